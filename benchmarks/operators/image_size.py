"""Learning to explain in its original form against the size of the image.

``pixels`` is the original form: a selector network scores the patches of the image, a predictor network of its own
reads the pixels times the memberships. ``cells`` is the control: one trunk, built as the other form's two are; its
cells, one a patch, are scored by a linear layer, and a linear head reads the mean of the selected ones.

Photos are told apart by their classes, or by a mark of one patch that is put anywhere on them: then what is to be
found is the same at every size, and where it is is known.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.operators.bags import digits, fashion_or_mnist
from benchmarks.operators.gradient_quality import kept_bytes
from bla.data.image_sets import image_folder
from bla.data.photo import open_photo
from bla.operators import BoundedLogits, GumbelMaximum, SubsetOperator, gumbel_soft, normalised

FORMS = ("pixels", "cells")
SHARE = 1 / 8
"""Of the patches that are selected, by those that are told how many; of photos with a mark, MARKED."""
MARKED = 4
PRICE = 0.2
"""Of all the patches together, in nats, for the operator that is not told: chosen on training images."""
START = 2.0
"""Where every score starts: within the subset of the operators that have a bound."""
WIDTH = 16
BATCH = 32
RATE = 3e-3
MARK = torch.tensor([-1.0, 1, 1, -1]).expand(4, 4)
"""Class 0 is upright stripes, class 1 the same lying."""


@dataclasses.dataclass(frozen=True)
class OfficialGumbelMaximum(GumbelMaximum):
    """As the bounded-logit authors' code has it, which multiplies by the temperature."""

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        return gumbel_soft(scores, self.k, temperature=self.temperature, generator=generator)


@dataclasses.dataclass(frozen=True)
class All(SubsetOperator):
    """Every patch: what there is to lose."""

    def _soft(self, scores: Tensor, mask: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.ones_like(scores) + 0 * scores

    def _hard(self, scores: Tensor, mask: Tensor) -> Tensor:
        return mask

    def _expected_size(self, scores: Tensor, mask: Tensor) -> Tensor:
        return mask.sum(dim=-1) + 0 * scores.sum(dim=-1)


NAMES = ("all", "random", "gumbel-maximum", "gumbel-official", "bounded-dial", "bounded")


def operator_of(name: str, k: int) -> SubsetOperator:
    """By name, told to select k items; ``bounded`` is told nothing."""
    return {
        "all": All(),
        "random": GumbelMaximum(k),
        "gumbel-maximum": GumbelMaximum(k),
        "gumbel-official": OfficialGumbelMaximum(k),
        "bounded-dial": BoundedLogits(k=k, noise=1.0),
        "bounded": BoundedLogits(noise=1.0),
    }[name]


@dataclasses.dataclass(frozen=True)
class Task:
    """Images (n, C, S, S) in 0..1 as float or in 0..255 as uint8, labels (n,), and the side of a patch."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    patch: int
    flips: bool = False
    marked: bool = False

    @property
    def items(self) -> int:
        """Patches of an image."""
        return (self.images.shape[-1] // self.patch) ** 2

    @property
    def k(self) -> int:
        """How many to select."""
        return min(MARKED, self.items // 2) if self.marked else max(round(self.items * SHARE), 1)


def small_digits() -> Task:
    """scikit-learn's ten digits, 8x8, patches of 2x2: every fifth is test."""
    pixels, labels = digits()
    return _split(pixels.reshape(-1, 1, 8, 8), labels, patch=2)


def three_or_eight(folder: str) -> Task:
    """MNIST's 3 against 8, as published: 28x28, patches of 4x4."""
    pixels, labels = fashion_or_mnist(folder)
    wanted = (labels == 3) | (labels == 8)
    return _split(pixels[wanted].reshape(-1, 1, 28, 28), (labels[wanted] == 8).astype(np.int64), patch=4)


@functools.cache
def photographs(folder: str, size: int) -> tuple[Tensor, Tensor]:
    """All photos of an image folder, squashed to size x size, and their classes."""
    whole = image_folder(folder).whole()
    read = [np.array(open_photo(whole.path(row)).resize((size, size))) for row in range(len(whole))]
    return torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).contiguous(), torch.tensor(whole.labels)


