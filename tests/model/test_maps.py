"""One selection over several feature maps: by hand, one bound for all, pictures, runs, refusals, a real classifier."""

from __future__ import annotations

import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import bla
from bla.comparison import compare
from bla.comparison.methods import ComparisonError
from bla.data.image_sets import image_folder
from bla.deploy.export import ExportError, export
from bla.explanations.explanation import Explanation, ExplanationError, MapCells, Prediction, laid, over, spread
from bla.explanations.render import cutout, overlay, panel
from bla.model.attention import BoundedLogitAttention, weighted_sum
from bla.model.backbones import LITE0, load_backbone
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable
from bla.model.maps import SeveralMaps, apart, in_a_row, shown_cells, shown_votes
from bla.runs.hub import from_pretrained, save_pretrained
from bla.runs.run import Run, evaluate, open_run, train
from bla.training.cache import cached_features
from bla.training.settings import Settings, TrainingError
from small import CHANNELS, CLASSES, Tiny, some_photos, write_classes


class TwoStages(Tiny):
    """Two maps, 6x10 and 3x5, the second of them below the first, and a submodule in each."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed + 1)
            self.stem = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU())  # type: ignore[assignment]
            self.deep = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, CHANNELS, 2, stride=2))

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.deep(self.stem(pixels)).relu()


FINE, COARSE = (6, 10), (3, 5)


@functools.cache
def wrapped(seed: int = 0, **options: Any) -> ExplainableClassifier:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made = explainable(TwoStages(), head=3, maps=options.pop("maps", 2), classes=CLASSES, **options)
    made.fitted = True
    return made


class Meeting(nn.Module):
    """Passes on, once as many threads are here as are to meet."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.all = threading.Barrier(threads, timeout=60)

    def forward(self, x: Tensor) -> Tensor:
        self.all.wait()
        return x


def test_threads_that_call_one_classifier_get_their_own_maps() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 2, stride=2), Meeting(2), nn.Conv2d(2, 2, 2, stride=2), Meeting(2))
    maps = SeveralMaps(model, ["0", "2"], [(4, 6), (2, 3)])
    pixels = torch.rand(2, 1, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(maps, pixels))
    for row, each in zip(rows, pixels, strict=True):
        fine = model[0](each)
        assert torch.equal(row, in_a_row([fine, model[2](fine)]))
    assert not any(module._forward_hooks for module in model)


# --- by hand


def test_a_row_of_two_maps_that_are_not_square_by_hand() -> None:
    fine = torch.tensor([[[[1.0, 2, 3]], [[4, 5, 6]]]])  # two channels, 1x3
    coarse = torch.tensor([[[[9.0]]]])
    row = in_a_row([fine, coarse])
    assert row[0, :, 0].T.tolist() == [[1, 4, 0, 1, 0], [2, 5, 0, 1, 0], [3, 6, 0, 1, 0], [0, 0, 9, 0, 1]]
    # u = fine's first channel - 2 in the fine map, 9 - 9.5 in the coarse: 1x1 weights are a score and a bias by map
    attention = BoundedLogitAttention(5)
    with torch.no_grad():
        attention.score.weight.copy_(torch.tensor([1.0, 0, 1, -2, -9.5]).reshape(1, 5, 1, 1))
        attention.score.bias.zero_()
    selection = attention(row)
    assert (-selection.unbounded[0, 0]).tolist() == [-1, 0, 1, -0.5]
    assert selection.scores[0, 0].tolist() == [0, 0, -1, 0]
    assert selection.hard[0, 0].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    # what the head reads: each map's sum, with each map's share of the weight
    assert weighted_sum(row, selection.hard)[0].tolist() == pytest.approx([1, 3, 3, 2 / 3, 1 / 3])
    one = attention(row, size=1).hard[0, 0]
    assert one.tolist() == [1, 0, 0, 0]
    shown = shown_cells([values[0].detach().numpy() for values in selection], [(1, 3), (1, 1)])
    assert shown["grid"] == (1, 3)
    assert shown["selected"].tolist() == [[True, True, True]]  # the third place, by the coarse cell
    assert shown["scores"].tolist() == [[0, 0, 0]]
    assert shown["unbounded"].tolist() == [[1, 0.5, 0.5]]
    assert [each.selected.tolist() for each in shown["maps"]] == [[[True, True, False]], [[True]]]


