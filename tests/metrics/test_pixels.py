"""Pixel-level metrics by hand on photos that are not square, over several batches."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bla import BlaError
from bla.data.masking import filled
from bla.metrics import top_cells
from bla.metrics.metric import METRICS
from bla.metrics.pixels import (
    confidence_over_shares,
    deletion_insertion,
    imputed,
    infidelity,
    kept_and_removed,
    masked_confidence,
    max_sensitivity,
    over_sizes,
    road,
    single_deletion,
    spread,
)

WEIGHT = torch.zeros(3, 4, 6)
WEIGHT[:, 0, 0], WEIGHT[:, 3, 5] = 1.0, -1.0


def network(pixels: Tensor) -> Tensor:
    """Two classes; the first one's logit is a weighted sum over a photo of 4 x 6 pixels."""
    logit = (pixels * WEIGHT).sum(dim=(1, 2, 3))
    return torch.stack([logit, torch.zeros_like(logit)], dim=1)


def sigmoid(value: float) -> float:
    return torch.tensor(value, dtype=torch.float64).sigmoid().item()


def batches(function, pixels: Tensor, *rest: Tensor) -> dict[str, Tensor]:  # type: ignore[no-untyped-def]
    """As one batch and one photo at a time: a metric that counts only the first batch, or photo, would differ."""
    together = function(network, pixels, *rest)
    alone = [function(network, *(value[row : row + 1] for value in (pixels, *rest))) for row in range(len(pixels))]
    for name, value in together.items():
        torch.testing.assert_close(value, torch.cat([each[name] for each in alone]), atol=1e-5, rtol=1e-5)
    return together


PIXELS = torch.ones(3, 3, 4, 6)
PIXELS[1] *= 2
PIXELS[2] *= -1
CLASSES = torch.tensor([0, 0, 1])
MAPS = torch.zeros(3, 2, 3)
MAPS[:, 0, 0] = 1


def test_spread_is_flat_over_each_cell() -> None:
    maps = torch.arange(6.0).reshape(1, 2, 3)
    assert spread(maps, PIXELS[:1])[0].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2


def test_deletion_and_insertion_by_hand() -> None:
    # the best cell holds the pixel that speaks for the class; the one against it comes with the last pixels of all
    steps = 6
    pixels = PIXELS.clone()
    pixels[:, :, 3, 5] = 0  # blurring stays out of it: only the first pixel counts
    maps = MAPS.clone()
    found = batches(lambda *given: deletion_insertion(*given, steps=steps), pixels, maps, CLASSES)
    # of 24 pixels 4 go at the first step, the best cell's: trapezoid over 0, 1/6, ..., 1
    for row, (value, sign) in enumerate([(3.0, 1), (6.0, 1), (-3.0, -1)]):
        before, after = sigmoid(value * sign), 0.5
        assert found["deletion"][row].item() == pytest.approx((before / 2 + 5 * after + after / 2) / 6, abs=1e-6)
    soft = filled(pixels, "blur")
    first = torch.stack([torch.sigmoid(network(soft)[row, 0] * (1 - 2 * CLASSES[row])) for row in range(3)])
    for row, (value, sign) in enumerate([(3.0, 1), (6.0, 1), (-3.0, -1)]):
        shown = pixels[row : row + 1].clone()
        against = (soft[row, :, 3, 5] * WEIGHT[:, 3, 5]).sum().item()  # blurred until the last step
        after = sigmoid(sign * (value + against))
        expected = (first[row].item() / 2 + 5 * after + sigmoid(sign * network(shown)[0, 0].item()) / 2) / 6
        assert found["insertion"][row].item() == pytest.approx(expected, abs=1e-6)


def test_a_better_order_deletes_faster_and_inserts_faster() -> None:
    best, worst = MAPS, -MAPS
    pixels = PIXELS[:2].clone()
    pixels[:, :, 0, 0] *= 3  # the blur takes from it, and the first insertion gives it back
    for name, better in (("deletion", "lower"), ("insertion", "higher")):
        assert METRICS[name].better == better
        one, other = (deletion_insertion(network, pixels, maps[:2], CLASSES[:2])[name] for maps in (best, worst))
        assert ((one < other) if better == "lower" else (one > other)).all()


