"""Parser of the keys of config.json about rotary position embedding. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from models.files.json_values import Json, ModelError, integer, number, short

RopeKind = Literal["default", "linear", "llama3"]

_THETA = 10000.0
"""Default of transformers for all families."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: pair i rotates by theta^(-2i / head_dim) radians per position, scaled according to `kind`.

    linear: every pair rotates `factor` times slower. llama3: see kernels.rope.llama3_frequencies.
    """

    theta: float = _THETA
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def parse_rope(data: Json, max_positions: int) -> RopeConfig:
    """Parse either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`, which includes both.

    data: content of config.json. max_positions: its max_position_embeddings. Type `dynamic` turns more slowly only
    beyond these positions, which are all that is served, so it is read as `default`. Raises ModelError.
    """
    _refuse_condensed(data, max_positions)
    key, rope = _scaling(data)
    if rope.get("partial_rotary_factor", data.get("partial_rotary_factor", 1.0)) not in (None, 1):
        raise ModelError("partial_rotary_factor other than 1 is not supported")
    kind = _kind(rope)
    theta = number(rope, "rope_theta", number(data, "rope_theta", _THETA))
    if kind in ("default", "dynamic"):
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=number(rope, "factor"))
    if kind == "llama3":
        original = {"original_max_position_embeddings": max_positions, **rope}
        if data.get("original_max_position_embeddings") is not None:
            original["original_max_position_embeddings"] = data["original_max_position_embeddings"]
        low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
        if low >= high:
            raise ModelError(f"{key}: low_freq_factor ({low}) must be below high_freq_factor ({high})")
        return RopeConfig(
            theta=theta,
            kind="llama3",
            factor=number(rope, "factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_positions=integer(original, "original_max_position_embeddings"),
        )
    raise ModelError(f"{key}: rope_type {short(kind)} is not supported; these are: default, linear, llama3, dynamic")


def served_positions(data: Json, max_positions: int) -> tuple[int, list[str]]:
    """Return the number of positions at which the model computes what it was made for, and warnings if these are fewer
    than config.json promises.

    data: content of config.json. max_positions: its max_position_embeddings. Linear scaling multiplies the positions:
    max_position_embeddings is the number before it, as transformers documents and vLLM reads it.
    """
    _, rope = _scaling(data)
    kind, warnings = _kind(rope), []
    if kind == "linear":
        original = integer(rope, "original_max_position_embeddings", max_positions)
        max_positions = int(original * number(rope, "factor"))
        if max_positions >= 2**63:
            raise ModelError(f"rope_scaling: factor {number(rope, 'factor'):g} is too large")
    if kind == "dynamic":
        warnings.append(
            f"rope_type dynamic: served up to max_position_embeddings ({max_positions}), where it changes nothing"
        )
    if chunks := data.get("dual_chunk_attention_config"):
        if not isinstance(chunks, dict):
            raise ModelError("dual_chunk_attention_config is not an object")
        exact = integer(chunks, "chunk_size") - integer(chunks, "local_size", minimum=0)
        if exact < 1:
            raise ModelError("dual_chunk_attention_config: chunk_size must be more than local_size")
        exact = min(exact, integer(chunks, "original_max_position_embeddings", exact))
        if exact < max_positions:
            warnings.append(f"dual_chunk_attention_config: served up to {exact} tokens, where it changes nothing")
        max_positions = min(max_positions, exact)
    return max_positions, warnings


def _refuse_condensed(data: Json, max_positions: int) -> None:
    """Raise ModelError for the key by which old files mean linear scaling of positions that are already scaled."""
    if data.get("rope_condense_ratio") in (None, 1):
        return
    ratio = number(data, "rope_condense_ratio")
    scaling = f'"rope_scaling": {{"rope_type": "linear", "factor": {ratio:g}}}'
    positions = f'"max_position_embeddings": {max(1, int(max_positions / ratio))}'
    raise ModelError(f"rope_condense_ratio {ratio:g} is not supported; write it as {scaling} with {positions}")


def _scaling(data: Json) -> tuple[str, Json]:
    """Return the key that describes the scaling, and its value."""
    key = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope = data.get(key) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(f"{key} {short(rope)} is not supported; expected one set of parameters for all layers")
    return key, rope


def _kind(rope: Json) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")
