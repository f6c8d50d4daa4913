"""Tensors of a checkpoint's open files, of which parts can be read in any order."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from torch import Tensor

from models.files.json_values import ModelError
from models.layouts.stacked_experts import StackedPart
from models.weights import FLOATS, StoredTensors, opened

_PACKED = ("F4", "F6_")
"""Beginnings of the types whose elements are less than a byte, which safetensors cuts and shapes as whole ones."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. name: there. part: the part of it that this is; None: all."""

    file: Path
    name: str
    handle: Any  # of safetensors
    part: StackedPart | None = None

    @property
    def where(self) -> str:
        """Where the tensor is, for messages."""
        of = "" if self.part is None else f"expert {self.part.expert} of "
        return f"{self.file}: {of}tensor {self.name}"

    @property
    def shape(self) -> tuple[int, ...]:
        stored = tuple(self.handle.get_shape())
        return stored if self.part is None else self.part.shape(stored)

    @property
    def dtype(self) -> str:
        """Type as safetensors names it, such as BF16."""
        dtype: str = self.handle.get_dtype()
        return dtype

    def read(self, *index: slice) -> Tensor:
        """Read a part, or, without an index, all of it. Raises ModelError for a type that is not read."""
        if self.dtype.startswith(_PACKED):
            raise ModelError(f"{self.where} has unsupported type {self.dtype}")
        try:
            if self.part is not None:
                return self.part.read(self.handle, *index)
            part: Tensor = self.handle[index] if index else self.handle[:] if self.shape else self.handle[...]
            return part
        except SafetensorError as error:
            raise ModelError(f"{self.where} cannot be read: {error}") from error

    def check(self, shape: tuple[int, ...], dtypes: tuple[str, ...] = FLOATS) -> None:
        """Raise ModelError unless the tensor has this shape and one of these types."""
        if self.shape != shape:
            raise ModelError(f"{self.where} has shape {list(self.shape)}, expected {list(shape)}")
        if self.dtype not in dtypes:
            raise ModelError(f"{self.where} has unsupported type {self.dtype}")


class WeightFiles:
    """Files of a checkpoint, opened when one of their tensors is first asked for. Use it as a context manager."""

    def __init__(self, stored: StoredTensors) -> None:
        self._sources, self._parts = stored.sources, stored.parts
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._sources

    def __getitem__(self, name: str) -> StoredTensor:
        """Return the tensor that the model knows by `name`. Raises ModelError if its file cannot be read."""
        file, stored_name = self._sources[name]
        if file not in self._open:
            self._open[file] = self._stack.enter_context(opened(file))
        return StoredTensor(file, stored_name, self._open[file].get_slice(stored_name), self._parts.get(name))
