"""Chat messages to prompt text, by the template that comes with the model, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.tokenizer import Tokenizer, TokenizerError
from server.errors import ApiError


class ChatTemplate:
    """Raises TokenizerError, on construction, if the model's template is not one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        source = tokenizer.chat_template
        try:
            self._template = None if source is None else environment.from_string(source)
        except TemplateError as error:
            raise TokenizerError(f"the model's chat template is broken: {error}") from None
        self._special = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """`messages`: role, content, and name if given. Raises ApiError."""
        if self._template is None:
            raise ApiError("this model has no chat template", code="not_served", param="messages")
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, **self._special
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ApiError(f"messages: the model's chat template refuses them: {error}", param="messages") from None


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
