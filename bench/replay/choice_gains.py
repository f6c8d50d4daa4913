"""Compare the choices of drafters on equal text and equal times, free of the noise of measured ones.

    python -m bench.replay.choice_gains --task edit json --temperature 0 0.8 --rows 4 --context 2000 --text FILE

The engine writes texts, which drafts do not change, and notes where the model's drafts were wrong. They are replayed
with the engine's own search of text and controllers, each of which learns from its own rounds. A round takes what the
start-up profile says: so controllers predict times well, and acceptance is what they have to find out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from bench.corpus import read_text
from bench.format_flags import exits_on_error
from bench.machine import describe_processor
from bench.replay.recording import DraftRecorder, RecordedText, record
from bench.replay.replayed_texts import add_text_flags, check_text_flags, read_samples, texts_to_write
from engine.config.deployment import EngineConfig
from engine.config.speculation import Source
from engine.control.auto import AutoGamma
from engine.control.drafting_model import DraftingModel
from engine.control.goodput import draft_share
from engine.control.step_times import StepTimes
from engine.core import Engine
from engine.ngram.ngram_drafts import NO_PROPOSAL, NgramDrafts, Proposal
from engine.plan import RoundPlan, RoundResult, RowResult, RowWork
from engine.scheduler.controller import Controller, FixedGamma, RowDrafts
from engine.scheduler.request import Request
from engine.scheduler.request_ngrams import RequestNgrams
from engine.worker.controllers import draft_reads
from models.default import resolve_model
from models.tokenizer import Tokenizer

WAYS: Mapping[str, Source | None] = {"off": None, "self": "self", "ngram": "ngram", "together": "together"}
"""Drafters that are compared. None: none drafts."""
_RECORDED_DRAFTS = 6
_PRICED_DRAFTS = 16
"""Drafts of a verify pass over which the price of one more is taken."""
_WIDTH = 26


@dataclass(slots=True)
class Throughput:
    """Outcome of replays. rows: sum over rounds of their rows. drafted, accepted, copied: drafts, those of them that
    were accepted, and of these the ones from the text."""

    seconds: float = 0.0
    tokens: int = 0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0
    copied: int = 0

    @property
    def rate(self) -> float:
        """Return tokens per second."""
        return self.tokens / self.seconds

    def add(self, other: Throughput) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class RoundReplay:
    """Rounds over recorded texts, which take what a profile says."""

    def __init__(self, times: StepTimes, budget: int, vocab_size: int) -> None:
        """budget: KV tokens that drafts read per row."""
        self._times, self.budget = times, budget
        self._drafts = NgramDrafts(vocab_size)

    def run(self, texts: Sequence[RecordedText], controller: Controller) -> Throughput:
        """Decode all texts as one batch, which rows leave at their end."""
        ngrams = RequestNgrams(self._drafts, controller.gamma_max, lambda _, tokens: len(tokens))
        rows = {Request(text.message, (), number): text for number, text in enumerate(texts)}
        for request, text in rows.items():
            request.tokens.append(text.output[0])  # prefill yields it
        gain = Throughput()
        while rows:
            requests = list(rows)
            controller.begin_round()
            proposals = [NO_PROPOSAL] * len(rows)
            if controller.takes_text:
                proposals = ngrams.propose(requests, controller.gamma_max)
            choices = controller.choose(requests, 0, proposals)
            work = list(_work(requests, proposals, choices))
            results = []
            for request, proposal, each in zip(requests, proposals, work, strict=True):
                ngrams.record(request, proposal, taken=bool(each.proposed))
                text = rows[request]
                accepted = text.count_accepted(request.num_output, each.proposed, each.model_drafts)
                gain.drafted += each.gamma
                gain.accepted += accepted
                gain.copied += min(accepted, len(each.proposed))
                new = text.output[request.num_output :][: accepted + 1]
                results.append(RowResult(each.gamma, accepted, new, None))
            seconds = self._seconds([len(request.tokens) for request in requests], work)
            gain.seconds += sum(seconds)
            gain.rows += len(rows)
            for request, result in zip(requests, results, strict=True):
                request.tokens += result.tokens
                gain.tokens += len(result.tokens)
            plan = RoundPlan(0, [], [], work, controller.way.budget, controller.way.drafter)
            controller.observe(plan, requests, RoundResult(0, results, *seconds))
            rows = {request: text for request, text in rows.items() if request.num_output < len(text.output)}
        return gain

    def _seconds(self, contexts: Sequence[int], work: Sequence[RowWork]) -> tuple[float, float]:
        """Return the seconds of a round's drafts, and of its verify pass."""
        verify = self._times.verify(
            len(work), sum(contexts), [*range(_PRICED_DRAFTS + 1), mean(each.gamma for each in work)]
        )
        # Drafts from the text that a model goes on from are further rows of its first step, and of one row queries.
        queries = sum(len(each.proposed) for each in work if each.model_drafts)
        drafting = 0.0
        for step in range(max(each.model_drafts for each in work)):
            reading = [context for context, each in zip(contexts, work, strict=True) if each.model_drafts > step]
            further = queries if len(work) > 1 and not step else 0
            seconds = self._times.draft(len(reading) + further, self._times.read(reading, self.budget))
            if len(work) == 1 and not step:
                seconds *= 1 + queries * draft_share(verify[:-1])
            drafting += seconds
        return drafting, verify[-1]


