"""Decode one batch from a short to a long context with `gamma: auto`, to see where the controller turns speculation on.

    python -m bench.offline.growth --rows 4 --start 100 --end 6000 --plot growth.png

Tokens are sampled at temperature 1, so that the text does not repeat itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.corpus import passages, read_text
from bench.format_flags import add_format_flags, exits_on_error, read_format_flags
from bench.paper.forecast_report import check_plotting
from engine.config.deployment import CacheConfig, EngineConfig
from engine.llm import LLM
from engine.messages import AddRequest
from engine.params import SamplingParams


class Stretch(msgspec.Struct):
    """Measurements over one part of the growing context.

    context: mean tokens per row at its end. gamma: mean over rows and rounds. share_off: fraction of rows and rounds
    with gamma 0. speedup, predicted: over plain decoding, as measured and as forecast by the controller.
    """

    context: float
    gamma: float
    share_off: float
    tokens_per_second: float
    speedup: float
    predicted: float


def measure(
    config: EngineConfig, *, rows: int, start: int, end: int, stretches: int, text: Path | None
) -> list[Stretch]:
    """Decode from `start` to `end` tokens per row. Returns one Stretch for each of `stretches` equal parts."""
    found = []
    with LLM(config) as llm:
        engine = llm.engine
        for i, prompt in enumerate(passages(llm.tokenizer, read_text(text), count=rows, length=start)):
            params = SamplingParams(max_tokens=end - start, seed=i, ignore_eos=True)
            engine.add(AddRequest(str(i), prompt, params))
        tokens = {str(i): 0 for i in range(rows)}
        ends = [(end - start) * (i + 1) // stretches for i in range(stretches)]
        before, began = engine.stats(), time.perf_counter()
        while engine.has_work():
            for output in engine.step():
                tokens[output.id] += len(output.tokens)
            mean = sum(tokens.values()) / rows
            if mean >= ends[0]:
                after, now = engine.stats(), time.perf_counter()
                chosen = [b - a for a, b in zip(before.gamma_chosen, after.gamma_chosen, strict=True)]
                plain = after.plain_seconds - before.plain_seconds
                found.append(
                    Stretch(
                        context=start + mean,
                        gamma=sum(gamma * count for gamma, count in enumerate(chosen)) / max(1, sum(chosen)),
                        share_off=chosen[0] / max(1, sum(chosen)),
                        tokens_per_second=(after.generated_tokens - before.generated_tokens) / (now - began),
                        speedup=plain / max(1e-9, after.decode_seconds - before.decode_seconds),
                        predicted=plain / max(1e-9, after.forecast_seconds - before.forecast_seconds),
                    )
                )
                before, began = after, now
                ends.pop(0)
                if not ends:
                    break
    return found


def plot(stretches: Sequence[Stretch], path: Path) -> None:
    """Plot gamma and speed-up over context. Raises PlotError without matplotlib."""
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    contexts = [stretch.context for stretch in stretches]
    axes.step(contexts, [stretch.gamma for stretch in stretches], where="mid", color="tab:gray", label="mean gamma")
    axes.set(xlabel="context (tokens per row)", ylabel="gamma")
    axes.set_ylim(bottom=0)
    gains = axes.twinx()
    gains.plot(contexts, [stretch.speedup for stretch in stretches], color="tab:blue", label="speed-up, measured")
    gains.plot(contexts, [stretch.predicted for stretch in stretches], "--", color="tab:orange", label="predicted")
    gains.axhline(1.0, color="black", linewidth=0.5)
    gains.set(ylabel="over plain decoding")
    lines = [*axes.get_lines(), *gains.get_lines()[:2]]
    axes.legend(lines, [str(line.get_label()) for line in lines], loc="upper left")
    figure.savefig(path, dpi=120)


@exits_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--start", type=int, default=100)
    parser.add_argument("--end", type=int, default=6000)
    parser.add_argument("--stretches", type=int, default=40)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    add_format_flags(parser)
    arguments = parser.parse_args()
    if arguments.plot:
        check_plotting()
    config = EngineConfig(model=arguments.model, cache=CacheConfig(prefix=False))  # every row reads its own context
    stretches = measure(
        read_format_flags(arguments).apply(config),
        rows=arguments.rows,
        start=arguments.start,
        end=arguments.end,
        stretches=arguments.stretches,
        text=arguments.text,
    )
    for stretch in stretches:
        print(
            f"context {stretch.context:6.0f}  gamma {stretch.gamma:4.2f}  off {stretch.share_off:4.0%}  "
            f"{stretch.tokens_per_second:6.1f} tokens/s  x plain {stretch.speedup:4.2f}, "
            f"predicted {stretch.predicted:4.2f}"
        )
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode(stretches))
    if arguments.plot:
        plot(stretches, arguments.plot)


if __name__ == "__main__":
    main()
