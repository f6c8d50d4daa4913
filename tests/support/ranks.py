"""Engines of several ranks for tests: ranks as threads, and model directories for ranks as processes."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.config.deployment import EngineConfig
from engine.core import Engine
from engine.oom import describe_failure
from engine.ranks.executor import RankExecutor
from engine.ranks.protocol import RankReport, send_report, worker_loop
from engine.worker.build import load_draft
from engine.worker.sliding_limits import grouped
from engine.worker.worker import Worker
from kernels.ops import Ops
from kernels.reference_ops import REFERENCE
from models.config import ModelConfig
from models.decoder import DecoderModel
from models.files.rope_config import FULL, SLIDING
from models.loader import random_model
from parallel import shm
from parallel.channel import Disconnected, Link
from parallel.group import Group, RankFailure
from parallel.matrix_layer import AS_STORED, WeightChoice
from tests.support.model_weights import tensors_of
from tests.support.rig import CPU, ThreadGroup
from tests.support.tiny import TOKENS, write_tokenizer

PROCESS_MODEL = ModelConfig(
    vocab_size=321,
    hidden_size=24,
    intermediate_size=31,
    num_layers=2,
    num_heads=9,
    num_kv_heads=3,
    head_dim=8,
    max_position_embeddings=2048,
    eos_token_ids=(2,),
)
"""Model for ranks that are processes: odd sizes in the dimensions that ranks split, heads that two ranks share
unevenly."""

SERVED_MODEL = ModelConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=2048,
    eos_token_ids=(2,),
)
"""Model for servers whose ranks are killed: the vocabulary size is that of its tokenizer."""

DRAFT = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=512,
    eos_token_ids=(1,),
)
"""Draft model for tests.support.engines.TINY."""


class ThreadRanks:
    """Ranks 1 … size - 1 of an engine as threads of this process, connected through real links.

    workers: by rank, once the engine has started. plans: every frame sent to rank 1.
    """

    def __init__(
        self,
        config: ModelConfig,
        size: int,
        dtype: torch.dtype,
        share: bool = False,
        ops: Ops = REFERENCE,
        weights: WeightChoice = AS_STORED,
    ) -> None:
        """share: exchange tensors through shared memory, like rank processes on one machine."""
        self._share = share
        self._barriers: list[threading.Barrier] = []
        self._groups = self._new_groups(size)
        self._draft_groups: list[Group] = []
        self._config, self._dtype, self._ops, self._weights = config, dtype, ops, weights
        self.workers: dict[int, Worker] = {}
        self.plans: list[bytes] = []

    def model(self, rank: int) -> DecoderModel:
        return random_model(self._config, 0, self._dtype, CPU, self._groups[rank], self._ops, self._weights)

    def launch(self, config: EngineConfig, device: torch.device) -> RankExecutor:
        links = {}
        size = len(self._groups)
        count = config.speculation.draft_ranks(size)
        self._draft_groups = self._new_groups(count) if 0 < count < size else self._groups
        for rank in range(1, size):
            ours, theirs = socket.socketpair()
            links[rank] = Link(ours, 60)
            threading.Thread(target=self._live, args=(rank, Link(theirs), config), daemon=True).start()
        ranks = RankExecutor(links, timeout_s=60)
        ranks.group = self._groups[0]
        ranks._join_first = lambda count: self._draft_groups[0]
        return ranks

    def groups(self, rank: int) -> list[Group]:
        """Groups that this rank belongs to: all ranks, and the draft's ranks if it is one of them."""
        return [self._groups[rank], *self._draft_groups[rank : rank + 1]]

    def _new_groups(self, size: int) -> list[Group]:
        if self._share:
            memory = shm.create(size)
            try:
                return [shm.ShmGroup(memory, rank, size, timeout_s=60) for rank in range(size)]
            finally:
                os.close(memory)
        barrier, board = threading.Barrier(size, timeout=60), [torch.empty(0)] * size
        self._barriers.append(barrier)
        return [ThreadGroup(rank, barrier, board) for rank in range(size)]

    def _live(self, rank: int, link: Link, config: EngineConfig) -> None:
        try:
            assert config.cache.num_pages
            assert config.max_model_len
            model = self.model(rank)
            model = model.keeping_all_kv(grouped(config, model.config).keeps_all_kv)
            model = model.with_positions(config.max_model_len)
            draft_group = self._draft_groups[rank] if rank < len(self._draft_groups) else None
            self.workers[rank] = worker = Worker(
                model,
                config,
                num_pages=config.cache.num_pages,
                max_model_len=config.max_model_len,
                group=self._groups[rank],
                draft=load_draft(config, model, config.max_model_len, draft_group),
            )
            send_report(link, RankReport())
            send_report(link, RankReport())
            if rank == 1:
                receive = link.receive

                def recorded() -> bytes:
                    self.plans.append(receive())
                    return self.plans[-1]

                link.receive = recorded  # type: ignore[method-assign]
            worker_loop(link, worker.execute, lambda step: "its weights come from no directory")
        except (Disconnected, RankFailure):
            pass  # rank 0 has gone, or detects the same failure itself
        except Exception as error:
            for barrier in self._barriers:
                barrier.abort()  # otherwise the other ranks would wait for this one
            with contextlib.suppress(Disconnected):
                send_report(link, RankReport(failure=describe_failure(error)))
        finally:
            link.close()


def settings(gamma: int, **others: Any) -> dict[str, Any]:
    """Settings of a small engine whose draft KV budget is so small that drafts are often wrong."""
    return {
        "model": "random",
        "device": "cpu",
        "max_model_len": 256,
        "speculation": {"gamma": gamma, "kv": {"budget": 16, "sink": 4}},
        "cache": {"page_size": 4, "memory_gb": 0.05},
        "scheduler": {"max_rows": 16, "max_batch_tokens": 64},
        "check_invariants": True,
    } | others


def threaded_engine(
    config: ModelConfig,
    size: int,
    *,
    gamma: int,
    dtype: torch.dtype = torch.float64,
    share: bool = False,
    ops: Ops = REFERENCE,
    weights: WeightChoice = AS_STORED,
    **others: Any,
) -> tuple[Engine, ThreadRanks]:
    """Build an engine over a random model, with `size` - 1 threads as its other ranks. share: see ThreadRanks."""
    ranks = ThreadRanks(config, size, dtype, share, ops, weights)
    model = ranks.model(0) if size > 1 else random_model(config, 0, dtype, CPU, Group.single(), ops, weights)
    chosen = EngineConfig.model_validate(settings(gamma, tensor_parallel_size=size, **others))
    return Engine(chosen, model=model, ranks=ranks.launch), ranks


def write_random_model(directory: Path, config: ModelConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> Path:
    """Write a model directory with the weights of `random_model`, and a tokenizer if the vocabulary is large enough.
    Returns the directory."""
    if config.vocab_size >= TOKENS:
        write_tokenizer(directory)
    directory.mkdir(parents=True, exist_ok=True)
    model = random_model(config, seed, dtype, CPU, Group.single())
    tensors = {name: tensor.contiguous() for name, tensor in tensors_of(model).items()}
    save_file(tensors, directory / "model.safetensors")
    fields = {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "eos_token_id": list(config.eos_token_ids),
        "hidden_act": "silu",
    }
    if config.sliding_layers:
        kinds = [SLIDING if layer in config.sliding_layers else FULL for layer in range(config.num_layers)]
        fields |= {"sliding_window": config.sliding_window, "layer_types": kinds}
    (directory / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return directory
