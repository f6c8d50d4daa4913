"""Chat templates of a model directory. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.files.json_values import read_json_if_any, read_text

DEFAULT, WITH_TOOLS = "default", "tool_use"
"""Names of the template for chats, and of the one for chats with tools, where that is another one."""
_NAMED = "additional_chat_templates"


def read_chat_templates(directory: Path) -> dict[str, str]:
    """Read the jinja2 sources of the templates, by name.

    As in transformers, files of their own replace the templates in tokenizer_config.json: chat_template.jinja, and
    those in additional_chat_templates/, whose `default` counts before it. A template in tokenizer_config.json without a
    name is the default one. Last comes chat_template.json, where processors keep it. Raises ModelError.
    """
    files = {DEFAULT: directory / "chat_template.jinja"}
    files |= {f"{_NAMED}/{file.stem}": file for file in sorted((directory / _NAMED).glob("*.jinja"))}
    texts = {name: read_text(file, "a chat template") for name, file in files.items() if file.is_file()}
    found = {name.removeprefix(f"{_NAMED}/"): text for name, text in texts.items() if text}
    for name in ("chat_template.json",) if texts else ("tokenizer_config.json", "chat_template.json"):
        if DEFAULT not in found:
            found = _named(read_json_if_any(directory / name).get("chat_template")) | found
    return found


def _named(value: Any) -> dict[str, str]:
    """Return templates by name: of the default one, of {name: template}, or of [{name, template}]."""
    if isinstance(value, str):
        value = {DEFAULT: value}
    if isinstance(value, dict):
        value = [{"name": name, "template": template} for name, template in value.items()]
    entries = [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
    pairs = [(entry.get("name"), entry.get("template")) for entry in entries]
    return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str) and text}
