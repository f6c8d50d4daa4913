"""The gated feed-forward network of one layer, or its experts."""

from __future__ import annotations

from torch import Tensor

from models.model_config import ModelConfig
from models.parts.mixture import MixtureOfExperts
from parallel.layers import GateUpLinear, RowLinear
from parallel.matrix_layer import Placement
from parallel.module import Module
from parallel.split import split


class FeedForward(Module):
    """down(activation(gate(x)) * up(x)): this rank's intermediate features, summed over ranks."""

    def __init__(self, prefix: str, config: ModelConfig, place: Placement) -> None:
        inner = config.intermediate_size
        mine = split(inner, place.group.size)[place.group.rank].slice()
        self._gate_up = GateUpLinear(
            prefix,
            config.hidden_size,
            inner,
            mine=mine,
            bias=config.mlp_bias,
            place=place,
            activation=config.activation,
            names=(config.names.gate, config.names.up),
            joined=config.names.gate_up,
        )
        self._down = RowLinear(
            f"{prefix}.{config.names.down}", inner, config.hidden_size, mine=mine, bias=config.mlp_bias, place=place
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden_size]; returns the same shape."""
        return self._down(self._gate_up(x))


def make_feed_forward(prefix: str, config: ModelConfig, layer: int, place: Placement) -> FeedForward | MixtureOfExperts:
    """Make the network of a layer, or its experts. prefix: of the layer's weights."""
    experts = config.experts
    if experts is None or layer in experts.dense_layers:
        return FeedForward(f"{prefix}.mlp", config, place)
    return MixtureOfExperts(f"{prefix}.{config.names.experts}", config, experts, place)
