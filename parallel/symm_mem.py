"""A group over NCCL whose small sums go through memory that the GPUs of one machine see of each other.

A decoder takes two sums per layer, of some hundred kilobytes each: too little for NCCL's rings, which are made for
bandwidth. Here every GPU reads the parts of all others, and adds them in the order of rank, in one kernel of torch's
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

MOST_BYTES = 512 << 10
"""Of a sum: every GPU reads that of each other one, which for more takes longer than to pass parts round."""
_ALIGNED = 16
_DTYPES = (torch.float32, torch.bfloat16)

Sum = Callable[[Tensor, Tensor], Tensor]
"""Of x on all ranks, given a part of the memory that they share, of x's shape and dtype, and x."""


class SymmetricGroup(Group):
    """See Group."""

    def __init__(self, comm: dist.ProcessGroup, memory: Tensor, total: Sum) -> None:
        """memory: this rank's, [MOST_BYTES] uint8, which the others see."""
        super().__init__(comm)
        self._memory = memory
        self._total = total

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Group.all_reduce."""
        if x.nbytes > MOST_BYTES or x.nbytes % _ALIGNED or x.data_ptr() % _ALIGNED or x.dtype not in _DTYPES:
            return super().all_reduce(x)
        try:
            return x.copy_(self._total(self._memory[: x.nbytes].view(x.dtype).view(x.shape), x))
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error


def join(comm: dist.ProcessGroup, store: Store, device: torch.device) -> SymmetricGroup:
    """Give the ranks of `comm` memory that all of them see. Every rank does that at the same time.

    store: theirs, and of no other group. Raises CollectiveError where GPUs have no such memory.
    """
    c10d: Any = torch._C._distributed_c10d
    memory_of = c10d._SymmetricMemory
    if comm.rank() == 0:
        store.set("symmetric", f"magicdec-{uuid.uuid4().hex}")  # names are for good, and processes can have many groups
    name = store.get("symmetric").decode()
    try:
        # Which of the two torch asks for its group has changed between versions.
        c10d._register_process_group(name, comm)
        memory_of.set_group_info(name, comm.rank(), comm.size(), store)
        memory = memory_of.empty_strided_p2p((MOST_BYTES,), (1,), torch.uint8, device)
        memory_of.rendezvous(memory, name)
    except RuntimeError as error:
        raise CollectiveError(f"the GPUs have no memory that all of them see: {error}") from error
    one_shot = torch.ops.symm_mem.one_shot_all_reduce_copy
    return SymmetricGroup(comm, memory, lambda part, x: one_shot(part, x, "sum", name))
