"""The classifier's own preprocessing: the pixels of timm's, torchvision's and transformers' pipelines."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from packaging.version import Version
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms._presets import ImageClassification

import bla
from bla.data.photo import DataError, Transform
from bla.model.classifier import ClassifierError
from bla.model.preprocessing import transform_of, transform_of_code

HALF = (0.5, 0.5, 0.5)
SHAPES = [(300, 231), (187, 400), (30, 41), (5, 3), (90, 90), (40, 400)]  # rows, columns


def noise(rows: int, columns: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(rows).randint(0, 256, (rows, columns, 3), np.uint8))


def timms(**config: Any) -> nn.Module:
    """A small model of timm with another configuration; its input stays tiny."""
    return timm.create_model("resnet10t", pretrained_cfg_overlay={"mean": HALF, "std": HALF, **config})


def levels(pixels: torch.Tensor, transform: Transform) -> np.ndarray[Any, Any]:
    """Normalised pixels (3, H, W) as levels (H, W, 3)."""
    back = pixels.double().permute(1, 2, 0).numpy() * transform.std + transform.mean
    return np.rint(255 * back)


@pytest.mark.parametrize(
    "config",
    [
        {"input_size": (3, 64, 64), "crop_pct": 0.875},
        {"input_size": (3, 64, 64), "crop_pct": 0.89, "interpolation": "bilinear"},
        pytest.param(
            {"input_size": (3, 64, 96), "crop_pct": 0.9},
            marks=pytest.mark.skipif(Version(timm.__version__) < Version("1.0.31"), reason="timm resized otherwise"),
        ),
        {"input_size": (3, 64, 64), "crop_pct": 1.0, "crop_mode": "squash"},
        {"input_size": (3, 64, 96), "crop_pct": 0.9, "crop_mode": "squash"},
    ],
    ids=["centre", "bilinear", "oblong", "squash", "squash and crop"],
)
def test_the_pixels_are_timms(config: dict[str, Any], tmp_path: Path) -> None:
    model = timms(**config)
    transform, theirs = transform_of(model), create_transform(**resolve_model_data_config(model), is_training=False)
    for rows, columns in SHAPES:
        photo = noise(rows, columns)
        photo.save(tmp_path / "photo.png")
        assert np.array_equal(transform.read(tmp_path / "photo.png").pixels, levels(theirs(photo), transform))


def test_a_pipeline_that_pads_is_called_as_it_is() -> None:
    model = timms(crop_mode="border")
    wrapped = bla.explainable(model)
    photo = noise(60, 90)
    made = create_transform(**resolve_model_data_config(model), is_training=False)(photo)
    with torch.no_grad():
        expected = model.eval()(made[None]).softmax(-1).max()
    why = wrapped.explain(photo)[0]
    assert why.classifier is not None
    assert why.classifier.probability == pytest.approx(float(expected), abs=1e-6)
    assert (why.shown, wrapped.transform.source) == ("the input that the classifier saw", "timm")
    with pytest.raises(DataError, match="expected preprocessing that can be written down, got Compose, which is code"):
        wrapped.transform.to_dict()
    assert transform_of(model, "squash").mode == "squash"
    assert bla.explainable(model, transform=Transform((64, 64), HALF, HALF)).transform.mode == "squash"


def test_another_mode_keeps_the_rest() -> None:
    own = transform_of(timms(crop_pct=0.95))
    assert transform_of(timms(crop_pct=0.95), "squash") == dataclasses.replace(own, mode="squash")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        # resnet18 has one set of weights, resnet50's default ones are the second
        ("resnet18", (256, "torchvision's ResNet18_Weights.IMAGENET1K_V1")),
        ("resnet50", (232, "torchvision's ResNet50_Weights.IMAGENET1K_V2")),
        (10, (256, "torchvision's ResNet18_Weights.IMAGENET1K_V1")),
    ],
)
def test_torchvisions_models_have_the_preset_of_their_weights(model: str | int, said: tuple[int, str]) -> None:
    with torch.device("meta"):
        named = {"name": model} if isinstance(model, str) else {"name": "resnet18", "num_classes": model}
        made = torchvision.models.get_model(**named)
    short, source = said
    words = f"preprocessing: short side to {short} (bilinear), centre crop 224 x 224, from {source}"
    assert transform_of(made).in_words() == words


def test_a_preset_is_a_transform() -> None:
    for crop, short in ((224, 232), (64, 73), (61, 61)):
        preset = ImageClassification(crop_size=crop, resize_size=short, mean=HALF, std=HALF)
        transform = transform_of_code(preset)
        for rows, columns in SHAPES:
            photo = noise(rows, columns)
            assert np.array_equal(transform.pixels(photo), levels(preset(photo), transform))
    model = nn.Sequential(nn.Conv2d(3, 2, 8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert bla.explainable(model, transform=preset).transform.source == "ImageClassification"


def by_hand(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Somebody's own, by NumPy: every second row and column of a part, colours reversed, last."""
    return array[10:58:2, 10:74:2, ::-1].astype(np.float32) / 127.5 - 1


