"""Formats of weights and KV in benches: the same flags everywhere, and none of them without effect."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench.corpus import BenchError
from bench.format_flags import FormatFlags, add_format_flags, exits_on_error, read_format_flags
from bench.gpu.gpu_rounds import Bench
from bench.micro.blank_rounds import BlankRounds, cpu_config, load_with_ops
from bench.offline import memory, perplexity, reuse
from bench.offline.acceptance_sweep import Setup
from engine.config.deployment import ConfigError, EngineConfig
from engine.worker.weight_choice import target_weights
from kernels.cpu.cpu_ops import CpuOps
from kernels.reference_ops import REFERENCE, ReferenceOps
from server.cli.app import app
from tests.support.engines import TINY
from tests.support.rig import CPU
from tests.support.tiny import write_model

DRAFTING = [
    *("bench.offline.divergence", "bench.offline.growth", "bench.offline.mixed", "bench.offline.reuse"),
    *("bench.micro.choosing", "bench.micro.shares", "bench.micro.neighbours", "bench.gpu.__main__"),
]
PLAIN = ["bench.offline.memory", "bench.offline.target_kv", "bench.offline.perplexity", "bench.micro.prefill_parts"]


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", [*DRAFTING, *PLAIN])
def test_benches_have_the_flags(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    said = capsys.readouterr().out
    assert "--weights" in said
    assert ("--draft-weights" in said) == (name in DRAFTING)
    assert ("--kv-format" in said) == (name != "bench.offline.target_kv")  # whose targets read dense KV


def test_flags() -> None:
    parser = argparse.ArgumentParser()
    add_format_flags(parser)
    assert read_format_flags(parser.parse_args([])) == FormatFlags("auto", "auto")
    flags = read_format_flags(parser.parse_args(["--weights", "int4", "--draft-weights", "fp8"]))
    config = flags.apply(EngineConfig.model_validate({"model": "m", "speculation": {"gamma": 2}}))
    assert (config.weights, config.speculation.weights, config.speculation.gamma) == ("int4", "fp8", 2)
    assert flags.missing(frozenset({"dense", "int4"})) == ["fp8"]
    assert FormatFlags("dense", "same").missing(frozenset({"dense"})) == []
    sealed = read_format_flags(parser.parse_args(["--kv-format", "int4x2"])).apply(EngineConfig())
    assert (sealed.cache.format, sealed.cache.page_size) == ("int4x2", 64)
    with pytest.raises(ConfigError, match=r"speculation\.kv\.budget \(96\) must be a multiple of .* \(64\)"):
        FormatFlags(kv="int8").apply(EngineConfig.model_validate({"speculation": {"kv": {"budget": 96}}}))
    for wrong in (["--kv-format", "fp4"], ["--weights", "int3"], ["--weights", "same"], ["--draft-weights", "dense"]):
        with pytest.raises(SystemExit):
            parser.parse_args(wrong)


@pytest.mark.parametrize(
    "name",
    [
        *("bench.offline.memory", "bench.offline.growth", "bench.offline.divergence", "bench.offline.mixed"),
        *("bench.micro.choosing", "bench.micro.shares"),
    ],
)
def test_formats_that_kernels_do_not_read(name: str, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ops in (CpuOps, ReferenceOps):
        monkeypatch.setattr(ops, "kv_formats", frozenset({"dense"}))
    monkeypatch.setattr(sys, "argv", ["bench", "--model", str(tiny_dir), "--kv-format", "int8"])
    if name == "bench.offline.memory":
        sys.argv += ["--ranks", "1"]
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main()
    assert re.fullmatch(
        r"error: engine\.cache\.format: \w+ kernels do not read int8 KV, but dense", str(ended.value.code)
    )


def test_memory_ends_as_its_processes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    run: list[list[str]] = []

    def fail(command: list[str], check: bool) -> subprocess.CompletedProcess[bytes]:
        run.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", fail)
    monkeypatch.setattr(sys, "argv", ["bench", "--ranks", "1,2", "--kv-format", "fp8"])
    with pytest.raises(SystemExit) as ended:
        memory.main()
    assert ended.value.code == 3
    assert len(run) == 1


def test_errors_of_settings() -> None:
    with (
        pytest.raises(SystemExit, match=r"^error: cache\.page_size: Input should be greater than 0$"),
        exits_on_error(),
    ):
        EngineConfig.model_validate({"cache": {"page_size": 0}})
    with pytest.raises(KeyError), exits_on_error():
        raise KeyError("a bug")


def test_wrapped_kernels_get_the_weights(tiny_dir: Path) -> None:
    config = cpu_config(str(tiny_dir), 1, 1, FormatFlags("int8", "int4"))
    model = load_with_ops(config, lambda ops: ops)
    rounds = BlankRounds(config, 1, 20, 1, 2, model)
    assert rounds.engine.stats().weights == {"target": "int8", "drafts": "int4 and int8"}
    rounds.close()


def test_a_first_run_without_drafts_loads_their_weights(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    def run(name: str, config: EngineConfig, model: object, load: object) -> reuse.Replay:
        loaded.append(model)
        raise ValueError("enough")

    monkeypatch.setattr(reuse, "run", run)
    monkeypatch.setattr(reuse, "compose", lambda *arguments, **others: [])
    with pytest.raises(SystemExit, match="enough"):
        reuse.main(["--model", str(tiny_dir), "--speculation", "off,2", "--draft-weights", "int4"])
    assert loaded[0].weights.drafts == "int4"  # type: ignore[attr-defined]


def test_setups_keep_the_weights_of_drafts() -> None:
    config = EngineConfig.model_validate({"model": "m", "speculation": {"weights": "int4"}})
    assert Setup("self", "window", 64).config(config, 3).speculation.weights == "int4"


def test_rounds_with_weights_of_fewer_bits() -> None:
    shape = dataclasses.replace(TINY, num_heads=4, head_dim=16, hidden_size=64)
    made = Bench(
        "tiny",
        shape,
        [(2, 50)],
        gamma=2,
        budget=32,
        device=CPU,
        dtype=torch.float32,
        ops=REFERENCE,
        memory=1 << 30,
        page_size=4,
        rounds=2,
        formats=FormatFlags("int8", "int4"),
    )
    found = made.measure(2, 50, alpha=0.5, ceiling=1e9)
    assert (found.weights, found.draft_weights) == ("int8", "int4 and int8")
    made.close()


def test_perplexity_of_several_models(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(perplexity, "_perplexity", lambda *given: [(kv, torch.tensor([-1.0, -2.0])) for kv in given[3]])
    text = tmp_path / "text"
    text.write_text("words of a text " * 100, encoding="utf-8")
    flags = ["--model", str(tiny_dir), "--model", "other", "--weights", "dense", "int4", "--length", "20"]
    monkeypatch.setattr(sys, "argv", ["perplexity", *flags, "--text", str(text)])
    perplexity.main()
    names = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [f"{tiny_dir}, dense", f"{tiny_dir}, int4", "other, dense", "other, int4"]


def test_acceptance_loads_the_weights_of_drafts(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the config file has no drafts."""
    asked: list[EngineConfig] = []

    def load(config: EngineConfig, *, progress: bool) -> None:
        asked.append(config)
        raise BenchError("enough")

    monkeypatch.setattr("engine.worker.loading.load_target", load)
    file = tmp_path / "config.yaml"
    file.write_text(f"engine: {{model: {tiny_dir}, device: cpu, speculation: {{gamma: 0}}}}", encoding="utf-8")
    done = CliRunner().invoke(app, ["bench", "acceptance", "--config", str(file), "--draft-weights", "int4"])
    assert "enough" in str(done.exception)
    assert target_weights(asked[0], REFERENCE).drafts == "int4"
