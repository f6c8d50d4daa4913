"""Device operations of model layers and of sampling: one interface, with an implementation per kind of device.

`kernels.reference_ops` defines each operation in plain torch; all other implementations must agree with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from torch import Tensor

from kernels.attention.base import AttentionBackend, GraphAttention, GraphBatch
from kernels.kv.kv_pool import LayerKV
from kernels.weights.matrix import Matrix

Gate = Literal["silu", "gelu_tanh", "clamped_silu"]
"""How a gate g and a value u are joined. silu: u g / (1 + exp(-g)); gelu_tanh:
u g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 g^3))); clamped_silu, with `CLAMP`:
(1 + min(max(u, -7), 7)) * h / (1 + exp(-1.702 h)), h = min(g, 7)."""

CLAMP = 7.0
"""Largest gate, and largest absolute value, of clamped_silu."""

STEEPNESS = 1.702
"""Factor of the exponent of clamped_silu."""


class Linear(Protocol):
    """A weight matrix in the layout that a device multiplies by."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the matrix takes."""

    @property
    def references_weights(self) -> bool:
        """Whether the product reads the tensors it was made from, rather than a copy."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute x w^T + bias, [rows, features] to [rows, columns], and the epilogue chosen in `Ops.linear`."""


class Experts(Protocol):
    """Networks of a mixture of experts, of which a few compute each token."""

    def __call__(self, x: Tensor, scores: Tensor) -> Tensor:
        """Sum the networks of each token, weighted; see kernels.reference_experts.

        x: [tokens, features]. scores: [tokens, networks], the router's, in float32 or wider. Returns [tokens,
        columns] in the dtype of scores.
        """


class Graphs(Protocol):
    """Capture of device work, which is enqueued once and then replayed as a whole. All captures share memory, so they
    are replayed one at a time, and the results of one are read before the next."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work`, and return a function that replays it on the same addresses.

        `work` must not wait for the device, nor read tensors that are freed before a replay.
        """

    def attention(self, page_size: int, head_dim: int, batch: GraphBatch) -> GraphAttention:
        """Create attention whose runs are captured. Each captured forward needs its own, because it holds a plan."""

    def release(self) -> None:
        """Destroy all captures, which cannot be replayed any more. Call it before a process group ends whose
        collectives were captured."""


