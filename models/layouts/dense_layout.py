"""Layout of checkpoints that are not quantized, and of the modules of others that are not."""

from __future__ import annotations

from kernels.weights.matrix import DenseMatrix
from models.layouts.weight_files import WeightFiles
from models.weights import FLOATS, StoredTensors


class DenseLayout:
    """Each matrix is one floating-point tensor."""

    def tensors(self, name: str, stored: StoredTensors) -> tuple[str, ...]:
        return (name,) if name in stored.sources else ()

    def check(self, files: WeightFiles, name: str, shape: tuple[int, int]) -> None:
        files[name].check(shape, FLOATS)

    def read(self, files: WeightFiles, name: str, shape: tuple[int, int], rows: slice, features: slice) -> DenseMatrix:
        self.check(files, name, shape)
        return DenseMatrix(files[name].read(rows, features))


DENSE = DenseLayout()
