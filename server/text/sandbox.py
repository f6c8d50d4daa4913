"""Where a model's chat template runs: it can reach nothing but the messages, for so long, and write so much.

A template comes with the weights and is as trusted as these; what it must not do is hold up the server, which one that
loops over what a client sends can.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0
CHARS = 1 << 20
"""Of text, beside four times as much as the messages have."""
_MOST_DIGITS = 100

_until = threading.local()


class Sandbox(ImmutableSandboxedEnvironment):
    """Templates that look at the clock in every turn of a loop and at every call."""

    intercepted_binops = frozenset({"*", "**"})

    def compiled(self, source: str) -> Template:
        """Raises TemplateError."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.body.insert(0, nodes.ExprStmt(_tick()).set_lineno(loop.lineno).set_environment(self))
            if loop.test is not None:  # turns that it rejects do not come to the body
                loop.test = nodes.And(nodes.Not(_tick()), loop.test).set_lineno(loop.lineno).set_environment(self)
        return self.from_string(tree)

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        check_clock()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """A text that is repeated, and a power, may not become large at once."""
        if operator == "**" and (abs(left) > 1 and right > _MOST_DIGITS):
            raise TemplateError("a number is too large")
        for many, times in ((left, right), (right, left)):
            if operator == "*" and hasattr(many, "__len__") and len(many) * times > CHARS:
                raise TemplateError("a text is too long")
        return super().call_binop(context, operator, left, right)


def _tick() -> nodes.Call:
    """By its place in Python: a name could be taken by the template."""
    return nodes.Call(nodes.ImportedName(f"{__name__}.check_clock"), [], [], None, None)


def render(template: Template, variables: dict[str, Any], chars: int) -> str:
    """chars: that the messages have. Raises TemplateError where that takes too long or comes to too much."""
    _until.time = time.monotonic() + SECONDS
    pieces, left = [], CHARS + 4 * chars
    for piece in template.generate(**variables):
        check_clock()
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise TemplateError("what it writes is too long")
    return "".join(pieces)


def check_clock() -> str:
    """Raises TemplateError when the time of this thread's template is over. Returns nothing to write."""
    if time.monotonic() > _until.time:
        raise TemplateError(f"it takes more than {SECONDS:g} seconds")
    return ""
