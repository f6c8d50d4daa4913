"""Triton's interpreter with less work around each operation and call. Its results are the same."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_patched: set[int] = set()
"""Modules of the language, by id, that the running launch has replaced functions of."""
_builtins: dict[int, list[str]] = {}
"""Names of functions to replace, by id of the module or class that has them."""


def hasten() -> None:
    """Replace parts of the interpreter; may be called again.

    It computes for every sum and product of integers whether it overflows, and drops that, since `debug` is off. For
    every call of a function in a kernel it replaces the functions of the language anew, after a search for them.
    """
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    if interpreter._patch_builtin is _replace_builtins:
        return
    interpreter._get_np_dtype = _dtypes_once(interpreter._get_np_dtype)
    interpreter._patch_builtin = _replace_builtins
    interpreter.InterpretedFunction.__call__ = _call
    interpreter.GridExecutor.__call__ = _forgetting(interpreter.GridExecutor.__call__)


def _dtypes_once(get_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Cache the types that have names: those of elements. A block has the NumPy dtype of its elements."""
    known: dict[Any, Any] = {}

    def get_known(dtype: Any) -> Any:
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        if isinstance(dtype, tl.pointer_type):
            return get_dtype(dtype)
        found = known.get(dtype)
        if found is None:
            found = known[dtype] = get_dtype(dtype)
        return found

    return get_known


def _replace_builtins(owner: Any, builder: Any, scope: Any) -> None:
    """Replace functions of a module or class, as `_patch_builtin` does."""
    names = _builtins.get(id(owner))
    if names is None:
        names = [name for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]
        _builtins[id(owner)] = names
    for name in names:
        member = getattr(owner, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(owner, name, member, builder, scope)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of a kernel, as `InterpretedFunction.__call__` does."""
    languages = {id(each) for each in self.fn.__globals__.values() if each is tl or each is tl.core}
    if not languages <= _patched:
        interpreter._patch_lang(self.fn)
        _patched.update(languages)
    function = self.rewrite()
    try:
        return function(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def _forgetting(launch: Callable[..., None]) -> Callable[..., None]:
    """A launch restores what it replaced."""

    def launch_and_forget(self: Any, *args: Any, **kwargs: Any) -> None:
        _patched.clear()
        _patched.add(id(tl))  # every kernel sees it
        try:
            launch(self, *args, **kwargs)
        finally:
            _patched.clear()

    return launch_and_forget
