"""Conversations as loads for engines: prompts that share beginnings, and grow by the engine's own answers.

A turn's prompt is known only once the turn before it has been answered. So a load is played, not listed: `play` records
the requests that it led to, and any other engine can answer the same requests as the reference (`check_answers`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from engine.core import Engine
from engine.messages import AddRequest, PromptLogprobs, RequestOutput, TokenLogprobs
from engine.params import SamplingParams
from tests.support.engines import tokens
from tests.support.workloads import SAMPLING, prompt_of


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: a prompt, answered once or several times.

    The prompt is that of the turn `after` with its answer, and `text` behind it. Before `text` is appended, all but the
    first `keep` tokens are dropped, and the token at `edit` is replaced. An answer that was aborted or failed is not
    part of it. wait: rounds after that turn's end, or after the start of the load, at which the turn is sent. leave:
    rounds after which it is aborted. choices: number of answers, each a request with its own seed; the first one is
    continued.
    """

    id: str
    text: Sequence[int]
    after: str | None = None
    keep: int | None = None
    edit: int | None = None
    wait: int = 0
    leave: int | None = None
    choices: int = 1
    priority: int = 0
    salt: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)

    def prompt(self, history: Sequence[int], max_len: int) -> list[int]:
        """Build the prompt. history: tokens of the turn before. The result and the answer fit into `max_len`."""
        prompt = list(history)[: self.keep]
        if self.edit is not None and prompt:
            at = self.edit % len(prompt)
            prompt[at] = 2 + (prompt[at] + 1) % 59  # another token than before
        prompt += self.text
        return prompt[: max(1, max_len - self.params.get("max_tokens", 16))] or [2]


class Played(NamedTuple):
    """Requests of a load in the order they were sent, the outputs of each, and the ids of those that were aborted or
    failed."""

    requests: list[AddRequest]
    outputs: dict[str, list[RequestOutput]]
    left: set[str]


def play(engine: Engine, turns: Sequence[Turn], max_len: int) -> Played:
    """Run a load until no work is left."""
    played = Played([], {}, set())
    of_turn: dict[str, list[AddRequest]] = {}
    leaves: dict[str, int] = {}
    due = {turn.id: turn.wait for turn in turns if turn.after is None}
    open_turns = {turn.id: turn for turn in turns}
    step = 0
    while open_turns or engine.has_work():
        for turn in [turn for id, turn in open_turns.items() if due.get(id, step + 1) <= step]:
            del open_turns[turn.id]
            prompt = turn.prompt(_history(turn, of_turn, played), max_len)
            of_turn[turn.id] = [_request(turn, prompt, choice) for choice in range(turn.choices)]
            for request in of_turn[turn.id]:
                engine.add(request)
                played.requests.append(request)
                played.outputs[request.id] = []
                if turn.leave is not None:
                    leaves[request.id] = step + turn.leave
        for id in [id for id, at in leaves.items() if at <= step]:
            del leaves[id]
            if not _ended(played.outputs[id]):
                engine.abort([id])
                played.left.add(id)
        for output in engine.step():
            played.outputs[output.id].append(output)
            if output.error is not None:
                played.left.add(output.id)
        step += 1
        for turn in open_turns.values():
            if turn.id not in due and turn.after in of_turn:
                sent = [request.id for request in of_turn[turn.after]]
                if all(id in played.left or _ended(played.outputs[id]) for id in sent):
                    due[turn.id] = step + turn.wait
    return played


def _request(turn: Turn, prompt: list[int], choice: int) -> AddRequest:
    params = SamplingParams(**{"seed": choice, **turn.params, **({"seed": choice} if turn.choices > 1 else {})})
    return AddRequest(f"{turn.id}.{choice}", prompt, params, priority=turn.priority, cache_salt=turn.salt)


def _history(turn: Turn, of_turn: Mapping[str, list[AddRequest]], played: Played) -> list[int]:
    if turn.after is None:
        return []
    before = of_turn[turn.after][0]
    answer = [] if before.id in played.left else tokens(played.outputs[before.id])
    return before.prompt + answer


def _ended(outputs: Sequence[RequestOutput]) -> bool:
    return bool(outputs) and outputs[-1].finish_reason is not None


# -- random loads ------------------------------------------------------------------------------------------------------


def random_turns(rng: random.Random, page_size: int, count: int, longest: int = 60, answer: int = 24) -> list[Turn]:
    """Make a load of `count` turns: new conversations, follow-ups, branches, edits, repetitions, twins and aborts.

    longest: largest number of tokens that a turn adds; most add fewer. answer: largest number of tokens of an answer.
    """
    turns: list[Turn] = []
    for i in range(count):
        if turns and rng.random() < 0.2:  # the same prompt, at the same time or later
            turn = replace(rng.choice(turns), wait=rng.choice([0, 0, 1, 6]))
        elif turns and rng.random() < 0.6:
            before = rng.choice(turns)
            turn = Turn(
                "",
                prompt_of(_length(rng, page_size, longest), rng.randrange(3)),
                after=before.id,
                keep=rng.choice([None, None, None, page_size, 2 * page_size + 1, 3]),
                edit=rng.choice([None, None, None, rng.randrange(longest)]),
                salt=before.salt if rng.random() < 0.8 else "other",
                wait=rng.choice([0, 0, 2]),
            )
        else:  # one of two beginnings
            opening = prompt_of(_length(rng, page_size, longest), rng.randrange(2))
            opening += prompt_of(rng.randrange(3) * page_size, 9)
            turn = Turn("", opening, wait=rng.choice([0, 0, 1, 4, 12]), salt=rng.choice(["", "", "", "other"]))
        turns.append(
            replace(
                turn,
                id=str(i),
                leave=rng.choice([None] * 6 + [rng.randrange(14)]),
                choices=rng.choice([1, 1, 1, 2, 3]),
                priority=rng.choice([0, 0, 0, -1, 3]),
                params=_params(rng, page_size, answer),
            )
        )
    return turns


