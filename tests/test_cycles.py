"""The TPU compiler's cycles, from texts as it writes them, shortened."""

import dataclasses
import json
import math

import pytest

from timesformer_jax import recipes
from timesformer_jax.distributed.hardware import CHIPS
from timesformer_jax.planning import cycles, hlo, make_plan
from timesformer_jax.planning.cycles import (
    BACKWARD,
    FORWARD,
    RECOMPUTED,
    KernelCall,
    Share,
    count_cycles,
    place,
)
from timesformer_jax.planning.kernels import kernel_of
from timesformer_jax.planning.report import as_json, as_text
from timesformer_jax.planning.schedule import Schedule, read_schedule

LAYERS = ("temporal", "spatial")

# libtpu 0.0.42.1 for v5e; layouts and most of each backend_config are left out.
STEP = """HloModule jit_train_step, is_scheduled=true

%fused_computation.1 (param_0.1: bf16[8,128]) -> f32[128,8] {
  %param_0.1 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %convert.1 = f32[8,128]{1,0:T(8,128)} convert(%param_0.1)
  ROOT %transpose.1 = f32[128,8]{1,0:T(8,128)} transpose(%convert.1), dimensions={1,0}
}

%fused_computation.2 (param_0.2: f32[128,8]) -> f32[128,8] {
  %param_0.2 = f32[128,8]{1,0:T(8,128)} parameter(0)
  ROOT %add.2 = f32[128,8]{1,0:T(8,128)} add(%param_0.2, %param_0.2)
}

%body (param.3: (s32[], f32[128,8])) -> (s32[], f32[128,8]) {
  %param.3 = (s32[]{:T(128)}, f32[128,8]{1,0:T(8,128)}) parameter(0)
  %gte.3 = f32[128,8]{1,0:T(8,128)} get-tuple-element(%param.3), index=1
  %fusion.3 = f32[128,8]{1,0:T(8,128)} fusion(%gte.3), kind=kLoop, \
calls=%fused_computation.2, METADATA
  ROOT %tuple.3 = (s32[]{:T(128)}, f32[128,8]{1,0:T(8,128)}) tuple(%gte.3, %fusion.3)
}

%condition (param.4: (s32[], f32[128,8])) -> pred[] {
  %constant.1272.clone.2 = s32[]{:T(128)} constant(12)
  %param.4 = (s32[]{:T(128)}, f32[128,8]{1,0:T(8,128)}) parameter(0)
  %get-tuple-element.4 = s32[]{:T(128)} get-tuple-element(%param.4), index=0
  ROOT %lt.247 = pred[]{:T(512)} compare(%get-tuple-element.4, %constant.1272.clone.2), direction=LT
}

ENTRY %main.5 (p.5: bf16[8,128]) -> f32[128,8] {
  %p.5 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %fusion.5 = f32[128,8]{1,0:T(8,128)} fusion(%p.5), kind=kLoop, calls=%fused_computation.1, \
metadata={op_name="jit(train_step)/jvp(temporal)/vmap(vmap())/concatenate"}, \
backend_config={"window_config":{"estimated_cycles":"5000"}}
  %tuple.5 = (s32[]{:T(128)}, f32[128,8]{1,0:T(8,128)}) tuple(%constant.5, %fusion.5)
  %while.5 = (s32[]{:T(128)}, f32[128,8]{1,0:T(8,128)}) while(%tuple.5), condition=%condition, \
body=%body, metadata={op_name="jit(train_step)/jvp()/while"}
  %all-reduce.5 = f32[128,8]{1,0:T(8,128)} all-reduce(%gte.5), replica_groups={}, to_apply=%add
  ROOT %divide.5 = f32[128,8]{1,0:T(8,128)} divide(%all-reduce.5, %all-reduce.5), \
metadata={op_name="jit(train_step)/optimizer/div"}, \
backend_config={"window_config":{"estimated_cycles":"1855"}}
}
""".replace(
    "METADATA",
    'metadata={op_name="jit(train_step)/transpose(jvp(mlp))/linear/add"}, '
    'backend_config={"window_config":{"estimated_cycles":"2000"}}',
)


def test_cycles_are_summed_by_part_and_pass_and_loops_count_as_often_as_they_run():
    found = count_cycles(STEP, CHIPS["v5e"], "v5e", LAYERS)
    assert found.of(part="temporal attention", direction=FORWARD, kind="copy") == 5000
    assert found.of(part="linear layers, GELU", direction=BACKWARD, kind="operation") == 12 * 2000
    assert found.of(part="optimizer") == 1855
    assert found.total == 5000 + 24000 + 1855
    assert found.seconds == found.total / CHIPS["v5e"].clock
    assert (found.kernels, found.known) == ([], True)


