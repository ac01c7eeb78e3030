"""The Pallas kernels of a program that was compiled for TPUs, and the cycles of each.

The compiler gives no estimate for a kernel. But it can write a kernel's schedule, if it is told so
before it is loaded, and then does for every operation that it compiles. So a process of its own
compiles each distinct kernel alone, from its serialised code in the program's text.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from timesformer_jax.planning.hlo import Instruction, arrays, num_bytes
from timesformer_jax.planning.schedule import Schedule, read_schedule
from timesformer_jax.planning.topology import open_topology

_GIVEN = ("custom_call_config", "scoped_memory_configs")  # what Pallas writes, of a call's config


class Kernel(NamedTuple):
    """A Pallas kernel as a compiled program calls it; equal ones have the same cycles.

    Attributes:
      operands, results: shapes, as HLO writes them.
      aliases: (operand, result) pairs that share memory.
      config: JSON: the serialised code and its options.
    """

    operands: str
    results: str
    aliases: tuple[tuple[int, int], ...]
    config: str

    @property
    def num_bytes(self) -> int:
        """The bytes of the operands and results."""
        return num_bytes(self.operands) + num_bytes(self.results)


def kernel_of(instruction: Instruction) -> Kernel | None:
    """The kernel that an instruction calls; None if it calls none."""
    if 'custom_call_target="tpu_custom_call"' not in instruction.rest:
        return None
    _, _, config = instruction.rest.partition("backend_config=")
    written = json.JSONDecoder().raw_decode(config)[0]
    given = {k: v for k, v in written.items() if k in _GIVEN}
    operands = re.search(r"operand_layout_constraints=\{(.*?)\}(?:, \w+=|$)", instruction.rest)
    aliasing = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.rest)
    pairs = re.findall(r"\{(\d*)\}: \((\d+), ", aliasing[1] if aliasing else "")
    return Kernel(
        re.sub(r"\{[^}]*\}", "", operands[1]) if operands else "",
        re.sub(r"\{[^}]*\}", "", instruction.shape),
        tuple((int(operand), int(result or 0)) for result, operand in pairs),
        json.dumps(given, sort_keys=True),
    )


def compile_kernels(kernels: list[Kernel], chip: str) -> list[Schedule | None]:
    """Compiles each kernel alone and reads its schedule; None for one that cannot be compiled so.

    Args:
      kernels: what to compile; each takes seconds.
      chip: "v5e", "v5p" or "v6e".
    """
    if not kernels:
        return []
    with tempfile.TemporaryDirectory(prefix="kernels") as folder:
        dump = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*"  # of 70 files an operation
        )
        flags = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {dump}".strip()
        done = subprocess.run(
            [sys.executable, "-c", f"from {__name__} import main; main()", chip, folder],
            input=json.dumps(kernels),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            # A program from a cache would not be dumped.
            env=os.environ
            | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
            | {"JAX_ENABLE_COMPILATION_CACHE": "false"},
        )
    return [found and Schedule(*found) for found in json.loads(done.stdout)]


def _compile_one(kernel: Kernel, device: jax.Device, folder: pathlib.Path) -> Schedule | None:
    for file in folder.iterdir():
        file.unlink()
    mesh = Mesh(np.array([device]), ("one",))
    place = NamedSharding(mesh, P())
    operands = [jax.ShapeDtypeStruct(*a, sharding=place) for a in _arrays(kernel.operands)]
    results = [jax.ShapeDtypeStruct(*a) for a in _arrays(kernel.results)]
    call = jax.ffi.ffi_call(
        "tpu_custom_call",
        results,
        custom_call_api_version=1,  # whose config is a text
        legacy_backend_config=kernel.config,
        input_output_aliases=dict(kernel.aliases),
    )
    try:
        with jax.set_mesh(mesh):
            jax.jit(lambda *operands: call(*operands)).lower(*operands).compile()
    except jax.errors.JaxRuntimeError as e:
        print(f"a kernel that cannot be compiled alone: {e}", file=sys.stderr)
        return None
    (text,) = (
        file
        for file in folder.glob("*-ffi_call*-final_bundles.txt")
        if "schedule-analysis" not in file.name
    )
    return read_schedule(text.read_text())


def _arrays(shapes: str) -> list[tuple[tuple[int, ...], Any]]:
    """The shape and dtype of each array."""
    return [(sizes, _dtype(name)) for name, sizes in arrays(shapes)]


def _dtype(name: str) -> Any:
    """The dtype that HLO calls pred, s32, u8, bf16, f32, f8e4m3fn, ..."""
    kind, digits = re.fullmatch(r"([a-z]+)(\w*)", name).groups()  # type: ignore[union-attr]
    names = {"pred": "bool", "s": "int", "u": "uint", "bf": "bfloat", "f": "float", "c": "complex"}
    separator = "_" if "e" in digits else ""
    before, _, after = digits.partition("e")
    return jax.numpy.dtype(names[kind] + (f"{before}{separator}e{after}" if after else digits))


def main() -> None:
    """The process of `compile_kernels`: kernels from standard input, schedules to its output."""
    chip, folder = sys.argv[1:]
    sides = "1x1x1" if chip == "v5p" else "1x1"
    (device,) = open_topology(f"{chip}:{sides}").devices
    kernels = [Kernel(*fields) for fields in json.load(sys.stdin)]
    print(json.dumps([_compile_one(kernel, device, pathlib.Path(folder)) for kernel in kernels]))
