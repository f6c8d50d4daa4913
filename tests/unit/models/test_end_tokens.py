"""Tokens that end a text, and the other special tokens that a model directory names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from models.config import parse_config, read_config
from tests.support.configs import llama


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama(eos_token_id=9)))
    assert read_config(tmp_path).eos_token_ids == (9,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 4]}')
    assert read_config(tmp_path).eos_token_ids == (4, 9)
    (tmp_path / "config.json").write_text(json.dumps(llama(eos_token_id=None, bos_token_id=None)))
    assert read_config(tmp_path).eos_token_ids == (4, 9)
    assert read_config(tmp_path).bos_token_id is None


def write_tokenizer_files(directory: Path, **files: Any) -> None:
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("eos", ["<end>", {"content": "<end>", "lstrip": False}])
@pytest.mark.parametrize("named_by", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("vocab", [{"a": 0, "<end>": 7}, [["a", 0.0]] * 7 + [["<end>", 0.0]]])
def test_end_token_of_the_tokenizer(tmp_path: Path, eos: Any, named_by: str, vocab: Any) -> None:
    files = {"config": llama(eos_token_id=9), "tokenizer": {"model": {"vocab": vocab}}, named_by: {"eos_token": eos}}
    write_tokenizer_files(tmp_path, **files)
    assert read_config(tmp_path).eos_token_ids == (7, 9)
    write_tokenizer_files(tmp_path, config=llama(eos_token_id=None))
    assert read_config(tmp_path).eos_token_ids == (7,)
    added = {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 11, "content": "<end>"}]}
    write_tokenizer_files(tmp_path, tokenizer=added)
    assert read_config(tmp_path).eos_token_ids == (11,)
    write_tokenizer_files(tmp_path, tokenizer={"model": {"vocab": {"a": 0}}})  # the tokenizer lacks it
    assert read_config(tmp_path).eos_token_ids == ()
    assert read_config(tmp_path).warnings == ()


def test_end_tokens_outside_the_vocabulary_are_dropped() -> None:
    config = parse_config(llama(eos_token_id=[128256, 128255, -1]), {"eos_token_id": 128256})
    assert config.eos_token_ids == (128255,)
    assert [warning.split(" is not")[0] for warning in config.warnings] == ["eos_token_id -1", "eos_token_id 128256"]
    assert parse_config(llama(eos_token_id=None)).eos_token_ids == ()
