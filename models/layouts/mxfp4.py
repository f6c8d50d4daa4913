"""MXFP4 (Open Compute Project, Microscaling Formats 1.0): codes of E2M1 in groups of 32, with scales that are powers of
two. `quant_method: mxfp4`, as OpenAI publishes gpt-oss, and a format of compressed-tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.weights.matrix import QuantizedMatrix, regular_groups
from models.files.json_values import Json
from models.layouts.block_scales import read_scales
from models.layouts.module_layout import ModuleLayout, ModuleTensors
from models.layouts.packed_codes import grouped_matrix
from models.layouts.scaled_codes import INT8

GROUP = 32
"""Features of a group."""
PACKED, SCALES = "weight_packed", "weight_scale"
"""Names of a module's tensors."""
_E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)
"""Twice the values of codes of 4 bits: 1 of sign, 2 of exponent, 1 of mantissa."""
_E2M1_PAIRS = torch.stack((_E2M1.repeat(16), _E2M1.repeat_interleave(16)), 1)
"""Those of the two codes in each byte."""


@dataclass(frozen=True, slots=True)
class Mxfp4Format:
    """weight_packed: [rows, features / 2], the first feature in the lower bits. weight_scale: [rows, groups]."""

    codes = PACKED
    others = (SCALES,)

    def check(self, tensors: ModuleTensors, shape: tuple[int, int]) -> None:
        rows, features = shape
        tensors[PACKED].check((rows, -(-features // 2)), ("U8",))
        tensors[SCALES].check((rows, -(-features // GROUP)), ("U8", "F8_E8M0"))

    def read(self, tensors: ModuleTensors, shape: tuple[int, int], rows: slice, features: slice) -> QuantizedMatrix:
        octets = slice(features.start // 2, -(-features.stop // 2))
        packed = tensors[PACKED].read(rows, octets)
        codes = _E2M1_PAIRS.index_select(0, packed.flatten().int()).view(len(packed), -1)
        first = features.start - 2 * octets.start
        return grouped_matrix(
            INT8,
            codes[:, first : first + features.stop - features.start],
            read_scales(tensors[SCALES], shape, (1, GROUP), rows) / 2,
            None,
            regular_groups(shape[1], GROUP)[features],
            min(GROUP, shape[1]),
        )


class Mxfp4Layout(ModuleLayout):
    """Experts in MXFP4, as models.layouts.stacked_experts names their tensors. All other modules are dense, so
    modules_to_not_convert need not be read."""

    def __init__(self, settings: Json) -> None:
        """settings: nothing in them changes what is read."""
        super().__init__(lambda _: Mxfp4Format())
