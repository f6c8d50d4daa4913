"""Bits per weight of each weight format, scales included. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping

INT4_GROUP = 32
"""Features of a group that int4 weights are rounded in."""
_SCALE_BITS = 16

WEIGHT_BITS: Mapping[str, float] = {
    "dense": 16.0,
    "int8": 8.0,
    "int4": 4 + 2 * _SCALE_BITS / INT4_GROUP,
    "fp8": 8.0,
    "mxfp4": 4 + 8 / 32,
}
"""Bits by format; dense: of 16-bit models; int4: with a scale and a minimum per group; mxfp4, which is forecast alone,
since checkpoints of it are served with codes of 8 bits: with an exponent of 8 bits per 32 weights. Scales of whole rows
are not counted."""
HEAD_FORMATS: Mapping[str, str] = {"dense": "dense", "int8": "int8", "int4": "int8", "fp8": "fp8", "mxfp4": "dense"}
"""Format of the LM head, whose errors cost more, by the format of a model's other matrices."""
EXPERTS_ALONE = frozenset({"mxfp4"})
"""Formats of experts, beside which all other matrices are dense, as OpenAI published gpt-oss."""
