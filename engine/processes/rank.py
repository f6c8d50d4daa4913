"""Ranks 1 … N - 1. Rank 0 starts them through start_rank.py, torchrun through torchrun.py."""

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
from engine.oom import describe_failure
from engine.ranks.protocol import RankLaunch, RankReport, send_report, worker_loop
from engine.worker.resolve import resolve
from engine.worker.worker_owner import WorkerOwner
from parallel import rendezvous
from parallel.channel import Disconnected, Link
from parallel.group import CollectiveError, Group

log = logging.getLogger(__name__)


def main() -> int:
    """Run as the rank whose link to rank 0 is the standard input, until rank 0 is gone. Returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return run_rank(Link.from_stdin())


def run_rank(
    link: Link, *, local_rank: int | None = None, store: Store | None = None, address: str = rendezvous.LOOPBACK
) -> int:
    """Run as the rank that rank 0 assigns over `link`. Returns the exit status once rank 0 is gone.

    local_rank: this rank's index among those on this machine; None: all ranks are on it. store, address: see
    rendezvous.join.
    """
    try:
        launch = msgspec.msgpack.decode(link.receive(), type=RankLaunch)
        set_up(launch.log_level, launch.log_format, f"rank {launch.join.rank}")
        send_report(link, RankReport())
        config = EngineConfig.model_validate_json(link.receive())
        device = _device(config, launch.join.rank if local_rank is None else local_rank)
        group = rendezvous.join(launch.join, device, store, address)
        count = config.speculation.draft_ranks(group.size)
        draft_group: Group | None = group
        if 0 < count < group.size:
            draft_group = rendezvous.join_first(count, launch.join, device, store, address)
        owner = WorkerOwner(config, resolve(config, None), device, group, draft_group)
        send_report(link, RankReport(weight_bytes=owner.worker.weight_bytes))
        worker_loop(link, lambda plan: owner.worker.execute(plan), owner.perform)
    except Disconnected:
        return 1
    except Exception as error:
        lost = isinstance(error, CollectiveError)
        if not lost:
            log.exception("this rank fails")
        send_report(link, RankReport(failure=describe_failure(error), lost=lost))
        return 1


def _device(config: EngineConfig, local_rank: int) -> torch.device:
    """Select and prepare this rank's device. config: with every setting resolved."""
    if config.device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"{torch.cuda.device_count()} CUDA devices are visible, rank {local_rank} has none")
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return torch.device(config.device)


def exit_now(status: int) -> None:
    """End this process at once, without waiting for the threads of a broken group."""
    sys.stderr.flush()
    os._exit(status)
