"""A graph with its trunk in int8, calibrated on photos: ONNX Runtime's static quantisation."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bla.data.image_sets import list_images
from bla.data.photo import Photo
from bla.deploy.engine import KEY, Card, Engine
from bla.deploy.export.checking import ExportError
from bla.deploy.export.graph import MAPS

if TYPE_CHECKING:
    import onnx

LEAST = 8
"""Photos to calibrate and to compare on."""
_BATCH = 16


def quantised(graph: bytes, photos: Sequence[Path]) -> tuple[bytes, Card, dict[str, float]]:
    """The graph with its trunk in int8; its card, of which the note says how far it agrees; and how often it does not.

    Activations get their ranges from every other photo; the others compare: how often the
    classifier's class, or one of its several labels, differs, and the mean share of the selected cells of either that
    are not of both. Attention and head stay in float32: an explanation's ranks would tie.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("float32.onnx", "int8.onnx")]
        files[0].write_bytes(graph)
        engine = Engine(files[0], gpu=False)
        paths = list_images(photos)
        read = (engine.read(str(path), path) for path in paths)
        pixels = [photo.pixels for photo in read if isinstance(photo, Photo)]
        if len(pixels) < 2 * LEAST:
            raise ExportError(f"expected {2 * LEAST} photos or more to calibrate int8 on, got {len(pixels)}: pass more")

        class Reader(CalibrationDataReader):  # type: ignore[misc]
            rows = iter(pixels[::2])

            def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
                row = next(self.rows, None)
                return None if row is None else {"pixels": engine.normalised(row[None])}

        model = onnx.load(files[0])
        trunk = _needed_for(model, MAPS[0])
        _copied(model, MAPS[0])
        others = [node.name for node in model.graph.node if node.name not in trunk]
        kinds = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
        with _silent():  # signed activations would run at half the speed
            quantize_static(model, files[1], Reader(), nodes_to_exclude=others, **kinds)
        misses = disagreement(engine, Engine(files[1], gpu=False), pixels[1::2])
        note = "int8: the classifier's class differs from float32's on {:.1%} of {} photos, {:.1%} of the cells".format(
            misses["classifier"], len(pixels[1::2]), misses["selected"]
        )
        card = dataclasses.replace(engine.card, note="; ".join(filter(None, (engine.card.note, note))))
        result = onnx.load(files[1])
        onnx.helper.set_model_props(result, {KEY: json.dumps(dataclasses.asdict(card))})
        return result.SerializeToString(), card, misses


def _copied(model: onnx.ModelProto, tensor: str) -> None:
    """Let all that read a tensor read one copy of it: ONNX Runtime would make floats of int8 for each of them."""
    import onnx

    nodes = model.graph.node
    place = next(place for place, node in enumerate(nodes) if tensor in node.output)
    for node in nodes:
        node.input[:] = [f"{tensor}_copy" if name == tensor else name for name in node.input]
    nodes.insert(place + 1, onnx.helper.make_node("Max", [tensor], [f"{tensor}_copy"], name="copy"))


def _needed_for(model: onnx.ModelProto, tensor: str) -> set[str]:
    """The names of the nodes that a tensor is computed by."""
    makers = {name: node for node in model.graph.node for name in node.output}
    found, wanted = set[str](), [tensor]
    while wanted:
        node = makers.get(wanted.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            wanted += node.input
    return found


def disagreement(one: Engine, other: Engine, photos: Sequence[npt.NDArray[np.uint8]]) -> dict[str, float]:
    """How often what the classifier says differs, and the mean of 1 - |A & B| / |A | B| over the selected cells.

    It says the likeliest class; of several labels, each whose logit is above 0.
    """
    classes, cells = 0.0, 0.0

    def says(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return logits > 0 if one.card.several_labels else logits.argmax(1)[:, None]

    for start in range(0, len(photos), _BATCH):
        a, b = (engine.run(np.stack(photos[start : start + _BATCH])) for engine in (one, other))
        classes += (says(a.classifier_logits) != says(b.classifier_logits)).any(1).sum()
        ours, theirs = (each.selected.reshape(len(each.selected), -1) for each in (a, b))
        cells += (1 - (ours & theirs).sum(1) / (ours | theirs).sum(1)).sum()
    return {"classifier": float(classes / len(photos)), "selected": float(cells / len(photos))}


@contextlib.contextmanager
def _silent() -> Any:
    """The quantiser logs to the root logger, and has ONNX Runtime warn."""
    import onnxruntime

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    onnxruntime.set_default_logger_severity(3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.root.setLevel(level)
        onnxruntime.set_default_logger_severity(2)
