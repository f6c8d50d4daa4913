"""What a trainer does to a real server of two ranks: pause, other weights, sleep."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.paths import ROOT
from tests.support.profiles import is_all
from tests.support.ranks import SERVED_MODEL, write_random_model
from tests.support.servers import PATIENCE_S, PLAIN, TINY_SETTINGS, Server, command, environment, eventually, start

KEY = "secret"
SETTINGS: dict[str, Any] = {
    "engine": {
        **TINY_SETTINGS["engine"],
        "tensor_parallel_size": 2,
        "speculation": {"gamma": 3, "weights": "int8", "kv": {"budget": 64}},
    },
    "server": {"ping_s": 0.2, "weight_updates": True, "api_keys": [KEY], "served_model_name": "m"},
}
PROMPT = [3 + place * 7 % 300 for place in range(150)]
BODIES: list[dict[str, Any]] = [
    {"prompt": PROMPT, "max_tokens": 40 if is_all() else 20, "temperature": 0, "logprobs": 2},
    {"prompt": PROMPT[:70], "max_tokens": 40 if is_all() else 20, "temperature": 1, "seed": 11, "ignore_eos": True},
]


class Trainer:
    """A client with the key."""

    def __init__(self, server: Server) -> None:
        headers = {"Authorization": f"Bearer {KEY}"}
        self.http = httpx.Client(base_url=server.url, headers=headers, **PLAIN)

    def state(self) -> str:
        state: str = self.http.get("/load").raise_for_status().json()["state"]
        return state

    def post(self, route: str, **body: Any) -> str:
        state: str = self.http.post(route, json=body).raise_for_status().json()["state"]
        return state

    def complete(self, **body: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.post("/v1/completions", json=body).raise_for_status().json()
        return answer

    def choices(self) -> list[Any]:
        return [self.complete(**body)["choices"] for body in BODIES]

    def cached(self) -> int:
        found: int = self.complete(**BODIES[0])["usage"]["prompt_tokens_details"]["cached_tokens"]
        return found


def texts(choices: list[Any]) -> list[str]:
    """Log-probabilities may differ in the last bit, by the rows beside them."""
    return [each[0]["text"] for each in choices]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("weights")
    return [write_random_model(folder / str(seed), SERVED_MODEL, seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, folders: list[Path]) -> Iterator[Server]:
    running = start(tmp_path_factory.mktemp("server"), folders[0], config=SETTINGS)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, folders: list[Path], server: Server) -> list[list[Any]]:
    """What the server answers with its first weights, and a fresh one with the others."""
    other = start(tmp_path_factory.mktemp("fresh"), folders[1], config=SETTINGS)
    found = [Trainer(each).choices() for each in (server, other)]
    other.stop()
    return found


@pytest.fixture
def trainer(server: Server, folders: list[Path]) -> Iterator[Trainer]:
    """A trainer of a running server with the first weights."""
    client = Trainer(server)
    yield client
    client.post("/resume")
    client.post("/wake_up")
    assert client.post("/update_weights", path=str(folders[0])) == "running"
    client.http.close()


def test_texts_are_those_of_a_fresh_server(trainer: Trainer, folders: list[Path], expected: list[list[Any]]) -> None:
    assert trainer.choices() == expected[0] != expected[1]
    assert trainer.cached() == 144
    for weights in (1, 0, 1) if is_all() else (1,):
        assert trainer.post("/update_weights", path=str(folders[weights])) == "running"
        assert trainer.cached() == 0
        assert trainer.choices() == expected[weights]


def test_what_is_refused_changes_nothing(trainer: Trainer, folders: list[Path], expected: list[list[Any]]) -> None:
    for path, code in ((str(folders[0]) + "/gone", "weights_refused"), ("weights", "invalid_value")):
        answer = trainer.http.post("/update_weights", json={"path": path})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    assert trainer.choices() == expected[0]
    assert trainer.cached() == 144


def test_a_stream_waits_through_a_pause(trainer: Trainer) -> None:
    body = {"prompt": PROMPT, "max_tokens": 150 if is_all() else 60, "temperature": 1, "seed": 5, "ignore_eos": True}
    text, texts, pings = trainer.complete(**body)["choices"][0]["text"], [""], 0
    with trainer.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        for line in answer.iter_lines():
            if line.startswith(":") and trainer.state() == "paused":
                pings += 1
                if pings == 1:
                    queued = threading.Thread(target=trainer.complete, kwargs=BODIES[0])
                    queued.start()
                if pings == 5:
                    eventually(lambda: trainer.http.get("/load").json()["waiting"] == 1)
                    assert trainer.http.get("/ready").json()["error"]["code"] == "paused"
                    assert trainer.http.get("/health").status_code == 200
                    assert trainer.post("/resume") == "running"
            elif line.startswith("data: {"):
                texts.append(json.loads(line[6:])["choices"][0]["text"])
                if len(texts) == 6:
                    assert trainer.post("/pause") == "paused"
    assert pings >= 5
    assert "".join(texts) == text
    queued.join(PATIENCE_S)
    assert not queued.is_alive()


def test_a_pause_that_aborts(trainer: Trainer) -> None:
    body = {"prompt": PROMPT, "max_tokens": 1500, "temperature": 0, "ignore_eos": True}
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(trainer.complete, **body) for _ in range(3)]
        eventually(lambda: trainer.http.get("/load").json()["running"] == 3)
        assert trainer.post("/pause", mode="abort") == "paused"
        assert [answer.result()["choices"][0]["finish_reason"] for answer in answers] == ["abort"] * 3


def test_requests_wait_for_weights(trainer: Trainer, folders: list[Path], expected: list[list[Any]]) -> None:
    assert trainer.post("/sleep") == "asleep"
    assert trainer.http.get("/ready").status_code == 503
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(trainer.choices)
        eventually(lambda: trainer.http.get("/load").json()["waiting"] == 1)
        assert trainer.post("/update_weights", path=str(folders[1])) == "asleep"
        assert trainer.post("/wake_up") == "running"
        assert answers.result() == expected[1]


def test_concurrent_changes_beside_requests(trainer: Trainer, folders: list[Path], expected: list[list[Any]]) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(trainer.choices) for _ in range(4)]
        changes = [pool.submit(trainer.post, "/update_weights", path=str(folders[1])) for _ in range(3)]
        states = [pool.submit(trainer.post, path) for path in ("/sleep", "/pause", "/wake_up", "/resume")]
        assert all(each.result() in ("running", "paused", "asleep") for each in (*changes, *states))
        trainer.post("/resume")
        trainer.post("/wake_up")
        assert all(len(each.result()) == len(BODIES) for each in answers)
    assert trainer.state() == "running"
    assert texts(trainer.choices()) == texts(expected[1])


def test_without_a_key_the_server_does_not_start(tmp_path: Path, folders: list[Path]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"engine": {"model": str(folders[0])}, "server": {"weight_updates": True}}))
    ended = subprocess.run(
        command("serve", "--config", str(config)),
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 2
    assert "server.weight_updates" in ended.stderr
    assert "--api-keys-file" in ended.stderr
    assert ended.stdout == ""
