"""Triton's compiler for a GPU that need not be present."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True, slots=True)
class Resources:
    """Resources of one binary. shared: bytes per program. stack: bytes per thread, not 0 where registers are spilled.
    copies: asynchronous copies of 16 bytes to shared memory. divisions: of 64-bit integers."""

    kernel: str
    case: str
    shared: int
    warps: int
    registers: int
    stack: int
    copies: int
    divisions: int


class Compiler:
    """Compiles at every kernel launch instead of launching, and prints resources."""

    def __init__(self, architecture: int) -> None:
        self.case = ""
        self._seen: set[str] = set()
        target = GPUTarget("cuda", architecture, 32)
        driver.set_active(
            SimpleNamespace(
                get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
            )
        )
        run = JITFunction.run

        def compile_it(function: Any, *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
            kernel = run(function, *args, grid=grid, warmup=True, **kwargs)
            if kernel.hash not in self._seen:
                self._seen.add(kernel.hash)
                print(json.dumps(asdict(self._resources(function.fn.__name__, kernel))), flush=True)

        JITFunction.run = compile_it

    def _resources(self, name: str, kernel: Any) -> Resources:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        assert found, usage
        ptx = kernel.asm["ptx"]
        return Resources(
            name,
            self.case,
            kernel.metadata.shared,
            kernel.metadata.num_warps,
            int(found[1]),
            int(found[2]),
            len(re.findall(r"cp\.async\.cg\.shared\.global .*0x10,", ptx)),
            len(re.findall(r"\b(?:div|rem)\.[su]64", ptx)),
        )
