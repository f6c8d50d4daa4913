"""Products of dense weights on GPUs, by torch."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.gpu.products.dense_grouped import GroupedDense
from kernels.ops import Gate


class DenseLinear:
    """See GroupableProduct."""

    references_weights = True

    def __init__(self, weight: Tensor, bias: Tensor | None, wide: bool) -> None:
        """weight: [columns, features]. bias: [columns]."""
        self._weight, self._bias, self._wide = weight, bias, wide

    @property
    def nbytes(self) -> int:
        return self._weight.nbytes + (self._bias.nbytes if self._bias is not None else 0)

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(x, self._weight, self._bias)
        return y.to(torch.promote_types(y.dtype, torch.float32)) if self._wide else y

    def groupable(self) -> Self:
        return self

    @property
    def layout(self) -> Hashable:
        return "dense", self._weight.shape, self._weight.dtype, self._bias is None

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return {"weight": self._weight} | ({} if self._bias is None else {"bias": self._bias})

    def place(self, tensors: Mapping[str, Tensor]) -> None:
        self._weight, self._bias = tensors["weight"], tensors.get("bias")

    def group(self, stacked: Mapping[str, Tensor], gate: Gate | None) -> GroupedDense:
        return GroupedDense(stacked["weight"], stacked.get("bias"), gate)

    def plain(self) -> Self:
        return self
