"""Defaults of sampling parameters from the model's generation_config.json, for requests that leave them open."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.params import SamplingParams
from models.files.generation_defaults import GenerationDefaults, read_generation_defaults
from models.files.json_values import ModelError
from tests.support.app import server
from tests.support.tiny import write_tokenizer

QWEN = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05, "min_p": 0.1}
DEFAULTS = GenerationDefaults(temperature=0.6, top_p=0.95, top_k=20, repetition_penalty=1.05, min_p=0.1)
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


def write(directory: Path, config: Any) -> Path:
    write_tokenizer(directory)
    (directory / "generation_config.json").write_text(json.dumps(config))
    return directory


def test_reading(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_generation_defaults(tmp_path) == GenerationDefaults()
    assert read_generation_defaults(write(tmp_path, QWEN)) == DEFAULTS
    nothing: dict[str, Any] = {"temperature": None, "eos_token_id": 2, "do_sample": False}
    assert read_generation_defaults(write(tmp_path, nothing)).given() == {}
    assert read_generation_defaults(write(tmp_path, {"top_k": -1, "temperature": 0})).given() == {
        "top_k": 0,
        "temperature": 0,
    }
    assert not caplog.records
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ModelError, match="generation_config"):
        read_generation_defaults(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2e30),
        ("temperature", "0.6"),
        ("temperature", True),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 10**400),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", [0.9]),
        ("top_k", -2),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("repetition_penalty", 0),
    ],
)
def test_values_that_cannot_be_are_ignored(
    name: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = read_generation_defaults(write(tmp_path, QWEN | {name: value}))
    assert found.given() == {key: each for key, each in DEFAULTS.given().items() if key != name}
    (record,) = caplog.records
    assert f"generation_config.json: {name} " in record.getMessage()


def test_ranges_are_those_of_requests(tmp_path: Path) -> None:
    """What is read can always be served, and what requests may set can be read."""
    for name, values in {
        "temperature": (0, 1e30),
        "top_p": (0, 1),
        "top_k": (0, 2**31 - 1),
        "min_p": (0, 1),
        "repetition_penalty": (1e-6, 1e6),
    }.items():
        for value, beyond in zip(values, (values[0] - 2, 2 * values[1] + 2), strict=True):
            found = read_generation_defaults(write(tmp_path, {name: value})).given()
            assert getattr(msgspec.convert(found, SamplingParams), name) == value
            with pytest.raises(msgspec.ValidationError):
                msgspec.convert({name: beyond}, SamplingParams)


REQUESTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, DEFAULTS.given()),
    (dict.fromkeys(NEUTRAL), DEFAULTS.given()),  # null is absent
    (NEUTRAL, NEUTRAL),  # the usual default, said aloud
    ({"top_k": -1}, DEFAULTS.given() | {"top_k": 0}),
    ({"temperature": 0}, DEFAULTS.given() | {"temperature": 0}),
]


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
@pytest.mark.parametrize(
    ("setting", "given", "expected"), [("model", *each) for each in REQUESTS] + [("none", {}, NEUTRAL)]
)
def test_requests(route: str, setting: str, given: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    async def main() -> None:
        async with server(write(tmp_path, QWEN), generation_config=setting) as (http, client, _):
            prompt = {"prompt": "a"} if route == "completions" else {"messages": [{"role": "user", "content": "a"}]}
            answer = await http.post(f"/v1/{route}", json={**prompt, "max_tokens": 1, **given})
            assert answer.status_code == 200
            params = client.requests[0].params
            assert {name: getattr(params, name) for name in NEUTRAL} == expected

    asyncio.run(main())


def test_the_start_names_them_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with server(write(tmp_path, {"temperature": 0.7, "top_k": 20})):
            pass

    with caplog.at_level("INFO"):
        asyncio.run(main())
    (line,) = (r.getMessage() for r in caplog.records if "defaults of requests" in r.getMessage())
    assert line.endswith("generation_config.json: temperature 0.7, top_k 20")
