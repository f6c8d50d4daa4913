"""Grouped products of weights of few bits, whose codes are unpacked in registers as those of single matrices are (see
kernels.gpu.products.few_bit_products). Halves are joined by a kernel of their own: their sums would take the registers
that unpacking needs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.checks import check_dtype
from kernels.gpu.pointwise import apply_gate
from kernels.gpu.products.few_bit_layout import LINE, FewBitWeights
from kernels.gpu.products.few_bit_sums import few_bit_sums, layout_constants
from kernels.gpu.products.sorted_pairs import SortedPairs
from kernels.ops import Gate

_COLUMNS = 64
"""Columns of a tile; half as many in float32."""


@triton.jit
def _grouped_few_bit_kernel(
    x: tl.tensor,
    feature_order: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    factors: tl.tensor,
    networks: tl.tensor,
    firsts: tl.tensor,
    ends: tl.tensor,
    x_stride: tl.tensor,
    features: tl.tensor,
    in_features: tl.tensor,
    columns: tl.tensor,
    padded_columns: tl.tensor,
    groups: tl.tensor,
    lines: tl.tensor,
    PER_TOKEN: tl.constexpr,
    FIRST: tl.constexpr,
    BIAS: tl.constexpr,
    ORDER: tl.constexpr,
    FORMAT: tl.constexpr,
    HALF: tl.constexpr,
    LINE: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    MINS: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Multiply a block of rows by a tile of its network's columns. Programs of one block are neighbours.

    FIRST: x: [tokens, in_features]; out: [pairs, columns] in sorted order. Otherwise x: [pairs, in_features], in sorted
    order; out: [pairs, columns] float32 in the pairs' own order, times `factors`. codes, scales, mins, feature_order
    (FewBitWeights.order) and bias [columns] of each network lie one after the other. Others: see few_bit_sums and
    SortedPairs.
    """
    block = tl.program_id(1)
    first = tl.load(firsts + block)
    end = tl.load(ends + block)
    if first < end:
        network = tl.load(networks + block)
        place = first + tl.arange(0, ROWS)
        present = place < end
        pair = tl.load(order + place, mask=present, other=0)
        source = pair // PER_TOKEN if FIRST else place
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        of_group = network * groups * padded_columns
        sums = few_bit_sums(
            x + source * x_stride,
            present,
            feature_order + network * features,
            codes + network * lines * padded_columns * LINE,
            scales + of_group,
            mins + of_group,
            column,
            features,
            in_features,
            padded_columns,
            0,
            lines,
            FORMAT,
            HALF,
            LINE,
            GROUP,
            ZEROS,
            MINS,
            ORDER,
            SHARED,
            WHOLE,
            COLUMNS,
            ROWS,
            CHUNK,
            STAGES,
            WIDEN,
        )
        inside = column < columns
        if BIAS:
            added = tl.load(bias + network * columns + column, mask=inside, other=0.0)
            sums += added.to(tl.float32)[:, None]
        if FIRST:
            target = place
        else:
            sums *= tl.load(factors + pair, mask=present, other=0.0)[None, :]
            target = pair
        at_out = out + target[:, None] * columns + column[None, :]
        tl.store(at_out, tl.trans(sums).to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])


class GroupedFewBit:
    """See kernels.gpu.products.product.GroupedProduct."""

    def __init__(self, weights: FewBitWeights, bias: Tensor | None, gate: Gate | None) -> None:
        """weights: with a dimension of networks before the others of each tensor. bias: [networks, n]. Columns are
        those of both halves if there is a gate, gates first."""
        self._weights, self._bias, self._gate = weights, bias, gate
        self.columns = weights.columns // (1 if gate is None else 2)

    def __call__(self, x: Tensor, pairs: SortedPairs) -> Tensor:
        check_dtype(x)
        weights, bias = self._weights, self._bias
        if x.stride(1) != 1 or (weights.order is None and x.shape[1] != weights.features):
            raise ValueError("experts: inputs do not match the weights, or are not contiguous")
        _, lines, padded_columns, _ = weights.codes.shape
        dtype = torch.float32 if self._gate is None else x.dtype
        out = torch.empty(len(pairs.order), weights.columns, dtype=dtype, device=x.device)
        wide = x.dtype == torch.float32
        columns = _COLUMNS // 2 if wide else _COLUMNS
        _grouped_few_bit_kernel[(triton.cdiv(weights.columns, columns), len(pairs.firsts))](
            x,
            pairs.order if weights.order is None else weights.order,
            weights.codes,
            weights.scales,
            weights.scales if weights.mins is None else weights.mins,
            weights.scales if bias is None else bias,
            out,
            pairs.order,
            pairs.factors,
            pairs.networks,
            pairs.firsts,
            pairs.ends,
            x.stride(0),
            weights.features,
            x.shape[1],
            weights.columns,
            padded_columns,
            weights.scales.shape[1],
            lines,
            PER_TOKEN=pairs.per_token,
            FIRST=self._gate is not None,
            BIAS=bias is not None,
            ORDER=weights.order is not None,
            **layout_constants(weights, x.dtype),
            COLUMNS=columns,
            ROWS=pairs.rows,
            CHUNK=16 if wide else min(LINE, weights.group & -weights.group or LINE),
            STAGES=3,
            num_warps=4 if pairs.rows < 64 else 8,
        )
        return out if self._gate is None else apply_gate(out, self._gate)