def named(*, image: np.ndarray[Any, Any]) -> dict[str, Any]:
    """As albumentations are called."""
    return {"image": by_hand(image)}


TO_FLOAT = v2.ToDtype(torch.float32, scale=True)
ALONE = v2.Compose([v2.Resize((32, 40)), TO_FLOAT])
RESIZE = v1.Resize((32, 32))
CODE: dict[str, tuple[Any, Callable[[Image.Image], Any] | None, str]] = {
    # code, how its input is made of a photo unless by a call, and what it is taken for
    "torchvision": (v1.Compose([v1.Resize(48), v1.CenterCrop(32), v1.ToTensor()]), None, "crop"),
    "v2": (v2.Compose([v2.Resize((32, 40)), v2.ToImage(), TO_FLOAT]), None, "squash"),
    "v2, tensors first": (v2.Compose([v2.ToImage(), v2.Resize((32, 40)), TO_FLOAT]), None, "nearly squash"),
    "v2, tensors alone": (ALONE, lambda photo: ALONE(v2.functional.pil_to_tensor(photo)), "nearly squash"),
    "timm": (create_transform((3, 32, 32), is_training=False, crop_pct=0.8), None, "crop"),
    "timm, padded": (create_transform((3, 32, 32), is_training=False, crop_mode="border"), None, "input"),
    "grey": (v1.Compose([v1.Grayscale(), RESIZE, v1.ToTensor()]), None, "squash"),
    "standardised": (v1.Compose([RESIZE, v1.ToTensor(), lambda x: (x - x.mean()) / x.std()]), None, "input"),
    "padded": (v1.Compose([v1.Pad(9), RESIZE, v1.ToTensor()]), None, "input"),
    "mirrored": (v1.Compose([RESIZE, v1.functional.hflip, v1.ToTensor()]), None, "input"),
    "a batch": (v1.Compose([RESIZE, v1.ToTensor(), lambda x: x[None]]), None, "squash"),
    "by hand": (by_hand, lambda photo: by_hand(np.asarray(photo)).transpose(2, 0, 1), "photo"),
    "by name": (named, lambda photo: by_hand(np.asarray(photo)).transpose(2, 0, 1), "photo"),
}  # fmt: skip


