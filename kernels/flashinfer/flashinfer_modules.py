"""FlashInfer's compiled modules: those that attention needs, loaded when kernels are chosen, or compiled ahead.

FlashInfer's package has none of them. It compiles a module with nvcc when it first meets a dtype and a head_dim, unless
it finds the module in a folder of the installation. The program compiles into that folder, or into another one:

    python -m kernels.flashinfer.flashinfer_modules --architectures 8.0 9.0 --head-dims 64 128

It needs nvcc (CUDA_HOME, or the one on PATH) and a C++ compiler, but no GPU. MAX_JOBS limits the compilers at work.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from kernels.attention.base import AttentionBatch
from kernels.cpu.compiler import KernelsUnavailable
from kernels.flashinfer.flashinfer_attention import FlashInferAttention
from kernels.flashinfer.flashinfer_sizes import Kernels
from kernels.flashinfer.flashinfer_workspace import Workspace, load_flashinfer
from kernels.kv.kv_pool import LayerKV

log = logging.getLogger(__name__)

_HOPPER = (9, 0)
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_CAUSE = 200  # characters of a compiler's error that a message quotes


class ModulesUnavailable(KernelsUnavailable):
    """FlashInfer's modules cannot be had; the message gives the cause in one line."""


def needed_modules(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int], kv_dtype: torch.dtype | None = None
) -> list[tuple[Kernels, dict[str, Any]]]:
    """List the compiled modules that attention needs: the arguments of FlashInfer's `gen_batch_prefill_module` and
    `get_batch_prefill_module`, which take them in this order and by these names.

    capability: the GPU's compute capability. kv_dtype: of the pool; None: `dtype`.
    """
    arguments: dict[str, Any] = {
        "dtype_q": dtype,
        "dtype_kv": kv_dtype or dtype,
        "dtype_o": dtype,
        "dtype_idx": torch.int32,
        "head_dim_qk": head_dim,
        "head_dim_vo": head_dim,
        "pos_encoding_mode": 0,
        "use_sliding_window": False,
        "use_logits_soft_cap": False,
        "use_fp16_qk_reduction": False,
    }
    kernels: list[Kernels] = ["fa2", "fa3"] if capability == _HOPPER and kv_dtype is None else ["fa2"]
    return [(each, arguments) for each in kernels]


def module_spec(kernels: Kernels, arguments: dict[str, Any]) -> Any:
    """Return what FlashInfer compiles for a module of `needed_modules`, a JitSpec."""
    from flashinfer import prefill

    # Since 0.7, FA2 has a smaller module for keys and values that are laid out alike, as they are in our pools.
    small = getattr(prefill, "_gen_batch_prefill_primary_module", None) if kernels == "fa2" else None
    return (small or prefill.gen_batch_prefill_module)(kernels, **arguments)


def load_modules(
    device: torch.device,
    dtype: torch.dtype,
    head_dims: Sequence[int],
    compiling: Callable[[], AbstractContextManager[None]],
    kv_dtype: torch.dtype | None = None,
) -> None:
    """Load the modules that this device needs into this process; compile those that are missing, once per machine and
    user.

    compiling: entered while a compiler works, which takes minutes. kv_dtype: see needed_modules. Raises ImportError if
    FlashInfer is not installed, ModulesUnavailable for any other failure.
    """
    try:
        importlib.import_module("flashinfer")
    except Exception as error:  # it needs a home directory, among other things
        if isinstance(error, ModuleNotFoundError) and error.name == "flashinfer":
            load_flashinfer()  # raises ImportError, with a hint
        raise ModulesUnavailable(f"FlashInfer cannot be imported: {shortened(error)}") from error
    try:
        get_module = importlib.import_module("flashinfer.prefill").get_batch_prefill_module
        capability = torch.cuda.get_device_capability(device)
        modules = [module for head_dim in head_dims for module in needed_modules(dtype, head_dim, capability, kv_dtype)]
        missing = [each for each in modules if not module_spec(*each).is_compiled]
        ahead = all(module_spec(*each).is_aot for each in modules)
        if missing:
            names = ", ".join(f"{kernels} with head_dim {arguments['head_dim_qk']}" for kernels, arguments in missing)
            log.info("compiling FlashInfer's attention, once on this machine; it takes minutes: %s", names)
        # Of modules that were not compiled ahead, ninja checks whether they are up to date.
        with compiling() if missing else contextlib.nullcontext(), contextlib.nullcontext() if ahead else _tools():
            for kernels, arguments in modules:
                get_module(kernels, *arguments.values())
    except Exception as error:  # whatever a compiler, a loader or FlashInfer raises
        raise ModulesUnavailable(f"FlashInfer's attention cannot be compiled or loaded: {shortened(error)}") from error


