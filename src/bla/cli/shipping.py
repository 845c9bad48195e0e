"""`bla export` and `bla serve`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bla import needs_extra
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
    from bla.deploy.export import export as write

    exported = write(run, out, to=to, entry=entry)
    if json_:
        print(json.dumps(exported.to_dict()))
        return
    card, worst = exported.card, max(exported.misses.items(), key=lambda item: item[1])
    print(f"{out}: {card.setup} on {card.model}, {out.stat().st_size / 1e6:.1f} MB, takes {card.entry}.")
    print(f"Checked against the module: the largest miss is {worst[1]:.1e}, of {worst[0]}.")


def serve(
    explainer: str,
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    threads: int | None = None,
    batch_size: int = 16,
    deadline: float = 5.0,
    queue: int = 64,
    megabytes: float = 32.0,
    megapixels: float = 50.0,
    timeout: float = 30.0,
) -> None:
    """Serve explanations: an API (/openapi.json) and a page (/). Stopped, it answers what it has accepted first.

    Parameters
    ----------
    explainer
        An exported file, or a run or shipped explainer, which is exported first and kept.
    host
        The address to listen at; 0.0.0.0 for all.
    port
        The port to listen at.
    threads
        Of the computation. By default all cores.
    batch_size
        Photos that are run together, at most.
    deadline
        Milliseconds that a photo waits for others, at most.
    queue
        Photos that are under way, at most; others are refused, with the time to try again (429).
    megabytes
        Of a request, at most.
    megapixels
        Of a photo, at most; known before it is decoded.
    timeout
        Seconds of a request, at most.
    """
    from bla.deploy.engine import EngineError, open_engine

    counts = {"port": port, "batch-size": batch_size, "queue": queue, "megabytes": megabytes, "megapixels": megapixels}
    for name, value in (counts | {"timeout": timeout, "threads": threads or 1}).items():
        if not value > 0:
            raise EngineError(f"expected {name} > 0, got {value}")
    with needs_extra("serve"):
        from bla.deploy.serve import Limits
        from bla.deploy.serve import serve as run
    engine = open_engine(explainer, threads=threads)
    limits = Limits(bytes=int(megabytes * 2**20), pixels=int(megapixels * 1e6), seconds=timeout)
    print(f"{engine.card.setup} on {engine.card.model}: http://{host}:{port}/", file=sys.stderr, flush=True)
    run(engine, host=host, port=port, limits=limits, most=batch_size, deadline=deadline / 1000, room=queue)
