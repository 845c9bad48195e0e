"""Whether cells lie where the photo's pixels do: turned and mirrored maps are refused, padded ones marked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.data.photo import Transform
from bla.model.classifier import ClassifierError, explainable

HALF = (0.5, 0.5, 0.5)


class Net(nn.Module):
    """A map of 8 channels of 8x8 pixels a cell, read by its average, of a picture that is first changed."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.change = change
        self.stem, self.fc = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU()), nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.fc(self.stem(self.change(pixels)).mean((2, 3)))
        return found


ELSEWHERE: dict[str, Net] = {
    "transposed": Net(lambda x: x.mT),
    "mirrored": Net(lambda x: x.flip(-1)),
    "upside down": Net(lambda x: x.flip(-2)),
    "a quarter turn": Net(lambda x: x.rot90(1, (2, 3))),
}


@pytest.mark.parametrize("net", ELSEWHERE.values(), ids=ELSEWHERE)
def test_maps_in_another_order_than_the_photo_are_refused(net: Net) -> None:
    with pytest.raises(ClassifierError, match="cells lie where the photo's pixels do, got one turned, mirrored or in"):
        explainable(net.eval(), transform=Transform((64, 64), HALF, HALF))


def sampled(x: Tensor) -> Tensor:
    """A spatial transformer that leaves everything where it is."""
    grid = functional.affine_grid(torch.eye(2, 3).expand(len(x), -1, -1), list(x.shape), align_corners=False)
    return functional.grid_sample(x, grid, align_corners=False)


MARKED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, int], str]] = {
    "padded": (lambda x: functional.pad(x, (16, 16, 16, 16)), (12, 12), "80 cells read nothing of the photo"),
    "to a square": (lambda x: functional.pad(x, (0, 0, 0, 32)), (12, 8), "32 cells read nothing of the photo"),
    "its centre": (lambda x: x[:, :, 16:-16, 16:-16], (4, 4), "nothing is read of the photo's edge"),
    "a few cells of it": (lambda x: x[:, :, 24:-24, 24:-24], (2, 2), "nothing is read of the photo's edge"),
    "its left": (lambda x: x[:, :, :, :40], (8, 5), "nothing is read of the photo's right edge"),
    "beside copies of its edge": (
        lambda x: functional.pad(x, (0, 64, 0, 0), mode="replicate"),
        (8, 16),
        "the photo takes one side of the map",
    ),
    "a corner": (lambda x: x[:, :, 16:, 16:], (6, 6), "nothing is read of the photo's upper and left edge"),
    "a corner, enlarged": (
        lambda x: functional.interpolate(x[:, :, :48, :], size=(64, 64)),
        (8, 8),
        "nothing is read of the photo's lower",
    ),
    "what a sampler gives": (sampled, (8, 8), "the classifier warps the photo itself"),
    "resized": (lambda x: functional.interpolate(x, size=(96, 96)), (12, 12), ""),
    "less a margin below a cell": (lambda x: x[:, :, 2:-2, 2:-2], (7, 7), ""),
}


@pytest.mark.parametrize(("change", "grid", "note"), MARKED.values(), ids=MARKED)
def test_maps_of_more_or_less_than_the_photo_are_marked(
    change: Callable[[Tensor], Tensor], grid: tuple[int, int], note: str
) -> None:
    wrapped = explainable(Net(change).eval(), transform=Transform((64, 64), HALF, HALF))
    assert wrapped.select(torch.randn(1, 3, 64, 64)).hard.shape[1:] == grid
    assert wrapped.note.removeprefix("approximate: ").startswith(note)
    assert bool(wrapped.note) == bool(note)


def test_views_that_are_mirrored_beside_others_are_refused() -> None:
    net = Net(lambda x: x)

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, pixels: Tensor) -> Tensor:
            found: Tensor = (self.net(pixels) + self.net(pixels.flip(-1))) / 2
            return found

    with pytest.raises(ClassifierError, match="turned, mirrored or in another order"):
        explainable(Views().eval(), transform=Transform((64, 64), HALF, HALF))


class Queries(Net):
    """Pools by some learnt queries, each of 8 numbers, which may look like the tokens of a grid of 2 x 3 or 2 x 4."""

    def __init__(self, count: int) -> None:
        super().__init__(lambda x: x)
        self.queries = nn.Parameter(torch.randn(1, count, 8))
        self.pool = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.stem(pixels).flatten(2).mT
        found: Tensor = self.fc(self.pool(self.queries.expand(len(tokens), -1, -1), tokens, tokens)[0].mean(1))
        return found


@pytest.mark.parametrize("count", [1, 6])
def test_queries_and_channels_are_not_taken_for_cells(count: int) -> None:
    wrapped = explainable(Queries(count).eval(), transform=Transform((64, 96), HALF, HALF))
    assert wrapped.trunk(torch.randn(2, 3, 64, 96)).shape[2:] == (8, 12)
