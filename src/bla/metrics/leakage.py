r"""Does a selection carry the class by what it keeps, or by which cells it keeps? An evaluator that was never told.

A selector trained together with its head can encode the class in the shape of its masks, and the head can learn to
read the code. The remedy (EVAL-X, Jethani et al. 2021, arXiv 2103.01890) is a judge trained on random subsets alone:

.. math:: \min_w \; E_{(F, y)} E_{S \sim \text{law}} \; -\log \mathrm{softmax}\big(
          W \tfrac1m \textstyle\sum_{n \in S} F_n + b\big)_y

Architecture, fixed: dropout 0.2 and one linear layer on the mean of the cells kept. Law of S, fixed: a size m uniform
in 1..N for each mask, then m of the N cells uniformly. Adam, 1e-3, batches of 32 images with four masks each, 1,500
of them or 3 epochs, whichever is more.

Beside it stand a probe that sees only the mask (N inputs, 128 hidden units, ReLU), which measures what the code alone
could tell, and a linear layer retrained on the selected cells alone (ROAR's question, Hooker et al. 2019, arXiv
1806.10758, asked of what is kept). All of them take any selector's masks, from any program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.metrics.cells import read_cells
from bla.metrics.metric import Metric

Features = Tensor | Callable[[npt.NDArray[np.int64]], Tensor]
"""(N, C, H, W), or a callable that gives the rows asked for, such as a feature cache's ``batch``."""

STEPS, EPOCHS = 1500, 3
MASKS_AN_IMAGE = 4
BATCH = 32
_READING = 64
_DROPOUT, _LEARNING_RATE, _PROBE_WIDTH = 0.2, 1e-3, 128

_EVALX = "Jethani et al. 2021 (EVAL-X, arXiv 2103.01890), on cells of the feature map"
METRICS = {
    metric.name: metric
    for metric in (
        Metric("evaluator", "evaluator's accuracy from the selected cells", "1[evaluator(S) = y]", _EVALX, "higher"),
        Metric(
            "evaluator_left", "evaluator's accuracy from the cells left out", "1[evaluator(not S) = y]", _EVALX, "lower"
        ),
        Metric(
            "mask_only",
            "accuracy of a probe that sees only the mask",
            "1[probe(the N bits of S) = y], the probe trained on the training images' masks: chance is 1 / classes",
            "after Jethani et al. 2021 and Puli et al. 2024 on encoding explanations",
            "lower",
        ),
        Metric(
            "retrained",
            "accuracy of a head retrained on the selected cells",
            "1[linear layer trained on the training images' mean over S = y]",
            "after Hooker et al. 2019 (ROAR, arXiv 1806.10758), keeping in place of removing",
            "higher",
        ),
        Metric(
            "off_object",
            "evaluator's accuracy from the selected cells off the object",
            "1[evaluator(cells of S covered by less than a tenth) = y], over images with such cells",
            "ours",
            None,
        ),
    )
}


class Evaluator(nn.Module):
    """The judge: pooled features (B, C) to logits (B, K). :func:`train_evaluator` makes one."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(_DROPOUT)
        self.linear = nn.Linear(channels, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits of the mean of the cells kept."""
        logits: Tensor = self.linear(self.dropout(pooled))
        return logits

    @torch.no_grad()
    def correct(self, features: Features, masks: Tensor, labels: Tensor) -> Tensor:
        """Whether the evaluator names the class (N,) from the cells of each mask (N, H, W) or (N, M, H, W)."""
        sets = masks[:, None] if masks.ndim == 3 else masks
        found = []
        for rows in _rows(len(labels)):
            maps = _batch(features, rows).to(self.linear.weight)
            logits = read_cells(self, maps, sets[rows].to(maps.device), affine=True)
            found.append(logits.argmax(dim=2).cpu() == labels[rows, None].cpu())
        return torch.cat(found).reshape(masks.shape[: masks.ndim - 2])

    def accuracy(self, features: Features, masks: Tensor, labels: Tensor) -> float:
        """The share of images whose class the evaluator names from the cells of the masks (N, H, W)."""
        return float(self.correct(features, masks, labels).double().mean())


