"""The choice of the two formats that an answer is read in: of thinking, and of calls."""

from __future__ import annotations

from server.text.thinking.harmony_thinking import HarmonyThinking
from server.text.thinking.thinking_format import ThinkingFormat
from server.text.thinking.thinking_registry import choose_thinking
from server.text.tool_formats.harmony_calls import HarmonyFormat
from server.text.tool_formats.tool_registry import choose_format
from server.text.tools.tool_format import ToolFormat


def choose_formats(thinking: str, tool_format: str, template: str | None) -> tuple[ThinkingFormat, ToolFormat]:
    """Return the formats that the settings of these names say. template: the model's, by which auto chooses.

    harmony has thinking and calls in the same channels, so it is for both or for neither: a setting that is not auto
    decides for the other one (ServerConfig refuses two that disagree).
    """
    chosen = choose_thinking(thinking, template), choose_format(tool_format, template)
    channels = isinstance(chosen[0], HarmonyThinking), isinstance(chosen[1], HarmonyFormat)
    if channels[0] is channels[1]:
        return chosen
    if thinking == "auto":
        return choose_thinking("harmony" if channels[1] else "none", template), chosen[1]
    return chosen[0], choose_format("harmony" if channels[0] else "generic_json", template)
