"""Layouts of llm-compressor: `quant_method: compressed-tensors`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from kernels.weights.matrix import QuantizedMatrix
from models.files.json_values import Json, ModelError, flag, integer, short
from models.layouts.block_scales import check_scales, read_scales
from models.layouts.fp8 import parse_block
from models.layouts.module_layout import MatrixFormat, ModuleLayout, ModuleTensors
from models.layouts.mxfp4 import GROUP as MX_GROUP
from models.layouts.mxfp4 import PACKED, SCALES, Mxfp4Format
from models.layouts.packed_codes import (
    INTEGERS,
    count_words,
    groups_of,
    integer_matrix,
    parse_group_size,
    unpack,
    words_of,
)
from models.layouts.scaled_codes import FP8, INT8, Block, ScaledFormat
from models.weights import EMBEDDING

SHAPE, ZEROS = "weight_shape", "weight_zero_point"
"""Names of a module's tensors, beside those that MXFP4 has too."""
_INDEX = "weight_g_idx"
_FORMATS = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized"),
    *("mxfp4-pack-quantized", "mxfp8-quantized"),
)
_FIXED_ORDERS = (None, False, "weight", "static")
"""Values of actorder with which groups are regular."""


@dataclass(frozen=True, slots=True)
class PackedFormat:
    """`pack-quantized`: codes in words along the features.

    weight_packed: [rows, features / codes per word]. weight_scale: one per block. weight_zero_point: packed along the
    rows. weight_g_idx: [features], the group of each, if ordered.
    """

    bits: int
    block: Block
    symmetric: bool
    ordered: bool
    codes = PACKED

    @property
    def others(self) -> tuple[str, ...]:
        zeros = () if self.symmetric else (ZEROS,)
        return (SCALES, SHAPE, *zeros, *((_INDEX,) if self.ordered else ()))

    def check(self, tensors: ModuleTensors, shape: tuple[int, int]) -> None:
        rows, features = shape
        tensors[PACKED].check((rows, count_words(features, self.bits)), ("I32",))
        check_scales(tensors[SCALES], shape, self.block(shape))
        stored = tensors.get(SHAPE)
        if stored is not None:
            stored.check((2,), INTEGERS)
            if tuple(stored.read().tolist()) != shape:
                raise ModelError(f"{stored.where} is {stored.read().tolist()}, expected {list(shape)}")
        if not self.symmetric:
            count = -(-features // self.block(shape)[1])
            tensors[ZEROS].check((count_words(rows, self.bits), count), ("I32",))
        self._groups(tensors, shape)

    def read(self, tensors: ModuleTensors, shape: tuple[int, int], rows: slice, features: slice) -> QuantizedMatrix:
        words, codes = words_of(features, self.bits)
        block = self.block(shape)
        return integer_matrix(
            unpack(tensors[PACKED].read(rows, words), self.bits)[:, codes],
            self.bits,
            read_scales(tensors[SCALES], shape, block, rows),
            None if self.symmetric else self._zeros(tensors, rows),
            self._groups(tensors, shape)[features],
            block[1],
        )

    def _zeros(self, tensors: ModuleTensors, rows: slice) -> Tensor:
        """Read zero points, [rows, groups]."""
        words, codes = words_of(rows, self.bits)
        packed = tensors[ZEROS].read(words)
        return unpack(packed.T, self.bits).T[codes]

    def _groups(self, tensors: ModuleTensors, shape: tuple[int, int]) -> Tensor:
        index = tensors[_INDEX] if self.ordered else None
        return groups_of(shape[1], self.block(shape)[1], index)


class CompressedTensorsLayout(ModuleLayout):
    """Modules of the formats of `config_groups`. `ignore` lists those that are dense."""

    def __init__(self, settings: Json) -> None:
        """Raises ModelError for settings that are not served."""
        self._ignored = _names(settings, "ignore")
        self._targets: dict[str, MatrixFormat | None] = {}
        groups = settings.get("config_groups")
        if not isinstance(groups, dict):
            raise ModelError(f"config_groups {short(groups)} is not an object")
        if not groups:
            raise ModelError("config_groups is empty: a kv_cache_scheme alone is not served")
        if settings.get("transform_config"):
            raise ModelError("transform_config is not served: transforms of inputs are not computed")
        sparsity = settings.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
            raise ModelError(f"sparsity_config: format {short(sparsity['format'])} is not served; dense is")
        for name, group in groups.items():
            if not isinstance(group, dict):
                raise ModelError(f"config_groups: {short(name)}: {short(group)} is not an object")
            try:
                wanted = _parse_group(group, group.get("format") or settings.get("format"))
                for target in _names(group, "targets"):
                    self._targets[target] = wanted
            except ModelError as error:
                raise ModelError(f"config_groups: {short(name)}: {error}") from None
        super().__init__(self._format)

    def _format(self, module: str) -> MatrixFormat | None:
        """Return the format of the first target in order: names, patterns, classes."""
        own_class = "Embedding" if f"{module}.weight" == EMBEDDING else "Linear"
        if any(_matches(module, name) or name == own_class for name in self._ignored):
            return None
        by_name = [target for target in sorted(self._targets, key=_is_pattern) if _matches(module, target)]
        found = next(iter(by_name), own_class)
        return self._targets.get(found)


def _parse_group(group: Json, written: object) -> MatrixFormat | None:
    """Parse a group of modules whose tensors have the format `written`. Returns None: its weights are dense."""
    weights = group.get("weights")
    if weights is None:
        return None
    if not isinstance(weights, dict):
        raise ModelError(f"weights {short(weights)} is not an object")
    if not isinstance(written, str) or written not in _FORMATS:
        raise ModelError(f"format {short(written)} is not served; these are: {', '.join(_FORMATS)}")
    inputs = group.get("input_activations")
    rounds_inputs = isinstance(inputs, dict) and inputs.get("num_bits") == 8 and inputs.get("type", "int") == "int"
    try:
        return _parse_weights(weights, written, rounds_inputs)
    except ModelError as error:
        raise ModelError(f"weights: {error}") from None


def _parse_weights(weights: Json, written: str, rounds_inputs: bool) -> MatrixFormat:
    bits, kind = integer(weights, "num_bits", 8), weights.get("type", "int")
    symmetric = flag(weights, "symmetric", True)
    is_float = written in ("float-quantized", "mxfp4-pack-quantized", "mxfp8-quantized")
    if kind not in ("int", "float") or (written != "naive-quantized" and is_float != (kind == "float")):
        raise ModelError(f"type {short(kind)} is not served in format {written}")
    served = (4,) if written == "mxfp4-pack-quantized" else (4, 8) if kind == "int" else (8,)
    if bits not in served:
        are = "and ".join(f"{each} " for each in served) + ("are" if len(served) > 1 else "is")
        raise ModelError(f"num_bits {bits} of type {kind} is not served; {are}")
    if kind == "float" and not symmetric:
        raise ModelError("symmetric false is not served with type float")
    if written == "mxfp4-pack-quantized":
        if weights.get("group_size") != MX_GROUP:
            raise ModelError(f"group_size {short(weights.get('group_size'))} is not served; {MX_GROUP} is")
        return Mxfp4Format()
    block = _parse_block(weights)
    if written == "pack-quantized":
        return PackedFormat(bits, block, symmetric, ordered=weights.get("actorder") not in _FIXED_ORDERS)
    if weights.get("actorder") not in _FIXED_ORDERS:
        raise ModelError(f"actorder {short(weights['actorder'])} is not served in format {written}")
    # An int8 tensor holds codes of fewer bits as well.
    if kind == "float":
        return ScaledFormat(FP8, block, (SCALES,), ZEROS, symmetric)
    return ScaledFormat(INT8, block, (SCALES,), ZEROS, symmetric, rounds_inputs)


def _parse_block(weights: Json) -> Block:
    """Parse the blocks that have a scale each."""
    group_size = parse_group_size(weights, -1)
    inferred = "group" if group_size > 0 else "tensor" if weights.get("group_size") is None else "channel"
    strategy = weights.get("strategy") or inferred
    if strategy == "tensor":
        return lambda shape: shape
    if strategy == "channel":
        return lambda shape: (1, shape[1])
    if strategy == "group" and group_size > 0:
        return lambda shape: (1, min(group_size, shape[1]))
    if strategy == "block" and (block := parse_block(weights, "block_structure")) is not None:
        rows, features = block
        return lambda shape: (min(rows, shape[0]), min(features, shape[1]))
    if strategy in ("group", "block"):
        raise ModelError(f"strategy {strategy} without {'group_size' if strategy == 'group' else 'block_structure'}")
    raise ModelError(f"strategy {short(strategy)} is not served; tensor, channel, group and block are")


def _names(settings: Json, key: str) -> list[str]:
    """Parse a list of names of modules or classes, or patterns of the former. Raises ModelError."""
    value = settings.get(key)
    names = [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{key} {short(names)} is not a list of strings")
    for name in filter(_is_pattern, names):
        try:
            re.compile(name.removeprefix("re:"))
        except (re.error, OverflowError, RecursionError) as error:
            raise ModelError(f"{key}: {short(name)} is not a regular expression: {error}") from None
    return names


def _is_pattern(name: str) -> bool:
    return name.startswith("re:")


def _matches(module: str, target: str) -> bool:
    """Whether a module has this name or matches this pattern."""
    return re.match(target.removeprefix("re:"), module) is not None if _is_pattern(target) else target == module
