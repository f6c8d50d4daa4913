"""Views: which KV of a row the queries of a forward read, as page lists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kernels.ragged import Ints


class View(Protocol):
    """A page table, and a rule that lists, for the queries at the end of a row, the pages that they attend to.

    The rule depends on the first query of a row in a forward; later ones skip the same pages. Everything it lists is in
    whole pages, apart from a row's last one. One pool can have several views.
    """

    @property
    def page_table(self) -> Tensor:
        """[max_rows, max_pages] int64: the pages that hold each row's positions."""

    @property
    def first_page(self) -> int:
        """Page id that slots count from: that of the pool's first page that tokens are written to."""

    @property
    def shares(self) -> bool:
        """Whether rows whose tokens begin alike may list the same pages. False where every row has pages of its own."""

    @property
    def per_layer(self) -> bool:
        """Whether each layer has lists of its own."""

    @property
    def window(self) -> int:
        """See AttentionBatch.window."""

    @property
    def sliding(self) -> View | None:
        """The view of the KV of sliding layers, of the same queries; None: the model that reads has none."""

    def skipped(self, rows: Ints, contexts: Ints) -> Ints:
        """Return the number of KV slots that each row's list leaves out.

        rows: [n] row slots. contexts: [n], tokens up to and including each row's first query. Both on the host.
        """

    def leading(self, rows: Ints, contexts: Ints) -> Ints:
        """Return the number of first KV slots that each row's list has before the first one it leaves out. Rows with
        the same first pages list them alike up to there."""

    def pages(self, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        """List the pages.

        rows, contexts: as above, on the device. width: number of pages to list. Returns [n, width] int64, with lists
        per layer [layers, n, width]; entries past a row's last token are any valid pages.
        """


@dataclass(frozen=True, slots=True)
class DenseView:
    """The view of all KV, or of a window that all layers have."""

    page_table: Tensor
    first_page: int = 0
    shares: bool = True
    per_layer: bool = False
    window: int = 0
    sliding: View | None = None

    def skipped(self, rows: Ints, contexts: Ints) -> Ints:
        return contexts * 0

    def leading(self, rows: Ints, contexts: Ints) -> Ints:
        return contexts

    def pages(self, rows: Tensor, contexts: Tensor, width: int) -> Tensor:
        return self.page_table[rows, :width]
