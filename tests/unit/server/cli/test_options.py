"""Flags that set engine settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
import yaml
from typer.testing import CliRunner

from engine.config.deployment import Config, ConfigError, ServerConfig, load_config
from engine.config.kv import POLICIES
from server.cli import options
from server.cli.serve import CallsAs, GenerationConfig, LogLevel, LogStyle, ThinksIn, serve
from tests.support.nested import flatten
from tests.support.paths import ROOT
from tests.support.profiles import each_value, is_all

CPU_YAML = ROOT / "configs" / "cpu.yaml"


def parse(*arguments: str, but: tuple[str, ...] = ()) -> Config:
    app = typer.Typer()
    seen: list[dict[str, Any]] = []

    @app.command()
    @options.engine_flags(*but)
    def command(overrides: dict[str, Any], config: options.ConfigFile = None, other: int = 1) -> None:
        seen.append({"config": config, "overrides": overrides})

    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return load_config(seen[0]["config"], seen[0]["overrides"])


def test_no_flag_changes_nothing() -> None:
    assert parse() == load_config(None, {})


def test_every_flag_arrives() -> None:
    engine = parse(
        *("--model", "m", "--device", "cpu", "--dtype", "float32", "--tensor-parallel-size", "2", "--speculation", "5"),
        *("--draft", "d", "--policy", "snapkv", "--budget", "128", "--verification", "rejection"),
        *("--max-model-len", "99", "--threads", "3", "--other", "4"),
    ).engine
    assert (engine.model, engine.device, engine.dtype, engine.tensor_parallel_size) == ("m", "cpu", "float32", 2)
    assert (engine.max_model_len, engine.threads) == (99, 3)
    speculation = engine.speculation
    assert (speculation.gamma, speculation.source, speculation.model) == (5, "model", "d")
    assert (speculation.kv.policy, speculation.kv.budget, speculation.verification) == ("snapkv", 128, "rejection")


@pytest.mark.parametrize(
    ("arguments", "prefix"), [((), True), (("--prefix-cache",), True), (("--no-prefix-cache",), False)]
)
def test_a_setting_that_is_on_can_be_switched_off(arguments: tuple[str, ...], prefix: bool) -> None:
    assert parse(*arguments).engine.cache.prefix is prefix


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("engine: {cache: {prefix: false}}")
    assert parse("--config", str(path)).engine.cache.prefix is False
    assert parse("--config", str(path), "--prefix-cache").engine.cache.prefix is True


def test_a_command_can_go_without() -> None:
    with pytest.raises(AssertionError, match="No such option"):
        parse("--budget", "16", but=("budget",))


@pytest.mark.parametrize("policy", ["window", "verified", "quest", "snapkv", "topk", "all"])
def test_another_policy_than_the_files(tmp_path: Path, policy: str) -> None:
    """The other policy has only its own settings; of the file's, only the budget still applies."""
    path = tmp_path / "config.yaml"
    path.write_text("engine: {speculation: {kv: {policy: window, budget: 256, sink: 32}}}")
    kv = parse("--config", str(path), "--policy", policy).engine.speculation.kv
    assert (kv.policy, kv.budget) == (policy, None if policy == "all" else 256)
    assert getattr(kv, "sink", None) == {"window": 32, "verified": 16, "quest": 16}.get(policy)
    assert parse("--config", str(CPU_YAML), "--policy", policy).engine.speculation.kv.policy == policy


