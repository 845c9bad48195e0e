"""Multiple-instance bags (Ilse et al. 2018): a bag is positive if it holds a 9. Which instances make it so?

Pools: gated attention, mean and maximum on the one side; bounded logits on the other. All train on bag labels alone.
"""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from bla.operators import BoundedLogits, HardConcrete, normalised
from stacked import StackedLinear, StackedMLP

POOLS = ("bounded", "bounded-plain", "hard-concrete", "gated-attention", "mean", "maximum")
SETTINGS = (0.0, 0.003, 0.01, 0.03)
"""Prices of an instance, of those that choose a size; weight decays of the others: four settings each."""
WANTED = 9
WIDTH = 64

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


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


class _Model:
    """All seeds' networks: (S, bags, length, pixels) to bag logits, weights and memberships."""

    def __init__(self, pool: str, seeds: int, pixels: int, setting: float) -> None:
        generator = torch.Generator().manual_seed(0)
        self.pool, self.setting, self.generator = pool, setting, generator
        self.embedding = StackedMLP(seeds, [pixels, WIDTH, WIDTH], generator, torch.relu)
        self.value = StackedLinear(seeds, WIDTH, 32, generator)
        self.gate = StackedLinear(seeds, WIDTH, 32, generator)
        self.score = StackedLinear(seeds, 32, 1, generator)
        self.head = StackedLinear(seeds, WIDTH, 1, generator)
        self.operator = {
            "bounded": BoundedLogits(noise=1.0), "bounded-plain": BoundedLogits(), "hard-concrete": HardConcrete(),
        }.get(pool)  # fmt: skip
        layers = (self.value, self.gate, self.score, self.head)
        self.parameters = [*self.embedding.parameters(), *(p for layer in layers for p in (layer.weight, layer.bias))]

    def __call__(self, x: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Bag logits (S, B), what instances are chosen by (S, B, L), a price to add (S, B)."""
        seeds, bags, length, _ = x.shape
        h = torch.relu(self.embedding(x.flatten(1, 2)))
        if self.pool == "maximum":  # of the instances' own logits, as published
            single = self.head(h).reshape(seeds, bags, length)
            return single.amax(dim=-1), torch.sigmoid(single), torch.zeros(seeds, bags)
        if self.pool == "mean":
            single = self.head(h).reshape(seeds, bags, length)
            return single.mean(dim=-1), torch.sigmoid(single), torch.zeros(seeds, bags)
        scores = self.score(torch.tanh(self.value(h)) * torch.sigmoid(self.gate(h))).reshape(seeds, bags, length)
        price = torch.zeros(seeds, bags)
        if self.operator is None:
            weights = strength = torch.softmax(scores, dim=-1)
        else:
            strength = scores
            memberships = (
                self.operator.soft(scores, None, self.generator) if training else self.operator.hard(scores)
            )  # fmt: skip
            weights = normalised(memberships)
            price = self.setting * self.operator.expected_size(scores)
        pooled = (weights[..., None] * h.reshape(seeds, bags, length, -1)).sum(dim=2)
        return self.head(pooled)[..., 0], strength, price


def trained_bags(
    pool: str,
    images: Images,
    labels: Labels,
    seeds: list[int],
    *,
    count: int,
    length: int,
    scale: float,
    report: Callable[[str, int, int], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Each setting trained, all seeds at once; that of the best validation loss kept for each seed; its test figures.

    What is not hard gets its threshold on the weights from validation too: the best F1 there, which takes instance
    labels that a hard subset does without. ``f1_threshold`` gives every pool that, on scores where it has an operator.
    """
    splits = [_split(labels, seed, count, length) for seed in seeds]
    pixels = torch.from_numpy(images)
    bags = [torch.from_numpy(np.stack([split[part] for split in splits])) for part in range(3)]
    wanted = [torch.from_numpy(labels)[part] == WANTED for part in bags]
    best: list[dict[str, Any]] = [{"validation_loss": float("inf")} for _ in seeds]
    for setting in SETTINGS:
        outcome = _fitted(pool, pixels, bags, wanted, setting=setting, steps=max(int(400 * scale), 5), report=report)
        best = [new if new["validation_loss"] < old["validation_loss"] else old
                for new, old in zip(outcome, best, strict=True)]  # fmt: skip
    return best


def _split(labels: Labels, seed: int, count: int, length: int) -> tuple[Labels, Labels, Labels]:
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(labels))
    edges = np.split(rows, [int(0.5 * len(rows)), int(0.65 * len(rows))])
    sizes = (count, 200, 500)
    train, validation, test = (
        drawn_bags(labels, part, n, length, rng) for part, n in zip(edges, sizes, strict=True)
    )  # fmt: skip
    return train, validation, test


def _fitted(
    pool: str, pixels: Tensor, bags: list[Tensor], wanted: list[Tensor], *, setting: float, steps: int, report: Any
) -> list[dict[str, Any]]:
    seeds, count = bags[0].shape[:2]
    model = _Model(pool, seeds, pixels.shape[1], setting)
    decay = 1e-4 if model.operator is not None else setting or 1e-4
    optimiser = torch.optim.Adam(model.parameters, 1e-3, weight_decay=decay, foreach=True)
    rows = torch.arange(seeds)[:, None]
    draws = torch.Generator().manual_seed(1)
    for step in range(steps):
        chosen = torch.randint(count, (seeds, min(32, count)), generator=draws)
        logits, _, price = model(pixels[bags[0][rows, chosen]], training=True)
        target = wanted[0][rows, chosen].any(dim=-1).float()
        loss = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
        loss = loss + price * min(1, 2 * step / steps)
        optimiser.zero_grad(set_to_none=True)
        loss.mean(dim=1).sum().backward()
        optimiser.step()
        if step % 100 == 0:
            report(f"bags, {pool}", step, steps)
    with torch.no_grad():
        (v_logits, v_weights, _), (t_logits, t_weights, _) = (model(pixels[part], training=False) for part in bags[1:])
    outcome = []
    for seed in range(seeds):
        positive = wanted[2][seed].any(dim=-1)
        validation = wanted[1][seed].any(dim=-1)
        levels = torch.quantile(v_weights[seed].flatten()[:10_000], torch.linspace(0, 1, 101))
        # in a negative bag nothing is claimed: instances count where the bag is called positive
        called, t_called = (v_logits[seed] > 0)[:, None], (t_logits[seed] > 0)[:, None]
        threshold = max(
            levels.tolist(), key=lambda level: found((v_weights[seed] > level) & called, wanted[1][seed])["f1"]
        )  # fmt: skip
        chosen = over = t_weights[seed] > threshold
        if model.operator is not None:
            chosen = model.operator.hard(t_weights[seed]).bool()
        outcome.append({
            "auc": auc(t_logits[seed], positive),
            **found(chosen & t_called, wanted[2][seed]),
            "f1_threshold": found(over & t_called, wanted[2][seed])["f1"],
            "validation_loss": float(functional.binary_cross_entropy_with_logits(v_logits[seed], validation.float())),
        })  # fmt: skip
    return outcome
