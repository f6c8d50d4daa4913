"""A tokenizer whose template writes messages in channels, as that of gpt-oss does, and refuses what that refuses."""

from __future__ import annotations

import json
from pathlib import Path

from server.text.thinking.harmony_thinking import HarmonyThinking
from tests.support.tool_walks import write_tool_tokenizer

TEMPLATE = """\
{{- "<|start|>system<|message|>Reasoning: " + reasoning_effort|default("medium") + "<|end|>" }}
{%- for tool in tools or [] %}{{ "<|start|>developer<|message|>" + tool.function.name + "<|end|>" }}{% endfor %}
{%- set last = namespace(call=none) %}
{%- for message in messages %}
  {%- if message.role == "assistant" and message.tool_calls %}
    {%- set call = message.tool_calls[0].function %}
    {%- if message.content and message.thinking %}{{ raise_exception("content and thinking beside a call") }}{% endif %}
    {%- if message.tool_calls|length > 1 %}{{ raise_exception("several calls") }}{% endif %}
    {%- if message.thinking or message.content %}
      {{- "<|start|>assistant<|channel|>analysis<|message|>" + (message.thinking or message.content) + "<|end|>" }}
    {%- endif %}
    {{- "<|start|>assistant to=" + "functions." + call.name + "<|channel|>commentary json<|message|>" }}
    {{- call.arguments|tojson + "<|call|>" }}
    {%- set last.call = call.name %}
  {%- elif message.role == "assistant" %}
    {%- if loop.last and not add_generation_prompt and "thinking" in message %}
      {{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
    {%- endif %}
    {{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
  {%- elif message.role == "tool" %}
    {%- if last.call is none %}{{ raise_exception("a result of no call") }}{% endif %}
    {{- "<|start|>functions." + last.call + " to=assistant<|channel|>commentary<|message|>" }}
    {{- message.content|tojson + "<|end|>" }}
  {%- else %}
    {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{% endif %}
"""


def write_harmony_tokenizer(directory: Path) -> Path:
    """Write the tokenizer, whose marks are special tokens, and its template. Returns the directory."""
    write_tool_tokenizer(directory, sorted(HarmonyThinking.marks), special=True)
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": TEMPLATE}), encoding="utf-8")
    return directory
