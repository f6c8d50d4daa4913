"""Measure the CPU kernels of this processor's instruction sets, and choose by it.

It takes a few seconds, once per processor model, number of threads and libraries: the result is kept beside the
compiled libraries.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from kernels.cpu.choice import PREFETCHES, KernelChoice, Prefetch
from kernels.cpu.compiler import (
    InstructionSet,
    KernelsUnavailable,
    build_kernels,
    build_operators,
    processor_name,
    rivals,
    supported,
)
from kernels.cpu.cpus import usable_cores
from kernels.cpu.library import CpuKernels, open_set
from kernels.cpu.packing import Packed, pack
from kernels.fastest import LEAD, fastest
from kernels.weights.weight_format import FORMATS

log = logging.getLogger(__name__)

_Input = TypeVar("_Input")
_Variant = TypeVar("_Variant")

PRODUCTS = {"dense": "products", "int8": "products_int8", "int4": "products_int4"}
"""Kinds of products, by format of weights."""
KINDS = ("attention", *PRODUCTS.values())
"""Kinds of kernels, each with an instruction set of its own."""
TILED = ("products", "products_int8")
"""Kinds that AMX tiles multiply."""
_VERSION = 2
_SECONDS = 0.05
"""Time spent on each variant and shape."""
_REPEATS = 3
"""Runs of each variant and shape, at least."""
_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE = 12, 4, 64, 16
_QUERIES = ((4, 2048, 1), (4, 2048, 4), (1, 1024, 256))
"""Shapes of attention: rows, tokens of context, queries per row."""
_ROWS = (1, 4, 16, 64, 256)
"""Shapes of products, by number of rows."""
_TILES_FROM = (1, 2, 4, 6, 8, 12, 16, 24, 32)
_SIZE = 1024
"""Rows and columns of weights."""
_POOL_BYTES = 256 << 20
"""Weights and KV that are read in turn: more than most caches hold."""


class Rate(msgspec.Struct, frozen=True):
    """Speed of one kernel. variant: instruction set, and how it prefetches. rate: in 10^9 of `unit` per second."""

    kernel: str
    shape: str
    variant: str
    seconds: float
    rate: float
    unit: str


class MicroProfile(msgspec.Struct, frozen=True):
    """Measured rates, and what they lead to: instruction sets by kind of kernel, see KernelChoice."""

    rates: list[Rate]
    attention: str
    products: str
    products_int8: str
    products_int4: str
    tiles_from: int
    tiles_from_int8: int
    prefetch: Prefetch

    def choice(self, sets: Sequence[InstructionSet]) -> KernelChoice:
        """Return the choice among the sets that were measured."""
        named = {each.name: each for each in sets}
        return KernelChoice(
            named[self.attention],
            named[self.products],
            named[self.products_int8],
            named[self.products_int4],
            rest=sets[0],
            tiles_from=self.tiles_from,
            tiles_from_int8=self.tiles_from_int8,
            prefetch=self.prefetch,
        )

    def fastest_format(self, max_rows: int) -> str | None:
        """Return the format of weights in which products of up to `max_rows` rows take the least time, by the geometric
        mean over the measured numbers of rows; None: no other is faster than dense."""
        times = {
            (rate.kernel, rate.shape): rate.seconds
            for rate in self.rates
            if rate.kernel != KINDS[0] and rate.variant == getattr(self, rate.kernel)
        }
        shapes = [_product_shape(rows) for rows in _ROWS if rows <= max_rows]
        chosen = fastest([{name: times[kind, shape] for name, kind in PRODUCTS.items()} for shape in shapes])
        return None if chosen == "dense" else chosen


def choose(folder: Path | None) -> KernelChoice:
    """Return the choice of `measured_choice`."""
    return measured_choice(folder)[0]


def measured_choice(folder: Path | None) -> tuple[KernelChoice, MicroProfile | None]:
    """Choose instruction sets for this processor by measurement, or the likely best one where no measurement can be
    kept: the next start, or another rank, might choose otherwise.

    folder: of compiled libraries, and of kept measurements. Returns the choice and the profile that it goes by, None if
    nothing is measured. Raises KernelsUnavailable if no set can be used.
    """
    sets = usable(folder)
    profile = _kept(folder, tuple(sets))
    return KernelChoice.all_of(sets[0]) if profile is None else profile.choice(sets), profile


def full_profile(folder: Path | None, *, anew: bool) -> MicroProfile:
    """Return the profile that `choose` goes by from now on, also where it cannot be kept. anew: measure it even if it
    is kept. Raises KernelsUnavailable."""
    sets = tuple(usable(folder))
    file = _file(folder, sets)
    kept = None if anew else _read(file, sets)
    if kept is None:
        kept = measure(folder, sets)
        _keep(kept, file)
    return kept


def usable(folder: Path | None) -> list[InstructionSet]:
    """Compile and load the sets that may be the fastest here, and return those that the system permits, or else the
    next best one. Raises KernelsUnavailable if there is none."""
    found: list[InstructionSet] = []
    first = rivals()
    build_operators(folder)
    if len(first) > 1:
        with ThreadPoolExecutor(usable_cores()) as pool:  # compilers are processes
            wait([pool.submit(build_kernels, target, folder) for target in first])  # errors return below
    errors: dict[str, KernelsUnavailable] = {}
    for target in [*first, *(each for each in supported() if each not in first)]:
        if found and target not in first:
            break
        try:
            open_set(folder, target)
            found.append(target)
        except KernelsUnavailable as error:
            errors[target.name] = error
    if not found:
        raise next(iter(errors.values()))
    for name, reason in errors.items():
        log.warning("kernels for %s are not used: %s", name, reason)
    return found


@functools.lru_cache
def _kept(folder: Path | None, sets: tuple[InstructionSet, ...]) -> MicroProfile | None:
    """Return what an earlier start has kept, or measure and keep it; in one process always the same. None: nothing can
    be kept."""
    file = _file(folder, sets)
    profile = _read(file, sets)
    if profile is None and _can_keep(file):
        log.info("measuring the kernels of this processor, once")
        profile = measure(folder, sets)
        _keep(profile, file)
    return profile


def _file(folder: Path | None, sets: Sequence[InstructionSet]) -> Path | None:
    if folder is None:
        return None
    libraries = [open_set(folder, target)[0].stem for target in sets]
    key = hashlib.sha256(repr((_VERSION, libraries, usable_cores(), processor_name())).encode()).hexdigest()[:16]
    return folder / f"rates-{key}.json"


def _read(file: Path | None, sets: Sequence[InstructionSet]) -> MicroProfile | None:
    """Return the profile in a file; None if there is none that fits the sets."""
    if file is None:
        return None
    try:
        kept = msgspec.json.decode(file.read_bytes(), type=MicroProfile)
    except (OSError, msgspec.MsgspecError):
        return None
    fits = {getattr(kept, kind) for kind in KINDS} <= {each.name for each in sets} and kept.prefetch in PREFETCHES
    return kept if fits else None


def _can_keep(file: Path | None) -> bool:
    if file is None:
        return False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)  # libraries may be those of the installation
        tempfile.TemporaryDirectory(dir=file.parent).cleanup()
    except OSError:
        log.info("kernels are not measured: %s cannot be written", file.parent)
        return False
    return True


def _keep(profile: MicroProfile, file: Path | None) -> None:
    """Keep a profile, if possible; otherwise the next start measures again."""
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)  # libraries may be those of the installation
        with tempfile.TemporaryDirectory(dir=file.parent) as aside:
            made = Path(aside) / file.name
            made.write_bytes(msgspec.json.encode(profile))
            os.replace(made, file)  # ranks that measure at the same time keep one result


def measure(folder: Path | None, sets: Sequence[InstructionSet]) -> MicroProfile:
    """Measure the kernels of these sets on shapes of all heights, on all cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    try:
        return _measure(folder, sets)
    finally:
        torch.set_num_threads(before)


