"""The decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3, Seed-OSS, InternLM3): one rank's shard."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from kernels.attention.base import AttentionBackend, PlannedAttention
from kernels.kv.kv_formats import KV_FORMATS
from kernels.kv.kv_pool import KVPool, LayerKV
from kernels.rope import llama3_frequencies, rotary_frequencies, rotary_tables
from models.batch import ForwardBatch, TokenInputs
from models.config import ModelConfig, ModelError, RopeConfig
from parallel.layers import GateUpLinear, LMHead, QKVLinear, RMSNorm, RowLinear, VocabEmbedding
from parallel.matrix_layer import Placement
from parallel.module import Module
from parallel.split import HeadSplit, split, split_heads


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """Inputs shared by all layers of one forward. rotary: cosines and sines of all positions. attention: planned."""

    tokens: TokenInputs
    rotary: tuple[Tensor, Tensor]
    attention: PlannedAttention


class Attention(Module):
    """Self-attention of one layer: this rank's heads, summed over ranks by the output projection."""

    def __init__(self, prefix: str, config: ModelConfig, mine: HeadSplit, place: Placement) -> None:
        head_dim = config.head_dim
        self._qkv = QKVLinear(
            prefix,
            config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=head_dim,
            mine=mine,
            bias=config.qkv_bias,
            place=place,
        )
        self._out = RowLinear(
            f"{prefix}.o_proj",
            config.num_heads * head_dim,
            config.hidden_size,
            mine=mine.heads.slice(head_dim),
            bias=config.o_bias,
            place=place,
        )
        self._q_norm = self._k_norm = None
        if config.qk_norm:
            self._q_norm = RMSNorm(f"{prefix}.q_norm", head_dim, eps=config.rms_norm_eps, place=place)
            self._k_norm = RMSNorm(f"{prefix}.k_norm", head_dim, eps=config.rms_norm_eps, place=place)
        self._scale = head_dim**-0.5
        self._ops = place.ops

    def __call__(self, x: Tensor, inputs: LayerInputs, kv: LayerKV) -> Tensor:
        """x: [tokens, hidden_size]. Returns the same shape."""
        norms = None
        if self._q_norm and self._k_norm:
            norms = self._q_norm.weight, self._k_norm.weight, self._q_norm.eps
        qkv = self._qkv.project(x)
        q = self._ops.rotate_and_cache(qkv, inputs.rotary, inputs.tokens.positions, inputs.tokens.slots, kv, norms)
        o, _ = inputs.attention.run(kv, q, self._scale)
        return self._out(o.flatten(1))


