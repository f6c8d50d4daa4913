"""bench.gpu without a GPU: a tiny shape shows which parts it measures; the times mean nothing here."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu.gpu_rounds import Bench, _covered
from bench.gpu.synthetic import synthetic_acceptance
from bench.micro.bandwidth import copy_bandwidth
from bench.micro.host import Host
from engine.speculation import round as round_module
from engine.speculation.verify import verify
from kernels.reference_ops import REFERENCE
from models.shapes import SHAPES
from tests.support.engines import TINY
from tests.support.rig import CPU

SHAPE = dataclasses.replace(TINY, num_heads=4, head_dim=16, hidden_size=64)
TOKEN_BYTES = 2 * 2 * 2 * 16 * 4


def bench(points: list[tuple[int, int]], memory: int = 1 << 30) -> Bench:
    return Bench(
        "tiny",
        SHAPE,
        points,
        gamma=3,
        budget=32,
        device=CPU,
        dtype=torch.float32,
        ops=REFERENCE,
        memory=memory,
        page_size=4,
        rounds=40,
    )


@pytest.mark.parametrize(("alpha", "accepted"), [(0.0, 0.0), (1.0, 3.0), (0.8, 0.8 + 0.64 + 0.512)])
def test_chance_accepts(alpha: float, accepted: float) -> None:
    made = bench([(5, 100)])
    found = made.measure(5, 100, alpha=alpha, ceiling=1e9)
    made.close()
    assert found.accepted == pytest.approx(accepted, abs=0.25)
    assert (found.rows, found.context, found.gamma, found.gap) == (5, 100, 3, None)
    read = 1e3 * (made.weight_bytes + 5 * 100 * TOKEN_BYTES) / 1e9
    assert found.floor_ms == pytest.approx(read)
    assert found.t_round_ms >= found.t_verify_ms > 0


def test_what_does_not_fit_is_left_out() -> None:
    made = bench([(1, 50), (200, 5000)], memory=50 * 1000 * 1000)
    assert (made.points, made.left_out) == ([(1, 50)], [(200, 5000)])
    made.close()
    made = bench([(200, 5000)], memory=1000)
    assert not made.points
    made.close()


def test_engines_know_of_no_chance() -> None:
    assert vars(round_module)["verify"] is verify
    with synthetic_acceptance(0.5):
        assert vars(round_module)["verify"] is not verify
    assert vars(round_module)["verify"] is verify


def test_covered() -> None:
    assert _covered([(0, 3), (1, 2), (2, 5), (7, 8), (8, 9)]) == 7
    assert _covered([]) == 0


def test_copy_bandwidth() -> None:
    assert copy_bandwidth(CPU, size=1 << 20, repeats=2) > 0


def test_the_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SHAPES, "tiny", SHAPE)
    file = tmp_path / "gpu.json"
    flags = "--device cpu --kernels reference --shapes tiny --points 2x40,3x80 --rounds 2 --budget 32 --json"
    monkeypatch.setattr(sys, "argv", ["gpu", *flags.split(), str(file)])
    assert gpu.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("synthetic acceptance 0.8" in line for line in lines) == 2
    assert [each["rows"] for each in json.loads(file.read_text())["results"]] == [2, 3]
    for wrong in ("--points 3", "--points 0x5", "--shapes none", "--gamma 0", "--synthetic-acceptance 2"):
        monkeypatch.setattr(sys, "argv", ["gpu", *wrong.split()])
        with pytest.raises(SystemExit):
            gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 1
    assert capsys.readouterr().err == "error: no CUDA device is present\n"


@pytest.mark.parametrize("gamma", [0, 3])
def test_what_a_device_waits_for(gamma: int) -> None:
    """The parts of a round that Host measures, while contexts grow by several pages."""
    parts = Host(3, 40, gamma, 32, 30).run().seconds
    assert set(parts) - {"first draft step", "further draft steps"} == {
        "plan the round",
        "patch the rank's state",
        "verify pass",
        "commit",
        "build outputs",
        "encode outputs",
    }
    assert ("further draft steps" in parts) == (gamma > 1)
    assert all(seconds > 0 for seconds in parts.values())
