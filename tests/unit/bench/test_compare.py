"""bench.peers.compare over fake contenders: the protocol between real processes, turns, failures and the table."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.corpus import BenchError
from bench.machine import CpuQuota
from bench.peers.compare import run
from bench.peers.compare_plan import ChatShape, Plan, parse_points, parse_temperatures
from bench.peers.compare_report import table
from bench.peers.contenders import Peer, choose, variant
from bench.peers.install import PeerError, environment, requirements
from bench.peers.lineup import Start
from bench.peers.measure import same_tokens
from bench.peers.process import PeerProcess
from tests.support.engines import TINY
from tests.support.fake_peers import fake_peers

COUNTS = '''
class Peer:
    """Row r's tokens are r, r + 1, r + 2 …; a prompt that begins with 13 is bad luck."""

    def __init__(self, settings):
        print("packages write here as they like")
        if settings["options"].get("broken"):
            raise ValueError("cannot load\\nin detail")
        self.max_batch = settings["options"].get("max_batch")
        self.about = "counts"
        if settings["options"].get("quota"):
            self.about = open("/proc/self/cgroup").read()
        self.step_of = settings["options"].get("step", 1)
        self.rows = []

    def prepare(self, rows, row_tokens, temperature):
        print("room", row_tokens, "temperature", temperature)

    def start(self, prompts, limit, *, together):
        if prompts[0][0] == 13:
            raise RuntimeError("bad luck")
        self.rows = [[row, 0, limit] for row in range(len(prompts))]

    def again(self, limit, temperature):
        print("temperature", temperature)
        self.rows = [[row, 0, limit] for row in range(len(self.rows))]

    def step(self):
        if self.rows and self.rows[0][2] == 999:
            raise SystemExit(3)
        yielded = []
        for row in self.rows:
            new = list(range(row[0] + row[1], row[0] + row[1] + self.step_of))[: row[2] - row[1]]
            row[1] += len(new)
            if new:
                yielded.append((row[0], new))
        return yielded

    def stop(self):
        self.rows = []
