"""The comparison itself: methods, judges and figures brought together in one record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bla.comparison.catalogue import CHEAP, METHODS, Setting, method_names
from bla.comparison.explanations import Explained, explain_photos, wait
from bla.comparison.leakage import evaluator_of, measure_leakage
from bla.comparison.methods import RUN, ComparisonError
from bla.comparison.photos import Photos, find_photos, training_photos, training_source
from bla.comparison.pixels import measure_pixels
from bla.comparison.sanity import measure_sanity
from bla.data.image_sets import Splits
from bla.data.masking import FILLS
from bla.files import timestamp, write_json
from bla.metrics import Evaluator, Ranked, judge_methods, localise, size_summary, top_cells
from bla.metrics.metric import METRICS
from bla.metrics.pixels import STEPS
from bla.metrics.statistics import bootstrap, correlation, holm, sign_flips
from bla.progress import Progress, silent
from bla.runs.record import versions
from bla.runs.run import Run, open_run

SCHEMA_VERSION = 1
SANE = 16
"""Photos of the sanity checks, unless ``pixels`` says how many."""
EXPLAINS = {
    "baseline": "the mean-pooled classifier: its head reads the average of all cells",
    "own": "the method's own head, which reads its selection",
    "nothing": "a control, which explains none; read by the baseline's head",
}
"""Which classifier a method's map explains."""


def compare(
    run: str | Path,
    data: str | Path | Splits | None = None,
    *,
    out: str | Path,
    methods: Sequence[str] | None = None,
    leakage: bool = False,
    sanity: bool = False,
    pixels: int = 0,
    limit: int | None = None,
    seed: int = 0,
    model: nn.Module | str | None = None,
    device: str = "auto",
    cache: Path | None = None,
    report: Progress = silent,
) -> dict[str, Any]:
    """Compare a run's explanations with other methods' on the same photos, each cut to the run's size, photo by photo.

    The result, ``out/compare.json``, is documented in docs/reference/formats.md; ``out/explanations/METHOD.jsonl``
    holds each method's explanations, a line per photo. If interrupted, the same call resumes, by method and photo.

    Parameters
    ----------
    run: a run folder, or a shipped explainer's name.
    data: images, with or without classes or objects, or splits, of which the test images; by default the run's own.
    methods: names in :data:`ALL`, by default :data:`CHEAP`, without those trained on the run's training images where
        these are not there. The run's own is always among them: it sets the sizes.
    leakage: train an evaluator, probes and retrained heads on the run's training images.
    sanity: compare maps under randomised networks and changed photos, on the photos of ``pixels``, or on 16.
    pixels: how many photos, drawn by ``seed``, to change and classify again by the whole network: for kept and removed,
        and of at most :data:`bla.comparison.pixels.COSTLY` of them for the other measures.
    limit: how many photos, drawn by ``seed``, to compare on; by default all.
    model: as :func:`bla.load` takes it.

    A ComparisonError if a method is unknown or does not fit; a RunError or DataError if there is no such run or photo.
    """
    started, out, names = time.monotonic(), Path(out), method_names(methods or CHEAP)
    if out.is_file():
        raise ComparisonError(f"expected a folder for the comparison, got the file {out}: choose another name")
    if pixels < 0:
        raise ComparisonError(f"expected a number of photos to change the pixels of, got {pixels}")
    opened = _comparable(open_run(run, model=model, device=device))
    if methods is None and not training_source(opened):
        names = [name for name in names if not METHODS[name].trained]
        report("the methods that need the run's training images are left out", 0, 0)
    photos = find_photos(opened, data, limit=limit, seed=seed, cache=cache, report=report)
    needed = leakage or any(METHODS[name].trained for name in names)
    training = training_photos(opened, cache, report) if needed else None
    setting = Setting(photos, training, seed=seed, report=report)

    explained = _explain(setting, names, out / "explanations")
    evaluator = evaluator_of(setting) if leakage else None
    _judge(setting, explained, evaluator)
    leaks = None if evaluator is None else measure_leakage(setting, explained, evaluator)
    sample = np.sort(np.random.RandomState([seed, 7]).permutation(len(photos))[: pixels or SANE])
    sane = measure_sanity(setting, sample, explained) if sanity else None
    if pixels:
        measure_pixels(setting, sample, explained, out / "pixels")

    changed = {"images": sample.tolist()}
    record = _record(setting, explained) | {
        "judge": "evaluator" if evaluator else "baseline",
        "leakage": leaks,
        "pixels": changed | {"classifier": EXPLAINS["baseline"], "steps": STEPS, "fill": FILLS[0]} if pixels else None,
        "sanity": changed | {"methods": sane} if sanity else None,
        "seconds": round(time.monotonic() - started, 1),
    }
    record["run"]["folder"], record["data"]["limit"] = str(run), limit
    write_json(out / "compare.json", record, allow_nan=False)
    return record


