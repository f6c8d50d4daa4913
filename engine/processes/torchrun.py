"""Run the engine on any number of hosts: `torchrun … -m engine.processes.torchrun --config FILE`.

Every process reads the settings; those of rank 0 apply. Rank 0 is the engine process: it waits for the others, and
serves API processes on its host through sockets in a directory. torchrun restarts all of them when one fails.

Each process ends on SIGTERM, on SIGINT, and when its torchrun agent ends.
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
from engine.processes.rank import exit_now, run_rank
from engine.ranks.executor import RankExecutor
from engine.ranks.protocol import RankReport, send_report
from engine.worker.resolve import resolve
from kernels.cpu.cpus import usable_cores
from parallel import tcp_bootstrap
from parallel.channel import Disconnected, Link
from parallel.group import CollectiveError
from parallel.torchrun_env import TorchrunEnv, TorchrunEnvError, read_torchrun_env

_AGENT_CHECK_S = 1.0

log = logging.getLogger(__name__)


def main(arguments: Sequence[str]) -> int:
    """Run as the rank that the environment names. Returns the exit status; threads of a broken group may remain."""
    parser = argparse.ArgumentParser(prog="torchrun … -m engine.processes.torchrun", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of settings, as for `magicdec serve`")
    parser.add_argument(
        "--socket",
        type=Path,
        default=default_directory(),
        help="directory for rank 0's sockets, the value of `magicdec serve --engine` (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        env = read_torchrun_env(os.environ)
        config = load_config(options.config, {})
        settings = _settings(config.engine, env)
        if env.rank == 0:
            claim(options.socket)
    except (TorchrunEnvError, ConfigError, EndpointError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    set_up(config.server.log_level, config.server.log_format)
    return _run_rank_0(settings, env, options.socket) if env.rank == 0 else _run_other_rank(settings, env)


def _settings(config: EngineConfig, env: TorchrunEnv) -> EngineConfig:
    if config.tensor_parallel_size not in (1, env.size):
        raise ConfigError(
            f"engine.tensor_parallel_size: {config.tensor_parallel_size}, but torchrun has started {env.size} ranks; "
            "leave it out"
        )
    # torchrun limits OpenMP to one thread, however many cores the machine has.
    threads = config.threads or max(1, usable_cores() // env.local_size)
    return config.model_copy(update={"tensor_parallel_size": env.size, "threads": threads})


def _run_rank_0(config: EngineConfig, env: TorchrunEnv, directory: Path) -> int:
    parent_fd, held = os.pipe()
    _on_stop(lambda: os.close(held))
    ranks = functools.partial(_connect_ranks, env=env)
    log.info("rank 0 of %d; `magicdec serve --engine %s` on this host attaches to it", env.size, directory)
    return engine_server.serve(
        lambda compiling: Engine(config, ranks=ranks, compiling=compiling, progress=sys.stderr.isatty()),
        directory,
        parent_fd,
        has_no_parent=True,
    )


def _connect_ranks(config: EngineConfig, device: torch.device, env: TorchrunEnv) -> RankExecutor:
    """Connect to the other ranks, for Engine. Raises RankFailure, CollectiveError."""
    address = env.address()
    connections = tcp_bootstrap.accept_ranks(
        env.store(config.start_timeout_s),
        address,
        env.size,
        timeout_s=config.start_timeout_s,
        link_timeout_s=config.step_timeout_s,
    )
    return RankExecutor.connect(config, device, connections, one_machine=env.one_host, address=address)


def _run_other_rank(config: EngineConfig, env: TorchrunEnv) -> int:
    link: Link | None = None

    def end() -> None:
        if link is not None:
            with contextlib.suppress(Disconnected):
                send_report(link, RankReport(failure="got a signal to end", lost=True, signalled=True))
        os._exit(1)

    _on_stop(end)
    _compile_kernels(config, env)
    try:
        link, store = tcp_bootstrap.connect(
            env.store(config.start_timeout_s),
            env.rank,
            timeout_s=config.start_timeout_s,
            link_timeout_s=config.step_timeout_s,
        )
        address = env.address()
    except CollectiveError as error:
        log.error("rank %d: %s", env.rank, error)
        return 1
    link.exit_with_peer()
    return run_rank(link, local_rank=env.local_rank, store=store, address=address)


def _compile_kernels(config: EngineConfig, env: TorchrunEnv) -> None:
    """Compile the kernels of this rank's GPU that this host lacks: it may take longer than a start, so it comes before
    ranks wait for each other. What fails here fails again once rank 0 can be told."""
    if config.device == "cpu" or env.local_rank >= torch.cuda.device_count():
        return
    torch.cuda.set_device(env.local_rank)
    with contextlib.suppress(ValueError):
        resolve(config, None, sizes_pool=False)


def _on_stop(act: Callable[[], None]) -> None:
    """Call `act`, once and from a thread, on SIGTERM or SIGINT or when the parent is gone. A signal handler is not
    enough: Python runs it only while no library call blocks the main thread."""
    stop, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(wakeup)  # the system writes to it at once
    parent = os.getppid()

    def wait() -> None:
        while os.getppid() == parent and not select.select([stop], [], [], _AGENT_CHECK_S)[0]:
            pass
        act()

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    exit_now(main(sys.argv[1:]))
