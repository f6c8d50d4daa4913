"""`magicdec kernels`: compile and measure the kernels for this processor."""

from __future__ import annotations

import platform
from typing import Annotated

import typer


def kernels(
    every: Annotated[
        bool,
        typer.Option(
            "--every", help="Compile for all instruction sets, into the installation: images need no compiler."
        ),
    ] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure again, and go by the new rates from now on.")
    ] = False,
) -> None:
    """Compile the kernels for this processor unless that is done, measure them, and print what is chosen."""
    import torch

    from engine.worker.kernels import choose_ops, kernels_folder
    from kernels.cpu.compiler import BUILT, INSTRUCTION_SETS, build_kernels, build_operators, processor_name
    from kernels.cpu.cpus import usable_cores
    from kernels.cpu.micro_profile import KINDS, TILED, full_profile

    if every:
        for library in (build_operators(BUILT), *(build_kernels(each, BUILT) for each in INSTRUCTION_SETS)):
            typer.echo(library.name)
        return
    ops = choose_ops("auto", torch.device("cpu"), torch.float32, ())
    if ops.kind != "cpu":
        typer.echo(ops.kind)
        return
    profile = full_profile(kernels_folder(), anew=measure)
    chosen = {kind: getattr(profile, kind) for kind in KINDS}
    chosen["attention"] += f", {profile.prefetch}"
    typer.echo(f"{processor_name() or platform.machine()}, {usable_cores()} threads")
    for kind, variant in chosen.items():
        typer.echo(f"{kind}: {variant}")
    for kind, rows in zip(TILED, (profile.tiles_from, profile.tiles_from_int8), strict=True):
        if rows > 1:
            typer.echo(f"{kind}: tiles from {rows} rows on")
    for rate in profile.rates:
        mark = "*" if rate.variant == chosen[rate.kernel] else " "
        typer.echo(
            f"{mark} {rate.kernel:14} {rate.shape:24} {rate.variant:40} {1e6 * rate.seconds:9.1f} us"
            f" {rate.rate:8.1f} G{'B' if rate.unit == 'bytes' else rate.unit}/s"
        )
