"""Inputs of one forward of a model, passed explicitly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from kernels.attention.base import AttentionBatch, PlannedAttention
from kernels.kv.kv_pool import KVPool


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """Tokens of a forward, those of its rows laid end to end.

    token_ids: [tokens] int64.
    positions: [tokens] int64, absolute position in the request (for RoPE).
    slots: [tokens] int64, KV slot (page * page_size + offset) that receives each token's key and value.
    sliding_slots: the same in the pool of sliding layers; None: the model has none.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    sliding_slots: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch(TokenInputs):
    """Tokens, and what is read and computed for them. `tokens` below is the sum of the rows' query lengths.

    attention: KV that each row's queries read, including the keys and values that this forward writes.
    logit_index: [n] int64, positions within `tokens` whose logits are computed.
    sliding_attention: KV that they read in sliding layers, with their window; None: the model has none.
    """

    attention: AttentionBatch
    logit_index: Tensor
    sliding_attention: AttentionBatch | None = None


Reads = TypeVar("Reads", bound=PlannedAttention, covariant=True)


@dataclass(frozen=True, slots=True)
class SlidingKV(Generic[Reads]):
    """KV of a model's sliding layers: the pool that is written to, and the attention that reads it."""

    pool: KVPool
    attention: Reads
