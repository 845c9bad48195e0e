"""The benchmark of subset selection runs at a small size, and so do the examples; the sets are the published ones."""

from __future__ import annotations

import dataclasses
import gzip
import json
import runpy
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.operators import subsets
from benchmarks.operators.bags import (
    ATTEMPTS,
    POOLS,
    Networks,
    auc,
    drawn_bags,
    fashion_or_mnist,
    found,
    instances,
    odds_of,
    read_idx,
)
from benchmarks.operators.cells import trained_cells
from benchmarks.operators.gradient_quality import bias_and_variance, distribution, kept_bytes, timed
from benchmarks.operators.gradient_quality import subsets as every_subset
from benchmarks.operators.image_size import MARK, Selecting, marked, patches_of, rising, task_of
from benchmarks.operators.rivals import First
from benchmarks.operators.stacked import StackedMLP
from benchmarks.operators.synthetic import L2X, bayes, syn
from benchmarks.operators.tabular import Stack, fitted, invase_plan, l2x_plan, over, samples, thresholds
from bla.operators import BoundedLogits, HardConcrete, Sparsemax, StraightThroughTopK, SubsetOperator
from bla.training.cache import FeatureCache

ROOT = Path(__file__).parents[2]


def die(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["subsets.py", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        subsets.main()
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out


def test_bayes_figures_are_those_known() -> None:
    known = {"xor": (0.632, 0.620), "orange": (0.824, 0.391), "additive": (0.973, 0.065)}
    for name, (accuracy, entropy) in known.items():
        figures = bayes(L2X[name][0](100_000, die()))
        assert figures["accuracy"] == pytest.approx(accuracy, abs=0.005)
        assert figures["cross_entropy"] == pytest.approx(entropy, abs=0.005)
    assert bayes(syn(3, 11)(100_000, die()))["accuracy"] == pytest.approx(0.822, abs=0.005)


@pytest.mark.parametrize("name", ["orange", "xor", "additive", "switch", *(f"syn{n}" for n in range(1, 7))])
def test_only_the_relevant_features_matter(name: str) -> None:
    draw = L2X[name][0] if name in L2X else syn(int(name[3:]), 11)
    drawn = draw(4, die())
    first = drawn.features[0].tolist()
    rules = {
        "xor": lambda x: x[0] * x[1],
        "orange": lambda x: sum(v * v for v in x[:4]) - 4,
        "additive": lambda x: -100 * np.sin(0.2 * x[0]) + abs(x[1]) + x[2] + np.exp(-x[3]) - 2.4,
        "switch": lambda x: sum(v * v for v in x[:4]) - 4,
        "syn1": lambda x: x[0] * x[1],
        "syn2": lambda x: sum(v * v for v in x[2:6]) - 4,
        "syn3": lambda x: -10 * np.sin(0.2 * x[6]) + abs(x[7]) + x[8] + np.exp(-x[9]) - 2.4,
    }
    branches = {"syn4": ("syn1", "syn2"), "syn5": ("syn1", "syn3"), "syn6": ("syn2", "syn3")}
    rule = rules[name if name in rules else branches[name][int(first[10] >= 0)]]
    assert drawn.probability[0].item() == pytest.approx(1 / (1 + np.exp(rule(first))), rel=1e-3)
    counts = {"xor": {2}, "syn1": {2}, "switch": {5}, "syn4": {3, 5}, "syn5": {3, 5}, "syn6": {5}}
    assert set(draw(100, die()).relevant.sum(1).tolist()) == counts.get(name, {4})


def test_synthetic_sets_train_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["bounded", "gumbel-maximum"]
    options = ["invase", "--out", tmp_path, "--sets", "syn4", "--seeds", 2, "--scale", 0.01, "--operators", *names]
    options += ["--at-size-of", "bounded"]
    table = json.loads(run(monkeypatch, capsys, *options, "--json"))
    assert [row["operator"] for row in table] == ["Bayes", *names, "gumbel-maximum"]
    assert all(0 <= row["tpr"][0] <= 1 for row in table[1:])
    assert table[3]["size"][0] == pytest.approx(table[1]["size"][0]), "at equal size"
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    assert len(stamps) == 2 + 2 + 2
    text = run(monkeypatch, capsys, *options, "--settings")
    assert "BoundedLogits(" in text
    assert "price" in text
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}, "nothing is done twice"
    table = json.loads(
        run(monkeypatch, capsys, "l2x", "--out", tmp_path, "--sets", "xor", "--seeds", 1, "--scale", 0.001,
            "--operators", "bounded-dial", "first", "--json")
    )  # fmt: skip
    assert 1.5 <= table[1]["median_rank"][0] <= 9.5
    assert table[1]["moving_accuracy"] != table[1]["accuracy"]
    first = First(2).soft(torch.tensor([[-1.0, 0.0, 3.0]], requires_grad=True))
    assert first.tolist() == [[1, 1, 0]], "whatever the scores"


@pytest.mark.parametrize("operator", [Sparsemax(3.0), BoundedLogits(k=2), BoundedLogits()])
def test_a_threshold_leaves_the_size_it_was_chosen_for(operator: SubsetOperator) -> None:
    generator = die()
    networks = (StackedMLP(2, [11, 4, 11], generator, torch.relu), StackedMLP(2, [11, 4, 1], generator, torch.relu))
    stack = Stack([(operator, 0.0)], 2, *networks)
    data = samples("syn4", 50, [0, 1], 1, invase_plan(), features=11)
    cut = thresholds(stack, data)
    sizes = [one["size"] for one in stack.figures(data, lambda scores: over(stack, scores, cut))]
    assert all(1 <= size <= 10.5 for size in sizes)
    everything = stack.figures(data, lambda scores: over(stack, scores, torch.full((2,), -torch.inf)))
    assert everything[0]["size"] == 11
    assert everything[0]["tpr"] == 1
    nothing = stack.figures(data, lambda scores: over(stack, scores, torch.full((2,), torch.inf)))
    assert nothing[0]["size"] < 11, "the strongest at least"


def test_settled_networks_normalise_by_what_is_selected_in_the_whole_set() -> None:
    generator = die()
    selector, predictor = (
        StackedMLP(2, widths, generator, torch.relu, normalise)
        for *widths, normalise in ((10, 8, 10, False), (10, 8, 1, True))
    )
    stack = Stack([(BoundedLogits(k=3), 0.0)], 2, selector, predictor)
    plan = dataclasses.replace(l2x_plan("switch"), train=3000)
    data = samples("switch", 3000, [0, 1], 0, plan, features=11)
    assert data.features[0, :1500, 9].mean() * data.features[0, 1500:, 9].mean() < -4, "the set is sorted"
    chosen = data.features * stack.hard(selector(data.features))
    inner = predictor.layers[0](chosen).relu()
    normal = (inner - inner.mean(1, keepdim=True)) / (inner.var(1, keepdim=True) + 1e-3).sqrt()
    stack.settle(data)
    torch.testing.assert_close(predictor(chosen, training=False), predictor.layers[1](normal), rtol=0.05, atol=0.01)


def test_networks_of_a_stack_learn_by_themselves() -> None:
    plan = dataclasses.replace(invase_plan(), train=64, steps=3, batch=32)
    train = samples("syn4", 64, [0], 0, plan, features=11)
    weights = []
    for price in (0.0, 0.5):
        candidates = [(BoundedLogits(), 0.01), (BoundedLogits(), price)]
        stack = fitted(train, candidates, [0], plan, report=lambda *_: None)
        weights.append(stack.selector.layers[0].weight.detach())
    assert torch.equal(weights[0][0], weights[1][0]), "a neighbour's price is the neighbour's"
    assert not torch.equal(weights[0][1], weights[1][1])


def test_bags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["bags", "--out", tmp_path, "--seeds", 1, "--scale", 0.01, "--bags", 20, "--json"]
    table = json.loads(run(monkeypatch, capsys, *options))
    assert [row["operator"] for row in table] == list(POOLS)
    assert all(0 <= row["auc"][0] <= 1 for row in table)
    tried = json.loads(run(monkeypatch, capsys, *options, "--first-seed", 100, "--operators", *ATTEMPTS))
    assert len(tried) == len(ATTEMPTS)
    assert len(list(tmp_path.rglob("*-100-100.json"))) == len(ATTEMPTS), "other seeds, other results"


def test_a_bag_of_selected_instances_is_positive_as_soon_as_one_is() -> None:
    own = torch.tensor([[1.0, 0.5, -3.0], [-2.0, -0.1, -1.0]])
    bounded = POOLS["bounded"]
    logits = bounded.read(own, bounded.memberships(own, None))
    assert logits.tolist() == pytest.approx([2 * np.log(np.exp(0.5) + np.exp(0.25)), -0.1], abs=1e-6)
    assert torch.allclose(odds_of(own, torch.ones(2, 3)).exp(), own.exp().sum(dim=1))
    alike = torch.full((1, 7), bounded.start(7))
    operator = BoundedLogits(0.1)
    assert bounded.read(alike, operator.soft(alike)).item() == pytest.approx(0, abs=1e-5), "neither, before training"
    relaxed = bounded.memberships(own, die())
    assert ((relaxed > 0) & (relaxed <= 1)).all()


@pytest.mark.parametrize("pool", ["gated-attention", "bounded-gated", "mean"])
def test_the_mean_of_the_logits_is_the_logit_of_the_mean_features(pool: str) -> None:
    kind = {**POOLS, **ATTEMPTS}[pool]
    networks = Networks(kind, 2, 4, 5)
    pixels = torch.rand(20, 4, generator=die())
    rows = torch.stack([torch.arange(10), torch.arange(10, 20)])
    bags = torch.randint(10, (2, 3, 5), generator=die())
    own, scores = instances(networks, pixels, rows, bags)
    weights = kind.memberships(scores, None)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    h = torch.relu(networks.embedding(pixels[rows.gather(1, bags.flatten(1))])).reshape(2, 3, 5, -1)
    expected = networks.head((weights[..., None] * h).sum(dim=2))[..., 0]
    assert torch.allclose(kind.read(own, weights), expected, atol=1e-6)


def test_an_image_read_once_counts_in_every_bag_that_holds_it() -> None:
    networks = Networks(POOLS["bounded"], 4, 4, 4)
    pixels = torch.rand(30, 4, generator=die())
    rows = torch.stack([torch.randperm(30, generator=die(seed))[:6] for seed in (0, 1)])
    bags = torch.randint(6, (2, 3, 4), generator=die())
    once, _ = instances(networks, pixels, rows, bags)
    each = torch.stack([instances(networks, pixels, rows, bags[:, b : b + 1])[0][:, 0] for b in range(3)], dim=1)
    assert once.shape == (4, 3, 4)
    assert torch.allclose(once, each, atol=1e-6)


def test_bags_hold_what_they_should() -> None:
    labels = np.arange(1000) % 10
    rows = np.arange(0, 1000, 2) + (np.arange(500) % 2)
    bags = drawn_bags(labels, rows, 40, 10, np.random.default_rng(0))
    positive = (labels[bags] == 9).any(axis=1)
    assert bags.shape == (40, 10)
    assert positive.sum() == 20
    assert set(bags.ravel()) <= set(rows)


def test_figures_of_bags_by_hand() -> None:
    assert auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, True, False, True])) == 0.875
    chosen, wanted = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, True])
    assert found(chosen, wanted) == {"precision": 0.5, "recall": 1 / 3, "f1": 0.4}


