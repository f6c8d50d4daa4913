"""Symmetric-memory group: NCCL, with sums of up to some megabytes through memory that all GPUs of one machine access.

A decoder needs two sums per layer, of some hundred kilobytes each: too little for NCCL's rings, which are made for
bandwidth. The kernels of torch's symmetric memory (`torch.ops.symm_mem`) are faster: on Hopper GPUs, vLLM's developers
publish 24 us for 512 KiB over NCCL, 15 with two-shot and 11 with multimem, and the limits below follow their tables.

- one-shot: every GPU reads the parts of all others and adds them in the order of ranks.
- two-shot: every GPU does so for its share of the elements, then all read each other's sums. In the same order, so the
  result of an element does not depend on the size of the tensor.
- multimem: the NVSwitch adds, once for each element, on behalf of the GPU whose share it is in, and writes the sum to
  all GPUs. So all get the same bits, although nothing documents the order of the switch's additions, and it may change
  with the memory's address. bfloat16 only: float32 keeps the order of ranks.

Two operators of torch are not used. `multimem_one_shot_all_reduce` lets the switch add anew for every GPU that reads,
and nothing promises that all read the same bits. `one_shot_all_reduce_copy` would save the copy of x into the memory,
but (torch 2.11 to 2.13, sources and machine code) the first warp of a block tells the other GPUs to read while the
block's other warps may still be copying.

All run on the current stream and can be captured in a graph. No kernel gives up waiting for a GPU whose rank is gone:
NCCL's next collective does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._autograd import DeviceType

from parallel.group import CollectiveError, Group

Algorithm = Literal["one-shot", "two-shot", "multimem"]
ONE_SHOT_BYTES, ONE_SHOT_READ = 512 << 10, 2 << 20
"""Largest tensor of one-shot, and limit of what a GPU reads from all others together: it reads each part whole."""
TWO_SHOT_BYTES, MULTIMEM_BYTES = 8 << 20, 32 << 20
MULTIMEM_RANKS = 5
"""Number of ranks from which on the switch is faster than reading from each GPU."""
_ALIGNED = 16
_DTYPES = (torch.float32, torch.bfloat16)

Sum = Callable[[Tensor, Tensor], None]
"""Sums over all ranks. Arguments: this rank's part, in the shared memory; the result's place, of the same shape and
dtype."""


def choose_algorithm(nbytes: int, dtype: torch.dtype, ranks: int, multicast: bool) -> Algorithm | None:
    """Return the fastest algorithm for a tensor; None: NCCL. All ranks choose alike: nothing else decides.

    multicast: the GPUs and their switch support multimem.
    """
    if dtype not in _DTYPES or nbytes == 0 or nbytes % _ALIGNED:
        return None
    if nbytes <= ONE_SHOT_BYTES and nbytes * (ranks - 1) <= ONE_SHOT_READ:
        return "one-shot"
    if multicast and ranks >= MULTIMEM_RANKS and dtype == torch.bfloat16:
        return "multimem" if nbytes <= MULTIMEM_BYTES else None
    return "two-shot" if nbytes <= TWO_SHOT_BYTES else None


def largest_sums(ranks: int, multicast: bool) -> dict[tuple[Algorithm, torch.dtype], int]:
    """Return the bytes of the largest tensor that each algorithm sums, by its dtype."""
    one_shot = min(ONE_SHOT_BYTES, ONE_SHOT_READ // max(ranks - 1, 1)) // _ALIGNED * _ALIGNED
    sizes = (one_shot, TWO_SHOT_BYTES, MULTIMEM_BYTES)
    chosen = (
        (choose_algorithm(nbytes, dtype, ranks, multicast), dtype, nbytes) for dtype in _DTYPES for nbytes in sizes
    )
    return {(algorithm, dtype): nbytes for algorithm, dtype, nbytes in chosen if algorithm is not None}


class SymmetricMemory:
    """One rank's end of torch's symmetric memory, whose interface is private. Raises RuntimeError where it does not
    work."""

    def __init__(self, comm: dist.ProcessGroup, device: torch.device, name: str) -> None:
        """name: the group's, unique in this process, and the same on all ranks."""
        self._c10d: Any = torch._C._distributed_c10d
        self._comm, self._name = comm, name
        self._device = device if device != torch.device("cuda") else torch.device("cuda", torch.cuda.current_device())
        self.memory: Tensor
        """[bytes of the largest sum] uint8, after `allocate`."""

    def check_links(self) -> None:
        """Raise RuntimeError unless all GPUs are linked by NVLink: the kernels need atomic operations on each other's
        memory, which PCIe does not have. The ranks of one machine use its first GPUs, in order."""
        mine = self._device.index
        matrix = self._c10d._detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
        for other in range(self._comm.size()):
            if other != mine and not matrix[mine][other]:
                raise RuntimeError(f"torch finds no NVLink between GPUs {min(mine, other)} and {max(mine, other)}")

    def allocate(self) -> None:
        """Allocate this rank's memory."""
        multicast = self._c10d._SymmetricMemory.has_multicast_support(DeviceType.CUDA, self._device.index)
        nbytes = max(largest_sums(self._comm.size(), multicast).values())
        self.memory = self._c10d._SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, self._device)

    def connect(self) -> bool:
        """Map the memory of all ranks, which call this at the same time. Returns whether multimem works."""
        self._c10d._register_process_group(self._name, self._comm)
        return bool(self._c10d._SymmetricMemory.rendezvous(self.memory, self._name).multicast_ptr)

    def sums(self) -> dict[Algorithm, Sum]:
        """Return the algorithms, for use after `connect`."""
        ops, name = torch.ops.symm_mem, self._name

        def one_shot(part: Tensor, out: Tensor) -> None:
            ops.one_shot_all_reduce_out(part, "sum", name, out)

        def two_shot(part: Tensor, out: Tensor) -> None:
            if self._comm.size() in (2, 4, 8):
                ops.two_shot_all_reduce_out(part, "sum", name, out)
            else:  # this one is compiled for those numbers only
                out.copy_(ops.two_shot_all_reduce_(part, "sum", name))

        def multimem(part: Tensor, out: Tensor) -> None:
            out.copy_(ops.multimem_all_reduce_(part, "sum", name))

        return {"one-shot": one_shot, "two-shot": two_shot, "multimem": multimem}


class SymmetricGroup(Group):
    """Group whose sums use symmetric memory up to some size, and all other collectives NCCL."""

    def __init__(
        self, comm: dist.ProcessGroup, memory: Tensor, sums: Mapping[Algorithm, Sum], *, multicast: bool
    ) -> None:
        """memory: this rank's symmetric memory, uint8, as large as the largest sum. multicast: multimem works."""
        super().__init__(comm)
        self._memory, self._sums = memory, sums
        self.multicast = multicast

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Group.all_reduce."""
        algorithm = choose_algorithm(x.nbytes, x.dtype, self.size, self.multicast)
        if algorithm is None:
            return self.all_reduce_with_nccl(x)
        part = self._memory[: x.nbytes].view(x.dtype).view(x.shape)
        out = torch.empty_like(x) if x.data_ptr() % _ALIGNED else x  # the kernels write 16 bytes at once
        try:
            self._sums[algorithm](part.copy_(x), out)
        except RuntimeError as error:
            raise CollectiveError(str(error)) from error
        return x if out is x else x.copy_(out)

    def all_reduce_with_nccl(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, in place, without symmetric memory; returns x."""
        return super().all_reduce(x)
