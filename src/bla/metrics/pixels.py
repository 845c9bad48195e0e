"""Faithfulness in pixels: photos are changed where an explanation points, and classified again by the whole network.

Each function takes a ``network`` (normalised pixels (B, 3, h, w) to logits) and returns one value per image, whatever
the device, the photo's shape and the batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bla import needs_extra
from bla.data.masking import FILLS, enlarged, filled, masked
from bla.metrics.cells import Features, batches, probability
from bla.metrics.fitting import Rows
from bla.metrics.leakage import MASKS_AN_IMAGE, READING, Evaluator, check_labels, fitted, orders, random_masks
from bla.metrics.ranking import places, top_cells
from bla.metrics.sanity import spearman

Network = Callable[[Tensor], Tensor]

STEPS = 7
SHARES = (0.12, 0.25, 0.4)
"""The sizes of ``kept`` and ``removed`` over sizes, as shares of the grid: 6, 12 and 20 of 49 cells."""
ROAD_SHARES = (0.25, 0.5)
_ROAD_NOISE = 0.01


def spread(maps: Tensor, like: Tensor) -> Tensor:
    """Maps (B, H, W) enlarged to the pixels of photos (B, 3, h, w), constant over each cell: (B, h, w)."""
    return functional.interpolate(maps[:, None].float(), size=like.shape[2:], mode="nearest-exact")[:, 0]


def _pixel_places(maps: Tensor, pixels: Tensor) -> Tensor:
    """The rank of each pixel, 0 for the best, as a share of all: (B, h, w); ties in reading order."""
    ranks = places(spread(maps, pixels))
    return ranks / ranks[0].numel()


@torch.no_grad()
def _p(network: Network, pixels: Tensor, classes: Tensor) -> Tensor:
    return probability(network(pixels)[:, None], classes)[:, 0]


@torch.no_grad()
def deletion_insertion(
    network: Network, pixels: Tensor, maps: Tensor, classes: Tensor, *, steps: int = STEPS
) -> dict[str, Tensor]:
    """RISE's two areas for maps (B, H, W) of any grid, or of pixels: ``deletion`` and ``insertion``, (B,) each."""
    place = _pixel_places(maps, pixels)[:, None]
    soft = filled(pixels, "blur")
    areas = {name: torch.zeros(len(pixels), dtype=torch.float64) for name in ("deletion", "insertion")}
    for step in range(steps + 1):
        gone = place < step / steps
        weight = (0.5 if step in (0, steps) else 1.0) / steps
        areas["deletion"] += weight * _p(network, pixels.masked_fill(gone, 0.0), classes).cpu()
        areas["insertion"] += weight * _p(network, torch.where(gone, pixels, soft), classes).cpu()
    return areas