def test_idx_files(tmp_path: Path) -> None:
    for part, n in (("train", 5), ("t10k", 3)):
        pixels = np.arange(n * 4, dtype=np.uint8).reshape(n, 2, 2)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + struct.pack(">3I", n, 2, 2) + pixels.tobytes()
        )
        labels = b"\0\0\x08\x01" + struct.pack(">I", n) + bytes(range(n))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    images, labels = fashion_or_mnist(tmp_path)
    assert images.shape == (8, 4)
    assert images[1, 3] == pytest.approx(7 / 255)
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    short = tmp_path / "train-images-idx3-ubyte"
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"expected 20 values .* got 19"):
        read_idx(short)
    short.write_bytes(b"PNG?")
    with pytest.raises(ValueError, match="idx format"):
        read_idx(short)
    with pytest.raises(ValueError, match="found neither"):
        fashion_or_mnist(tmp_path / "nowhere")


def test_distributions_are_those_drawn_from() -> None:
    scores = torch.tensor([0.5, -0.3, 0.1, -0.8], dtype=torch.float64)
    every = every_subset(4)
    for operator in (BoundedLogits(noise=0.7), HardConcrete(), StraightThroughTopK(2)):
        probability = distribution(operator, scores)
        assert probability is not None
        assert probability.sum().item() == pytest.approx(1)
        if isinstance(operator, StraightThroughTopK):
            drawn = operator.soft(scores.expand(20_000, 4), generator=die()).mean(dim=0)
            assert torch.allclose(probability @ every, drawn, atol=0.02)
    assert distribution(BoundedLogits(), scores) is None
    figures = bias_and_variance(StraightThroughTopK(2), 50, n=5)
    assert -1 <= figures["cosine"] <= 1


