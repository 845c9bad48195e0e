"""Small trainings against Adam written out."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from bla.metrics.fitting import Rows, fit_minibatches


def test_it_is_adam_over_the_batches_of_each_order() -> None:
    x, y = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)), torch.arange(7.0)
    first, second = nn.Linear(3, 2).eval().requires_grad_(False), nn.Linear(2, 1)
    values = [value.detach().double().clone() for module in (first, second) for value in module.parameters()]
    seen: list[list[int]] = []

    def loss(rows: Rows) -> torch.Tensor:
        assert first.training
        assert second.training
        seen.append(rows.tolist())
        return (second(first(x[rows]).relu())[:, 0] - y[rows]).square().mean()

    orders = [np.random.RandomState(epoch).permutation(7) for epoch in range(4)]
    with torch.inference_mode():
        fit_minibatches(first, second, loss=loss, orders=iter(orders), batch_size=3, learning_rate=0.01)
    assert seen == [order[start : start + 3].tolist() for order in orders for start in (0, 3, 6)]
    assert not first.training
    assert not second.weight.requires_grad

    m, v = [[torch.zeros_like(value) for value in values] for _ in range(2)]
    for step, rows in enumerate(seen, 1):  # Kingma and Ba 2015, algorithm 1
        leaves = [value.clone().requires_grad_() for value in values]
        hidden = (x[rows].double() @ leaves[0].T + leaves[1]).relu()
        ((hidden @ leaves[2].T + leaves[3])[:, 0] - y[rows]).square().mean().backward()
        for index, leaf in enumerate(leaves):
            m[index] = 0.9 * m[index] + 0.1 * leaf.grad
            v[index] = 0.999 * v[index] + 0.001 * leaf.grad**2
            change = m[index] / (1 - 0.9**step) / ((v[index] / (1 - 0.999**step)).sqrt() + 1e-8)
            values[index] = values[index] - 0.01 * change
    for came, value in zip([*first.parameters(), *second.parameters()], values, strict=True):
        torch.testing.assert_close(came, value.float(), rtol=1e-4, atol=1e-5)
