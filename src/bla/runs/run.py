"""A run folder: trained, measured, loaded. What was trained is in it; the classifier stays where it is."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from bla.data.image_sets import ImageSet, Splits, stratified_split
from bla.data.photo import DataError, Transform
from bla.data.published import named, photo_splits, read_images
from bla.files import reading, sole_writer, write_atomically, write_json
from bla.model.attention import BoundedLogitAttention
from bla.model.backbones import LITE0, load_backbone
from bla.model.classifier import ClassifierError, ExplainableClassifier, ImageLike, explainable, transform_of
from bla.progress import Progress, show, silent
from bla.runs.record import SCHEMA_VERSION, RunError, read_record, run_folder, versions
from bla.training import processes
from bla.training.cache import FeatureCache, cached_features, weights_digest
from bla.training.finetuning import TunedNetworks
from bla.training.loop import clear_checkpoints, train_networks
from bla.training.measuring import measure
from bla.training.networks import Examples, Networks, new_head
from bla.training.photos import Photos, StreamedFeatures, readable_photos
from bla.training.settings import Settings, TrainingError


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A trained explainer: the record in run.json, the classifier that explains, and the networks to measure."""

    record: dict[str, Any]
    classifier: ExplainableClassifier
    networks: Networks


@processes.joined()  # type: ignore[has-type, untyped-decorator]
def train(
    data: str | Path | Splits,
    out: str | Path,
    settings: Settings | None = None,
    *,
    model: str | nn.Module = LITE0,
    weights: str | Path | None = None,
    mode: Literal["squash", "crop"] = "squash",
    image_size: int | None = None,
    device: str = "auto",
    data_root: Path | None = None,
    cache: Path | None = None,
    stream: bool = False,
    report: Progress = show,
) -> Run:
    """Train an explainer on a folder of images and write a run folder; go on where an earlier call stopped.

    Features of the frozen trunk are cached once; then come the stages of :func:`bla.training.loop.train_networks`, and
    the metrics on the test images. With ``settings.trunk_rate`` the trunk is trained too, and its weights lie in the
    run folder: :mod:`bla.training.finetuning`. A folder that already holds this run is returned as it is. Several
    processes
    train as one: :mod:`bla.training.processes`.

    Parameters
    ----------
    data: a folder, the name of a data set, or splits, as :func:`bla.data.published.read_images` takes them.
    model: a name as :func:`bla.model.backbones.load_backbone` takes it, or a classifier.
    mode: whether the model sees the whole photo squashed, or the classifier's own resize and crop.
    image_size: pixels a side of the model's input, in place of its own: a larger one has more and finer cells.
    data_root: where data sets by name are kept, by default :func:`bla.data.published.default_data_root`.
    cache: where features are kept, by default :func:`bla.files.cache_root`.
    stream: keep no features but compute them anew for every batch: for sets whose features fit no disk.
    report: called with progress; by default remarks go to standard error. :func:`bla.progress.silent` shows none.

    Raises
    ------
    DataError, ClassifierError, CacheError, TrainingError
        If data, classifier, cache or settings do not serve; each says what was expected.
    """
    settings = settings or Settings()
    report = report if processes.rank() == 0 else silent
    out = Path(out)
    if out.is_file():
        raise TrainingError(f"expected a folder for the run, got the file {out}: choose another name")
    splits, source = read_images(data, seed=settings.seed, data_root=data_root, cache=cache, report=report)
    settings = dataclasses.replace(settings, several_labels=settings.several_labels or splits.train.several)
    new_classes = len(splits.train.classes) if settings.head == "new" else None
    wrapped = _wrapped(model, weights, mode=mode, image_size=image_size, device=device, new_classes=new_classes)
    if settings.trunk_rate is not None:
        wrapped.name += ", end to end"  # what explains is not what was loaded
    origin = _origin(model, weights)
    return _train(
        wrapped, splits, settings, out, source=source, origin=origin, cache=cache, stream=stream, report=report
    )


@torch.inference_mode(False)
def fit(
    wrapped: ExplainableClassifier,
    images: str | Path | ImageSet | Sequence[ImageLike],
    *,
    targets: Literal["labels", "predictions"] = "predictions",
    epochs: int = 5,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    validation: float = 0.0,
    patience: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    stream: bool = False,
    report: Progress = show,
) -> dict[str, Any]:
    """Train the attention of a wrapped classifier, in place and post hoc: the classifier stays as it is.

    Learns to predict the classifier's own predictions from a subset of its features, or the labels of an image
    folder whose classes are the classifier's. A fifth of the images (or the folder's test images) is held out. The
    attention keeps its settings (temperature, threshold, ...) and starts anew from the seed.

    Parameters
    ----------
    images: a folder, an image set, or a list of photos (paths, PIL images or arrays).
    stream: keep no features, as :func:`train` does.
    report: called with progress; by default remarks go to standard error. :func:`bla.progress.silent` shows none.

    Returns
    -------
    The metrics on the images held out, as in ``bla evaluate --json``.

    Examples
    --------
    >>> import numpy as np, tempfile, bla
    >>> stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=16), nn.ReLU())
    >>> wrapped = bla.explainable(nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)))
    >>> photos = [np.random.default_rng(i).integers(0, 255, (60, 80, 3), dtype=np.uint8) for i in range(10)]
    >>> with tempfile.TemporaryDirectory() as cache:
    ...     metrics = bla.fit(wrapped, photos, epochs=1, cache=Path(cache))
    >>> metrics["images"], len(wrapped.explain(photos[0]))
    (2, 1)
    """
    if not isinstance(wrapped, ExplainableClassifier):
        raise ClassifierError(f"expected a wrapped classifier, got {type(wrapped).__name__}: bla.explainable wraps it")
    settings = Settings(
        setup="bla-ph" if isinstance(wrapped.attention, BoundedLogitAttention) else "l2x-f",
        head="own",
        targets=targets,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        validation=validation,
        patience=patience,
        seed=seed,
        several_labels=wrapped.several_labels,
    )
    if not wrapped.frozen_head:
        raise ClassifierError(
            "expected a wrapped classifier with its own head, got one with a head of its own training"
        )
    _check_float32(wrapped)
    with photo_splits(images, seed=seed, cache=cache, report=report) as splits:
        parts = _examples(wrapped, splits, settings, cache=cache, stream=stream, report=report)
        before = {key: value.clone() for key, value in wrapped.attention.state_dict().items()}
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                wrapped.attention.reset_parameters()
            networks = Networks(wrapped.attention, wrapped.head, own_head=True)
            if train_networks(networks, settings, parts.train, parts.validation, report=report)["dead"]:
                raise TrainingError(
                    "expected a module that selects, got one that died in training (every cell selected): lower the "
                    f"learning rate ({learning_rate}) or take another seed"
                )
        except BaseException:
            wrapped.attention.load_state_dict(before)  # what was fitted before is not lost
            raise
        wrapped.fitted = True
        return measure(networks, parts.test, report, several=wrapped.several_labels)


def load(run: str | Path, *, model: nn.Module | None = None, device: str = "auto") -> ExplainableClassifier:
    """The classifier of a run folder, or of a shipped explainer by name, ready to predict and explain.

    Parameters
    ----------
    model: the classifier, for a run that was trained on one given as an object.

    Raises
    ------
    RunError
        If the folder holds no complete run of this schema, or the classifier is not the one it was trained on.
    """
    return open_run(run, model=model, device=device).classifier


@torch.inference_mode(False)
def open_run(run: str | Path, *, model: nn.Module | None = None, device: str = "auto") -> Run:
    """As :func:`load`, with the record and the networks to measure."""
    folder = run_folder(run)
    record = read_record(folder)
    with reading("the record of a run", folder / "run.json", RunError):
        settings = Settings(**record["settings"])
        transform = Transform.from_dict(record["transform"])
        backbone, name, classes = record["backbone"], record["model"], record["classes"]
    if model is None:
        if backbone["name"] is None:
            raise RunError(f"{folder}: expected model=, the classifier it was trained on, which came as an object")
        # a trunk that was trained comes with the run
        weights = backbone["weights"] if settings.trunk_rate is None else "random"
        if weights not in (None, "random"):
            weights = folder / weights  # as it stands, unless it lies beside the record
        model = load_backbone(backbone["name"], weights)
    classes_of_new = len(classes) if settings.head == "new" else None
    wrapped = explainable(model, head=classes_of_new, transform=transform, name=name).to(pick_device(device))
    if settings.trunk_rate is None and weights_digest(wrapped.trunk) != backbone["digest"]:
        raise RunError(
            f"{folder}: expected the classifier it was trained on (weights {backbone['digest'][:12]}...), got another: "
            "an explanation is of one classifier; train anew for this one"
        )
    return _restored(folder, record, *_assembled(wrapped, settings, classes))


@processes.joined()  # type: ignore[has-type, untyped-decorator]
def evaluate(
    run: str | Path,
    data: str | Path | Splits | None = None,
    *,
    model: nn.Module | None = None,
    device: str = "auto",
    data_root: Path | None = None,
    cache: Path | None = None,
    stream: bool = False,
    report: Progress = silent,
) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """Measure a run on the test images of its own data, or on other data with the same classes.

    Other data are measured on their test images, or, where they come without a division, on all images: whether
    some of them were trained on is not known then. Splits are measured on their test images. ``stream`` keeps no
    features.

    Returns
    -------
    The metrics object, and (image, reason) for each image that could not be read.

    Raises
    ------
    RunError, DataError
        If there is no such run, its data have moved, or the data's classes are not the run's.
    """
    report = report if processes.rank() == 0 else silent
    opened = open_run(run, model=model, device=device)
    settings = Settings(**opened.record["settings"])
    measured_on = opened.record["data"]
    known = measured_on["root"]
    if data is None and not named(known) and not (Path(known).is_absolute() and Path(known).exists()):
        where = f"in {known}, which are not here" if known else "as splits made by a program"
        raise RunError(f"expected the images that {run} was trained with {where}: pass --data")
    splits, source = read_images(
        known if data is None else data,
        seed=settings.seed,
        data_root=data_root,
        cache=cache,
        report=report,
    )
    images = splits.test
    if images.digest() != measured_on["test"] and not isinstance(data, Splits):
        if source == known:
            raise RunError(
                f"expected the test images of {run} in {source}, got others: the folder has changed since the "
                "training, which may have seen them. Train again, or pass a folder of images that it never saw"
            )
        if splits.seeded:
            images = splits.whole()
            report(
                f"{source} comes without a division: measuring on all its images, on the word that none was trained on",
                0,
                0,
            )
    images = _relabelled(images, opened.classifier.classes, settings)
    examples = _readable(opened.classifier, images, settings, cache=cache, stream=stream, report=report)
    metrics = measure(opened.networks, examples, report, several=settings.several_labels)
    return metrics, examples.cache.failures


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one, of several on a machine this process's, else the CPU."""
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("another kind of device")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0][:100]
        raise RunError(f"expected device auto, cpu or a CUDA device that is present, got {name!r}: {reason}") from error
    return device


def _check_float32(wrapped: ExplainableClassifier) -> None:
    dtype = next(wrapped.attention.parameters()).dtype
    if dtype != torch.float32:
        raise ClassifierError(f"expected a classifier in float32 to train on, got {dtype}: convert it afterwards")


@dataclasses.dataclass(frozen=True, slots=True)
class _Parts:
    train: Examples
    validation: Examples | None
    test: Examples
    failures: tuple[tuple[str, str], ...]


def _train(
    wrapped: ExplainableClassifier,
    splits: Splits,
    settings: Settings,
    out: Path,
    *,
    source: str,
    origin: dict[str, Any],
    cache: Path | None,
    stream: bool,
    report: Progress,
) -> Run:
    classes = list(wrapped.classes if settings.head == "own" else splits.train.classes)
    if settings.head == "new" and splits.train.labels is None:
        raise DataError(
            f"{splits.train.root}: expected class folders to train a new head on, got images without classes; for the "
            "classifier's own classes use head='own' and targets='predictions'"
        )
    if settings.head == "new" and splits.train.several != settings.several_labels:
        raise DataError(f"{splits.train.root}: expected a table of several labels an image, got one class an image")
    _check_float32(wrapped)
    identity: dict[str, Any] = {
        "backbone": origin | {"digest": weights_digest(wrapped.trunk)},
        "transform": wrapped.transform.to_dict(),
        "data": {"train": splits.train.digest(), "test": splits.test.digest()},
        "classes": classes,
    }
    out.mkdir(parents=True, exist_ok=True)
    first = processes.rank() == 0
    busy = TrainingError(f"expected a folder that no other training is writing, got {out}: wait for it")
    with sole_writer(out, busy) if first else nullcontext():
        done = _finished(out, settings, identity)
        if done is not None:
            report(f"{out} already holds this run", 0, 0)
            if first:
                clear_checkpoints(out)  # a kill may have left one beside the finished run
            return _restored(out, done, *_assembled(wrapped, settings, classes))
        started = time.monotonic()
        parts = _examples(wrapped, splits, settings, cache=cache, stream=stream, report=report)
        classifier, networks = _assembled(wrapped, settings, classes)
        outcome = train_networks(
            networks, settings, parts.train, parts.validation, folder=out, identity=identity, report=report
        )
        counts = {
            "train": len(parts.train),
            "validation": len(parts.validation) if parts.validation else 0,
            "test": len(parts.test),
        }
        record = {
            "schema_version": SCHEMA_VERSION,
            "setup": settings.name,
            "model": wrapped.name,
            **identity,
            "data": {**identity["data"], "root": source, "images": counts},
            "seed": settings.seed,
            "settings": dataclasses.asdict(settings),
            **outcome,
            "skipped": [{"image": image, "error": error} for image, error in parts.failures],
            "versions": versions(),
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - started, 1),
            "metrics": measure(networks, parts.test, report, several=settings.several_labels),
        }
        if settings.trunk_rate is not None:
            record["trunk"] = weights_digest(classifier.trunk)
        size = record["metrics"]["size"]
        if "mean_size" in record:
            record["mean_size"]["test"] = size["mean"]
        record["dead"] |= settings.setup != "l2x-f" and size["min"] == size["cells"]  # died in the very last steps
        if first:
            tensors = {key: value.detach().cpu().contiguous().clone() for key, value in networks.saved().items()}
            write_atomically(out / "model.safetensors", save(tensors))
            write_json(out / "run.json", record, indent=1)
            clear_checkpoints(out)
        classifier.fitted = True
        return Run(record, classifier.eval(), networks)


def _wrapped(
    model: str | nn.Module,
    weights: str | Path | None,
    *,
    mode: Literal["squash", "crop"],
    image_size: int | None,
    device: str,
    new_classes: int | None,
) -> ExplainableClassifier:
    """The classifier, with its own head checked where it is to be used: ``new_classes`` is None."""
    place = pick_device(device)
    name = model if isinstance(model, str) else None
    built = load_backbone(model, weights) if isinstance(model, str) else model
    transform = dataclasses.replace(transform_of(built), mode=mode)
    if image_size is not None:
        transform = dataclasses.replace(transform, size=(image_size, image_size))
    head = None if new_classes is None else max(1, new_classes)
    return explainable(built, name=name, head=head, transform=transform).to(place)


def _origin(model: str | nn.Module, weights: str | Path | None) -> dict[str, Any]:
    if not isinstance(model, str):
        return {"name": None, "weights": None}
    file = weights is not None and weights != "random"
    return {"name": model, "weights": str(Path(str(weights)).resolve()) if file else weights}


def _assembled(
    wrapped: ExplainableClassifier, settings: Settings, classes: Sequence[str]
) -> tuple[ExplainableClassifier, Networks]:
    """A fresh module, and head where there is a new one, on the wrapped trunk; weights are the seed's."""
    channels = wrapped.attention.in_channels
    like = next(wrapped.attention.parameters())
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        attention = settings.attention(channels).to(like)
        own = settings.head == "own"
        baseline = wrapped.head if own else new_head(channels, len(classes), settings.dropout).to(like)
    networks = (
        Networks(attention, baseline, own_head=own)
        if settings.trunk_rate is None
        else TunedNetworks(attention, baseline, wrapped.trunk, settings=settings, pixels=wrapped.pixels)
    )
    classifier = ExplainableClassifier(
        wrapped.trunk,
        attention,
        networks.head,
        transform=wrapped.transform,
        classes=classes,
        name=wrapped.name,
        setup=settings.name,
        frozen_head=settings.frozen_head,
        several_labels=settings.several_labels,
    )
    return classifier.to(like.device), networks


def _restored(folder: Path, record: dict[str, Any], classifier: ExplainableClassifier, networks: Networks) -> Run:
    path = folder / "model.safetensors"
    try:
        networks.restore(load_file(path))
        if "trunk" in record and weights_digest(classifier.trunk) != record["trunk"]:
            raise TrainingError("another trunk")
    except (OSError, SafetensorError, TrainingError) as error:
        raise RunError(
            f"expected the weights of the run in {path}, got none or others ({error}): remove {folder} and train again"
        ) from error
    classifier.fitted = True
    return Run(record, classifier.eval(), networks)


def _examples(
    wrapped: ExplainableClassifier,
    splits: Splits,
    settings: Settings,
    *,
    cache: Path | None,
    stream: bool,
    report: Progress,
) -> _Parts:
    found = []
    failures: tuple[tuple[str, str], ...] = ()
    for split in (splits.train, splits.test):
        images = _relabelled(split, wrapped.classes, settings) if settings.head == "own" else split
        found.append(_readable(wrapped, images, settings, cache=cache, stream=stream, report=report))
        failures += found[-1].cache.failures
    if failures:
        report(f"{len(failures)} images cannot be read and take no part, the first: {failures[0][1]}", 0, 0)
    train, test = found
    if not settings.validation:
        return _Parts(train, None, test, failures)
    kept, held_out = stratified_split(train.labels, len(train), settings.validation, settings.seed)
    return _Parts(train.subset(kept), train.subset(held_out), test, failures)


def _relabelled(images: ImageSet, classes: Sequence[str], settings: Settings) -> ImageSet:
    """The images with labels into ``classes``, by name; without any where predictions are learnt."""
    if settings.targets == "predictions":
        return dataclasses.replace(images, labels=None, classes=())
    if images.labels is None:
        raise DataError(f"{images.root}: expected class folders for targets='labels', got images without classes")
    if images.several != settings.several_labels:
        kinds = ("one class an image", "a table of the labels that each image has")
        expected, came = kinds[settings.several_labels], kinds[images.several]
        raise DataError(f"{images.root}: expected {expected}, as the explainer was trained on, got {came}")
    unknown = sorted(set(images.classes) - set(classes))
    if unknown:
        raise DataError(
            f"{images.root}: expected classes of the classifier, got {unknown[:5]}; it knows {list(classes[:5])}, ..."
        )
    index = np.array([list(classes).index(name) for name in images.classes], np.int64)
    labels = index[images.labels] if not images.several else np.zeros((len(images), len(classes)), np.int64)
    if images.several:
        labels[:, index] = images.labels
    return dataclasses.replace(images, labels=labels, classes=tuple(classes))


def _readable(
    wrapped: ExplainableClassifier,
    images: ImageSet,
    settings: Settings,
    *,
    cache: Path | None,
    stream: bool,
    report: Progress,
) -> Examples:
    """The images that can be read: as features, cached or streamed, or as photos where the trunk is trained."""
    source: FeatureCache | StreamedFeatures | Photos
    if settings.trunk_rate is None and not stream:
        source = cached_features(wrapped, images, root=cache, report=report)
    else:
        source = readable_photos(images, wrapped.transform, report)
        if settings.trunk_rate is None:
            source = StreamedFeatures(wrapped, source)
    failed = {image for image, _ in source.failures}
    rows = np.array([row for row, name in enumerate(images.names) if name not in failed], np.int64)
    labels = images.labels[rows] if images.labels is not None and settings.targets == "labels" else None
    return Examples(source, rows, labels)


def _finished(out: Path, settings: Settings, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    if not (out / "run.json").exists():
        return None
    record = read_record(out)
    wanted = json.loads(json.dumps({"settings": dataclasses.asdict(settings), **identity}))
    came = {**record, "data": {split: record["data"][split] for split in ("train", "test")}}
    different = [key for key, value in wanted.items() if came.get(key) != value]
    if different:
        raise TrainingError(
            f"expected an empty folder or this run in {out}, got a run that differs in {', '.join(different)}: choose "
            "another folder, or remove it"
        )
    return record
