"""`magicdec plan`: its output, its files, and the arguments it rejects."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from bench.paper.published import Row, read_rows
from bench.paper.vegas_terms import TERMS
from engine.config.deployment import CacheConfig, EngineConfig
from engine.config.speculation import SpeculationConfig
from kernels.kv.kv_bits import KV_BITS
from kernels.weights.weight_bits import EXPERTS_ALONE, WEIGHT_BITS
from server.cli import main
from server.cli.plan import DraftWeightsName, KVFormatName, TermsName, WeightsName
from tests.support.paths import ROOT
from tests.support.profiles import is_all

FIELDS = {
    *("model", "draft", "gpu", "tensor_parallel", "batch", "context", "budget", "alpha", "gamma", "speedup", "fits"),
    *("policy", "largest_batch", "break_even_context", "break_even_limit", "tokens_per_second"),
    *("plain_tokens_per_second", "t_target_ms", "t_draft_ms", "t_verify_ms", "weight_bytes", "kv_bytes"),
    *("draft_bytes", "memory_bytes", "usable_bytes", "shared", "t_choose_ms", "draft_row_read_bytes"),
    *("draft_read_bytes", "weights", "draft_weights", "kv_format"),
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["magicdec", "plan", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


class Planner:
    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._file = directory / "plan.json"
        self._monkeypatch = monkeypatch

    def __call__(self, *arguments: str, model: str = "llama-3.1-8b", gpu: str = "a100-80gb") -> list[dict[str, Any]]:
        code = run(self._monkeypatch, "--model", model, "--gpu", gpu, "--json", str(self._file), *arguments)
        assert code == 0
        listed: list[dict[str, Any]] = json.loads(self._file.read_text(encoding="utf-8"))
        return listed


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planner:
    return Planner(tmp_path, monkeypatch)


def test_json(plan: Planner) -> None:
    found = plan("--tp", "8", "--batch", "32,64,128", "--context", "8000,32000")
    assert [(row["context"], row["batch"]) for row in found] == [
        (context, batch) for context in (8000, 32000) for batch in (32, 64, 128)
    ]
    for row in found:
        assert set(row) == FIELDS
        assert (row["model"], row["draft"], row["gpu"]) == ("llama-3.1-8b", "self", "a100-80gb")
        assert row["tensor_parallel"] == 8
        assert row["fits"] is True
        assert 0 < row["alpha"] < 1 <= row["speedup"]
        tokens = sum(row["alpha"] ** i for i in range(row["gamma"] + 1))
        taken = row["gamma"] * row["t_draft_ms"] + row["t_verify_ms"]
        assert row["speedup"] == pytest.approx(tokens * row["t_target_ms"] / taken)
        assert row["tokens_per_second"] == pytest.approx(row["batch"] * tokens / taken * 1e3)
    assert found[-1]["speedup"] > found[0]["speedup"] + 0.3


def test_what_is_given_is_taken(plan: Planner) -> None:
    (row,) = plan(*("--tp", "8", "--batch", "64", "--context", "32000"), *("--budget", "256", "--alpha", "0.7"))
    assert (row["budget"], row["alpha"]) == (256, 0.7)
    (row,) = plan(*("--tp", "8", "--batch", "64", "--context", "32000"), *("--gamma", "2", "--budget", "all"))
    assert (row["gamma"], row["budget"]) == (2, "all")
    assert row["speedup"] < 1
    (row,) = plan("--gamma", "0", "--batch", "64")
    assert row["speedup"] == 1


def test_the_best_is_chosen(plan: Planner) -> None:
    where = ("--tp", "8", "--batch", "64", "--context", "32000")
    (best,) = plan(*where)
    for budget in (128, 256, 512, 1024, 2048) if is_all() else (128, 512, 2048):
        for gamma in range(17) if is_all() else (0, 1, best["gamma"] - 1, best["gamma"] + 1, 16):
            (other,) = plan(*where, "--budget", str(budget), "--gamma", str(gamma))
            assert other["speedup"] <= best["speedup"]


@pytest.mark.parametrize("row", [row for row in read_rows() if row.fit])
def test_published_rows(plan: Planner, row: Row) -> None:
    where = ("--tp", "8", "--draft", row.draft, "--batch", str(row.batch), "--context", str(row.context))
    (found,) = plan(*where, "--budget", str(row.budget), "--gamma", str(row.gamma), model=row.target)
    assert found["speedup"] == pytest.approx(row.speedup, rel=0.15)
    assert found["fits"] is True


def test_fixed_time_of_a_layer(plan: Planner) -> None:
    where = ("--batch", "8", "--gamma", "3", "--budget", "512")
    (fitted,), (shorter,) = plan(*where), plan(*where, "--layer-us", "20")
    for name in ("t_target_ms", "t_draft_ms", "t_verify_ms"):
        assert fitted[name] - shorter[name] == pytest.approx(32 * 0.115)
    assert shorter["speedup"] > fitted["speedup"]
    (slow,) = plan("--batch", "1", "--gamma", "0", "--layer-us", "1e6", gpu="cpu")
    assert slow["t_target_ms"] > 32e3


def test_weights_of_fewer_bits(
    plan: Planner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--batch", "8", "--gamma", "3", "--budget", "512", "--layer-us", "20", "--alpha", "0.8")
    (dense,), (drafts,) = plan(*where), plan(*where, "--draft-weights", "int4")
    (target,) = plan(*where, "--weights", "int4")
    formats = [("dense", "dense"), ("dense", "int4"), ("int4", "int4")]
    assert [(row["weights"], row["draft_weights"]) for row in (dense, drafts, target)] == formats
    for name in ("t_target_ms", "t_verify_ms", "weight_bytes"):
        assert drafts[name] == dense[name] > target[name]
    assert drafts["t_draft_ms"] == target["t_draft_ms"] < 0.5 * dense["t_draft_ms"]
    assert drafts["speedup"] > 1.3 * dense["speedup"]
    assert dense["draft_bytes"] == target["draft_bytes"] == 0
    assert drafts["draft_bytes"] == (32 * 218_103_808 * 5 + 128_256 * 4096 * 8) / 8
    capsys.readouterr()
    assert run(monkeypatch, *("--model", "llama-3.1-8b", "--gpu", "h100", "--weights", "fp8")) == 0
    assert ", self-speculation, fp8 weights, drafts fp8; " in capsys.readouterr().out


def test_every_format_has_a_forecast() -> None:
    assert {*KVFormatName} == {*KV_BITS} >= {*get_args(get_type_hints(CacheConfig)["format"])}
    assert [*WeightsName] == [*WEIGHT_BITS]
    assert {"auto", *WeightsName} - EXPERTS_ALONE == {*get_args(get_type_hints(EngineConfig)["weights"])}
    assert {"auto", *DraftWeightsName} == {*get_args(get_type_hints(SpeculationConfig)["weights"])}


def test_every_policy_has_a_line(
    plan: Planner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ("--batch", "8,16", "--context", "32000", "--budget", "512", "--gamma", "6", "--layer-us", "20")
    found = plan(*where, "--policy", "window,snapkv,verified,quest", "--plot", str(tmp_path / "plan.png"), gpu="h100")
    names = ["window", "snapkv", "verified", "quest"]
    assert [(row["batch"], row["policy"]) for row in found] == [(rows, name) for rows in (8, 16) for name in names]
    assert found[0] == plan(*where, gpu="h100")[0]
    alphas = [row["alpha"] for row in found[:4]]
    assert alphas == pytest.approx([0.81, 1 - 0.75 * 0.19, 1 - 0.32 * 0.19, 1 - 0.714 * 0.19], abs=1e-3)
    assert [row["draft_row_read_bytes"] // 131_072 for row in found[:4]] == [512, 512, 537, 537]
    assert [row["t_choose_ms"] > 0 for row in found[:4]] == [False, False, True, True]
    assert [row["draft_bytes"] > 0 for row in found[:4]] == [False, True, False, True]
    capsys.readouterr()
    flags = ("--model", "llama-3.1-8b", "--gpu", "h100", *where, "--policy", "verified,quest")
    assert run(monkeypatch, *flags) == 0
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert title.startswith("llama-3.1-8b on 1 x h100, self-speculation; ")
    assert head.split()[:3] == ["batch", "context", "policy"]
    assert {len(line) for line in (head, *lines)} == {len(head)}
    assert [line.split()[2] for line in lines] == ["verified", "quest"] * 2
    # 32 layers, 152 float32 per page; a 16th of the KV, twice in 6 steps. 8 rows at 80 % of 3.35 TB/s.
    assert [line.split()[11:13] for line in lines[:2]] == [["0.12", "70.4"], ["1.57", "70.4"]]


def test_all_kv_is_the_same_with_every_policy(plan: Planner) -> None:
    found = plan("--budget", "all", "--policy", "window,verified,quest")
    assert [{**row, "policy": "any"} for row in found[::3]] == [{**row, "policy": "any"} for row in found[1::3]]
    assert {(row["budget"], row["t_choose_ms"], row["draft_bytes"]) for row in found} == {("all", 0, 0)}


def test_several_budgets(plan: Planner) -> None:
    (row,) = plan("--tp", "8", "--batch", "64", "--context", "32000", "--budget", "128,256")
    assert row["budget"] == 256


def test_draft_model(plan: Planner) -> None:
    (row,) = plan("--draft", "tinyllama-1.1b", "--tp", "8", "--batch", "32", model="llama-2-7b-32k")
    assert row["draft"] == "tinyllama-1.1b"
    assert row["draft_bytes"] > 2.2e9 / 8
    assert row["t_draft_ms"] < row["t_target_ms"] / 2


def test_directory(plan: Planner, tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (row,) = plan("--batch", "2", "--context", "500", model=str(tmp_path), gpu="cpu")
    assert row["kv_bytes"] == 2 * (500 + row["gamma"] + 1) * 2 * 2 * 32 * 2


def test_the_format_of_quantized_weights_is_asked_for(
    plan: Planner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 512}
    config |= {"quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run(monkeypatch, "--model", str(tmp_path), "--gpu", "h100", "--context", "500") == 2
    assert "--weights" in capsys.readouterr().err
    (row,) = plan("--batch", "8", "--context", "500", "--weights", "int4", model=str(tmp_path), gpu="h100")
    assert row["weights"] == "int4"


def test_wider_weights(plan: Planner) -> None:
    (narrow,), (wide,) = (
        plan("--batch", "8", "--gamma", "0"),
        plan("--batch", "8", "--gamma", "0", "--dtype", "float32"),
    )
    assert wide["memory_bytes"] == 2 * narrow["memory_bytes"]
    assert wide["t_target_ms"] > 1.5 * narrow["t_target_ms"]


def test_shared_tokens(
    plan: Planner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    where = ("--tp", "8", "--batch", "64", "--context", "32000")
    gains = []
    for shared in (0, 16000, 32000):
        (row,) = plan(*where, "--shared", str(shared))
        assert row["shared"] == shared
        gains.append(row["speedup"])
        assert row["kv_bytes"] == (64 * (32001 + row["gamma"] - shared) + shared) * 16_384
    assert gains[0] > gains[1] + 0.2 > gains[2] + 0.2
    capsys.readouterr()
    flags = ("--model", "llama-3.1-8b", "--gpu", "a100-80gb", *where, "--shared", "16000")
    assert run(monkeypatch, *flags, "--plot", str(tmp_path / "plan.png")) == 0
    _, head, line = capsys.readouterr().out.splitlines()
    assert dict(zip(head.split(), line.split(), strict=False))["shared"] == "16000"
    assert len(head) == len(line)
    (row,) = plan(*where)
    assert row["shared"] == 0
    assert "shared" not in capsys.readouterr().out


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--model", "llama-2-7b-32k", "--gpu", "a100-80gb", "--tp", "8", "--context", "32000")
    assert run(monkeypatch, *where, "--batch", "32,64") == 0
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("llama-2-7b-32k on 8 x a100-80gb, self-speculation")
    assert head.split()[:3] == ["batch", "context", "policy"]
    assert {len(line) for line in (head, *rows)} == {len(head)}
    assert [row.split()[-3] for row in rows] == ["yes", "no"]


@pytest.mark.parametrize("batches", ["32,64", "32"])
def test_plot(plan: Planner, tmp_path: Path, batches: str) -> None:
    file = tmp_path / "plan.png"
    plan("--tp", "8", "--batch", batches, "--context", "8000,130000", "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_no_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    file = tmp_path / "plan.png"
    assert run(monkeypatch, "--model", "llama-3.1-8b", "--gpu", "h100", "--plot", str(file)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "error: plots need matplotlib: pip install 'magicdec[plot]'\n"
    assert not file.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt-5"), "error: 'gpt-5' is neither a model directory nor one of llama-2-7b-32k, llama-3.1-8b,"),
        (("--draft", "gpt-5"), "error: 'gpt-5' is neither a model directory nor one of llama-2-7b-32k, llama-3.1-8b,"),
        (
            ("--gpu", "tpu"),
            "error: 'tpu' is not a known GPU; these are: a100-80gb, h100, h100-nvl, h200, l40s, a10, cpu",
        ),
        (("--tp", "33"), "error: llama-3.1-8b has 32 query heads, which cannot be split over 33 ranks"),
        (("--context", "140000"), "error: llama-3.1-8b is made for 131072 tokens, not 140000"),
        (("--shared", "8001"), "error: a context of 8000 tokens cannot begin with 8001 shared ones"),
        (("--budget", "40"), "error: speculation.kv.budget (40) must be a multiple of cache.page_size (16)"),
    ],
)
def test_one_line(
    arguments: tuple[str, str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--model", "llama-3.1-8b", "--gpu", "h100", *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(message)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *(("--tp", "0"), ("--batch", "0"), ("--batch", "8,"), ("--context", "x"), ("--budget", "0")),
        *(
            ("--budget", "some"),
            ("--alpha", "1.5"),
            ("--alpha", "nan"),
            ("--gamma", "17"),
            ("--gamma", "-1"),
            ("--layer-us", "-1"),
            ("--layer-us", "inf"),
            ("--shared", "-1"),
            ("--shared", "x"),
        ),
        *(
            ("--policy", "h2o"),
            ("--policy", "window,all"),
            ("--policy", ""),
            ("--dtype", "int3"),
            ("--kv-format", "int3"),
            ("--json", "/no/such/dir/x.json"),
            ("--plot", "/no/such/dir/x"),
        ),
    ],
)
def test_wrong_usage(
    flag: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--model", "llama-3.1-8b", "--gpu", "h100", flag, value) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert flag in said.err


def test_missing_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--gpu", "h100") == 2
    assert "--model" in capsys.readouterr().err


def test_all_terms_are_options() -> None:
    assert {each.value for each in TermsName} == set(TERMS)


def test_terms(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "terms.json"
    assert run(monkeypatch, "--terms", "vegas", "--gpu", "h100", "--json", str(file)) == 0
    tables = capsys.readouterr().out.split("\n\n")
    assert [table.partition(":")[0] for table in tables] == [
        "Predicted for one h100, as fitted to published runs on eight GPUs",
        "Predicted for one h100, forwards replayed from graphs (assumed",
        "Predicted for one h100, the same, and attention of a verify pass as fast as a plain step's (assumed",
    ]
    for table in tables:
        *shown, note = table.splitlines()[2:]
        lines = [line.split() for line in shown]
        policies = ("plain", "window", "verified", "plain", "quest")
        assert [(line[0], line[3]) for line in lines] == [
            *((shape, policy) for shape in ("qwen3-8b", "qwen3-4b", "qwen3-30b-a3b") for policy in policies),
            *(("gpt-oss-20b", policy) for policy in ("plain", "window", "verified", "quest")),  # all with 128 rows
        ]
        assert [lines[place][11] for place in (1, 2, 4)] == ["1576", "1893", "1247"]
        assert note.startswith("quest: ")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert [row["rows"] for row in found] == [37, 37, 35, 43, 43, 40, 11, 11, 10, 128, 128, 128] * 3
    assert run(monkeypatch, "--terms", "vegas", "--gpu", "h200", "--batch", "64", "--json", str(file)) == 0
    assert {row["rows"] for row in json.loads(file.read_text(encoding="utf-8"))} == {64}


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        *((("--model", "llama-3.1-8b"), "--model"), (("--tp", "2"), "--tp"), (("--context", "8000"), "--context")),
        *((("--gamma", "6"), "--gamma"), (("--alpha", "0.9"), "--alpha"), (("--budget", "512"), "--budget")),
        *((("--draft", "self"), "--draft"), (("--policy", "window"), "--policy"), (("--plot", "x.png"), "--plot")),
        *((("--dtype", "bfloat16"), "--dtype"), (("--batch", "1,2"), "--batch"), (("--gpu", "cpu"), "--gpu")),
        *((("--layer-us", "20"), "--layer-us"), (("--batch", "x"), "--batch")),
        (("--shared", "8"), "--shared"),
        (("--kv-format", "int8"), "--kv-format"),
        (("--json", "/no/such/dir/x.json"), "--json"),
    ],
)
def test_terms_take_nothing_else(
    arguments: tuple[str, ...], flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--gpu", "h100", "--terms", "vegas", *arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert flag in said.err


def test_help_names_models_and_gpus(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("llama-3.1-70b", "tinyllama-1.1b", "a100-80gb", "l40s", "cpu"))


@pytest.mark.parametrize("arguments", [("--model", "llama-3.1-8b"), ("--terms", "vegas")])
def test_needs_neither_torch_nor_matplotlib(arguments: tuple[str, str]) -> None:
    code = """
import sys
from bench.paper.published import Row, read_rows
from server.cli import main
sys.argv = ["magicdec", "plan", *sys.argv[1:], "--gpu", "h100"]
try:
    main()
except SystemExit as ended:
    heavy = {"torch", "transformers", "matplotlib", "numpy"} & set(sys.modules)
    sys.exit(f"imported: {heavy}" if heavy else ended.code)
"""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
