"""`bla calibrate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bla.cli.sharing import FillName, Json, TrustCode, flat, say, skipped
from bla.cli.training import Places


def calibrate(
    run: str,
    photos: str,
    /,
    *,
    for_: Annotated[Literal["agreement", "kept", "removed"], Parameter(name="--for")] = "kept",
    share: float = 0.9,
    confidence: float = 0.95,
    fill: FillName = "coarse",
    out: Path | None = None,
    trust_code: TrustCode = None,
    places: Annotated[Places | None, flat()] = None,
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> int:
    """Certify a size: from how many of the best cells the classifier keeps its class, on photos like these.

    Writes certificate.json into the run folder; `bla explain --size certified` selects as many cells. If no size
    reaches the share, it says so and writes nothing.

    Example: `bla calibrate run photos --share 0.9`.

    :param run: A run folder, or a shipped explainer's name.
    :param photos: A folder of photos that the run was not trained on, or another source as for `bla train`.
    :param for_: kept: the classifier says its class from these cells' pixels alone; removed: it does not without them;
        agreement: the head says it from these cells.
    :param share: Of photos like these, the share in which this holds.
    :param confidence: How sure the certificate is.
    :param fill: What replaces the other pixels: the photo made coarse, a blur, its mean, or grey.
    :param out: The file to write. By default certificate.json in the run folder; a shipped explainer needs one.
    """
    from bla.progress import shown_progress
    from bla.runs import calibration

    options = {
        "quantity": for_,
        "share": share,
        "confidence": confidence,
        "fill": fill,
        "out": out,
        "model": trust_code,
    }
    with shown_progress() as report:
        found, failures = calibration.calibrate(run, photos, **options, **asdict(places or Places()), report=report)  # type: ignore[arg-type]
    if json_:
        print(json.dumps(asdict(found)))
    else:
        say(found)
        say(f"It held in {100 * found.rate:.1f}% of the photos; at this size the lower bound is {found.bound:.3f}.")
    return skipped(failures)
