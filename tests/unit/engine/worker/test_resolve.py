"""Settings that are left open, the dtype, and those that a device refuses."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import torch

from engine.config.deployment import CacheConfig, ConfigError, EngineConfig
from engine.config.speculation import SpeculationConfig
from engine.worker.resolve import Resolved, _dtype, resolve
from kernels.cpu import compiler
from kernels.cpu.compiler import instruction_sets
from kernels.kv.kv_bits import KV_BITS
from kernels.weights.weight_format import FORMATS
from models.known_shapes import SHAPES
from tests.support.engines import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("machine", "best", "dtype"),
    [
        ("x86_64", "amx", torch.bfloat16),
        ("x86_64", "avx512_bf16", torch.bfloat16),
        ("x86_64", "avx512", torch.float32),
        ("x86_64", "avx2", torch.float32),
        ("x86_64", "portable", torch.float32),
        ("aarch64", "neon_bf16", torch.bfloat16),
        ("aarch64", "neon_dotprod", torch.float32),
        ("aarch64", "portable", torch.float32),
        ("riscv64", "portable", torch.float32),
    ],
)
def test_bfloat16_where_the_processor_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, machine: str, best: str, dtype: torch.dtype
) -> None:
    sets = instruction_sets(machine)
    (features,) = (each.features for each in sets if each.name == best)
    monkeypatch.setattr(compiler, "INSTRUCTION_SETS", sets)
    monkeypatch.setattr(compiler, "_cpuinfo", lambda: f"flags\t: {' '.join(features)}\n")
    assert _dtype("auto", CPU) == dtype
    assert _dtype("float16", CPU) == torch.float16


def test_bfloat16_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for native, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda native=native: native)
        assert _dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": "int8"}, r"^engine\.weights: the model was loaded without int8 weights$"),
        ({"speculation": {"weights": "int4"}}, r"^engine\.speculation\.weights: .* without int4 weights$"),
    ],
)
def test_a_loaded_model_has_the_weights_it_has(settings: dict[str, object], message: str) -> None:
    config = EngineConfig.model_validate({"device": "cpu", "max_model_len": 64, **settings})
    with pytest.raises(ConfigError, match=message):
        resolve(config, tiny_model())


def test_settings_name_all_formats() -> None:
    own = get_args(EngineConfig.model_fields["weights"].annotation)
    drafts = get_args(SpeculationConfig.model_fields["weights"].annotation)
    assert set(own) == {"auto", *FORMATS}
    assert set(drafts) == {"auto", "same", *FORMATS} - {"dense"}


def test_weights_that_kernels_do_not_multiply_by(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(type(model.ops), "weight_formats", frozenset(("dense", "int4")))
    for settings in ({"weights": "fp8"}, {"speculation": {"weights": "fp8"}}):
        config = EngineConfig.model_validate({"device": "cpu", "max_model_len": 64, **settings})
        with pytest.raises(ConfigError, match=r"reference kernels do not multiply by fp8 weights, but by dense, int4$"):
            resolve(config, model)


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        ("cuda", {}),
        ("cuda", {"speculation": {"weights": "auto"}}),
        ("cuda", {"speculation": {"weights": "same"}}),
        ("cpu", {"speculation": {"weights": "same"}}),
    ],
)
def test_other_weights_are_served(monkeypatch: pytest.MonkeyPatch, device: str, settings: dict[str, object]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = EngineConfig.model_validate({"device": device, "max_model_len": 64, **settings})
    assert resolve(config, tiny_model()).device.type == device


# -- formats of KV -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def default_shape(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with the config of the default model alone."""
    shape, directory = SHAPES["smollm2-135m"], tmp_path_factory.mktemp("default")
    fields = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return str(directory)


def resolved(directory: str, kv_format: str, **settings: object) -> Resolved:
    fields = {
        "model": directory,
        "device": "cpu",
        "kernels": "reference",
        "cache": {"format": kv_format, "memory_gb": 4.0},
    }
    return resolve(EngineConfig.model_validate(fields | settings), None)


@pytest.mark.parametrize(("dtype", "gain"), [("float32", 3.0), ("bfloat16", 1.8)])
@pytest.mark.parametrize("kv_format", [name for name, bits in KV_BITS.items() if bits.seals])
def test_pools_of_fewer_bits_hold_more_rows(default_shape: str, kv_format: str, dtype: str, gain: float) -> None:
    """As many as are to run, each with two exact pages."""
    rows, scheduler = {}, {"max_rows": 44 if dtype == "bfloat16" else 64}
    for each in ("dense", kv_format):
        page_size = EngineConfig.model_validate({"cache": {"format": each}}).cache.page_size
        found = resolved(default_shape, each, dtype=dtype, scheduler=scheduler).num_pages
        assert found is not None
        rows[each] = found * page_size / 7500
    assert rows[kv_format] >= gain * rows["dense"] > 0


def test_messages_name_the_exact_pages(default_shape: str) -> None:
    with pytest.raises(ConfigError, match=r"pages that are not sealed keep for 64 rows; lower .*max_batch_tokens"):
        resolved(default_shape, "int8", cache={"format": "int8", "memory_gb": 0.2}, dtype="float32")


def test_settings_name_all_formats_of_kv() -> None:
    assert get_args(CacheConfig.model_fields["format"].annotation) == tuple(KV_BITS)


def test_kv_that_kernels_do_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(type(model.ops), "kv_formats", frozenset({"dense"}))
    config = EngineConfig.model_validate({"device": "cpu", "max_model_len": 64, "cache": {"format": "int8"}})
    with pytest.raises(ConfigError, match=r"^engine\.cache\.format: reference kernels do not read int8 KV, but dense$"):
        resolve(config, model)
