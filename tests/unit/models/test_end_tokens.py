"""Tokens that end a text, and the other special tokens that a model directory names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from models.config import parse_config, read_config
from models.tokenizer import Tokenizer
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
    assert read_config(tmp_path).warnings == ("eos_token '<end>' has no token id and never ends a text",)
    write_tokenizer_files(tmp_path, **{named_by: {}})
    assert read_config(tmp_path).warnings == ("no end-of-sequence token: texts end at max_tokens",)
    write_tokenizer_files(tmp_path, generation_config={"eos_token_id": 3})
    assert read_config(tmp_path).warnings == ()


@pytest.mark.parametrize("lists_added", [{}, {"added_tokens_decoder": {}}])
def test_a_text_ends_at_the_end_tokens_of_both_tokenizer_files(tmp_path: Path, lists_added: dict[str, Any]) -> None:
    write_tokenizer_files(
        tmp_path,
        config=llama(eos_token_id=None),
        tokenizer={"model": {"vocab": {"a": 0, "<end>": 7, "<stop>": 8}}},
        tokenizer_config={"eos_token": "<end>", **lists_added},
        special_tokens_map={"eos_token": {"content": "<stop>"}},
    )
    assert read_config(tmp_path).eos_token_ids == (7, 8)
    assert read_config(tmp_path).warnings == ()


def test_ids_of_added_tokens(tmp_path: Path) -> None:
    """An end token that tokenizer.json lacks has the id that another file lists."""
    files: dict[str, Any] = {"config": llama(eos_token_id=None), "tokenizer": {"model": {"vocab": {"a": 0}}}}
    write_tokenizer_files(tmp_path, **files, tokenizer_config={"eos_token": "<end>"}, added_tokens={"<end>": 9})
    assert read_config(tmp_path).eos_token_ids == (9,)
    listed = {"10": {"content": "<end>", "special": True}, "x": {"content": "<end>"}, "11": None}
    write_tokenizer_files(tmp_path, tokenizer_config={"eos_token": "<end>", "added_tokens_decoder": listed})
    assert read_config(tmp_path).eos_token_ids == (10,)
    write_tokenizer_files(tmp_path, tokenizer={"model": {"vocab": {"<end>": 12}}})
    assert read_config(tmp_path).eos_token_ids == (12,)


LLAMA_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("suffix", ["", "Fast"])
@pytest.mark.parametrize(
    ("kind", "defaults"),
    [
        ("LlamaTokenizer", LLAMA_DEFAULTS),
        ("Qwen2Tokenizer", dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")),
        ("GPT2Tokenizer", dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")),
        ("PreTrainedTokenizer", {}),
    ],
)
def test_default_tokens_of_a_class(tmp_path: Path, kind: str, suffix: str, defaults: dict[str, str]) -> None:
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<|endoftext|>": 3}
    config = {"tokenizer_class": kind + suffix}
    tokenizer = {"model": {"type": "BPE", "vocab": vocab, "merges": []}}
    write_tokenizer_files(
        tmp_path, config=llama(eos_token_id=None), tokenizer=tokenizer, tokenizer_config=config, special_tokens_map={}
    )
    assert Tokenizer(tmp_path).special_tokens == defaults
    assert read_config(tmp_path).eos_token_ids == ((vocab[defaults["eos_token"]],) if defaults else ())
    for file in ("tokenizer_config", "special_tokens_map"):  # null: there is none
        write_tokenizer_files(tmp_path, **{file: {**config, "eos_token": None}})
        assert "eos_token" not in Tokenizer(tmp_path).special_tokens
        assert read_config(tmp_path).eos_token_ids == ()
        write_tokenizer_files(tmp_path, **{file: config})
    tokenizer["model"]["vocab"] = {"a": 0}
    write_tokenizer_files(tmp_path, tokenizer=tokenizer)
    assert Tokenizer(tmp_path).special_tokens == {}
    assert read_config(tmp_path).eos_token_ids == ()


@pytest.mark.parametrize("lists_added", [{}, {"added_tokens_decoder": {}}], ids=["old", "new"])
def test_names_are_those_of_transformers(tmp_path: Path, lists_added: dict[str, Any]) -> None:
    """Also a model's own tokens, which templates use by name."""
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "a",
        "eos_token": "a",
        "image_token": "<image>",
        "add_bos_token": False,
        "extra_special_tokens": {"audio_token": "<audio>"},
        "model_specific_special_tokens": {} if not lists_added else {"video_token": "<video>"},
        **lists_added,
    }
    others = {"eos_token": {"content": "b", "lstrip": False, "rstrip": False}}
    write_tokenizer_files(tmp_path, tokenizer=tokenizer, tokenizer_config=config, special_tokens_map=others)
    found = Tokenizer(tmp_path).special_tokens
    assert found["eos_token"] == ("a" if lists_added else "b")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path).special_tokens_map
    assert found == theirs | ({"video_token": "<video>"} if lists_added else {})


def test_the_map_names_what_the_config_does_not(tmp_path: Path) -> None:
    tokenizer = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    config: dict[str, Any] = {"bos_token": None, "eos_token": "a", "added_tokens_decoder": {}}
    others = {"bos_token": "b", "pad_token": "p"}
    write_tokenizer_files(tmp_path, tokenizer=tokenizer, tokenizer_config=config, special_tokens_map=others)
    assert Tokenizer(tmp_path).special_tokens == {"bos_token": "b", "eos_token": "a", "pad_token": "p"}


def test_end_tokens_outside_the_vocabulary_are_dropped() -> None:
    config = parse_config(llama(eos_token_id=[128256, 128255, -1]), {"eos_token_id": 128256})
    assert config.eos_token_ids == (128255,)
    assert [warning.split(" is not")[0] for warning in config.warnings] == ["eos_token_id -1", "eos_token_id 128256"]
    assert parse_config(llama(eos_token_id=None)).eos_token_ids == ()
