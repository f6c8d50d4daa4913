"""Measure the CPU kernels of this processor's instruction sets, and choose by it.

Nothing is measured where one set is known to be the best. Otherwise it takes a second or two, once per processor model,
number of threads and libraries: the result is kept beside the compiled libraries.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from kernels.cpu.choice import Choice
from kernels.cpu.compiler import SOFTWARE_TILES, InstructionSet, KernelsUnavailable, processor_name, rivals, supported
from kernels.cpu.library import CpuKernels, PackedWeights, open_set

log = logging.getLogger(__name__)

_Input = TypeVar("_Input")

_SECONDS = 0.05
"""Time spent on each set and shape."""
_REPEATS = 3
"""Runs of each set and shape, at least."""
_LEAD = 1.1
"""A set replaces one listed before it if it is faster by this factor: a choice must not depend on noise."""
_HEADS, _KV_HEADS, _HEAD_DIM, _PAGE = 12, 4, 64, 16
_QUERIES = ((4, 2048, 1), (4, 2048, 4), (1, 1024, 256))
"""Shapes of attention: rows, tokens of context, queries per row."""
_ROWS = (1, 4, 16, 64, 256)
"""Shapes of products, by number of rows."""
_TILES_FROM = (1, 2, 4, 6, 8, 12, 16, 24, 32)
_SIZE = 1024
_POOL_BYTES = 256 << 20
"""Weights and KV that are read in turn: more than most caches hold."""


class Rate(msgspec.Struct, frozen=True):
    """Speed of one kernel. rate: in 10^9 of `unit` per second."""

    kernel: str
    shape: str
    instruction_set: str
    seconds: float
    rate: float
    unit: str


class MicroProfile(msgspec.Struct, frozen=True):
    """Measured rates, and what they lead to: instruction sets by kind of kernel, and where tiles begin."""

    rates: list[Rate]
    attention: str
    products: str
    products_int8: str
    tiles_from: int
    tiles_from_int8: int

    def choice(self) -> Choice:
        sets = {each.name: each for each in (*supported(), SOFTWARE_TILES)}
        return Choice(
            sets[self.attention],
            sets[self.products],
            sets[self.products_int8],
            rest=supported()[0],
            tiles_from=self.tiles_from,
            tiles_from_int8=self.tiles_from_int8,
        )


def choose(folder: Path | None) -> Choice:
    """Choose instruction sets for this processor; measure where that is needed. folder: of compiled libraries, and of
    kept measurements. Raises KernelsUnavailable if no set can be used."""
    usable = _usable(folder, rivals())
    if len(usable) == 1 and not usable[0].has_tiles:
        return Choice.all_of(usable[0])
    return replace(measured(folder, usable).choice(), rest=usable[0])


def _usable(folder: Path | None, sets: Sequence[InstructionSet]) -> list[InstructionSet]:
    """Return the sets that compile and that the system permits. Where none of them does, the next ones are tried."""
    usable: list[InstructionSet] = []
    reasons = []
    for target in [*sets, *(each for each in supported() if each not in sets)]:
        if usable and target not in sets:
            break
        try:
            open_set(folder, target)
            usable.append(target)
        except KernelsUnavailable as error:
            reasons.append(error)
            log.warning("kernels for %s are not used: %s", target.name, error)
    if not usable:
        raise reasons[0]
    return usable


def measured(folder: Path | None, sets: Sequence[InstructionSet]) -> MicroProfile:
    """Return the micro-profile of these sets, kept from an earlier start or measured now."""
    libraries = tuple(open_set(folder, target)[0].stem for target in sets)
    return _measured(folder, tuple(sets), libraries, torch.get_num_threads())


@functools.lru_cache
def _measured(
    folder: Path | None, sets: tuple[InstructionSet, ...], libraries: tuple[str, ...], threads: int
) -> MicroProfile:
    key = hashlib.sha256(repr((libraries, threads, processor_name())).encode()).hexdigest()[:16]
    file = None if folder is None else folder / f"rates-{key}.json"
    with contextlib.suppress(OSError, msgspec.MsgspecError):
        if file is not None:
            return msgspec.json.decode(file.read_bytes(), type=MicroProfile)
    profile = measure(folder, sets)
    if file is not None:
        with contextlib.suppress(OSError):  # it is measured again at the next start
            _keep(profile, file)
    return profile


def _keep(profile: MicroProfile, file: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as aside:
        aside.write(msgspec.json.encode(profile))
    os.replace(aside.name, file)  # ranks that measure at the same time keep one result


def measure(folder: Path | None, sets: Sequence[InstructionSet]) -> MicroProfile:
    """Measure the kernels of these sets on shapes of all heights."""
    kernels = {target.name: CpuKernels(folder, target) for target in sets}
    weight = PackedWeights(torch.full((_SIZE, _SIZE), 0.01, dtype=torch.bfloat16))
    weights, coarse = _copies(weight), _copies(weight.quantized())
    rates = _attention_rates(kernels)
    rates += _product_rates("products", kernels, weights)
    rates += _product_rates("products_int8", kernels, coarse)
    chosen = {kind: _fastest(kind, rates) for kind in ("attention", "products", "products_int8")}
    by_name = {target.name: target for target in sets}
    return MicroProfile(
        rates=rates,
        tiles_from=_tiles_from(folder, by_name[chosen["products"]], weights),
        tiles_from_int8=_tiles_from(folder, by_name[chosen["products_int8"]], coarse),
        **chosen,
    )


def _copies(weights: PackedWeights) -> list[PackedWeights]:
    copies = [copy.copy(weights) for _ in range(max(2, _POOL_BYTES // weights.nbytes))]
    for each in copies:
        each.packed = weights.packed.clone()
    return copies


def _fastest(kind: str, rates: list[Rate]) -> str:
    """Return the set with the least geometric mean of times over all shapes; of nearly equal ones the first."""
    logs: dict[str, float] = {}
    for rate in rates:
        if rate.kernel == kind:
            logs[rate.instruction_set] = logs.get(rate.instruction_set, 0.0) + math.log(rate.seconds)
    shapes = len({rate.shape for rate in rates if rate.kernel == kind})
    best, *others = logs
    for name in others:
        if (logs[best] - logs[name]) / shapes > math.log(_LEAD):
            best = name
    return best


def _attention_rates(kernels: dict[str, CpuKernels]) -> list[Rate]:
    rates = []
    for rows, context, queries in _QUERIES:
        width = context // _PAGE
        token_bytes = 2 * _KV_HEADS * _HEAD_DIM * torch.bfloat16.itemsize
        layers = max(2, _POOL_BYTES // (rows * context * token_bytes))
        pools = torch.full((layers, 2, rows * width, _KV_HEADS, _PAGE, _HEAD_DIM), 0.5, dtype=torch.bfloat16)
        pages = torch.arange(rows * width).view(rows, width)
        lengths = (torch.full((rows,), queries), torch.full((rows,), context))
        q = torch.full((rows * queries, _HEADS, _HEAD_DIM), 0.1, dtype=torch.bfloat16)
        taken = _seconds(
            {name: partial(_attend, each, q, lengths, pages) for name, each in kernels.items()}, list(pools)
        )
        seen = rows * queries * (context - (queries - 1) / 2)  # pairs of a query and a slot
        shape = f"{rows} x {context}, {queries} quer{'y' if queries == 1 else 'ies'}"
        for name, seconds in taken.items():
            amount, unit = pools[0].nbytes, "bytes"
            if queries > 16:
                amount, unit = int(4 * seen * _HEADS * _HEAD_DIM), "FLOP"
            rates.append(Rate("attention", shape, name, seconds, amount / seconds / 1e9, unit))
    return rates


def _attend(kernels: CpuKernels, q: Tensor, lengths: tuple[Tensor, Tensor], pages: Tensor, kv: Tensor) -> object:
    return kernels.attention(q, kv[0], kv[1], *lengths, pages, 0.125)


def _product_rates(kind: str, kernels: dict[str, CpuKernels], weights: list[PackedWeights]) -> list[Rate]:
    rates = []
    for rows in _ROWS:
        taken = _seconds({name: _product(each, rows) for name, each in kernels.items()}, weights)
        for name, seconds in taken.items():
            amount, unit = weights[0].nbytes, "bytes"
            if rows > 16:
                amount, unit = 2 * rows * _SIZE * _SIZE, "FLOP"
            shape = f"{rows} row{'s' if rows > 1 else ''}"
            rates.append(Rate(kind, shape, name, seconds, amount / seconds / 1e9, unit))
    return rates


def _product(kernels: CpuKernels, rows: int) -> Callable[[PackedWeights], object]:
    x = torch.full((rows, _SIZE), 0.1, dtype=torch.bfloat16)
    return lambda weights: kernels.linear(x, weights)


def _tiles_from(folder: Path | None, target: InstructionSet, weights: list[PackedWeights]) -> int:
    """Return the least number of rows from which on tiles are faster than what the set has for few rows; 1 if the
    processor's tiles should round otherwise than these."""
    whole = Choice.all_of(target)
    always = CpuKernels(folder, replace(whole, tiles_from=1, tiles_from_int8=1))
    never = CpuKernels(folder, replace(whole, tiles_from=1 << 30, tiles_from_int8=1 << 30))
    if not target.has_tiles or not _agree(always, never, weights[0].scales is not None):
        return 1
    for rows in _TILES_FROM:
        taken = _seconds({"tiles": _product(always, rows), "": _product(never, rows)}, weights)
        if taken["tiles"] < taken[""]:
            return rows
    return _TILES_FROM[-1]


def _agree(one: CpuKernels, other: CpuKernels, int8: bool) -> bool:
    """Whether two kernels of products have the same bits."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, _SIZE, generator=generator).bfloat16()
    x = torch.randn(33, _SIZE, generator=generator).bfloat16()
    packed = PackedWeights(weight).quantized() if int8 else PackedWeights(weight)
    return torch.equal(one.linear(x, packed, float_out=True), other.linear(x, packed, float_out=True))


def _seconds(runs: dict[str, Callable[[_Input], object]], inputs: Sequence[_Input]) -> dict[str, float]:
    """Measure runs by turns: the median seconds of each. Each goes through all inputs, far from where others are,
    so that none finds in a cache what another one has just read."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    turns = {
        name: cycle([*inputs[at:], *inputs[:at]])
        for name, at in zip(runs, _spread(len(runs), len(inputs)), strict=True)
    }
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


def _spread(count: int, size: int) -> list[int]:
    return [size * index // count for index in range(count)]
