"""What an output means: one logit, probabilities, values, and tensors among others."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bla.data.photo import Transform
from bla.explanations.explanation import Explanation
from bla.model.attention import BoundedLogitAttention
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable

HALF = (0.5, 0.5, 0.5)
SMALL = Transform((32, 48), HALF, HALF)
PIXELS = torch.randn(4, 3, 32, 48, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """A 4x6 map of 8 channels, its average, and whatever is made of a linear layer's answer."""

    def __init__(self, classes: int, answer: Callable[[Net, Tensor, Tensor], Any], scale: float = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fc, self.other = nn.Conv2d(3, 8, 8, 8), nn.Linear(8, classes), nn.Linear(8, classes)
        nn.init.normal_(self.fc.weight, std=scale)
        self.answer = answer

    def forward(self, pixels: Tensor) -> Any:
        pooled = self.stem(pixels).relu().mean((2, 3))
        return self.answer(self, self.fc(pooled), pooled)


def own(wrapped: ExplainableClassifier, pixels: Tensor = PIXELS) -> Tensor:
    """The probabilities from all cells, as explanations have them."""
    with torch.no_grad():
        features = wrapped.trunk(pixels)
        logits = wrapped.classify(features, torch.full((len(pixels), 4, 6), 1 / 24))
        return logits.sigmoid() if wrapped.several_labels else logits.softmax(-1)


ONE_LOGIT: dict[str, Callable[[Tensor], Tensor]] = {
    "a logit": lambda logit: logit,
    "squeezed": lambda logit: logit.squeeze(),
    "flattened": lambda logit: logit.flatten(),
    "a map of one": lambda logit: logit[:, :, None, None],
    "a sigmoid": lambda logit: logit.sigmoid(),
    "a squeezed sigmoid": lambda logit: logit.sigmoid().squeeze(1),
    "an exponential": lambda logit: 1 / (1 + (-logit).exp()),
    "a hyperbolic tangent": lambda logit: ((logit / 2).tanh() + 1) / 2,
}


@pytest.mark.parametrize("form", ONE_LOGIT.values(), ids=ONE_LOGIT)
def test_one_number_tells_two_classes_apart(form: Callable[[Tensor], Tensor]) -> None:
    model = Net(1, lambda _, logit, __: form(logit))
    wrapped = explainable(model, transform=SMALL, classes=["defect"])
    assert wrapped.classes == ("not defect", "defect")
    with torch.no_grad():
        logit = model.fc(model.stem(PIXELS).relu().mean((2, 3)))
    torch.testing.assert_close(own(wrapped), torch.cat([(-logit).sigmoid(), logit.sigmoid()], 1), rtol=0, atol=2e-6)
    for pixel, why in zip(PIXELS, wrapped.explain(PIXELS, size=24), strict=True):
        assert why.classifier is not None
        assert why.classifier.probability == pytest.approx(float(own(wrapped, pixel[None]).max()), abs=1e-5)
        assert why.prediction.index == why.classifier.index
    assert wrapped(PIXELS[:1]).shape == (1, 2)


PROBABILITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(1),
    "by hand": lambda logits: logits.exp() / logits.exp().sum(1, keepdim=True),
    "mixed": lambda logits: (logits.softmax(1) + 3 * (2 * logits).softmax(1)) / 4,
    "normalised": lambda logits: nn.functional.normalize(logits.relu() + 0.01, p=1.0, dim=1),
    "log softmax": lambda logits: logits.log_softmax(1),
    "percentages": lambda logits: 100 * logits.softmax(1),
}


@pytest.mark.parametrize("form", PROBABILITIES.values(), ids=PROBABILITIES)
def test_probabilities_are_taken_as_such(form: Callable[[Tensor], Tensor]) -> None:
    model = Net(4, lambda _, logits, __: form(logits))
    wrapped = explainable(model, transform=SMALL)
    with torch.no_grad():
        expected = model(PIXELS)
    expected = expected.exp() if (expected < 0).any() else expected / expected.sum(1, keepdim=True)
    torch.testing.assert_close(own(wrapped), expected, rtol=0, atol=1e-6)
    assert not wrapped.several_labels
    wrapped.explain(PIXELS[0])


ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "clipped": lambda logits: (logits / 6 + 0.5).clamp(0, 1),
    "exponential": lambda logits: (-logits.square()).exp(),
    "squared": lambda logits: logits.sigmoid().square(),
}