@pytest.mark.parametrize(("code", "by", "taken"), CODE.values(), ids=CODE)
def test_a_classifier_gets_just_what_its_code_makes(code: Any, by: Any, taken: str) -> None:
    transform = transform_of_code(code)
    channels = nn.Conv2d(transform.channels, 4, 8, 8)
    net = nn.Sequential(channels, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    wrapped = bla.explainable(net, transform=code)
    for rows, columns in ((75, 90), (120, 80)):
        photo = noise(rows, columns)
        theirs = torch.as_tensor((by or code)(photo)).reshape(1, *transform.shape)
        with torch.no_grad():
            expected = net(theirs).softmax(-1)
        for source in (photo, np.asarray(photo)):
            why = wrapped.explain(source)[0]
            assert why.classifier is not None
            assert why.classifier.probability == pytest.approx(float(expected.max()), abs=1e-5)
            assert ("the input that the classifier saw" in str(why.shown)) == (taken == "input")
            assert why.upright().size == (transform.size[::-1] if taken == "input" else photo.size)
    if taken in ("input", "photo"):
        with pytest.raises(DataError, match=r"expected preprocessing that can be written down, got .*, which is code"):
            transform.to_dict()
    else:
        near = taken.startswith("nearly")
        with pytest.warns(UserWarning, match="takes its place") if near else contextlib.nullcontext():
            record = transform.to_dict()
        assert Transform.from_dict(record).mode == taken.removeprefix("nearly ")
        assert ("nearly" in record["source"]) == near


def of_deep_grey(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(array[:32, :40].astype(np.float32) / 4095)[None]


def of_bands(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return ((array[:32, :40] - 1000.0) / 800).transpose(2, 0, 1)


def of_volumes(array: np.ndarray[Any, Any]) -> torch.Tensor:
    return torch.from_numpy(array[:8, :16, :24].clip(-1000, 400).astype(np.float32) / 1400)[None]


GREY = v1.Compose([RESIZE, v1.ToTensor(), v1.Normalize((0.5,), (0.5,))])  # of three channels, too
VOLUMES = nn.Conv3d, nn.AdaptiveAvgPool3d
DEEP = v1.Compose([RESIZE, lambda photo: torch.tensor(np.array(photo, np.float32) / 4095)[None]])


@pytest.mark.parametrize(
    ("code", "channels", "shape"),
    [(of_deep_grey, 1, (60, 70)), (DEEP, 1, (60, 70)), (of_bands, 11, (60, 70, 11)), (of_volumes, 1, (9, 20, 30))],
)
def test_code_for_other_arrays_than_photos(code: Any, channels: int, shape: tuple[int, ...]) -> None:
    array = np.random.RandomState(0).randint(0, 4096, shape).astype(np.uint16)
    convolution, pooling = (
        (nn.Conv3d, nn.AdaptiveAvgPool3d) if code is of_volumes else (nn.Conv2d, nn.AdaptiveAvgPool2d)
    )
    net = nn.Sequential(convolution(channels, 4, 8, 8), nn.ReLU(), pooling(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    wrapped = bla.explainable(net, transform=code)
    sources: list[Any] = [array]
    if array.ndim == 2:
        Image.fromarray(array).save(stored := io.BytesIO(), "PNG")
        sources += [Image.fromarray(array), stored.getvalue()]
    given = torch.as_tensor(code(Image.fromarray(array) if code is DEEP else array))
    with torch.no_grad():
        expected = float(net(given[None].float()).softmax(-1).max())
    for source in sources:
        why = wrapped.explain(source)[0]
        assert why.classifier is not None
        assert why.classifier.probability == pytest.approx(expected, abs=1e-5)
        assert why.shown == "the input that the classifier saw"
        assert why.upright().size == wrapped.transform.size[:-3:-1]


def test_grey_photos_for_a_classifier_of_one_channel() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    transform = bla.explainable(net, transform=GREY).transform
    assert (type(transform), transform.mean, transform.interpolation) == (Transform, (0.5,), "bilinear")
    assert transform_of_code(GREY).mean == HALF


def test_regions_of_code_are_found_by_ramps() -> None:
    assert transform_of_code(by_hand).region((90, 75)) == pytest.approx((10, 10, 74, 58), abs=1)
    middle = v2.Compose([v2.ToImage(), v2.CenterCrop(40), v2.Resize((20, 20)), TO_FLOAT])
    assert transform_of_code(middle).region((120, 60)) == pytest.approx((40, 10, 80, 50), abs=1)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (v1.Compose([v1.RandomResizedCrop(32), v1.ToTensor()]), "of evaluation, got Compose, .* each time"),
        (RESIZE, "expected floats from Resize, got a Pillow image: add ToTensor"),
        (v2.Compose([RESIZE, v2.PILToTensor()]), "expected floats from Compose, got uint8: add a conversion"),
        (v1.Compose([v1.FiveCrop(32), lambda five: torch.stack([v1.ToTensor()(each) for each in five])]), "got shape"),
        (lambda photo: 1 / 0, "expected an input from <lambda>, got ZeroDivisionError: division by zero"),
        ({"size": 224}, "expected a bla.Transform, or code that makes a classifier's input .*, got dict"),
    ],
)  # fmt: skip
def test_code_that_is_no_preprocessing_is_refused(code: Any, message: str) -> None:
    with pytest.raises(ClassifierError, match=message):
        bla.explainable(nn.Flatten(), transform=code)


ODD = {"size": {"height": 32, "width": 40}}
CROP = {"size": {"shortest_edge": 40}, "crop_size": {"height": 36, "width": 36}}
PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("ViT", ODD),
    ("ViT", ODD | {"do_normalize": False}),
    ("ViT", ODD | {"rescale_factor": 1 / 100, "image_mean": [0.1, 0.2, 0.3], "resample": 3}),
    ("ViT", ODD | {"do_rescale": False, "image_mean": [100.0] * 3, "image_std": [60.0] * 3}),
    ("EfficientNet", ODD | {"rescale_offset": True, "include_top": True}),
    ("MobileViT", {"size": {"shortest_edge": 40}, "crop_size": {"height": 36, "width": 36}}),
    ("MobileViT", {"size": {"shortest_edge": 40}, "crop_size": {"height": 64, "width": 64}}),
    ("MobileNetV2", CROP),
    ("ConvNext", {"size": {"shortest_edge": 56}}),
    ("ConvNext", {"size": {"shortest_edge": 384}}),
    ("PoolFormer", CROP),
    ("DeiT", CROP | {"size": {"height": 40, "width": 40}}),
    ("Levit", CROP),
    ("CLIP", CROP | {"do_convert_rgb": True}),
    ("Bit", CROP | {"do_resize": False}),
]


@pytest.mark.parametrize(("name", "options"), PROCESSORS)
@pytest.mark.parametrize("kind", ["", "Pil"])
def test_every_setting_of_a_processor_is_honoured(name: str, options: dict[str, Any], kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{name}ImageProcessor{kind}")(**options)
    transform = transform_of_code(processor)
    for rows, columns in ((200, 400), (90, 61), (211, 333)):
        photo = noise(rows, columns)
        theirs = processor(images=photo, return_tensors="np")["pixel_values"][0]
        levels = transform.read(photo).pixels.astype(np.float64)
        ours = np.moveaxis((levels / 255 - transform.mean) / transform.std, -1, 0)
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max())


EDGES = {"size": {"shortest_edge": 32, "longest_edge": 64}}
AS_LARGE: dict[str, tuple[Callable[[Any], Any], bool]] = {
    # how the code is made of transformers, and whether pictures show the photo
    "torchvision": (lambda _: v1.Compose([v1.Resize(32), v1.ToTensor()]), True),
    "DETR": (lambda transformers: transformers.DetrImageProcessor(**EDGES), True),
    "ViLT": (lambda transformers: transformers.ViltImageProcessor(size={"shortest_edge": 32}, size_divisor=8), True),
    "padded": (lambda _: v1.Compose([v1.Resize(32), v1.Pad(8), v1.ToTensor()]), False),
    "MaskFormer": (lambda transformers: transformers.MaskFormerImageProcessor(**EDGES), True),
    "Idefics2, of several": (lambda transformers: transformers.Idefics2ImageProcessor(**EDGES), True),
}


@pytest.mark.parametrize(("make", "photos"), AS_LARGE.values(), ids=AS_LARGE)
def test_inputs_may_be_as_large_as_the_photo(make: Callable[[Any], Any], photos: bool) -> None:
    code = make(pytest.importorskip("transformers"))
    net = nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)).eval()
    wrapped = bla.explainable(net, transform=code)
    given = [noise(60, 90), noise(60, 90), noise(90, 60), noise(48, 48)]
    explained = wrapped.explain(given, target=[0, 1, 2, None], batch_size=3)
    assert len({why.selected.shape for why in explained}) == 3
    for photo, why, target in zip(given, explained, [0, 1, 2, None], strict=True):
        made = code(photo) if isinstance(code, v1.Compose) else code(images=photo, return_tensors="pt")["pixel_values"]
        pixels = made.reshape(1, 3, *made.shape[-2:])
        assert why.selected.shape == tuple(side // 8 for side in pixels.shape[2:])
        with torch.no_grad():
            expected = net(pixels).softmax(-1).max()
        assert why.classifier is not None
        assert why.classifier.probability == pytest.approx(float(expected), abs=1e-5)
        assert target in (None, why.target)
        assert (why.shown is None) == photos
        assert why.upright().size == (photo.size if photos else pixels.shape[:1:-1])
        alone = wrapped.explain(pixels[0], target=target)[0]
        np.testing.assert_allclose(alone.unbounded, why.unbounded, atol=1e-5)
    assert wrapped.transform.in_words().count("to a size that depends on the photo") == 1
    with pytest.raises(ClassifierError, match="expected inputs of one size to learn from"):
        bla.fit(wrapped, given)
    flat = nn.Sequential(net[:2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    with pytest.raises(ClassifierError, match=r"of photos of any size, .* and not \(3, .*add a resize"):
        bla.explainable(Fixed(wrapped.transform.size, flat), transform=code)
    (_, rows, columns), *_ = wrapped.transform.shapes  # a tall input has as many pixels, and a square one has not
    flattened = nn.Sequential(net[:2], nn.Flatten(), nn.Linear(4 * (rows // 8) * (columns // 8), 3))
    with pytest.raises(ClassifierError, match="of photos of any size"):
        bla.explainable(flattened, transform=code)


class Fixed(nn.Module):
    """A classifier of pictures of one size, as a vision transformer is."""

    def __init__(self, size: tuple[int, ...], net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.positions = nn.Parameter(torch.zeros(size))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.net(pixels + self.positions)
        return found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen2VL", r"got shape \(704, 1176\), which holds patches: let a module"),
        ("Siglip2", r"got shape \(1, 256, 768\), which holds patches"),
        ("PaddleOCRVL", r"got shape \(816, 3, 14, 14\), which holds several pictures: switch off what cuts"),
        ("LlavaNext", r"got shape \(1, 7, 3, 224, 224\), which holds several pictures"),
        ("MiniCPMV4_6", r"got shape \(1, 3, 14, 15680\), which holds patches"),
        ("LightGlue", r"got ValueError: .*A pair of PIL images.*pass a function that makes it of a photo"),
        ("VitPose", r"got TypeError: .*missing 1 required positional argument: 'boxes'"),
    ],
)
def test_processors_of_no_classifier_are_refused_by_name(name: str, message: str) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ClassifierError, match=f"from {name}ImageProcessor, {message}"):
        transform_of_code(getattr(transformers, f"{name}ImageProcessor")())


class Behind(nn.Module):
    """A classifier behind what somebody does to its input."""

    def __init__(self, model: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.model, self.change = model, change

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(self.change(pixels))
        return found


IMAGENETS = v1.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
BEHIND: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float | None]] = {
    "as it comes": (lambda x: x, None),
    "normalised": (lambda x: (x - 0.5) / 0.5, 1),
    "normalised as ImageNet's": (IMAGENETS, 1),
    "of bytes": (lambda x: (x / 255 - 0.5) / 0.5, 255),
    "of bytes, to 1": (lambda x: x / 127.5 - 1, 255),
    "resized, too": (lambda x: (nn.functional.interpolate(x, (48, 48)) - 0.5) / 0.5, 1),
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_a_classifier_does_to_its_input_itself_is_not_done_before(name: str) -> None:
    change, white = BEHIND[name]
    stated, plain = timms(input_size=(3, 64, 64)), nn.Sequential(nn.Conv2d(3, 4, 8, 8), nn.AdaptiveAvgPool2d(1))
    photo = noise(90, 61)
    found, own = (np.moveaxis(given(transform_of(of), photo), -1, 0) for of in (Behind(stated, change), stated))
    if name != "resized, too":
        torch.testing.assert_close(change(torch.from_numpy(found)), torch.from_numpy(own), atol=1e-4, rtol=0)
    assumed, imagenets = transform_of(Behind(plain, change)), transform_of(plain)
    assert assumed.mean == (imagenets.mean if white is None else (0, 0, 0))
    assert assumed.std == (imagenets.std if white is None else pytest.approx((1 / white,) * 3, abs=1e-5))
    assert assumed.is_assumed
    assert not any(module._forward_pre_hooks for module in (*stated.modules(), *plain.modules()))


def given(transform: Transform, photo: Image.Image) -> np.ndarray[Any, Any]:
    return (transform.read(photo).pixels / 255 - transform.mean) / transform.std


def test_what_is_assumed_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    bla.explainable(plain, transform=transform_of(plain))
    assert capsys.readouterr().err == ""
    bla.explainable(plain, name="mine")
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("mine: preprocessing: whole photo squashed to 224 x 224 (bilinear), assumed")
    assert said.endswith("if it was trained with another, pass that as transform=")


def test_torchvisions_are_known_whatever_their_classes_and_in_another_module() -> None:
    with torch.device("meta"):
        b4 = torchvision.models.efficientnet_b4(num_classes=7)
        inception = torchvision.models.inception_v3(num_classes=7, init_weights=False, aux_logits=False)
        cut = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1], nn.Flatten(), nn.Linear(512, 7))
    assert [transform_of(of).size for of in (b4, Behind(b4, lambda x: x), inception)] == [
        (380,) * 2,
        (380,) * 2,
        (299,) * 2,
    ]
    assert transform_of(cut).is_assumed


def test_a_transformers_model_has_the_processor_that_is_saved_beside_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=16, **sizes))
    assert transform_of(model).is_assumed
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    for of in (loaded, Behind(loaded, lambda x: x)):
        found = transform_of(of)
        assert (found.size, found.mean, found.source) == ((32, 32), HALF, "ViTImageProcessor")


def test_what_is_used_is_said_in_one_line() -> None:
    squash = Transform((224, 260), HALF, HALF)
    assert squash.in_words() == "preprocessing: whole photo squashed to 260 x 224 (bicubic)"
    assumed = transform_of(nn.Flatten()).in_words()
    assert assumed.endswith("squashed to 224 x 224 (bilinear), assumed: the classifier states none")
    oblong = Transform((70, 140), HALF, HALF, mode="crop", source="timm")
    assert oblong.in_words().endswith("resized to cover 160 x 80 (bicubic), centre crop 140 x 70, from timm")
    both = dataclasses.replace(oblong, mode="squash-crop").in_words()
    assert both == "preprocessing: whole photo squashed to 160 x 80 (bicubic), centre crop 140 x 70, from timm"
