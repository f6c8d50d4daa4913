"""Start of symmetric memory with a fake of it that sums over gloo. Every rank is a process that runs this file."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from parallel import rendezvous, symm_start
from parallel.group import Group
from parallel.symm_mem import Algorithm, Sum, SymmetricGroup, SymmetricMemory, largest_sums
from tests.support.paths import ROOT
from tests.support.profiles import is_all, only_in_all
from tests.support.rig import CPU

FAULTS = {
    "none": "",
    "check_links": "out of order",
    "allocate": "out of order",
    "connect": "out of order",
    "raises": "two-shot is out of order",
    "wrong": "two-shot sums of float32 are wrong",
    "wrong in graphs": "one-shot sums of float32 are wrong",
    "different bits": "one-shot sums of bfloat16 differ between ranks",
    "capture": "out of order",
    "stuck": "one-shot sums of float32 do not end within 30 s",
}
"""Faults of the last rank, and what the others learn of them."""

DEMANDED = ("none", "allocate", "raises", "different bits", "stuck")
"""Faults that `make test` shows to ranks whose settings demand symmetric memory, too."""


class GlooMemory(SymmetricMemory):
    """Fake of one rank's symmetric memory. fault: what is wrong with it."""

    made = 0
    in_graph = False

    def __init__(self, comm: dist.ProcessGroup, device: torch.device, name: str, fault: str) -> None:
        super().__init__(comm, device, name)
        self._fault = fault
        type(self).made += 1

    def check_links(self) -> None:
        self._raise("check_links")

    def allocate(self) -> None:
        self._raise("allocate")
        self.memory = torch.empty(max(largest_sums(self._comm.size(), False).values()), dtype=torch.uint8)

    def connect(self) -> bool:
        self._raise("connect")
        return self._comm.rank() == 0  # only one rank has multicast, so none uses it

    def sums(self) -> dict[Algorithm, Sum]:
        def sum_of(algorithm: Algorithm) -> Sum:
            def add(part: Tensor, out: Tensor) -> None:
                Group(self._comm).all_reduce(part)
                out.copy_(part)
                if algorithm == "two-shot" and self._fault == "raises":
                    raise RuntimeError("two-shot is out of order\nC++ stack")
                if (algorithm, self._fault) == ("two-shot", "wrong") or (
                    self.in_graph and self._fault == "wrong in graphs"
                ):
                    out[-1] += 1
                if self._fault == "different bits" and out.dtype == torch.bfloat16 and out[0] != out[0].round():
                    out.view(torch.int16)[7] += 1

            return add

        return {name: sum_of(name) for name in ("one-shot", "two-shot")}

    def _raise(self, step: str) -> None:
        if self._fault == step:
            raise ValueError("out of order")


