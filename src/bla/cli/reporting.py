"""`bla report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bla.cli.sharing import DONE, Json


def report(
    run: Path,
    /,
    *,
    out: Path | None = None,
    photos: int = 12,
    seed: int = 0,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Write one self-contained HTML page from what `bla compare` found: verdict, curves, photos, figures.

    Parameters
    ----------
    run
        A run folder that was compared, or the folder of a comparison.
    out
        The file to write. By default report.html beside the comparison.
    photos
        How many photos to show: half drawn by the seed, a quarter each the best and the worst.
    seed
        Of the photos that are drawn.
    """
    from bla.comparison.report import write_report

    written = write_report(run, out, photos=photos, seed=seed)
    if json_:
        print(json.dumps(written.to_dict()))
        return DONE
    marks = {"for": "+", "against": "-", "open": "?"}
    print(written.summary)
    for finding in written.findings:
        print(f"{marks[finding.answer]} {finding.question} {finding.words}")
    print(f"The page is {written.path}.")
    return DONE
