"""Logging of a server process: one line per event on stderr."""

from __future__ import annotations

import logging
import sys


class _Formatter(logging.Formatter):
    """Escapes control characters in messages, so that nothing a client sends can pass for a line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in record.message)
        return super().formatMessage(record)


def set_up(level: str) -> None:
    """`level`: debug, info, warning or error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for chatty in ("uvicorn.error", "asyncio"):
        logging.getLogger(chatty).setLevel("INFO" if level == "debug" else "WARNING")
