"""A shipped explainer on photos of objects that it never saw: how many cells to ask for, and whether they lie on them.

    python -m benchmarks.faithfulness.on_object CUB_200_2011 --out OUT [--explainer tf_efficientnet_lite0]

The size (`bla explain --size`) is chosen on the training photos, by the smaller of the mean differences from CAM and
from a centre disc in the share of the cells that lies on the object. Reported are the test photos, paired, with 95%
intervals over photos: at that size, and on average over all sizes at which it led both on the training photos.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import parser_of
from bla.comparison import RUN, compare
from bla.comparison.photos import find_photos
from bla.data.image_sets import Splits
from bla.data.published import read_images
from bla.files import cache_root
from bla.metrics import localise, top_cells
from bla.metrics.statistics import bootstrap, sign_flips
from bla.progress import show
from bla.runs.run import open_run

RIVALS = ("cam", "grad-cam++", "norm", "centre", "random")
BEATEN = ("cam", "centre")
"""What the size is chosen against."""
SIZES = range(1, 25)


def shares(explainer: str, splits: Splits, out: Path) -> dict[int, dict[str, np.ndarray]]:
    """By size and method, the share of each test photo's best cells that lies on its object."""
    compare(explainer, splits, out=out, methods=RIVALS, report=show)
    photos = find_photos(open_run(explainer), splits, limit=None, seed=0, cache=None, report=show)
    assert photos.coverage is not None
    found: dict[int, dict[str, np.ndarray]] = {size: {} for size in SIZES}
    for method in (RUN, *RIVALS):
        lines = (out / "explanations" / f"{method}.jsonl").read_text(encoding="utf-8").splitlines()
        ranking: Tensor = torch.tensor([json.loads(line)["unbounded"] for line in lines])
        for size in SIZES:
            share = localise(ranking, top_cells(ranking, size), photos.coverage)["on_object"]
            found[size][method] = share.numpy()
    return found


def lead(shares_of_size: dict[str, np.ndarray]) -> float:
    """The smaller of the mean differences."""
    return min(float(np.nanmean(shares_of_size[RUN] - shares_of_size[name])) for name in BEATEN)


def main() -> None:
    """Choose on the training photos, report on the test photos."""
    parser = parser_of(__doc__)
    parser.add_argument("data", help="a division of photos with boxes or masks")
    parser.add_argument("--explainer", default="tf_efficientnet_lite0")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    splits, _ = read_images(arguments.data, cache=cache_root(), report=show)
    seen = shares(arguments.explainer, dataclasses.replace(splits, test=splits.train), arguments.out / "chosen-on")
    size = max(SIZES, key=lambda size: lead(seen[size]))
    leading = [each for each in SIZES if lead(seen[each]) > 0]
    held_out = shares(arguments.explainer, splits, arguments.out / "reported-on")
    result: dict[str, Any] = {
        "explainer": arguments.explainer,
        "size": size,
        "lead_by_size_on_training_photos": {each: lead(seen[each]) for each in SIZES},
        "leading": leading,
        "chosen": summary(held_out[size]),
        "mean_of_leading": summary(
            {name: np.mean([held_out[each][name] for each in leading], axis=0) for name in (RUN, *RIVALS)}
        ),
    }
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    print(f"Sizes chosen on {len(splits.train)} photos; on {len(splits.test)} others:\n")
    print(f"| method | {size} cells | less it | {leading[0]} to {leading[-1]} cells | less it |\n|{' --- |' * 5}")
    for name in (RUN, *RIVALS):
        cells = []
        for row in (result["chosen"][name], result["mean_of_leading"][name]):
            cells += [
                f"{row['on_object']:.3f}",
                "" if name == RUN else "{difference:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row),
            ]
        print(f"| {name} | {' | '.join(cells)} |")


def summary(values: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Each method's mean over photos, and the explainer's difference from it."""
    found: dict[str, dict[str, float]] = {}
    for name, each in values.items():
        known = np.isfinite(values[RUN]) & np.isfinite(each)
        found[name] = {"on_object": float(each[known].mean())}
        if name != RUN:
            difference = values[RUN][known] - each[known]
            interval = bootstrap(difference).to_dict()
            found[name] |= {"difference": interval.pop("mean"), **interval, "p": float(sign_flips(difference[None])[0])}
    return found


if __name__ == "__main__":
    main()
