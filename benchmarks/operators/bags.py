"""Multiple-instance bags (Ilse et al. 2018): a bag is positive if it holds a 9. Which instances make it so?

Every pool is three choices: what an instance's score is (its own logit, or gated attention's), what memberships the
scores give, and how the bag's logit is read from the instances' own logits and the memberships. All train on bag labels
alone.
"""

from __future__ import annotations

import dataclasses
import gzip
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.operators.stacked import StackedLinear, StackedMLP
from bla.operators import BoundedLogits, HardConcrete, SubsetOperator, normalised
from bla.progress import Progress, silent

WANTED = 9
WIDTH = 64
DECAYS = (1e-4, 0.01, 0.03, 0.1)
PRICES = (0.0, 0.003, 0.01, 0.03)

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Reading = Callable[[Tensor, Tensor], Tensor]


def mean_of(own: Tensor, memberships: Tensor) -> Tensor:
    """The members' mean logit. A linear head makes it that of the members' mean feature, as attention reads it."""
    return (normalised(memberships) * own).sum(dim=-1)


def odds_of(own: Tensor, memberships: Tensor, sharpness: float = 1.0) -> Tensor:
    """log(sum m exp(sharpness a)) / sharpness of the members' logits: positive as soon as one of them is.

    The logarithm of their summed odds at 1, which is nearly the largest; the lower, the more of them count (log-sum-exp
    pooling, Pinheiro and Collobert 2015).
    """
    return torch.logsumexp(sharpness * own + memberships.clamp(min=1e-8).log(), dim=-1) / sharpness


def sum_of(own: Tensor, memberships: Tensor) -> Tensor:
    """The members' logits, summed."""
    return (memberships * own).sum(dim=-1)


def highest_of(own: Tensor, memberships: Tensor) -> Tensor:
    """The largest logit."""
    return own.amax(dim=-1)


@dataclasses.dataclass(frozen=True)
class Pool:
    """How a bag is read. Without an operator every instance is a member, gated ones by a softmax of their scores."""

    read: Reading
    operator: SubsetOperator | None = None
    gated: bool = False
    priced: bool = False
    low: bool = False
    """Own logits start where L alike ones give a bag the logit 0: log-sum-exp adds log L / sharpness to them."""

    def start(self, length: int) -> float:
        """Where own logits start."""
        alike = torch.zeros(length, dtype=torch.float64)
        return -self.read(alike, torch.ones_like(alike)).item() if self.low else 0.0

    def settings(self) -> list[tuple[float, float]]:
        """Four for every pool: weight decays, or prices of an instance at the least weight decay."""
        return [(DECAYS[0], price) for price in PRICES] if self.priced else [(decay, 0.0) for decay in DECAYS]

    def memberships(self, scores: Tensor, generator: torch.Generator | None) -> Tensor:
        """Of instances (..., L): relaxed with a generator, in training; without one what is used at test."""
        if self.operator is None:
            return torch.softmax(scores, dim=-1) if self.gated else torch.ones_like(scores)
        return self.operator.hard(scores) if generator is None else self.operator.soft(scores, None, generator)


SOFTLY = partial(odds_of, sharpness=0.5)

POOLS = {
    "bounded": Pool(SOFTLY, BoundedLogits(0.1, noise=3.0), low=True),
    "hard-concrete": Pool(odds_of, HardConcrete()),
    "gated-attention": Pool(mean_of, gated=True),
    "mean": Pool(mean_of),
    "maximum": Pool(highest_of),
    "odds": Pool(odds_of),
}
"""Those of the tables."""

ATTEMPTS = {
    "bounded-low-noise": Pool(SOFTLY, BoundedLogits(0.1, noise=1.0), low=True),
    "bounded-odds-low": Pool(odds_of, BoundedLogits(0.1, noise=1.0), low=True),
    "bounded-odds": Pool(odds_of, BoundedLogits(noise=1.0)),
    "bounded-mean": Pool(mean_of, BoundedLogits(noise=1.0)),
    "bounded-sum": Pool(sum_of, BoundedLogits(noise=1.0)),
    "bounded-gated": Pool(mean_of, BoundedLogits(noise=1.0), gated=True, priced=True),
    "odds-softly": Pool(SOFTLY, low=True),
}
"""What else bounded logits were tried as, and the tables' reading without a selection."""


