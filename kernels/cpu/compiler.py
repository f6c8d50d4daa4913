"""Compile the CPU kernels, once per instruction set and version of torch, into a persistent folder.

`csrc/` yields two kinds of libraries: the kernels, one library per instruction set and independent of torch, and the
operators by which torch calls them. Both are built on first use. A finished library is reused, from that folder or
from BUILT, where images have them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent / "csrc"
BUILT = Path(__file__).parent / "built"
"""Folder of the libraries that came with the installation."""
_TIMEOUT_S = 600


class KernelsUnavailable(RuntimeError):
    """Failure to build or load the kernels; the message has the reason. The reference backend is used instead."""


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """Target of the compiler. name: that of the kernels. features: required processor features, as Linux names them.
    flags: compiler flags."""

    name: str
    features: frozenset[str]
    flags: tuple[str, ...]

    @property
    def has_tiles(self) -> bool:
        """Whether its kernels are made of AMX tiles, be they computed in software."""
        return not {"-mamx-tile", "-DMAGICDEC_SOFTWARE_TILES"}.isdisjoint(self.flags)

    @property
    def has_bf16(self) -> bool:
        """Whether the processor multiplies bfloat16 natively."""
        return not self.features.isdisjoint(("avx512_bf16", "amx_bf16", "bf16"))


def _x86(name: str, features: str, compiler_names: str) -> InstructionSet:
    return InstructionSet(name, frozenset(features.split()), tuple(f"-m{each}" for each in compiler_names.split()))


_AVX2 = "avx2 fma f16c"
_AVX512 = "avx512f avx512bw avx512vl avx512dq"
_BF16 = _x86("avx512_bf16", f"{_AVX2} {_AVX512} avx512_vnni avx512_bf16", f"{_AVX2} {_AVX512} avx512vnni avx512bf16")
_TILES = "amx_tile amx_bf16 amx_int8"
SOFTWARE_TILES = InstructionSet("software_tiles", _BF16.features, (*_BF16.flags, "-DMAGICDEC_SOFTWARE_TILES"))
"""The set "amx" with its tiles computed in software, for tests on processors without them."""
_ARCHITECTURES = {
    "x86_64": (
        InstructionSet(
            "amx", _BF16.features | set(_TILES.split()), (*_BF16.flags, "-mamx-tile", "-mamx-bf16", "-mamx-int8")
        ),
        _BF16,
        _x86("avx512", f"{_AVX2} {_AVX512}", f"{_AVX2} {_AVX512}"),
        _x86("avx_vnni", f"{_AVX2} avx_vnni", f"{_AVX2} avxvnni"),
        _x86("avx2", _AVX2, _AVX2),
    ),
    "aarch64": (
        InstructionSet("neon_bf16", frozenset({"asimddp", "bf16"}), ("-march=armv8.2-a+dotprod+bf16",)),
        InstructionSet("neon_dotprod", frozenset({"asimddp"}), ("-march=armv8.2-a+dotprod",)),
    ),
}
_PORTABLE = InstructionSet("portable", frozenset(), ())
"""The set that every processor of an architecture has; on aarch64 it includes NEON."""


def instruction_sets(architecture: str) -> tuple[InstructionSet, ...]:
    """List the instruction sets of an architecture, as `platform.machine` names it, the best first."""
    name = {"AMD64": "x86_64", "arm64": "aarch64"}.get(architecture, architecture)
    return (*_ARCHITECTURES.get(name, ()), _PORTABLE)


INSTRUCTION_SETS = instruction_sets(platform.machine())
"""The instruction sets of this machine's architecture, the best first."""


def supported() -> list[InstructionSet]:
    """List the instruction sets of this processor, the best first. Every processor has the last one."""
    features = parse_features(_cpuinfo())
    return [each for each in INSTRUCTION_SETS if each.features <= features]