def _work(
    requests: Sequence[Request], proposals: Sequence[Proposal], choices: Sequence[RowDrafts]
) -> Iterator[RowWork]:
    """Yield what a round does for each row."""
    for row, (request, proposal, choice) in enumerate(zip(requests, proposals, choices, strict=True)):
        gamma, proposed = choice.proposed + choice.model, proposal.tokens[: choice.proposed]
        yield RowWork(row, request.num_tokens - 1, 1, gamma, True, proposed=proposed)


@exits_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_flags(parser, rows=4, new_tokens=320)
    parser.add_argument("--budget", type=int, default=512, help="KV tokens of the window that the model's drafts read")
    given = parser.parse_args(arguments)
    check_text_flags(given)
    drafts = {"drafter": "together", "kv": {"policy": "window", "budget": given.budget}}
    fields = {"model": given.model, "speculation": drafts, "scheduler": {"max_rows": given.rows}}
    config, source = EngineConfig.model_validate(fields), read_text(given.text)
    recorder = DraftRecorder(min(_RECORDED_DRAFTS, config.speculation.max_model_drafts))
    engine = Engine(config, controller=recorder, progress=False)
    try:
        reads = draft_reads(config)[None]
        times = StepTimes(read_samples(given, engine, config), reads.tokens_read, drafts_share=reads.share)
        replay = RoundReplay(times, given.budget, engine.ready.vocab_size)
        tokenizer = Tokenizer(resolve_model(given.model))
        print(f"{'task':<9}{'T':>4}{'rows':>6}" + "".join(f"{way:>{_WIDTH}}" for way in WAYS) + "   of best")
        for task, temperature, prompts, params in texts_to_write(given, source, tokenizer):
            texts = record(engine, recorder, prompts, params)
            for rows in sorted({1, given.rows}):
                batches = [texts[first : first + rows] for first in range(0, given.rows, rows)]
                line = _line(compare(replay, batches, config, times))
                print(f"{task:<9}{temperature:>4g}{rows:>6}{line}", flush=True)
        print(describe_processor())
    finally:
        engine.close()


def _controller(way: Source | None, config: EngineConfig, times: StepTimes, budget: int) -> Controller:
    """Make the engine's controller for a drafter, with the one budget that was recorded."""
    if way is None:
        return FixedGamma(0)
    own = config.speculation.model_copy(update={"drafter": way})
    return AutoGamma([DraftingModel(times, [budget], budget)], own.max_model_drafts, own.max_text_drafts)


def compare(
    replay: RoundReplay, batches: Sequence[Sequence[RecordedText]], config: EngineConfig, times: StepTimes
) -> dict[str, Throughput]:
    """Replay the batches, one after another, with each way, whose controller goes on learning."""
    gains = {}
    for name, way in WAYS.items():
        controller, gains[name] = _controller(way, config, times, replay.budget), Throughput()
        for batch in batches:
            gains[name].add(replay.run(batch, controller))
    return gains


def _line(gains: Mapping[str, Throughput]) -> str:
    """Format the speed of each way over plain decoding, its tokens per row and round and its share of accepted drafts;
    of `together` also how many of these came from the text."""
    found = []
    for name, gain in gains.items():
        cell = f"{gain.rate / gains['off'].rate:.2f} ({gain.tokens / gain.rows:.2f}"
        if gain.drafted:
            cell += f", {gain.accepted / gain.drafted:.2f}"
        if name == "together" and gain.accepted:
            cell += f", {gain.copied / gain.accepted:.0%}"
        found.append(f"{cell})")
    best = max(gain.rate for name, gain in gains.items() if name != "together")
    return "".join(f"{each:>{_WIDTH}}" for each in found) + f"{gains['together'].rate / best:>8.3f}"


if __name__ == "__main__":
    main()
