"""Layouts of 8-bit floating point (E4M3): `quant_method: fp8`, as DeepSeek, Qwen3 and vLLM write it, and
`fbgemm_fp8`."""

from __future__ import annotations

from models.files.json_values import Json, ModelError, short
from models.layouts.module_layout import ModuleLayout
from models.layouts.scaled_codes import FP8, ScaledFormat

_SCALES = ("weight_scale_inv", "weight_scale")
"""Names of scales. Despite the first one's name, codes are multiplied by both."""


class Fp8Layout(ModuleLayout):
    """Modules with a scale per block of weight_block_size, or else per row or matrix."""

    def __init__(self, settings: Json) -> None:
        """Raises ModelError for settings that are not served."""
        kind = settings.get("fmt", "e4m3")
        if kind != "e4m3":
            raise ModelError(f"fmt {short(kind)} is not served; e4m3 is")
        block = parse_block(settings, "weight_block_size")
        wanted = ScaledFormat(FP8, None if block is None else lambda _: block, _SCALES)
        super().__init__(lambda _: wanted)


def parse_block(settings: Json, key: str) -> tuple[int, int] | None:
    """Parse the rows and features of a block; None: the key is absent or null. Raises ModelError."""
    value = settings.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(each) is int and each > 0 for each in value):
        raise ModelError(f"{key} {short(value)} is not a list of two positive integers")
    return value[0], value[1]
