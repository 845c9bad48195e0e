"""Which situations of users are handled, and how exactly: classifiers, what their output means, what they are shown.

    python -m benchmarks.models.situations > runs/situations.csv

Each is a small classifier at random weights that reads a map in its own way, comes in its own form, or answers in its
own; or a way to pass photos and classes. The table holds how far the probabilities of the wrapped classifier, from all
cells, are from its own, in batches of one, two and five, and what is said where explanations are approximate.
"""

from __future__ import annotations

import csv
import functools
import io
import operator
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import bla
from benchmarks.models.inputs import arrays, preprocessing
from bla.data.photo import Transform
from bla.model.classifier import ClassifierError, explainable
from bla.model.evidence import from_all

SIZE = (32, 48)
SMALL = Transform(SIZE, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ONES = torch.ones(5, 4)
BATCHES = [torch.randn(size, 3, *SIZE, generator=torch.Generator().manual_seed(size)) for size in (1, 2, 5)]


class Net(nn.Module):
    """A 4x6 map of 8 channels, an earlier one of 8x12 and 4, and a way to read them."""

    def __init__(self, read: Callable[..., Any], classes: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fine, self.stem = nn.Conv2d(3, 4, 4, 4), nn.Sequential(nn.Conv2d(4, 8, 2, 2), nn.ReLU())
        self.fc, self.two = nn.Linear(8, classes), nn.Linear(12, classes)
        self.twice, self.flat, self.rnn = (
            nn.Linear(16, classes),
            nn.Linear(192, classes),
            nn.LSTM(8, 8, batch_first=True),
        )
        for layer in (self.fc, self.two, self.twice, self.flat):
            nn.init.normal_(layer.weight, std=2)
        self.read = read

    def forward(self, pixels: Tensor, *inputs: Any) -> Any:
        self.before = self.fine(pixels)
        return self.read(self, pixels, self.stem(self.before), *inputs)


class Around(nn.Module):
    """A classifier in another module, whose code may decide by values."""

    def __init__(self, call: Callable[[nn.ModuleList, Tensor], Any], *models: nn.Module) -> None:
        super().__init__()
        self.call, self.models = call, nn.ModuleList(models)

    def forward(self, pixels: Tensor) -> Any:
        return self.call(self.models, pixels)


class Situation(NamedTuple):
    """A classifier and how it is wrapped; ``expected`` makes probabilities of what it returns."""

    kind: str
    name: str
    make: Callable[[], nn.Module]
    options: dict[str, Any] = {}  # noqa: RUF012
    expected: Callable[[Any], Tensor] = lambda logits: logits.softmax(-1)


def mean(net: Any, x: Tensor, f: Tensor) -> Tensor:
    logits: Tensor = net.fc(f.mean((2, 3)))
    return logits


def pooled(f: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(f, 1)


def together(models: nn.ModuleList, x: Tensor) -> Tensor:
    return torch.stack([model(x) for model in models]).mean(0)


def scaled(models: nn.ModuleList, x: Tensor) -> Any:
    return models[0](x / 255 if float(x.max()) > 1e3 else x)


def deciding(net: Any, x: Tensor, f: Tensor) -> Tensor:
    logits: Tensor = net.fc((f / 2 if float(x.abs().max()) > 1e6 else f).mean((2, 3)))
    return logits


def autocast(net: Any, x: Tensor, f: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return mean(net, x, f)


def locked() -> nn.Module:
    model = Net(mean)
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


def keeping() -> nn.Module:
    model = Net(mean)
    model(BATCHES[0]).sum().backward()
    return model


def compiled_in_place() -> nn.Module:
    model = Net(mean)
    model.compile()
    return model


def sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def weight_normed() -> nn.Module:
    model = sequential()
    nn.utils.parametrizations.weight_norm(model[4])
    return model


class Tokens(nn.Module):
    """A transformer with a class token before or behind the patches, and a way to read it."""

    def __init__(self, read: Callable[[Tensor], Tensor], *, last: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.token = nn.Conv2d(3, 16, 8, 8), nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.fc, self.read, self.last = nn.Linear(16, 5), read, last

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patches(pixels).flatten(2).mT
        token = self.token.expand(len(patches), -1, -1)
        tokens = torch.cat([patches, token] if self.last else [token, patches], dim=1)
        logits: Tensor = self.fc(self.read(self.block(tokens)))
        return logits


def beyond(logit: Tensor) -> Tensor:
    both: Tensor = torch.cat([(-logit).sigmoid(), logit.sigmoid()], dim=1)
    return both


READS: dict[str, Callable[..., Any]] = {
    "mean": mean,
    "one mean after the other": lambda n, x, f: n.fc(f.mean(3).mean(2)),
    "view by the batch size": lambda n, x, f: n.fc(functional.avg_pool2d(f, (4, 6)).view(f.size(0), -1)),
    "reshape by the input's batch size": lambda n, x, f: n.fc(pooled(f).reshape(x.shape[0], -1)),
    "mean of a view": lambda n, x, f: n.fc(f.view(f.size(0), 8, -1).mean(-1)),
    "squeeze": lambda n, x, f: n.fc(pooled(f).squeeze(-1).squeeze(-1)),
    "sum": lambda n, x, f: n.fc(f.sum((2, 3)) / 24),
    "einsum": lambda n, x, f: n.fc(torch.einsum("bchw->bc", f) / 24),
    "tokens' mean": lambda n, x, f: n.fc(f.flatten(2).mT.mean(1)),
    "channels last": lambda n, x, f: n.fc(f.permute(0, 2, 3, 1).mean((1, 2))),
    "mean of logit maps": lambda n, x, f: functional.conv2d(f, n.fc.weight[:, :, None, None]).mean((2, 3)),
    "generalised mean": lambda n, x, f: n.fc((f - 0.2).clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3)),
    "generalised mean of norms": lambda n, x, f: n.fc(f.flatten(2).norm(p=3.0, dim=2)),
    "log mean exp": lambda n, x, f: n.fc(f.exp().mean((2, 3)).log()),
    "log-sum-exp": lambda n, x, f: n.fc(f.logsumexp((2, 3))),
    "two maps": lambda n, x, f: n.two(torch.cat([f.mean((2, 3)), n.before.mean((2, 3))], 1)),
    "map and its square": lambda n, x, f: n.twice(torch.cat([f.mean((2, 3)), f.square().mean((2, 3))], 1)),
    "mean and deviation": lambda n, x, f: n.twice(torch.cat([f.mean((2, 3)), f.std((2, 3))], 1)),
    "attention pooling": lambda n, x, f: n.fc((f * f[:, :1].flatten(2).softmax(2).reshape(-1, 1, 4, 6)).sum((2, 3))),
    "view of fixed width": lambda n, x, f: n.flat(f.view(-1, 192)),
    "flatten": lambda n, x, f: n.flat(f.flatten(1)),
    "flatten, signed": lambda n, x, f: n.flat((f - 0.5).flatten(1)),
    "maximum": lambda n, x, f: n.fc(f.amax((2, 3))),
    "maximum, signed": lambda n, x, f: n.fc((f - 5).amax((2, 3))),
    "average and maximum": lambda n, x, f: n.twice(torch.cat([f.mean((2, 3)), f.amax((2, 3))], 1)),
    "average and maximum, signed": lambda n, x, f: n.twice(torch.cat([(f - 5).mean((2, 3)), (f - 5).amax((2, 3))], 1)),
    "the four largest": lambda n, x, f: n.fc(f.flatten(2).topk(4, dim=2).values.mean(2)),
    "recurrent": lambda n, x, f: n.fc(n.rnn(f.flatten(2).mT)[0][:, -1]),
    "also the photo": lambda n, x, f: mean(n, x, f) + x[:, 0, 0, :5],
    "also the batch": lambda n, x, f: mean(n, x, f) + f.mean(),
    "at random": lambda n, x, f: n.fc(functional.dropout(f.mean((2, 3)), training=True)),
    "layer norm over channels": lambda n, x, f: n.fc(functional.layer_norm(f.movedim(1, -1), (8,)).mean((1, 2))),
    "layer norm after the mean": lambda n, x, f: n.fc(functional.layer_norm(f.mean((2, 3)), (8,))),
    "cosine": lambda n, x, f: 30 * functional.linear(functional.normalize(f.mean((2, 3))), n.fc.weight),
    "distance to prototypes": lambda n, x, f: -torch.cdist(f.mean((2, 3)), n.fc.weight),
    "bilinear": lambda n, x, f: (f.flatten(2) @ f.flatten(2).mT).flatten(1)[:, :40].reshape(-1, 5, 8).mean(2) / 24,
    "mean and pyramid": lambda n, x, f: n.twice(torch.cat([f.mean((2, 3)), f[:, :, ::2, ::3].amax(2).mean(2)], 1)),
    "median": lambda n, x, f: n.fc(f.flatten(2).median(2).values),
}  # fmt: skip
INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "padded": lambda x: functional.pad(x, (16, 16, 16, 16)),
    "padded to a square": lambda x: functional.pad(x, (0, 0, 8, 8)),
    "cropped": lambda x: x[:, :, 8:-8, 8:-8],
    "resized": lambda x: functional.interpolate(x, size=(64, 96), mode="bilinear"),
    "normalised": lambda x: (x - 0.1) / 0.3,
    "mirrored": lambda x: x.flip(-1),
    "turned": lambda x: x.mT,
}


def structures() -> Iterator[Situation]:
    """How the map is read, and the form in which the classifier comes."""
    for name, read in READS.items():
        yield Situation("head", name, lambda read=read: Net(read))
    for name, change in INSIDE.items():
        yield Situation("inside", name, lambda change=change: Around(lambda m, x: m[0](change(x)), Net(mean)))
    both: Callable[..., Any] = lambda m, x: m[0](x) + m[0](x.flip(-1))  # noqa: E731
    yield Situation("inside", "also mirrored", lambda: Around(both, Net(mean)))
    yield Situation("head", "no map at all", lambda: nn.Sequential(nn.Flatten(), nn.Linear(4608, 8), nn.Linear(8, 5)))
    for last in (False, True):
        where = "behind" if last else "before"
        place = -1 if last else 0
        make = functools.partial(Tokens, operator.itemgetter((slice(None), place)), last=last)
        yield Situation("transformer", f"class token {where}", make)
    yield Situation("transformer", "class token and mean", lambda: Tokens(lambda t: t[:, 0] + t[:, 1:].mean(1)))
    yield Situation("transformer", "mean of all", lambda: Tokens(lambda t: t.mean(1)))
    meta = torch.randn(1, 5)
    forms: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "decides by values": (lambda: Net(deciding), {}),
        "decides by values first": (lambda: Around(scaled, Net(mean)), {}),
        "ensemble": (lambda: Around(together, Net(mean), Net(mean)), {}),
        "ensemble that decides": (lambda: Around(together, Net(deciding), Net(deciding)), {}),
        "averaged weights": (lambda: torch.optim.swa_utils.AveragedModel(Net(mean)), {}),
        "TorchScript": (lambda: torch.jit.script(sequential().eval()), {}),
        "torch.jit.trace": (lambda: torch.jit.trace(sequential().eval(), BATCHES[1]), {}),
        "compiled": (lambda: torch.compile(Net(mean)), {}),
        "compiled in place": (compiled_in_place, {}),
        "keeps activations": (keeping, {}),
        "holds a lock": (locked, {}),
        "DataParallel": (lambda: nn.DataParallel(Net(mean)), {}),
        "float64": (lambda: Net(mean).double(), {}),
        "bfloat16": (lambda: Net(mean).bfloat16(), {}),
        "casts inside": (lambda: Around(lambda m, x: m[0](x.bfloat16()).float(), Net(mean).bfloat16()), {}),
        "autocast inside": (lambda: Net(autocast), {}),
        "weight norm": (weight_normed, {}),
        "a second input": (lambda: Net(lambda n, x, f, m=meta: mean(n, x, f) + m), {"inputs": (meta,)}),
        "named parts": (sequential, {"parts": (lambda model, x: model[:2](x), "4")}),
    }  # fmt: skip
    for name, (make, options) in forms.items():
        yield Situation("form", name, make, options)


def outputs() -> Iterator[Situation]:
    """What an answer means, and where it is."""
    binary: dict[str, Callable[[Tensor], Tensor]] = {
        "one logit": lambda v: v, "one logit, squeezed": lambda v: v.squeeze(), "one sigmoid": torch.sigmoid,
        "one sigmoid by hand": lambda v: 1 / (1 + (-v).exp()),
    }  # fmt: skip
    for name, form in binary.items():
        expected = beyond if "logit" in name else (lambda p: torch.cat([1 - p, p], 1))
        make = lambda form=form: Net(lambda n, x, f: form(mean(n, x, f)), 1)  # noqa: E731
        yield Situation("output", name, make, {}, lambda v, e=expected: e(v.reshape(-1, 1)))
    answers: dict[str, tuple[Callable[[Tensor], Any], dict[str, Any], Callable[[Any], Tensor]]] = {
        "softmax": (lambda v: v.softmax(1), {}, lambda p: p),
        "log softmax": (lambda v: v.log_softmax(1), {}, lambda p: p.exp()),
        "sigmoids": (lambda v: (v / 9).sigmoid(), {}, lambda p: p),
        "percentages": (lambda v: 100 * v.softmax(1), {}, lambda p: p / 100),
        "percentages, each alone": (lambda v: 100 * v.sigmoid(), {}, lambda p: p / 100),
        "percentages, divided": (lambda v: 100 * (v / 9).sigmoid(), {"output": lambda p: p / 100}, lambda p: p / 100),
        "an embedding beside": (lambda v: (v, functional.normalize(v @ ONES)), {}, lambda r: r[0].softmax(1)),
        "sigmoid of logits, declared": (lambda v: v / 9, {"several_labels": True}, torch.sigmoid),
        "a tuple": (lambda v: (v, "more"), {}, lambda r: r[0].softmax(1)),
        "a dictionary": (lambda v: {"logits": v, "twice": 2 * v}, {}, lambda r: r["logits"].softmax(1)),
        "two alike": (lambda v: (v, 2 * v), {}, lambda r: r[0].softmax(1)),
        "two alike, named": (lambda v: (v, 2 * v), {"output": 1}, lambda r: r[1].softmax(1)),
        "a map of one": (lambda v: v[:, :, None, None], {}, lambda r: r.flatten(1).softmax(1)),
        "squeezed": (lambda v: v.squeeze(), {}, lambda r: r.reshape(-1, 5).softmax(1)),
        "a dense map": (lambda v: v[:, :, None, None].expand(-1, -1, 4, 6), {}, lambda r: r.mean((2, 3)).softmax(1)),
    }  # fmt: skip
    for name, (form, options, expected) in answers.items():
        yield Situation("output", name, lambda form=form: Net(lambda n, x, f: form(mean(n, x, f))), options, expected)


@torch.no_grad()
def tried(situation: Situation) -> dict[str, Any]:
    """How far the wrapped probabilities are from the classifier's own, or why it is refused."""
    with torch.enable_grad():
        model = situation.make().eval()
    try:
        wrapped = explainable(model, transform=SMALL, **situation.options)
    except ClassifierError as error:
        return {"result": "refused", "why": str(error)}
    miss = 0.0
    own = getattr(model, "_orig_mod", getattr(model, "module", model))
    for pixels in BATCHES:
        pixels = pixels.to(next(wrapped.attention.parameters()))  # noqa: PLW2901
        inputs = [each.expand(len(pixels), -1) for each in situation.options.get("inputs", ())]
        expected = situation.expected(own(pixels, *inputs)).double()
        logits = from_all(wrapped.head, wrapped.trunk(pixels)).double()
        found = logits.sigmoid() if wrapped.several_labels else logits.softmax(-1)
        miss = max(miss, float((found - expected).abs().max()))
    if wrapped.explains:
        with torch.enable_grad():
            wrapped.explain(BATCHES[1])
    return {"result": "approximate" if wrapped.note else "exact", "miss": f"{miss:.0e}", "why": wrapped.note}


def questions() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Ways to pass photos and classes: kind, name and call."""
    wrapped = explainable(Net(mean), transform=SMALL)
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    photo.save(stream := io.BytesIO(), "PNG")
    pixels, data = BATCHES[1], stream.getvalue()
    sources: dict[str, Any] = {
        "a Pillow image": photo, "an array": np.array(photo), "bytes": data, "an open file": io.BytesIO(data),
        "normalised pixels": pixels, "pixels and labels": (pixels, [0, 1]),
        "a data set": TensorDataset(pixels, torch.tensor([0, 1])),
        "a loader": DataLoader(TensorDataset(pixels, torch.tensor([0, 1])), batch_size=2),
        "rows": [{"image": photo, "label": 1}], "rows of bytes": [{"image": {"bytes": data, "path": None}}],
        "a grey photo": photo.convert("L"), "a photo of floats": np.array(photo) / 255,
    }  # fmt: skip
    for name, source in sources.items():
        yield "source", name, lambda source=source: wrapped.explain(source)
    targets: dict[str, Any] = {
        "an index": 1, "a name": "class 1", "a NumPy integer": np.int64(1), "a tensor": torch.tensor(1),
        "one for each": [0, 1], "None among them": [None, 1], "an array": np.array([0, 1]),
    }  # fmt: skip
    for name, target in targets.items():
        yield "target", name, lambda target=target: wrapped.explain(pixels, target=target)


def main() -> None:
    """Print the table as CSV, and how many are handled."""
    warnings.simplefilter("ignore")  # of torch, about itself
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["kind", "situation", "result", "probabilities differ by", "what is said"])
    counts: Counter[str] = Counter()
    for situation in (*structures(), *outputs()):
        found = tried(situation)
        counts[found["result"]] += 1
        table.writerow([situation.kind, situation.name, found["result"], found.get("miss", ""), found["why"]])
    for kind, name, ask in questions():
        try:
            ask()
            result, why = "exact", ""
        except bla.BlaError as error:
            result, why = "refused", str(error)
        counts[result] += 1
        table.writerow([kind, name, result, "", why])
    for kind, name, measure in (*arrays(), *preprocessing()):
        try:
            missed, why = measure(), ""
            result = "exact" if missed <= 1e-5 else "wrong"
        except bla.BlaError as error:
            result, missed, why = "refused", 0.0, str(error)
        counts[result] += 1
        table.writerow([kind, name, result, f"{missed:.0e}" if result != "refused" else "", why])
    print(f"{sum(counts.values())} situations: {dict(counts)}", file=sys.stderr)


if __name__ == "__main__":
    main()
