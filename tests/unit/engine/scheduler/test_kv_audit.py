"""The audit notices KV that is not what the prefix indices say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.core import Engine
from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.kv_audit import KVAudit
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.pages import PageLeak
from engine.scheduler.request import Request
from engine.scheduler.sliding_pages import SlidingPages
from tests.support.engines import TINY, complete, tiny_engine, tiny_model

PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PROMPT = [2 + i % 60 for i in range(20)]


def test_a_cached_page_that_is_overwritten_is_noticed() -> None:
    engine = tiny_engine(tiny_model(), gamma=2)
    complete(engine, PROMPT, PARAMS)
    complete(engine, PROMPT, PARAMS)
    cached = engine._kv.indices[0].entries[1].page
    engine._worker._target.pool._data[-1, 1, cached, 0, 1, 2] += 1e-9
    with pytest.raises(PageLeak, match=f"^page {cached} holds other KV"):
        complete(engine, PROMPT[::-1], PARAMS)


def sliding_engine() -> Engine:
    return tiny_engine(tiny_model(config=replace(TINY, sliding_window=10, sliding_layers=(1,))), gamma=2)


def test_and_so_is_one_of_sliding_layers() -> None:
    engine = sliding_engine()
    complete(engine, PROMPT, PARAMS)
    complete(engine, PROMPT, PARAMS)
    sliding = engine._worker._target.sliding
    assert sliding is not None
    cached = engine._kv.indices[1].entries[1].page
    sliding.pool._data[0, 0, cached, 1, 3, 0] += 1e-9
    with pytest.raises(PageLeak, match=f"^sliding page {cached} holds other KV"):
        complete(engine, PROMPT[::-1], PARAMS)


def test_a_row_that_writes_to_a_sliding_page_of_another_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sliding_engine()
    engine.add(AddRequest("owner", PROMPT, SamplingParams(max_tokens=60, ignore_eos=True)))
    for _ in range(3):
        engine.step()
    (owner,) = engine._scheduler.running
    page, cover = owner.sliding_pages[0], engine._kv.cover
    assert page in engine._kv.indices[1]

    def cover_wrongly(request: Request, end: int) -> tuple[int, list[int]]:
        first, pages = cover(request, end)
        return first, pages if request is owner else [page for _ in pages]

    monkeypatch.setattr(engine._kv, "cover", cover_wrongly)
    engine.add(AddRequest("other", PROMPT[::-1], PARAMS))
    engine.step()  # writes to the page, which is hashed before the next one
    with pytest.raises(PageLeak, match=f"^sliding page {page} holds other KV"):
        engine.step()


def run(kv: KVManager, audit: KVAudit, hashes: tuple[dict[int, int], dict[int, int]], request: Request) -> None:
    """Compute a request in one round. hashes: of the KV in each page of each pool."""
    audit.compare([of[page] for of, pages in zip(hashes, audit.next_pages(), strict=True) for page in pages])
    kv.admit(request)
    kv.cover(request, request.num_tokens)
    request.num_computed = request.num_tokens
    kv.commit(request)


@pytest.mark.parametrize("slides", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_equal_tokens_have_equal_kv_where_kernels_are_exact(slides: bool, exact: bool) -> None:
    """Both pools have pages of the same digests and numbers, with different KV."""
    kv = KVManager(10, 4, sliding=SlidingPages(10, 4, 8))
    audit = KVAudit(kv, exact=exact)
    first, second = (Request(AddRequest("", [*range(4)], SamplingParams(prompt_logprobs=0)), [], 0) for _ in "ab")
    run(kv, audit, ({}, {}), first)
    hashes = {first.pages[0]: 5}, {first.sliding_pages[0]: 7}
    kv.admit(second)
    kv.cover(second, 4)
    second.num_computed = 4
    hashes[0][second.pages[0]] = 5 + (not slides)  # computed again, and the KV of one pool differs
    hashes[1][second.sliding_pages[0]] = 7 + slides
    kv.commit(second)
    pages = audit.next_pages()
    for mine, of in zip(pages, hashes, strict=True):
        assert mine == [*of][: 1 + exact]
    found = [of[page] for of, mine in zip(hashes, pages, strict=True) for page in mine]
    if exact:
        with pytest.raises(PageLeak, match="^sliding page" if slides else "^page"):
            audit.compare(found)
        return
    audit.compare(found)
    audit.next_pages()
    with pytest.raises(PageLeak, match="^sliding page" if slides else "^page"):
        audit.compare([5, 9] if slides else [9, 7])
