"""The audit notices KV that is not what the prefix index says."""

from __future__ import annotations

import pytest

from engine.messages import AddRequest
from engine.params import SamplingParams
from engine.scheduler.kv_audit import KVAudit
from engine.scheduler.kv_manager import KVManager
from engine.scheduler.pages import PageLeak
from engine.scheduler.request import Request
from tests.support.engines import complete, tiny_engine, tiny_model

PARAMS = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
PROMPT = [2 + i % 60 for i in range(20)]


def test_a_cached_page_that_is_overwritten_is_noticed() -> None:
    engine = tiny_engine(tiny_model(), gamma=2)
    complete(engine, PROMPT, PARAMS)
    complete(engine, PROMPT, PARAMS)
    cached = engine._kv.indexed_pages()[1].page
    engine._worker._target.pool._data[-1, 1, cached, 0, 1, 2] += 1e-9
    with pytest.raises(PageLeak, match=f"page {cached} holds other KV"):
        complete(engine, PROMPT[::-1], PARAMS)


def run(kv: KVManager, audit: KVAudit, hashes: dict[int, int], request: Request) -> None:
    """Compute a request in one round. hashes: of the KV in each page."""
    audit.compare([hashes.get(page, 0) for page in audit.next_pages()])
    kv.admit(request)
    request.num_computed = request.num_tokens
    kv.commit(request)


def test_equal_tokens_have_equal_kv_where_kernels_are_exact() -> None:
    for exact in (True, False):
        kv = KVManager(10, 4)
        audit = KVAudit(kv, exact=exact)
        first, second = (Request(AddRequest("", [*range(4)], SamplingParams(prompt_logprobs=0)), [], 0) for _ in "ab")
        run(kv, audit, {}, first)
        hashes = {first.pages[0]: 7}
        kv.admit(second)
        second.num_computed = 4
        hashes[second.pages[0]] = 8  # computed again, and the KV differs
        kv.commit(second)
        pages = audit.next_pages()
        assert pages == [first.pages[0]] + [page for page in hashes if page != first.pages[0]] * exact
        if exact:
            with pytest.raises(PageLeak, match="holds other KV"):
                audit.compare([hashes[page] for page in pages])
        else:
            audit.compare([hashes[page] for page in pages])
            with pytest.raises(PageLeak, match="holds other KV"):
                audit.compare([9 for _ in audit.next_pages()])
