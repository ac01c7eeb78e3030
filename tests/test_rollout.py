"""Attention rollout against products of explicit matrices over all tokens in float64."""

import math

import numpy as np
import pytest
import torch
from flax import traverse_util
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

from timesformer_jax.models.rollout import attention_rollout
from timesformer_jax.models.timesformer import with_parameters

PATCHES = FRAMES * math.prod(GRID)


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
            for head in range(heads):
                for row, i in enumerate(members):
                    share = 1 / len(lists) if i == 0 and tokens == 1 and copies is not None else 1
                    matrix[head, i, members] += weights[head, row] * share
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


@pytest.fixture(scope="module")
def explicit():
    """(scheme) to a model, two clips, and the row of each clip: of rollout, of classes 2 and 0."""
    made = {}

    def make(scheme):
        if scheme in made:
            return made[scheme]
        config = config_of(scheme)
        params, video = random_parameters(config), random_video()
        flat = traverse_util.flatten_dict(params, sep="/")
        p = {name: torch.tensor(value, dtype=torch.float64) for name, value in flat.items()}
        plain, weighted, logits = [], [], []
        for clip, target in zip(torch.tensor(video, dtype=torch.float64), (2, 0)):
            matrices = Matrices(scheme)
            logits.append(reference(config, p, clip, attention=matrices))
            logits[-1][target].backward()
            plain.append(matrices.product(scheme == "parallel", weighted=False))
            weighted.append(matrices.product(scheme == "parallel", weighted=True))
        model = with_parameters(config, params)
        made[scheme] = model, video, np.stack(plain), np.stack(weighted), torch.stack(logits)
        return made[scheme]

    return make


@pytest.mark.compiles
@pytest.mark.parametrize("scheme", BLOCKS)
def test_rollout_is_the_product_of_explicit_matrices(explicit, scheme):
    model, video, plain, weighted, logits = explicit(scheme)
    for target, expected in ((None, plain), (np.array([2, 0]), weighted)):
        found = attention_rollout(model, video, target)
        assert_near(found.logits, logits.detach(), 1e-5)
        patches = expected[:, -PATCHES:]
        assert patches.min() >= 0
        assert patches.max() > 0
        assert_near(found.patches.reshape(2, -1), patches, 1e-4)
        assert_near(found.cls, expected[:, :-PATCHES].sum(axis=1), 1e-4)
        if target is None:
            np.testing.assert_allclose(found.patches.sum((1, 2)) + found.cls, 1, atol=1e-5)
