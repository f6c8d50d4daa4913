"""Products of weights of few bits on GPUs, one by one and grouped."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Self

from torch import Tensor

from kernels.gpu.products.few_bit_grouped import GroupedFewBit
from kernels.gpu.products.few_bit_layout import FewBitWeights, with_minima
from kernels.gpu.products.few_bit_products import few_bit_product
from kernels.ops import Gate


class FewBitLinear:
    """See GroupableProduct."""

    references_weights = False

    def __init__(self, weights: FewBitWeights, bias: Tensor | None, wide: bool) -> None:
        """bias: [columns]."""
        self._weights, self._bias, self._wide = weights, bias, wide

    @property
    def nbytes(self) -> int:
        return self._weights.nbytes + (0 if self._bias is None else self._bias.nbytes)

    def __call__(self, x: Tensor) -> Tensor:
        return few_bit_product(x, self._weights, self._bias, wide=self._wide)

    def groupable(self) -> Self:
        return self

    @property
    def layout(self) -> Hashable:
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in self.tensors.items())
        weights = self._weights
        return weights.format, weights.columns, weights.features, weights.group, shapes

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self._weights.tensors | ({} if self._bias is None else {"bias": self._bias})

    def place(self, tensors: Mapping[str, Tensor]) -> None:
        self._weights = self._weights.with_tensors(tensors)
        self._bias = tensors.get("bias")

    def group(self, stacked: Mapping[str, Tensor], gate: Gate | None) -> GroupedFewBit:
        return GroupedFewBit(self._weights.with_tensors(stacked), stacked.get("bias"), gate)

    def plain(self) -> Self:
        return type(self)(with_minima(self._weights), self._bias, self._wide)
