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

from kernels.gpu import INTERPRETED
from kernels.gpu.checks import check_dtype
from kernels.gpu.products.few_bit_layout import COLUMNS, LINE, FewBitWeights, codes_per_word
from kernels.gpu.tile import product

_REDUCED = 1024  # columns per program of the second kernel
_LINES = 4  # smallest number for a program to have its loads under way together
_MULTIPROCESSORS = 108  # of an A100, where there is no device


class FewBitLinear:
    """See kernels.ops.Linear."""

    references_weights = False

    def __init__(self, weights: FewBitWeights, bias: Tensor | None, wide: bool) -> None:
        self._weights, self._bias, self._wide = weights, bias, wide

    @property
    def nbytes(self) -> int:
        return self._weights.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return few_bit_product(x, self._weights, self._bias, wide=self._wide)


class ProductShape(NamedTuple):
    """Tiles of one product. columns, rows: of a program. chunk: features per dot product. splits: programs that share
    the features of a tile. warps, stages: of a program."""

    columns: int
    rows: int
    chunk: int
    splits: int
    warps: int
    stages: int


@triton.constexpr_function
def _assembly(shift: int, mask: int, base: int) -> str:
    """Instructions for two 16-bit words in one register: words >> shift & mask | base. The table of the last one is
    that of a & b | c."""
    shifted = f"shr.b32 t, $1, {shift}" if shift >= 0 else f"shl.b32 t, $1, {-shift}"
    return f"{{ .reg .b32 t; {shifted}; lop3.b32 $0, t, {(mask & 0xFFFF) * 0x10001:#x}, {base * 0x10001:#x}, 0xEA; }}"


@triton.jit
def _bits(
    words: tl.tensor, SHIFT: tl.constexpr, MASK: tl.constexpr, BASE: tl.constexpr, WIDEN: tl.constexpr
) -> tl.tensor:
    """Compute words >> SHIFT & MASK | BASE, for tensor cores two words at a time. MASK has no bits that would come from
    another word. SHIFT: negative to the left."""
    if not WIDEN:
        bits = tl.inline_asm_elementwise(
            _assembly(SHIFT, MASK, BASE), "=r,r", [words], dtype=tl.int16, is_pure=True, pack=2
        )
    elif SHIFT >= 0:
        bits = ((words >> SHIFT) & MASK) | BASE
    else:
        bits = ((words << -SHIFT) & MASK) | BASE
    return bits


@triton.jit
def _float(bits: tl.tensor, HALF: tl.constexpr, WIDEN: tl.constexpr) -> tl.tensor:
    """Read bits as numbers of type HALF, as float32 if WIDEN is set (see kernels.gpu.tile.product)."""
    if WIDEN and tl.bfloat16 == HALF:  # by bits: Triton's interpreter converts subnormal numbers to others
        value = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif WIDEN:
        value = bits.to(HALF, bitcast=True).to(tl.float32)
    else:
        value = bits.to(HALF, bitcast=True)
    return value


