"""The run's own method: its attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bla.comparison.methods.method import Batch, Cells, Method

RUN = "bla"
"""The name of the run's own method in results, whatever its setup."""


def own_attention(attention: nn.Module, head: nn.Module, title: str, *, class_aware: bool) -> Method:
    """The attention with the head that reads its selection; it chooses the sizes for all other methods."""

    @torch.no_grad()
    def select(batch: Batch) -> Cells:
        found = attention(batch.features, target=batch.targets if class_aware else None)
        return Cells(found.unbounded, found.scores, found.soft, found.hard > 0, found.hard)

    def maps(batch: Batch) -> Tensor:
        return select(batch).unbounded

    note = "the run's own; it chooses the sizes"
    return Method(RUN, title, "own", class_aware, maps, note, head=head, select=select)
