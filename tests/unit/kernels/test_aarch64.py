"""The CPU kernels of Arm processors, compiled by a cross compiler and run in an emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from kernels.cpu.compiler import InstructionSet, instruction_sets
from tests.support.paths import ROOT
from tests.support.profiles import is_all, only_in_all

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
LIBRARIES = "/usr/aarch64-linux-gnu"
SOURCES = ROOT / "kernels/cpu/csrc"

MISSING = [program for program in (COMPILER, EMULATOR) if shutil.which(program) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {' '.join(MISSING)}")


BF16, DOTPROD, PORTABLE = instruction_sets("aarch64")


# The other two sets have between them whatever that with DotProd alone has.
@pytest.mark.parametrize("target", [BF16, only_in_all(DOTPROD), PORTABLE], ids=lambda target: target.name)
def test_kernels(target: InstructionSet, tmp_path: Path) -> None:
    """See support/kernels_harness.cpp. `make test` compiles in half the time, `make test-all` as is served."""
    program = tmp_path / "kernels"
    sources = [SOURCES / "kernels.cpp", ROOT / "tests/support/kernels_harness.cpp"]
    flags = ["-std=gnu++17", "-O3" if is_all() else "-O1", "-pthread", "-Wno-psabi", f"-I{SOURCES}", *target.flags]
    subprocess.run([COMPILER, *flags, *map(str, sources), "-o", str(program)], check=True, timeout=300)
    # `max` has all extensions. The others have what their set requires, and no more of what a set may use.
    processor = {BF16: "max", DOTPROD: "neoverse-n1", PORTABLE: "cortex-a57"}[target]
    command = [EMULATOR, "-cpu", processor, "-L", LIBRARIES, str(program), "40" if is_all() else "3"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
