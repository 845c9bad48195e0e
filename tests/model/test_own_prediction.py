"""The classifier's own prediction: evidence by gradients, sizes by brute force, agreement by construction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import conv2d

import bla
from bla.model.attention import AttentionError
from bla.model.classifier import ExplainableClassifier
from bla.model.evidence import ask, evidence, from_all, linear_layer, sufficiency
from bla.model.heads import MapHead, read
from bla.model.own_prediction import UNTRAINED, OwnPredictionAttention


class Flattened(MapHead):
    """A head that flattens the map, as VGG's does."""

    def __init__(self, features: Tensor, classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(features[0].numel(), classes)

    def forward(self, features: Tensor, keep: Tensor | None = None) -> Tensor:
        logits: Tensor = self.layer(torch.relu(self.emptied(features, keep).flatten(1)))
        return logits


def features_of(seed: int = 0, photos: int = 3) -> Tensor:
    return torch.randn(photos, 6, 3, 4, generator=torch.Generator().manual_seed(seed))


def heads(classes: int = 5) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    nonlinear = nn.Sequential(nn.LayerNorm(6), nn.Hardswish(), nn.Linear(6, classes))
    dropped = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, classes))
    made = {"linear": dropped, "nonlinear": nonlinear, "map": Flattened(features_of(), classes)}
    return {name: head.eval().requires_grad_(False) for name, head in made.items()}


def slow_evidence(head: nn.Module, features: Tensor, target: Tensor) -> Tensor:
    """The three maps, of the log odds, the logit and its lead, by autograd at the features, one photo at a time."""
    found = []
    for photo, label in zip(features, target.tolist(), strict=True):
        at = photo[None].clone().requires_grad_()
        logits = from_all(head, at)[0]
        others = [index for index in range(len(logits)) if index != label]
        second = max(others, key=logits.tolist().__getitem__)
        odds = logits[label] - logits[others].logsumexp(-1)
        parts = (odds, logits[label], logits[label] - logits[second])
        slopes = [torch.autograd.grad(part, at, retain_graph=True)[0] for part in parts]
        found.append(torch.stack([12 * (slope * at)[0].sum(dim=0).detach() for slope in slopes]))
    return torch.stack(found)


@pytest.mark.parametrize("name", ["linear", "nonlinear", "map"])
def test_evidence_is_the_gradient_at_the_map_times_the_map(name: str) -> None:
    head, features, target = heads()[name], features_of(), torch.tensor([4, 0, 2])
    layer = linear_layer(head, 6)
    assert (layer is not None) == (name == "linear")
    found = evidence(head, features, ask(head, features, layer, target), layer)
    torch.testing.assert_close(found, slow_evidence(head, features, target), rtol=1e-4, atol=1e-4)


SURE = {
    "linear": lambda layer: layer.forward,
    "capped": lambda layer: lambda pooled: 60 * (layer(pooled) / 60).tanh(),
    "softmax": lambda layer: lambda pooled: layer(pooled).softmax(-1).clamp(min=1e-38).log(),
    "map": lambda layer: lambda features, keep=None: layer(features.mean((2, 3))),
}


@pytest.mark.parametrize("name", SURE)
def test_the_cells_of_a_sure_classifier_are_ordered_as_in_double_precision(name: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    features = 12 * features_of(photos=8).abs()
    head = nn.Module()
    head.layer, head.reads_maps = layer, name == "map"
    head.forward = SURE[name](layer)  # type: ignore[method-assign]
    orders = []
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype)
        layer.weight.data.copy_(torch.arange(30).reshape(5, 6).sin())
        layer.bias.data.copy_(torch.arange(5) == 2).mul_(25)
        attention = OwnPredictionAttention(6, head).eval().to(dtype)
        orders.append(attention.ranking(features.to(dtype)).flatten(1).argsort(dim=1))
        sure = from_all(head, features.to(dtype)).softmax(-1).amax(dim=1)
    assert (1 - sure).median() < 1e-8
    assert torch.equal(*orders)


def slow_sizes(head: nn.Module, photo: Tensor, ranking: Tensor) -> list[int]:
    """Every prefix and what is left of it, read one by one."""
    order = ranking.flatten().argsort(descending=True, stable=True).tolist()

    def said(cells: list[int]) -> int:
        weights = torch.zeros(len(order))
        weights[cells] = 1 / len(cells)
        return int(read(head, photo[None], weights.reshape(1, *ranking.shape)).argmax())

    own, count = said(order), len(order)
    sufficient = next(
        size for size in range(1, count + 1) if all(said(order[:longer]) == own for longer in range(size, count + 1))
    )
    decisive = next((size for size in range(1, count) if said(order[size:]) != own), count)
    return [sufficient, decisive, max(1, int((ranking >= 0).sum()))]


