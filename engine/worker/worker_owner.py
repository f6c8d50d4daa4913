"""Owner of one rank's worker: frees it, and builds another from other weights."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from pathlib import Path

import torch

from engine.config.deployment import EngineConfig
from engine.oom import is_out_of_memory
from engine.plan import WeightStep
from engine.worker.build import DraftModel, load_draft
from engine.worker.loading import load_shard
from engine.worker.resolve import Resolved
from engine.worker.worker import Worker
from models.config import ModelError
from models.decoder import DecoderModel
from models.loader import check_model
from parallel.group import Group


class WorkerOwner:
    """Owner of one rank's worker. Every worker has the same settings, sizes and formats of weights; its rows and its KV
    begin empty.

    A new worker is loaded when the old one is gone, so the weights are never in memory twice.
    """

    def __init__(
        self,
        config: EngineConfig,
        resolved: Resolved,
        device: torch.device,
        group: Group,
        draft_group: Group | None,
        *,
        model: DecoderModel | None = None,
        progress: bool = False,
    ) -> None:
        """Load the first worker; see Worker.load."""
        self._config, self._device, self._group, self._draft_group = config, device, group, draft_group
        worker = Worker.load(config, resolved, device, group, draft_group, model=model, progress=progress)
        self._worker: Worker | None = worker
        self._resolved = replace(resolved, num_pages=worker.num_pages, max_model_len=worker.max_model_len)
        self._shape, self._weights = worker.model.config, worker.model.weights
        self._model: DecoderModel | None = None  # loaded, for the next worker
        self._draft: DraftModel | None = None

    @property
    def worker(self) -> Worker:
        assert self._worker is not None, "the weights are released"
        return self._worker

    @property
    def weight_formats(self) -> dict[str, str]:
        """See EngineStats.weights."""
        return {} if self._worker is None else self._worker.weight_formats

    def perform(self, step: WeightStep) -> str | None:
        """Perform a step. Returns why it cannot be performed; None: it was. After a step other than `check` that could
        not be performed, there is no worker."""
        path = Path(step.path)
        try:
            if step.action == "check":
                check_model(path, self._shape, self._group)
            elif step.action == "load":
                self._load(path)
            elif step.action == "build":
                self._build()
            else:
                self._release()
        except (ModelError, OSError) as error:
            return str(error)
        except Exception as error:
            if is_out_of_memory(error):
                return f"out of memory: {error}"
            if step.action == "check":  # files can be broken in ways that no check expects
                return f"{type(error).__name__}: {error}"
            raise
        return None

    def close(self) -> None:
        """Free the worker."""
        if self._worker is not None:
            self._worker.close()
        self._worker = self._model = self._draft = None

    def _load(self, path: Path) -> None:
        draft = self._draft if self._worker is None else self._worker.draft
        self._release()
        config, length = self._config, self._resolved.max_model_len
        resolved = replace(self._resolved, path=path)
        model = load_shard(
            config, resolved, self._device, self._group, progress=False, like=self._shape, weights=self._weights
        )
        self._draft = draft or load_draft(config, model, length, self._draft_group)
        self._model = model

    def _build(self) -> None:
        model, draft, sizes = self._model, self._draft, self._resolved
        self._model = self._draft = None
        assert model is not None
        assert draft is not None
        assert sizes.num_pages is not None
        self._worker = Worker(
            model,
            self._config,
            num_pages=sizes.num_pages,
            max_model_len=sizes.max_model_len,
            group=self._group,
            draft=draft,
        )

    def _release(self) -> None:
        """Free the worker, and give its memory back to the system."""
        self.close()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        elif (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # of glibc
            trim(0)
