"""Estimate what trees of drafts from the text would bring over chains.

    python -m bench.replay.tree_gains --task edit json --temperature 0 0.8 --text FILE

The engine generates texts, which drafts do not change. Each is then replayed over the index of its own tokens: a round
drafts, accepts what the text goes on with, and yields one more token. A chain is what the engine proposes
(engine.ngram.ngram_drafts). A tree has several continuations of a node (bench.replay.draft_trees): those with the most
votes, and the nodes that are most probable to be accepted, by odds that are learnt along the way. Speeds are those of
the verify passes of a start-up profile, in which a node of a tree is assumed to cost as much as a draft of a chain.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.corpus import BenchError, read_text
from bench.format_flags import exits_on_error
from bench.machine import describe_processor
from bench.replay.draft_trees import LIMIT, Continuations, VoteOdds, count_accepted
from bench.replay.replayed_texts import add_text_flags, check_text_flags, read_samples, texts_to_write
from engine.config.deployment import EngineConfig
from engine.control.step_times import StepTimes
from engine.llm import LLM
from engine.ngram.ngram_index import NgramIndex
from engine.ngram.text_store import TextStore, fingerprint
from models.default import resolve_model

BATCHES = (1, 2, 4)
"""Rows of the batches whose speed is predicted."""
Texts = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompt and output of each."""


@dataclass(slots=True)
class Gain:
    """Outcome of replays. seconds: of their verify passes, if each row of a batch drafts as much."""

    tokens: int = 0
    rounds: int = 0
    seconds: float = 0.0


def replay(
    texts: Texts,
    verify_s: Sequence[float],
    width: int,
    limit: int,
    best: bool,
    store: TextStore | None = None,
    odds: VoteOdds | None = None,
) -> Gain:
    """Replay texts, one after another, with trees of up to `width` children.

    verify_s: seconds of a verify pass by drafts per row, from 0. limit: nodes of a tree. width: 0 for all
    continuations, whatever their number. best: draft the first nodes that have the most expected tokens per second, and
    not all. odds: learnt so far; None: none are.
    """
    gain, odds = Gain(), odds or VoteOdds()
    for prompt, output in texts:
        index, text, known = NgramIndex(prompt), [*prompt, *output], len(prompt) + 1  # the prefill yields a token
        while known < len(text):
            found, following = Continuations(index, text[:known], store), text[known:]
            nodes = found.tree(odds, width, min(limit, len(following) - 1)) if width else []
            if best:
                expected, rates = 1.0, [1 / verify_s[0]]
                for number, node in enumerate(nodes, 1):
                    expected += node.probability
                    rates.append(expected / verify_s[number])
                nodes = nodes[: rates.index(max(rates))]
            reached = found.judge(odds, following)
            accepted = count_accepted(nodes, following) if width else min(reached, len(following) - 1)
            known += accepted + 1
            gain.tokens += accepted + 1
            gain.rounds += 1
            gain.seconds += verify_s[len(nodes)]
    return gain


def report(
    name: str,
    texts: Texts,
    verify: Mapping[int, list[float]],
    width: int,
    store: TextStore | None = None,
    hindsight: bool = False,
) -> Iterator[str]:
    """Format the lines of one task. verify: `verify_s` of `replay` by rows of a batch. hindsight: learn the odds from
    the same texts first."""

    def gain(times: Sequence[float], width: int, limit: int, best: bool) -> Gain:
        odds = VoteOdds()
        if hindsight:
            replay(texts, times, width, limit, best, store, odds)
        return replay(texts, times, width, limit, best, store, odds)

    every = gain(verify[1], 0, 0, False)
    off = "".join(f"{rows / times[0]:>8.1f}{'':>12}" for rows, times in verify.items())
    yield f"{name:<14}{'0':>5}{1:>8.2f}{1:>7.2f}{off}  all continuations: {every.tokens / every.rounds:.2f}"
    for limit, best in ((4, False), (8, False), (LIMIT, False), (LIMIT, True)):
        gains = [[gain(times, each, limit, best) for each in (1, width)] for times in verify.values()]
        line = f"{'':<14}{'best' if best else limit:>5}"
        line += "{:>8.2f}{:>7.2f}".format(*(each.tokens / each.rounds for each in gains[0]))
        for rows, pair in zip(verify, gains, strict=True):
            chain, tree = (rows * each.tokens / each.seconds for each in pair)
            line += f"{chain:>8.1f}{tree:>6.1f}{tree / chain:>6.2f}"
        yield line


@exits_on_error()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_flags(parser, rows=1, new_tokens=128)
    parser.add_argument("--width", type=int, default=3, help="largest number of continuations of a node")
    parser.add_argument("--store", type=Path, help="text store to search in addition")
    parser.add_argument("--hindsight", action="store_true", help="learn the odds from the same texts first")
    given = parser.parse_args(arguments)
    check_text_flags(given)
    if given.width < 1:
        raise BenchError("--width must be at least 1")
    fields = {"model": given.model, "speculation": {"drafter": "ngram", "gamma": LIMIT}}
    config, source = EngineConfig.model_validate(fields | {"scheduler": {"max_rows": 4}}), read_text(given.text)
    tokenizer = resolve_model(given.model) / "tokenizer.json"
    store = TextStore(given.store, fingerprint(tokenizer)) if given.store else None
    with LLM(config) as llm:
        times, counts = (
            StepTimes(read_samples(given, llm.engine, config), lambda context, budget: context),
            range(LIMIT + 1),
        )
        verify = {rows: times.verify(rows, rows * given.context, counts) for rows in BATCHES}
        print(f"{'task, T':<14}nodes   tokens/round" + "".join(f"{f'tok/s, rows: {rows}':>20}" for rows in BATCHES))
        print(f"{'':<19}{'chain':>8}{'tree':>7}" + f"{'chain':>8}{'tree':>6}{'ratio':>6}" * len(BATCHES))
        for task, temperature, prompts, params in texts_to_write(given, source, llm.tokenizer):
            outputs = [each.token_ids for each in llm.generate(prompts, params)]
            texts = list(zip(prompts, outputs, strict=True))
            name = f"{task}, {temperature:g}"
            print("\n".join(report(name, texts, verify, given.width, store, given.hindsight)), flush=True)
    for rows, seconds in verify.items():
        print(f"verify pass of {rows} rows, ms, by drafts per row from 0: {[round(1e3 * each) for each in seconds]}")
    print(describe_processor())


if __name__ == "__main__":
    main()
