"""Break down the time of a round on a CPU: kernels by kind, and everything else, which is host work.

python -m bench.micro.shares --rows 16 --context 7500 --gamma 4
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from bench.format_flags import add_format_flags, exits_on_error, read_format_flags
from bench.micro.blank_rounds import BlankRounds, cpu_config, load_with_ops
from engine.speculation.verify import accept_drafts, commit_tokens
from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.kv.kv_pool import LayerKV
from kernels.ops import Experts, Gate, Graphs, Linear, Ops
from kernels.reference_experts import LoopedExperts
from kernels.weights.matrix import Matrix


class Clock:
    """Seconds and calls by name. Devices are not synchronised, so GPU kernels cannot be timed with it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - began
        self.calls[name] += 1

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()


class TimedLinear:
    """A matrix product whose calls are timed."""

    def __init__(self, inner: Linear, name: str, clock: Clock) -> None:
        self._inner, self._name, self._clock = inner, name, clock

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    @property
    def references_weights(self) -> bool:
        return self._inner.references_weights

    def __call__(self, x: Tensor) -> Tensor:
        with self._clock.time(self._name):
            return self._inner(x)


class TimedAttention:
    """An attention backend whose `run` is timed."""

    def __init__(self, inner: AttentionBackend, clock: Clock) -> None:
        self._inner, self._clock = inner, clock
        self._name = ""

    def plan(self, batch: AttentionBatch) -> None:
        self._name = f"attention, {max(batch.query_lengths)} queries over {max(batch.kv_lengths)}"
        self._inner.plan(batch)

    def run(self, layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See AttentionBackend.run."""
        with self._clock.time(self._name):
            return self._inner.run(layer, q, scale)


class TimedOps:
    """Wrapper of any `Ops` that times its kernels."""

    def __init__(self, inner: Ops, clock: Clock) -> None:
        self._inner, self._clock = inner, clock
        self.kind, self.name = inner.kind, inner.name
        self.make_graphs: Callable[[], Graphs] | None = None
        self.shared_stretch, self.reads_prefixes = inner.shared_stretch, inner.reads_prefixes
        self.weight_formats, self.fastest_format = inner.weight_formats, inner.fastest_format
        self.kv_formats = inner.kv_formats
        self.takes = inner.takes

    def linear(
        self, matrix: Matrix, bias: Tensor | None, *, gated: Gate | None = None, wide: bool = False
    ) -> TimedLinear:
        inner = self._inner.linear(matrix, bias, gated=gated, wide=wide)
        name = "head" if wide else "products"
        return TimedLinear(inner, name if matrix.format == "dense" else f"{name}, {matrix.format}", self._clock)

    def experts(self, networks: Sequence[tuple[Linear, Linear]], *, per_token: int, normalised: bool) -> Experts:
        """Make experts whose products are timed, so that they run one after the other."""
        return LoopedExperts(networks, per_token, normalised)

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        with self._clock.time("norms"):
            return self._inner.norm(x, delta, weight, eps)

    def rotate_and_cache(
        self,
        qkv: Tensor,
        rotary: tuple[Tensor, Tensor],
        positions: Tensor,
        slots: Tensor,
        kv: LayerKV,
        norms: tuple[Tensor, Tensor, float] | None,
    ) -> Tensor:
        with self._clock.time("rotation, KV write"):
            return self._inner.rotate_and_cache(qkv, rotary, positions, slots, kv, norms)

    def sample(
        self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor, first: int
    ) -> tuple[Tensor, Tensor]:
        with self._clock.time("sampling"):
            return self._inner.sample(logits, temperature, seeds, positions, first)

    def accept(
        self,
        tokens: Tensor,
        computed: Tensor,
        row_spans: Tensor,
        drafted: Tensor,
        target_tokens: Tensor,
        max_samples: int,
    ) -> Tensor:
        with self._clock.time("verdict"):
            return (self._inner.accept or accept_drafts)(
                tokens, computed, row_spans, drafted, target_tokens, max_samples
            )

    def commit(self, tokens: Tensor, computed: Tensor, row_spans: Tensor, verdict: Tensor) -> None:
        with self._clock.time("verdict"):
            (self._inner.commit or commit_tokens)(tokens, computed, row_spans, verdict)

    def snapkv_scores(
        self, q: Tensor, k: Tensor, scale: float, *, candidates: int, kernel: int, sinks: Tensor | None = None
    ) -> Tensor:
        with self._clock.time("SnapKV scores"):
            return self._inner.snapkv_scores(q, k, scale, candidates=candidates, kernel=kernel, sinks=sinks)

    def best(self, votes: Tensor, count: int) -> Tensor:
        with self._clock.time("choice of KV"):
            return self._inner.best(votes, count)

    def summarise(self, k: Tensor, pages: Tensor, low: Tensor, high: Tensor) -> None:
        with self._clock.time("choice of KV"):
            self._inner.summarise(k, pages, low, high)

    def bounds(self, q: Tensor, pages: Tensor, low: Tensor, high: Tensor, first: int, ends: Tensor) -> Tensor:
        with self._clock.time("choice of KV"):
            return self._inner.bounds(q, pages, low, high, first, ends)

    def merge(self, outputs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
        with self._clock.time("merging"):
            return self._inner.merge(outputs, lses)

    def attention(self, page_size: int, head_dim: int) -> TimedAttention:
        return TimedAttention(self._inner.attention(page_size, head_dim), self._clock)


@exits_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=7500)
    parser.add_argument("--gamma", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=8)
    add_format_flags(parser)
    arguments = parser.parse_args()
    flags, clock = read_format_flags(arguments), Clock()
    config = cpu_config(arguments.model, arguments.rows, arguments.gamma, flags)
    model = load_with_ops(config, lambda ops: TimedOps(ops, clock))
    context = arguments.context
    rounds = BlankRounds(config, arguments.rows, context, arguments.gamma, arguments.rounds, model)
    clock.clear()
    began = time.perf_counter()
    for _ in range(arguments.rounds):
        rounds.step()
    taken = (time.perf_counter() - began) / arguments.rounds
    rounds.close()
    print(f"{arguments.rows} rows of {context} tokens, gamma {arguments.gamma}: {1e3 * taken:.1f} ms per round")
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        seconds /= arguments.rounds
        print(
            f"  {name:32} {1e3 * seconds:7.2f} ms {seconds / taken:6.1%}, {clock.calls[name] // arguments.rounds} calls"
        )
    rest = taken - sum(clock.seconds.values()) / arguments.rounds
    print(f"  {'everything else':32} {1e3 * rest:7.2f} ms {rest / taken:6.1%}")


if __name__ == "__main__":
    main()
