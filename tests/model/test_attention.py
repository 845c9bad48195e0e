"""Attention modules: against slow loops over the paper's formulas, live starts, modes, what the head reads."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bla.model.attention import Attention, BoundedLogitAttention, L2XAttention, Selection
from bla.model.classifier import ExplainableClassifier
from bla.model.heads import weighted_sum

SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"threshold": 0.1},
    {"threshold": "auto"},
    {"gate": True},
    {"hidden": (6,)},
    {"hidden": (6, 3), "threshold": "auto"},
    {"context": True},
    {"context": True, "hidden": (5,), "gate": True},
]
settings = pytest.mark.parametrize("setting", SETTINGS, ids=str)
SHAPES = [(1, 4, 2, 3), (3, 4, 3, 2), (2, 4, 1, 5), (2, 4, 1, 1)]
STARTS: list[dict[str, Any]] = [{}, {"hidden": (64,)}, {"context": True}, {"hidden": (64,), "context": True}]


def spread_out(module: Attention, seed: int = 0) -> None:
    """Weights under which some cells are clipped and others are not."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layers_of(module: Attention) -> list[nn.Conv2d]:
    return [layer for layer in module.score.modules() if isinstance(layer, nn.Conv2d)]


def slow_scores(module: Attention, features: Tensor) -> list[list[list[float]]]:
    """u[image][row][column], multiplication by multiplication."""
    convolutions = [
        (conv.weight[:, :, 0, 0].tolist(), conv.bias.tolist())
        for conv in layers_of(module)
        if conv.bias is not None
    ]  # fmt: skip
    found = []
    for image in features.tolist():
        channels, height, width = len(image), len(image[0]), len(image[0][0])
        added = [0.0] * channels
        if module.context is not None:
            pooled = [sum(map(sum, plane)) / (height * width) for plane in image]
            rows, biases = module.context.weight.tolist(), module.context.bias.tolist()
            added = [
                sum(w * p for w, p in zip(row, pooled, strict=True)) + b for row, b in zip(rows, biases, strict=True)
            ]
        grid = []
        for y in range(height):
            line = []
            for x in range(width):
                cell = [image[channel][y][x] + added[channel] for channel in range(channels)]
                for depth, (weights, biases) in enumerate(convolutions):
                    cell = [
                        sum(w * value for w, value in zip(row, cell, strict=True)) + bias
                        for row, bias in zip(weights, biases, strict=True)
                    ]
                    if depth < len(convolutions) - 1:
                        cell = [max(value, 0.0) for value in cell]
                (u,) = cell
                line.append(u)
            grid.append(line)
        found.append(grid)
    return found


def slow_selection(u: list[list[float]], setting: dict[str, Any]) -> tuple[list[float], list[float], list[float]]:
    z = [-max(value, 0.0) for line in u for value in line]
    at_best = [value == max(z) for value in z]
    temperature = setting.get("temperature", 0.1)
    exponentials = [math.exp(temperature * value) for value in z]
    if setting.get("gate"):
        return z, [e / (1 + e) for e in exponentials], [float(best) for best in at_best]
    threshold = setting.get("threshold", 0.0)
    gamma = 0.98 / len(z) if threshold == "auto" else threshold
    soft = [max(e / sum(exponentials) - gamma, 0.0) for e in exponentials]
    return z, soft, [best / sum(at_best) for best in at_best]


