r"""One selection over several feature maps: their cells in a row, each with channels of its own map alone.

Cells of a coarse map have read more and say more, cells of a finer one say where. Put side by side under one bound,

.. math:: \text{row} = \bigl(F^1_1, \dots, F^1_{N_1}, F^2_1, \dots, F^I_{N_I}\bigr), \qquad
          \tilde F^i_n = (0, \dots, F^i_n, \dots, 0, e_i) \in \mathbb{R}^{C_1 + \dots + C_I + I},

where e_i says which map a cell is of. A 1x1 convolution is then a score and a bias for each map, weights are normalised
over all cells of all maps together, and their sum is the weighted sums of the maps side by side with each map's share.
To an attention, a head and a cache the row is a map like any other, of height 1.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bla.explanations.explanation import FloatMap, MapCells, finest, over, spread
from bla.model.tracing import TracingError

Grid = tuple[int, int]
Maps = int | tuple[str, ...]
"""How many of the last maps, each the last one of its grid; or the submodules that give them, by name."""


def maps_from(texts: Sequence[str]) -> Maps:
    """Maps as a command is given them: a number, or names.

    >>> maps_from(["2"]), maps_from(["blocks.4"])
    (2, ('blocks.4',))
    """
    return int(texts[0]) if len(texts) == 1 and texts[0].isdecimal() else tuple(texts)


class SeveralMaps(nn.Module):
    """The maps that submodules of a classifier give, of one (B, C, H, W), of several the row of their cells.

    Attributes
    ----------
    names: the submodules.
    grids: the maps' (H, W) at the size of input that they were found with, in the order of the names.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], grids: Sequence[Grid], *, channels_last: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.grids = tuple(grids)
        self.channels_last = channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, h, w) to features (B, C, H, W), or of several maps (B, sum C + I, 1, sum HW)."""
        found = _outputs(self.model, pixels, self.names)
        maps = [found[name].permute(0, 3, 1, 2) if self.channels_last else found[name] for name in self.names]
        return maps[0] if len(maps) == 1 else in_a_row(maps)


def in_a_row(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, H_i, W_i) as one, (B, sum C_i + I, 1, sum H_i W_i): map after map, row after row.

    >>> in_a_row([torch.tensor([[[[7.0, 8.0]]]]), torch.tensor([[[[9.0]]]])])[0, :, 0].tolist()
    [[7.0, 8.0, 0.0], [0.0, 0.0, 9.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    channels = [each.shape[1] for each in maps]
    rows = []
    for index, each in enumerate(maps):
        cells = each.flatten(2)
        before, after = sum(channels[:index]), sum(channels[index + 1 :])
        own = cells.new_zeros(len(maps), 1)
        own[index] = 1
        which = own.expand(cells.shape[0], -1, cells.shape[2])
        rows.append(torch.cat([nn.functional.pad(cells, (0, 0, before, after)), which], dim=1))
    return torch.cat(rows, dim=2)[:, :, None]


def apart(row: Any, grids: Sequence[Grid]) -> list[Any]:
    """A row of values (..., 1, N), tensor or array, as the maps (..., H_i, W_i) that it was made of.

    >>> [each.tolist() for each in apart(torch.arange(5)[None], [(2, 2), (1, 1)])]
    [[[0, 1], [2, 3]], [[4]]]
    """
    parts, start = [], 0
    for height, width in grids:
        part = row[..., start : start + height * width]
        parts.append(part.reshape(*part.shape[:-2], height, width))
        start += height * width
    return parts


def shown_cells(values: Sequence[FloatMap], grids: Sequence[Grid] | None) -> dict[str, Any]:
    """The fields of an explanation that say where its cells lie.

    ``values``: unbounded, scores, soft and hard, (H, W) each of one map, or with ``grids`` rows of several maps' cells.
    """
    if grids is None:
        unbounded, scores, soft, hard = values
        return {"grid": hard.shape, "unbounded": unbounded, "scores": scores, "soft": soft, "selected": hard > 0}
    by_map = zip(*(apart(each, grids) for each in values), strict=True)
    return over([MapCells(hard.shape, unbounded, scores, soft, hard > 0) for unbounded, scores, soft, hard in by_map])


def shown_votes(cells: FloatMap, grids: Sequence[Grid] | None) -> FloatMap:
    """Votes as an explanation shows them: of several maps each cell's divided among its places, and those added up."""
    if grids is None:
        return cells
    added: FloatMap = np.sum([spread(each, finest(grids)) for each in apart(cells, grids)], axis=0)
    return added


def several_maps(own: nn.Module, pixels: Tensor, maps: Maps, *, channels_last: bool) -> SeveralMaps:
    """The maps of a classifier, found or by name, for pixels like these.

    Where they are only counted, the last ones of different grids are taken, and of each grid what the least nested
    submodule gives last: ``layer3`` rather than a convolution in ``layer4``.

    Raises
    ------
    TracingError
        If there are fewer maps, or a name is not a submodule's that gives one.
    """
    known = dict(own.named_modules())
    if isinstance(maps, int):
        outputs = _outputs(own, pixels, [name for name in known if name])
        of_grid: dict[Grid, str] = {}
        for name, output in outputs.items():
            grid = _grid(output, channels_last)
            if grid is None or not _of_the_picture(grid, output, pixels):
                continue
            if grid not in of_grid or name.count(".") <= of_grid[grid].count("."):
                of_grid[grid] = name
        chosen = sorted(of_grid, key=lambda grid: -grid[0] * grid[1])[-maps:]
        if len(chosen) < maps:
            raise TracingError(f"expected {maps} feature maps of different grids, got {len(chosen)}: {chosen}")
        return SeveralMaps(own, [of_grid[grid] for grid in chosen], chosen, channels_last=channels_last)
    for name in maps:
        if name not in known or not name:
            children = ", ".join(name for name, _ in own.named_children())
            raise TracingError(f"maps: expected the name of a submodule, got {name!r}; there are {children}, ...")
    outputs = _outputs(own, pixels, maps)
    grids = []
    for name in maps:
        output = outputs.get(name)
        grid = _grid(output, channels_last)
        if grid is None:
            came = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TracingError(f"maps: expected a feature map of several cells from {name!r}, got {came}")
        grids.append(grid)
    return SeveralMaps(own, maps, grids, channels_last=channels_last)


def _outputs(model: nn.Module, pixels: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """What these submodules give, in the order in which they are done; of one that is called twice the last."""
    found: dict[str, Any] = {}
    caller = threading.get_ident()

    def keep(name: str, module: nn.Module, given: Any, output: Any) -> None:
        if threading.get_ident() == caller:  # a hook is called for every thread that runs the model meanwhile
            found.pop(name, None)
            found[name] = output

    hooks = [model.get_submodule(name).register_forward_hook(functools.partial(keep, name)) for name in names]
    try:
        model(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _grid(output: Any, channels_last: bool) -> Grid | None:
    """The grid of a map of several cells; None of anything else."""
    if not isinstance(output, Tensor) or output.ndim != 4:
        return None
    height, width = output.shape[1:3] if channels_last else output.shape[2:]
    return (height, width) if height * width > 1 else None


def _of_the_picture(grid: Grid, output: Tensor, pixels: Tensor) -> bool:
    """Whether a grid is of the picture's shape, of one map a picture: what attends within windows is neither."""
    shape = pixels.shape[3] / pixels.shape[2]
    return len(output) == len(pixels) and abs(grid[1] / grid[0] - shape) <= 0.5 * shape
