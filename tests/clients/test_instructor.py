"""instructor: response models by tools and by JSON schemas."""

from __future__ import annotations

import instructor
import openai
import pytest

from tests.support.client_servers import City, ScriptedServer
from tests.support.servers import PATIENCE_S, Server


def client(url: str, mode: str) -> instructor.Instructor:
    plain = openai.OpenAI(base_url=url, api_key="none", timeout=PATIENCE_S, max_retries=0)
    return instructor.from_openai(plain, mode=instructor.Mode[mode])


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"])
def test_response_model(server: Server, mode: str) -> None:
    """from_openai(…, mode=…).chat.completions.create(response_model=…) by the default model."""
    found = client(f"{server.url}/v1", mode).chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": "Tell me of Paris."}],
        response_model=City,
        max_retries=0,
        temperature=0,
    )
    assert isinstance(found, City)


@pytest.mark.parametrize("mode", ["JSON", "MD_JSON"])
def test_json(scripted: ScriptedServer, mode: str) -> None:
    """The same where the schema is only in the prompt: as any JSON object, and as JSON in Markdown."""
    answer = '{"name": "Lima", "continent": "America"}'
    scripted.answer(answer if mode == "JSON" else f"```json\n{answer}\n```")
    found = client(scripted.url, mode).chat.completions.create(
        model=scripted.model,
        messages=[{"role": "user", "content": "Tell me of Lima."}],
        response_model=City,
        max_retries=0,
    )
    assert found.model_dump() == {"name": "Lima", "continent": "America"}