def test_an_estimate_below_zero_counts_as_none():
    # libtpu had one near 2^64 in a step of joint attention for a v5e:2x2.
    text = STEP.replace('"1855"', f'"{2**64 - 1}"')
    found = count_cycles(text, CHIPS["v5e"], "v5e", LAYERS)
    assert found.total == 5000 + 24000


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    found = count_cycles(STEP.replace("direction=LT", "direction=NE"), CHIPS["v5e"], "v5e", LAYERS)
    assert found.of(part="linear layers, GELU") == 2000
    assert not found.known


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jit(train_step)/jvp(temporal)/linear/linear/dot_general",
         ("linear layers, GELU", FORWARD)),
        ("jit(train_step)/jvp(spatial)/norm/reduce_sum", ("norms, residuals", FORWARD)),
        ("jit(train_step)/transpose(jvp(spatial))/transpose", ("spatial attention", BACKWARD)),
        ("jit(train_step)/jvp(spatial)/transpose", ("spatial attention", FORWARD)),
        ("jit(train_step)/jvp(temporal)/linear/residual/gather", ("norms, residuals", FORWARD)),
        ("jit(train_step)/transpose(jvp(jvp()))/checkpoint/rematted_computation/spatial/vmap()/sub",
         ("spatial attention", RECOMPUTED)),
        ("jit(train_step)/transpose(jvp(jvp()))/checkpoint/mlp/mul",
         ("linear layers, GELU", BACKWARD)),
        ("jit(step)/preprocessing/vmap()/sub", ("embedding, preprocessing", FORWARD)),
        ("jit(train_step)/jvp(spatial)/reshape;jit(train_step)/jvp(mlp)/squeeze",
         ("spatial attention", FORWARD)),
        ("state.params['blocks']['0']['mlp']['fc1']['kernel']", ("other", FORWARD)),
    ],
)  # fmt: skip
def test_the_innermost_scope_says_the_part(name, expected):
    instruction = hlo.Instruction("x", "f32[8]{0}", "fusion", f'%y), metadata={{op_name="{name}"}}')
    assert place(instruction, LAYERS) == expected


@pytest.mark.parametrize("opcode", ["all-reduce", "all-gather-start", "collective-permute-done"])
def test_collectives_are_a_part_of_their_own(opcode):
    rest = '%y), metadata={op_name="jit(train_step)/transpose(jvp(mlp))/linear/dot_general"}'
    instruction = hlo.Instruction("x", "f32[8]{0}", opcode, rest)
    assert place(instruction, LAYERS) == ("collectives", BACKWARD)


KERNEL = (
    "%k.6 = (bf16[16,256,256]{2,1,0:T(8,128)(2,1)S(1)}, f32[8]{0:T(128)}) "
    'custom-call(%b.1, %copy-done), custom_call_target="tpu_custom_call", '
    "operand_layout_constraints={bf16[16,256,256]{2,1,0}, f32[8]{0}}, "
    "output_to_operand_aliasing={{1}: (1, {})}, frontend_attributes={kernel_metadata={}}, "
    'metadata={op_name="jit(step)/transpose(jvp(spatial))/my_kernel/pallas_call"}, '
    'backend_config={"flag_configs":[],"scoped_memory_configs":[],'
    '"custom_call_config":{"body":"TUzvUgFN","serialization_format":"1"},"retry_config":{}}'
)
# The kernel's program has two instructions; the second reads the result of the first.
WITH_KERNELS = (
    f"HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {{\n  {KERNEL}\n"
    f"  ROOT {KERNEL.replace('%k.6', '%k.7')}\n}}\n"
)


def test_a_kernel_is_read_from_the_text():
    (kernel, again) = (kernel_of(one.instruction) for one in hlo.executed(hlo.parse(WITH_KERNELS)))
    assert kernel == again
    assert kernel.operands == "bf16[16,256,256], f32[8]"
    assert hlo.arrays(kernel.results) == [("bf16", (16, 256, 256)), ("f32", (8,))]
    assert kernel.aliases == ((1, 1),)
    assert kernel.num_bytes == 2 * (2 * 16 * 256 * 256 + 4 * 8)
    assert '"body": "TUzvUgFN"' in kernel.config
    assert "retry" not in kernel.config


