"""Contexts of a text, sorted: matches are those that a search of the whole text finds."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.ngram.context_array import MAX_MATCH, ContextArray, pack_reversed, sort_contexts
from tests.support.profiles import examples

TEXTS = st.lists(st.integers(0, 3), max_size=60)
"""Of few different tokens, so that much repeats itself."""


def common(text: list[int], position: int, context: list[int]) -> int:
    """Count the last tokens that the context has in common with those before a position."""
    same = 0
    while same < min(MAX_MATCH, position, len(context)) and text[position - 1 - same] == context[-1 - same]:
        same += 1
    return same


@given(TEXTS)
@examples(100, 1000)
def test_contexts_are_sorted(text: list[int]) -> None:
    found = sort_contexts(pack_reversed(text)).tolist()
    backwards = text[::-1]
    # Equal contexts come from the end of the text to its beginning, which a stable sort keeps.
    assert found == sorted(range(len(text)), key=lambda i: backwards[i : i + MAX_MATCH])


@given(TEXTS, TEXTS.filter(bool), st.integers(1, 4), st.integers(1, 70))
@examples(200, 2000)
def test_matches(text: list[int], context: list[int], minimum: int, limit: int) -> None:
    array = ContextArray.build(text)
    found = list(array.matches(context, minimum, limit))
    expected = {at: common(text, at, context) for at in range(1, len(text))}
    assert len(dict(found)) == len(found)
    assert all(expected[at] == same >= minimum for at, same in found)
    longest = max(expected.values(), default=0)
    if longest >= minimum:
        assert max(same for _, same in found) == longest
    if limit > len(text):
        assert dict(found) == {at: same for at, same in expected.items() if same >= minimum}
    for at, _ in found:
        assert array.tokens(at, 3) == tuple(text[at : at + 3])


@pytest.mark.parametrize("tokens", [[], [7]])
def test_texts_that_are_too_short(tokens: list[int]) -> None:
    assert list(ContextArray.build(tokens).matches([7, 7], 1, 5)) == []


def test_tokens_of_all_sizes() -> None:
    """Tokens compare as numbers, whatever their bytes."""
    rng = random.Random(0)
    text = [rng.choice([0, 1, 255, 256, 65535, 65536, 2**31, 2**32 - 2]) for _ in range(300)]
    array = ContextArray.build(np.array(text))
    for position in range(20, 300):
        found = dict(array.matches(text[:position], 16, 300))
        assert found[position] == 16
    assert array.num_bytes == 8 * 300
