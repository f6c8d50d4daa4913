"""Layouts that store the matrix of a quantized module as several tensors, named after their role in the module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from kernels.weights.matrix import Matrix
from models.files.json_values import ModelError
from models.layouts.dense_layout import DENSE
from models.layouts.weight_files import StoredTensor, WeightFiles
from models.weights import FLOATS, StoredTensors

_DENSE_PART = "weight"
"""Tensor of a module that is not quantized; some layouts name the codes of others so too."""


@dataclass(frozen=True, slots=True)
class ModuleTensors:
    """Tensors of one module, by the last part of their names. codes: name of the one that must be there."""

    files: WeightFiles
    module: str
    codes: str

    def __contains__(self, part: str) -> bool:
        return f"{self.module}.{part}" in self.files

    def __getitem__(self, part: str) -> StoredTensor:
        """Return a tensor. Raises ModelError if it is missing."""
        if part not in self:
            beside = self.files[f"{self.module}.{self.codes}"].where
            raise ModelError(f"{beside} has no {self.module}.{part} beside it")
        return self.files[f"{self.module}.{part}"]

    def get(self, part: str) -> StoredTensor | None:
        """Return a tensor, or None if it is missing."""
        return self[part] if part in self else None  # noqa: SIM401  (this is that method)


class MatrixFormat(Protocol):
    """Tensors of a quantized module, and the matrix that they make.

    codes: name of the tensor of codes. others: of all that may be beside it.
    """

    @property
    def codes(self) -> str: ...

    @property
    def others(self) -> tuple[str, ...]: ...

    def check(self, tensors: ModuleTensors, shape: tuple[int, int]) -> None:
        """Raise ModelError unless these tensors make a matrix of this shape."""

    def read(self, tensors: ModuleTensors, shape: tuple[int, int], rows: slice, features: slice) -> Matrix:
        """Read rows and features of the matrix, which has passed `check`."""


class ModuleLayout:
    """Layout in which each module has a format of its own, or none. What is stored decides: a module with one
    floating-point weight is dense, whatever the configuration says of it."""

    def __init__(self, format_of: Callable[[str], MatrixFormat | None]) -> None:
        """format_of: returns the format of the module of this name, or None if it is not quantized."""
        self._format_of = format_of

    def tensors(self, name: str, stored: StoredTensors) -> tuple[str, ...]:
        module = _module(name)
        wanted = self._format_of(module)
        if wanted is None or f"{module}.{wanted.codes}" not in stored.sources:
            return DENSE.tensors(name, stored)
        parts = [f"{module}.{part}" for part in (wanted.codes, *wanted.others)]
        return tuple(part for part in parts if part in stored.sources)

    def check(self, files: WeightFiles, name: str, shape: tuple[int, int]) -> None:
        found = self._find(files, name)
        if found is None:
            DENSE.check(files, name, shape)
        else:
            wanted, tensors = found
            wanted.check(tensors, shape)

    def read(self, files: WeightFiles, name: str, shape: tuple[int, int], rows: slice, features: slice) -> Matrix:
        found = self._find(files, name)
        if found is None:
            return DENSE.read(files, name, shape, rows, features)
        wanted, tensors = found
        wanted.check(tensors, shape)
        return wanted.read(tensors, shape, rows, features)

    def _find(self, files: WeightFiles, name: str) -> tuple[MatrixFormat, ModuleTensors] | None:
        """Return the format of a matrix and its tensors; None: it is dense."""
        module = _module(name)
        wanted = self._format_of(module)
        if wanted is None:
            return None
        tensors = ModuleTensors(files, module, wanted.codes)
        if wanted.codes not in tensors:
            return None
        if wanted.codes == _DENSE_PART and not any(part in tensors for part in wanted.others):
            return None if tensors[_DENSE_PART].dtype in FLOATS else (wanted, tensors)
        return wanted, tensors


def _module(name: str) -> str:
    return name.removesuffix(f".{_DENSE_PART}")
