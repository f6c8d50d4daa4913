"""Acceptance measured for many drafting configurations over one text equals what an engine measures for each alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.corpus import BenchError
from bench.offline.acceptance_report import plot, table
from bench.offline.acceptance_sweep import AcceptanceResult, Setup, combine_setups, measure
from bench.offline.verification import measure_rounds
from engine.config.deployment import ConfigError, EngineConfig
from engine.params import SamplingParams
from models.decoder import DecoderModel
from server.cli.app import app
from tests.support.engines import complete, tiny_engine, tiny_model
from tests.support.profiles import is_all
from tests.support.ranks import DRAFT, write_random_model
from tests.support.tiny import write_model
from tests.support.workloads import prompt_of

CONFIG = EngineConfig.model_validate(
    {"model": "tiny", "cache": {"page_size": 4, "memory_gb": 0.1}, "scheduler": {"max_rows": 8, "max_batch_tokens": 48}}
)
GREEDY, SAMPLED = SamplingParams(temperature=0), SamplingParams(temperature=1)
WINDOW = Setup("self", "window", 24)
PROMPTS = [prompt_of(100, i) for i in range(3)]


@pytest.fixture(scope="module")
def model() -> DecoderModel:
    return tiny_model()


def test_what_reads_everything_always_agrees(model: DecoderModel, twin_dir: Path, draft_dir: Path) -> None:
    setups = [
        *(Setup("self", policy, 160) for policy in ("window", "relative", "topk")),
        Setup("self", "snapkv", 160, 8, 0),
        Setup("self", "all"),
        Setup(str(twin_dir), "all"),
        Setup(str(twin_dir), "window", 160),
        Setup(str(draft_dir), "all"),
    ]
    *dense, other = measure(CONFIG, model, PROMPTS, setups, gamma=3, new_tokens=40, sampling=[SAMPLED])
    assert [result.alpha for result in dense] == [1.0] * 7
    assert [result.accepted for result in dense] == [3 * 3 * 10] * 7
    assert other.alpha < 0.9
    assert other.rejected > 3


def test_the_target_may_read_less_itself(model: DecoderModel) -> None:
    """Dense drafts agree with a target whose budget covers the context, and with no smaller one."""

    def alpha(budget: int) -> float:
        target = {"policy": "quest", "budget": budget, "sink": 4}
        config = EngineConfig.model_validate(CONFIG.model_dump() | {"target_kv": target})
        dense = [Setup("self", "all")]
        (result,) = measure(config, model, PROMPTS, dense, gamma=16, new_tokens=40, sampling=[SAMPLED])
        return result.alpha

    assert alpha(160) == 1.0
    assert alpha(4) < 1.0


def test_a_drafter_is_judged_alike_in_any_company(model: DecoderModel, draft_dir: Path) -> None:
    alone = {}
    setups = [
        WINDOW,
        Setup("self", "relative", 24),
        Setup("self", "snapkv", 24, 8, 0),
        Setup("self", "snapkv", 32, 8, 6),
        Setup("self", "topk", 24),
        Setup(str(draft_dir), "window", 24),
        Setup(str(draft_dir), "all"),
    ]
    setups = setups if is_all() else setups[::2]
    sampling = [GREEDY, SAMPLED]
    for setup in setups:
        alone[setup] = measure(CONFIG, model, PROMPTS, [setup], gamma=2, new_tokens=30, sampling=sampling)
    together = measure(CONFIG, model, PROMPTS, setups, gamma=2, new_tokens=30, sampling=sampling)
    assert [result for setup in setups for result in alone[setup]] == together
    assert len({(result.accepted, result.rejected) for result in together}) > 4


def test_one_token_drafts_are_those_of_an_engine(model: DecoderModel) -> None:
    """One-token drafts start at every second token of the text. An engine that starts there accepts the same drafts."""
    (result,) = measure(CONFIG, model, PROMPTS[:1], [WINDOW], gamma=1, new_tokens=40, sampling=[SAMPLED])
    kv = {"budget": 24, "sink": 16}
    engine = tiny_engine(model, gamma=1, speculation={"kv": kv})
    text = complete(engine, PROMPTS[0], SamplingParams(max_tokens=43, temperature=1.0, seed=0, ignore_eos=True))
    agreed = 0
    for i in range(1, 41, 2):
        # Draft the token after a prefix in the first round of a request whose prompt is that prefix.
        probe = tiny_engine(model, gamma=1, speculation={"kv": kv})
        params = SamplingParams(max_tokens=3, temperature=1.0, seed=0, ignore_eos=True)
        complete(probe, PROMPTS[0] + text[: i - 1], params)
        agreed += probe.stats().accepted_per_position[0]
    assert (result.accepted, result.rejected) == (agreed, 20 - agreed)


def test_real_rounds_of_both_verifications(model: DecoderModel) -> None:
    new = 40 if is_all() else 24
    for verification in ("coupled", "rejection"):
        results = measure_rounds(
            CONFIG, model, PROMPTS, WINDOW, verification, gamma=3, new_tokens=new, sampling=[GREEDY, SAMPLED]
        )
        assert [result.temperature for result in results] == [0, 1]
        for result in results:
            assert result.verification == verification
            # Each row yields its first token, then accepted + 1 tokens per round; only the last round may be cut short.
            assert 0 < result.accepted < 3 * new
            assert result.rejected > 3
    engine = tiny_engine(model, gamma=3, speculation={"kv": {"budget": 24, "sink": 16}})
    for i, prompt in enumerate(PROMPTS):
        complete(engine, prompt, SamplingParams(max_tokens=new, temperature=1.0, seed=i, ignore_eos=True))
    stats = engine.stats()
    (coupled,) = measure_rounds(CONFIG, model, PROMPTS, WINDOW, "coupled", gamma=3, new_tokens=new, sampling=[SAMPLED])
    assert (coupled.accepted, coupled.rejected) == (stats.accepted_tokens, stats.rejections)


def test_setups_that_mean_nothing_are_left_out() -> None:
    listed = list(combine_setups(["self", "d"], ["all", "snapkv"], [32, 64], [32], [0, 8]))
    assert listed == [
        setup
        for draft in ("self", "d")
        for setup in (Setup(draft, "all"), *(Setup(draft, "snapkv", 64, 32, n) for n in (0, 8)))
    ]


def test_refusals(model: DecoderModel, tmp_path: Path) -> None:
    other = write_random_model(tmp_path / "other", replace(DRAFT, vocab_size=65))
    with pytest.raises(BenchError, match="a vocabulary of 65 tokens, the target has 64"):
        measure(CONFIG, model, PROMPTS, [Setup(str(other), "all")], gamma=1, new_tokens=2, sampling=[GREEDY])
    with pytest.raises(ConfigError, match="multiple of cache"):
        measure(CONFIG, model, PROMPTS, [Setup("self", "window", 18)], gamma=1, new_tokens=2, sampling=[GREEDY])
    with pytest.raises(BenchError, match="the model has 2048"):
        measure(CONFIG, model, PROMPTS, [WINDOW], gamma=1, new_tokens=2000, sampling=[GREEDY])
    with pytest.raises(BenchError, match="the model has 2048"):
        measure_rounds(CONFIG, model, PROMPTS, WINDOW, "coupled", gamma=1, new_tokens=2000, sampling=[GREEDY])


def result(policy: str, budget: int | None, alpha: float) -> AcceptanceResult:
    return AcceptanceResult(
        context=100,
        draft="self",
        policy=policy,
        budget=budget,
        recent=None,
        reselect=None,
        verification="coupled",
        temperature=0.7,
        top_p=1.0,
        gamma=2,
        accepted=round(1000 * alpha),
        rejected=round(1000 * (1 - alpha)),
    )


def test_the_report(tmp_path: Path) -> None:
    results = [result("window", 64, 0.5), result("window", 128, 0.75), result("all", None, 1.0)]
    head, window, everything = table(results).splitlines()
    assert head.split()[-3:] == ["64", "128", "all"]
    assert window.split()[-3:] == ["0.500", "0.750", "-"]
    assert everything.split()[-3:] == ["-", "-", "1.000"]
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path: Path) -> None:
    directory, target = write_model(tmp_path / "model"), tmp_path / "results.json"
    common = ["bench", "acceptance", "--model", str(directory), "--dtype", "float32", "--context", "100"]
    common += ["--passages", "2", "--new-tokens", "12", "--budget", "32,64"]
    done = CliRunner().invoke(
        app, [*common, "--draft", f"self,{directory}", "--policy", "window,all", "--json", str(target)]
    )
    assert done.exit_code == 0, done.output
    found = {(r["draft"], r["policy"], r["budget"]): r["alpha"] for r in json.loads(target.read_text())}
    assert len(found) == 6
    assert found["self", "all", None] == found[str(directory), "all", None] == 1.0
    done = CliRunner().invoke(app, [*common, "--verification", "rejection", "--sampling", "0,1:0.9", "--policy", "all"])
    assert done.exit_code == 0, done.output
    assert done.output.count("rejection") == 2
    for arguments, says in (
        (["--sampling", "warm"], "'warm' is not a temperature"),
        (["--policy", "wide"], "'wide' is not one of window, verified"),
        (["--verification", "none"], "'none' is not one of coupled, rejection"),
        (["--budget", "0"], "positive"),
        (["--policy", "snapkv"], "snapkv needs a budget larger than --recent"),
        (["--plot", str(tmp_path / "no" / "x.png")], "not a directory"),
    ):
        done = CliRunner().invoke(app, [*common, *arguments])
        assert done.exit_code == 2
        assert says in " ".join(done.output.replace("│", " ").split())
