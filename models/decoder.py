"""A decoder of any architecture in models.architectures, composed of models.parts: one rank's shard."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from kernels.attention.base import AttentionBackend, PlannedAttention
from kernels.kv.kv_formats import KV_FORMATS
from kernels.kv.kv_pool import KVPool, LayerKV
from models.batch import ForwardBatch, SlidingKV, TokenInputs
from models.files.json_values import ModelError
from models.files.rope_config import RopeConfig
from models.model_config import ModelConfig
from models.parts.feed_forward import make_feed_forward
from models.parts.rotary import Rotary, make_query_scales, make_rotary, rotary_factor
from models.parts.self_attention import Attention, AttentionInputs
from parallel.layers import LMHead, RMSNorm, VocabEmbedding
from parallel.matrix_layer import Placement
from parallel.module import Module
from parallel.split import HeadSplit, split_heads


class DecoderLayer(Module):
    """Attention, and a feed-forward network or experts. The norm before each of them first adds the previous output to
    the residual stream.

    slides: whether its KV is in the pool of sliding layers. index: its place in its pool. rotary: its rotary embedding;
    None: it has none.
    """

    def __init__(
        self, config: ModelConfig, layer: int, mine: HeadSplit, place: Placement, *, slides: bool, index: int
    ) -> None:
        prefix, names = f"model.layers.{layer}", config.names
        self.slides, self.index, self.rotary = slides, index, config.rope_of(layer)
        self._residual_scale = config.residual_scale

        def norm(name: str) -> RMSNorm | None:
            if not name:
                return None
            offset = float(config.norms_from_one)
            return RMSNorm(f"{prefix}.{name}", config.hidden_size, eps=config.rms_norm_eps, place=place, offset=offset)

        self._before_attention = norm(names.before_attention)
        self._attention = Attention(f"{prefix}.self_attn", config, layer, mine, place)
        self._after_attention = norm(names.after_attention)
        self._before_mlp = norm(names.before_mlp)
        self._mlp = make_feed_forward(prefix, config, layer, place)
        self._after_mlp = norm(names.after_mlp)

    def __call__(self, x: Tensor, delta: Tensor | None, inputs: AttentionInputs, kv: LayerKV) -> Tensor:
        """x: [tokens, hidden_size], the residual stream, changed in place. delta: the previous layer's output, still to
        be added. Returns this layer's output.
        """
        delta = self._attention(_add(x, delta, self._before_attention), inputs, kv)
        delta = self._output(delta, self._after_attention)
        return self._output(self._mlp(_add(x, delta, self._before_mlp)), self._after_mlp)

    def _output(self, delta: Tensor, norm: RMSNorm | None) -> Tensor:
        """Return what a part with this norm behind it adds to the residual stream."""
        if norm is not None:
            delta = norm(delta, None)
        return delta if self._residual_scale == 1 else delta.mul_(self._residual_scale)


def _add(x: Tensor, delta: Tensor | None, norm: RMSNorm | None) -> Tensor:
    """Add delta to x in place. Returns the norm of the sum, or, without one, the sum."""
    if norm is not None:
        return norm(x, delta)
    return x if delta is None else x.add_(delta)


class DecoderModel(Module):
    """One rank's shard of a decoder. Fill every slot of `weight_slots()`, then every one of `matrix_slots()`, and call
    `prepare()` before anything else.

    weights: formats of its matrices.
    vocab_start, vocab_size: this rank computes the logits of tokens vocab_start … vocab_start + vocab_size - 1.
    heads, kv_heads: numbers of this rank's heads. max_heads, max_kv_heads: the largest numbers that a rank has.
    first_kv_head: the first of its KV heads among the model's.
    num_layers: number of all layers. num_kv_layers, num_sliding_layers: of those that keep the KV of all tokens, and of
    those that keep only a window's. window: number of slots that queries of the first see, sliding_window: of the
    second; 0: all. kv_heads, head_dim, num_kv_layers, num_sliding_layers: sizes of its KV pools.
    """

    def __init__(self, config: ModelConfig, place: Placement, max_positions: int | None = None) -> None:
        """max_positions: number of positions that forwards can have; None: the model's own. A draft model may have more
        than it was made for, since its mistakes cost only time.

        Raises ModelError if the model cannot be split over that many ranks.
        """
        self.config = config
        self.dtype, self.device, self.ops = place.dtype, place.device, place.ops
        self.num_layers, self.head_dim = config.num_layers, config.head_dim
        groups = config.attention_groups
        self.num_kv_layers, self.num_sliding_layers = map(len, groups)
        self.window, self.sliding_window = config.windows
        try:
            shards = split_heads(config.num_heads, config.num_kv_heads, place.group.size)
            mine = shards[place.group.rank]
            self._embedding = VocabEmbedding(
                "model.embed_tokens",
                config.vocab_size,
                config.hidden_size,
                place=place,
                shared=config.tie_word_embeddings,
            )
            self._layers = [
                DecoderLayer(config, i, mine, place, slides=i in groups[1], index=groups[i in groups[1]].index(i))
                for i in range(config.num_layers)
            ]
        except ValueError as error:
            raise ModelError(f"tensor parallel size {place.group.size}: {error}") from error
        offset = float(config.norms_from_one)
        self._norm = RMSNorm("model.norm", config.hidden_size, eps=config.rms_norm_eps, place=place, offset=offset)
        tied = self._embedding if config.tie_word_embeddings else None
        self._head = LMHead("lm_head", config.vocab_size, config.hidden_size, tied=tied, place=place)
        self.heads, self.kv_heads = mine.heads.size, mine.kv_heads.size
        self.max_heads = max(shard.heads.size for shard in shards)
        self.max_kv_heads = max(shard.kv_heads.size for shard in shards)
        self.first_kv_head = mine.kv_heads.start
        self.vocab_start, self.vocab_size = self._head.vocab.start, self._head.vocab.size
        # Like transformers, which multiplies by the factor in the embedding's precision.
        self._embedding_scale = float(torch.tensor(config.embedding_scale, dtype=place.dtype))
        # Tables as wide as the arithmetic around them: float32 for models of 16 bits, which then round once.
        self._wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        positions = max_positions or config.max_model_len
        self._rotary: dict[RopeConfig | None, Rotary] = {
            kind: self._tables(kind, positions) for kind in {layer.rotary: None for layer in self._layers}
        }
        self.weights = place.weights
        self._twin: tuple[Self, ...] = ()  # the model that drafts, once made; in a tuple, so that it is no child

    @property
    def max_positions(self) -> int:
        """Number of positions that forwards can have."""
        return len(next(iter(self._rotary.values()))[0])

    @property
    def rotary(self) -> Rotary | None:
        """Cosines and sines by which all positions rotate, each [positions, head_dim / 2], without the factor that some
        kinds of rotary embedding have besides; None if layers have different ones."""
        if len(self._rotary) > 1:
            return None
        (kind,) = self._rotary
        if kind is None or rotary_factor(kind) == 1:
            return self._rotary[kind]
        return self._tables(replace(kind, attention_factor=1.0), self.max_positions)

    def _tables(self, kind: RopeConfig | None, positions: int) -> Rotary:
        return make_rotary(kind, self.head_dim, positions, dtype=self._wide, device=self.device)

    def limit_positions(self, count: int) -> None:
        """Keep only the first `count` positions, and free the memory of the others."""
        if count < self.max_positions:
            self._rotary = {
                kind: self._tables(kind, count)
                if kind is not None and kind.depends_on_length
                else (cos[:count].clone(), sin[:count].clone())
                for kind, (cos, sin) in self._rotary.items()
            }

    def with_positions(self, count: int) -> Self:
        """Return a model that shares all with this one, and rotates as one that serves only the first `count`
        positions; itself, where their number makes no difference."""
        if count >= self.max_positions or not any(kind and kind.depends_on_length for kind in self._rotary):
            return self
        other = copy.copy(self)
        other._twin = ()
        other.limit_positions(count)
        return other

    def with_layers(self, layers: Sequence[int]) -> DecoderModel:
        """Return a model of only these layers, in this order, that shares their weights. The KV of each stays in the
        pool where it was: that of sliding layers, even if no others are left."""
        part = copy.copy(self)
        part._twin = ()
        part.config = self.config.with_layers(layers)
        part.num_layers = len(layers)
        part._set_layers([self._layers[i] for i in layers])
        return part

    def keeping_all_kv(self, keeps: bool = True) -> DecoderModel:
        """Return a model that shares all with this one, and of which, if all layers slide, they keep the KV of all
        tokens, or of the window only. See ModelConfig.attention_groups."""
        if not self.config.all_slide or keeps == self.config.keeps_all_kv:
            return self
        other = copy.copy(self)
        other._twin = ()
        other.config = replace(self.config, keeps_all_kv=keeps)
        other.window, other.sliding_window = other.config.windows
        other._set_layers(self._layers, slides=not keeps)
        return other

    def _set_layers(self, layers: Sequence[DecoderLayer], slides: bool | None = None) -> None:
        """Set the layers to copies of `layers`, each at the next place of its pool. slides: of all of them; None: as
        they are."""
        counts, self._layers = [0, 0], []
        for each in layers:
            layer = copy.copy(each)
            layer.slides = each.slides if slides is None else slides
            layer.index = counts[layer.slides]
            counts[layer.slides] += 1
            self._layers.append(layer)
        self.num_kv_layers, self.num_sliding_layers = counts

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
            twin.weights = replace(self.weights, own=self.weights.drafts, drafts=None)
            self._twin = (twin,)
        return self._twin[0]

    def make_pool(self, num_pages: int, page_size: int, format: str = "dense", exact_pages: int = 0) -> KVPool:
        """Allocate a pool for the KV of all tokens, with a scratch page where forwards are captured. format: a key of
        KV_FORMATS. exact_pages: see KVFormat.make_pool."""
        return self._pool(self.num_kv_layers, num_pages, page_size, format, exact_pages)

    def make_sliding_pool(self, num_pages: int, page_size: int) -> KVPool:
        """Allocate a pool for the KV of sliding layers."""
        return self._pool(self.num_sliding_layers, num_pages, page_size, "dense", 0)

    def _pool(self, num_layers: int, num_pages: int, page_size: int, format: str, exact_pages: int) -> KVPool:
        return KV_FORMATS[format].make_pool(
            exact_pages,
            num_layers=num_layers,
            num_pages=num_pages,
            page_size=page_size,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            device=self.device,
            scratch=self.ops.make_graphs is not None,
        )

    def forward(
        self,
        batch: ForwardBatch,
        pool: KVPool,
        attention: AttentionBackend,
        sliding: SlidingKV[AttentionBackend] | None = None,
    ) -> Tensor:
        """Write the batch's keys and values into the pools and compute the requested logits.

        Plans attention for the batch. sliding: of a model with sliding layers. Positions must be below max_positions.
        Returns [n, vocab_size] for the n entries of batch.logit_index (n may be 0), in float32, or float64
        for float64 weights: this rank's shard of the vocabulary.
        """
        attention.plan(batch.attention)
        if sliding is not None:
            assert batch.sliding_attention is not None
            sliding.attention.plan(batch.sliding_attention)
        return self.logits(self.states(batch, pool, attention, batch.logit_index, sliding))

    def states(
        self,
        tokens: TokenInputs,
        pool: KVPool,
        attention: PlannedAttention,
        index: Tensor | None = None,
        sliding: SlidingKV[PlannedAttention] | None = None,
    ) -> Tensor:
        """Run `forward` up to the final hidden states, [n, hidden_size]. attention, sliding: planned for the tokens.
        index: [n] int64, tokens whose states are returned; None: all."""
        inputs = self._attention_inputs(tokens, attention, sliding)
        x, delta = self._embedding(tokens.token_ids), None
        if self._embedding_scale != 1:
            x.mul_(self._embedding_scale)
        pools = (pool,) if sliding is None else (pool, sliding.pool)
        for layer in self._layers:
            kv = pools[layer.slides].layer(layer.index)
            delta = layer(x, delta, inputs[layer.rotary, layer.slides], kv)
        if index is not None:
            x, delta = x[index], None if delta is None else delta[index]
        return self._norm(x, delta)

    def _attention_inputs(
        self, tokens: TokenInputs, attention: PlannedAttention, sliding: SlidingKV[PlannedAttention] | None
    ) -> dict[tuple[RopeConfig | None, bool], AttentionInputs]:
        """Return the inputs of attention by rotary embedding, and by whether a layer's KV is in the sliding pool."""
        inputs = {}
        for kind, tables in self._rotary.items():
            scales = make_query_scales(kind, tokens.positions)
            inputs[kind, False] = AttentionInputs(tables, tokens.positions, tokens.slots, attention, scales)
            if sliding is not None:
                slots = tokens.sliding_slots
                assert slots is not None
                inputs[kind, True] = AttentionInputs(tables, tokens.positions, slots, sliding.attention, scales)
        return inputs

    def logits(self, states: Tensor) -> Tensor:
        """states: [n, hidden_size]. Returns [n, this rank's vocabulary]."""
        logits = self._head(states)
        return logits if self.config.logits_scale == 1 else logits.mul_(self.config.logits_scale)
