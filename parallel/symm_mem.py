"""Symmetric-memory group: NCCL, with small sums through memory that all GPUs of one machine can access.

A decoder needs two sums per layer, of some hundred kilobytes each: too little for NCCL's rings, which are made for
bandwidth. Here every GPU reads the parts of all others and adds them in the order of ranks, in one kernel of torch's
symmetric memory (`torch.distributed._symmetric_memory`). It runs on the current stream and can be captured in a graph.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from parallel.group import CollectiveError, Group

MAX_BYTES = 512 << 10
"""Largest tensor summed this way: every GPU reads it whole from each other, which is slower than a ring beyond this."""
_ALIGNED = 16
_DTYPES = (torch.float32, torch.bfloat16)

Sum = Callable[[Tensor, Tensor], Tensor]
"""Returns the sum of x over all ranks. Arguments: a part of the shared memory, of x's shape and dtype; x."""


class SymmetricGroup(Group):
    """Group whose small all-reduces use symmetric memory, and all other collectives NCCL."""

    def __init__(self, comm: dist.ProcessGroup, memory: Tensor, total: Sum) -> None:
        """memory: this rank's symmetric memory, [MAX_BYTES] uint8. total: sums over all ranks through it."""
        super().__init__(comm)
        self._memory = memory
        self._total = total

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Group.all_reduce."""
        if x.nbytes > MAX_BYTES or x.nbytes % _ALIGNED or x.data_ptr() % _ALIGNED or x.dtype not in _DTYPES:
            return super().all_reduce(x)
        try:
            return x.copy_(self._total(self._memory[: x.nbytes].view(x.dtype).view(x.shape), x))
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error


def join(comm: dist.ProcessGroup, store: Store, device: torch.device) -> SymmetricGroup:
    """Allocate symmetric memory for the ranks of `comm`. All ranks call this at the same time.

    store: used by this group only. Raises CollectiveError if the GPUs have no memory that all of them can access.
    """
    c10d: Any = torch._C._distributed_c10d
    symmetric_memory = c10d._SymmetricMemory
    if comm.rank() == 0:
        # Names are never released, and a process can have many groups.
        store.set("symmetric", f"magicdec-{uuid.uuid4().hex}")
    name = store.get("symmetric").decode()
    try:
        # torch versions differ in which of the two they look up the group with.
        c10d._register_process_group(name, comm)
        symmetric_memory.set_group_info(name, comm.rank(), comm.size(), store)
        memory = symmetric_memory.empty_strided_p2p((MAX_BYTES,), (1,), torch.uint8, device)
        symmetric_memory.rendezvous(memory, name)
    except RuntimeError as error:
        raise CollectiveError(f"the GPUs share no memory: {error}") from error
    one_shot = torch.ops.symm_mem.one_shot_all_reduce_copy
    return SymmetricGroup(comm, memory, lambda part, x: one_shot(part, x, "sum", name))
