"""Small trainings: Adam over shuffled minibatches. Probes, judges and rivals are all fitted here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Rows = npt.NDArray[np.int64]


@torch.inference_mode(False)
@torch.enable_grad()
def fit_minibatches(
    *modules: nn.Module,
    loss: Callable[[Rows], Tensor],
    orders: Iterable[Rows],
    batch_size: int = 32,
    learning_rate: float = 1e-3,
) -> None:
    """Minimise a loss over the parameters of all modules, which are in training mode meanwhile and frozen afterwards.

    Parameters
    ----------
    loss: the mean loss, a scalar, of a batch of rows.
    orders: one permutation of the rows an epoch, drawn when the epoch starts.
    """
    for module in modules:
        module.train().requires_grad_(True)
    optimiser = torch.optim.Adam([value for module in modules for value in module.parameters()], lr=learning_rate)
    for order in orders:
        for start in range(0, len(order), batch_size):
            value = loss(order[start : start + batch_size])
            optimiser.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    for module in modules:
        module.eval().requires_grad_(False)
