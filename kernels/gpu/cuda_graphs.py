"""CUDA graphs: work that is enqueued once and replayed as one launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_WARM_UPS = 2  # first calls of libraries allocate memory and choose kernels, which cannot be captured


class CudaGraphs:
    """Graph capture on one device. All graphs share one memory pool, so callers must replay them one at a time, on one
    stream, and read the results of one before they replay the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = None

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run `work`, and return a function that replays it with the same kernels on the same addresses.

        `work` must not wait for the device.
        """
        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may call the driver during the capture: NCCL's watchdog does.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        graph.replay()
        return graph.replay
