"""Which implementation an attention gets, and what it is given: in every scheme, on a mesh."""

import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from meshes import mesh_of

from timesformer_jax.models import attention
from timesformer_jax.models.config import TimeSformerConfig
from timesformer_jax.models.ops import kernels
from timesformer_jax.models.ops.kernels import (
    cudnn,
    registry,
    select,
    tpu_spatial,
    tpu_temporal,
)
from timesformer_jax.models.ops.kernels.registry import Case, Kernel
from timesformer_jax.models.ops.reference import use_references
from timesformer_jax.models.schemes import SCHEMES, by_column, by_row
from timesformer_jax.models.timesformer import TimeSformer, abstract
from timesformer_jax.models.tokens import Tokens
from timesformer_jax.planning.collectives import collectives

pytestmark = pytest.mark.compiles

H100, V5E = "NVIDIA H100 80GB HBM3", "TPU v5 lite"
BASE = Case("temporal", (64, 8, 196, 3, 12, 64), "bfloat16", False, (14, 14))
OVER = {
    "temporal": attention.over_time,
    "spatial": attention.over_space,
    "joint": attention.over_space_time,
    "rows": attention.over_width,
    "columns": attention.over_height,
}
SMALL = TimeSformerConfig(
    num_classes=5, image_size=32, num_frames=8, hidden_size=64, depth=2, num_heads=2,
    init="width_scaled", drop_path=0.0,
)  # fmt: skip


def random(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 1.5, shape), dtype)


@contextlib.contextmanager
def program_for(device_kind, axes=(1, 1, 1, 1)):
    platform = "tpu" if device_kind.startswith("TPU") else "gpu"
    device = AbstractDevice(device_kind=device_kind, num_cores=None, platform=platform)
    names = ("data", "fsdp", "tensor", "sequence")
    mesh = AbstractMesh(axes, names, (AxisType.Auto,) * 4, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


def logits(model, video):
    """Traced anew at each call: the kernels are chosen while a program is traced."""
    return jax.jit(lambda video: model(video))(video)


def sequence_numbers(kind, t, n, grid):
    """The number of each patch's sequence, (T, N), by the definition of the kind."""
    if kind in ("rows", "columns"):
        return (by_row if kind == "rows" else by_column)(t, grid)
    frame, position = np.indices((t, n))
    return {"temporal": position, "spatial": frame, "joint": 0 * frame}[kind]


def masked(qkv, numbers):
    """Attention among all tokens, of which those of other sequences are masked."""
    b, t, n, _, h, d = qkv.patches.shape
    numbers = np.asarray(numbers).reshape(-1)
    tokens = qkv.patches.reshape(b, t * n, 3, h, d)
    first = 0 if qkv.cls is None else qkv.cls.shape[1]
    if first:
        tokens = jnp.concatenate([qkv.cls, tokens], axis=1)
        numbers = np.concatenate([np.arange(first), numbers])
    q, k, v = (tokens[:, :, i] for i in range(3))
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(d)
    logits = jnp.where(numbers[:, None] == numbers, logits, -jnp.inf)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), v).reshape(b, -1, h * d)
    return Tokens(out[:, :first] if first else None, out[:, first:].reshape(b, t, n, h * d))


def plain(kind, qkv, grid):
    return masked(qkv, sequence_numbers(kind, *qkv.patches.shape[1:3], grid))


def projections(kind, cls=True, shape=(2, 3, 6, 3, 2, 8), grid=(2, 3)):
    sequences = int(np.max(sequence_numbers(kind, *shape[1:3], grid))) + 1
    token = random((shape[0], sequences, *shape[3:]), seed=1) if cls else None
    return Tokens(token, random(shape))


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("kind", OVER)
def test_every_kind_is_the_attention_of_its_sequences(kind, cls):
    qkv = projections(kind, cls)
    found, expected = OVER[kind](qkv, (2, 3)), plain(kind, qkv, (2, 3))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)


# ---- the choice ---------------------------------------------------------------------------------


