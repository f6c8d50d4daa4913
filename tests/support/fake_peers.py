"""Contenders of a comparison as real processes, of a fake program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.machine import CpuQuota
from bench.peers.contenders import Peer
from bench.peers.lineup import Start
from bench.peers.process import PeerProcess


@contextmanager
def fake_peers(source: str, folder: Path) -> Iterator[Start]:
    """Yield a function that starts a contender whose program is `source`, with its log in `folder`."""
    program = folder / "peer.py"
    program.write_text(source)
    with ExitStack() as stack:

        def start(contender: Peer) -> PeerProcess:
            settings = {"threads": 1, "row_tokens": 4000, "options": dict(contender.options), "modes": contender.modes}
            log = folder / f"{contender.name}.log"
            quota = stack.enter_context(CpuQuota(0.5)) if contender.options.get("quota") else None
            process = PeerProcess(Path(sys.executable), program, settings, log=log, timeout_s=60, quota=quota)
            stack.callback(process.close)
            return process

        yield start
