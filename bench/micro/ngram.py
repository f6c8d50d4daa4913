"""Measure what drafts from the text cost the host: time to index a prompt, time of a proposal, memory.

    python -m bench.micro.ngram --text FILE --store FILE

A prompt is a passage of the text. The passage goes on, a few tokens at a time, as a request's output does; each time
drafts are proposed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter

from bench.corpus import BenchError, read_text
from bench.format_flags import exits_on_error
from bench.machine import describe_processor
from engine.ngram.ngram_drafts import NgramDrafts
from engine.ngram.ngram_index import NgramIndex
from engine.ngram.text_store import TextStore, fingerprint
from models.default import resolve_model
from models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class NgramCosts:
    """Costs at one context. index_ms: of the prompt. proposal_us, slowest_us: median and 99th percentile. bytes: of the
    index, with the output. accepted: drafts per proposal that the text goes on with."""

    context: int
    index_ms: float
    proposal_us: float
    slowest_us: float
    bytes: int
    accepted: float


def measure(
    tokens: Sequence[int], context: int, *, new: int, limit: int, store: TextStore | None = None, repeats: int = 3
) -> NgramCosts:
    """Measure a prompt of `context` tokens whose output is the next `new` ones. limit: largest number of drafts."""
    prompt, text = list(tokens[:context]), list(tokens[: context + new])
    indexing = []
    for _ in range(repeats):
        began = perf_counter()
        index = NgramIndex(prompt)
        indexing.append(perf_counter() - began)
    drafts, known, seconds, accepted = NgramDrafts(max(tokens) + 1, store), context, [], 0
    current = prompt[:]
    while known < len(text):
        began = perf_counter()
        proposal = drafts.propose(index, current, limit)
        seconds.append(perf_counter() - began)
        same = 0
        for a, b in zip(proposal.tokens, text[known:], strict=False):
            if a != b:
                break
            same += 1
        accepted += same
        known = min(len(text), known + same + 1)
        current += text[len(current) : known]
    slowest = quantiles(seconds, n=100)[-1] if len(seconds) > 1 else seconds[0]
    return NgramCosts(
        context, 1e3 * min(indexing), 1e6 * median(seconds), 1e6 * slowest, index.num_bytes, accepted / len(seconds)
    )


def table(costs: Sequence[NgramCosts]) -> str:
    lines = ["   context   index ms   proposal us      p99 us   MB per request   accepted"]
    for each in costs:
        lines.append(
            f"{each.context:>10}{each.index_ms:>11.1f}{each.proposal_us:>14.1f}{each.slowest_us:>12.1f}"
            f"{each.bytes / 1e6:>17.2f}{each.accepted:>11.2f}"
        )
    return "\n".join(lines)


@exits_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="model whose tokenizer is used")
    parser.add_argument("--contexts", default="1000,8000,100000", help="prompt tokens, comma-separated")
    parser.add_argument("--new-tokens", type=int, default=2000, help="output tokens")
    parser.add_argument("--limit", type=int, default=16, help="drafts of a proposal")
    parser.add_argument("--text", type=Path, help="take the text from this file instead of Python's manual")
    parser.add_argument("--repeat", type=int, default=0, help="repeat so many tokens of the text, again and again")
    parser.add_argument("--store", type=Path, help="text store to search in addition")
    given = parser.parse_args(arguments)
    model = resolve_model(given.model)
    tokens = Tokenizer(model).encode(read_text(given.text), add_special_tokens=False)
    store = TextStore(given.store, fingerprint(model / "tokenizer.json")) if given.store else None
    contexts = [int(part) for part in given.contexts.split(",")]
    if min(contexts, default=0) < 1 or given.new_tokens < 2 or given.limit < 1:
        raise BenchError("--contexts and --limit must be at least 1, --new-tokens at least 2")
    if given.repeat > 0:
        tokens = tokens[: given.repeat] * -(-(max(contexts) + given.new_tokens) // given.repeat)
    if max(contexts) + given.new_tokens > len(tokens):
        raise BenchError(f"the text has {len(tokens)} tokens, too few for the longest context")
    costs = [measure(tokens, context, new=given.new_tokens, limit=given.limit, store=store) for context in contexts]
    print(table(costs))
    print(f"{describe_processor()}; drafts of up to {given.limit} tokens")


if __name__ == "__main__":
    main()
