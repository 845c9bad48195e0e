"""Every image processor of transformers that is built without weights: whether its pixels are what is explained.

    python -m benchmarks.models.processors > runs/processors.csv

The table holds how far our input is from the processor's own output, of its largest value, on photos of four shapes;
what is not one picture, as a classifier takes it, is refused, and the table says why.
"""

from __future__ import annotations

import csv
import logging
import sys
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from bla.data.photo import DataError
from bla.data.pipeline import Pipeline, understood

OCR = {"apply_ocr": False}
TIMM = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 0.9}
SETTINGS: dict[str, dict[str, Any]] = {
    "LayoutLMv2ImageProcessor": OCR,
    "LayoutLMv3ImageProcessor": OCR,
    "TimmWrapperImageProcessor": {"pretrained_cfg": TIMM},
    "ImageGPTImageProcessor": {"clusters": [[-1.0] * 3, [0.0] * 3, [1.0] * 3]},
}
"""What a processor cannot be built or called without."""


def tried(processor: Any) -> tuple[str, str]:
    """What became of a processor, and its miss or the reason."""
    try:
        transform = understood(processor)
    except DataError as error:
        return "refused", str(error)
    worst = 0.0
    for shape in ((211, 333, 3), (90, 61, 3), (334, 213, 3), (97, 389, 3)):
        photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))
        theirs = given(processor(images=photo, return_tensors="pt"))
        levels = transform.read(photo).pixels.astype(np.float64)
        ours = np.moveaxis((levels / 255 - transform.mean) / transform.std, -1, 0)
        worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    if not isinstance(transform, Pipeline):
        return "a transform", f"{worst:.0e}"
    kind = (
        "the processor, as it is"
        if len(transform.shapes) == 1
        else "the processor, at a size that depends on the photo"
    )
    return kind, f"{worst:.0e}"


def given(returned: Any) -> Any:
    """The pixels (C, height, width) in what a processor returned for one photo."""
    if isinstance(returned, torch.Tensor):
        values = returned
    else:
        values = next(returned[key] for key in returned if "pixel_values" in key or key == "images")
    return values.reshape(values.shape[-3:]).float().numpy()


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
            processor = getattr(transformers, name)(**SETTINGS.get(name.removesuffix("Pil"), {}))
        except Exception as error:  # it needs more than a configuration
            kind, said = "not built", str(error).strip().partition("\n")[0]
        else:
            kind, said = tried(processor)
        counts[kind] += 1
        table.writerow([name, kind, said])
    print(f"{counts.total()} processors: {dict(counts)}", file=sys.stderr)


if __name__ == "__main__":
    main()
