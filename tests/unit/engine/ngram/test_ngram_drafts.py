"""Proposals from the text: places that match longest decide, then their number and age."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from engine.ngram.ngram_drafts import NgramDrafts, Proposal
from engine.ngram.ngram_index import MAX_PLACES, MIN_MATCH, NgramIndex
from engine.ngram.text_store import TextStore, build_store
from tests.support.profiles import examples

VOCAB = 10


def propose(tokens: list[int], limit: int = 8, prompt: int | None = None, store: TextStore | None = None) -> Proposal:
    """prompt: number of tokens that are indexed at once; the others one by one."""
    index = NgramIndex(tokens[: len(tokens) if prompt is None else prompt])
    return NgramDrafts(VOCAB, store).propose(index, tokens, limit)


def test_what_followed_is_proposed() -> None:
    assert propose([1, 2, 3, 4, 5, 9, 1, 2]) == Proposal([3, 4, 5, 9, 1, 2, 3, 4], 2)
    assert propose([1, 2, 3, 4, 5, 9, 1, 2], limit=2) == Proposal([3, 4], 2)
    assert propose([1, 2, 3, 4, 5, 9, 1, 2], limit=0) == Proposal()


def test_nothing_is_proposed_without_a_match() -> None:
    assert propose([1, 2, 3, 4]) == Proposal()
    assert propose([1]) == Proposal()
    assert propose([]) == Proposal()
    assert propose([2, 1, 1]) == Proposal()  # a single token is no match


def test_the_longest_match_decides() -> None:
    """Three places after 1, 2 continue with 7, one after 5, 1, 2 with 8."""
    text = [1, 2, 7, 0, 1, 2, 7, 3, 5, 1, 2, 8, 9, 1, 2, 7, 6, 5, 1, 2]
    assert propose(text, 1) == Proposal([8], 3)


def test_the_number_of_places_decides_between_equal_matches() -> None:
    assert propose([1, 2, 7, 3, 1, 2, 7, 4, 1, 2, 8, 5, 1, 2], 1).tokens == [7]


def test_the_newest_place_decides_between_equal_numbers() -> None:
    text = [1, 2, 7, 3, 1, 2, 8, 5, 1, 2]
    assert propose(text, 1, prompt=0).tokens == [8]


def test_a_repetition_goes_on() -> None:
    assert propose([4, 5, 6] * 3, 8) == Proposal([4, 5, 6, 4, 5, 6, 4, 5], 6)


@given(st.lists(st.integers(0, 4), max_size=50), st.integers(0, 50), st.integers(1, 12))
@examples(200, 2000)
def test_prompt_and_output_are_one_text(text: list[int], prompt: int, limit: int) -> None:
    """The longest match is the same wherever the prompt ends, and tokens are those that followed a place."""
    whole, cut = propose(text, limit), propose(text, limit, prompt)
    expected = 0
    for at in range(MIN_MATCH, len(text)):
        same = 0
        while same < min(16, at) and text[at - 1 - same] == text[len(text) - 1 - same]:
            same += 1
        expected = max(expected, same)
    found = max(
        (same for _, same in NgramIndex(text).matches(text)),
        default=0,
    )
    assert found == (expected if expected >= MIN_MATCH else 0)
    for proposal in (whole, cut):
        assert bool(proposal.tokens) == (expected >= MIN_MATCH)
        assert len(proposal.tokens) in (0, limit)
        if proposal.tokens:
            assert MIN_MATCH <= proposal.match <= expected
            pairs = {(text[i - 2], text[i - 1], text[i]) for i in range(2, len(text))}
            assert (*text[-2:], proposal.tokens[0]) in pairs


def test_an_index_follows_the_text() -> None:
    """One token after another gives the same places as all at once."""
    rng = random.Random(1)
    text = [rng.randrange(6) for _ in range(400)]
    index = NgramIndex(text[:100])
    for end in range(101, 401):
        index.update(text[:end])
    again = NgramIndex(text[:100])
    again.update(text)
    assert list(index.matches(text)) == list(again.matches(text))
    assert index.num_tokens == 400
    assert index.num_bytes > again._prompt.num_bytes


def test_places_are_bounded() -> None:
    text = [1, 2] * 5000
    index = NgramIndex(text[:5000])
    index.update(text)
    assert len(list(index.matches(text))) <= 3 * MAX_PLACES


def test_a_store_proposes_too(tmp_path: Path) -> None:
    file = tmp_path / "store"
    build_store([[5, 6, 7, 8, 9], [5, 6, 1]], "t", file)
    store = TextStore(file, "t")
    assert propose([0, 6, 7], 9, store=store) == Proposal([8, 9], 2)  # up to the end of the text
    assert propose([5, 6, 7, 3, 0, 5, 6, 7], 2, store=store).match == 3
    assert propose([4, 3], 2, store=store) == Proposal()


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    """A store of a tokenizer with more tokens than the model proposes none of these."""
    build_store([[5, 6, VOCAB, 7], [5, 6, 8, VOCAB]], "t", tmp_path / "store")
    assert propose([5, 6], 3, store=TextStore(tmp_path / "store", "t")) == Proposal([8], 2)