@pytest.fixture
def tpu_kernels(monkeypatch):
    """Stand-ins for the TPU kernels that run here; yields what they are called with."""
    called = []

    def side_by_side(patches, cls, heads):
        split = lambda x: x.reshape(*x.shape[:-1], 3, heads, -1)  # noqa: E731
        return Tokens(None if cls is None else split(cls), split(patches))

    def temporal(patches, cls, heads, interpret=False):
        called.append(("temporal", patches.shape, None if cls is None else cls.shape))
        found = plain("temporal", side_by_side(patches, cls, heads), None)
        return found.patches, found.cls

    def spatial(patches, cls, heads, frames=1, sequences=None, interpret=False):
        _, t, n, _ = patches.shape
        called.append(("spatial", patches.shape, None if cls is None else cls.shape))
        within = np.zeros(n, int) if sequences is None else np.asarray(sequences)
        of_frames = np.arange(t // frames).repeat(frames)[:, None] * (within.max() + 1)
        found = masked(side_by_side(patches, cls, heads), of_frames + within)
        return found.patches, found.cls

    def unsupported(shape, dtype, *frames_and_sequences, **options):
        return "too many frames" if shape[1] > 64 else None

    for name, function in (("tpu_temporal", temporal), ("tpu_spatial", spatial)):
        module = types.SimpleNamespace(attention=function, unsupported=unsupported)
        monkeypatch.setattr(kernels, name, module, raising=False)
    return called


@pytest.mark.usefixtures("tpu_kernels")
def test_a_tpu_gets_its_kernel_wherever_that_supports_the_case():
    longer = BASE._replace(shape=(1, 96, *BASE.shape[2:]))
    for kind in registry.KERNELS:
        with program_for(V5E):
            assert select.select_implementation(BASE._replace(kind=kind)) == "pallas"
            assert select.select_implementation(longer._replace(kind=kind)) == "xla"
        with program_for(H100):
            assert select.select_implementation(BASE._replace(kind=kind)) == "xla"
        assert select.select_implementation(BASE._replace(kind=kind)) == "xla"  # this machine


def test_why_an_implementation_cannot_run_is_said():
    assert select.unsupported(BASE, "xla") is None
    assert "it is not for 'cpu'" in select.unsupported(BASE, "hopper")
    assert "no temporal attention" in select.unsupported(BASE, "flash")
    with program_for(H100):
        assert select.unsupported(BASE, "hopper") is None
        assert "9 frames" in select.unsupported(BASE._replace(cls=True), "hopper")
        assert "it is not for" in select.unsupported(BASE, "pallas")
    with program_for("Tesla V100-SXM2-16GB"):
        assert "it is not for 'Tesla V100" in select.unsupported(BASE, "hopper")


@pytest.mark.parametrize("kind", OVER)
@pytest.mark.parametrize("cls", [True, False])
def test_a_tpu_kernel_is_given_the_attention(kind, cls, tpu_kernels):
    qkv = projections(kind, cls)
    found = registry.KERNELS[kind]["pallas"].attention(qkv, (2, 3))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), found, plain(kind, qkv, (2, 3))
    )
    [(_, patches, token)] = tpu_kernels
    assert patches == (2, 3, 6, 48)
    assert token == ((*qkv.cls.shape[:2], 48) if cls else None)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_the_same_by_the_kernels_of_a_tpu(scheme, monkeypatch, tpu_kernels):
    model = TimeSformer(dataclasses.replace(SMALL, attention=scheme), rngs=nnx.Rngs(0))
    video = random((2, 4, 32, 32, 3), "float32")
    expected = logits(model, video)
    device = types.SimpleNamespace(platform="tpu", device_kind=V5E)
    monkeypatch.setattr(select, "target_device", lambda: device)
    with use_references(True):
        np.testing.assert_allclose(logits(model, video), expected, atol=2e-5)
    assert not tpu_kernels
    np.testing.assert_allclose(logits(model, video), expected, atol=2e-5)
    assert tpu_kernels


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_traced_with_the_kernels_of_a_tpu(scheme):
    config = dataclasses.replace(SMALL, attention=scheme, dtype="bfloat16", hidden_size=256)
    graph, state = nnx.split(abstract(config))
    video = jax.ShapeDtypeStruct((2, 8, 32, 32, 3), "float32")

    def loss(state, video):
        return nnx.merge(graph, state)(video).sum()

    with program_for(V5E):
        kernels = str(jax.jit(jax.grad(loss)).trace(state, video).jaxpr).count("pallas_call")
    # Forward and backward, more of the parts of local_global; nothing reads the patches after the
    # last attention, so that one may need no gradient.
    assert kernels >= config.depth * 2 * len(config.scheme.layers) - 1


