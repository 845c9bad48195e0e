"""Masked photos on shapes that are not square: equal to torch's and SciPy's operations, and loaded without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from bla.data.masking import FILLS, blurring, coarse, enlarged, enlarging, filled, masked
from bla.data.photo import DataError

PHOTOS = np.random.default_rng(0).standard_normal((2, 3, 29, 44)).astype(np.float32)


@pytest.mark.parametrize(("cells", "pixels"), [(7, 224), (7, 31), (3, 3), (1, 5), (9, 4)])
def test_enlarging_is_torchs(cells: int, pixels: int) -> None:
    row = torch.randn(1, 1, cells, generator=torch.Generator().manual_seed(0))
    expected = functional.interpolate(row, size=pixels, mode="linear", align_corners=False)[0, 0]
    np.testing.assert_allclose(enlarging(cells, pixels) @ row[0, 0].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(224, 260), (29, 44), (5, 16)])
def test_the_coarse_fill_is_torchs_area_average_enlarged_again(shape: tuple[int, int]) -> None:
    photos = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    points = functional.interpolate(photos, size=(12, 12), mode="area")
    expected = functional.interpolate(points, size=shape, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(filled(photos.numpy()), expected, atol=1e-5)


@pytest.mark.parametrize(("pixels", "sigma"), [(29, 2.2), (5, 4.0), (40, 0.1), (1, 3.0)])
def test_the_blur_is_scipys(pixels: int, sigma: float) -> None:
    row = np.random.default_rng(0).standard_normal(pixels)
    expected = ndimage.gaussian_filter1d(row, sigma, truncate=3, mode="mirror")
    np.testing.assert_allclose(blurring(pixels, sigma) @ row, expected, atol=1e-6)


def test_fills_by_hand() -> None:
    np.testing.assert_allclose(
        filled(PHOTOS, "mean"), np.broadcast_to(PHOTOS.mean((2, 3), keepdims=True), PHOTOS.shape), atol=1e-6
    )
    assert not filled(PHOTOS, "grey").any()
    soft = ndimage.gaussian_filter(PHOTOS, (0, 0, 2.2, 2.2), truncate=3, mode="mirror")
    np.testing.assert_allclose(filled(PHOTOS, "blur"), soft, atol=1e-5)
    with pytest.raises(DataError, match="expected a fill among coarse, blur, mean, grey, got 'pink'"):
        filled(PHOTOS, "pink")


@pytest.mark.parametrize("fill", FILLS)
def test_a_mask_keeps_all_none_or_a_part(fill: str) -> None:
    cells = np.ones((2, 3, 5), bool)
    np.testing.assert_allclose(masked(PHOTOS, cells, fill), PHOTOS, atol=1e-5)
    np.testing.assert_allclose(masked(PHOTOS, ~cells, fill), filled(PHOTOS, fill), atol=1e-5)
    cells[1, :, 2:] = False
    part = masked(PHOTOS, cells, fill)
    np.testing.assert_allclose(part[0], PHOTOS[0], atol=1e-5)
    np.testing.assert_allclose(part[1, :, :, :13], PHOTOS[1, :, :, :13], atol=1e-5)  # to its last cell's middle
    np.testing.assert_allclose(part[1, :, :, 22:], filled(PHOTOS, fill)[1, :, :, 22:], atol=1e-5)
    flat = np.full((1, 3, 9, 8), 0.5, np.float32)
    if fill != "grey":
        np.testing.assert_allclose(masked(flat, cells[1:], fill), flat, atol=1e-6)


@pytest.mark.parametrize("fill", FILLS)
def test_tensors_are_masked_as_arrays_are(fill: str) -> None:
    pixels = torch.from_numpy(PHOTOS)
    masks = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    found = masked(pixels, masks, fill)
    torch.testing.assert_close(found, torch.from_numpy(masked(PHOTOS, masks.numpy(), fill)))
    again = functional.interpolate(masks[:, None].float(), size=(29, 44), mode="bilinear")
    torch.testing.assert_close(enlarged(masks, pixels), again[:, 0])
    torch.testing.assert_close(found, again * pixels + (1 - again) * filled(pixels, fill))
    last = pixels.contiguous(memory_format=torch.channels_last)
    assert masked(last, masks, fill).is_contiguous(memory_format=torch.channels_last), "which convolutions like"


def test_matrices_keep_a_flat_row_and_cannot_be_changed() -> None:
    for matrix in (enlarging(7, 30), coarse(30), blurring(30, 1.5)):
        np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
        assert matrix.dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 0


def test_it_loads_no_torch() -> None:
    program = "import sys, bla.data.masking; sys.exit('torch' in sys.modules or 'scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