@pytest.mark.parametrize(
    ("schedule", "each", "bound_by"),
    [
        (Schedule(309, 14157), 14157, "schedule"),
        (Schedule(309, 309), 4194368 / 819e9 * 1.503e9, "memory"),
        (None, 4194368 / 819e9 * 1.503e9, "memory"),
    ],
)
def test_a_kernel_takes_its_schedule_or_its_bytes(monkeypatch, schedule, each, bound_by):
    monkeypatch.setattr(cycles, "compile_kernels", lambda kernels, chip: [schedule] * len(kernels))
    found = count_cycles(WITH_KERNELS, CHIPS["v5e"], "v5e", LAYERS)
    (kernel,) = found.kernels
    assert (kernel.name, kernel.calls, kernel.bound_by) == ("my_kernel", 2, bound_by)
    assert kernel.cycles == round(each)
    assert found.total == 2 * kernel.cycles
    assert found.of(part="spatial attention", direction=BACKWARD, kind="kernel") == found.total


# A grid of 16 steps; in each a loop of 5, and in that one of 4; a branch over what pl.when skips.
BUNDLES = """= control target key start
LH: loop header
LB: loop body
= control target key end

     0   :  { %7 = vsyncpa [#allocation3], 0  ;;  %s4245_s9 = smov 0 /* copy for cssa */ }
   0x7 LB: > { %s4266_s13 = sadd.s32 4294967295, %s3704_s12 /* iteration index, stage = 1 */  ;;  \
%s1669_s14 = sadd.s32 4294967294, %s3704_s12 /* iteration index, stage = 2 */ } \
/* Start region 132 :: Start region 13 */
   0x8   : > { %s4270_s15 = sadd.s32 1, %s3704_s12 /* copy for cssa */ }
  0x2c   : > { %99 = sbr.rel (!%p44_p3) target = $region20 }
  0x2d   :  {} /* Start/End empty region 20 */
  0x4e LB: >> { %v6236_v55 = vld [vmem:[#allocation11_spill] sm:$0xff] } /* Start region 121 */
  0x55 LB: >>> { %s1682_s8 = sshll.u32 %s4224_s28, 6  ;;  %s282_s19 = sadd.s32 2, %s4224_s28 } \
/* Start region 110 */
  0x59   : >>> { %p5368_p6 = scmp.ge.s32.totalorder %s282_s19, 8 /* loop exit test */ }
  0x5a   : >>> { %s212_s3 = sadd.s32 (%p5368_p6), 1, %s3964_s20 /* copy for cssa */ }
  0x5b   : >> { %p5765_p12 = scmp.ge.s32.totalorder (%p5368_p6), %s212_s3, 5 }
 0x10f   : >>> { %167 = sbr.rel (!%p5368_p6) target = $region110 }
 0x110   :  {}
 0x111   :  {}
 0x112   : >> { %v768_v60 = vmul.f32 (%p5368_p6), 0.1, %v6457_v59 }
 0x113   :  {} /* End region 110 */
 0x163   : >> { %211 = sbr.rel (!%p5765_p12) target = $region121 }
 0x164   :  {}
 0x165   :  {}
 0x166   :  {}
 0x167   :  {} /* End region 121 */
0x11cd   : > { %p18_p2 = scmp.ge.s32.totalorder %s4270_s15, 18 /* loop exit test */ }
0x11ce   :  { %20 = sbr.rel (!%p18_p2) target = $region132 }
0x11cf   :  {}
0x11d0   :  {}
0x11d1   : > { %s2262_s14 = smov %s2255_s28 }
0x11d2   :  {} /* End region 132 */
0x11d3   :  { %1196 = vsyncpa [#allocation3], 1 }
base_bounds: (16, 32, 2)
hlo: k.1
 */ }
"""


def test_bundles_count_as_often_as_the_loops_around_them_run():
    inner, middle, outer, outside = 9, 1 + 5, 4 + 6, 2
    cycles_of = outside + 16 * (outer + 5 * (middle + 4 * inner))
    assert read_schedule(BUNDLES) == Schedule(inner + middle + outer + outside, cycles_of)


def test_a_loop_whose_length_is_loaded_is_unknown():
    found = read_schedule(BUNDLES.replace("%s282_s19, 8", "%s282_s19, %s99_s1"))
    assert found.cycles == 2 + 16 * (10 + 5 * (6 + 9))
    assert not found.known