def _measure(folder: Path | None, sets: Sequence[InstructionSet]) -> MicroProfile:
    attention = {
        (target.name, prefetch): CpuKernels(folder, replace(KernelChoice.all_of(target), prefetch=prefetch))
        for target in sets
        for prefetch in PREFETCHES
    }
    times = {shape: _attention_seconds(attention, *shape) for shape in _QUERIES}
    rates = [
        Rate(KINDS[0], _attention_shape(*shape), f"{name}, {prefetch}", seconds, *_attention_rate(*shape, seconds))
        for shape, taken in times.items()
        for (name, prefetch), seconds in taken.items()
    ]
    name, prefetch = fastest(list(times.values()))
    chosen, tiles_from = {}, {}
    weight = torch.full((_SIZE, _SIZE), 0.01, dtype=torch.bfloat16)
    kernels = {target.name: CpuKernels(folder, target) for target in sets}
    for format_name, kind in PRODUCTS.items():
        weights = pack(FORMATS[format_name].quantize(weight))
        copies = _copies(weights)
        products = {rows: _product_seconds(kernels, rows, copies) for rows in _ROWS}
        rates += [
            Rate(kind, _product_shape(rows), each, seconds, *_product_rate(rows, weights, seconds))
            for rows, taken in products.items()
            for each, seconds in taken.items()
        ]
        chosen[kind] = fastest(list(products.values()))
        target = next(each for each in sets if each.name == chosen[kind])
        if kind in TILED:
            tiles_from[kind] = _tiles_from(folder, target, copies)
    return MicroProfile(
        rates=rates,
        attention=name,
        prefetch=prefetch,
        tiles_from=tiles_from["products"],
        tiles_from_int8=tiles_from["products_int8"],
        **chosen,
    )


def _attention_shape(rows: int, context: int, queries: int) -> str:
    return f"{rows} x {context}, {queries} queries"


