"""Serve a mixed load of short chats and long documents with random arrivals, with speculation off, fixed and auto.

    python -m bench.offline.mixed --speculation off,3,auto --requests 24 --rate 0.5 --json mixed.json

The same requests arrive at the same times in every run. Runs alternate, `--repeats` times each, in one process that
loads the weights once. The results are the duration of the load and the latencies of requests. The prefix cache finds
nothing: each run has an engine of its own, in which prompts begin at different places of the text.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Literal

import msgspec

from bench.corpus import read_text
from bench.format_flags import add_format_flags, exits_on_error, read_format_flags
from engine.config.deployment import EngineConfig
from engine.config.speculation import SpeculationConfig
from engine.llm import LLM
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.worker.loading import load_target
from models.decoder import DecoderModel
from models.default import resolve_model
from models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    at: arrival, in seconds. first, prompt: start and length of its prompt in the text, in tokens. new: output tokens.
    """

    at: float
    first: int
    prompt: int
    new: int
    kind: Literal["chat", "document"]


@dataclass(slots=True)
class Outcome:
    """Measurements of one run of the whole load. Times in seconds.

    gammas: rows and rounds, by gamma. first: time to first token of each request, by kind. per_token: time per token of
    each request after its first output, by kind.
    """

    seconds: float
    tokens: int
    gammas: list[int]
    first: dict[str, list[float]] = field(default_factory=lambda: {"chat": [], "document": []})
    per_token: dict[str, list[float]] = field(default_factory=lambda: {"chat": [], "document": []})


