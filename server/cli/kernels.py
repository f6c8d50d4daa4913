"""`magicdec kernels`: compile the kernels for this processor."""

from __future__ import annotations

import typer


def kernels() -> None:
    """Compile the kernels for this processor unless that is done, and print which they are; `reference` without a
    compiler."""
    import torch

    from engine.backend import choose_ops

    typer.echo(choose_ops("auto", torch.device("cpu"), torch.float32).name)
