"""Mixture of experts in place of a layer's feed-forward network.

The router is whole on every rank; the intermediate features of each network are sharded like those of a plain one. Its
parts are sums over this rank's features, in float32 or wider, and all of them are summed over ranks once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from kernels.ops import Experts
from models.files.json_values import ModelError
from models.model_config import ExpertsConfig, ModelConfig
from parallel.layers import GateUpLinear
from parallel.matrix_layer import MatrixLayer, MatrixPart, Placement
from parallel.module import Module
from parallel.split import split


class Router(MatrixLayer):
    """Scores of tokens, whole on every rank and never rounded to few bits: an error would choose another network. All
    ranks have the same inputs and the same arithmetic, so they have the same scores."""

    def __init__(self, name: str, in_features: int, count: int, *, place: Placement) -> None:
        """count: number of scores of a token."""
        part = MatrixPart(name, (count, in_features), slice(0, count), slice(0, in_features))
        super().__init__([part], bias=False, place=place, wide=True)

    def _format_of(self, choice: str) -> str:
        return "dense"

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, in_features], whole. Returns [tokens, count], in float32 or wider."""
        return self.linear(x)


class PartialNetwork(Module):
    """A gated network without the sum over ranks: gate_up, then down, which are two products."""

    def __init__(
        self, prefix: str, hidden_size: int, size: int, *, names: tuple[str, str, str], place: Placement
    ) -> None:
        """size: intermediate features. names: of gate, up and down in a checkpoint. Raises ValueError if there are
        fewer features than ranks."""
        mine = split(size, place.group.size)[place.group.rank].slice()
        gate, up, down = names
        self.gate_up = GateUpLinear(prefix, hidden_size, size, mine=mine, bias=False, place=place, names=(gate, up))
        part = MatrixPart(f"{prefix}.{down}", (hidden_size, size), slice(0, hidden_size), mine)
        self.down = MatrixLayer([part], bias=False, place=place, wide=True)

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden_size], whole. Returns this rank's part, likewise, in float32 or wider."""
        return self.down.linear(self.gate_up.linear(x))


class RoutedNetworks(Module):
    """Networks of which each token has a few, by a router's scores."""

    def __init__(
        self,
        prefix: str,
        hidden_size: int,
        size: int,
        count: int,
        *,
        per_token: int,
        normalised: bool,
        names: tuple[str, str, str],
        place: Placement,
    ) -> None:
        """prefix: of all networks, whose numbers follow it. Others: see models.model_config.ExpertsConfig and
        PartialNetwork."""
        if place.weights.drafts is not None and place.weights.drafts not in place.ops.expert_formats:
            place = replace(place, weights=replace(place.weights, drafts=None))  # they draft with the same weights
        self._place, self._per_token, self._normalised = place, per_token, normalised
        self._networks = [
            PartialNetwork(f"{prefix}.{number}", hidden_size, size, names=names, place=place) for number in range(count)
        ]
        self._experts: Experts | None = None

    def prepare(self) -> None:
        super().prepare()
        self._join()

    def drafting(self) -> Self:
        twin = super().drafting()
        pairs = zip(self._networks, twin._networks, strict=True)
        if any(a.gate_up.linear is not b.gate_up.linear or a.down.linear is not b.down.linear for a, b in pairs):
            twin._join()
        return twin

    def _join(self) -> None:
        linears = [(each.gate_up.linear, each.down.linear) for each in self._networks]
        self._experts = self._place.ops.experts(linears, per_token=self._per_token, normalised=self._normalised)

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        """x: [tokens, hidden_size], whole. scores: [tokens, count]. Returns this rank's part of the weighted sums,
        [tokens, hidden_size], in float32 or wider."""
        assert self._experts is not None, "not prepared yet"
        return self._experts(x, scores)


class MixtureOfExperts(Module):
    """Networks that a router chooses for each token, and a shared one if there is one: this rank's intermediate
    features of each, summed over ranks once."""

    def __init__(self, prefix: str, config: ModelConfig, experts: ExpertsConfig, place: Placement) -> None:
        """prefix: of all weights of the block."""
        names = config.names
        of_network = (names.gate, names.up, names.down)
        self._place = place
        self._router = Router(f"{prefix}.gate", config.hidden_size, experts.count, place=place)
        self._routed = RoutedNetworks(
            f"{prefix}.experts",
            config.hidden_size,
            experts.size,
            experts.count,
            per_token=experts.per_token,
            normalised=experts.normalised,
            names=of_network,
            place=place,
        )
        self._shared: PartialNetwork | None = None
        self._shared_gate: Router | None = None
        if experts.shared_size:
            self._shared = PartialNetwork(
                f"{prefix}.shared_expert", config.hidden_size, experts.shared_size, names=of_network, place=place
            )
            self._shared_gate = Router(f"{prefix}.shared_expert_gate", config.hidden_size, 1, place=place)

    def prepare(self) -> None:
        """See Module. Raises ModelError if the device multiplies no experts in their format."""
        try:
            super().prepare()
        except ValueError as error:
            raise ModelError(str(error)) from error

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden_size]; returns the same shape."""
        y = self._routed(x, self._router(x))
        if self._shared is not None and self._shared_gate is not None:
            y += _sigmoid(self._shared_gate(x)) * self._shared(x)
        return self._place.group.all_reduce(y.to(x.dtype))


def _sigmoid(x: Tensor) -> Tensor:
    """Compute 1 / (1 + exp(-x)) of [rows, 1] as the softmax of x and 0, which is computed row by row: of a plain
    sigmoid, other rows would change how the last ones are rounded."""
    return torch.softmax(torch.cat([x, torch.zeros_like(x)], dim=-1), dim=-1)[:, :1]
