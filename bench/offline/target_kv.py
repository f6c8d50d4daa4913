"""Measure what a target that reads part of its KV loses and gains, by budget, beside the dense target.

    python -m bench.offline.target_kv --text book.txt

Perplexity: of real text after a prompt, which is fed as if the target had written it. Divergence: the first token of
greedy text that is not the dense target's. Speed: of plain decoding, all targets in turns within one run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from bench.corpus import BenchError, passages, read_text
from bench.format_flags import add_format_flags
from bench.offline.interleave import Contender, run_turns, scheduler_for_batch
from engine.batch.row_state import RowState
from engine.config.deployment import ConfigError, EngineConfig, describe
from engine.params import SamplingParams
from engine.plan import PageDelta, RoundPlan, RowStart
from engine.worker.build import make_target
from engine.worker.loading import load_target
from kernels.ragged import Ints
from models.decoder import DecoderModel
from models.default import resolve_model
from models.tokenizer import Tokenizer

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class TargetResult:
    """Result of one budget; None: the dense target.

    lost, error: nats per token more than the dense target's, and the standard error of that. first_differences: number
    of greedy tokens of each row before one that differs from the dense target's; None: none differs. compared: tokens
    of each row that were compared. kv_tokens: KV tokens read per output token.
    """

    budget: int | None
    perplexity: float
    lost: float
    error: float
    first_differences: list[int | None]
    compared: int
    tokens_per_second: float
    speedup: float
    kv_tokens: float


@torch.inference_mode()
def logprobs(config: EngineConfig, model: DecoderModel, text: Sequence[int], num_prompt: int) -> Tensor:
    """Compute the log-probability of each token that follows one after the prompt: [len(text) - num_prompt - 1].

    config: the deployment, of one rank; its target_kv counts. num_prompt: number of the text's first tokens that are
    its prompt, and are read as one.
    """
    page, device = config.cache.page_size, model.device
    width = -(-len(text) // page)
    state = RowState(max_rows=1, max_model_len=len(text), page_size=page, device=device, ops=model.ops)
    start = RowStart(0, list(text), num_prompt, SamplingParams(), [])
    state.apply(RoundPlan(0, [start], [PageDelta(0, 0, list(range(width)))], []))
    runner = make_target(config, model, state, width, width)
    tokens, parts = torch.tensor(text, device=device), []
    for first, last in _chunks(num_prompt, len(text) - 1):
        count, is_prompt = last - first, first < num_prompt
        index = np.arange(0 if is_prompt else count)
        inputs = state.forward_inputs(_one(0), _one(0), _one(first), _one(count), runner.view, index)
        logits = runner.forward(inputs)
        if not is_prompt:
            parts.append(logits.float().log_softmax(-1).gather(-1, tokens[first + 1 : last + 1, None])[:, 0])
    return torch.cat(parts).cpu()


def _chunks(num_prompt: int, end: int) -> list[tuple[int, int]]:
    """Cut positions into chunks, none of which has some of the prompt's and some after them."""
    firsts = [*range(0, num_prompt, _CHUNK), *range(num_prompt, end, _CHUNK)]
    return list(zip(firsts, [*firsts[1:], end], strict=True))


def _one(value: int) -> Ints:
    return np.array([value], dtype=np.int64)


def with_target(config: EngineConfig, target: dict[str, Any] | None) -> EngineConfig:
    """Return `config` without speculation and prefix cache, and with this target_kv. Raises ConfigError."""
    fields = config.model_dump() | {"target_kv": target, "speculation": {"gamma": 0}}
    fields["cache"]["prefix"] = False  # passages of a short text overlap, and each row must compute its own
    try:
        return EngineConfig.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(describe(error)) from None


def measure(
    config: EngineConfig,
    budgets: Sequence[int],
    texts: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    *,
    num_prompt: int,
    new_tokens: int,
    target: dict[str, Any],
) -> list[TargetResult]:
    """Measure the dense target, then each budget.

    texts: for perplexity; num_prompt: number of their first tokens that are prompts. prompts: rows to decode after, all
    of one length. new_tokens: number per row and target. target: settings of target_kv but for its budget. Raises
    BenchError, ConfigError.
    """
    if not 1 <= num_prompt <= min(map(len, texts)) - 2:
        raise BenchError(f"a prompt of {num_prompt} tokens leaves nothing to predict of {min(map(len, texts))}")
    listed = [None, *({**target, "budget": budget} for budget in budgets)]
    configs = [with_target(config, each) for each in listed]
    model = load_target(configs[0], progress=False)
    scores = [torch.cat([logprobs(each, model, text, num_prompt) for text in texts]).double() for each in configs]
    contenders = _decode(configs, model, prompts, new_tokens)
    dense, results = contenders[0], []
    interval = max((each.target_kv.interval for each in configs if each.target_kv is not None), default=1)
    compared = min(len(text) for each in contenders for text in each.texts.values())
    for budget, contender, values in zip([None, *budgets], contenders, scores, strict=True):
        rounds, change = contender.rounds[0], scores[0] - values
        speed, dense_speed = (
            mean(each.rounds[0].tokens) / typical_seconds(each.rounds[0].seconds, interval)
            for each in (contender, dense)
        )
        results.append(
            TargetResult(
                budget=budget,
                perplexity=math.exp(-float(values.mean())),
                lost=float(change.mean()),
                error=float(change.std()) / len(change) ** 0.5,
                first_differences=[
                    _first_difference(dense.texts[row][:compared], text[:compared])
                    for row, text in contender.texts.items()
                ],
                compared=compared,
                tokens_per_second=speed,
                speedup=speed / dense_speed,
                kv_tokens=rounds.total.kv_tokens_read / rounds.total.generated_tokens,
            )
        )
    return results


