"""Counts the bytes that programs read and write in the memory of an H100, without an H100.

    pip install 'jax[cuda13]'; python experiments/kernel_traffic.py [--batch=64]

Prints two tables: the attentions of one layer, and whole programs of inference and training. The
programs are compiled ahead of time for the description of an H100 below. The bytes that every
instruction reads and writes are added; if a fusion only reads slices of an operand, the slices are
counted. These bytes over the bandwidth of the data sheet predict a time, for memory alone. Nothing
is run. On a GPU XLA tunes its matrix products and may choose others.
docs/kernels.md and docs/optimisation.md have the tables.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Callable

os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # there is no driver

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax.experimental import topologies

from timesformer_jax.benchmark import model
from timesformer_jax.distributed.hardware import CHIPS
from timesformer_jax.distributed.mesh import make_mesh
from timesformer_jax.models.attention import Tokens, over_space, over_time
from timesformer_jax.models.ops.kernels import select
from timesformer_jax.models.presets import preset

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 15 patch: 1 }
runtime_version { major: 13 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800 memory_bandwidth: 3352320000000 device_memory_size: 84929347584
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
"""
FRAMES, GRID, HEADS, CHANNELS = 8, (14, 14), 12, 64  # base at 8 x 224

BATCH = flags.DEFINE_integer("batch", 64, "clips", lower_bound=1)


def with_gradient(attention: Callable[[Tokens], Tokens]) -> Callable:
    """A function that computes values and gradient, as a training step does."""

    def run(qkv: Tokens, g: Tokens) -> tuple[Tokens, Tokens]:
        out, backward = jax.vjp(attention, qkv)
        return out, *backward(g)

    return run


def tokens(kind: str, batch: int, features: tuple[int, ...], place: jax.NamedSharding) -> Tokens:
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*shape, *features), jnp.bfloat16, sharding=place)

    cls = array(batch, FRAMES) if kind == "spatial" else None
    return Tokens(cls, array(batch, FRAMES, GRID[0] * GRID[1]))


def traffic(text: str) -> int:
    """Bytes that the instructions of the entry of a compiled program read and write."""
    computations = {name: body for _, name, body in _COMPUTATION.findall(text)}
    entry = next(body for word, _, body in _COMPUTATION.findall(text) if word)
    shapes, total = {}, 0
    for name, shape, opcode, rest in _INSTRUCTION.findall(entry):
        shapes[name] = shape
        if opcode in ("parameter", "constant", "bitcast", "tuple", "get-tuple-element"):
            continue
        called = re.search(r"calls=%?([\w.-]+)", rest)
        sliced = _sliced(computations[called[1]]) if called else {}
        operands = re.findall(r"%([\w.-]+)", rest.split(")")[0])
        total += _bytes(shape)
        total += sum(sliced.get(i, _bytes(shapes[name])) for i, name in enumerate(operands))
    return total


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*?\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$", re.MULTILINE)


def _sliced(computation: str) -> dict[int, int]:
    """Bytes that a fusion reads of those parameters that it only slices."""
    found = _INSTRUCTION.findall(computation)
    read = {}
    for name, _, opcode, rest in found:
        if opcode == "parameter":
            users = [i for i in found if re.search(rf"%{re.escape(name)}[,)]", i[3])]
            if users and all(user[2] == "slice" for user in users):
                read[int(rest.split(")")[0])] = sum(_bytes(user[1]) for user in users)
    return read


def _bytes(shape: str) -> int:
    arrays = re.findall(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]", shape)
    return sum(
        int(bits or 8) // 8 * int(np.prod([int(n) for n in sizes.split(",") if n]))
        for _, bits, sizes in arrays
    )


def main(_: list[str]) -> None:
    target = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    attentions(jax.NamedSharding(jax.sharding.Mesh(target.devices, "x"), jax.P()))
    print()
    programs(make_mesh(devices=target.devices))


def attentions(place: jax.NamedSharding) -> None:
    """Prints the table of the attentions of one layer."""
    print("| attention | by | forward, MB | ms | and gradient, MB | ms |")
    print("|---|---|---|---|---|---|")
    for kind, attention in (("temporal", over_time), ("spatial", over_space)):
        # hopper_2 and hopper_3 move what hopper does
        for name in ("xla", *sorted({"cudnn", "hopper"} & {*select.KERNELS[kind]})):
            select.select_implementation = lambda _, name=name: name
            run = functools.partial(attention, grid=GRID)
            qkv = tokens(kind, BATCH.value, (3, HEADS, CHANNELS), place)
            g = tokens(kind, BATCH.value, (HEADS * CHANNELS,), place)
            cells = [kind, name]
            for function, inputs in ((run, (qkv,)), (with_gradient(run), (qkv, g))):
                moved = traffic(jax.jit(function).lower(*inputs).compile().as_text())
                cells += [f"{moved / 1e6:.0f}", f"{moved / CHIPS['h100'].memory_rate * 1e3:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


def programs(mesh: jax.sharding.Mesh) -> None:
    """Prints the table of inference and training. One layer is the difference of three and two."""
    fastest = {"temporal": "hopper", "spatial": "cudnn"}
    print("| workload | attention | a layer, GB | 12 layers, GB | ms |")
    print("|---|---|---|---|---|")
    for workload, (name, implementation) in itertools.product(
        model.PROGRAMS,
        {"xla": lambda _: "xla", "kernels": lambda case: fastest[case.kind]}.items(),
    ):
        select.select_implementation = implementation
        two, three = (whole(workload, depth, mesh) for depth in (2, 3))
        twelve = two + 10 * (three - two)
        cells = [workload, name, f"{(three - two) / 1e9:.1f}", f"{twelve / 1e9:.0f}"]
        cells.append(f"{twelve / CHIPS['h100'].memory_rate * 1e3:.0f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def whole(workload: str, depth: int, mesh: jax.sharding.Mesh) -> int:
    """Bytes of a program of `benchmark model`: the base model with this number of layers."""
    config = preset("timesformer_base", dtype="bfloat16", depth=depth)
    program = model.PROGRAMS[workload](config, BATCH.value, mesh)
    return traffic(program.lower().compile().as_text())


if __name__ == "__main__":
    app.run(main)
