"""Other methods: the libraries' own results, a target for each image, and a model that is left as it was."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bla.comparison.methods import (
    Batch,
    ComparisonError,
    Method,
    PooledClassifier,
    another_images,
    c_minus_e,
    cam,
    centre_disc,
    feature_norm,
    grad_cam_family,
    integrated_gradients,
    kernel_shap,
    l2x,
    learned_mask,
    occlusion,
    random_cells,
    refine_cam,
    rise,
    score_cam,
    smoothed,
    softmax_attention,
)
from bla.comparison.methods.libraries import last_layers
from bla.comparison.methods.sampled import shapley_masks, shapley_values
from bla.metrics.sanity import rank_correlation
from bla.model.untouched import untouched

CLASSES, CHANNELS = 4, 6
PIXELS = torch.randn(5, 3, 32, 48, generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([3, 0, 2, 2, 1])


def network(linear: bool = True) -> PooledClassifier:
    """A grid of 4 x 6, not square."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Conv2d(3, CHANNELS, 8, stride=8), nn.ReLU())
        head: nn.Module = nn.Sequential(nn.Dropout(0.2), nn.Linear(CHANNELS, CLASSES))
        if not linear:
            head = nn.Sequential(nn.Linear(CHANNELS, 8), nn.Tanh(), nn.Linear(8, CLASSES))
    return PooledClassifier(trunk, head).eval()


def batch(net: PooledClassifier, targets: Tensor = TARGETS, pixels: Tensor = PIXELS) -> Batch:
    with torch.no_grad():
        features = net.trunk(pixels)
    return Batch(features, targets, torch.arange(len(pixels)), pixels)


def methods(net: PooledClassifier) -> dict[str, Method]:
    found = [cam(net), score_cam(net, 3), integrated_gradients(net, 4), occlusion(net), random_cells(), centre_disc()]
    found += [grad_cam_family(net, name) for name in ("grad-cam", "grad-cam++", "layer-cam", "hires-cam")]
    found += [refine_cam(net), rise(net, 8), kernel_shap(net, 30)]
    found += [grad_cam_family(net, "finer-cam"), feature_norm(), c_minus_e(net), smoothed(cam(net))]
    return {method.name: method for method in found}


def scaled(maps: Tensor) -> np.ndarray:
    """As grad-cam gives them out: rectified, from 0 to 1."""
    found = maps.clamp(min=0).numpy()
    found = found - found.min(axis=(1, 2), keepdims=True)
    return found / (1e-7 + found.max(axis=(1, 2), keepdims=True))


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("grad-cam", "GradCAM"), ("grad-cam++", "GradCAMPlusPlus"), ("layer-cam", "LayerCAM"), ("hires-cam", "HiResCAM")],
)
def test_the_cam_family_is_the_librarys_on_the_whole_network(name: str, kind: str, linear: bool) -> None:
    import pytorch_grad_cam
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    library = getattr(pytorch_grad_cam, kind)
    net = network(linear)
    ours = grad_cam_family(net, name).maps(batch(net))  # type: ignore[arg-type]
    assert ours.shape == (5, 4, 6)
    # the library on pixels, hooked at the trunk's last layer, at the photo's size; ours works from the features alone
    reference = library(model=copy.deepcopy(net), target_layers=[])
    reference.activations_and_grads.release()
    twin = copy.deepcopy(net)
    whole = library(model=twin, target_layers=[twin.trunk[-1]])
    whole.get_target_width_height = lambda _: (6, 4)
    theirs = whole(PIXELS, [ClassifierOutputTarget(int(target)) for target in TARGETS])
    np.testing.assert_allclose(scaled(ours), theirs, atol=1e-4)


def test_cam_is_hires_cam_is_unrectified_grad_cam_at_the_last_map_with_a_linear_head() -> None:
    net = network()
    maps = {name: methods(net)[name].maps(batch(net)) for name in ("cam", "hires-cam", "grad-cam")}
    cells = 4 * 6
    assert (maps["cam"] < 0).any()
    torch.testing.assert_close(maps["hires-cam"] * cells, maps["cam"])
    torch.testing.assert_close(maps["grad-cam"] * cells, maps["cam"])
    weight = net.head[1].weight  # type: ignore[index]
    by_hand = torch.einsum("bc,bchw->bhw", weight[TARGETS], batch(net).features)
    torch.testing.assert_close(maps["cam"], by_hand.detach())


