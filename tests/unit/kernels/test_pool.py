"""The threads of the CPU kernels, alone under a sanitizer, and below torch's operators."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from kernels.cpu.packing import PackedWeights
from tests.support.paths import ROOT
from tests.support.profiles import is_all
from tests.support.rig import compiled

COMPILER = shutil.which("g++") or shutil.which("clang++")


def build(folder: Path, *flags: str) -> Path:
    """Compile support/pool_harness.cpp."""
    if COMPILER is None:
        pytest.skip("no C++ compiler is installed")
    program = folder / "pool"
    source = ROOT / "tests/support/pool_harness.cpp"
    command = [COMPILER, "-std=gnu++17", "-O1", "-pthread", *flags, f"-I{ROOT / 'kernels/cpu/csrc'}", str(source)]
    built = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True, check=False)
    if "sanitize" in built.stderr or "tsan" in built.stderr:
        pytest.skip("the compiler has no thread sanitizer")
    assert built.returncode == 0, built.stderr
    return program


def check(*command: object) -> None:
    ran = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, check=False)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("the thread sanitizer does not run on this system")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_jobs_under_the_thread_sanitizer(tmp_path: Path) -> None:
    program = build(tmp_path, "-fsanitize=thread")
    # The sanitizer needs addresses that are less random than systems make them.
    fixed = ["setarch", platform.machine(), "-R"] if shutil.which("setarch") else []
    if fixed and subprocess.run([*fixed, "true"], capture_output=True, check=False).returncode != 0:
        fixed = []  # containers may forbid it
    check(*fixed, program, "jobs", 30_000 if is_all() else 3000)


def test_forked_processes_and_threads_that_cannot_be_started(tmp_path: Path) -> None:
    program = build(tmp_path)
    check(program, "fork")
    check(program, "starved")


class Product:
    """A product that is computed again and again, and its only right result."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._kernels = compiled()._kernels
        self._x = torch.randn(37, 256, generator=generator)
        self._weights = PackedWeights(torch.randn(480, 256, generator=generator))
        self._expected = self._kernels.linear(self._x, self._weights)

    def holds(self) -> bool:
        return torch.equal(self._kernels.linear(self._x, self._weights), self._expected)


def test_two_threads_call_at_once() -> None:
    product = Product()
    wrong: list[int] = []

    def call() -> None:
        wrong.extend(i for i in range(300) if not product.holds())

    callers = [threading.Thread(target=call) for _ in range(3)]
    for each in callers:
        each.start()
    for each in callers:
        each.join(60)
    assert not any(each.is_alive() for each in callers)
    assert not wrong


def test_the_number_of_threads_may_change_between_calls() -> None:
    product, before = Product(), torch.get_num_threads()
    try:
        for threads in (1, 2, 7, 3, 1, 12, 2):
            torch.set_num_threads(threads)
            assert all(product.holds() for _ in range(20)), threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    product = Product()
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert product.holds()  # the parent's threads are started
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if all(product.holds() for _ in range(20)) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert product.holds()
    finally:
        torch.set_num_threads(before)
