"""Bytes that keys and values take in each KV format. Free of torch."""

from __future__ import annotations

SEALED_GROUP = 64
"""Tokens that are sealed together: those of one page."""
_HALF_BYTES = 2

SEALED_BITS = {"int8": 8, "int4x2": 8}
"""Bits of a code, by format, of those that seal pages."""
DRAFT_BITS = {"int4x2": 4}
"""Bits of a code that drafts read, where they read fewer."""
ROUNDED_BYTES = {"fp8": 1}
"""Bytes of a number, by format, of those that round tokens when they are written, and seal nothing."""
KV_FORMATS = ("dense", *ROUNDED_BYTES, *SEALED_BITS)


def record_bytes(name: str, head_dim: int, *, drafts: bool = False) -> tuple[int, int]:
    """Return the bytes of one sealed page of a KV head: of its keys, and of its values. Keys have a scale and a minimum
    per channel, values one per token. drafts: what drafts read of them."""
    bits = DRAFT_BITS.get(name, SEALED_BITS[name]) if drafts else SEALED_BITS[name]
    codes = SEALED_GROUP * head_dim * bits // 8
    return codes + 2 * _HALF_BYTES * head_dim, codes + 2 * _HALF_BYTES * SEALED_GROUP


def token_bytes(name: str, head_dim: int, itemsize: int, *, drafts: bool = False) -> int:
    """Return the bytes that the key and the value of one token and KV head take in a pool, rounded up. itemsize: bytes
    of a number of the model's dtype. drafts: see record_bytes."""
    if name not in SEALED_BITS:
        return 2 * head_dim * ROUNDED_BYTES.get(name, itemsize)
    return -(-sum(record_bytes(name, head_dim, drafts=drafts)) // SEALED_GROUP)


def page_size_of(name: str, default: int) -> int:
    """Return the page size of a deployment that sets none: that of a sealed group, or `default`."""
    return SEALED_GROUP if name in SEALED_BITS else default
