"""`bla calibrate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bla.cli.sharing import Fill, Json, RunName, TrustCode, flat, say, skipped
from bla.cli.training import Places


def calibrate(
    run: RunName,
    photos: str,
    /,
    *,
    for_: Annotated[Literal["agreement", "kept", "removed"], Parameter(name="--for")] = "kept",
    share: float = 0.9,
    confidence: float = 0.95,
    fill: Fill = "coarse",
    out: Path | None = None,
    trust_code: TrustCode = None,
    places: Annotated[Places | None, flat()] = None,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Certify a size: how many of the best cells make the classifier keep its class, on photos like these.

    Writes a certificate, which `bla explain --size certified` uses; nothing if no size reaches the share.

    Example: `bla calibrate run photos --share 0.9`

    :param photos: Photos that the run was not trained on: a folder, or another source as for `bla train`.
    :param for_: kept: the classifier names its class from these cells' pixels alone; removed: not without them;
        agreement: the head names it from these cells.
    :param share: The share of photos in which this holds.
    :param confidence: The certificate's confidence.
    :param out: The file to write. By default certificate.json in the run folder; required for a shipped explainer.
    """
    from bla.progress import shown_progress
    from bla.runs import calibration

    asked = {"quantity": for_, "share": share, "confidence": confidence, "fill": fill}
    where = {"out": out, "model": trust_code} | asdict(places or Places())
    with shown_progress() as report:
        found, failures = calibration.calibrate(run, photos, **asked, **where, report=report)  # type: ignore[arg-type]
    if json_:
        print(json.dumps(asdict(found)))
    else:
        say(found)
        say(f"It held in {100 * found.rate:.1f}% of the photos; at this size the lower bound is {found.bound:.3f}.")
    return skipped(failures)
