"""Layout of AWQ, as AutoAWQ writes it for matrix products: `quant_method: awq`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.weights.matrix import QuantizedMatrix, regular_groups
from models.files.json_values import Json, ModelError, flag, integer, short
from models.layouts.module_layout import ModuleLayout, ModuleTensors
from models.layouts.packed_codes import count_words, group_features, integer_matrix, parse_group_size, words_of
from models.weights import FLOATS

_BITS = 4


@dataclass(frozen=True, slots=True)
class AwqFormat:
    """Codes in words along the rows.

    qweight: [features, rows / 8]. qzeros: [groups, rows / 8]. scales: [groups, rows]. symmetric: whether zero points
    are half of the codes.
    """

    group_size: int
    symmetric: bool
    codes = "qweight"
    others = ("qzeros", "scales")

    def check(self, tensors: ModuleTensors, shape: tuple[int, int]) -> None:
        rows, features = shape
        words, count = count_words(rows, _BITS), -(-features // group_features(self.group_size, features))
        tensors["qweight"].check((features, words), ("I32",))
        tensors["scales"].check((count, rows), FLOATS)
        if "qzeros" in tensors or not self.symmetric:
            tensors["qzeros"].check((count, words), ("I32",))

    def read(self, tensors: ModuleTensors, shape: tuple[int, int], rows: slice, features: slice) -> QuantizedMatrix:
        words, codes = words_of(rows, _BITS)
        zeros = self._zeros(tensors)
        size = group_features(self.group_size, shape[1])
        return integer_matrix(
            _unpack_rows(tensors["qweight"].read(features, words))[codes],
            _BITS,
            tensors["scales"].read(slice(0, tensors["scales"].shape[0]), rows).T,
            None if zeros is None else zeros[rows],
            regular_groups(shape[1], size)[features],
            size,
        )

    def _zeros(self, tensors: ModuleTensors) -> Tensor | None:
        """Return the zero points, [rows, groups], or None if the layout is symmetric. What is stored decides: of all
        rows, so that ranks take the same decision."""
        if "qzeros" not in tensors:
            return None
        zeros = _unpack_rows(tensors["qzeros"].read())[: tensors["scales"].shape[1]]
        return None if self.symmetric and bool((zeros == 1 << (_BITS - 1)).all()) else zeros


def _unpack_rows(words: Tensor) -> Tensor:
    """Unpack codes of rows. words: [n, rows / 8] int32. Returns [rows, n] uint8.

    Of eight rows, a word holds first the even ones, then the odd ones.
    """
    octets = words.T.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    octets = octets.view(words.shape[1], words.shape[0], 4).transpose(1, 2).contiguous()
    codes = torch.stack((octets & 15, octets >> 4), 2)  # [rows / 8, 4, 2, n]
    return codes.view(words.shape[1], 2, 4, -1).transpose(1, 2).reshape(-1, words.shape[0])


class AwqLayout(ModuleLayout):
    """Modules of one format."""

    def __init__(self, settings: Json) -> None:
        """Raises ModelError for settings that are not served."""
        version = settings.get("version") or settings.get("format") or "gemm"
        if not isinstance(version, str) or version.lower() != "gemm":
            raise ModelError(f"version {short(version)} is not served; gemm is")
        bits = integer(settings, "bits", settings.get("w_bit"))
        if bits != _BITS:
            raise ModelError(f"bits {bits} is not served; {_BITS} is")
        group_size = parse_group_size(settings, settings.get("q_group_size"))
        wanted = AwqFormat(group_size, symmetric=not flag(settings, "zero_point", True))
        super().__init__(lambda _: wanted)
