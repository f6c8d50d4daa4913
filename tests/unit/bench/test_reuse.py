"""Conversations that are replayed with and without speculation and prefix cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bench.corpus import BenchError
from bench.offline import reuse
from bench.offline.reuse import Replay, Turn, compose, differences, possible_hits, report
from tests.support.profiles import is_all
from tests.support.tiny import write_model


def lengths(load: list[Turn]) -> list[int]:
    found: list[int] = []
    for turn in load:
        begins = 0
        if turn.parent is not None:
            begins = found[turn.parent] + load[turn.parent].answer if turn.kept is None else turn.kept
        found.append(begins + len(turn.new))
    return found


def test_a_load_has_all_kinds() -> None:
    text = list(range(5000))
    load = compose(text, 240, rows=8, longest=900, seed=3)
    assert load == compose(text, 240, rows=8, longest=900, seed=3) != compose(text, 240, rows=8, longest=900, seed=4)
    assert len(load) == 240
    assert [turn.wave for turn in load] == [number // 8 for number in range(240)]
    assert all(length + turn.answer <= 900 for length, turn in zip(lengths(load), load, strict=True))
    parents = [turn.parent for turn in load if turn.parent is not None]
    assert all(load[turn.parent].wave < turn.wave for turn in load if turn.parent is not None)
    going_on = [turn for turn in load if turn.parent is not None and turn.kept is None]
    again = [turn for turn in load if turn.kept is not None and not turn.new]
    edited = [turn for turn in load if turn.kept is not None and turn.new]
    assert min(len(going_on), len(again), len(edited)) > 10
    assert len(parents) > len(set(parents)) + 10  # several turns after one
    begun = [turn for turn in load if turn.parent is None]
    assert {tuple(turn.new[:160]) for turn in begun} == {tuple(text[:160]), tuple(text[1000:1160])}


def test_a_length_that_is_too_short() -> None:
    with pytest.raises(BenchError, match="conversations take 556 tokens"):
        compose(list(range(5000)), 8, rows=8, longest=500, seed=0)


def test_possible_hits() -> None:
    """Pages of 4: a prompt of 10 tokens and its answer of 4 leave 3 whole pages, the pending token not among them."""
    load = [
        Turn(0, None, None, list(range(10)), 4),
        Turn(0, None, None, [*range(8), 90, 91], 4),  # after the first two pages, another text
        Turn(1, 0, None, [50, 51], 4),  # the whole history
        Turn(1, 0, 10, [], 4),  # the same prompt again
        Turn(1, 0, 8, [], 4),  # the last page has the last token, which is computed
    ]
    prompts = [list(range(10)), [*range(8), 90, 91], [*range(10), 20, 21, 22, 23, 50, 51], list(range(10))]
    prompts.append(list(range(8)))
    replay = Replay("", prompts=prompts, texts=[[20, 21, 22, 23], [7] * 4, [7] * 4, [7] * 4, [7] * 4])
    assert possible_hits(load, replay, 4) == 0 + 8 + 12 + 8 + 4


def test_what_differs() -> None:
    first = Replay("off", prompts=[[1] * 8] * 2, texts=[[1], [2]], cached=[0, 16], queries=40, hits=16)
    assert differences([first, replace(first, name="3")]) == []
    assert differences([first, replace(first, name="no cache", prefix=False, cached=[0, 0], queries=0, hits=0)]) == []
    (line,) = differences([first, replace(first, name="3", texts=[[1], [3]])])
    assert line == "3: 1 texts differ from those of off"
    (line,) = differences([first, replace(first, name="3", cached=[16, 0])])
    assert line.startswith("3: 2 requests have other hits than with off")
    (line,) = differences([first, replace(first, name="3", queries=0, hits=0)])
    assert "0 tokens of 0 and not 16 of 40" in line
    text = report([first, replace(first, name="3")], 8)
    assert "8 prompt tokens (50.0%) possible" in text
    assert "off: 40 queries, 16 hits (40.00%)" in text
    assert "hits are the same in every run" in text


def test_one_replay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, book = write_model(tmp_path / "model", max_model_len=700), tmp_path / "book"
    book.write_text("the quick brown fox jumps over the lazy dog. größer. " * 200, encoding="utf-8")
    flags = ["--model", str(model), "--dtype", "float64", "--text", str(book), "--longest", "600"]
    count = 20 if is_all() else 8
    reuse.main([*flags, "--requests", str(count), "--rows", "4", "--speculation", "off,3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{count} requests, ")
    assert [line.partition(":")[0].strip() for line in lines[1:4]] == [
        "speculation off",
        "speculation 3",
        "speculation off, no cache",
    ]
    assert lines[3].partition(": ")[2].startswith("0 queries, 0 hits")
    assert lines[4] == "hits are the same in every run with the cache, and texts in all runs"
    with pytest.raises(SystemExit, match="error: "):
        reuse.main([*flags, "--speculation", "many"])
