"""Grouped products of dense weights: programs multiply blocks of rows by tiles of their network's columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import INTERPRETED
from kernels.gpu.checks import check_dtype
from kernels.gpu.pointwise import join_halves
from kernels.gpu.products.sorted_pairs import SortedPairs
from kernels.gpu.tile import product
from kernels.ops import Gate

_COLUMNS, _CHUNK = 64, 64
"""Output features of a tile, and features that are multiplied at a time; in float32, half as many of both."""


@triton.jit
def _grouped_kernel(
    x: tl.tensor,
    weights: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    order: tl.tensor,
    factors: tl.tensor,
    networks: tl.tensor,
    firsts: tl.tensor,
    ends: tl.tensor,
    x_stride: tl.tensor,
    features: tl.tensor,
    columns: tl.tensor,
    PER_TOKEN: tl.constexpr,
    GATE: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Multiply a block of rows by a tile of its network's columns. Programs of one block are neighbours.

    GATE: a Gate, or None. With one, x: [tokens, features]; weights: [networks, 2 columns, features], gates first; out:
    [pairs, columns], in sorted order. Otherwise x: [pairs, features], in sorted order; weights: [networks, columns,
    features]; out: [pairs, columns] float32 in the pairs' own order, times `factors`. bias: as weights,
    without features. Others: see SortedPairs.
    """
    HALVES: tl.constexpr = 1 if GATE is None else 2
    block = tl.program_id(1)
    first = tl.load(firsts + block)
    end = tl.load(ends + block)
    if first < end:
        network = tl.load(networks + block)
        place = first + tl.arange(0, ROWS)
        present = place < end
        pair = tl.load(order + place, mask=present, other=0)
        source = place if GATE is None else pair // PER_TOKEN
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < columns
        chunk = tl.arange(0, CHUNK)
        at_x = x + source[:, None] * x_stride + chunk[None, :]
        weight = weights + network * features * columns * HALVES
        at_w = weight + column[None, :].to(tl.int64) * features + chunk[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        values = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, features, CHUNK):
            left = chunk < features - start
            a = tl.load(at_x + start, mask=present[:, None] & left[None, :], other=0.0)
            b = tl.load(at_w + start, mask=inside[None, :] & left[:, None], other=0.0)
            total += product(a, b, WIDEN)
            if GATE is not None:
                c = tl.load(at_w + columns * features + start, mask=inside[None, :] & left[:, None], other=0.0)
                values += product(a, c, WIDEN)
        if BIAS:
            at_bias = bias + network * columns * HALVES + column
            total += tl.load(at_bias, mask=inside, other=0.0).to(tl.float32)[None, :]
            if GATE is not None:
                values += tl.load(at_bias + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        if GATE is None:
            total *= tl.load(factors + pair, mask=present, other=0.0)[:, None]
            target = pair
        else:
            total = join_halves(total, values, GATE)
            target = place
        at_out = out + target[:, None] * columns + column[None, :]
        tl.store(at_out, total.to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])


class GroupedDense:
    """See kernels.gpu.products.product.GroupedProduct."""

    def __init__(self, weights: Tensor, bias: Tensor | None, gate: Gate | None) -> None:
        """weights: [networks, n, features]. bias: [networks, n]. n: of both halves if there is a gate, gates first.
        Both are contiguous."""
        self._weights, self._bias, self._gate = weights, bias, gate
        self.columns = weights.shape[1] // (1 if gate is None else 2)

    def __call__(self, x: Tensor, pairs: SortedPairs) -> Tensor:
        check_dtype(x)
        features = self._weights.shape[2]
        if x.stride(1) != 1 or x.shape[1] != features or x.dtype != self._weights.dtype:
            raise ValueError("experts: inputs do not match the weights, or are not contiguous")
        dtype = torch.float32 if self._gate is None else x.dtype
        out = torch.empty(len(pairs.order), self.columns, dtype=dtype, device=x.device)
        shrink = x.element_size() // 2
        _grouped_kernel[(triton.cdiv(self.columns, _COLUMNS // shrink), len(pairs.firsts))](
            x,
            self._weights,
            self._weights if self._bias is None else self._bias,
            out,
            pairs.order,
            pairs.factors,
            pairs.networks,
            pairs.firsts,
            pairs.ends,
            x.stride(0),
            features,
            self.columns,
            PER_TOKEN=pairs.per_token,
            GATE=self._gate,
            BIAS=self._bias is not None,
            ROWS=pairs.rows,
            COLUMNS=_COLUMNS // shrink,
            CHUNK=_CHUNK // shrink,
            WIDEN=INTERPRETED,
            num_warps=4,
            num_stages=3,
        )
        return out
