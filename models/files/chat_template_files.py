"""Chat template of a model directory. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.files.json_values import read_json_if_any, read_text

_NAMED = "additional_chat_templates"


def read_chat_template(directory: Path) -> str | None:
    """Read the jinja2 source of the template for chats without tools; None if there is none.

    As in transformers, files of their own replace the templates in tokenizer_config.json: chat_template.jinja, and
    those in additional_chat_templates/, whose `default` counts before it. Of several templates in
    tokenizer_config.json, the one named `default` counts. Last comes chat_template.json, where processors keep it.
    Raises ModelError.
    """
    files = [directory / "chat_template.jinja", *sorted((directory / _NAMED).glob("*.jinja"))]
    texts = {file: read_text(file, "a chat template") for file in files if file.is_file()}
    source = texts.get(directory / _NAMED / "default.jinja") or texts.get(directory / "chat_template.jinja")
    for name in ("chat_template.json",) if texts else ("tokenizer_config.json", "chat_template.json"):
        source = source or _default(read_json_if_any(directory / name).get("chat_template"))
    return source


def _default(value: Any) -> str | None:
    """Return the template, or the default one of named templates: {name: template} or [{name, template}]."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None
