"""Scores that read what a head says at each cell about one class: slow reference, runs, explanations asked for."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bla
from bla.model.attention import AttentionError, BoundedLogitAttention, ClassAwareAttention
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable
from bla.runs.hub import from_pretrained, save_pretrained
from bla.runs.run import open_run, train
from bla.training.networks import Networks, new_head
from bla.training.settings import Settings, TrainingError
from small import CHANNELS, Tiny, as_files, some_photos, write_classes


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(channels: int = 6, classes: int = 4, **settings: Any) -> ClassAwareAttention:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return ClassAwareAttention(channels, nn.Linear(channels, classes), **settings).eval()


def slow_clues(judge: nn.Linear, features: np.ndarray[Any, Any], target: int | None) -> np.ndarray[Any, Any]:
    """(3, H, W) of one map (C, H, W), cell by cell, in float64."""
    weight, bias = judge.weight.detach().double().numpy(), judge.bias.detach().double().numpy()
    _, height, width = features.shape
    if target is None:
        target = int((weight @ features.mean(axis=(1, 2)) + bias).argmax())
    clues = np.zeros((3, height, width))
    for row, column in itertools.product(range(height), range(width)):
        cell = features[:, row, column]
        logits = weight @ cell + bias
        clues[0, row, column] = logits[target]
        clues[1, row, column] = np.log(np.exp(logits[target]) / np.exp(logits).sum())
        clues[2, row, column] = np.sqrt((cell**2).sum())
    return np.stack([(clue - clue.mean()) / clue.std() for clue in clues])


@pytest.mark.parametrize("target", [None, [3, 0, 3]])
@pytest.mark.parametrize("hidden", [(), (5,)])
def test_the_score_reads_what_the_judge_says_at_each_cell(target: list[int] | None, hidden: tuple[int, ...]) -> None:
    attention, features = module(hidden=hidden), randn(3, 6, 3, 4)
    asked = None if target is None else torch.tensor(target)
    selection = attention(features, target=asked)
    assert isinstance(attention.judge, nn.Linear)
    for index in range(3):
        clues = slow_clues(attention.judge, features[index].double().numpy(), None if target is None else target[index])
        values = torch.from_numpy(clues).float()
        u = attention.score(values[None])[0, 0]
        torch.testing.assert_close(selection.unbounded[index], -u, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(selection.scores[index], -torch.relu(u), rtol=1e-4, atol=1e-5)


def test_by_default_it_is_asked_about_what_the_judge_predicts() -> None:
    attention, features = module(), randn(5, 6, 3, 3)
    predicted = attention.predicted(features)
    assert attention.judge is not None
    assert predicted.tolist() == attention.judge(features.mean(dim=(2, 3))).argmax(-1).tolist()
    given, default = attention(features, target=predicted), attention(features)
    assert all(torch.equal(one, other) for one, other in zip(given[:4], default[:4], strict=True))
    others = attention(features, target=(predicted + 1) % 4)
    assert not torch.equal(others.unbounded, default.unbounded)


def test_a_map_of_cells_all_alike_is_scored_alike() -> None:
    selection = module()(torch.ones(2, 6, 3, 3))
    assert torch.isfinite(selection.unbounded).all()
    assert (selection.unbounded == selection.unbounded[:, :1, :1]).all()


def test_scaling_the_judge_changes_no_own_logit_clue() -> None:
    """Its first input is standardised: a surer judge says the same."""
    attention, features = module(hidden=()), randn(2, 6, 3, 3)
    with torch.no_grad():
        attention.score.weight[:, 1] = 0  # type: ignore[union-attr, index, operator]
    before = attention(features).unbounded
    assert isinstance(attention.judge, nn.Linear)
    with torch.no_grad():
        attention.judge.weight.mul_(7)
        attention.judge.bias.mul_(7)
    torch.testing.assert_close(attention(features).unbounded, before, rtol=1e-4, atol=1e-4)


def test_no_gradient_reaches_the_judge_or_the_features() -> None:
    attention, features = module().train(), randn(2, 6, 3, 3).requires_grad_()
    assert attention.training
    assert attention.judge is not None
    assert not attention.judge.training
    attention(features).soft.square().sum().backward()
    assert features.grad is None
    assert all(parameter.grad is None for parameter in attention.judge.parameters())
    assert all(parameter.grad is not None for parameter in attention.score.parameters())


def test_without_a_judge_it_says_so() -> None:
    with pytest.raises(AttentionError, match="expected a judge to ask about each cell, got none"):
        ClassAwareAttention(6)(randn(1, 6, 3, 3))
    with pytest.raises(ValueError, match=r"expected features of shape \(batch, 6, height, width\), got \(1, 5, 3, 3\)"):
        module()(randn(1, 5, 3, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setup": "l2x-f"}, "expected no class_aware with setup l2x-f"),
        ({"context": True}, "expected no context with class_aware"),
    ],
)
def test_settings_that_contradict(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Settings(class_aware=True, **changes)


@pytest.mark.parametrize("own", [True, False])
def test_the_judge_is_the_baseline_and_saved_once(own: bool) -> None:
    settings = Settings(class_aware=True, setup="bla-ph", head="own" if own else "new")
    networks = Networks(settings.attention(6), new_head(6, 4, 0.2), own_head=own)
    assert isinstance(networks.attention, ClassAwareAttention)
    assert networks.attention.judge is networks.baseline
    saved = networks.saved()
    assert not [key for key in saved if "judge" in key]
    other = Networks(settings.attention(6), new_head(6, 4, 0.2), own_head=own)
    if own:
        other.baseline.load_state_dict(networks.baseline.state_dict())
    other.restore({key: value.clone() for key, value in saved.items()})
    features = randn(2, 6, 3, 3)
    networks.eval(), other.eval()
    assert torch.equal(networks.attention(features).unbounded, other.attention(features).unbounded)


# --- whole runs


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("head", ["new", "own"])
def test_a_run_is_trained_and_loaded(head: Any, tmp_path: Path) -> None:
    data = write_classes(tmp_path / "data")
    settings = Settings("bla-ph", head=head, class_aware=True, hidden=(8,), epochs=2, threshold=0)
    model = Tiny()
    run = train(data, tmp_path / "run", settings, model=model)
    assert run.record["setup"] == "BLA-PH, class-aware, no threshold"
    opened = open_run(tmp_path / "run", model=model)
    photos = as_files(tmp_path / "photos")[:3]
    first, second = run.classifier.explain(photos), opened.classifier.explain(photos)
    assert first == second
    attention = opened.classifier.attention
    assert isinstance(attention, ClassAwareAttention)
    assert attention.judge is opened.networks.baseline
    for why in first:
        assert why.target is not None


def wrapped_and_fitted(tmp_path: Path) -> ExplainableClassifier:
    wrapped = explainable(Tiny(), attention=ClassAwareAttention(CHANNELS, hidden=(8,)))
    bla.fit(wrapped, as_files(tmp_path / "photos"), epochs=2)
    return wrapped


def test_an_explanation_can_be_asked_for_any_class(tmp_path: Path) -> None:
    wrapped = wrapped_and_fitted(tmp_path)
    assert isinstance(wrapped.attention, ClassAwareAttention)
    assert wrapped.attention.judge is wrapped.head
    photo = some_photos()[0]
    [default] = wrapped.explain(photo)
    assert default.target is not None
    [same] = wrapped.explain(photo, target=default.target)
    assert dataclasses.replace(same, votes=None) == default
    last = len(wrapped.classes) - 1
    [by_index], [by_name] = wrapped.explain(photo, target=last), wrapped.explain(photo, target=wrapped.classes[last])
    assert by_index == by_name
    assert by_index.target == last
    assert json.loads(json.dumps(by_index.to_dict()))["target"] == last
    maps = {wrapped.explain(photo, target=index)[0].unbounded.tobytes() for index in range(last + 1)}
    assert len(maps) == last + 1
    for target in (last + 1, -1, "no such class", True):
        with pytest.raises(ClassifierError, match="expected a class of tiny by name, or by index from 0 to"):
            wrapped.explain(photo, target=target)
    pixels = wrapped.pixels(np.zeros((2, *wrapped.transform.size, 3), np.uint8))
    assert wrapped.select(pixels, target=torch.tensor([0, last]), size=2).hard.count_nonzero(dim=(1, 2)).tolist() == [
        2,
        2,
    ]


def test_a_class_agnostic_explainer_selects_for_no_class(tmp_path: Path) -> None:
    wrapped = explainable(Tiny(), attention=BoundedLogitAttention(CHANNELS))
    bla.fit(wrapped, as_files(tmp_path / "photos"), epochs=1)
    assert wrapped.explain(some_photos()[0])[0].target is None
    assert wrapped.explain(some_photos()[0], target=0)[0].target is None  # and says what its cells speak for
    with pytest.raises(ClassifierError, match="expected a class-aware explainer to ask about a class, got a class-agn"):
        wrapped.select(torch.zeros(1, 3, *wrapped.transform.size), target=torch.tensor([0]))


def test_the_cells_left_out_are_not_read(tmp_path: Path) -> None:
    """The judge reads every cell; the prediction is made from the selected ones alone."""
    wrapped = wrapped_and_fitted(tmp_path)
    features = wrapped.trunk(torch.rand(2, 3, *wrapped.transform.size))
    hard = wrapped.attention(features).hard
    spoilt = torch.where(hard[:, None] > 0, features, 1e3)
    assert torch.equal(wrapped.classify(features, hard), wrapped.classify(spoilt, hard))


def test_a_timm_head_judges_each_cell(lite0: ExplainableClassifier) -> None:
    attention = ClassAwareAttention(1280, lite0.head, hidden=())
    features = torch.rand(2, 1280, 3, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention.score.weight.copy_(torch.tensor([0.0, -1.0, 0.0]).reshape(1, 3, 1, 1))  # type: ignore[operator]
        attention.score.bias.zero_()  # type: ignore[operator, union-attr]
        selection = attention(features, target=torch.tensor([3, 5]))
        one = lite0.head(features[1, :, 2, 0][None])[0].log_softmax(-1)[5]
        every = torch.stack(
            [
                lite0.head(features[1, :, row, column][None])[0].log_softmax(-1)[5]
                for row in range(3)
                for column in range(3)
            ]
        )
    expected = (one - every.mean()) / every.std(correction=0)
    torch.testing.assert_close(selection.unbounded[1, 2, 0], expected, rtol=1e-3, atol=1e-3)
    assert selection.hard.shape == (2, 3, 3)


def test_what_was_fitted_is_shared_and_comes_back(tmp_path: Path) -> None:
    wrapped = wrapped_and_fitted(tmp_path)
    folder = save_pretrained(wrapped, tmp_path / "shared")
    assert not [key for key in load_file(folder / "model.safetensors") if "judge" in key]
    loaded = from_pretrained(folder, model=Tiny())
    photo = some_photos()[1]
    for target in range(len(wrapped.classes)):
        [ours], [theirs] = wrapped.explain(photo, target=target), loaded.explain(photo, target=target)
        assert np.array_equal(ours.unbounded, theirs.unbounded)
        assert theirs.target == target
