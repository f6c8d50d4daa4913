"""Length of the longest request: what it costs, and what it is where memory holds less than the model's own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config.deployment import ConfigError, EngineConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.validation import RequestError
from engine.worker.build import load_draft
from engine.worker.kv_memory import DeviceMemory
from engine.worker.loading import load_shard, load_target
from engine.worker.resolve import resolve
from engine.worker.worker import Worker
from models.decoder import DecoderModel
from models.parts.rotary import Rotary
from parallel.group import Group
from parallel.matrix_layer import Placement
from tests.support.engines import TINY, complete_all
from tests.support.profiles import is_all, only_in_all
from tests.support.ranks import DRAFT, settings, write_random_model
from tests.support.rig import CPU

LONGEST = 4_194_304 if is_all() else 524_288
LONG = replace(TINY, max_position_embeddings=LONGEST)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "long", LONG)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("models") / "draft", replace(DRAFT, max_position_embeddings=40))


def tables(model: DecoderModel) -> Rotary:
    assert model.rotary is not None
    return model.rotary


def configured(directory: Path, **others: Any) -> EngineConfig:
    return EngineConfig.model_validate(settings(3, model=str(directory), dtype="float64", **others))


def test_rotary_tables_have_the_served_length(directory: Path, draft: Path) -> None:
    speculation = {"gamma": 3, "drafter": "model", "model": str(draft)}
    config = configured(directory, max_model_len=4096, speculation=speculation)
    resolved, group = resolve(config, None), Group.single()
    target = load_shard(config, resolved, CPU, group, progress=False)
    drafting = load_draft(config, target, resolved.max_model_len, group).model
    assert drafting is not None
    for model in (target, drafting):
        assert [len(table) for table in tables(model)] == [4096, 4096]


def test_rotary_tables_shrink_once_the_length_is_decided(
    directory: Path, draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the pool, and with it the length, is sized after the models are loaded."""
    speculation = {"gamma": 3, "drafter": "model", "model": str(draft)}
    config = configured(directory, max_model_len=None, speculation=speculation, cache={"page_size": 4})
    resolved, group = resolve(config, None, sizes_pool=False), Group.single()
    assert (resolved.num_pages, resolved.max_model_len) == (None, LONGEST)
    monkeypatch.setattr(
        "engine.worker.kv_memory.measure", lambda config, model: DeviceMemory(total=3 * 10**6, used=0, running=0)
    )
    worker = Worker.load(config, resolved, CPU, group, group)
    drafting = worker.draft.model
    assert drafting is not None
    assert 0 < worker.max_model_len < 10**4
    for model in (worker.model, drafting):
        assert model.max_positions == worker.max_model_len
        for table in tables(model):
            held = table.untyped_storage().nbytes()
            assert held == table.nbytes  # the rest is freed
    whole = load_target(config, progress=False)
    shared = Worker.load(config, resolved, CPU, group, group, model=whole)
    assert shared.max_model_len < whole.max_positions == LONGEST  # other engines may use it, too


@pytest.mark.parametrize(("stated", "positions"), [(4096, 4096), (None, LONGEST)])
def test_a_target_without_a_pool(
    directory: Path, stated: int | None, positions: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It has the length that is stated, or the model's, and nothing says that less is served."""
    config = configured(directory, max_model_len=stated, cache={"page_size": 4, "memory_gb": 1e-4})
    assert load_target(config, progress=False).max_positions == positions
    assert not caplog.records


def test_shapes_without_weights_cost_nothing() -> None:
    before = torch.randn(1)  # the meta device allocates nothing, and computes nothing on the CPU
    model = DecoderModel(
        replace(LONG, max_position_embeddings=2**40), Placement(Group.single(), before.dtype, torch.device("meta"))
    )
    assert len(tables(model)[0]) == 2**40


@pytest.mark.parametrize("speculation", ["self", only_in_all("window"), "snapkv", only_in_all("all")])
def test_requests_of_the_served_length(directory: Path, draft: Path, speculation: str) -> None:
    """Every position of the longest request is in the tables, also those that are only drafted."""
    kv: dict[str, Any] = {"policy": "window" if speculation == "self" else speculation, "budget": 16}
    kv = {"policy": "all"} if speculation == "all" else kv | ({"recent": 8} if speculation == "snapkv" else {"sink": 4})
    drafter = {} if speculation == "self" else {"drafter": "model", "model": str(draft)}
    requests = [
        AddRequest(
            str(length), [2 + i % 60 for i in range(length)], SamplingParams(max_tokens=96 - length, ignore_eos=True)
        )
        for length in (1, 50, 93, 95)
    ]
    found = []
    for gamma in (0, 3):
        config = configured(directory, max_model_len=96, speculation={"gamma": gamma, "kv": kv, **drafter})
        engine = Engine(config, progress=False)
        assert len(tables(engine._worker.model)[0]) == 96
        found.append(complete_all(engine, requests))
        engine.close()
    assert found[0] == found[1]
    assert [len(tokens) for tokens in found[0].values()] == [95, 46, 3, 1]


def shaped(path: Path, **keys: Any) -> Path:
    """Write a config.json alone, which is all that `resolve` reads."""
    shape = {"model_type": "llama", "intermediate_size": 14336, "num_key_value_heads": 8, "head_dim": 128} | keys
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(shape))
    return path