def sizes(head: nn.Module, features: Tensor, ranking: Tensor, target: Tensor | None = None) -> Tensor:
    """Sufficient, decisive (0 if they are not known) and at the bound, where the classes (B,) were asked about."""
    bound = (ranking >= 0).sum(dim=(1, 2)).clamp(min=1)
    enough = sufficiency(head, features, ranking, ask(head, features, linear_layer(head, 6), target))
    return torch.stack([*(enough or (0 * bound, 0 * bound)), bound], dim=1)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(["linear", "nonlinear"]), asked=st.booleans())
def test_sizes_equal_those_of_every_prefix_read_one_by_one(seed: int, name: str, asked: bool) -> None:
    head, features = heads()[name], features_of(seed)
    ranking = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(seed + 1))
    found = sizes(head, features, ranking, torch.tensor([4, 0, 2]) if asked else None)
    assert found.tolist() == [slow_sizes(head, *pair) for pair in zip(features, ranking, strict=True)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(["linear", "nonlinear", "map"]))
def test_the_selection_agrees_with_the_classifier_and_is_the_bound_where_that_suffices(seed: int, name: str) -> None:
    head, features = heads()[name], features_of(seed)
    attention = OwnPredictionAttention(6, head).eval()
    attention.move_bound(-1.0)  # few cells are at the bound, too few for some photos
    selection = attention(features)
    own = attention.predicted(features)
    assert read(head, features, selection.hard).argmax(-1).tolist() == own.tolist()
    assert torch.equal(selection.hard > 0, selection.scores == 0)
    attention.agreeing = False
    bare = attention(features)
    fine = read(head, features, bare.hard).argmax(-1) == own
    enough = sizes(head, features, bare.unbounded)
    for photo in range(3):
        if bool(fine[photo]) and enough[photo, 0] <= enough[photo, 2]:
            assert torch.equal(selection.hard[photo], bare.hard[photo])
        else:
            assert (selection.hard[photo] > 0).sum() >= (bare.hard[photo] > 0).sum()


def test_a_bound_that_is_set_selects_at_least_half_of_its_mean_size_and_weights_of_before_had_no_such_least() -> None:
    attention = OwnPredictionAttention(6, heads()["linear"], agreeing=False).eval()
    older = {name: value for name, value in attention.state_dict().items() if name != "score.least"}
    assert attention.least_about(9.0) == 4
    attention.move_bound(-5.0)  # no cell is at it
    assert (attention(features_of()).hard > 0).sum(dim=(1, 2)).tolist() == [4, 4, 4]
    assert (attention(features_of(), size=2).hard > 0).sum(dim=(1, 2)).tolist() == [2, 2, 2]
    attention.load_state_dict(older)
    assert int(attention.least) == 1


def test_another_class_is_explained_at_the_bound() -> None:
    head, features = heads()["linear"], features_of()
    attention = OwnPredictionAttention(6, head).eval()
    other = (attention.predicted(features) + 1) % 5
    selection = attention(features, target=other)
    assert torch.equal(selection.scores, selection.unbounded.clamp(max=0))
    layer = linear_layer(head, 6)
    contrast = evidence(head, features, ask(head, features, layer, other), layer)[:, 0]
    ones = torch.ones(1, 1, 3, 3)
    total, count = (conv2d(each[:, None], ones, padding=1) for each in (contrast, torch.ones_like(contrast)))
    order = (total / count).flatten(1).argsort(dim=1)
    assert torch.equal(selection.unbounded.flatten(1).argsort(dim=1), order), "c - E, averaged over 3x3 cells"


def test_large_features_do_not_overflow_half_precision() -> None:
    features = (300 * features_of().abs()).half()
    assert features.float().square().sum(dim=1).max() > torch.finfo(torch.half).max
    found = OwnPredictionAttention(6, heads()["linear"].half()).half().eval().ranking(features)
    assert torch.isfinite(found).all()


def test_a_size_is_kept_and_training_starts_untrained_again() -> None:
    attention = OwnPredictionAttention(6, heads()["linear"])
    assert attention.post_hoc_setup == UNTRAINED
    attention.learnt(features_of(), torch.tensor([0, 1, 2]))
    assert attention.post_hoc_setup != UNTRAINED
    features = features_of()
    assert attention.eval()(features, size=4).hard.count_nonzero(dim=(1, 2)).tolist() == [4, 4, 4]
    attention.reset_parameters()
    assert attention.post_hoc_setup == UNTRAINED
    with pytest.raises(AttentionError, match="expected a judge"):
        OwnPredictionAttention(6)(features)
    with pytest.raises(ValueError, match=r"expected three hidden sizes.* got \(64,\)"):
        OwnPredictionAttention(6, hidden=(64,))


