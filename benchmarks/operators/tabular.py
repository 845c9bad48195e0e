"""Selecting features of a sample: a selector scores them, a predictor reads features times memberships.

All candidates and all seeds are one stack of networks, trained at once. Two rules say what is selected at test:
an operator's own ``hard``, and one threshold on its scores that validation data chose, by the same rule for all.
A predictor with batch normalisation is measured twice: with the moving averages of its training, and ("own") with the
statistics of what its operator selects from the training samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.operators.stacked import StackedMLP, cross_entropy
from benchmarks.operators.synthetic import L2X, Drawn, syn
from bla.operators import Entmax15, Sparsemax, SubsetOperator
from bla.progress import Progress

WITHIN = 0.01
"""Nats of validation loss that a smaller subset is worth."""

START = 2.0
"""Where every score starts: within the subset of the operators that have a bound, and no difference to the others."""

MEAN_SIZES = (1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 10.0)
"""Thresholds that are tried are those that leave so many features on average on validation data."""

Candidate = tuple[SubsetOperator, float]
"""An operator, and the price of an item."""


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
    penalty: float
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
        batch=256, selector=(64, 64), predictor=(64, 64), learning_rate=3e-3, penalty=5e-5, decaying=True,
    )  # fmt: skip


def l2x_plan(name: str, scale: float = 1.0) -> Plan:
    """L2X's own: a million samples once, batches of 1,000, Adam 1e-3, explainer 100-100, predictor 200-200.

    And 10,000 more to choose on.
    """
    train = max(int(1_000_000 * scale) // 1000, 10) * 1000
    return Plan(
        train=train, validation=10_000, test=int(100_000 * min(1, 10 * scale)), steps=train // 1000,
        batch=1000, selector=(100, 100), predictor=(200, 200), learning_rate=1e-3, penalty=1e-3, decaying=False,
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


def chosen(measured: list[dict[str, float]]) -> int:
    """Which of several: the smallest within .01 of the least loss.

    >>> tried = [{"cross_entropy": 0.5, "size": 4}, {"cross_entropy": 0.505, "size": 3}]
    >>> chosen([*tried, {"cross_entropy": 0.6, "size": 1}])
    1
    """
    least = min(one["cross_entropy"] for one in measured)
    near = [index for index, one in enumerate(measured) if one["cross_entropy"] <= least + WITHIN]
    return min(near, key=lambda index: measured[index]["size"])


def strength(operator: SubsetOperator, scores: Tensor) -> Tensor:
    """What a threshold cuts: scores, or, where an operator does not mind a shift of them, what is left of them."""
    if isinstance(operator, (Sparsemax, Entmax15)):
        return operator.soft(scores)
    return scores.log_softmax(dim=-1) if getattr(operator, "k", None) else scores


@dataclasses.dataclass
class Stack:
    """Networks of every candidate and seed, the candidate's index before the seed's."""

    candidates: list[Candidate]
    seeds: int
    selector: StackedMLP
    predictor: StackedMLP

    def each(self, what: Callable[[SubsetOperator, Tensor], Tensor], scores: Tensor) -> Tensor:
        """Scores (C S, ...) to what each operator makes of its own."""
        parts = scores.split(self.seeds)
        return torch.cat([what(operator, part) for (operator, _), part in zip(self.candidates, parts, strict=True)])

    def spread(self, values: Tensor) -> Tensor:
        """Values (S, ...) for every candidate: (C S, ...)."""
        return values.repeat(len(self.candidates), *[1] * (values.ndim - 1))

    def hard(self, scores: Tensor) -> Tensor:
        """What each operator selects."""
        return self.each(lambda one, each: one.hard(each), scores)

    @torch.no_grad()
    def settle(self, data: Samples) -> None:
        """Normalise by the statistics of what is selected, over up to 50 batches, each from all over a sorted set."""
        stride = max(data.targets.shape[1] // 1000, 1)
        batches = (self.spread(data.features[:, at::stride]) for at in range(min(50, stride)))
        self.predictor.settle(x * self.hard(self.selector(x, training=False)) for x in batches)

    @torch.no_grad()
    def figures(self, data: Samples, hard: Callable[[Tensor], Tensor]) -> list[dict[str, float]]:
        """Of every candidate and seed, when ``hard`` makes subsets of scores."""
        parts = [self._figures(data, slice(at, at + 2000), hard) for at in range(0, data.targets.shape[1], 2000)]
        together = {key: torch.cat([part[key] for part in parts], dim=1).double() for key in parts[0]}
        means = {key: (v.median(1).values if key == "median_rank" else v.mean(1)) for key, v in together.items()}
        return [{key: float(v[place]) for key, v in means.items()} for place in range(len(next(iter(means.values()))))]

    def _figures(self, data: Samples, rows: slice, make: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        x, y, relevant = (self.spread(v[:, rows]) for v in (data.features, data.targets, data.relevant))
        scores = self.selector(x, training=False)
        hard = make(scores)
        logits = self.predictor(x * hard, training=False)[..., 0]
        right, true, size = (hard * relevant).sum(dim=-1), relevant.sum(dim=-1), hard.sum(dim=-1)
        ranks = scores.argsort(dim=-1, descending=True).argsort(dim=-1) + 1.0
        # L2X's figure: the median of the true features' ranks, a sample; 1.5 for two, 2.5 for four, 3 for five
        ordered = ranks.masked_fill(~relevant, torch.inf).sort(dim=-1).values
        low, high = (true - 1) // 2, true // 2
        median = (ordered.gather(-1, low[..., None]) + ordered.gather(-1, high[..., None]))[..., 0] / 2
        return {
            "tpr": right / true,
            "fdr": 1 - right / size,
            "f1": 2 * right / (size + true),
            "size": size,
            "exact": ((ranks <= true[..., None]) == relevant).all(dim=-1).float(),
            "median_rank": median,
            "cross_entropy": cross_entropy(logits, y),
            "accuracy": torch.where(logits > 0, y, 1 - y),
        }


def trained(
    name: str,
    candidates: list[Candidate],
    seeds: list[int],
    plan: Plan,
    *,
    features: int = 11,
    report: Progress = lambda *_: None,
) -> list[list[dict[str, dict[str, float]]]]:
    """Train an operator's candidates on one set, all seeds at once: figures a candidate, a seed, a rule and part."""
    train = samples(name, plan.train, seeds, 0, plan, features=features)
    stack = fitted(train, candidates, seeds, plan, report=partial(report, f"{name} {type(candidates[0][0]).__name__}"))
    parts = {
        part: samples(name, n, seeds, index, plan, features=features)
        for index, (part, n) in enumerate((("validation", plan.validation), ("test", plan.test)), start=1)
        if n
    }
    found = {}
    if plan.normalise:
        found |= {f"moving {part}": stack.figures(data, stack.hard) for part, data in parts.items()}
        stack.settle(train)
    found |= {f"own {part}": stack.figures(data, stack.hard) for part, data in parts.items()}
    if "validation" in parts and not plan.shared:
        cut = thresholds(stack, parts["validation"])
        for part, data in parts.items():
            found[f"threshold {part}"] = stack.figures(data, lambda scores: over(stack, scores, cut))
    count = len(seeds)
    return [
        [{key: figures[index * count + seed] for key, figures in found.items()} for seed in range(count)]
        for index in range(len(candidates))
    ]


