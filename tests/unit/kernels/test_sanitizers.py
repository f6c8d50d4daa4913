"""The CPU kernels of every instruction set of this processor, under the sanitizers of addresses and undefined
behaviour."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from kernels.cpu.compiler import InstructionSet
from tests.support.paths import ROOT
from tests.support.profiles import only_in_all
from tests.support.rig import sets_to_test

COMPILER = shutil.which("g++") or shutil.which("clang++")
CASES = 200
SOURCES = ROOT / "kernels/cpu/csrc"


@pytest.mark.timeout(3600)  # a compiler takes minutes per set
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler is installed")
@pytest.mark.parametrize("target", [only_in_all(each, id=each.name) for each in sets_to_test()])
def test_kernels(target: InstructionSet, tmp_path: Path) -> None:
    """See support/kernels_harness.cpp."""
    program = tmp_path / "kernels"
    flags = ["-std=gnu++17", "-g1", "-pthread", "-Wno-psabi", f"-I{SOURCES}", *target.flags, "-O1"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    sources = [str(SOURCES / "kernels.cpp"), str(ROOT / "tests/support/kernels_harness.cpp")]
    command = [str(COMPILER), *flags, *sanitize, *sources, "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "asan" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    # Leaks are looked for by a debugger's means, which containers forbid.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    ran = subprocess.run([str(program), str(CASES)], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout == f"{CASES} cases, 0 failures\n"