LLAMA_31_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 131072,
}
QWEN3_8B = LLAMA_31_8B | {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "max_position_embeddings": 40960,
}
QWEN3_4B_2507 = QWEN3_8B | {"hidden_size": 2560, "max_position_embeddings": 262144}
MINISTRAL_8B = QWEN3_8B | {"model_type": "mistral", "sliding_window": 32768, "max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("keys", "longest"), [(LLAMA_31_8B, 131072), (QWEN3_8B, 40960), (QWEN3_4B_2507, 262144), (MINISTRAL_8B, 32768)]
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("page_size", [16, 32])
def test_defaults_on_a_cpu_serve_what_fits(
    keys: dict[str, Any], longest: int, dtype: str, page_size: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = {"page_size": page_size}
    config = EngineConfig.model_validate({"model": str(shaped(tmp_path, **keys)), "dtype": dtype, "cache": cache})
    resolved = resolve(config, None)
    token = 2 * keys["num_hidden_layers"] * 8 * 128 * (2 if dtype == "bfloat16" else 4)
    pages = int(4e9) // (token * page_size)
    assert pages * page_size < longest
    assert (resolved.num_pages, resolved.max_model_len) == (pages, pages * page_size)
    (record,) = caplog.records
    says = f"max_model_len is {pages * page_size} tokens, of the model's {longest}: cache.memory_gb (4) holds no more; "
    assert record.getMessage() == says + "raise it to serve longer requests"
    caplog.clear()

    # What other ranks get is all set, so they do not decide or warn again.
    again = resolve(resolved.fill_in(config), None)
    assert (again.num_pages, again.max_model_len) == (resolved.num_pages, resolved.max_model_len)
    enough = config.model_copy(update={"cache": config.cache.model_copy(update={"memory_gb": 100.0})})
    assert resolve(enough, None).max_model_len == longest
    assert not caplog.records
    with pytest.raises(
        ConfigError, match=rf"hold less than one request of max_model_len {longest} .*raise cache\.memory_gb"
    ):
        resolve(config.model_copy(update={"max_model_len": longest}), None)


def test_what_drafts_keep_is_left_out(tmp_path: Path) -> None:
    """SnapKV keeps 8 rows of 512 tokens; nothing fits where it keeps all."""
    speculation = {"kv": {"policy": "snapkv", "budget": 512}}
    chosen = {"model": str(shaped(tmp_path, **LLAMA_31_8B)), "dtype": "bfloat16", "speculation": speculation}
    resolved = resolve(EngineConfig.model_validate(chosen | {"scheduler": {"max_rows": 8}}), None)
    assert resolved.max_model_len == (int(4e9) - resolved.fixed_bytes) // (131072 * 16) * 16
    assert 0.5e9 < resolved.fixed_bytes < 1e9
    with pytest.raises(ConfigError) as error:
        resolve(EngineConfig.model_validate(chosen), None)
    says = r"engine\.cache: cache\.memory_gb \(4\) leaves 4 GB, no more than the [\d.]+ GB that drafts keep for 64 "
    remedy = r"rows; lower speculation\.kv\.budget or scheduler\.max_rows, or raise cache\.memory_gb"
    assert re.fullmatch(says + remedy, str(error.value))
    short = chosen | {"scheduler": {"max_rows": 8}, "max_model_len": 131072}
    with pytest.raises(ConfigError, match=r"tokens, beside the .* GB of .* that drafts keep.*max_model_len"):
        resolve(EngineConfig.model_validate(short), None)


def test_an_engine_serves_the_shorter_length(directory: Path) -> None:
    config = configured(directory, max_model_len=None, cache={"page_size": 4, "num_pages": 30})
    engine = Engine(config, progress=False)
    assert engine.ready.max_model_len == 120
    request = AddRequest("a", [3] * 100, SamplingParams(max_tokens=20, ignore_eos=True))
    assert len(complete_all(engine, [request])["a"]) == 20
    with pytest.raises(RequestError, match="120"):
        engine.add(AddRequest("b", [3] * 100, SamplingParams(max_tokens=21)))
    engine.close()
