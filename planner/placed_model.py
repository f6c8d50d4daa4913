"""Time of one forward of a model on devices, predicted from shapes and data sheets. Free of torch.

    T(rows, Σcontext, n) = T_lin + T_att + T_comm + T_0
    T_lin  = max(2·P·rows·n / (N·F·u_f), W / (N·M·u_m))
    T_att  = max(4·h·d_h·n·(L_f·Σcontext + L_s·Σwindow) / (N·F·u_f), (k·unique + k_s·Σwindow) / (N'·M·u_kv)),
             times v where n > 1
    T_comm = 2·L·(t_ar + 2(N−1)/N·rows·n·d·bytes / link), none for N = 1
    T_0    = L·t_layer

n: query tokens per row. N: ranks, each of F FLOP/s and M bytes/s. P: parameters active for a token. W: bytes of the
matrices that a forward reads, which follow from the weights' format and, of experts, from the expected number of them
that rows·n tokens are given to (models.shapes.distinct_experts). So a verify pass reads more weights than a plain step
where a model has experts, until a batch reads them all. F is the rate of 16 bits for weights of fewer, which kernels
widen while they multiply (MARLIN, arXiv 2408.11743), except for T_lin of fp8 weights where a device multiplies these
(Device.fp8_flops). L: layers, of h query heads, head dimension d_h and hidden size d; L_s of them slide: whatever the
policy, they read the window's tokens of each row, Σwindow, which rows share none of. L_f: the others. k, k_s: KV bytes
per token of these and of those. k is in the format that is read; of both, the rank with the most KV heads reads 1/N';
where pages are sealed, a row's latest tokens have those of dense KV (PlacedModel.exact_tokens). Where all layers slide,
they count as the others, and plain steps read the window's tokens. v: Efficiency.verify_attention. t_ar:
Device.all_reduce_s. unique: the tokens of Σcontext, those that rows share counted once. One read of them serves all
rows (Bifurcated attention, arXiv 2403.08845), but the queries of every row compute with them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.kv.kv_bits import EXACT_PAGES, KV_BITS
from models.model_config import ModelConfig
from models.shapes import active_parameters, matrix_bytes, rank_kv_token_bytes, rank_sliding_token_bytes
from planner.hardware import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiency:
    """Fractions of a device's peak rates that a forward reaches, and fixed overheads.

    The defaults are for GPUs. Only `layer_s` is fitted (bench/paper/published.py). The others are typical values, kept
    fixed because the published ratios hardly separate them from `layer_s`.
    """

    flops: float = 0.6
    """u_f: fraction of peak FLOP/s that matrix products and attention reach."""
    weights: float = 0.8
    """u_m: fraction of peak memory bandwidth that weight reads reach."""
    kv: float = 0.8
    """u_kv: fraction of peak memory bandwidth that KV reads reach."""
    verify_attention: float = 1.4
    """v: time of attention for several queries per row, relative to one query, over the same KV."""
    layer_s: float = 0.135e-3
    """t_layer: seconds per layer that do not depend on its work: launches, waiting for other ranks, pauses."""


PUBLISHED = Efficiency()
"""Efficiency of MagicDec's published runs. Its layer_s was fitted to speed-ups on eight GPUs, where it covers what
all-reduces take beyond Device.all_reduce_s, and ranks that wait for each other. Their code compiles forwards to CUDA
graphs (torch.compile, max-autotune), so it is not the time that the host needs to launch kernels one by one."""
CAPTURED = Efficiency(layer_s=0.02e-3)
"""Efficiency assumed for forwards replayed from CUDA graphs on one GPU, where nothing of the above applies: a layer is
about ten kernels, each of which takes some 2 µs to begin and to end beside its bytes. Neither fitted nor measured."""
REFERENCE_ON_CPU = Efficiency(flops=1.0, weights=0.8, kv=0.04, verify_attention=1.1, layer_s=1e-3)
"""Efficiency of the reference attention, derived from the batches of 1 and 8 on two cores in docs/benchmarks.md. flops
is relative to float32."""


def product_seconds(tokens: float, weights: float, nbytes: float, *, flops: float, bandwidth: float) -> float:
    """Predict T_lin, the seconds of products of `tokens` inputs with so many weights, which take `nbytes`."""
    return max(2 * weights * tokens / flops, nbytes / bandwidth)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModel:
    """One model on `ranks` devices.

    element_bytes: bytes of an element of dense weights, KV and activations. weights: format of its matrices, a key of
    kernels.weights.weight_bits.WEIGHT_BITS. kv_format: format of the KV that it reads, see kernels.kv.kv_bits. drafts:
    whether it drafts, and so reads the fewer bits that some formats have for drafts.
    """

    model: ModelConfig
    device: Device
    ranks: int
    element_bytes: int = 2
    efficiency: Efficiency = PUBLISHED
    weights: str = "dense"
    kv_format: str = "dense"
    drafts: bool = False

    def forward_seconds(
        self,
        rows: int,
        context_tokens: float,
        queries: int = 1,
        shared_tokens: float = 0,
        window_tokens: float | None = None,
    ) -> float:
        """Predict T, the seconds of a forward of `queries` tokens in each of `rows` rows.

        context_tokens: KV tokens read, summed over rows. A token counts once, however many queries read it.
        shared_tokens: those of them that need no reading, because another row has the same ones. window_tokens: KV
        tokens that sliding layers read, summed over rows; None: the window's of context_tokens, in equal rows.
        """
        model, reached = self.model, self.efficiency
        if window_tokens is None:
            window_tokens = rows * self.window_tokens(context_tokens / rows)
        linear = product_seconds(
            rows * queries,
            active_parameters(model),
            self._matrix_bytes(rows * queries),
            flops=self._linear_flops,
            bandwidth=self.ranks * self.device.bandwidth * reached.weights,
        )
        full, sliding = map(len, model.attention_groups)
        read = full * context_tokens + sliding * window_tokens
        products = 4 * model.num_heads * model.head_dim * read * queries
        reading = self.kv_seconds(self.kv_read_bytes(rows, context_tokens - shared_tokens, window_tokens))
        attention = max(products / self._flops, reading)
        if queries > 1:
            attention *= reached.verify_attention
        return linear + attention + self._communication(rows * queries) + model.num_layers * reached.layer_s

    def read_bytes(self, rows: int, context_tokens: float, window_tokens: float = 0) -> float:
        """Return the bytes of weights and KV that a forward of a token per row reads, on the rank with the largest
        share of KV. See kv_read_bytes."""
        return self._matrix_bytes(rows) / self.ranks + self.kv_read_bytes(rows, context_tokens, window_tokens)

    def kv_read_bytes(self, rows: int, context_tokens: float, window_tokens: float = 0) -> float:
        """Return the bytes of KV that a forward reads, on the rank with the largest share.

        context_tokens: KV tokens read, summed over rows, those that rows share counted once. window_tokens: those that
        sliding layers read.
        """
        exact = min(context_tokens, rows * self.exact_tokens)
        return (
            exact * self.dense_kv_bytes(1)
            + (context_tokens - exact) * self._kv_token_bytes
            + window_tokens * self.window_bytes(1)
        )

    def context_tokens(self, context: int) -> int:
        """Return the KV tokens of a row that a plain step reads, in the layers that keep the KV of all tokens: fewer
        than there are where all layers slide."""
        return min(context, self.model.windows[0] or context)

    @property
    def window(self) -> int:
        """Number of KV tokens of a row that sliding layers read beside others, at most."""
        return self.model.windows[1]

    def window_tokens(self, context: float) -> float:
        """Return the KV tokens of a row that sliding layers read beside others."""
        return min(context, self.window)

    @property
    def exact_tokens(self) -> int:
        """Number of a row's latest tokens that are read before they are sealed, on average: half of a group, and those
        of a group more in drafts (engine.batch.tail_pages)."""
        group = KV_BITS[self.kv_format].group
        return group // 2 + group * self.drafts

    @property
    def _kv_token_bytes(self) -> int:
        """Bytes that are read of the KV of a token, unless it is exact."""
        return rank_kv_token_bytes(self.model, self.ranks, self.element_bytes, self.kv_format, drafts=self.drafts)

    def kv_bytes(self, tokens: int) -> int:
        """Return the bytes that the KV of so many tokens takes, on the rank with the largest share, without exact
        pages and without sliding layers."""
        return tokens * rank_kv_token_bytes(self.model, self.ranks, self.element_bytes, self.kv_format)

    def dense_kv_bytes(self, tokens: int) -> int:
        """Return the bytes of dense KV of so many tokens, on the rank with the largest share, without sliding
        layers."""
        return tokens * rank_kv_token_bytes(self.model, self.ranks, self.element_bytes)

    def window_bytes(self, tokens: int) -> int:
        """Return the bytes that the KV of so many tokens takes in sliding layers, on the rank with the largest
        share."""
        return tokens * rank_sliding_token_bytes(self.model, self.ranks, self.element_bytes)

    @property
    def exact_page_bytes(self) -> int:
        """Bytes of the pages that a row's tokens are written to before they are sealed, on the rank with the largest
        share. Those that prompts are written to, some MB for all rows together, are not counted."""
        return self.dense_kv_bytes(EXACT_PAGES * KV_BITS[self.kv_format].group)

    def _matrix_bytes(self, tokens: int) -> float:
        """Return the bytes of the weights that a forward of so many tokens reads, on all ranks together."""
        return matrix_bytes(self.model, self.element_bytes, self.weights, tokens=tokens)

    @property
    def _flops(self) -> float:
        """Effective FLOP/s of all ranks together."""
        return self.ranks * self.device.flops * self.efficiency.flops

    @property
    def _linear_flops(self) -> float:
        """The same of products with weights. Experts, nearly all products of a model that has them, unpack fp8."""
        eight_bits = self.weights == "fp8" and self.model.experts is None
        peak = (self.device.fp8_flops if eight_bits else None) or self.device.flops
        return self.ranks * peak * self.efficiency.flops

    @property
    def kv_token_seconds(self) -> float:
        """Seconds to read one token's KV, unless it is exact, on the rank with the largest share of it."""
        return self.kv_seconds(self._kv_token_bytes)

    @property
    def exact_seconds(self) -> float:
        """Seconds to read a row's exact tokens, beyond those of as many others, on the rank with the largest share."""
        tokens = self.exact_tokens
        return self.kv_seconds(self.kv_read_bytes(1, tokens)) - tokens * self.kv_token_seconds

    @property
    def window_seconds(self) -> float:
        """Seconds to read a full window of a row in sliding layers, on the rank with the largest share of it."""
        return self.kv_seconds(self.window_bytes(self.window))

    def kv_seconds(self, nbytes: float) -> float:
        """Predict the seconds to read so many bytes of KV on one rank, or what is kept beside it."""
        return nbytes / (self.device.bandwidth * self.efficiency.kv)

    @property
    def token_seconds(self) -> float:
        """Seconds that one more token adds to a forward whose matrix products are compute-bound."""
        return 2 * active_parameters(self.model) / self._linear_flops

    def _communication(self, tokens: int) -> float:
        """Predict the seconds of two all-reduces per layer, each of one hidden state per token."""
        if self.ranks == 1:
            return 0.0
        moved = 2 * (self.ranks - 1) / self.ranks * tokens * self.model.hidden_size * self.element_bytes
        return 2 * self.model.num_layers * (self.device.all_reduce_s + moved / self.device.link)
