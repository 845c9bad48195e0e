"""Is a cell its pixels? The trunk's receptive field against a trunk whose cells see nothing but their own pixels.

    python -m benchmarks.faithfulness.patches catdog --out OUT

BLA is trained on tf_efficientnet_lite0 and on the same network applied to the pixels of each of the 49 cells, enlarged
twice. Then all pixels but the selected cells' are made grey, blurred or the mean colour, and the head reads the same
cells again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import bla.runs.run
from benchmarks.results import parser_of
from bla.comparison.photos import find_photos
from bla.data.image_sets import Splits, image_folder
from bla.data.masking import filled
from bla.metrics.pixels import spread
from bla.metrics.statistics import bootstrap
from bla.model.backbones import LITE0, load_backbone
from bla.model.heads import weighted_sum
from bla.model.preprocessing import transform_of
from bla.progress import show
from bla.training.settings import Settings

GRID = 7


class Patches(nn.Module):
    """A classifier on patches that do not see one another: a cell's feature is a function of its pixels alone."""

    def __init__(self, model: nn.Module, enlarged: int = 2) -> None:
        super().__init__()
        self.model = model
        self.enlarged = enlarged
        self.num_features = model.num_features
        self.pretrained_cfg = model.pretrained_cfg
        self.transform = transform_of(model)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, 224, 224) to features (B, C, 7, 7)."""
        batch, colours, height, width = pixels.shape
        down, across = height // GRID, width // GRID
        cells = pixels.reshape(batch, colours, GRID, down, GRID, across).permute(0, 2, 4, 1, 3, 5)
        cells = functional.interpolate(cells.flatten(0, 2), scale_factor=float(self.enlarged), mode="bilinear")
        maps: Tensor = self.model.forward_features(cells)  # type: ignore[operator]
        return maps.mean(dim=(2, 3)).reshape(batch, GRID, GRID, -1).permute(0, 3, 1, 2)

    def forward_head(self, maps: Tensor) -> Tensor:
        """Features (B, C, H, W) to logits (B, K)."""
        logits: Tensor = self.model.forward_head(maps)  # type: ignore[operator]
        return logits

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, K)."""
        return self.forward_head(self.forward_features(pixels))


@torch.no_grad()
def measured(opened: bla.runs.run.Run, data: Splits) -> dict[str, Any]:
    """Accuracy and agreement of the selected cells, read again after every other pixel is gone."""
    subjects = find_photos(opened, data, limit=None, seed=0, cache=None, report=show)
    classifier = opened.classifier
    assert subjects.labels is not None
    grey = classifier.pixels(np.full((1, 1, 1, 3), 127, np.uint8))
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(subjects), 8):
        rows = range(start, min(start + 8, len(subjects)))
        read = [classifier.transform.read(subjects.path(row)).pixels for row in rows]
        pixels = classifier.pixels(np.stack(read))
        features = classifier.trunk(pixels)
        hard = classifier.attention(features).hard
        named = classifier.classify(features, hard).argmax(dim=1)
        label = subjects.labels[start : start + 8]
        mask = spread((hard > 0).float(), pixels)[:, None] > 0.5
        fills = {"grey": grey.expand_as(pixels), "blur": filled(pixels, "blur"), "mean": torch.zeros_like(pixels)}
        found.setdefault("accuracy", []).append((named == label).double())
        found.setdefault("size", []).append((hard > 0).sum(dim=(1, 2)).double())
        for fill, other in fills.items():
            again = classifier.trunk(torch.where(mask, pixels, other))
            renamed = classifier.head(weighted_sum(again, hard)).argmax(dim=1)
            found.setdefault(f"agreement_{fill}", []).append((renamed == named).double())
            found.setdefault(f"accuracy_{fill}", []).append((renamed == label).double())
    result = {name: bootstrap(torch.cat(values).numpy()).to_dict() for name, values in found.items()}
    return result | {"baseline": opened.record["metrics"]["baseline"]["top1"]}


def main() -> None:
    """Train what is missing, measure, print."""
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path, help="an image folder with classes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--train", type=int, default=240, help="photos to train on")
    parser.add_argument("--test", type=int, default=80, help="photos to measure on")
    parser.add_argument("--epochs", type=int, default=20, help="of each stage")
    parser.add_argument("--mean-size", type=float, help="cells to select on average; by default the module's choice")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    settings = Settings(epochs=arguments.epochs, mean_size=arguments.mean_size)
    whole, draw = image_folder(arguments.data), np.random.RandomState(0)
    data = Splits(
        whole.train.subset(draw.permutation(len(whole.train))[: arguments.train]),
        whole.test.subset(draw.permutation(len(whole.test))[: arguments.test]),
        seeded=False,
    )
    results = {}
    for name in ("whole", "patches"):
        model = load_backbone(LITE0) if name == "whole" else Patches(load_backbone(LITE0))
        opened = bla.runs.run.train(data, arguments.out / name, settings, model=model)
        results[name] = measured(opened, data)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    columns = [name for name in results["whole"] if name != "baseline"]
    print(f"| trunk | baseline | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 2)}")
    for name, found in results.items():
        means = " | ".join(f"{found[key]['mean']:.3f}" for key in columns)
        print(f"| {name} | {found['baseline']:.3f} | {means} |")


if __name__ == "__main__":
    main()