def test_the_model_is_the_same_by_the_interpreted_kernels_of_a_tpu(monkeypatch):
    model = TimeSformer(dataclasses.replace(SMALL, hidden_size=128), rngs=nnx.Rngs(0))
    video = random((2, 4, 32, 48, 3), "float32")
    expected = logits(model, video)
    for module in (tpu_spatial, tpu_temporal):
        interpreted = functools.partial(module.attention, interpret=True)
        monkeypatch.setattr(module, "attention", interpreted)
    device = types.SimpleNamespace(platform="tpu", device_kind=V5E)
    monkeypatch.setattr(select, "target_device", lambda: device)
    np.testing.assert_allclose(logits(model, video), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "capability", "fused"),
    [
        ("NVIDIA A100-SXM4-80GB", "8.0", True),
        ("NVIDIA A10G", "8.6", True),
        ("NVIDIA L4", "8.9", True),
        ("NVIDIA L40S", "8.9", True),
        ("NVIDIA GeForce RTX 3090 Ti", "8.6", True),
        ("NVIDIA GeForce RTX 4080 SUPER", "8.9", True),
        ("NVIDIA GeForce RTX 5090", "12.0", True),
        ("NVIDIA RTX A6000", "8.6", True),
        ("NVIDIA RTX 6000 Ada Generation", "8.9", True),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "12.0", True),
        (H100, "9.0", True),
        ("NVIDIA GH200 480GB", "9.0", True),
        ("NVIDIA B200", "10.0", True),
        ("NVIDIA GB200", "10.0", True),
        ("Tesla V100-SXM2-16GB", "7.0", False),
        ("Tesla T4", "7.5", False),
        ("NVIDIA GeForce RTX 2080 Ti", "7.5", False),
        ("Quadro RTX 8000", "7.5", False),
        ("AMD Instinct MI300X", "gfx942", False),
    ],
)
def test_cudnn_is_for_gpus_from_ampere_on(name, capability, fused, monkeypatch):
    runs_on = registry.KERNELS["spatial"]["cudnn"].runs_on
    assert runs_on(AbstractDevice(device_kind=name, num_cores=None, platform="gpu")) == fused
    device = types.SimpleNamespace(
        device_kind="NVIDIA X", platform="gpu", compute_capability=capability
    )
    assert runs_on(device) == fused
    monkeypatch.setattr(jax, "local_devices", lambda: [device])  # of which a mesh is made
    assert runs_on(AbstractDevice(device_kind="NVIDIA X", num_cores=None, platform="gpu")) == fused
    assert not runs_on(AbstractDevice(device_kind=V5E, num_cores=None, platform="tpu"))


