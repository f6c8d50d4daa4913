"""`magicdec quantize`: write a model with weights of 4 bits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

_TOKENS = 32768
_LENGTH = 512
"""Tokens of one calibration text."""


def quantize(
    src: Annotated[str, typer.Argument(help="A directory with safetensors weights, or `default`.")],
    dst: Annotated[Path, typer.Argument(help="The directory to create.")],
    text: Annotated[Path | None, typer.Option(help="Text to calibrate on; without one, rounds to nearest.")] = None,
    group_size: Annotated[int, typer.Option(min=8, help="Features that share a scale.")] = 64,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Whether groups go without zero points.")
    ] = False,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Tokens of the text to calibrate on; {_TOKENS} if not given. Each takes about 12 bytes of memory per "
            "hidden and intermediate feature of a layer.",
        ),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing directory.")] = False,
) -> None:
    """Round a model's weights to 4 bits: by GPTQ with --text, else to nearest.

    Writes the layout of compressed-tensors (pack-quantized), which vLLM and transformers read too, but for gpt-oss,
    whose experts they expect in one tensor. Embedding, LM head and routers stay as they are.
    """
    if tokens is not None and text is None:
        raise typer.BadParameter("counts tokens of a text: needs --text", param_hint="--tokens")
    from models.conversion.convert import check_destination
    from models.default import resolve_model
    from models.quantize.quantize_model import quantize as run

    directory = resolve_model(src)
    check_destination(directory, dst, force)
    texts = [] if text is None else _passages(directory, text, tokens or _TOKENS)
    progress = sys.stderr.isatty()
    run(
        directory,
        dst,
        texts,
        group_size=group_size,
        symmetric=symmetric,
        device=device,
        progress=progress,
        force=force,
    )
    typer.echo(dst)


def _passages(directory: Path, text: Path, tokens: int) -> list[list[int]]:
    """Cut passages of one length, `tokens` in all if the text has as many."""
    from bench.corpus import read_text, spread
    from models.config import read_config
    from models.tokenizer import Tokenizer

    ids = Tokenizer(directory).encode(read_text(text), add_special_tokens=False)
    length = min(_LENGTH, tokens, read_config(directory).max_model_len)
    return spread(ids, count=max(1, min(tokens, len(ids)) // length), length=length)