def rivals() -> list[InstructionSet]:
    """List the supported sets of which any may be the fastest here, the likely best first.

    AMD's processors multiply 16-bit floats at least as fast as others: there is nothing to measure. Intel's multiply
    pairs of them no faster than single float32 numbers, and their tiles are fast for tall shapes.
    """
    best = supported()
    if best[0].name == "avx512_bf16" and processor_name().startswith("AMD"):
        return best[:1]
    names = {"amx", "avx512_bf16", "avx512"} if best[0].name in ("amx", "avx512_bf16") else {best[0].name}
    return [each for each in best if each.name in names]


def processor_name() -> str:
    """Return the model name of this processor, as Linux names it; empty if unknown."""
    names = (line.partition(":")[2].strip() for line in _cpuinfo().splitlines() if line.startswith("model name"))
    return next(names, "")


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def parse_features(cpuinfo: str) -> set[str]:
    """Parse the features of the first processor in the text of /proc/cpuinfo: `flags` on x86, `Features` on Arm."""
    for line in cpuinfo.splitlines():
        name, _, names = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(names.split())
    return set()


def build_kernels(target: InstructionSet, folder: Path | None) -> Path:
    """Return the library of kernels for one instruction set; build it if missing.

    folder: where built libraries are kept; None: there is no such folder, and only BUILT is searched.
    Raises KernelsUnavailable.
    """
    flags = ["-std=gnu++17", "-O3", "-fvisibility=hidden", "-Wno-psabi", *target.flags]
    return _build(folder, f"kernels-{target.name}", "kernels.cpp", flags, [])


def build_operators(folder: Path | None) -> Path:
    """Return the library that registers the operators with torch; otherwise as `build_kernels`."""
    include = _torch_folder("include")
    flags = ["-std=gnu++20", "-O2", f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    return _build(
        folder, "operators", "ops.cpp", flags, [f"-L{_torch_folder('lib')}", "-ltorch", "-ltorch_cpu", "-lc10"]
    )


def _torch_folder(name: str) -> Path:
    return Path(torch.__file__).parent / name


def _build(folder: Path | None, name: str, source: str, flags: list[str], libraries: list[str]) -> Path:
    flags = [*flags, "-fPIC", "-shared"]
    file = f"{name}-{_digest(flags, source)}.so"
    if (BUILT / file).is_file():
        return BUILT / file
    if folder is None:
        raise KernelsUnavailable("no folder is known to keep kernels in; set HOME or XDG_CACHE_HOME")
    target = folder / file
    try:
        if target.is_file() and _is_whole(target):
            return target
    except OSError as error:
        raise KernelsUnavailable(f"cannot read kernels: {error}") from error
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise KernelsUnavailable("no C++ compiler (g++ or clang++) is installed")
    command = [compiler, *flags, str(_SOURCES / source)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / "made.so"
            subprocess.run(
                [*command, "-o", str(made), *libraries],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=_TIMEOUT_S,
                env=os.environ | {"TMPDIR": aside},  # a killed compiler leaves its files there
            )
            os.replace(made, target)  # atomic; a concurrent build produces the same library
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        raise KernelsUnavailable(f"{compiler} fails: {lines[0] if lines else error}") from error
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelsUnavailable(f"cannot build kernels: {error}") from error
    return target


def _is_whole(library: Path) -> bool:
    """Whether a library is as long as its ELF header requires. A file truncated by a full disk or a crash must not be
    loaded: the loader would map memory past its end, and SIGBUS would kill the process."""
    with library.open("rb") as file:
        head = file.read(64)
        size = os.fstat(file.fileno()).st_size
    if len(head) < 64:
        return False
    if head[:6] != b"\x7fELF\2\1":  # not 64-bit little-endian ELF: left to the loader
        return True
    sections, each, count = (int.from_bytes(head[at : at + n], "little") for at, n in ((40, 8), (58, 2), (60, 2)))
    return sections + each * count <= size  # linkers write the section table last


def _digest(flags: list[str], source: str) -> str:
    """Hash all inputs of a library, except where torch is installed."""
    kept = [flag for flag in flags if not flag.startswith("-I")]
    hashed = hashlib.sha256(repr((kept, source, torch.__version__, platform.machine())).encode())
    for file in sorted(_SOURCES.iterdir()):
        hashed.update(file.name.encode() + file.read_bytes())
    return hashed.hexdigest()[:16]
