"""The program that runs every contender: loads one model, then answers JSON lines. Standard library only.

    python -P driver.py PEER.py SETTINGS        -P: files beside this one have the names of the packages they import

SETTINGS is a JSON object. `model`: directory. `threads`: number of threads; null: the contender chooses. `rows`:
largest number of rows at once. `row_tokens`: largest number of tokens of a row. `kv_bytes`: KV bytes of the largest
batch. `seed`: of sampling. `keep_prompts`: whether `again` will be asked for. `options`: settings of this contender.
The first output line is {"ready": {...}}; then one line answers each request:

    {"op": "start", "prompts": [[ids]], "limit": n, "temperature": t}          {"first_token_s", "tokens"}
    {"op": "again", "limit": n, "temperature": t}                              {"first_token_s", "tokens"}
    {"op": "decode", "new_tokens": n}                                          {"decode_s", "rounds", "tokens"}
    {"op": "stop"}                                                             {}
    {"op": "complete", "prompts": [[ids]], "new_tokens": n, "temperature": t}  {"first_token_s", "decode_s", "total_s",
                                                                                "tokens"}
    {"op": "turn", "prompt": [ids], "new_tokens": n, "room": n, "temperature": t}
                                                                               {"first_token_s", "decode_s", "tokens"}

`start` prefills until every row has its first token. `again` begins the same rows anew, with the KV of their prompts
that is there already: contenders that cannot keep it compute it again. `decode` continues until rows have n new tokens
each on average; `rounds`: steps that brought them. `complete` generates exactly n tokens per row, as a server does.
`turn` does so for one row and keeps memory, and with it what the contender knows of this prompt, for the next `turn`;
`room`: tokens of the longest one and its answer. `temperature`: of sampling, without truncation; 0: greedy. `tokens`
are the new tokens of this request, by row. Seconds cover the steps only, not the allocation and release of memory. A
failed request is answered by {"error": "..."}; the next `start` or `complete` begins afresh, and so does a `turn` after
`stop`. Where `modes` of the settings lists several, requests to magicdec have the `mode` that it drafts in.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any, Protocol


class Peer(Protocol):
    """Interface of a contender; its file defines it as `Peer(settings)`. It ignores end-of-text tokens."""

    max_batch: int | None
    """Largest number of rows at once; None: `rows` of the settings."""
    about: str
    """Version and weights, for the report."""
    mode: str
    """See above; set only where the settings' `modes` list several."""

    def prepare(self, rows: int, row_tokens: int, temperature: float) -> None:
        """Allocate memory for `rows` rows of `row_tokens` tokens each, all sampled at `temperature`."""

    def start(self, prompts: Sequence[Sequence[int]], limit: int, *, together: bool) -> None:
        """Queue one request per prompt, of at most `limit` new tokens each, without computing anything. The rows
        before them, if any, have ended.

        together: rows that finish prefill early should not get far ahead of the others.
        """

    def again(self, limit: int, temperature: float) -> None:
        """Drop the rows of `start`, and queue the same prompts, to be sampled at `temperature`, with what it keeps of
        their KV."""

    def step(self) -> Sequence[tuple[int, Sequence[int]]]:
        """Run one step of all rows, or a part of prefill. Returns (row, new tokens) of rows that got tokens: several
        tokens of a row whose drafts were accepted."""

    def stop(self) -> None:
        """Drop all rows and free their memory. It may be called without rows, and after a failed step."""


