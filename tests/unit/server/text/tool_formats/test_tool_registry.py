"""The choice of a tool format."""

from __future__ import annotations

import pytest

from server.text.tool_formats.tool_registry import FORMATS, choose_format
from tests.support.harmony_model import TEMPLATE as HARMONY_TEMPLATE
from tests.support.tiny import TEMPLATE

TEMPLATES = {
    "hermes": """{%- if tools %}<tools>{{ tools }}</tools>
return a json object within tags:\n<tool_call>\n{\\"name\\": <function-name>, \\"arguments\\": <args>}\n</tool_call>""",
    "qwen_xml": """reply ONLY in the following format:\n\n<tool_call>\n<function=example_function_name>\n<parameter=""",
    "mistral": """{{- "[AVAILABLE_TOOLS] [" }}{{- "[TOOL_CALLS] [" }}""",
    "llama_json": """{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}""",
    "harmony": HARMONY_TEMPLATE,
    "generic_json": TEMPLATE,
}


def test_formats_by_name() -> None:
    assert set(FORMATS) == set(TEMPLATES)
    for name, form in FORMATS.items():
        assert form.name == name
        assert choose_format(name, None) is form


@pytest.mark.parametrize(
    "template",
    [
        "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>{{ tool_call.arguments }}",
        "<function=example_function_name>{{ arguments }}</function>",
        '<TOOLCALL>[{"name": "func_name", "arguments": {}}]</TOOLCALL>',
    ],
)
def test_templates_of_other_formats(template: str) -> None:
    assert choose_format("auto", template).name == "generic_json"


@pytest.mark.parametrize("name", TEMPLATES)
def test_formats_by_template(name: str) -> None:
    assert choose_format("auto", TEMPLATES[name]).name == name
    assert choose_format("auto", None).name == "generic_json"


def test_a_format_that_is_unknown() -> None:
    names = "qwen_xml, hermes, mistral, harmony, llama_json, generic_json"
    with pytest.raises(ValueError, match=f"no tool format 'json', expected auto or one of {names}"):
        choose_format("json", None)