def over(stack: Stack, scores: Tensor, cut: Tensor) -> Tensor:
    """Features whose strength reaches a threshold a network (C S,), or the strongest one."""
    strong = stack.each(strength, scores)
    return (strong >= torch.minimum(cut[:, None, None], strong.amax(dim=-1, keepdim=True))).float()


@torch.no_grad()
def thresholds(stack: Stack, data: Samples) -> Tensor:
    """One a network (C S,): of those that leave MEAN_SIZES features, the one that the rule :func:`chosen` takes."""
    strong = stack.each(strength, stack.selector(stack.spread(data.features), training=False)).flatten(1)
    ordered = strong.sort(dim=1, descending=True).values
    n = data.targets.shape[1]
    tried = [ordered[:, min(round(size * n), ordered.shape[1]) - 1] for size in MEAN_SIZES]
    measured = [stack.figures(data, lambda scores, cut=cut: over(stack, scores, cut)) for cut in tried]  # type: ignore[misc]
    return torch.stack([tried[chosen(list(of))][place] for place, of in enumerate(zip(*measured, strict=True))])


def fitted(
    train: Samples, candidates: list[Candidate], seeds: list[int], plan: Plan, *, report: Callable[[int, int], None]
) -> Stack:
    """Trained networks."""
    width = train.features.shape[-1]
    count = len(candidates) * len(seeds)
    generator = torch.Generator().manual_seed(seeds[0])
    selector = StackedMLP(count, [width, *plan.selector, width], generator, plan.activation)
    selector.layers[-1].bias.data.fill_(START)
    predictor = StackedMLP(count, [width, *plan.predictor, 1], generator, plan.activation, plan.normalise)
    stack = Stack(candidates, len(seeds), selector, predictor)
    # Keras' l2(c) adds c w^2 to the loss; the last layer of the selector has none there
    kernels = [*list(selector.kernels())[:-1], *predictor.kernels()]
    decayed = {id(one) for one in kernels}
    others = [one for one in (*selector.parameters(), *predictor.parameters()) if id(one) not in decayed]
    groups = [{"params": kernels, "weight_decay": 2 * plan.penalty}, {"params": others}]
    optimiser = torch.optim.Adam(groups, plan.learning_rate, fused=True)
    prices = torch.tensor([price for _, price in candidates for _ in seeds])[:, None]
    order = [torch.Generator().manual_seed(7000 + seed) for seed in seeds]
    epochs: Tensor = torch.empty(len(seeds), 0, dtype=torch.long)
    rows = torch.arange(len(seeds))[:, None]
    for step in range(plan.steps):
        if epochs.shape[1] < plan.batch:
            epochs = torch.stack([torch.randperm(plan.train, generator=each) for each in order])
        batch, epochs = epochs[:, : plan.batch], epochs[:, plan.batch :]
        x, y = stack.spread(train.features[rows, batch]), stack.spread(train.targets[rows, batch])
        scores = selector(x)
        memberships = stack.each(lambda one, part: one.soft(part, None, generator), scores)
        loss = cross_entropy(predictor(x * memberships)[..., 0], y)
        if prices.any():
            size = stack.each(lambda one, part: one.expected_size(part), scores)
            loss = loss + prices * min(1, 2 * step / plan.steps) * size
        if plan.decaying:
            for group in optimiser.param_groups:
                group["lr"] = plan.learning_rate * (1 - step / plan.steps)
        optimiser.zero_grad(set_to_none=True)
        loss.mean(dim=1).sum().backward()
        optimiser.step()
        if step % 50 == 0:
            report(step, plan.steps)
    return stack