@contextmanager
def fake(fault: str) -> Iterator[None]:
    """Replace symmetric memory, graphs and waiting by fakes."""

    def make(comm: dist.ProcessGroup, device: torch.device, name: str) -> GlooMemory:
        return GlooMemory(comm, device, name, fault)

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        if fault == "capture":
            raise RuntimeError("out of order")

        def replay() -> None:
            GlooMemory.in_graph = True
            work()
            GlooMemory.in_graph = False

        return replay

    def wait(device: torch.device, what: str) -> None:
        if fault == "stuck":
            raise symm_start._Stuck(f"{what} do not end within 30 s")

    with (
        patch.object(symm_start, "SymmetricMemory", make),
        patch.object(symm_start, "_capture", capture),
        patch.object(symm_start, "_wait", wait),
    ):
        yield


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def rank_main(rank: int, size: int, directory: Path, demanded: Sequence[str]) -> None:
    """Join with every fault of the last rank, and save what came of it. demanded: faults that ranks meet again whose
    settings demand symmetric memory."""
    logged = Lines()
    symm_start.log.addHandler(logged)
    symm_start.log.setLevel("INFO")
    said: dict[str, Any] = {}
    for number, fault in enumerate([*FAULTS, *demanded, "no fake"]):
        store = FileStore(f"{directory}/store{number}", -1)
        fall_back = number < len(FAULTS)
        how = rendezvous.Join(rank, size, "symmetric", 60, fall_back=fall_back or fault == "no fake")
        outcome: dict[str, Any] = {"error": None}
        logged.lines, GlooMemory.made = [], 0
        with fake(fault if rank == size - 1 else "none") if fault != "no fake" else patch.dict({}):
            try:
                group = rendezvous.join(how, CPU, store)
            except symm_start.SymmetricUnavailable as error:
                outcome["error"] = str(error)
            else:
                second = rendezvous.join_first(2, how, CPU, store)
                groups = [group] if second is None else [group, second]
                outcome["symmetric"] = [isinstance(each, SymmetricGroup) for each in groups]
                outcome["sums"] = [each.all_reduce(torch.full((4,), 2.0**rank)).tolist() for each in groups]
        outcome |= {"transport": how.transport, "lines": logged.lines, "made": GlooMemory.made}
        said[f"{fault}, {'auto' if fall_back else 'symmetric'}"] = outcome
    (directory / f"{rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What three ranks have said, by rank."""
    directory = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.parallel.test_symm_start"]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), "3", str(directory), *(FAULTS if is_all() else DEMANDED)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0, 0], "\n".join(errors)
    return [json.loads((directory / f"{rank}.json").read_text()) for rank in range(3)]


def first_cause(message: str) -> str:
    """Any rank may be the first to see that bits differ."""
    return message.replace("rank 0", "rank 2").replace("rank 1", "rank 2") if "differ" in message else message


@pytest.mark.parametrize("wanted", ["auto", "symmetric"])
def test_all_ranks_use_it_where_it_works(outcomes: list[dict[str, Any]], wanted: str) -> None:
    for rank, said in enumerate(outcomes):
        outcome = said[f"none, {wanted}"]
        count = 2 if rank < 2 else 1
        assert outcome["symmetric"] == [True] * count
        assert outcome["sums"] == [[7.0] * 4, [3.0] * 4][:count]
        assert (outcome["transport"], outcome["made"]) == ("symmetric", count)
        line = "GPUs sum through symmetric memory: one-shot up to 0.5 MiB, two-shot up to 8 MiB"
        assert outcome["lines"] == ([line] * 2 if rank == 0 else [])


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in ("none", "stuck")])
def test_all_ranks_fall_back_where_one_fails(outcomes: list[dict[str, Any]], fault: str) -> None:
    for rank, said in enumerate(outcomes):
        outcome = said[f"{fault}, auto"]
        assert not any(outcome["symmetric"])
        assert outcome["sums"] == [[7.0] * 4, [3.0] * 4][: 2 if rank < 2 else 1]
        assert (outcome["transport"], outcome["made"]) == ("nccl", 1)  # the second group does not try
        line = f"GPUs sum through NCCL alone, without symmetric memory (rank 2: {FAULTS[fault]})"
        assert list(map(first_cause, outcome["lines"])) == ([line] if rank == 0 else [])


@pytest.mark.parametrize(
    "fault",
    [fault if fault in DEMANDED else only_in_all(fault) for fault in FAULTS if fault not in ("none", "stuck")],
)
def test_what_is_demanded_is_an_error(outcomes: list[dict[str, Any]], fault: str) -> None:
    for said in outcomes:
        outcome = said[f"{fault}, symmetric"]
        line = f"no symmetric memory (rank 2: {FAULTS[fault]}): set it to auto or nccl"
        assert first_cause(outcome["error"]) == line
        assert outcome["lines"] == []


@pytest.mark.parametrize("wanted", ["auto", "symmetric"])
def test_a_stuck_gpu_is_an_error(outcomes: list[dict[str, Any]], wanted: str) -> None:
    for said in outcomes:
        assert said[f"stuck, {wanted}"]["error"] == f"rank 2: {FAULTS['stuck']}: set it to nccl"


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_gpu(outcomes: list[dict[str, Any]]) -> None:
    for rank, said in enumerate(outcomes):
        outcome = said["no fake, symmetric"]
        assert outcome["sums"][0] == [7.0] * 4
        assert len(outcome["lines"]) == (rank == 0)


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