def test_places_of_grids_that_do_not_nest_by_hand() -> None:
    assert laid(np.array([[1, 2]]), (1, 3)).tolist() == [[1, 2, 2]]  # the middle's middle is the second's edge
    assert laid(np.array([[1, 2, 3]]), (2, 5)).tolist() == [[1, 1, 2, 3, 3]] * 2
    assert spread(np.array([[2.0, 6.0]], np.float32), (1, 3)).tolist() == [[2, 3, 3]]


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 4), st.integers(0, 4), st.integers(0, 99))
def test_votes_laid_over_one_another_keep_their_sum(h: int, w: int, more_h: int, more_w: int, seed: int) -> None:
    grids = [(h + more_h, w + more_w), (h, w)]
    votes = np.random.default_rng(seed).normal(size=(1, sum(a * b for a, b in grids))).astype(np.float32)
    shown = shown_votes(votes, grids)
    assert shown.shape == grids[0]
    assert shown.sum() == pytest.approx(votes.sum(), abs=1e-4)


# --- one bound for all


def test_the_maps_are_found_and_taken_by_name() -> None:
    found = wrapped()
    assert isinstance(found.trunk, SeveralMaps)
    assert (found.trunk.names, found.trunk.grids) == (("stem", "deep"), (FINE, COARSE))
    pixels = torch.rand(2, 3, 24, 40)
    model = TwoStages()
    stem = model.stem(pixels)
    fine, coarse = apart(found.trunk(pixels), found.trunk.grids)
    torch.testing.assert_close(fine[:, :4], stem)
    torch.testing.assert_close(coarse[:, 4 : 4 + CHANNELS], model.deep(stem))
    assert not fine[:, 4 : 4 + CHANNELS].any()
    assert not coarse[:, :4].any()
    assert [bool((part[:, -2:].amax((2, 3)) == part[:, -2:].amin((2, 3))).all()) for part in (fine, coarse)] == [
        True
    ] * 2
    alone = wrapped(maps=("stem",))  # an earlier map alone is a map like any other
    assert alone.several_maps is None
    assert torch.equal(alone.trunk(pixels), stem)
    assert not any(module._forward_hooks for module in found.trunk.modules())


@given(st.integers(1, 75), st.integers(0, 2))
def test_a_size_is_of_all_maps_together(size: int, seed: int) -> None:
    made = wrapped(seed)
    selection = made.select(torch.rand(2, 3, 24, 40, generator=torch.Generator().manual_seed(seed)), size=size)
    counts = [(part > 0).sum((1, 2)) for part in apart(selection.hard, (FINE, COARSE))]
    assert sum(counts).tolist() == [size, size]  # type: ignore[union-attr]
    torch.testing.assert_close(selection.hard.sum((1, 2)), torch.ones(2))


def test_the_head_reads_the_selected_cells_of_all_maps_and_no_other() -> None:
    made, pixels = wrapped(), torch.rand(2, 3, 24, 40)
    features = made.trunk(pixels).requires_grad_()
    selection = made.attention(features)
    made.classify(features, selection.hard.detach()).sum().backward()
    assert features.grad is not None
    read = features.grad.abs().sum(1) > 0
    assert torch.equal(read, selection.hard > 0)