def test_cost_is_measured() -> None:
    figures = timed(BoundedLogits(), 50, seconds=0.01)
    assert figures["forward ms"] > 0
    assert figures["backward ms"] > 0
    both = figures["forward ms"] + figures["backward ms"]
    assert figures["times a softmax"] == pytest.approx(both / figures["softmax ms"])


@pytest.mark.parametrize("operator", [BoundedLogits(noise=1.0), BoundedLogits(k=4), HardConcrete()])
def test_what_is_kept_grows_with_the_items_and_no_faster(operator: SubsetOperator) -> None:
    few, many = (kept_bytes(operator, torch.randn(1, n, requires_grad=True)) for n in (1000, 4000))
    assert 3.8 < many / few < 4.2
    assert few >= 4 * 1000, "the result at least"


def test_cells(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.random((80, 3, 3, 8)).astype(np.float16)
    labels = np.arange(80) % 2
    features[labels == 1, 1, 1] += 3
    cache = FeatureCache(tmp_path, features, features.reshape(80, 9, 8).mean(axis=1).astype(np.float32), ())
    operators = [BoundedLogits(k=1, noise=1.0), StraightThroughTopK(2)]
    figures = trained_cells(operators, (cache, labels), (cache, labels), 0, scale=1.0, report=lambda *_: None)
    assert [one["size"] for one in figures] == [1, 2]
    assert all(0 <= one["top1"] <= 1 and 0 <= one["validation"] <= 1 for one in figures)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8)).save(
                tmp_path / "photos" / name / f"{index}.png"
            )
    return tmp_path / "photos"


