r"""Does a selection carry the class in what it keeps, or in which cells it keeps?

A selector trained together with its head can encode the class in the shape of its masks, and the head can learn to
read the code. The remedy (EVAL-X, Jethani et al. 2021, arXiv 2103.01890) is an evaluator trained on random subsets
alone, which has never seen the selector:

.. math:: \min_w \; E_{(F, y)} E_{S \sim \text{law}} \; -\log \mathrm{softmax}\bigl(
          W \tfrac1m \textstyle\sum_{n \in S} F_n + b\bigr)_y

Architecture, fixed: dropout 0.2 and one linear layer on the mean of the cells kept. Law of S, fixed: a size m uniform
in 1..N for each mask, then m of the N cells uniformly. Adam, 1e-3, batches of 32 images with four masks each, 1,500
batches or 3 epochs, whichever is more.

Three more small networks: a probe that sees only the mask (N inputs, 128 hidden units, ReLU), which measures the code
alone; the same added to the evaluator's answer, which measures what the mask tells beyond the selected values
(:func:`encoding`); and a linear layer retrained on the selected cells alone (after ROAR, Hooker et al. 2019, arXiv
1806.10758). All take the masks of any selector, from any program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.metrics.cells import Features, batches, read_cells, rows_of
from bla.metrics.fitting import Rows, fit_minibatches

Network = TypeVar("Network", bound=nn.Module)

STEPS, EPOCHS = 1500, 3
MASKS_AN_IMAGE = 4
BATCH = 32
READING = 64
_DROPOUT, _PROBE_WIDTH = 0.2, 128


class Evaluator(nn.Module):
    """The evaluator, pooled features (B, C) to logits (B, K), made by :func:`train_evaluator`."""

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
        """Whether the evaluator predicts the class (N,) from the cells of each mask (N, H, W) or (N, M, H, W)."""
        sets = masks[:, None] if masks.ndim == 3 else masks
        found = []
        weight = self.linear.weight
        for rows, maps in batches(features, len(labels), READING):
            logits = read_cells(self, maps.to(weight), sets[rows].to(weight.device), affine=True)
            found.append(logits.argmax(dim=2).cpu() == labels[rows, None].cpu())
        return torch.cat(found).reshape(masks.shape[:-2])

    def accuracy(self, features: Features, masks: Tensor, labels: Tensor) -> float:
        """The share of images for which the evaluator predicts the class from the cells of the masks (N, H, W)."""
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


def train_evaluator(
    features: Features, labels: Tensor, *, classes: int | None = None, steps: int | None = None, seed: int = 0
) -> Evaluator:
    """Train an evaluator on random subsets of the cells, to judge any selector's hard masks.

    Parameters
    ----------
    features: of the training images, on the evaluator's device.
    labels: (N,) class indices.
    classes: K; by default one more than the largest label.
    steps: the least number of batches, by default :data:`STEPS`; three epochs at least.

    >>> labels = torch.arange(64) % 2
    >>> features = torch.randn(64, 8, 3, 3) + 3 * labels[:, None, None, None]
    >>> evaluator = train_evaluator(features, labels, steps=400)
    >>> masks = torch.zeros(64, 3, 3, dtype=torch.bool)  # your selector's
    >>> masks[:, 1, 1] = True
    >>> evaluator.accuracy(features, masks, labels) > 0.8
    True
    """
    check_labels(labels)
    first = rows_of(features, np.arange(1))
    classes = int(labels.max()) + 1 if classes is None else classes
    generator = torch.Generator().manual_seed(seed)

    def loss(evaluator: nn.Module, rows: Rows) -> Tensor:
        maps = rows_of(features, rows).float()
        sets = random_masks(len(rows) * MASKS_AN_IMAGE, (maps.shape[2], maps.shape[3]), generator)
        weights = sets.reshape(len(rows), MASKS_AN_IMAGE, -1).to(maps)
        pooled = torch.bmm(weights / weights.sum(dim=2, keepdim=True), maps.flatten(2).transpose(1, 2))
        targets = labels[rows].to(maps.device).repeat_interleave(MASKS_AN_IMAGE)
        return functional.cross_entropy(evaluator(pooled.flatten(0, 1)), targets)

    shuffled = orders(len(labels), generator, steps)
    return fitted(lambda: Evaluator(first.shape[1], classes).to(first.device), loss, shuffled, seed)


def encoding(
    train_logits: Tensor,
    train_masks: Tensor,
    train_labels: Tensor,
    *,
    logits: Tensor,
    masks: Tensor,
    labels: Tensor,
    seed: int = 0,
) -> Tensor:
    r"""What the masks (N, H, W) tell of the classes (N,) beyond the selected values, in nats, (N,).

    .. math:: \log q(y \mid x_S, S) - \log e(y \mid x_S), \quad q = \mathrm{softmax}(\log e + a \, r(S))

    with the evaluator's logits e of the selected values, (N, K), and a small network r of the mask, trained on other
    images, of which a fifth chooses a from 0 to 1. Its mean estimates from below what STRIPE-X punishes (Puli et al.
    2024, arXiv 2411.02664): that y depends on S given :math:`x_S`. A mask that tells no more than its values do,
    because a class has its place, has about 0, however well :func:`mask_probe` reads it.
    """
    check_labels(train_labels)
    inputs, known = train_masks.flatten(1).float(), train_logits.float().log_softmax(dim=1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(train_labels), generator=generator).numpy()
    kept, held_out = order[len(order) // 5 :], order[: max(1, len(order) // 5)]

    def loss(network: nn.Module, rows: Rows) -> Tensor:
        those = kept[rows]
        return functional.cross_entropy(known[those] + network(inputs[those]), train_labels[those])

    more = fitted(lambda: _probe(train_masks, known.shape[1]), loss, orders(len(kept), generator), seed)

    def error(before: Tensor, added: Tensor, wanted: Tensor, share: Tensor) -> Tensor:
        return functional.cross_entropy(before + share * added, wanted, reduction="none")

    with torch.no_grad():
        shares = torch.linspace(0, 1, 21)
        chosen = known[held_out], more(inputs[held_out]), train_labels[held_out]
        share = shares[torch.stack([error(*chosen, each).mean() for each in shares]).argmin()]
        given = logits.float().log_softmax(dim=1), more(masks.flatten(1).float()), labels
        return error(*given, shares[0]) - error(*given, share)


def _probe(masks: Tensor, classes: int) -> nn.Module:
    """Masks (N, H, W), flat, to logits (N, K)."""
    return nn.Sequential(nn.Linear(masks[0].numel(), _PROBE_WIDTH), nn.ReLU(), nn.Linear(_PROBE_WIDTH, classes))


def mask_probe(
    train_masks: Tensor, train_labels: Tensor, masks: Tensor, labels: Tensor, *, classes: int, seed: int = 0
) -> Tensor:
    """Whether a probe that sees only the masks (N, H, W) predicts each class (N,) from their shape."""
    inputs, others = train_masks.flatten(1).float(), masks.flatten(1).float()
    return _learnt(lambda: _probe(masks, classes), inputs, train_labels, others, labels, seed=seed)


def retrained(
    train_pooled: Tensor, train_labels: Tensor, pooled: Tensor, labels: Tensor, *, classes: int, seed: int = 0
) -> Tensor:
    """Whether a linear layer trained on the mean of the selected cells (N, C) predicts each class (N,) from them."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Dropout(_DROPOUT), nn.Linear(pooled.shape[1], classes))

    return _learnt(build, train_pooled, train_labels, pooled, labels, seed=seed)