'''


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a fake contender, whose output is consecutive numbers."""
    with fake_peers(COUNTS, tmp_path) as start_one:
        yield start_one


def test_one_contender(start: Start) -> None:
    peer = start(Peer("one", "fake", {"step": 2}))
    assert (peer.about, peer.max_batch) == ("counts", None)
    answer = peer.ask("start", prompts=[[1], [1]], limit=100, temperature=0)
    assert answer["tokens"] == [[0, 1], [1, 2]]
    answer = peer.ask("decode", new_tokens=3)
    assert answer["tokens"] == [[2, 3, 4, 5], [3, 4, 5, 6]]
    assert answer["decode_s"] > 0
    assert answer["rounds"] == 2
    whole = peer.ask("complete", prompts=[[1]], new_tokens=5, temperature=0)
    assert whole["tokens"] == [[0, 1, 2, 3, 4]]
    assert whole["total_s"] == whole["first_token_s"] + whole["decode_s"]


def test_what_goes_wrong_is_said_and_the_next_request_starts_afresh(start: Start) -> None:
    peer = start(Peer("one", "fake"))
    with pytest.raises(PeerError, match="bad luck"):
        peer.ask("start", prompts=[[13]], limit=10, temperature=0)
    with pytest.raises(PeerError, match="unknown op"):
        peer.ask("dance")
    peer.ask("start", prompts=[[1]], limit=3, temperature=0)
    with pytest.raises(PeerError, match="reached its limit"):
        peer.ask("decode", new_tokens=2)
    assert peer.ask("complete", prompts=[[1]], new_tokens=2, temperature=0)["tokens"] == [[0, 1]]
    assert not peer.ended


def test_a_contender_that_ends(start: Start) -> None:
    peer = start(Peer("one", "fake"))
    with pytest.raises(PeerError, match="it ended"):
        peer.ask("start", prompts=[[1]], limit=999, temperature=0)
    assert peer.ended


def test_one_run(start: Start) -> None:
    """All points and turns are measured. A contender that fails to load, or takes fewer rows, is reported with the
    reason."""
    contenders = [
        Peer("counts", "fake", {"step": 2}),
        Peer("broken", "fake", {"broken": True}),
        Peer("alone", "fake", {"max_batch": 1}),
    ]
    plan = Plan([(1, 20), (2, 20)], first=7, warm_up=1, new_tokens=3, rounds=2, totals=1)
    said: list[str] = []
    settings = {"threads": 1, "row_tokens": 4000}
    report = run(contenders, start, plan, lambda count, length, shared: [[1] * length] * count, settings, said.append)
    counts, broken, alone = report.contenders
    assert (counts.error, counts.same) == (None, 1.0)
    assert broken.error == "ValueError: cannot load"
    assert alone.error is None
    single, single_alone, double, double_alone = report.points
    for point in (single, single_alone, double):
        assert len(point.step_ms) == 2
        assert min(point.step_ms) > 0
        assert point.round_tokens == [2 if point.contender == "counts" else 1] * 2
        assert (len(point.total_s), point.same, point.error) == (1, 1.0, None)
    assert (double_alone.step_ms, double_alone.error) == ([], "takes 1 row at most")
    assert [first.context for first in report.firsts] == [7, 7]
    text = table(report)
    assert "(ValueError: cannot load)" in text
    assert "(takes 1 row at most)" in text
    assert "time to the first token of 7" in text


def test_steps_of_several_tokens_are_counted(start: Start) -> None:
    """A contender with three tokens per step needs a third of the steps, and its time is per token."""
    plan = Plan([(2, 20)], first=0, warm_up=1, new_tokens=6, rounds=1, totals=1)
    settings = {"threads": 1, "row_tokens": 4000}
    contenders = [Peer("one", "fake"), Peer("three", "fake", {"step": 3})]
    report = run(
        contenders, start, plan, lambda count, length, shared: [[1] * length] * count, settings, lambda line: None
    )
    assert [point.same for point in report.points] == [1.0, 1.0]
    peer = start(Peer("again", "fake", {"step": 3}))
    peer.ask("start", prompts=[[1], [1]], limit=100, temperature=0)
    assert [len(row) for row in peer.ask("decode", new_tokens=6)["tokens"]] == [6, 6]
    assert [len(row) for row in peer.ask("decode", new_tokens=4)["tokens"]] == [6, 6]


def recorded(start: Start, asked: list[tuple[str, float | None]]) -> Start:
    """Return `start` with requests recorded, and their temperatures."""

    def start_recorded(contender: Peer) -> PeerProcess:
        process = start(contender)
        ask = process.ask

        def ask_recorded(op: str, **fields: Any) -> dict[str, Any]:
            asked.append((op, fields.get("temperature")))
            return ask(op, **fields)

        process.ask = ask_recorded  # type: ignore[method-assign]
        return process

    return start_recorded


def test_greedy_beside_sampled(start: Start) -> None:
    """Each point has both temperatures; tokens are compared at 0 only. Texts that do not repeat themselves say so."""
    plan = Plan([(1, 20), (2, 10)], first=5, warm_up=0, new_tokens=9, rounds=1, totals=1, temperatures=(0, 0.5), busy=1)
    settings = {"threads": 1, "row_tokens": 4000}
    asked: list[tuple[str, float | None]] = []
    cut = lambda n, length, shared: [[1] * length] * n  # noqa: E731
    report = run([Peer("x", "fake")], recorded(start, asked), plan, cut, settings, lambda line: None)
    of_point = [("start", 0), ("start", 0.5), ("complete", 0), ("complete", 0.5)]
    assert [each for each in asked if each[1] is not None] == [("complete", 0), *of_point, *of_point, ("complete", 0)]
    assert report.contenders[0].same == 1
    found = [(at.batch, at.temperature, at.same, at.repeated) for at in report.points]
    assert found == [(1, 0, 1, 0), (1, 0.5, None, 0), (2, 0, 1, 0), (2, 0.5, None, 0)]
    assert report.prompts_repeated == 1 - 3 / (13 + 2 * 3)
    text = table(report)
    rows = [line.split() for line in text.splitlines() if line.startswith("x ")]
    assert [row[1:4] for row in rows[:4]] == [[*place, t] for place in (["1", "20"], ["2", "10"]) for t in ("0", "0.5")]
    assert [row[8] for row in rows[:4]] == ["1.00"] * 4
    assert "temperatures 0 (greedy), 0.5;" in text
    assert "in the prompts it is 84.2 %" in text
    assert "time to the first token of 5 (T = 0), s:" in text
    assert "1 busy process on the first CPUs" in text
    assert report.date in text


def test_prompts_that_are_kept(start: Start) -> None:
    """Prompts are sent once for both temperatures, and rows begin anew."""
    plan = Plan([(2, 20)], 0, 0, new_tokens=4, rounds=1, totals=0, temperatures=(0, 0.5), keep_prompts=True)
    settings = {"threads": 1, "row_tokens": 4000}
    asked: list[tuple[str, float | None]] = []
    cut = lambda n, length, shared: [[1] * length] * n  # noqa: E731
    report = run([Peer("x", "fake")], recorded(start, asked), plan, cut, settings, lambda line: None)
    assert [op for op, _ in asked] == ["complete", "start", "decode", "again", "decode", "stop"]
    greedy, sampled = report.points
    assert (greedy.temperature, sampled.temperature) == (0, 0.5)
    assert greedy.prefill_s is not None
    assert sampled.prefill_s is None
    assert len(greedy.step_ms) == len(sampled.step_ms) == 1
    peer = start(Peer("alone", "fake"))
    with pytest.raises(PeerError, match="nothing was started"):
        peer.ask("again", limit=3, temperature=0)


def test_temperatures() -> None:
    assert parse_temperatures("0,1") == [0, 1]
    assert parse_temperatures("0.7,0,0.7") == [0.7, 0]
    for wrong in ("", "a", "0,", "-1", "inf", "nan"):
        with pytest.raises(BenchError, match="--temperatures"):
            parse_temperatures(wrong)


def test_a_chat_keeps_each_contenders_answers(start: Start) -> None:
    """Answers of "counts" are 0, 1, of "twos" as well; every turn sends text, answer, text. The last turn of the second
    chat, whose text begins with 13, fails."""
    shape = ChatShape.parse("4:12:3")
    assert (shape.prompts, shape.added(2)) == ([4, 8, 12], [4, 2, 2])
    plan = Plan([], first=0, warm_up=0, new_tokens=2, rounds=2, totals=0, temperatures=(0.5, 0), chat=shape)
    asked: list[tuple[str, list[int]]] = []

    def start_recorded(contender: Peer) -> PeerProcess:
        process = start(contender)
        ask = process.ask

        def recorded(op: str, **fields: Any) -> dict[str, Any]:
            if op == "turn":
                asked.append((contender.name, fields["prompt"]))
                assert (fields["room"], fields["temperature"]) == (14, 0.5)
            return ask(op, **fields)

        process.ask = recorded  # type: ignore[method-assign]
        return process

    settings = {"threads": 1, "row_tokens": 4000}
    contenders = [Peer("counts", "fake"), Peer("twos", "fake", {"step": 2})]

    def cut(count: int, length: int, shared: int) -> list[list[int]]:
        return [list(range(20, 20 + length)), list(range(13, 13 + length))][:count] * 2

    report = run(contenders, start_recorded, plan, cut, settings, lambda line: None)
    counts, twos = report.chats
    assert [len(times) for times in counts.first_token_s] == [1, 1, 1]
    assert [prompt for name, prompt in asked if name == "counts"][:3] == [
        [20, 21, 22, 23],
        [20, 21, 22, 23, 0, 1, 24, 25],
        [20, 21, 22, 23, 0, 1, 24, 25, 0, 1, 26, 27],
    ]
    assert [name for name, _ in asked[:4]] == ["counts", "twos", "twos", "counts"]
    assert (twos.prompts, twos.error) == ([4, 8, 12], "RuntimeError: bad luck")
    text = table(report)
    assert "time to the first token of each turn of a chat (T = 0.5), s" in text
    assert "; temperature 0.5\n" in text
    assert "(RuntimeError: bad luck)" in text


def test_a_turn_keeps_memory(start: Start) -> None:
    peer = start(Peer("one", "fake", {}))
    for _ in range(2):
        answer = peer.ask("turn", prompt=[1], new_tokens=2, room=50, temperature=0)
        assert answer["tokens"] == [[0, 1]]
    assert peer.ask("complete", prompts=[[1]], new_tokens=2, temperature=0)["tokens"] == [[0, 1]]
    peer.ask("turn", prompt=[1], new_tokens=2, room=60, temperature=1)
    log = (peer._log).read_text()
    assert [line for line in log.splitlines() if line.startswith("room")] == [
        "room 50 temperature 0",
        "room 3 temperature 0",
        "room 60 temperature 1",
    ]


def test_prompts_that_share_tokens(start: Start) -> None:
    plan = Plan([(2, 20)], first=0, warm_up=0, new_tokens=2, rounds=1, totals=0, shared=15)
    settings = {"threads": 1, "row_tokens": 4000}
    cuts: list[tuple[int, int, int]] = []

    def cut(count: int, length: int, shared: int) -> list[list[int]]:
        cuts.append((count, length, shared))
        return [[1] * length] * count

    report = run([Peer("x", "fake")], start, plan, cut, settings, lambda line: None)
    assert (2, 20, 15) in cuts
    assert "all rows begin with the same 15 tokens" in table(report)


def test_chats_and_shares_that_cannot_be_measured(tmp_path: Path) -> None:
    for wrong in ("", "500", "500:6000", "0:5:2", "6000:500:10", "5:9:1", "a:b:c"):
        with pytest.raises(BenchError, match="START:END:TURNS"):
            ChatShape.parse(wrong)
    tight = Plan([], 0, 0, 16, 1, 0, chat=ChatShape(100, 200, 10))
    with pytest.raises(BenchError, match="answers of 16 tokens leave no room"):
        tight.settings(tmp_path, TINY, 1)
    long = Plan([], 0, 0, 16, 1, 0, chat=ChatShape(100, 2040, 3))
    with pytest.raises(BenchError, match="2056 tokens, but the model has 2048"):
        long.settings(tmp_path, TINY, 1)
    with pytest.raises(BenchError, match="2x20: 20 shared tokens leave none"):
        Plan([(2, 20)], 0, 0, 2, 1, 0, shared=20).settings(tmp_path, TINY, 1)
    fine = Plan([], 0, 0, 16, 1, 0, chat=ChatShape(100, 2000, 3)).settings(tmp_path, TINY, 1)
    assert fine["rows"] == 4


def test_a_contender_in_a_quota(start: Start) -> None:
    try:
        CpuQuota(0.5).close()
    except BenchError:
        pytest.skip("quotas are not permitted here")
    assert "/magicdec-" in start(Peer("one", "fake", {"quota": True})).about


def test_settings_of_sampling(tmp_path: Path) -> None:
    settings = Plan([(1, 20)], 0, 0, 2, 1, 0).settings(tmp_path, TINY, 3)
    assert (settings["threads"], settings["seed"]) == (3, 0)


def test_points() -> None:
    assert parse_points("1x2048,16x7500") == [(1, 2048), (16, 7500)]
    for wrong in ("", "1x", "1x2x3", "0x5", "axb"):
        with pytest.raises(BenchError, match="BATCHxCONTEXT"):
            parse_points(wrong)


def test_contenders() -> None:
    fast = variant("fast: speculation.gamma=2 dtype=bfloat16")
    assert fast.options == {"engine.speculation.gamma": 2, "engine.dtype": "bfloat16"}
    verified = variant("magicdec verified: speculation.kv.policy=verified speculation.kv.budget=128")
    assert verified.name == "magicdec verified"
    assert verified.options == {"engine.speculation.kv.policy": "verified", "engine.speculation.kv.budget": 128}
    assert [one.name for one in choose("vllm,magicdec off", [fast])] == ["vllm", "magicdec off", "fast"]
    usual = [one.name for one in choose(None, [fast])]
    assert usual[-1] == "fast"
    assert {"vllm ngram", "llama.cpp ngram", "transformers lookup"} < set(usual)
    assert "llama.cpp q8_0" not in usual
    assert "vllm prefix" not in usual
    sharing = [one.name for one in choose(None, [fast], "shared")]
    assert sharing == [
        "magicdec off",
        "magicdec auto",
        "magicdec prefix",
        "magicdec prefix auto",
        "vllm prefix",
        "llama.cpp prefix",
        "fast",
    ]
    few_bits = {one.name for one in choose(None, [fast], "weights")}
    ours = {f"magicdec {weights}{mode}" for weights in ("", "int8 ", "int4 ") for mode in ("off", "auto")}
    theirs = {"vllm", "llama.cpp bf16", "llama.cpp q8_0", "llama.cpp q4_0", "llama.cpp as is"}
    assert few_bits == ours | theirs | {"fast"}
    with pytest.raises(BenchError, match="no contender 'sglang'"):
        choose("sglang", [])
    for wrong in ("fast", ": a=1", "fast: a", "fast: =1"):
        with pytest.raises(BenchError, match="--variant"):
            variant(wrong)


def test_more_tokens_than_the_model_has() -> None:
    plan = Plan([(1, 100)], first=0, warm_up=0, new_tokens=10, rounds=1, totals=0)
    assert plan.row_tokens(1, 100, 4000) > 110
    with pytest.raises(BenchError, match="but the model has 105"):
        plan.row_tokens(1, 100, 105)


def test_same_tokens() -> None:
    assert same_tokens([[1, 2, 3]], [[1, 9]]) == 0.5
    assert same_tokens([[1]], [[]]) is None


def test_requirements_of_a_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "x.whl"
    lines = ["Name: x", "Requires-Dist: torch==2.9", "Requires-Dist: numpy>=1", 'Requires-Dist: rich; extra == "cli"']
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("x-1.dist-info/METADATA", "\n".join(lines))
    assert requirements(wheel, ("torch",)) == ["numpy>=1"]


def test_an_environment_that_may_not_be_made(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="not installed"):
        environment("transformers", tmp_path, print, install=False)
    assert not list(tmp_path.iterdir())
