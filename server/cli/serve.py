"""`magicdec serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli import options

if TYPE_CHECKING:
    from engine.config.deployment import Config
    from server.service import Service


class LogStyle(StrEnum):
    text = "text"
    json = "json"


class GenerationConfig(StrEnum):
    model = "model"
    none = "none"


class CallsAs(StrEnum):
    auto = "auto"
    hermes = "hermes"
    llama_json = "llama_json"
    mistral = "mistral"
    harmony = "harmony"
    qwen_xml = "qwen_xml"
    generic_json = "generic_json"


class ThinksIn(StrEnum):
    auto = "auto"
    think = "think"
    harmony = "harmony"
    none = "none"


class LogLevel(StrEnum):
    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


@options.engine_flags()
def serve(
    overrides: dict[str, Any],
    config: options.ConfigFile = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 picks a free one.")] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Model ids that clients may use, one or several: --served-model-name A B.")
    ] = None,
    clamp_max_tokens: Annotated[
        bool | None,
        typer.Option(
            "--clamp-max-tokens/--no-clamp-max-tokens",
            help="Take max_tokens beyond the room left for that room, in place of an error.",
        ),
    ] = None,
    special_tokens_in_content: Annotated[
        bool | None,
        typer.Option(
            "--special-tokens-in-content/--no-special-tokens-in-content",
            help="Encode names of special tokens in chat messages as those tokens, not as plain text.",
        ),
    ] = None,
    generation_config: Annotated[
        GenerationConfig | None,
        typer.Option(help="Defaults of sampling parameters: model: its generation_config.json; none: OpenAI's."),
    ] = None,
    tool_format: Annotated[
        CallsAs | None,
        typer.Option(help="How the model writes calls of functions; auto: as its chat template says."),
    ] = None,
    thinking: Annotated[
        ThinksIn | None,
        typer.Option(
            help="What is reasoning_content: text in <think> tags, in channels, or nothing; auto: by the template."
        ),
    ] = None,
    restart: Annotated[
        bool | None, typer.Option("--restart/--no-restart", help="Restart the engine when it dies.")
    ] = None,
    weight_updates: Annotated[
        bool | None,
        typer.Option(
            "--weight-updates/--no-weight-updates",
            help="Serve /pause, /resume, /update_weights, /sleep and /wake_up; needs an API key.",
        ),
    ] = None,
    engine: Annotated[
        Path | None, typer.Option(help="Socket directory of an engine under torchrun to attach to; starts none.")
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="Lowest level that is logged to stderr.")] = None,
    log_format: Annotated[LogStyle | None, typer.Option(help="Log format: text or json, one line per event.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="API key that requests must carry; can be repeated. Other users see flags: prefer --api-keys-file."
        ),
    ] = None,
    api_keys_file: Annotated[Path | None, typer.Option(help="File of API keys, one per line.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may send requests; * for all.")
    ] = None,
    keep_alive_s: Annotated[
        float | None,
        typer.Option(help="Seconds after which an idle connection is closed."),
    ] = None,
    ping_s: Annotated[
        float | None, typer.Option(help="Seconds after which a stream without news sends a comment; 0: never.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM): serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of the certificate (PEM).")] = None,
) -> None:
    """Serve a model over HTTP. Prints one line with an example request once it takes requests."""
    own = options.flags_of(name for name in overrides if name != "engine.model")
    if engine is not None and own:
        raise typer.BadParameter("--engine attaches to an engine that has its settings already", param_hint=own)
    flags = {
        "server.host": host,
        "server.port": port,
        "server.served_model_name": served_model_name,
        "server.clamp_max_tokens": clamp_max_tokens,
        "server.special_tokens_in_content": special_tokens_in_content,
        "server.generation_config": generation_config and generation_config.value,
        "server.tool_format": tool_format and tool_format.value,
        "server.thinking": thinking and thinking.value,
        "server.restart": restart,
        "server.weight_updates": weight_updates,
        "server.log_level": log_level and log_level.value,
        "server.log_format": log_format and log_format.value,
        "server.api_keys": api_key,
        "server.api_keys_file": api_keys_file and str(api_keys_file),
        "server.cors_origins": cors_origin,
        "server.keep_alive_s": keep_alive_s,
        "server.ping_s": ping_s,
        "server.tls_cert": tls_cert and str(tls_cert),
        "server.tls_key": tls_key and str(tls_key),
    }
    overrides |= {name: value for name, value in flags.items() if value is not None}
    from engine.config.deployment import load_config

    raise typer.Exit(_run(load_config(config, overrides), engine))


def _run(config: Config, engine: Path | None) -> int:
    import uvloop

    from engine.logs import set_up
    from models.config import read_config
    from models.default import resolve_model
    from models.tokenizer import Tokenizer
    from server.keys import check_weight_updates, read_keys
    from server.lifecycle import Lifecycle
    from server.listen import listen

    keys = read_keys([key.get_secret_value() for key in config.server.api_keys], config.server.api_keys_file)
    check_weight_updates(config.server, keys)
    directory = resolve_model(config.engine.model)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"model": str(directory)})})
    set_up(config.server.log_level, config.server.log_format)
    read_config(directory)
    tokenizer = Tokenizer(directory)
    listener = listen(config.server.host, config.server.port)
    address, port = listener.getsockname()[:2]

    def ready(service: Service) -> None:
        typer.echo(f"ready: {example(address, port, service)}")

    async def main() -> int:
        return await Lifecycle(config, tokenizer, listener, ready, keys=keys, engine_directory=engine).run()

    return uvloop.run(main())


def example(address: str, port: int, service: Service) -> str:
    """Return a shell command that gets an answer from the server."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    host = f"[{reachable}]" if ":" in reachable else reachable
    ask: dict[str, Any]
    if service.template.available:
        route, ask = "chat/completions", {"messages": [{"role": "user", "content": "Say hello."}]}
    else:
        route, ask = "completions", {"prompt": "Once upon a time"}
    body = json.dumps({**ask, "max_tokens": 32})
    scheme, key = ("https" if service.config.server.tls_cert else "http"), ""
    if service.config.server.api_keys or service.config.server.api_keys_file:
        key = " -H 'Authorization: Bearer KEY'"
    return f"curl {scheme}://{host}:{port}/v1/{route} -H 'Content-Type: application/json'{key} -d '{body}'"
