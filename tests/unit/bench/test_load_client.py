"""bench serve: the client against a server that counts what its prefix cache finds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.serving.conversations import Conversation, UserTurn, conversations
from bench.serving.load import Item, Lengths, draw_mark, questions
from bench.serving.load_client import LoadClient, PrefixCounts, RequestRecord, Target, read_prefix_counts
from bench.serving.load_report import Summary, table

web = pytest.importorskip("aiohttp.web", reason="aiohttp is not installed")


class FakeServer:
    """A server whose answers name their number, and whose prefix cache finds half of each prompt.

    fail_at: number of the request that it refuses.
    """

    def __init__(self, fail_at: int = 0, details: bool = True) -> None:
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.fail_at, self.details = fail_at, details
        self.queries = self.hits = 0

    async def answer(self, request: Any) -> Any:
        body = await request.json()
        self.bodies.append((request.path, body))
        number = len(self.bodies)
        if number == self.fail_at:
            return web.json_response({"error": {"message": "full"}}, status=503)
        prompt = len(body["prompt"]) if "prompt" in body else sum(len(m["content"]) for m in body["messages"])
        self.queries += prompt
        self.hits += prompt // 2
        words = f"answer {number}"
        chat = {"delta": {"content": words}}
        usage = {"prompt_tokens": prompt, "completion_tokens": 2}
        if self.details:
            usage |= {"prompt_tokens_details": {"cached_tokens": prompt // 2}}  # type: ignore[dict-item]
        chunks: list[dict[str, Any]] = [
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [chat if "messages" in body else {"text": words}]},
            {"choices": [], "usage": usage},
        ]
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        for chunk in chunks:
            await stream.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await stream.write(b"data: [DONE]\n\n")
        return stream

    async def metrics(self, request: Any) -> Any:
        return web.Response(
            text=f"# TYPE vllm:prefix_cache_queries counter\n"
            f'vllm:prefix_cache_queries_total{{engine="0",model_name="m"}} {self.queries}.0\n'
            f'vllm:prefix_cache_queries_total{{engine="1",model_name="m"}} 1e3\n'
            f'vllm:prefix_cache_hits_total{{engine="0",model_name="m"}} {self.hits}.0\n'
            f'vllm:prefix_cache_hits_total{{engine="1",model_name="m"}} 100.0\n'
        )

    @asynccontextmanager
    async def serve(self, metrics: bool = True) -> AsyncIterator[Target]:
        application = web.Application()
        application.router.add_post("/v1/completions", self.answer)
        application.router.add_post("/v1/chat/completions", self.answer)
        if metrics:
            application.router.add_get("/metrics", self.metrics)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        try:
            yield Target(f"http://127.0.0.1:{runner.addresses[0][1]}", "m", timeout_s=30)
        finally:
            await runner.cleanup()


def talk(words: str, turns: int = 3) -> Conversation:
    return Conversation("be brief", [UserTurn(f"{words} {i}", 5, 0.0) for i in range(1, turns + 1)])


def run(
    server: FakeServer, work: Callable[[LoadClient], Coroutine[Any, Any, list[RequestRecord]]]
) -> list[RequestRecord]:
    async def go() -> list[RequestRecord]:
        async with server.serve() as target:
            return await work(LoadClient(target))

    return asyncio.run(go())


def test_every_turn_sends_the_whole_history() -> None:
    server = FakeServer()
    records = run(server, lambda client: client.at_concurrency([talk("hello")], 1))
    assert [record.turn for record in records] == [1, 2, 3]
    assert {record.fate for record in records} == {"answered"}
    assert [path for path, _ in server.bodies] == ["/v1/chat/completions"] * 3
    assert [message["content"] for message in server.bodies[2][1]["messages"]] == [
        "be brief",
        "hello 1",
        "answer 1",
        "hello 2",
        "answer 2",
        "hello 3",
    ]
    assert [message["role"] for message in server.bodies[1][1]["messages"]] == ["system", "user", "assistant", "user"]
    assert all(body["max_tokens"] == 5 and body["ignore_eos"] for _, body in server.bodies)
    assert all(len(record.chunks) == 1 for record in records)  # the role alone is no text
    assert [(record.prompt_tokens, record.cached_tokens) for record in records] == [(15, 7), (30, 15), (45, 22)]


def test_a_turn_without_an_answer_is_the_last() -> None:
    server = FakeServer(fail_at=2)
    records = run(server, lambda client: client.at_rate([talk("a"), talk("b")], 1000.0, "constant", 0))
    fates = sorted((record.turn, record.fate) for record in records)
    assert (1, "refused") in fates or (2, "refused") in fates
    assert len(server.bodies) == len(records) < 6
    assert sum(fate == "refused" for _, fate in fates) == 1


def test_a_user_thinks() -> None:
    turns = [UserTurn("a", 2, 0.0), UserTurn("b", 2, 0.05)]
    first, second = run(FakeServer(), lambda client: client.at_concurrency([Conversation("", turns)], 1))
    assert second.due == pytest.approx(first.ended + 0.05)
    assert second.sent >= second.due


def test_what_the_metrics_say() -> None:
    async def counts(server: FakeServer, metrics: bool) -> PrefixCounts | None:
        async with server.serve(metrics) as target:
            await LoadClient(target).at_concurrency([Item([1] * 40, 2)], 1)
            return await read_prefix_counts(target)

    assert asyncio.run(counts(FakeServer(), True)) == PrefixCounts(1040.0, 120.0)
    assert asyncio.run(counts(FakeServer(), False)) is None


def test_a_summary_of_turns() -> None:
    jobs = [talk("a"), talk("b"), Conversation("", [UserTurn("c", 2, 0.0)])]
    records = run(FakeServer(), lambda client: client.at_concurrency(jobs, 3))
    found = Summary.from_records(records, 3.0, True, "as-is", None, hit_rate=0.25)
    assert [(turn.turn, turn.requests) for turn in found.turns] == [(1, 3), (2, 2), (3, 2)]
    assert found.hit_rate == 0.25
    assert found.cached == pytest.approx(0.48, abs=0.03)
    assert found.turns[2].prompt_tokens == 8 + 3 * 3 + 2 * 8
    assert found.turns[2].cached_tokens == 16
    assert 0 < found.turns[0].ttft_ms["p50"] <= found.turns[0].ttft_ms["p90"]
    assert [line.turn for line in found.requests] == [1, 2, 3, 1, 2, 3, 1]
    assert all(line.ttft_ms and line.fate == "answered" for line in found.requests)
    text = table([found])
    assert "25.0 %" in text
    assert text.count("as-is") == 1 + 3
    silent = run(FakeServer(details=False), lambda client: client.at_concurrency(jobs, 3))
    other = Summary.from_records(silent, 3.0, True, "as-is", None)
    assert (other.hit_rate, other.cached, other.turns[0].cached_tokens) == (None, None, None)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 20), st.integers(1, 3), st.integers(0, 9))
def test_conversations(count: int, turns: int, shared: int, groups: int, seed: int) -> None:
    lengths = Lengths.parse("uniform:3:9"), Lengths.parse("uniform:2:4")

    def draw() -> list[Conversation]:
        return conversations(
            range(100, 200),
            lambda ids: " ".join(map(str, ids)),
            count,
            turns,
            *lengths,
            think_s=2.0,
            shared=shared,
            groups=groups,
            seed=seed,
        )

    found = draw()
    assert found == draw()
    assert [len(each.turns) for each in found] == [turns] * count
    for each, other in zip(found, found[groups:], strict=False):
        assert each.system == other.system
    for each in found:
        assert len(each.system.split()) == shared
        assert all(3 <= len(turn.text.split()) <= 9 and turn.output in (2, 3, 4) for turn in each.turns)
        assert (each.turns[0].pause_s, all(turn.pause_s > 0 for turn in each.turns[1:])) == (0.0, True)


def test_marks_change_the_beginning_alone() -> None:
    assert Item([1, 2, 3, 4, 5, 6], 2).marked([7, 8, 9, 10]) == Item([7, 8, 9, 10, 5, 6], 2)
    assert Item([1, 2], 2).marked([7, 8, 9, 10]) == Item([7, 8], 2)
    assert talk("a").marked([7, 8]).system == "7 8: be brief"
    bare = Conversation("", talk("a").turns).marked([7, 8])
    assert [turn.text for turn in bare.turns] == ["7 8: a 1", "a 2", "a 3"]
    tokens = list(range(1000))
    assert len({tuple(draw_mark(tokens)) for _ in range(20)}) == 20


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_questions(documents: int, each: int, seed: int) -> None:
    lengths = Lengths.parse("20"), Lengths.parse("uniform:3:9"), Lengths.parse("4")
    found = questions(range(500), documents, each, *lengths, seed=seed)
    assert found == questions(range(500), documents, each, *lengths, seed=seed)
    begins = [tuple(item.prompt[:20]) for item in found]
    assert len(found) == documents * each
    assert all(begins.count(begin) % each == 0 for begin in begins)
    assert all(23 <= len(item.prompt) <= 29 and item.output == 4 for item in found)
    if documents == 4 and each == 5 and seed < 5:
        assert len(set(begins[:5])) > 1  # in random order
