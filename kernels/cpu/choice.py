"""Choice of an instruction set for each kind of CPU kernel."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from kernels.cpu.compiler import InstructionSet

TILES_FROM = 16
"""Number of rows from which on AMX tiles multiply, where nothing was measured: a tile's height."""


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Prefetching of keys and values. blocks: how far ahead, in blocks of 64 slots of one KV head. to_l2: into
    the L2 cache, not the L1 cache, whose requests are fewer. Results do not depend on it."""

    blocks: int
    to_l2: bool

    def __str__(self) -> str:
        return f"prefetch {self.blocks} ahead{' to L2' if self.to_l2 else ''}"


PREFETCHES = (Prefetch(2, to_l2=True), Prefetch(1, to_l2=True), Prefetch(1, to_l2=False))
"""Ways to prefetch that are measured; the first one is used where nothing is."""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """Instruction sets by kind of kernel. Sets may differ in rounding, so a choice holds for all row counts of a kind.

    attention, products, products_int8, products_int4: the sets of attention, of products, and of products with weights
    of 8 and of 4 bits. rest: that of norms, rotation and sampling. tiles_from, tiles_from_int8: number of rows from
    which on a product's set multiplies by tiles, if it has any; results do not depend on it. prefetch: in attention.
    """

    attention: InstructionSet
    products: InstructionSet
    products_int8: InstructionSet
    products_int4: InstructionSet
    rest: InstructionSet
    tiles_from: int = TILES_FROM
    tiles_from_int8: int = TILES_FROM
    prefetch: Prefetch = PREFETCHES[0]

    @classmethod
    def all_of(cls, target: InstructionSet) -> KernelChoice:
        """Return the choice of one set for everything."""
        return cls(target, target, target, target, target)

    @property
    def digest(self) -> str:
        """A short hash of all choices."""
        names = [each.name for each in self._by_kind]
        text = repr((names, self.tiles_from, self.tiles_from_int8, self.prefetch))
        return hashlib.sha256(text.encode()).hexdigest()[:6]

    @property
    def sets(self) -> list[InstructionSet]:
        """The chosen sets, each once."""
        return list(dict.fromkeys(self._by_kind))

    @property
    def _by_kind(self) -> tuple[InstructionSet, ...]:
        return self.attention, self.products, self.products_int8, self.products_int4, self.rest
