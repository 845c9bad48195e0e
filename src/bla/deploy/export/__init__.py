"""A trained explainer as one graph that runs without torch, checked against the module before it is kept.

:mod:`bla.deploy.engine` runs what is written here.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from bla import __version__, needs_extra
from bla.deploy import page
from bla.deploy.engine import KEY, STEP, Card
from bla.deploy.export.checking import ExportError, check_onnx, check_torch
from bla.deploy.export.entries import hide, optional_inputs, photos_entry
from bla.deploy.export.graph import EXPLAINED, MAPS, OUTPUTS, ExplainedGraph, NamedGraph, read_apart, stable_sort
from bla.files import write_atomically
from bla.model.classifier import ExplainableClassifier
from bla.model.tracing import said
from bla.progress import Progress, quiet, silent
from bla.runs.run import load

__all__ = ["Entry", "ExportError", "Exported", "Target", "export"]

Target = Literal["onnx", "torch", "html"]
Entry = Literal["pixels", "photos"]

OPSET = 20
"""ONNX's version; since 18 its Resize has antialiasing."""


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """What was written: the file, its card, and how far the graph missed the module, output by output.

    In int8: how often the classifier's class, and the share of the selected cells, differ from float32's.
    """

    path: Path
    card: Card
    misses: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of ``bla export --json``."""
        card = dataclasses.asdict(self.card) | {"classes": len(self.card.classes)}
        return {"path": str(self.path), "bytes": self.path.stat().st_size, "misses": dict(self.misses), "card": card}


@torch.inference_mode(False)
def export(
    explainer: str | Path | ExplainableClassifier,
    out: str | Path,
    *,
    to: Target = "onnx",
    entry: Entry = "pixels",
    calibration: Sequence[Path] = (),
    model: str | None = None,
    report: Progress = silent,
) -> Exported:
    """Write a run, a shipped explainer or a wrapped classifier as one graph, after checking it against the module.

    The graph takes ``pixels``, normalised float32 (B, 3, H, W), any B; with ``entry="photos"`` it takes ``photos``,
    uint8 (B, h, w, 3) of any one size, and resizes and normalises them itself. It gives ``logits`` (B, K), from the
    selection, and ``classifier_logits``, from all cells; ``scores``, ``soft``, ``selected`` and ``unbounded``
    (B, H, W); ``sizes`` (B, 3), as :class:`bla.model.classifier.Answer`; ``answers`` (B, M, K); and, of class-aware
    explainers, ``explained`` (B,), the class that each explanation is about. Further inputs of an ONNX file are
    optional:

    - ``size``, int64 (B,) or (1,): cells to select; 0, the default, leaves the size to the explainer.
    - ``target``, int64 (B,) or (1,), of class-aware explainers: the class to explain; -1, the default, the predicted.
    - ``masks``, float32 (B, M, H, W): subsets of cells to ask the head about, which gives ``answers``; by default none.

    A torch file (``torch.export.load(FILE).module()``) takes the images alone and gives a dictionary without answers.
    An HTML file (:mod:`bla.deploy.page`) is the server's page with the graph inside, which a browser runs by itself.
    With ``calibration``, photos or folders of them, the trunk computes in int8; the file's note says how far it agrees
    with float32: :func:`bla.deploy.export.quantising.quantised`.

    Class names, transform, version and setup are in the file: :class:`bla.deploy.engine.Card`. ``model`` is as
    :func:`bla.load` takes it.

    Raises
    ------
    ExportError
        If the explainer was never fitted, no graph can be made of it, or the graph differs from the module: with
        figures.
    """
    out = Path(out)
    if to not in get_args(Target) or entry not in get_args(Entry):
        raise ExportError(f"expected to {get_args(Target)} and entry {get_args(Entry)}, got {to!r} and {entry!r}")
    if to == "html" and entry == "photos":
        raise ExportError("expected the entry pixels of a page, which resizes photos itself, got photos: leave it out")
    if calibration and (to == "torch" or entry == "photos"):
        raise ExportError(f"expected an ONNX graph that takes pixels for int8, got one for {to} that takes {entry}")
    if out.is_dir():
        raise ExportError(f"expected a file to write, got the folder {out}: name a file in it")
    fetched = page.runtime(report) if to == "html" else None
    report(f"{STEP}loading {explainer if isinstance(explainer, (str, Path)) else explainer.name}", 0, 0)
    wrapped = explainer if isinstance(explainer, ExplainableClassifier) else load(explainer, model=model, device="cpu")
    like = next(wrapped.attention.parameters())
    if not wrapped.explains:
        raise ExportError(f"expected a trained attention, got {wrapped.name} with one never fitted: bla.fit trains it")
    if like.dtype != torch.float32:
        raise ExportError(f"expected a classifier in float32, got {like.dtype}: export it before you convert it")
    if entry == "photos" and wrapped.transform.interpolation == "lanczos":
        raise ExportError("expected a resize that a graph can do, got lanczos: use the entry pixels")
    if (entry == "photos" or to == "html") and wrapped.transform.channels != 3:
        raise ExportError(f"expected photos of 3 channels, got {wrapped.transform.channels}: export pixels to onnx")
    if to == "html" and (wrapped.regression or len(wrapped.transform.size) != 2):
        what = "regression" if wrapped.regression else "classifier of volumes"
        raise ExportError(f"expected a classifier of photos, got the {what} {wrapped.name}: export it to onnx")
    if calibration and wrapped.regression:
        raise ExportError(f"expected a classifier for int8, got the regression {wrapped.name}: export it in float32")
    wrapped = copy.deepcopy(wrapped).cpu().eval()
    with torch.inference_mode():
        grid = tuple(wrapped.trunk(torch.zeros(1, *wrapped.transform.shape)).shape[2:])
    card = Card(
        classes=wrapped.classes,
        transform=wrapped.transform.plain(),
        grid=grid,
        method=wrapped.attention.method,
        model=wrapped.name,
        setup=wrapped.setup,
        entry=entry,
        sizes=wrapped.attention.bounded,
        targets=wrapped.attention.class_conditional,
        version=__version__,
        several_labels=wrapped.several_labels,
        regression=wrapped.regression,
        note=wrapped.note,
    )
    content, misses = (_torch if to == "torch" else _onnx)(wrapped, card, report)
    if calibration:
        from bla.deploy.export.quantising import quantised

        report(f"{STEP}calibrating int8", 0, 0)
        content, card, misses = quantised(content, calibration)
    if fetched is not None:
        content = page.alone(content, json.dumps(dataclasses.asdict(card)), fetched)
    return Exported(write_atomically(out, content), card, misses)


def _onnx(wrapped: ExplainableClassifier, card: Card, report: Progress) -> tuple[bytes, Mapping[str, float]]:
    with needs_extra("export", ExportError):
        import onnx
        import onnx_ir
        import onnx_ir.passes.common
        import onnxruntime  # noqa: F401  the check needs it
    report(f"{STEP}making the graph", 0, 0)
    # Two photos: torch would take a batch of one for a constant.
    examples: dict[str, tuple[torch.Tensor, dict[int, str]]] = {
        "pixels": (torch.zeros(2, *wrapped.transform.shape), {0: "batch"})
    }
    if card.sizes:
        examples["size"] = (torch.tensor([0, 1]), {0: "batch"})
    examples["masks"] = (torch.ones(2, 3, *card.grid), {0: "batch", 1: "subsets"})
    if card.targets:
        examples["target"] = (torch.tensor([-1, 0]), {0: "batch"})
    maps = MAPS[: 1 + bool(wrapped.attention.earlier)]
    with _making(wrapped, "torch.onnx.export"):
        program = torch.onnx.export(
            ExplainedGraph(wrapped).eval(),
            kwargs={name: tensor for name, (tensor, _) in examples.items()},
            input_names=[*examples],
            output_names=[*OUTPUTS, *maps, *([EXPLAINED] if card.targets else [])],
            dynamic_shapes={name: shape for name, (_, shape) in examples.items()},
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        )
    assert program is not None
    onnx_ir.passes.common.ClearMetadataAndDocStringPass()(program.model)  # it names paths of this machine
    read_apart(program.model)
    model = program.model_proto
    for name in maps:
        hide(model, model.graph.output, name)
    model.producer_name, model.producer_version, model.graph.name = "bla", card.version, "bla"
    model.doc_string = f"{card.setup} on {card.model}: a prediction, and the cells that alone made it"
    optional_inputs(model, card)
    if card.entry == "photos":
        photos_entry(model, card.transform)
    onnx.helper.set_model_props(model, {KEY: json.dumps(dataclasses.asdict(card))})
    onnx.checker.check_model(model)
    report(f"{STEP}checking it against the module", 0, 0)
    return model.SerializeToString(), check_onnx(wrapped, model, card)


def _torch(wrapped: ExplainableClassifier, card: Card, report: Progress) -> tuple[bytes, Mapping[str, float]]:
    shape: dict[int, Any] = {0: torch.export.Dim("batch")}
    example = torch.zeros(2, *wrapped.transform.shape)
    if card.entry == "photos":
        shape |= {1: torch.export.Dim("rows", min=2), 2: torch.export.Dim("columns", min=2)}
        example = torch.zeros(2, 300, 400, 3, dtype=torch.uint8)
    file = io.BytesIO()
    report(f"{STEP}making the graph", 0, 0)
    with _making(wrapped, "torch.export"):
        graph = NamedGraph(wrapped, card).eval()
        program = torch.export.export(graph, (example,), dynamic_shapes=(shape,))
        torch.export.save(program, file, extra_files={f"{KEY}.json": json.dumps(dataclasses.asdict(card))})
        file.seek(0)
        loaded = torch.export.load(file).module()
    report(f"{STEP}checking it against the module", 0, 0)
    with quiet():
        return file.getvalue(), check_torch(wrapped, loaded, card)


@contextlib.contextmanager
def _making(wrapped: ExplainableClassifier, by: str) -> Iterator[None]:
    """Make a graph, and be quiet about it; an ExportError says what failed at the root, and what works without."""
    try:
        with quiet(), torch.no_grad():
            yield
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise ExportError(
            f"{wrapped.name}: expected a classifier that {by} takes, got {said(root)[:300]}; .explain() and bla.fit, "
            "which run the classifier itself, need no graph"
        ) from error
