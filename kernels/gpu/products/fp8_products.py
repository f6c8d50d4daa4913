"""Products of fp8 weights by the tensor cores that multiply fp8 itself: torch._scaled_mm, on GPUs of compute capability
8.9 or more.

Inputs are rounded to fp8 as well, with one scale per row, for any number of rows: so a token's results do not depend on
whether it is verified beside others or decoded alone. That adds an error of about 3 % to each input, twice that of
rounding weights, in exchange for products of many rows in half the time of bfloat16's. Models in other dtypes than
bfloat16, and matrices with several scales per row, keep their inputs (kernels.gpu.products.few_bit_products).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gpu.products.few_bit_layout import lay_out
from kernels.gpu.products.few_bit_linear import FewBitLinear
from kernels.gpu.tile import fp8_codes
from kernels.weights.fp8_weights import LARGEST
from kernels.weights.matrix import TINY, QuantizedMatrix

_ALIGNMENT = 16  # of both sizes of a matrix, for torch._scaled_mm


@triton.jit
def _round_inputs_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    x_stride: tl.tensor,
    size: tl.tensor,
    LARGEST: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Round a row to fp8, to nearest, halves to even. One program per row. GPUs before 8.9 compile it too."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < size
    value = tl.load(x + row * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(value), 0), LARGEST), TINY)
    tl.store(scales + row, scale)
    value = tl.div_rn(value, scale)  # NaN where an input is NaN or infinite
    tl.store(codes + row * size + i, fp8_codes(value), mask=inside)


def round_inputs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [rows, features] in float8_e4m3fn, and the scales of its rows, [rows, 1] float32."""
    rows, size = x.shape
    codes = torch.empty(rows, size, dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // 512))
    _round_inputs_kernel[(rows,)](
        x, codes, scales, x.stride(0), size, LARGEST=LARGEST, TINY=TINY, BLOCK=block, num_warps=warps
    )
    return codes.view(torch.float8_e4m3fn), scales


def multiplies_fp8(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether models of this dtype on this device multiply fp8 weights by fp8 inputs."""
    if dtype != torch.bfloat16 or device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Linear:
    """See GpuProduct."""

    references_weights = False

    def __init__(self, matrix: QuantizedMatrix, bias: Tensor | None, wide: bool) -> None:
        self._codes, self._bias, self._wide = matrix.codes.contiguous(), bias, wide
        self._scales = matrix.scales.reshape(1, -1)

    @staticmethod
    def takes(matrix: QuantizedMatrix) -> bool:
        """Whether a matrix has fp8 codes, one scale per row, and sizes that the library takes."""
        if matrix.format != "fp8" or matrix.mins is not None or matrix.scales.shape[1] != 1:
            return False
        return all(size % _ALIGNMENT == 0 for size in matrix.shape)

    @property
    def nbytes(self) -> int:
        return self._codes.nbytes + self._scales.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        if not len(x):
            y = x.new_empty(0, len(self._codes))
        else:
            codes, scales = round_inputs(x)
            y = torch._scaled_mm(
                codes, self._codes.t(), scale_a=scales, scale_b=self._scales, bias=self._bias, out_dtype=x.dtype
            )
        return y.float() if self._wide else y

    def groupable(self) -> FewBitLinear:
        """See GpuProduct. The result keeps inputs as they are."""
        columns, features = self._codes.shape
        matrix = QuantizedMatrix(
            format="fp8",
            codes=self._codes,
            scales=self._scales.view(columns, 1),
            mins=None,
            groups=torch.zeros(features, dtype=torch.int64, device=self._codes.device),
            group_size=features,
        )
        return FewBitLinear(lay_out(matrix), self._bias, self._wide)
