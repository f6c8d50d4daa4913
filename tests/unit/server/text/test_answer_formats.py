"""The two formats that an answer is read in fit together, whatever the settings and the template."""

from __future__ import annotations

import pytest

from server.text.answer_formats import choose_formats

CHANNELS = "<|start|>assistant<|channel|>analysis<|message|>"
TAGS = "<think></think>[TOOL_CALLS]"


@pytest.mark.parametrize(
    ("thinking", "tool_format", "template", "chosen"),
    [
        ("auto", "auto", CHANNELS, ("harmony", "harmony")),
        ("auto", "auto", TAGS, ("think", "mistral")),
        ("harmony", "auto", TAGS, ("harmony", "harmony")),
        ("auto", "harmony", None, ("harmony", "harmony")),
        ("none", "auto", CHANNELS, ("none", "generic_json")),
        ("think", "auto", CHANNELS, ("think", "generic_json")),
        ("auto", "hermes", CHANNELS, ("none", "hermes")),
        ("auto", "generic_json", TAGS, ("think", "generic_json")),
    ],
)
def test_harmony_is_for_both_or_for_neither(
    thinking: str, tool_format: str, template: str | None, chosen: tuple[str, str]
) -> None:
    assert tuple(each.name for each in choose_formats(thinking, tool_format, template)) == chosen
