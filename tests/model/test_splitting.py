"""Heads recognised by what they do: averages written by hand, several maps, maxima; each read of what is kept alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d as pool2d
from torch.nn.functional import adaptive_max_pool2d as maxima2d
from torch.nn.functional import avg_pool2d as averages2d
from torch.nn.functional import conv2d

import bla
from bla.data.photo import Transform
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable
from bla.model.heads import reads_maps
from bla.model.hooking import HookedHead, HookedTrunk, _Blank, _maps_in
from bla.model.joining import Around, Keeping
from bla.progress import silent
from small import some_photos

HALF = (0.5, 0.5, 0.5)
SMALL = Transform((32, 48), HALF, HALF)
BATCHES = [torch.randn(size, 3, 32, 48, generator=torch.Generator().manual_seed(size)) for size in (1, 2, 5)]
GRID = (4, 6)

Read = Callable[[Any, Tensor, Tensor], Any]


class Net(nn.Module):
    """A 4x6 map of 8 channels, another of 8x12 and 4, and a way to read them."""

    def __init__(self, read: Read, classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.stem = nn.Conv2d(3, 4, 4, 4), nn.Sequential(nn.Conv2d(4, 8, 2, 2), nn.ReLU())
        self.fc, self.two = nn.Linear(8, classes), nn.Linear(12, classes)
        self.twice, self.flat = nn.Linear(16, classes), nn.Linear(8 * 24, classes)
        for layer in (self.fc, self.two, self.twice, self.flat):
            nn.init.normal_(layer.weight, std=2)
        self.read = read

    def forward(self, pixels: Tensor, *inputs: Any, **named: Any) -> Any:
        before = self.fine(pixels)
        self.before = before  # another thread may keep another one here
        return self.read(self, pixels, self.stem(before), *inputs, **named)


def assert_own(wrapped: ExplainableClassifier, model: Callable[[Tensor], Tensor]) -> None:
    """Uniform weights are the classifier's own answer, and what is left out is not read: in any batch and layout."""
    for pixels in BATCHES:
        for layout in (torch.contiguous_format, torch.channels_last):
            with torch.no_grad():
                features = wrapped.trunk(pixels.contiguous(memory_format=layout))
                size = tuple(features.shape[2:])
                weights = torch.full((len(pixels), *size), 1 / (size[0] * size[1]))
                expected = model(pixels)
                torch.testing.assert_close(wrapped.classify(features, weights), expected, rtol=1e-5, atol=1e-5)
                some = torch.zeros_like(weights)
                some[:, 0, :2] = 0.5
                others = torch.where(some[:, None] > 0, features, torch.randn_like(features))
                alone = wrapped.classify(features, some)
                assert torch.equal(wrapped.classify(others, some), alone)
                assert (alone - expected).abs().max() > 1e-3


AVERAGES: dict[str, Read] = {
    "mean": lambda net, x, f: net.fc(f.mean((2, 3))),
    "one mean after the other": lambda net, x, f: net.fc(f.mean(3).mean(2)),
    "of a view": lambda net, x, f: net.fc(f.view(f.size(0), 8, -1).mean(-1)),
    "of a view of the batch's size": lambda net, x, f: net.fc(f.view(x.shape[0], f.shape[1], -1).mean(2)),
    "scaled by a constant made on the way": lambda net, x, f: net.fc(f.mean((2, 3))) * torch.arange(1.0, 6),
    "view by the map's size": lambda net, x, f: net.fc(averages2d(f, GRID).view(f.size(0), -1)),
    "reshape by the photo's size": lambda net, x, f: net.fc(pool2d(f, 1).reshape(x.shape[0], -1)),
    "reshape by len": lambda net, x, f: net.fc(pool2d(f, 1).reshape((f.shape[0], 8))),
    "squeezed": lambda net, x, f: net.fc(pool2d(f, 1).squeeze(-1).squeeze(-1)),
    "squeezed by the map's size": lambda net, x, f: net.fc(averages2d(f, f.shape[2:]).flatten(1)),
    "a sum": lambda net, x, f: net.fc(f.sum((2, 3)) / 24),
    "a sum by the map's size": lambda net, x, f: net.fc(f.sum((2, 3)) / (f.shape[2] * f.shape[3])),
    "sums": lambda net, x, f: net.fc(f.sum(3).sum(2)),
    "einsum": lambda net, x, f: net.fc(torch.einsum("bchw->bc", f) / 24),
    "tokens": lambda net, x, f: net.fc(f.flatten(2).transpose(1, 2).mean(1)),
    "colours last": lambda net, x, f: net.fc(f.permute(0, 2, 3, 1).mean((1, 2))),
    "of logits": lambda net, x, f: conv2d(f, net.fc.weight[:, :, None, None]).mean((2, 3)),
    "a power mean": lambda net, x, f: net.fc(f.clamp(min=1e-3).pow(3).mean((2, 3)).pow(1 / 3)),
    "a power mean of tiny values": lambda net, x, f: net.fc((f - 0.2).clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)),
    "a power mean pooled": lambda net, x, f: net.fc(averages2d(f.clamp(min=1e-3).pow(2), GRID).sqrt().flatten(1)),
    "the logarithm of a mean": lambda net, x, f: net.fc(f.exp().mean((2, 3)).log()),
    "of two maps": lambda net, x, f: net.two(torch.cat([f.mean((2, 3)), net.before.mean((2, 3))], 1)),
    "of two maps pooled": lambda net, x, f: net.two(
        torch.cat([pool2d(each, 1).flatten(1) for each in (f, net.before)], 1)
    ),
    "of a map and its square": lambda net, x, f: net.twice(torch.cat([f.mean((2, 3)), f.square().mean((2, 3))], 1)),
    "by attention": lambda net, x, f: net.fc((f * f[:, :1].flatten(2).softmax(2).reshape(-1, 1, 4, 6)).sum((2, 3))),
    "of members": lambda net, x, f: torch.stack([net.fc(f.mean((2, 3))), net.fc(f.square().mean((2, 3)))]).mean(0),
}  # fmt: skip


