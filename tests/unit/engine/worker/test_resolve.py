"""Settings that are left open: the dtype."""

from __future__ import annotations

import pytest
import torch

from engine.worker.resolve import _dtype
from kernels.cpu import compiler
from kernels.cpu.compiler import instruction_sets

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
