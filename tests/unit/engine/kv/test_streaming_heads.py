"""KV heads that stream: which of them do, and what they read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from engine.config.deployment import ConfigError
from engine.kv.streaming_heads import read_streaming_heads
from engine.kv.target_quest import TargetQuestAttention
from engine.params import SamplingParams
from engine.scheduler.controller import DraftReads
from kernels.attention.base import AttentionBackend, AttentionBatch
from kernels.kv.kv_pool import LayerKV
from tests.support.engines import TINY, complete, tiny_engine, tiny_model
from tests.support.head_files import write_head_shares
from tests.support.workloads import prompt_of

PAGE = 4
SHARES = [[0.1, 0.9], [0.5, 0.2]]
STREAMS = [[True, False], [False, True]]


def test_the_half_with_the_lowest_shares_streams(tmp_path: Path) -> None:
    assert read_streaming_heads(write_head_shares(tmp_path, SHARES), TINY) == STREAMS
    assert read_streaming_heads(write_head_shares(tmp_path, [[0.3, 0.3], [0.3, 0.3]]), TINY) == [
        [True] * 2,
        [False] * 2,
    ]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_layers": 3}, "has 3 layers of 2 KV heads, but the model has 2 of 2"),
        ({"num_kv_heads": 4}, "has 2 layers of 4 KV heads, but the model has 2 of 2"),
        ({"shares": [[0.1, 0.2], [0.3]]}, "does not have one share for each KV head of each layer"),
        ({"shares": [[0.1, 0.2]]}, "does not have one share for each KV head of each layer"),
        ({"shares": [[0.1, 0.2], [0.3, 1.5]]}, "has a share that is not from 0 to 1"),
        ({"shares": "none"}, "is no file of `magicdec profile heads`"),
        ({"colour": 1}, "is no file of `magicdec profile heads`"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    file = write_head_shares(tmp_path, SHARES)
    Path(file).write_text(json.dumps(json.loads(Path(file).read_text()) | fields))
    with pytest.raises(ConfigError) as caught:
        tiny_engine(tiny_model(), gamma=0, target_kv={"policy": "quest", "heads": file}, page_size=16)
    assert str(caught.value).startswith(f"engine.target_kv.heads: {file} {says}")
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent cannot be read \(No such file or directory\)"):
        read_streaming_heads(str(tmp_path / "absent"), TINY)
    (tmp_path / "empty").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is no file of"):
        read_streaming_heads(str(tmp_path / "empty"), TINY)


@pytest.mark.parametrize("gamma", [0, 3])
def test_a_streaming_head_reads_sink_and_window_and_what_is_newer(tmp_path: Path, gamma: int) -> None:
    """The others read their choice. The statistics count both."""
    target = {"policy": "quest", "budget": 8, "interval": 3, "sink": 4, "window": 12}
    target["heads"] = write_head_shares(tmp_path, SHARES)
    engine = tiny_engine(tiny_model(), gamma=gamma, page_size=PAGE, target_kv=target, cache={"prefix": False})
    engine._stats._draft_reads = {None: DraftReads(lambda context, budget: 0)}
    attention = engine._worker._target.attention
    assert isinstance(attention, TargetQuestAttention)
    lists: list[tuple[list[int], list[int], list[list[int]]]] = []

    def watch(inner: AttentionBackend) -> None:
        plan, run = inner.plan, inner.run
        batches: list[AttentionBatch] = []

        def plan_watched(batch: AttentionBatch) -> None:
            batches.append(batch)
            plan(batch)

        def run_watched(layer: LayerKV, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:
            batch, table = batches[-1], engine._worker._state.page_table[0].tolist()
            # Places of the listed pages in the row's own list, by KV head.
            pages = [[table.index(page // 2) for page in row] for row in batch.pages_of(layer).tolist()]
            lists.append((list(batch.query_lengths), list(batch.kv_lengths), pages))
            return run(layer, q, scale)

        inner.plan, inner.run = plan_watched, run_watched  # type: ignore[method-assign]

    for pattern in attention._patterns:
        watch(pattern._attention)
    complete(engine, prompt_of(50, 1), SamplingParams(max_tokens=30, temperature=1.0, seed=1, ignore_eos=True))
    read = 0
    for call, (queries, lengths, pages) in enumerate(lists):
        streams = STREAMS[call % TINY.num_layers]
        read += sum(lengths)
        for row, (count, length) in enumerate(zip(queries, lengths, strict=True)):
            listed = pages[row][: -(-length // PAGE)]
            last = listed[-1] * PAGE + (length - 1) % PAGE  # position of the group's last query
            first = last - count + 1
            anchor = first - (first - 50) % 3
            window = 12 if streams[row % 2] else 8
            begin = anchor // PAGE - window // PAGE
            newest = list(range(anchor // PAGE, last // PAGE + 1))
            assert length == PAGE + window + last + 1 - anchor // PAGE * PAGE
            assert listed[0] == 0
            assert listed[-len(newest) :] == newest
            if streams[row % 2]:
                assert listed == [0, *range(begin, anchor // PAGE), *newest]
            else:
                assert len(set(listed)) == len(listed)
    assert lists
    assert engine.stats().kv_tokens_read == read / (TINY.num_layers * TINY.num_kv_heads)