def task_of(data: str | None, size: int, seed: int, *, marked: bool) -> Task:
    """Digits without data; MNIST's files; else photos at a size, of which every seed has another fifth as test."""
    if data is None:
        return small_digits()
    if any(Path(data).glob("train-images-idx3-ubyte*")):
        return three_or_eight(data)
    images, labels = photographs(data, size)
    generator = torch.Generator().manual_seed(seed)
    train, test = torch.randperm(len(labels), generator=generator).split([len(labels) * 4 // 5, -(-len(labels) // 5)])
    return Task(images[train], labels[train], images[test], labels[test], patch=4, flips=not marked, marked=marked)


def marked(patches: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Patches (B, N, 48) where one of each image, drawn, is its class's mark instead."""
    places = torch.randint(patches.shape[1], (len(patches),), generator=generator)
    marks = torch.stack([MARK, MARK.mT])[labels][:, None].expand(-1, 3, -1, -1).flatten(1)
    return patches.index_put((torch.arange(len(patches)), places), marks)


def _split(images: Any, labels: Any, *, patch: int) -> Task:
    test = np.arange(len(labels)) % 5 == 0
    parts = [torch.from_numpy(v[rows]) for rows in (~test, test) for v in (images, labels)]
    return Task(*parts, patch=patch)


class Trunk(nn.Module):
    """Patches (B, N, P) to one cell a patch (B, WIDTH, H, W); a cell sees 5 x 5 patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Linear(width, WIDTH)
        self.around = nn.ModuleList(nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(2))

    def forward(self, patches: Tensor) -> Tensor:
        """Cells, none negative."""
        side = math.isqrt(patches.shape[1])
        cells = torch.relu(self.patches(patches)).mT.unflatten(2, (side, side)).contiguous()
        for layer in self.around:
            cells = torch.relu(layer(cells))
        return cells


class Selecting(nn.Module):
    """Patches of images to logits and to the scores of the patches, in one of the two forms."""

    def __init__(self, form: str, operator: SubsetOperator, width: int, classes: int, *, fixed: bool = False) -> None:
        super().__init__()
        self.operator, self.fixed = operator, fixed
        self.trunk = Trunk(width)
        self.predictor = Trunk(width) if form == "pixels" else None
        self.score = nn.Linear(WIDTH, 1)
        nn.init.constant_(self.score.bias, START)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, patches: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Logits (B, K) and scores (B, N); by the soft memberships in training, by the hard ones else."""
        cells = self.trunk(patches).flatten(2)
        scores = self.score(cells.mT)[..., 0]
        if self.fixed:  # the same for every image: chosen by chance, never learnt
            scores = 0 * scores + torch.rand(scores.shape[1], generator=torch.Generator().manual_seed(0))
        soft = self.training and not self.fixed
        memberships = self.operator.soft(scores, None, generator) if soft else self.operator.hard(scores)
        if self.predictor is None:
            return self.head((cells @ normalised(memberships)[..., None])[..., 0]), scores
        # a patch's pixels times its membership: what a mask on the image does
        return self.head(self.predictor(patches * memberships[..., None]).mean(dim=(2, 3))), scores


def patches_of(images: Tensor, patch: int) -> Tensor:
    """Images (B, C, S, S), bytes or 0..1, to their patches' pixels (B, N, C patch patch) about 0, which is mid-grey."""
    side = images.shape[-1] // patch
    cut = (
        images.unflatten(3, (side, patch))
        .unflatten(2, (side, patch))
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(3)
        .flatten(1, 2)
    )
    return cut.float() / 127.5 - 1 if images.dtype == torch.uint8 else 2 * cut - 1


def trained_on(form: str, name: str, task: Task, seed: int, *, steps: int, report: Any) -> dict[str, float]:
    """Train and measure: accuracy by the hard subset and by the soft memberships, and the share that is selected."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    operator = operator_of(name, task.k)
    width = task.images.shape[1] * task.patch**2
    model = Selecting(form, operator, width, int(task.labels.max()) + 1, fixed=name == "random")
    optimiser = torch.optim.Adam(model.parameters(), RATE, fused=True)
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(task.labels), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        patches, labels = drawn(task, task.images[rows], task.labels[rows], generator, flips=task.flips)
        logits, scores = model(patches, generator)
        loss = cross_entropy(logits, labels)
        if name == "bounded":
            loss = loss + PRICE * rising(step / steps) * operator.expected_size(scores).mean() / task.items
        for group in optimiser.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            report(f"{form}, {task.images.shape[-1]}x{task.images.shape[-1]}, {name}", step, steps)
    found: dict[str, list[Tensor]] = {"top1": [], "soft": [], "share": []}
    with torch.no_grad():
        for start in range(0, len(task.test_labels), BATCH):
            some = slice(start, start + BATCH)
            patches, labels = drawn(task, task.test_images[some], task.test_labels[some], generator)
            for mode, key in ((True, "soft"), (False, "top1")):
                logits, scores = model.train(mode)(patches, generator)
                found[key].append((logits.argmax(dim=1) == labels).float())
            found["share"].append(operator.size(scores) / task.items)
    return {key: float(torch.cat(values).mean()) for key, values in found.items()}


def drawn(
    task: Task, images: Tensor, labels: Tensor, generator: torch.Generator, *, flips: bool = False
) -> tuple[Tensor, Tensor]:
    """Patches and labels of a batch, with a new mark on each image if the task has marks."""
    if flips and torch.rand((), generator=generator) < 0.5:
        images = images.flip(-1)
    patches = patches_of(images, task.patch)
    if not task.marked:
        return patches, labels
    labels = torch.randint(2, (len(patches),), generator=generator)
    return marked(patches, labels, generator), labels


def rising(progress: float) -> float:
    """The price's share: nothing for a third of the training, all of it from two thirds on."""
    return min(max(3 * progress - 1, 0), 1)


def kept_megabytes(name: str, items: int, k: int) -> float:
    """What an operator holds for the way back for a batch of images."""
    return BATCH * kept_bytes(operator_of(name, k), torch.randn(1, items, requires_grad=True)) / 2**20