def test_a_file_that_names_no_policy_has_a_window(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("engine: {speculation: {kv: {budget: 256, sink: 32}}}")
    kv = parse("--config", str(path), "--policy", "window", "--budget", "128").engine.speculation.kv
    assert kv.model_dump() == {"policy": "window", "budget": 128, "sink": 32, "positions": "absolute"}


def test_the_target_can_draft_where_a_file_has_a_model(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("engine: {speculation: {drafter: model, model: d}}")
    assert parse("--config", str(path)).engine.speculation.draft_model == "d"
    assert parse("--config", str(path), "--draft", "self").engine.speculation.draft_model is None


TARGET = "engine: {target_kv: {policy: quest, budget: 256, interval: 8}}"


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("", ["--target-kv", "quest"], (1024, 4)),
        ("", ["--target-budget", "512", "--target-kv", "quest"], (512, 4)),
        ("", ["--target-kv", "none"], None),
        (TARGET, [], (256, 8)),
        (TARGET, ["--target-kv", "quest"], (256, 8)),
        (TARGET, ["--target-budget", "512"], (512, 8)),
        (TARGET, ["--target-kv", "none"], None),
    ],
)
def test_a_target_that_reads_less(
    tmp_path: Path, text: str, arguments: list[str], expected: tuple[int, int] | None
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    target = parse("--config", str(path), *arguments).engine.target_kv
    assert (target and (target.budget, target.interval)) == expected


@pytest.mark.parametrize("kind", ["quest", "none"])
def test_the_flags_of_a_target_are_known_again(kind: str) -> None:
    """An engine that is attached to refuses them."""
    overrides = options.engine_overrides({"target_kv": kind, "target_budget": 16})
    assert options.flags_of(overrides) == ["--target-kv", "--target-budget"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target-budget", "64"], "engine.target_kv: Value error, its settings need a policy beside them"),
        (["--target-kv", "none", "--target-budget", "64"], "the flag --target-kv quest"),
        (["--target-kv", "window"], "engine.target_kv.policy: Input should be 'quest'"),
        (["--target-kv", "quest", "--target-budget", "60"], "must be a multiple of cache.page_size"),
        (["--policy", "all", "--budget", "64"], "engine.speculation.kv: Value error, policy all reads all tokens"),
        (["--policy", "wide"], "expected settings of a policy: window, verified, quest, snapkv, topk or all"),
        (["--verification", "none"], "engine.speculation.verification: Input should be 'coupled' or 'rejection'"),
    ],
)
def test_faults_are_named(arguments: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(*arguments)
    assert says in str(caught.value)


@pytest.mark.parametrize(("policy", "kv_format"), each_value([*POLICIES], ["int8", "int4x2"]))
def test_formats_of_kv_need_no_other_flag(kv_format: str, policy: str) -> None:
    """Nor another value of any policy's setting."""
    for where in ((), ("--config", str(CPU_YAML))):
        engine = parse(*where, "--kv-format", kv_format, "--policy", policy).engine
        assert (engine.cache.format, engine.cache.page_size) == (kv_format, 64)
    for path in sorted((ROOT / "configs").glob("*.yaml")) if is_all() or policy == "window" else ():
        assert parse("--config", str(path), "--kv-format", kv_format).engine.cache.page_size == 64


@pytest.mark.parametrize(
    ("text", "arguments", "says"),
    [
        ("", ["--target-kv", "quest"], ": Value error, target_kv: a target reads all of its KV with cache.format int8"),
        (
            "",
            ["--budget", "96"],
            ": Value error, speculation.kv.budget (96) must be a multiple of cache.page_size (64)",
        ),
        (
            "engine: {cache: {page_size: 32}}",
            [],
            ".cache: Value error, page_size (32): pages of format int8 have 64 tokens",
        ),
        (
            "engine: {speculation: {kv: {policy: snapkv, recent: 32}}}",
            [],
            ": Value error, speculation.kv.recent (32) must be a multiple of cache.page_size (64)",
        ),
        ("", ["--kv-format", "int3"], ".cache.format: Input should be 'dense', 'fp8', 'int8' or 'int4x2'"),
    ],
)
def test_faults_of_formats_of_kv_are_one_line(tmp_path: Path, text: str, arguments: list[str], says: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse("--config", str(path), "--kv-format", "int8", *arguments)
    assert str(caught.value) == f"engine{says}"


FLAGS = {
    "--model": "m",
    "--device": "cpu",
    "--dtype": "float32",
    "--kernels": "reference",
    "--weights": "int8",
    "--kv-format": "int8",
    "--tensor-parallel-size": "2",
    "--speculation": "5",
    "--drafter": "ngram",
    "--draft": "d",
    "--store": "s",
    "--draft-weights": "int8",
    "--policy": "snapkv",
    "--budget": "128",
    "--verification": "rejection",
    "--target-kv": "quest",
    "--target-budget": "512",
    "--max-model-len": "99",
    "--gpu-memory-utilization": "0.5",
    "--prefix-cache": None,
    "--threads": "3",
    "--host": "::",
    "--port": "1",
    "--clamp-max-tokens": None,
    "--tool-format": "hermes",
    "--thinking": "none",
    "--served-model-name": "m",
    "--special-tokens-in-content": None,
    "--generation-config": "none",
    "--restart": None,
    "--weight-updates": None,
    "--log-level": "debug",
    "--log-format": "json",
    "--api-key": "k",
    "--api-keys-file": "f",
    "--cors-origin": "*",
    "--keep-alive-s": "1",
    "--ping-s": "1",
    "--tls-cert": "c",
    "--tls-key": "k",
}
"""A value for every flag of `magicdec serve` that overrides a setting."""
ON = {"--prefix-cache": "--no-prefix-cache"}
"""Flags of settings that are on by default, and the flags that change them."""


def test_cpu_config_names_the_flag_of_every_setting_that_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer(add_completion=False)
    app.command()(serve)
    options_of_serve = {option for parameter in typer.main.get_command(app).params for option in parameter.opts}
    assert options_of_serve == {*FLAGS, "--config", "--engine"}

    documented = {
        (name, flag)
        for name, line in setting_lines(CPU_YAML.read_text(encoding="utf-8")).items()
        for flag in re.findall(r"\[(--[a-z-]+)\]", line)
    }
    changed = set()
    defaults = flatten(Config().model_dump())
    for flag, value in FLAGS.items():
        seen: list[Config] = []
        monkeypatch.setattr("server.cli.serve._run", lambda config, engine, seen=seen: seen.append(config) or 0)
        # Certificate and key are valid only together, a target's budget only with its policy, a store with a drafter.
        other = {
            "--tls-cert": ["--tls-key", "k"],
            "--tls-key": ["--tls-cert", "c"],
            "--target-budget": ["--target-kv", "quest"],
            "--store": ["--drafter", "ngram"],
        }.get(flag, [])
        done = CliRunner().invoke(app, [ON.get(flag, flag), *([] if value is None else [value]), *other])
        assert done.exit_code == 0, done.output
        settings = flatten(seen[0].model_dump())
        changed |= {(name, flag) for name in defaults if name in settings and settings[name] != defaults[name]}
        changed |= {(name, flag) for name in defaults if any(each.startswith(f"{name}.") for each in settings)}
    pairs = {
        ("server.tls_cert", "--tls-key"),
        ("server.tls_key", "--tls-cert"),
        ("engine.target_kv", "--target-budget"),
        ("engine.speculation.drafter", "--draft"),
        ("engine.speculation.drafter", "--store"),
        ("engine.cache.page_size", "--kv-format"),
    }
    assert changed - pairs == documented


def setting_lines(text: str) -> dict[str, str]:
    """Map the dotted name of every setting to its line."""
    lines = text.splitlines()
    found: dict[str, str] = {}

    def walk(node: yaml.MappingNode, prefix: str) -> None:
        for key, value in node.value:
            found[prefix + key.value] = lines[key.start_mark.line]
            if isinstance(value, yaml.MappingNode):
                walk(value, f"{prefix}{key.value}.")

    root = yaml.compose(text)
    assert isinstance(root, yaml.MappingNode)
    walk(root, "")
    return found


@pytest.mark.parametrize(
    ("setting", "flag"),
    [
        ("tool_format", CallsAs),
        ("thinking", ThinksIn),
        ("generation_config", GenerationConfig),
        ("log_level", LogLevel),
        ("log_format", LogStyle),
    ],
)
def test_flags_take_all_that_their_settings_take(setting: str, flag: Any) -> None:
    assert {each.value for each in flag} == set(get_args(get_type_hints(ServerConfig)[setting]))
