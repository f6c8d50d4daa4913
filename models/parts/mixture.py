"""Mixture of experts in place of a layer's feed-forward network.

The router is whole on every rank; the intermediate features of each network are sharded like those of a plain one. Its
parts are sums over this rank's features, in float32 or wider, and all of them are summed over ranks once. Biases of
sums over features are in the parts of rank 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from kernels.ops import Experts, Gate
from models.files.json_values import ModelError
from models.model_config import ExpertsConfig, ModelConfig
from parallel.layers import GateUpLinear
from parallel.matrix_layer import MatrixLayer, MatrixPart, Placement
from parallel.module import MatrixSlot, Module, WeightSlot
from parallel.split import split


class Router(MatrixLayer):
    """Scores of tokens, whole on every rank and never rounded to few bits: an error would choose another network. All
    ranks have the same inputs and the same arithmetic, so they have the same scores."""

    def __init__(self, name: str, in_features: int, count: int, *, bias: bool = False, place: Placement) -> None:
        """count: number of scores of a token."""
        part = MatrixPart(name, (count, in_features), slice(0, count), slice(0, in_features))
        super().__init__([part], bias=bias, place=place, wide=True)
        self._name = name

    def weight_slots(self) -> Iterator[WeightSlot]:
        if self._bias is not None:
            count = len(self._bias)
            yield WeightSlot(self._bias, f"{self._name}.bias", (count,), (slice(0, count),))

    def matrix_slots(self) -> Iterator[MatrixSlot]:
        for slot in super().matrix_slots():
            yield replace(slot, rounds=False)

    def _format_of(self, choice: str) -> str:
        return "dense"

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, in_features], whole. Returns [tokens, count], in float32 or wider."""
        return self.linear(x)


@dataclass(frozen=True, slots=True)
class NetworkKind:
    """Properties that all networks of a mixture share. names: of gate, up and down in a checkpoint. activation: of
    gates. biased: whether all three have biases."""

    names: tuple[str, str, str]
    activation: Gate
    biased: bool


class PartialRowLinear(MatrixLayer):
    """Linear layer with sharded input features, without the sum over ranks. Rank 0 alone has the bias, so that a sum
    over ranks has it once."""

    def __init__(
        self, name: str, in_features: int, out_features: int, *, mine: slice, bias: bool, place: Placement
    ) -> None:
        """mine: the input features that this rank holds."""
        part = MatrixPart(name, (out_features, in_features), slice(0, out_features), mine)
        super().__init__([part], bias=bias and place.group.rank == 0, place=place, wide=True)
        self._name = name
        self._share = self._bias if self._bias is not None else place.empty(0) if bias else None

    def weight_slots(self) -> Iterator[WeightSlot]:
        if self._share is not None:
            shape = (self._parts[0].full_shape[0],)
            yield WeightSlot(self._share, f"{self._name}.bias", shape, (slice(0, len(self._share)),))


class PartialNetwork(Module):
    """A gated network without the sum over ranks: gate_up, then down, which are two products."""

    def __init__(self, prefix: str, hidden_size: int, size: int, *, kind: NetworkKind, place: Placement) -> None:
        """size: intermediate features. Raises ValueError if there are fewer features than ranks."""
        mine = split(size, place.group.size)[place.group.rank].slice()
        gate, up, down = kind.names
        self.gate_up = GateUpLinear(
            prefix,
            hidden_size,
            size,
            mine=mine,
            bias=kind.biased,
            place=place,
            activation=kind.activation,
            names=(gate, up),
        )
        self.down = PartialRowLinear(f"{prefix}.{down}", size, hidden_size, mine=mine, bias=kind.biased, place=place)

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
        kind: NetworkKind,
        place: Placement,
    ) -> None:
        """prefix: of all networks, whose numbers follow it. Others: see models.model_config.ExpertsConfig and
        PartialNetwork."""
        self._place, self._per_token, self._normalised = place, per_token, normalised
        self._networks = [
            PartialNetwork(f"{prefix}.{number}", hidden_size, size, kind=kind, place=place) for number in range(count)
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
        kind = NetworkKind((names.gate, names.up, names.down), config.activation, experts.biased)
        self._place = place
        self._router = Router(
            f"{prefix}.{names.router}", config.hidden_size, experts.count, bias=experts.biased, place=place
        )
        self._routed = RoutedNetworks(
            f"{prefix}.experts",
            config.hidden_size,
            experts.size,
            experts.count,
            per_token=experts.per_token,
            normalised=experts.normalised,
            kind=kind,
            place=place,
        )
        self._shared: PartialNetwork | None = None
        self._shared_gate: Router | None = None
        if experts.shared_size:
            self._shared = PartialNetwork(
                f"{prefix}.shared_expert", config.hidden_size, experts.shared_size, kind=kind, place=place
            )
            self._shared_gate = Router(f"{prefix}.shared_expert_gate", config.hidden_size, 1, place=place)

    def prepare(self) -> None:
        """See Module. Raises ModelError if the device cannot take how the matrices of experts differ."""
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