@settings
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_is_the_papers(setting: dict[str, Any], shape: tuple[int, ...]) -> None:
    module = BoundedLogitAttention(4, **setting).double()
    spread_out(module)
    features = randn(*shape, dtype=torch.float64)
    selection = module(features)
    assert all(values.shape == (shape[0], *shape[2:]) for values in selection[:4])
    for image, u in enumerate(slow_scores(module, features)):
        assert selection.unbounded[image].flatten().tolist() == pytest.approx([-value for line in u for value in line])
        for values, expected in zip(selection[1:4], slow_selection(u, setting), strict=True):
            assert values[image].flatten().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_map_worked_out_by_hand() -> None:
    module = BoundedLogitAttention(2)
    with torch.no_grad():
        module.score.weight.copy_(torch.tensor([1.0, -2.0]).reshape(1, 2, 1, 1))  # type: ignore[operator]
        module.score.bias.fill_(0.5)  # type: ignore[operator, union-attr]
    first, second = [[1.0, 0.0, 3.0], [0.0, 2.0, 1.0]], [[2.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    selection = module(torch.tensor([[first, second]]))
    # u = first - 2 second + 0.5
    assert selection.unbounded.tolist() == [[[2.5, -0.5, -3.5], [1.5, -2.5, 0.5]]]
    assert selection.scores.tolist() == [[[0, -0.5, -3.5], [0, -2.5, 0]]]
    third = pytest.approx(1 / 3)
    assert selection.hard.tolist() == [[[third, 0, 0], [third, 0, third]]]


def test_the_default_score_is_one_convolution_to_one_channel() -> None:
    module = BoundedLogitAttention(7)
    assert type(module.score) is nn.Conv2d
    assert (module.score.in_channels, module.score.out_channels, module.score.kernel_size) == (7, 1, (1, 1))
    assert dict(module.named_parameters()).keys() == {"score.weight", "score.bias"}
    assert (module.temperature, module.threshold) == (0.1, 0.0)
    assert isinstance(module(randn(2, 7, 3, 4)), Selection)
    assert "temperature=0.1, threshold=0.0" in repr(module)


@settings
def test_a_batch_is_its_images(setting: dict[str, Any]) -> None:
    module = BoundedLogitAttention(4, **setting).double()
    spread_out(module)
    features = randn(5, 4, 3, 2, dtype=torch.float64)
    whole = module(features)
    for index in range(5):
        for together, alone in zip(whole[:4], module(features[index : index + 1])[:4], strict=True):
            torch.testing.assert_close(together[index : index + 1], alone)
    assert all(values.shape == (0, 3, 2) for values in module(features[:0])[:4])


@settings
def test_memory_layout_makes_no_difference(setting: dict[str, Any]) -> None:
    module = BoundedLogitAttention(4, **setting)
    spread_out(module)
    features = randn(3, 4, 5, 3)
    laid_out = features.to(memory_format=torch.channels_last)
    for plain, last in zip(module(features)[:4], module(laid_out)[:4], strict=True):
        torch.testing.assert_close(plain, last)


@settings
def test_size_gives_exactly_so_many_cells(setting: dict[str, Any]) -> None:
    module = BoundedLogitAttention(4, **setting)
    spread_out(module)
    features = randn(6, 4, 3, 5)
    free = module(features)
    ranked = free.unbounded.flatten(1).sort(descending=True).values
    for size in range(1, 16):
        selection = module(features, size=size)
        assert (selection.hard.count_nonzero(dim=(1, 2)) == size).all()
        expected = float(size) if setting.get("gate") else 1.0
        assert selection.hard.sum(dim=(1, 2)).tolist() == pytest.approx([expected] * 6)
        assert torch.equal(selection.unbounded, free.unbounded)
        assert torch.equal(selection.scores == 0, selection.hard > 0)
        chosen = selection.hard > 0
        assert torch.equal(free.unbounded.where(chosen, math.inf).flatten(1).amin(1), ranked[:, size - 1])
    tied = module(torch.zeros(1, 4, 3, 5), size=4)
    assert (tied.hard > 0).flatten().tolist() == [True] * 4 + [False] * 11


@pytest.mark.parametrize("module", [BoundedLogitAttention(4), L2XAttention(4)], ids=["bla", "l2x"])
def test_wrong_shapes_and_sizes_are_refused(module: Attention) -> None:
    for shape in ((4, 3, 3), (2, 5, 3, 3), (2, 3, 3, 4), (2, 4, 9), (2, 4, 0, 3), (1, 2, 4, 3, 3)):
        with pytest.raises(ValueError, match=r"features of shape \(batch, 4, height, width\), got \("):
            module(torch.zeros(shape))
    for size in (0, -2, 10):
        with pytest.raises(ValueError, match=f"size from 1 to 9, the number of items, got {size}"):
            module(torch.zeros(2, 4, 3, 3), size=size)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0, got 0.0"),
        ({"temperature": -1}, "temperature > 0, got -1"),
        ({"temperature": math.nan}, "temperature > 0, got nan"),
        ({"threshold": -0.1}, r"a number in \[0, 1\), got -0.1"),
        ({"threshold": 1.0}, r"a number in \[0, 1\), got 1.0"),
        ({"threshold": math.nan}, r"a number in \[0, 1\), got nan"),
        ({"threshold": "most"}, "threshold 'auto' or a number"),
        ({"threshold": 0.02, "gate": True}, "no threshold with the sigmoid gate"),
        ({"threshold": "auto", "gate": True}, "no threshold with the sigmoid gate"),
    ],
)
def test_contradictory_settings_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BoundedLogitAttention(4, **setting)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"size": 0}, "size > 0, got 0"),
        ({"temperature": 0}, "temperature > 0, got 0"),
        ({"variant": "best"}, "variant 'official' or 'corrected', got 'best'"),
    ],
)
def test_contradictory_settings_of_l2x_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        L2XAttention(4, **setting)


