"""The start-up profile: engines of any length can be measured, and a stored profile is only used where it is valid."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config.deployment import EngineConfig
from engine.control.step_times import StepSample
from engine.params import SamplingParams
from engine.ranks.protocol import WeightBytes
from engine.worker import consistency, worker
from engine.worker.profiler import _path, load_profile, profile_key, save_profile
from engine.worker.resolve import resolve
from models.config import ModelConfig
from tests.support.engines import TINY, complete, tiny_engine, tiny_model
from tests.support.profiles import is_all, only_in_all
from tests.support.ranks import DRAFT, write_random_model
from tests.support.workloads import prompt_of

KV: dict[str, dict[str, Any]] = {
    "window": {"budget": 16, "sink": 4},
    "verified": {"policy": "verified", "budget": 16, "sink": 4},
    "quest": {"policy": "quest", "budget": 16, "sink": 4, "interval": 2},
    "snapkv": {"policy": "snapkv", "budget": 16, "recent": 8, "queries": 5, "kernel": 3, "reselect": 4},
}


DENSE = {"target": "dense", "drafts": "dense"}
LENGTHS = (4, 8, 20, 127, 128, 129, 140)
FAST = {(4, "window"), (8, "verified"), (20, "snapkv"), (128, "window"), (129, "quest")}


@pytest.mark.parametrize(
    ("length", "policy"),
    [each if each in FAST else only_in_all(*each) for each in product(LENGTHS, KV)],
)
def test_short_engines_and_small_pools_can_be_profiled(length: int, policy: str) -> None:
    engine = tiny_engine(
        tiny_model(),
        gamma="auto",  # type: ignore[arg-type]
        max_model_len=length,
        cache={"num_pages": -(-length // 4)},
        speculation={"kv": KV[policy]},
    )
    params = SamplingParams(max_tokens=length - 2 if is_all() else min(length - 2, 25), seed=1, ignore_eos=True)
    assert complete(engine, prompt_of(2, 1), params) == complete(
        tiny_engine(tiny_model(), gamma=0), prompt_of(2, 1), params
    )


def test_comparing_ranks_is_no_part_of_what_a_round_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = tiny_engine(tiny_model(), gamma=2)
    now = [0.0]

    def compare(*_: object) -> None:
        now[0] += 100.0

    monkeypatch.setattr(worker, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(consistency, "compare", compare)
    engine._worker._digest_every = 1
    complete(engine, prompt_of(9, 1), SamplingParams(max_tokens=9))
    assert now[0] >= 100.0
    assert engine.stats().verify_seconds < 100.0


@pytest.mark.parametrize("kept", [[], [StepSample(1, 64, 0, 0.0, 0.1)], [StepSample(1, 64, 3, 0.1, 0.1)]])
def test_a_kept_profile_that_says_too_little_is_no_profile(kept: list[StepSample]) -> None:
    save_profile("little", kept)
    assert _path("little").exists()
    assert load_profile("little") is None


def test_another_draft_model_in_the_same_place_is_profiled_anew(tmp_path: Path) -> None:
    def key(num_layers: int) -> str:
        path = write_random_model(tmp_path / "draft", replace(DRAFT, num_layers=num_layers))
        speculation = {"drafter": "model", "model": str(path)}
        config = tiny_engine(tiny_model(), gamma=2, speculation=speculation)._config
        return profile_key(config, resolve(config, tiny_model()), DENSE, WeightBytes())

    assert TINY.vocab_size == DRAFT.vocab_size
    assert key(1) != key(2)
    assert key(1) == key(1)


def key_of(config: dict[str, Any], shape: ModelConfig = TINY) -> str:
    """Profile key of these settings, for a model of this shape."""
    model = tiny_model(config=shape)
    settings = EngineConfig.model_validate({"model": "tiny", "cache": {"num_pages": 2000, "page_size": 4}} | config)
    return profile_key(settings, resolve(settings, model), DENSE, WeightBytes())


LONG = replace(TINY, max_position_embeddings=20000)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"cache": {"num_pages": 6000, "page_size": 4}}, LONG),
        ({"max_model_len": 9000, "cache": {"num_pages": 6000, "page_size": 4}}, LONG),
        ({"cache": {"memory_gb": 1.0, "page_size": 4}}, replace(LONG, eos_token_ids=(5, 6), rms_norm_eps=1e-5)),
        ({"cache": {"num_pages": 6000, "page_size": 4}, "scheduler": {"max_batch_tokens": 99, "max_waiting": 7}}, LONG),
        ({"cache": {"num_pages": 6000, "page_size": 4}, "speculation": {"kv": {"sink": 32}}}, LONG),
        ({"cache": {"num_pages": 6000, "page_size": 4}, "speculation": {"verification": "rejection"}}, LONG),
        ({"cache": {"num_pages": 6000, "page_size": 4}, "check_invariants": True, "step_timeout_s": 5.0}, LONG),
    ],
)
def test_settings_that_change_no_times_share_a_profile(config: dict[str, Any], shape: ModelConfig) -> None:
    assert key_of(config, shape) == key_of({"cache": {"num_pages": 6000, "page_size": 4}}, LONG)


def test_pages_that_rows_may_read_change_no_times() -> None:
    keys = [key_of({"speculation": {"kv": {"policy": "verified", "latest": each}}}) for each in ("auto", "never")]
    assert keys[0] == keys[1] != key_of({})


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"max_model_len": 1000}, TINY),
        ({"cache": {"num_pages": 2000, "page_size": 8}}, TINY),
        ({"scheduler": {"max_rows": 3}}, TINY),
        ({"threads": 1}, TINY),
        ({"speculation": {"gamma_max": 4}}, TINY),
        ({"speculation": {"kv": {"budget": 256}}}, TINY),
        ({"speculation": {"kv": {"positions": "relative"}}}, TINY),
        ({"speculation": {"kv": {"policy": "topk"}}}, TINY),
        ({"target_kv": {"policy": "quest"}}, TINY),
        ({}, replace(TINY, num_layers=3)),
    ],
)
def test_settings_that_change_times_do_not(config: dict[str, Any], shape: ModelConfig) -> None:
    assert key_of(config, shape) != key_of({"threads": 2} if "threads" in config else {})


def test_the_settings_of_a_target_that_reads_less_change_times() -> None:
    settings: list[dict[str, Any]] = [{}, {"budget": 512}, {"interval": 2}, {"sink": 32}, {"window": 512}]
    assert len({key_of({"target_kv": {"policy": "quest"} | each}) for each in settings}) == len(settings)


def test_formats_of_loaded_weights_count_not_settings() -> None:
    """`auto` and `same` stand for what a checkpoint has and for what was measured."""
    config, model = EngineConfig.model_validate({"model": "tiny", "cache": {"num_pages": 2000}}), tiny_model()
    sizes = resolve(config, model)
    chosen = config.model_copy(update={"weights": "int4"})
    formats = [DENSE, DENSE | {"drafts": "int8"}, {"target": "int4 (as stored)", "drafts": "int4 (as stored)"}]
    keys = [profile_key(config, sizes, each, WeightBytes()) for each in formats]
    assert len({*keys, profile_key(config, sizes, DENSE, WeightBytes(target=9))}) == 4
    assert profile_key(chosen, sizes, DENSE, WeightBytes()) == keys[0]
