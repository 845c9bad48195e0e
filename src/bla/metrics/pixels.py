"""Faithfulness in pixels: photos are changed where an explanation points, and classified again by the whole network.

Each function takes a ``network`` (normalised pixels (B, 3, h, w) to logits) and returns one value per image, whatever
the device, the photo's shape and the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional

from bla.metrics.cells import probability
from bla.metrics.metric import Metric, by_name
from bla.metrics.ranking import places

Network = Callable[[Tensor], Tensor]

STEPS = 7
ROAD_SHARES = (0.25, 0.5)
_BLUR_SIGMA_SHARE = 0.05
_ROAD_NOISE = 0.01
_TOLERANCE = 1e-3
"""The residual at which the imputation stops, relative to the right-hand side."""

METRICS = by_name(
    Metric(
        "deletion",
        "deletion",
        f"area under p_c as the best pixels are set to the mean colour, a {STEPS}th at a time (trapezoid)",
        "Petsiuk et al. 2018 (RISE, arXiv 1806.07421); fewer steps",
        "lower",
    ),
    Metric(
        "insertion",
        "insertion",
        f"area under p_c as the best pixels are put into the blurred photo, a {STEPS}th at a time (trapezoid)",
        "Petsiuk et al. 2018 (RISE, arXiv 1806.07421); fewer steps, Gaussian of 5% of the side",
        "higher",
    ),
    Metric(
        "average_drop",
        "average drop",
        "max(0, p_c(x) - p_c(x * mask)) / p_c(x), the mask of equal area, the mean colour outside of it",
        "Chattopadhay et al. 2018 (Grad-CAM++, arXiv 1710.11063), with a mask of equal area",
        "lower",
    ),
    Metric(
        "increase",
        "increase in confidence",
        "1[p_c(x * mask) > p_c(x)], as average drop",
        "Chattopadhay et al. 2018 (Grad-CAM++, arXiv 1710.11063), with a mask of equal area",
        "higher",
    ),
    Metric(
        "average_gain",
        "average gain",
        "max(0, p_c(x * mask) - p_c(x)) / (1 - p_c(x)), as average drop",
        "Zhang et al. 2024 (Opti-CAM, arXiv 2301.07002), with a mask of equal area",
        "higher",
    ),
    Metric(
        "road_most",
        "ROAD, most relevant first",
        f"mean over shares {ROAD_SHARES} of p_c after the best pixels are imputed from their neighbours",
        "Rong et al. 2022 (ROAD, arXiv 2202.00449), noisy linear imputation",
        "lower",
    ),
    Metric(
        "road_least",
        "ROAD, least relevant first",
        f"mean over shares {ROAD_SHARES} of p_c after the worst pixels are imputed from their neighbours",
        "Rong et al. 2022 (ROAD, arXiv 2202.00449), noisy linear imputation",
        "higher",
    ),
    *(
        Metric(
            f"kept_{fill}",
            f"prediction kept from the selected cells' pixels alone, the rest {fill}",
            "1[argmax network(x on S, filled elsewhere) = argmax network(x)]",
            "ours; after Fong & Vedaldi 2017 (arXiv 1704.03296)",
            "higher",
        )
        for fill in ("grey", "blur", "mean")
    ),
    Metric(
        "infidelity",
        "infidelity",
        "(I . Phi - (f_c(x) - f_c(x - I)))^2 with Gaussian I, mean of draws, the map scaled to fit best",
        "Yeh et al. 2019 (arXiv 1901.09392), by captum, normalised",
        "lower",
    ),
    Metric(
        "max_sensitivity",
        "max-sensitivity",
        "max over small shifts of the pixels of |Phi(x + e) - Phi(x)| / |Phi(x)|",
        "Yeh et al. 2019 (arXiv 1901.09392), by captum",
        "lower",
    ),
)


def spread(maps: Tensor, like: Tensor) -> Tensor:
    """Maps (B, H, W) enlarged to the pixels of photos (B, 3, h, w), constant over each cell: (B, h, w)."""
    return functional.interpolate(maps[:, None].float(), size=like.shape[2:], mode="nearest-exact")[:, 0]


def blurred(pixels: Tensor) -> Tensor:
    """Photos under a Gaussian of 5% of the longer side, borders mirrored."""
    sigma = _BLUR_SIGMA_SHARE * max(pixels.shape[2:])
    soft = ndimage.gaussian_filter(pixels.float().cpu().numpy(), (0, 0, sigma, sigma), truncate=3, mode="mirror")
    return torch.from_numpy(soft).to(pixels)


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
    soft = blurred(pixels)
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
    mask = spread(selected.float(), pixels)[:, None] > 0.5
    whole = _p(network, pixels, classes).cpu()
    kept = _p(network, pixels * mask, classes).cpu()
    return {
        "average_drop": (whole - kept).clamp(min=0) / whole.clamp(min=1e-12),
        "increase": (kept > whole).double(),
        "average_gain": (kept - whole).clamp(min=0) / (1 - whole).clamp(min=1e-12),
    }


@torch.no_grad()
def kept_pixels(
    network: Network, pixels: Tensor, selected: Tensor, grey: Tensor, labels: Tensor | None = None
) -> dict[str, Tensor]:
    """Whether the network still predicts its class from the selected cells' pixels, the rest grey, blurred or the mean.

    ``grey`` (3,) is mid-grey in normalised pixels. With ``labels`` those are the classes to predict.
    """
    mask = spread(selected.float(), pixels)[:, None] > 0.5
    wanted = network(pixels).argmax(dim=1) if labels is None else labels
    fills = {
        "kept_grey": grey.reshape(1, 3, 1, 1).to(pixels).expand_as(pixels),
        "kept_blur": blurred(pixels),
        "kept_mean": torch.zeros_like(pixels),
    }
    return {
        name: (network(torch.where(mask, pixels, fill)).argmax(dim=1) == wanted).double().cpu()
        for name, fill in fills.items()
    }


@torch.no_grad()
def road(
    network: Network,
    pixels: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    shares: Sequence[float] = ROAD_SHARES,
    seed: int = 0,
) -> dict[str, Tensor]:
    """ROAD with ``shares`` of the pixels imputed: ``road_most`` and ``road_least``, (B,) each."""
    place = _pixel_places(maps, pixels)

    def confidence(missing: Callable[[float], Tensor]) -> Tensor:
        filled = [imputed(pixels, missing(share), seed=seed) for share in shares]
        return torch.stack([_p(network, photos, classes).cpu() for photos in filled]).mean(dim=0)

    return {
        "road_most": confidence(lambda share: place < share),
        "road_least": confidence(lambda share: 1 - place <= share),
    }


@torch.no_grad()
def imputed(pixels: Tensor, missing: Tensor, *, noise: float = _ROAD_NOISE, seed: int = 0) -> Tensor:
    r"""Replace missing pixels by the weighted mean of their eight neighbours plus noise, the same for every photo.

    Solves :math:`x_p \sum_q w_{pq} = \sum_q w_{pq} x_q` for every missing pixel p over its neighbours q in the photo,
    missing ones included, with weights 1/6 (straight) and 1/12 (diagonal): by conjugate gradients for the whole batch,
    started from the solution on a grid half as fine. Where no pixel is known, all become 0.

    Parameters
    ----------
    pixels: (B, C, h, w).
    missing: booleans (B, h, w).
    """
    gap = missing[:, None].to(pixels)
    known = pixels * (1 - gap)
    generator = torch.Generator().manual_seed(seed)
    grain = noise * torch.randn(pixels.shape[1:], generator=generator).to(pixels)
    return known + gap * (_between(known, gap) + grain)


def _neighbours(values: Tensor) -> Tensor:
    """The weighted sum over the eight neighbours: (1, 2, 1) down and across, over 12, less the pixel's own share."""
    padded = functional.pad(values, (1, 1, 1, 1))
    down = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return (down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]) / 12 - values / 3


