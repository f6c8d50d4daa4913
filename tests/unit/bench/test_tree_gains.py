"""Replays of texts with chains and trees of drafts from the text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bench.replay.draft_trees import LIMIT, Continuations, Node, VoteOdds, count_accepted
from bench.replay.tree_gains import replay, report
from engine.ngram.ngram_drafts import NgramDrafts
from engine.ngram.ngram_index import NgramIndex
from engine.ngram.text_store import TextStore, build_store
from tests.support.profiles import only_in_all

FORK = [1, 2, 3, 7, 1, 2, 4, 8, 1, 2, 3, 9, 1, 2]
"""After 1 2 came 3 twice, with 7 and with 9 behind it, and 4 once."""


def copied_text(seed: int, length: int) -> list[int]:
    """Make a text that repeats parts of itself, with changes."""
    rng = random.Random(seed)
    text = [rng.randrange(12) for _ in range(40)]
    while len(text) < length:
        begin = rng.randrange(len(text) - 8)
        text += [*text[begin : begin + rng.randrange(2, 9)], rng.randrange(12)]
    return text[:length]


def paths(nodes: list[Node]) -> set[tuple[int, ...]]:
    """List the tokens on the way to each node."""
    found: list[tuple[int, ...]] = []
    for node in nodes:
        found.append((*(found[node.parent] if node.parent >= 0 else ()), node.token))
    return set(found)


def test_a_small_tree() -> None:
    found, odds = Continuations(NgramIndex(FORK), FORK), VoteOdds()
    assert [node.token for node in found.tree(odds, 1, 3)] == [3, 9, 1]
    tree = found.tree(odds, 2, 100)
    assert {(3,), (4,), (3, 7), (3, 9), (4, 8), (4, 8, 1)} <= paths(tree)
    assert tree[0].token == 3
    assert all(node.parent < number for number, node in enumerate(tree))
    probabilities = [node.probability for node in tree]
    assert probabilities == sorted(probabilities, reverse=True)
    assert count_accepted(tree, [4, 8, 5]) == 2
    assert count_accepted(tree, [5, 3]) == 0
    assert count_accepted(tree, [3]) == 1


def test_descents_take_the_child_of_the_node_that_was_reached() -> None:
    nodes = [Node(3, -1, 0.8), Node(4, -1, 0.1), Node(5, 1, 0.1), Node(6, 0, 0.1)]
    assert [count_accepted(nodes, each) for each in ([3, 6], [4, 5], [3, 5], [4, 6], [])] == [2, 2, 1, 1, 0]


@pytest.mark.parametrize("seed", [0, 1, *map(only_in_all, range(2, 6))])
def test_a_chain_is_what_the_engine_proposes(seed: int) -> None:
    text = copied_text(seed, 300)
    index, own = NgramIndex(text[:150]), NgramIndex(text[:150])
    lengths = set()
    for known in range(150, 300):
        chain = Continuations(index, text[:known]).tree(VoteOdds(), 1, LIMIT)
        assert [node.token for node in chain] == NgramDrafts(12).propose(own, text[:known], LIMIT).tokens
        assert [node.parent for node in chain] == list(range(-1, len(chain) - 1))
        lengths.add(len(chain))
    assert LIMIT in lengths


@pytest.mark.parametrize("seed", [0, 1, *map(only_in_all, range(2, 6))])
def test_a_tree_accepts_no_less_than_a_chain_in_it(seed: int) -> None:
    text, odds, more = copied_text(seed, 300), VoteOdds(), 0
    index = NgramIndex(text[:150])
    for known in range(150, 290):
        found, following = Continuations(index, text[:known]), text[known:]
        chain, tree = found.tree(odds, 1, 4), found.tree(odds, 3, 60)
        reached = found.judge(odds, following)
        assert count_accepted(tree, following) <= reached
        if paths(chain) <= paths(tree):
            assert count_accepted(chain, following) <= count_accepted(tree, following)
            more += count_accepted(chain, following) < count_accepted(tree, following)
    assert more > 5


def test_odds_are_learnt() -> None:
    odds = VoteOdds()
    found = Continuations(NgramIndex(FORK), FORK)
    votes = found.votes(found.places, [])
    assert [vote.token for vote in votes] == [3, 4]
    before = [odds[vote.kind] for vote in votes]
    assert found.judge(odds, [4, 8, 5]) == 2
    after = [odds[vote.kind] for vote in votes]
    assert after[0] < before[0]
    assert after[1] > before[1]


def test_replays() -> None:
    prompt = copied_text(1, 200)
    texts = [(prompt, prompt[20:80])]
    free, dear = [1.0] * (LIMIT + 1), [1.0 + 2 * count for count in range(LIMIT + 1)]
    plain = replay(texts, free, 1, 0, False)
    assert (plain.tokens, plain.rounds, plain.seconds) == (59, 59, 59.0)  # the prefill yields the first
    chain = replay(texts, free, 1, LIMIT, False)
    assert chain.tokens == 59
    assert chain.rounds < 15
    one = replay(texts, dear, 1, 1, False)
    drafted = (one.seconds - one.rounds) / 2
    assert one.tokens - one.rounds <= drafted <= one.rounds
    best = replay(texts, dear, 1, LIMIT, True)
    assert (best.rounds, best.seconds) == (59, 59.0)  # no draft is worth two plain steps
    assert replay(texts, free, 0, 0, False).rounds <= chain.rounds


def test_a_store_offers_continuations_too(tmp_path: Path) -> None:
    build_store([copied_text(7, 100), [20, 21, 22, 23, 24], copied_text(8, 100)], "tokenizer", tmp_path / "store")
    store = TextStore(tmp_path / "store", "tokenizer")
    text = copied_text(9, 80)
    index, own = NgramIndex(text[:40]), NgramIndex(text[:40])
    lengths = set()
    for known in range(40, 80):
        chain = Continuations(index, text[:known], store).tree(VoteOdds(), 1, LIMIT)
        assert [node.token for node in chain] == NgramDrafts(25, store).propose(own, text[:known], LIMIT).tokens
        lengths.add(len(chain))
    assert LIMIT in lengths
    text = [*text, 21, 22]
    (first, second) = Continuations(index, text, store).tree(VoteOdds(), 3, LIMIT)  # the stored text ends
    assert (first.token, second.token) == (23, 24)


def test_reports() -> None:
    text = copied_text(3, 400)
    texts = [(text[:200], text[200:300]), (text[100:300], text[300:])]
    verify = {rows: [rows * (1 + drafts / 10) for drafts in range(LIMIT + 1)] for rows in (1, 2)}
    first, *lines = report("copy, 0", texts, verify, 3)
    assert first.split()[:5] == ["copy,", "0", "0", "1.00", "1.00"]
    assert [line.split()[0] for line in lines] == ["4", "8", "16", "best"]
    chain, tree = (replay(texts, verify[1], width, 4, False) for width in (1, 3))
    cells = [f"{each.tokens / each.rounds:.2f}" for each in (chain, tree)]
    cells += [f"{each.tokens / each.seconds:.1f}" for each in (chain, tree)]
    assert lines[0].split()[1:5] == cells
    assert [line.split()[3] for line in lines] == [line.split()[6] for line in lines]  # two rows take twice the time
    assert list(report("copy, 0", texts, verify, 3, hindsight=True))[1:] != lines