def test_an_explanation_shows_cells_of_both_sizes(tmp_path: Path) -> None:
    made = wrapped()
    photo = some_photos(1)[0]
    (why,) = made.explain(photo, size=9, target=1)
    assert why.maps is not None
    assert [each.grid for each in why.maps] == [FINE, COARSE]
    assert (why.size, why.cells, why.grid) == (9, 75, FINE)
    selection = made.select(made.pixels(made.transform.read(photo).pixels[None]), size=9)
    fine, coarse = (part[0].numpy() > 0 for part in apart(selection.hard, (FINE, COARSE)))
    assert np.array_equal(why.maps[0].selected, fine)
    assert np.array_equal(why.maps[1].selected, coarse)
    assert np.array_equal(why.selected, fine | coarse.repeat(2, 0).repeat(2, 1))
    assert why.votes is not None
    assert why.votes.offset + why.votes.cells.sum() == pytest.approx(why.votes.logit, abs=1e-5)
    assert Explanation.load(why.save(tmp_path / "why.json")) == why
    assert panel(photo, why, height=240).height == 240


def explained(fine: Any, coarse: Any) -> Explanation:
    maps = []
    for selected in (fine, coarse):
        chosen = np.array(selected, bool)
        scores = np.where(chosen, 0.0, -1.0)
        maps.append(MapCells(chosen.shape, scores, scores, chosen / 4, chosen))
    cat = Prediction(0, "cat", 0.5)
    return Explanation("cat.jpg", cat, (cat,), "BLA", region=(0, 0, 80, 40), **over(maps))


def test_the_picture_outlines_each_maps_cells_at_their_size() -> None:
    photo = Image.new("RGB", (80, 40), (200, 160, 120))
    why = explained([[1, 0, 0, 1], [0, 0, 0, 0]], [[0, 1]])  # a fine cell in the coarse one, and one elsewhere
    assert why.size == 3
    shown = np.asarray(overlay(photo, why))
    dark, own, dimmed = (16, 16, 16), (200, 160, 120), (67, 67, 67)
    assert tuple(shown[0, 0]) == dark  # the fine cell's corner
    assert tuple(shown[10, 10]) == own
    assert tuple(shown[30, 10]) == dimmed  # below it
    assert tuple(shown[30, 50]) == own  # in the coarse cell, of which no fine one is selected here
    assert tuple(shown[19, 70]) == dark  # the fine cell in it has its own outline
    assert tuple(shown[19, 50]) == own  # the coarse one has none through its middle
    assert np.asarray(cutout(photo, why))[30, 10].tolist() == [216] * 3
    with pytest.raises(ExplanationError, match="where the maps' selected cells lie"):
        dataclasses.replace(why, selected=~why.selected)


# --- runs


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"setup": "bla-ph", "class_aware": True, "mean_size": 0.2},
        {"trunk_rate": 1e-3},
        {"setup": "l2x-f", "size": 5},
    ],
)
def test_a_run_over_several_maps_is_trained_measured_shared_and_loaded(tmp_path: Path, options: dict[str, Any]) -> None:
    data, cache = write_classes(tmp_path / "photos", 6), tmp_path / "cache"
    settings = Settings(epochs=2, maps=2, batch_size=8, **options)
    model = TwoStages()
    run = train(data, tmp_path / "run", settings, model=model, cache=cache, report=lambda *_: None)
    assert run.record["metrics"]["size"]["cells"] == 75
    again = train(data, tmp_path / "run", settings, model=model, cache=cache, report=lambda *_: None)
    assert again.record["created"] == run.record["created"], "it is there already"
    save_pretrained(tmp_path / "run", tmp_path / "shared")
    photo = some_photos(1)[0]
    why = run.classifier.explain(photo)
    assert open_run(tmp_path / "run", model=model).classifier.explain(photo) == why
    assert from_pretrained(tmp_path / "shared", model=model).explain(photo) == why
    metrics, _ = evaluate(tmp_path / "run", model=model, cache=cache)
    assert metrics["hard"] == run.record["metrics"]["hard"]