@pytest.mark.parametrize("mark", [False, True])
def test_images_of_two_sizes(
    photos: Path, mark: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["images", "--out", tmp_path / "out", "--data", photos, "--seeds", 2, "--scale", 0.01, "--sizes", 8, 16]
    options += ["--operators", "gumbel-official", "bounded", "--json", *(["--mark"] if mark else [])]
    table = json.loads(run(monkeypatch, capsys, *options))
    assert [row["set"].split(",")[0] for row in table] == ["8x8"] * 4 + ["16x16"] * 4
    told = {row["set"]: row["share"][0] for row in table if row["operator"] == "gumbel-official"}
    assert list(told.values()) == pytest.approx([1 / 2] * 2 + [1 / 4] * 2 if mark else [1 / 4] * 2 + [1 / 8] * 2)
    assert len(list((tmp_path / "out").rglob("*.json"))) == 2 * 2 * 2 * 2
    assert len({json.dumps(row) for row in table}) == 8


def test_patches_are_the_image_and_a_mark_is_one_of_them(photos: Path) -> None:
    task = task_of(str(photos), 16, 0, marked=True)
    assert len(task.labels) == 16
    assert (task.items, task.k) == (16, 4)
    patches = patches_of(task.images, 4)
    expected = task.images[3, :, 4:8, 8:12].flatten() / 127.5 - 1
    assert torch.equal(patches[3, 6], expected), "second row, third column"
    labels = torch.arange(16) % 2
    changed = marked(patches, labels, die())
    differs = (changed != patches).any(dim=-1)
    assert differs.sum(dim=1).tolist() == [1] * 16
    assert differs.float().argmax(dim=1).unique().numel() > 3, "anywhere"
    for label, mark in enumerate((MARK, MARK.mT)):
        found = changed[differs][labels == label].reshape(-1, 3, 4, 4)
        assert torch.equal(found, mark.expand_as(found))
    other = task_of(str(photos), 16, 1, marked=True)
    assert not torch.equal(task.test_images, other.test_images), "every seed has a test of its own"


def test_the_original_form_reads_the_selected_pixels_alone_and_the_price_comes_late() -> None:
    torch.manual_seed(0)
    model = Selecting("pixels", BoundedLogits(k=2), 12, 2).eval()
    patches = torch.randn(3, 16, 12)
    logits, scores = model(patches)
    chosen = model.operator.hard(scores)[..., None]
    assert torch.equal(model.head(model.predictor(patches * chosen).mean(dim=(2, 3))), logits)
    assert torch.equal(model.head(model.predictor(torch.where(chosen > 0, patches, 0)).mean(dim=(2, 3))), logits)
    assert not torch.equal(model.head(model.predictor(patches).mean(dim=(2, 3))), logits)
    cells = Selecting("cells", BoundedLogits(k=2), 12, 2).eval()
    logits, scores = cells(patches)
    best = cells.trunk(patches).flatten(2).gather(2, scores.topk(2).indices[:, None].expand(-1, 16, -1))
    assert torch.allclose(cells.head(best.mean(dim=2)), logits, atol=1e-6)
    assert [rising(share) for share in (0, 1 / 3, 1 / 2, 2 / 3, 1)] == pytest.approx([0, 0, 0.5, 1, 1])


@pytest.mark.parametrize("name", ["tabular_subset", "transformer_subset"])
def test_examples(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--steps", "30"])
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert "accuracy from the selected" in capsys.readouterr().out
