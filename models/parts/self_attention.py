"""Self-attention of one layer: one rank's heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.attention.base import PlannedAttention
from kernels.kv.kv_pool import LayerKV
from models.model_config import ModelConfig
from models.parts.rotary import Rotary, kernel_order
from parallel.layers import HeadsNorm, QKVLinear, RMSNorm, RowLinear
from parallel.matrix_layer import Placement
from parallel.module import Module, WeightSlot
from parallel.split import HeadSplit


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Inputs of attention that layers of one kind share in a forward.

    rotary: of all positions. positions, slots: see models.batch.TokenInputs; slots are those of the layers' pool.
    attention: planned. query_scales: [tokens] float32, factors of rotated queries; None: there are none.
    """

    rotary: Rotary
    positions: Tensor
    slots: Tensor
    attention: PlannedAttention
    query_scales: Tensor | None = None


class Attention(Module):
    """Self-attention of one layer: this rank's heads, summed over ranks by the output projection."""

    def __init__(self, prefix: str, config: ModelConfig, layer: int, mine: HeadSplit, place: Placement) -> None:
        head_dim = config.head_dim
        self._qkv = QKVLinear(
            prefix,
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=head_dim,
            mine=mine,
            bias=config.qkv_bias,
            place=place,
            joined=config.names.qkv,
        )
        self._out = RowLinear(
            f"{prefix}.o_proj",
            config.num_heads * head_dim,
            config.hidden_size,
            mine=mine.heads.slice(head_dim),
            bias=config.o_bias,
            place=place,
        )
        self._norms: list[RMSNorm] = []
        self._joint_norms: list[HeadsNorm] = []
        eps = config.rms_norm_eps
        if config.qk_norm == "head":
            offset = float(config.norms_from_one)
            self._norms = [
                RMSNorm(f"{prefix}.{name}", head_dim, eps=eps, place=place, offset=offset)
                for name in ("q_norm", "k_norm")
            ]
        elif config.qk_norm == "all":
            self._joint_norms = [
                HeadsNorm(f"{prefix}.q_norm", config.num_heads, head_dim, mine.heads, True, eps=eps, place=place),
                HeadsNorm(
                    f"{prefix}.k_norm",
                    config.num_kv_heads,
                    head_dim,
                    mine.kv_heads,
                    # Of the ranks that hold the same KV head, the one with its first query head counts it.
                    mine.heads.start == mine.kv_heads.start * (config.num_heads // config.num_kv_heads),
                    eps=eps,
                    place=place,
                ),
            ]
        self._prefix, self._num_heads, self._mine = prefix, config.num_heads, mine.heads.slice()
        self._sinks = place.empty(mine.heads.size) if config.has_sinks else None
        order = kernel_order(config.rope_of(layer), head_dim)
        self._order = None if order is None else order.to(place.device)
        self._heads, self._kv_heads = mine.heads.size, mine.kv_heads.size
        self._scale = head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        self._ops = place.ops

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield from super().weight_slots()
        if self._sinks is not None:
            yield WeightSlot(self._sinks, f"{self._prefix}.sinks", (self._num_heads,), (self._mine,))

    def prepare(self) -> None:
        super().prepare()
        if self._sinks is not None:
            # As attention reads them.
            self._sinks = self._sinks.to(torch.promote_types(self._sinks.dtype, torch.float32))
        if self._order is not None and self._norms:
            for norm in self._norms:
                norm.weight = norm.weight[self._order]

    def __call__(self, x: Tensor, inputs: AttentionInputs, kv: LayerKV) -> Tensor:
        """x: [tokens, hidden_size]. Returns the same shape."""
        qkv = self._qkv.project(x)
        first = 0
        for norm, heads in zip(self._joint_norms, (self._heads, self._kv_heads), strict=False):
            part = qkv[:, first : first + heads]
            part.copy_(norm(part.flatten(1).contiguous()).view_as(part))
            first += heads
        if self._order is not None:
            part = qkv[:, : self._heads + self._kv_heads]
            part.copy_(part[..., self._order])
        norms = (self._norms[0].weight, self._norms[1].weight, self._norms[0].eps) if self._norms else None
        q = self._ops.rotate_and_cache(qkv, inputs.rotary, inputs.positions, inputs.slots, kv, norms)
        if inputs.query_scales is not None:
            q = q * inputs.query_scales[:, None, None].to(q.dtype)
        if self._sinks is not None:
            kv = replace(kv, sinks=self._sinks)
        o, _ = inputs.attention.run(kv, q, self._scale)
        return self._out(o.flatten(1))
