"""Texts of a model, with what its drafts of them would have been. Drafts do not change a text, so a replay may draft it
in any other way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from bench.corpus import BenchError
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.plan import RoundPlan, RoundResult
from engine.scheduler.controller import FixedGamma
from engine.scheduler.request import Request


@dataclass(frozen=True, slots=True)
class RecordedText:
    """One request. rejected: places of output tokens that the model drafted wrongly, after all tokens before them.

    A place behind drafts that were all accepted was not drafted; it counts as right.
    """

    message: AddRequest
    output: list[int]
    rejected: set[int]

    def count_accepted(self, known: int, proposed: Sequence[int], drafts: int) -> int:
        """Count the drafts that are accepted after `known` output tokens: those from the text, then the model's."""
        following = self.output[known:]
        for place, token in enumerate(proposed):
            if place >= len(following) or token != following[place]:
                return place
        first = known + len(proposed)
        for place in range(first, first + drafts):
            if place >= len(self.output) or place in self.rejected:
                return place - known
        return len(proposed) + drafts


class DraftRecorder(FixedGamma):
    """Controller under which a model alone drafts, always the same number, and which notes where it was wrong."""

    def __init__(self, gamma: int) -> None:
        super().__init__(gamma)
        self.rejected: dict[str, set[int]] = {}

    @property
    def takes_text(self) -> bool:
        return False

    def observe(self, plan: RoundPlan, requests: Sequence[Request], result: RoundResult) -> None:
        outcomes = iter(result.rows)
        for request, work in zip(requests, plan.work, strict=True):
            if work.samples and (outcome := next(outcomes)).accepted < outcome.drafted:
                first = work.computed + work.new - request.num_prompt  # place of the round's first token
                self.rejected.setdefault(request.id, set()).add(first + outcome.accepted)


_ids = count()


def record(
    engine: Engine, recorder: DraftRecorder, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
) -> list[RecordedText]:
    """Let an engine under `recorder` write the texts. Raises BenchError if a request fails."""
    messages = [
        AddRequest(f"text {next(_ids)}", list(prompt), each) for prompt, each in zip(prompts, params, strict=True)
    ]
    outputs: Mapping[str, list[int]] = {message.id: [] for message in messages}
    for message in messages:
        engine.add(message)
    while engine.has_work():
        for output in engine.step():
            if output.error is not None:
                raise BenchError(output.error)
            outputs[output.id] += output.tokens
    return [
        RecordedText(message, outputs[message.id], recorder.rejected.pop(message.id, set())) for message in messages
    ]
