"""How checkpoints store weight matrices: recognised from config.json, read as matrices of kernels.weights.

Each layout is one class in a file of its own, and a line in LAYOUTS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from kernels.weights.matrix import Matrix
from models.files.json_values import Json, ModelError, read_json, short
from models.files.nested_text import text_model
from models.layouts.awq import AwqLayout
from models.layouts.compressed_tensors import CompressedTensorsLayout
from models.layouts.dense_layout import DENSE
from models.layouts.fp8 import Fp8Layout
from models.layouts.gptq import GptqLayout
from models.layouts.group_layout import METHOD, GroupLayout
from models.layouts.mxfp4 import Mxfp4Layout
from models.layouts.weight_files import WeightFiles
from models.weights import StoredTensors

_KEYS = ("quantization_config", "compression_config")
_EMPTY: tuple[Any, ...] = (None, {})


class Layout(Protocol):
    """Layout of the matrices of one checkpoint. A matrix is known by the name of its weight, `….weight`, which need
    not be the name of a tensor."""

    def tensors(self, name: str, stored: StoredTensors) -> tuple[str, ...]:
        """Return the names of the tensors that hold matrix `name`, and of those beside them that are not used: those of
        `stored.sources`. Empty: it is not there."""

    def check(self, files: WeightFiles, name: str, shape: tuple[int, int]) -> None:
        """Raise ModelError unless matrix `name` has this shape, and can be read. Reads no more than it must."""

    def read(self, files: WeightFiles, name: str, shape: tuple[int, int], rows: slice, features: slice) -> Matrix:
        """Read rows and features of the matrix, whose whole shape is `shape`. Raises ModelError as `check` does."""


LAYOUTS: Mapping[str, Callable[[Json], Layout]] = {
    "awq": AwqLayout,
    "compressed-tensors": CompressedTensorsLayout,
    "fbgemm_fp8": Fp8Layout,
    "fp8": Fp8Layout,
    "gptq": GptqLayout,
    "mxfp4": Mxfp4Layout,
    METHOD: GroupLayout,
}
"""Layouts by `quant_method`. Each is made from the `quantization_config`, and raises ModelError, which names the key in
it but not the file, for one that it does not read."""


def find_layout(directory: Path) -> Layout:
    """Return the layout that config.json of a model directory describes. Raises ModelError: it is not supported."""
    path = directory / "config.json"
    try:
        return parse_layout(read_json(path))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def parse_layout(config: Json) -> Layout:
    """Return the layout that the content of a config.json describes. Raises ModelError."""
    config = text_model(config)
    for key in _KEYS:
        settings = config.get(key)
        if settings in _EMPTY:
            continue
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        if not isinstance(settings, dict) or not isinstance(method, str) or method not in LAYOUTS:
            raise ModelError(f"{key}: quant_method {short(method)} is not supported; these are: {', '.join(LAYOUTS)}")
        try:
            return LAYOUTS[method](settings)
        except ModelError as error:
            raise ModelError(f"{key}: {error}") from None
    return DENSE
