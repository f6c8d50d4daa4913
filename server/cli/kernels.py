"""`magicdec kernels`: compile the kernels for this processor."""

from __future__ import annotations

from typing import Annotated

import typer


def kernels(
    every: Annotated[
        bool,
        typer.Option(
            "--every", help="Compile for all instruction sets, into the installation: images need no compiler."
        ),
    ] = False,
) -> None:
    """Compile the kernels for this processor unless that is done, and print their name; `reference` without a
    compiler."""
    import torch

    from engine.worker.kernels import choose_ops
    from kernels.cpu.compiler import BUILT, INSTRUCTION_SETS, build_kernels, build_operators

    if every:
        for library in (build_operators(BUILT), *(build_kernels(each, BUILT) for each in INSTRUCTION_SETS)):
            typer.echo(library.name)
        return
    typer.echo(choose_ops("auto", torch.device("cpu"), torch.float32).name)
