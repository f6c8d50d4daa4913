"""Interfaces of matrix products on GPUs: one by one, and grouped, for the networks of a mixture of experts."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Protocol

from torch import Tensor

from kernels.gpu.products.sorted_pairs import SortedPairs
from kernels.ops import Gate, Linear


class GroupedProduct(Protocol):
    """Products of rows with the matrix of the network that each row belongs to.

    With a gate they are the first of a network: they take a token's row for each of its pairs, and return the joined
    halves in sorted order, in the dtype of rows. Without one they take rows in sorted order, and return results times
    the weights of pairs, by the pairs' numbers, in float32.
    """

    @property
    def columns(self) -> int:
        """Columns of results."""

    def __call__(self, x: Tensor, pairs: SortedPairs) -> Tensor:
        """x: [tokens, features] with a gate, else [pairs, features]. Returns [pairs, columns]."""


class GpuProduct(Linear, Protocol):
    """A product without a gate."""

    def groupable(self) -> GroupableProduct:
        """Return the product in a layout that can be grouped, or itself if its own can be."""


class GroupableProduct(GpuProduct, Protocol):
    """A product that can be grouped with others of its layout."""

    @property
    def layout(self) -> Hashable:
        """Whatever is equal in products that can be grouped."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Weights and bias by name; those of products of one layout have the same names, shapes and dtypes."""

    def place(self, tensors: Mapping[str, Tensor]) -> None:
        """Use these tensors, which are equal to its own, from now on."""

    def group(self, stacked: Mapping[str, Tensor], gate: Gate | None) -> GroupedProduct:
        """Prepare grouped products. stacked: `tensors` of all networks, with a dimension of networks before the
        others. gate: how the two halves of results are joined."""

    def plain(self) -> GroupableProduct:
        """Return the product in the most general layout of its format, or itself if that is the only one."""


def alike(products: Sequence[GpuProduct]) -> Sequence[GroupableProduct]:
    """Return the products in one layout. Raises ValueError if they have none in common."""
    groupable = [each.groupable() for each in products]
    if len({each.layout for each in groupable}) > 1:
        groupable = [each.plain() for each in groupable]
        if len({each.layout for each in groupable}) > 1:
            raise ValueError("the experts of a layer have weights of different formats, groups or shapes")
    return groupable


def group_products(products: Sequence[GroupableProduct], gate: Gate | None) -> GroupedProduct:
    """Move the tensors of products of one layout into one tensor each, of which they keep their parts, and prepare
    grouped products with these."""
    stacked = {name: first.new_empty(len(products), *first.shape) for name, first in products[0].tensors.items()}
    for number, product in enumerate(products):
        for name, tensor in product.tensors.items():
            stacked[name][number].copy_(tensor)
        product.place({name: whole[number] for name, whole in stacked.items()})
    return products[0].group(stacked, gate)
