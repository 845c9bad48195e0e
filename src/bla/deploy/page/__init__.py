"""The page on which a photo is explained: a server's, or alone in one file, with the explainer and its runtime inside.

Alone it is a graph of :mod:`bla.deploy.export`, onnxruntime-web and JavaScript that reads photos as Pillow does. It
may load nothing (its policy forbids the browser any connection), so it works offline and from a disk.
"""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path

from bla.data.download import Archive, downloaded
from bla.files import cache_root
from bla.progress import Progress, silent

_HERE = Path(__file__).parent
PAGE, RESIZING, ANSWERING = (
    (_HERE / name).read_text(encoding="utf-8") for name in ("page.html", "resizing.js", "alone.js")
)

RUNTIME = Archive(
    "https://registry.npmjs.org/onnxruntime-web/-/onnxruntime-web-1.30.0.tgz",
    "d2228df7e4616bc3348bf504ee888f3bec43789a273f0a63f3e68d203ce3bf71",
)
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'wasm-unsafe-eval' blob:; style-src 'unsafe-inline'; "
    "img-src blob: data:; base-uri 'none'; form-action 'none'"
)


def runtime(report: Progress = silent) -> tuple[bytes, bytes]:
    """onnxruntime-web's module and its WebAssembly, of one pinned version, fetched once into the user's cache.

    A DataError if they cannot be fetched, or are not what was published.
    """
    folder = cache_root() / RUNTIME.name.removesuffix(".tgz")
    if not folder.exists():
        downloaded("onnxruntime-web", [RUNTIME], folder, f"what {RUNTIME.name} holds", report)
    dist = folder / "package" / "dist"
    return (dist / "ort.wasm.bundle.min.mjs").read_bytes(), (dist / "ort-wasm-simd-threaded.wasm").read_bytes()


def alone(graph: bytes, card: str, runtime: tuple[bytes, bytes]) -> bytes:
    """The page with a graph, its card as JSON, and the runtime: one HTML file."""
    import onnx

    model = onnx.load_from_string(graph)
    inputs = {value.name for value in model.graph.input}
    constants = [value for value in model.graph.initializer if value.name not in inputs]
    del model.graph.initializer[:]  # onnxruntime-web lets no input be left out, and takes none that could be
    model.graph.initializer.extend(constants)
    card = json.dumps(json.loads(card)).replace("<", "\\u003c")
    inline = f"<script>\n{RESIZING}</script>\n<script>\n{ANSWERING.replace('CARD', card, 1)}</script>\n"
    files = zip(("runtime", "engine", "graph"), (*runtime, model.SerializeToString()), strict=True)
    packed = ((name, base64.b64encode(gzip.compress(file, mtime=0)).decode()) for name, file in files)
    embedded = "".join(f'<script type="application/gzip" id="{name}">{text}</script>\n' for name, text in packed)
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    page = PAGE.replace('<meta charset="utf-8">', f'<meta charset="utf-8">\n{policy}', 1)
    return page.replace("<script>", f"{inline}<script>", 1).replace("</body>", f"{embedded}</body>", 1).encode()