def _between(known: Tensor, gap: Tensor) -> Tensor:
    """The solution of :func:`imputed` where ``gap`` is 1; ``known`` holds the photo where ``gap`` is 0, and 0 in it."""
    guess = torch.zeros_like(known)
    if min(known.shape[2:]) > 4:
        share = functional.avg_pool2d(1 - gap, 2, ceil_mode=True)
        coarse = functional.avg_pool2d(known, 2, ceil_mode=True) / share.clamp(min=1e-6)
        hole = (share == 0).to(known)
        coarse = coarse * (1 - hole)
        coarse = coarse + hole * _between(coarse, hole)
        guess = gap * functional.interpolate(coarse, size=known.shape[2:], mode="bilinear")
    degree = _neighbours(torch.ones_like(gap))
    solution, right = guess, gap * _neighbours(known)
    residual = right - gap * (degree * solution - _neighbours(solution))
    direction = residual / degree
    along = (residual * direction).sum(dim=(2, 3), keepdim=True)
    goal = _TOLERANCE**2 * (right * right / degree).sum(dim=(2, 3), keepdim=True)
    for _ in range(2 * sum(known.shape[2:])):
        if bool((along <= goal).all()):
            break
        product = gap * (degree * direction - _neighbours(direction))
        step = along / (direction * product).sum(dim=(2, 3), keepdim=True).clamp(min=1e-30)
        solution = solution + step * direction
        residual = residual - step * product
        scaled = residual / degree
        renewed = (residual * scaled).sum(dim=(2, 3), keepdim=True)
        direction = scaled + renewed / along.clamp(min=1e-30) * direction
        along = renewed
    return solution


def infidelity(
    network: Network, pixels: Tensor, maps: Tensor, classes: Tensor, *, draws: int = 8, seed: int = 0
) -> Tensor:
    """Captum's infidelity, normalised, of maps (B, H, W) spread over pixels and colours; (B,)."""
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
    from captum.metrics import sensitivity_max

    def attributed(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (explain(inputs[0] if isinstance(inputs, tuple) else inputs),)

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        value: Tensor = sensitivity_max(
            attributed, pixels, perturb_radius=radius, n_perturb_samples=draws, max_examples_per_batch=len(pixels)
        )
    return value.double().cpu()
