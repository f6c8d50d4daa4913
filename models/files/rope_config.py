"""Parser of the keys of config.json about rotary position embedding. Free of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from models.files.json_values import Json, ModelError, flag, integer, number, short

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "dynamic"]

_THETA = 10000.0
"""Default of transformers, unless a family has its own."""
_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
_OTHER_NAMES = {"su": "longrope", "mrope": "default"}
"""Other names of kinds: that of the first Phi-3 files; and positions of images, which in text are those of tokens."""
LAYER_TYPES = FULL, SLIDING = "full_attention", "sliding_attention"
"""Types of layers, as layer_types names them."""
ORIGINAL = "original_max_position_embeddings"
_MIN_TURNS, _MAX_TURNS = 1e-9, 1e9
"""Bounds of the turns over the original positions by which YaRN tells pairs apart; the logarithm of the number of
positions per turn is finite between them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: pair i rotates by theta^(-2i / head_dim) radians per position, scaled according to `kind`.

    linear: every pair rotates `factor` times slower. llama3, yarn, longrope, dynamic: see kernels.rope.
    rotated: share of a head's elements that rotate, the first ones. interleaved: whether element 2i pairs with 2i + 1,
    rather than element i with the one half of the rotated elements later. attention_factor: of cosines and sines; None:
    as `kind` says. short_factors, long_factors: divisors of the frequencies of longrope, up to original_max_positions
    and beyond. query_beta: see kernels.rope.query_scales; 0: queries are not scaled.
    """

    theta: float = _THETA
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    rotated: float = 1.0
    interleaved: bool = False
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    query_beta: float = 0.0

    @property
    def depends_on_length(self) -> bool:
        """Whether rotations depend on the number of positions that are served."""
        return self.kind in ("longrope", "dynamic")

    def num_rotated(self, head_dim: int) -> int:
        """Return the number of a head's elements that rotate, the first ones."""
        return int(head_dim * self.rotated)

    def check(self, head_dim: int) -> None:
        """Raise ModelError unless heads of this size can rotate."""
        rotated = self.num_rotated(head_dim)
        if rotated < 2 or rotated % 2:
            share = "" if self.rotated == 1 else f" times partial_rotary_factor ({self.rotated:g})"
            raise ModelError(f"head_dim ({head_dim}){share} makes {rotated} elements: rotary embedding turns pairs")
        if self.kind == "dynamic" and rotated == 2:
            raise ModelError("rope_type dynamic changes theta by the number of pairs, and there is only one")
        for name, factors in (("short_factor", self.short_factors), ("long_factor", self.long_factors)):
            if self.kind == "longrope" and len(factors) != rotated // 2:
                raise ModelError(f"{name} has {len(factors)} factors for {rotated // 2} pairs of elements that rotate")


_PLAIN = RopeConfig()


def parse_rope(
    data: Json, max_positions: int, layer_type: str | None = None, defaults: RopeConfig = _PLAIN
) -> RopeConfig:
    """Parse either spelling: `rope_theta` with `rope_scaling`, or `rope_parameters`, which includes both.

    data: content of config.json. max_positions: its max_position_embeddings. layer_type: that of the layers, as
    layer_types names it, where rope_parameters has a set for each type; None: full_attention. defaults: what the
    architecture rotates if nothing is said. Raises ModelError.
    """
    _refuse_condensed(data, max_positions)
    key, rope = _scaling(data, layer_type)
    kind = _kind(rope)
    if kind not in _KINDS:
        raise ModelError(f"{key}: rope_type {short(kind)} is not supported; these are: {', '.join(_KINDS)}")
    plain = RopeConfig(
        theta=number(rope, "rope_theta", number(data, "rope_theta", defaults.theta)),
        rotated=number(rope, "partial_rotary_factor", number(data, "partial_rotary_factor", 1.0)),
    )
    if plain.rotated > 1:
        raise ModelError(f"partial_rotary_factor {plain.rotated:g} is more than 1")
    if rope.get("llama_4_scaling_beta"):
        original = _original(data, rope, max_positions)
        plain = replace(plain, query_beta=number(rope, "llama_4_scaling_beta"), original_max_positions=original)
    if kind == "linear":
        return replace(plain, kind="linear", factor=number(rope, "factor"))
    if kind == "dynamic":
        return replace(plain, kind="dynamic", factor=number(rope, "factor"), original_max_positions=max_positions)
    if kind == "llama3":
        low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
        if low >= high:
            raise ModelError(f"{key}: low_freq_factor ({low}) must be below high_freq_factor ({high})")
        return replace(
            plain,
            kind="llama3",
            factor=number(rope, "factor"),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_positions=_original(data, rope, max_positions),
        )
    if kind == "yarn":
        return _parse_yarn(key, data, rope, max_positions, plain)
    return _parse_longrope(key, data, rope, max_positions, plain) if kind == "longrope" else plain


