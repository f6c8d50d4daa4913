"""Grammars of requests: where they are converted, and what is refused beforehand."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from server.bodies import fields
from server.text.structured import Grammar, checked_grammar
from tests.support.app import server
from tests.support.contract import COMPLETIONS


def grammars_of(directory: Path, **asked: Any) -> list[str | None]:
    """Return the grammar that the engine gets for a completion."""

    async def main() -> list[str | None]:
        async with server(directory) as (http, client, _):
            answer = await http.post(COMPLETIONS, json={"prompt": [10], "max_tokens": 2, **asked})
            assert answer.status_code == 200, answer.text
            return [request.params.grammar for request in client.requests]

    return asyncio.run(main())


@pytest.mark.parametrize(
    "asked", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"grammar": 'root ::= "a"'}}]
)
def test_grammars_are_converted_off_the_event_loop(
    directory: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def watched(*arguments: Any) -> Grammar | None:
        threads.append(threading.current_thread())
        return checked_grammar(*arguments)

    monkeypatch.setattr(fields, "checked_grammar", watched)
    (grammar,) = grammars_of(directory, **asked)
    assert grammar is not None
    (thread,) = threads
    assert thread is not threading.current_thread()
    assert grammars_of(directory, response_format={"type": "text"}) == [None]
