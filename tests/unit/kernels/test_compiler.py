"""Instruction sets that the CPU kernels are compiled for."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels.cpu import compiler
from kernels.cpu.compiler import INSTRUCTION_SETS, SOFTWARE_TILES, instruction_sets, parse_features, supported

X86 = """processor\t: 0
model name\t: Some Processor with flags: of all colours
flags\t\t: fpu sse2 avx2 fma f16c
vmx flags\t: vnmi

processor\t: 1
flags\t\t: fpu
"""
ARM = """processor\t: 0
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm atomics fphp asimdhp cpuid asimddp i8mm bf16
CPU implementer\t: 0x41

processor\t: 1
Features\t: fp
"""


def test_features_of_the_first_processor() -> None:
    assert parse_features(X86) == {"fpu", "sse2", "avx2", "fma", "f16c"}
    arm = {"fp", "asimd", "evtstrm", "atomics", "fphp", "asimdhp", "cpuid", "asimddp", "i8mm", "bf16"}
    assert parse_features(ARM) == arm
    assert parse_features("processor: 0\nisa: rv64gc\n") == set()


def test_an_architecture_has_its_own_sets() -> None:
    names = {machine: [each.name for each in instruction_sets(machine)] for machine in ("x86_64", "aarch64", "riscv64")}
    assert names == {
        "x86_64": ["amx", "avx512_bf16", "avx512", "avx_vnni", "avx2", "portable"],
        "aarch64": ["neon_bf16", "neon_dotprod", "portable"],
        "riscv64": ["portable"],
    }
    assert instruction_sets("AMD64") == instruction_sets("x86_64")
    assert instruction_sets("arm64") == instruction_sets("aarch64")


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "names"),
    [
        ("x86_64", X86, ["avx2", "portable"]),
        ("aarch64", ARM, ["neon_bf16", "neon_dotprod", "portable"]),
        ("aarch64", ARM.replace("bf16", ""), ["neon_dotprod", "portable"]),
        ("aarch64", "", ["portable"]),
        ("riscv64", ARM, ["portable"]),
    ],
)
def test_a_processor_has_the_sets_whose_features_it_has(
    monkeypatch: pytest.MonkeyPatch, machine: str, cpuinfo: str, names: list[str]
) -> None:
    monkeypatch.setattr(compiler, "INSTRUCTION_SETS", instruction_sets(machine))
    monkeypatch.setattr(Path, "read_text", lambda path, **_: cpuinfo)
    assert [each.name for each in supported()] == names


def test_sets_that_multiply_bfloat16() -> None:
    names = {each.name for machine in ("x86_64", "aarch64") for each in instruction_sets(machine) if each.has_bf16}
    assert names == {"amx", "avx512_bf16", "neon_bf16"}
    assert SOFTWARE_TILES.has_bf16


def test_without_a_list_of_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path, **_: str) -> str:
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert supported() == [INSTRUCTION_SETS[-1]]
