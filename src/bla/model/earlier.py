"""A finer map nearer to the pixels, given beside a trunk's own: channels that a score reads and the head does not."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.nn import functional

from bla.model.heads import reads_maps
from bla.model.splitting import Split
from bla.model.untouched import seeing

MOST = 1024
"""A map of more channels is no earlier one."""


class EarlierTrunk(nn.Module):
    """A trunk's map (B, C, H, W) and behind its channels those of an earlier one, averaged to its grid.

    ``place`` names the submodule that gives the earlier map, ``channels_last`` its layout.
    """

    def __init__(self, trunk: nn.Module, place: str, channels_last: bool) -> None:
        super().__init__()
        self.trunk = trunk
        self.place = place
        self.channels_last = channels_last

    def forward(self, pixels: Tensor) -> Tensor:
        seen: list[Tensor] = []
        here = threading.get_ident()

        def see(_: str, output: Tensor) -> None:
            if threading.get_ident() == here:  # another thread may run the same trunk
                seen.append(output)

        with seeing([(self.place, self.trunk.get_submodule(self.place))], see):
            features: Tensor = self.trunk(pixels)
        earlier = seen[-1].permute(0, 3, 1, 2) if self.channels_last else seen[-1]
        size = (features.shape[2], features.shape[3])
        return torch.cat([features, functional.adaptive_avg_pool2d(earlier, size).to(features.dtype)], dim=1)


class FirstChannels(nn.Module):
    """A head that reads the first ``channels`` of a pooled vector, or of maps."""

    shares_trunk = True

    def __init__(self, head: nn.Module, channels: int) -> None:
        super().__init__()
        self.head = head
        self.in_features = channels
        self.reads_maps = reads_maps(head)

    def forward(self, values: Tensor, *keep: Tensor | None) -> Tensor:
        logits: Tensor = self.head(values[:, : self.in_features], *keep)
        return logits


def with_earlier(found: Split, pixels: Tensor) -> tuple[Split, int]:
    """A split whose trunk gives an earlier map of twice the grid, too, and the channels of that; 0 if there is none.

    The grid of 2n or, where n was rounded up, of 2n - 1 cells a side.
    """
    seen: dict[str, Tensor] = {}  # of a module that is called again, the last, as EarlierTrunk takes it

    def see(name: str, output: Tensor) -> None:
        seen.pop(name, None)
        seen[name] = output

    _, *inner = found.trunk.named_modules()
    with seeing(inner, see), torch.inference_mode():
        own = found.trunk(pixels).shape[2:]
    candidates: list[tuple[str, bool, int]] = []
    for name, output in seen.items():
        if isinstance(output, Tensor) and output.ndim == 4 == 2 + len(own):
            for channels_last, grid, channels in ((False, output.shape[2:], 1), (True, output.shape[1:3], 3)):
                twice = [(side + 1) // 2 for side in grid] == list(own)
                if twice and 4 <= output.shape[channels] <= MOST:
                    candidates.append((name, channels_last, output.shape[channels]))
    if not candidates:
        return found, 0
    outermost = min(name.count(".") for name, *_ in candidates)
    place, channels_last, channels = [each for each in candidates if each[0].count(".") == outermost][-1]
    head = FirstChannels(found.head, found.channels)
    trunk = EarlierTrunk(found.trunk, place, channels_last).eval()
    return found._replace(trunk=trunk, head=head.eval(), channels=found.channels + channels), channels
