"""One rank's share of the engine: its shard of the model, its pool, its rows; runs the rounds it is told to.

As a program (`python -m engine.worker`) it is one of the ranks that engine.ranks starts; its standard input is its
connection to rank 0. Otherwise it is any rank, 0 included, of a group that torchrun starts: see engine.torchrun.
"""

from __future__ import annotations

import logging
import os
import signal
import stat
import sys
import time
from collections.abc import Callable

import msgspec
import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from engine import agreement
from engine.config import ConfigError, EngineConfig
from engine.fitting import fit_pages
from engine.grammar import Grammars
from engine.logs import set_up
from engine.memory import OutOfMemory, is_out_of_memory, what_failed
from engine.messages import PromptLogprobs, TokenLogprobs
from engine.orders import Launch, Report, WeightBytes, answer, follow
from engine.plan import RowResult, RowWork, StepPlan, StepResult
from engine.rows import Rows
from engine.sampling import Logprobs, PromptReport
from engine.sizing import size_up
from engine.speculation.build import DraftModel, drafting_model, load_draft, make_drafter, make_sampler, make_target
from engine.speculation.drafters import TimedDrafter
from engine.speculation.round import run_round
from engine.speculation.verify import Verdict
from engine.stopwatch import Stopwatch
from kernels.transfer import fetch
from models.default import resolve_model
from models.llama import Llama
from models.loader import load_model
from parallel import rendezvous
from parallel.channel import Disconnected, Link
from parallel.group import CollectiveError, Group, RoundGivenUp
from parallel.sampling import VocabShard

_NO_DRAFT_MODEL = DraftModel()

log = logging.getLogger(__name__)


class Worker:
    """Owns everything of one rank. `execute` is the only thing that moves it."""

    def __init__(
        self,
        model: Llama,
        config: EngineConfig,
        *,
        num_pages: int,
        max_model_len: int,
        group: Group,
        draft: DraftModel = _NO_DRAFT_MODEL,
    ) -> None:
        """draft: the draft model, if the config has one."""
        page_size = config.cache.page_size
        self._group = group
        self._groups = [group] if draft.group is None or draft.group is group else [group, draft.group]
        self._digest_every = config.digest_every if group.size > 1 else 0
        self._rows = Rows(
            max_rows=config.scheduler.max_rows,
            max_model_len=max_model_len,
            page_size=page_size,
            device=model.device,
            ops=model.ops,
        )
        self._model, self._own_draft = model, draft.model
        self._drafting = drafting_model(config, model, draft)
        vocab = VocabShard(model.vocab_start, model.vocab_size, model.config.vocab_size, group)
        eos = model.config.eos_token_ids
        tokenizer = resolve_model(config.model) / "tokenizer.json"
        self._grammars = Grammars(config.scheduler.max_rows, tokenizer, model.config.vocab_size, eos)
        self._sampler = make_sampler(config, self._rows, vocab, model.ops, self._grammars)
        target = make_target(config, model, self._rows, num_pages)
        self._target, drafter = make_drafter(config, target, self._rows, self._sampler, group, draft)
        self._watch = Stopwatch(model.device)
        self._drafter = TimedDrafter(drafter, self._watch)

    @property
    def weight_bytes(self) -> WeightBytes:
        """Of this rank's shards."""
        tables = self._model.table_bytes + (self._own_draft.table_bytes if self._own_draft else 0)
        return WeightBytes(self._model.matrix_bytes, self._drafting.matrix_bytes if self._drafting else 0, tables)

    @torch.inference_mode()
    def execute(self, plan: StepPlan, meanwhile: Callable[[], None] | None = None) -> StepResult:
        """Run one round. Its result is the only thing that crosses from device to host.

        meanwhile: called once all of the round is sent to the device, before its result is waited for.
        Raises OutOfMemory, on every rank, if memory did not suffice on one of them: nothing is left of the round then,
        and its rows have to start anew. A group that cannot give a round up raises what it comes to.
        """
        for group in self._groups:
            group.begin_round()
        result, reason = self._attempt(plan, meanwhile)
        if result is None:
            for group in self._groups:
                group.give_up()
        failed = self._group.agree(reason is not None)
        if not failed:
            assert result is not None  # who gives up has failed, or has seen one that has
            return result
        if reason is not None and self._group.rank > 0:  # rank 0 says it with the requests that fail
            log.error("out of memory: %s", reason)
        self._rows.forget(plan)
        self._sampler.give_up()
        self._watch.reset()
        raise OutOfMemory(_on_ranks(failed, reason) if self._group.size > 1 else reason)

    def _attempt(self, plan: StepPlan, meanwhile: Callable[[], None] | None) -> tuple[StepResult | None, str | None]:
        """The result, or how this rank ran out of memory; neither if another did. Lets go of the exception, and with it
        of what the failed calls held."""
        try:
            return self._run(plan, meanwhile), None
        except RoundGivenUp:
            return None, None
        except (RuntimeError, MemoryError) as error:
            if not (self._group.can_give_up and is_out_of_memory(error)):
                raise
            return None, str(error)

    def _run(self, plan: StepPlan, meanwhile: Callable[[], None] | None) -> StepResult:
        began = time.perf_counter()
        if plan.clear:
            self._target.pool.clear(plan.clear)
        for start in plan.starts:
            self._grammars.start(start)
            self._sampler.start(start)
        verdict = run_round(self._rows.enter(plan), self._target, self._drafter, self._sampler)
        decided = fetch(verdict.rows)  # the one copy of the round, but for log-probabilities
        if meanwhile is not None:
            meanwhile()
        results = _to_host(verdict, decided(), plan)
        for row, result in zip((work.row for work in plan.work if work.samples), results, strict=True):
            self._grammars.commit(row, result.tokens)
        draft_seconds = self._watch.take()
        prompts = _prompts_to_host(verdict.prompts) if verdict.prompts else []
        verify_seconds = time.perf_counter() - began - draft_seconds
        step = StepResult(plan.step, results, draft_seconds, verify_seconds, prompts)
        # Not part of what the round takes: neither a profile nor the controller is to see it.
        if self._digest_every and plan.step % self._digest_every == 0:
            agreement.compare(self._rows, self._group, plan.step)
        return step