def test_a_cache_of_other_maps_is_another(tmp_path: Path) -> None:
    images = image_folder(write_classes(tmp_path / "photos", 2)).train
    shapes = [
        cached_features(wrapped(maps=maps), images, root=tmp_path / "cache").features.shape[1:]
        for maps in (1, 2, ("stem",), ("deep", "stem"))
    ]
    assert shapes == [(3, 5, 8), (1, 75, 14), (6, 10, 4), (1, 75, 14)]


def test_what_has_one_grid_refuses_several(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"over one feature map, got one over 2.*: train on one map \(maps=1"):
        export(wrapped(), tmp_path / "graph.onnx")
    data = write_classes(tmp_path / "photos", 3)
    run = Run({}, wrapped(), None)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bla.comparison.result.runs.open_run", lambda *_, **__: run)
        with pytest.raises(ComparisonError, match=r"one feature map, got .* over 2, of cells of several sizes"):
            compare(tmp_path / "run", str(data), out=tmp_path / "compared")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": None}, "with head=, as the classifier's own reads its last map alone"),
        ({"maps": 0}, "expected maps= a number from 1"),
        ({"maps": ()}, "expected maps= a number from 1"),
        ({"maps": 3}, r"tiny: expected 3 feature maps of different grids, got 2: \[\(6, 10\), \(3, 5\)\]"),
        ({"maps": ("steam",)}, "maps: expected the name of a submodule, got 'steam'; there are stem, fc, deep"),
        ({"maps": ("fc", "stem")}, r"expected a feature map of several cells from 'fc', got \(2, 3\)"),
    ],
)
def test_maps_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        explainable(TwoStages(), **{"head": 3, "maps": 2, **options})


def test_settings_that_contradict_are_refused() -> None:
    with pytest.raises(TrainingError, match="expected head='new' with maps=2, got 'own'"):
        Settings(setup="bla-ph", head="own", maps=2)
    with pytest.raises(TrainingError, match="expected maps a number from 1, or names of submodules, got 0"):
        Settings(maps=0)
    assert Settings(maps=["a", "b"]).maps == ("a", "b")  # type: ignore[arg-type]  # as a record has it


@pytest.mark.parametrize(
    ("name", "names", "grids"),
    [
        (LITE0, ("blocks.4", "bn2"), ((14, 14), (7, 7))),
        ("resnet18", ("layer3", "layer4"), ((14, 14), (7, 7))),
        ("convnext_atto", ("stages.2", "norm_pre"), ((14, 14), (7, 7))),
        ("swin_tiny_patch4_window7_224", ("layers.2", "norm"), ((14, 14), (7, 7))),
    ],
)
def test_of_real_classifiers_the_ends_of_the_stages_are_found(
    name: str, names: tuple[str, ...], grids: tuple[tuple[int, int], ...]
) -> None:
    trunk = explainable(load_backbone(name, "random"), head=2, maps=2).trunk
    assert isinstance(trunk, SeveralMaps)
    assert (trunk.names, trunk.grids) == (names, grids)


def test_real_photos_from_training_to_a_picture(shared_data: Path, tmp_path: Path) -> None:
    photos = image_folder(shared_data / "catdog")
    some = {name: split.subset(np.arange(0, len(split), -(-len(split) // 24))) for name, split in
            (("train", photos.train), ("test", photos.test))}  # fmt: skip
    run = train(
        dataclasses.replace(photos, **some),
        tmp_path / "run",
        Settings(epochs=3, head_epochs=8, maps=2, mean_size=12),
        cache=tmp_path / "cache",
        report=lambda *_: None,
    )
    metrics = run.record["metrics"]
    assert metrics["size"]["cells"] == 14 * 14 + 7 * 7
    assert metrics["hard"]["top1"] >= 0.8
    path = some["test"].path(0)
    (why,) = bla.load(tmp_path / "run").explain(path)
    assert why.maps is not None
    assert [each.grid for each in why.maps] == [(14, 14), (7, 7)]
    with Image.open(path) as photo:
        assert panel(photo, why).width > 320
