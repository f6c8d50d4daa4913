"""Measure the host work of a round, launches excluded: the work a device may wait for between rounds.

    python -m bench.micro.host --rows 32 --context 8000 --gamma 3

No model runs. The scheduler plans, the rank's state is patched, and the inputs of captured forwards are built as for a
GPU, but in host memory. On a GPU every tensor operation takes some microseconds more, for its launch, and FlashInfer
plans each forward. The last line sums the parts between one round's result and the next round's first kernel.
"""

from __future__ import annotations

import argparse
import random

import msgspec
import numpy as np
import torch

from bench.micro.shares import Clock
from engine.batch.graph_inputs import GraphInputs
from engine.batch.round_batch import RoundBatch
from engine.batch.row_state import RowState
from engine.batch.view import DenseView
from engine.kv.window import WindowView
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundResult, RowResult
from engine.scheduler.controller import FixedGamma
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.outputs import make_output
from engine.scheduler.scheduler import Scheduler
from kernels.kv.kv_pool import KVPool

_PAGE = 16
_WARM_UPS = 5


class Host:
    """Host side of an engine whose rows all decode."""

    def __init__(self, rows: int, context: int, gamma: int, budget: int, rounds: int) -> None:
        max_len = context + (rounds + _WARM_UPS + 1) * (gamma + 1) + 1
        width = -(-max_len // _PAGE)
        self._rounds, self._chance = rounds, random.Random(0)
        self._scheduler = Scheduler(
            kv=KVManager(rows * (width + 1), _PAGE),
            page_size=_PAGE,
            max_rows=rows,
            max_batch_tokens=rows * max_len,
            max_waiting=rows,
            max_model_len=2 * max_len,
            eos_token_ids=[],
            controller=FixedGamma(gamma),
        )
        params = SamplingParams(max_tokens=max_len, temperature=0.0)
        for row in range(rows):
            # No two rows begin with the same tokens, so they share no pages.
            self._scheduler.add(AddRequest(str(row), [row] + [0] * (context - 1), params))
        self._state = RowState(max_rows=rows, max_model_len=2 * max_len, page_size=_PAGE, device=torch.device("cpu"))
        self._view = WindowView(self._state.page_table, budget=budget, sink=_PAGE, page_size=_PAGE)
        pages = rows * (width + 1)
        sizes = {"num_layers": 1, "num_pages": pages, "page_size": _PAGE, "kv_heads": 1, "head_dim": 1}
        pool = KVPool(**sizes, dtype=torch.bfloat16, device=torch.device("cpu"), scratch=True)
        draft_width = min(budget // _PAGE + 1, width)
        self._first = GraphInputs(pool, rows=rows, queries=1, width=draft_width)
        self._later = GraphInputs(pool, rows=rows * max(0, gamma - 1), queries=1, width=draft_width)
        self._target = GraphInputs(pool, rows=rows, queries=gamma + 1, width=self._state.page_table.shape[1])
        self._encoder = msgspec.msgpack.Encoder()

    def run(self) -> Clock:
        """Measure the mean times of one round. The first warm-up round is the prefill."""
        for _ in range(_WARM_UPS):
            self._round(Clock())
        parts = Clock()
        for _ in range(self._rounds):
            self._round(parts)
        for part in parts.seconds:
            parts.seconds[part] /= self._rounds
        return parts

    def _round(self, parts: Clock) -> None:
        with parts.time("plan the round"):
            plan, requests = self._scheduler.schedule()
        with parts.time("patch the rank's state"):
            self._state.apply(plan)
            batch = RoundBatch(self._state, plan)
        rows, gamma = len(plan.work), batch.gamma_max
        if gamma:
            with parts.time("first draft step"):
                self._first.copy(batch.draft_inputs(0, self._view), np.arange(rows))
        if gamma > 1:
            with parts.time("further draft steps"):
                step, row = batch.drafts(range(1, gamma))
                self._later.copy(batch.later_draft_inputs(gamma, self._view), (step - 1) * rows + row)
        with parts.time("verify pass"):
            inputs = batch.verify_inputs(DenseView(self._state.page_table))
            if self._target.fits(inputs):
                self._target.copy(inputs, np.arange(rows))
        results = []
        for work in plan.work:
            accepted = self._chance.randrange(work.gamma + 1)
            results.append(RowResult(work.gamma, accepted, [0] * (accepted + 1), None))
            self._state.computed[work.row] += work.new + accepted
        with parts.time("commit"):
            committed = self._scheduler.commit(plan, requests, RoundResult(plan.number, results, 0.0, 0.0))
        with parts.time("build outputs"):
            outputs = [make_output(request, new, row, origin) for request, new, row, _, origin in committed]
        with parts.time("encode outputs"):
            self._encoder.encode(outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=8000)
    parser.add_argument("--gamma", type=int, default=3)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    if min(arguments.rows, arguments.context, arguments.rounds) < 1 or not 0 <= arguments.gamma <= 16:
        parser.error("--rows, --context and --rounds are at least 1, --gamma is from 0 to 16")
    if arguments.budget % _PAGE or arguments.budget < 2 * _PAGE:
        parser.error(f"--budget is a multiple of {_PAGE}, and at least {2 * _PAGE}")
    torch.set_num_threads(1)
    host = Host(arguments.rows, arguments.context, arguments.gamma, arguments.budget, arguments.rounds)
    parts = host.run()
    print(f"{arguments.rows} rows of {arguments.context} tokens, gamma {arguments.gamma}, microseconds per round:")
    for part, seconds in parts.seconds.items():
        print(f"  {part:26}{1e6 * seconds:8.0f}")
    first = "first draft step" if arguments.gamma else "verify pass"
    waited = ("commit", "build outputs", "plan the round", "patch the rank's state", first)
    total = sum(parts.seconds[part] for part in waited)
    print(f"  from one round's result to the next one's first kernel: {1e6 * total:.0f}")


if __name__ == "__main__":
    main()