class Ops(Protocol):
    """Arithmetic of one device, in the dtype of its inputs. Other rows of a batch affect a row's results only in the
    rounding of sums."""

    @property
    def kind(self) -> str:
        """Value of the setting `engine.kernels` that selects this implementation."""

    @property
    def name(self) -> str:
        """Key of stored measurements: different kernels have different names."""

    def shared_stretch(self, head_dim: int) -> int:
        """Return the number of KV slots in the stretches in which attention discovers that rows list the same pages,
        from the first slot on, and reads them once for all; 0: it reads every row's KV by itself."""

    @property
    def reads_prefixes(self) -> bool:
        """Whether attention makes use of `AttentionBatch.prefixes`."""

    @property
    def make_graphs(self) -> Callable[[], Graphs] | None:
        """Create the captures of one engine, whose memory is freed with the last of them. None if capturing gains
        nothing on this device."""

    @property
    def weight_formats(self) -> frozenset[str]:
        """Formats that matrices may be rounded to."""

    @property
    def kv_formats(self) -> frozenset[str]:
        """Formats of pages that attention reads."""

    def takes(self, matrix: Matrix) -> bool:
        """Whether `linear` takes a matrix as it is; it takes all dense ones."""

    def fastest_format(self, max_rows: int) -> str | None:
        """Return the format of weights in which products of up to `max_rows` rows take the least time, as measured, or
        the likely one where nothing can be measured. None: none is faster than dense."""

    def linear(self, matrix: Matrix, bias: Tensor | None, *, gated: Gate | None = None, wide: bool = False) -> Linear:
        """Prepare a weight matrix for products. The result copies the weights or keeps them.

        matrix: [columns, features]; a dense one has the dtype of inputs. bias: [columns]. gated: the first half of the
        columns are gates for the second half, and the result joins both as `Gate` says. wide: results are float32, or
        float64 for float64 inputs.

        The result is the product with the matrix's values, but for the rounding of sums; with few bits, inputs may be
        rounded to 8 bits as well: in groups of features with a scale from the largest of them, or, where
        `QuantizedMatrix.rounds_inputs` is set, with one scale per row and exact sums.
        """

    def experts(self, networks: Sequence[tuple[Linear, Linear]], *, per_token: int, normalised: bool) -> Experts:
        """Prepare a mixture of experts. It may move the weights of `networks`, which stay usable.

        networks: a gated product, and a wide one of its results, both made by `linear` of this object. per_token:
        number of networks that compute each token. normalised: whether their weights are scaled to sum to 1. Raises
        ValueError if the matrices of networks differ in a way that the device cannot take.
        """

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add delta to x in place, and return the root-mean-square norm of the sum, computed in float32 or wider.

        x, delta and the result: [rows, size] of one dtype.
        """

    def rotate_and_cache(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor,
        kv: LayerKV,
        norms: tuple[Tensor, Tensor, float] | None,
    ) -> Tensor:
        """Normalize queries and keys if there are norms, rotate both, and write keys and values into the pool.

        qkv: [tokens, heads + 2 kv_heads, head_dim], changed in place. rotary: cosines and sines of all positions, each
        [positions, head_dim / 2]. positions, slots: [tokens] int64. norms: weights of the norms of queries and of keys,
        [head_dim] each, and their eps. Returns the queries, [tokens, heads, head_dim].
        """

    def sample(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """Apply the coupled sampling rule (see kernels.noise): each row's largest logit / temperature + noise.

        logits: [rows, size], of the tokens from `first` on; may be overwritten. temperature: [rows] float64; 0 selects
        the largest logit. seeds, positions: [rows] int64. Returns the largest values, [rows] of the logits' dtype, NaN
        where a logit is, and their token ids, [rows] int64, the lowest id among equals; some id of the slice with NaN.
        """

    @property
    def accept(self) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor] | None:
        """`engine.speculation.verify.accept_drafts` in one launch; None: use that function.

        Takes tokens [max_rows, max_model_len] int32, computed [max_rows] int64, row_spans [rows, 4] int64 (see
        engine.batch.round_batch), drafted [rows] int64, target_tokens [samples] int64, and the largest number of
        samples of a row. Returns [rows, 2 + that number] int64: drafted, accepted, and the row's target tokens. The
        first accepted + 1 of these are valid; later ones are arbitrary. Modifies no argument.
        """

    @property
    def commit(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], None] | None:
        """`engine.speculation.verify.commit_tokens` in one launch; None: use that function.

        Takes tokens, computed and row_spans as `accept` does, and its result. Modifies tokens and computed.
        """

    def snapkv_scores(
        self, q: Tensor, k: Tensor, scale: float, *, candidates: int, kernel: int, sinks: Tensor | None = None
    ) -> Tensor:
        """Score keys; see kernels.key_scores.snapkv_scores."""

    def best(self, votes: Tensor, count: int) -> Tensor:
        """Return the indices of each row's `count` largest votes, the largest first.

        votes: [rows, units] float32, contiguous, without NaN. Returns [rows, count] int64. Equal votes come in order
        on a CPU, so that smaller ones behind them change nothing; on a GPU in any order.
        """

    def summarise(self, k: Tensor, pages: Tensor, low: Tensor, high: Tensor) -> None:
        """Write the element-wise minimum and maximum of the keys of some pages to `low` and `high`; NaN where a key
        is.

        k: [pages, kv_heads, page_size, head_dim]. pages: [n] int64. low, high: [pages, kv_heads, head_dim].
        """

    def bounds(self, q: Tensor, pages: Tensor, low: Tensor, high: Tensor, first: int, ends: Tensor) -> Tensor:
        """Bound products of queries with the keys of pages; see kernels.key_summaries.bound_products. Other queries
        and pages change no bit of a score."""

    def merge(self, outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Merge segments; see kernels.attention.reference_attention.merge_segments."""

    def attention(self, page_size: int, head_dim: int) -> AttentionBackend:
        """Create a backend. Each caller needs its own, because a backend holds a plan."""
