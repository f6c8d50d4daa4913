"""Draft models made of a target's layers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.params import SamplingParams
from engine.scheduler.stats import acceptance_rate
from models.architectures import ARCHITECTURES
from models.config import ModelError, parse_config, read_config
from models.conversion.checkpoint import Checkpoint
from models.conversion.draft import _with_layers, choose_layers, evenly_spaced_layers, make_draft
from models.loader import load_model
from parallel.group import Group
from server.cli.app import app
from tests.support.engines import TINY, complete, tiny_model
from tests.support.model_weights import tensors_of
from tests.support.ranks import write_random_model
from tests.support.rig import CPU
from tests.support.workloads import prompt_of

DEEP = replace(TINY, num_layers=6, vocab_size=320)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "target", DEEP, torch.bfloat16)


@pytest.mark.parametrize(
    ("count", "keep", "expected"),
    [(30, 30, list(range(30))), (30, 2, [0, 29]), (30, 1, [0]), (6, 4, [0, 2, 3, 5]), (1, 1, [0])],
)
def test_even_spread(count: int, keep: int, expected: list[int]) -> None:
    assert evenly_spaced_layers(count, keep) == expected


@pytest.mark.parametrize("keep", [0, 7])
def test_there_must_be_so_many(keep: int) -> None:
    with pytest.raises(ModelError, match="of 6 layers, 1 to 6 can be kept"):
        evenly_spaced_layers(6, keep)


def test_the_layers_that_are_kept(target: Path, tmp_path: Path) -> None:
    make_draft(target, tmp_path / "draft", [5, 0, 2])
    assert read_config(tmp_path / "draft") == replace(read_config(target), num_layers=3)
    whole, draft = (load_file(path / "model.safetensors") for path in (target, tmp_path / "draft"))
    for name, tensor in draft.items():
        for place, layer in enumerate((0, 2, 5)):
            name = name.replace(f"layers.{place}.", f"layers.<{layer}>.")
        assert torch.equal(tensor, whole[name.replace("<", "").replace(">", "")])
    assert len([name for name in draft if "layers" not in name]) == 3
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "draft" / name).read_bytes() == (target / name).read_bytes()


def test_all_layers_are_the_target(target: Path, tmp_path: Path) -> None:
    """A draft with all layers equals the target, and its directory is usable as speculation.model."""
    make_draft(target, tmp_path / "draft", range(6))
    speculation = {"gamma": 3, "drafter": "model", "model": str(tmp_path / "draft"), "kv": {"policy": "all"}}
    config = EngineConfig.model_validate({"model": str(target), "dtype": "float64", "speculation": speculation})
    engine = Engine(config.model_copy(update={"max_model_len": 256}), progress=False)
    complete(engine, prompt_of(50, 0), SamplingParams(max_tokens=40, seed=1, ignore_eos=True))
    assert acceptance_rate(engine.stats()) == 1.0
    engine.close()


def test_a_list_with_an_entry_per_layer(target: Path, tmp_path: Path) -> None:
    config = json.loads((target / "config.json").read_text())
    kinds = ["full_attention"] * 6
    copied = tmp_path / "target"
    copied.mkdir()
    for file in target.iterdir():
        (copied / file.name).symlink_to(file)
    (copied / "config.json").unlink()
    (copied / "config.json").write_text(json.dumps(config | {"layer_types": kinds}), encoding="utf-8")
    make_draft(copied, tmp_path / "draft", [1, 4])
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["layer_types"] == kinds[:2]


@pytest.mark.parametrize("layers", [[], [6], [-1, 2]])
def test_layers_that_are_not_there(target: Path, tmp_path: Path, layers: list[int]) -> None:
    with pytest.raises(ModelError, match="the model has layers 0 to 5"):
        make_draft(target, tmp_path / "draft", layers)
    assert not (tmp_path / "draft").exists()


def test_what_is_there_stays(target: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("")
    with pytest.raises(ModelError, match="not empty"):
        make_draft(target, tmp_path, [0])
    make_draft(target, tmp_path, [0], force=True)
    assert not (tmp_path / "kept").exists()


def test_layers_that_do_nothing_go_first() -> None:
    model = tiny_model(config=replace(DEEP, vocab_size=64))
    slots = tensors_of(model)
    for layer in (1, 4):
        for part in ("self_attn.o_proj", "mlp.down_proj"):
            slots[f"model.layers.{layer}.{part}.weight"].zero_()
    told = []
    texts = [prompt_of(40, i) for i in range(3)]
    assert choose_layers(model, texts, 4, lambda left, agree: told.append((len(left), agree))) == [0, 2, 3, 5]
    assert told == [(5, 1.0), (4, 1.0)]
    assert choose_layers(model, texts, 6, lambda left, agree: None) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ModelError):
        choose_layers(model, texts, 7, lambda left, agree: None)


def test_the_command(target: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["make-draft", "--model", str(target), *arguments])
        if isinstance(done.exception, ModelError):
            return 2, str(done.exception)
        return done.exit_code, " ".join(done.output.replace("│", " ").split())

    for i, (arguments, kept) in enumerate(
        ((["--layers", "0,5"], 2), (["--keep", "5", "--tokens", "64"], 5), (["--spread"], 4), (["--keep", "6"], 6))
    ):
        code, said = run(str(tmp_path / str(i)), *arguments)
        assert code == 0, said
        assert (
            load_model(
                tmp_path / str(i), dtype=torch.float32, device=CPU, group=Group.single(), progress=False
            ).num_layers
            == kept
        )
    for arguments, says in (
        (["--layers", "0,x"], "'x' is not a layer number"),
        (["--layers", "0", "--keep", "1"], "cannot be combined with --keep"),
        (["--spread", "--text", "x"], "cannot be combined with --text"),
        (["--layers", "6"], "the model has layers 0 to 5"),
        (["--keep", "7"], "1 to 6 can be kept, not 7"),
    ):
        code, said = run(str(tmp_path / "new"), *arguments)
        assert code == 2
        assert says in said
    assert run(str(tmp_path / "0"))[1].endswith("not empty (--force replaces it)")


_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
_MIXED: dict[str, dict[str, Any]] = {
    "exaone4": {"sliding_window": 64, "sliding_window_pattern": 4},
    "gemma3_text": {"sliding_window": 64},
    "mixtral": {"sliding_window": 64},
    "olmo3": {"sliding_window": 64},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": 64},
    "qwen2_moe": {"num_experts": 4, "mlp_only_layers": [0, 5]},
    "qwen3_moe": {"num_experts": 8, "decoder_sparse_step": 2},
}
"""Keys with which layers differ."""


@pytest.mark.parametrize("kept", [[0, 3, 5, 7], [3, 7], [0, 1], [4]])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_layers_stay_what_they_were(model_type: str, kept: list[int]) -> None:
    """Also where a pattern, which counts from the first layer, tells them apart."""
    config = {"model_type": model_type, **_SIZES, **_MIXED.get(model_type, {})}
    draft = _with_layers(Checkpoint(config, iter(()), {}, False), kept)
    assert parse_config(draft.config) == parse_config(config).with_layers(kept)


def test_a_draft_of_which_some_layers_slide_is_refused(tmp_path: Path) -> None:
    """No server would take it."""
    source = write_random_model(tmp_path / "mixed", replace(DEEP, sliding_window=8, sliding_layers=(0, 1, 3, 4)))
    with pytest.raises(ModelError, match="1 of these layers slide"):
        make_draft(source, tmp_path / "draft", [2, 3])
    make_draft(source, tmp_path / "draft", [2, 5])
    assert not read_config(tmp_path / "draft").sliding_layers
