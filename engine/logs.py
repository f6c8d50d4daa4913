"""Logging of all processes: one line per event on stderr. Messages cannot forge a line."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal

LogFormat = Literal["text", "json"]

_format: LogFormat = "text"


class LineFormatter(logging.Formatter):
    """Formatter that escapes control characters in messages and indents tracebacks line by line. A record's `facts`
    (`extra={"facts": …}`) follow its message."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        message = " ".join([record.message, *(f"{name}={value}" for name, value in facts.items())])
        record.message = _escaped(message)
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        event, *trace = super().format(record).splitlines()
        return "\n".join([event, *(f"    | {_escaped(line)}" for line in trace)])


class JsonFormatter(logging.Formatter):
    """Formatter of one JSON object per line: time (ISO 8601, UTC), level, logger, message, the record's facts, and an
    exception if there is one."""

    converter = staticmethod(time.gmtime)

    def __init__(self, who: str = "") -> None:
        super().__init__()
        self._who = who

    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **({"process": self._who} if self._who else {}),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def set_up(level: str, format: LogFormat = "text", who: str = "") -> None:
    """Set up logging of this process.

    level: debug, info, warning or error. who: name of this process, if it is not the server or its engine.
    """
    global _format
    _format = format
    handler = logging.StreamHandler(sys.stderr)
    named = f" {who}:" if who else ""
    text = LineFormatter(f"%(asctime)s %(levelname)s{named} %(message)s")
    handler.setFormatter(JsonFormatter(who) if format == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def current_setup() -> tuple[str, LogFormat]:
    """Return this process's level and format, for processes that it starts."""
    return logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower(), _format


def _escaped(text: str) -> str:
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