def arrivals(count: int, rate: float, documents: float, longest: int, text: int, seed: int) -> list[Arrival]:
    """Draw Poisson arrivals.

    documents: share of requests with prompts of half to all of `longest` tokens; the others have 50 to 300. text:
    length of the text in tokens.
    """
    rng = random.Random(seed)
    at, found = 0.0, []
    for _ in range(count):
        at += rng.expovariate(rate)
        long = rng.random() < documents
        prompt = rng.randint(longest // 2, longest) if long else rng.randint(50, 300)
        found.append(
            Arrival(at, rng.randrange(text - prompt), prompt, rng.randint(40, 160), "document" if long else "chat")
        )
    return found


def run(config: EngineConfig, model: DecoderModel, load: Sequence[Arrival], text: Sequence[int]) -> Outcome:
    """Serve the load once, in real time."""
    with LLM(config, loaded=model) as llm:
        engine, todo = llm.engine, list(load)
        began = time.perf_counter()
        seen: dict[str, tuple[float, int]] = {}  # first token at, tokens since
        outcome = Outcome(0.0, 0, [])
        while todo or engine.has_work():
            now = time.perf_counter() - began
            while todo and todo[0].at <= now:
                arrival = todo.pop(0)
                index = load.index(arrival)
                prompt = list(text[arrival.first : arrival.first + arrival.prompt])
                params = SamplingParams(max_tokens=arrival.new, seed=index, temperature=0.7, ignore_eos=True)
                engine.add(AddRequest(str(index), prompt, params))
            if not engine.has_work():
                time.sleep(max(0.0, todo[0].at - now))
                continue
            for output in engine.step():
                now = time.perf_counter() - began
                arrival = load[int(output.id)]
                if output.id not in seen:
                    seen[output.id] = now, 0
                    outcome.first[arrival.kind].append(now - arrival.at)
                else:
                    first, count = seen[output.id]
                    seen[output.id] = first, count + len(output.tokens)
                if output.finish_reason is not None:
                    first, count = seen[output.id]
                    outcome.per_token[arrival.kind].append((now - first) / max(1, count))
        outcome.seconds = time.perf_counter() - began
        stats = engine.stats()
        outcome.tokens, outcome.gammas = stats.generated_tokens, stats.gamma_chosen
    return outcome


class Result(msgspec.Struct):
    """All runs with one value of --speculation. Times in seconds.

    load_s: mean duration of the load. runs_s: duration of each run. chat_first_s, document_first_s, chat_token_s,
    document_token_s: medians over requests; None without such requests. chat_slowest_s, document_slowest_s: largest
    times to first token. gamma_chosen: rows and rounds, by gamma.
    """

    speculation: str
    load_s: float
    runs_s: list[float]
    tokens_per_second: float
    chat_first_s: float | None
    chat_slowest_s: float | None
    document_first_s: float | None
    document_slowest_s: float | None
    chat_token_s: float | None
    document_token_s: float | None
    gamma_chosen: list[int]

    @classmethod
    def from_outcomes(cls, mode: str, runs: Sequence[Outcome]) -> Result:
        seconds = [one.seconds for one in runs]
        kinds = ("chat", "document")
        per_token = {kind: [s for one in runs for s in one.per_token[kind]] for kind in kinds}
        first = {kind: [s for one in runs for s in one.first[kind]] for kind in kinds}
        return cls(
            speculation=mode,
            load_s=mean(seconds),
            runs_s=seconds,
            tokens_per_second=sum(one.tokens for one in runs) / sum(seconds),
            chat_first_s=_median(first["chat"]),
            chat_slowest_s=max(first["chat"], default=None),
            document_first_s=_median(first["document"]),
            document_slowest_s=max(first["document"], default=None),
            chat_token_s=_median(per_token["chat"]),
            document_token_s=_median(per_token["document"]),
            gamma_chosen=[sum(counts) for counts in zip(*(one.gammas for one in runs), strict=True)],
        )


def _median(seconds: Sequence[float]) -> float | None:
    return median(seconds) if seconds else None


_MEASURES = {
    "load_s": "the load",
    "chat_first_s": "first token of a chat",
    "document_first_s": "first token of a document",
    "chat_token_s": "chat, per token",
    "document_token_s": "document, per token",
}


def report(results: Sequence[Result]) -> str:
    """Format results as text: a line each, then for each measure the best one and how much longer the others take."""
    lines = []
    for result in results:
        kinds = (
            ("chat", result.chat_first_s, result.chat_slowest_s, result.chat_token_s),
            ("document", result.document_first_s, result.document_slowest_s, result.document_token_s),
        )
        lines.append(
            f"{result.speculation:>5}: {result.load_s:6.1f} s for the load "
            f"({', '.join(f'{seconds:.1f}' for seconds in result.runs_s)}), "
            f"{result.tokens_per_second:5.1f} tokens/s"
            + "".join(
                f"; {kind}: first token {first:.2f} s, at most {slowest:.2f}, {1e3 * per_token:.0f} ms per token"
                for kind, first, slowest, per_token in kinds
                if first is not None and slowest is not None and per_token is not None
            )
            + f"; gamma {result.gamma_chosen}"
        )
    for name, what in _MEASURES.items():
        ranked = sorted((seconds, result.speculation) for result in results if (seconds := getattr(result, name)))
        if ranked:
            best, mode = ranked[0]
            others = ", ".join(f"{other} x {seconds / best:.2f}" for seconds, other in ranked[1:])
            lines.append(f"best for {what}: {mode}" + (f" ({others})" if others else ""))
    return "\n".join(lines)


@exits_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--speculation", default="off,3,auto")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--rate", type=float, default=0.5, help="arrivals per second")
    parser.add_argument("--documents", type=float, default=0.3, help="fraction of requests with long prompts")
    parser.add_argument("--longest", type=int, default=6000, help="tokens of the longest prompt")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", type=Path)
    add_format_flags(parser)
    arguments = parser.parse_args()

    flags = read_format_flags(arguments)
    base = flags.apply(EngineConfig(model=arguments.model))
    text = Tokenizer(resolve_model(base.model)).encode(read_text(arguments.text), add_special_tokens=False)
    model = load_target(base, progress=False)
    load = arrivals(
        arguments.requests, arguments.rate, arguments.documents, arguments.longest, len(text), arguments.seed
    )
    modes = [value.strip() for value in arguments.speculation.split(",")]
    outcomes: dict[str, list[Outcome]] = {mode: [] for mode in modes}
    for _ in range(arguments.repeats):
        for mode in modes:
            gamma = 0 if mode == "off" else mode if mode == "auto" else int(mode)
            speculation = SpeculationConfig.model_validate({"gamma": gamma})
            config = flags.apply(base.model_copy(update={"speculation": speculation}))
            outcomes[mode].append(run(config, model, load, text))
    results = [Result.from_outcomes(mode, runs) for mode, runs in outcomes.items()]
    print(report(results))
    if arguments.json:
        arguments.json.write_bytes(msgspec.json.encode(results))


if __name__ == "__main__":
    main()
