"""Sandbox for a model's chat template: it reaches nothing but the messages, with bounded run time and output.

A template comes with the weights and is as trusted as they are. It must not block the server, which a template that
loops over client input could do.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 5.0
MAX_OUTPUT_CHARS = 1 << 20
"""Maximum characters of output, in addition to four times those of the messages."""
_MAX_EXPONENT = 100

_until = threading.local()


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja environment whose templates check the clock in every loop iteration and at every call."""

    intercepted_binops = frozenset({"*", "**"})

    def compiled(self, source: str) -> Template:
        """Compile `source`. Raises TemplateError."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.body.insert(0, nodes.ExprStmt(_clock_call()).set_lineno(loop.lineno).set_environment(self))
            if loop.test is not None:  # iterations that it rejects do not reach the body
                loop.test = nodes.And(nodes.Not(_clock_call()), loop.test).set_lineno(loop.lineno).set_environment(self)
        return self.from_string(tree)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        check_clock()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Refuse a repetition or a power that would get large in a single operation."""
        if operator == "**" and (abs(left) > 1 and right > _MAX_EXPONENT):
            raise TemplateError("a number is too large")
        for many, times in ((left, right), (right, left)):
            if operator == "*" and hasattr(many, "__len__") and len(many) * times > MAX_OUTPUT_CHARS:
                raise TemplateError("a text is too long")
        return super().call_binop(context, operator, left, right)


def _clock_call() -> nodes.Call:
    """Build a call of check_clock by its import path: a template could redefine a name."""
    return nodes.Call(nodes.ImportedName(f"{__name__}.check_clock"), [], [], None, None)


def render(template: Template, variables: dict[str, Any], chars: int) -> str:
    """Render within the bounds. chars: length of the messages. Raises TemplateError if time or output exceed them."""
    _until.time = time.monotonic() + MAX_SECONDS
    pieces, left = [], MAX_OUTPUT_CHARS + 4 * chars
    for piece in template.generate(variables):
        check_clock()
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise TemplateError("its output is too long")
    return "".join(pieces)


def check_clock() -> str:
    """Raise TemplateError when the time of this thread's template is over. Returns an empty string."""
    if time.monotonic() > _until.time:
        raise TemplateError(f"it takes more than {MAX_SECONDS:g} seconds")
    return ""
