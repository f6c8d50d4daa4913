"""Sizes and options of a decoder. Free of torch, so that a server can read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from models.files.json_values import ModelError
from models.files.rope_config import RopeConfig

QKNorm = Literal["none", "head", "all"]
Activation = Literal["silu", "gelu_tanh", "clamped_silu"]

_PLAIN_ROPE = RopeConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """Names of a layer's weights in a checkpoint, without what all models name alike.

    before_attention, after_attention, before_mlp, after_mlp: norms of the input or the output of attention and of the
    feed-forward network; empty: there is none. qkv, gate_up: matrices that the checkpoint has joined, one above the
    other; empty: it has their parts. experts: the block of experts; router: its router; gate, up, down: matrices of one
    of them. stacks_experts: whether tensors hold all experts of a layer (models.layouts.stacked_experts).
    """

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    qkv: str = ""
    gate_up: str = ""
    experts: str = "mlp"
    router: str = "gate"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    stacks_experts: bool = False


_PLAIN_NAMES = WeightNames()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """Mixture of experts in place of a layer's feed-forward network (Mixtral, arXiv 2401.04088): of `count` networks, a
    router gives each token to the `per_token` ones with the largest probabilities.

    size: intermediate features of each. normalised: whether the probabilities of a token's experts are scaled to sum to
    1. shared_size: intermediate features of an expert that has every token, weighted by a gate of its own; 0: there is
    none. biased: whether the router and all networks have biases. dense_layers: layers that have a plain network
    instead.
    """

    count: int
    per_token: int
    size: int
    normalised: bool = True
    shared_size: int = 0
    biased: bool = False
    dense_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder: RMS norms, rotary positions, grouped-query attention, gated feed-forward networks or experts.

    Raises ModelError if the sizes contradict each other.
    """

    model_type: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    """Positions at which the model computes what it was made for: those of config.json, which linear scaling multiplies
    by its factor, as transformers documents it; so also where a file already states the scaled positions."""
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = _PLAIN_ROPE
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: QKNorm = "none"
    """Norm of queries and keys before they are rotated: of each head, or of all heads of the model together."""
    norms_from_one: bool = False
    """Whether a norm multiplies by 1 + its weight."""
    activation: Activation = "silu"
    """Function of the gate of feed-forward networks."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """Factor of what attention and the feed-forward network add to the residual stream."""
    logits_scale: float = 1.0
    attention_scale: float | None = None
    """Factor of scores; None: head_dim ** -0.5."""
    has_sinks: bool = False
    """Whether each head has a sink: a score, without a value, that its softmax has besides those of keys."""
    sliding_window: int | None = None
    """Positions that a query attends to in sliding layers, its own included."""
    sliding_layers: tuple[int, ...] = ()
    """Layers that slide, ascending."""
    sliding_rope: RopeConfig | None = None
    """Rotary embedding of sliding layers; None: that of the others."""
    keeps_all_kv: bool = field(default=False, compare=False)
    """Whether the KV of all tokens is kept although all layers slide: something reads more of it than the window."""
    unrotated_layers: tuple[int, ...] = ()
    """Layers without rotary embedding (NoPE, arXiv 2305.19466), ascending."""
    experts: ExpertsConfig | None = None
    names: WeightNames = _PLAIN_NAMES
    """How a checkpoint names and joins the weights of a layer."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Every token that ends a text, ascending."""
    warnings: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Parts of the model's files that are not served as they are written; logged where the model is loaded."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(
                f"num_attention_heads ({self.num_heads}) is not a multiple of num_key_value_heads ({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim ({self.head_dim}) is odd: rotary embedding turns pairs")
        for rope in (self.rope, self.sliding_rope):
            if rope is not None:
                rope.check(self.head_dim)

    @property
    def attention_groups(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers whose KV is kept for all tokens, and those whose KV is kept for the window only."""
        if self.all_slide and self.keeps_all_kv:
            return self.sliding_layers, ()
        return tuple(i for i in range(self.num_layers) if i not in self.sliding_layers), self.sliding_layers

    @property
    def all_slide(self) -> bool:
        return len(self.sliding_layers) == self.num_layers

    @property
    def mixes_layers(self) -> bool:
        """Whether some layers slide and others do not, which those of a draft model must not."""
        return 0 < len(self.sliding_layers) < self.num_layers

    @property
    def windows(self) -> tuple[int, int]:
        """Number of tokens that a query sees, its own included, in the layers of each of `attention_groups`; 0: all."""
        window = (self.sliding_window or 0) if self.sliding_layers else 0
        return (0, window) if self.attention_groups[1] else (window, 0)

    def rope_of(self, layer: int) -> RopeConfig | None:
        """Return the rotary embedding of a layer; None: it has none."""
        if layer in self.unrotated_layers:
            return None
        return self.sliding_rope if layer in self.sliding_layers and self.sliding_rope else self.rope

    def with_layers(self, layers: Sequence[int]) -> ModelConfig:
        """Return the config of a model of only these layers, in this order."""

        def kept(marked: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(place for place, layer in enumerate(layers) if layer in marked)

        experts = self.experts
        return replace(
            self,
            num_layers=len(layers),
            sliding_window=self.sliding_window if kept(self.sliding_layers) else None,
            sliding_rope=self.sliding_rope if kept(self.sliding_layers) else None,
            sliding_layers=kept(self.sliding_layers),
            unrotated_layers=kept(self.unrotated_layers),
            experts=experts and replace(experts, dense_layers=kept(experts.dense_layers)),
        )

    @property
    def max_model_len(self) -> int:
        """Longest request that the model serves exactly, in tokens."""
        return self.max_position_embeddings
