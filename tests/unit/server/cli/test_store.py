"""`magicdec store build`."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.ngram.text_store import TextStore, fingerprint
from models.tokenizer import Tokenizer
from server.cli.app import app
from tests.support.tiny import write_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_tokenizer(directory)
    (directory / "config.json").write_text("{}")
    return directory


def build(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["store", "build", *map(str, arguments)])
    return done.exit_code, " ".join(done.output.replace("│", " ").split())


def test_texts_are_indexed(model: Path, tmp_path: Path) -> None:
    for name, text in (("a.txt", "the quick brown fox"), ("b.txt", "a stitch in time"), ("c.txt", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    texts = sorted(tmp_path.glob("*.txt"))
    out = tmp_path / "store"
    code, output = build(*texts, out, "--model", model)
    assert code == 0, output
    tokenizer = Tokenizer(model)
    store = TextStore(out, fingerprint(model / "tokenizer.json"))
    ids = tokenizer.encode("the quick brown fox", add_special_tokens=False)
    assert f"{store.num_tokens:,} tokens" in output
    assert list(store.following(0, len(ids))) == ids
    assert [at for at, same in store.matches(ids[:3], 3, 5)] == [3]


def test_a_file_is_replaced_only_by_force(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox")
    out = tmp_path / "store"
    out.write_text("mine")
    code, output = build(tmp_path / "a.txt", out, "--model", model)
    assert (code, out.read_text()) == (2, "mine")
    assert "--force" in output
    assert build(tmp_path / "a.txt", out, "--model", model, "--force")[0] == 0
    assert TextStore(out, fingerprint(model / "tokenizer.json")).num_tokens


def test_texts_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("größer".encode("latin-1"))
    for text, message in ((tmp_path / "latin", "not text in UTF-8"), (tmp_path / "none", "No such file")):
        code, output = build(text, tmp_path / "store", "--model", model)
        assert code == 2
        assert message in output
        assert not (tmp_path / "store").exists()
