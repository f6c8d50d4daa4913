"""`magicdec make-draft`: make a draft model from layers of the target."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def make_draft(
    dst: Annotated[Path, typer.Argument(help="The directory to create.")],
    model: Annotated[str, typer.Option(help="The target: a model directory, `default` or `default-int4`.")] = "default",
    keep: Annotated[int | None, typer.Option(min=1, help="Number of layers to keep; two thirds if not given.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to keep, numbered from 0, comma-separated.")] = None,
    spread: Annotated[
        bool, typer.Option("--spread", help="Keep evenly spaced layers, without measuring which matter.")
    ] = False,
    text: Annotated[Path | None, typer.Option(help="Measure on this text instead of Python's manual.")] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of text to measure on.")] = 512,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
) -> None:
    """Keep some layers of a model as its draft model, for --draft. Nothing is trained.

    Layers are removed one by one, always the one whose absence, as measured, changes predictions least.
    """
    if layers is not None and (keep is not None or spread or text is not None):
        raise typer.BadParameter("cannot be combined with --keep, --spread or --text", param_hint="--layers")
    if spread and text is not None:
        raise typer.BadParameter("measures nothing: cannot be combined with --text", param_hint="--spread")
    from models.config import read_config
    from models.conversion.convert import check_destination
    from models.conversion.draft import check_any_layers, evenly_spaced_layers
    from models.conversion.draft import make_draft as run
    from models.default import resolve_model

    src = resolve_model(model)
    config = read_config(src)
    count = config.num_layers
    check_destination(src, dst, force)
    wanted = keep or -(-2 * count // 3)
    evenly_spaced_layers(count, wanted)  # raises if there are fewer layers
    if layers is not None:
        kept = [_number(part.strip()) for part in layers.split(",")]
    else:
        check_any_layers(config)  # measuring takes minutes
        kept = (
            evenly_spaced_layers(count, wanted) if spread or wanted == count else _measured(src, wanted, text, tokens)
        )
    run(src, dst, kept, force=force)
    print(f"layers {', '.join(map(str, sorted(set(kept))))} of 0 to {count - 1}", file=sys.stderr)
    typer.echo(dst)


def _number(text: str) -> int:
    if not (text.isdecimal() and text.isascii()):
        raise typer.BadParameter(f"{text!r} is not a layer number", param_hint="--layers")
    return int(text)


def _measured(src: Path, keep: int, text: Path | None, tokens: int) -> list[int]:
    from bench.corpus import passages, read_text
    from engine.config.deployment import EngineConfig
    from engine.worker.loading import load_target
    from models.conversion.draft import choose_layers
    from models.tokenizer import Tokenizer

    def progress(left: list[int], agree: float) -> None:
        print(f"{len(left)} layers left: the likeliest token is the same at {agree:.0%} of the text", file=sys.stderr)

    target = load_target(EngineConfig(model=str(src)), progress=sys.stderr.isatty())
    count = max(1, tokens // 128)
    texts = passages(Tokenizer(src), read_text(text), count=count, length=tokens // count)
    return choose_layers(target, texts, keep, progress)
