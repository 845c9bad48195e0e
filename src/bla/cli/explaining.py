"""`bla explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from bla.cli.sharing import DONE, DONE_BUT, Check, Device, Fill, RunOrGraph, TrustCode, require, say, skip_line

if TYPE_CHECKING:
    from bla.explanations.explanation import Explanation


def explain(
    photos: Annotated[list[Path], Parameter(consume_multiple=True)],
    /,
    *,
    run: RunOrGraph = "tf_efficientnet_lite0",
    size: int | Literal["certified"] | None = None,
    certificate: Path | None = None,
    target: str | None = None,
    against: str | None = None,
    check: Check = False,
    fill: Fill = "coarse",
    out: Path | None = None,
    panel: Literal["plain", "paper"] = "plain",
    trust_code: TrustCode = None,
    device: Device = "auto",
    json_: Annotated[bool, Parameter(negative=(), help="Print one line of JSON per photo.")] = False,
) -> int:
    """Explain photos: what the classifier sees in each, and what the selected cells alone say.

    Writes a picture (PNG) and an explanation (JSON) per photo, and a contact sheet. If interrupted, rerun: it resumes.

    Example: `bla explain cat.jpg --run run`

    :param photos: Photos, and folders of photos.
    :param size: Select exactly this many cells, or "certified". By default the explainer chooses for each photo.
    :param certificate: A file that `bla calibrate` wrote. By default the run's own.
    :param target: A class, by name or index: show each selected cell's vote for it. A class-aware explainer selects
        cells for it; by default for the predicted class.
    :param against: With --target: votes for the target rather than this class.
    :param out: The folder to write. By default "why", with --json none.
    :param panel: A picture with plain words, or the paper's four pictures with the scores.
    """
    from bla.data.image_sets import list_images
    from bla.deploy.pictures import explain_files
    from bla.explanations.explanation import Unexplained
    from bla.progress import shown_progress
    from bla.runs.certificates import read_certificate
    from bla.runs.record import RunError

    if graph := Path(run).is_file():
        require("export")
    paths = list_images(photos)
    folder = out if out is not None or json_ else Path("why")
    failed = 0
    with shown_progress() as report:
        if (certified := None if graph else read_certificate(run, certificate, report)) is not None:
            report(str(certified), 0, 0)
        if size == "certified":
            if certified is None:
                raise RunError(f"expected a certificate of {run}, got none: `bla calibrate` makes one for a run")
            if target is not None:
                raise RunError("expected no --target with a certified size, which is for the predicted class, got one")
            size = certified.size
        asked, other = (int(name) if name is not None and name.isdecimal() else name for name in (target, against))
        question = {"size": size, "target": asked, "against": other, "check": check, "fill": fill, "model": trust_code}
        drawn = {"out": folder, "panel": panel, "device": device, "report": report}
        results = explain_files(paths, run=run, **question, **drawn)  # type: ignore[arg-type]
        for index, result in enumerate(results, start=1):
            if json_:
                print(json.dumps(result.to_dict()), flush=True)
            if isinstance(result, Unexplained):
                failed += 1
                report(skip_line(result.image, result.error), 0, 0)
            elif not json_:
                say(_one_line(result), flush=True)
            report("explaining", index, len(paths))
    if folder is not None and not json_ and failed < len(paths):
        say(f"The pictures are in {folder}.")
    return DONE_BUT if failed else DONE


def _one_line(explanation: Explanation) -> str:
    parts = [f"{explanation.image}: {explanation}"]
    if (votes := explanation.votes) is not None:
        for_it = f"{int((votes.cells > 0).sum())} of {explanation.size} cells for it"
        parts.append(f"{' rather than '.join(votes.labels)}: logit {votes.logit:+.2f}, {for_it}")
    if explanation.check is not None:
        parts.append(str(explanation.check))
    return "; ".join(parts)