def test_confidence_under_masks_by_hand() -> None:
    selected = MAPS > 0
    found = batches(masked_confidence, PIXELS, selected, CLASSES)
    whole = [0.5, 0.5, 0.5]  # for and against cancel
    kept = [sigmoid(3.0), sigmoid(6.0), sigmoid(3.0)]
    assert found["average_drop"].tolist() == [0, 0, 0]
    assert found["increase"].tolist() == [1, 1, 1]
    gains = [(after - before) / (1 - before) for before, after in zip(whole, kept, strict=True)]
    assert found["average_gain"].tolist() == pytest.approx(gains, abs=1e-6)
    against = torch.zeros(3, 2, 3, dtype=torch.bool)
    against[:, 1, 2] = True
    dropped = batches(masked_confidence, PIXELS, against, CLASSES)
    drops = [(0.5 - sigmoid(-3.0)) / 0.5, (0.5 - sigmoid(-6.0)) / 0.5, (0.5 - sigmoid(-3.0)) / 0.5]
    assert dropped["average_drop"].tolist() == pytest.approx(drops, abs=1e-6)
    assert dropped["increase"].tolist() == [0, 0, 0]


def test_kept_and_removed_by_hand() -> None:
    # the first column of cells holds the pixel that speaks for the class, the last one the pixel that speaks against it
    left = torch.zeros(3, 1, 2)
    left[:, :, 0] = 1
    found = batches(lambda *given: kept_and_removed(*given, fill="grey"), PIXELS, left, CLASSES)
    assert found["kept"].tolist() == [1, 1, 1]
    assert found["removed"].tolist() == [0, 0, 0]
    other = kept_and_removed(network, PIXELS, left == 0, CLASSES, fill="grey")
    assert torch.equal(other["kept"], found["removed"])
    assert torch.equal(other["removed"], found["kept"])
    assert kept_and_removed(network, PIXELS, left, 1 - CLASSES, fill="grey")["kept"].tolist() == [0, 0, 0]


def test_kept_over_sizes_is_the_mean_over_equal_shares_of_the_grid() -> None:
    ranking = torch.randn(3, 7, 7, generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    found = batches(over_sizes, pixels, ranking, CLASSES)
    for name in ("kept", "removed"):
        each = []
        for share, size in ((12, 6), (25, 12), (40, 20)):
            best = top_cells(ranking, size)
            each.append(kept_and_removed(network, pixels, best, CLASSES)[name])
            assert torch.equal(found[f"{name}_{share}_percent"], each[-1])
        torch.testing.assert_close(found[f"{name}_area"], torch.stack(each).mean(dim=0))
    assert set(found) <= set(METRICS)


def test_imputation_fills_the_gap_alone_and_is_a_function_of_the_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 20, 31, generator=generator)
    missing = torch.rand(2, 20, 31, generator=generator) < 0.5
    ours = imputed(pixels, missing, noise=0)
    known = (~missing)[:, None].expand_as(ours)
    assert torch.equal(ours[known], pixels[known])
    assert torch.equal(imputed(pixels, missing, seed=1), imputed(pixels, missing, seed=1))
    assert 0 < (imputed(pixels, missing, seed=1) - ours).std() < 0.05


def test_a_flat_photo_is_imputed_as_it_was() -> None:
    missing = torch.zeros(1, 16, 24, dtype=torch.bool)
    missing[:, 4:12, 2:20] = True
    flat = torch.full((1, 3, 16, 24), 0.7)
    torch.testing.assert_close(imputed(flat, missing, noise=0), flat, atol=1e-2, rtol=1e-2)


def test_road_counts_every_photo_of_three_colours() -> None:
    pixels = torch.zeros(3, 3, 4, 6)
    pixels[:, :, :2, :2] = torch.tensor([1.0, 2.0, -1.0]).reshape(3, 1, 1, 1)
    found = batches(lambda *given: road(*given, seed=1), pixels, MAPS, CLASSES)
    kept = torch.tensor([3.0, 6.0, 3.0]).double().sigmoid()
    torch.testing.assert_close(found["road_least"], kept, atol=0.02, rtol=0)  # to the noise of the imputation
    assert (found["road_most"] < found["road_least"]).all()
    assert METRICS["road_most"].better == "lower"
    assert METRICS["road_least"].better == "higher"