def _on_ranks(ranks: list[int], reason: str | None) -> str:
    """reason: this rank's, if it is one of them."""
    where = f"on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    return where if reason is None else f"{where}: {reason}"


def _to_host(verdict: Verdict, rows: Tensor, plan: StepPlan) -> list[RowResult]:
    """rows: the verdict's, on the host."""
    sampling = [(work, row) for work, row in zip(plan.work, rows.tolist(), strict=True) if work.samples]
    logprobs = _logprobs_by_row(verdict.logprobs, [work for work, _ in sampling]) if verdict.logprobs else {}
    return [
        RowResult(drafted, count, tokens[: count + 1], logprobs[i][: count + 1] if i in logprobs else None)
        for i, (_, (drafted, count, *tokens)) in enumerate(sampling)
    ]


def _prompts_to_host(report: PromptReport) -> list[PromptLogprobs]:
    parts = (report.tokens, report.chosen, report.rank, report.top_ids, report.top)
    return [PromptLogprobs(*each) for each in zip(*(part.tolist() for part in parts), strict=True)]


def _logprobs_by_row(logprobs: Logprobs, sampling: list[RowWork]) -> dict[int, list[TokenLogprobs]]:
    """What each row that asks is told, keyed by its index among the rows that sample; drafts that failed included."""
    owner = [i for i, work in enumerate(sampling) for _ in range(work.gamma + 1)]
    reports: dict[int, list[TokenLogprobs]] = {}
    columns = zip(
        logprobs.decisions.tolist(),
        logprobs.chosen.tolist(),
        logprobs.top_ids.tolist(),
        logprobs.top.tolist(),
        strict=True,
    )
    for decision, chosen, top_ids, top in columns:
        reports.setdefault(owner[decision], []).append(TokenLogprobs(chosen, top_ids, top))
    return reports


def main() -> int:
    """Be a rank until rank 0 is gone. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return live(Link.of_stdin())


def live(
    link: Link, *, local_rank: int | None = None, store: Store | None = None, address: str = rendezvous.LOOPBACK
) -> int:
    """Be the rank that rank 0, at the other end of the link, says. Returns the exit status once rank 0 is gone.

    local_rank: among those on this machine; None: all are. store, address: see rendezvous.join.
    """
    try:
        launch = msgspec.msgpack.decode(link.receive(), type=Launch)
        set_up(launch.log_level, launch.log_format, f"rank {launch.join.rank}")
        answer(link, Report())
        config = EngineConfig.model_validate_json(link.receive())
        device = _device(config, launch.join.rank if local_rank is None else local_rank)
        group = rendezvous.join(launch.join, device, store, address)
        count = config.speculation.draft_ranks(group.size)
        draft_group: Group | None = group
        if 0 < count < group.size:
            draft_group = rendezvous.join_first(count, launch.join, device, store, address)
        worker = _load(config, device, group, draft_group)
        answer(link, Report(weight_bytes=worker.weight_bytes))
        follow(link, worker.execute)
    except Disconnected:
        return 1
    except Exception as error:
        lost = isinstance(error, CollectiveError)
        if not lost:
            log.exception("this rank fails")
        answer(link, Report(failure=what_failed(error), lost=lost))
        return 1


def _device(config: EngineConfig, local_rank: int) -> torch.device:
    """What this rank computes on, ready for use. config: with every setting resolved."""
    if config.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"{torch.cuda.device_count()} CUDA devices are visible, rank {local_rank} has none")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return torch.device(config.device)


def _load(config: EngineConfig, device: torch.device, group: Group, draft_group: Group | None) -> Worker:
    """draft_group: the ranks that share the draft model, if this is one of them."""
    sizes = size_up(config, None)
    model = load_model(
        sizes.path,
        dtype=sizes.dtype,
        device=device,
        group=group,
        progress=False,
        ops=sizes.ops,
        int8=config.weights == "int8",
    )
    draft = load_draft(config, model, sizes.max_model_len, draft_group)
    num_pages = fit_pages(config, sizes, model, group)
    return Worker(model, config, num_pages=num_pages, max_model_len=sizes.max_model_len, group=group, draft=draft)


if __name__ == "__main__":
    if sys.argv[1:] or not stat.S_ISSOCK(os.fstat(0).st_mode):
        from engine import torchrun

        status = torchrun.main(sys.argv[1:])
    else:
        status = main()
    sys.stderr.flush()
    os._exit(status)  # without waiting for the threads of a broken group
