"""Programs of bench.micro on a tiny model and tiny shapes: they run, and count rightly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.corpus import BenchError
from bench.micro import blank_rounds, cpu_kernels, host, neighbours, prefill_parts
from bench.micro.cpu_kernels import attention_flops, open_kernels
from bench.micro.neighbours import Steps, Times
from bench.micro.shares import Clock
from kernels.cpu.compiler import KernelsUnavailable, supported
from models.default import user_cache
from tests.support.engines import TINY
from tests.support.profiles import is_all, whole_test_only_in_all
from tests.support.tiny import write_model


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny"))


def test_blank_rounds_restart(tiny_dir: Path) -> None:
    """Rows return to their first length: more rounds than there is room for run after restarts."""
    rounds = blank_rounds.BlankRounds(blank_rounds.cpu_config(str(tiny_dir), 2, 1), 2, 40, 1, 100)
    for _ in range(3):
        rounds.restart()
        for _ in range(100):
            rounds.step()
    rounds.close()


def test_no_prompt_is_known() -> None:
    """Engines of the programs have no prefix cache, and rows without a model begin with different tokens."""
    assert not blank_rounds.cpu_config("model", 2, 1).cache.prefix
    waiting = host.Host(3, 40, 1, 64, 2)._scheduler.waiting
    assert [request.tokens[0] for request in waiting] == [0, 1, 2]


@whole_test_only_in_all
def test_neighbours(tiny_dir: Path) -> None:
    said: list[str] = []
    steps = Steps(str(tiny_dir), 1, 40, 0, steps=3, turns=2)
    found = neighbours.measure(steps, 0.5, said.append)
    assert [len(times.ms) for times in found] == [6] * len(found)
    assert len(found) == 4 or (len(found) == 3 and "not permitted" in said[0])
    if len(found) == 4:
        assert found[3].threads == 1  # half a CPU
    assert "a busy process anywhere" in neighbours.table(steps, found)


@whole_test_only_in_all
def test_neighbours_of_no_model(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="process ended"):
        neighbours.measure(Steps(str(tmp_path), 1, 40, 0, steps=1, turns=1), 1.0, print)


def test_times_of_one_condition() -> None:
    times = Times("idle", 2, [float(ms) for ms in range(1, 11)])
    assert times.line(2.75).split() == ["idle", "2", "5.50", "9.00", "10.00", "2.00"]


def test_prefill(tiny_dir: Path) -> None:
    report = prefill_parts.measure(str(tiny_dir), 300, 1)
    assert "prompts of 300 tokens in chunks of 300" in report
    assert "everything else" in report
    with pytest.raises(BenchError, match="511 tokens at most"):
        prefill_parts.measure(str(tiny_dir), 512, 1)


def test_operations_of_a_prefill() -> None:
    flops = prefill_parts.prefill_flops(TINY, 10)
    heads = TINY.num_heads * TINY.head_dim
    assert flops["attention"] == TINY.num_layers * 4 * sum(range(1, 11)) * heads
    assert flops["head"] == 2 * TINY.hidden_size * TINY.vocab_size
    assert flops["products"] == 20 * TINY.num_layers * sum(n * k for n, k in prefill_parts.product_shapes(TINY))
    assert attention_flops(2, 100, 1, heads=1, head_dim=1) == 4 * 2 * 100


def test_attention_of_all_lengths_is_one_part() -> None:
    clock = Clock()
    for name in ("attention, 4 queries over 4", "attention, 4 queries over 8", "products"):
        clock.seconds[name] = 1.0
    assert prefill_parts.parts(clock) == {"attention": 2.0, "products": 1.0}


def test_cpu_kernels(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_POOL_BYTES", 1e6)
    monkeypatch.setattr(cpu_kernels, "_DECODING", ((2, 64),))
    monkeypatch.setattr(cpu_kernels, "_SHARED", (2, 1100))
    monkeypatch.setattr(cpu_kernels, "_VOTES", (2, 480))
    if not is_all():
        monkeypatch.setattr(cpu_kernels, "_SEALED", ((2, 300),))
    monkeypatch.setattr(cpu_kernels, "_CHUNK", (1, 128, 64))
    monkeypatch.setattr(cpu_kernels, "_ROWS", (1, 3))
    monkeypatch.setattr(cpu_kernels, "_LAYERS", 1)
    monkeypatch.setattr(cpu_kernels, "read_bandwidth", lambda device: 1e9)
    target, threads = supported()[0], torch.get_num_threads()
    try:
        cpu_kernels.main(["--set", target.name])
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert f"given: attention {target.name}" in text
    assert "64 queries" in text
    assert "votes     2 x   480,   9 queries" in text
    assert "best 2 of (6, 30), per page" in text
    assert text.count("1.00 x own pages") >= 2
    assert text.count("the same pages: ") == 2
    assert text.count("ours, one row and several: are the same") == 4
    (head,) = (line for line in text.splitlines() if line.startswith("products  "))
    formats = ["bf16", "int8", "fp8", "int4"]
    assert [word for word in head.split() if word in formats] == [*formats, "bf16"]
    assert sum(" rows " in line and line.count("%") == len(formats) for line in text.splitlines()) == 2


def test_kernels_of_a_set_that_is_missing() -> None:
    with pytest.raises(KernelsUnavailable, match="it has: "):
        open_kernels(user_cache() / "kernels", "mmx")
