"""The decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3), one rank's shard of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.attention.base import AttentionBackend
from kernels.kv_cache import KVPool, LayerKV
from kernels.rope import llama3_frequencies, rotary_frequencies, rotary_tables
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


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What all layers of one forward share. rotary: cosines and sines of all positions. attention: planned."""

    batch: ForwardBatch
    rotary: tuple[Tensor, Tensor]
    attention: AttentionBackend


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
        self._ops = place.ops

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield from self._qkv.weight_slots()
        yield from self._out.weight_slots()
        if self._q_norm and self._k_norm:
            yield from self._q_norm.weight_slots()
            yield from self._k_norm.weight_slots()

    def prepare(self, int8: bool) -> None:
        self._qkv.prepare(int8)
        self._out.prepare(int8)

    @property
    def nbytes(self) -> int:
        return self._qkv.nbytes + self._out.nbytes

    def quantized(self) -> Attention:
        twin = copy.copy(self)
        twin._qkv, twin._out = self._qkv.quantized(), self._out.quantized()
        return twin

    def __call__(self, x: Tensor, step: LayerInputs, kv: LayerKV) -> Tensor:
        """x: [tokens, hidden_size]. Returns the same shape."""
        norms = None
        if self._q_norm and self._k_norm:
            norms = self._q_norm.weight, self._k_norm.weight, self._q_norm.eps
        qkv = self._qkv.project(x)
        q = self._ops.rotate_and_cache(qkv, step.rotary, step.batch.positions, step.batch.slots, kv, norms)
        o, _ = step.attention.run(kv, q, self._scale)
        return self._out(o.flatten(1))


