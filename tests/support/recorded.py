"""CUDA graphs on the CPU: what a call did to tensors is done again on the same tensors, and nothing else of it.

What Python computed meanwhile is as it was, shapes and numbers alike: work that looks at something anew, or asks for
values of tensors, is told apart from work that can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from triton.runtime.interpreter import InterpretedFunction

_ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
"""Operators that need values on the host. `tolist` reads a CPU's memory unseen."""


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
    """In place of kernels.gpu.cuda_graphs.CudaGraphs, for kernels in Triton as its interpreter runs them. Counts."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        recorder = _Recorder()
        with _launches(recorder), recorder:
            work()
        self.captured += 1

        def again() -> None:
            self.replayed += 1
            for call in recorder.calls:
                call()

        return again


@contextmanager
def _launches(recorder: _Recorder) -> Iterator[None]:
    """Record launches of Triton kernels as a whole: what the interpreter does inside is its own affair."""
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