@torch.no_grad()
def masked_confidence(network: Network, pixels: Tensor, selected: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """``average_drop``, ``increase`` and ``average_gain`` under masks (B, H, W), (B,) each."""
    return _drop_and_gain(network, pixels, spread(selected.float(), pixels) > 0.5, classes)


@torch.no_grad()
def confidence_over_shares(
    network: Network, pixels: Tensor, maps: Tensor, classes: Tensor, *, shares: Sequence[float] = (1.0, 0.5, 0.15)
) -> dict[str, Tensor]:
    r"""Average drop, increase and gain of photos times their map, of which a share of the pixels counts; (B,) each.

    .. math:: x' = x \cdot m \cdot 1[m \text{ is among the share of best pixels}]

    as T-TAME reports them (arXiv 2403.04523): maps (B, H, W) are scaled to 0..1 each and enlarged bilinearly. Named
    ``average_drop_100``, ``average_drop_50``, and so on.
    """
    low, high = (of(maps, dim=(1, 2), keepdim=True) for of in (torch.amin, torch.amax))
    mask = enlarged(torch.where(high > low, (maps - low) / (high - low), 1.0), pixels)
    place = places(mask) / mask[0].numel()
    found: dict[str, Tensor] = {}
    for share in shares:
        values = _drop_and_gain(network, pixels, mask * (place < share), classes)
        found |= {f"{name}_{100 * share:g}": value for name, value in values.items()}
    return found


@torch.no_grad()
def single_deletion(
    network: Network, pixels: Tensor, maps: Tensor, classes: Tensor, *, patches: int = 4, fill: str = "grey"
) -> Tensor:
    """Whether a map orders the patches of a photo as the network does: single deletion, of IDSDS (arXiv 2407.11910).

    Spearman's correlation over ``patches`` x ``patches`` parts between a map's (B, H, W) sum over a part and the fall
    of the class's logit without it, (B,); NaN where one of them is constant. In IDSDS the network was fine-tuned on
    photos without some parts, so that such photos are nothing new to it.
    """
    parts = torch.eye(patches**2, device=pixels.device).reshape(-1, patches, patches)
    own, fills = classes.to(pixels.device)[:, None], filled(pixels, fill)
    whole = network(pixels).gather(1, own)
    falls = []
    for part in parts:
        gone = spread(part[None], pixels)[:, None] > 0.5
        falls.append(whole - network(torch.where(gone, fills, pixels)).gather(1, own))
    sums = functional.adaptive_avg_pool2d(spread(maps, pixels), patches).flatten(1)
    return spearman(sums.double().cpu(), torch.cat(falls, dim=1).double().cpu())


def _drop_and_gain(network: Network, pixels: Tensor, mask: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Of photos times a mask (B, h, w)."""
    whole = _p(network, pixels, classes).cpu()
    kept = _p(network, pixels * mask[:, None], classes).cpu()
    return {
        "average_drop": (whole - kept).clamp(min=0) / whole.clamp(min=1e-12),
        "increase": (kept > whole).double(),
        "average_gain": (kept - whole).clamp(min=0) / (1 - whole).clamp(min=1e-12),
    }


@torch.no_grad()
def kept_and_removed(
    network: Network, pixels: Tensor, masks: Tensor, classes: Tensor, *, fill: str = FILLS[0]
) -> dict[str, Tensor]:
    r"""Whether the network names the class (B,) from the pixels of masks (B, H, W) alone, and without them.

    .. math:: \mathrm{kept} = 1[\arg\max f(mx + (1-m)\tilde x) = c], \quad
              \mathrm{removed} = 1[\arg\max f((1-m)x + m\tilde x) = c]

    with the enlarged mask m and the fill :math:`\tilde x` of :mod:`bla.data.masking`: ``kept`` and ``removed``, (B,).
    """
    kept = masks.float()
    pair = {"kept": kept, "removed": 1 - kept}
    wanted = classes.to(pixels.device)
    return {
        name: (network(masked(pixels, mask, fill)).argmax(dim=1) == wanted).double().cpu()
        for name, mask in pair.items()
    }


def over_sizes(
    network: Network, pixels: Tensor, ranking: Tensor, classes: Tensor, *, fill: str = FILLS[0]
) -> dict[str, Tensor]:
    """:func:`kept_and_removed` of the best :data:`SHARES` of the cells, and their means, (B,) each.

    Named ``kept_12_percent`` and so on; ``kept_area`` and ``removed_area`` are the means over the sizes.
    """
    cells = ranking[0].numel()
    found: dict[str, Tensor] = {}
    for share in SHARES:
        best = top_cells(ranking, max(1, round(share * cells)))
        values = kept_and_removed(network, pixels, best, classes, fill=fill)
        found |= {f"{name}_{share:.0%}".replace("%", "_percent"): value for name, value in values.items()}
    for name in ("kept", "removed"):
        parts = [value for metric, value in found.items() if metric.startswith(name)]
        found[f"{name}_area"] = torch.stack(parts).mean(dim=0)
    return found


@torch.no_grad()
def road(network: Network, pixels: Tensor, maps: Tensor, classes: Tensor, *, seed: int = 0) -> dict[str, Tensor]:
    """ROAD with a quarter and a half of the pixels imputed: ``road_most`` and ``road_least``, (B,) each."""
    place = _pixel_places(maps, pixels)

    def confidence(missing: Callable[[float], Tensor]) -> Tensor:
        filled = [imputed(pixels, missing(share), seed=seed) for share in ROAD_SHARES]
        return torch.stack([_p(network, photos, classes).cpu() for photos in filled]).mean(dim=0)

    return {
        "road_most": confidence(lambda share: place < share),
        "road_least": confidence(lambda share: 1 - place <= share),
    }


def imputed(pixels: Tensor, missing: Tensor, *, noise: float = _ROAD_NOISE, seed: int = 0) -> Tensor:
    """Missing pixels, booleans (B, h, w), as the weighted mean of their neighbours plus noise, by grad-cam."""
    with needs_extra("compare"):
        from pytorch_grad_cam.metrics.road import NoisyLinearImputer

    fill, found = NoisyLinearImputer(noise=noise), []
    for photo, gap in zip(pixels.float().cpu(), missing.cpu(), strict=True):
        with torch.random.fork_rng([]), warnings.catch_warnings():
            torch.manual_seed(seed)
            warnings.simplefilter("ignore")  # the library hands tensors to NumPy
            found.append(fill(photo, (~gap).float()))
    return torch.stack(found).to(pixels)


def infidelity(
    network: Network, pixels: Tensor, maps: Tensor, classes: Tensor, *, draws: int = 8, seed: int = 0
) -> Tensor:
    """Captum's infidelity, normalised, of maps (B, H, W) enlarged to pixels and colours; (B,)."""
    with needs_extra("compare"):
        from captum.metrics import infidelity as captums

    attributions = (spread(maps, pixels)[:, None] / 3).expand_as(pixels)

    def shaken(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise = 0.2 * torch.randn_like(inputs)
        return noise, inputs - noise

    with torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(seed)
        value: Tensor = captums(
            network, shaken, pixels, attributions, target=classes, n_perturb_samples=draws, normalize=True
        )
    return value.double().cpu()


def max_sensitivity(
    explain: Callable[[Tensor], Tensor], pixels: Tensor, *, draws: int = 4, radius: float = 0.02, seed: int = 0
) -> Tensor:
    """Captum's max-sensitivity of an explainer (pixels to maps (B, H, W)); (B,)."""
    with needs_extra("compare"):
        from captum.metrics import sensitivity_max

    def attributed(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (explain(inputs[0] if isinstance(inputs, tuple) else inputs),)

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        value: Tensor = sensitivity_max(
            attributed, pixels, perturb_radius=radius, n_perturb_samples=draws, max_examples_per_batch=len(pixels)
        )
    return value.double().cpu()


def train_pixel_evaluator(
    embed: Callable[[Tensor], Tensor],
    photos: Features,
    labels: Tensor,
    grid: tuple[int, int],
    *,
    classes: int | None = None,
    masks: int = MASKS_AN_IMAGE,
    fill: str = FILLS[0],
    seed: int = 0,
) -> Callable[[Tensor], Tensor]:
    """An evaluator of pixels: normalised pixels (B, 3, h, w) to logits, trained on photos of which random cells show.

    A linear layer, as of :class:`bla.metrics.Evaluator`, on a network that stays as it is. Judge masks with it by
    :func:`kept_and_removed`, with the labels as classes: kept is EVAL-X on pixels, removed what is
    left behind. ``masks`` x N passes through ``embed`` are all it takes.

    Parameters
    ----------
    embed: normalised pixels to features (B, C), such as a trunk with its pooling.
    photos: the N training photos, (N, 3, h, w), or a callable from row numbers to those.
    grid: rows and columns of the masks to be judged.
    """
    check_labels(labels)
    classes = int(labels.max()) + 1 if classes is None else classes
    generator, found = torch.Generator().manual_seed(seed), []
    with torch.no_grad():
        for _, pixels in batches(photos, len(labels), READING):
            parts = [masked(pixels, random_masks(len(pixels), grid, generator).float(), fill) for _ in range(masks)]
            found.append(torch.stack([embed(part) for part in parts], dim=1).float())
    features = torch.cat(found)

    def loss(evaluator: Evaluator, rows: Rows) -> Tensor:
        targets = labels[rows].to(features.device).repeat_interleave(masks)
        return functional.cross_entropy(evaluator(features[rows].flatten(0, 1)), targets)

    def build() -> Evaluator:
        return Evaluator(features.shape[2], classes).to(features.device)

    evaluator = fitted(build, loss, orders(len(labels), generator), seed)
    return lambda pixels: evaluator(embed(pixels))