def crowd(count: int, answer: int) -> list[Turn]:
    """Make `count` short prompts that differ, are sent at once, and have answers of `answer` tokens: in a pool for
    fewer tokens, rows are preempted."""
    params = {"max_tokens": answer, "ignore_eos": True}
    return [Turn(f"crowd{i}", prompt_of(5, 20 + i), params=params | {"seed": i}) for i in range(count)]


def _length(rng: random.Random, page_size: int, longest: int) -> int:
    page = page_size
    edges = [1, page - 1, page, page + 1, 2 * page, 3 * page, 3 * page + 1, rng.randrange(1, longest + 1)]
    return min(max(1, rng.choice(edges)), longest)


def _params(rng: random.Random, page_size: int, answer: int) -> dict[str, Any]:
    max_tokens = rng.choice([1, 2, page_size, page_size + 1, *(rng.randrange(1, answer + 1) for _ in range(3))])
    params = rng.choice(SAMPLING) | {"max_tokens": max_tokens, "seed": rng.randrange(3)}
    if rng.random() < 0.3:
        params["logprobs"] = rng.choice([0, 2])
    if rng.random() < 0.15:
        params["prompt_logprobs"] = rng.choice([0, 2])
        if rng.random() < 0.3:
            params["max_tokens"] = 0
    if rng.random() < 0.2:
        params["max_draft_tokens"] = rng.choice([0, 1])
    params["ignore_eos"] = rng.random() < 0.5
    return params


# -- comparison --------------------------------------------------------------------------------------------------------


def check_answers(played: Played, reference: Mapping[str, Sequence[RequestOutput]], *, exact: bool = False) -> None:
    """Compare a load's answers with those that another engine gave to the same requests.

    reference: outputs by request, none of which was aborted. exact: log-probabilities agree to the bit.
    """
    for request in played.requests:
        found, expected = played.outputs[request.id], reference[request.id]
        said, meant = tokens(found), tokens(expected)
        if request.id in played.left:
            meant = meant[: len(said)]
        else:
            reasons = [(side[-1].finish_reason, side[-1].stop_reason, side[-1].error) for side in (found, expected)]
            assert reasons[0] == reasons[1], request
        assert said == meant, request
        logprobs = [[at for output in side for at in output.logprobs or ()] for side in (found, expected)]
        _check_logprobs(logprobs[0], logprobs[1][: len(logprobs[0])], exact)
        assert len(logprobs[0]) == (0 if request.params.logprobs is None else len(said)), request
        if found and found[0].error is None:
            scored, meant_scores = (list(side[0].prompt_logprobs or ()) for side in (found, expected))
            _check_logprobs(scored, meant_scores, exact)
            assert [(at.token, at.rank) for at in scored] == [(at.token, at.rank) for at in meant_scores], request
            assert len(scored) == (0 if request.params.prompt_logprobs is None else len(request.prompt) - 1), request


def _check_logprobs(
    found: Sequence[TokenLogprobs | PromptLogprobs], expected: Sequence[TokenLogprobs | PromptLogprobs], exact: bool
) -> None:
    assert [at.top_ids for at in found] == [at.top_ids for at in expected]
    values = [[[at.logprob, *at.top_logprobs] for at in side] for side in (found, expected)]
    if exact:
        assert values[0] == values[1]
    else:
        for mine, theirs in zip(*values, strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs))


def check_hits(engine: Engine, played: Played, *, empty_before: bool = True) -> None:
    """Check the counts of tokens found in the prefix cache, and that all pages are owned by nobody afterwards.

    empty_before: the engine has run nothing else.
    """
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    assert stats.pages_free + stats.pages_cached == stats.pages_total
    hits, queries = 0, 0
    for request in played.requests:
        cached = max((output.cached_tokens for output in played.outputs[request.id]), default=0)
        assert 0 <= cached < len(request.prompt), request
        if request.params.prompt_logprobs is not None:  # its prompt is not looked up
            assert cached == 0, request
            continue
        hits, queries = hits + cached, queries + len(request.prompt)
    if not empty_before:
        return
    if played.left:  # aborted requests may have been admitted, and have no output that says so
        assert hits <= stats.prefix_hits <= stats.prefix_queries <= queries
    else:
        assert hits == stats.prefix_hits
        assert stats.prefix_queries == queries
