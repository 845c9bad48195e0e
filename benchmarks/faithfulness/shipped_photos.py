"""The photos that the shipped explainers learn from: those of some folders, and each squashed to a square as well.

    python -m benchmarks.faithfulness.shipped_photos OUT FOLDER...
    bla train OUT --out RUN --setup bla-px

Squashed copies, every second one mirrored, are further views of the same objects: held-out kept and removed gain.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageOps

from bla.data.image_sets import list_images
from bla.data.photo import open_photo

SIDE = 256


def main() -> None:
    """Write the photos."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for folder in options.folders:
        for index, path in enumerate(list_images([folder])):
            photo = open_photo(path)
            photo.save(options.out / f"{folder.name}-{path.stem}.jpg", quality=95)
            square = photo.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            view = ImageOps.mirror(square) if index % 2 else square
            view.save(options.out / f"{folder.name}-{path.stem}-squashed.jpg", quality=95)


if __name__ == "__main__":
    main()