@triton.jit
def _unpack(
    words: tl.tensor, zero: tl.tensor, PART: tl.constexpr, FORMAT: tl.constexpr, HALF: tl.constexpr, WIDEN: tl.constexpr
) -> tl.tensor:
    """Convert one code of each word to its value, less `zero` for int4, without rounding.

    HALF: bfloat16 or float16. A number of few bits in the lowest bits of 128 (of 1024 in float16) adds to it.
    """
    BASE: tl.constexpr = 0x6400 if tl.float16 == HALF else 0x4300
    if FORMAT == "int4":
        value = _float(_bits(words, 4 * PART, 0xF, BASE, WIDEN), HALF, WIDEN) - zero
    elif FORMAT == "int8":  # the low 7 bits, less 128 if the code is negative
        low, sign = _bits(words, 8 * PART, 0x7F, BASE, WIDEN), _bits(words, 8 * PART, 0x80, BASE, WIDEN)
        value = _float(low, HALF, WIDEN) - _float(sign, HALF, WIDEN)
    else:  # the same numbers with smaller exponents, subnormal ones too
        SHIFT: tl.constexpr = 1 if tl.float16 == HALF else 4
        MASK: tl.constexpr = 0x3F80 if tl.float16 == HALF else 0x07F0
        FACTOR: tl.constexpr = 2.0**8 if tl.float16 == HALF else 2.0**120
        sign = _bits(words, 8 * PART - 8, -0x8000, 0, WIDEN)
        bits = sign | _bits(words, 8 * PART - 8 + SHIFT, MASK, 0, WIDEN)
        value = _float(bits, HALF, WIDEN) * FACTOR
    return value


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
    FORMAT: tl.constexpr,
    HALF: tl.constexpr,
    LINE: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    MINS: tl.constexpr,
    BIAS: tl.constexpr,
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

    out: [splits, rows, columns]; with several splits, float32, and there is no bias. GROUP, ZEROS, MINS: see
    FewBitWeights. SHARED: parts of a line in one group. WHOLE: whether lines have no padding.
    """
    PARTS: tl.constexpr = 4 if FORMAT == "int4" else 2
    CHUNKS: tl.constexpr = LINE // CHUNK
    BASE: tl.constexpr = 0x6400 if tl.float16 == HALF else 0x4300
    ZERO: tl.constexpr = (1024 if tl.float16 == HALF else 128) + (0 if MINS else 8)
    split = tl.program_id(2)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, CHUNK)
    present = row < rows
    of_row = x + row * x_stride
    in_line = column[:, None] * LINE + place[None, :]
    line_stride = padded_columns.to(tl.int64) * LINE
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    first = split * lines_per_split
    last = tl.minimum(first + lines_per_split, lines)
    for step in tl.range(first * CHUNKS, last * CHUNKS, num_stages=STAGES):
        line, start = step // CHUNKS, step % CHUNKS * CHUNK
        words = tl.load(codes + line * line_stride + in_line + start)
        partial = sums if GROUP == 0 else tl.zeros([COLUMNS, ROWS], tl.float32)
        for part in tl.static_range(PARTS):
            feature = (line * PARTS + part) * LINE + start
            read = present[:, None] if WHOLE else present[:, None] & (feature + place < features)[None, :]
            inputs = tl.load(of_row[:, None] + (feature + place)[None, :], mask=read, other=0.0)
            at = column if GROUP == 0 else feature // GROUP * padded_columns + column
            if ZEROS and part % SHARED == 0:
                word = tl.load(scales + at)
                zero = _float((word >> 16).to(tl.int16) | BASE, HALF, WIDEN)[:, None]
                scale = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
            if not ZEROS:
                zero = tl.full([COLUMNS, 1], ZERO, tl.float32 if WIDEN else HALF)
                if GROUP != 0 and part % SHARED == 0:
                    scale = tl.load(scales + at)
            weights = _unpack(words, zero, part, FORMAT, HALF, WIDEN)
            partial += product(weights, tl.trans(inputs), WIDEN)
            if GROUP != 0 and (part + 1) % SHARED == 0:
                sums += partial * scale[:, None]
                partial = tl.zeros([COLUMNS, ROWS], tl.float32)
            if MINS:
                total = tl.sum(inputs.to(tl.float32), 1)
                sums += tl.load(mins + at)[:, None] * total[None, :]
        if GROUP == 0:
            sums = partial
    if GROUP == 0:
        scale = tl.load(scales + column)
        if ZEROS:
            scale = scale.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        sums *= scale[:, None]
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
    several, parts = splits > 1, codes_per_word(weights.format)
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
        FORMAT=weights.format,
        HALF=tl.float16 if x.dtype == torch.float16 else tl.bfloat16,
        LINE=LINE,
        GROUP=weights.group,
        ZEROS=weights.has_zeros,
        MINS=weights.mins is not None,
        BIAS=bias is not None and not several,
        SHARED=parts if not weights.group else max(1, min(weights.group & -weights.group, LINE * parts) // LINE),
        WHOLE=weights.features == lines * weights.features_per_line,
        COLUMNS=shape.columns,
        ROWS=shape.rows,
        CHUNK=shape.chunk,
        STAGES=shape.stages,
        WIDEN=INTERPRETED or x.dtype == torch.float32,
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
