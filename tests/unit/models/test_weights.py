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
from models.conversion.convert import convert
from models.decoder import DecoderModel
from models.loader import load_model, random_model
from models.shapes import find_shape
from models.tokenizer import Tokenizer, TokenizerError
from models.weights import EMBEDDING, HEAD
from parallel.group import Group
from tests.support.configs import SMALL as CONFIG
from tests.support.model_weights import tensors_of
from tests.support.rig import CPU, run_ranks

DOWN = "model.layers.1.mlp.down_proj.weight"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5ee50593a9640e0018c1550b5a0\n"


def weights() -> dict[str, Tensor]:
    """Build untied weights whose values 16 bits can hold."""
    model = random_model(parse_config(CONFIG), 0, torch.bfloat16, CPU, Group.single())
    return {name: tensor.float() for name, tensor in tensors_of(model).items()}


def write(path: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    (path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def load(path: Path, group: Group | None = None) -> DecoderModel:
    return load_model(path, dtype=torch.float32, device=CPU, group=group or Group.single(), progress=False)


def held(model: DecoderModel) -> dict[str, Tensor]:
    return tensors_of(model)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), expected[name]), name


WEIGHTS = weights()
TIED = {name: tensor for name, tensor in WEIGHTS.items() if name != HEAD}
EQUAL = WEIGHTS[EMBEDDING].clone()
LAST_ROW = EQUAL.clone()
LAST_ROW[-1] += 1
FINER = EQUAL * (1 + 2**-20)


