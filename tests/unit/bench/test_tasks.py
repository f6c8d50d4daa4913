"""Prompts of four kinds of work, and the costs of drafts from text."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.corpus import BenchError, read_text
from bench.micro.ngram import measure, table
from bench.tasks import TASKS, cutter, task_prompts
from engine.ngram.text_store import TextStore, build_store
from models.tokenizer import Tokenizer
from tests.support.profiles import is_all
from tests.support.tiny import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    return Tokenizer(directory)


@pytest.fixture(scope="module", autouse=True)
def few_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A library of a few files of Python's, which take less time to encode than all."""
    if is_all():
        yield
        return
    folder = tmp_path_factory.mktemp("library")
    for name in ("bisect.py", "heapq.py", "queue.py"):
        shutil.copy(Path(sysconfig.get_path("stdlib")) / name, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.tasks.sysconfig", SimpleNamespace(get_path=lambda name: str(folder)))
        yield


@pytest.mark.parametrize("task", TASKS)
def test_prompts_have_the_length_that_is_asked_for(tokenizer: Tokenizer, task: str) -> None:
    prompts = task_prompts(task, tokenizer, read_text(None)[:60_000], count=3, length=900)
    assert [len(prompt) for prompt in prompts] == [900] * 3
    assert len({tuple(prompt) for prompt in prompts}) == 3
    said = tokenizer.decode(prompts[0])
    begun = {"free": "", "summary": '\n\n"', "edit": "type annotations:\n\n", "json": "[\n{"}[task]
    assert begun in said
    if task == "edit":  # the new version begins as the file does
        file, _, version = said.partition("\n\nThe same file, with type annotations:\n\n")
        assert file.removeprefix("A file:\n\n").startswith(version)
        assert version
    if task == "json":
        rows = said.partition("\n\nid,name,city,year\n")[2]
        first = json.loads(said.partition("[\n")[2].partition(",\n")[0])
        assert rows.startswith(",".join(map(str, first.values())))


@pytest.mark.parametrize("task", TASKS[1:])
def test_prompts_without_room(tokenizer: Tokenizer, task: str) -> None:
    with pytest.raises(BenchError, match="no room"):
        task_prompts(task, tokenizer, read_text(None)[:60_000], count=1, length=60)


def test_costs_of_text_that_repeats_itself(tmp_path: Path) -> None:
    text = [*range(50)] * 40
    found = measure(text, 500, new=300, limit=8)
    assert found.context == 500
    assert found.accepted == pytest.approx(8, abs=0.3)
    assert found.bytes >= 8 * 500
    assert 0 < found.proposal_us <= found.slowest_us
    build_store([[*range(100, 400)]], "t", tmp_path / "s")
    store = TextStore(tmp_path / "s", "t")
    fresh = [*range(50), *range(100, 400)]
    assert measure(fresh, 53, new=200, limit=4, store=store).accepted > 3
    assert measure(fresh, 53, new=200, limit=4).accepted == 0
    assert "  500" in table([found])


def test_only_passages_begin_alike(tokenizer: Tokenizer) -> None:
    text = read_text(None)[:60_000]
    first, second = cutter("free", tokenizer, text)(2, 100, 40)
    assert first[:40] == second[:40]
    assert first[40:] != second[40:]
    edits = cutter("edit", tokenizer, text)
    assert edits(2, 900, 0) == task_prompts("edit", tokenizer, text, count=2, length=900)
    with pytest.raises(BenchError, match="--task free"):
        edits(2, 900, 40)