def _parse_yarn(key: str, data: Json, rope: Json, max_positions: int, plain: RopeConfig) -> RopeConfig:
    """Parse what kernels.rope.yarn_frequencies and yarn_attention_factor need."""
    original = _original(data, rope, max_positions)
    if plain.theta <= 1:
        raise ModelError(f"{key}: yarn with rope_theta {plain.theta:g} is not supported; it has to be more than 1")
    fast = number(rope, "beta_fast", 32.0) if rope.get("beta_fast") else 32.0
    slow = number(rope, "beta_slow", 1.0) if rope.get("beta_slow") else 1.0
    for name, turns in (("beta_fast", fast), ("beta_slow", slow)):
        if not _MIN_TURNS <= turns <= _MAX_TURNS:
            raise ModelError(f"{key}: {name} {turns:g} is not a number from {_MIN_TURNS:g} to {_MAX_TURNS:g}")
    if fast < slow:
        raise ModelError(f"{key}: beta_fast ({fast:g}) must not be below beta_slow ({slow:g})")
    return replace(
        plain,
        kind="yarn",
        factor=number(rope, "factor", max_positions / original),
        beta_fast=fast,
        beta_slow=slow,
        original_max_positions=original,
        truncate=flag(rope, "truncate", True),
        mscale=number(rope, "mscale") if rope.get("mscale") else None,
        mscale_all_dim=number(rope, "mscale_all_dim") if rope.get("mscale_all_dim") else None,
        attention_factor=number(rope, "attention_factor") if rope.get("attention_factor") is not None else None,
    )


def _parse_longrope(key: str, data: Json, rope: Json, max_positions: int, plain: RopeConfig) -> RopeConfig:
    """Parse longrope. The factor of cosines and sines is sqrt(1 + ln(factor) / ln(original positions)) (LongRoPE, arXiv
    2402.13753, as Phi-3 has it), where none is stated."""
    original = _original(data, rope, max_positions)
    factor = number(rope, "factor", max_positions / original)
    if original < 2:
        raise ModelError(f"{key}: {ORIGINAL} {original} is too small for longrope")
    for name in ("short_mscale", "long_mscale"):
        if rope.get(name) is not None:
            raise ModelError(f"{key}: {name} {short(rope[name])} is not supported")
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return replace(
        plain,
        kind="longrope",
        factor=factor,
        original_max_positions=original,
        attention_factor=number(rope, "attention_factor", default),
        short_factors=_numbers(key, rope, "short_factor"),
        long_factors=_numbers(key, rope, "long_factor"),
    )


def _numbers(key: str, rope: Json, name: str) -> tuple[float, ...]:
    """Parse a list of numbers above 0."""
    values = rope.get(name)
    if not isinstance(values, list) or not values:
        raise ModelError(f"{key}: {name} {short(values)} is not a list of numbers")
    return tuple(number({name: value}, name) for value in values)


def _original(data: Json, rope: Json, default: int) -> int:
    """Parse the positions before scaling. They are among the parameters or, as in Phi-3, beside them, which counts
    more."""
    found = data if data.get(ORIGINAL) is not None else rope
    return integer(found, ORIGINAL, default)


def served_positions(data: Json, max_positions: int) -> tuple[int, list[str]]:
    """Return the number of positions at which the model computes what it was made for, and warnings if these are fewer
    than config.json promises, or are rotated otherwise than by transformers.

    data: content of config.json. max_positions: its max_position_embeddings. Linear scaling multiplies the positions:
    max_position_embeddings is the number before it, as transformers documents and vLLM reads it. Dynamic scaling, too,
    begins at that number; it has no limit of its own, and is served up to `factor` times as many positions, as by vLLM,
    and never up to fewer. YaRN multiplies the original ones, where these are stated.
    """
    _, rope = _scaling(data)
    kind, warnings = _kind(rope), []
    if kind == "linear":
        max_positions = _multiplied(integer(rope, ORIGINAL, max_positions), rope)
    states_original = data.get(ORIGINAL) is not None or rope.get(ORIGINAL) is not None
    if kind == "yarn" and states_original and rope.get("factor") is not None:
        max_positions = _multiplied(_original(data, rope, max_positions), rope)
    if kind == "longrope" and (original := _original(data, rope, max_positions)) < max_positions:
        warnings.append(
            f"rope_type longrope: texts of up to {original} tokens are rotated by long_factor, like longer ones, and "
            f"by short_factor only where max_model_len is at most {original}; transformers decides by the text"
        )
    if kind == "dynamic" and (longer := _multiplied(max_positions, rope)) > max_positions:
        warnings.append(
            f"rope_type dynamic: all texts are rotated as one of max_model_len tokens is, and as without scaling only "
            f"where max_model_len is at most {max_positions}; transformers decides by the text"
        )
        max_positions = longer
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


def _multiplied(positions: int, rope: Json) -> int:
    """Multiply positions by the factor of a scaling."""
    factor = number(rope, "factor")
    if not 1 <= positions * factor < 2**63:
        raise ModelError(f"rope_scaling: factor {factor:g} is too {'small' if factor < 1 else 'large'}")
    return int(positions * factor)


def has_own_rope(data: Json, layer_type: str) -> bool:
    """Whether rope_parameters has a set for the layers of a type."""
    sets = data.get("rope_parameters")
    return isinstance(sets, dict) and isinstance(sets.get(layer_type), dict)


def _scaling(data: Json, layer_type: str | None = None) -> tuple[str, Json]:
    """Return the key that describes the scaling, and its value. layer_type: see parse_rope. Of a type without a set,
    all is absent."""
    is_own = layer_type is not None and has_own_rope(data, layer_type)
    key = "rope_scaling" if data.get("rope_scaling") and not is_own else "rope_parameters"
    rope = data.get(key) or {}
    if key == "rope_parameters" and isinstance(rope, dict) and any(kind in rope for kind in LAYER_TYPES):
        rope = rope.get(layer_type or FULL) or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ModelError(f"{key} {short(rope)} is not supported; expected parameters of all layers or of each type")
    return key, rope


def _kind(rope: Json) -> str:
    """Return the type; `yarn` with the factors of longrope means that, as in early files of Phi-3."""
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    if kind == "yarn" and rope.get("short_factor"):
        return "longrope"
    return _OTHER_NAMES.get(kind, kind)