# The start.


@pytest.mark.parametrize("setting", STARTS, ids=str)
def test_starts_alive_on_activations(setting: dict[str, Any]) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        module = BoundedLogitAttention(160, **setting)
        u = -module(nn.functional.relu6(torch.randn(4, 160, 7, 5))).unbounded
        assert u.min() >= 0.5, seed
        assert u.max() <= 1.5, seed


@pytest.mark.parametrize("setting", STARTS, ids=str)
@pytest.mark.parametrize("sign", ["positive", "both", "negative"])
def test_calibrate_starts_at_the_scale_of_the_features(setting: dict[str, Any], sign: str) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        # float64: where the biases of hidden layers outweigh small features, float32 would round the median off
        module = BoundedLogitAttention(32, **setting).double()
        features = 10 ** (-3 + 7 * seed / 19) * torch.randn(4, 32, 3, 5, dtype=torch.float64)
        if sign != "both":
            features = features.abs() * (1 if sign == "positive" else -1)
        module.calibrate(features)
        u = -module(features).unbounded
        assert u.median().item() == pytest.approx(0, abs=1e-9)
        assert u.std(correction=0).item() == pytest.approx(0.1)
        assert (u > 0).sum().item() == pytest.approx(u.numel() / 2, abs=1)
        assert (module.float()(features.float()).unbounded < 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("setting", STARTS, ids=str)
def test_calibrate_leaves_no_module_dead_where_most_cells_are_alike(setting: dict[str, Any]) -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        module = BoundedLogitAttention(16, **setting)
        features = torch.zeros(2, 16, 5, 5)
        features[:, :, 2, 2] = torch.rand(2, 16)
        module.calibrate(features)
        assert (module(features).unbounded < 0).any(), seed
        gradient_of_score(module, features)


def test_calibrate_where_all_cells_are_alike() -> None:
    for features in (torch.zeros(2, 8, 3, 3), randn(1, 8, 1, 1).expand(2, 8, 3, 3), torch.full((2, 8, 3, 3), 1e4)):
        module = BoundedLogitAttention(8)
        module.calibrate(features)
        assert (-module(features).unbounded).flatten().tolist() == pytest.approx([0.1] * 18, abs=5e-3)


def test_calibrate_again_changes_nothing() -> None:
    module, features = BoundedLogitAttention(8), randn(4, 8, 3, 3)
    module.calibrate(features)
    before = copy.deepcopy(module.state_dict())
    module.calibrate(features)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


def test_calibrate_refuses_broken_features_and_stays_as_it_was() -> None:
    module = BoundedLogitAttention(4)
    before = copy.deepcopy(module.state_dict())
    for broken in (math.nan, math.inf):
        features = torch.zeros(2, 4, 3, 3)
        features[1, 2, 0, 1] = broken
        with pytest.raises(ValueError, match="expected finite features, got NaN or infinity"):
            module.calibrate(features)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def gradient_of_score(module: Attention, features: Tensor) -> Tensor:
    """Of a random price on what the head reads, with respect to the last layer of the score; checked to be alive."""
    read = weighted_sum(features, module(features).soft)
    module.zero_grad()
    (read * randn(*read.shape, seed=9)).sum().backward()  # type: ignore[no-untyped-call]
    gradient = layers_of(module)[-1].weight.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    return gradient


@settings
@pytest.mark.parametrize("calibrated", [False, True])
def test_gradients_flow_at_the_start(setting: dict[str, Any], calibrated: bool) -> None:
    torch.manual_seed(0)
    if setting.get("threshold") == 0.1:
        setting = {"threshold": 0.02}  # 0.1 takes off all of the 15 weights at a start that is nearly uniform
    module = BoundedLogitAttention(16, **setting)
    features = torch.rand(4, 16, 3, 5)
    if calibrated:
        module.calibrate(features)
    gradient_of_score(module, features)
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_gradients_flow_through_l2x(variant: Any) -> None:
    gradient_of_score(L2XAttention(16, size=3, variant=variant), randn(4, 16, 3, 5))


def test_gradients_are_exact() -> None:
    module = BoundedLogitAttention(3, threshold="auto", hidden=(4,), context=True).double()
    spread_out(module)
    features = randn(2, 3, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda values: module(values).soft, features)


# A module among others.


@pytest.mark.parametrize(
    "make",
    [lambda: BoundedLogitAttention(4, hidden=(3,), context=True), lambda: L2XAttention(4, size=2)],
    ids=["bla", "l2x"],
)
def test_state_and_copies_round_trip(make: Any, tmp_path: Path) -> None:
    module, other = make().eval(), make().eval()
    spread_out(module)
    features = randn(2, 4, 3, 3)
    expected = module(features)
    torch.save(module.state_dict(), tmp_path / "module.pt")
    other.load_state_dict(torch.load(tmp_path / "module.pt", weights_only=True))
    twin = copy.deepcopy(module)
    for again in (other(features), twin(features)):
        assert all(torch.equal(values, same) for values, same in zip(expected[:4], again[:4], strict=True))
    spread_out(twin, seed=1)
    assert all(torch.equal(values, same) for values, same in zip(expected[:4], module(features)[:4], strict=True))


@settings
def test_autocast_to_bfloat16(setting: dict[str, Any]) -> None:
    torch.manual_seed(0)
    if setting.get("threshold") == 0.1:
        setting = {"threshold": 0.02}
    module, features = BoundedLogitAttention(16, **setting), torch.rand(4, 16, 3, 5)
    exact = module(features)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = module(features)
        read = weighted_sum(features, narrow.soft)
    read.float().square().sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(narrow.unbounded.float(), exact.unbounded, rtol=0.03, atol=0.03)
    torch.testing.assert_close(narrow.soft.float(), exact.soft, rtol=0.05, atol=2e-3)
    total = narrow.hard.float().sum(dim=(1, 2))
    counted = narrow.hard.count_nonzero(dim=(1, 2)).float()
    torch.testing.assert_close(total, counted if setting.get("gate") else torch.ones(4), rtol=0.02, atol=0)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_types_are_kept(dtype: torch.dtype) -> None:
    for module in (BoundedLogitAttention(4, context=True), L2XAttention(4, size=2)):
        selection = module.to(dtype)(randn(2, 4, 3, 3).to(dtype))
        assert {values.dtype for values in selection[:4]} == {dtype}


def test_a_broken_image_spoils_no_other() -> None:
    for module in (BoundedLogitAttention(4, threshold="auto"), BoundedLogitAttention(4, gate=True), L2XAttention(4)):
        module.eval()
        features = randn(3, 4, 3, 3)
        whole = module(features)
        features[1, 2, 0, 0] = math.nan
        broken = module(features)
        for before, after in zip(whole[2:4], broken[2:4], strict=True):
            assert after[1].isnan().all()
            assert torch.equal(before[[0, 2]], after[[0, 2]])


# L2X.


def test_l2x_draws_anew_in_training_and_alike_in_evaluation() -> None:
    module, features = L2XAttention(4, size=3), randn(2, 4, 3, 3)
    torch.manual_seed(0)
    first, second = module.train()(features), module(features)
    assert not torch.equal(first.soft, second.soft)
    assert torch.equal(first.hard, second.hard)
    torch.manual_seed(0)
    assert torch.equal(module(features).soft, first.soft)
    module.eval()
    state = torch.get_rng_state()
    assert torch.equal(module(features).soft, module(features).soft)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("setting", [{}, {"hidden": (6,)}, {"context": True}], ids=str)
def test_l2x_selects_the_smallest_scores(shape: tuple[int, ...], setting: dict[str, Any]) -> None:
    module = L2XAttention(4, size=4, **setting).double().eval()
    spread_out(module)
    features = randn(*shape, dtype=torch.float64)
    selection = module(features)
    cells = shape[2] * shape[3]
    for image, u in enumerate(slow_scores(module, features)):
        flat = [value for line in u for value in line]
        best = sorted(range(cells), key=flat.__getitem__)[:4]
        expected = [1 / min(4, cells) if cell in best else 0.0 for cell in range(cells)]
        assert selection.hard[image].flatten().tolist() == pytest.approx(expected)
        assert selection.scores[image].flatten().tolist() == pytest.approx([-value for value in flat])
    assert torch.equal(selection.scores, selection.unbounded)
    assert (module(features, size=1).hard.count_nonzero(dim=(1, 2)) == 1).all()


@pytest.mark.parametrize("variant", ["official", "corrected"])
def test_l2x_weights_come_from_the_operator(variant: Any) -> None:
    torch.manual_seed(0)
    module = L2XAttention(4, size=8, variant=variant)
    soft = module(torch.zeros(200, 4, 7, 7)).soft
    assert soft.sum(dim=(1, 2)).mean().item() == pytest.approx(1.2 if variant == "official" else 7.4, abs=0.1)
    assert f"size=8, temperature=0.1, variant='{variant}'" in repr(module)


def test_l2x_evaluates_a_map_alike_wherever_it_stands_in_a_batch() -> None:
    module, features = L2XAttention(4, size=8).eval(), randn(5, 4, 3, 6)
    together = module(features).soft
    for image in range(5):
        torch.testing.assert_close(module(features[image : image + 1]).soft[0], together[image])


# What the head reads.


def test_weighted_sum_is_the_sum() -> None:
    features, weights = randn(3, 5, 2, 4), randn(3, 2, 4, seed=1)
    expected = torch.einsum("bchw,bhw->bc", features, weights)
    torch.testing.assert_close(weighted_sum(features, weights), expected)
    torch.testing.assert_close(weighted_sum(features.to(memory_format=torch.channels_last), weights), expected)
    torch.testing.assert_close(weighted_sum(features.permute(0, 1, 3, 2), weights.permute(0, 2, 1)), expected)
    assert weighted_sum(features[:1], weights[:1]).shape == (1, 5)
    uniform = torch.full((3, 2, 4), 1 / 8)
    torch.testing.assert_close(weighted_sum(features, uniform), features.mean(dim=(2, 3)))


def test_weighted_sum_keeps_the_type_of_the_features() -> None:
    for dtype in (torch.float16, torch.float64):
        assert weighted_sum(randn(2, 3, 2, 2).to(dtype), torch.full((2, 2, 2), 0.25)).dtype == dtype


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [None, 1, 5])
def test_cells_that_are_not_selected_are_not_read(channels_last: bool, size: int | None) -> None:
    torch.manual_seed(0)
    module, head = BoundedLogitAttention(64), nn.Linear(64, 10)
    spread_out(module)
    features = torch.randn(8, 64, 7, 7)
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    hard = module(features, size=size).hard
    unread = (hard == 0)[:, None].expand_as(features)
    assert unread.any(dim=(1, 2, 3)).all()
    changed = torch.where(unread, 1e6 * torch.randn_like(features), features)
    assert torch.equal(head(weighted_sum(changed, hard)), head(weighted_sum(features, hard)))
    read = torch.where(unread, features, features + 1)
    assert (head(weighted_sum(read, hard)) != head(weighted_sum(features, hard))).any(dim=1).all()


