"""Does a jointly trained explainer speak of pixels once it has learnt from masked photos, too?

    python -m benchmarks.faithfulness.joint birds100 --out OUT --classes 25

Two trainings of a setup (BLA by default) on an image folder: on the photos, and on the photos beside masked copies of
them, whose label is the photo's. Then each test photo is explained, only the pixels of the selected cells are kept, and
the whole classifier names the class again: by the cells that it selects in that photo, and by all of its cells. Every
photo is judged at the explainer's own size, and at the same number of cells for both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import bla.runs.run
from benchmarks.faithfulness.planted import some_classes
from benchmarks.results import interval, kept, parser_of
from bla.data.image_sets import ImageSet, Splits, image_folder
from bla.data.masking import FILLS, masked, masked_photos
from bla.metrics import top_cells
from bla.model.evidence import from_all
from bla.progress import show
from bla.training.masked import draw_masks
from bla.training.settings import Settings

SIDE = 224
GRID = (7, 7)
BATCH = 16
KINDS = ("photos", "photos and masked copies")


def with_copies(photos: ImageSet, folder: Path, copies: int, seed: int) -> ImageSet:
    """The photos, squashed, and so many masked copies of each: blobs, near the centre, or random cells, filled."""
    assert photos.labels is not None
    rows, columns = (torch.arange(side) - (side - 1) / 2 for side in GRID)
    orders = torch.stack([-(rows[:, None] ** 2 + columns**2), torch.zeros(GRID)])[None]
    names, labels = [], []
    for index, label in enumerate(photos.labels.tolist()):
        with Image.open(photos.path(index)) as opened:
            photo = np.asarray(opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        masks = draw_masks(orders, max(2, 2 * copies), seed=seed, rows=[index])[0, ::2][:copies].numpy()
        changed = masked_photos(np.repeat(photo[None], copies, axis=0), masks, (0.5, 0.5, 0.5), FILLS[0])
        for copy, pixels in enumerate([photo, *np.rint(changed).clip(0, 255).astype(np.uint8)]):
            path = Path(photos.classes[label], f"{index:05d}-{copy}.png")
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / path, compress_level=1)
            names.append(path.as_posix())
            labels.append(label)
    order = np.argsort(names)
    return ImageSet(folder, tuple(np.array(names)[order].tolist()), np.array(labels)[order], photos.classes)


@torch.no_grad()
def measured(data: Splits, out: Path, settings: Settings, copies: int, size: int) -> dict[str, Any]:
    """Train, then accuracy from whole photos and from their selected pixels alone, by the cells selected and by all."""
    name = f"{settings.setup}-{copies}-{settings.seed}"
    with torch.enable_grad():
        run = bla.runs.run.train(data, out / name, settings)
    classifier, labels = run.classifier, data.test.labels
    assert labels is not None
    right: dict[str, list[bool]] = {}
    sizes = []
    for start in range(0, len(labels), BATCH):
        rows = range(start, min(start + BATCH, len(labels)))
        photos = np.stack([classifier.transform.read(data.test.path(row)).pixels for row in rows])
        pixels, wanted = classifier.pixels(photos), torch.from_numpy(labels[start : rows.stop])
        chosen = classifier.select(pixels)
        sizes += (chosen.hard > 0).sum(dim=(1, 2)).tolist()
        shown = {"": None, "own size: ": chosen.hard > 0, f"{size} cells: ": top_cells(chosen.unbounded, size)}
        for title, mask in shown.items():
            changed = pixels if mask is None else masked(pixels, mask.float(), FILLS[0])
            said = {"selected": classifier(changed), "all": from_all(classifier.head, classifier.trunk(changed))}
            for by, logits in said.items():
                right.setdefault(title + by, []).extend((logits.argmax(dim=1) == wanted).tolist())
        show("masking", rows.stop, len(labels))
    return {"size": float(np.mean(sizes))} | {title: float(np.mean(values)) for title, values in right.items()}


def main() -> None:
    """Make the copies, train, measure, print."""
    parser = parser_of(__doc__)
    parser.add_argument("data", type=Path, help="an image folder with classes, or with train and test")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=25, help="the first ones of the folder")
    parser.add_argument("--photos", type=int, help="of each class, to train on and to test; by default all")
    parser.add_argument("--setup", choices=("bla", "bla-t", "bla-ph"), default="bla")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--copies", type=int, default=3, help="masked copies of each training photo")
    parser.add_argument("--size", type=int, default=12, help="the number of cells at which both are judged")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    whole, out = image_folder(arguments.data), arguments.out
    train, test = (some_classes(part, arguments.classes, arguments.photos) for part in (whole.train, whole.test))
    rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    for kind, copies in zip(KINDS, (0, arguments.copies), strict=True):
        squashed = with_copies(train, out / f"train-{copies}", copies, 0)
        data = Splits(squashed, with_copies(test, out / "test", 0, 0), seeded=False)
        for seed in range(arguments.seeds):
            settings = Settings(arguments.setup, epochs=arguments.epochs, seed=seed)
            path = out / f"{arguments.setup}-{copies}-{seed}.json"
            rows[kind].append(kept(path, lambda at=(data, out, settings, copies, arguments.size): measured(*at)))
    columns = list(rows[KINDS[0]][0])
    print(f"| trained on | {' | '.join(columns)} |\n|{' --- |' * (1 + len(columns))}")
    for kind, found in rows.items():
        figures = [interval([each[column] for each in found]) for column in columns]
        print(f"| {kind} | {' | '.join(f'{mean:.3f} ± {half:.3f}' for mean, half in figures)} |")
    print(f"\n{len(test)} test photos; {json.dumps(vars(arguments), default=str)}")


if __name__ == "__main__":
    main()
