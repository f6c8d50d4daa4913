"""Weights that are stored otherwise than config.json says: loaded, and converted, as transformers loads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import ModelError, parse_config
from models.convert import convert
from models.llama import Llama
from models.loader import load_model, random_model
from models.shapes import find_shape
from models.tokenizer import Tokenizer, TokenizerError
from models.weights import EMBEDDING, HEAD
from parallel.group import Group
from tests.support.rig import CPU, run_ranks

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 29,
    "hidden_size": 16,
    "intermediate_size": 11,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "eos_token_id": 2,
}
DOWN = "model.layers.1.mlp.down_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0\n"


def weights() -> dict[str, Tensor]:
    """Build untied weights whose values 16 bits can hold."""
    model = random_model(parse_config(CONFIG), 0, torch.bfloat16, CPU, Group.single())
    return {slot.source: slot.tensor.float() for slot in model.weight_slots()}


def write(path: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def load(path: Path, group: Group | None = None) -> Llama:
    return load_model(path, dtype=torch.float32, device=CPU, group=group or Group.single(), progress=False)


def held(model: Llama) -> dict[str, Tensor]:
    return {slot.source: slot.tensor for slot in model.weight_slots()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name]), name


WEIGHTS = weights()
TIED = {name: tensor for name, tensor in WEIGHTS.items() if name != HEAD}
EQUAL = WEIGHTS[EMBEDDING].clone()


@pytest.mark.parametrize(
    ("tied", "stored", "expected", "warning"),
    [
        (True, WEIGHTS, WEIGHTS, "differs"),
        (True, TIED | {HEAD: WEIGHTS[HEAD].double()}, WEIGHTS, "differs"),
        (True, TIED | {HEAD: EQUAL}, TIED, None),
        (True, TIED | {HEAD: EQUAL.bfloat16()}, TIED, None),
        (True, TIED | {HEAD: EQUAL.double()}, TIED, None),
        (True, {HEAD if name == EMBEDDING else name: tensor for name, tensor in TIED.items()}, TIED, None),
        (False, TIED, TIED, "lm_head.weight is not stored"),
        (False, WEIGHTS, WEIGHTS, None),
    ],
    ids=["another", "another-in-double", "copy", "copy-in-bf16", "copy-in-double", "head-only", "no-head", "untied"],
)
def test_what_is_stored_decides_on_the_tie(
    tied: bool,
    stored: dict[str, Tensor],
    expected: dict[str, Tensor],
    warning: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    src = tmp_path / "src"
    src.mkdir()
    model = load(write(src, stored, tie_word_embeddings=tied))
    assert_same(held(model), expected)
    assert model.config.tie_word_embeddings == (HEAD not in expected)
    assert len(caplog.records) == (warning is not None)
    assert (warning or "") in caplog.text

    convert(src, tmp_path / "dst")
    assert_same(load_file(tmp_path / "dst" / "model.safetensors"), expected)
    caplog.clear()
    assert_same(held(load(tmp_path / "dst")), expected)
    assert not caplog.records


def test_every_rank_decides_alike_and_one_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, WEIGHTS, tie_word_embeddings=True)
    assert run_ranks(2, lambda group: load(tmp_path, group).config.tie_word_embeddings) == [False, False]
    assert len(caplog.records) == 1


def test_an_embedding_alone_is_missing(tmp_path: Path) -> None:
    write(tmp_path, {name: tensor for name, tensor in WEIGHTS.items() if name != EMBEDDING})
    with pytest.raises(ModelError, match=f"missing from the weight files: {EMBEDDING}"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("extra", "warning"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", None),
        ("model.rotary_emb.original_inv_freq", None),
        ("model.layers.0.self_attn.masked_bias", None),
        ("model.layers.0.attn.bias", None),
        ("model.layers.0.self_attn.k_scale", "scales of an 8-bit KV cache are not used"),
        ("model.layers.0.self_attn.k_proj.v_scale", "scales of"),
        ("model.layers.0.self_attn.kv_scale", "scales of"),
    ],
)
def test_known_extras_are_left_out(
    extra: str, warning: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    src = tmp_path / "src"
    src.mkdir()
    write(src, {**WEIGHTS, extra: torch.ones(1)})
    assert_same(held(load(src)), WEIGHTS)
    assert len(caplog.records) == (warning is not None)
    assert (warning or "") in caplog.text
    convert(src, tmp_path / "dst")
    assert_same(load_file(tmp_path / "dst" / "model.safetensors"), WEIGHTS)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.weight_scale"])
def test_unknown_tensors_are_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, {**WEIGHTS, name: torch.ones(1)})
    with pytest.raises(ModelError, match=f"unexpected tensor {name}"):
        load(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite(
    bad: float, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {name: tensor.clone().to(dtype) for name, tensor in WEIGHTS.items()}
    write(tmp_path, tensors)
    load(tmp_path)
    assert not caplog.records
    tensors[DOWN][3, 5] = bad
    write(tmp_path, tensors)
    load(tmp_path)
    (record,) = caplog.records
    file = tmp_path / "model.safetensors"
    says = f"{file}: tensor {DOWN} holds values that are NaN or infinite: the text may be nonsense"
    assert record.getMessage() == says
    tensors[EMBEDDING][1, 1] = bad
    write(tmp_path, tensors)
    load(tmp_path)
    assert "(the first of 2) holds values" in caplog.text


@pytest.mark.parametrize(
    ("name", "says"), [("model.safetensors", "a git-lfs pointer, not weights"), ("config.json", "a git-lfs pointer")]
)
def test_git_lfs_pointers(name: str, says: str, tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS)
    (tmp_path / name).write_text(LFS)
    with pytest.raises(ModelError, match=f"{name}: {says}.*; run `git lfs pull`"):
        load(tmp_path)


def test_a_tokenizer_as_git_lfs_pointer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(LFS)
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json: a git-lfs pointer, not a tokenizer; run `git lfs pull`"
    ):
        Tokenizer(tmp_path)


def test_a_gguf_file_is_no_model_directory(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"x\.gguf: .* convert it: magicdec convert .*x\.gguf DIRECTORY"):
        load(file)
    with pytest.raises(TokenizerError, match="convert it: magicdec convert"):
        Tokenizer(file)
    with pytest.raises(ModelError, match="convert it: magicdec convert"):
        find_shape(str(file))
    file.write_text(LFS)
    with pytest.raises(ModelError, match=r"x\.gguf: a git-lfs pointer, not weights"):
        convert(file, tmp_path / "dst")
    with pytest.raises(ModelError, match="not a directory"):
        load(write(tmp_path, WEIGHTS) / "config.json")


def test_conversion_keeps_all_chat_templates(tmp_path: Path) -> None:
    src = tmp_path / "src"
    (src / "additional_chat_templates").mkdir(parents=True)
    (src / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    convert(write(src, WEIGHTS), tmp_path / "dst")
    assert (tmp_path / "dst" / "additional_chat_templates" / "tool_use.jinja").read_text() == "T"


def test_end_token_that_only_the_tokenizer_names(tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS, eos_token_id=None)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    added = [{"id": 28, "content": "<|im_end|>", "special": True}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": added}))
    assert load(tmp_path).config.eos_token_ids == (28,)


def test_an_end_token_that_cannot_be_sampled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load(write(tmp_path, WEIGHTS, eos_token_id=[29, 3])).config.eos_token_ids == (3,)
    (record,) = caplog.records
    assert "eos_token_id 29 is not in the vocabulary of 29" in record.getMessage()
