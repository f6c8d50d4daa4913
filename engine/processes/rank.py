"""The process of one rank, but 0: as a program (`python -m engine.processes.rank`) one of those that engine.ranks.executor starts, whose
standard input is its connection to rank 0. Those that torchrun starts are engine.processes.torchrun."""

from __future__ import annotations

import logging
import os
import signal
import sys

import msgspec
import torch
from torch._C._distributed_c10d import Store

from engine.config.deployment import ConfigError, EngineConfig
from engine.logs import set_up
from engine.oom import what_failed
from engine.ranks.protocol import Launch, Report, answer, follow
from engine.worker.build import load_draft
from engine.worker.kv_memory import fit_pages
from engine.worker.loading import load_shard
from engine.worker.resolve import size_up
from engine.worker.worker import Worker
from parallel import rendezvous
from parallel.channel import Disconnected, Link
from parallel.group import CollectiveError, Group

log = logging.getLogger(__name__)


def main() -> int:
    """Be a rank until rank 0 is gone. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return live(Link.of_stdin())


def live(
    link: Link, *, local_rank: int | None = None, store: Store | None = None, address: str = rendezvous.LOOPBACK
) -> int:
    """Be the rank that rank 0, at the other end of the link, says. Returns the exit status once rank 0 is gone.

    local_rank: among those on this machine; None: all are. store, address: see rendezvous.join.
    """
    try:
        launch = msgspec.msgpack.decode(link.receive(), type=Launch)
        set_up(launch.log_level, launch.log_format, f"rank {launch.join.rank}")
        answer(link, Report())
        config = EngineConfig.model_validate_json(link.receive())
        device = _device(config, launch.join.rank if local_rank is None else local_rank)
        group = rendezvous.join(launch.join, device, store, address)
        count = config.speculation.draft_ranks(group.size)
        draft_group: Group | None = group
        if 0 < count < group.size:
            draft_group = rendezvous.join_first(count, launch.join, device, store, address)
        worker = _load(config, device, group, draft_group)
        answer(link, Report(weight_bytes=worker.weight_bytes))
        follow(link, worker.execute)
    except Disconnected:
        return 1
    except Exception as error:
        lost = isinstance(error, CollectiveError)
        if not lost:
            log.exception("this rank fails")
        answer(link, Report(failure=what_failed(error), lost=lost))
        return 1


def _device(config: EngineConfig, local_rank: int) -> torch.device:
    """What this rank computes on, ready for use. config: with every setting resolved."""
    if config.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"{torch.cuda.device_count()} CUDA devices are visible, rank {local_rank} has none")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return torch.device(config.device)


def _load(config: EngineConfig, device: torch.device, group: Group, draft_group: Group | None) -> Worker:
    """draft_group: the ranks that share the draft model, if this is one of them."""
    sizes = size_up(config, None)
    model = load_shard(config, sizes, device, group, progress=False)
    draft = load_draft(config, model, sizes.max_model_len, draft_group)
    num_pages = fit_pages(config, sizes, model, group)
    return Worker(model, config, num_pages=num_pages, max_model_len=sizes.max_model_len, group=group, draft=draft)


def leave(status: int) -> None:
    """End this process at once, without waiting for the threads of a broken group."""
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