class Driver:
    """Request handler that steps a peer."""

    def __init__(self, peer: Peer, row_tokens: int) -> None:
        self._peer, self._row_tokens = peer, row_tokens
        self._left: list[int] = []  # by row, tokens it may still generate
        self._chatting = False

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Answer one request. Raises ValueError for a bad request, and whatever the peer raises."""
        op = request["op"]
        if "mode" in request:
            self._peer.mode = request["mode"]
        if op == "start":
            first_s, tokens = self._start(request["prompts"], request["limit"], request["temperature"], together=True)
            return {"first_token_s": first_s, "tokens": tokens}
        if op == "again":
            first_s, tokens = self._again(request["limit"], request["temperature"])
            return {"first_token_s": first_s, "tokens": tokens}
        if op == "decode":
            return self._decode(request["new_tokens"])
        if op == "complete":
            return self._complete(request["prompts"], request["new_tokens"], request["temperature"])
        if op == "turn":
            return self._turn(request["prompt"], request["new_tokens"], request["room"], request["temperature"])
        if op == "stop":
            self._stop()
            return {}
        raise ValueError(f"unknown op {op!r}")

    def _start(
        self, prompts: list[list[int]], limit: int, temperature: float, *, together: bool
    ) -> tuple[float, list[list[int]]]:
        self._stop()
        rows = len(prompts)
        if self._peer.max_batch is not None and rows > self._peer.max_batch:
            raise ValueError(f"{rows} rows, but it takes {self._peer.max_batch} at most")
        self._peer.prepare(rows, min(self._row_tokens, max(map(len, prompts)) + limit), temperature)
        self._left = [limit] * rows
        began = perf_counter()
        self._peer.start(prompts, limit, together=together)
        tokens = self._first_tokens()
        return perf_counter() - began, tokens

    def _again(self, limit: int, temperature: float) -> tuple[float, list[list[int]]]:
        if not self._left:
            raise ValueError("nothing was started")
        self._left = [limit] * len(self._left)
        began = perf_counter()
        self._peer.again(limit, temperature)
        tokens = self._first_tokens()
        return perf_counter() - began, tokens

    def _first_tokens(self) -> list[list[int]]:
        """Step until every row has a token."""
        tokens: list[list[int]] = [[] for _ in self._left]
        while not all(tokens):
            self._step(tokens)
        return tokens

    def _decode(self, new_tokens: int) -> dict[str, Any]:
        rows = len(self._left)
        if not rows:
            raise ValueError("nothing was started")
        tokens: list[list[int]] = [[] for _ in range(rows)]
        rounds, began = 0, perf_counter()
        while sum(map(len, tokens)) < new_tokens * rows:
            rounds += self._step(tokens)
        seconds = perf_counter() - began
        if min(self._left) <= 0:
            raise ValueError("a row reached its limit, and the rest was a smaller batch: ask for fewer tokens")
        return {"decode_s": seconds, "rounds": rounds, "tokens": tokens}

    def _complete(self, prompts: list[list[int]], new_tokens: int, temperature: float) -> dict[str, Any]:
        first_s, tokens = self._start(prompts, new_tokens, temperature, together=False)
        began = perf_counter()
        while min(map(len, tokens)) < new_tokens:
            self._step(tokens)
        decode_s = perf_counter() - began
        self._stop()
        return {"first_token_s": first_s, "decode_s": decode_s, "total_s": first_s + decode_s, "tokens": tokens}

    def _turn(self, prompt: list[int], new_tokens: int, room: int, temperature: float) -> dict[str, Any]:
        if not self._chatting:
            self._stop()
            self._peer.prepare(1, min(self._row_tokens, room), temperature)
            self._chatting = True
        self._left = [new_tokens]
        tokens: list[list[int]] = [[]]
        began = perf_counter()
        self._peer.start([prompt], new_tokens, together=False)
        while not tokens[0]:
            self._step(tokens)
        first_s = perf_counter() - began
        while len(tokens[0]) < new_tokens:
            self._step(tokens)
        return {"first_token_s": first_s, "decode_s": perf_counter() - began - first_s, "tokens": tokens}

    def _step(self, tokens: list[list[int]]) -> bool:
        """Run one step. Returns whether a row got tokens."""
        yielded = self._peer.step()
        for row, new in yielded:
            tokens[row] += new
            self._left[row] -= len(new)
        return any(new for _, new in yielded)

    def _stop(self) -> None:
        self._left, self._chatting = [], False
        self._peer.stop()


def load_peer(path: str, settings: dict[str, Any]) -> Peer:
    """Import the file at `path` and create its `Peer`."""
    spec = importlib.util.spec_from_file_location("peer", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    peer: Peer = module.Peer(settings)
    return peer


def main(path: str, settings: dict[str, Any]) -> None:
    # Packages may write to standard output: redirect it to standard error, and keep a separate descriptor for
    # answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        peer = load_peer(path, settings)
    except Exception as error:
        say({"error": _words(error)})
        raise
    driver = Driver(peer, settings["row_tokens"])
    say({"ready": {"max_batch": peer.max_batch, "about": peer.about}})
    for line in sys.stdin:
        try:
            answer = driver.answer(json.loads(line))
        except Exception as error:
            answer = {"error": _words(error)}
        say(answer)


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