def _comparable(run: Run) -> Run:
    name = run.record["model"]
    if run.classifier.several_labels:
        raise ComparisonError(
            f"expected a run whose photos have one class each, got one of {name} whose photos may have several labels: "
            "the methods compared explain one class; bla evaluate measures it, bla explain has votes for each label"
        )
    if "trunk" in run.record and not run.classifier.frozen_head:
        raise ComparisonError(
            f"expected a run whose baseline reads the same features as its module, got one of {name} in which each was "
            "trained end to end with its own trunk: compare one trained with --setup bla-ph"
        )
    return run


def _explain(setting: Setting, names: Sequence[str], folder: Path) -> dict[str, Explained]:
    """Every method's explanations in the order of :data:`METHODS`; the run's own are made first and give the sizes."""
    found: dict[str, Explained] = {}
    for name in names:
        sizes = found[RUN].sizes if found else torch.empty(0)
        if METHODS[name].trained:
            setting.report(f"training {name} for comparison", 0, 0)
        method = METHODS[name].build(setting)
        found[name] = explain_photos(method, setting, sizes, folder)
        setting = dataclasses.replace(setting, ranking=found[RUN].ranking)
    return {name: found[name] for name in METHODS if name in found}


def _judge(setting: Setting, explained: Mapping[str, Explained], evaluator: Evaluator | None) -> None:
    """Add faithfulness on the feature map, curves and localisation to every method."""
    photos, baseline = setting.photos, setting.run.networks.baseline
    values, curves = judge_methods(
        photos.features,
        {name: Ranked(one.ranking, one.selected, one.method.head or baseline) for name, one in explained.items()},
        photos.judged,
        judge=evaluator or baseline,
        report=lambda done, total: setting.report("judging", done, total),
    )
    for name, one in explained.items():
        one.values, one.curve = values[name], curves[name]
        if evaluator is None:  # then the judge is the baseline, whose accuracy is measured already
            del one.values["evaluator"], one.values["evaluator_left"]
        if photos.coverage is not None:
            one.values |= localise(one.ranking, one.selected, photos.coverage)


@torch.no_grad()
def _forward_ms(setting: Setting) -> float:
    """Milliseconds per photo of a plain forward pass of 8, to which every method's cost comes on top."""
    pixels = torch.zeros(8, *setting.run.classifier.transform.shape, device=setting.device)
    setting.pooled(pixels)
    started = time.perf_counter()
    setting.pooled(pixels)
    wait(setting.device)
    return round((time.perf_counter() - started) * 1000 / 8, 2)


