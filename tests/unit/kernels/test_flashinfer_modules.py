"""FlashInfer's modules: which are needed, and what a failure says. With FlashInfer's own Python, and a compiler that
does nothing, where those lie that are compiled ahead."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.flashinfer.flashinfer_modules import (
    ModulesUnavailable,
    architecture,
    main,
    needed_modules,
    nvcc_target,
    shortened,
    try_attention,
)
from kernels.flashinfer.flashinfer_workspace import Workspace
from tests.support import fake_flashinfer
from tests.support.paths import ROOT
from tests.support.profiles import whole_test_only_in_all
from tests.support.rig import CPU
from tests.support.wheels import unpacked

VERSIONS = ("0.6.6", "0.7.2")
IMPORTED = ("apache-tvm-ffi==0.1.15.post2", "nvidia-ml-py==13.615.71", "ninja==1.13.2")
"""What FlashInfer needs and a development environment lacks."""
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "Cuda compilation tools, release 13.0, V13.0.88"; exit; fi
if [ -e "$0.fails" ]; then echo "a.cu(3): error: no such thing" >&2; exit 1; fi
while [ "$1" != -o ]; do shift; done
echo | c++ -x c++ -fPIC -c - -o "$2"
"""
"""A compiler of CUDA that makes empty objects, or fails."""


def test_hopper_needs_one_more_module() -> None:
    assert [kernels for kernels, _ in needed_modules(torch.bfloat16, 128, (8, 0))] == ["fa2"]
    assert [kernels for kernels, _ in needed_modules(torch.bfloat16, 128, (9, 0))] == ["fa2", "fa3"]
    assert [kernels for kernels, _ in needed_modules(torch.bfloat16, 128, (12, 0))] == ["fa2"]
    half = torch.float16
    ((_, arguments),) = needed_modules(half, 64, (8, 9))
    assert list(arguments.values()) == [half, half, half, torch.int32, 64, 64, 0, False, False, False]


def test_architectures() -> None:
    assert [architecture(name) for name in ("8.0", "9.0", "12.1")] == [(8, 0), (9, 0), (12, 1)]
    assert [nvcc_target(each) for each in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["8.0", "8.9", "9.0a", "10.0a"]
    for name in ("9.0a", "90", ""):
        with pytest.raises(ValueError, match="is no architecture"):
            architecture(name)


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("Could not find nvcc", "Could not find nvcc"),
        ("", "RuntimeError"),
        (
            "Ninja build failed. Ninja output:\nninja: Entering directory `/x'\n[1/9] nvcc -c a.cu\n"
            "/bin/sh: 1: /usr/local/cuda/bin/nvcc: not found\nninja: build stopped",
            "/bin/sh: 1: /usr/local/cuda/bin/nvcc: not found",
        ),
        ("Ninja build failed.\n[1/9] nvcc -Wno-x a.cu\na.cu(3): error: what is this?\n1 error", "a.cu(3): error: what"),
        ("first\nsecond", "first"),
        ("x" * 1000, "x" * 200 + " …"),
    ],
)
def test_a_cause_is_one_line(message: str, cause: str) -> None:
    found = shortened(RuntimeError(message))
    assert found.startswith(cause)
    assert "\n" not in found
    assert len(found) < 210


def test_trying_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    workspace = Workspace(CPU, (9, 0), multiprocessors=132)
    try_attention(workspace, torch.bfloat16, 64)

    def launch(*_: object, **__: object) -> None:
        raise RuntimeError("BatchPrefillWithPagedKVCache failed with error no kernel image is available\nat x.cu:3")

    monkeypatch.setattr(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper, "run", launch)
    with pytest.raises(ModulesUnavailable, match=r"does not run on this GPU: .*no kernel image is available$"):
        try_attention(workspace, torch.bfloat16, 64)

    def wrong(*_: object, out: torch.Tensor, **__: object) -> None:
        out.zero_()

    monkeypatch.setattr(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper, "run", wrong)
    with pytest.raises(ModulesUnavailable, match="computes something else"):
        try_attention(workspace, torch.bfloat16, 64)