def test_a_wrapped_classifier_explains_at_once_and_says_what_it_predicts_itself() -> None:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(3, 8, 9, stride=16), nn.ReLU())
    net = nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval().requires_grad_(False)
    wrapped = bla.explainable(net, attention=OwnPredictionAttention(8))
    photos = [np.random.default_rng(seed).integers(0, 255, (224, 224, 3), dtype=np.uint8) for seed in range(4)]
    pixels = torch.cat([wrapped.pixels(photo[None]) for photo in photos])
    probabilities = net(pixels).softmax(-1)
    for row, why in enumerate(wrapped.explain(photos)):
        assert why.setup == UNTRAINED
        assert why.classifier is not None
        assert why.classifier.index == why.prediction.index == int(probabilities[row].argmax())
        assert why.classifier.probability == pytest.approx(float(probabilities[row].max()), abs=1e-5)
        assert why.agrees
        assert why.sizes is not None
        assert why.size == max(why.sizes.bound, why.sizes.sufficient)
    one = wrapped.explain(photos[0], size=1, target=(int(probabilities[0].argmax()) + 1) % 3)[0]
    assert one.size == 1
    assert one.agrees == (one.prediction == one.classifier or one.prediction.index == one.classifier.index)  # type: ignore[union-attr]


class Deep(nn.Module):
    """A map of 3 x 4 cells, and before it one of 6 x 8 with two channels more than the inputs have."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 5, 8, stride=8), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(5, 6, 2, stride=2), nn.ReLU())
        self.pool, self.flatten, self.fc = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.flatten(self.pool(self.late(self.early(pixels)))))
        return logits


def wrapped_wide(kind: type[Deep]) -> tuple[Deep, ExplainableClassifier, Tensor]:
    """A model of a kind, wrapped for photos that are not square, and two of these."""
    torch.manual_seed(0)
    model = kind().eval().requires_grad_(False)
    half = (0.5, 0.5, 0.5)
    wrapped = bla.explainable(model, transform=bla.Transform((48, 64), half, half))
    return model, wrapped, torch.randn(2, 3, 48, 64)


def test_an_earlier_map_is_given_behind_the_trunks_own_and_the_head_does_not_read_it() -> None:
    model, wrapped, pixels = wrapped_wide(Deep)
    features = wrapped.trunk(pixels)
    assert (features.shape, wrapped.attention.earlier) == ((2, 11, 3, 4), 5)
    early = model.early(pixels)
    assert torch.equal(features[:, 6:], nn.functional.avg_pool2d(early, 2))
    assert torch.equal(features[:, :6], model.late(early))
    torch.testing.assert_close(from_all(wrapped.head, features), model(pixels))
    spoilt = torch.cat([features[:, :6], 1e3 * torch.randn(2, 5, 3, 4)], dim=1)
    assert torch.equal(wrapped.classify(spoilt, wrapped.attention(features).hard), wrapped(pixels))
    assert not any(module._forward_hooks for module in wrapped.modules()), "no hook is left behind"
    wrapped.attention.calibrate(features)
    wrapped.attention.train()
    assert wrapped.attention(features).unbounded.requires_grad


class Shared(Deep):
    """One activation for all convolutions, as torchvision's bottlenecks have."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.last = nn.Conv2d(6, 7, 1)
        self.fc = nn.Linear(7, 4)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.relu(self.last(self.relu(self.late[0](self.relu(self.early(pixels))))))
        logits: Tensor = self.fc(self.flatten(self.pool(maps)))
        return logits


def test_a_module_that_gives_several_maps_is_taken_for_its_last() -> None:
    model, wrapped, pixels = wrapped_wide(Shared)
    assert torch.equal(wrapped.trunk(pixels)[:, 7:], nn.functional.avg_pool2d(model.early(pixels), 2))
    torch.testing.assert_close(wrapped(pixels).argmax(dim=1), model(pixels).argmax(dim=1))


@pytest.mark.parametrize("bend", [lambda v: 30 * (v / 30).tanh(), lambda v: v.clamp(-50, 50), lambda v: v / 1.5])
def test_a_head_that_bends_large_logits_is_not_taken_for_its_linear_layer(bend: Callable[[Tensor], Tensor]) -> None:
    head = nn.Sequential(nn.Linear(6, 5), nn.Identity())
    assert linear_layer(head, 6) is head[0]
    head[1].forward = bend  # type: ignore[method-assign]
    assert linear_layer(head, 6) is None
