"""Selecting features of a sample: a selector scores them, a predictor reads features times memberships."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bla.operators import SubsetOperator
from stacked import StackedMLP, cross_entropy
from synthetic import L2X, Drawn, syn

START = 2.0
"""Where every score starts: within the subset of the operators that have a bound, and no difference to the others."""

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How long and how large."""

    train: int
    validation: int
    test: int
    steps: int
    batch: int
    selector: tuple[int, ...]
    predictor: tuple[int, ...]
    learning_rate: float
    weight_decay: float
    decaying: bool
    activation: Callable[[Tensor], Tensor] = torch.relu
    normalise: bool = False
    sampled_labels: bool = True
    shared: bool = False
    """One data set for all seeds, as published, or one a seed."""


def invase_plan(scale: float = 1.0) -> Plan:
    """INVASE's sets: 10,000 samples to train on, of which 2,000 to choose on, 10,000 to test, sampled labels."""
    return Plan(
        train=int(8000 * scale), validation=int(2000 * scale), test=int(10_000 * scale), steps=int(800 * scale),
        batch=256, selector=(64, 64), predictor=(64, 64), learning_rate=3e-3, weight_decay=1e-4, decaying=True,
    )  # fmt: skip


def l2x_plan(name: str, scale: float = 1.0) -> Plan:
    """L2X's own: a million samples once, batches of 1,000, Adam 1e-3, explainer 100-100, predictor 200-200."""
    train = max(int(1_000_000 * scale) // 1000, 10) * 1000
    return Plan(
        train=train, validation=10_000, test=int(100_000 * min(1, 10 * scale)), steps=train // 1000,
        batch=1000, selector=(100, 100), predictor=(200, 200), learning_rate=1e-3, weight_decay=0.0, decaying=False,
        activation=torch.relu if name in ("orange", "xor") else functional.selu, normalise=True,
        sampled_labels=False, shared=True,
    )  # fmt: skip


def draw(name: str, n: int, seed: int, features: int = 11) -> Drawn:
    """A set by name: orange, xor, additive, switch, or syn1 to syn6."""
    generator = torch.Generator().manual_seed(seed)
    return L2X[name][0](n, generator) if name in L2X else syn(int(name[3:]), features)(n, generator)


@dataclasses.dataclass(frozen=True)
class Samples:
    """Of all seeds: features (S, n, d), targets (S, n), relevant (S, n, d)."""

    features: Tensor
    targets: Tensor
    relevant: Tensor


def samples(name: str, n: int, seeds: list[int], part: int, plan: Plan, *, features: int) -> Samples:
    """Part 0 is to train on, 1 to choose on, 2 to test."""
    if plan.shared:
        drawn = [draw(name, n, part, features)]
    else:
        drawn = [draw(name, n, 3 * seed + part, features) for seed in seeds]
    targets = [
        torch.bernoulli(one.probability, generator=torch.Generator().manual_seed(1000 + 3 * seed + part))
        if plan.sampled_labels
        else one.probability
        for one, seed in zip(drawn, seeds, strict=False)
    ]
    stacked = (torch.stack([one.features for one in drawn]), torch.stack(targets))
    relevant = torch.stack([one.relevant for one in drawn])
    return Samples(*(x.expand(len(seeds), *x.shape[1:]) for x in (*stacked, relevant)))


def trained(
    name: str,
    operator: SubsetOperator,
    price: float,
    seeds: list[int],
    plan: Plan,
    *,
    features: int = 11,
    on_test: bool = True,
    report: Progress = lambda *_: None,
) -> list[dict[str, Any]]:
    """Train one operator on one set, all seeds at once; a dictionary of figures a seed."""
    train = samples(name, plan.train, seeds, 0, plan, features=features)
    count, _, width = train.features.shape
    generator = torch.Generator().manual_seed(seeds[0])
    selector = StackedMLP(count, [width, *plan.selector, width], generator, plan.activation)
    selector.layers[-1].bias.data.fill_(START)
    predictor = StackedMLP(count, [width, *plan.predictor, 1], generator, plan.activation, plan.normalise)
    parameters = [*selector.parameters(), *predictor.parameters()]
    optimiser = torch.optim.Adam(parameters, plan.learning_rate, weight_decay=plan.weight_decay, foreach=True)
    order = [torch.Generator().manual_seed(7000 + seed) for seed in seeds]
    epochs: Tensor = torch.empty(count, 0, dtype=torch.long)
    rows = torch.arange(count)[:, None]
    for step in range(plan.steps):
        if epochs.shape[1] < plan.batch:
            epochs = torch.stack([torch.randperm(plan.train, generator=each) for each in order])
        chosen, epochs = epochs[:, : plan.batch], epochs[:, plan.batch :]
        x, y = train.features[rows, chosen], train.targets[rows, chosen]
        scores = selector(x)
        memberships = operator.soft(scores, None, generator)
        loss = cross_entropy(predictor(x * memberships)[..., 0], y)
        if price:
            loss = loss + price * min(1, 2 * step / plan.steps) * operator.expected_size(scores)
        if plan.decaying:
            for group in optimiser.param_groups:
                group["lr"] = plan.learning_rate * (1 - step / plan.steps)
        optimiser.zero_grad(set_to_none=True)
        loss.mean(dim=1).sum().backward()
        optimiser.step()
        if step % 100 == 0:
            report(f"{name} {type(operator).__name__}", step, plan.steps)
    n = plan.test if on_test else plan.validation
    held_out = samples(name, n, seeds, 2 if on_test else 1, plan, features=features)
    with torch.no_grad():
        parts = [
            _figures(selector, predictor, operator, held_out, slice(start, start + 2000)) for start in range(0, n, 2000)
        ]
    keys = parts[0].keys()
    figures = {key: torch.cat([part[key] for part in parts], dim=1) for key in keys}
    out = [{key: float(figures[key][seed].double().mean()) for key in keys} for seed in range(count)]
    for seed, one in enumerate(out):
        one["median_rank"] = float(figures["median_rank"][seed].double().median())
    return out


def _figures(
    selector: StackedMLP, predictor: StackedMLP, operator: SubsetOperator, data: Samples, rows: slice
) -> dict[str, Tensor]:
    x, y, relevant = data.features[:, rows], data.targets[:, rows], data.relevant[:, rows]
    scores = selector(x, training=False)
    hard = operator.hard(scores)
    logits = predictor(x * hard, training=False)[..., 0]
    right = (hard * relevant).sum(dim=-1)
    ranks = scores.argsort(dim=-1, descending=True).argsort(dim=-1) + 1.0
    true = relevant.sum(dim=-1)
    best = (ranks <= true[..., None]) == relevant
    # L2X's figure: the median of the true features' ranks, a sample; 1.5 for two, 2.5 for four, 3 for five
    sorted_ranks = ranks.masked_fill(~relevant, torch.inf).sort(dim=-1).values
    low, high = (true - 1) // 2, true // 2
    median = (sorted_ranks.gather(-1, low[..., None]) + sorted_ranks.gather(-1, high[..., None]))[..., 0] / 2
    return {
        "tpr": right / true,
        "fdr": 1 - right / hard.sum(dim=-1),
        "size": hard.sum(dim=-1),
        "exact": best.all(dim=-1).float(),
        "median_rank": median,
        "cross_entropy": cross_entropy(logits, y),
        "accuracy": torch.where(logits > 0, y, 1 - y),
    }
