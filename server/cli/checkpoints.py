"""`magicdec fetch` and `magicdec convert`: get checkpoints, and make them servable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from models.default import MODELS, OPTIONAL, default_model_dir, missing_models

_WEIGHTS = (
    "Matrices that the file holds in few bits: stored: with the same codes and scales, where this format has them "
    "(GGUF's Q4_0, Q4_1, Q4_K, Q5_0, Q6_K, Q8_0); dense: in bf16."
)


def convert(
    src: Annotated[Path, typer.Argument(help="A .gguf file, or a directory with safetensors weights.")],
    dst: Annotated[Path, typer.Argument(help="The directory to create.")],
    weights: Annotated[Literal["stored", "dense"], typer.Option(help=_WEIGHTS)] = "stored",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
) -> None:
    """Convert a checkpoint to the format that magicdec serves: safetensors, bf16 or quantized, and
    tokenizer.json."""
    from models.conversion.convert import convert as run

    run(src, dst, force=force, weights=weights)
    typer.echo(dst)


def fetch(
    model: Annotated[str, typer.Argument(help=f"One of: {', '.join([*MODELS, *OPTIONAL])}.")] = "default",
) -> None:
    """Download and convert a model that has a name, unless it is installed, and print its directory.

    `default` and `default-int4` are installed together. All others have licences of their own, and are served by name
    once they are installed.
    """
    if model not in MODELS and model not in OPTIONAL:
        raise typer.BadParameter(f"{model!r} is none of: {', '.join([*MODELS, *OPTIONAL])}", param_hint="MODEL")
    if model in OPTIONAL or missing_models():
        from models.fetch import fetch as run

        run(lambda line: typer.echo(line, err=True), model)
    typer.echo(default_model_dir(model))
