"""Which features decide? Bounded logits choose how many, for each sample.

Two of eleven features make the label, or four others: an eleventh feature switches between the two rules.

    python examples/tabular_subset.py [--steps 1500]
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.operators import BoundedLogits

PRICE = 0.02
"""The price of one feature, in nats: a higher price selects fewer."""


def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, 11), labels (n,), and which features made the label (n, 11)."""
    x = torch.randn(n, 11, generator=generator)
    switch = x[:, 10] < 0
    logit = torch.where(switch, 3 * x[:, 0] * x[:, 1], 2 * (x[:, 2:6].square().sum(dim=1) - 4))
    relevant = torch.zeros(n, 11, dtype=torch.bool)
    relevant[:, 10] = True
    relevant[:, :2] = switch[:, None]
    relevant[:, 2:6] = ~switch[:, None]
    return x, torch.bernoulli(torch.sigmoid(logit), generator=generator), relevant


def main() -> None:
    """Train selector and predictor together, then print what is selected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    operator = BoundedLogits(noise=1.0)
    selector = nn.Sequential(nn.Linear(11, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 11))
    predictor = nn.Sequential(nn.Linear(11, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    nn.init.constant_(selector[-1].bias, 2.0)  # everything starts within the subset
    optimiser = torch.optim.Adam([*selector.parameters(), *predictor.parameters()], 3e-3)
    for step in range(steps):
        x, y, _ = draw(256, generator)
        scores = selector(x)
        logits = predictor(x * operator.soft(scores, generator=generator))[:, 0]
        price = PRICE * min(1, 2 * step / steps) * operator.expected_size(scores).mean()
        optimiser.zero_grad()
        (functional.binary_cross_entropy_with_logits(logits, y) + price).backward()
        optimiser.step()
    x, y, relevant = draw(5000, generator)
    with torch.no_grad():
        hard = operator.hard(selector(x))
        accuracy = ((predictor(x * hard)[:, 0] > 0) == (y > 0)).double().mean()
    chosen = hard.bool()
    print(f"accuracy from the selected features alone: {accuracy:.3f}")
    for name, rows in (("feature 10 < 0: 0, 1 and 10 count", x[:, 10] < 0), ("else 2 to 5 and 10", x[:, 10] >= 0)):
        share = " ".join(f"{value:.2f}" for value in chosen[rows].double().mean(dim=0))
        print(f"{name}: {chosen[rows].sum(dim=1).double().mean():.1f} selected, each feature {share}")
    print(f"right of those selected: {(chosen & relevant).sum() / chosen.sum():.3f}, "
          f"found of those that count: {(chosen & relevant).sum() / relevant.sum():.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
