"""Rendezvous: join the ranks of a group over one of four transports.

- shared: the ranks run on the CPUs of one machine and map the same memory.
- nccl: CUDA devices.
- symmetric: NCCL, with sums of up to some megabytes through memory that the devices of one machine can all access.
- gloo: everything else. Its sockets are bound to the loopback interface unless an address of this machine is given.

NCCL and gloo connect through a store, of rank 0 or of the launcher that started the ranks.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any, Literal

import msgspec
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Backend, PrefixStore, Store, TCPStore

from parallel import shm
from parallel.group import CollectiveError, Group
from parallel.symm_start import join_symmetric

Transport = Literal["shared", "gloo", "nccl", "symmetric"]
LOOPBACK = "127.0.0.1"


class Join(msgspec.Struct):
    """Parameters with which a rank joins the group."""

    rank: int
    size: int
    transport: Transport
    timeout_s: float
    """Time that a collective waits for another rank."""
    port: int | None = None
    """All but shared: port of rank 0's store on the loopback interface."""
    fd: int | None = None
    """shared: file descriptor of the memory; the rank that created it keeps it open until it closes the group."""
    holder: int | None = None
    """shared: process id of the rank that owns the descriptor; None: this process has inherited it."""
    start_timeout_s: float | None = None
    """Time that joining and loading wait for another rank, until Group.settle; None: timeout_s."""
    fall_back: bool = False
    """symmetric: use NCCL alone where symmetric memory does not work. Joining then changes `transport`."""


def choose(device: torch.device, wanted: Transport | Literal["auto"], one_machine: bool = True) -> Transport:
    """Choose the transport between ranks; auto: the fastest, where `symmetric` may need Join.fall_back. Raises
    ValueError for one that cannot work."""
    if wanted == "auto":
        if device.type == "cuda":
            return "symmetric" if one_machine else "nccl"
        return "shared" if one_machine and shm.available() else "gloo"
    if (wanted in ("nccl", "symmetric")) != (device.type == "cuda"):
        raise ValueError(f"{wanted} does not support the device {device.type}")
    if wanted in ("shared", "symmetric") and not one_machine:
        raise ValueError(f"{wanted} needs all ranks on one machine")
    if wanted == "shared" and not shm.available():
        raise ValueError("shared needs Linux, on x86 or on Arm with libatomic.so.1")
    return wanted


def host_store(size: int, timeout_s: float) -> TCPStore:
    """Open rank 0's store on a free port of the loopback interface; it closes with this process."""
    listener = socket.create_server((LOOPBACK, 0))
    port = listener.getsockname()[1]
    return TCPStore(
        LOOPBACK,
        port,
        size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join(how: Join, device: torch.device, store: Store | None = None, address: str = LOOPBACK) -> Group:
    """Join the group as a rank; with NCCL and gloo, return once all ranks have joined.

    store: this process's end of the store; None: connect to the one at how.port. address: an address of this machine
    that the other ranks can reach. Raises CollectiveError if they do not join in time; SymmetricUnavailable.
    """
    return _enter(how, how.size, device, store, address)


def join_first(
    count: int, how: Join, device: torch.device, store: Store | None = None, address: str = LOOPBACK
) -> Group | None:
    """Join a second group, of ranks 0 … count - 1. Returns None on the other ranks. Every rank calls this at most once,
    after `join` and with the same arguments. Raises CollectiveError; SymmetricUnavailable.
    """
    if not 0 < count <= how.size:
        raise ValueError(f"a group of {count} ranks out of {how.size}")
    if how.rank >= count:
        return None
    return Group.single() if count == 1 else _enter(how, count, device, store, address, second=True)


def _enter(
    how: Join, size: int, device: torch.device, store: Store | None, address: str, second: bool = False
) -> Group:
    if how.transport == "shared":
        assert how.fd is not None
        inherited = how.holder is None
        fd = how.fd if inherited else os.open(f"/proc/{how.holder}/fd/{how.fd}", os.O_RDWR)
        try:
            offset = shm.area_bytes(how.size) if second else 0
            return shm.ShmGroup(fd, how.rank, size, how.timeout_s, offset)
        finally:
            if not inherited:
                os.close(fd)
    limit = timedelta(seconds=how.timeout_s if how.start_timeout_s is None else how.start_timeout_s)
    try:
        if store is None:
            assert how.port is not None
            store = TCPStore(LOOPBACK, how.port, how.size, is_master=False, timeout=limit)
        part = PrefixStore("second" if second else "first", store)
        comm = connect(part, how.rank, size, device, limit, address)
        _meet(comm, device)  # NCCL connects only in the first collective
        group: Group | None = None
        if how.transport == "symmetric":
            group = join_symmetric(comm, part, device, fall_back=how.fall_back)
            if group is None:
                how.transport = "nccl"  # a second group does not try again
        group = group or Group(comm)

        def settle() -> None:
            try:
                _meet(comm, device)
            except RuntimeError as error:
                raise CollectiveError(str(error)) from error
            comm._get_backend(device)._set_default_timeout(timedelta(seconds=how.timeout_s))

        group.at_settling = settle
        return group
    except CollectiveError:
        raise
    except RuntimeError as error:
        raise CollectiveError(str(error)) from error


def _meet(comm: dist.ProcessGroup, device: torch.device) -> None:
    """Wait until all ranks are here."""
    comm.allreduce([torch.zeros(1, device=device)]).wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def connect(
    store: Store, rank: int, size: int, device: torch.device, limit: timedelta, hostname: str = LOOPBACK
) -> dist.ProcessGroup:
    """Create a process group apart from torch's default one, so that a process can be in several.

    hostname: address that gloo's sockets are bound to.
    """
    group = dist.ProcessGroup(store, rank, size)
    if device.type == "cuda":
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = limit
        backend: Backend = dist.ProcessGroupNCCL(store, rank, size, nccl)
        kind = dist.ProcessGroup.BackendType.NCCL
    else:
        kind_of: Any = dist.ProcessGroupGloo  # its stub lacks the options
        gloo = kind_of._Options()
        gloo._timeout = limit
        gloo._threads = 1
        gloo._devices = [kind_of.create_device(hostname=hostname)]
        backend = kind_of(store, rank, size, gloo)
        kind = dist.ProcessGroup.BackendType.GLOO
    group._register_backend(device, kind, backend)
    return group