def digits() -> tuple[Images, Labels]:
    """scikit-learn's 1,797 digits of 8x8 pixels, flat, in 0..1."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    return (loaded.data / 16).astype(np.float32), loaded.target.astype(np.int64)


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """An array in MNIST's idx format, gzipped or not.

    Raises
    ------
    ValueError
        If the file is not idx of bytes, or is cut short.
    """
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"expected {path} in idx format, of bytes, got one that starts with {raw[:4].hex()}")
    shape = struct.unpack_from(f">{raw[3]}I", raw, 4)
    values = np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3])
    if values.size != np.prod(shape):
        raise ValueError(f"expected {int(np.prod(shape))} values in {path}, got {values.size}: fetch it again")
    return values.reshape(shape)


def fashion_or_mnist(folder: str | Path) -> tuple[Images, Labels]:
    """Training and test images of a folder that holds MNIST's four files (Debian: dataset-fashion-mnist)."""
    images, labels = [], []
    for part in ("train", "t10k"):
        for kind, into in (("images-idx3", images), ("labels-idx1", labels)):
            found = sorted(Path(folder).glob(f"{part}-{kind}-ubyte*"))
            if not found:
                raise ValueError(f"expected {part}-{kind}-ubyte or the same with .gz in {folder}, found neither")
            into.append(read_idx(found[0]))
    pixels = np.concatenate(images)
    return (pixels.reshape(len(pixels), -1) / 255).astype(np.float32), np.concatenate(labels).astype(np.int64)


