"""The comparison itself: methods, judges and figures brought together in one result."""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bla.comparison.keeping import Writer
from bla.comparison.leaks import measure_leakage
from bla.comparison.making import CHEAP, RUN, TRAINED, Methods, explained, method_names
from bla.comparison.methods import ComparisonError, Method, PooledClassifier, another_images
from bla.comparison.probing import Sample, measure_pixels, measure_sanity
from bla.comparison.subjects import Subjects, find_subjects, labels_of, predictions_of, training_subjects
from bla.data.image_sets import Splits
from bla.files import write_json
from bla.metrics import (
    Evaluator,
    Ranked,
    cells,
    judge_methods,
    localisation,
    localise,
    size_summary,
    top_cells,
    train_evaluator,
)
from bla.metrics.leakage import METRICS as LEAKAGE_METRICS
from bla.metrics.pixels import METRICS as PIXEL_METRICS
from bla.metrics.pixels import STEPS
from bla.metrics.statistics import bootstrap, correlation, holm, sign_flips
from bla.progress import Progress, silent
from bla.runs import run as runs
from bla.runs.record import versions
from bla.training.cache import weights_digest

SCHEMA_VERSION = 1
SANE = 16
"""Photos of the sanity checks, where no other number is asked for."""
METRICS = cells.METRICS | localisation.METRICS | LEAKAGE_METRICS | PIXEL_METRICS
EXPLAINS = {
    "baseline": "the mean-pooled classifier: its head reads the average of all cells",
    "own": "the method's own head, which reads its selection",
    "nothing": "a control, which explains none; read by the baseline's head",
}
"""Which classifier a method's map speaks of."""


