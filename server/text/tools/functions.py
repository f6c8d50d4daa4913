"""Functions that a client offers to the model, and which of them an answer has to call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Function:
    """A function that the model may call.

    parameters: JSON schema of its arguments, which are an object; empty: it has none. strict: whether arguments must
    match it even where the model decides whether to call. description: for the model; empty: none.
    """

    name: str
    parameters: Mapping[str, Any]
    description: str = ""
    strict: bool = False

    def as_tool(self) -> dict[str, Any]:
        """Return the function in the form in which chat templates take tools. Some need a description, and the
        properties of the parameters."""
        parameters = dict(self.parameters) or {"type": "object", "properties": {}}
        described = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": described}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Functions of a request, and how an answer uses them.

    offered: functions that the model is told of, in the client's order. callable: those that it may call. mode: none:
    no call; auto: the model decides; required: one call or more. parallel: whether one answer may make several calls.
    """

    offered: Sequence[Function] = ()
    callable: Sequence[Function] = ()
    mode: Literal["none", "auto", "required"] = "none"
    parallel: bool = True

    @property
    def is_bound(self) -> bool:
        """Whether a grammar has to hold the answer to the functions."""
        if self.mode == "auto":
            limits = self.callable != self.offered or not self.parallel
            return limits or any(function.strict for function in self.callable)
        return self.mode == "required"