@pytest.mark.parametrize("linear", [True, False])
def test_finer_cam_is_the_librarys_for_the_predicted_class(linear: bool) -> None:
    net = network(linear)
    predicted = net(PIXELS).argmax(dim=1)
    ours = grad_cam_family(net, "finer-cam").maps(batch(net, predicted))
    twin = copy.deepcopy(net)
    from pytorch_grad_cam import FinerCAM

    library = FinerCAM(model=twin, target_layers=[twin.trunk[-1]])
    library.base_cam.get_target_width_height = lambda _: (6, 4)
    np.testing.assert_allclose(scaled(ours), library(PIXELS), atol=1e-4)


def test_c_minus_e_by_hand_and_as_a_gradient() -> None:
    net = network()
    asked = batch(net)
    weight = net.head[1].weight.detach()  # type: ignore[index]
    logits = torch.einsum("kc,bchw->bkhw", weight, asked.features)
    p = net(PIXELS).softmax(dim=1).detach()
    own = p.gather(1, TARGETS[:, None])
    expected = logits[torch.arange(5), TARGETS] - torch.einsum("bk,bkhw->bhw", p, logits)
    torch.testing.assert_close(c_minus_e(net).maps(asked) * (1 - own)[..., None], expected)
    other = network(
        linear=False
    )  # its mean over the cells is the derivative of the log odds by a scale of all features
    scale = torch.ones(5, 1, 1, 1, requires_grad=True)
    p = other.on_features(scale * asked.features).softmax(dim=1).gather(1, TARGETS[:, None])
    (slope,) = torch.autograd.grad(p.logit().sum(), scale)
    torch.testing.assert_close(c_minus_e(other).maps(asked).mean(dim=(1, 2)), slope.flatten())


