"""Sizes of keys and values in each KV format. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SEALED_GROUP = 64
"""Tokens that are sealed together: those of one page."""
EXACT_PAGES = 2
"""Pages that a row's tokens are written to where pages are sealed: that of the pending token, and the one before it,
which drafts read exactly."""
_HALF_BYTES = 2


@dataclass(frozen=True, slots=True)
class KVBits:
    """How a format stores numbers. name: value of engine.cache.format. bits: of a number, or of its code; None: those
    of the model's dtype. group: tokens that are sealed together once all are committed; 0: nothing is sealed.
    draft_bits: of what drafts read of a code, if that is less."""

    name: str
    bits: int | None = None
    group: int = 0
    draft_bits: int | None = None

    @property
    def seals(self) -> bool:
        """Whether pages of committed tokens are stored in fewer bits than tokens are written in."""
        return self.group > 0

    @property
    def written(self) -> str:
        """Name of the format that tokens are written in, one by one. Copies of tokens have it too."""
        return "dense" if self.seals else self.name

    def record_bytes(self, head_dim: int, *, drafts: bool = False) -> tuple[int, int]:
        """Return the bytes of one sealed page of a KV head: of its keys, and of its values. Keys have a scale and a
        minimum per channel, values one per token. drafts: what drafts read of them."""
        bits = self.draft_bits if drafts and self.draft_bits is not None else self.bits
        assert bits is not None
        codes = self.group * head_dim * bits // 8
        return codes + 2 * _HALF_BYTES * head_dim, codes + 2 * _HALF_BYTES * self.group

    def token_bytes(self, head_dim: int, itemsize: int, *, drafts: bool = False) -> int:
        """Return the bytes that the key and the value of one token and KV head take in a pool, rounded up. itemsize:
        bytes of a number of the model's dtype. drafts: see record_bytes."""
        if self.seals:
            return -(-sum(self.record_bytes(head_dim, drafts=drafts)) // self.group)
        return 2 * head_dim * (itemsize if self.bits is None else self.bits // 8)

    def max_drafts(self, num_tokens: int, gamma: int) -> int:
        """Return how many of `gamma` drafts a row of `num_tokens` committed tokens can have. Where pages are sealed,
        drafts end with the page of the pending token, so that all queries of a decoding row read the same pages
        sealed."""
        return min(gamma, -num_tokens % self.group) if self.seals else gamma

    def page_size(self, default: int) -> int:
        """Return the page size of a deployment that sets none: that of a sealed group, or `default`."""
        return self.group or default


KV_BITS: Mapping[str, KVBits] = {
    each.name: each
    for each in (
        KVBits("dense"),
        KVBits("fp8", bits=8),
        KVBits("int8", bits=8, group=SEALED_GROUP),
        KVBits("int4x2", bits=8, group=SEALED_GROUP, draft_bits=4),
    )
}
"""All formats, by name. Pools of them: kernels.kv.kv_formats."""
