"""Mixture of experts on GPUs: products of rows with the weights of the network that each row chose.

Pairs of a token and one of its networks are sorted by network on the device, and cut into blocks of rows of one network
each, of which a program computes a tile. Their largest number depends on the number of tokens alone, so the host waits
for nothing and the work can be captured; programs of blocks that are not needed return at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu import INTERPRETED
from kernels.gpu.checks import check_dtype
from kernels.gpu.tile import product
from kernels.reference_experts import choose_experts
from kernels.reference_ops import ReferenceLinear

_ROWS = (16, 32, 64)
"""Rows of a block: as many as a network has on average, within these. Tensor cores take 16 or more."""
_COLUMNS, _CHUNK = 64, 64
"""Output features of a tile, and features that are multiplied at a time; in float32, half as many of both."""


@triton.jit
def _grouped_kernel(
    x: tl.tensor,
    weights: tl.tensor,
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
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Multiply a block of rows by a tile of its network's columns. Programs of one block are neighbours.

    GATED: x: [tokens, features]; weights: [networks, 2 columns, features], gates first; out: [pairs, columns] of
    silu(gate) * value, in sorted order. Otherwise x: [pairs, features], in sorted order; weights: [networks, columns,
    features]; out: [pairs, columns] float32 in the pairs' own order, times `factors`.
    order: [pairs], pairs by network. networks, firsts, ends: [blocks] int64, the network of each block, its first pair
    in that order, and the end of its network's; a block without rows has first >= end.
    """
    block = tl.program_id(1)
    first = tl.load(firsts + block)
    end = tl.load(ends + block)
    if first < end:
        network = tl.load(networks + block)
        place = first + tl.arange(0, ROWS)
        present = place < end
        pair = tl.load(order + place, mask=present, other=0)
        source = pair // PER_TOKEN if GATED else place
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < columns
        chunk = tl.arange(0, CHUNK)
        at_x = x + source[:, None] * x_stride + chunk[None, :]
        weight = weights + network * features * columns * (2 if GATED else 1)
        at_w = weight + column[None, :].to(tl.int64) * features + chunk[:, None]
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        values = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, features, CHUNK):
            left = chunk < features - start
            a = tl.load(at_x + start, mask=present[:, None] & left[None, :], other=0.0)
            b = tl.load(at_w + start, mask=inside[None, :] & left[:, None], other=0.0)
            total += product(a, b, WIDEN)
            if GATED:
                c = tl.load(at_w + columns * features + start, mask=inside[None, :] & left[:, None], other=0.0)
                values += product(a, c, WIDEN)
        if GATED:
            total = total / (1.0 + tl.exp(-total)) * values
            target = place
        else:
            total *= tl.load(factors + pair, mask=present, other=0.0)[:, None]
            target = pair
        at_out = out + target[:, None] * columns + column[None, :]
        tl.store(at_out, total.to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """Pairs of a token and a network, by network, in blocks of rows; see _grouped_kernel."""

    order: Tensor
    factors: Tensor
    networks: Tensor
    firsts: Tensor
    ends: Tensor
    rows: int


def sort_pairs(chosen: Tensor, factors: Tensor, count: int) -> SortedPairs:
    """Sort pairs by network. chosen, factors: [tokens, per_token], numbers of networks and their weights. count: of
    all networks. Enqueues only."""
    pairs = chosen.numel()
    rows = next((each for each in _ROWS if each * count >= pairs), _ROWS[-1])
    blocks = min(pairs, count + pairs // rows)
    ordered, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(max(blocks, count + 1), device=chosen.device)
    bounds = torch.searchsorted(ordered, numbers[: count + 1])
    needed = (bounds.diff() + (rows - 1)) // rows
    until = needed.cumsum(0)
    block = numbers[:blocks]
    network = torch.searchsorted(until, block, right=True)
    unused = network == count
    network = network.masked_fill(unused, 0)
    first = bounds[network] + (block - (until - needed)[network]) * rows
    ends = bounds[1:][network].masked_fill(unused, 0)
    return SortedPairs(order, factors.flatten(), network, first, ends, rows)


def grouped_product(x: Tensor, weights: Tensor, pairs: SortedPairs, *, per_token: int, gated: bool) -> Tensor:
    """Multiply rows by the weights of their networks; see _grouped_kernel. Returns [pairs, columns]."""
    check_dtype(x)
    columns, features = weights.shape[1] // (2 if gated else 1), weights.shape[2]
    if x.stride(1) != 1 or not weights.is_contiguous() or x.shape[1] != features or x.dtype != weights.dtype:
        raise ValueError("experts: inputs and weights do not match, or are not contiguous")
    out = torch.empty(len(pairs.order), columns, dtype=x.dtype if gated else torch.float32, device=x.device)
    shrink = x.element_size() // 2
    _grouped_kernel[(triton.cdiv(columns, _COLUMNS // shrink), len(pairs.firsts))](
        x,
        weights,
        out,
        pairs.order,
        pairs.factors,
        pairs.networks,
        pairs.firsts,
        pairs.ends,
        x.stride(0),
        features,
        columns,
        PER_TOKEN=per_token,
        GATED=gated,
        ROWS=pairs.rows,
        COLUMNS=_COLUMNS // shrink,
        CHUNK=_CHUNK // shrink,
        WIDEN=INTERPRETED,
        num_warps=4,
        num_stages=3,
    )
    return out


class GpuExperts:
    """See kernels.ops.Experts. Dense weights of all networks in two tensors."""

    def __init__(self, gate_up: Tensor, down: Tensor, per_token: int, normalised: bool) -> None:
        """gate_up: [networks, 2 size, features], gates first. down: [networks, columns, size]."""
        self._gate_up, self._down = gate_up, down
        self._per_token, self._normalised = per_token, normalised

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        chosen, weights = choose_experts(scores, self._per_token, self._normalised)
        if not len(x):
            return scores.new_zeros(0, self._down.shape[1])
        pairs = sort_pairs(chosen, weights, len(self._down))
        inner = grouped_product(x, self._gate_up, pairs, per_token=self._per_token, gated=True)
        parts = grouped_product(inner, self._down, pairs, per_token=self._per_token, gated=False)
        return parts.view(len(x), self._per_token, -1).sum(1)


def stack_weights(products: Sequence[ReferenceLinear]) -> Tensor:
    """Move the weights of products of one shape into one tensor, [products, columns, features], of which they keep
    their parts."""
    first = products[0].weight
    whole = first.new_empty(len(products), *first.shape)
    for each, part in zip(products, whole, strict=True):
        part.copy_(each.weight)
        each.weight = part
    return whole