def random_masks(count: int, grid: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Masks (count, H, W) by the evaluator's law: a size uniform in 1..N, then so many cells uniformly.

    >>> random_masks(1000, (7, 7), torch.Generator().manual_seed(0)).sum(dim=(1, 2)).float().mean().round()
    tensor(25.)
    """
    cells = grid[0] * grid[1]
    sizes = torch.randint(1, cells + 1, (count, 1), generator=generator)
    order = torch.rand(count, cells, generator=generator).argsort(dim=1).argsort(dim=1)
    return (order < sizes).reshape(count, *grid)


@torch.inference_mode(False)
@torch.enable_grad()
def train_evaluator(
    features: Features, labels: Tensor, *, classes: int | None = None, steps: int = STEPS, seed: int = 0
) -> Evaluator:
    """Train a judge on random subsets of the cells, for any selector's hard masks.

    Parameters
    ----------
    features: of the training images; on the device that the evaluator is to be on.
    labels: (N,) class indices.
    classes: K; by default one more than the largest label.
    steps: batches at the least; and at the least three epochs.

    Examples
    --------
    >>> labels = torch.arange(64) % 2
    >>> features = torch.randn(64, 8, 3, 3) + 3 * labels[:, None, None, None]
    >>> judge = train_evaluator(features, labels, steps=400)
    >>> masks = torch.zeros(64, 3, 3, dtype=torch.bool)  # anyone's selector
    >>> masks[:, 1, 1] = True
    >>> judge.accuracy(features, masks, labels) > 0.8
    True
    """
    _check(labels)
    first = _batch(features, np.arange(1))
    classes = int(labels.max()) + 1 if classes is None else classes
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        evaluator = Evaluator(first.shape[1], classes).to(first.device)
        optimiser = torch.optim.Adam(evaluator.parameters(), lr=_LEARNING_RATE)
        for rows in _shuffled(len(labels), steps, generator):
            maps = _batch(features, rows).float()
            sets = random_masks(len(rows) * MASKS_AN_IMAGE, (maps.shape[2], maps.shape[3]), generator)
            weights = sets.reshape(len(rows), MASKS_AN_IMAGE, -1).to(maps)
            pooled = torch.bmm(weights / weights.sum(dim=2, keepdim=True), maps.flatten(2).transpose(1, 2))
            targets = labels[rows].to(maps.device).repeat_interleave(MASKS_AN_IMAGE)
            loss = functional.cross_entropy(evaluator(pooled.flatten(0, 1)), targets)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return evaluator.eval().requires_grad_(False)


def mask_probe(
    train_masks: Tensor, train_labels: Tensor, masks: Tensor, labels: Tensor, *, classes: int, seed: int = 0
) -> Tensor:
    """Whether a probe that sees only the masks (N, H, W) names each class (N,): what their shape alone gives away."""
    _check(train_labels)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        cells = masks[0].numel()
        probe = nn.Sequential(nn.Linear(cells, _PROBE_WIDTH), nn.ReLU(), nn.Linear(_PROBE_WIDTH, classes))
        _fit(probe, train_masks.flatten(1).float(), train_labels, seed)
    with torch.no_grad():
        named: Tensor = probe(masks.flatten(1).float()).argmax(dim=1) == labels
    return named


def retrained(
    train_pooled: Tensor, train_labels: Tensor, pooled: Tensor, labels: Tensor, *, classes: int, seed: int = 0
) -> Tensor:
    """Whether a linear layer trained on the mean of the selected cells (N, C) names each class (N,) from them."""
    _check(train_labels)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        head = nn.Sequential(nn.Dropout(_DROPOUT), nn.Linear(pooled.shape[1], classes))
        _fit(head, train_pooled, train_labels, seed)
    with torch.no_grad():
        named: Tensor = head(pooled).argmax(dim=1) == labels
    return named


@torch.no_grad()
def mean_of_selected(features: Features, masks: Tensor) -> Tensor:
    """The mean (N, C) of each image's selected cells (N, H, W); of several sets (N, M, H, W), (N, M, C)."""
    sets = masks[:, None] if masks.ndim == 3 else masks
    found = []
    for rows in _rows(len(masks)):
        maps = _batch(features, rows)
        found.append(read_cells(lambda pooled: pooled, maps, sets[rows].to(maps.device)).cpu())
    means = torch.cat(found)
    return means[:, 0] if masks.ndim == 3 else means


@torch.inference_mode(False)
@torch.enable_grad()
def _fit(network: nn.Module, inputs: Tensor, labels: Tensor, seed: int) -> None:
    optimiser = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE)
    network.train()
    for rows in _shuffled(len(labels), STEPS, torch.Generator().manual_seed(seed)):
        loss = functional.cross_entropy(network(inputs[rows].clone()), labels[rows])
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    network.eval()


def _shuffled(count: int, steps: int, generator: torch.Generator) -> Iterator[npt.NDArray[np.int64]]:
    for _ in range(max(EPOCHS, -(-steps // -(-count // BATCH)))):
        order = torch.randperm(count, generator=generator).numpy()
        yield from (order[start : start + BATCH] for start in range(0, count, BATCH))


def _rows(count: int) -> Iterator[npt.NDArray[np.int64]]:
    edges = [*range(0, count, _READING), count]
    return (np.arange(start, stop) for start, stop in itertools.pairwise(edges))


def _batch(features: Features, rows: npt.NDArray[np.int64]) -> Tensor:
    return features[rows] if isinstance(features, Tensor) else features(rows)


def _check(labels: Tensor) -> None:
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        raise ValueError(
            f"expected labels as class indices (N,), at least one, got {labels.dtype} {tuple(labels.shape)}"
        )
