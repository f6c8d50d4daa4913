"""Device parameters of the cost model. Free of torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, or one rank's share of a CPU machine. Peak values; placed_model.Efficiency has the fractions reached.

    flops: dense 16-bit FLOP/s (on a CPU: float32). bandwidth: memory bandwidth, bytes per second. memory: bytes. link:
    bytes per second to other ranks, in one direction. all_reduce_s: seconds of an all-reduce too small for `link` to
    matter. fp8_flops: dense FLOP/s of 8-bit floating-point products; None: weights of fp8 are multiplied at 16 bits.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    all_reduce_s: float
    fp8_flops: float | None = None


_NVLINK_S = 10e-6
_PCIE_S = 30e-6


def _hopper(name: str, *, bandwidth: float, memory: float, flops: float = 989.5e12, link: float = 450e9) -> Device:
    """Describe an H100 or H200: tensor cores multiply fp8 at twice the rate of 16 bits (`torch._scaled_mm`)."""
    return Device(
        name=name,
        flops=flops,
        fp8_flops=2 * flops,
        bandwidth=bandwidth,
        memory=memory,
        link=link,
        all_reduce_s=_NVLINK_S,
    )


GPUS = {
    device.name: device
    for device in (
        # Vendor data sheets, the SXM variant where there are several, without sparsity. NVLink 3 and 4, PCIe 4 x16. The
        # times of a small all-reduce are typical values, not measured here.
        Device(name="a100-80gb", flops=312e12, bandwidth=2.039e12, memory=80e9, link=300e9, all_reduce_s=_NVLINK_S),
        _hopper("h100", bandwidth=3.35e12, memory=80e9),
        _hopper("h100-nvl", bandwidth=3.9e12, memory=94e9, flops=835.5e12, link=300e9),
        _hopper("h200", bandwidth=4.8e12, memory=141e9),
        Device(name="l40s", flops=362e12, bandwidth=0.864e12, memory=48e9, link=32e9, all_reduce_s=_PCIE_S),
        Device(name="a10", flops=125e12, bandwidth=0.6e12, memory=24e9, link=32e9, all_reduce_s=_PCIE_S),
    )
}

NAMES = (*GPUS, "cpu")


class UnknownDevice(ValueError):
    """The device is unknown; the message lists the known ones."""


def find_device(name: str, ranks: int) -> Device:
    """Look up one of NAMES. `cpu`: one of `ranks` equal shares of this machine, measured now. Raises UnknownDevice."""
    if name == "cpu":
        return this_cpu(ranks)
    if name not in GPUS:
        raise UnknownDevice(f"{name!r} is not a known GPU; these are: {', '.join(NAMES)}")
    return GPUS[name]


def this_cpu(ranks: int) -> Device:
    """Measure a rank's share of this machine: a sequential read on all cores and a float32 matrix product.

    Takes a few tenths of a second. Other load on the machine lowers the result.
    """
    import numpy as np

    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(1 << 24, dtype=np.int64), cores)  # 128 MiB, beyond any cache
    with ThreadPoolExecutor(cores) as pool:
        read = _best(lambda: list(pool.map(np.sum, parts)))
    size = 1024
    matrix = np.ones((size, size), dtype=np.float32)
    multiply = _best(lambda: matrix @ matrix)
    bandwidth = 8 * sum(map(len, parts)) / read
    return Device(
        name="cpu",
        flops=2 * size**3 / multiply / ranks,
        bandwidth=bandwidth / ranks,
        memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks,
        link=bandwidth / ranks / 2,  # a copy through shared memory: a write and a read
        all_reduce_s=_PCIE_S,
    )


def _best(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the seconds of the fastest of several runs; other load slows the rest."""
    seconds = []
    for _ in range(repeats):
        began = perf_counter()
        work()
        seconds.append(perf_counter() - began)
    return min(seconds)
