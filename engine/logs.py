"""Logging of all our processes: one line per event on stderr, and nothing that can pass for one."""

from __future__ import annotations

import logging
import sys


class LineFormatter(logging.Formatter):
    """Escapes control characters in messages; what an exception says is indented, line by line."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = _escaped(record.message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        event, *trace = super().format(record).splitlines()
        return "\n".join([event, *(f"    | {_escaped(line)}" for line in trace)])


def set_up(level: str) -> None:
    """`level`: debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
