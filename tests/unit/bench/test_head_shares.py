"""Shares of attention outside the first and the most recent tokens, and the command that measures them."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch

from bench.corpus import BenchError
from bench.micro.head_shares import describe, measure
from engine.kv.streaming_heads import HeadShares, read_streaming_heads
from models.config import read_config
from server.cli import main
from tests.support.engines import TINY, tiny_model
from tests.support.model_weights import tensors_of
from tests.support.tiny import write_model
from tests.support.workloads import prompt_of

SINK, WINDOW, CONTEXT = 16, 32, 300


def test_a_head_that_looks_everywhere_alike() -> None:
    """Zero keys give every token the same weight. The other heads of its layer stay as they were."""
    model, passages = tiny_model(), [prompt_of(CONTEXT, 1), prompt_of(CONTEXT, 2)]
    before = measure(model, passages, sink=SINK, window=WINDOW)
    keys = tensors_of(model)["model.layers.0.self_attn.k_proj.weight"]
    keys[TINY.head_dim :].zero_()  # of the second of two
    after = measure(model, passages, sink=SINK, window=WINDOW)
    positions = torch.linspace(SINK + WINDOW, CONTEXT - 1, 64, dtype=torch.float64).long()
    expected = float(((positions - WINDOW + 1 - SINK) / (positions + 1)).mean())
    assert after.shares[0][1] == pytest.approx(expected, abs=1e-5)
    assert after.shares[0][0] == pytest.approx(before.shares[0][0], abs=1e-9)
    assert before.shares[0][1] != pytest.approx(expected, abs=1e-3)


def test_sinks_take_a_share() -> None:
    """Zero keys and a sink as heavy as 100 of them: a query's share outside has as many more slots to divide by."""
    model = tiny_model(config=replace(TINY, has_sinks=True))
    weights = tensors_of(model)
    weights["model.layers.0.self_attn.k_proj.weight"].zero_()
    weights["model.layers.0.self_attn.sinks"].fill_(math.log(100))
    found = measure(model, [prompt_of(CONTEXT, 1)], sink=SINK, window=WINDOW)
    positions = torch.linspace(SINK + WINDOW, CONTEXT - 1, 64, dtype=torch.float64).long()
    expected = float(((positions - WINDOW + 1 - SINK) / (positions + 1 + 100)).mean())
    assert found.shares[0] == pytest.approx([expected] * TINY.num_kv_heads, abs=1e-5)


def test_a_longer_window_leaves_less_outside() -> None:
    model, passages = tiny_model(), [prompt_of(CONTEXT, 1)]
    short, long = (measure(model, passages, sink=SINK, window=window) for window in (16, 128))
    assert all(0 < b < a < 1 for x, y in zip(short.shares, long.shares, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("context", "says"), [(48, "48 tokens of context all belong to a sink of 16"), (3000, "but the model has 2048")]
)
def test_contexts_that_cannot_be_measured(context: int, says: str) -> None:
    with pytest.raises(BenchError, match=says):
        measure(tiny_model(), [prompt_of(context, 1)], sink=SINK, window=WINDOW)


def test_what_it_says() -> None:
    shares = HeadShares(1, 4, 16, 256, 4096, [[0.5, 0.1, 0.0, 0.25]])
    assert describe(shares) == (
        "4 KV heads: 0.0% to 50.0% of attention is outside the first 16 and the last 256 tokens; of the 2 heads that "
        "would stream, at most 10.0%"
    )
    assert "of the 0 heads" in describe(HeadShares(1, 1, 16, 256, 4096, [[0.5]]))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr(sys, "argv", ["magicdec", "profile", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    directory, file, config = write_model(tmp_path / "tiny"), tmp_path / "heads.json", tmp_path / "config.yaml"
    # The config may name the file that is to be written.
    config.write_text(f"engine: {{target_kv: {{policy: quest, sink: 20, window: 64, heads: {file}}}}}")
    flags = ["--model", str(directory), "--device", "cpu", "--config", str(config), "--context", "200"]
    assert run(monkeypatch, "heads", *flags, "-o", str(file)) == 0
    found = msgspec.json.decode(file.read_bytes(), type=HeadShares)
    assert (found.sink, found.window, found.context) == (32, 64, 200)  # the sink in whole pages, as it is read
    assert describe(found) in capsys.readouterr().out
    streams = read_streaming_heads(str(file), read_config(directory))
    assert sum(map(sum, streams)) == found.num_layers * found.num_kv_heads // 2


def test_options_come_after_the_subcommand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--rows", "4", "heads", "-o", str(tmp_path / "heads.json")) == 2
    assert "its options come after `heads`" in capsys.readouterr().err
    assert run(monkeypatch, "heads", "-o", "absent/heads.json") == 2
    assert "absent is not a directory" in capsys.readouterr().err