def try_attention(workspace: Workspace, dtype: torch.dtype, head_dim: int) -> None:
    """Run attention over a short and a long row, by each of the modules. A module that was compiled ahead may lack this
    GPU's architecture, which shows at its first launch.

    workspace: see make_workspace. Raises ModulesUnavailable.
    """
    page_size, length, device = 16, 512, workspace.device
    count = length // page_size
    try:
        attention = FlashInferAttention(page_size, workspace)
        pages = torch.arange(count, device=device).expand(2, count).contiguous()
        attention.plan(AttentionBatch([1, length], [length, length], pages))
        pool = torch.zeros(2, count, 1, page_size, head_dim, dtype=dtype, device=device)
        pool[1] = 1  # an average of values is then 1, whatever the queries
        q = torch.ones(length + 1, 1, head_dim, dtype=dtype, device=device)
        out, _ = attention.run(LayerKV(pool[0], pool[1]), q, 1.0)
        is_right = bool(((out.float() - 1).abs() < 0.01).all())  # waits for the device
    except Exception as error:  # whatever FlashInfer or the driver raises
        raise ModulesUnavailable(f"FlashInfer's attention does not run on this GPU: {shortened(error)}") from error
    if not is_right:
        raise ModulesUnavailable("FlashInfer's attention computes something else on this GPU")


def shortened(error: BaseException) -> str:
    """Return the cause of an error in one line. Of a compiler's output: the first line that speaks of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    faults = (line for line in lines if re.search(r"\berror\b|not found|No such file", line, re.IGNORECASE))
    cause = lines[0] if len(lines) == 1 else next(faults, lines[0] if lines else "")
    if len(cause) > _MAX_CAUSE:
        cause = cause[:_MAX_CAUSE].rstrip() + " …"
    return f"{type(error).__name__}: {cause}" if not cause or isinstance(error, KeyError) else cause


@contextlib.contextmanager
def _tools() -> Iterator[None]:
    """Let FlashInfer find what it compiles with: ninja, where it is installed beside this Python only, and libraries.

    FlashInfer takes both from environment variables, which are as before when this ends. Under make, ninja would look
    for the job server of a make that has closed it.
    """
    from flashinfer.jit import cpp_ext, env

    before = {name: os.environ.get(name) for name in ("PATH", "FLASHINFER_EXTRA_LDFLAGS", "MAKEFLAGS")}
    os.environ.pop("MAKEFLAGS", None)
    libraries = _libraries(Path(cpp_ext.get_cuda_path()), Path(env.FLASHINFER_WORKSPACE_DIR) / "libraries")
    os.environ["FLASHINFER_EXTRA_LDFLAGS"] = f"{before['FLASHINFER_EXTRA_LDFLAGS'] or ''} -L{libraries}".strip()
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), before["PATH"] or os.defpath))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _libraries(cuda: Path, folder: Path) -> Path:
    """Fill a folder with what modules are linked with and a toolkit may lack: the runtime under the name that linkers
    look for, and an empty library in place of the driver's."""
    folder.mkdir(parents=True, exist_ok=True)
    runtime = next((file for name in ("lib64", "lib") for file in sorted((cuda / name).glob("libcudart.so*"))), None)
    with contextlib.suppress(FileExistsError):
        if runtime is not None:
            (folder / "libcudart.so").symlink_to(runtime.resolve())
    driver = folder / "libcuda.so"
    if not driver.exists():
        part = folder / f"libcuda.{os.getpid()}"
        source = ["-shared", "-x", "c++", os.devnull, "-Wl,-soname,libcuda.so.1", "-o", str(part)]
        subprocess.run([os.environ.get("CXX", "c++"), *source], check=True, capture_output=True)
        os.replace(part, driver)
    return folder