def use(monkeypatch, name):
    """Selects one implementation for every attention that it supports."""

    def selected(case):
        return name if select.unsupported(case, name) is None else "xla"

    monkeypatch.setattr(select, "select_implementation", selected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_a_kernel_the_same_attention(scheme, monkeypatch):
    model = TimeSformer(dataclasses.replace(SMALL, attention=scheme), rngs=nnx.Rngs(0))
    video = random((2, 4, 32, 32, 3), "float32")
    expected, used = logits(model, video), set()

    def counted(kind, qkv, grid):
        used.add(kind)
        return plain(kind, qkv, grid)

    for kind, known in registry.KERNELS.items():
        run = functools.partial(counted, kind)
        other = Kernel(lambda device: True, lambda case: None, run)
        monkeypatch.setitem(known, "other", other)
    use(monkeypatch, "other")
    np.testing.assert_allclose(logits(model, video), expected, atol=2e-5)
    assert used


@pytest.mark.parametrize("implementation", ["hopper", "hopper_2", "cudnn"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_traced_with_every_kernel_of_a_gpu(scheme, implementation, monkeypatch):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91501)
    monkeypatch.setattr(cudnn, "cudnn_version", lambda: (9, 15, 1))
    use(monkeypatch, implementation)
    used = set()
    for kind, known in registry.KERNELS.items():
        if implementation in known:
            kernel = known[implementation]

            def run(qkv, grid, kernel=kernel, kind=kind):
                used.add(kind)
                return kernel.attention(qkv, grid)

            monkeypatch.setitem(known, implementation, kernel._replace(attention=run))
    config = dataclasses.replace(SMALL, attention=scheme, dtype="bfloat16")
    graph, state = nnx.split(abstract(config))
    video = jax.ShapeDtypeStruct((2, 8, 32, 32, 3), "float32")

    def loss(state, video):
        return nnx.merge(graph, state)(video).sum()

    with program_for(H100):
        jax.jit(jax.grad(loss)).trace(state, video)
    # The class token makes 9 tokens of 8 frames, which "time" alone has in temporal attention.
    temporal = scheme in ("divided", "space_then_time", "parallel", "axial")
    assert bool(used) == (temporal or implementation == "cudnn")


def test_on_a_gpu_patches_lie_in_the_order_of_their_axes():
    graph, state = nnx.split(abstract(SMALL))
    video = jax.ShapeDtypeStruct((2, 8, 32, 32, 3), "float32")

    def loss(state, video):
        return nnx.merge(graph, state)(video).sum()

    def constraints():
        return str(jax.jit(jax.grad(loss)).trace(state, video).jaxpr).count("layout_constraint")

    with program_for(H100):
        # After the embedding and each of two layers' three updates but the last, which nothing
        # reads; and of their gradients.
        assert constraints() == 2 * (1 + 2 * 3 - 1)
    assert constraints() == 0  # on this machine


# ---- on a mesh ----------------------------------------------------------------------------------

# The whole patches and what a device of (data 2, tensor 2, sequence 2) gets, with its tokens; an
# axis that a mesh axis does not divide is whole.
SHARES = [
    ("temporal", (4, 3, 6, 3, 2, 8), (2, 3, 3, 3, 1, 8), 3),
    ("spatial", (4, 4, 6, 3, 2, 8), (2, 2, 6, 3, 1, 8), 2),
    ("spatial", (4, 3, 6, 3, 2, 8), (2, 3, 6, 3, 1, 8), 3),
    ("joint", (4, 4, 6, 3, 2, 8), (2, 4, 6, 3, 1, 8), 1),
    ("rows", (4, 4, 6, 3, 2, 8), (2, 2, 6, 3, 1, 8), 2 * 2),
    ("rows", (4, 3, 6, 3, 2, 8), (2, 3, 6, 3, 1, 8), 3 * 2),
    ("columns", (3, 4, 6, 3, 3, 8), (3, 2, 6, 3, 3, 8), 2 * 3),
]


@pytest.mark.parametrize("cls", [False, True])
@pytest.mark.parametrize(("kind", "shape", "part", "sequences"), SHARES, ids=str)
def test_a_device_runs_the_kernel_on_its_own_part(kind, shape, part, sequences, cls, monkeypatch):
    seen = []

    def kernel(qkv, grid):
        seen.append((qkv.patches.shape, None if qkv.cls is None else qkv.cls.shape))
        return plain(kind, qkv, grid)

    entry = Kernel(lambda device: True, lambda case: None, kernel)
    monkeypatch.setitem(registry.KERNELS[kind], "other", entry)
    qkv = projections(kind, cls, shape)
    apply = functools.partial(select.run_kernel, kind, grid=(2, 3), name="other")
    expected = plain(kind, qkv, (2, 3))
    mesh = mesh_of((2, 1, 2, 2))
    with jax.set_mesh(mesh):
        specs = select._partition_specs(kind, qkv)
        lies = [jax.NamedSharding(mesh, axes) for axes in specs]
        qkv = Tokens(*map(jax.device_put, qkv, lies))
        assert select.local_case(kind, qkv, (2, 3)) == Case(kind, part, "float32", cls, (2, 3))
        compiled = jax.jit(apply).lower(qkv).compile()
        found = compiled(qkv)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), found, expected)
    assert seen == [(part, (part[0], sequences, *part[3:]) if cls else None)]
    assert not collectives(compiled.as_text(), mesh)
