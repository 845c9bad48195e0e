"""`bla export` and `bla serve`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from bla import BlaError
from bla.cli.sharing import Host, Json, Port, RunName, TrustCode, listening, require, say, within


def export(
    run: RunName,
    /,
    *,
    out: Path | None = None,
    to: Literal["onnx", "torch", "html"] = "onnx",
    entry: Literal["pixels", "photos"] = "pixels",
    int8: Annotated[list[Path] | None, Parameter(negative=())] = None,
    trust_code: TrustCode = None,
    json_: Json = False,
) -> None:
    """Export a trained explainer as one graph that runs without torch, checked against the module.

    Example: `bla export run --out explainer.onnx`

    :param out: The file to write. By default one in the cache, which `bla explain`, `batch` and `serve` then use.
    :param to: onnx, for ONNX Runtime and `bla serve`; torch, for torch.export.load; or html, a page that explains
        photos in the browser, without a server.
    :param entry: What the graph takes: normalised pixels, or uint8 photos of any size.
    :param int8: Compute the trunk in int8, calibrated on these photos, 16 or more, and folders of photos.
    """
    if to != "torch":
        require("export")
    from bla.deploy.engine import graph_of, seal
    from bla.deploy.export import export as write
    from bla.progress import shown_progress

    if kept := out is None:
        if (to, entry, int8) != ("onnx", "pixels", None):
            raise BlaError("expected --out, the file to write, with --to, --entry or --int8, got none")
        out = graph_of(run)
    with shown_progress() as report:
        exported = write(run, out, to=to, entry=entry, calibration=int8 or (), model=trust_code, report=report)
    if kept:
        seal(out)
    if json_:
        print(json.dumps(exported.to_dict()))
        return
    card, worst = exported.card, max(exported.misses.items(), key=lambda item: item[1])
    use = "opens in a browser" if to == "html" else f"takes {card.entry}"
    say(f"{out}: {card.setup} on {card.model}, {out.stat().st_size / 1e6:.1f} MB, {use}.")
    if int8:
        say(card.note)
        return
    say(f"Checked against the module: the largest difference is {worst[1]:.1e}, in {worst[0]}.")


def serve(
    explainer: str,
    /,
    *,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    threads: Annotated[int, within(1, 1024)] = 1,
    workers: Annotated[int | None, within(1, 256)] = None,
    batch_size: Annotated[int, within(1, 4096)] = 16,
    latency: Annotated[float | None, within(1, 3_600_000)] = None,
    queue: Annotated[int, within(1, 65_536)] = 64,
    megabytes: Annotated[float, within(0.001, 1024)] = 32.0,
    megapixels: Annotated[float, within(0.001, 178)] = 50.0,
    timeout: Annotated[float, within(0.1, 3600)] = 30.0,
    token_file: Path | None = None,
    framed_by: Annotated[str | None, Parameter(env_var="BLA_FRAMED_BY")] = None,
    trust_code: TrustCode = None,
) -> None:
    """Serve explanations: an API (/openapi.json) and a page (/).

    When stopped, it first answers the accepted requests.

    Example: `bla serve tf_efficientnet_lite0 --port 8080`

    :param explainer: An exported file, or a run or shipped explainer, which is exported first.
    :param threads: Threads that compute, for each worker. More answer one photo sooner, but fewer photos per second.
    :param workers: Batches that run at once; they share the weights. By default as many as the cores are enough for.
    :param batch_size: Maximum number of photos per batch.
    :param latency: Target in milliseconds for an answer, by default --timeout: sizes batches, and refuses a photo (429)
        that is likely to take more than half of it.
    :param queue: Maximum number of photos in progress; others are refused with the time to retry (429).
    :param megabytes: Maximum size of a request.
    :param megapixels: Maximum size of a photo, checked before decoding.
    :param timeout: Maximum seconds per request.
    :param token_file: A file with a token that requests must carry, as bearer or password.
    :param framed_by: A site, such as https://huggingface.co, that may show the page in a frame.
    """
    from bla.data.prefetching import cores
    from bla.deploy.engine import open_engine

    require("serve")
    from bla.deploy.serve import Limits
    from bla.deploy.serve import serve as run
    from bla.progress import shown_progress

    token = None if token_file is None else token_file.read_text("utf-8", "replace").strip()
    if token is not None and (len(token) < 16 or not token.isascii()):
        raise BlaError(f"expected a token of 16 ASCII characters or more in {token_file}, got {len(token)} characters")
    with listening(host, port) as listener:
        with shown_progress() as report:
            engine = open_engine(explainer, model=trust_code, threads=threads, report=report)
        say(f"{engine.card.transform.in_words()}; computed on the {engine.device}", file=sys.stderr)
        limits = Limits(bytes=int(megabytes * 2**20), pixels=int(megapixels * 1e6), seconds=timeout)
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}/"
        say(f"{engine.card.setup} on {engine.card.model}: {address}", file=sys.stderr, flush=True)
        bounds = {"most": batch_size, "room": queue, "workers": workers or max(1, cores() // threads)}
        target = math.inf if latency is None else latency / 1000
        run(engine, listener, limits=limits, framed_by=framed_by, token=token, latency=target, **bounds)
