"""Gather what a GPU machine without a network lacks into one folder, to be copied there.

    python -m bench.gpu.kit --python 3.12

Such a machine has Linux on x86-64, and for its Python torch for CUDA, Triton, numpy, transformers, pip and pytest. The
folder has packages for that Python, FlashInfer with its attention compiled for these GPUs, and `install.sh`, which
needs neither a compiler nor a network. Compiling takes a quarter of an hour on one core, once per user; it needs a C++
compiler, and nvcc from CUDA_HOME or, if that is not set, from PyPI.

Triton's kernels are not compiled ahead: what its cache holds is found by hashes of that machine's own Triton and of the
arguments at each launch, and compiling one takes about a second.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from models.default import user_cache

LIMIT_BYTES = 60 << 20
FLASHINFER = "flashinfer-python==0.6.18"
"""The first version that takes the number of queries of every row (takes_uniform_queries): 18 MB, later ones up to
65."""
_FLASHINFER_IMPORTS = (
    *("apache-tvm-ffi", "nvidia-ml-py", "requests", "certifi", "charset-normalizer", "idna", "urllib3"),
    *("filelock", "packaging", "tqdm"),
)
PACKAGES = (
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("msgspec", "llguidance", "psutil", "hypothesis", "sortedcontainers", "pytest-timeout"),
    *_FLASHINFER_IMPORTS,
)
"""What this project's engine, its GPU tests and FlashInfer import and such a machine may lack; in the versions of
constraints.txt."""
_TOOLKIT = (
    *("nvidia-cuda-nvcc==13.0.88", "nvidia-nvvm==13.0.88", "nvidia-cuda-crt==13.0.88"),
    *("nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cccl==13.0.85", "nvidia-curand==10.4.0.35"),
)
_NEWEST_GLIBC, _OLDEST_GLIBC = 35, 5
_ROOT = Path(__file__).parents[2]
_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
INSTALL = """\
#!/bin/sh
# Install the packages of this folder, and FlashInfer's compiled modules, into a folder (default: site, beside this
# script). PYTHON: the interpreter, python3 by default. Prints what to set before Python starts.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
target=${1:-$here/site}
"${PYTHON:-python3}" -m pip install -q --no-index --no-deps --upgrade --target "$target" "$here"/wheels/*.whl
if [ -d "$here/modules" ]; then
    mkdir -p "$target/flashinfer/data/aot"
    cp -R "$here"/modules/. "$target/flashinfer/data/aot/"
fi
echo "export PYTHONPATH=$target"
"""


class KitError(RuntimeError):
    """The kit cannot be made; the message gives the reason."""


def platform_tags() -> list[str]:
    """List the platforms whose wheels such a machine can install, the newest first."""
    return [f"manylinux_2_{minor}_x86_64" for minor in range(_NEWEST_GLIBC, _OLDEST_GLIBC - 1, -1)] + [
        "manylinux2014_x86_64",
        "manylinux2010_x86_64",
        "manylinux1_x86_64",
    ]


def listing(folder: Path) -> list[tuple[int, str]]:
    """List the files of a folder: size and path, the largest first."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(((path.stat().st_size, str(path.relative_to(folder))) for path in files), reverse=True)


def table(files: Sequence[tuple[int, str]]) -> str:
    """Format a listing, with the total last. Of a path that repeats a long name, only the file is shown."""
    rows = [f"{size / 2**20:8.2f} MiB  {_shown(path)}" for size, path in files]
    return "\n".join([*rows, f"{_total(files) / 2**20:8.2f} MiB  in all"])


def check_size(files: Sequence[tuple[int, str]]) -> None:
    """Raise KitError if the files are larger than LIMIT_BYTES together."""
    if (total := _total(files)) > LIMIT_BYTES:
        raise KitError(
            f"the kit has {total / 2**20:.1f} MiB, more than {LIMIT_BYTES >> 20}; the largest file is {files[0][1]}"
        )


def make_kit(
    python: str, into: Path, architectures: Sequence[str], head_dims: Sequence[int], dtypes: Sequence[str]
) -> str:
    """Make the kit in place of what `into` holds. python: version of the machine's Python. architectures, head_dims,
    dtypes: what FlashInfer is compiled for; no head_dims: nothing is compiled. Raises KitError. Returns the listing."""
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=into.parent, prefix="gpu-kit-") as aside:
        kit = Path(aside) / "kit"
        _fetch_wheels(python, kit / "wheels")
        if head_dims:
            names = _compile_modules(architectures, head_dims, dtypes)
            for path in names:
                shutil.copytree(path, kit / "modules" / path.name)
        (kit / "install.sh").write_text(INSTALL, encoding="utf-8")
        (kit / "install.sh").chmod(0o755)
        files = listing(kit)
        check_size(files)
        (kit / "CONTENTS").write_text(f"{table(files)}\n", encoding="utf-8")
        if into.exists():
            shutil.rmtree(into)
        kit.rename(into)
    return table(files)


def _fetch_wheels(python: str, folder: Path) -> None:
    platforms = [part for tag in platform_tags() for part in ("--platform", tag)]
    command = [
        *_PIP,
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-c",
        str(_without_flashinfer(folder)),
        *platforms,
    ]
    _run([*command, "--python-version", python, "-d", str(folder), FLASHINFER, *PACKAGES])


def _without_flashinfer(folder: Path) -> Path:
    """Write constraints.txt without its version of FlashInfer, beside `folder`."""
    folder.mkdir(parents=True)
    lines = (_ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    constraints = folder.parent.parent / "constraints.txt"
    kept = [line for line in lines if not line.startswith(FLASHINFER.partition("=")[0])]
    constraints.write_text("\n".join(kept) + "\n", encoding="utf-8")
    return constraints


def _compile_modules(architectures: Sequence[str], head_dims: Sequence[int], dtypes: Sequence[str]) -> list[Path]:
    """Compile FlashInfer's modules, unless the user's cache has them. Returns a folder for each."""
    toolkit = os.environ.get("CUDA_HOME") or str(_installed("cuda", _TOOLKIT) / "nvidia" / "cu13")
    packages = _installed("flashinfer", (FLASHINFER, *_FLASHINFER_IMPORTS))
    cache = _cache() / f"modules-{_digest((FLASHINFER, toolkit, *architectures))}"
    program = [sys.executable, "-m", "kernels.flashinfer.flashinfer_modules", "--into", str(cache)]
    shapes = ["--architectures", *architectures, "--head-dims", *map(str, head_dims), "--dtypes", *dtypes]
    paths = [str(packages), str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    print(f"compiling FlashInfer's attention, unless {cache} has it; this takes minutes", file=sys.stderr, flush=True)
    found = _run([*program, *shapes], CUDA_HOME=toolkit, PYTHONPATH=os.pathsep.join(paths))
    return [Path(line.split(maxsplit=2)[2]).parent for line in found.splitlines()]


def _installed(name: str, requirements: Iterable[str]) -> Path:
    """Return a folder of the user's cache with packages for this Python; install them if it is missing."""
    requirements = list(requirements)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = _cache() / f"{name}-{_digest((version, *requirements))}"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(dir=_cache()) as aside:
            constraints = _without_flashinfer(Path(aside) / "x" / "y")
            place = Path(aside) / "site"
            _run([*_PIP, "install", "--no-deps", "-c", str(constraints), "--target", str(place), *requirements])
            place.rename(folder)
    return folder


def _cache() -> Path:
    folder = user_cache() / "gpu-kit"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256(repr(tuple(parts)).encode()).hexdigest()[:12]


def _run(command: Sequence[str], **env: str) -> str:
    """Run a program, whose errors this process shows. Returns what it prints. Raises KitError."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | env, check=False)
    if done.returncode:
        raise KitError(f"{' '.join(command[1:5])} … ended with status {done.returncode}")
    return done.stdout


def _shown(path: str) -> str:
    folder, _, name = path.rpartition("/")
    return f"modules/…/{name}" if folder.startswith("modules/") else path


def _total(files: Iterable[tuple[int, str]]) -> int:
    return sum(size for size, _ in files)


def main(arguments: Sequence[str]) -> int:
    """Run the program. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version of the machine's Python (default: %(default)s)")
    parser.add_argument("--into", type=Path, default=_ROOT / "build/gpu-kit", help="folder (default: build/gpu-kit)")
    parser.add_argument("--architectures", nargs="+", default=["8.0", "9.0"], help="compute capabilities of its GPUs")
    parser.add_argument(
        "--head-dims", nargs="*", type=int, default=[64, 128], help="of models; without any, nothing is compiled"
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], help="bfloat16, float16")
    options = parser.parse_args(arguments)
    try:
        print(make_kit(options.python, options.into, options.architectures, options.head_dims, options.dtypes))
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.into}: copy it to the machine and run its install.sh there")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