def compare(
    run: str | Path,
    data: str | Path | Splits | None = None,
    *,
    out: str | Path,
    methods: Sequence[str] = CHEAP,
    leakage: bool = False,
    sanity: bool = False,
    pixels: int = 0,
    limit: int | None = None,
    seed: int = 0,
    device: str = "auto",
    cache: Path | None = None,
    report: Progress = silent,
) -> dict[str, Any]:
    """Compare a run's explanations with other methods' on the same photos, each cut to the run's size, photo by photo.

    The result, ``out/compare.json``, is documented in docs/formats.md; ``out/explanations/METHOD.jsonl`` holds each
    method's explanations, a line a photo. Interrupted, the same call goes on, by method and photo.

    Parameters
    ----------
    run: a run folder, or a shipped explainer's name.
    data: images, with or without classes or objects, or splits, of which the test images; by default the run's own.
    methods: names of :data:`ALL`. The run's own is always among them: it sets the sizes.
    leakage: train an evaluator, probes and retrained heads on the run's training images.
    sanity: compare maps under randomised networks and changed photos, on the photos of ``pixels``, or on 16.
    pixels: measure what changed pixels do through the whole network on so many photos, drawn by ``seed``.
    limit: compare on so many photos, drawn by ``seed``.

    Raises
    ------
    ComparisonError, RunError, DataError
        If a method is unknown or does not fit, or there is no such run or no photo.
    """
    started = time.monotonic()
    names = method_names(methods)
    out = Path(out)
    if out.is_file():
        raise ComparisonError(f"expected a folder for the comparison, got the file {out}: choose another name")
    opened = runs.open_run(run, device=device)
    classifier, networks = opened.classifier, opened.networks
    if classifier.several_labels:
        raise ComparisonError(
            f"expected a run whose photos have one class each, got {run}, whose photos may have several labels: the "
            "methods compared explain one class; bla evaluate measures it, bla explain has votes for each label"
        )
    if "trunk" in opened.record and not classifier.frozen_head:
        raise ComparisonError(
            f"expected a run whose baseline reads the same features as its module, got {run}, in which each was "
            "trained end to end with a trunk of its own: compare one trained with --setup bla-ph"
        )
    place = next(classifier.attention.parameters()).device
    subjects, failures, source = find_subjects(opened, data, limit=limit, seed=seed, cache=cache, report=report)
    pooled = PooledClassifier(classifier.trunk, networks.baseline).eval()
    predictions = predictions_of(pooled, subjects, place)
    training = training_subjects(opened, cache, report) if leakage or set(names) & {*TRAINED} else None
    making = Methods(opened, pooled, training, seed=seed, report=report)

    made: dict[str, Method] = {}
    rankings: dict[str, Tensor] = {}
    selected: dict[str, Tensor] = {}
    costs: dict[str, dict[str, Any]] = {}
    for name in names:
        own = rankings.get(RUN)
        made[name] = (
            another_images(made[RUN], dict(enumerate(own)), len(subjects))
            if name == "shuffled" and own is not None
            else making.build(name)
        )
        writer = Writer(out / "explanations" / name, _signature(opened, subjects, made[name], limit, seed))
        sizes = selected[RUN].sum(dim=(1, 2)) if selected else None
        found = explained(made[name], opened, subjects, predictions, sizes=sizes, writer=writer, report=report)
        rankings[name] = torch.stack([torch.from_numpy(entry.unbounded.copy()) for entry in found])
        selected[name] = torch.stack([torch.from_numpy(entry.selected.copy()) for entry in found])
        costs[name] = writer.cost()

    labels = predictions["index"] if subjects.labels is None else subjects.labels
    judge: torch.nn.Module = networks.baseline
    if leakage and training is not None:
        report("training the evaluator on random subsets", 0, 0)
        learnt, classes = labels_of(training, pooled, place), len(classifier.classes)
        judge = train_evaluator(lambda rows: training.features(rows).to(place), learnt, classes=classes, seed=seed)
    values, curves = judge_methods(
        lambda rows: subjects.features(rows).to(place),
        {name: Ranked(rankings[name], selected[name], made[name].head or networks.baseline) for name in names},
        labels,
        judge=judge,
        report=lambda done, total: report("judging", done, total),
    )
    leaks: dict[str, Any] | None = None
    if isinstance(judge, Evaluator) and training is not None:
        leaks, leaked = measure_leakage(
            made,
            selected,
            subjects,
            training,
            training_labels=learnt,
            training_targets=predictions_of(pooled, training, place)["index"],
            labels=labels,
            evaluator=judge,
            classes=classes,
            seed=seed,
            place=place,
            report=report,
        )
        for name in names:
            values[name] |= leaked[name]
    sample, sane = None, None
    if pixels < 0:
        raise ComparisonError(f"expected a number of photos to change the pixels of, got {pixels}")
    if pixels or sanity:
        targets = predictions["index"]
        sample = Sample(opened, pooled, subjects, targets, count=pixels or SANE, seed=seed)
        if sanity:
            sane = {"images": sample.rows.tolist(), "methods": measure_sanity(sample, made, seed=seed, report=report)}
    if pixels and sample is not None:
        signature = _signature(opened, subjects, made[RUN], limit, seed)
        changed = measure_pixels(
            sample, made, rankings, selected, folder=out / "pixels", signature=signature, seed=seed, report=report
        )
        for name in names:
            for metric, measured in changed[name].items():
                values[name][metric] = torch.full((len(subjects),), torch.nan, dtype=torch.float64)
                values[name][metric][sample.rows] = torch.tensor(measured, dtype=torch.float64)
    for name in names:
        if leaks is None:  # then the judge is the baseline, and its word on the selected cells is accuracy
            del values[name]["evaluator"], values[name]["evaluator_left"]
        if subjects.coverage is not None:
            values[name] |= localise(rankings[name], selected[name], subjects.coverage)
    sizes = selected[RUN].sum(dim=(1, 2))
    truth = subjects.labels
    result = {
        "schema_version": SCHEMA_VERSION,
        "kind": "comparison",
        "run": {
            "folder": str(run),
            "setup": opened.record["setup"],
            "model": opened.record["model"],
            "classes": list(classifier.classes),
        },
        "data": {
            "root": source,
            "images": len(subjects),
            "digest": subjects.images.digest(),
            "labels": "the data's" if truth is not None else "predictions of the classifier from all cells",
            "objects": 0 if subjects.coverage is None else int((subjects.coverage.sum(dim=(1, 2)) > 0).sum()),
            "limit": limit,
            "seed": seed,
        },
        "grid": list(rankings[RUN].shape[1:]),
        "equal_area": "each method's best cells, as many as the run selected in that photo",
        "explains": EXPLAINS,
        "judge": "baseline" if leaks is None else "evaluator",
        "metrics": {key: metric.to_dict() for key, metric in METRICS.items() if any(key in v for v in values.values())},
        "baseline": {
            "accuracy": None if truth is None else float((predictions["index"] == truth).double().mean()),
            "forward_ms": making.forward_ms(),
        },
        "methods": {
            name: {
                "title": made[name].title,
                "explains": made[name].explains,
                "class_specific": made[name].class_specific,
                "needs_pixels": made[name].needs_pixels,
                "note": made[name].note,
                "cost": costs[name],
                "values": {metric: _interval(value, seed) for metric, value in values[name].items()},
                "each": {metric: _rounded(value) for metric, value in values[name].items()},
                "curve": {
                    "sizes": list(curves[name].sizes),
                    "kept": curves[name].kept.double().mean(dim=0).tolist(),
                    "left": curves[name].left.double().mean(dim=0).tolist(),
                    "on_object": _object_curve(rankings[name], curves[name].sizes, subjects.coverage),
                },
            }
            for name in names
        },
        "comparisons": _comparisons(values, seed),
        "size": {
            **size_summary(np.bincount(sizes.numpy(), minlength=rankings[RUN][0].numel() + 1)),
            "object_correlation": _size_correlation(sizes, subjects.coverage, seed),
        },
        "leakage": leaks,
        "pixels": None
        if sample is None or not pixels
        else {
            "images": sample.rows.tolist(),
            "classifier": EXPLAINS["baseline"],
            "steps": STEPS,
        },
        "sanity": sane,
        "images": [
            {
                "image": subjects.name(index),
                "label": None if truth is None else classifier.classes[int(truth[index])],
                "predicted": classifier.classes[int(predictions["index"][index])],
                "size": int(sizes[index]),
                "object_share": None if subjects.coverage is None else float(subjects.coverage[index].mean()),
            }
            for index in range(len(subjects))
        ],
        "skipped": [{"image": image, "error": error} for image, error in failures],
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_json(out / "compare.json", result, allow_nan=False)
    return result


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


def _interval(value: Tensor, seed: int) -> dict[str, Any] | None:
    known = value[torch.isfinite(value)]
    return bootstrap(known.numpy(), seed=seed).to_dict() if len(known) else None


def _rounded(value: Tensor) -> list[float | None]:
    return [round(float(each), 6) if np.isfinite(float(each)) else None for each in value]


def _object_curve(ranking: Tensor, sizes: Sequence[int], coverage: Tensor | None) -> list[float] | None:
    if coverage is None:
        return None
    found = []
    for size in sizes:
        share = localise(ranking, top_cells(ranking, size), coverage)["on_object"]
        found.append(float(share[torch.isfinite(share)].mean()))
    return found


def _size_correlation(sizes: Tensor, coverage: Tensor | None, seed: int) -> dict[str, Any] | None:
    if coverage is None:
        return None
    area = coverage.sum(dim=(1, 2))
    known = area > 0
    return correlation(sizes[known].double().numpy(), area[known].numpy(), seed=seed).to_dict() if known.any() else None


def _signature(opened: runs.Run, subjects: Subjects, method: Method, limit: int | None, seed: int) -> str:
    parts = [
        SCHEMA_VERSION,
        weights_digest(opened.classifier),
        weights_digest(opened.networks),
        subjects.images.digest(),
        str(subjects.images.root),
        [method.name, method.note],
        limit,
        seed,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
