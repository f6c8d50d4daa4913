"""Calls of models whose template knows no tools: the system message describes them, and calls look like Hermes's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.text.tool_formats.hermes import BEGIN, END, HermesFormat
from server.text.tools.functions import Function
from server.text.tools.tool_messages import for_template

_INTRODUCTION = f"""You may call functions. These are the functions, one on each line:
<tools>
%s
</tools>

To call a function, write its name and its arguments as a JSON object, like this:
{BEGIN}
{{"name": "name-of-the-function", "arguments": {{"name-of-an-argument": "value"}}}}
{END}"""


class GenericJsonFormat(HermesFormat):
    """Format that any template can carry: everything is plain text in messages of the system, user and assistant."""

    name = "generic_json"

    def recognises(self, template: str) -> bool:
        return True

    def prepare(
        self, messages: Sequence[Mapping[str, Any]], functions: Sequence[Function]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
        prepared: list[dict[str, Any]] = []
        is_result = False
        for message in for_template(messages):
            follows, is_result = is_result, message["role"] == "tool"
            if is_result:
                result = f"<tool_response>\n{message['content']}\n</tool_response>"
                if follows:  # templates want users and assistants to alternate
                    prepared[-1]["content"] += f"\n{result}"
                else:
                    prepared.append({"role": "user", "content": result})
            else:
                prepared.append(_with_calls_as_text(message))
        return (_introduce(functions, prepared) if functions else prepared), None


def _with_calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    texts = [message["content"]] if message["content"] else []
    for call in message.pop("tool_calls", ()):
        function = {"name": call["function"]["name"], "arguments": call["function"].get("arguments", {})}
        texts.append(f"{BEGIN}\n{json.dumps(function, ensure_ascii=False)}\n{END}")
    return {**message, "content": "\n".join(texts)}


def _introduce(functions: Sequence[Function], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Describe functions in the system message, which becomes the first one where there is none."""
    lines = [json.dumps(function.as_tool()["function"], ensure_ascii=False) for function in functions]
    introduction = _INTRODUCTION % "\n".join(lines)
    if messages and messages[0]["role"] == "system":
        content = messages[0]["content"]
        described = f"{content}\n\n{introduction}" if content else introduction
        return [{**messages[0], "content": described}, *messages[1:]]
    return [{"role": "system", "content": introduction}, *messages]
