r"""What the head says for a class at each cell, and how many of the best cells it takes to say it.

.. math:: \text{contrast}_n = N \, F_n \cdot \frac{\partial}{\partial F_n} \log \frac{p_c}{1 - p_c}, \qquad
          \text{for a linear head } F_n \cdot \Bigl(w_c - \sum_{k \ne c} \frac{p_k}{1 - p_c} w_k\Bigr),

at the map that the head reads from all cells: the class's logit at the cell less what is expected of another class
there, "c - E". By :math:`\log p_c` it would be :math:`1 - p_c` times as large in every cell, and lost in rounding where
the classifier is sure. It needs no training. Finer-CAM (CVPR 2025) is its kin.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.model.heads import grid_of, read, read_each, reads_maps

RIVALS = 32
"""A class is held against this many others, the likeliest from all cells; with fewer classes against all of them.

A sufficient size is then a lower bound and a decisive one an upper bound; with up to so many classes both are exact.
"""

Slopes = Callable[[Tensor, Tensor], Tensor]


class Answers(NamedTuple):
    """What a head says of features, from all cells alike and, if it is linear, at each.

    ``logits`` (B, K) are from all cells. ``cells`` (B, M, N) are the logits, less their ``offset`` (B, M, 1), that each
    cell alone gives to ``target`` (B,), the first, and to the M - 1 likeliest other classes; None of another head.
    """

    target: Tensor
    logits: Tensor
    cells: Tensor | None
    offset: Tensor | None


class Sufficiency(NamedTuple):
    """Sizes (B,) of prefixes of a ranking.

    ``sufficient``: from it, and from every longer one, the head gives the class. ``decisive``: without it, it does not.
    """

    sufficient: Tensor
    decisive: Tensor


def linear_layer(head: nn.Module, channels: int) -> nn.Linear | None:
    """The one linear layer that a head for pooled features (B, channels) consists of; None if there is more to it.

    It may read the first channels alone.
    """
    if reads_maps(head):
        return None
    for layer in head.modules():
        if isinstance(layer, nn.Linear) and layer.in_features <= channels:
            scales = torch.tensor([[0.01], [1.0], [30.0], [1000.0]])  # a soft cap shows only in large logits
            probe = (scales * torch.randn(4, channels, generator=torch.Generator().manual_seed(0))).to(layer.weight)
            with torch.no_grad():
                expected, given = layer(probe[:, : layer.in_features]), head(probe)
            if (given.shape, given.dtype) == (expected.shape, expected.dtype) and torch.allclose(
                given, expected, rtol=1e-4, atol=1e-5
            ):
                return layer
    return None


def ask(head: nn.Module, features: Tensor, layer: nn.Linear | None, target: Tensor | None = None) -> Answers:
    """The head's answers about features (B, C, H, W) for classes (B,), by default and below 0 those that it predicts.

    ``layer`` is what :func:`linear_layer` found.
    """
    logits = from_all(layer or head, features)
    own = logits.argmax(-1)
    target = own if target is None else torch.where(target < 0, own, target)
    if layer is None:
        return Answers(target, logits, None, None)
    others = _others(logits, target).topk(min(RIVALS, layer.out_features)).indices
    classes = torch.cat([target[:, None], others], dim=1)
    cells = torch.bmm(functional.embedding(classes, layer.weight), features[:, : layer.in_features].flatten(2))
    offset = torch.zeros_like(cells[..., :1]) if layer.bias is None else layer.bias[classes][..., None]
    return Answers(target, logits, cells, offset)


def evidence(
    head: nn.Module, features: Tensor, said: Answers, layer: nn.Linear | None, slopes: Slopes | None = None
) -> Tensor:
    """Contrast, logit, and logit less the runner-up's of ``said.target`` at each cell of features, (B, 3, H, W).

    Where the head is not linear these are the parts of its linearisation at all cells: slope times features.
    ``slopes`` is :func:`slopes_of` the head, traced for export; by default autograd computes them.
    """
    if said.cells is not None:
        assert layer is not None
        own, runner_up = said.cells[:, :1], said.cells[:, 1:2]
        mean = _others(said.logits, said.target).softmax(-1) @ layer.weight
        expected = torch.bmm(mean[:, None], features[:, : layer.in_features].flatten(2))
        contrast = own - expected if len(layer.weight) > 1 else own  # a value stands for itself
        found = torch.cat([contrast, own, own - runner_up], dim=1)
        return found.reshape(found.shape[0], 3, *features.shape[2:])
    at = features if reads_maps(head) else features.mean(dim=grid_of(features))
    found = (slopes or slopes_of(head))(at, said.target)  # (B, 3, C), or (B, 3, C, H, W)
    if found.ndim == 3:
        return torch.bmm(found, features.flatten(2)).reshape(found.shape[0], 3, *features.shape[2:])
    return (found * features[:, None]).sum(dim=2) * math.prod(features.shape[2:])


def slopes_of(head: nn.Module) -> Slopes:
    """Gradients, where the head reads, (B, 3, ...): of the log odds, the logit, and the logit less the runner-up's."""

    def slopes(at: Tensor, target: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            at, target = at.detach().clone().requires_grad_(), target.clone()
            logits = head(at)
            other = _others(logits.detach(), target).argmax(dim=1)
            own, second = (logits.gather(1, chosen[:, None])[:, 0] for chosen in (target, other))
            rest = _others(logits, target).logsumexp(-1) if logits.shape[1] > 1 else 0
            parts = (own - rest, own, own - second)
            found = [torch.autograd.grad(part.sum(), at, retain_graph=True)[0] for part in parts]
        return torch.stack([each.detach() for each in found], dim=1)

    return slopes


def sufficiency(head: nn.Module, features: Tensor, ranking: Tensor, said: Answers) -> Sufficiency | None:
    """The sizes that suffice and that decide for the class that the head predicts, for rankings (B, H, W).

    By sums over the prefixes where the head is linear, against :data:`RIVALS` classes; by the head itself otherwise.
    None for a head that reads maps, which would have to read them twice for every cell.
    """
    if reads_maps(head):
        return None
    cells = ranking[0].numel()
    own = said.logits.argmax(-1)
    counts = torch.arange(1, cells + 1, device=features.device)
    order = ranking.flatten(1).sort(dim=1, descending=True, stable=True).indices
    if said.cells is None:
        kept = (order.argsort(dim=1)[:, None] < counts[:, None]).to(features.dtype)  # (B, size, N)
        subsets = torch.cat([kept, (1 - kept)[:, :-1]], dim=1)
        weights = (subsets / subsets.sum(dim=-1, keepdim=True)).reshape(*subsets.shape[:2], *ranking.shape[1:])
        same = read_each(head, features, weights).argmax(-1) == own[:, None]
        names, without = same[:, :cells], same[:, cells:]
    else:
        assert said.offset is not None
        total = said.cells.gather(2, order[:, None].expand_as(said.cells)).cumsum(dim=2)  # (B, M, size)
        from_kept = total / counts + said.offset
        from_rest = (total[..., -1:] - total)[..., :-1] / counts[:-1].flip(0) + said.offset
        asked = (own == said.target)[:, None]  # otherwise the predicted class is the likeliest of the others
        names, without = (
            torch.where(asked, values[:, 0], values[:, 1]) >= values.amax(dim=1) for values in (from_kept, from_rest)
        )
    sufficient = torch.where(names, 0, counts).amax(dim=1) + 1
    decisive = torch.where(without, cells, counts[:-1]).amin(dim=1) if cells > 1 else torch.ones_like(sufficient)
    return Sufficiency(sufficient.clamp(max=cells), decisive)


def from_all(head: nn.Module, features: Tensor) -> Tensor:
    """The classifier's own logits (B, K): the head on all cells alike."""
    cells = math.prod(features.shape[2:])
    return read(head, features, features.new_full((features.shape[0], *features.shape[2:]), 1 / cells))


def _others(logits: Tensor, target: Tensor) -> Tensor:
    """The logits (B, K) of all classes but these (B,)."""
    return logits.scatter(1, target[:, None], -torch.inf)