def _record(setting: Setting, explained: Mapping[str, Explained]) -> dict[str, Any]:
    photos, run, own, seed = setting.photos, setting.run, explained[RUN], setting.seed
    coverage, truth = photos.coverage, photos.labels
    measured = {metric for one in explained.values() for metric in one.values}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "run": {"setup": run.record["setup"], "model": run.record["model"], "classes": run.record["classes"]},
        "data": {
            "root": photos.source,
            "images": len(photos),
            "digest": photos.images.digest(),
            "labels": "predictions of the classifier from all cells" if truth is None else "the data's",
            "objects": 0 if coverage is None else int((coverage.sum(dim=(1, 2)) > 0).sum()),
            "seed": seed,
        },
        "grid": list(own.ranking.shape[1:]),
        "equal_area": "each method's best cells, as many as the run selected in that photo",
        "explains": EXPLAINS,
        "metrics": {key: dataclasses.asdict(metric) for key, metric in METRICS.items() if key in measured},
        "baseline": {
            "accuracy": None if truth is None else float((photos.predicted == truth).double().mean()),
            "forward_ms": _forward_ms(setting),
        },
        "methods": {name: _method_record(one, coverage, seed) for name, one in explained.items()},
        "comparisons": _comparisons({name: one.values for name, one in explained.items()}, seed),
        "size": _size_record(own, coverage, seed),
        "images": [_image_record(photos, index, size) for index, size in enumerate(own.sizes.tolist())],
        "skipped": [{"image": image, "error": error} for image, error in photos.failures],
        "versions": versions(),
        "created": timestamp(),
    }


def _image_record(photos: Photos, index: int, size: int) -> dict[str, Any]:
    classes = photos.run.classifier.classes
    return {
        "image": str(photos.path(index)),
        "label": None if photos.labels is None else classes[int(photos.labels[index])],
        "predicted": classes[int(photos.predicted[index])],
        "size": size,
        "object_share": None if photos.coverage is None else float(photos.coverage[index].mean()),
    }


def _method_record(one: Explained, coverage: Tensor | None, seed: int) -> dict[str, Any]:
    curve, on_object = one.curve, None
    assert curve is not None
    if coverage is not None:
        shares = [localise(one.ranking, top_cells(one.ranking, size), coverage)["on_object"] for size in curve.sizes]
        on_object = [float(share.nanmean()) for share in shares]
    facts = ("title", "explains", "class_specific", "needs_pixels", "note")
    return {key: getattr(one.method, key) for key in facts} | {
        "cost": one.cost,
        "values": {metric: _interval(value, seed) for metric, value in one.values.items()},
        "each": {
            metric: [round(number, 6) if np.isfinite(number) else None for number in value.double().tolist()]
            for metric, value in one.values.items()
        },
        "curve": {
            "sizes": list(curve.sizes),
            "kept": curve.kept.double().mean(dim=0).tolist(),
            "left": curve.left.double().mean(dim=0).tolist(),
            "on_object": on_object,
        },
    }


def _interval(value: Tensor, seed: int) -> dict[str, Any] | None:
    known = value[torch.isfinite(value)]
    return bootstrap(known.numpy(), seed=seed).to_dict() if len(known) else None


def _comparisons(values: Mapping[str, Mapping[str, Tensor]], seed: int) -> list[dict[str, Any]]:
    """The run minus every other method, metric by metric, on the same images; p corrected within a metric."""
    found = []
    for metric, own in values[RUN].items():
        differences = {
            name: difference
            for name, others in values.items()
            if name != RUN and metric in others and torch.isfinite(difference := own - others[metric]).any()
        }
        if not differences:
            continue
        p = sign_flips(torch.stack([*differences.values()]).nan_to_num(0, 0, 0).numpy(), seed=seed)
        for (name, difference), raw, corrected in zip(differences.items(), p, holm(p.tolist()), strict=True):
            interval = bootstrap(difference[torch.isfinite(difference)].numpy(), seed=seed)
            found.append(
                {"metric": metric, "method": RUN, "against": name, "difference": interval.mean, "low": interval.low}
                | {"high": interval.high, "p": float(raw), "images": interval.images, "p_holm": corrected}
            )
    return found


def _size_record(own: Explained, coverage: Tensor | None, seed: int) -> dict[str, Any]:
    summary = size_summary(np.bincount(own.sizes.numpy(), minlength=own.selected[0].numel() + 1))
    area = torch.zeros(len(own.sizes)) if coverage is None else coverage.sum(dim=(1, 2))
    known = area > 0
    if not known.any():
        return summary | {"object_correlation": None}
    found = correlation(own.sizes[known].double().numpy(), area[known].numpy(), seed=seed)
    return summary | {"object_correlation": found.to_dict()}
