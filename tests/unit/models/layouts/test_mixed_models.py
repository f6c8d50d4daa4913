"""Models some of whose modules have another format than others, or none."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import ModelError, parse_config
from models.decoder import DecoderModel
from models.loader import check_model, load_model, random_model
from models.weights import EMBEDDING, HEAD
from parallel.group import Group
from parallel.layers import GateUpLinear, QKVLinear
from parallel.matrix_layer import JoinedLinear, MatrixLayer
from parallel.module import Module
from tests.support.model_weights import tensors_of
from tests.support.packed_weights import LAYOUTS, Drawn, Packed
from tests.support.rig import CPU, PagedRows, run_ranks

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}
TOKENS = [5, 17, 3, 39, 0, 8]
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."


def write(path: Path, packed: dict[str, Packed], settings: dict[str, Any], **changes: Any) -> dict[str, Tensor]:
    """Write a model in which these modules are quantized. Returns the values of all weights."""
    config = {**CONFIG, "quantization_config": settings, **changes}
    (path / "config.json").write_text(json.dumps(config))
    model = random_model(parse_config(CONFIG), 0, torch.float32, CPU, Group.single())
    values = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    stored = {name: value for name, value in values.items() if name.removesuffix(".weight") not in packed}
    for module, each in packed.items():
        stored |= {f"{module}.{part}": tensor.contiguous() for part, tensor in each.tensors.items()}
        values[f"{module}.weight"] = each.values.float()
    save_file(stored, path / "model.safetensors")
    return values


def load(path: Path, group: Group | None = None) -> DecoderModel:
    return load_model(path, dtype=torch.float32, device=CPU, group=group or Group.single(), progress=False)


def logits(model: DecoderModel) -> Tensor:
    return PagedRows(model, [len(TOKENS)], 16).forward({0: TOKENS}, {0: range(len(TOKENS))})


def dense_logits(path: Path, values: dict[str, Tensor], **changes: Any) -> Tensor:
    directory = path / "dense"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(values, directory / "model.safetensors")
    return logits(load(directory))


def find_layer(module: Module, kind: type[MatrixLayer]) -> MatrixLayer | None:
    found = (each if isinstance(each, kind) else find_layer(each, kind) for each in module.children())
    return next((each for each in found if each is not None), None)


def is_joined(model: DecoderModel, kind: type[MatrixLayer]) -> bool:
    layer = find_layer(model, kind)
    assert layer is not None
    return isinstance(layer.linear, JoinedLinear)


def scaled(packed: Packed, features: int) -> Packed:
    """Scale the values of a matrix to those of weights."""
    factor = features**-0.5 / float(packed.values.std())
    power = 2.0 ** torch.tensor(factor).log2().round()
    for name in packed.tensors:
        if "scale" in name:
            packed.tensors[name] = packed.tensors[name] * power
    packed.values = packed.values * power
    return packed


def groups_of(packed: dict[str, Packed]) -> dict[str, Any]:
    """Return a configuration with a group for each module."""
    groups = {}
    for number, (module, each) in enumerate(packed.items()):
        group = dict(each.settings["config_groups"]["group_0"])
        groups[f"group_{number}"] = group | {"targets": [module], "format": each.settings["format"]}
    return {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups, "ignore": []}


def mixed() -> dict[str, Packed]:
    return {
        f"{ATTENTION}q_proj": scaled(LAYOUTS["packed"](Drawn(1, 32, 32, group_size=8)), 32),
        f"{ATTENTION}k_proj": scaled(LAYOUTS["packed"](Drawn(2, 16, 32, group_size=16)), 32),
        f"{MLP}gate_proj": scaled(LAYOUTS["packed"](Drawn(3, 48, 32, group_size=8)), 32),
        f"{MLP}up_proj": scaled(LAYOUTS["integers"](Drawn(4, 48, 32, group_size=16)), 32),
    }


@pytest.mark.parametrize("size", [1, 2, 3])
def test_joined_products_of_several_formats(size: int, tmp_path: Path) -> None:
    packed = mixed()
    values = write(tmp_path, packed, groups_of(packed))
    expected = dense_logits(tmp_path, values)

    def work(group: Group) -> Tensor:
        model = load(tmp_path, group)
        assert is_joined(model, QKVLinear)
        assert not is_joined(model, GateUpLinear)
        return logits(model)

    torch.testing.assert_close(torch.cat(run_ranks(size, work), 1), expected, atol=1e-4, rtol=1e-4)


def test_the_first_target_in_order_counts(tmp_path: Path) -> None:
    """Names come before patterns, and patterns before classes; ignored modules are dense."""
    packed = mixed()
    settings = groups_of(packed)
    names = list(packed)
    groups = list(settings["config_groups"].values())
    groups[0]["targets"] = ["Linear"]
    groups[1]["targets"] = [r"re:.*self_attn\.k_pr"]
    groups[3]["targets"] = ["re:.*mlp"]
    settings["ignore"] = ["lm_head", f"{ATTENTION}v_proj", r"re:.*o_proj$", "re:.*down"]
    expected = dense_logits(tmp_path, write(tmp_path, packed, settings))
    torch.testing.assert_close(logits(load(tmp_path)), expected, atol=1e-4, rtol=1e-4)
    assert groups[2]["targets"] == [names[2]]
    for ignored in ("Linear", "re:.*q_proj"):
        settings["ignore"] = [ignored]
        write(tmp_path, packed, settings)
        with pytest.raises(ModelError, match="unexpected tensor"):
            load(tmp_path)


def test_a_module_without_a_scheme_is_not_quantized(tmp_path: Path) -> None:
    packed = mixed()
    settings = groups_of(packed)
    del settings["config_groups"]["group_0"]
    write(tmp_path, packed, settings)
    with pytest.raises(ModelError, match=r"unexpected tensor model\.layers\.0\.self_attn\.q_proj\.weight_"):
        load(tmp_path)


def gptq_model(path: Path, *modules: str, dynamic: dict[str, Any] | None = None, **changes: Any) -> dict[str, Tensor]:
    """Write a model with modules of 4 bits, and down_proj, if it is one, of 8."""
    shapes = {"down_proj": (32, 48), "up_proj": (48, 32), "lm_head": (40, 32)}
    packed = {}
    for module in modules:
        rows, features = shapes[module.rpartition(".")[2]]
        drawn = Drawn(5, rows, features, group_size=16, bits=8 if module.endswith("down_proj") else 4)
        packed[module] = scaled(LAYOUTS["gptq"](drawn), features)
    settings = LAYOUTS["gptq"](replace(drawn, bits=4)).settings | {"dynamic": dynamic}
    return write(path, packed, settings, **changes)


def test_modules_with_settings_of_their_own(tmp_path: Path) -> None:
    dynamic = {r"-:.*q_proj": {}, r"+:.*\.down": {"bits": 8}, r".*down": {"bits": 4}}
    values = gptq_model(tmp_path, f"{MLP}down_proj", f"{MLP}up_proj", dynamic=dynamic)
    torch.testing.assert_close(logits(load(tmp_path)), dense_logits(tmp_path, values), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
def test_a_quantized_head(tied: bool, prefix: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = gptq_model(tmp_path, "lm_head", tie_word_embeddings=tied)
    if not prefix:
        file = tmp_path / "model.safetensors"
        save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file)
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path)
    says = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert says == ["lm_head is quantized, so it is used, although tie_word_embeddings is true"] * tied
    torch.testing.assert_close(logits(model), dense_logits(tmp_path, values), atol=1e-4, rtol=1e-4)


def test_a_quantized_embedding(tmp_path: Path) -> None:
    """A head that shares it multiplies by its codes."""
    packed = {EMBEDDING.removesuffix(".weight"): scaled(LAYOUTS["fp8_rows"](Drawn(6, 40, 32)), 32)}
    values = write(tmp_path, packed, {"quant_method": "fp8"}, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if name != HEAD}, file)
    del values[HEAD]
    expected = dense_logits(tmp_path, values, tie_word_embeddings=True)
    torch.testing.assert_close(logits(load(tmp_path)), expected, atol=1e-4, rtol=1e-4)


def test_biases_of_zeros_that_libraries_add(tmp_path: Path) -> None:
    gptq_model(tmp_path, f"{MLP}up_proj")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {f"{MLP}up_proj.bias": torch.zeros(48).half()}, file)
    load(tmp_path)
    save_file(tensors | {f"{MLP}up_proj.bias": torch.ones(48).half()}, file)
    with pytest.raises(ModelError, match="unexpected tensor"):
        load(tmp_path)


def test_weight_updates_are_checked(tmp_path: Path) -> None:
    gptq_model(tmp_path, f"{MLP}up_proj")
    config = load(tmp_path).config
    check_model(tmp_path, config, Group.single())
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{MLP}up_proj.g_idx"][3] = 2
    save_file(tensors, file)
    with pytest.raises(ModelError, match="names groups from 0 to 2, expected 0 to 1"):
        check_model(tmp_path, config, Group.single())
