"""Thinking formats by name, and the choice of a model's own."""

from __future__ import annotations

from server.text.thinking.harmony_thinking import HarmonyThinking
from server.text.thinking.no_thinking import NoThinking
from server.text.thinking.tagged_thinking import TaggedThinking
from server.text.thinking.thinking_format import ThinkingFormat

_FORMATS: tuple[ThinkingFormat, ...] = (
    HarmonyThinking(),
    TaggedThinking("think", "<think>", "</think>"),  # Qwen3, DeepSeek-R1 and many others
    NoThinking(),  # takes any template
)
THINKING_FORMATS = {each.name: each for each in _FORMATS}
"""Formats by name, in the order in which they look at a template."""


def choose_thinking(setting: str, template: str | None) -> ThinkingFormat:
    """Return the format that a setting names. auto: the one that the model's chat template has, or else none."""
    if setting == "auto":
        return next(each for each in THINKING_FORMATS.values() if each.recognises(template or ""))
    return THINKING_FORMATS[setting]
