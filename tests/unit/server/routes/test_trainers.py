"""Routes for trainers, over a FakeEngine: states, refusals, keys."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.config.deployment import ConfigError, ServerConfig
from server.app import create_app
from server.keys import check_weight_updates
from tests.support.app import server
from tests.support.fake_engine import BAD_WEIGHTS, LOST_WEIGHTS
from tests.support.tiny import write_tokenizer

ROUTES = ("/pause", "/resume", "/update_weights", "/sleep", "/wake_up")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


def test_states(directory: Path) -> None:
    async def main() -> None:
        async with server(directory, weight_updates=True) as (http, client, _):

            async def post(path: str, body: Any = None) -> tuple[int, Any]:
                answer = await http.post(path, json=body)
                return answer.status_code, answer.json()

            async def seen() -> tuple[int, str | None, str]:
                load, metrics = (await http.get("/load")).json(), (await http.get("/metrics")).text
                assert (await http.get("/health")).status_code == 200
                paused = 'magicdec_paused{model_name="tiny"} 1.0' in metrics
                assert paused == (load["state"] != "running")
                ready = await http.get("/ready")
                code = ready.json().get("error", {}).get("code", "ready")
                return ready.status_code, ready.headers.get("retry-after"), f"{code} {load['state']}"

            assert await seen() == (200, None, "ready running")
            assert await post("/pause") == await post("/pause", {}) == (200, {"state": "paused"})
            assert await seen() == (503, "1", "paused paused")
            assert await post("/pause", {"mode": "abort"}) == (200, {"state": "paused"})
            assert await post("/update_weights", {"path": "/new"}) == (200, {"state": "paused"})
            assert await post("/sleep") == await post("/resume") == (200, {"state": "asleep"})
            assert await seen() == (503, "1", "asleep asleep")
            assert await post("/wake_up") == (200, {"state": "running"})
            assert await seen() == (200, None, "ready running")
            assert client.controls == [
                ("pause", False, ""),
                ("pause", False, ""),
                ("pause", True, ""),
                ("update_weights", False, "/new"),
                ("sleep", False, ""),
                ("resume", False, ""),
                ("wake_up", False, ""),
            ]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("path", "body", "param", "code"),
    [
        ("/pause", {"mode": "wait"}, "mode", "invalid_value"),
        ("/pause", {"modes": "keep"}, "modes", "unknown_field"),
        ("/update_weights", {}, "path", "missing_field"),
        ("/update_weights", {"path": 3}, "path", "invalid_value"),
        ("/update_weights", {"path": "weights"}, "path", "invalid_value"),
        ("/update_weights", {"path": "s3://bucket/weights"}, "path", "invalid_value"),
        ("/update_weights", {"path": "/a\0b"}, "path", "invalid_value"),
        ("/update_weights", {"path": "/" * 4097}, "path", "invalid_value"),
        ("/update_weights", {"path": BAD_WEIGHTS}, "path", "weights_refused"),
    ],
)
def test_refusals(directory: Path, path: str, body: Any, param: str, code: str) -> None:
    async def main() -> None:
        async with server(directory, weight_updates=True) as (http, client, _):
            answer = await http.post(path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
            assert error["message"].startswith(f"{param}: ")
            assert client.engine.weights == []

    asyncio.run(main())


def test_an_engine_that_cannot_wake_names_no_files(directory: Path) -> None:
    async def main() -> None:
        async with server(directory, weight_updates=True) as (http, client, _):
            client.engine.weights, client.engine.asleep = [LOST_WEIGHTS], True
            answer = await http.post("/wake_up")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cannot_wake")
            assert LOST_WEIGHTS not in answer.text
            assert (await http.get("/load")).json()["state"] == "asleep"

    asyncio.run(main())


def test_off_unless_enabled(directory: Path) -> None:
    async def main() -> None:
        async with server(directory) as (http, client, _):
            for path in ROUTES:
                answer = await http.post(path, json={"path": "/new"})
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_enabled")
                assert (await http.get(path)).status_code == 405
            assert client.controls == []

    asyncio.run(main())


def test_a_key_is_needed(directory: Path) -> None:
    async def main() -> None:
        async with server(directory, weight_updates=True) as (_, client, service):
            transport = httpx.ASGITransport(create_app(service, frozenset({"key"})))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
                for path in ROUTES:
                    assert (await http.post(path, json={"path": "/new"})).status_code == 401
                assert client.controls == []
                assert (await http.post("/pause", headers={"Authorization": "Bearer key"})).status_code == 200

    asyncio.run(main())


def test_without_an_engine(directory: Path) -> None:
    async def main() -> None:
        async with server(directory, weight_updates=True) as (http, client, service):
            client.dead = "it broke"
            for code in ("engine_dead", "loading"):
                for path in ROUTES:
                    answer = await http.post(path, json={"path": "/new"} if path == "/update_weights" else {})
                    assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
                service.client = None

    asyncio.run(main())


def test_no_deployment_lets_everyone_change_weights() -> None:
    check_weight_updates(ServerConfig(), frozenset())
    check_weight_updates(ServerConfig(weight_updates=True), frozenset({"key"}))
    with pytest.raises(ConfigError, match=r"server\.weight_updates: .*--api-keys-file"):
        check_weight_updates(ServerConfig(weight_updates=True), frozenset())