class MLP(Module):
    """The gated feed-forward network of one layer."""

    def __init__(self, prefix: str, config: ModelConfig, place: Placement) -> None:
        inner = config.intermediate_size
        mine = split(inner, place.group.size)[place.group.rank].slice()
        self._gate_up = GateUpLinear(prefix, config.hidden_size, inner, mine=mine, bias=config.mlp_bias, place=place)
        self._down = RowLinear(
            f"{prefix}.down_proj", inner, config.hidden_size, mine=mine, bias=config.mlp_bias, place=place
        )

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden_size]; returns the same shape."""
        return self._down(self._gate_up(x))


class DecoderLayer(Module):
    """Attention and MLP. The norm before each of them first adds the previous output to the residual stream."""

    def __init__(self, prefix: str, config: ModelConfig, mine: HeadSplit, place: Placement) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._input_norm = RMSNorm(f"{prefix}.input_layernorm", hidden, eps=eps, place=place)
        self._attention = Attention(f"{prefix}.self_attn", config, mine, place)
        self._mlp_norm = RMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps=eps, place=place)
        self._mlp = MLP(f"{prefix}.mlp", config, place)

    def __call__(self, x: Tensor, delta: Tensor | None, inputs: LayerInputs, kv: LayerKV) -> Tensor:
        """x: [tokens, hidden_size], the residual stream, changed in place. delta: the previous layer's output, still to
        be added. Returns this layer's output.
        """
        delta = self._attention(self._input_norm(x, delta), inputs, kv)
        return self._mlp(self._mlp_norm(x, delta))


class Llama(Module):
    """One rank's shard of a decoder. Fill every slot of `weight_slots()`, then every one of `matrix_slots()`, and call
    `prepare()` before anything else.

    weights: formats of its matrices.
    vocab_start, vocab_size: this rank computes the logits of tokens vocab_start … vocab_start + vocab_size - 1.
    heads, kv_heads: numbers of this rank's heads. first_kv_head: the first of its KV heads among the model's. kv_heads,
    head_dim, num_layers: sizes of its KV pool.
    rotary: cosines and sines of all positions that forwards can have, each [positions, head_dim / 2].
    """

    def __init__(self, config: ModelConfig, place: Placement, max_positions: int | None = None) -> None:
        """max_positions: number of positions that forwards can have; None: the model's own. A draft model may have more
        than it was made for, since its mistakes cost only time.

        Raises ModelError if the model cannot be split over that many ranks.
        """
        self.config = config
        self.dtype, self.device, self.ops = place.dtype, place.device, place.ops
        self.num_layers, self.head_dim = config.num_layers, config.head_dim
        try:
            mine = split_heads(config.num_heads, config.num_kv_heads, place.group.size)[place.group.rank]
            self._embedding = VocabEmbedding(
                "model.embed_tokens",
                config.vocab_size,
                config.hidden_size,
                place=place,
                shared=config.tie_word_embeddings,
            )
            self._layers = [DecoderLayer(f"model.layers.{i}", config, mine, place) for i in range(config.num_layers)]
        except ValueError as error:
            raise ModelError(f"tensor parallel size {place.group.size}: {error}") from error
        self._norm = RMSNorm("model.norm", config.hidden_size, eps=config.rms_norm_eps, place=place)
        tied = self._embedding if config.tie_word_embeddings else None
        self._head = LMHead("lm_head", config.vocab_size, config.hidden_size, tied=tied, place=place)
        self.heads, self.kv_heads = mine.heads.size, mine.kv_heads.size
        self.first_kv_head = mine.kv_heads.start
        self.vocab_start, self.vocab_size = self._head.vocab.start, self._head.vocab.size
        # Tables as wide as the arithmetic around them: float32 for models of 16 bits, which then round once.
        self.rotary = rotary_tables(
            model_frequencies(config.rope, config.head_dim),
            max_positions or config.max_model_len,
            dtype=torch.float64 if self.dtype == torch.float64 else torch.float32,
            device=self.device,
        )
        self.weights = place.weights
        self._twin: tuple[Self, ...] = ()  # the model that drafts, once made; in a tuple, so that it is no child

    @property
    def max_positions(self) -> int:
        """Number of positions that forwards can have."""
        return len(self.rotary[0])

    def limit_positions(self, count: int) -> None:
        """Keep only the first `count` positions, and free the memory of the others."""
        if count < self.max_positions:
            cos, sin = self.rotary
            self.rotary = cos[:count].clone(), sin[:count].clone()

    def with_layers(self, layers: Sequence[int]) -> Llama:
        """Return a model of only these layers, in this order, that shares their weights."""
        left = copy.copy(self)
        left._twin = ()
        left.config = dataclasses.replace(self.config, num_layers=len(layers))
        left.num_layers, left._layers = len(layers), [self._layers[i] for i in layers]
        return left

    @property
    def table_bytes(self) -> int:
        """Bytes of the embedding, where the head has its own weights; a forward reads a few rows of it."""
        return 0 if self._head.shares_embedding else self._embedding.weight.nbytes

    def drafting(self) -> Self:
        """Return the model with the matrices of drafts, sharing all else; made once. Itself, if it has none."""
        if self.weights.drafts is None:
            return self
        if not self._twin:
            twin = super().drafting()
            twin.weights = dataclasses.replace(self.weights, own=self.weights.drafts, drafts=None)
            self._twin = (twin,)
        return self._twin[0]

    def make_pool(self, num_pages: int, page_size: int, format: str = "dense", exact_pages: int = 0) -> KVPool:
        """Allocate a pool for this model's KV, with a scratch page where forwards are captured. format: a key of
        KV_FORMATS. exact_pages: see KVFormat.make_pool."""
        return KV_FORMATS[format].make_pool(
            exact_pages,
            num_layers=self.num_layers,
            num_pages=num_pages,
            page_size=page_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            scratch=self.ops.make_graphs is not None,
        )

    def forward(self, batch: ForwardBatch, pool: KVPool, attention: AttentionBackend) -> Tensor:
        """Write the batch's keys and values into the pool and compute the requested logits.

        Plans `attention` for the batch. Positions must be below max_positions.
        Returns [n, vocab_size] for the n entries of batch.logit_index (n may be 0), in float32, or float64
        for float64 weights: this rank's shard of the vocabulary.
        """
        attention.plan(batch.attention)
        return self.logits(self.states(batch, pool, attention, batch.logit_index))

    def states(
        self, tokens: TokenInputs, pool: KVPool, attention: PlannedAttention, index: Tensor | None = None
    ) -> Tensor:
        """Run `forward` up to the final hidden states, [n, hidden_size]. attention: planned for the tokens. index: [n]
        int64, tokens whose states are returned; None: all."""
        inputs = LayerInputs(tokens, self.rotary, attention)
        x, delta = self._embedding(tokens.token_ids), None
        for number, layer in enumerate(self._layers):
            delta = layer(x, delta, inputs, pool.layer(number))
        if index is not None:
            x, delta = x[index], None if delta is None else delta[index]
        return self._norm(x, delta)

    def logits(self, states: Tensor) -> Tensor:
        """states: [n, hidden_size]. Returns [n, this rank's vocabulary]."""
        return self._head(states)


def model_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Return the rotary frequencies of a model: [head_dim / 2]."""
    frequencies = rotary_frequencies(head_dim, rope.theta)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return llama3_frequencies(
            frequencies,
            factor=rope.factor,
            low_freq_factor=rope.low_freq_factor,
            high_freq_factor=rope.high_freq_factor,
            original_max_positions=rope.original_max_positions,
        )
    return frequencies
