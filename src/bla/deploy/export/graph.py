"""The whole computation as one function of tensors, as it is traced."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bla import operators
from bla.data.photo import Transform
from bla.model.attention import L2XAttention, MapHead, Selection, read
from bla.model.classifier import ExplainableClassifier

OUTPUTS = ("logits", "scores", "soft", "selected", "unbounded", "answers")
EXPLAINED = "explained"
"""A further output of class-aware explainers: the class (B,) that each explanation is about."""
FEATURES = "features"
"""What the trunk's map is called inside of the graph."""


class ExplainedGraph(nn.Module):
    r"""Pixels to prediction and explanation, and what the head says of other subsets.

    .. math:: \text{logits} = \mathrm{head}\bigl(\textstyle\sum_n h_n F_n\bigr), \qquad
              \text{answers}_m = \mathrm{head}\bigl(\textstyle\sum_n M_{mn} F_n / |M_m|\bigr)

    ``forward(pixels, size, masks, target)``: pixels (B, 3, H, W), size and target int64 (B,), masks (B, M, H, W), to
    the outputs in the order of :data:`OUTPUTS`. A size of 0 and a target of -1 ask for the explainer's own. Without
    masks there are no answers. With the sigmoid gate nothing is normalised, here as there.
    """

    def __init__(self, wrapped: ExplainableClassifier) -> None:
        super().__init__()
        self.trunk = wrapped.trunk
        attention = wrapped.attention
        self.attention = _FixedDraws(attention, wrapped) if isinstance(attention, L2XAttention) else attention
        self.head = wrapped.head

    def forward(
        self, pixels: Tensor, size: Tensor | None = None, masks: Tensor | None = None, target: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs, in the order of :data:`OUTPUTS`, then the features and, with a target, the class explained."""
        features = self.trunk(pixels)
        attention: Any = self.attention
        last: tuple[Tensor, ...] = (features,)
        if target is None:
            own = attention(features)
        else:
            explained = torch.where(target < 0, attention.predicted(features), target)
            own = attention(features, target=explained)
            last += (explained,)
        unbounded, scores, soft, hard = (maps.flatten(1) for maps in own)
        gate = bool(getattr(attention, "gate", False))
        if size is not None:
            at_size = dialled(
                unbounded, size, temperature=attention.temperature, threshold=attention.threshold, gate=gate
            )
            scores, soft, hard = (
                torch.where((size > 0)[:, None], dial, mine)
                for dial, mine in zip(at_size, (scores, soft, hard), strict=True)
            )
        maps = tuple(values.unflatten(1, features.shape[2:]) for values in (scores, soft, hard > 0, unbounded))
        if masks is None:
            return (read(self.head, features, hard.unflatten(1, features.shape[2:])), *maps, *last)
        asked = masks.flatten(2)
        if not gate:
            asked = asked / asked.sum(dim=-1, keepdim=True)
        # the selection and the subsets asked about go through the head together: (B, 1 + M, N)
        weights = torch.cat([hard[:, None], asked], dim=1)
        if isinstance(self.head, MapHead):
            each = features[:, None] + torch.zeros_like(weights[:, :, :1, None, None]).to(features.dtype)
            logits = read(self.head, each.flatten(0, 1), weights.reshape(-1, *features.shape[2:]))
        else:
            pooled = torch.bmm(features.flatten(2), weights.transpose(1, 2)).transpose(1, 2)
            logits = self.head(pooled.flatten(0, 1))
        logits = logits.reshape(weights.shape[0], weights.shape[1], -1)
        return logits[:, 0], *maps, logits[:, 1:], *last


def dialled(
    unbounded: Tensor, size: Tensor, *, temperature: float, threshold: float | Literal["auto"], gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, soft and hard weights (B, N) at a size of its own for each map, int64 (B,); sizes are cut to 1..N.

    What :func:`bla.operators.bound_at_size`, ``bounded_soft`` and ``top_hard`` give for a size that is a number.

    >>> dialled(torch.tensor([[2.0, 0, -3]]), torch.tensor([2]), temperature=0.1, threshold=0, gate=False)[2]
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    cells = unbounded.shape[-1]
    size = size.clamp(1, cells)[:, None]
    # A cell's rank is the number of cells before it: larger, or as large and earlier. Sorting stably is not traced.
    one, other = unbounded[:, :, None], unbounded[:, None, :]
    earlier = torch.ones(cells, cells, dtype=torch.bool, device=size.device).tril(-1)
    rank = ((other > one) | ((other == one) & earlier)).sum(dim=-1)
    least = torch.where(rank == size - 1, unbounded, 0.0).sum(dim=-1, keepdim=True)
    scores = torch.where(unbounded >= least, 0.0, unbounded - least)
    soft = operators.bounded_soft(scores, temperature=temperature, threshold=threshold, gate=gate)
    chosen = (rank < size).to(unbounded.dtype)
    return scores, soft, chosen if gate else chosen / size.to(unbounded.dtype)


class _FixedDraws(nn.Module):
    """L2X with its draws as a constant: those of evaluation mode, which are the same at every call."""

    def __init__(self, attention: L2XAttention, wrapped: ExplainableClassifier) -> None:
        super().__init__()
        self.l2x = attention
        with torch.no_grad():
            height, width = wrapped.trunk(torch.zeros(1, 3, *wrapped.transform.size)).shape[2:]
        self.size = min(attention.size, height * width)
        draws = torch.empty(self.size, 1, height * width)
        draws.exponential_(generator=torch.Generator().manual_seed(0)).log_().neg_()
        self.register_buffer("draws", draws)

    def forward(self, features: Tensor) -> Selection:
        """As the attention's own, of the grid that it was made for."""
        l2x, draws = self.l2x, cast(Tensor, self.draws)
        if l2x.context is not None:
            features = features + l2x.context(features.mean(dim=(2, 3)))[:, :, None, None]
        logits = -l2x.score(features).flatten(1)
        scale = l2x.temperature if l2x.variant == "official" else 1 / l2x.temperature
        soft = torch.softmax(scale * (logits + draws), dim=-1).amax(dim=0)
        size = torch.full_like(logits[:, 0], self.size, dtype=torch.int64)
        _, _, hard = dialled(logits, size, temperature=1.0, threshold=0.0, gate=False)
        return Selection(*(values.unflatten(1, features.shape[2:]) for values in (logits, logits, soft, hard)))


class NamedGraph(nn.Module):
    """``pixels``, or uint8 ``photos`` (B, h, w, 3), to a dictionary of the outputs: what a torch file holds."""

    def __init__(self, wrapped: ExplainableClassifier, *, photos: bool) -> None:
        super().__init__()
        self.whole = ExplainedGraph(wrapped)
        self.transform: Transform | None = wrapped.transform if photos else None

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The outputs by name, without answers."""
        pixels = images if self.transform is None else _prepared(images, self.transform)
        return dict(zip(OUTPUTS[:5], self.whole(pixels), strict=False))


def _prepared(photos: Tensor, transform: Transform) -> Tensor:
    mode = transform.interpolation
    values = photos.permute(0, 3, 1, 2).float()
    if mode == "nearest":
        resized = F.interpolate(values, transform.size, mode="nearest-exact")
    else:
        resized = F.interpolate(values, transform.size, mode=mode, antialias=True)
    mean, std = (values.new_tensor(numbers)[:, None, None] for numbers in (transform.mean, transform.std))
    return (resized.round().clamp(0, 255) - 255 * mean) / (255 * std)
