"""Every image processor of transformers that is built without weights: whether its pixels are what is explained.

    python -m benchmarks.models.processors > runs/processors.csv

The table holds how far our input is from the processor's own output, of its largest value, on photos of two shapes;
what is not one picture of one size, as a classifier takes it, is refused, and the table says why.
"""

from __future__ import annotations

import csv
import logging
import sys
import warnings
from collections import Counter
from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from bla.data.photo import DataError
from bla.data.pipeline import Pipeline, understood


def tried(processor: Any) -> tuple[str, str]:
    """What became of a processor, and its miss or the reason."""
    try:
        transform = understood(processor)
    except DataError as error:
        return "refused", str(error)
    worst = 0.0
    for shape in ((211, 333, 3), (90, 61, 3)):
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        theirs = np.asarray(processor(images=photo, return_tensors="np")["pixel_values"][0])
        levels = transform.read(photo).pixels.astype(np.float64)
        ours = np.moveaxis((levels / 255 - transform.mean) / transform.std, -1, 0)
        worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    kind = "a transform" if not isinstance(transform, Pipeline) else "the processor, as it is"
    return kind, f"{worst:.0e}"


def main() -> None:
    """Print the table as CSV, and how many there are of each kind."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    names: set[str] = set()
    for known in IMAGE_PROCESSOR_MAPPING_NAMES.values():
        names.update(filter(None, known.values() if isinstance(known, dict) else known))
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["processor", "explained by", "differs by, or why not"])
    counts: Counter[str] = Counter()
    for name in sorted(names):
        try:
            processor = getattr(transformers, name)()
        except Exception as error:  # it needs more than a configuration
            kind, said = "not built", str(error).strip().partition("\n")[0]
        else:
            kind, said = tried(processor)
        counts[kind] += 1
        table.writerow([name, kind, said])
    print(f"{counts.total()} processors: {dict(counts)}", file=sys.stderr)


if __name__ == "__main__":
    main()