@pytest.mark.parametrize("read", AVERAGES.values(), ids=AVERAGES)
def test_an_average_is_one_whatever_makes_it(read: Read) -> None:
    model = Net(read).eval()
    wrapped = explainable(model, transform=SMALL)
    assert not reads_maps(wrapped.head)
    assert not wrapped.note
    assert wrapped.select(BATCHES[1]).hard.shape == (2, *GRID)
    assert_own(wrapped, model)


WHOLE: dict[str, tuple[Read, bool]] = {
    "a view of fixed width": (lambda net, x, f: net.flat(f.view(-1, 192)), False),
    "flattened": (lambda net, x, f: net.flat(torch.flatten(f, 1)), False),
    "a view of a signed map": (lambda net, x, f: net.flat((f - 0.5).view(f.size(0), -1)), True),
    "maximum": (lambda net, x, f: net.fc(f.amax((2, 3))), False),
    "maximum of a signed map": (lambda net, x, f: net.fc((f - 5).flatten(2).max(2).values), False),
    "average and maximum": (lambda net, x, f: net.twice(torch.cat([f.mean((2, 3)), f.amax((2, 3))], 1)), False),
    "average and maximum, signed": (
        lambda net, x, f: net.twice(torch.cat([f.sub(5).mean((2, 3)), maxima2d(f - 5, 1).flatten(1)], 1)),
        False,
    ),
    "minimum and maximum": (lambda net, x, f: net.twice(torch.cat([f.amin((2, 3)), f.amax((2, 3))], 1)), False),
    "log-sum-exp": (lambda net, x, f: net.fc(5 * (f / 5).logsumexp((2, 3))), True),
    "a power mean of what is left": (lambda net, x, f: net.fc(f.flatten(2).norm(p=3.0, dim=2)), True),
}  # fmt: skip


@pytest.mark.parametrize(("read", "approximate"), WHOLE.values(), ids=WHOLE)
def test_what_reads_a_map_otherwise_reads_something_neutral_for_what_is_left_out(read: Read, approximate: bool) -> None:
    model = Net(read).eval()
    wrapped = explainable(model, transform=SMALL)
    assert reads_maps(wrapped.head)
    assert wrapped.note.startswith("approximate: ") == approximate
    assert_own(wrapped, model)
    (why,) = wrapped.explain(BATCHES[0])
    assert why.note == (wrapped.note or None)
    assert str(why).endswith(wrapped.note)


def test_an_average_beside_a_maximum_does_not_shrink_with_what_is_left_out() -> None:
    """Slowly: of two selected cells their own average and maximum, in a map of both signs."""
    model = Net(WHOLE["average and maximum, signed"][0]).eval()
    wrapped = explainable(model, transform=SMALL)
    weights = torch.zeros(2, *GRID)
    weights[:, 1, 2:4] = 0.5
    with torch.no_grad():
        found = wrapped.classify(wrapped.trunk(BATCHES[1]), weights)
        cells = (model.stem(model.fine(BATCHES[1])) - 5)[:, :, 1, 2:4]
        torch.testing.assert_close(found, model.twice(torch.cat([cells.mean(2), cells.amax(2)], 1)))