def _learnt(
    build: Callable[[], nn.Module], inputs: Tensor, labels: Tensor, others: Tensor, wanted: Tensor, *, seed: int
) -> Tensor:
    """Whether a network trained on inputs and labels predicts the wanted label (N,) of each other input."""
    check_labels(labels)

    def loss(network: nn.Module, rows: Rows) -> Tensor:
        return functional.cross_entropy(network(inputs[rows].clone()), labels[rows])

    network = fitted(build, loss, orders(len(labels), torch.Generator().manual_seed(seed)), seed)
    with torch.no_grad():
        predicted: Tensor = network(others).argmax(dim=1) == wanted
    return predicted


@torch.no_grad()
def mean_of_selected(features: Features, masks: Tensor) -> Tensor:
    """The mean (N, C) of each image's selected cells (N, H, W); (N, M, C) for several sets (N, M, H, W)."""
    sets = masks[:, None] if masks.ndim == 3 else masks
    found = []
    for rows, maps in batches(features, len(masks), READING):
        found.append(read_cells(lambda pooled: pooled, maps, sets[rows].to(maps.device)).cpu())
    return torch.cat(found).reshape(*masks.shape[:-2], -1)


def fitted(
    build: Callable[[], Network], loss: Callable[[Network, Rows], Tensor], orders: Iterable[Rows], seed: int
) -> Network:
    """A network, built and fitted to its loss of a batch of rows by the seed alone."""
    with torch.random.fork_rng([]), torch.inference_mode(False):
        torch.manual_seed(seed)
        network = build()
        fit_minibatches(network, loss=lambda rows: loss(network, rows), orders=orders, batch_size=BATCH)
    return network


def orders(count: int, generator: torch.Generator, steps: int | None = None) -> Iterator[Rows]:
    """A permutation of the images an epoch, for at least as many epochs as the batches need."""
    for _ in range(max(EPOCHS, -(-(STEPS if steps is None else steps) // -(-count // BATCH)))):
        yield torch.randperm(count, generator=generator).numpy()


def check_labels(labels: Tensor) -> None:
    if labels.ndim != 1 or not len(labels) or labels.is_floating_point():
        raise ValueError(
            f"expected labels as class indices (N,), at least one, got {labels.dtype} {tuple(labels.shape)}"
        )
