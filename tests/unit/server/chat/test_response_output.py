"""Events of a response rebuild its items."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseOutputItem, ResponseStreamEvent
from pydantic import TypeAdapter

from server.chat.answer_parser import AnswerDelta, CallDelta
from server.chat.response_output import Event, ResponseOutput

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ITEM: TypeAdapter[Any] = TypeAdapter(ResponseOutputItem)


def run(deltas: list[AnswerDelta], status: Any = "completed") -> tuple[list[dict[str, Any]], list[Event]]:
    output = ResponseOutput()
    events = [event for delta in deltas for event in output.add(delta)]
    events += output.finish(status)
    return output.items, events


def rebuilt(events: list[Event]) -> list[dict[str, Any]]:
    """Items as a client that only listens to growth makes them."""
    items: list[dict[str, Any]] = []
    for event in events:
        EVENT.validate_python({**event, "sequence_number": 0})
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append(event["item"] | {"content": []} if "content" in event["item"] else dict(event["item"]))
            continue
        item = items[event["output_index"]]
        if kind == "output_item.done":
            assert {**item, "status": event["item"]["status"]} == event["item"]
            items[event["output_index"]] = event["item"]
        elif kind == "content_part.added":
            item["content"].append(dict(event["part"]))
        elif kind == "content_part.done":
            assert item["content"] == [event["part"]]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert (item["arguments"], item["name"]) == (event["arguments"], event["name"])
        elif kind.endswith(".delta"):
            item["content"][0]["text"] += event["delta"]
        else:
            assert event["text"] == item["content"][0]["text"]
        assert event.get("item_id", item["id"]) == item["id"]
    return items


def test_thinking_text_and_calls_are_items_in_their_order() -> None:
    items, events = run(
        [
            AnswerDelta("hm"),
            AnswerDelta("m", ["Sure"]),
            AnswerDelta("", [".", CallDelta(0, "call_a", "f", "{"), CallDelta(0, arguments="}")]),
            AnswerDelta("", [CallDelta(1, "call_b", "g")]),
            AnswerDelta("", [CallDelta(1, arguments='{"a": 1}')]),
        ]
    )
    for item in items:
        assert item.pop("id").startswith({"reasoning": "rs_", "message": "msg_", "function_call": "fc_"}[item["type"]])
    part = {"type": "output_text", "text": "Sure.", "annotations": [], "logprobs": []}
    assert items == [
        {
            "type": "reasoning",
            "summary": [],
            "content": [{"type": "reasoning_text", "text": "hmm"}],
            "status": "completed",
        },
        {"type": "message", "role": "assistant", "content": [part], "status": "completed"},
        {"type": "function_call", "call_id": "call_a", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "call_b", "name": "g", "arguments": '{"a": 1}', "status": "completed"},
    ]
    assert [event["type"] for event in events if event["output_index"] == 2] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]


@pytest.mark.parametrize("status", ["completed", "incomplete"])
def test_an_answer_without_anything_is_an_empty_message(status: str) -> None:
    items, events = run([AnswerDelta()], status)
    assert [(item["type"], item["content"][0]["text"], item["status"]) for item in items] == [("message", "", status)]
    assert rebuilt(events) == items


def test_only_the_last_item_is_incomplete() -> None:
    items, _ = run([AnswerDelta("a", ["b"])], "incomplete")
    assert [item["status"] for item in items] == ["completed", "incomplete"]


PIECES = st.lists(st.text(min_size=1, max_size=3), min_size=1, max_size=3)


@given(st.lists(st.tuples(st.sampled_from(["thinking", "content", "call"]), PIECES), max_size=6))
def test_events_rebuild_the_items(answer: list[tuple[str, list[str]]]) -> None:
    deltas, calls = [], 0
    for kind, pieces in answer:
        if kind == "call":
            deltas.append(AnswerDelta(parts=[CallDelta(calls, f"call_{calls}", "f")]))
            deltas += [AnswerDelta(parts=[CallDelta(calls, arguments=piece)]) for piece in pieces]
            calls += 1
        else:
            deltas += [AnswerDelta(piece) if kind == "thinking" else AnswerDelta("", [piece]) for piece in pieces]
    items, events = run(deltas)
    assert rebuilt(events) == items
    for item in items:
        ITEM.validate_python(item)
    texts = {"thinking": "", "content": "", "call": ""}
    for kind, pieces in answer:
        texts[kind] += "".join(pieces)
    of_kind = {"reasoning": "thinking", "message": "content", "function_call": "call"}
    found = dict.fromkeys(texts, "")
    for item in items:
        found[of_kind[item["type"]]] += item["arguments"] if "arguments" in item else item["content"][0]["text"]
    assert found == texts
    assert sum(item["type"] == "function_call" for item in items) == calls