# Classifiers that cannot be traced run as they are.


def halved_by_content(net: Net, x: Tensor, f: Tensor) -> Tensor:
    return net.fc((f / 2 if x.abs().max() > 1e6 else f).mean((2, 3)))


class Scaled(nn.Module):
    """A classifier that decides by its pixels whether they are to be scaled, in a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Any:
        if float(pixels.max()) > 100:
            pixels = pixels / 255
        return self.model(pixels)


class Ensemble(nn.Module):
    def __init__(self, *models: nn.Module) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.stack([model(pixels) for model in self.models]).mean(0)


def cast_inside(net: Net, x: Tensor, f: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16) if x.abs().max() < 1e6 else contextlib.nullcontext():
        return net.fc(f.mean((2, 3))).float()


def listing(net: Net, x: Tensor, f: Tensor) -> Tensor:
    net.seen = [f, [float(value) for value in f.detach().flatten()[:3]]]
    return net.fc(f.mean((2, 3)))


def numpy_inside(net: Net, x: Tensor, f: Tensor) -> Tensor:
    shift = torch.from_numpy(np.zeros(1, np.float32)) if f.detach().numpy().size else 0
    return net.fc(f.mean((2, 3)) + shift)


EAGER: dict[str, Callable[[], nn.Module]] = {
    "decides by the photo": lambda: Net(halved_by_content),
    "decides by the photo first": lambda: Scaled(Net(AVERAGES["mean"])),
    "keeps values": lambda: Net(listing),
    "NumPy inside": lambda: Net(numpy_inside),
    "a loop that depends on values": lambda: Scaled(nn.Sequential(Net(AVERAGES["squeezed"]))),
    "an ensemble that decides": lambda: Ensemble(Net(halved_by_content), Net(halved_by_content)),
    "two maps that are decided on": lambda: Scaled(Net(AVERAGES["of two maps"])),
    "averaged weights": lambda: torch.optim.swa_utils.AveragedModel(Net(halved_by_content)),
    "tokens": lambda: Scaled(
        nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.Flatten(2), nn.Module(), nn.Identity())[:2].append(Tokens())
    ),
}  # fmt: skip


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, flat: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.norm(flat.mT).mean(1))
        return logits


def innermost(part: nn.Module) -> nn.Module:
    """A trunk or head without what is around it for earlier maps and other meanings."""
    while not hasattr(part, "places") and hasattr(part, "trunk" if hasattr(part, "trunk") else "head"):
        part = part.trunk if hasattr(part, "trunk") else part.head
    return part


@pytest.mark.parametrize("make", EAGER.values(), ids=EAGER)
def test_what_cannot_be_traced_runs_as_it_is(make: Callable[[], nn.Module], capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model = make().eval()
    wrapped = explainable(model, transform=SMALL)
    assert isinstance(innermost(wrapped.trunk), HookedTrunk)
    assert isinstance(innermost(wrapped.head), HookedHead)
    assert_own(wrapped, model)
    assert wrapped.explain(BATCHES[1])[1].classifier is not None
    assert capfd.readouterr().err == ""  # nothing of torch's, which tried to trace it


def test_what_is_hooked_costs_one_pass_and_leaves_other_threads_alone() -> None:
    """Counted: the stem runs once for a forward pass; and while a head runs, another thread may run the trunk."""
    model = Net(halved_by_content)
    wrapped = explainable(model, transform=SMALL)
    passes: list[int] = []
    stem: Any = innermost(wrapped.trunk).get_submodule("model.fine")
    stem.forward.forward = lambda x: (passes.append(len(x)), conv2d(x, model.fine.weight, model.fine.bias, 4))[1]
    wrapped(BATCHES[1])
    assert passes == [2]
    pixels = BATCHES[2]
    with torch.no_grad():
        expected = wrapped(pixels)
        found: list[Tensor] = []
        threads = [threading.Thread(target=lambda: found.append(wrapped(pixels))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.allclose(each, expected, atol=1e-5) for each in found)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.fc = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU()), nn.Linear(8, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.stem(pixels).mean((2, 3)))
        return logits


class Unattached(Plain):
    """As a Lightning module, whose trainer is not there, and which holds what cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    @property
    def trainer(self) -> Any:
        raise RuntimeError("not attached to a trainer")


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Plain().bfloat16()

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self.net(pixels.bfloat16()).float()
        return logits


