"""Inputs of one forward of a model, passed explicitly."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.attention.base import AttentionBatch


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """Tokens of a forward, those of its rows laid end to end.

    token_ids: [tokens] int64.
    positions: [tokens] int64, absolute position in the request (for RoPE).
    slots: [tokens] int64, KV slot (page * page_size + offset) that receives each token's key and value.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor


@dataclass(frozen=True, slots=True)
class ForwardBatch(TokenInputs):
    """Tokens, and what is read and computed for them. `tokens` below is the sum of the rows' query lengths.

    attention: KV that each row's queries read, including the keys and values that this forward writes.
    logit_index: [n] int64, positions within `tokens` whose logits are computed.
    """

    attention: AttentionBatch
    logit_index: Tensor
