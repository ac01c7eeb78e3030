"""A SavedModel of TensorFlow, in the layout of TensorFlow Serving."""

from __future__ import annotations

import json
import os
import tempfile

import jax
import numpy as np
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo as dialect
from jax.extend.mlir.passmanager import PassManager

from timesformer_jax.errors import InputError, install
from timesformer_jax.export import stablehlo
from timesformer_jax.export.program import VIDEO, Program
from timesformer_jax.tensorflow_messages import hide_tensorflow_messages

# TensorFlow is built with an older StableHLO than JAX, and reads no operation that is newer. The
# version of TensorFlow 2.21 is 1.13; nothing in the programs is younger than this one.
STABLEHLO_VERSION = "1.9.0"

SIGNATURE = "serving_default"


def write(path: str, program: Program) -> None:
    """Writes PATH/1: the model as its first version.

    Raises:
      InputError: if TensorFlow is not installed, or is too old for this JAX.
    """
    try:
        with hide_tensorflow_messages():
            import tensorflow as tf
            from tensorflow.compiler.tf2xla.python import xla
    except ImportError as error:
        raise InputError(f"--to=saved_model needs TensorFlow: {install('export')}") from error
    exported = stablehlo.exported(program)
    newest = xla.call_module_maximum_supported_version()
    if exported.calling_convention_version > newest:
        raise InputError(
            f"this JAX writes calling convention {exported.calling_convention_version}, TensorFlow "
            f"{tf.__version__} reads {newest} at most: upgrade TensorFlow, or use --to=stablehlo"
        )
    module, (output,) = _portable(exported), exported.out_avals

    def call(variables: list, video: tf.Tensor) -> tf.Tensor:
        arguments = [*variables, video]
        found = xla.call_module(
            [arguments[i] for i in exported.module_kept_var_idx],
            version=exported.calling_convention_version,
            module=module,
            Tout=(tf.float32,),
            Sout=((None, output.shape[1]),),
            platforms=tuple(name.upper() for name in exported.platforms),
            disabled_checks=(),
            use_shardy_partitioner=True,
        )
        return {program.output: found[0]}

    served = tf.Module()
    served.arrays = {
        name: tf.Variable(np.asarray(x), trainable=False, name=name.replace("/", "_"))
        for name, x in program.parameters.items()
    }
    variables = [served.arrays[name] for name in sorted(program.parameters)]  # as JAX orders a dict
    shape = [size if isinstance(size, int) else None for size in program.shape]
    spec = tf.TensorSpec(shape, program.dtype, name=VIDEO)
    served.classify = tf.function(
        lambda video: call(variables, video), input_signature=[spec], autograph=False
    )
    with tempfile.TemporaryDirectory() as folder:
        served.card = tf.saved_model.Asset(_text(folder, "card.json", program.card))
        served.labels = tf.saved_model.Asset(_text(folder, "labels.txt", program.card["labels"]))
        tf.saved_model.save(
            served, os.path.join(path, "1"), signatures={SIGNATURE: served.classify}
        )


def _portable(exported: jax.export.Exported) -> bytes:
    """The module, serialized so that TensorFlow's older StableHLO reads it.

    JAX writes erf as a composite operation, which TensorFlow does not know: its parts are called.
    """
    dialect.register_stablehlo_passes()
    with ir.Context() as context:
        module = dialect.deserialize_portable_artifact(context, exported.mlir_module_serialized)
        PassManager.parse("builtin.module(func.func(stablehlo-legalize-composite-to-call))").run(
            module.operation
        )
        return dialect.serialize_portable_artifact(module, STABLEHLO_VERSION)


def _text(folder: str, name: str, content: dict | list) -> str:
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        if isinstance(content, dict):
            json.dump(content, file, indent=2)
        else:
            file.writelines(f"{line}\n" for line in content)
    return path
