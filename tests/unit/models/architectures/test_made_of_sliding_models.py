"""Draft models and weights of few bits, made of models whose layers differ: in windows, rotary embeddings, scales."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

from kernels.weights.int4_weights import Int4Format
from models.config import ModelError, parse_config, read_config
from models.conversion.convert import served_config
from models.conversion.draft import _LayerSubsetRunner, choose_layers, make_draft
from models.quantize.layer_rounder import LayerRounder
from models.quantize.quantize_model import quantize
from models.shapes import parameters
from server.cli.app import app
from tests.support.oracle_models import SIZES, VOCAB, OracleRow, load_served, write_checkpoint
from tests.support.profiles import only_in_all
from tests.support.rig import CPU

WINDOW = {"sliding_window": 10, "intermediate_size": 64, "head_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"num_hidden_layers": 7, **WINDOW},
    "olmo3": {"num_hidden_layers": 5, "hidden_size": 64, **WINDOW},
    "smollm3": {"num_hidden_layers": 6, **WINDOW, "no_rope_layer_interval": 3, "use_sliding_window": True},
    "mistral": {"num_hidden_layers": 3, **WINDOW},
}
PATTERNS = ("layer_types", "no_rope_layers")


def write(model_type: str, directory: Path) -> Any:
    """Write a model whose file has patterns, not lists."""
    config = transformers.AutoConfig.for_model(model_type, **SIZES | MODELS[model_type])
    theirs = write_checkpoint(directory, config, without=PATTERNS)
    (directory / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    return theirs


def drawn(rows: int, length: int) -> list[list[int]]:
    draw = random.Random(4)
    return [[draw.randrange(3, VOCAB) for _ in range(length)] for _ in range(rows)]


@pytest.mark.parametrize("model_type", ["gemma3_text", only_in_all("olmo3"), "smollm3", only_in_all("mistral")])
def test_kept_layers_stay_what_they_were(model_type: str, tmp_path: Path) -> None:
    """Layers that keep all KV: where some slide, no draft has both kinds."""
    write(model_type, tmp_path / "target")
    whole = read_config(tmp_path / "target")
    kept = [layer for layer in range(whole.num_layers) if layer not in whole.sliding_layers] or [1, 2]
    make_draft(tmp_path / "target", tmp_path / "draft", kept)
    assert read_config(tmp_path / "draft") == whole.with_layers(kept)
    (text,) = drawn(1, 40)
    draft = OracleRow(load_served(tmp_path / "draft"), 40).forward(text)
    target = OracleRow(load_served(tmp_path / "target").with_layers(kept), 40).forward(text)
    assert draft.std() > 0.3
    torch.testing.assert_close(draft, target, rtol=0, atol=0.3)  # the draft's weights are bf16


@pytest.mark.parametrize("model_type", [only_in_all("gemma3_text"), "olmo3", only_in_all("smollm3"), "mistral"])
def test_layers_are_chosen_by_what_they_compute(model_type: str, tmp_path: Path) -> None:
    theirs, texts = write(model_type, tmp_path), drawn(2, 40)
    model = load_served(tmp_path)
    with torch.inference_mode():
        expected = theirs(torch.tensor(texts)).logits.flatten(0, 1)
    ours = _LayerSubsetRunner(model, texts).logits(range(model.num_layers))
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    keep = model.num_layers - 2
    assert len(choose_layers(model, texts, keep, lambda left, agree: None)) == keep


@pytest.mark.parametrize("model_type", [only_in_all("gemma3_text"), only_in_all("olmo3"), "smollm3", "mistral"])
def test_matrices_are_rounded_by_what_reaches_them(model_type: str, tmp_path: Path) -> None:
    """After the last layer, calibration has the activations that the model it writes has."""
    write(model_type, tmp_path / "dense")
    texts, int4 = drawn(3, 40), Int4Format(16, True, scale_dtype=torch.bfloat16)
    quantize(tmp_path / "dense", tmp_path / "int4", texts, group_size=16, symmetric=True)
    stored = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "dense" / "model.safetensors").items()}
    config = read_config(tmp_path / "dense")
    rounder = LayerRounder(config, int4, texts, stored["model.embed_tokens.weight"], CPU)
    for layer in range(config.num_layers):
        rounder.round_layer(layer, stored.__getitem__)
    model = load_served(tmp_path / "int4")
    made = torch.cat([OracleRow(model, 40).forward(text) for text in texts])
    assert rounder._delta is not None
    calibrated = model.logits(model._norm(rounder._x + rounder._delta, None))
    assert made.std() > 0.3
    torch.testing.assert_close(calibrated, made, rtol=0, atol=1e-3)


@pytest.mark.parametrize("model_type", MODELS)
def test_parameters_are_counted(model_type: str, tmp_path: Path) -> None:
    theirs = write(model_type, tmp_path)
    assert parameters(read_config(tmp_path)) == theirs.num_parameters()


def test_old_keys_are_written_beside_new_ones() -> None:
    """Readers of either find the same model."""
    gemma = transformers.AutoConfig.for_model("gemma3_text", **SIZES, sliding_window=10).to_dict()
    gemma["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    gemma["rope_parameters"]["sliding_attention"]["rope_theta"] = 123.0
    config = served_config(json.loads(json.dumps(gemma, default=str)))
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 123.0)
    both, old = parse_config(config), parse_config({k: v for k, v in config.items() if k != "rope_parameters"})
    new = parse_config({k: v for k, v in config.items() if k not in ("rope_scaling", "rope_local_base_freq")})
    assert both == old == new
    assert replace(both, sliding_layers=()) != both


@pytest.mark.parametrize("how", [["--keep", "1", "--spread"], ["--keep", "1"], []])
def test_layers_are_not_chosen_where_some_slide(how: list[str], tmp_path: Path) -> None:
    """Refused before anything is measured."""
    write("gemma3_text", tmp_path / "target")
    done = CliRunner().invoke(app, ["make-draft", str(tmp_path / "draft"), "--model", str(tmp_path / "target"), *how])
    assert isinstance(done.exception, ModelError)
    said = "6 of 7 layers slide, which a draft model's must not; choose among the others: --layers 5"
    assert str(done.exception) == said
    assert not (tmp_path / "draft").exists()
