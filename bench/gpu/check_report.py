"""Results of `bench.gpu.check`: what a step's output says, and the table of all steps."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

StepOutcome = Literal["passed", "failed", "too long", "skipped", "no time", "interrupted"]

_TEST = re.compile(r"^\S+\.py::\S+", re.MULTILINE)
_END = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)(?: \(.*\))? *\[ *\d+%\] *$", re.MULTILINE)
"""End of a test's line, or a line of its own if the test has printed, as pytest does when a test takes long."""
_REPORT = re.compile(r"^=+ (?!test session starts)", re.MULTILINE)
_FAILURE = re.compile(r"^(?:FAILED|ERROR) (\S.*)$", re.MULTILINE)
_SKIP = re.compile(r"^SKIPPED \[\d+\] (?:\S+: )?(.+)$", re.MULTILINE)
_WIDTH = 160
"""Length at which notes are cut in the table."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a step's output says. note: first line of the first failure, or the reason for which the step did not run.
    tests: numbers of passed, failed and skipped ones; None for other steps. rows: lines of a benchmark's table."""

    note: str = ""
    tests: tuple[int, int, int] | None = None
    rows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Result of one step."""

    name: str
    outcome: StepOutcome
    seconds: float
    found: Finding


def read_tests(output: str, status: int | None) -> tuple[bool, Finding]:
    """Read what `pytest -v` has printed, which may break off. status: its exit status; None if it was ended. Returns
    whether tests passed and none failed, and the finding."""
    progress = _REPORT.split(output, maxsplit=1)[0]
    counts = Counter(_END.findall(progress))
    tests = counts["PASSED"], counts["FAILED"] + counts["ERROR"], counts["SKIPPED"]
    failures, skips = _FAILURE.findall(output), _SKIP.findall(output)
    notes = failures[:1]
    if status is None:
        begun = list(_TEST.finditer(progress))
        hangs = begun and not _END.search(progress, begun[-1].end())
        notes = [f"ended in {begun[-1][0]}" if hangs else "ended outside tests", *notes]
    elif not failures and status not in (0, 5):
        notes = [f"{_ending(status)}: {_last_line(output)}"]
    elif not failures and not tests[0]:
        notes = [f"no test ran: {skips[0]}" if skips else "no test ran"]
    return status == 0 and tests[0] > 0 and not tests[1], Finding("; ".join(notes), tests)


def read_bench(output: str, status: int | None, file: Path) -> tuple[bool, Finding]:
    """Read what `python -m bench.gpu` has printed and the results that it has written to `file`. status: its exit
    status; None if it was ended. Returns whether it has a result, and the finding."""
    try:
        said = json.loads(file.read_bytes())
    except (OSError, ValueError):
        said = {}
    why = str(said["notes"][0]) if said.get("notes") else _last_line(output)
    if status is None:
        return False, Finding(f"ended after: {why}")
    if status:
        return False, Finding(f"{_ending(status)}: {why}")
    lines = output.splitlines()
    heads = [i for i, line in enumerate(lines) if line.split()[:2] == ["rows", "context"]]
    if not said.get("results") or not heads:
        return False, Finding(f"no result: {why}")
    rows = lines[heads[-1] :]
    return True, Finding(rows=tuple(rows[: rows.index("")] if "" in rows else rows))


def _ending(status: int) -> str:
    return f"exit status {status}" if status >= 0 else f"ended by signal {-status}"


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def table(results: Sequence[StepResult]) -> str:
    """Format the results, one line per step; a benchmark's rows follow its line."""
    width = max([4, *(len(each.name) for each in results)]) + 2
    lines = [f"{'step':<{width}}{'outcome':<13}{'seconds':>8}{'passed':>8}{'failed':>8}{'skipped':>9}  note"]
    for each in results:
        counts = ("-", "-", "-") if each.found.tests is None else each.found.tests
        numbers = f"{each.seconds:>8.1f}{counts[0]:>8}{counts[1]:>8}{counts[2]:>9}"
        lines.append(f"{each.name:<{width}}{each.outcome:<13}{numbers}  {each.found.note[:_WIDTH]}".rstrip())
        lines += [f"    {row}" for row in each.found.rows]
    return "\n".join(lines)
