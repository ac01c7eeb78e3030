"""Attention rollout against products of explicit matrices over all tokens in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, traverse_util
from test_attention import sequences
from test_model import (
    BLOCKS,
    FRAMES,
    GRID,
    TOKENLESS,
    assert_near,
    config_of,
    random_parameters,
    random_video,
    reference,
)

import timesformer_jax as tsf
from timesformer_jax.models import rollout
from timesformer_jax.models.rollout import attention_rollout, layer_attention
from timesformer_jax.models.schemes import LOCAL, SCHEMES, TIME, Scheme
from timesformer_jax.models.timesformer import with_parameters
from timesformer_jax.models.tokens import Tape, Tokens, tape

PATCHES = FRAMES * math.prod(GRID)
TARGETS = np.array([2, 0])


class Matrices:
    """An attention for `reference` that keeps one matrix over all tokens for every layer.

    Tokens: the classification token (for space only that of every frame), then the patches. A row
    of the token holds the mean over its copies; where it takes no part there is no row.
    """

    def __init__(self, scheme):
        self.tokens = FRAMES if scheme == "space" else 1
        self.found = []

    def __call__(self, name, copies, patches):
        size = patches.shape[:3]
        lists = sequences(name, *size)
        flat = patches.reshape(-1, *patches.shape[3:])
        tokens = self.tokens
        total = tokens + len(flat)
        first = torch.zeros_like(flat[:1]).expand(tokens, *flat.shape[1:])
        qkv = torch.cat([first if copies is None else copies[:tokens], flat])
        q, k, v = qkv.unbind(dim=1)
        heads = q.shape[1]
        matrix = torch.zeros(heads, total, total, dtype=torch.float64)
        for number, sequence in enumerate(lists):
            members = [tokens + np.ravel_multi_index(patch, size) for patch in sequence]
            of_token = number if tokens > 1 else 0
            members = members if copies is None else [of_token, *members]
            logits = torch.einsum("qhd,khd->hqk", q[members], k[members])
            weights = torch.softmax(logits / math.sqrt(q.shape[-1]), dim=-1)
            shares = torch.ones(len(members), dtype=torch.float64)
            if copies is not None and tokens == 1:
                shares[0] = 1 / len(lists)
            at = torch.tensor(members)
            where = torch.arange(heads)[:, None, None], at[:, None], at[None, :]
            matrix = matrix.index_put(where, weights * shares[:, None], accumulate=True)
        added = torch.zeros_like(matrix, requires_grad=True)  # whose gradient is the matrix's
        self.found.append((name, matrix.detach().numpy(), added))
        out = torch.einsum("hqk,khd->qhd", matrix + added, v).flatten(1)
        if copies is None:
            return None, out[tokens:].reshape(*size, -1)
        # The reference averages over the copies what is the mean already.
        return out[:tokens].expand(len(lists), -1), out[tokens:].reshape(*size, -1)

    def product(self, parallel, weighted):
        """The row of the classification token of the product of all layers."""
        total = self.found[0][1].shape[-1]
        row = np.zeros(total)
        row[: self.tokens] = 1 / self.tokens
        result = np.eye(total)
        per_block = 2 if parallel else 1
        for start in range(0, len(self.found), per_block):
            step, updates = np.zeros((total, total)), np.ones(total)
            for name, mixing, added in self.found[start : start + per_block]:
                if weighted:
                    gradient = 0 if added.grad is None else added.grad.numpy()
                    mixing = np.maximum(gradient * mixing, 0)
                updated = np.ones(total)
                if name in TOKENLESS:
                    updated[: self.tokens] = 0
                step += mixing.mean(axis=0) * updated[:, None]
                updates += updated
            step += np.eye(total)
            result = (step if weighted else step / updates[:, None]) @ result
        return row @ result


@functools.cache
def explicit(scheme):
    """A model, two clips, their matrices, and the logits of which `TARGETS` were traced."""
    config = config_of(scheme)
    params, video = random_parameters(config), random_video()
    flat = traverse_util.flatten_dict(params, sep="/")
    p = {name: torch.tensor(value, dtype=torch.float64) for name, value in flat.items()}
    found, logits = [], []
    for clip, target in zip(torch.tensor(video, dtype=torch.float64), TARGETS):
        found.append(Matrices(scheme))
        logits.append(reference(config, p, clip, attention=found[-1]))
        logits[-1][target].backward()
    return with_parameters(config, params), video, found, torch.stack(logits).detach()


def check_rollout(scheme, target):
    model, video, found, logits = explicit(scheme)
    ours = attention_rollout(model, video, target)
    weighted = target is not None
    rows = np.stack([clip.product(scheme == "parallel", weighted) for clip in found])
    assert rows.min() >= 0
    assert_near(ours.logits, logits, 1e-5)
    assert_near(ours.patches.reshape(2, -1), rows[:, -PATCHES:], 1e-4)
    assert_near(ours.cls, rows[:, :-PATCHES].sum(axis=1), 1e-4)
    if not weighted:
        np.testing.assert_allclose(ours.patches.sum((1, 2)) + ours.cls, 1, atol=1e-5)


@pytest.mark.compiles
@pytest.mark.parametrize("target", [None, TARGETS], ids=["plain", "weighted"])
@pytest.mark.parametrize("scheme", BLOCKS)
def test_rollout_is_the_product_of_explicit_matrices(scheme, target):
    check_rollout(scheme, target)


@pytest.mark.parametrize("target", [None, TARGETS], ids=["plain", "weighted"])
def test_a_registered_scheme_in_chunks_too(monkeypatch, target):
    """Layers have the token, sequences and heads differ, and 5 or 10 queries make a chunk."""
    scheme = Scheme((TIME._replace(name="moments", attention_fn=None, width=0.5), LOCAL))
    monkeypatch.setitem(SCHEMES, "mine", scheme)
    monkeypatch.setitem(
        BLOCKS, "mine", [("moments", "temporal_with_token", False), ("local", "local", True)]
    )
    monkeypatch.setattr(rollout, "_WEIGHTS", 2 * 2 * 21 * 5)
    check_rollout("mine", target)


@pytest.mark.parametrize("scheme", ["divided", "space"])
def test_attention_of_a_layer_is_the_row_of_its_matrix(scheme):
    model, video, found, _ = explicit(scheme)
    tokens, layers = FRAMES if scheme == "space" else 1, [name for name, *_ in BLOCKS[scheme]]
    for block, layer in ((-1, None), (0, layers[0])):
        ours = layer_attention(model, video, block, layer)
        index = block % 2 * len(layers) + layers.index(layer or layers[-1])
        rows = slice(tokens, None) if layer in TOKENLESS else slice(tokens)
        theirs = [clip.found[index][1][:, rows, tokens:].mean(axis=1) for clip in found]
        assert_near(ours.reshape(2, -1, PATCHES), theirs, 1e-4)
    with pytest.raises(tsf.InputError, match=r"no layer 'time'; it has .*spatial"):
        layer_attention(model, video, layer="time")
    with pytest.raises(tsf.InputError, match="no block 2"):
        layer_attention(model, video, block=2)


def test_no_matrix_of_all_pairs_is_made(monkeypatch):
    """Joint attention over 2,049 tokens: the weights of both heads are 34 MB in float32."""
    monkeypatch.setattr(rollout, "_WEIGHTS", 2**18)
    config = config_of("joint", num_frames=32, image_size=16, depth=1)
    model = with_parameters(config, random_parameters(config))
    x = Tokens(jnp.ones((1, 8)), jnp.ones((1, 32, 64, 8)))
    row = Tokens(jnp.ones(1), jnp.zeros((1, 32, 64)))
    program = rollout._backward.lower(*nnx.split(model.blocks[0]), x, None, row, (8, 8)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 5e6


def test_a_tape_leaves_the_program_as_it_is():
    config = config_of("divided")
    model, video = with_parameters(config, random_parameters(config)), random_video()
    alone = str(jax.make_jaxpr(model)(video))
    with tape(found := Tape()):
        taped = str(jax.make_jaxpr(model)(video))
    assert taped == alone
    assert [x.cls is None for x in found.qkv] == [True, False] * config.depth
