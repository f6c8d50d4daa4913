"""A CPU stand-in for CUDA graphs: capture records a call's tensor operations, replay repeats them on the same tensors.

Replay runs no other Python code of the call: shapes and numbers computed during capture stay fixed. So tests detect
work that cannot be captured, because it reads tensor values on the host or computes something anew in Python.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpretedFunction

_ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
"""Operators that need values on the host; capture rejects them. `tolist` reads CPU memory directly and is not
detected."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Callable[[], None]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(name in str(func) for name in _ASKS):
            raise RuntimeError(f"{func} cannot be captured: the host would wait for the device")
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if not any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns):
            self.calls.append(lambda: _again(func, args, kwargs, made))
        return made


def _again(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> None:
    for new, old in zip(tree_flatten(func(*args, **kwargs))[0], tree_flatten(made)[0], strict=True):
        if isinstance(old, Tensor) and new is not old:
            old.copy_(new)


class Recorded:
    """Replacement for kernels.gpu.cuda_graphs.CudaGraphs with interpreted Triton kernels. Counts captures, those that
    are still held, and replays.

    Like CUDA's, its memory is freed with the last graph, and nothing can be captured afterwards.
    """

    def __init__(self) -> None:
        self.captured = self.held = self.replayed = 0
        self.released = False

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.captured and not self.held:
            raise RuntimeError("the memory of these graphs is freed: use_count > 0 INTERNAL ASSERT FAILED")
        work()
        recorder = _Recorder()
        with _launches(recorder), recorder:
            work()
        self.captured += 1
        self.held += 1

        def again() -> None:
            if self.released:
                raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
            self.replayed += 1
            for call in recorder.calls:
                call()

        weakref.finalize(again, self._let_go)
        return again

    def release(self) -> None:
        self.released = True

    def _let_go(self) -> None:
        self.held -= 1


@contextmanager
def _launches(recorder: _Recorder) -> Iterator[None]:
    """Record each Triton kernel launch as one call; the operators that the interpreter runs inside it are not
    recorded."""
    run = InterpretedFunction.run

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        recorder.calls.append(lambda: run(self, *args, **kwargs))
        with torch.utils._python_dispatch._disable_current_modes():
            return run(self, *args, **kwargs)

    InterpretedFunction.run = recorded
    try:
        yield
    finally:
        InterpretedFunction.run = run
