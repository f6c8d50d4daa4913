"""The whole command line: an expected error prints one message; any other exception is a bug and shows its
traceback."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.config.deployment import ConfigError
from models.config import ModelError
from server.cli import is_expected, main, repeated
from tests.support.paths import ROOT
from tests.support.profiles import whole_test_only_in_all
from tests.support.tiny import write_model


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["magicdec", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_help_lists_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    commands = ("serve", "generate", "plan", "make-draft", "bench", "fetch", "convert", "quantize")
    assert all(f" {command} " in said for command in commands)


def test_expected_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "convert", str(tmp_path / "absent"), str(tmp_path / "new")) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == f"error: {tmp_path / 'absent'}: no such file or directory\n"


def test_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "convert", "only-one") == 2
    assert run(monkeypatch, "no-such-command") == 2
    assert "no-such-command" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "expected"), [([], "stored"), (["--weights", "dense"], "dense")])
def test_weights_that_a_conversion_keeps(
    flags: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Path, Path, bool, str]] = []

    def convert(src: Path, dst: Path, *, force: bool, weights: str) -> None:
        asked.append((src, dst, force, weights))

    monkeypatch.setattr("models.conversion.convert.convert", convert)
    assert run(monkeypatch, "convert", "a.gguf", "b", *flags) == 0
    assert asked == [(Path("a.gguf"), Path("b"), False, expected)]
    assert type(asked[0][3]) is str
    assert run(monkeypatch, "convert", "a.gguf", "b", "--weights", "int4") == 2


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(src: Path, dst: Path, *, force: bool, weights: str) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("models.conversion.convert.convert", broken)
    monkeypatch.setattr(sys, "argv", ["magicdec", "convert", "a", "b"])
    with pytest.raises(ValueError, match="a bug"):
        main()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigError("x"), True),
        (ModelError("x"), True),
        (FileNotFoundError(2, "No such file", "x.yaml"), True),
        (ValueError("x"), False),
        (UnicodeError("x"), False),
        (OSError("x"), False),
        (RuntimeError("x"), False),
    ],
)
def test_what_is_expected(error: Exception, expected: bool) -> None:
    assert is_expected(error) is expected


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from server.cli import main
sys.argv = ["magicdec", "--help"]
try:
    main()
except SystemExit:
    heavy = {"torch", "transformers", "fastapi", "uvicorn", "numpy"} & set(sys.modules)
    sys.exit(f"imported: {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_an_output_cannot_encode_is_written_as_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("models.conversion.convert.convert", lambda *paths, **flags: print("\xe5\u65e5"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "latin-1"))
    assert run(monkeypatch, "convert", "a", "b") == 0
    sys.stdout.flush()
    assert b"\xe5\\u65e5" in written.getvalue()


@whole_test_only_in_all
def test_text_that_the_output_cannot_encode_is_written_as_escapes(tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "model"))
    code = "import sys; from server import cli; sys.argv[0] = 'magicdec'; cli.main()"
    arguments = ("generate", "hi", "--model", model, "--temperature", "1", "--seed", "1", "--max-tokens", "90")
    texts = []
    for encoding in ("utf-8", "latin-1"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        command = [sys.executable, "-c", code, *arguments, "--ignore-eos"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    whole, escaped = texts
    assert "\ufffd" in whole.decode("utf-8")
    assert escaped == whole.decode("utf-8").encode("latin-1", errors="backslashreplace")


@pytest.mark.parametrize(
    ("given", "written"),
    [
        (["serve", "--names", "a", "b", "--port", "1"], ["serve", "--names", "a", "--names", "b", "--port", "1"]),
        (["serve", "--names", "a", "--names", "b", "c"], ["serve", "--names", "a", "--names", "b", "--names", "c"]),
        (["serve", "--port", "1"], ["serve", "--port", "1"]),
        (["serve", "--names=a", "--port", "1"], ["serve", "--names=a", "--port", "1"]),
    ],
)
def test_one_flag_takes_several_values(given: list[str], written: list[str]) -> None:
    assert repeated(given, "--names") == written
