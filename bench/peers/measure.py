"""Measurements of a lineup: rows that decode in turns, times to first token, chats."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from bench.peers.compare_plan import ChatShape, Plan
from bench.peers.compare_report import ChatTimes, First, Point, repeated_grams
from bench.peers.install import PeerError
from bench.peers.lineup import Contenders

_CHECK_TOKENS = 16


def same_tokens(reference: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> float | None:
    """Compute the share of positions with the same token, up to the shorter text. None without common positions."""
    pairs = [pair for ours, theirs in zip(reference, tokens, strict=False) for pair in zip(ours, theirs, strict=False)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def check(lineup: Contenders, prompts: Sequence[Sequence[int]]) -> None:
    """Have every contender complete a few prompts greedily, and set `error` of the entries, and `same`: the share of
    tokens that equal the first contender's."""
    reference: list[list[int]] | None = None
    for entry in lineup.entries:
        if entry.name not in lineup.running:
            continue
        max_batch = lineup.running[entry.name].max_batch or len(prompts)
        tokens: list[list[int]] = []
        try:
            for i in range(0, len(prompts), max_batch):
                some = prompts[i : i + max_batch]
                fields = {"prompts": some, "new_tokens": _CHECK_TOKENS, "temperature": 0.0}
                tokens += lineup.ask(entry.name, "complete", **fields)["tokens"]
        except PeerError as error:
            entry.error = str(error)
            continue
        reference = reference or tokens
        entry.same = same_tokens(reference, tokens)


class _Failures:
    """Errors by contender in one measurement. A contender that failed gets no further requests."""

    def __init__(self, lineup: Contenders) -> None:
        self._lineup = lineup
        self.errors: dict[str, str] = {}

    def ask(self, name: str, op: str, **fields: Any) -> dict[str, Any] | None:
        if name in self.errors:
            return None
        try:
            return self._lineup.ask(name, op, **fields)
        except PeerError as error:
            self.errors[name] = str(error)
            return None


def measure_point(lineup: Contenders, prompts: Sequence[Sequence[int]], limit: int, plan: Plan) -> list[Point]:
    """Measure one (batch, context) at all temperatures.

    prompts: one per row, all of one length. limit: maximum new tokens per row.
    """
    batch, names = len(prompts), list(lineup.running)
    turns = {temperature: _Failures(lineup) for temperature in plan.temperatures}
    points = {
        (temperature, name): Point(name, batch, len(prompts[0]), temperature=temperature)
        for temperature in plan.temperatures
        for name in names
    }
    texts: dict[tuple[float, str], list[list[int]]] = {which: [[] for _ in prompts] for which in points}
    for name in names:
        max_batch = lineup.running[name].max_batch
        if max_batch is not None and batch > max_batch:
            for each in turns.values():
                each.errors[name] = f"takes {max_batch} row{'s' * (max_batch > 1)} at most"
    if not plan.anew:  # else texts are the same, but each has its own
        texts |= {(temperature, name): texts[temperature, lineup.rows_of(name)] for temperature, name in points}

    def begin(name: str, temperature: float, *, again: bool) -> None:
        """Begin the rows, and decode the first tokens, which are not timed."""
        text, failures = texts[temperature, name], turns[temperature]
        for row in text:
            row.clear()
        fields: dict[str, Any] = {"limit": limit, "temperature": temperature}
        if not again:
            fields["prompts"] = prompts
        if answer := failures.ask(name, "again" if again else "start", **fields):
            for one in names:
                if not again and lineup.rows_of(one) == name:
                    points[temperature, one].prefill_s = answer["first_token_s"]
            _append(text, answer["tokens"])
            if plan.warm_up and (answer := failures.ask(name, "decode", new_tokens=plan.warm_up)):
                _append(text, answer["tokens"])

    groups = [[name for name in names if lineup.rows_of(name) == own] for own in names] if plan.separately else [names]
    for group, temperature in itertools.product(filter(None, groups), plan.temperatures):
        for name in group:
            if lineup.rows_of(name) == name:
                begin(name, temperature, again=plan.keep_prompts and temperature != plan.temperatures[0])
        for i in range(plan.rounds):
            shift = i % len(group)  # so that none always follows the same one
            for name in (*group[shift:], *group[:shift]):
                if plan.anew:
                    begin(name, temperature, again=True)
                if answer := turns[temperature].ask(name, "decode", new_tokens=plan.new_tokens):
                    count = sum(map(len, answer["tokens"]))
                    points[temperature, name].step_ms.append(1e3 * answer["decode_s"] * batch / count)
                    points[temperature, name].round_tokens.append(count / batch / answer["rounds"])
                    _append(texts[temperature, name], answer["tokens"])
        for name in group:
            if not plan.keep_prompts or temperature == plan.temperatures[-1]:
                turns[temperature].ask(name, "stop")
    for temperature, _, name in itertools.product(plan.temperatures, range(plan.totals), names):
        fields = {"prompts": prompts, "new_tokens": plan.new_tokens, "temperature": temperature}
        if answer := turns[temperature].ask(name, "complete", **fields):
            points[temperature, name].total_s.append(answer["total_s"])
    for (temperature, name), point in points.items():
        if not temperature:
            reference = next((texts[temperature, one] for one in names if points[temperature, one].step_ms), [])
            point.same = same_tokens(reference, texts[temperature, name])
        point.repeated = repeated_grams(texts[temperature, name])
        point.error = turns[temperature].errors.get(name)
    return list(points.values())


def measure_first(lineup: Contenders, prompt: Sequence[int], plan: Plan) -> list[First]:
    """Measure the time to first token of a single prompt."""
    turns = _Failures(lineup)
    found = {name: First(name, len(prompt)) for name in lineup.running}
    fields = {"prompts": [prompt], "new_tokens": 1, "temperature": plan.temperatures[0]}
    for _ in range(plan.rounds):
        for name, first in found.items():
            if answer := turns.ask(name, "complete", **fields):
                first.first_token_s.append(answer["first_token_s"])
    for name, first in found.items():
        first.error = turns.errors.get(name)
    return list(found.values())


def measure_chat(lineup: Contenders, texts: Sequence[Sequence[int]], shape: ChatShape, plan: Plan) -> list[ChatTimes]:
    """Measure the time to first token of each turn of growing chats. Contenders take turns within a chat, and each has
    its own answers in its history. texts: what users say, one text per chat."""
    turns, names = _Failures(lineup), list(lineup.running)
    found = {name: ChatTimes(name, shape.prompts, [[] for _ in shape.prompts]) for name in names}
    common = {
        "new_tokens": plan.new_tokens,
        "room": shape.end + plan.new_tokens,
        "temperature": plan.temperatures[0],
    }
    for group in [[name] for name in names] if plan.separately else [names]:
        for text in texts:
            histories: dict[str, list[int]] = {name: [] for name in group}
            said = 0
            for turn, added in enumerate(shape.added(plan.new_tokens)):
                shift = turn % len(group)  # so that none always follows the same one
                for name in (*group[shift:], *group[:shift]):
                    prompt = [*histories[name], *text[said : said + added]]
                    if answer := turns.ask(name, "turn", prompt=prompt, **common):
                        found[name].first_token_s[turn].append(answer["first_token_s"])
                        histories[name] = prompt + answer["tokens"][0]
                said += added
            for name in group:
                turns.ask(name, "stop")
    for name, times in found.items():
        times.error = turns.errors.get(name)
    return list(found.values())


def _append(rows: list[list[int]], new: Sequence[Sequence[int]]) -> None:
    for row, tokens in zip(rows, new, strict=True):
        row += tokens
