"""`bla report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from bla.cli.sharing import Json, Seed, require, say, within


def report(
    run: Path,
    /,
    *,
    out: Path | None = None,
    photos: Annotated[int, within(0, 1000)] = 12,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Write the result of `bla compare` as one self-contained HTML page: verdict, curves, photos, figures.

    Example: `bla report run --out report.html`

    :param run: A compared run's folder, or a comparison's.
    :param out: The file to write. By default report.html beside the comparison.
    :param photos: Photos to show: half at random, a quarter each the best and the worst.
    """
    require("compare")
    from bla.comparison.report import write_report

    written = write_report(run, out, photos=photos, seed=seed)
    if json_:
        print(json.dumps(written.to_dict()))
        return
    marks = {"for": "+", "against": "-", "open": "?"}
    say(f"{written.decision} {written.headline} {written.summary} {written.to_settle}".rstrip())
    for finding in written.findings:
        say(f"{marks[finding.answer]} {finding.question} {finding.words}")
    if written.not_shown:
        say(f"Not shown, since it was not measured: {'; '.join(written.not_shown)}.")
    say(f"The page is {written.path}.")
