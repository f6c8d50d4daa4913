"""The engine over processes that torchrun starts, on any number of hosts: `torchrun … -m engine.processes.torchrun --config F`.

Every process reads the settings; those of rank 0 hold. Rank 0 is the engine process: it waits for the others, and
serves API processes on its host through sockets in a directory. torchrun starts all of them again when one fails.

SIGTERM and SIGINT end any of them, and so does the end of the torchrun agent that started it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from engine.config.deployment import ConfigError, EngineConfig, load_config
from engine.core import Engine
from engine.logs import set_up
from engine.processes import engine_server
from engine.processes.endpoint import EndpointError, claim, default_directory
from engine.processes.rank import leave, live
from engine.ranks.executor import Ranks
from engine.ranks.protocol import Report, answer
from parallel import meeting
from parallel.channel import Disconnected, Link
from parallel.elastic import ElasticError, Place, read_place
from parallel.group import CollectiveError

_AGENT_CHECK_S = 1.0

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Be the rank that the environment says. Returns the exit status; threads of a broken group may be left."""
    parser = argparse.ArgumentParser(prog="torchrun … -m engine.processes.torchrun", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of settings, as of `magicdec serve`")
    parser.add_argument(
        "--socket",
        type=Path,
        default=default_directory(),
        help="directory for rank 0's sockets, which `magicdec serve --engine` is given (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        place = read_place(os.environ)
        config = load_config(options.config, {})
        settings = _settings(config.engine, place)
        if place.rank == 0:
            claim(options.socket)
    except (ElasticError, ConfigError, EndpointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    set_up(config.server.log_level, config.server.log_format)
    return _lead(settings, place, options.socket) if place.rank == 0 else _follow(settings, place)


def _settings(config: EngineConfig, place: Place) -> EngineConfig:
    if config.tensor_parallel_size not in (1, place.size):
        raise ConfigError(
            f"engine.tensor_parallel_size: {config.tensor_parallel_size}, but torchrun has started {place.size} ranks; "
            "leave it out"
        )
    # torchrun tells OpenMP to use one thread, whatever the machine has.
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // place.local_size)
    return config.model_copy(update={"tensor_parallel_size": place.size, "threads": threads})


def _lead(config: EngineConfig, place: Place, directory: Path) -> int:
    leash, held = os.pipe()
    _when_told(lambda: os.close(held))
    ranks = functools.partial(_gather, place=place)
    log.info("rank 0 of %d; `magicdec serve --engine %s` on this host attaches to it", place.size, directory)
    return engine_server.serve(
        lambda: Engine(config, ranks=ranks, progress=sys.stderr.isatty()), directory, leash, alone=True
    )


def _gather(config: EngineConfig, device: torch.device, place: Place) -> Ranks:
    """Engine's way to its ranks. Raises RankFailure, CollectiveError."""
    address = place.address()
    guests = meeting.receive(
        place.store(config.start_timeout_s),
        address,
        place.size,
        timeout_s=config.start_timeout_s,
        link_timeout_s=config.step_timeout_s,
    )
    return Ranks.meet(config, device, guests, one_machine=place.one_host, address=address)


def _follow(config: EngineConfig, place: Place) -> int:
    link: Link | None = None

    def end() -> None:
        if link is not None:
            with contextlib.suppress(Disconnected):
                answer(link, Report(failure="was told to end", lost=True, told=True))
        os._exit(1)

    _when_told(end)
    try:
        link, store = meeting.visit(
            place.store(config.start_timeout_s),
            place.rank,
            timeout_s=config.start_timeout_s,
            link_timeout_s=config.step_timeout_s,
        )
        address = place.address()
    except CollectiveError as error:
        log.error("rank %d: %s", place.rank, error)
        return 1
    link.end_together()
    return live(link, local_rank=place.local_rank, store=store, address=address)


def _when_told(act: Callable[[], None]) -> None:
    """Call `act`, once and from a thread, on SIGTERM or SIGINT or when the parent is gone, whatever this process is
    busy with: Python runs handlers of signals only when no library call holds its main thread."""
    told, teller = os.pipe()
    os.set_blocking(teller, False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(teller)  # written to at once
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent and not select.select([told], [], [], _AGENT_CHECK_S)[0]:
            pass
        act()

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