@pytest.mark.parametrize(
    ("tied", "stored", "expected", "warning"),
    [
        (True, WEIGHTS, WEIGHTS, "differs"),
        (True, TIED | {HEAD: WEIGHTS[HEAD].double()}, WEIGHTS, "differs"),
        (True, TIED | {HEAD: EQUAL}, TIED, None),
        (True, TIED | {HEAD: EQUAL.bfloat16()}, TIED, None),
        (True, TIED | {HEAD: EQUAL.double()}, TIED, None),
        (True, TIED | {HEAD: EQUAL.double() * (1 + 2**-40)}, TIED | {HEAD: EQUAL}, "differs"),
        (True, TIED | {EMBEDDING: FINER, HEAD: EQUAL.bfloat16()}, TIED | {EMBEDDING: FINER, HEAD: EQUAL}, "differs"),
        (True, TIED | {HEAD: LAST_ROW}, TIED | {HEAD: LAST_ROW}, "differs"),
        (True, {HEAD if name == EMBEDDING else name: tensor for name, tensor in TIED.items()}, TIED, None),
        (False, TIED, TIED, "lm_head.weight is not stored"),
        (False, WEIGHTS, WEIGHTS, None),
    ],
    ids=["other", "double", "copy", "bf16", "in-double", "finer", "coarser", "last", "head", "no-head", "untied"],
)
def test_what_is_stored_decides_on_the_tie(
    tied: bool,
    stored: dict[str, Tensor],
    expected: dict[str, Tensor],
    warning: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("models.weights._BLOCK", 8)  # rows that are compared at once
    src = tmp_path / "src"
    src.mkdir()
    model = load(write(src, stored, tie_word_embeddings=tied))
    assert_same(held(model), expected)
    assert model.config.tie_word_embeddings == (HEAD not in expected)
    assert len(caplog.records) == (warning is not None)
    assert (warning or "") in caplog.text

    convert(src, tmp_path / "dst")
    rounded = {name: tensor.bfloat16().float() for name, tensor in expected.items()}
    assert_same(load_file(tmp_path / "dst" / "model.safetensors"), rounded)
    caplog.clear()
    if not torch.equal(rounded[EMBEDDING], rounded.get(HEAD, EQUAL + 1)):
        assert_same(held(load(tmp_path / "dst")), rounded)
        assert not caplog.records


@pytest.mark.parametrize(
    ("head", "says"),
    [(EQUAL[:-1], r"has shape \[28, 16\]"), (torch.zeros(29, 16, dtype=torch.int8), "has unsupported type I8")],
)
def test_a_head_that_cannot_be_used_is_only_an_error(
    head: Tensor, says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Even if its values are those of the embedding."""
    write(tmp_path, TIED | {EMBEDDING: torch.zeros(29, 16), HEAD: head}, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=f"tensor {HEAD} {says}"):
        load(tmp_path)
    with pytest.raises(ModelError, match=f"tensor {HEAD} "):
        convert(tmp_path, tmp_path / "dst")
    assert not caplog.records


def test_an_embedding_that_is_a_number(tmp_path: Path) -> None:
    number = torch.tensor(1.0)
    write(tmp_path, TIED | {EMBEDDING: number, HEAD: number.clone()}, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"unexpected tensor lm_head|has shape \[\]"):
        load(tmp_path)


def test_names_without_the_prefix(tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    bare = {name.removeprefix("model."): tensor for name, tensor in WEIGHTS.items()}
    assert_same(held(load(write(src, bare))), WEIGHTS)
    convert(src, tmp_path / "dst")
    assert_same(load_file(tmp_path / "dst" / "model.safetensors"), WEIGHTS)
    name = next(name for name in WEIGHTS if name.startswith("model.layers."))
    with pytest.raises(ModelError, match=f"unexpected tensor {name.removeprefix('model.')}"):
        load(write(src, WEIGHTS | {name.removeprefix("model."): WEIGHTS[name].clone()}))
    write(src, bare | {"layers.0.odd": torch.ones(1)})
    with pytest.raises(ModelError, match=r"unexpected tensor layers\.0\.odd"):
        load(src)


@pytest.mark.parametrize("first", [True, False])
def test_the_index_decides_between_copies(first: bool, tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    write(src, {})
    (src / "model.safetensors").unlink()
    names = sorted(WEIGHTS)
    other = {DOWN: torch.zeros_like(WEIGHTS[DOWN])}
    parts = {
        "a.safetensors": {name: WEIGHTS[name] for name in names[::2] if name != DOWN} | (other if first else {}),
        "b.safetensors": {name: WEIGHTS[name] for name in names[1::2] if name != DOWN} | ({} if first else other),
    }
    owner = "b.safetensors" if first else "a.safetensors"
    parts[owner][DOWN] = WEIGHTS[DOWN]
    for file, part in parts.items():
        save_file(part, src / file)
    weight_map = {name: file for file, part in parts.items() for name in part} | {DOWN: owner}
    (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(held(load(src)), WEIGHTS)
    convert(src, tmp_path / "dst")
    assert_same(load_file(tmp_path / "dst" / "model.safetensors"), WEIGHTS)
    del weight_map[DOWN]
    (src / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=f"tensor {DOWN} is also in another file"):
        load(src)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_biases_of_zeros(dtype: torch.dtype, tmp_path: Path) -> None:
    """A model without biases may be stored with some that add nothing."""
    src = tmp_path / "src"
    src.mkdir()
    biases = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16, dtype=dtype)}
    biases["model.layers.1.mlp.down_proj.bias"] = torch.zeros(16, dtype=dtype)
    assert_same(held(load(write(src, WEIGHTS | biases))), WEIGHTS)
    convert(src, tmp_path / "dst")
    assert_same(load_file(tmp_path / "dst" / "model.safetensors"), WEIGHTS)
    biases["model.layers.1.mlp.down_proj.bias"][-1] = 1
    write(src, WEIGHTS | biases)
    with pytest.raises(ModelError, match=r"unexpected tensor model\.layers\.1\.mlp\.down_proj\.bias"):
        load(src)
    with pytest.raises(ModelError, match=r"unexpected tensor model\.layers\.1\.mlp\.down_proj\.bias"):
        convert(src, tmp_path / "dst", force=True)


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
        ("model.layers.0.self_attn.k_proj.output_scale", "scales of an 8-bit KV cache are not used"),
        ("model.layers.0.self_attn.q_proj.input_scale", "scales of inputs are not used"),
        ("model.layers.0.mlp.down_proj.input_scale_ub", "scales of inputs are not used"),
        ("model.layers.0.mlp.down_proj.activation_scale", "scales of inputs are not used"),
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
    says = f"tensor {DOWN} holds values that are NaN or infinite in float32: the text may be nonsense"
    assert record.getMessage() == f"{file}: {says}"
    tensors[EMBEDDING][1, 1] = bad
    write(tmp_path, tensors)
    load(tmp_path)
    assert "(the first of 2) holds values" in caplog.text
    caplog.clear()
    convert(tmp_path, tmp_path / "dst")
    (record,) = caplog.records
    first = min(DOWN, EMBEDDING, key=list(load_file(file)).index)  # the one stored first
    says = f"{tmp_path}: tensor {first} (the first of 2) holds values that are NaN or infinite in bfloat16"
    assert record.getMessage().startswith(says)


@pytest.mark.parametrize(
    ("stored", "served"),
    [(torch.float32, torch.float16), (torch.bfloat16, torch.float16), (torch.float64, torch.bfloat16)],
)
def test_weights_that_the_served_type_cannot_hold(
    stored: torch.dtype, served: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in WEIGHTS.items()}
    tensors[DOWN][3, 5] = 1e5 if served == torch.float16 else 1e200
    write(tmp_path, tensors)
    load_model(tmp_path, dtype=stored, device=CPU, group=Group.single(), progress=False)
    assert not caplog.records
    load_model(tmp_path, dtype=served, device=CPU, group=Group.single(), progress=False)
    (record,) = caplog.records
    kind = str(served).removeprefix("torch.")
    assert f"tensor {DOWN} holds values that are NaN or infinite in {kind}" in record.getMessage()


def test_conversion_to_a_type_that_cannot_hold_a_weight(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    src = tmp_path / "src"
    src.mkdir()
    convert(write(src, WEIGHTS), tmp_path / "dst")
    assert not caplog.records
    huge = WEIGHTS[DOWN].double()
    huge[3, 5] = 1e200
    convert(write(src, WEIGHTS | {DOWN: huge}), tmp_path / "dst", force=True)
    (record,) = caplog.records
    says = f"{src}: tensor {DOWN} holds values that are NaN or infinite in bfloat16: the text may be nonsense"
    assert record.getMessage() == says


@pytest.mark.parametrize(("name", "row"), [(DOWN, -1), (EMBEDDING, -1), (EMBEDDING, 0), ("model.norm.weight", 0)])
def test_the_rank_that_holds_a_bad_weight_warns(
    name: str, row: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, also where all ranks hold it."""
    tensors = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    tensors[name][row] = torch.nan
    if name == DOWN:  # split by columns
        tensors[name] = WEIGHTS[name].clone()
        tensors[name][0, row] = torch.nan
    write(tmp_path, tensors)
    run_ranks(2, lambda group: load(tmp_path, group).config)
    (record,) = caplog.records
    assert f"tensor {name} holds values" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "says"), [("model.safetensors", "a git-lfs pointer, not weights"), ("config.json", "a git-lfs pointer")]
)
def test_git_lfs_pointers(name: str, says: str, tmp_path: Path) -> None:
    write(tmp_path, WEIGHTS)
    (tmp_path / name).write_text(LFS)
    with pytest.raises(ModelError, match=f"{name}: {says}.*; run `git lfs pull`"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"]
)
def test_conversion_refuses_git_lfs_pointers(name: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    write(src, WEIGHTS)
    (src / name).write_text(LFS)
    with pytest.raises(ModelError, match=f"{name}: a git-lfs pointer, not the file itself; run `git lfs pull`"):
        convert(src, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "generation_config.json"])
def test_conversion_keeps_the_accompanying_files(name: str, tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    write(src, WEIGHTS)
    (src / name).write_text('{"x": 1}')
    convert(src, tmp_path / "dst")
    assert (tmp_path / "dst" / name).read_text() == '{"x": 1}'


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
