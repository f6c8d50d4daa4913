"""Matrices whose codes are stored one per element, with scales of blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from kernels.weights.matrix import QuantizedMatrix, regular_groups
from models.files.json_values import ModelError
from models.layouts.block_scales import check_scales, read_blocks, read_scales
from models.layouts.module_layout import ModuleTensors
from models.layouts.packed_codes import grouped_matrix
from models.layouts.weight_files import StoredTensor

Block = Callable[[tuple[int, int]], tuple[int, int]]
"""Rows and features of a block that has a scale, by the shape of the matrix."""
FP8, INT8 = "fp8", "int8"
_DTYPES = {FP8: "F8_E4M3", INT8: "I8"}


@dataclass(frozen=True, slots=True)
class ScaledFormat:
    """One tensor of codes, `weight`: [rows, features].

    name: of the format of the matrix. block: None: of the whole matrix or of a row, as many as there are scales.
    scales: names that the scales may have. zeros: of the zero points, which are like scales but integers. symmetric:
    whether zero points are 0; they may then be left out. rounds_inputs: whether products round inputs to 8 bits, where
    each row has one scale.
    """

    name: str
    block: Block | None
    scales: tuple[str, ...]
    zeros: str | None = None
    symmetric: bool = True
    rounds_inputs: bool = False
    codes = "weight"

    @property
    def others(self) -> tuple[str, ...]:
        return (*self.scales, self.zeros) if self.zeros else self.scales

    def check(self, tensors: ModuleTensors, shape: tuple[int, int]) -> None:
        tensors["weight"].check(shape, (_DTYPES[self.name],))
        scales = self._scales(tensors)
        check_scales(scales, shape, self._block(scales, shape))
        if self.zeros and (self.zeros in tensors or not self.symmetric):
            zeros = tensors[self.zeros]
            zeros.check(scales.shape, ("I8", "F8_E4M3") if self.symmetric else ("I8",))
            if self.symmetric and zeros.read().float().any():
                raise ModelError(f"{zeros.where} is not 0, but the configuration says symmetric")

    def read(self, tensors: ModuleTensors, shape: tuple[int, int], rows: slice, features: slice) -> QuantizedMatrix:
        stored = self._scales(tensors)
        block = self._block(stored, shape)
        scales = read_scales(stored, shape, block, rows)
        matrix = grouped_matrix(
            self.name,
            tensors["weight"].read(rows, features),
            scales,
            self._mins(tensors, scales, shape, block, rows),
            regular_groups(shape[1], block[1])[features],
            min(block[1], shape[1]),
        )
        return replace(matrix, rounds_inputs=self.rounds_inputs and self.symmetric and block[1] >= shape[1])

    def _mins(
        self, tensors: ModuleTensors, scales: Tensor, shape: tuple[int, int], block: tuple[int, int], rows: slice
    ) -> Tensor | None:
        if self.zeros is None or self.symmetric:
            return None
        return -read_blocks(tensors[self.zeros], shape, block, rows).float() * scales

    def _scales(self, tensors: ModuleTensors) -> StoredTensor:
        return tensors[next((name for name in self.scales if name in tensors), self.scales[0])]

    def _block(self, scales: StoredTensor, shape: tuple[int, int]) -> tuple[int, int]:
        if self.block is not None:
            return self.block(shape)
        return shape if math.prod(scales.shape) == 1 else (1, shape[1])
