"""Every kernel compiles for the supported GPU architectures; Triton's interpreter is more lenient than its compiler."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Maximum bytes of shared memory per program, by architecture (CUDA's table of compute capabilities)."""


def kernel_names() -> set[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "kernels" / "gpu").glob("*.py")]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if function.name.endswith("_kernel")}


@pytest.mark.parametrize("architecture", SHARED)
def test_every_kernel_compiles(architecture: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_gpu_kernels", str(architecture), "bfloat16"],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for name, _ in lines} == kernel_names()
    assert max(int(shared) for _, shared in lines) <= SHARED[architecture]