@pytest.mark.parametrize("form", ALONE.values(), ids=ALONE)
def test_probabilities_that_stand_alone_are_of_several_labels(form: Callable[[Tensor], Tensor]) -> None:
    model = Net(3, lambda _, logits, __: form(logits), scale=1)
    wrapped = explainable(model, transform=SMALL)
    assert wrapped.several_labels
    assert isinstance(wrapped.attention, BoundedLogitAttention)
    with torch.no_grad():
        torch.testing.assert_close(own(wrapped), model(PIXELS), rtol=0, atol=1e-6)


SCALED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "percentages": (lambda logits: 100 * logits.sigmoid(), "100"),
    "stars": (lambda logits: logits[:, 0].sigmoid() * 5, "5"),
    "clipped": (lambda logits: logits.clamp(0, 6), "6"),
    "votes of ten": (lambda logits: 10 * logits.tanh().square(), "10"),
}


@pytest.mark.parametrize(("form", "most"), SCALED.values(), ids=SCALED)
def test_numbers_that_stay_in_a_range_of_their_own_are_to_be_explained(form: Any, most: str) -> None:
    model = Net(3, lambda _, logits, __: form(logits))
    with pytest.raises(
        ClassifierError, match=rf"numbers that stay from 0 to {most}: pass meaning=.* found / {most} for"
    ):
        explainable(model, transform=SMALL)
    wrapped = explainable(model, transform=SMALL, output=lambda found: found / float(most))
    with torch.no_grad():
        expected = (model(PIXELS) / float(most)).reshape(len(PIXELS), -1)
    given = own(wrapped) if wrapped.several_labels else own(wrapped)[:, 1:]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
    assert not explainable(model, transform=SMALL, meaning="logits").several_labels


@pytest.mark.parametrize("scale", [0.0, 0.01])
def test_logits_that_happen_to_lie_between_0_and_1_are_logits(scale: float) -> None:
    model = Net(3, lambda _, logits, __: logits, scale=scale or 1e-3)
    nn.init.uniform_(model.fc.bias, 0.2, 0.3)
    wrapped = explainable(model, transform=SMALL)
    assert not wrapped.several_labels
    with torch.no_grad():
        torch.testing.assert_close(own(wrapped), model(PIXELS).softmax(1))
    declared = explainable(model, transform=SMALL, meaning="probabilities")
    assert declared.several_labels


def test_an_output_is_bounded_by_its_own_layer_and_not_by_another_that_comes_later() -> None:
    model = Net(3, lambda net, logits, pooled: {"fine": logits, "coarse": net.other(pooled)}, scale=1e-3)
    nn.init.uniform_(model.fc.bias, 0.2, 0.3)
    wrapped = explainable(model, transform=SMALL, output="fine")
    assert not wrapped.several_labels
    with torch.no_grad():
        torch.testing.assert_close(own(wrapped), model(PIXELS)["fine"].softmax(1))


VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda value: value,
    "squeezed": lambda value: value.squeeze(1),
    "bounded": lambda value: 9 * value.tanh(),
}


@pytest.mark.parametrize("form", VALUES.values(), ids=VALUES)
def test_a_regression_says_a_value(form: Callable[[Tensor], Tensor]) -> None:
    model = Net(1, lambda _, value, __: form(value))
    wrapped = explainable(model, transform=SMALL, meaning="value")
    assert (wrapped.classes, wrapped.regression) == (("value",), True)
    with torch.no_grad():
        expected = model(PIXELS).flatten().tolist()
    for value, why in zip(expected, wrapped.explain(PIXELS, check=True), strict=True):
        assert why.classifier is not None
        assert why.classifier.value == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert str(why.classifier) == f"value {value:.4g}"
        assert (why.agrees, why.sizes) == (None, None)
        assert why.check is not None
        assert why.check.about == why.classifier
        assert why.check.lines[0] == f"from these pixels alone: {why.check.kept}"
        assert why.check.kept.value != why.check.removed.value
        assert Explanation.from_dict(why.to_dict()) == why
        assert why.unbounded.max() - why.unbounded.min() > 0.3  # cells that raise the value come first


Pair = namedtuple("Pair", "features scores")


@dataclasses.dataclass
class Answer:
    embedding: Tensor
    scores: Tensor


