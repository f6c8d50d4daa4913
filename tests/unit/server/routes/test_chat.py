"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.support.app import server

USER = {"role": "user", "content": "a"}


def test_the_newer_name_of_max_tokens_wins(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, _):
            body = {"messages": [USER], "max_tokens": 5, "max_completion_tokens": 7}
            assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
            assert client.requests[0].params.max_tokens == 7

    asyncio.run(main())