def typical_seconds(rounds: Sequence[float], interval: int) -> float:
    """Return the typical seconds of a round: the median over stretches of `interval` rounds, in each of which a row
    chooses once. rounds: seconds of each, in order."""
    stretches = [rounds[first : first + interval] for first in range(0, len(rounds) - interval + 1, interval)]
    return median(map(mean, stretches or [rounds]))


def _decode(
    configs: Sequence[EngineConfig], model: DecoderModel, prompts: Sequence[Sequence[int]], new_tokens: int
) -> list[Contender]:
    """Decode greedily with an engine for each config, in turns."""
    contenders: list[Contender] = []
    with ExitStack() as stack:
        for config in configs:
            scheduler = scheduler_for_batch(config.scheduler, len(prompts), 0)
            contender = Contender(config.model_copy(update={"scheduler": scheduler}), model, 0, False)
            stack.callback(contender.engine.close)
            contenders.append(contender)
            contender.prefill(prompts, 1, 0, new_tokens, 0, 0.0)
        run_turns([(contender, 0) for contender in contenders], new_tokens * len(prompts), 0)
    return contenders


def _first_difference(expected: Sequence[int], found: Sequence[int]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b), None)


def table(results: Sequence[TargetResult]) -> str:
    """Format results as a text table."""
    head = ("target", "perplexity", "nats lost", "+-", "tok/s", "x dense", "KV/tok", "rows part", "median at")
    lines = ["".join(f"{name:>12}" for name in head)]
    for result in results:
        parted = [place for place in result.first_differences if place is not None]
        cells = (
            "dense" if result.budget is None else str(result.budget),
            f"{result.perplexity:.3f}",
            f"{result.lost:.4f}",
            f"{result.error:.4f}",
            f"{result.tokens_per_second:.1f}",
            f"{result.speedup:.2f}",
            f"{result.kv_tokens:.0f}",
            f"{len(parted)} of {len(result.first_differences)}",
            f"{median(parted):.0f}" if parted else "-",
        )
        lines.append("".join(f"{cell:>12}" for cell in cells))
    lines.append(
        f"rows part: greedy rows with a token within {results[0].compared} that is not the dense target's, and "
        "the median place of the first one"
    )
    return "\n".join(lines)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--budgets", type=_numbers, default="512,1024,2048", help="KV tokens that are chosen, comma-separated"
    )
    parser.add_argument("--interval", type=int, default=4, help="positions that read the same choice")
    parser.add_argument("--heads", help="file of `magicdec profile heads`")
    parser.add_argument("--passages", type=int, default=8, help="texts whose perplexity is measured")
    parser.add_argument(
        "--context", type=int, default=7500, help="tokens of each of them, and of prompts to decode after"
    )
    parser.add_argument(
        "--prompt", type=int, default=5500, help="tokens of --context that are a prompt, for perplexity"
    )
    parser.add_argument("--rows", type=int, default=4, help="rows that decode")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to decode per row and target")
    parser.add_argument("--text", type=Path, help="text to read instead of Python's manual")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    add_format_flags(parser, drafts=False, kv=False)  # such a target reads dense KV
    arguments = parser.parse_args()
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: {arguments.json.parent} is not a directory")

    fields = {"model": arguments.model, "device": arguments.device, "dtype": arguments.dtype}
    fields |= {"threads": arguments.threads, "weights": arguments.weights}
    config = with_target(EngineConfig.model_validate(fields), None)
    if config.threads:
        torch.set_num_threads(config.threads)
    tokenizer, prose = Tokenizer(resolve_model(config.model)), read_text(arguments.text)
    results = measure(
        config,
        arguments.budgets,
        passages(tokenizer, prose, count=arguments.passages, length=arguments.context),
        passages(tokenizer, prose, count=arguments.rows, length=arguments.context),
        num_prompt=arguments.prompt,
        new_tokens=arguments.new_tokens,
        target={"policy": "quest", "interval": arguments.interval, "heads": arguments.heads},
    )
    print(table(results))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
