"""LangChain, unmodified, and a fuzzer against real servers. `make test-clients` runs many more clients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from tests.support.profiles import is_all
from tests.support.servers import PATIENCE_S, Server, eventually

QUESTION = "What is the capital of France? Answer with one word."


class City(BaseModel):
    name: Literal["Paris", "London", "Lima"]
    continent: Literal["Africa", "America", "Europe"]


class TestLangChain:
    @pytest.fixture
    def model(self, server: Server) -> Any:
        from langchain_openai import ChatOpenAI

        return ChatOpenAI(
            model="default",
            base_url=f"{server.url}/v1",
            api_key="none",  # type: ignore[arg-type]
            temperature=0,
            max_completion_tokens=40,
            timeout=PATIENCE_S,
            max_retries=0,
        )

    def test_invoke(self, model: Any) -> None:
        answer = model.invoke(QUESTION)
        assert "Paris" in answer.content
        assert answer.response_metadata["finish_reason"] == "stop"
        assert answer.usage_metadata["total_tokens"] == sum(
            answer.usage_metadata[name] for name in ("input_tokens", "output_tokens")
        )

    def test_stream(self, model: Any) -> None:
        chunks = list(model.stream(QUESTION))
        assert len(chunks) > 2
        assert "".join(chunk.content for chunk in chunks) == model.invoke(QUESTION).content

    def test_batch(self, model: Any) -> None:
        answers = model.batch([QUESTION, "Say hello.", QUESTION])
        assert answers[0].content == answers[2].content != answers[1].content

    def test_structured_output(self, model: Any) -> None:
        found = model.with_structured_output(City, method="json_schema").invoke("Tell me of Paris.")
        assert isinstance(found, City)

    def test_errors(self, model: Any) -> None:
        import openai

        with pytest.raises(openai.BadRequestError, match="top_p"):
            model.bind(top_p=7).invoke(QUESTION)


CHECKS = "not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance"


def test_schemathesis(launch: Callable[..., Server], tmp_path: Path) -> None:
    """Valid and invalid requests generated from the schema get only responses that the schema declares.

    Few valid ones say how much they want: the model's length bounds it.
    """
    tiny = launch("--max-model-len", "256")
    done = subprocess.run(
        [
            *(str(Path(sys.executable).parent / "schemathesis"), "run", f"{tiny.url}/openapi.json"),
            *("--phases", "fuzzing", "--max-examples", "60" if is_all() else "6"),
            *("--seed", "7", "--checks", CHECKS, "--no-color"),
        ],
        cwd=tmp_path,  # it writes files to its working directory
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * PATIENCE_S,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    print(done.stdout[-400:])
    eventually(lambda: tiny.idle())
