"""What a target that reads part of its KV loses: perplexity, tokens that differ; and its speed beside the dense one."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.corpus import BenchError
from bench.offline.perplexity import logprobs as dense_logprobs
from bench.offline.target_kv import logprobs, main, measure, table, typical_seconds, with_target
from engine.config.deployment import ConfigError, EngineConfig
from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from tests.support.engines import run, tiny_model
from tests.support.profiles import only_in_all
from tests.support.tiny import write_model
from tests.support.workloads import prompt_of

CONFIG = EngineConfig.model_validate({"model": "tiny", "device": "cpu", "cache": {"page_size": 4, "memory_gb": 0.1}})


def target(budget: int, **others: Any) -> dict[str, Any]:
    return {"policy": "quest", "budget": budget, "sink": 4, "interval": 3, "window": 4} | others


@pytest.mark.parametrize("length", [90, only_in_all(700)])
def test_texts_are_scored_as_the_served_target_would(length: int) -> None:
    """Greedy output of an engine with that target has the log-probabilities that the benchmark computes."""
    config, model = with_target(CONFIG, target(8)), tiny_model()
    prompt, new = prompt_of(length - 60, 1), 60
    engine = Engine(config, model=model)
    params = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, logprobs=0)
    outputs = run(engine, [AddRequest("x", prompt, params)])["x"]
    text = [*prompt, *(token for output in outputs for token in output.tokens)]
    told = [at.logprob for output in outputs for at in output.logprobs or ()]
    torch.testing.assert_close(logprobs(config, model, text, len(prompt)), torch.tensor(told[1:]))


@pytest.mark.parametrize("num_prompt", [1, 100, 298])
def test_a_budget_over_the_context_loses_nothing(num_prompt: int) -> None:
    model, text = tiny_model(), prompt_of(300, 1)
    expected = dense_logprobs(model, text)[num_prompt:]
    for config in (with_target(CONFIG, None), with_target(CONFIG, target(400))):
        torch.testing.assert_close(logprobs(config, model, text, num_prompt), expected)
    if num_prompt == 100:
        lossy = logprobs(with_target(CONFIG, target(4)), model, text, num_prompt)
        assert not torch.allclose(lossy, expected)


def test_rounds_that_choose_count() -> None:
    assert typical_seconds([1, 1, 1, 5] * 3, 4) == 2
    assert typical_seconds([1, 1, 1, 5, 1, 1, 101, 5, 5, 1, 1, 1, 7], 4) == 2  # one was disturbed
    assert typical_seconds([1, 3], 4) == 2


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


def test_all_of_it(tiny_dir: Path) -> None:
    config = EngineConfig.model_validate(CONFIG.model_dump() | {"model": str(tiny_dir), "dtype": "float32"})
    prompts = [prompt_of(150, 1), prompt_of(150, 2)]
    dense, small, covering = measure(
        config, [4, 400], prompts, prompts, num_prompt=50, new_tokens=20, target=target(0) | {"policy": "quest"}
    )
    assert (dense.budget, small.budget, covering.budget) == (None, 4, 400)
    assert (dense.lost, dense.speedup, dense.first_differences) == (0, 1, [None, None])
    assert covering.perplexity == pytest.approx(dense.perplexity)
    assert covering.first_differences == [None, None]
    assert small.perplexity != pytest.approx(dense.perplexity, rel=1e-6)
    assert small.kv_tokens < 25 < 150 < covering.kv_tokens
    assert dense.compared >= 20
    lines = table([dense, small, covering]).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["dense", "4", "400"]


def test_what_cannot_be_measured() -> None:
    with pytest.raises(BenchError, match="leaves nothing to predict of 50"):
        measure(CONFIG, [4], [prompt_of(50, 1)], [], num_prompt=49, new_tokens=1, target=target(0))
    with pytest.raises(ConfigError, match="must be a multiple"):
        with_target(CONFIG, target(3))


def test_command(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_main(flags: Iterable[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["target_kv", *flags])
        main()

    file = tmp_path / "results.json"
    sizes = ["--context", "200", "--prompt", "100", "--passages", "2", "--rows", "2", "--new-tokens", "8"]
    flags = ["--model", str(tiny_dir), "--device", "cpu", "--budgets", "16,64", *sizes]
    run_main([*flags, "--json", str(file)])
    assert "x dense" in capsys.readouterr().out
    assert [result["budget"] for result in json.loads(file.read_bytes())] == [None, 16, 64]
    with pytest.raises(SystemExit):
        run_main([*flags, "--json", str(tmp_path / "absent" / "results.json")])
    with pytest.raises(SystemExit):
        run_main([*flags, "--budgets", "a few"])
