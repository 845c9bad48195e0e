"""Explain real photographs by the shipped explainer, then train BLA and BLA-PH on the embedded data set."""

from __future__ import annotations

import argparse
from pathlib import Path

import skimage.data
from PIL import Image
from rich.console import Console
from rich.table import Table

import bla
from bla.data.published import EMBEDDED
from bla.deploy.pictures import explain_files
from bla.explanations.explanation import Explanation
from bla.files import cache_root
from bla.progress import shown_progress
from bla.training.settings import Settings

PHOTOGRAPHS = {
    "camera": skimage.data.camera,
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "rocket": skimage.data.rocket,
}


def main() -> None:
    """Explain photographs by the shipped explainer; then train, print accuracies, and explain by what was trained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    out: Path = parser.parse_args().out

    (out / "photographs").mkdir(parents=True, exist_ok=True)
    photographs = []
    for name, photograph in PHOTOGRAPHS.items():
        photographs.append(out / "photographs" / f"{name}.png")
        Image.fromarray(photograph()).save(photographs[-1])
    _explain("Photographs, explained by the shipped explainer", photographs, "tf_efficientnet_lite0", out / "why")

    table = Table("setup", "baseline", "soft", "hard", "cells of 49", title="Top-1 on 400 test images, from")
    with shown_progress() as report:
        for setup, name in (("bla", "BLA"), ("bla-ph", "BLA-PH")):
            report(f"{name} on the embedded data set, features of tf_efficientnet_lite0", 0, 0)
            metrics = bla.train(EMBEDDED, out / setup, Settings(setup=setup), report=report).record["metrics"]
            size = metrics["size"]
            spread = f"{size['mean']:.1f} ({size['min']} to {size['max']})"
            table.add_row(name, *(f"{metrics[key]['top1']:.3f}" for key in ("baseline", "soft", "hard")), spread)
    Console().print(table)

    composed = sorted((cache_root() / EMBEDDED / "test").glob("*/*.jpg"))[::50]
    _explain("Test images, explained by the BLA just trained", composed, out / "bla", out / "why-embedded")
    print(f"The runs are in {out / 'bla'} and {out / 'bla-ph'}.")


def _explain(title: str, photos: list[Path], run: str | Path, out: Path) -> None:
    print(f"{title}:")
    for result in explain_files(photos, run=run, out=out):
        if isinstance(result, Explanation):
            print(f"  {'/'.join(Path(result.image).parts[-2:])}: {result}", flush=True)
    print(f"The pictures are in {out}.\n", flush=True)


if __name__ == "__main__":
    main()
