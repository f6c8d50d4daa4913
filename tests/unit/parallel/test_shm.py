"""Where shared-memory groups are available, and how they order memory accesses there."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from parallel import rendezvous, shm

CPU = torch.device("cpu")


@pytest.fixture
def memory() -> Iterator[int]:
    memory = shm.create(2)
    yield memory
    os.close(memory)


def on(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)


def without_libatomic(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "PyDLL", missing)


def test_x86_needs_no_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    on("x86_64", monkeypatch)
    without_libatomic(monkeypatch)
    assert shm.find_fence("x86_64") is None
    assert shm.available()
    assert rendezvous.choose(CPU, "auto") == "shared"


def test_arm_has_one_with_libatomic(monkeypatch: pytest.MonkeyPatch) -> None:
    on("aarch64", monkeypatch)
    try:
        ctypes.PyDLL("libatomic.so.1")
    except OSError:
        pytest.skip("no libatomic.so.1")
    fence = shm.find_fence("aarch64")
    assert fence is not None
    fence()
    assert rendezvous.choose(CPU, "auto") == "shared"


@pytest.mark.parametrize("machine", ["aarch64", "riscv64"])
def test_gloo_is_chosen_elsewhere(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    on(machine, monkeypatch)
    without_libatomic(monkeypatch)
    assert not shm.available()
    assert rendezvous.choose(CPU, "auto") == "gloo"
    with pytest.raises(ValueError, match=r"Linux, on x86 or on Arm with libatomic\.so\.1"):
        rendezvous.choose(CPU, "shared")


def test_fences_stand_between_data_and_flags(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """Data, fence, own flag; all flags, fence, data."""
    monkeypatch.setattr(shm, "find_fence", lambda machine: lambda: None)
    first, second = (shm.ShmGroup(memory, rank, 2, timeout_s=10) for rank in (0, 1))
    seen: list[list[int]] = []
    places = {"flag": shm._FLAG, "verdict of round 1": shm._STATUS + 1}

    def watched(place: int) -> None:
        """Record the two ranks' numbers at each fence of the first rank."""
        first._fence = lambda: seen.append([first._flags[rank * shm._LINE + place] for rank in (0, 1)])

    def together(name: str) -> None:
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(getattr(second, name), *([torch.ones(3)] if name == "all_reduce" else [False]))
            if name == "all_reduce":
                assert first.all_reduce(torch.ones(3)).tolist() == [2, 2, 2]
            else:
                assert first.agree(False) == []
            other.result()

    for group in (first, second):
        group.begin_round()
    watched(places["flag"])
    together("all_reduce")
    number = shm._ROUND + 1
    assert [numbers[0] for numbers in seen] == [0, number]
    assert seen[-1] == [number, number]
    seen.clear()
    watched(places["verdict of round 1"])
    together("agree")
    assert [numbers[0] for numbers in seen] == [0, 2]
    assert seen[-1] == [2, 2]
    seen.clear()
    watched(places["flag"])
    first.abandon()
    assert [numbers[0] for numbers in seen] == [number]
