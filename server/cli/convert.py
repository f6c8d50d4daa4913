"""`magicdec convert`: make a checkpoint servable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    src: Annotated[Path, typer.Argument(help="A .gguf file, or a directory with safetensors weights.")],
    dst: Annotated[Path, typer.Argument(help="The directory to create.")],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
) -> None:
    """Convert a Llama-family checkpoint to the format that magicdec serves: bf16 safetensors and tokenizer.json."""
    from models.convert import convert as run

    run(src, dst, force=force)
    typer.echo(dst)
