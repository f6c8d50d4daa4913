"""Choice of an instruction set for each kind of CPU kernel."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cpu.compiler import InstructionSet

TILES_FROM = 16
"""Number of rows from which on AMX tiles multiply, where nothing was measured: a tile's height."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Instruction sets by kind of kernel. Sets may differ in rounding, so a choice holds for all row counts of a kind.

    attention, products, products_int8: the sets of attention, of products, and of products with 8-bit weights. rest:
    that of norms, rotation and sampling. tiles_from, tiles_from_int8: number of rows from which on a product's
    set multiplies by tiles, if it has any; results do not depend on it.
    """

    attention: InstructionSet
    products: InstructionSet
    products_int8: InstructionSet
    rest: InstructionSet
    tiles_from: int = TILES_FROM
    tiles_from_int8: int = TILES_FROM

    @classmethod
    def all_of(cls, target: InstructionSet) -> Choice:
        """Return the choice of one set for everything."""
        return cls(target, target, target, target)

    @property
    def sets(self) -> list[InstructionSet]:
        """The chosen sets, each once."""
        return list(dict.fromkeys((self.attention, self.products, self.products_int8, self.rest)))
