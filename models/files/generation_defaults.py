"""Defaults of sampling parameters that a model directory recommends (generation_config.json). Free of torch."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.files.json_values import read_json_if_any

log = logging.getLogger(__name__)

_RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0, 1e30),
    "top_p": (0, 1),
    "top_k": (0, 2**31 - 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-6, 1e6),
}
"""Smallest and largest values: those of engine.params.SamplingParams."""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Values for requests that leave these fields open; None: no recommendation. top_k: 0 keeps all tokens."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def given(self) -> dict[str, float]:
        """Return the values that are recommended, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def read_generation_defaults(directory: Path) -> GenerationDefaults:
    """Read generation_config.json, if there is one. `do_sample` is ignored, as vLLM does: with `do_sample: false`, too,
    a request is sampled unless a temperature of 0 is named here or by the request.

    Ignores a value that is out of range or not a number, with a warning. Raises ModelError if the file is broken.
    """
    path = directory / "generation_config.json"
    data = read_json_if_any(path)
    found: dict[str, Any] = {}
    for name, (smallest, largest) in _RANGES.items():
        if (value := data.get(name)) is None:
            continue
        if name == "top_k" and value == -1:  # off, as in requests
            value = 0
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not smallest <= value <= largest or (name == "top_k" and value != int(value)):
            expected = f"expected a number from {smallest:g} to {largest:g}"
            log.warning("%s: %s %.50r is ignored; %s", path, name, value, expected)
        else:
            found[name] = int(value) if name == "top_k" else float(value)
    return GenerationDefaults(**found)
