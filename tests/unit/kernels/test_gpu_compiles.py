"""Every kernel compiles for the supported GPU architectures, within their registers and shared memory; Triton's
interpreter is more lenient than its compiler."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.profiles import is_all

pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this platform")

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Maximum bytes of shared memory per program, by architecture (CUDA's table of compute capabilities)."""
PIPELINED = ("_attend_kernel", "_mass_kernel", "_scores_kernel")


def kernel_names() -> set[str]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "kernels" / "gpu").rglob("*.py")]
    functions = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if function.name.endswith("_kernel")}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", SHARED)
def test_every_kernel_compiles_within_the_devices_limits(architecture: int, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    selection = "" if is_all() else "few" if architecture == min(SHARED) else "tall"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.compile_gpu_kernels", str(architecture), *selection.split()],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    binaries = [json.loads(line) for line in done.stdout.splitlines()]
    assert selection == "tall" or {binary["kernel"] for binary in binaries} == kernel_names()
    for binary in binaries:
        assert binary["stack"] == 0, f"registers are spilled: {binary}"
        assert binary["shared"] <= SHARED[architecture], binary
        if binary["kernel"] in PIPELINED:
            assert binary["copies"] > 0, f"keys are not copied asynchronously, 16 bytes at a time: {binary}"
        if binary["kernel"] == "_few_bit_kernel" and "float32" not in binary["case"]:
            assert binary["copies"] > 0, f"codes are not copied asynchronously, 16 bytes at a time: {binary}"
        if binary["kernel"] == "_attend_kernel":
            assert binary["divisions"] == 0, f"64-bit integers are divided: {binary}"
    is_dense = [binary for binary in binaries if not binary["case"].endswith(" KV") and " KV," not in binary["case"]]
    decode = [binary for binary in is_dense if "/128 bfloat16, 1 queries" in binary["case"] and binary["copies"]]
    assert {"shared" in binary["case"] for binary in decode} == {False, True}  # rows of one query beside prefixes too
    for binary in decode:
        # The estimate of kernels.gpu.tile.tile_shape: two buffers of 16 KiB for keys and for values, two programs on a
        # multiprocessor. That has 1 KiB more than a program may use, and keeps 1 KiB for each.
        assert binary["shared"] >= 2 * 2 * 16 * 1024, f"keys and values have a single buffer: {binary}"
        assert 2 * (binary["shared"] + 1024) <= SHARED[architecture] + 1024, binary
        assert 2 * 32 * binary["warps"] * binary["registers"] <= 65536, binary
