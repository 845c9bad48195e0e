"""Splitting classifiers: one contract over the families, refusals by name, modes, explaining photos."""

from __future__ import annotations

import copy
import dataclasses
import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

from bla.data.masking import FILLS, masked
from bla.data.photo import DataError, Transform
from bla.explanations.explanation import Explanation, Unexplained
from bla.model.attention import BoundedLogitAttention, L2XAttention
from bla.model.classifier import ClassifierError, ExplainableClassifier, explainable
from bla.model.joining import Around, _Replacing
from bla.model.parts import tensor_in
from bla.model.preprocessing import classes_of, imagenet_classes, transform_of

HALF = (0.5, 0.5, 0.5)


def inputs(height: int, width: int | None = None, **rest: Any) -> Transform:
    return Transform((height, width or height), HALF, HALF, **rest)


def plain(classes: int = 3) -> nn.Sequential:
    """A grid of 4x6 cells at 32x48."""
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.ReLU())
    return nn.Sequential(stem, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


class Cut(nn.Module):
    """A classifier of a stem, and of whatever follows it."""

    def __init__(self, head: Callable[[Cut, Tensor], Any]) -> None:
        super().__init__()
        self.stem, self.other = nn.Conv2d(3, 4, 3, stride=4), nn.Conv2d(3, 4, 3, stride=4)
        self.classes, self.wide = nn.Linear(4, 5), nn.Linear(8, 5)
        self.follow = head

    def forward(self, pixels: Tensor) -> Any:
        return self.follow(self, pixels)


def means(features: Tensor) -> Tensor:
    return features.mean(dim=(2, 3))


def reads_a_branch(net: Cut, pixels: Tensor) -> Tensor:
    logits: Tensor = net.wide(torch.cat([means(net.stem(pixels)), means(net.other(pixels))], 1))
    return logits


def reads_the_maximum_too(net: Cut, pixels: Tensor) -> Tensor:
    features = net.stem(pixels)
    logits: Tensor = net.wide(torch.cat([means(features), features.amax(dim=(2, 3))], 1))
    return logits


def reads_the_photo_too(net: Cut, pixels: Tensor) -> Tensor:
    logits: Tensor = net.classes(means(net.stem(pixels)) + pixels[:, 0, 0, :4])
    return logits


def decides_by_the_batch(net: Cut, pixels: Tensor) -> Tensor:
    features = net.stem(pixels)
    logits: Tensor = net.classes(means(features * 2 if features.mean() > 0 else features))
    return logits


class Returns(nn.Module):
    """A classifier that returns more than logits."""

    def __init__(self, model: nn.Module, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.form = form
        self.model = model

    def forward(self, pixels: Tensor) -> Any:
        return self.form(self.model(pixels))


class Tokens(nn.Module):
    """A transformer with a class token behind the patches, and a way to read it."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 16, 16), nn.Parameter(torch.randn(1, 1, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.fc, self.read = nn.Linear(16, 5), read

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patches(pixels).flatten(2).mT
        tokens = torch.cat([tokens, self.token.expand(len(tokens), -1, -1)], dim=1)
        logits: Tensor = self.fc(self.read(self.block(tokens)))
        return logits


def no_gigabyte(model: nn.Module, flat: int) -> nn.Module:
    """VGG and AlexNet on the meta device, with as many layers in the head, but narrow ones."""
    model.classifier = nn.Sequential(nn.Linear(flat, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 5))
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def vgg11() -> nn.Module:
    with torch.device("meta"):
        return no_gigabyte(torchvision.models.vgg11(), 512 * 7 * 7)


def alexnet() -> nn.Module:
    with torch.device("meta"):
        return no_gigabyte(torchvision.models.alexnet(), 256 * 6 * 6)


def residual(classes: int = 3) -> nn.Module:
    model: nn.Module = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes
    )
    return model


def vit(size: int = 64) -> nn.Module:
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 16, "num_classes": 5}
    model: nn.Module = torchvision.models.VisionTransformer(image_size=size, patch_size=16, **sizes)
    return model


# One contract, whatever the family.

FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "timm resnet10t": lambda: timm.create_model("resnet10t", num_classes=7),
    "timm tf_efficientnet_lite0": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=7),
    "timm mobilenetv3_small_100": lambda: timm.create_model("mobilenetv3_small_100", num_classes=7),
    "timm convnext_atto": lambda: timm.create_model("convnext_atto", num_classes=7),
    "timm densenet121": lambda: timm.create_model(
        "densenet121", num_classes=7, growth_rate=8, block_config=(2, 2, 2, 2)
    ),
    "timm regnetx_002": lambda: timm.create_model("regnetx_002", num_classes=7),
    "timm swin_tiny": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=7, img_size=96, depths=(1, 1, 1, 1), embed_dim=24
    ),
    "timm vit_tiny, averaging": lambda: timm.create_model(
        "vit_tiny_patch16_224", num_classes=7, img_size=96, depth=2, global_pool="avg"
    ),
    "timm vit_relpos": lambda: timm.create_model("test_vit_relpos", num_classes=7, img_size=96),
    "torchvision resnet": lambda: residual(7),
    "torchvision efficientnet_b0": lambda: torchvision.models.efficientnet_b0(num_classes=7),
    "torchvision mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=7),
    "torchvision mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=7),
    "torchvision convnext": lambda: torchvision.models.ConvNeXt(
        [CNBlockConfig(16, 32, 1), CNBlockConfig(32, 64, 1), CNBlockConfig(64, None, 1)], num_classes=7
    ),
    "torchvision densenet121": lambda: torchvision.models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=7),
    "sequential": lambda: plain(7),
    # heads that read maps
    "timm vgg11": lambda: timm.create_model("vgg11", num_classes=7, mlp_ratio=0.01),
    "timm resnet, maximum": lambda: timm.create_model("resnet10t", num_classes=7, global_pool="max"),
    "timm vit_tiny": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=7, img_size=96, depth=2),
    "timm deit, distilled": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=7, img_size=96, depth=2
    ),
    "timm convit": lambda: timm.create_model("convit_tiny", num_classes=7, img_size=96, depth=2, local_up_to_layer=1),
    "timm cait": lambda: timm.create_model("cait_xxs24_224", num_classes=7, img_size=96, depth=1, init_values=1),
    "timm vit, attention pooling": lambda: timm.create_model(
        "vit_base_patch16_siglip_224", num_classes=7, img_size=96, depth=1, embed_dim=32, num_heads=2
    ),
    "timm vit, registers": lambda: timm.create_model(
        "vit_small_patch14_reg4_dinov2", num_classes=7, img_size=96, patch_size=16, depth=2, embed_dim=32, num_heads=2
    ),
    "a class token behind the patches": lambda: Tokens(lambda tokens: tokens[:, -1]),
    "a class token and the mean": lambda: Tokens(lambda tokens: tokens[:, -1] + tokens[:, :-1].mean(1)),
    "the mean of all tokens": lambda: Tokens(lambda tokens: tokens.mean(dim=1)),
    "torchvision vgg11": vgg11,
    "torchvision alexnet": alexnet,
    "torchvision vit": lambda: vit(96),
    "two maps": lambda: Cut(reads_a_branch),
    "average and maximum": lambda: Cut(reads_the_maximum_too),
    "maximum": lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 8), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
    # heads that are not what is averaged, and classifiers that return more than logits
    "timm lowformer": lambda: timm.create_model("lowformer_b0", num_classes=7),
    "a tuple": lambda: Returns(plain(7), lambda logits: (logits, 3)),
    "a dictionary": lambda: Returns(plain(7), lambda logits: {"loss": None, "logits": logits}),
}


@dataclasses.dataclass
class Family:
    model: nn.Module
    before: dict[str, Any]
    wrapped: ExplainableClassifier
    pixels: Tensor
    hooked: list[str]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that wrapping could change."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "places": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "training": {name: module.training for name, module in model.named_modules()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {name: parameter.grad for name, parameter in model.named_parameters()},
        "hooks": {name: list(module._forward_hooks.values()) for name, module in model.named_modules()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    now = snapshot(model)
    torch.testing.assert_close(now.pop("values"), before["values"], rtol=0, atol=0, equal_nan=True)
    assert now == {key: value for key, value in before.items() if key != "values"}


def lively(model: nn.Module) -> nn.Module:
    """Random, but with activations as a trained model's: a miss would show."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, 96, 96))
    *_, head = (module for module in model.modules() if isinstance(module, nn.Linear))
    nn.init.normal_(head.weight)
    nn.init.normal_(head.bias)
    return model


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> Family:
    torch.manual_seed(0)
    try:
        model = lively(request.param())
    except RuntimeError as error:
        pytest.skip(str(error))  # a model that older versions of timm lack
    # nothing uniform: a module in evaluation mode, a frozen parameter, a hook
    list(model.modules())[-2].eval()
    next(model.parameters()).requires_grad_(False)
    hooked: list[str] = []
    list(model.modules())[-1].register_forward_hook(lambda *_: hooked.append("called"))
    before = snapshot(model)
    hooked.clear()
    wrapped = explainable(model, transform=inputs(96))
    return Family(model, before, wrapped, torch.randn(2, 3, 96, 96), hooked)


def test_uniform_weights_are_the_classifiers_own(family: Family) -> None:
    own = copy.deepcopy(family.model).eval()
    with torch.no_grad():
        logits, features = tensor_in(own(family.pixels)), family.wrapped.trunk(family.pixels)
        cells = features.shape[2] * features.shape[3]
        uniform = family.wrapped.classify(features, torch.full((2, *features.shape[2:]), 1 / cells))
    assert features.shape[:2] == (2, family.wrapped.attention.in_channels)
    assert cells >= 9
    assert (uniform - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_moving_the_weight_moves_the_logits(family: Family) -> None:
    with torch.no_grad():
        features = family.wrapped.trunk(family.pixels)
        logits = []
        for cell in range(features.shape[2] * features.shape[3]):
            weights = torch.zeros(2, *features.shape[2:])
            weights.view(2, -1)[:, cell] = 1
            logits.append(family.wrapped.classify(features, weights))
    spread = torch.stack(logits).std(dim=0).amax(1)
    assert (spread > 1e-4 * torch.stack(logits).abs().max()).all()


def test_of_the_cells_left_out_nothing_is_read(family: Family) -> None:
    with torch.no_grad():
        features = family.wrapped.trunk(family.pixels)
        weights = torch.zeros(2, *features.shape[2:])
        weights[:, 0, :2] = 0.5
        others = torch.where(weights[:, None] > 0, features, torch.randn_like(features))
        logits = family.wrapped.classify(features, weights)
        torch.testing.assert_close(family.wrapped.classify(others, weights), logits, rtol=0, atol=1e-5)


def test_forward_is_hard_in_evaluation_and_soft_in_training(family: Family) -> None:
    wrapped = family.wrapped
    with torch.no_grad():
        wrapped.attention.calibrate(wrapped.trunk(family.pixels))  # type: ignore[operator]
        features = wrapped.trunk(family.pixels)
        selection = wrapped.attention(features)
        hard = wrapped.classify(features, selection.hard)
        assert torch.equal(wrapped(family.pixels), hard)
        soft = wrapped.classify(features, wrapped.train().attention(features).soft)
        assert torch.equal(wrapped(family.pixels), soft)
        assert torch.equal(wrapped.eval()(family.pixels), hard)
    assert not torch.equal(hard, soft) or selection.unbounded.std() == 0  # cells that are all alike
    for values, same in zip(wrapped.select(family.pixels)[:4], selection[:4], strict=True):
        assert torch.equal(values, same)


def test_the_original_is_untouched_and_training_moves_the_attention_alone(family: Family) -> None:
    wrapped = family.wrapped.train()
    wrapped.attention.calibrate(wrapped.trunk(family.pixels))  # type: ignore[operator]
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    optimiser = torch.optim.SGD(wrapped.attention.parameters(), 1.0)
    nn.functional.cross_entropy(wrapped(family.pixels), torch.tensor([1, 2])).backward()  # type: ignore[no-untyped-call]
    optimiser.step()
    changed = {name for name, value in wrapped.state_dict().items() if not torch.equal(value, before[name])}
    assert changed  # of a score that starts as a constant, the last layer
    assert all(name.startswith("attention.score.") for name in changed)
    assert all(parameter.grad is None for parameter in (*wrapped.trunk.parameters(), *wrapped.head.parameters()))
    wrapped.eval()
    assert_untouched(family.model, family.before)


def test_a_hook_on_the_original_stays_its_owners(family: Family) -> None:
    family.hooked.clear()
    family.model(family.pixels)
    assert family.hooked == ["called"]


@pytest.mark.parametrize("make", [plain, lambda: timm.create_model("resnet10t", num_classes=3)], ids=["traced", "timm"])
def test_the_wrapped_classifier_calls_no_hook_of_the_original(make: Callable[[], nn.Module]) -> None:
    model, calls = make(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append("forward"))
        module.register_forward_pre_hook(lambda *_: calls.append("before"))
    wrapped = explainable(model, transform=inputs(64))
    wrapped(torch.randn(2, 3, 64, 64))
    assert calls == []


def test_a_classifier_says_its_own_preprocessing() -> None:
    model = plain()
    model.transform = inputs(48)  # type: ignore[assignment]
    assert explainable(model).transform == inputs(48)


def test_imagenets_names_are_all_different() -> None:
    names = imagenet_classes()
    assert len(set(names)) == 1000
    assert (names[281], names[134], names[517]) == ("tabby", "crane (n02012849)", "crane (n03126707)")


def test_torchs_own_hooks_compute_weights_and_are_kept() -> None:
    model = plain()
    layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    torch.nn.utils.parametrizations.weight_norm(layer)
    pixels = torch.randn(2, 3, 64, 64)
    wrapped = explainable(model, transform=inputs(64))
    uniform = torch.full_like(wrapped.select(pixels).hard, 1 / wrapped.select(pixels).hard[0].numel())
    with torch.no_grad():
        logits = wrapped.classify(wrapped.trunk(pixels), uniform)
    torch.testing.assert_close(logits, model.eval()(pixels))


def test_features_are_channels_first_whatever_the_classifiers_layout() -> None:
    torch.manual_seed(0)
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, img_size=(64, 128), depths=(1, 1, 1, 1))
    wrapped = explainable(swin, transform=inputs(64, 128), attention=BoundedLogitAttention)
    assert wrapped.trunk(torch.randn(2, 3, 64, 128)).shape == (2, 768, 2, 4)
    wrapped = explainable(swin, transform=inputs(64, 128))
    assert wrapped.trunk(torch.randn(2, 3, 64, 128)).shape == (2, 768 + wrapped.attention.earlier, 2, 4)
    assert wrapped.attention.earlier == 384
    assert wrapped.select(torch.randn(2, 3, 64, 128)).hard.shape == (2, 2, 4)

    class ChannelsLast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 3, stride=8), nn.Linear(8, 3)

        def forward(self, pixels: Tensor) -> Tensor:
            logits: Tensor = self.head(self.stem(pixels).permute(0, 2, 3, 1).mean(dim=(1, 2)))
            return logits

    assert explainable(ChannelsLast(), transform=inputs(32, 48)).trunk(torch.randn(2, 3, 32, 48)).shape == (2, 8, 4, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("make", [plain, lambda: timm.create_model("resnet10t", num_classes=3)], ids=["traced", "timm"])
def test_other_types_wrap(dtype: torch.dtype, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    wrapped = explainable(make().to(dtype), transform=inputs(64))
    assert {parameter.dtype for parameter in wrapped.parameters()} == {dtype}
    assert wrapped(torch.randn(2, 3, 64, 64, dtype=dtype)).dtype == dtype
    wrapped.fitted = True
    (explanation,) = wrapped.explain(noise(50, 70))
    assert explanation.size >= 1


def test_any_input_size_is_taken_after_wrapping() -> None:
    wrapped = explainable(plain(), transform=inputs(32, 48))
    assert wrapped.select(torch.randn(3, 3, 64, 40)).hard.shape == (3, 8, 5)


def test_wrapping_is_repeatable_and_leaves_the_random_state_to_the_attention() -> None:
    torch.manual_seed(0)
    model = plain()
    state = torch.get_rng_state()
    attention = BoundedLogitAttention(8)
    torch.set_rng_state(state)
    made = explainable(model, attention=BoundedLogitAttention).attention
    torch.testing.assert_close(made.state_dict(), attention.state_dict())
    state = torch.get_rng_state()
    assert explainable(model, attention=attention).attention is attention
    assert torch.equal(torch.get_rng_state(), state)


# Refusals.


def without_head(model: nn.Module) -> nn.Module:
    *_, head = (module for module in model.modules() if isinstance(module, nn.Linear))
    nn.init.zeros_(head.weight)
    return model


def broken(model: nn.Module) -> nn.Module:
    nn.init.constant_(next(model.parameters()), math.nan)
    return model


def timm_resnet(**settings: Any) -> nn.Module:
    model: nn.Module = timm.create_model("resnet10t", num_classes=5, **settings)
    return model


class Branches(nn.Module):
    """As CrossViT: class tokens over patches of two sizes, the average of what each says."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.ModuleList(nn.Conv2d(3, 8, side, side) for side in (8, 16))
        self.mix = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.token, self.fc = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        rows = [self.token.expand(len(pixels), 1, 8)] * 2
        rows = [
            torch.cat([row, each(pixels).flatten(2).mT], dim=1) for row, each in zip(rows, self.patches, strict=True)
        ]
        mixed = [mix(row, row, row)[0] for row, mix in zip(rows, self.mix, strict=True)]
        return torch.stack([self.fc(row[:, 0]) for row in mixed]).mean(dim=0)


REFUSED: dict[str, tuple[Callable[[], nn.Module], int, str]] = {
    "timm, no pooling": (lambda: timm_resnet(global_pool=""), 96, "resnet10t: expected .*RuntimeError"),
    "timm, one colour": (lambda: timm_resnet(in_chans=1), 64, r"resnet10t: .*pixels \(5, 3, 64, 64\), .*transform="),
    "timm, all-zero head": (lambda: without_head(timm_resnet()), 96, "resnet10t: expected logits that depend on "),
    "all-zero head": (lambda: without_head(plain()), 48, "Sequential: expected logits that depend on .*all zero"),
    "map": (lambda: Cut(lambda net, x: net.stem(x)), 32, r"Cut: expected logits of shape .*, got \(5, 4, 8, 8\)"),
    "the photo too": (lambda: Cut(reads_the_photo_too), 32, "Cut: expected a head that reads averages of feature maps"),
    "two grids": (Branches, 64, "Branches: expected class tokens that read .* of one grid, got 2 grids"),
    "the batch": (lambda: Cut(decides_by_the_batch), 32, "Cut: expected the same answer to a photo alone and beside"),
    "fails": (lambda: nn.Sequential(nn.Linear(5, 5)), 32, "Sequential: expected a classifier of pixels .*RuntimeError"),
    "not a number": (lambda: broken(plain()), 32, r"Sequential: .* logits, got NaN or infinity in 0.*weight \("),
}  # fmt: skip


@pytest.mark.parametrize(("make", "size", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_split_is_refused_by_name(make: Callable[[], nn.Module], size: int, message: str) -> None:
    torch.manual_seed(0)
    model = make()
    before = snapshot(model)
    with pytest.raises(ClassifierError, match=f"^{message}"):
        explainable(model, transform=inputs(size))
    assert_untouched(model, before)
    with pytest.raises(ClassifierError, match=r"^my model: expected"):
        explainable(model, transform=inputs(size), name="my model")


def timm_vit() -> nn.Module:
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=2)
    return model


@pytest.mark.parametrize(
    ("make", "size", "grid"),
    [
        (vgg11, 64, (7, 7)),
        (alexnet, 96, (6, 6)),
        (vit, 64, (4, 4)),
        (timm_vit, 64, (4, 4)),
        (plain, 64, (8, 8)),
        (Branches, 64, (4, 4)),
    ],
    ids=["vgg11", "alexnet", "torchvision vit", "timm vit", "plain", "two grids of patches"],
)
def test_a_new_head_needs_no_other_of_the_classifier(
    make: Callable[[], nn.Module], size: int, grid: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    model = make()
    before = snapshot(model)
    wrapped = explainable(model, head=3, transform=inputs(size))
    assert_untouched(model, before)
    pixels = torch.randn(2, 3, size, size)
    assert wrapped.select(pixels).hard.shape == (2, *grid)
    assert wrapped(pixels).shape == (2, 3)
    assert wrapped.classes == ("class 0", "class 1", "class 2")
    assert not wrapped.frozen_head
    assert all(parameter.requires_grad for parameter in wrapped.head.parameters())
    assert not any(parameter.requires_grad for parameter in wrapped.trunk.parameters())
    wrapped.train()(pixels).sum().backward()
    assert next(wrapped.head.parameters()).grad is not None
    channels = wrapped.attention.in_channels
    taken = explainable(model, head=nn.Linear(channels, 4), classes=list("abcd"), transform=inputs(size))
    assert taken.frozen_head
    assert taken(pixels).shape == (2, 4)


def test_heads_without_gradients_are_refused() -> None:
    class Rounded(nn.Module):
        def forward(self, pooled: Tensor) -> Tensor:
            return torch.from_numpy(pooled.detach().numpy() @ np.eye(8, 3, dtype=np.float32))

    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Rounded())
    with pytest.raises(ClassifierError, match=r"a head with gradients, .*: pass attention=BoundedLogitAttention"):
        explainable(net, transform=inputs(32))


def test_heads_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ClassifierError, match="expected a head of at least one class, got 0"):
        explainable(plain(), head=0, transform=inputs(64))
    with pytest.raises(ClassifierError, match="expected a head for 8 pooled features"):
        explainable(plain(), head=nn.Linear(5, 2), transform=inputs(64))
    with pytest.raises(ClassifierError, match=r"ResNet: expected .* several cells, .*\(32, 32\)"):
        explainable(torchvision.models.resnet18(), head=3, transform=inputs(32))
    with pytest.raises(ClassifierError, match="expected finite features"):
        explainable(broken(plain()), head=3, transform=inputs(64))


def test_patch_tokens_lie_where_their_patches_are() -> None:
    """A bright patch of a photo that is not square moves its own cell most."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", num_classes=3, img_size=(64, 96), depth=1, global_pool="avg", reg_tokens=2
    )
    wrapped = explainable(model, transform=dataclasses.replace(inputs(64), size=(64, 96)))
    dark = torch.zeros(1, 3, 64, 96)
    lit = dark.clone()
    lit[:, :, 16:32, 64:80] = 1
    with torch.no_grad():
        moved = (wrapped.trunk(lit) - wrapped.trunk(dark)).norm(dim=1)[0]
    assert moved.shape == (4, 6)
    assert divmod(int(moved.argmax()), 6) == (1, 4)


def test_a_class_token_reads_what_it_would_read_were_the_other_patches_dropped() -> None:
    """Slowly: the selected tokens alone go through the blocks; and with the rest of the photo painted over."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64, depth=3).eval()
    wrapped = explainable(model, transform=inputs(64))
    pixels = torch.randn(1, 3, 64, 64)
    chosen = [1, 6, 7]
    weights = torch.zeros(1, 16)
    weights[:, chosen] = 1 / 3
    painted = pixels.clone()
    for cell in set(range(16)) - {*chosen}:
        painted[:, :, 16 * (cell // 4) :, 16 * (cell % 4) :][:, :, :16, :16] = torch.randn(16, 16)
    with torch.no_grad():
        tokens = model._pos_embed(model.patch_embed(pixels))[:, [0, *(1 + cell for cell in chosen)]]
        expected = model.forward_head(model.norm(model.blocks(tokens)))
        for seen in (pixels, painted):
            logits = wrapped.classify(wrapped.trunk(seen), weights.reshape(1, 4, 4))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_soft_weights_of_a_class_token_are_attended_by_their_share_and_pass_gradients() -> None:
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(1, 1, 5, 4) for _ in range(3))
    keep = torch.tensor([[1.0, 0.5, 0.25, 0.0]], requires_grad=True)
    with _Replacing(torch.empty(1, 4, 4), keep, Around(1, 0)) as mode:
        mode.replaced = mode.patches
        found = torch.nn.functional.scaled_dot_product_attention(queries, keys, values)
    shares = (queries @ keys.mT / 2).exp() * torch.cat([torch.ones(1, 1), keep], 1)
    torch.testing.assert_close(found, shares / shares.sum(-1, keepdim=True) @ values)
    found.sum().backward()
    assert keep.grad is not None
    assert torch.isfinite(keep.grad).all()
    assert (keep.grad[0, :3] != 0).all()


def keeping(model: nn.Module) -> nn.Module:
    model.kept = [model(torch.randn(1, 3, 32, 48))]  # type: ignore[assignment]
    return model


def locked(model: nn.Module) -> nn.Module:
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


def tied(model: nn.Module) -> nn.Module:
    model[1].again = model[3]  # type: ignore[index]
    return locked(model)


def generating(model: nn.Module) -> nn.Module:
    model.rows = (row for row in range(3))  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("make", [lambda: timm_resnet(zero_init_last=False), residual], ids=["timm", "torchvision"])
def test_where_the_last_map_has_one_cell_an_earlier_one_is_read_and_this_is_said(
    make: Callable[[], nn.Module],
) -> None:
    torch.manual_seed(0)
    model = lively(make()).eval()
    wrapped = explainable(model, transform=inputs(32))
    (why,) = wrapped.explain(torch.randn(1, 3, 32, 32))
    assert why.grid == (2, 2)
    assert why.note == "approximate: the head reads zero for a cell left out, and 4 layers follow the map"


@pytest.mark.parametrize("holding", [keeping, locked, tied, generating])
def test_what_a_classifier_holds_besides_is_no_obstacle(holding: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    model = holding(plain())
    before = snapshot(model)
    wrapped = explainable(model, transform=inputs(32, 48))
    pixels = torch.randn(3, 3, 32, 48)
    with torch.no_grad():
        whole = wrapped.classify(wrapped.trunk(pixels), torch.full((3, 4, 6), 1 / 24))
        torch.testing.assert_close(whole, model(pixels))
    assert_untouched(model, before)
    nn.init.zeros_(model[3].weight)  # type: ignore[index]  # the copy is not moved by the original
    with torch.no_grad():
        assert torch.equal(wrapped.classify(wrapped.trunk(pixels), torch.full((3, 4, 6), 1 / 24)), whole)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ClassifierError, match="expected an attention for 8 channels, got one for 9"):
        explainable(plain(), attention=BoundedLogitAttention(9))
    with pytest.raises(ClassifierError, match="expected 3 class names, as many as logits, got 2"):
        explainable(plain(), classes=["cat", "dog"])
    with pytest.raises(ClassifierError, match="expected class names that differ, got 'cat' more than once"):
        explainable(plain(), classes=["cat", "dog", "cat"])


# Names and transforms.


def test_class_names_by_default() -> None:
    assert explainable(plain(3), transform=inputs(32)).classes == ("class 0", "class 1", "class 2")
    names = imagenet_classes()
    theirs = [timm.create_model("test_resnet"), nn.Sequential(nn.Identity(), torchvision.models.squeezenet1_1())]
    assert all(classes_of(model, 1000) == names for model in theirs)
    for own in (plain(1000), timm.create_model("test_resnet", num_classes=0), nn.Sequential(residual(5), plain(1000))):
        assert classes_of(own, 1000)[0] == "class 0"
    assert (len(names), names[0], names[281]) == (1000, "tench", "tabby")
    assert explainable(plain(2), transform=inputs(32), classes=["a", "b"]).classes == ("a", "b")


def test_transforms_by_default() -> None:
    with torch.device("meta"):
        timms = transform_of(timm.create_model("tf_efficientnet_lite0"))
    assert timms == Transform((224, 224), HALF, HALF, "bicubic", "crop", 0.875, "timm")
    net = timm.create_model("resnet10t")
    assert explainable(net).transform.mode == "crop"
    assert explainable(net, head=2).transform.mode == "squash"  # as the paper trains it
    assumed = transform_of(plain())
    assert (assumed.size, assumed.source, assumed.mode) == ((224, 224), "assumed", "squash")
    assert assumed.mean == (0.485, 0.456, 0.406)


def test_pixels_are_normalised_as_the_transform_says() -> None:
    transform = Transform((5, 4), (0.1, 0.5, 0.9), (0.2, 0.3, 0.4))
    wrapped = ExplainableClassifier(
        nn.Identity(), BoundedLogitAttention(3), nn.Identity(), transform=transform, classes="abc", name="none"
    )
    photos = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    pixels = wrapped.pixels(photos)
    expected = (photos / 255 - np.array([0.1, 0.5, 0.9])) / np.array([0.2, 0.3, 0.4])
    np.testing.assert_allclose(pixels.numpy(), np.moveaxis(expected, 3, 1), atol=1e-5)
    assert pixels.is_contiguous(memory_format=torch.channels_last)


# Modes.


def test_what_is_frozen_stays_in_evaluation_mode() -> None:
    model = timm.create_model("resnet10t", num_classes=3, drop_rate=0.5)
    wrapped = explainable(model, transform=inputs(64))
    assert not any(module.training for module in wrapped.modules())
    assert wrapped.train() is wrapped
    assert wrapped.training
    assert all(module.training for module in wrapped.attention.score.modules())
    assert not any(module.training for module in (*wrapped.trunk.modules(), *wrapped.head.modules()))
    assert not any(parameter.requires_grad for parameter in (*wrapped.trunk.parameters(), *wrapped.head.parameters()))
    assert all(parameter.requires_grad for parameter in wrapped.attention.score.parameters())
    pixels = torch.randn(2, 3, 64, 64)
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    assert torch.equal(wrapped(pixels), wrapped(pixels)), "no dropout in a frozen head"
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items()), "no new statistics"


def test_a_head_in_training_is_trained() -> None:
    split = explainable(plain(), transform=inputs(32, 48))
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 3))
    wrapped = ExplainableClassifier(
        split.trunk, split.attention, head, transform=split.transform, classes="abc", name="mine", frozen_head=False
    )
    assert not head.training
    wrapped.train()
    assert all(module.training for module in head.modules())
    assert all(parameter.requires_grad for parameter in head.parameters())
    assert not any(module.training for module in wrapped.trunk.modules())
    assert not any(parameter.requires_grad for parameter in wrapped.trunk.parameters())


def test_state_and_copies_round_trip() -> None:
    torch.manual_seed(0)
    for make in (plain, timm_resnet):
        wrapped = explainable(make(), transform=inputs(64))
        for parameter in wrapped.attention.score.parameters():
            nn.init.normal_(parameter)
        wrapped.fitted = True
        other = explainable(make(), transform=inputs(64))
        assert not other.fitted
        other.load_state_dict(wrapped.state_dict())
        pixels = torch.randn(2, 3, 64, 64)
        for again in (other, copy.deepcopy(wrapped)):
            assert again.fitted
            assert torch.equal(again(pixels), wrapped(pixels))


# Explaining.


def noise(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def wrapped() -> ExplainableClassifier:
    """Fitted, as far as it knows, and with some of its 4x6 cells at the bound."""
    torch.manual_seed(1)
    found = explainable(lively(plain(7)), attention=BoundedLogitAttention(8), transform=inputs(32, 48), name="small")
    nn.init.normal_(found.attention.score.weight, std=3)  # type: ignore[arg-type]
    nn.init.zeros_(found.attention.score.bias)  # type: ignore[arg-type]
    found.fitted = True
    return found


def test_what_was_never_fitted_says_so() -> None:
    unfitted = explainable(plain(), attention=BoundedLogitAttention(8), transform=inputs(32, 48), name="small")
    with pytest.raises(
        ClassifierError, match=r"got small with one that was never fitted: call bla\.fit\(wrapped, images"
    ):
        unfitted.explain(noise(9, 9))
    with pytest.raises(ClassifierError, match=r"bla\.fit"):
        next(unfitted.explain_each([noise(9, 9)]))


def test_training_mode_is_refused(wrapped: ExplainableClassifier) -> None:
    with pytest.raises(ClassifierError, match=r"call \.eval\(\) before \.explain"):
        wrapped.train().explain(noise(9, 9))


def test_an_explanation_is_what_forward_computed(wrapped: ExplainableClassifier) -> None:
    photo = noise(40, 60)
    (explanation,) = wrapped.explain(photo)
    pixels = wrapped.pixels(wrapped.transform.read(photo).pixels[None])
    with torch.no_grad():
        probabilities, selection = wrapped(pixels).softmax(-1)[0], wrapped.select(pixels)
    ranked = probabilities.sort(descending=True)
    assert [guess.index for guess in explanation.top] == ranked.indices[:5].tolist()
    assert [guess.probability for guess in explanation.top] == pytest.approx(ranked.values[:5].tolist(), rel=1e-5)
    assert explanation.prediction == explanation.top[0]
    assert explanation.prediction.label == f"class {ranked.indices[0].item()}"
    assert explanation.grid == (4, 6)
    assert 1 < explanation.size < 24
    assert explanation.selected.tolist() == (selection.hard[0] > 0).tolist()
    for found, expected in zip(
        (explanation.unbounded, explanation.scores, explanation.soft), selection[:3], strict=True
    ):
        np.testing.assert_allclose(found, expected[0].numpy(), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    assert (explanation.scores[explanation.selected] == 0).all()
    assert (explanation.image, explanation.method, explanation.setup) == ("image 0", "BLA", "BLA-PH, no threshold")
    assert (explanation.model, explanation.target) == ("small", None)
    assert Explanation.from_dict(explanation.to_dict()) == explanation


def test_a_photo_is_a_photo_in_any_form(wrapped: ExplainableClassifier, tmp_path: Path) -> None:
    photo = noise(40, 60)
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    last = torch.from_numpy(photo)
    forms: list[Any] = [path, str(path), Image.fromarray(photo), photo, last, last.permute(2, 0, 1)]
    explanations = [wrapped.explain(form) for form in forms]
    assert all(len(found) == 1 for found in explanations)
    assert [found[0].image for found in explanations] == [str(path)] * 2 + ["image 0"] * 4
    for (explanation,) in explanations:
        assert dataclasses.replace(explanation, image="") == dataclasses.replace(explanations[0][0], image="")
    together = wrapped.explain(forms)
    assert [found.image for found in together] == [str(path)] * 2 + [f"image {index}" for index in range(2, 6)]
    assert all(same(found, explanations[0][0]) for found in together)


def same(one: Explanation, other: Explanation) -> bool:
    """But for their names, and for rounding: sums depend a little on the batch."""
    return (
        one.prediction.index == other.prediction.index
        and one.region == other.region
        and np.array_equal(one.selected, other.selected)
        and np.allclose(one.unbounded, other.unbounded, rtol=1e-4, atol=1e-5)
    )


def test_normalised_pixels_are_taken_as_they_are(wrapped: ExplainableClassifier) -> None:
    photo = noise(40, 60)
    pixels = wrapped.pixels(wrapped.transform.read(photo).pixels[None])
    (expected,) = wrapped.explain(photo)
    (alone,), (batched,) = wrapped.explain(pixels[0]), wrapped.explain(pixels)
    (double,) = wrapped.explain(pixels.double())
    for found in (alone, batched, double):
        assert list(found.region) == [0, 0, 48, 32]
        assert same(dataclasses.replace(found, region=expected.region), expected)
    assert wrapped.explain(torch.randn(5, 3, 32, 48), batch_size=2)[4].image == "image 4"


def test_an_explanation_knows_a_photo_that_came_in_memory(wrapped: ExplainableClassifier, tmp_path: Path) -> None:
    image = Image.fromarray(noise(40, 60))
    image.save(tmp_path / "photo.png")
    array = np.array(image)
    paths, arrays, images = (wrapped.explain(each)[0] for each in (tmp_path / "photo.png", array, image))
    (content,) = wrapped.explain((tmp_path / "photo.png").read_bytes())
    array[:] = 0
    assert paths.photo is None
    assert all(np.array_equal(each.upright(), image) for each in (paths, arrays, images, content))
    shown = wrapped.transform.read(image).pixels
    pixels = wrapped.explain(wrapped.pixels(shown[None]))[0]
    assert np.array_equal(pixels.upright(), shown)
    assert pixels.overlay().size == (48, 32)


def test_batches_make_no_difference(wrapped: ExplainableClassifier) -> None:
    photos = np.stack([noise(20, 30, seed) for seed in range(7)])
    expected = [wrapped.explain(photo)[0] for photo in photos]
    for batch_size in (1, 3, 16):
        found = wrapped.explain(photos, batch_size=batch_size)
        assert [explanation.image for explanation in found] == [f"image {index}" for index in range(7)]
        assert all(map(same, found, expected))
    assert all(map(same, wrapped.explain_each(iter(photos)), expected))  # type: ignore[arg-type]
    assert wrapped.explain([]) == []


def test_size_asks_for_so_many_cells(wrapped: ExplainableClassifier) -> None:
    photos = [noise(20, 30, seed) for seed in range(3)]
    for size in (1, np.int64(5), 24):
        assert [explanation.size for explanation in wrapped.explain(photos, size=size)] == [size] * 3
    with pytest.raises(ClassifierError, match="expected a size from 1 to 24, the cells of small, got 25"):
        wrapped.explain(photos, size=25)
    for none_or_some in (photos, []):
        for size in (0, 2.5):
            with pytest.raises(ClassifierError, match=f"expected a size of at least 1, a whole number, got {size}"):
                wrapped.explain(none_or_some, size=size)  # type: ignore[arg-type]


def test_a_folder_is_the_photos_in_it(wrapped: ExplainableClassifier, tmp_path: Path) -> None:
    for name in ("b.png", "a.png"):
        Image.fromarray(noise(20, 30, 1)).save(tmp_path / name)
    for folder in (tmp_path, str(tmp_path), [tmp_path]):
        found = wrapped.explain(folder)
        assert [Path(explanation.image).name for explanation in found] == ["a.png", "b.png"]


def test_wrappers_are_unwrapped_and_others_refused() -> None:
    model = plain()
    pixels = torch.randn(2, 3, 64, 64)
    expected = explainable(model, transform=inputs(64))(pixels)
    for around in (nn.DataParallel(model), torch.compile(model)):
        assert explainable(around, transform=inputs(64))(pixels).shape == expected.shape
    for wrong in ("resnet50", None, explainable(model, transform=inputs(64))):
        with pytest.raises(ClassifierError, match=r"expected a classifier, a torch\.nn\.Module not wrapped yet"):
            explainable(wrong)  # type: ignore[arg-type]
    learner = SimpleNamespace(criterion_=nn.CrossEntropyLoss(), module_=model, lr=0.1)
    with pytest.raises(ClassifierError, match=r"not wrapped yet, got SimpleNamespace: pass its \.module_$"):
        explainable(learner)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("transform", "region"),
    [
        (inputs(32, 48), (0, 0, 90, 60)),
        (inputs(32, mode="crop", crop_fraction=1.0), (15, 0, 75, 60)),
        # 60 rows become 64, of which the middle 32 are kept: of 96 x 64 pixels those from (32, 16) to (64, 48)
        (inputs(32, mode="crop", crop_fraction=0.5), (30, 15, 60, 45)),
    ],
    ids=["squash", "crop", "small crop"],
)
def test_the_region_is_what_the_model_saw(transform: Transform, region: tuple[float, ...]) -> None:
    wrapped = explainable(plain(), transform=transform)
    wrapped.fitted = True
    photo = noise(60, 90)
    (explanation,) = wrapped.explain(photo)
    assert explanation.region == pytest.approx(region)
    left, top, right, bottom = (round(side) for side in explanation.region)
    outside = np.ones((60, 90), bool)
    # the resize is antialiased: at the edge it reads a few pixels more
    outside[max(top - 4, 0) : bottom + 4, max(left - 4, 0) : right + 4] = False
    photo[outside] = 0
    (again,) = wrapped.explain(photo)
    np.testing.assert_allclose(again.unbounded, explanation.unbounded, rtol=1e-5, atol=1e-6)


def test_unreadable_photos_are_reported_and_the_others_explained(
    wrapped: ExplainableClassifier, tmp_path: Path
) -> None:
    path, damaged, absent = tmp_path / "photo.png", tmp_path / "damaged.jpg", tmp_path / "absent.jpg"
    Image.fromarray(noise(40, 60)).save(path)
    damaged.write_bytes(b"no photo")
    wrong: list[Any] = [
        damaged,
        absent,
        np.zeros((4, 4, 3), np.float32),
        torch.zeros(4, 4, 3, dtype=torch.int64),
        torch.zeros(3, 32, 32),
        None,
    ]
    for batch_size in (1, 2, 16):
        found = list(wrapped.explain_each([path, *wrong, path], batch_size=batch_size))
        assert isinstance(found[0], Explanation)
        assert isinstance(found[-1], Explanation)
        reports = found[1:-1]
        assert all(isinstance(report, Unexplained) for report in reports)
        names = [str(damaged), str(absent), "image 3", "image 4", "image 5", "image 6"]
        assert [report.image for report in reports] == names
        for report, name in zip(reports, names, strict=True):
            assert isinstance(report, Unexplained)
            assert report.error.startswith(f"{name}: ")
            assert "expected" in report.error
    for index, error in (
        (0, "damaged.jpg: expected"),
        (2, "image 1: expected"),
        (4, "image 1: expected normalised pixels"),
    ):
        with pytest.raises(DataError, match=error):
            wrapped.explain([path, wrong[index]])


def test_features_that_are_not_finite_are_reported(wrapped: ExplainableClassifier) -> None:
    pixels = torch.randn(4, 3, 32, 48)
    pixels[1, 0, 8, 8] = math.nan
    pixels[2] *= 1e38
    found = list(wrapped.explain_each(pixels))
    assert [type(result) for result in found] == [Explanation, Unexplained, Unexplained, Explanation]
    assert isinstance(found[1], Unexplained)
    assert (
        found[1].error
        == "image 1: expected finite features from small, got NaN or infinity in its pixels: replace them"
    )
    (alone,) = wrapped.explain(pixels[3])
    assert isinstance(found[3], Explanation)
    assert same(found[3], alone)


def test_the_fixed_size_rival_explains_too() -> None:
    for attention in (L2XAttention(8, size=5), L2XAttention(8, size=99)):
        wrapped = explainable(plain(), transform=inputs(32, 48), attention=attention)
        wrapped.fitted = True
        photo = noise(40, 60)
        (first,), (second,) = wrapped.explain(photo), wrapped.explain(photo)
        assert first == second
        assert (first.method, first.size) == ("L2X", min(attention.size, 24))


def test_explaining_leaves_no_gradient_and_no_mode_behind(wrapped: ExplainableClassifier) -> None:
    before = snapshot(wrapped)
    wrapped.explain([noise(40, 60)] * 3)
    assert_untouched(wrapped, before)
    assert torch.is_grad_enabled()
    each = wrapped.explain_each([noise(40, 60)] * 40, batch_size=1)
    next(each)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    threads = threading.active_count()
    each.close()  # type: ignore[attr-defined]
    assert threading.active_count() < threads


@pytest.mark.parametrize("fill", FILLS)
def test_a_check_asks_the_original_about_the_selected_pixels_alone_and_the_others(fill: str) -> None:
    torch.manual_seed(0)
    model = plain().eval()
    wrapped = explainable(model, transform=inputs(32, 48), classes=list("abc"))
    wrapped.fitted = True
    pixels = torch.randn(2, 3, 32, 48)
    for photo, why in zip(pixels, wrapped.explain(pixels, check=True, fill=fill), strict=True):
        assert why.check is not None
        kept = torch.tensor(why.selected)[None].float()
        with torch.inference_mode():
            alone, without = (model(masked(photo[None], mask, fill)).softmax(-1)[0] for mask in (kept, 1 - kept))
        about = why.check.about.index
        assert why.check.about == why.classifier
        assert why.check.fill == fill
        assert why.check.probability_kept == pytest.approx(float(alone[about]), abs=1e-5)
        assert why.check.probability_removed == pytest.approx(float(without[about]), abs=1e-5)
        assert (why.check.kept.index, why.check.removed.index) == (int(alone.argmax()), int(without.argmax()))
    assert all(why.check is None for why in wrapped.explain(pixels))
    with pytest.raises(ClassifierError, match="expected a fill among coarse, blur, mean, grey, got 'black'"):
        wrapped.explain(pixels, check=True, fill="black")
