"""Products of inputs with weights of few bits, which are read as they are and unpacked in registers.

Codes are whole numbers, or fp8, that bfloat16 and float16 represent exactly. Tensor cores multiply inputs by codes, sum
each group in float32, and the sums are scaled: weights are never rounded, and inputs are not either, unlike those of
`kernels.reference_ops.Int8Linear`. All of it also holds for many rows, with larger tiles; no second copy of the weights
exists, and a row's results depend on other rows in the rounding of sums alone.

The scheme is that of MARLIN (arXiv 2408.11743): whole lines of codes are copied asynchronously, several tiles ahead,
and converted by operations on bits, and with few rows several programs share the features of a column; their sums are
added in a fixed order by a second kernel. Codes are the left operand of tl.dot, columns before rows: tensor cores take
16 or 64 of these at a time but only 8 rows, and Hopper's take the left operand from registers.

Kept kernels that this replaces:
- torch's `_weight_int4pack_mm`: bfloat16 alone, groups of 32 to 256 and of no other size, scales and zero points
  rounded to bfloat16; made for up to 16 rows, as it unpacks all weights again for every 16, so that prompts would need
  a second layout. `_weight_int8pack_mm` has no groups.
- FlashInfer's products: fp8 and fp4 on both sides or for Blackwell, none with 4-bit integers of sm_80 and sm_90.
- sgl-kernel's and vLLM's MARLIN: the same speed class, but as extensions of hundreds of megabytes, each built for one
  version of torch; no float32, and features and columns only in multiples of 128 and 64.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.checks import check_dtype
from kernels.gpu.products.few_bit_layout import COLUMNS, LINE, FewBitWeights
from kernels.gpu.products.few_bit_sums import few_bit_sums, layout_constants

_REDUCED = 1024  # columns per program of the second kernel
_LINES = 4  # smallest number for a program to have its loads under way together
_MULTIPROCESSORS = 108  # of an A100, where there is no device


class ProductShape(NamedTuple):
    """Tiles of one product. columns, rows: of a program. chunk: features per dot product. splits: programs that share
    the features of a tile. warps, stages: of a program."""

    columns: int
    rows: int
    chunk: int
    splits: int
    warps: int
    stages: int


@triton.jit(do_not_specialize=["rows"])
def _few_bit_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    features: tl.tensor,
    columns: tl.tensor,
    padded_columns: tl.tensor,
    lines: tl.tensor,
    lines_per_split: tl.tensor,
    BIAS: tl.constexpr,
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
    """Multiply a tile of rows by a tile of columns, over the features of one split. Programs of the same columns are
    neighbours, and find their codes in the L2 cache.

    out: [splits, rows, columns]; with several splits, float32, and there is no bias. Others: see few_bit_sums.
    """
    split = tl.program_id(2)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    present = row < rows
    first = split * lines_per_split
    last = tl.minimum(first + lines_per_split, lines)
    sums = few_bit_sums(
        x + row * x_stride,
        present,
        x,  # there is no order
        codes,
        scales,
        mins,
        column,
        features,
        features,
        padded_columns,
        first,
        last,
        FORMAT,
        HALF,
        LINE,
        GROUP,
        ZEROS,
        MINS,
        False,
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
        sums += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)[:, None]
    to = out + (split.to(tl.int64) * rows + row)[:, None] * columns + column[None, :]
    tl.store(to, tl.trans(sums).to(out.dtype.element_ty), mask=present[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["rows"])
def _sum_splits_kernel(
    sums: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    splits: tl.tensor,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add the sums of all splits, in order, and the bias. One program per row and block of columns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    total = tl.zeros([BLOCK], tl.float32)
    size = rows.to(tl.int64) * columns
    for split in range(splits):
        total += tl.load(sums + split * size + row * columns + column, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * columns + column, total.to(out.dtype.element_ty), mask=inside)


def few_bit_product(x: Tensor, weights: FewBitWeights, bias: Tensor | None, *, wide: bool = False) -> Tensor:
    """Compute x w^T + bias: [rows, features] to [rows, columns], float32 if `wide` is set, else in the dtype of x."""
    check_dtype(x)
    x = weights.gather(x)
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, columns, dtype = len(x), weights.columns, torch.float32 if wide else x.dtype
    out = torch.empty(rows, columns, dtype=dtype, device=x.device)
    if not rows:
        return out
    lines, padded_columns, _ = weights.codes.shape
    shape = product_shape(rows, weights, x.dtype)
    per_split = triton.cdiv(lines, shape.splits)
    splits = triton.cdiv(lines, per_split)
    several = splits > 1
    sums = torch.empty(splits, rows, columns, dtype=torch.float32, device=x.device) if several else out
    _few_bit_kernel[(triton.cdiv(rows, shape.rows), triton.cdiv(columns, shape.columns), splits)](
        x,
        weights.codes,
        weights.scales,
        weights.scales if weights.mins is None else weights.mins,
        weights.scales if bias is None else bias,
        sums,
        rows,
        x.stride(0),
        weights.features,
        columns,
        padded_columns,
        lines,
        per_split,
        BIAS=bias is not None and not several,
        **layout_constants(weights, x.dtype),
        COLUMNS=shape.columns,
        ROWS=shape.rows,
        CHUNK=shape.chunk,
        STAGES=shape.stages,
        num_warps=shape.warps,
    )
    if several:
        block = min(_REDUCED, triton.next_power_of_2(columns))
        _sum_splits_kernel[(rows, triton.cdiv(columns, block))](
            sums, out if bias is None else bias, out, rows, columns, splits, BIAS=bias is not None, BLOCK=block
        )
    return out


def product_shape(rows: int, weights: FewBitWeights, dtype: torch.dtype) -> ProductShape:
    """Choose tiles.

    Few rows are bound by reading codes. Up to 64 rows are one tile, so that codes are unpacked once. Programs have 3
    tiles of 8 KiB of codes under way, two or more programs fit a multiprocessor, and unpacking takes 3.3 instructions
    per code of 4 bits (4 of fp8): at 128 lanes per clock an A100 unpacks 1.5 times as many as it reads, an H100 1.3
    times, an H200 0.9 times; of 8 bits, more than twice as many as it reads, or 1.5 times on an H200.

    Many rows are bound by arithmetic, in tiles of 64 rows, or 128 where codes form one group, which needs half the
    sums: as many as registers hold. For 64 rows of 64 features and 128 columns, an A100's tensor cores take 512 cycles
    and an H100's 245, all else about 300 on both. So prompts can be as fast as with dense weights on an A100, and take
    a fifth longer on an H100, at best. These are counts, not measurements.
    """
    lines, padded_columns, _ = weights.codes.shape
    chunk = min(LINE, weights.group & -weights.group or LINE)  # of one group
    if dtype == torch.float32:  # multiplied outside tensor cores, with both tiles in registers
        tile, columns, warps, stages = 16, 64, 4, 2
        chunk = 16
    else:
        largest = 64 if weights.group else 128
        tile = min(largest, max(16, triton.next_power_of_2(rows)))
        columns, warps, stages = COLUMNS, 4 if tile < 64 else 8, 4 if tile < 128 else 3
    programs = triton.cdiv(rows, tile) * triton.cdiv(padded_columns, columns)
    wanted = 2 * _multiprocessors(weights.codes.device) // programs
    # Sums are written and read in float32: at most half as many bytes as codes.
    affordable = lines * LINE // (8 * rows)
    return ProductShape(columns, tile, chunk, max(1, min(wanted, affordable, lines // _LINES)), warps, stages)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