@pytest.fixture(params=VERSIONS)
def flashinfer(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """Environment of a process with FlashInfer's Python, ninja, and a compiler of CUDA."""
    packages = [unpacked(each) for each in (f"flashinfer-python=={request.param}", *IMPORTED)]
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler (c++) is installed")
    cuda = tmp_path / "cuda"
    (cuda / "bin").mkdir(parents=True)
    (cuda / "lib").mkdir()
    (cuda / "bin/nvcc").write_text(NVCC)
    (cuda / "bin/nvcc").chmod(0o755)
    runtime = ["-shared", "-x", "c++", os.devnull, "-Wl,-soname,libcudart.so.13"]
    subprocess.run(["c++", *runtime, "-o", str(cuda / "lib/libcudart.so.13")], check=True)
    scripts = next(packages[-1].glob("*.data/scripts"))
    return os.environ | {
        "MAKEFLAGS": " -j2 --jobserver-auth=900,901",  # as in a recipe of `make -j2` that does not call make
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *packages))),
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "CUDA_HOME": str(cuda),
        "FLASHINFER_WORKSPACE_BASE": str(tmp_path / "home"),
    }


LOAD = """
import contextlib, json, shutil, sys, types
from pathlib import Path
import torch
from flashinfer import prefill
from flashinfer.jit import core, cpp_ext, env
from kernels.flashinfer.flashinfer_modules import ModulesUnavailable, load_modules

def load(spec, path=None):
    loaded.append(str(path or spec.jit_library_path))
    return types.SimpleNamespace(plan=None, ragged_run=None, paged_run=None)

@contextlib.contextmanager
def compiling():
    entered.append(True)
    yield

getattr(core, "JitSpecNvcc", core.JitSpec).load = load
torch.cuda.get_device_capability = lambda device: (9, 0)
for folder in sys.argv[1:]:
    loaded, entered, error = [], [], ""
    env.FLASHINFER_AOT_DIR = Path(folder)
    prefill.get_batch_prefill_module.cache_clear()
    try:
        load_modules(torch.device("cpu"), torch.bfloat16, [64], compiling)
    except ModulesUnavailable as unavailable:
        error = str(unavailable)
    print(json.dumps([loaded, len(entered), error]))
    if entered:  # once more, with a compiler that fails
        Path(cpp_ext.get_cuda_path(), "bin/nvcc.fails").touch()
        shutil.rmtree(env.FLASHINFER_JIT_DIR)
"""


@whole_test_only_in_all  # test_flashinfer_versions.py compares the modules that are named with those that are used
def test_modules_compiled_ahead_are_those_that_are_loaded(flashinfer: dict[str, str], tmp_path: Path) -> None:
    def python(*arguments: str) -> list[str]:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, env=flashinfer, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    into, nothing = tmp_path / "aot", str(tmp_path / "nothing")
    python("-m", "kernels.flashinfer.flashinfer_modules", "--head-dims", "64", "--into", str(into))
    names = sorted(path.name for path in into.iterdir())
    assert len(names) == 2
    assert names[1].endswith("_sm90")  # fa3
    flashinfer["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"
    ahead, compiled, failed = (json.loads(line) for line in python("-c", LOAD, str(into), nothing, nothing)[-3:])
    assert ahead == [[str(into / name / f"{name}.so") for name in names], 0, ""]
    assert compiled[1:] == [1, ""]
    assert [Path(path).name for path in compiled[0]] == [f"{name}.so" for name in names]
    assert all(path.startswith(flashinfer["FLASHINFER_WORKSPACE_BASE"]) for path in compiled[0])
    cause = "FlashInfer's attention cannot be compiled or loaded: a.cu(3): error: no such thing"
    assert failed == [[], 1, cause]


def test_the_program_without_flashinfer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("FLASHINFER_CUDA_ARCH_LIST", "FLASHINFER_EXTRA_CUDAFLAGS", "FLASHINFER_WORKSPACE_BASE"):
        monkeypatch.setenv(name, "")  # so that they are as before after the test
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    assert main(["--into", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: FlashInfer's modules cannot be compiled: ")
    assert not list(tmp_path.iterdir())


def test_what_the_program_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--architectures", "hopper"], ["--dtypes", "float32"], ["--head-dims", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
    assert "'hopper' is no architecture like 8.0 or 9.0" in capsys.readouterr().err
