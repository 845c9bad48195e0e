"""`bla export` and `bla serve`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bla.cli.sharing import Json


def export(
    run: str,
    /,
    *,
    out: Path,
    to: Literal["onnx", "torch"] = "onnx",
    entry: Literal["pixels", "photos"] = "pixels",
    json_: Annotated[Json, Parameter(name="--json")] = False,
) -> None:
    """Write a trained explainer as one graph that runs without torch, checked against the module.

    Parameters
    ----------
    run
        A run folder, or a shipped explainer's name.
    out
        The file to write.
    to
        onnx, for ONNX Runtime and `bla serve`; or torch, for torch.export.load.
    entry
        pixels, normalised; or photos, uint8 of any size, with resizing and normalising inside of the graph.
    """
    from bla.export import export as write

    exported = write(run, out, to=to, entry=entry)
    if json_:
        print(json.dumps(exported.to_dict()))
        return
    card, worst = exported.card, max(exported.misses.items(), key=lambda item: item[1])
    print(f"{out}: {card.setup} on {card.model}, {out.stat().st_size / 1e6:.1f} MB, takes {card.entry}.")
    print(f"Checked against the module: the largest miss is {worst[1]:.1e}, of {worst[0]}.")
