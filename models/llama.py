"""The decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3), one rank's shard of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention.base import AttentionBackend
from kernels.kv_cache import KVPool, LayerKV, write_kv
from kernels.rope import apply_rope, llama3_frequencies, rotary_frequencies, rotary_tables
from models.batch import ForwardBatch
from models.config import ModelConfig, ModelError, RopeConfig
from parallel.layers import (
    GateUpLinear,
    LMHead,
    Placement,
    QKVLinear,
    RMSNorm,
    RowLinear,
    VocabEmbedding,
    WeightSlot,
)
from parallel.split import HeadSplit, split, split_heads


class Attention:
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

    def slots(self) -> Iterator[WeightSlot]:
        yield from self._qkv.slots()
        yield from self._out.slots()
        if self._q_norm and self._k_norm:
            yield from self._q_norm.slots()
            yield from self._k_norm.slots()

    def __call__(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        slots: Tensor,
        kv: LayerKV,
        attention: AttentionBackend,
    ) -> Tensor:
        """x: [tokens, hidden_size]; rotary: cos and sin, [tokens, head_dim / 2]. Returns [tokens,
        hidden_size].
        """
        q, k, v = self._qkv.project(x)
        if self._q_norm and self._k_norm:
            q, k = self._q_norm(q), self._k_norm(k)
        q, k = apply_rope(q, *rotary), apply_rope(k, *rotary)
        write_kv(kv, slots, k, v)
        return self._out(attention.run(kv, q, self._scale).flatten(1))


class MLP:
    """The gated feed-forward network of one layer."""

    def __init__(self, prefix: str, config: ModelConfig, place: Placement) -> None:
        inner = config.intermediate_size
        mine = split(inner, place.group.size)[place.group.rank].slice()
        self._gate_up = GateUpLinear(prefix, config.hidden_size, inner, mine=mine, bias=config.mlp_bias, place=place)
        self._down = RowLinear(
            f"{prefix}.down_proj", inner, config.hidden_size, mine=mine, bias=config.mlp_bias, place=place
        )

    def slots(self) -> Iterator[WeightSlot]:
        yield from self._gate_up.slots()
        yield from self._down.slots()

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden_size]; returns the same shape."""
        gate, up = self._gate_up.project(x)
        return self._down(F.silu(gate).mul_(up))


class DecoderLayer:
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, prefix: str, config: ModelConfig, mine: HeadSplit, place: Placement) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._input_norm = RMSNorm(f"{prefix}.input_layernorm", hidden, eps=eps, place=place)
        self._attention = Attention(f"{prefix}.self_attn", config, mine, place)
        self._mlp_norm = RMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps=eps, place=place)
        self._mlp = MLP(f"{prefix}.mlp", config, place)

    def slots(self) -> Iterator[WeightSlot]:
        for part in (self._input_norm, self._attention, self._mlp_norm, self._mlp):
            yield from part.slots()

    def __call__(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        slots: Tensor,
        kv: LayerKV,
        attention: AttentionBackend,
    ) -> Tensor:
        """See Attention.__call__."""
        x = x + self._attention(self._input_norm(x), rotary, slots, kv, attention)
        return x + self._mlp(self._mlp_norm(x))


class Llama:
    """One rank's shard of a decoder. Its weights are uninitialised until every slot of `slots()` is filled.

    vocab_start, vocab_size: the logits this rank computes are those of tokens vocab_start … vocab_start +
    vocab_size - 1.
    heads, kv_heads: this rank's. kv_heads, head_dim, num_layers: what its KV pool must hold.
    rotary: cosines and sines of all positions, each [positions, head_dim / 2].
    """

    def __init__(self, config: ModelConfig, place: Placement, max_positions: int | None = None) -> None:
        """max_positions: run at more positions than the model was made for (a draft model, whose mistakes only cost
        time). Raises ModelError when the model cannot be split over that many ranks.
        """
        self.config = config
        self.dtype, self.device = place.dtype, place.device
        self.num_layers, self.head_dim = config.num_layers, config.head_dim
        try:
            mine = split_heads(config.num_heads, config.num_kv_heads, place.group.size)[place.group.rank]
            self._embedding = VocabEmbedding("model.embed_tokens", config.vocab_size, config.hidden_size, place=place)
            self._layers = [DecoderLayer(f"model.layers.{i}", config, mine, place) for i in range(config.num_layers)]
        except ValueError as error:
            raise ModelError(f"tensor parallel size {place.group.size}: {error}") from error
        self._norm = RMSNorm("model.norm", config.hidden_size, eps=config.rms_norm_eps, place=place)
        tied = self._embedding if config.tie_word_embeddings else None
        self._head = LMHead("lm_head", config.vocab_size, config.hidden_size, tied=tied, place=place)
        self.heads, self.kv_heads = mine.heads.size, mine.kv_heads.size
        self.vocab_start, self.vocab_size = self._head.vocab.start, self._head.vocab.size
        # Tables as wide as the arithmetic around them: float32 for models of 16 bits, which then round once.
        self._logit_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.rotary = rotary_tables(
            _frequencies(config.rope, config.head_dim),
            max(config.max_position_embeddings, max_positions or 0),
            dtype=self._logit_dtype,
            device=self.device,
        )

    def with_layers(self, layers: Sequence[int]) -> Llama:
        """The model that is left with these of its layers, in this order; it shares their weights."""
        left = copy.copy(self)
        left.config = dataclasses.replace(self.config, num_layers=len(layers))
        left.num_layers, left._layers = len(layers), [self._layers[i] for i in layers]
        return left

    def slots(self) -> Iterator[WeightSlot]:
        yield from self._embedding.slots()
        for layer in self._layers:
            yield from layer.slots()
        yield from self._norm.slots()
        yield from self._head.slots()

    def forward(self, batch: ForwardBatch, pool: KVPool, attention: AttentionBackend) -> Tensor:
        """Write the batch's keys and values into the pool and compute the logits asked for.

        Plans `attention` for the batch. Positions must be below the number of positions in `rotary`.
        Returns [n, vocab_size] for the n entries of batch.logit_index (n may be 0), in float32, or float64
        for float64 weights: this rank's shard of the vocabulary.
        """
        attention.plan(batch.attention)
        cos, sin = self.rotary
        rotary = cos.index_select(0, batch.positions), sin.index_select(0, batch.positions)
        x = self._embedding(batch.token_ids)
        for index, layer in enumerate(self._layers):
            x = layer(x, rotary, batch.slots, pool.layer(index), attention)
        x = self._norm(x.index_select(0, batch.logit_index))
        return self._head(x).to(self._logit_dtype)


def _frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
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
