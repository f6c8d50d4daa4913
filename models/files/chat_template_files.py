"""Chat template of a model directory. Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.files.json_values import ModelError, read_json_if_any


def read_chat_template(directory: Path) -> str | None:
    """Read the jinja2 source of the template for chats without tools; None if there is none.

    As in transformers, chat_template.jinja comes first, then tokenizer_config.json; of several templates, also those of
    additional_chat_templates/, the one named `default` counts. Last comes chat_template.json, where processors keep it.
    Raises ModelError.
    """
    source = None
    for name in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        source = source or _read_text(directory / name)
    for name in ("tokenizer_config.json", "chat_template.json"):
        source = source or _default(read_json_if_any(directory / name).get("chat_template"))
    return source


def _default(value: Any) -> str | None:
    """Return the template, or the default one of named templates: {name: template} or [{name, template}]."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: {error}") from None
