"""What the layers of a model, and sampling, ask of a device: one interface, a twin for each kind of device.

`kernels.reference_ops` says in plain torch what each of these computes; other twins must agree with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from kernels.attention.base import AttentionBackend, GraphShape
from kernels.kv_cache import LayerKV


class Linear(Protocol):
    """A weight matrix in the form in which a device multiplies by it."""

    @property
    def nbytes(self) -> int:
        """Of memory that it takes."""

    @property
    def keeps_weights(self) -> bool:
        """Whether it reads what it was made of, rather than a copy."""

    def __call__(self, x: Tensor) -> Tensor:
        """x w^T + bias: [rows, features] to [rows, columns]; see `Ops.linear` for what may come after that."""

    def quantized(self) -> Linear:
        """The same product with weights of 8 bits, a scale for each column: the column's largest weight is 127.

        Inputs are rounded to 8 bits too, each row by its largest element; sums are exact.
        """


class Graphs(Protocol):
    """Work on a device that is enqueued once, and then replayed as a whole."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do `work`, and return what does it again on the same addresses, in place of a call. `work` must not wait for
        the device, nor read tensors that are not there any more at a replay."""

    def attention(self, page_size: int, head_dim: int, fixed: GraphShape) -> AttentionBackend:
        """A backend whose runs can be captured. Plans are made outside, and hold for replays."""


class Ops(Protocol):
    """One device's arithmetic, in the dtype of what it is given. Results of a row do not depend on the rows beside it
    further than the rounding of sums."""

    @property
    def kind(self) -> str:
        """Which value of the setting `engine.kernels` asks for it."""

    @property
    def name(self) -> str:
        """What measurements are remembered by: other kernels, another name."""

    @property
    def graphs(self) -> Graphs | None:
        """What captures this arithmetic; None where that gains nothing."""

    def linear(self, weight: Tensor, bias: Tensor | None, *, gated: bool = False, wide: bool = False) -> Linear:
        """May copy the weights, or keep them.

        weight: [columns, features]. bias: [columns]. gated: the first half of the columns are gates of the second, g
        and u, and silu(g) * u is what comes out. wide: results are float32, or float64 for float64 weights.
        """

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add delta to x, in place, and return the root-mean-square norm of that, computed in float32 or wider: all
        [rows, size] of one dtype."""

    def rotate_and_cache(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor,
        kv: LayerKV,
        norms: tuple[Tensor, Tensor, float] | None,
    ) -> Tensor:
        """Norm queries and keys, if there are norms, rotate both, and write keys and values into the pool.

        qkv: [tokens, heads + 2 kv_heads, head_dim], changed in place. rotary: cosines and sines of all positions, each
        [positions, head_dim / 2]. positions, slots: [tokens] int64. norms: weights of the norms of queries and of keys,
        [head_dim] each, and their eps. Returns the queries, [tokens, heads, head_dim].
        """

    def sample(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """The coupled sampling rule (see kernels.noise): each row's largest logit / temperature + noise, and its id.

        logits: [rows, size], of the tokens from `first` on; left in any state. temperature: [rows] float64, 0 for the
        largest logit itself. seeds, positions: [rows] int64. Returns [rows] of the logits' dtype and [rows] int64, the
        lowest id among equals.
        """

    @property
    def accept(self) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], Tensor] | None:
        """`engine.speculation.verify.accept_drafts` in one launch; None: that function serves.

        Takes tokens [max_rows, max_model_len] int32, computed [max_rows] int64, row_spans [rows, 4] int64 (see
        engine.batch.round_batch), drafted [rows] int64, chosen [samples] int64, and the largest number of samples of a
        row. Returns [rows, 2 + that number] int64: drafted, accepted, and the row's chosen tokens, of which
        accepted + 1 count; those after are any token. Changes nothing.
        """

    @property
    def commit(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], None] | None:
        """`engine.speculation.verify.commit_tokens` in one launch; None: that function serves.

        Takes tokens, computed and row_spans as `accept`, and what that returned; changes tokens and computed.
        """

    def snapkv_scores(self, q: Tensor, k: Tensor, scale: float, *, candidates: int, kernel: int) -> Tensor:
        """See kernels.snapkv.snapkv_scores."""

    def merge(self, outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See kernels.attention.reference_attention.merge_segments."""

    def attention(self, page_size: int, head_dim: int) -> AttentionBackend:
        """A backend of its own for whoever asks, since it holds a plan."""
