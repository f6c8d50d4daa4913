"""Sums of a tile: codes of few bits are unpacked in registers, and multiplied by inputs on tensor cores. Shared by the
products of one matrix and of those of experts."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.gpu import INTERPRETED
from kernels.gpu.products.few_bit_layout import LINE, FewBitWeights, codes_per_word
from kernels.gpu.tile import product


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


@triton.jit
def few_bit_sums(
    of_row: tl.tensor,
    present: tl.tensor,
    order: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    mins: tl.tensor,
    column: tl.tensor,
    features: tl.tensor,
    in_features: tl.tensor,
    padded_columns: tl.tensor,
    first: tl.tensor,
    last: tl.tensor,
    FORMAT: tl.constexpr,
    HALF: tl.constexpr,
    LINE: tl.constexpr,
    GROUP: tl.constexpr,
    ZEROS: tl.constexpr,
    MINS: tl.constexpr,
    ORDER: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    WIDEN: tl.constexpr,
) -> tl.tensor:
    """Multiply columns by rows over the features of lines first … last - 1: [COLUMNS, ROWS] float32.

    of_row: [ROWS], where inputs of each row begin. present: [ROWS], whether there is such a row. column: [COLUMNS].
    codes, scales, mins, features: see FewBitWeights; so are GROUP, ZEROS and MINS. order: FewBitWeights.order, if ORDER
    is set; inputs then have `in_features` features. SHARED: parts of a line in one group. WHOLE: whether lines have no
    padding.
    """
    PARTS: tl.constexpr = 4 if FORMAT == "int4" else 2
    CHUNKS: tl.constexpr = LINE // CHUNK
    BASE: tl.constexpr = 0x6400 if tl.float16 == HALF else 0x4300
    ZERO: tl.constexpr = (1024 if tl.float16 == HALF else 128) + (0 if MINS else 8)
    place = tl.arange(0, CHUNK)
    in_line = column[:, None] * LINE + place[None, :]
    line_stride = padded_columns.to(tl.int64) * LINE
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    for step in tl.range(first * CHUNKS, last * CHUNKS, num_stages=STAGES):
        line, start = step // CHUNKS, step % CHUNKS * CHUNK
        words = tl.load(codes + line * line_stride + in_line + start)
        partial = sums if GROUP == 0 else tl.zeros([COLUMNS, ROWS], tl.float32)
        for part in tl.static_range(PARTS):
            feature = (line * PARTS + part) * LINE + start
            read = present[:, None] if WHOLE else present[:, None] & (feature + place < features)[None, :]
            where = feature + place
            if ORDER:
                where = tl.load(order + where, mask=where < features, other=in_features)
                read = present[:, None] & (where < in_features)[None, :]
            inputs = tl.load(of_row[:, None] + where[None, :], mask=read, other=0.0)
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
    return sums


def layout_constants(weights: FewBitWeights, dtype: torch.dtype) -> dict[str, Any]:
    """Return those constants of `few_bit_sums` that depend on the layout and on the dtype of inputs."""
    group, features, parts = weights.group, weights.features, codes_per_word(weights.format)
    return {
        "FORMAT": weights.format,
        "HALF": tl.float16 if dtype == torch.float16 else tl.bfloat16,
        "LINE": LINE,
        "GROUP": group,
        "ZEROS": weights.has_zeros,
        "MINS": weights.mins is not None,
        "SHARED": parts if not group else max(1, min(group & -group, LINE * parts) // LINE),
        "WHOLE": features % weights.features_per_line == 0,
        "WIDEN": INTERPRETED or dtype == torch.float32,
    }
