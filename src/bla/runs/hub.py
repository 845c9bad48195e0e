"""Explainers shared as folders, and over the Hugging Face Hub: a run folder with a card, and nothing twice."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from bla import BlaError
from bla.data.photo import Transform
from bla.files import write_atomically, write_json
from bla.model.attention import BoundedLogitAttention, ClassAwareAttention
from bla.model.backbones import load_backbone
from bla.model.classifier import ExplainableClassifier, explainable
from bla.runs.record import SCHEMA_VERSION, read_record, run_folder, versions
from bla.runs.run import load
from bla.training.cache import weights_digest
from bla.training.settings import Settings, TrainingError

CLASSIFIER = "classifier.safetensors"
"""The classifier's own weights, where they are shared too; ``backbone.weights`` of run.json then names this file."""
FILES = ("run.json", "model.safetensors", "README.md", CLASSIFIER)


class HubError(BlaError):
    """An explainer that cannot be shared, or is not to be had."""


@torch.inference_mode(False)
def save_pretrained(
    explainer: str | Path | ExplainableClassifier,
    folder: str | os.PathLike[str],
    *,
    model: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    with_classifier: bool = False,
) -> Path:
    """Write an explainer as a folder to share: ``run.json``, ``model.safetensors``, and ``README.md``, its card.

    It is a run folder, which :func:`bla.load` and every command take. Only what was trained is in it; the
    classifier is named, and the SHA-256 of its weights is checked at loading. Paths of this machine are left out.

    Parameters
    ----------
    explainer: a run folder, a shipped explainer's name, or a fitted classifier with its own head.
    model: of a classifier given as an object: the name by which others get it, as
        :func:`bla.model.backbones.load_backbone` takes it. Without one they pass ``model=`` to load it.
    metrics: of a classifier given as an object: what :func:`bla.fit` returned, for the card.
    with_classifier: put the classifier's own weights in too, as ``classifier.safetensors``, each tensor once.

    Raises
    ------
    HubError, RunError
        If there is no such run, the classifier was never fitted, or the folder holds other files.
    """
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / "run.json").exists()):
        raise HubError(f"expected a new folder, or one that holds an explainer, got {target}: choose another name")
    if isinstance(explainer, ExplainableClassifier):
        record, trained = _described(explainer, model, metrics)
        own = _own_weights(explainer) if with_classifier and model is not None else None
    else:
        if model is not None or metrics is not None:
            raise HubError(
                "expected model= and metrics= beside a classifier, got them beside a run, which records both"
            )
        source = run_folder(explainer)
        if source.resolve() == target.resolve():
            raise HubError(f"expected another folder than the run's own, got {target}: choose another name")
        record, trained = read_record(source), (source / "model.safetensors").read_bytes()
        with_classifier = with_classifier and "trunk" not in record  # one trained end to end is in it already
        own = None
        if with_classifier and record["backbone"]["name"] is not None:
            file = record["backbone"]["weights"]
            classifier = load_backbone(record["backbone"]["name"], source / file if file == CLASSIFIER else file)
            own = classifier.state_dict()
    if with_classifier:
        if own is None:
            raise HubError("expected model=, the name of the classifier whose weights are to be shared, got none")
        _check_rebuilt(record, own)
    record = _portable(record, with_classifier)
    target.mkdir(parents=True, exist_ok=True)
    for name in ("run.json", CLASSIFIER):  # run.json comes last: where it is, all of it is there
        (target / name).unlink(missing_ok=True)
    if own is not None:
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in own.items()}
        write_atomically(target / CLASSIFIER, save(tensors))
    write_atomically(target / "model.safetensors", trained)
    write_atomically(target / "README.md", card(record).encode())
    write_json(target / "run.json", record, indent=1)
    return target


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    model: nn.Module | None = None,
    device: str = "auto",
    token: str | bool | None = None,
) -> ExplainableClassifier:
    """The classifier of a shared explainer: a folder, or ``user/name`` on the Hugging Face Hub (extra ``hub``).

    Nothing in it is run as code: neither pickles nor a classifier that is named ``package.module:callable``, for
    which you pass ``model``. With ``HF_HUB_OFFLINE=1`` only what was fetched before is found.

    Parameters
    ----------
    revision: a branch, tag or commit of the Hub.
    model: the classifier, where the explainer does not name one; it is copied, and takes the weights that lie in
        the folder, where there are any.

    Raises
    ------
    HubError, RunError, ClassifierError
        If there is no such explainer, it was written by another version's schema, or the classifier is another.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = _downloaded(os.fspath(name), revision, token)
    elif revision is not None:
        raise HubError(f"expected a revision with a name on the Hub, got {revision!r} with the folder {folder}")
    backbone = read_record(folder)["backbone"]
    if model is None and ":" in (backbone["name"] or ""):
        raise HubError(
            f"{folder}: expected model=, as its classifier is a callable of somebody's code, {backbone['name']!r}, "
            "which is not called unasked: build it and pass it"
        )
    if backbone["weights"] not in (None, "random", CLASSIFIER):
        raise HubError(
            f"{folder}: expected a folder that bla.save_pretrained wrote, got one that wants weights from "
            f"{backbone['weights']!r}: bla.load reads a run of your own"
        )
    if model is not None and backbone["weights"] == CLASSIFIER:
        model = copy.deepcopy(model)
        try:
            model.load_state_dict(load_file(folder / CLASSIFIER))
        except (RuntimeError, OSError, SafetensorError) as error:
            raise HubError(f"expected a model that {folder / CLASSIFIER} fits, got {_first_line(error)}") from error
    return load(folder, model=model, device=device)


def push_to_hub(
    explainer: str | Path | ExplainableClassifier,
    repo_id: str,
    *,
    model: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    with_classifier: bool = False,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Explainer by bounded logit attention",
    token: str | bool | None = None,
) -> str:
    """Write as :func:`save_pretrained` does, and upload to ``user/name`` on the Hugging Face Hub in one commit.

    Returns
    -------
    The commit's address.
    """
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(explainer, folder, model=model, metrics=metrics, with_classifier=with_classifier)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                delete_patterns=[CLASSIFIER],  # an earlier commit's, where this one has none
            )
        except _hub_errors() as error:
            raise HubError(f"expected to write {repo_id} on the Hub, got {_first_line(error)}") from error
    return str(commit.commit_url)


def card(record: Mapping[str, Any]) -> str:
    """The model card, in Markdown, of the record in run.json."""
    metrics, data, settings, backbone = record["metrics"], record["data"], record["settings"], record["backbone"]
    labels = settings["targets"] == "labels"
    counts = data.get("images", {})
    trained_on = f"{counts['train']:,} images of `{data['root']}`" if counts else "images that were not recorded"
    learnt = "their labels" if labels else "the classifier's own predicted classes; no label was used"
    own_head = settings["head"] == "own"
    where = {None: "by name", "random": "by name, with the weights it is initialised with", CLASSIFIER: CLASSIFIER}
    included = where[backbone["weights"]] if backbone["name"] else "not included"
    if "trunk" in record:
        included = "its weights included" if backbone["name"] else "its weights included, its code not"
    rows = [
        ("Shows", "for each photo, the cells of the feature map that alone made the prediction"),
        ("Method", f"{record['setup']} (bounded logit attention, arXiv 2105.14824)"),
        ("Head", "the classifier's own, unchanged" if own_head else f"a linear one, {len(record['classes'])} classes"),
        ("Trained on", f"{trained_on}, towards {learnt}"),
        ("Classifier", f"`{record['model']}`, {included}"),
        ("SHA-256 of its trunk", f"`{record.get('trunk', backbone['digest'])}`, checked at loading"),
        (
            "Input",
            f"{record['transform']['size'][0]} x {record['transform']['size'][1]}, {record['transform']['mode']}",
        ),
        ("Made", f"{record['created']} with bla {record['versions']['bounded-logit-attention']}"),
    ]
    argument = "" if backbone["name"] and ":" not in backbone["name"] else ", model=your_classifier"
    return "\n".join(
        [
            "---",
            "library_name: bounded-logit-attention",
            "pipeline_tag: image-classification",
            "tags: [explainable-ai, interpretability, bounded-logit-attention]",
            "---",
            "",
            f"# Explainer for `{record['model']}`",
            "",
            "An image classifier that shows what it looked at. One forward pass gives the prediction and the cells of",
            "the feature map it was made from; every other cell is provably unread by the head.",
            "",
            "```python",
            "import bla  # pip install 'bounded-logit-attention[hub]'",
            "",
            f'classifier = bla.from_pretrained("NAME_OR_FOLDER"{argument})',
            'explanation = classifier.explain("photo.jpg")[0]',
            "print(explanation.prediction, explanation.selected)",
            "```",
            "",
            "| | |",
            "| --- | --- |",
            *(f"| {name} | {value} |" for name, value in rows),
            "",
            *_figures(metrics, labels, dead=record["dead"]),
            "",
            "## Limits",
            "",
            "- It explains this classifier with these weights, and no other.",
            "- A cell sees much of the photo through the trunk's receptive field: *selected* means that the head read",
            "  this cell and no other, not that only the pixels under it counted.",
            "- The figures are of the images held out from this data set. On other photos, measure again:",
            "  `bla evaluate FOLDER --data YOUR_IMAGES`.",
            "",
        ]
    )


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _figures(metrics: Mapping[str, Any], labels: bool, *, dead: bool) -> list[str]:
    if not metrics:
        return ["## Figures", "", "None were recorded. Measure it on images of yours before you rely on it."]
    truth = "the true class" if labels else "the class that the classifier predicts from all cells"
    names = {"baseline": "all cells, mean-pooled", "soft": "the soft selection", "hard": "the selected cells alone"}
    size = metrics["size"]
    columns = {"loss": "loss", "top1": f"top-1: {truth}", "top5": "top-5"}
    if "label_agreement" in metrics:
        columns = {"loss": "loss", "average_precision": "mean average precision", "auc": "mean area under ROC"}
    return [
        f"## Figures, on {metrics['images']:,} images held out",
        "",
        f"| prediction from | {' | '.join(columns.values())} |",
        f"| --- |{' --- |' * len(columns)}",
        *(
            f"| {name} | {' | '.join(_figure(metrics[key][column]) for column in columns)} |"
            for key, name in names.items()
        ),
        "",
        f"Size: {size['mean']:.1f} of {size['cells']} cells on average ({size['min']} to {size['max']}).",
        f"The prediction from them agrees with the one from all cells on {metrics['agreement']:.1%} of the images.",
        *(["", "**The module died in training: it selects every cell, and explains nothing.**"] if dead else []),
    ]


def _described(
    classifier: ExplainableClassifier, model: str | None, metrics: Mapping[str, Any] | None
) -> tuple[dict[str, Any], bytes]:
    """The record of a classifier that was fitted in memory, and its tensors."""
    if not classifier.fitted:
        raise HubError(f"expected a fitted classifier, got {classifier.name} before bla.fit: fit it first")
    if not classifier.frozen_head:
        raise HubError("expected a classifier with its own head, got a head trained anew: share its run folder")
    settings = _settings_of(classifier)
    record = {
        "schema_version": SCHEMA_VERSION,
        "setup": classifier.setup,
        "model": classifier.name,
        "backbone": {"name": model, "weights": None, "digest": weights_digest(classifier.trunk)},
        "transform": classifier.transform.to_dict(),
        "classes": list(classifier.classes),
        "data": {"train": "", "test": "", "root": ""},
        "seed": settings.seed,
        "settings": dataclasses.asdict(settings),
        "dead": False,
        "epochs": {},
        "skipped": [],
        "versions": versions(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "metrics": dict(metrics or {}),
    }
    tensors = {  # a judge is the classifier's own head
        f"attention.{key}": value
        for key, value in classifier.attention.state_dict().items()
        if not key.startswith("judge.")
    }
    return record, save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})


def _settings_of(classifier: ExplainableClassifier) -> Settings:
    """Settings that build this attention anew."""
    attention = classifier.attention
    bounded = isinstance(attention, BoundedLogitAttention)
    score = attention.score
    layers = list(score) if isinstance(score, nn.Sequential) else [score]
    names = ("temperature", "threshold", "gate") if bounded else ("temperature", "size", "variant")
    try:
        settings = Settings(
            setup="bla-ph" if bounded else "l2x-f",
            head="own",
            targets="predictions",
            hidden=tuple(layer.out_channels for layer in layers[:-1] if isinstance(layer, nn.Conv2d)),
            context=attention.context is not None,
            class_aware=isinstance(attention, ClassAwareAttention),
            several_labels=classifier.several_labels,
            **{name: getattr(attention, name) for name in names},
        )
    except TrainingError as error:
        raise HubError(f"expected an attention that a run can describe, got {attention}: {error}") from error
    built = settings.attention(attention.in_channels)
    if isinstance(built, ClassAwareAttention) and isinstance(attention, ClassAwareAttention):
        built.judge = attention.judge
    if repr(built) != repr(attention):
        raise HubError(f"expected an attention that a run can describe, got one of your own make: {attention}")
    return settings


def _own_weights(classifier: ExplainableClassifier) -> dict[str, Tensor]:
    """The state of the classifier as it was before it was split: what lies under our own modules in trunk and head."""

    def under(part: nn.Module) -> nn.Module:
        if not type(part).__module__.startswith("bla."):
            return part
        (only,) = part.children()  # each of ours holds one other
        return under(only)

    return under(classifier.trunk).state_dict() | under(classifier.head).state_dict()


def _check_rebuilt(record: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    """What others will load is this classifier."""
    name, transform = record["backbone"]["name"], Transform.from_dict(record["transform"])
    rebuilt = load_backbone(name, "random")
    different = sorted(set(own) ^ set(rebuilt.state_dict()))
    if different:
        raise HubError(
            f"expected the tensors of {name}, got a classifier that differs in {different[:3]}: name another"
        )
    try:
        rebuilt.load_state_dict(own)
    except RuntimeError as error:
        raise HubError(f"expected the tensors of {name}, got others: {_first_line(error)}") from error
    if weights_digest(explainable(rebuilt, transform=transform).trunk) != record["backbone"]["digest"]:
        raise HubError(f"expected weights under which {name} is the classifier that was explained, got others")


def _portable(record: dict[str, Any], with_classifier: bool) -> dict[str, Any]:
    """Without paths of this machine: folders by their last name, a classifier's private file not at all."""
    root, backbone = record["data"]["root"], record["backbone"]
    name = Path(root).name
    skipped = [{key: text.replace(root, name) for key, text in entry.items()} for entry in record["skipped"] if root]
    name_of_classifier, weights = backbone["name"], backbone["weights"]
    if with_classifier:
        weights = CLASSIFIER
    elif weights not in (None, "random"):
        weights = None
        if "trunk" not in record:
            name_of_classifier = None  # nobody else has that file: they must bring the classifier
    return record | {
        "data": record["data"] | {"root": name},
        "backbone": backbone | {"name": name_of_classifier, "weights": weights},
        "skipped": skipped,
    }


def _downloaded(name: str, revision: str | None, token: str | bool | None) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise HubError(f"expected a folder, or user/name on the Hub, got {name!r}, which is neither")
    hub = _hub()
    try:
        return Path(hub.snapshot_download(name, revision=revision, token=token, allow_patterns=list(FILES)))
    except _hub_errors() as error:
        raise HubError(f"expected a folder, or an explainer on the Hub, got {name!r}: {_first_line(error)}") from error


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise HubError("expected huggingface-hub: pip install 'bounded-logit-attention[hub]'") from None
    return huggingface_hub


def _hub_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
