r"""What each selected cell says for a class, or for one class rather than another: the logit as a sum over cells.

With a linear head, g the weights of the selection, w and b the head's,

.. math:: \text{logit}_c = b_c + \sum_n g_n \, w_c \cdot F_n, \qquad \text{vote}_n = g_n \, w_c \cdot F_n,

exactly; for c rather than d it is the difference of the two. With a nonlinear head on one pooled vector
p = sum_n g_n F_n, votes are integrated gradients from no cell at all (p = 0) to p, which add up likewise: what the
steps of the integral miss, as where a normalisation jumps at 0, is shared out by F_n p. With a head that reads maps a
vote is what the logit loses when that cell is left out, too; such votes do not add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bla.explanations.explanation import VoteMethod
from bla.model.heads import read, reads_maps, weighted_sum

STEPS = 32  # midpoints of the integral
EXACT = 1e-4  # how far one gradient may miss the logit, of its largest part, for a head to count as linear


class CellVotes(NamedTuple):
    """Votes (B, H, W), zero off the selection, ``offset`` (B,) and ``logit`` (B,), and how they were found.

    ``logit`` is the head's, or the difference of two; exact votes and the offset add up to it.
    """

    cells: Tensor
    offset: Tensor
    logit: Tensor
    method: VoteMethod


def votes(
    head: nn.Module, features: Tensor, weights: Tensor, target: Tensor, against: Tensor | None = None
) -> CellVotes:
    """What the cells of features (B, C, H, W) under weights (B, H, W) say for classes (B,), against others (B,).

    >>> head = nn.Linear(2, 3, bias=False)
    >>> _ = head.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    >>> features = torch.tensor([[[[4.0, 0.0]], [[2.0, 8.0]]]])  # the cells (4, 2) and (0, 8)
    >>> found = votes(head, features, torch.tensor([[[0.5, 0.5]]]), torch.tensor([0]), torch.tensor([1]))
    >>> found.cells.tolist(), found.logit.tolist(), found.method
    ([[[1.0, -4.0]]], [-3.0], 'exact')
    """

    def asked(logits: Tensor) -> Tensor:
        own = logits.gather(1, target[:, None])[:, 0]
        return own if against is None else own - logits.gather(1, against[:, None])[:, 0]

    with torch.inference_mode(False), torch.no_grad():
        features, weights = features.clone(), weights.clone()  # which inference mode may have made
        target, against = target.clone(), None if against is None else against.clone()
        logit = asked(read(head, features, weights))
        if reads_maps(head):
            return _left_out(head, features, weights, logit, asked)
        pooled = weighted_sum(features, weights)
        offset = asked(head(torch.zeros_like(pooled)))

        def gradient(share: float) -> Tensor:
            at = (share * pooled).requires_grad_()
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(asked(head(at)).sum(), at)
            return slope

        method: VoteMethod = "exact"
        slope = gradient(0.5)
        same = torch.allclose(slope, gradient(1.0), rtol=1e-4, atol=1e-6 * float(slope.abs().max()))
        scale = torch.maximum(logit.abs(), offset.abs()).max().clamp(min=1e-12)
        if (offset + (slope * pooled).sum(1) - logit).abs().max() > EXACT * scale or not same:
            method = "integrated gradients"
            slope = torch.stack([gradient((step + 0.5) / STEPS) for step in range(STEPS)]).mean(0)
            missed, least = logit - offset - (slope * pooled).sum(1), torch.finfo(pooled.dtype).tiny
            slope = slope + pooled * (missed / pooled.square().sum(1).clamp(min=least))[:, None]
        cells = (features * slope.reshape(*slope.shape, *[1] * (features.ndim - 2))).sum(1) * weights
        return CellVotes(cells, offset, logit, method)


def _left_out(
    head: nn.Module, features: Tensor, weights: Tensor, logit: Tensor, asked: Callable[[Tensor], Tensor]
) -> CellVotes:
    selected = (weights > 0).flatten(1)
    lost = torch.zeros_like(weights).flatten(1)
    for cell in selected.any(0).nonzero()[:, 0].tolist():
        fewer = weights.flatten(1).clone()
        fewer[:, cell] = 0
        lost[:, cell] = logit - asked(read(head, features, fewer.reshape(weights.shape)))
    alone = selected.sum(1, keepdim=True) == 1  # without a single cell nothing is left: it has the whole logit
    cells = torch.where(selected, torch.where(alone, logit[:, None], lost), 0.0)
    return CellVotes(cells.reshape(weights.shape), torch.zeros_like(logit), logit, "left out one by one")
