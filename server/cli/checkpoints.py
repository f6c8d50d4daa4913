"""`magicdec fetch` and `magicdec convert`: get checkpoints, and make them servable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from models.default import default_model_dir, missing_models

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
    """Convert a Llama-family checkpoint to the format that magicdec serves: safetensors, bf16 or quantized, and
    tokenizer.json."""
    from models.conversion.convert import convert as run

    run(src, dst, force=force, weights=weights)
    typer.echo(dst)


def fetch() -> None:
    """Download and convert the models `default` and `default-int4` unless they exist, and print the directory of the
    first."""
    directory = default_model_dir()
    if missing_models():
        from models.fetch import fetch as run

        run(lambda line: typer.echo(line, err=True))
    typer.echo(directory)
