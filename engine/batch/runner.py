"""Runner of forwards: a model, the pool it writes to and the attention it reads with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.batch.forward_graphs import ForwardGraphs
from engine.batch.view import View
from kernels.attention.base import AttentionBackend
from kernels.kv_cache import KVPool
from models.batch import ForwardBatch
from models.llama import Llama


class Observer(Protocol):
    """Learns from the attention of forwards."""

    def around(self, attention: AttentionBackend) -> AttentionBackend:
        """Return attention for the next forward, which gives the same results as `attention`; that itself if there is
        nothing to learn from it."""


@dataclass(frozen=True, slots=True)
class Runner:
    """Target and draft are two runners in one process. For self-speculation they share model and pool, and differ in
    the KV they read. Each has its own attention backend, since a backend holds the plan of its latest forward.

    graphs: replay forwards where they can.
    observers: learn from forwards; no graph replays a forward that one of them learns from.
    """

    model: Llama
    pool: KVPool
    attention: AttentionBackend
    view: View
    graphs: ForwardGraphs | None = None
    observers: tuple[Observer, ...] = ()

    def forward(self, inputs: ForwardBatch) -> Tensor:
        """Run the model and write the inputs' KV. Returns the requested logits, [n, this rank's vocabulary]."""
        attention = self.attention
        for observer in self.observers:
            attention = observer.around(attention)
        if attention is self.attention and self.graphs is not None:
            logits = self.graphs.forward(inputs)
            if logits is not None:
                return logits
        return self.model.forward(inputs, self.pool, attention)
