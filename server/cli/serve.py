"""`magicdec serve`: an OpenAI-compatible server for one model."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli import options

if TYPE_CHECKING:
    from engine.config import Config
    from server.service import Service


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
    port: Annotated[int | None, typer.Option(help="0 takes a free one.")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="Model id that clients use.")] = None,
    restart: Annotated[
        bool | None, typer.Option("--restart/--no-restart", help="Start the engine again when it dies.")
    ] = None,
    engine: Annotated[
        Path | None, typer.Option(help="Socket directory of an engine that torchrun runs; start none.")
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="What is logged, on stderr.")] = None,
) -> None:
    """Serve a model over HTTP. Prints one line, with a request to try, when it takes requests."""
    own = options.flags_of(name for name in overrides if name != "engine.model")
    if engine is not None and own:
        raise typer.BadParameter("--engine attaches to an engine that has its settings already", param_hint=own)
    flags = {
        "server.host": host,
        "server.port": port,
        "server.served_model_name": served_model_name,
        "server.restart": restart,
        "server.log_level": log_level and log_level.value,
    }
    overrides |= {name: value for name, value in flags.items() if value is not None}
    from engine.config import load_config

    raise typer.Exit(_run(load_config(config, overrides), engine))


def _run(config: Config, engine: Path | None) -> int:
    import uvloop

    from engine.logs import set_up
    from models.config import read_config
    from models.default import resolve_model
    from models.tokenizer import Tokenizer
    from server.listen import listen
    from server.run import Lifecycle

    directory = resolve_model(config.engine.model)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"model": str(directory)})})
    set_up(config.server.log_level)
    read_config(directory)
    tokenizer = Tokenizer(directory)
    listener = listen(config.server.host, config.server.port)
    address, port = listener.getsockname()[:2]

    def ready(service: Service) -> None:
        typer.echo(f"ready: {example(address, port, service)}")

    async def main() -> int:
        return await Lifecycle(config, tokenizer, listener, ready, engine_directory=engine).run()

    return uvloop.run(main())


def example(address: str, port: int, service: Service) -> str:
    """A shell command that gets an answer from the server."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    host = f"[{reachable}]" if ":" in reachable else reachable
    ask: dict[str, Any]
    if service.template.available:
        route, ask = "chat/completions", {"messages": [{"role": "user", "content": "Say hello."}]}
    else:
        route, ask = "completions", {"prompt": "Once upon a time"}
    body = json.dumps({**ask, "max_tokens": 32})
    return f"curl http://{host}:{port}/v1/{route} -H 'Content-Type: application/json' -d '{body}'"
