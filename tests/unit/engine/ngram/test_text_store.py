"""Text stores: what is written is what is found, and a file that cannot be used is named with the reason."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engine.ngram.context_array import ContextArray
from engine.ngram.text_store import SEPARATOR, StoreError, TextStore, build_store, fingerprint


def test_a_store_finds_what_its_texts_contain(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [[rng.randrange(20) for _ in range(rng.randrange(40))] for _ in range(30)]
    count = build_store(texts, "t", tmp_path / "s")
    whole = [token for text in texts for token in (*text, SEPARATOR)][:-1]
    assert count == len(whole)
    store, array = TextStore(tmp_path / "s", "t"), ContextArray.build(whole)
    assert store.num_tokens == count
    for _ in range(200):
        at = rng.randrange(3, count)
        context = whole[at - 3 : at]
        assert list(store.matches(context, 2, 16)) == list(array.matches(context, 2, 16))
    for at in range(count + 2):
        rest = whole[at : at + 5]
        assert store.following(at, 5) == tuple(rest[: rest.index(SEPARATOR)] if SEPARATOR in rest else rest)


@pytest.mark.parametrize("texts", [[], [[]], [[], []]])
def test_texts_without_tokens(texts: list[list[int]]) -> None:
    with pytest.raises(StoreError, match="no tokens"):
        build_store(texts, "t", Path("never-written"))
    assert not Path("never-written").exists()


def test_a_store_that_is_replaced_stays_readable(tmp_path: Path) -> None:
    """An engine that has the old file mapped goes on with it."""
    file = tmp_path / "s"
    build_store([list(range(50_000))], "t", file)
    old = TextStore(file, "t")
    build_store([[1, 2, 3]], "t", file)
    assert list(old.matches([40_000, 40_001], 2, 3)) == [(40_002, 2)]
    assert old.following(40_002, 1) == (40_002,)
    assert TextStore(file, "t").num_tokens == 3
    assert [each.name for each in tmp_path.iterdir()] == ["s"]


def test_a_store_is_for_all_users(tmp_path: Path) -> None:
    build_store([[1, 2, 3]], "t", tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o644


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "s"
    build_store([[1, 2, 3, 4]], "t", file)
    with pytest.raises(StoreError, match="another tokenizer"):
        TextStore(file, "u")
    with pytest.raises(StoreError, match="No such file"):
        TextStore(tmp_path / "none", "t")
    with pytest.raises(StoreError, match="Is a directory"):
        TextStore(tmp_path, "t")
    arrays = load_file(file)
    for name, content in {
        "empty": b"",
        "text": b"once upon a time, there was a file",
        "cut": file.read_bytes()[:-3],
        "huge header": b"\xff" * 16,
        "nested header": b"\x40\x0d\x03" + b"\0" * 5 + b"[" * 200_000,
    }.items():
        wrong = tmp_path / name
        wrong.write_bytes(content)
        with pytest.raises(StoreError, match="not a text store"):
            TextStore(wrong, "t")
    save_file(arrays, tmp_path / "weights")
    with pytest.raises(StoreError, match="not a text store"):
        TextStore(tmp_path / "weights", "t")
    save_file(arrays, tmp_path / "later", metadata={"kind": "magicdec text store 9", "tokenizer": "t"})
    with pytest.raises(StoreError, match="that this version reads"):
        TextStore(tmp_path / "later", "t")
    arrays["order"] = np.arange(9, dtype=np.int32)
    save_file(arrays, tmp_path / "uneven", metadata={"kind": "magicdec text store 1", "tokenizer": "t"})
    with pytest.raises(StoreError, match="not a text store"):
        TextStore(tmp_path / "uneven", "t")


def test_the_name_of_a_tokenizer_is_that_of_its_file(tmp_path: Path) -> None:
    one, other = tmp_path / "a", tmp_path / "b"
    one.write_text("{}")
    other.write_text("{ }")
    assert fingerprint(one) == fingerprint(one) != fingerprint(other)
