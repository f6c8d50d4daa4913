"""Mixture of experts on GPUs: each token's networks by grouped products, without waiting for the device."""

from __future__ import annotations

from torch import Tensor

from kernels.gpu.products.product import GroupedProduct
from kernels.gpu.products.sorted_pairs import sort_pairs
from kernels.reference_experts import choose_experts


class GpuExperts:
    """See kernels.ops.Experts."""

    def __init__(self, gate_up: GroupedProduct, down: GroupedProduct, per_token: int, normalised: bool) -> None:
        """gate_up: with a gate; down: without."""
        self._gate_up, self._down = gate_up, down
        self._per_token, self._normalised = per_token, normalised

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        if not len(x):
            return scores.new_zeros(0, self._down.columns)
        chosen, weights = choose_experts(scores, self._per_token, self._normalised)
        pairs = sort_pairs(chosen, weights, scores.shape[1])
        parts = self._down(self._gate_up(x, pairs), pairs)
        return parts.view(len(x), self._per_token, -1).sum(1)
