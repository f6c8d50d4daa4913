"""Compare magicdec with other engines on this machine: the same prompts, interleaved in one run.

    python -m bench.peers.compare --points 1x2048,4x6000 --json compare.json --plot compare.png

Every contender is a process that loads the model once (bench/peers/programs/). All but the one being measured are
stopped. At each point (batch x context) and temperature every row is prefilled, then contenders alternate in turns of
--new-tokens per row. Decoding is reported as the median turn; whole requests and the time to first token as the median
of their repeats. Tokens are compared at temperature 0 only. Where a model repeats itself, drafts by n-grams gain: the
report says how much of each text is repetition. With --busy, other processes compute on the first CPUs from the first
point on. With --quota, each contender has a CPU quota of its own: magicdec chooses its threads by it, and the others
get one for every CPU of it, rounded up. Other engines are installed into environments of their own
(bench/peers/install.py). A contender that is not available is listed with the reason, and the others are measured.

    python -m bench.peers.compare --chat 500:6000:10
    python -m bench.peers.compare --shared 6000 --points 16x6200

The first measures the time to first token of each turn of a chat, in whose history each contender has its own answers;
the second, rows behind one document. Contenders named "prefix" use what they know of a prompt that begins like another.

    python -m bench.peers.compare --few-bits --quantized build/int4

Weights of fewer bits, rounded by each engine itself, and, of a directory with quantized weights, the same weights for
magicdec and vLLM. --few-bits-kv compares KV of fewer bits.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from bench.corpus import read_text
from bench.format_flags import exits_on_error
from bench.machine import CpuQuota, busy, describe_processor, first_cores
from bench.paper.forecast_report import check_plotting
from bench.peers.compare_plan import CHECK_PROMPTS, ChatShape, Plan, parse_points, parse_temperatures
from bench.peers.compare_report import ComparisonReport, plot, repeated_grams, table
from bench.peers.contenders import CONTENDERS, Peer, choose, largest_share, quantized, variant
from bench.peers.install import peers_dir
from bench.peers.lineup import Start, start_contenders, starter
from bench.peers.measure import check, measure_chat, measure_first, measure_point
from bench.tasks import TASKS, cutter
from models.config import read_config
from models.default import resolve_model
from models.tokenizer import Tokenizer

POINTS = "1x2048,1x7000,4x6000,8x4000,16x7500"
_POINTS = {"weights": "1x2048,8x4000,16x7500", "kv": "4x7500,16x7500"}
_CHECK_LENGTH = 256


def run(
    contenders: Sequence[Peer],
    start: Start,
    plan: Plan,
    cut: Callable[[int, int, int], list[list[int]]],
    settings: Mapping[str, Any],
    say: Callable[[str], None],
) -> ComparisonReport:
    """Make all measurements.

    cut: see bench.tasks.cutter. settings: see Plan.settings. say: prints progress.
    """
    report = ComparisonReport(
        threads=settings["threads"],
        new_tokens=plan.new_tokens,
        rounds=plan.rounds,
        temperatures=list(plan.temperatures if plan.points else plan.temperatures[:1]),
        busy=plan.busy,
        quota=plan.quota,
        shared=plan.shared,
        task=plan.task,
        processor=describe_processor(),
        date=date.today().isoformat(),
    )
    cores = first_cores(plan.busy)
    points = [(batch, context, cut(batch, context, plan.shared)) for batch, context in plan.points]
    started = start_contenders(contenders, start, say, one_prefill=plan.turns > 1)
    with started as lineup, contextlib.ExitStack() as neighbours:
        report.contenders = lineup.entries
        # magicdec measures its rounds here, if it has to, and keeps the times: before others disturb it.
        check(lineup, cut(CHECK_PROMPTS, _CHECK_LENGTH, 0))
        neighbours.enter_context(busy(cores))
        for batch, context, prompts in points:
            say(f"batch {batch}, context {context} …")
            limit = plan.row_tokens(batch, context, settings["row_tokens"]) - context
            report.points += measure_point(lineup, prompts, limit, plan)
            say(table(report, only=(batch, context)))
        report.prompts_repeated = repeated_grams([prompt for *_, prompts in points for prompt in prompts])
        if plan.first:
            say(f"first token of {plan.first} …")
            report.firsts = measure_first(lineup, cut(1, plan.first, 0)[0], plan)
        if plan.chat is not None:
            say(f"chats of {plan.chat.turns} turns …")
            report.chats = measure_chat(lineup, cut(plan.rounds, plan.chat.end, 0), plan.chat, plan)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--gguf", type=Path, help="GGUF file of the model for llama.cpp (default model: not needed)")
    parser.add_argument(
        "--points",
        help=f"BATCHxCONTEXT, comma-separated ({POINTS}; with --few-bits {_POINTS['weights']}; with --few-bits-kv "
        f"{_POINTS['kv']}; with --chat none, with --shared 16 rows)",
    )
    parser.add_argument(
        "--shared", type=int, default=0, help="tokens, part of the context, that all prompts of a point begin with"
    )
    parser.add_argument(
        "--chat", help="START:END:TURNS; time to first token of a chat that grows from START to END tokens"
    )
    parser.add_argument("--contenders", help=f"comma-separated, of: {', '.join(one.name for one in CONTENDERS)}")
    parser.add_argument(
        "--variant", action="append", default=[], help="NAME: key=value …; add magicdec with these engine settings"
    )
    parser.add_argument("--few-bits", action="store_true", help="compare weights of fewer bits")
    parser.add_argument("--few-bits-kv", action="store_true", help="compare KV of fewer bits")
    parser.add_argument(
        "--quantized",
        type=Path,
        action="append",
        default=[],
        help="directory with quantized weights of the same model; add magicdec and vllm with these",
    )
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens per row of a turn, and of a whole request")
    parser.add_argument("--warm-up", type=int, default=8, help="tokens per row before the turns")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender")
    parser.add_argument("--totals", type=int, default=1, help="number of times that whole requests are timed; 0: never")
    parser.add_argument(
        "--first", type=int, help="prompt length for time to first token; 0: skip it (4000; with --chat or --shared 0)"
    )
    parser.add_argument(
        "--separately", action="store_true", help="run contenders one after the other at each point, to save memory"
    )
    parser.add_argument(
        "--keep-prompts",
        action="store_true",
        help="keep the KV of prompts from one temperature to the next, to save time",
    )
    parser.add_argument(
        "--one-prefill",
        action="store_true",
        help="let magicdec with different drafters, and without, take turns on the same rows, to save time and memory",
    )
    parser.add_argument(
        "--anew",
        action="store_true",
        help="with --keep-prompts: begin the rows anew for each turn, so that all turns decode the same text",
    )
    parser.add_argument(
        "--threads", type=int, help="threads of each contender; default: all CPUs, or as the quota says"
    )
    parser.add_argument(
        "--temperatures",
        default="0,1",
        help="of sampling at each point, comma-separated; 0: greedy; first tokens and chats have the first (0,1)",
    )
    parser.add_argument("--busy", type=int, default=0, help="processes that keep the first CPUs busy meanwhile")
    parser.add_argument(
        "--quota", type=float, help="CPU quota of each contender, in CPUs (a control group; needs root)"
    )
    parser.add_argument("--task", choices=TASKS, default="free", help="kind of prompts (bench/tasks.py)")
    parser.add_argument("--text", type=Path, help="take prompts from this file instead of Python's manual")
    parser.add_argument("--peers-dir", type=Path, default=peers_dir(), help="directory of other engines' environments")
    parser.add_argument("--no-install", action="store_true", help="measure only engines that are installed")
    parser.add_argument("--timeout", type=float, default=1800.0, help="time limit of an answer, in seconds")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="plot the results to this PNG")
    given = parser.parse_args(arguments)
    threads = given.threads
    if threads is not None and given.quota is not None:
        parser.error("--quota sets the number of threads; leave out --threads")
    if threads is None:
        cpus = len(os.sched_getaffinity(0))
        threads = cpus if given.quota is None else min(cpus, math.ceil(given.quota))
    sharing = bool(given.shared or given.chat)
    sets = {"shared": sharing, "weights": given.few_bits, "kv": given.few_bits_kv}
    if sum(sets.values()) > 1:
        parser.error("--few-bits, --few-bits-kv and prompts that share tokens (--shared, --chat) exclude each other")
    if given.task != "free" and sharing:
        parser.error("--task needs prompts that share nothing: leave out --shared and --chat")
    if given.one_prefill and given.chat:
        parser.error("--one-prefill and --chat exclude each other: a turn would find the other's prompt in its cache")
    if given.anew and not given.keep_prompts:
        parser.error("--anew needs --keep-prompts")
    chosen = next((name for name, asked in sets.items() if asked), "usual")
    first = given.first if given.first is not None else 0 if sharing else 4000
    if given.shared < 0:
        parser.error("--shared must be at least 0")
    if min(given.new_tokens, given.rounds, threads) < 1 or min(given.totals, first, given.warm_up) < 0:
        parser.error(
            "--new-tokens, --rounds and --threads must be at least 1, --warm-up, --totals and --first at least 0"
        )
    if given.busy < 0 or (given.quota is not None and given.quota < 0.01):
        parser.error("--busy must be at least 0, --quota at least 0.01")
    with exits_on_error():
        if given.plot is not None:
            check_plotting()
        more = [variant(text) for text in given.variant]
        more += [peer for directory in given.quantized for peer in quantized(directory)]
        contenders = choose(given.contenders, more, chosen)
        if given.points is not None:
            points = parse_points(given.points)
        elif given.shared:
            points = [(16, given.shared + 200)]
        else:
            points = [] if given.chat else parse_points(_POINTS.get(chosen, POINTS))
        plan = Plan(
            points,
            first,
            given.warm_up,
            given.new_tokens,
            given.rounds,
            given.totals,
            given.separately,
            parse_temperatures(given.temperatures),
            given.busy,
            given.quota,
            given.shared,
            ChatShape.parse(given.chat) if given.chat else None,
            given.task,
            given.keep_prompts,
            largest_share(contenders) if given.one_prefill else 1,
            given.anew,
        )
        first_cores(plan.busy)
        if plan.quota is not None:
            CpuQuota(plan.quota).close()
        model = resolve_model(given.model)
        settings = plan.settings(model, read_config(model), threads)
        cut = cutter(given.task, Tokenizer(model), read_text(given.text))
        with tempfile.TemporaryDirectory(prefix="magicdec-compare-") as logs:
            start = starter(
                settings,
                given.peers_dir,
                Path(logs),
                given.gguf,
                given.timeout,
                install=not given.no_install,
                cpus=plan.quota,
            )
            report = run(
                contenders,
                start,
                plan,
                cut,
                settings,
                lambda line: print(line, file=sys.stderr, flush=True),
            )
        print(table(report))
        if given.json is not None:
            given.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
        if given.plot is not None:
            plot(report, given.plot)


if __name__ == "__main__":
    main()
