"""Environment variables that torchrun sets for each process; only this module reads them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import TCPStore

from parallel.group import CollectiveError


class TorchrunEnvError(ValueError):
    """The variables are missing or inconsistent; the message is one line for the user who started the process."""


@dataclass(frozen=True)
class TorchrunEnv:
    """Place of this process in the group that torchrun has started.

    The restart count is not read: hosts disagree on it, since an agent that restarts because another one did does not
    count it.
    """

    rank: int
    size: int
    local_rank: int
    """Index among the ranks of this host."""
    local_size: int
    """Number of ranks that this host's agent has started."""
    master: str
    port: int
    """Port of the store that all ranks can reach, on `master`."""
    hosts_store: bool
    """Whether this process has to run that store, because no torchrun agent does."""

    @property
    def one_host(self) -> bool:
        """Whether all ranks are known to be on this host."""
        return self.local_size == self.size

    def store(self, timeout_s: float) -> TCPStore:
        """Connect to the store. Raises CollectiveError."""
        try:
            return TCPStore(
                self.master,
                self.port,
                self.size,
                is_master=self.hosts_store,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise CollectiveError(f"the store at {self.master}:{self.port} cannot be reached: {error}") from error

    def address(self) -> str:
        """Return the address of this host that other ranks can reach: the one from which it reaches the master."""
        with contextlib.suppress(OSError):
            for family, kind, protocol, _, target in socket.getaddrinfo(self.master, self.port, type=socket.SOCK_DGRAM):
                with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                    probe.connect(target)  # a datagram socket: nothing is sent
                    address: str = probe.getsockname()[0]
                    return address
        raise CollectiveError(f"no route from this host to {self.master}")


def read_torchrun_env(environment: Mapping[str, str]) -> TorchrunEnv:
    """Parse torchrun's environment variables. Raises TorchrunEnvError."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        value = environment.get(name, "")
        if not (value.isascii() and value.isdecimal()):
            what = f"is {value!r}" if value else "is not set"
            raise TorchrunEnvError(f"{name} {what}: start this program with torchrun")
        numbers[name] = int(value)
    rank, size = numbers["RANK"], numbers["WORLD_SIZE"]
    local_rank, local_size = numbers["LOCAL_RANK"], numbers["LOCAL_WORLD_SIZE"]
    if not environment.get("MASTER_ADDR"):
        raise TorchrunEnvError("MASTER_ADDR is not set: start this program with torchrun")
    if not (rank < size and local_rank < local_size <= size):
        raise TorchrunEnvError(f"rank {rank} of {size}, {local_rank} of {local_size} on this host: outside its group")
    return TorchrunEnv(
        rank=rank,
        size=size,
        local_rank=local_rank,
        local_size=local_size,
        master=environment["MASTER_ADDR"],
        port=numbers["MASTER_PORT"],
        hosts_store=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )
