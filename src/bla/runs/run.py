"""A run folder: trained, loaded, measured. It holds what was trained; the classifier stays where it is."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from bla.data.image_sets import ImageSet, Splits
from bla.data.photo import DataError, Mode, Transform
from bla.data.published import named, photo_splits, read_images
from bla.files import reading, real, sole_writer
from bla.model.attention import Attention
from bla.model.backbones import LITE0, load_backbone, weights_digest
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable
from bla.model.evidence import from_all
from bla.model.images import Images, as_photos
from bla.model.own_prediction import OwnPredictionAttention
from bla.model.preprocessing import transform_of
from bla.model.untouched import copied
from bla.progress import Progress, progress_of, show, silent
from bla.runs.examples import Failures, Parts, read_examples, read_parts
from bla.runs.record import RECORD, WEIGHTS, Record, RunError, new_record, read_record, run_folder, write_run
from bla.training import distributed
from bla.training.checkpoint import clear_checkpoints, tensor_bytes
from bla.training.finetuning import TunedNetworks
from bla.training.loggers import Callback
from bla.training.loop import train_networks
from bla.training.measuring import diagnosed, measure
from bla.training.networks import Networks, new_head
from bla.training.settings import Settings, Setup, TrainingError


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A trained explainer: the record in run.json, its settings, the classifier that explains, what was trained."""

    record: Record
    settings: Settings
    classifier: ExplainableClassifier
    networks: Networks


@distributed.joined()  # type: ignore[has-type, untyped-decorator]
def train(
    data: str | Path | Splits,
    out: str | Path,
    settings: Settings | None = None,
    *,
    model: str | nn.Module = LITE0,
    weights: str | Path | None = None,
    mode: Mode | None = None,
    image_size: int | None = None,
    device: str = "auto",
    data_root: Path | None = None,
    cache: Path | None = None,
    stream: bool = False,
    report: Progress | type = show,
    callback: Callback | None = None,
) -> Run:
    """Train an explainer on images and write a run folder. If interrupted, call it again: it resumes.

    The features of the frozen trunk are cached once; then come the stages of :func:`bla.training.loop.train_networks`
    and the metrics on the test images. With ``trunk_rate`` the trunk is trained too, and the run folder holds its
    weights: :mod:`bla.training.finetuning`. A folder that already holds this run is returned unchanged. Several
    processes share the work: :mod:`bla.training.distributed`.

    Parameters
    ----------
    data: a folder, the name of a data set, or splits, as :func:`bla.data.published.read_images` takes them.
    model: a name as :func:`bla.model.backbones.load_backbone` takes it, or a classifier.
    mode: ``squash`` shows the model the whole photo squashed, ``crop`` its own resize and centre crop. By default a new
        head is trained on squashed photos, as in the paper, and the classifier's own head keeps its own preprocessing.
    image_size: height and width of the model's input in pixels; a larger input has more and finer cells.
    data_root, cache: where named data sets and features are kept: :func:`bla.data.published.default_data_root` and
        :func:`bla.files.cache_root` by default.
    stream: compute the features anew for every batch instead of caching them, if they are too large for the disk.
    report: called with progress, or tqdm; by default remarks go to standard error. :func:`bla.progress.silent` shows
        none.
    callback: called with each :class:`bla.training.loggers.Update`; ready ones are beside it.

    A DataError, ClassifierError, CacheError or TrainingError says which of data, classifier, cache and settings do not
    fit, and what was expected.
    """
    first = distributed.rank() == 0
    report = progress_of(report) if first else silent
    settings, out, place = settings or Settings(), Path(out), pick_device(device)
    if out.is_file():
        raise TrainingError(f"expected a folder for the run, got the file {out}: choose another name")
    splits, source = read_images(data, seed=settings.seed, data_root=data_root, cache=cache, report=report)
    settings = settings.replace(several_labels=settings.several_labels or splits.train.several)
    name = model if isinstance(model, str) else None
    if weights not in (None, "random"):
        weights = real(str(weights))
    built = load_backbone(model, weights) if isinstance(model, str) else model
    transform = transform_of(built, mode if mode or settings.own_head else "squash")
    if image_size is not None:
        transform = dataclasses.replace(transform, size=(image_size, image_size))
    wrapped = _wrapped(built, name, splits.train, settings, transform).to(place)
    report(transform.in_words(), 0, 0)
    classes = wrapped.classes if settings.own_head else splits.train.classes
    _check_float32(wrapped)
    file = str(weights) if name and weights else None
    identity: dict[str, Any] = {
        "backbone": {"name": name, "weights": file, "digest": weights_digest(wrapped.trunk)},
        "transform": wrapped.transform.to_dict(),
        "data": {"train": splits.train.digest(), "test": splits.test.digest()},
        "classes": list(classes),
    }
    if settings.own_head:
        identity["backbone"]["head"] = weights_digest(wrapped.head)
    out.mkdir(parents=True, exist_ok=True)
    busy = TrainingError(f"expected a folder that no other training is writing, got {out}: wait for it")
    with sole_writer(out, busy) if first else nullcontext():
        classifier, networks = _assembled(wrapped, settings, classes)
        if distributed.agreed(_holds(out, settings, identity)):
            report(f"{out} already holds this run", 0, 0)
        else:
            known = identity["backbone"]["digest"]
            read = partial(read_examples, classifier, settings, cache=cache, stream=stream, digest=known, report=report)
            parts = read_parts(read, splits, settings, report)
            outcome = _trained(networks, settings, parts, out=out, identity=identity, report=report, callback=callback)
            if first:
                train_part, validation_part, test_part, _ = parts
                counts = {"train": len(train_part), "validation": len(validation_part or ()), "test": len(test_part)}
                identity["data"] |= {"root": source, "images": counts}
                record = new_record(setup=settings.name, model=wrapped.name, **identity, **outcome)
                write_run(out, record, {WEIGHTS: tensor_bytes(networks.saved())})
            distributed.together()
        if first:
            clear_checkpoints(out)  # if killed before this line, the next call removes them
        return _restored(out, read_record(out), settings, classifier, networks)


@torch.inference_mode(False)
def fit(
    wrapped: ExplainableClassifier,
    images: str | Path | ImageSet | Images,
    *,
    targets: Literal["labels", "predictions"] = "predictions",
    epochs: int | None = None,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    masks: int = 64,
    mean_size: float = 0.25,
    validation: float = 0.0,
    patience: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    stream: bool = False,
    report: Progress | type = show,
    callback: Callback | None = None,
) -> dict[str, Any]:
    """Train the attention of a wrapped classifier, in place and post hoc: the classifier stays as it is.

    The default attention learns from the classifier's answers to masked photos which pixels its prediction depends on
    (:class:`bla.training.stages.PixelStage`), of a regression which raise its value; the time is said before it starts.
    Any other learns to predict the
    classifier's own predictions from a subset of its features, or the labels of an image folder that has the
    classifier's classes. A fifth of the images (or the folder's test images) is held out. The attention keeps its
    settings (temperature, threshold, ...) and starts anew from the seed.

    Parameters
    ----------
    images: a folder, an image set, or whatever ``explain`` takes: photos or normalised pixels in a list, a data set or
        loader of torch's, or rows of Hugging Face's. Labels beside them are left out.
    epochs: 10 by default for the default attention, else 5.
    masks, mean_size: of the default attention: masked copies of each photo, and the mean number of cells at the bound,
        or their share below 1.
    stream: cache no features, as in :func:`train`.
    report, callback: as in :func:`train`.

    Returns the metrics on the held-out images, as in ``bla evaluate --json``.

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
    if not wrapped.frozen_head:
        raise ClassifierError("expected a wrapped classifier with its own head, got one with a newly trained head")
    if wrapped.regression and not isinstance(wrapped.attention, OwnPredictionAttention):
        raise ClassifierError(
            f"expected the default attention, which learns from a regression's values, got {wrapped.attention}: leave "
            "attention= out"
        )
    if len(wrapped.transform.shapes) > 1:
        raise ClassifierError(
            "expected inputs of one size to learn from, got a preprocessing that makes them as large as the photo: add "
            "a resize or a crop to one size, or explain without fit"
        )
    _check_float32(wrapped)
    report = progress_of(report)
    if isinstance(wrapped.attention, OwnPredictionAttention):
        post_hoc = partial(Settings, "bla-px", targets=targets, masks=masks, mean_size=mean_size, epochs=epochs or 10)
    else:
        setup: Setup = "bla-ph" if wrapped.attention.bounded else "l2x-f"
        post_hoc = partial(Settings, setup, head="own", targets=targets, epochs=epochs or 5)
    schedule = partial(post_hoc, batch_size=batch_size, learning_rate=learning_rate)
    settings = schedule(validation=validation, patience=patience, seed=seed, several_labels=wrapped.several_labels)
    known = weights_digest(wrapped.trunk)
    read = partial(read_examples, wrapped, settings, cache=cache, stream=stream, digest=known, report=report)
    if not isinstance(images, (str, Path, ImageSet)):
        images = as_photos(wrapped.transform, images)
    with photo_splits(images, seed=seed, cache=cache, report=report) as splits:
        train_part, validation_part, test_part, _ = read_parts(read, splits, settings, report)
        before = {key: value.clone() for key, value in wrapped.attention.state_dict().items()}
        try:
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                wrapped.attention.reset_parameters()
            networks = Networks(wrapped.attention, wrapped.head, own_head=True, task=wrapped.task)
            train = partial(train_networks, networks, settings, train_part, validation_part, callback=callback)
            dead = train(report=report)["dead"]
            metrics = measure(networks, test_part, report)
            fault = diagnosed(networks, settings, test_part, metrics, dead=dead)
            if dead:
                raise TrainingError(f"expected a module that selects: {fault}")
        except BaseException:
            wrapped.attention.load_state_dict(before)  # an earlier fit is kept
            raise
        if fault:
            report(fault, 0, 0)
        wrapped.fitted, wrapped.setup = True, wrapped.attention.post_hoc_setup
        return metrics


def load(run: str | Path, *, model: nn.Module | str | None = None, device: str = "auto") -> ExplainableClassifier:
    """The classifier of a run folder, or of a shipped explainer by name, ready to predict and explain.

    Parameters
    ----------
    model: the classifier, for a run that was trained on one passed as an object, or as :func:`bla.explainable` wrapped
        it, if that was told more than the classifier. Where the run names code, as ``package.module:callable``, that
        name: you trust the code, and it is imported and called. No other code is.

    A RunError if the folder holds no complete run of this schema, or the classifier is not the one it was trained on.
    """
    return open_run(run, model=model, device=device).classifier


@torch.inference_mode(False)
def open_run(run: str | Path, *, model: nn.Module | str | None = None, device: str = "auto") -> Run:
    """As :func:`load`, with the record, the settings and the networks to measure."""
    folder = run_folder(run)
    record = read_record(folder)
    backbone, classes, place = record["backbone"], record["classes"], pick_device(device)
    with reading("the record of a run", folder / RECORD, RunError):
        settings, transform = Settings.from_record(record["settings"]), Transform.from_dict(record["transform"])
    found = backbone_of(folder, record, model)
    if isinstance(found, ExplainableClassifier):
        wrapped = cast("ExplainableClassifier", copied(found))
        if wrapped.transform != transform:
            raise RunError(f"{folder}: expected a classifier wrapped with {transform}, got {wrapped.transform}")
    else:
        head = None if settings.own_head else len(classes)
        wrap = partial(explainable, name=record["model"], head=head, transform=transform)
        wrapped = wrap(found, attention=placeholder(settings))
    wrapped.to(place)
    changed = settings.trunk is None and weights_digest(wrapped.trunk) != backbone["digest"]
    if changed or ("head" in backbone and weights_digest(wrapped.head) != backbone["head"]):
        raise RunError(
            f"{folder}: expected the classifier it was trained on (weights {backbone['digest'][:12]}...), got another: "
            "an explanation is of one classifier; train anew for this one, or pass that one, wrapped as it was then if "
            "with output=, inputs= or parts="
        )
    known, came = backbone.get("said", {}), said_of_noise(wrapped)
    if known and (known.keys() != came.keys() or not np.allclose([*known.values()], [*came.values()], rtol=0.05)):
        raise RunError(
            f"{folder}: expected the classifier to say {known} of noise, by class index, as when it was fitted, got "
            f"{came}: pass it wrapped as it was then, with meaning=, output=, inputs= or several_labels="
        )
    return _restored(folder, record, settings, *_assembled(wrapped, settings, classes))


@torch.inference_mode()
def said_of_noise(wrapped: ExplainableClassifier) -> dict[str, float]:
    """The probabilities that the classifier gives its likeliest classes, by their index, or its value."""
    noise = torch.randn(1, *wrapped.transform.shape, generator=torch.Generator().manual_seed(0))
    logits = from_all(wrapped.head, wrapped.trunk(noise.to(next(wrapped.attention.parameters()))))
    probabilities = wrapped.probabilities(logits.float())[0]
    return {str(index): float(probabilities[index]) for index in sorted((-probabilities).argsort()[:3].tolist())}


def backbone_of(folder: Path, record: Record, model: nn.Module | str | None = None) -> nn.Module:
    """The classifier that a run names, unless ``model`` is it; code is run only if ``model`` repeats its name."""
    name, weights = record["backbone"]["name"], record["backbone"]["weights"]
    if isinstance(model, nn.Module):
        return model
    if name is None:
        raise RunError(f"{folder}: expected model=, the classifier it was trained on, which came as an object")
    if ":" in name and model != name:
        raise RunError(
            f"{folder}: expected model=, as its classifier is code, {name!r}, which is not run unasked, got {model!r}: "
            f"pass the classifier, or, if you trust this code, its name (--trust-code {name})"
        )
    file: str | Path | None = weights
    if "trunk" in record:
        file = "random"  # the run holds the trained trunk
    elif weights not in (None, "random"):
        file = folder / str(weights)  # a relative name is a file of the run folder
    return load_backbone(name, file)


@distributed.joined()  # type: ignore[has-type, untyped-decorator]
def evaluate(
    run: str | Path,
    data: str | Path | Splits | None = None,
    *,
    model: nn.Module | str | None = None,
    device: str = "auto",
    data_root: Path | None = None,
    cache: Path | None = None,
    stream: bool = False,
    report: Progress = silent,
) -> tuple[dict[str, Any], Failures]:
    """Measure a run on the test images of its own data, or on other data with the same classes.

    Of other data the test images are measured, or all images if the data come without a division: whether some of
    them were trained on is not known then. ``stream`` caches no features. Returns the metrics object, and (image,
    reason) for each image that could not be read; a RunError or DataError says that there is no such run, that its
    data have moved, or that the data's classes are not the run's.
    """
    report = report if distributed.rank() == 0 else silent
    opened = open_run(run, model=model, device=device)
    settings, trained_on = opened.settings, opened.record["data"]
    known = trained_on["root"]
    if data is None and not named(known) and not (Path(known).is_absolute() and Path(known).exists()):
        where = f"in {known}, which are not here" if known else "as splits made by a program"
        raise RunError(f"expected the images that {run} was trained with {where}: pass --data")
    splits, source = read_images(
        known if data is None else data, seed=settings.seed, data_root=data_root, cache=cache, report=report
    )
    images = splits.test
    if images.digest() != trained_on["test"] and not isinstance(data, Splits):
        if source == known:
            raise RunError(
                f"expected the test images of {run} in {source}, got others: the folder has changed since the "
                "training, which may have seen them. Train again, or pass a folder of images that it never saw"
            )
        if splits.seeded:
            images = splits.whole()
            report(f"{source} has no division: measuring on all its images, assuming that none was trained on", 0, 0)
    examples = read_examples(opened.classifier, settings, images, cache=cache, stream=stream, report=report)
    metrics: dict[str, Any] = {}
    if distributed.rank() == 0:
        metrics = measure(opened.networks, examples, report)
    return distributed.agreed(metrics), examples.cache.failures


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA if available (with several processes, the device of this one), else the CPU."""
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
        raise ClassifierError(f"expected a classifier in float32 to train on, got {dtype}: wrap model.float()")


def _wrapped(
    model: nn.Module, name: str | None, images: ImageSet, settings: Settings, transform: Transform
) -> ExplainableClassifier:
    """The classifier to train on, with its own head or a new one for the classes of the images."""
    if not settings.own_head and images.labels is None:
        raise DataError(
            f"{images.root}: expected class folders to train a new head on, got images without classes; for the "
            "classifier's own classes use head='own' and targets='predictions'"
        )
    head = None if settings.own_head else len(images.classes)
    wrapped = explainable(model, name=name, head=head, transform=transform, attention=placeholder(settings))
    if settings.trunk is not None:
        wrapped.name += ", end to end"  # what explains is not what was loaded
    return wrapped


def placeholder(settings: Settings) -> Callable[[int], Attention] | None:
    """What a classifier is wrapped with for these settings: the default, which has an earlier map, for bla-px alone."""
    return None if settings.setup == "bla-px" else settings.attention


def _assembled(
    wrapped: ExplainableClassifier, settings: Settings, classes: Sequence[str]
) -> tuple[ExplainableClassifier, Networks]:
    """A fresh module, and a fresh head if it is new, on the wrapped trunk; the seed decides the weights."""
    channels = wrapped.attention.in_channels
    like = next(wrapped.attention.parameters())
    with torch.random.fork_rng([]):
        torch.manual_seed(settings.seed)
        attention = settings.attention(channels, wrapped.attention.earlier).to(like)
        head = wrapped.head if settings.own_head else new_head(channels, len(classes), settings.head.dropout).to(like)
    if settings.trunk is None:
        networks = Networks(
            attention, head, own_head=settings.own_head, task="value" if wrapped.regression else settings.task
        )
    else:
        networks = TunedNetworks(attention, head, wrapped.trunk, settings=settings, pixels=wrapped.pixels)
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
        regression=wrapped.regression,
        note=wrapped.note,
    )
    return classifier.to(like.device), networks


def _trained(
    networks: Networks,
    settings: Settings,
    parts: Parts,
    *,
    out: Path,
    identity: Mapping[str, Any],
    report: Progress,
    callback: Callback | None,
) -> dict[str, Any]:
    """Train the networks and measure them: the fields of the record that the first process writes."""
    first, started = distributed.rank() == 0, time.monotonic()
    if not first and settings.trunk is None:
        return {}  # training on cached features takes the first process seconds
    training, validation, test, failures = parts
    train = partial(train_networks, networks, settings, training, validation, report=report, callback=callback)
    outcome = train(folder=out, identity=identity)
    if not first:
        return {}
    seconds = round(time.monotonic() - started, 1)
    metrics = measure(networks, test, report)
    size = metrics["size"]
    fault = diagnosed(networks, settings, test, metrics, dead=outcome["dead"])
    if fault:
        report(fault, 0, 0)
    outcome["dead"] |= settings.setup != "l2x-f" and size["min"] == size["cells"]  # died in the very last steps
    if "mean_size" in outcome:
        outcome["mean_size"]["test"] = size["mean"]
    if isinstance(networks, TunedNetworks):
        outcome["trunk"] = weights_digest(networks.trunk)
    skipped = [{"image": image, "error": error} for image, error in failures]
    settled = {"seed": settings.seed, "settings": settings.record(), "skipped": skipped, "seconds": seconds}
    return settled | outcome | {"metrics": metrics}


def _restored(
    folder: Path, record: Record, settings: Settings, classifier: ExplainableClassifier, networks: Networks
) -> Run:
    """The run with its trained weights in the networks, which the classifier shares."""
    path = folder / WEIGHTS
    try:
        networks.restore(load_file(path))
        if "trunk" in record and weights_digest(classifier.trunk) != record["trunk"]:
            raise TrainingError("another trunk")
    except (OSError, SafetensorError, TrainingError) as error:
        raise RunError(
            f"expected the weights of the run in {path}, got none or others ({error}): remove {folder} and train again"
        ) from error
    classifier.fitted = True
    return Run(record, settings, classifier.eval(), networks)


def _holds(out: Path, settings: Settings, identity: Mapping[str, Any]) -> bool:
    """Whether the folder holds this run already; TrainingError if it holds another."""
    if not (out / RECORD).exists():
        return False
    record = read_record(out)
    data = record["data"]
    known = {**identity["backbone"], **record["backbone"]}  # a record of before may lack the head's digest
    came = {**record, "backbone": known, "data": {"train": data["train"], "test": data["test"]}}
    different = [key for key, value in json.loads(json.dumps(identity)).items() if came.get(key) != value]
    if Settings.from_record(record["settings"]) != settings:
        different.insert(0, "settings")
    if different:
        raise TrainingError(
            f"expected an empty folder or this run in {out}, got a run that differs in {', '.join(different)}: choose "
            "another folder, or remove it"
        )
    return True
