"""A model, the pool it writes to and the attention it reads with: what a forward needs, in one place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from engine.batch.forward_graphs import ForwardGraphs
from engine.kv.policies import View
from engine.speculation.draft_graphs import DraftGraphs
from kernels.attention.base import AttentionBackend
from kernels.attention.observed import ObservedAttention
from kernels.kv_cache import KVPool
from models.batch import ForwardBatch
from models.llama import Llama


@dataclass(frozen=True, slots=True)
class Runner:
    """Target and draft are two runners in one process; for self-speculation they share model and pool, and differ in
    the KV they read. Each has its own attention backend, since a backend holds the plan of its latest forward.

    graphs: replay what they can of its forwards; those whose queries are kept are not. drafts: replay the forwards of a
    round's drafts without the host.
    """

    model: Llama
    pool: KVPool
    attention: AttentionBackend
    view: View
    graphs: ForwardGraphs | None = None
    drafts: DraftGraphs | None = None

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Logits of the positions asked for: [n, this rank's vocabulary]. Writes the batch's KV."""
        kept = isinstance(self.attention, ObservedAttention) and self.attention.expecting
        if self.graphs is not None and not kept:
            logits = self.graphs.forward(batch)
            if logits is not None:
                return logits
        return self.model.forward(batch, self.pool, self.attention)
