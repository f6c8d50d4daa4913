"""The choice of the two formats that an answer is read in: of thinking, and of calls."""

from __future__ import annotations

from server.text.thinking.thinking_format import ThinkingFormat
from server.text.thinking.thinking_registry import THINKING_FORMATS, choose_thinking
from server.text.tool_formats.tool_registry import FORMATS, choose_format
from server.text.tools.tool_format import ToolFormat

_OF_BOTH = THINKING_FORMATS.keys() & FORMATS.keys()
"""Formats that have thinking and calls in the same channels, so that they are for both or for neither."""


def choose_formats(thinking: str, tool_format: str, template: str | None) -> tuple[ThinkingFormat, ToolFormat]:
    """Return the formats that the settings of these names say. template: the model's, by which auto chooses.

    For a format of both, a setting that is not auto decides for the other one (ServerConfig refuses two that disagree).
    """
    read, called = choose_thinking(thinking, template), choose_format(tool_format, template)
    if read.name == called.name or not _OF_BOTH & {read.name, called.name}:
        return read, called
    if thinking == "auto":
        return choose_thinking(called.name if called.name in _OF_BOTH else "none", template), called
    return read, choose_format(read.name if read.name in _OF_BOTH else "generic_json", template)
