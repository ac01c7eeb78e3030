"""One ONNX file, by jax2onnx; its card is in the file and, for a browser, beside it."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import pkgutil
from collections.abc import Iterator

import jax
from jax.extend.core import jaxpr_as_fun

from timesformer_jax.errors import InputError, install
from timesformer_jax.export.program import VIDEO, Program, size_of
from timesformer_jax.models.ops.kernels import select

# The version of the operators, which onnxruntime since 1.20 and onnxruntime-web support.
OPSET = 21

# The limit of a file of protocol buffers, less some room for the graph.
MAX_BYTES = 2**31 - 2**24


def write(path: str, program: Program) -> None:
    """Writes the file.

    Raises:
      InputError: if jax2onnx is not installed, or the model is larger than a file of ONNX can be.
    """
    if size_of(program.parameters) > MAX_BYTES:
        raise InputError("the model has more than 2 GiB, which one ONNX file cannot hold: use "
                         "--to=stablehlo or saved_model")  # fmt: skip
    try:
        import jax2onnx
    except ImportError as error:
        raise InputError(f"--to=onnx needs jax2onnx: {install('export')}") from error

    def run(video: jax.Array) -> jax.Array:
        return program.run(program.parameters, video)

    # Traced here and not by jax2onnx, which replaces functions of JAX by operators of its own while
    # it traces; some of these do not support vmap. Without nested jitted functions, which jax2onnx
    # cannot rewrite with JAX 0.11.
    with select.attention_kernels("xla"), jax.disable_jit():
        traced = jax.make_jaxpr(run)(program.symbolic_input())
    with _plugins_of_primitives():
        model = jax2onnx.to_onnx(
            jaxpr_as_fun(traced),
            inputs=[program.symbolic_input()],
            model_name="timesformer",
            opset=OPSET,
            input_names=[VIDEO],
            output_names=[program.output],
        )
    model.producer_name = "timesformer_jax"
    for name, value in program.card.items():
        text = value if isinstance(value, str) else json.dumps(value)
        model.metadata_props.add(key=name, value=text)
    with open(path, "wb") as file:
        file.write(model.SerializeToString())


@contextlib.contextmanager
def _plugins_of_primitives() -> Iterator[None]:
    """Imports the plugins for JAX's primitives only, not those for examples and other libraries.

    All of them take nine seconds of a core. A later jax2onnx without this flag imports all.
    """
    from jax2onnx.plugins import plugin_system
    from jax2onnx.plugins.jax import core, lax

    flag = "_already_imported_plugins"
    before = getattr(plugin_system, flag, False)
    if not before:
        for package in (core, lax):
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{package.__name__}.{module.name}")
    setattr(plugin_system, flag, True)
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of unknown shapes
    try:
        yield
    finally:
        setattr(plugin_system, flag, before)