def _attention_rate(rows: int, context: int, queries: int, seconds: float) -> tuple[float, str]:
    if queries <= 16:  # reading KV is the bound
        return rows * context * _token_bytes() / seconds / 1e9, "bytes"
    pairs = rows * queries * (context - (queries - 1) / 2)  # of a query and a slot it sees
    return 4 * pairs * _HEADS * _HEAD_DIM / seconds / 1e9, "FLOP"


def _token_bytes() -> int:
    return 2 * _KV_HEADS * _HEAD_DIM * torch.bfloat16.itemsize


def _attention_seconds(
    kernels: dict[tuple[str, Prefetch], CpuKernels], rows: int, context: int, queries: int
) -> dict[tuple[str, Prefetch], float]:
    width = context // _PAGE
    layers = max(2, _POOL_BYTES // (rows * context * _token_bytes()))
    pools = torch.full((layers, 2, rows * width, _KV_HEADS, _PAGE, _HEAD_DIM), 0.5, dtype=torch.bfloat16)
    pages = torch.arange(rows * width).view(rows, width)
    lengths = (torch.full((rows,), queries), torch.full((rows,), context))
    q = torch.full((rows * queries, _HEADS, _HEAD_DIM), 0.1, dtype=torch.bfloat16)
    return _seconds({name: partial(_attend, each, q, lengths, pages) for name, each in kernels.items()}, list(pools))


def _attend(kernels: CpuKernels, q: Tensor, lengths: tuple[Tensor, Tensor], pages: Tensor, kv: Tensor) -> object:
    return kernels.attention(q, kv[0], kv[1], *lengths, pages, 0.125)


def _copies(weights: Packed) -> list[Packed]:
    return [copy.deepcopy(weights) for _ in range(max(2, _POOL_BYTES // weights.nbytes))]


def _product_shape(rows: int) -> str:
    return f"{rows} rows"


def _product_seconds(kernels: dict[str, CpuKernels], rows: int, weights: list[Packed]) -> dict[str, float]:
    x = torch.full((rows, _SIZE), 0.1, dtype=torch.bfloat16)
    return _seconds({name: partial(each.linear, x) for name, each in kernels.items()}, weights)


def _product_rate(rows: int, weights: Packed, seconds: float) -> tuple[float, str]:
    if rows <= 16:  # reading weights is the bound
        return weights.nbytes / seconds / 1e9, "bytes"
    return 2 * rows * _SIZE * _SIZE / seconds / 1e9, "FLOP"


def _tiles_from(folder: Path | None, target: InstructionSet, weights: list[Packed]) -> int:
    """Return the number of rows from which on tiles are faster than what the set has for fewer rows; 1 if tiles of this
    processor do not round like those."""
    if not target.has_tiles:
        return 1
    whole = KernelChoice.all_of(target)
    kernels = {
        name: CpuKernels(folder, replace(whole, tiles_from=rows, tiles_from_int8=rows))
        for name, rows in (("tiles", 1), ("vectors", 1 << 30))
    }
    if not _agree(*kernels.values(), int8=weights[0].kind == "products_int8"):
        log.warning("AMX tiles round otherwise than specified: they multiply at all numbers of rows")
        return 1
    for rows in _TILES_FROM:
        taken = _product_seconds(kernels, rows, weights)
        if taken["tiles"] * LEAD < taken["vectors"]:
            return rows
    return _TILES_FROM[-1]


def _agree(one: CpuKernels, other: CpuKernels, *, int8: bool) -> bool:
    """Whether two kernels of products have the same bits."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, _SIZE, generator=generator).bfloat16()
    x = torch.randn(33, _SIZE, generator=generator).bfloat16()
    packed = pack(FORMATS["int8" if int8 else "dense"].quantize(weight), torch.ones(64))
    return torch.equal(one.linear(x, packed, float_out=True), other.linear(x, packed, float_out=True))


def _seconds(runs: dict[_Variant, Callable[[_Input], object]], inputs: Sequence[_Input]) -> dict[_Variant, float]:
    """Measure runs by turns: the median seconds of each. Each goes through all inputs, far from where others are, so
    that none finds in a cache what another one has just read."""
    taken: dict[_Variant, list[float]] = {name: [] for name in runs}
    starts = [len(inputs) * index // len(runs) for index in range(len(runs))]
    turns = {name: cycle([*inputs[at:], *inputs[:at]]) for name, at in zip(runs, starts, strict=True)}
    for name, run in runs.items():
        run(next(turns[name]))
    end = time.perf_counter() + _SECONDS * len(runs)
    while time.perf_counter() < end or min(map(len, taken.values())) < _REPEATS:
        for name, run in runs.items():
            each = next(turns[name])
            began = time.perf_counter()
            run(each)
            taken[name].append(time.perf_counter() - began)
    return {name: median(times) for name, times in taken.items()}
