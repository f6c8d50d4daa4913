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
    """One contender at one (batch, context).

    prefill_s: until every row has its first token. step_ms: mean time per token of every row, one item per turn.
    total_s: whole requests of new_tokens each, one item per repeat. same: share of tokens that equal those of the first
    contender measured at this point. error: reason that a value is missing.
    """

    contender: str
    batch: int
    context: int
    prefill_s: float | None = None
    step_ms: list[float] = []
    total_s: list[float] = []
    same: float | None = None
    error: str | None = None

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
    """threads: of each contender; under a quota, of those that do not choose by it. temperature: of sampling. busy:
    number of processes that computed meanwhile, each on one of the first CPUs. quota: of each contender, in CPUs.
    date: of the measurement, as YYYY-MM-DD. shared: number of tokens that all prompts of a point begin with."""

    threads: int
    new_tokens: int
    rounds: int
    temperature: float = 0.0
    busy: int = 0
    quota: float | None = None
    processor: str = ""
    date: str = ""
    contenders: list[Entry] = []
    points: list[Point] = []
    firsts: list[First] = []
    chats: list[ChatTimes] = []
    shared: int = 0

    @property
    def conditions(self) -> str:
        """Processor, date and settings of the run."""
        parts = [self.processor, self.date, f"{self.threads} thread{'s' * (self.threads > 1)}"]
        parts.append(f"temperature {self.temperature:g}{'' if self.temperature else ' (greedy)'}")
        if self.quota is not None:
            parts.append(f"a quota of {self.quota:g} CPUs for each")
        if self.shared:
            parts.append(f"all rows begin with the same {self.shared} tokens")
        if self.busy:
            parts.append(f"{self.busy} busy process{'es' * (self.busy > 1)} on the first CPUs")
        return "; ".join(part for part in parts if part)

    def places(self) -> list[tuple[int, int]]:
        """List each (batch, context), in the order of measurement."""
        return list(dict.fromkeys((point.batch, point.context) for point in self.points))

    def at(self, place: tuple[int, int]) -> list[Point]:
        return [point for point in self.points if (point.batch, point.context) == place]


_HEAD = ("batch", "context", "step ms", "min", "max", "tok/s", "x first", "prefill s", "total s", "same")


def table(report: ComparisonReport, only: tuple[int, int] | None = None) -> str:
    """Format the report as a text table. only: this point alone, without legend."""
    width = max((len(entry.name) for entry in report.contenders), default=0) + 2
    places = report.places() if only is None else [only]
    lines = []
    for place in places:
        points = report.at(place)
        base = next((point.tokens_per_s for point in points if point.tokens_per_s is not None), None)
        lines.append(" " * width + "".join(f"{name:>10}" for name in _HEAD))
        lines += [_line(point, base, width) for point in points]
        lines.append("")
    if only is not None:
        return "\n".join(lines[:-1])
    if report.firsts:
        lines.append(f"time to the first token of {report.firsts[0].context}, s:")
        for first in report.firsts:
            lines.append(f"{first.contender:<{width}}{_cell(_median(first.first_token_s), 2)}{_note(first.error)}")
        lines.append("")
    if report.chats:
        prompts = report.chats[0].prompts
        lines.append("time to the first token of each turn of a chat, s; tokens of its prompt:")
        lines.append(" " * width + "".join(f"{prompt:>8}" for prompt in prompts))
        for chat in report.chats:
            cells = "".join(f"{_cell(_median(times), 3)[-8:]}" for times in chat.first_token_s)
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
        "token of every row, median, minimum and maximum of the turns; x first: speed relative to the first line"
    )
    lines.append(
        "prefill: until every row has its first token; total: whole requests; same: tokens equal to the first line's"
    )
    return "\n".join(lines)


def _line(point: Point, base: float | None, width: int) -> str:
    speed = point.tokens_per_s
    cells = (
        f"{point.batch:>10}",
        f"{point.context:>10}",
        _cell(_median(point.step_ms), 1),
        _cell(min(point.step_ms, default=None), 1),
        _cell(max(point.step_ms, default=None), 1),
        _cell(speed, 1),
        _cell(None if speed is None or base is None else speed / base, 2),
        _cell(point.prefill_s, 1),
        _cell(_median(point.total_s), 1),
        f"{'-' if point.same is None else f'{100 * point.same:.0f} %':>10}",
    )
    return f"{point.contender:<{width}}{''.join(cells)}{_note(point.error)}"


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _cell(value: float | None, digits: int) -> str:
    return f"{'-' if value is None else f'{value:.{digits}f}':>10}"


def _note(error: str | None) -> str:
    return "" if error is None else f"  ({error})"


def plot(report: ComparisonReport, path: Path) -> None:
    """Plot tokens per second by contender to a PNG, one panel per point, and a last panel for time to first token.

    Raises PlotError without matplotlib, OSError if the file cannot be written.
    """
    check_plotting()
    from matplotlib.figure import Figure

    names = [entry.name for entry in report.contenders][::-1]
    panels = [
        (
            f"batch {batch}, context {context:,}",
            "tokens/s",
            {at.contender: at.tokens_per_s for at in report.at((batch, context))},
        )
        for batch, context in report.places()
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
