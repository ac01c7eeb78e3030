"""Programs compiled for TPUs that are not there: what they cost, in the compiler's own cycles.

`make tpu-test` runs these in an environment with the TPU compiler, without the other tests' needs.
Each plan is made in a process of its own, without the flags that the tests give to XLA.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.compiles,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs the TPU compiler: make tpu-test, or pip install '.[tpu]'",
    ),
]

REPOSITORY = pathlib.Path(__file__).parents[1]

# Two blocks of the base model at a sixth of its width, in bfloat16, 16 clips on one chip.
SMALL = {
    "model.depth": 2,
    "model.hidden_size": 128,
    "model.num_heads": 2,
    "model.dtype": "bfloat16",
    "batch_size": 16,
    "eval.crops": 1,
}
# M cycles of a step: all of them, and the copies. A tenth more than measured when they were set, by
# libtpu 0.0.42.1. What takes more brings back an array that is laid anew, or a pass over it.
CEILINGS: dict[tuple[str, str], tuple[float, float]] = {}


@pytest.fixture
def plan(tmp_path):
    """The plan of a topology as JSON."""

    def run(topology, *flags, check=True, **changes):
        out = tmp_path / "plan.json"
        done = subprocess.run(
            [
                sys.executable, "-m", "timesformer_jax.cli", "plan", f"--json={out}",
                f"--config={REPOSITORY}/configs/k400_base.py", f"--topology={topology}", *flags,
                *(f"--config.{name}={value}" for name, value in changes.items()),
            ],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        if not check:
            return done
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text())

    return run


@pytest.mark.parametrize("work", ["training", "inference"])
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1"])
def test_a_step_takes_no_more_cycles_than_it_did(plan, topology, work):
    found = plan(topology, f"--work={work}", **SMALL)["cycles"]
    of = {kind: 0.0 for kind in ("kernel", "copy", "operation")}
    for share in found["parts"]:
        of[share["kind"]] += share["cycles"] / 1e6
    most, most_copies = CEILINGS[topology.partition(":")[0], work]
    assert found["total"] / 1e6 <= most, of
    assert of["copy"] <= most_copies, of
    assert all(k["schedule"] and k["schedule"]["known"] for k in found["kernels"])


def test_loops_count_as_often_as_they_run(plan):
    # The last block of an unrolled model computes less: no output depends on its patches' MLP.
    fields = SMALL | {"model.depth": 4, "batch_size": 1}
    unrolled, scanned = (
        plan("v5e:1x1", "--quick", **fields, **{"model.scan_layers": scan})["cycles"]
        for scan in (False, True)
    )
    assert scanned["loops_known"]
    assert scanned["total"] == pytest.approx(unrolled["total"], rel=0.4)


def test_a_program_sums_every_gradient_once(plan):
    found = plan("v5e:2x2", "--quick", **SMALL)
    summed = sum(c["num_bytes"] * c["count"] for c in found["compiled"]["collectives"])
    assert summed == pytest.approx(4 * found["parameters"], rel=0.01)
    assert found["fits"]
    assert 0 < found["mfu"] < 1


def test_base_on_four_chips(plan):
    found = plan("v5e:2x2", "--quick", batch_size=16)
    assert found["fits"]
    assert found["compiled"]["memory_bytes"]["parameters"] == 4 * 121_566_352
    ratio = found["compiled"]["flops"] / found["counted"]["flops"]
    assert ratio == pytest.approx(1, abs=0.1)


def test_a_slice_that_does_not_exist_is_one_line(plan):
    done = plan("v5e:3x4", check=False)
    assert done.returncode != 0
    assert "knows no --topology=v5e:3x4" in done.stderr.splitlines()[-1]
