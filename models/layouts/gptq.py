"""Layout of GPTQ, as AutoGPTQ and GPTQModel write it: `quant_method: gptq`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from kernels.weights.matrix import QuantizedMatrix
from models.files.json_values import Json, ModelError, flag, integer, short
from models.layouts.module_layout import ModuleLayout, ModuleTensors
from models.layouts.packed_codes import (
    count_words,
    group_features,
    groups_of,
    integer_matrix,
    parse_group_size,
    unpack,
    words_of,
)
from models.weights import FLOATS

_STORED_LESS = {"gptq": 1, "gptq_v2": 0}
"""By checkpoint_format: the number that stored zero points are less than those that are meant."""


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """Codes in words along the features.

    qweight: [features / codes per word, rows]. qzeros: [groups, rows / codes per word]. scales: [groups, rows]. g_idx:
    [features], the group of each; without it groups are regular. symmetric: whether zero points are half of the codes.
    ordered: whether groups are out of order, so that several of them need g_idx.
    """

    bits: int
    group_size: int
    symmetric: bool
    stored_less: int
    ordered: bool
    codes = "qweight"
    others = ("qzeros", "scales", "g_idx")

    def check(self, tensors: ModuleTensors, shape: tuple[int, int]) -> None:
        rows, features = shape
        count = -(-features // group_features(self.group_size, features))
        tensors["qweight"].check((count_words(features, self.bits), rows), ("I32",))
        tensors["qzeros"].check((count, count_words(rows, self.bits)), ("I32",))
        tensors["scales"].check((count, rows), FLOATS)
        self._groups(tensors, features)

    def read(self, tensors: ModuleTensors, shape: tuple[int, int], rows: slice, features: slice) -> QuantizedMatrix:
        groups = self._groups(tensors, shape[1])
        words, codes = words_of(features, self.bits)
        packed = tensors["qweight"].read(words, rows)
        zeros = self._zeros(tensors)
        return integer_matrix(
            unpack(packed.T, self.bits)[:, codes],
            self.bits,
            tensors["scales"].read(slice(0, tensors["scales"].shape[0]), rows).T,
            None if zeros is None else zeros[rows],
            groups[features],
            group_features(self.group_size, shape[1]),
        )

    def _groups(self, tensors: ModuleTensors, features: int) -> Tensor:
        size = group_features(self.group_size, features)
        return groups_of(features, size, tensors["g_idx"] if self.ordered and size < features else tensors.get("g_idx"))

    def _zeros(self, tensors: ModuleTensors) -> Tensor | None:
        """Return the zero points, [rows, groups], or None if the layout is symmetric. What is stored decides: of all
        rows, so that ranks take the same decision."""
        zeros = unpack(tensors["qzeros"].read(), self.bits).T.int() + self.stored_less
        zeros = zeros[: tensors["scales"].shape[1]]
        return None if self.symmetric and bool((zeros == 1 << (self.bits - 1)).all()) else zeros


class GptqLayout(ModuleLayout):
    """Modules of one format, and of others that `dynamic` lists."""

    def __init__(self, settings: Json) -> None:
        """Raises ModelError for settings that are not served."""
        written = settings.get("checkpoint_format") or settings.get("format") or "gptq"
        if not isinstance(written, str) or written not in _STORED_LESS:
            raise ModelError(f"checkpoint_format {short(written)} is not served; {' and '.join(_STORED_LESS)} are")
        if settings.get("is_marlin_format"):
            raise ModelError("is_marlin_format true is not served; checkpoint_format gptq is")
        packed = settings.get("pack_dtype")
        if packed not in (None, "int32"):
            raise ModelError(f"pack_dtype {short(packed)} is not served; int32 is")
        self._settings, self._stored_less = settings, _STORED_LESS[written]
        self._default = self._parse(settings)
        self._others = self._parse_dynamic(settings.get("dynamic"))
        super().__init__(self._format)

    def _format(self, module: str) -> GptqFormat | None:
        for pattern, wanted in self._others:
            if pattern.match(module):
                return wanted
        return self._default

    def _parse(self, settings: Json) -> GptqFormat:
        bits = integer(settings, "bits")
        if bits not in (4, 8):
            raise ModelError(f"bits {bits} is not served; 4 and 8 are")
        ordered = flag(settings, "desc_act", False)
        return GptqFormat(bits, parse_group_size(settings), flag(settings, "sym", True), self._stored_less, ordered)

    def _parse_dynamic(self, dynamic: object) -> list[tuple[re.Pattern[str], GptqFormat | None]]:
        """Return what the first pattern that matches a module's name makes of it; None: it is not quantized."""
        found: list[tuple[re.Pattern[str], GptqFormat | None]] = []
        if dynamic is None or dynamic is False:
            return found
        if not isinstance(dynamic, dict):
            raise ModelError(f"dynamic {short(dynamic)} is not an object")
        for key, changes in dynamic.items():
            try:
                pattern = re.compile(key.removeprefix("-:").removeprefix("+:"))
            except (re.error, OverflowError, RecursionError) as error:
                raise ModelError(f"dynamic: {short(key)} is not a regular expression: {error}") from None
            if key.startswith("-:"):
                found.append((pattern, None))
            elif isinstance(changes, dict):
                found.append((pattern, self._parse({**self._settings, **changes})))
            else:
                raise ModelError(f"dynamic: {short(changes)} is not an object")
        return found
