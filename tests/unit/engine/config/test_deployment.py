"""Settings are strict, overridable, free of contradictions, and documented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from engine.config.deployment import Config, ConfigError, EngineConfig, load_config
from engine.config.kv import POLICIES
from tests.support.nested import flatten
from tests.support.paths import ROOT

CONFIGS = ROOT / "configs"


def settings(model: type[BaseModel], prefix: str = "") -> dict[str, Any]:
    """Map the dotted name of every setting below `model` to its default, or to None if it has none."""
    found: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= settings(kind, f"{prefix}{name}.")
        elif isinstance(field.default, BaseModel):
            found |= settings(type(field.default), f"{prefix}{name}.")
        else:
            found[prefix + name] = None if field.is_required() else field.default
    return found


def write(directory: Path, text: str) -> Path:
    path = directory / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_built_in_defaults() -> None:
    config = load_config(None, {})
    assert config.engine.model == "default"
    assert config == Config.model_validate({"engine": {"model": "default"}})


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_deployment_loads(path: Path) -> None:
    assert isinstance(load_config(path, {}), Config)


def test_cpu_config_mentions_every_setting_at_its_default() -> None:
    path = CONFIGS / "cpu.yaml"
    mentioned = flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert mentioned == settings(Config) | {"engine.model": "default", "engine.cache.page_size": None}
    assert load_config(path, {}) == load_config(None, {})


def test_overrides_win_and_leave_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, "engine: {model: m, cache: {page_size: 8}}\nserver: {port: 1}\n")
    config = load_config(path, {"engine.cache.page_size": 32, "engine.speculation.gamma": 0, "server.port": 2})
    assert (config.engine.model, config.engine.cache.page_size) == ("m", 32)
    assert (config.engine.speculation.gamma, config.server.port) == (0, 2)
    assert config.engine.cache.memory_gb == load_config(None, {}).engine.cache.memory_gb


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("engine: {model: m, page_size: 8}", "engine.page_size: unknown setting"),
        ("engine: {model: m, speculation: {kv: {policy: window, bugdet: 8}}}", "engine.speculation.kv.bugdet"),
        ("engine: {model: m}\nsrever: {}", "srever: unknown setting"),
        ("engine: {model: m, device: tpu}", "engine.device"),
        ("engine: {model: m, cache: {page_size: 0}}", "engine.cache.page_size"),
        ("engine: {model: m, speculation: {gamma: 17}}", "engine.speculation.gamma"),
        ("engine: {model: m, speculation: {gamma: -1}}", "engine.speculation.gamma"),
        ("engine: {model: m}\nserver: {port: 65536}", "server.port"),
        ("engine: {model: m, speculation: {kv: {budget: 100}}}", "multiple of cache.page_size"),
        ("engine: {model: m, speculation: {kv: {budget: 32, sink: 17}}}", "no page for recent tokens"),
        (
            "engine: {speculation: {drafter: model, model: d, kv: {policy: verified}}}",
            "verified chooses from the target's KV, which a draft model does not read; set another policy, such as "
            "quest, and this one for the target's own drafts (speculation.self_kv), or drafter: self",
        ),
        ("engine: {speculation: {kv: {policy: verified, budget: 100}}}", "multiple of cache.page_size"),
        ("engine: {speculation: {kv: {policy: quest, budget: 8}}}", "multiple of cache.page_size"),
        ("- engine", "expected a mapping"),
        ("engine: {scheduler: {max_rows: yes}}", "engine.scheduler.max_rows"),
        ("engine: {speculation: {gamma: '3'}}", "engine.speculation.gamma"),
        ("engine: {cache: {memory_gb: .inf}}", "engine.cache.memory_gb"),
        ("engine: {model: a, model: b}", "'model' is given twice"),
        ("engine: [", "config.yaml"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), {})
    assert named in str(caught.value)


def test_every_fault_gets_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "engine: {model: m, threads: 0, tensor_parallel_size: none}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {"server.port": -1})
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "engine.tensor_parallel_size",
        "engine.threads",
        "server.port",
    ]


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_config(tmp_path / "missing.yaml", {})
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml"):
        load_config(binary, {})


@pytest.mark.parametrize(
    "override",
    [{"engine.no_such": 1}, {"engine.model.name": 1}, {"engine.cache.page_size": "many"}, {"server.port": None}],
)
def test_bad_overrides(override: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_config(None, override)


def test_nothing_changes_a_config() -> None:
    config = load_config(None, {})
    with pytest.raises(ValidationError, match="frozen"):
        config.engine.speculation.gamma = 0


@given(page=st.integers(1, 64), budget=st.integers(1, 1024), sink=st.integers(1, 256), gamma=st.integers(0, 16))
def test_the_budget_holds_the_sink_and_a_recent_page(page: int, budget: int, sink: int, gamma: int) -> None:
    overrides = {
        "engine.cache.page_size": page,
        "engine.speculation.gamma": gamma,
        "engine.speculation.kv.budget": budget,
        "engine.speculation.kv.sink": sink,
    }
    sink_pages = (sink + page - 1) // page
    fits = budget % page == 0 and budget // page > sink_pages
    try:
        config = load_config(None, overrides)
    except ConfigError:
        assert gamma > 0
        assert not fits
    else:
        assert gamma == 0 or fits
        assert config.engine.speculation.kv.budget == budget


def test_no_restart_brings_the_first_weights_back() -> None:
    assert not load_config(None, {}).server.weight_updates
    assert load_config(None, {"server.weight_updates": True}).server.weight_updates
    with pytest.raises(ConfigError, match="restart and weight_updates exclude each other"):
        load_config(None, {"server.weight_updates": True, "server.restart": True})


@pytest.mark.parametrize(
    ("thinking", "calls"),
    [("harmony", "generic_json"), ("harmony", "hermes"), ("think", "harmony"), ("none", "harmony")],
)
def test_channels_are_read_by_both_formats(thinking: str, calls: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"server.thinking": thinking, "server.tool_format": calls})
    (line,) = str(caught.value).splitlines()
    assert f"thinking ({thinking})" in line
    assert f"tool_format ({calls})" in line


@pytest.mark.parametrize(
    ("thinking", "calls"),
    [("harmony", "harmony"), ("harmony", "auto"), ("auto", "harmony"), ("auto", "hermes"), ("think", "hermes")],
)
def test_formats_that_go_together(thinking: str, calls: str) -> None:
    server = load_config(None, {"server.thinking": thinking, "server.tool_format": calls}).server
    assert (server.thinking, server.tool_format) == (thinking, calls)


@pytest.mark.parametrize("policy", POLICIES)
def test_settings_survive_the_way_to_another_process(policy: str) -> None:
    speculation = {"drafter": "model", "model": "draft"} if policy == "all" else {}
    config = EngineConfig.model_validate({"speculation": {**speculation, "kv": {"policy": policy}}})
    assert EngineConfig.model_validate(config.model_dump(mode="json")) == config
    assert EngineConfig.model_validate_json(config.model_dump_json()) == config


def test_a_full_batch_must_leave_tokens_for_prefill() -> None:
    with pytest.raises(ConfigError, match="max_batch_tokens"):
        load_config(None, {"engine.scheduler.max_rows": 64, "engine.scheduler.max_batch_tokens": 64})
    load_config(None, {"engine.scheduler.max_rows": 64, "engine.scheduler.max_batch_tokens": 65})


@pytest.mark.parametrize("text", ["", "engine: {}", "{}", "server: {port: 8000}"])
def test_what_is_not_set_is_the_default(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path, {}) == load_config(None, {})


def test_the_proxy_closes_idle_connections_before_the_server_does() -> None:
    text = (ROOT / "docker" / "nginx" / "nginx.conf").read_text(encoding="utf-8")
    (upstream,) = re.findall(r"upstream magicdec \{(.*?)\}", text, re.DOTALL)
    (seconds,) = re.findall(r"keepalive_timeout (\d+)s;", upstream)
    assert int(seconds) < Config().server.keep_alive_s - 10
