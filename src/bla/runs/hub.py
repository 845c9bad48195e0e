"""Shared explainers: a run folder with a model card, in a local folder or on the Hugging Face Hub."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from bla import BlaError
from bla.data.photo import Transform
from bla.files import real
from bla.model.backbones import load_backbone, weights_digest
from bla.model.classifier import ExplainableClassifier, explainable
from bla.model.own_prediction import OwnPredictionAttention
from bla.runs.certificates import Certificate, read_certificate
from bla.runs.record import (
    CERTIFICATE,
    RECORD,
    WEIGHTS,
    Backbone,
    Data,
    Record,
    Skipped,
    new_record,
    read_record,
    run_folder,
    write_run,
)
from bla.runs.run import backbone_of, load, placeholder, said_of_noise
from bla.training.checkpoint import tensor_bytes
from bla.training.networks import Networks
from bla.training.settings import Settings, TrainingError

CARD, CLASSIFIER = "README.md", "classifier.safetensors"
"""The model card; the classifier's own weights, if they are shared too: ``backbone.weights`` then names this file."""


class HubError(BlaError):
    """An explainer that cannot be shared, or cannot be found."""


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

    It is a run folder, which :func:`bla.load` and every command take. It holds only what was trained; the classifier
    is named, and the SHA-256 of its weights is checked when it is loaded. Paths of this machine are left out.

    Parameters
    ----------
    explainer: a run folder, a shipped explainer's name, or a fitted classifier with its own head.
    model: the name of a classifier passed as an object, as :func:`bla.model.backbones.load_backbone` takes it. Without
        a name, others pass ``model=`` to load it. With a run: as :func:`bla.load` takes a name.
    metrics: what :func:`bla.fit` returned for a classifier passed as an object; the card shows them.
    with_classifier: add the classifier's own weights as ``classifier.safetensors``, each tensor once.

    A HubError or RunError if there is no such run, the classifier was never fitted, or the folder holds other files.
    """
    target = Path(folder)
    if target.is_file() or (target.is_dir() and any(target.iterdir()) and not (target / RECORD).exists()):
        raise HubError(f"expected a new folder, or one that holds an explainer, got {target}: choose another name")
    own: dict[str, Tensor] | None = None
    certificate: Certificate | None = None
    if isinstance(explainer, ExplainableClassifier):
        record, weights = _fitted(explainer, model, metrics or {})
        if with_classifier and model is not None:
            own = _own_weights(explainer)
    elif metrics is not None or ":" not in (model or ":"):
        raise HubError("expected model= and metrics= beside a classifier, got them beside a run, which records both")
    else:
        source = run_folder(explainer)
        if real(source) == real(target):
            raise HubError(f"expected another folder than the run's own, got {target}: choose another name")
        record, weights = read_record(source), (source / WEIGHTS).read_bytes()
        certificate = read_certificate(source)
        with_classifier = with_classifier and "trunk" not in record  # a run with a trained trunk holds it already
        if with_classifier and record["backbone"]["name"] is not None:
            own = backbone_of(source, record, model).state_dict()
    files = {WEIGHTS: weights}
    if with_classifier:
        if own is None:
            raise HubError("expected model=, the name of the classifier to share the weights of, got none")
        _check_rebuilt(record, own)
        files[CLASSIFIER] = tensor_bytes(own)
    if certificate is not None:
        files[CERTIFICATE] = (source / CERTIFICATE).read_bytes()
    record = _portable(record, with_classifier)
    (target / CLASSIFIER).unlink(missing_ok=True)
    write_run(target, record, files | {CARD: card(record, certificate).encode()})
    return target


def from_pretrained(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    model: nn.Module | str | None = None,
    device: str = "auto",
    token: str | bool | None = None,
) -> ExplainableClassifier:
    """The classifier of a shared explainer: a folder, or ``user/name`` on the Hugging Face Hub (extra ``hub``).

    None of its content is run as code: it holds no pickle, and a classifier named ``package.module:callable`` is called
    only if ``model`` repeats that name. With ``HF_HUB_OFFLINE=1`` only earlier downloads are found.

    Parameters
    ----------
    revision: a branch, tag or commit of the Hub.
    model: the classifier, if the explainer names none; it is copied, and takes the classifier's weights from the
        folder if they are there.

    A HubError, RunError or ClassifierError if there is no such explainer, another version's schema wrote it, or the
    classifier does not match.
    """
    folder = Path(name)
    if not folder.is_dir():
        name = os.fspath(name)
        if name.count("/") != 1 or name.startswith((".", "/")):
            raise HubError(f"expected a folder, or user/name on the Hub, got {name!r}, which is neither")
        files = [RECORD, WEIGHTS, CARD, CLASSIFIER, CERTIFICATE]
        download = partial(huggingface_hub.snapshot_download, revision=revision, token=token, allow_patterns=files)
        try:
            folder = Path(download(name))
        except (OSError, ValueError) as error:  # the library's errors are of these kinds
            said = f"expected a folder, or an explainer on the Hub, got {name!r}"
            raise HubError(f"{said}: {_first_line(error)}") from error
    elif revision is not None:
        raise HubError(f"expected a revision with a name on the Hub, got {revision!r} with the folder {folder}")
    backbone = read_record(folder)["backbone"]
    if backbone["weights"] not in (None, "random", CLASSIFIER):
        raise HubError(
            f"{folder}: expected a folder that bla.save_pretrained wrote, got one that wants weights from "
            f"{backbone['weights']!r}: bla.load reads your own runs"
        )
    if isinstance(model, nn.Module) and backbone["weights"] == CLASSIFIER:
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
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Explainer by bounded logit attention",
    token: str | bool | None = None,
    **options: Any,
) -> str:
    """Write as :func:`save_pretrained` does, and upload to ``user/name`` on the Hugging Face Hub in one commit.

    Parameters
    ----------
    options: of :func:`save_pretrained`: ``model``, ``metrics``, ``with_classifier``.

    Returns the commit's address.
    """
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(explainer, folder, **options)
        try:
            repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            upload = partial(api.upload_folder, repo_id=repo, folder_path=folder, commit_message=commit_message)
            # An earlier commit's weights of the classifier, and its certificate, go if this one has none.
            commit = upload(revision=revision, delete_patterns=[CLASSIFIER, CERTIFICATE])
        except (OSError, ValueError) as error:
            raise HubError(f"expected to write {repo_id} on the Hub, got {_first_line(error)}") from error
    return str(commit.commit_url)


def card(record: Record, certificate: Certificate | None = None) -> str:
    """The model card of a run, in Markdown."""
    tags = ["explainable-ai", "interpretability", "bounded-logit-attention"]
    data = partial(huggingface_hub.ModelCardData, library_name="bounded-logit-attention", tags=tags)
    fill = partial(huggingface_hub.ModelCard.from_template, template_path=str(Path(__file__).with_name("card.md")))
    described = partial(fill, data(pipeline_tag="image-classification"), classifier_file=CLASSIFIER)
    return str(described(record=record, certificate=certificate))


def _fitted(classifier: ExplainableClassifier, model: str | None, metrics: Mapping[str, Any]) -> tuple[Record, bytes]:
    """The record of a classifier that was fitted in memory, and its trained weights."""
    if not classifier.fitted:
        raise HubError(f"expected a fitted classifier, got {classifier.name} before bla.fit: fit it first")
    if not classifier.frozen_head:
        raise HubError("expected a classifier with its own head, got a newly trained head: share its run folder")
    attention = classifier.attention
    own = isinstance(attention, OwnPredictionAttention)
    setup = "bla-px" if own else "bla-ph" if attention.bounded else "l2x-f"
    options: dict[str, Any] = {"setup": setup, "several_labels": classifier.several_labels, **attention.settings}
    if not own:
        options["class_aware"] = attention.class_conditional
    try:
        settings = Settings(head="own", targets="predictions", **options)
    except TrainingError as error:
        raise HubError(f"expected an attention that a run can describe, got {attention}: {error}") from error
    built = settings.attention(attention.in_channels, attention.earlier)
    if attention.class_conditional:
        built.judged_by(classifier.head)
    if repr(built) != repr(attention):
        raise HubError(f"expected an attention that a run can describe, got your own kind: {attention}")
    digest, head = (weights_digest(part) for part in (classifier.trunk, classifier.head))
    backbone = Backbone(name=model, weights=None, digest=digest, head=head, said=said_of_noise(classifier))
    view, classes = classifier.transform.to_dict(), list(classifier.classes)
    trained = {"seed": settings.seed, "settings": settings.record(), "metrics": dict(metrics)}
    known = {"setup": classifier.setup, "model": classifier.name, "transform": view, "classes": classes}
    record = new_record(backbone=backbone, data=Data(train="", test="", root=""), **known, **trained)
    return record, tensor_bytes(Networks(attention, classifier.head, own_head=True).saved())


def _own_weights(classifier: ExplainableClassifier) -> dict[str, Tensor]:
    """The state of the classifier before it was split: what our own modules wrap in trunk and head."""
    tensors: dict[str, Tensor] = {}
    for whole in (classifier.trunk, classifier.head):
        part: nn.Module = whole
        while type(part).__module__.startswith("bla."):
            (part,) = part.children()  # each of our modules holds one other
        tensors |= part.state_dict()
    return tensors


def _check_rebuilt(record: Record, own: Mapping[str, Tensor]) -> None:
    """Check that others will load this classifier by its name and these weights."""
    name = str(record["backbone"]["name"])
    rebuilt = load_backbone(name, "random")
    try:
        rebuilt.load_state_dict(own)
    except RuntimeError as error:
        raise HubError(f"expected the tensors of {name}, got others: {_first_line(error)}") from error
    attention = placeholder(Settings.from_record(record["settings"]))
    wrapped = explainable(rebuilt, transform=Transform.from_dict(record["transform"]), attention=attention)
    if weights_digest(wrapped.trunk) != record["backbone"]["digest"]:
        raise HubError(f"expected weights under which {name} is the classifier that was explained, got others")


def _portable(record: Record, with_classifier: bool) -> Record:
    """The record without paths of this machine: folders by their last name, no private file of weights."""
    root, backbone = record["data"]["root"], record["backbone"].copy()
    if with_classifier:
        backbone["weights"] = CLASSIFIER
    elif backbone["weights"] not in (None, "random"):
        backbone["weights"] = None
        if "trunk" not in record:
            backbone["name"] = None  # nobody else has that file: they must bring the classifier
    name = Path(root).name
    skipped = [
        Skipped(image=entry["image"].replace(root, name), error=entry["error"].replace(root, name))
        for entry in record["skipped"]
        if root
    ]
    return {**record, "backbone": backbone, "data": {**record["data"], "root": name}, "skipped": skipped}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
