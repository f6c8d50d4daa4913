"""Results of bench.peers.compare as a table, JSON (the structs below) and plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec

from bench.paper.forecast_report import check_plotting


class Entry(msgspec.Struct):
    """A contender.

    about: its version and weights. same: share of greedy tokens after short prompts that equal the first contender's.
    error: reason that it could not be started or checked.
    """

    name: str
    about: str = ""
    same: float | None = None
    error: str | None = None


class Point(msgspec.Struct):
    """One contender at one (batch, context) and temperature.

    prefill_s: until every row has its first token. step_ms: mean time per token of every row, one item per turn.
    round_tokens: mean tokens of a row per step, one item per turn; 1 without drafts. total_s: whole requests of
    new_tokens each, one item per repeat. same: share of tokens that equal those of the first contender measured at this
    point. repeated: see repeated_grams, of the turns' text. error: reason that a value is missing.
    """

    contender: str
    batch: int
    context: int
    prefill_s: float | None = None
    step_ms: list[float] = []
    round_tokens: list[float] = []
    total_s: list[float] = []
    same: float | None = None
    error: str | None = None
    temperature: float = 0.0
    repeated: float | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second of the whole batch, in the median turn."""
        return 1e3 * self.batch / median(self.step_ms) if self.step_ms else None


class First(msgspec.Struct):
    """Time to first token of a single prompt of `context` tokens; one item per repeat."""

    contender: str
    context: int
    first_token_s: list[float] = []
    error: str | None = None


class ChatTimes(msgspec.Struct):
    """Times to first token of a growing chat. prompts: tokens of each turn's prompt. first_token_s: by turn, one item
    per chat."""

    contender: str
    prompts: list[int]
    first_token_s: list[list[float]]
    error: str | None = None


class ComparisonReport(msgspec.Struct):
    """threads: of each contender; under a quota, of those that do not choose by it. temperatures: of sampling at each
    point; firsts and chats have the first one. busy: number of processes that computed meanwhile, each on one of the
    first CPUs. quota: of each contender, in CPUs. date: of the measurement, as YYYY-MM-DD. shared: number of tokens
    that all prompts of a point begin with. task: kind of prompts. prompts_repeated: see repeated_grams, of the prompts
    of all points."""

    threads: int
    new_tokens: int
    rounds: int
    temperatures: list[float]
    busy: int = 0
    quota: float | None = None
    processor: str = ""
    date: str = ""
    contenders: list[Entry] = []
    points: list[Point] = []
    firsts: list[First] = []
    chats: list[ChatTimes] = []
    shared: int = 0
    task: str = "free"
    prompts_repeated: float | None = None

    @property
    def conditions(self) -> str:
        """Processor, date and settings of the run."""
        parts = [self.processor, self.date, f"{self.threads} thread{'s' * (self.threads > 1)}"]
        named = [f"{temperature:g}{'' if temperature else ' (greedy)'}" for temperature in self.temperatures]
        parts.append(f"temperature{'s' * (len(named) > 1)} {', '.join(named)}")
        if self.quota is not None:
            parts.append(f"a quota of {self.quota:g} CPUs for each")
        if self.task != "free":
            parts.append(f"task {self.task}")
        if self.shared:
            parts.append(f"all rows begin with the same {self.shared} tokens")
        if self.busy:
            parts.append(f"{self.busy} busy process{'es' * (self.busy > 1)} on the first CPUs")
        return "; ".join(part for part in parts if part)

    def places(self) -> list[tuple[int, int]]:
        """List each (batch, context), in the order of measurement."""
        return list(dict.fromkeys((point.batch, point.context) for point in self.points))

    def at(self, place: tuple[int, int], temperature: float) -> list[Point]:
        """List the points of one (batch, context) and temperature."""
        wanted = (*place, temperature)
        return [point for point in self.points if (point.batch, point.context, point.temperature) == wanted]


GRAM = 8
"""Number of tokens in a row whose repetition counts; see repeated_grams."""
_WIDTHS = {
    "batch": 7,
    "context": 9,
    "T": 5,
    "step ms": 9,
    "min": 8,
    "max": 8,
    "tok/s": 8,
    "tok/round": 11,
    "x first": 9,
    "prefill s": 11,
    "total s": 9,
    "same": 7,
    "repeated": 10,
}
"""Columns of a point's line, with their widths."""


def repeated_grams(texts: Sequence[Sequence[int]]) -> float | None:
    """Compute the share of sequences of GRAM tokens that occurred before in the same text. None if all are shorter."""
    grams = [[tuple(text[i : i + GRAM]) for i in range(len(text) - GRAM + 1)] for text in texts]
    count = sum(map(len, grams))
    return 1 - sum(len(set(of_text)) for of_text in grams) / count if count else None