def test_infidelity_of_a_linear_network_is_none_for_its_gradient() -> None:
    def logits(pixels: Tensor) -> Tensor:
        grey = pixels.mean(dim=1)
        return torch.stack([grey[:, :2, :2].sum(dim=(1, 2)), torch.zeros(len(pixels))], dim=1)

    pixels = torch.randn(4, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    classes = torch.zeros(4, dtype=torch.long)
    right = infidelity(logits, pixels, MAPS[:1].expand(4, 2, 3), classes, draws=20)
    wrong = infidelity(logits, pixels, 1 - MAPS[:1].expand(4, 2, 3), classes, draws=20)
    assert right.tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert (wrong > 1e-3).all()


def test_max_sensitivity_of_what_does_not_move_is_none() -> None:
    pixels = torch.randn(3, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    still = max_sensitivity(lambda given: torch.ones(len(given), 2, 3), pixels)
    assert still.tolist() == [0, 0, 0]
    moving = max_sensitivity(lambda given: 100 * given.mean(dim=1)[:, ::2, ::2], pixels)
    assert (moving > 0).all()


@pytest.mark.parametrize(
    ("module", "measure"),
    [
        ("pytorch_grad_cam.metrics.road", lambda pixels: imputed(pixels, pixels[:, 0] > 0)),
        ("captum.metrics", lambda pixels: infidelity(nn.Flatten(), pixels, pixels[:, 0], torch.zeros(2).long())),
        ("captum.metrics", lambda pixels: max_sensitivity(lambda inputs: inputs[:, 0], pixels)),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    module: str, measure: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(BlaError, match=rf"expected the package {package}, got none: pip install .*\[compare\]"):
        measure(torch.zeros(2, 3, 4, 4))


def test_confidence_over_shares_multiplies_by_the_map_and_cuts_it() -> None:
    maps = torch.tensor([[[1.0, 0.0, 0.0, 0.0, 0.0, 0.5]] + 3 * [6 * [0.0]]])  # of the photo's own size
    one = torch.full((1, 3, 4, 6), 2.0)
    found = confidence_over_shares(network, one, maps, torch.tensor([0]), shares=(1.0, 1 / 24))
    whole, kept = sigmoid(0.0), sigmoid(6.0)  # the corner that speaks against the class is multiplied by 0
    for share in ("100", "4.16667"):
        assert found[f"average_drop_{share}"].item() == 0
        assert found[f"increase_{share}"].item() == 1
        assert found[f"average_gain_{share}"].item() == pytest.approx((kept - whole) / (1 - whole), abs=1e-6)
    flat = confidence_over_shares(network, one, torch.ones(1, 2, 3), torch.tensor([0]), shares=(0.5,))
    assert flat["average_gain_50"].item() == pytest.approx((kept - whole) / (1 - whole)), "ties in reading order"


def test_single_deletion_is_one_where_the_map_orders_parts_as_a_linear_network_does() -> None:
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

    def linear(pixels: Tensor) -> Tensor:
        logit = (pixels[:, 0] * weight).sum(dim=(1, 2))
        return torch.stack([logit, -logit], dim=1)

    pixels = torch.rand(2, 3, 4, 6) + 0.5
    exact = pixels[:, 0] * weight
    assert single_deletion(linear, pixels, exact, torch.tensor([0, 0]), patches=2).tolist() == pytest.approx([1, 1])
    assert single_deletion(linear, pixels, exact, torch.tensor([0, 1]), patches=2).tolist() == pytest.approx([1, -1])
    sums = exact.reshape(2, 2, 2, 2, 3).sum(dim=(2, 4))
    tied = torch.where(sums == sums.amax(dim=(1, 2), keepdim=True), 1.0, 0.0)
    one_above_three = ((4 - 2.5) * 1.5 + 3 * 0.5 * 0.5) / (5**0.5 * 3**0.5)  # ranks 4, 3, 2, 1 and 4, 2, 2, 2
    found = single_deletion(linear, pixels, tied, torch.tensor([0, 0]), patches=2)
    assert found.tolist() == pytest.approx(2 * [one_above_three])
    assert torch.isnan(single_deletion(linear, pixels, torch.ones(2, 2, 2), torch.tensor([0, 0]), patches=2)).all()
