"""Networks by ONNX Runtime: equal to torch for any number of photos, and taken where they save time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bla.model import compiled
from bla.model.compiled import quickest


class Doubled(nn.Module):
    """Its part `graph` must not hide what the exporter calls so; with a size, it takes other numbers in another way."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.graph = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.size = size

    def forward(self, pixels: Tensor) -> Tensor:
        maps: Tensor = self.graph(pixels)
        return maps if self.size and self.size != len(pixels) else maps + maps


@pytest.mark.parametrize(
    ("seconds", "size", "by_graph"),
    [((0.4, 0.1), None, True), ((0.4, 0.5), None, False), ((0.2,), None, False), ((0.4, 0.1), 2, False)],
    ids=["long", "graph is slower", "short", "not for any number of photos"],
)
def test_a_graph_is_taken_where_it_saves_time_and_is_the_same(
    seconds: tuple[float, ...], size: int | None, by_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, took = Doubled(size).eval(), iter(seconds)
    monkeypatch.setattr(compiled, "_seconds", lambda network, pixels: next(took))
    run, a_photo = quickest(network, torch.rand(2, 3, 8, 12), 100)
    assert (run is not network) == by_graph
    assert a_photo == (min(seconds) if by_graph else seconds[0])
    for count in (1, 5):
        pixels = torch.randn(count, 3, 8, 12).contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(run(pixels), network(pixels))