def table(report: ComparisonReport, only: tuple[int, int] | None = None) -> str:
    """Format the report as a text table. only: this point alone, without legend."""
    width = max((len(entry.name) for entry in report.contenders), default=0) + 2
    places = report.places() if only is None else [only]
    lines = []
    for place in places:
        lines.append(" " * width + "".join(f"{name:>{space}}" for name, space in _WIDTHS.items()))
        for temperature in report.temperatures:
            points = report.at(place, temperature)
            base = next((point.tokens_per_s for point in points if point.tokens_per_s is not None), None)
            lines += [_line(point, base, width) for point in points]
        lines.append("")
    if only is not None:
        return "\n".join(lines[:-1])
    if report.firsts:
        lines.append(f"time to the first token of {report.firsts[0].context} (T = {report.temperatures[0]:g}), s:")
        for first in report.firsts:
            lines.append(f"{first.contender:<{width}}{_cell(_median(first.first_token_s), 2):>10}{_note(first.error)}")
        lines.append("")
    if report.chats:
        prompts = report.chats[0].prompts
        at = f"T = {report.temperatures[0]:g}"
        lines.append(f"time to the first token of each turn of a chat ({at}), s; tokens of its prompt:")
        lines.append(" " * width + "".join(f"{prompt:>8}" for prompt in prompts))
        for chat in report.chats:
            cells = "".join(f"{_cell(_median(times), 3):>8}" for times in chat.first_token_s)
            lines.append(f"{chat.contender:<{width}}{cells}{_note(chat.error)}")
        lines.append("")
    for entry in report.contenders:
        what = entry.about
        if entry.same is not None:
            what += f"; {100 * entry.same:.0f} % of tokens after short prompts equal the first contender's"
        lines.append(f"{entry.name:<{width}}{what}{_note(entry.error)}")
    lines.append("")
    lines.append(report.conditions)
    lines.append(
        f"{report.rounds} turns of {report.new_tokens} tokens per row; step ms: time per "
        "token of every row, median, minimum and maximum of the turns; tok/round: tokens of a row per step; x first: "
        "speed relative to the first line of the same T, the temperature"
    )
    lines.append(
        "prefill: until every row has its first token; total: whole requests; same: tokens equal to the first line's"
    )
    repeated = f"repeated: share of sequences of {GRAM} new tokens that the row had before, where n-gram drafts gain"
    if report.prompts_repeated is not None:
        repeated += f"; in the prompts it is {100 * report.prompts_repeated:.1f} %"
    lines.append(repeated)
    return "\n".join(lines)


def _line(point: Point, base: float | None, width: int) -> str:
    speed = point.tokens_per_s
    cells = (
        str(point.batch),
        str(point.context),
        f"{point.temperature:g}",
        _cell(_median(point.step_ms), 1),
        _cell(min(point.step_ms, default=None), 1),
        _cell(max(point.step_ms, default=None), 1),
        _cell(speed, 1),
        _cell(_median(point.round_tokens), 2),
        _cell(None if speed is None or base is None else speed / base, 2),
        _cell(point.prefill_s, 1),
        _cell(_median(point.total_s), 1),
        _percent(point.same),
        _percent(point.repeated),
    )
    # A value wider than its column stays apart from the one before.
    line = "".join(f" {cell:>{space - 1}}" for cell, space in zip(cells, _WIDTHS.values(), strict=True))
    return f"{point.contender:<{width}}{line}{_note(point.error)}"


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _note(error: str | None) -> str:
    return "" if error is None else f"  ({error})"


def plot(report: ComparisonReport, path: Path) -> None:
    """Plot tokens per second by contender to a PNG, one panel per point and temperature, and a last panel for time to
    first token.

    Raises PlotError without matplotlib, OSError if the file cannot be written.
    """
    check_plotting()
    from matplotlib.figure import Figure

    names = [entry.name for entry in report.contenders][::-1]
    panels = [
        (
            f"batch {batch}, context {context:,}, T = {temperature:g}",
            "tokens/s",
            {at.contender: at.tokens_per_s for at in report.at((batch, context), temperature)},
        )
        for batch, context in report.places()
        for temperature in report.temperatures
    ]
    if report.firsts:
        title = f"first token of {report.firsts[0].context:,}"
        panels.append((title, "s", {at.contender: _median(at.first_token_s) for at in report.firsts}))
    for turn in {0, len(report.chats[0].prompts) - 1} if report.chats else ():
        title = f"first token of turn {turn + 1}, {report.chats[0].prompts[turn]:,}"
        panels.append((title, "s", {at.contender: _median(at.first_token_s[turn]) for at in report.chats}))
    figure = Figure(figsize=(3 * max(1, len(panels)) + 1.5, 0.4 * len(names) + 1.5), layout="constrained")
    row = figure.subplots(1, max(1, len(panels)), squeeze=False, sharey=True)[0]
    for axes, (title, unit, values) in zip(row, panels, strict=False):
        heights = [values.get(name) or 0.0 for name in names]
        colors = ["tab:orange" if name.startswith("magicdec") else "tab:blue" for name in names]
        bars = axes.barh(names, heights, color=colors)
        axes.bar_label(bars, [f"{height:.3g}" if height else "-" for height in heights], padding=2)
        axes.margins(x=0.2)
        axes.set(title=title, xlabel=unit)
    figure.suptitle(report.conditions, fontsize="small")
    figure.savefig(path, format="png", dpi=120)
