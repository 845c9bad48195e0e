"""Methods that ask the whole network about photos of which random cells are kept, hundreds of times a photo."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bla.comparison.methods.method import Batch, Method
from bla.data.masking import FILLS, masked

PASSES = 500

Network = Callable[[Tensor], Tensor]
"""Normalised pixels (B, 3, h, w) to logits (B, K)."""


def rise(network: Network, passes: int = PASSES, *, fill: str = FILLS[0], seed: int = 0) -> Method:
    r"""RISE (Petsiuk et al. 2018) on the cells: the mean probability of the class over random masks that keep a cell.

    .. math:: M_n = \frac{\sum_j m_{jn} \, p_c(m_j)}{\sum_j m_{jn}}, \quad m_{jn} \sim \mathrm{Bernoulli}(1/2)

    The pixels of cells that are not kept are filled; the masks are enlarged bilinearly.
    """

    def maps(batch: Batch) -> Tensor:
        found = []
        for pixels, target, row in _each(batch):
            masks = (torch.rand(passes, *batch.features.shape[2:], generator=_random(seed, row)) < 0.5).float()
            p = _asked(network, pixels, masks, fill).softmax(dim=1)[:, target]
            found.append((p[:, None, None] * masks).sum(dim=0) / masks.sum(dim=0).clamp(min=1))
        return torch.stack(found).to(batch.features.device)

    note = f"{passes} passes, seed {seed}, fill {fill}"
    return Method("rise", f"RISE, {passes} passes", "baseline", True, maps, note, needs_pixels=True)


def kernel_shap(network: Network, passes: int = PASSES, *, fill: str = FILLS[0], seed: int = 0) -> Method:
    r"""KernelSHAP (Lundberg & Lee 2017) on the cells, of the class's logit, by sampled least squares.

    .. math:: \min_\phi \sum_j \bigl(f(m_j) - f(0) - \phi^\top m_j\bigr)^2, \quad \textstyle\sum_n \phi_n = f(1) - f(0)

    The number s of cells kept has the Shapley kernel's probability, proportional to 1 / (s (N - s)); each mask comes
    with its complement (Covert & Lee 2021).
    """

    def maps(batch: Batch) -> Tensor:
        shape, found = batch.features.shape[2:], []
        for pixels, target, row in _each(batch):
            masks = shapley_masks(max(1, passes // 2), shape[0] * shape[1], _random(seed, row))
            ends = torch.stack([torch.zeros_like(masks[0]), torch.ones_like(masks[0])])
            asked = torch.cat([ends, masks]).reshape(-1, *shape)
            f = _asked(network, pixels, asked, fill)[:, target].double()
            found.append(shapley_values(masks, f[2:], f[0], f[1]).reshape(shape))
        return torch.stack(found).float().to(batch.features.device)

    note = f"{passes} passes in pairs, seed {seed}, fill {fill}"
    return Method("kernel-shap", f"KernelSHAP, {passes} passes", "baseline", True, maps, note,
                  needs_pixels=True)  # fmt: skip


def shapley_masks(pairs: int, cells: int, generator: torch.Generator) -> Tensor:
    """Masks (2 * pairs, N) by the Shapley kernel, the second half the complements of the first."""
    sizes = torch.arange(1, max(cells, 2))
    drawn = sizes[torch.multinomial(1 / (sizes * (cells - sizes)).clamp(min=1), pairs, True, generator=generator)]
    places = torch.rand(pairs, cells, generator=generator).argsort(dim=1).argsort(dim=1)
    masks = (places < drawn[:, None]).float()
    return torch.cat([masks, 1 - masks])


def shapley_values(masks: Tensor, values: Tensor, nothing: Tensor, everything: Tensor) -> Tensor:
    """The least squares of :func:`kernel_shap`: masks (J, N) and what they are worth (J,) to (N,).

    >>> masks = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> shapley_values(masks, torch.tensor([3.0, 1.0]), torch.tensor(0.0), torch.tensor(4.0)).round(decimals=6).tolist()
    [3.0, 1.0]
    """
    wide, total = masks.double(), (everything - nothing).double()
    others, last = wide[:, :-1] - wide[:, -1:], wide[:, -1]  # phi_N is what the others leave of the total
    left = values.double() - nothing - last * total
    found = torch.linalg.lstsq(others, left[:, None], driver="gelsd").solution[:, 0]
    return torch.cat([found, (total - found.sum())[None]])


def _each(batch: Batch) -> zip[tuple[Tensor, int, int]]:
    return zip(torch.split(batch.seen(), 1), batch.targets.tolist(), batch.rows.tolist(), strict=True)


def _random(seed: int, row: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + row)


@torch.no_grad()
def _asked(network: Network, pixels: Tensor, masks: Tensor, fill: str, at_once: int = 32) -> Tensor:
    """Logits (J, K) of one photo under each of the masks (J, H, W)."""
    parts = torch.split(masks, at_once)
    return torch.cat([network(masked(pixels, part, fill)).float().cpu() for part in parts])