MIXING = torch.randn(8, 5, generator=torch.Generator().manual_seed(4))
FOUND: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a pair": lambda logits, pooled: (pooled, logits),
    "by name": lambda logits, pooled: {"hidden": pooled, "logits": logits, "auxiliary": logits * 2},
    "named tuple": lambda logits, pooled: Pair(pooled, logits),
    "dataclass": lambda logits, pooled: Answer(pooled, logits),
    "nested": lambda logits, pooled: [{"out": (logits, "a word")}, None],
    "an embedding beside": lambda logits, pooled: {"out": logits, "unit": nn.functional.normalize(pooled @ MIXING)},
    "probabilities beside": lambda logits, pooled: (logits, logits.softmax(1)),
    "probabilities before, and their logarithms": lambda logits, pooled: (logits.softmax(1), logits.log_softmax(1)),
    "map beside": lambda logits, pooled: (pooled[:, :, None, None].expand(-1, -1, 4, 6), logits),
}


@pytest.mark.parametrize("form", FOUND.values(), ids=FOUND)
def test_the_tensor_that_is_meant_is_found(form: Callable[[Tensor, Tensor], Any]) -> None:
    model = Net(5, lambda _, logits, pooled: form(logits, pooled))
    wrapped = explainable(model, transform=SMALL)
    with torch.no_grad():
        torch.testing.assert_close(own(wrapped), model.fc(model.stem(PIXELS).relu().mean((2, 3))).softmax(1))


def test_of_logits_and_their_sigmoids_the_labels_are_meant() -> None:
    model = Net(5, lambda _, logits, __: (logits / 4, (logits / 4).sigmoid()))
    wrapped = explainable(model, transform=SMALL)
    assert wrapped.several_labels
    torch.testing.assert_close(own(wrapped), model(PIXELS)[1].detach())


UNCLEAR: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "logarithms of labels": (nn.functional.logsigmoid, "never above 0 .* found.exp"),
    "and of one": (lambda logits: nn.functional.logsigmoid(logits[:, :1]), "never above 0 .* found.exp"),
    "ordered classes": (lambda logits: logits[:, :1] + torch.tensor([3.0, 1, 0, -2]), "rise and fall together"),
    "one logit twice": (lambda logits: logits[:, [0, 0]], "rise and fall together"),
}


@pytest.mark.parametrize("name", UNCLEAR)
def test_outputs_of_which_a_softmax_says_nothing_are_refused(name: str) -> None:
    form, message = UNCLEAR[name]
    with pytest.raises(ClassifierError, match=f"Net: expected logits .*{message}"):
        explainable(Net(5, lambda _, logits, __: form(logits)), transform=SMALL)


@pytest.mark.parametrize("form", [lambda v: -v.square(), lambda v: -10 * (1 - nn.functional.normalize(v)) - 1])
def test_distances_below_0_are_logits(form: Callable[[Tensor], Tensor]) -> None:
    model = Net(5, lambda _, logits, __: form(logits))
    torch.testing.assert_close(own(explainable(model, transform=SMALL)), model(PIXELS).softmax(1).detach())


@pytest.mark.parametrize(
    ("form", "output", "choice"),
    [
        (lambda net, logits, pooled: (logits, net.other(pooled)), 1, r"output=0 \(5, 5\), output=1 \(5, 5\)"),
        (lambda net, logits, pooled: {"fine": logits, "coarse": net.other(pooled)}, "coarse", "output='coarse'"),
        (lambda net, logits, pooled: {"fine": logits[:, :2], "coarse": net.other(pooled)}, "coarse", "output='fine'"),
        (lambda net, logits, pooled: Answer(logits, net.other(pooled)), "scores", "output='scores'"),
        (
            lambda net, logits, pooled: [(logits, net.other(pooled))],
            lambda found: found[0][1],
            r"output=lambda found: found\[0\]\[1\]",
        ),
    ],
)
def test_of_several_outputs_one_is_to_be_chosen(form: Any, output: Any, choice: str) -> None:
    model = Net(5, form)
    with pytest.raises(
        ClassifierError, match=f"Net: expected one output that may be the logits, got several: .*{choice}"
    ):
        explainable(model, transform=SMALL)
    wrapped = explainable(model, transform=SMALL, output=output)
    with torch.no_grad():
        torch.testing.assert_close(own(wrapped), model.other(model.stem(PIXELS).relu().mean((2, 3))).softmax(1))
    with pytest.raises(ClassifierError, match="expected an output named by output='wrong', got"):
        explainable(model, transform=SMALL, output="wrong")
