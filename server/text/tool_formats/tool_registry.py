"""Tool formats by name, and the choice of a model's own."""

from __future__ import annotations

from server.text.tool_formats.generic_json import GenericJsonFormat
from server.text.tool_formats.harmony_calls import HarmonyFormat
from server.text.tool_formats.hermes import HermesFormat
from server.text.tool_formats.llama_json import LlamaJsonFormat
from server.text.tool_formats.mistral import MistralFormat
from server.text.tool_formats.qwen_xml import QwenXmlFormat
from server.text.tools.tool_format import ToolFormat

_FORMATS: tuple[ToolFormat, ...] = (
    QwenXmlFormat(),  # its templates have <tool_call> too
    HermesFormat(),
    MistralFormat(),
    HarmonyFormat(),
    LlamaJsonFormat(),
    GenericJsonFormat(),  # takes any template
)
FORMATS = {each.name: each for each in _FORMATS}
"""Formats by name, in the order in which they look at a template."""


def choose_format(setting: str, template: str | None) -> ToolFormat:
    """Return the format that a setting names. auto: the one that the model's chat template has, or else generic_json.

    Raises ValueError: there is no such format.
    """
    if setting == "auto":
        return next(each for each in FORMATS.values() if each.recognises(template or ""))
    if setting not in FORMATS:
        raise ValueError(f"no tool format {setting!r}, expected auto or one of {', '.join(FORMATS)}")
    return FORMATS[setting]
