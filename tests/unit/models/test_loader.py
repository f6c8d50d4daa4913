from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from models.config import ModelError, parse_config
from models.decoder import DecoderModel
from models.loader import load_model, random_model
from parallel.group import Group
from tests.support.configs import SMALL as CONFIG
from tests.support.model_weights import tensors_of
from tests.support.rig import CPU, run_ranks

DOWN = "model.layers.1.mlp.down_proj.weight"


def weights(seed: int = 0, **changes: Any) -> dict[str, Tensor]:
    model = random_model(parse_config({**CONFIG, **changes}), seed, torch.float32, CPU, Group.single())
    return {name: tensor.clone() for name, tensor in tensors_of(model).items()}


def write(path: Path, tensors: dict[str, Tensor], file: str = "model.safetensors", **changes: Any) -> None:
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    save_file(tensors, path / file)


def load(path: Path, *, dtype: torch.dtype = torch.float32, progress: bool = False) -> DecoderModel:
    return load_model(path, dtype=dtype, device=CPU, group=Group.single(), progress=progress)


def assert_holds(model: DecoderModel, tensors: dict[str, Tensor]) -> None:
    held = tensors_of(model)
    assert held.keys() == tensors.keys()
    indices = {slot.source: slot.index for slot in model.weight_slots()}
    indices |= {slot.source: slot.index for slot in model.matrix_slots()}
    for name, tensor in held.items():
        assert torch.equal(tensor, tensors[name].to(model.dtype)[indices[name]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loads_and_converts(dtype: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in weights().items()}
    write(tmp_path, tensors)
    model = load(tmp_path, dtype=dtype)
    assert model.dtype == dtype
    assert_holds(model, tensors)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_rank_loads_its_slices(size: int, tmp_path: Path) -> None:
    tensors = weights(attention_bias=True, mlp_bias=True)
    write(tmp_path, tensors, attention_bias=True, mlp_bias=True)

    def work(group: Group) -> None:
        model = load_model(tmp_path, dtype=torch.float32, device=CPU, group=group, progress=False)
        assert_holds(model, tensors)
        assert sum(t.nbytes for t in tensors_of(model).values()) < sum(t.nbytes for t in tensors.values())

    run_ranks(size, work)


def write_sharded(path: Path, tensors: dict[str, Tensor], *, index: bool) -> list[str]:
    """Write two files of alternating tensors. Returns their names."""
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for part, file in enumerate(files):
        write(path, {name: tensors[name] for name in sorted(tensors)[part::2]}, file)
    if index:
        weight_map = {name: files[i % 2] for i, name in enumerate(sorted(tensors))}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


def test_sharded_checkpoints(tmp_path: Path) -> None:
    tensors = weights()
    files = write_sharded(tmp_path, tensors, index=False)
    assert_holds(load(tmp_path), tensors)  # without an index, all files are loaded
    write_sharded(tmp_path, tensors, index=True)
    save_file({"something": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert_holds(load(tmp_path), tensors)  # with an index, only the files it lists
    (tmp_path / files[1]).unlink()
    with pytest.raises(ModelError, match=f"{files[1]}: not found, but listed in model.safetensors.index.json"):
        load(tmp_path)


def test_one_file_beside_others(tmp_path: Path) -> None:
    """If model.safetensors exists, it is the model; other files, pickles included, are ignored."""
    tensors = weights()
    write(tmp_path, tensors)
    save_file({"something": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert_holds(load(tmp_path), tensors)


def test_broken_index(tmp_path: Path) -> None:
    tensors = weights()
    write_sharded(tmp_path, tensors, index=True)
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{"):
        index.write_text(content)
        with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json: "):
            load(tmp_path)
    index.write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ModelError, match="is not a file of this directory"):
        load(tmp_path)


def test_a_tensor_in_two_files(tmp_path: Path) -> None:
    tensors = weights()
    write(tmp_path, tensors, "a.safetensors")
    write(tmp_path, {DOWN: tensors[DOWN]}, "b.safetensors")
    with pytest.raises(ModelError, match=f"b.safetensors: tensor {DOWN} is also in another file"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth"])
def test_pickled_weights_only(name: str, tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no safetensors weights"):
        load(tmp_path)
    (tmp_path / name).write_bytes(b"never read")
    with pytest.raises(ModelError, match=f"only pickled weights \\({name}\\)"):
        load(tmp_path)


def test_no_directory_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        load(tmp_path)


def changed(**tensors: Tensor | None) -> Callable[[dict[str, Tensor]], None]:
    def change(checkpoint: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor is None:
                del checkpoint[name]
            else:
                checkpoint[name] = tensor

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(**{DOWN: None}), f"tensors missing from the weight files: {DOWN}"),
        (dict.clear, "lm_head.weight, .* and 18 more"),
        (changed(extra=torch.zeros(2)), "model.safetensors: unexpected tensor extra"),
        (changed(**{"model.layers.2.mlp.down_proj.weight": torch.zeros(16, 11)}), r"unexpected tensor model.layers.2"),
        (changed(**{DOWN: torch.zeros(11, 16)}), rf"{DOWN} has shape \[11, 16\], expected \[16, 11\]"),
        (changed(**{DOWN: torch.zeros(16, 12)}), rf"{DOWN} has shape \[16, 12\]"),
        (changed(**{DOWN: torch.zeros(16 * 11)}), rf"{DOWN} has shape \[176\]"),
        (changed(**{DOWN: torch.zeros(16, 11, dtype=torch.int8)}), f"{DOWN} has unsupported type I8"),
        (changed(**{"lm_head.weight": torch.zeros(30, 16)}), r"lm_head.weight has shape \[30, 16\]"),
    ],
)
def test_wrong_tensors(change: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    tensors = weights()
    change(tensors)
    write(tmp_path, tensors)
    with pytest.raises(ModelError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(("dtype", "shape"), [("F4", [16]), ("F6_E2M3", [16]), ("I8", [1]), ("F32", [])])
def test_an_unexpected_bias_of_any_type(dtype: str, shape: list[int], tmp_path: Path) -> None:
    write(tmp_path, weights())
    file, bits = tmp_path / "extra.safetensors", {"F4": 4, "F6_E2M3": 6, "I8": 8, "F32": 32}[dtype]
    name, size = "model.layers.0.self_attn.q_proj.bias", math.prod(shape) * bits // 8
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\x3f" * size)
    (tmp_path / "model.safetensors").rename(tmp_path / "others.safetensors")
    with pytest.raises(ModelError, match=f"tensor {name}"):
        load(tmp_path)


def test_tied_head(tmp_path: Path) -> None:
    """A stored copy of the tied head is not another one."""
    tensors = weights(tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors
    write(tmp_path, tensors, tie_word_embeddings=True)
    assert_holds(load(tmp_path), tensors)
    embedding = tensors["model.embed_tokens.weight"]
    write(tmp_path, {**tensors, "lm_head.weight": embedding.clone()}, tie_word_embeddings=True)
    assert_holds(load(tmp_path), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_is_overwritten_changes_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in weights().items()}
    write(tmp_path, tensors)
    model, file = load(tmp_path, dtype=dtype), tmp_path / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
    assert_holds(model, tensors)


@pytest.mark.parametrize("damage", ["header", "truncated", "empty"])
def test_damaged_file(damage: str, tmp_path: Path) -> None:
    write(tmp_path, weights())
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes({"header": b"\xff" * 16 + content[16:], "truncated": content[:-4], "empty": b""}[damage])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors file"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),
    [
        ({"model": {"vocab": {"a": 0, "b": 28}}}, 29),
        ({"model": {"vocab": {"a": 0, "b": 29}}}, 30),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 29}]}, 30),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 28}]}, 29),
        ({"model": {"vocab": [["a", 0.0]] * 29}}, 29),
        ({"model": {"vocab": [["a", 0.0]] * 31}}, 31),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_a_warning(
    tokenizer: dict[str, Any], tokens: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, weights())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    load(tmp_path)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == (tokens > CONFIG["vocab_size"])
    assert all(f"tokenizer.json has token ids up to {tokens - 1}, but the model embeds 29" in each for each in warned)
    assert all(each.endswith("prompts with token ids from 29 on are refused") for each in warned)


def test_added_tokens_of_the_tokenizer_config(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, weights())
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {str(id): id for id in range(28)}}}))
    for ids, warnings in (((28,), []), ((28, 29), ["token ids up to 29"]), ((27,), ["the added token '<27>'"])):
        added = {str(id): {"content": f"<{id}>"} for id in ids}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
        caplog.clear()
        load(tmp_path)
        assert len(caplog.records) == len(warnings)
        assert all(warning in caplog.text for warning in warnings)


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"vocab": 3}}', '{"model": {"vocab": {"a": "b"}}}'])
def test_broken_tokenizer(content: str, tmp_path: Path) -> None:
    write(tmp_path, weights())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json: "):
        load(tmp_path)


