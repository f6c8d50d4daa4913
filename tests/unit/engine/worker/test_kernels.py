"""Whether FlashInfer serves: only if its modules can be compiled, loaded and run, and if it has the model's shapes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.config.deployment import ConfigError
from engine.worker.kernels import choose_ops
from kernels.flashinfer.flashinfer_workspace import Workspace
from kernels.gpu.gpu_ops import GpuOps
from tests.support import fake_flashinfer

pytest.importorskip("triton")
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
BUILD_FAILS = "Ninja build failed. Ninja output:\n[1/9] nvcc a.cu\na.cu(3): error: no such thing\nninja: build stopped"


class Modules:
    """FlashInfer's modules, `flashinfer.prefill`. missing: whether they are not compiled. error: why they cannot be."""

    def __init__(self, missing: bool = False, error: Exception | None = None) -> None:
        self._missing, self._error = missing, error
        self.loaded: list[tuple[str, int]] = []

    def gen_batch_prefill_module(self, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(is_compiled=not self._missing, is_aot=True)

    def get_batch_prefill_module(self, backend: str, *arguments: Any) -> None:
        if self._error is not None:
            raise self._error
        self.loaded.append((backend, arguments[4]))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that installs a fake of FlashInfer with these modules, on a Hopper GPU."""

    def install(modules: Modules) -> Modules:
        monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
        monkeypatch.setitem(sys.modules, "flashinfer.prefill", modules)
        monkeypatch.setattr(fake_flashinfer, "prefill", modules, raising=False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(
            "kernels.flashinfer.flashinfer_workspace.make_workspace", lambda device: Workspace(CPU, (9, 0), 132)
        )
        return modules

    return install


def test_it_serves_where_its_modules_are(install: Any, caplog: pytest.LogCaptureFixture) -> None:
    modules = install(Modules())
    ops = choose_ops("auto", CUDA, torch.bfloat16, (128, 64, 64))
    assert isinstance(ops, GpuOps)
    assert ops.kind == "flashinfer"
    assert modules.loaded == [("fa2", 128), ("fa3", 128), ("fa2", 64), ("fa3", 64)]
    assert not caplog.messages


def test_compiling_is_announced(install: Any) -> None:
    modules, entered = install(Modules(missing=True)), []

    @contextlib.contextmanager
    def compiling() -> Iterator[None]:
        entered.append(len(modules.loaded))
        yield
        entered.append(len(modules.loaded))

    choose_ops("auto", CUDA, torch.float16, (64,), compiling)
    assert entered == [0, 2]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(BUILD_FAILS), "cannot be compiled or loaded: a.cu(3): error: no such thing"),
        (OSError("libcudart.so.13: cannot open shared object file"), "cannot be compiled or loaded: libcudart.so.13"),
    ],
)
def test_triton_serves_instead(install: Any, caplog: pytest.LogCaptureFixture, error: Exception, reason: str) -> None:
    install(Modules(error=error))
    assert choose_ops("auto", CUDA, torch.bfloat16, (128,)).kind == "triton"
    (message,) = caplog.messages
    assert message.startswith(f"attention runs in Triton: FlashInfer's attention {reason}")
    with pytest.raises(ConfigError, match=r"engine\.kernels: FlashInfer's attention cannot be compiled or loaded"):
        choose_ops("flashinfer", CUDA, torch.bfloat16, (128,))


def test_a_module_for_other_gpus(
    install: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image is available for execution on the device")

    install(Modules())
    monkeypatch.setattr(fake_flashinfer.BatchPrefillWithPagedKVCacheWrapper, "run", run)
    assert choose_ops("auto", CUDA, torch.bfloat16, (128,)).kind == "triton"
    assert [message.partition(": ")[2] for message in caplog.messages] == [
        "FlashInfer's attention does not run on this GPU: no kernel image is available for execution on the device"
    ]


def test_formats_of_kv(install: Any) -> None:
    """It does not read sealed pages, which Triton does. Of fp8, FA3 has none beside queries of another type."""
    modules = install(Modules())
    assert choose_ops("auto", CUDA, torch.bfloat16, (128,), kv_format="int8").kind == "triton"
    with pytest.raises(ConfigError, match=r"engine\.kernels: flashinfer does not read int8 KV; triton does"):
        choose_ops("flashinfer", CUDA, torch.bfloat16, (128,), kv_format="int8")
    assert not modules.loaded
    assert choose_ops("auto", CUDA, torch.bfloat16, (128,), kv_format="fp8").kind == "flashinfer"
    assert modules.loaded == [("fa2", 128), ("fa3", 128), ("fa2", 128)]


def test_head_dims_that_it_lacks(install: Any, caplog: pytest.LogCaptureFixture) -> None:
    modules = install(Modules())
    assert choose_ops("auto", CUDA, torch.bfloat16, (96, 64)).kind == "triton"
    with pytest.raises(ConfigError, match=r"engine\.kernels: flashinfer has none for head_dim 96"):
        choose_ops("flashinfer", CUDA, torch.bfloat16, (96, 64))
    assert choose_ops("auto", CUDA, torch.bfloat16, (64, 96)).kind == "flashinfer"  # Triton serves the draft model
    assert modules.loaded == [("fa2", 64), ("fa3", 64)]
    assert not caplog.messages


def test_a_package_that_is_broken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A package that FlashInfer imports is missing: that is not the same as no FlashInfer."""

    def import_module(name: str) -> None:
        raise ModuleNotFoundError("No module named 'pynvml'", name="pynvml")

    monkeypatch.setattr("kernels.flashinfer.flashinfer_modules.importlib", SimpleNamespace(import_module=import_module))
    assert choose_ops("auto", CUDA, torch.bfloat16, (128,)).kind == "triton"
    assert caplog.messages == ["attention runs in Triton: FlashInfer cannot be imported: No module named 'pynvml'"]
