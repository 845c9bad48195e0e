"""Masked answers: masks by their properties, answers as the slow way gives them, resuming, sharing, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bla.training.cache
from bla.data import masking
from bla.data.image_sets import ImageSet
from bla.data.photo import DataError, Transform
from bla.model.classifier import ExplainableClassifier, explainable
from bla.training.cache import CacheError, damaged, listed, remove
from bla.training.masked import MaskedError, draw_masks, masked_answers
from forked import Starter
from small import photo

COUNT, GRID, MASKS = 11, (3, 5), 8
TRANSFORM = Transform((24, 40), (0.5, 0.4, 0.3), (0.3, 0.4, 0.5), interpolation="bilinear")
HEADS = {
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    "two layers": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
    ),
    "of maps": lambda: nn.Sequential(nn.Flatten(), nn.Linear(6 * 15, 3)),
}


def model(head: str = "linear", scale: float = 9.0) -> nn.Sequential:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv2d(3, 6, 8, stride=8), nn.ReLU(), *HEADS[head]())
    with torch.no_grad():
        made[-1].weight.mul_(scale)  # answers that differ from one another
    return made.eval()


def wrapped(head: str = "linear", **options: Any) -> ExplainableClassifier:
    return explainable(model(head), transform=TRANSFORM, name="tiny", **options)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    (tmp_path / "photos").mkdir()
    names = tuple(f"{index:02}.png" for index in range(COUNT))
    for index, name in enumerate(names):
        photo(index, index % 3).save(tmp_path / "photos" / name)
    return ImageSet(tmp_path / "photos", names)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bla.training.cache, "CHUNK", 32)  # 4 photos of answers


def content(folder: Path) -> dict[str, bytes]:
    assert sorted(path.name for path in folder.iterdir()) == ["answers", "manifest.json", "masks", "targets"]
    return {name: (folder / name).read_bytes() for name in ("targets", "masks", "answers")}


# --- masks


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [((7, 7), range(3, 25)), ((4, 4), range(1, 9)), ((14, 14), range(12, 97)), ((7, 5), range(2, 18)), ((1, 2), [1])],
)
def test_masks_come_in_pairs_of_the_sizes_of_the_mixture(grid: tuple[int, int], sizes: range) -> None:
    orders = torch.randn(200, 5, *grid, generator=torch.Generator().manual_seed(0))
    masks = draw_masks(orders, 32, seed=3, rows=range(200))
    assert (masks.shape, masks.dtype) == ((200, 32, *grid), torch.bool)
    assert torch.equal(masks[:, 1::2], ~masks[:, ::2])
    kept = masks[:, ::2].sum(dim=(2, 3))
    assert set(kept.flatten().tolist()) == set(sizes)


def test_masks_depend_on_seed_and_row_alone() -> None:
    orders = torch.randn(4, 5, 3, 5, generator=torch.Generator().manual_seed(0))
    together = draw_masks(orders, 16, seed=0, rows=[4, 9, 2, 7])
    for place, row in enumerate([4, 9, 2, 7]):
        assert torch.equal(draw_masks(orders[[place]], 16, seed=0, rows=[row])[0], together[place])
    assert not torch.equal(draw_masks(orders, 16, seed=1, rows=[4, 9, 2, 7]), together)
    assert not torch.equal(draw_masks(orders[[0]], 16, seed=0, rows=[5])[0], together[0])


def test_kinds_of_masks_are_random_smooth_and_near_the_orders() -> None:
    ramp = torch.arange(7.0).expand(7, 7)
    masks = draw_masks(ramp.expand(60, 2, 7, 7), 64, seed=0, rows=range(60))[:, ::2].reshape(60, 8, 4, 7, 7).float()
    kept = masks.sum(dim=(3, 4))
    order = ((masks * ramp).sum(dim=(3, 4)) / kept).mean(dim=(0, 1))  # 3 on average
    pairs = (masks[..., 1:] * masks[..., :-1]).sum(dim=(3, 4)) / kept  # kept neighbours of a kept cell
    random, blobs, *near = order.tolist()
    assert random == pytest.approx(3, abs=0.1)
    assert blobs == pytest.approx(3, abs=0.3)
    assert min(near) > 4
    assert pairs[:, :, 1].mean() > pairs[:, :, 0].mean() + 0.2


def test_masks_that_cannot_be_drawn_are_refused(images: ImageSet, tmp_path: Path) -> None:
    with pytest.raises(MaskedError, match="at least two cells"):
        draw_masks(torch.zeros(1, 1, 1, 1), 2, seed=0, rows=[0])
    for count in (0, 7, -2):
        with pytest.raises(MaskedError, match=f"even number of masks, .* got {count}"):
            masked_answers(wrapped(), images, count=count, root=tmp_path)
    with pytest.raises(DataError, match="fill among coarse, blur, mean, grey, got 'pink'"):
        masked_answers(wrapped(), images, fill="pink", root=tmp_path)
    with pytest.raises(CacheError, match="at least one image to cache masked answers of"):
        masked_answers(wrapped(), images.subset([]), root=tmp_path)
    assert listed(tmp_path) == []


# --- answers


def normalised(images: ImageSet, row: int) -> Any:
    pixels = TRANSFORM.read(images.path(row)).pixels / 255
    return ((pixels - np.array(TRANSFORM.mean)) / np.array(TRANSFORM.std)).transpose(2, 0, 1)[None].astype(np.float32)


@pytest.mark.parametrize(
    ("head", "fill", "several"),
    [("linear", "coarse", False), ("two layers", "grey", False), ("of maps", "mean", False), ("linear", "blur", True)],
)
def test_answers_are_those_of_the_slow_way(
    head: str, fill: str, several: bool, images: ImageSet, tmp_path: Path
) -> None:
    found = masked_answers(
        wrapped(head, several_labels=several), images, count=MASKS, fill=fill, root=tmp_path / "caches"
    )
    assert found.failures == ()
    original, answers = model(head), []
    rows = np.array([9, 0, 4, 4])
    masks, given = found.batch(rows)
    assert (masks.shape, masks.dtype) == ((4, MASKS, *GRID), torch.bool)
    assert (given.shape, given.dtype) == ((4, MASKS), torch.float32)
    for row, of_photo in zip(rows, masks, strict=True):
        photo = normalised(images, row)
        with torch.no_grad():
            target = int(original(torch.from_numpy(photo)).argmax())
            assert found.targets[row] == target
            for mask in of_photo:
                logits = original(torch.from_numpy(masking.masked(photo, mask[None].numpy(), fill)))[0]
                answers.append((logits.sigmoid().log() if several else logits.log_softmax(0))[target])
    torch.testing.assert_close(given, torch.stack(answers).reshape(4, MASKS), rtol=1e-4, atol=1e-4)
    assert given.std() > 0.02, "or this test shows nothing"


def test_answers_of_a_regression_are_its_values_told_in_units_of_their_spread(images: ImageSet, tmp_path: Path) -> None:
    told: dict[str, Any] = {"output": lambda logits: logits[:, :1], "meaning": "value"}
    found = masked_answers(wrapped(**told), images, count=MASKS, root=tmp_path / "caches")
    (mask,), (given,) = found.batch(np.array([3]))
    with torch.no_grad():
        photo = torch.from_numpy(masking.masked(normalised(images, 3), mask[:1].numpy(), "coarse"))
        torch.testing.assert_close(given[0], model()(photo)[0, 0], rtol=1e-4, atol=1e-4)
    answers = np.stack([found.answers[row] for row in range(COUNT)])
    assert found.unit == pytest.approx(np.sqrt(answers.var(axis=1).mean()), rel=1e-5)
    torch.testing.assert_close(found.told(given), given / found.unit)
    kept = mask.flatten(1).sum(dim=1)
    sizes = found.batch(np.arange(COUNT))[0].flatten(2).sum(dim=2)
    same = torch.from_numpy(answers)[sizes == kept[0]].mean() / found.unit
    torch.testing.assert_close(found.by_size[kept[0]], same)


def test_a_photo_without_a_row_is_listed_and_moves_none(images: ImageSet, tmp_path: Path) -> None:
    whole = masked_answers(wrapped(), images, count=MASKS, root=tmp_path / "whole")
    for row in (0, 4, 5, 6, 7):  # a chunk of them
        images.path(row).write_bytes(b"")
    found = masked_answers(wrapped(), images, count=MASKS, root=tmp_path / "caches")
    assert [name for name, _ in found.failures] == [images.names[row] for row in (0, 4, 5, 6, 7)]
    masks, answers = found.batch(np.array([0, 4, 5, 6, 7]))
    assert not masks.any()
    assert not answers.any()
    good = np.array([1, 2, 3, 8, 9, 10])
    assert torch.equal(found.batch(good)[0], whole.batch(good)[0])
    torch.testing.assert_close(found.batch(good)[1], whole.batch(good)[1], rtol=1e-4, atol=1e-5)


def test_logits_that_are_not_finite_are_a_failure_of_that_photo(images: ImageSet, tmp_path: Path) -> None:
    classifier = wrapped()
    mean = normalised(images, 3).mean()

    def spoil(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        bad = (inputs[0].mean(dim=(1, 2, 3)) - mean).abs() < 1e-5
        return output.masked_fill(bad[:, None, None, None], torch.nan)

    classifier.trunk.register_forward_hook(spoil)
    found = masked_answers(classifier, images, count=MASKS, root=tmp_path)
    assert [name for name, _ in found.failures] == [images.names[3]]
    assert "finite logits" in found.failures[0][1]
    assert np.isfinite(found.answers).all()


# --- the cache


def test_a_second_call_only_opens(images: ImageSet, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    first = masked_answers(wrapped(), images, count=MASKS, root=tmp_path, report=lambda *call: calls.append(call))
    assert calls[0] == (f"masked answers of {COUNT} photos, {MASKS} each: about 1 seconds", 0, 0)
    assert calls[1] == (f"caching masked answers of {COUNT} images", 0, COUNT)
    assert calls[-1] == (calls[1][0], COUNT, COUNT)
    count = len(calls)
    again = masked_answers(wrapped(), images, count=MASKS, root=tmp_path, report=lambda *call: calls.append(call))
    assert (len(calls), again.folder) == (count, first.folder)
    assert all(isinstance(values, np.memmap) for values in (again.targets, again.masks, again.answers))
    assert content(first.folder)["masks"] == first.masks.tobytes()
    assert first.masks.shape == (COUNT, MASKS, 2), "15 cells in two bytes"


def test_the_key_covers_the_head_and_all_options(images: ImageSet, tmp_path: Path) -> None:
    options: list[dict[str, Any]] = [{}, {"count": 2}, {"seed": 1}, {"fill": "grey"}]
    folders = {masked_answers(wrapped(), images, **{"count": 4} | each, root=tmp_path).folder for each in options}
    other = explainable(model(scale=3.0), transform=TRANSFORM, name="tiny")
    folders.add(masked_answers(other, images, count=4, root=tmp_path).folder)
    assert len(folders) == 5
    assert {entry["kind"] for entry in listed(tmp_path)} == {"answers"}


@pytest.mark.parametrize(("calls", "safe"), [(0, 0), (1, 0), (3, 0), (4, 4), (7, 8)])
def test_an_interrupted_build_resumes_to_the_same_bits(calls: int, safe: int, images: ImageSet, tmp_path: Path) -> None:
    images.path(6).write_bytes(b"no photo")
    expected = content(masked_answers(wrapped(), images, root=tmp_path / "whole").folder)
    seen: list[int] = []

    def interrupt(title: str, done: int, total: int) -> None:
        seen.append(done)
        if len(seen) > calls:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        masked_answers(wrapped(), images, root=tmp_path / "caches", report=interrupt)
    assert seen == [0, 0, 2, 4, 6, 8, 10, 11][: calls + 1]
    assert [entry["done"] for entry in listed(tmp_path / "caches")] == [safe]
    seen.clear()
    found = masked_answers(wrapped(), images, root=tmp_path / "caches", report=lambda *call: seen.append(call[1]))
    assert content(found.folder) == expected
    assert seen == [0, safe, *(done for done in (2, 4, 6, 8, 10, 11) if done > safe)]


def test_several_processes_share_the_work(images: ImageSet, start: Starter, tmp_path: Path) -> None:
    program = """
        import runpy
        from pathlib import Path
        from bla.training import distributed
        from bla.training.masked import masked_answers
        test = runpy.run_path({file!r})
        images = test["ImageSet"](Path({photos!r}), {names!r})
        with distributed.joined():
            masked_answers(test["wrapped"](), images, count=4, root=Path({root!r}) / str(world))
    """
    text = program.format(file=__file__, photos=str(images.root), names=images.names, root=str(tmp_path / "caches"))
    assert start(3, text) == [0] * 3
    assert start(1, text) == [0]
    three, one = (content(next((tmp_path / "caches" / world).glob("*/"))) for world in "31")
    assert three == one


@pytest.mark.parametrize("file", ["targets", "masks", "answers"])
def test_damage_is_noticed(file: str, images: ImageSet, tmp_path: Path) -> None:
    folder = masked_answers(wrapped(), images, count=4, root=tmp_path).folder
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert damaged(folder) == [file]
    with pytest.raises(CacheError, match=rf"{file} as it was written, got a damaged file: remove it with `bla cache"):
        masked_answers(wrapped(), images, count=4, root=tmp_path)
    assert remove([folder.name], tmp_path) == [folder.name]
    assert damaged(masked_answers(wrapped(), images, count=4, root=tmp_path).folder) == []


def test_other_code_with_the_same_weights_is_found_out(images: ImageSet, tmp_path: Path) -> None:
    masked_answers(wrapped(), images, count=4, root=tmp_path)
    changed = model()
    changed[1] = nn.Softplus()
    with pytest.raises(CacheError, match=r"cached masked answers of 00\.png .*code has changed"):
        masked_answers(explainable(changed, transform=TRANSFORM, name="tiny"), images, count=4, root=tmp_path)


def test_the_record_says_what_it_holds(images: ImageSet, tmp_path: Path) -> None:
    folder = masked_answers(wrapped(), images, count=4, root=tmp_path).folder
    record = json.loads((folder / "manifest.json").read_text())
    assert (record["kind"], record["shape"], record["done"]) == ("answers", [4, *GRID], COUNT)
    assert {file: len(sums) for file, sums in record["checksums"].items()} == {"targets": 3, "masks": 3, "answers": 3}
