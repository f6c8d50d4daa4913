"""CUDA graphs: work that is enqueued once and replayed as one launch."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

_WARM_UPS = 2  # first calls of libraries allocate memory and choose kernels, which cannot be captured


class CudaGraphs:
    """Graph capture on one device, for one engine. All graphs share one memory pool, so callers must replay them one at
    a time, on one stream, and read the results of one before they replay the next.

    The pool lives as long as a graph that was captured into it. Its handle must not be used again after that: so every
    engine has an object of its own.

    `release` destroys all graphs. It is also called when Python ends, and before objects that hold each other are
    collected: NCCL, which waits for the graphs of a communicator before it destroys it, would wait for ever where
    Python takes the process group first.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Warm-ups run on the stream of the capture, where cuBLAS then finds a workspace outside the pool: inside, it
        # would keep the pool's memory when all graphs are gone.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self.release = weakref.finalize(self, _reset, self._graphs)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work`, and return a function that replays it with the same kernels on the same addresses.

        `work` must not wait for the device.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                work()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may call the driver during the capture: NCCL's watchdog does.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        self._graphs.append(graph)
        graph.replay()
        return graph.replay


def _reset(graphs: list[torch.cuda.CUDAGraph]) -> None:
    while graphs:
        graphs.pop().reset()