# min(272, 799 - 272 i) / 16, where i is the step along the second axis of the grid.
LENGTH = """  0x54   : >> { %s5151_s12 = sphi %s5230_s12, %s8755_s12 /* iter bound = 1 */  ;;  \
%s5230_s12 = smov 0 /* copy for cssa */  ;;  %s592_s3 = smul.u32 272, %s5151_s12 }
  0x54   : >> { %s593_s16 = ssub.s32 (!%p1_p0), 799, %s592_s3  ;;  \
%p594_p0 = scmp.lt.s32.totalorder (%p5265_p4), %s593_s16, 272 }
  0x54   : >> { %s8768_s16 = smov (!%p594_p0, %s593_s16), 272  ;;  \
%p4362_p1 = scmp.lt.s32.totalorder %s593_s16, 0 }
  0x54   : >> { %s599_s7 = sshrl.u32 %s8768_s16, 4  ;;  %s600_s18 = ssub.s32 0, %s599_s7 }
  0x54   : >> { %s8772_s18 = scalar_select /*predicate=*/%p4362_p1, /*on_true=*/%s600_s18, \
/*on_false=*/%s599_s7 }
"""


@pytest.mark.parametrize(("first", "length"), [(799, 17), (271, 16)])
def test_a_loop_whose_length_depends_on_the_step_counts_as_in_the_first(first, length):
    ends = BUNDLES.replace("%s282_s19, 8", "%s282_s19, %s8772_s18").replace(
        "sadd.s32 2", "sadd.s32 1"
    )
    before, at, after = ends.partition("  0x55 LB: >>>")
    found = read_schedule(before + LENGTH.replace("799", str(first)) + at + after)
    assert found.cycles == 2 + 16 * (10 + 5 * (6 + 5 + length * 9))
    assert (found.varies, found.known) == (True, True)


def test_a_text_without_bundles_is_refused():
    with pytest.raises(ValueError, match="no bundles"):
        read_schedule("LB: loop body\n")


@pytest.fixture(scope="module")
def reported():
    """A plan with the cycles of `STEP` and a kernel, whichever its own program is."""
    found = make_plan(recipes.demo(), "h100:8")
    step = count_cycles(STEP, CHIPS["v5e"], "v5e", LAYERS)
    call = KernelCall(
        "my_kernel",
        "spatial attention",
        BACKWARD,
        2,
        Schedule(9, 3000, known=False),
        3000,
        "schedule",
    )
    share = Share("spatial attention", BACKWARD, "kernel", 6000)
    step = step._replace(shares=[*step.shares, share], kernels=[call], known=False)
    return dataclasses.replace(found, cycles=step)


def test_the_report_has_a_row_for_each_part_and_what_follows(reported):
    text, total = as_text(reported), 5000 + 24000 + 1855 + 6000
    rows = {line[:30].strip(): line[30:].split() for line in text.splitlines()}
    assert rows["the TPU compiler's cycles, M"] == [
        "forward",
        "backward",
        "total",
        "share",
        "copies",
    ]
    assert rows["temporal attention"] == ["0.01", "0.00", "0.01", f"{5000 / total:.1%}", "0.01"]
    assert rows["my_kernel, backward"] == ["2", "0.003", "0.01", "schedule"]
    assert "norms, residuals" not in rows  # it has no cycles
    seconds = total / CHIPS["v5e"].clock
    assert f"at 1.50 GHz {seconds * 1e3:.1f} ms a step" in text
    assert f"{32 / seconds:.1f} clips/s, MFU {reported.cycles_mfu:.1%}" in text
    assert reported.cycles_mfu == reported.counted.roofline.compute / seconds
    assert "cycles: a loop of unknown length counts as one iteration" in text
    assert "kernel my_kernel: a loop of unknown length counts as one iteration" in text


def test_the_report_as_json_has_every_share(reported):
    written = json.loads(json.dumps(as_json(reported)))["cycles"]
    assert written["total"] == sum(share["cycles"] for share in written["parts"])
    assert written["clips_per_second"] == pytest.approx(32 / written["step_seconds"])
    (kernel,) = written["kernels"]
    assert kernel["schedule"] == {
        "bundles": 9, "cycles": 3000, "varies": False, "known": False
    }  # fmt: skip


def test_the_clock_is_that_of_the_matrix_units():
    for name, units in {"v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}.items():
        chip = CHIPS[name]
        assert math.isclose(chip.bfloat16 / (2 * units), chip.clock, rel_tol=1e-3)