def test_progress_goes_to_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, weights())
    load(tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Loading weights: 100%" in err
    load(tmp_path, progress=False)
    assert capsys.readouterr() == ("", "")


def test_random_models_repeat() -> None:
    """Weights depend only on config and seed, and torch's global generator is not touched."""
    state = torch.get_rng_state()
    first, again, other = weights(3), weights(3), weights(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    layers = [first[f"model.layers.{i}.mlp.down_proj.weight"] for i in range(2)]
    assert not torch.equal(*layers)


def test_random_models_do_not_depend_on_ranks() -> None:
    config = parse_config({**CONFIG, "attention_bias": True})
    whole = weights(3, attention_bias=True)

    def work(group: Group) -> None:
        assert_holds(random_model(config, 3, torch.float32, CPU, group), whole)

    run_ranks(3, work)


def test_ranks_agree_on_the_largest_shard() -> None:
    """All ranks decide alike where it is asked for, such as which forwards are captured."""
    config = parse_config({**CONFIG, "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 8})
    shards = run_ranks(3, lambda group: random_model(config, 0, torch.float32, CPU, group))
    assert [(shard.heads, shard.kv_heads) for shard in shards] == [(4, 2), (4, 2), (2, 1)]
    assert {(shard.max_heads, shard.max_kv_heads) for shard in shards} == {(4, 2)}
