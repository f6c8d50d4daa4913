"""What the layers of a model, and sampling, ask of a device: one interface, a twin for each kind of device.

`kernels.reference` says in plain torch what each of these computes; other twins must agree with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from kernels.attention.base import AttentionBackend, Fixed
from kernels.kv_cache import LayerKV


class Product(Protocol):
    """A weight matrix in the form in which a device multiplies by it."""

    @property
    def nbytes(self) -> int:
        """Of memory that it takes."""

    @property
    def keeps_weights(self) -> bool:
        """Whether it reads what it was made of, rather than a copy."""

    def __call__(self, x: Tensor) -> Tensor:
        """x w^T + bias: [rows, features] to [rows, columns]; see `Ops.product` for what may come after that."""

    def int8(self) -> Product:
        """The same product with weights of 8 bits, a scale for each column: the column's largest weight is 127.

        Inputs are rounded to 8 bits too, each row by its largest element; sums are exact.
        """


class Graphs(Protocol):
    """Work on a device that is enqueued once, and then replayed as a whole."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do `work`, and return what does it again on the same addresses, in place of a call. `work` must not wait for
        the device, nor read tensors that are not there any more at a replay."""

    def attention(self, page_size: int, head_dim: int, fixed: Fixed) -> AttentionBackend:
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

    def product(self, weight: Tensor, bias: Tensor | None, *, gated: bool = False, wide: bool = False) -> Product:
        """May copy the weights, or keep them.

        weight: [columns, features]. bias: [columns]. gated: the first half of the columns are gates of the second, g
        and u, and silu(g) * u is what comes out. wide: results are float32, or float64 for float64 weights.
        """

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add delta to x, in place, and return the root-mean-square norm of that, computed in float32 or wider: all
        [rows, size] of one dtype."""

    def rotary(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor,
        kv: LayerKV,
        norms: tuple[Tensor, Tensor, float] | None,
    ) -> Tensor:
        """Rotate queries and keys, after the norms if there are any, and store keys and values in the pool.

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

    def accept(
        self, tokens: Tensor, computed: Tensor, ledger: Tensor, drafted: Tensor, chosen: Tensor, most: int
    ) -> Tensor:
        """See kernels.acceptance.accept."""

    def commit(self, tokens: Tensor, computed: Tensor, ledger: Tensor, verdict: Tensor) -> None:
        """See kernels.acceptance.commit."""

    def votes(self, q: Tensor, k: Tensor, scale: float, *, candidates: int, kernel: int) -> Tensor:
        """See kernels.selection.attention_votes."""

    def merge(self, outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See kernels.attention.reference.merge_segments."""

    def attention(self, page_size: int, head_dim: int) -> AttentionBackend:
        """A backend of its own for whoever asks, since it holds a plan."""