def drawn_bags(labels: Labels, rows: Labels, count: int, length: int, rng: np.random.Generator) -> Labels:
    """Rows of the images in each bag (count, length), half of the bags positive; lengths as published, fixed here."""
    wanted, others = rows[labels[rows] == WANTED], rows[labels[rows] != WANTED]
    bags = rng.choice(others, (count, length))
    for bag in bags[: count // 2]:
        # as many wanted ones as a bag of random instances has, given that it has one
        while not (inside := rng.random(length) < 0.1).any():
            pass
        bag[inside] = rng.choice(wanted, inside.sum())
    order: Labels = bags[rng.permutation(count)]
    return order


def auc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the share of pairs in the right order, ties half."""
    above = scores[positive][:, None] - scores[~positive][None, :]
    return float(((above > 0).double() + (above == 0).double() / 2).mean())


def found(chosen: Tensor, wanted: Tensor) -> dict[str, float]:
    """Precision, recall and F1 of chosen instances."""
    right, precision_of, recall_of = float((chosen & wanted).sum()), float(chosen.sum()), float(wanted.sum())
    return {
        "precision": right / max(precision_of, 1),
        "recall": right / max(recall_of, 1),
        "f1": 2 * right / max(precision_of + recall_of, 1),
    }


class Networks:
    """All seeds' and settings' networks: images (S, M, pixels) to own logits and scores, (S, M) each."""

    def __init__(self, pool: Pool, count: int, pixels: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = StackedMLP(count, [pixels, WIDTH, WIDTH], generator, torch.relu)
        self.head = StackedLinear(count, WIDTH, 1, generator)
        self.head.bias.data.fill_(pool.start(length))
        layers = [self.head]
        self.gates: list[StackedLinear] = []
        if pool.gated:
            self.gates = [StackedLinear(count, *shape, generator) for shape in ((WIDTH, 32), (WIDTH, 32), (32, 1))]
            layers += self.gates
        self.parameters = [*self.embedding.parameters(), *(p for layer in layers for p in (layer.weight, layer.bias))]

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.embedding(images))
        own = self.head(h)[..., 0]
        if not self.gates:
            return own, own
        value, gate, score = self.gates
        return own, score(torch.tanh(value(h)) * torch.sigmoid(gate(h)))[..., 0]


@dataclasses.dataclass(frozen=True)
class _Part:
    """One part of every seed's split: its images' rows (S, M), and bags (S, B, L) of positions among them."""

    rows: Tensor
    bags: Tensor
    wanted: Tensor
    """Which instances are the ones looked for, (S, B, L)."""

    @property
    def positive(self) -> Tensor:
        return self.wanted.any(dim=-1)


def trained_bags(
    pool: str,
    images: Images,
    labels: Labels,
    seeds: list[int],
    *,
    count: int,
    length: int,
    scale: float,
    report: Progress = silent,
) -> list[dict[str, Any]]:
    """Each setting trained, all seeds at once; that of the best validation loss kept for each seed; its test figures.

    What is not hard gets its threshold on the scores from validation too: the best F1 there, which takes instance
    labels that a hard subset does without. ``f1_threshold`` gives every pool that.
    """
    kind = {**POOLS, **ATTEMPTS}[pool]
    pixels = torch.from_numpy(images)
    train, validation, test = _parts(labels, seeds, count, length)
    networks = Networks(kind, len(seeds) * len(kind.settings()), pixels.shape[1], length)
    _fit(networks, kind, pixels, train, steps=max(int(400 * scale), 5), report=partial(report, f"bags, {pool}"))
    with torch.no_grad():
        on_validation, on_test = (_used(networks, kind, pixels, part) for part in (validation, test))
    outcome = []
    for place in range(len(on_test[0])):
        seed = place % len(seeds)
        figures = [
            _Judged(logits[place], scores[place], part.wanted[seed])
            for (logits, scores), part in ((on_validation, validation), (on_test, test))
        ]
        outcome.append(_figures(kind, *figures))
    return [min(outcome[seed :: len(seeds)], key=lambda one: one["validation_loss"]) for seed in range(len(seeds))]


def _parts(labels: Labels, seeds: list[int], count: int, length: int) -> list[_Part]:
    """Half of the images for training bags, 15% for 200 validation bags, the rest for 500 test bags."""
    drawn: list[list[tuple[Labels, Labels]]] = [[], [], []]
    for seed in seeds:
        rng = np.random.default_rng(seed)
        rows = rng.permutation(len(labels))
        edges = np.split(rows, [int(0.5 * len(rows)), int(0.65 * len(rows))])
        for into, part, bags in zip(drawn, edges, (count, 200, 500), strict=True):
            into.append((part, drawn_bags(labels[part], np.arange(len(part)), bags, length, rng)))
    parts = []
    for part in drawn:
        rows, bags = (torch.from_numpy(np.stack(each)) for each in zip(*part, strict=True))
        wanted = torch.from_numpy(labels)[rows] == WANTED
        parts.append(_Part(rows, bags, wanted.gather(1, bags.flatten(1)).reshape(bags.shape)))
    return parts


def instances(networks: Networks, pixels: Tensor, rows: Tensor, bags: Tensor) -> tuple[Tensor, Tensor]:
    """Own logits and scores of bags' instances, (settings * seeds, B, L): each image once, if that is less to do."""
    settings = networks.head.weight.shape[0] // len(bags)
    flat = bags.flatten(1)
    once = rows.shape[1] < flat.shape[1]
    shown = pixels[rows if once else rows.gather(1, flat)].repeat(settings, 1, 1)
    figures = networks(shown)
    if once:
        figures = tuple(one.gather(1, flat.repeat(settings, 1)) for one in figures)
    own, scores = (one.reshape(-1, *bags.shape[1:]) for one in figures)
    return own, scores


def _fit(networks: Networks, pool: Pool, pixels: Tensor, train: _Part, *, steps: int, report: Any) -> None:
    seeds, count = train.bags.shape[:2]
    decays, prices = torch.tensor(pool.settings()).repeat_interleave(seeds, dim=0).T
    optimiser = torch.optim.Adam(networks.parameters, 1e-3, foreach=True)
    draws, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    for step in range(steps):
        chosen = torch.randint(count, (seeds, min(32, count)), generator=draws)
        rows = torch.arange(seeds)[:, None]
        own, scores = instances(networks, pixels, train.rows, train.bags[rows, chosen])
        logits = pool.read(own, pool.memberships(scores, noise))
        target = train.positive[rows, chosen].to(logits.dtype).repeat(len(logits) // seeds, 1)
        loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
        if pool.operator is not None and pool.priced:
            loss = loss + prices * pool.operator.expected_size(scores).mean(dim=1) * min(1, 2 * step / steps)
        optimiser.zero_grad(set_to_none=True)
        loss.sum().backward()
        for one in networks.parameters:  # the optimiser's own weight decay is one number for all networks
            assert one.grad is not None
            one.grad.add_(decays[:, None, None] * one.detach())
        optimiser.step()
        if step % 100 == 0:
            report(step, steps)


def _used(networks: Networks, pool: Pool, pixels: Tensor, part: _Part) -> tuple[Tensor, Tensor]:
    """Bag logits, and what a threshold on instances is put on: scores, attention's weights. In pieces, for memory."""
    pieces = [instances(networks, pixels, part.rows, some) for some in part.bags.split(100, dim=1)]
    own, scores = (torch.cat(each, dim=1) for each in zip(*pieces, strict=True))
    memberships = pool.memberships(scores, None)
    return pool.read(own, memberships), memberships if pool.gated and pool.operator is None else scores


@dataclasses.dataclass(frozen=True)
class _Judged:
    """One network's bag logits (B,), instances' scores (B, L) and which are wanted (B, L)."""

    logits: Tensor
    scores: Tensor
    wanted: Tensor

    def found(self, chosen: Tensor) -> dict[str, float]:
        """Of chosen instances in the bags that are called positive: in a negative bag nothing is claimed."""
        return found(chosen & (self.logits > 0)[:, None], self.wanted)

    def bag_figures(self) -> tuple[float, float]:
        """Cross entropy and area under the curve."""
        positive = self.wanted.any(dim=-1)
        loss = functional.binary_cross_entropy_with_logits(self.logits, positive.to(self.logits.dtype))
        return float(loss), auc(self.logits, positive)


def _figures(pool: Pool, validation: _Judged, test: _Judged) -> dict[str, float]:
    levels = torch.quantile(validation.scores.flatten()[:10_000], torch.linspace(0, 1, 101)).tolist()
    level = max(levels, key=lambda level: validation.found(validation.scores > level)["f1"])
    own = [
        judged.found(judged.scores > level if pool.operator is None else pool.operator.hard(judged.scores).bool())
        for judged in (validation, test)
    ]
    loss, area = validation.bag_figures()
    return {
        "auc": test.bag_figures()[1],
        **own[1],
        "f1_threshold": test.found(test.scores > level)["f1"],
        "validation_loss": loss,
        "validation_auc": area,
        "validation_f1": own[0]["f1"],
    }
