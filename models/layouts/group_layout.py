"""Layout of `quant_method` "magicdec", which `magicdec convert` writes: codes of 4 or 8 bits in groups of features."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.weights.matrix import DenseMatrix, Matrix, QuantizedMatrix, narrowed, regular_groups
from models.files.json_values import Json, ModelError, short
from models.layouts.packed_codes import split_bytes
from models.layouts.weight_files import WeightFiles
from models.weights import FLOATS, StoredTensors

METHOD = "magicdec"
VERSION = 1
SETTINGS: Json = {"quant_method": METHOD, "version": VERSION}
"""The `quantization_config` of this layout."""

_WEIGHT = ".weight"
_CODES, _SCALES, _MINS = "codes", "scales", "mins"
_SCALE_TYPES = ("F16", "F32")


@dataclass(frozen=True, slots=True)
class _Codes:
    """Form of a format's codes. dtype: as safetensors names it. per_byte: codes in one byte, the first in the lowest
    bits."""

    format: str
    dtype: str
    per_byte: int


_FORMS = {form.dtype: form for form in (_Codes("int4", "U8", 2), _Codes("int8", "I8", 1))}


class GroupLayout:
    """Matrix `M.weight` is either one floating-point tensor of that name, or these tensors:

    M.codes: int4: uint8 [rows, features / 2], two codes per byte, the first in the low bits; int8: int8 [rows,
    features]. M.scales: [rows, groups] float16 or float32; each group has features / groups features in order, and a
    scale may be negative. M.mins: likewise, or absent. See QuantizedMatrix for the values.
    """

    def __init__(self, settings: Json) -> None:
        if (version := settings.get("version")) != VERSION:
            raise ModelError(f"quantization_config: version {short(version)} is not supported; {VERSION} is")
        if unknown := settings.keys() - SETTINGS.keys():
            raise ModelError(f"quantization_config: {short(min(unknown))} is no key of quant_method {METHOD!r}")

    def tensors(self, name: str, stored: StoredTensors) -> tuple[str, ...]:
        codes, *others = _names(name)
        if codes in stored.sources:
            return (codes, *(other for other in others if other in stored.sources))
        return (name,) if name in stored.sources else ()

    def check(self, files: WeightFiles, name: str, shape: tuple[int, int]) -> None:
        codes, scales, mins = _names(name)
        if codes not in files:
            files[name].check(shape, FLOATS)
            return
        rows, features = shape
        if (form := _FORMS.get(files[codes].dtype)) is None:
            raise ModelError(f"{files[codes].where} has unsupported type {files[codes].dtype}")
        if features % form.per_byte:
            raise ModelError(f"{files[codes].where} has two codes per byte of {features} features, an odd number")
        files[codes].check((rows, features // form.per_byte), (form.dtype,))
        if scales not in files:
            raise ModelError(f"{files[codes].where} has no tensor {scales}")
        found = files[scales].shape
        if len(found) != 2 or found[0] != rows or found[1] < 1 or features % found[1]:
            raise ModelError(f"{files[scales].where} has shape {list(found)}, which makes no groups of {list(shape)}")
        for each in (scales, mins):
            if each in files:
                files[each].check(found, _SCALE_TYPES)

    def read(self, files: WeightFiles, name: str, shape: tuple[int, int], rows: slice, features: slice) -> Matrix:
        self.check(files, name, shape)
        codes, scales, mins = _names(name)
        if codes not in files:
            return DenseMatrix(files[name].read(rows, features))
        form, size = _FORMS[files[codes].dtype], shape[1] // files[scales].shape[1]
        stored = files[codes].read(rows, slice(features.start // form.per_byte, -(-features.stop // form.per_byte)))
        if form.per_byte == 2:
            stored = split_bytes(stored)[:, features.start % 2 :][:, : features.stop - features.start]
        groups = slice(features.start // size, -(-features.stop // size))
        return QuantizedMatrix(
            format=form.format,
            codes=stored,
            scales=files[scales].read(rows, groups).float(),
            mins=files[mins].read(rows, groups).float() if mins in files else None,
            groups=regular_groups(features.stop - features.start, size, first=features.start % size),
            group_size=size,
        )

    def read_all(self, stored: StoredTensors) -> Iterator[tuple[str, Tensor | QuantizedMatrix]]:
        """Yield all weights of a checkpoint with their names, dense ones as tensors. Raises ModelError as `check` does,
        for shapes that contradict each other."""
        with WeightFiles(stored) as files:
            for name in stored.sources:
                module, _, part = name.rpartition(".")
                if part in (_SCALES, _MINS) and f"{module}.{_CODES}" in stored.sources:
                    continue
                if part != _CODES:
                    yield name, files[name].read()
                    continue
                codes = files[name]
                form = _FORMS.get(codes.dtype)
                if form is None or len(codes.shape) != 2:
                    raise ModelError(f"{codes.where} has unsupported type {codes.dtype} or shape {list(codes.shape)}")
                rows, features = codes.shape[0], codes.shape[1] * form.per_byte
                matrix = self.read(files, f"{module}{_WEIGHT}", (rows, features), slice(0, rows), slice(0, features))
                assert isinstance(matrix, QuantizedMatrix)
                yield f"{module}{_WEIGHT}", matrix


def stored_tensors(name: str, matrix: QuantizedMatrix) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that hold matrix `name`, with their names.

    matrix: int4 or int8, with groups of equal size in order. Raises ValueError for any other.
    """
    features, count = matrix.shape[1], matrix.scales.shape[1]
    size = features // count
    if matrix.format not in {form.format for form in _FORMS.values()} or size * count != features:
        raise ValueError(f"{name}: {matrix.format} in {count} groups of {features} features")
    if not torch.equal(matrix.groups, regular_groups(features, size)):
        raise ValueError(f"{name}: its groups are not in order")
    codes, scales, mins = _names(name)
    yield codes, _pack(matrix.codes) if matrix.format == "int4" else matrix.codes.contiguous()
    yield scales, narrowed(matrix.scales).contiguous()
    if matrix.mins is not None:
        yield mins, narrowed(matrix.mins).contiguous()


def _names(name: str) -> tuple[str, str, str]:
    """Return the names of the codes, scales and minima of matrix `name`."""
    module = name.removesuffix(_WEIGHT)
    return f"{module}.{_CODES}", f"{module}.{_SCALES}", f"{module}.{_MINS}"


def _pack(codes: Tensor) -> Tensor:
    """Put pairs of 4-bit codes into bytes. codes: [rows, features] uint8. Returns [rows, features / 2]."""
    return codes[:, 0::2] | codes[:, 1::2] << 4