def test_smoothing_takes_the_mean_of_the_neighbours_that_exist() -> None:
    net = network()
    asked = batch(net)
    plain, found = cam(net).maps(asked), smoothed(cam(net))
    for row, column in ((0, 0), (0, 2), (1, 1), (3, 5)):
        window = plain[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
        torch.testing.assert_close(found.maps(asked)[:, row, column], window.mean(dim=(1, 2)))
    assert (found.name, found.title) == ("cam-3x3", "CAM, 3x3")


def test_cam_needs_a_linear_head() -> None:
    with pytest.raises(ComparisonError, match="linear head for cam"):
        cam(network(linear=False))


@pytest.mark.parametrize(
    ("build", "module"),
    [
        (lambda net: grad_cam_family(net, "grad-cam"), "pytorch_grad_cam"),
        (score_cam, "pytorch_grad_cam"),
        (integrated_gradients, "captum.attr"),
        (occlusion, "captum.attr"),
    ],
)
def test_a_missing_library_is_named_with_its_extra(
    build: Callable[[PooledClassifier], Method], module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    package = module.partition(".")[0]
    with pytest.raises(ComparisonError, match=rf"expected the package {package}, got none: pip install .*\[compare\]"):
        build(network())


def test_score_cam_is_the_librarys_where_no_channel_is_left_out() -> None:
    net = network()
    ours = score_cam(net, CHANNELS).maps(batch(net))
    twin = copy.deepcopy(net)
    from pytorch_grad_cam import ScoreCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    library = ScoreCAM(model=twin, target_layers=[twin.trunk[-1]])
    library.get_target_width_height = lambda _: (6, 4)
    theirs = library(PIXELS, [ClassifierOutputTarget(int(target)) for target in TARGETS])
    np.testing.assert_allclose(scaled(ours), theirs, atol=1e-4)


def test_refine_cam_multiplies_grad_cam_plus_plus_of_the_coarsest_resolutions() -> None:
    trunk = nn.Sequential(nn.Conv2d(3, CHANNELS, 8, stride=8), nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 2, stride=2))
    net = PooledClassifier(trunk, nn.Linear(CHANNELS, CLASSES)).eval()
    assert last_layers(net, PIXELS[:1], 2) == [trunk[1], net.cells]
    targets = torch.tensor(TARGETS.tolist())
    from pytorch_grad_cam import GradCAMPlusPlus
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    asked = [ClassifierOutputTarget(int(target)) for target in targets]
    with untouched(net):
        pixels = PIXELS.clone().requires_grad_(True)
        each = [torch.as_tensor(GradCAMPlusPlus(net, [layer])(pixels, asked)) for layer in (trunk[1], net.cells)]
    product = (each[0] * each[1])[:, None]
    product = product / product.amax(dim=(2, 3), keepdim=True).clamp(min=1e-7)
    expected = nn.functional.adaptive_avg_pool2d(product, (2, 3))[:, 0]
    torch.testing.assert_close(refine_cam(net).maps(batch(net)), expected, atol=1e-4, rtol=1e-3)


def test_sampled_methods_find_what_a_linear_network_adds_up() -> None:
    net = network()
    net.trunk[1] = nn.Identity()  # linear throughout, so that a cell's Shapley value is its own share
    asked = batch(net)
    exact = torch.einsum("bc,bchw->bhw", net.head[1].weight[TARGETS], net.trunk(PIXELS) - net.trunk(PIXELS * 0)) / 24  # type: ignore[index]
    found = kernel_shap(net, 200, fill="grey").maps(asked)
    whole = (net(PIXELS) - net(PIXELS * 0)).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(found.sum(dim=(1, 2)), whole, atol=1e-4, rtol=1e-4)
    assert (rank_correlation(found, exact.detach()) > 0.75).all()
    ours = rise(net, 400, fill="grey").maps(asked)
    assert (rank_correlation(ours, found) > 0.3).all()
    masks = shapley_masks(500, 6, torch.Generator().manual_seed(0))
    sizes = masks.sum(dim=1).long().bincount(minlength=7)[1:6].double() / 1000
    weights = torch.tensor([1 / (size * (6 - size)) for size in range(1, 6)])
    torch.testing.assert_close(sizes, (weights / weights.sum()).double(), atol=0.05, rtol=0)
    worth = torch.tensor([2.0, -1.0, 0.5, 0.0, 3.0, 1.0])
    exactly = shapley_values(masks, 1 + masks @ worth, torch.tensor(1.0), 1 + worth.sum())
    torch.testing.assert_close(exactly, worth.double(), atol=1e-6, rtol=0)


def test_occlusion_by_hand() -> None:
    net = network()
    ours = occlusion(net).maps(batch(net))
    with torch.no_grad():
        for image in range(5):
            for row in range(4):
                for column in range(6):
                    covered = PIXELS[image : image + 1].clone()
                    covered[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 0
                    drop = (net(PIXELS[image : image + 1]) - net(covered))[0, TARGETS[image]]
                    assert ours[image, row, column] == pytest.approx(drop.item(), abs=1e-5)


def test_integrated_gradients_add_up_to_the_logits_difference() -> None:
    net = network()
    ours = integrated_gradients(net, 64).maps(batch(net))
    with torch.no_grad():
        difference = (net(PIXELS) - net(PIXELS * 0)).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(ours.mean(dim=(1, 2)) * 32 * 48, difference, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", methods(network()))
def test_each_image_has_its_own_target_whatever_the_batch(name: str) -> None:
    net = network()
    together = methods(net)[name].maps(batch(net))
    for image in range(5):
        alone = Batch(
            batch(net).features[image : image + 1],
            TARGETS[image : image + 1],
            torch.tensor([image]),
            PIXELS[image : image + 1],
        )
        torch.testing.assert_close(methods(net)[name].maps(alone)[0], together[image], atol=1e-5, rtol=1e-4)
    other = methods(net)[name].maps(batch(net, (TARGETS + 1) % CLASSES))
    assert methods(net)[name].class_specific == (not torch.equal(other, together))


def test_too_few_targets_are_refused_and_not_cut_short() -> None:
    with pytest.raises(ComparisonError, match="a target, a row and features for each image"):
        batch(network(), TARGETS[:3])


@pytest.mark.parametrize("name", methods(network()))
@pytest.mark.parametrize("inference", [True, False])
def test_nothing_is_left_behind_on_the_model(name: str, inference: bool) -> None:
    net = network().train()
    net.trunk.eval()
    for value in net.head.parameters():
        value.grad = torch.ones_like(value)
    net.trunk[0].weight.requires_grad_(False)  # type: ignore[index]
    seen = []
    net.trunk.register_forward_hook(lambda *_: seen.append(1))
    state = {key: value.clone() for key, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    needs = [value.requires_grad for value in net.parameters()]
    hooks = [(len(module._forward_hooks), len(module._backward_hooks)) for module in net.modules()]
    with torch.inference_mode(inference):
        asked = batch(net)
    methods(net)[name].maps(asked)
    assert [module.training for module in net.modules()] == modes
    assert [value.requires_grad for value in net.parameters()] == needs
    assert [(len(module._forward_hooks), len(module._backward_hooks)) for module in net.modules()] == hooks
    assert all(torch.equal(value.grad, torch.ones_like(value)) for value in net.head.parameters())  # type: ignore[arg-type]
    assert all(value.grad is None for value in net.trunk.parameters())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_an_error_inside_gets_out_and_the_model_is_restored() -> None:
    net = network().train()

    def failing() -> None:
        with untouched(net):
            net.cells.register_forward_hook(lambda *_: None)
            assert not net.training
            raise IndexError("grad-cam's own context swallows this one")

    with pytest.raises(IndexError):
        failing()
    assert net.training
    assert not net.cells._forward_hooks
    with pytest.raises(IndexError):
        grad_cam_family(net, "grad-cam").maps(batch(net, TARGETS + 90))
    assert not net.cells._forward_hooks


def test_controls() -> None:
    net = network()
    asked = batch(net)
    disc = centre_disc().maps(asked)
    assert disc.argmax() // 6 in (1, 2)
    assert torch.equal(disc, disc.flip(1))
    assert torch.equal(disc, disc.flip(2))
    assert torch.equal(random_cells(3).maps(asked), random_cells(3).maps(asked))
    assert not torch.equal(random_cells(3).maps(asked), random_cells(4).maps(asked))
    torch.testing.assert_close(feature_norm().maps(asked), asked.features.square().sum(1).sqrt())
    rankings = torch.arange(5.0)[:, None, None].expand(5, 4, 6)
    moved = another_images("CAM", rankings).maps(asked)
    assert moved[:, 0, 0].tolist() == [2, 3, 4, 0, 1]
    assert another_images("CAM", torch.zeros(1, 4, 6)).maps(
        Batch(asked.features[:1], TARGETS[:1], torch.tensor([0]))
    ).shape == (1, 4, 6)


def test_rivals_find_the_cell_that_tells_and_leave_the_classifier_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % CLASSES
    features = torch.randn(240, CHANNELS, 3, 5, generator=generator).abs()
    where = torch.randint(15, (240,), generator=generator)
    for row in range(240):
        features[row, :, where[row] // 5, where[row] % 5] = 0
        features[row, labels[row], where[row] // 5, where[row] % 5] = 20
        features[row, CHANNELS - 1, where[row] // 5, where[row] % 5] = 20
    net = network()
    net.head = nn.Linear(CHANNELS, CLASSES)
    nn.init.zeros_(net.head.bias)
    net.head.weight.data = 2 * torch.eye(CLASSES, CHANNELS)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    rivals = [
        softmax_attention(net, lambda rows: features[rows], labels, epochs=15),
        l2x(net, lambda rows: features[rows], labels, size=1, epochs=15),
        learned_mask(net, lambda rows: features[rows], labels, epochs=15),
    ]
    for rival in rivals:
        maps = rival.maps(Batch(features, labels, torch.arange(240)))
        found = (maps.flatten(1).argmax(dim=1) == where).double().mean()
        assert found > 0.9, rival.name
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    again = softmax_attention(net, lambda rows: features[rows], labels, epochs=15)
    asked = Batch(features, labels, torch.arange(240))
    assert torch.equal(again.maps(asked), rivals[0].maps(asked)), "the seed alone decides"