class UnderAutocast(Plain):
    def forward(self, pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(pixels)


def compiled_in_place() -> nn.Module:
    model = Plain()
    model.compile()
    return model


FORMS: dict[str, Callable[[], nn.Module]] = {
    "scripted": lambda: torch.jit.script(Plain().eval()),
    "traced by torch.jit": lambda: torch.jit.trace(Plain().eval(), BATCHES[1]),
    "compiled": lambda: torch.compile(Plain()),  # type: ignore[dict-item]
    "compiled in place": compiled_in_place,
    "an ensemble of members that decide": lambda: Ensemble(Scaled(Plain()), Scaled(Plain())),
    "averaged weights": lambda: torch.optim.swa_utils.AveragedModel(Plain()),
    "an ensemble": lambda: Ensemble(Plain(), Plain(), Plain()),
    "without its trainer": Unattached,
    "cast inside": Casting,
    "under autocast": UnderAutocast,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_a_classifier_wraps_in_whatever_form_it_comes(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    wrapped = explainable(model, transform=SMALL)
    plain: Any = getattr(model, "_orig_mod", model)
    pixels = BATCHES[1]
    with torch.no_grad():
        expected = getattr(plain, "forward")(pixels).float()  # noqa: B009  not what is compiled
        features = wrapped.trunk(pixels)
        found = wrapped.classify(features, torch.full((2, *GRID), 1 / 24)).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2 if "half precision" in wrapped.note else 1e-5)
    assert wrapped.explain(pixels)[0].classifier is not None


META = torch.randn(1, 5)


@pytest.mark.parametrize("content", [False, True], ids=["traced", "hooks"])
def test_other_inputs_are_passed_along(content: bool) -> None:
    def read(net: Net, x: Tensor, f: Tensor, meta: Tensor, *, scale: float = 1.0) -> Tensor:
        half = content and float(x.max()) > 1e6
        logits: Tensor = scale * net.fc((f / 2 if half else f).mean((2, 3))) + meta
        return logits

    model = Net(read).eval()
    with pytest.raises(ClassifierError, match=r"expected a classifier of pixels .* inputs= for what it takes"):
        explainable(model, transform=SMALL)
    assert_own(explainable(model, transform=SMALL, inputs=(META,)), lambda x: model(x, META.expand(len(x), -1)))
    named = explainable(model, transform=SMALL, inputs={"meta": META, "scale": 2.0})
    assert_own(named, lambda x: model(x, META.expand(len(x), -1), scale=2.0))


LEARNING: dict[str, Callable[[], nn.Module]] = {
    "hooks": lambda: Net(halved_by_content),
    "an ensemble's hooks": EAGER["an ensemble that decides"],
    "a view": lambda: Net(WHOLE["a view of fixed width"][0]),
    "average and maximum": lambda: Net(WHOLE["average and maximum, signed"][0]),
    "a power mean of tiny values": lambda: Net(AVERAGES["a power mean of tiny values"]),
}  # fmt: skip


@pytest.mark.parametrize("make", LEARNING.values(), ids=LEARNING)
def test_what_wraps_is_fitted_and_explains(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    wrapped = explainable(make(), transform=SMALL)
    assert bla.fit(wrapped, some_photos(10), epochs=1, masks=8, cache=tmp_path, report=silent)["images"] == 2
    why = wrapped.explain(some_photos(1), check=True, target=2)[0]
    assert why.check is not None
    assert why.target == 2


def test_a_split_that_is_off_by_more_than_rounding_is_said_and_marked(capsys: pytest.CaptureFixture[str]) -> None:
    """Answers that depend on the number of photos are met as far as they are any."""
    model = Net(lambda net, pixels, map_: net.fc(map_.mean((2, 3))) * (1 + 2e-5 * pixels.shape[0]))
    wrapped = explainable(model, transform=SMALL, name="unsteady")
    expected = "approximate: its answers are met to 7e-05, and differ themselves by 7e-05 with the number of photos"
    assert wrapped.note == expected
    assert capsys.readouterr().err == f"unsteady: {expected}\n"
    assert wrapped.explain(BATCHES[0])[0].note == expected


def test_keys_weighted_over_the_tokens_before_any_query_are_those_of_the_kept() -> None:
    """Linear attention: softmax_n(k) v, of which a query then reads."""
    keys, values = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    keep = torch.tensor([[1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 0, 0]])
    with Keeping(keep.float(), Around(1, 0), torch.float32):
        found = keys.softmax(dim=2).mT @ values
    for image, kept in enumerate(torch.cat([torch.ones(2, 1), keep], dim=1).bool()):
        expected = keys[image][:, kept].softmax(dim=1).mT @ values[image][:, kept]
        torch.testing.assert_close(found[image], expected)


@pytest.mark.parametrize(
    ("shape", "size", "layout", "prefix", "grid"),
    [
        ((2, 16, 24), (64, 64), "tokens", 0, (4, 4)),
        ((2, 21, 1024), (64, 64), "tokens", 5, (4, 4)),
        ((2, 768, 16), (64, 64), "channels, tokens", 0, (4, 4)),
        ((2, 48, 24), (64, 96), "channels, tokens", 0, (4, 6)),
    ],
)
def test_a_row_is_read_as_square_patches(
    shape: tuple[int, ...], size: tuple[int, int], layout: str, prefix: int, grid: tuple[int, int]
) -> None:
    (place,) = _maps_in("unfold", _Blank(shape, (True, False, False), None), size)
    assert (place.layout, place.prefix, place.grid) == (layout, prefix, grid)
    maps = torch.randn(2, place.channels, *grid)
    returned = place.returning(_Blank(shape, (True, False, False), None), maps)
    assert returned.shape == shape
    assert torch.equal(place.map_in(returned, size), maps)


class Keras(nn.Module):
    """Takes pixels (B, h, w, 3); its map has its channels last, or first."""

    def __init__(self, last: bool, branches: bool = False) -> None:
        super().__init__()
        self.net, self.last, self.branches = Plain(), last, branches

    def forward(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        if self.branches and pixels.mean() > 1e9:
            return torch.zeros(len(pixels), 5)
        features = self.net.stem(pixels.permute(0, 3, 1, 2))
        pooled = features.permute(0, 2, 3, 1).mean(dim=(1, 2)) if self.last else features.mean((2, 3))
        logits: Tensor = self.net.fc(pooled)
        return logits * scale


@pytest.mark.parametrize(
    ("model", "inputs"),
    [(Keras(last=True), {}), (Keras(last=False), {}), (Keras(last=True, branches=True), {}), (Keras(last=True), [3.0])],
    ids=["channels last", "channels first", "hooked", "another input"],
)
def test_pixels_whose_colours_come_last_are_given_so(model: Keras, inputs: Any) -> None:
    wrapped = explainable(model, transform=SMALL, inputs=inputs)
    assert_own(wrapped, lambda pixels: model(pixels.permute(0, 2, 3, 1), *inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("place", "layer", "head"),
    [
        ("fc", lambda: torch.ao.nn.quantized.dynamic.Linear(8, 5), None),
        ("stem.0", lambda: torch.ao.nn.quantized.Conv2d(3, 8, 8, 8), None),
        ("stem.0", lambda: torch.ao.nn.quantized.Conv2d(3, 8, 8, 8), 2),
    ],
    ids=["the head", "the trunk", "the trunk, with a new head"],
)
def test_what_is_quantised_is_refused_as_such(place: str, layer: Callable[[], nn.Module], head: int | None) -> None:
    model = Plain().eval()
    model.set_submodule(place, layer())
    with pytest.raises(ClassifierError, match=r"got one with quantised layers .*: wrap it before it is quantised"):
        explainable(model, transform=SMALL, head=head)


@pytest.mark.parametrize("filled", [False, True])
def test_classes_that_are_ruled_out_are_told_from_broken_weights(filled: bool) -> None:
    out = torch.tensor([False, True, False, True, False])

    def read(net: Net, x: Tensor, f: Tensor) -> Tensor:
        logits: Tensor = net.fc(f.mean((2, 3)))
        return logits.masked_fill(out, -torch.inf) if filled else logits + torch.zeros(5).masked_fill(out, -torch.inf)

    with pytest.raises(ClassifierError, match=r"-inf for 2 of 5 classes, .*: leave these out, by output="):
        explainable(Net(read), transform=SMALL)
    wrapped = explainable(Net(read), transform=SMALL, output=lambda logits: logits[:, ~out], classes="abc")
    assert wrapped.explain(BATCHES[0])[0].classifier is not None


def test_a_machine_without_memory_is_not_called_a_faulty_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr("bla.model.own_prediction.OwnPredictionAttention.forward", exhausted)
    reason = "CUDA out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        explainable(Plain(), transform=SMALL)
    reason = "does not require grad"
    with pytest.raises(ClassifierError, match=r"head with gradients, .* got .*require grad: pass attention="):
        explainable(Plain(), transform=SMALL)