# Real photographs.


@pytest.fixture(scope="module")
def real_features(shared_data: Path, lite0: ExplainableClassifier) -> dict[str, Tensor]:
    """Features of eight photos from each set."""
    found = {}
    for name in ("birds100", "catdog", "imagenet500", "CUB_200_2011"):
        photos = sorted((shared_data / name).rglob("*.jpg"))
        chosen = photos[:: len(photos) // 8][:8]
        with torch.inference_mode():
            pixels = [lite0.pixels(lite0.transform.read(photo).pixels[None]) for photo in chosen]
            found[name] = lite0.trunk(torch.cat(pixels).contiguous(memory_format=torch.channels_last))
    return found


@pytest.mark.parametrize("name", ["birds100", "catdog", "imagenet500", "CUB_200_2011"])
@pytest.mark.parametrize(("setting", "seeds"), [({}, 10), ({"hidden": (64,)}, 2), ({"context": True}, 2)], ids=str)
def test_no_start_is_dead_on_real_photos(
    real_features: dict[str, Tensor], setting: dict[str, Any], seeds: int, name: str
) -> None:
    features = real_features[name].clone()
    for seed in range(seeds):
        torch.manual_seed(seed)
        module = BoundedLogitAttention(features.shape[1], **setting)
        with torch.no_grad():
            assert (module(features).unbounded < 0).all(), f"seed {seed}: clipped cells at a fresh start"
            module.calibrate(features)
            alive = (module(features).unbounded < 0).flatten(1).any(1)
        assert alive.any(), f"seed {seed}: dead after calibration"
        # a photo may start with all cells clipped, and teaches nothing until others have moved the score: one at most
        assert alive.sum() >= len(features) - 1, f"seed {seed}: {alive.tolist()}"
    gradient_of_score(module, features)
