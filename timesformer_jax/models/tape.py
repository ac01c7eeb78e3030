"""Notes the attentions of a program that is traced, for what looks at them (`rollout`)."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from timesformer_jax.models.tokens import Tokens

# `with tape(Tape()):` notes the attentions that are traced inside. Without one, nothing is traced
# but the model.
tape = jax.make_user_context(default_value=None)


class Tape:
    """The attentions of a program, in the order in which they are traced.

    Args:
      added: to be added to the attended values of each attention. The gradient with respect to
        zeros, added here, is the gradient with respect to the attended values.

    Attributes:
      qkv: the projections of each attention: patches (B, T, N, 3, h, d), and cls (B, S, 3, h, d) or
        None.
    """

    def __init__(self, added: Sequence[Tokens] = ()):
        self.qkv: list[Tokens] = []
        self._added = added

    def note(self, qkv: Tokens, attended: Tokens) -> Tokens:
        """Notes an attention; returns the attended values that the model is to use."""
        self.qkv.append(qkv)
        if not self._added:
            return attended
        return jax.tree.map(lambda a, b: a + b, attended, self._added[len(self.qkv) - 1])