def architecture(name: str) -> tuple[int, int]:
    """Parse an architecture like "9.0". Raises ValueError."""
    found = re.fullmatch(r"(\d+)\.(\d)", name)
    if found is None:
        raise ValueError(f"{name!r} is no architecture like 8.0 or 9.0")
    return int(found[1]), int(found[2])


def nvcc_target(capability: tuple[int, int]) -> str:
    """Return an architecture as FlashInfer names it: from Hopper on, with the features of that very architecture."""
    major, minor = capability
    return f"{major}.{minor}{'a' if major >= _HOPPER[0] else ''}"


def compile_modules(
    capabilities: Iterable[tuple[int, int]], dtypes: Iterable[torch.dtype], head_dims: Iterable[int], into: Path | None
) -> list[Path]:
    """Compile the modules that any of these architectures needs, each for all architectures that can run it.

    into: folder for them, <name>/<name>.so each; None: where FlashInfer looks first. Modules that are there are kept.
    Sets environment variables that FlashInfer reads when it is imported, so it is for a program of its own. Raises
    ModulesUnavailable. Returns the modules' files.
    """
    capabilities = sorted(set(capabilities))
    # Listed for each architecture, and compiled once for all.
    shapes = [(dtype, head_dim, each) for dtype in dtypes for head_dim in head_dims for each in capabilities]
    needed = [module for shape in shapes for module in needed_modules(*shape)]
    os.environ["FLASHINFER_CUDA_ARCH_LIST"] = " ".join(map(nvcc_target, capabilities))
    flags = os.environ.get("FLASHINFER_EXTRA_CUDAFLAGS", "")
    os.environ["FLASHINFER_EXTRA_CUDAFLAGS"] = f"{flags} -Xfatbin=-compress-all".strip()  # half the size
    with tempfile.TemporaryDirectory(prefix="magicdec-modules-") as aside:
        os.environ["FLASHINFER_WORKSPACE_BASE"] = aside
        try:
            from flashinfer.jit import env

            made = []
            with _tools():
                for spec in {spec.name: spec for spec in (module_spec(*each) for each in needed)}.values():
                    target = (into or Path(env.FLASHINFER_AOT_DIR)) / spec.name / f"{spec.name}.so"
                    if not target.exists():
                        spec.build(verbose=False)
                        _put(Path(spec.jit_library_path), target)
                    log.info("%6.1f MB  %s", target.stat().st_size / 1e6, target)
                    made.append(target)
        except Exception as error:  # whatever a compiler or FlashInfer raises
            raise ModulesUnavailable(shortened(error)) from error
    return made


def _put(library: Path, target: Path) -> None:
    """Copy a library to its place, where it appears whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    shutil.copyfile(library, part)
    os.replace(part, target)


def main(arguments: list[str]) -> int:
    """Run the program. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["8.0", "9.0"], help="compute capabilities of GPUs")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=sorted(_DTYPES))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--into", type=Path, help="folder for the modules; without it, FlashInfer's installation")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        capabilities = [architecture(name) for name in options.architectures]
    except ValueError as error:
        parser.error(f"--architectures: {error}")
    try:
        compile_modules(capabilities, [_DTYPES[name] for name in options.dtypes], options.head_dims, options.into)
    except ModulesUnavailable as error:
        sys.stderr.write(f"error: FlashInfer's modules cannot be compiled: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