class MLP:
    """The gated feed-forward network of one layer."""

    def __init__(self, prefix: str, config: ModelConfig, place: Placement) -> None:
        inner = config.intermediate_size
        mine = split(inner, place.group.size)[place.group.rank].slice()
        self._gate_up = GateUpLinear(prefix, config.hidden_size, inner, mine=mine, bias=config.mlp_bias, place=place)
        self._down = RowLinear(
            f"{prefix}.down_proj", inner, config.hidden_size, mine=mine, bias=config.mlp_bias, place=place
        )

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield from self._gate_up.weight_slots()
        yield from self._down.weight_slots()

    def prepare(self, int8: bool) -> None:
        self._gate_up.prepare(int8)
        self._down.prepare(int8)

    @property
    def nbytes(self) -> int:
        return self._gate_up.nbytes + self._down.nbytes

    def quantized(self) -> MLP:
        twin = copy.copy(self)
        twin._gate_up, twin._down = self._gate_up.quantized(), self._down.quantized()
        return twin

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, hidden_size]; returns the same shape."""
        return self._down(self._gate_up(x))


class DecoderLayer:
    """Attention and MLP, each behind a norm, which first adds to the residual stream what came before it."""

    def __init__(self, prefix: str, config: ModelConfig, mine: HeadSplit, place: Placement) -> None:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self._input_norm = RMSNorm(f"{prefix}.input_layernorm", hidden, eps=eps, place=place)
        self._attention = Attention(f"{prefix}.self_attn", config, mine, place)
        self._mlp_norm = RMSNorm(f"{prefix}.post_attention_layernorm", hidden, eps=eps, place=place)
        self._mlp = MLP(f"{prefix}.mlp", config, place)

    def weight_slots(self) -> Iterator[WeightSlot]:
        for part in (self._input_norm, self._attention, self._mlp_norm, self._mlp):
            yield from part.weight_slots()

    def prepare(self, int8: bool) -> None:
        self._attention.prepare(int8)
        self._mlp.prepare(int8)

    @property
    def nbytes(self) -> int:
        return self._attention.nbytes + self._mlp.nbytes

    def quantized(self) -> DecoderLayer:
        twin = copy.copy(self)
        twin._attention, twin._mlp = self._attention.quantized(), self._mlp.quantized()
        return twin

    def __call__(self, x: Tensor, delta: Tensor | None, step: LayerInputs, kv: LayerKV) -> Tensor:
        """x: [tokens, hidden_size], the residual stream, changed in place. delta: what the layer before adds to it.
        Returns what this one adds to it.
        """
        delta = self._attention(self._input_norm(x, delta), step, kv)
        return self._mlp(self._mlp_norm(x, delta))


class Llama:
    """One rank's shard of a decoder. Its weights are uninitialised until every slot of `weight_slots()` is filled; then
    it wants `prepare`. vocab_start, vocab_size: the logits this rank computes are those of tokens vocab_start …
    vocab_start + vocab_size - 1. heads, kv_heads: this rank's. kv_heads, head_dim, num_layers: what its KV pool holds.
    rotary: cosines and sines of all positions, each [positions, head_dim / 2].
    """

    def __init__(self, config: ModelConfig, place: Placement, max_positions: int | None = None) -> None:
        """max_positions: run at more positions than the model was made for (a draft model, whose mistakes only cost
        time). Raises ModelError when the model cannot be split over that many ranks.
        """
        self.config = config
        self.dtype, self.device, self.ops = place.dtype, place.device, place.ops
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
        self.rotary = rotary_tables(
            _frequencies(config.rope, config.head_dim),
            max(config.max_position_embeddings, max_positions or 0),
            dtype=torch.float64 if self.dtype == torch.float64 else torch.float32,
            device=self.device,
        )
        self._int8 = False
        self._twin: Llama | None = None

    def with_layers(self, layers: Sequence[int]) -> Llama:
        """The model that is left with these of its layers, in this order; it shares their weights."""
        left = copy.copy(self)
        left._twin = None
        left.config = dataclasses.replace(self.config, num_layers=len(layers))
        left.num_layers, left._layers = len(layers), [self._layers[i] for i in layers]
        return left

    def weight_slots(self) -> Iterator[WeightSlot]:
        yield from self._embedding.weight_slots()
        for layer in self._layers:
            yield from layer.weight_slots()
        yield from self._norm.weight_slots()
        yield from self._head.weight_slots()

    def prepare(self, int8: bool = False) -> None:
        """All slots are filled: get ready to compute. int8: with matrices rounded to 8 bits; see kernels.ops."""
        for layer in self._layers:  # one after the other, so that little is in memory twice
            layer.prepare(int8)
        self._head.prepare(int8)
        self._int8 = int8

    @property
    def matrix_bytes(self) -> int:
        """What the matrices take; a forward reads all of them."""
        return self._head.nbytes + sum(layer.nbytes for layer in self._layers)

    @property
    def table_bytes(self) -> int:
        """What the embedding takes beside them; a forward reads a few rows of it."""
        return 0 if self._head.shares else self._embedding.weight.nbytes

    def quantized(self) -> Llama:
        """The model with matrices of 8 bits, sharing all else; made once. Itself, if it has them."""
        if self._int8:
            return self
        if self._twin is None:
            twin = copy.copy(self)
            twin._layers, twin._head = [layer.quantized() for layer in self._layers], self._head.quantized()
            twin._int8 = True
            self._twin = twin
        return self._twin

    def make_pool(self, num_pages: int, page_size: int) -> KVPool:
        """For its KV; with the scratch page that graphs need, where there are graphs."""
        return KVPool(
            num_layers=self.num_layers,
            num_pages=num_pages,
            page_size=page_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            scratch=self.ops.graphs is not None,
        )

    def forward(self, batch: ForwardBatch, pool: KVPool, attention: AttentionBackend) -> Tensor:
        """Write the batch's keys and values into the pool and compute the logits asked for.

        Plans `attention` for the batch. Positions must be below the number of positions in `rotary`.
        Returns [n, vocab_size] for the n entries of batch.logit_index (n may be 0), in float32, or float64
        for float64 weights: this rank's shard of the vocabulary.
        """
        attention.plan(batch.attention)
        return self.logits(self.states(batch, pool, attention, batch.logit_index))

    def states(
        self, batch: ForwardBatch, pool: KVPool, attention: AttentionBackend, asked: Tensor | None = None
    ) -> Tensor:
        """As `forward`, up to what `logits` are made of: [n, hidden_size]. attention: planned for the batch. asked: [n]
        int64, of which tokens; None: of all."""
        step = LayerInputs(batch, self.rotary, attention)
        x, delta = self._embedding(batch.token_ids), None
        for index, layer in enumerate(self._layers):
            delta = layer(x, delta, step, pool.layer(index))
        if asked is not None:
            x, delta = x[asked], None if delta is None else delta[asked]
        return self._norm(x, delta)

    def logits(self, states: Tensor) -> Tensor:
        return self._head(states)


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
