"""The GPU kernels as Python calls them: the methods of `kernels.cpu.library.CpuKernels`, and some more."""

from __future__ import annotations

from torch import Tensor

from kernels.gpu import acceptance, pointwise, sampling, votes
from kernels.gpu.attention import attend, lay_tiles
from kernels.kv_cache import LayerKV


class GpuKernels:
    """All tensors are on one GPU, or on the CPU where Triton interprets. dtypes below: float32, bfloat16 or float16."""

    name = "triton"

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Tensor, lengths: Tensor, pages: Tensor, scale: float, lse: bool
    ) -> tuple[Tensor, Tensor]:
        """See kernels.attention.base.

        q: [tokens, heads, head_dim]. k, v: [pages, kv_heads, page_size, head_dim]. queries, lengths: [rows] int64.
        pages: [rows, width] or [rows, kv_heads, width] int64. Returns o, in q's dtype, and the log-sum-exp [tokens,
        heads] float32, empty unless asked for.
        """
        o, sums = attend(lay_tiles(queries, lengths, pages, len(q)), LayerKV(k, v), q, scale)
        return o, sums if lse else sums.new_empty(0)

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        """Add delta to x, in place, and return the root-mean-square norm of that: all [rows, size] of one dtype."""
        return pointwise.norm(x, delta, weight, eps)

    def silu_mul(self, pairs: Tensor) -> Tensor:
        """silu(gate) * value: [rows, 2 size], gates first, to [rows, size]."""
        return pointwise.silu_mul(pairs)

    def rotary(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        slots: Tensor,
        k: Tensor,
        v: Tensor,
        norms: tuple[Tensor, Tensor, float] | None = None,
    ) -> None:
        """Rotate queries and keys in place, and store keys and values in the pool.

        qkv: [tokens, heads + 2 kv_heads, head_dim]. cos, sin: [positions, head_dim / 2] float32, of all positions.
        positions, slots: [tokens] int64. k, v: [pages, kv_heads, page_size, head_dim]. norms: of queries and of keys,
        their weights [head_dim] and their eps.
        """
        pointwise.rotary(qkv, cos, sin, positions, slots, LayerKV(k, v), norms)

    def sample(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        """The coupled sampling rule: each row's largest logit / temperature + noise, and its token id.

        logits: [rows, size], of the tokens from `first` on. temperature: [rows], 0 for the largest logit itself.
        seeds, positions: [rows] int64. Returns [rows] float32 and [rows] int64, the lowest id among equals.
        """
        return sampling.sample(logits, temperature, seeds, positions, first)

    def votes(self, q: Tensor, k: Tensor, scale: float, *, candidates: int, kernel: int) -> Tensor:
        """See kernels.selection.attention_votes."""
        return votes.attention_votes(q, k, scale, candidates=candidates, kernel=kernel)

    def accept(
        self, tokens: Tensor, computed: Tensor, ledger: Tensor, drafted: Tensor, chosen: Tensor, most: int
    ) -> Tensor:
        """See kernels.acceptance.accept."""
        return acceptance.accept(tokens, computed, ledger, drafted, chosen, most)

    def commit(self, tokens: Tensor, computed: Tensor, ledger: Tensor, verdict: Tensor) -> None:
        """See kernels.acceptance.commit."""
        acceptance.commit(tokens, computed, ledger, verdict)
