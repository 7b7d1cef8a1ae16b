"""Images: the default tensor against PIL to the bit, whoever decodes, and JPEGs at a part of their size."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dynams_stream import images
from dynams_stream.images import open_image, rgb_tensor


def some_image(width: int, height: int, mode: str) -> Image.Image:
    generator = np.random.default_rng([width, height])
    coarse = generator.integers(0, 255, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pil(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGB"))


def as_bytes(tensor: Any) -> np.ndarray:
    return (tensor * 255).round().byte().permute(1, 2, 0).numpy()


JPEGS = [
    encoded(some_image(*size, mode), "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
    for size, mode, quality, subsampling, progressive in itertools.product(
        ((120, 90), (33, 17)), ("RGB", "L", "CMYK"), (30, 95), (0, 1, 2), (False, True)
    )
]


@pytest.mark.parametrize("decoder", ["simplejpeg", "PIL alone"])
def test_the_default_tensor_is_pils_to_the_bit(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if decoder == "PIL alone":
        monkeypatch.setattr(images, "simplejpeg", None)
    else:
        pytest.importorskip("simplejpeg")
    others = [encoded(some_image(20, 30, mode), "PNG") for mode in ("RGB", "L", "P", "RGBA")]
    rgb = encoded(some_image(40, 30, "RGB"), "JPEG", keep_rgb=True)
    for data in [*JPEGS, *others, rgb]:
        np.testing.assert_array_equal(as_bytes(rgb_tensor(data)), by_pil(data))


def test_simplejpeg_is_used_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("simplejpeg")
    monkeypatch.setattr(images.Image, "open", lambda file: pytest.fail("asked PIL"))
    assert rgb_tensor(encoded_rgb := JPEGS[0]).shape == (3, 90, 120)
    assert encoded_rgb.startswith(b"\xff\xd8\xff")


def test_what_is_broken_is_refused_as_by_pil() -> None:
    whole = encoded(some_image(120, 90, "RGB"), "JPEG")
    for data in (b"", b"no image", whole[:3], whole[:200], whole[: len(whole) // 2]):
        with pytest.raises((OSError, SyntaxError)) as expected:
            by_pil(data)
        with pytest.raises(expected.type):
            rgb_tensor(data)


@pytest.mark.parametrize(
    ("least_side", "size"),
    [(None, (128, 96)), (97, (128, 96)), (48, (64, 48)), (25, (64, 48)), (24, (32, 24)), (1, (16, 12))],
)
def test_jpegs_keep_the_least_side(least_side: int | None, size: tuple[int, int]) -> None:
    for mode in ("RGB", "L"):
        data = encoded(some_image(128, 96, mode), "JPEG", quality=95)
        with open_image(data, least_side) as image:
            assert (image.size, image.mode) == (size, mode)
        tensor = rgb_tensor(data, least_side)
        assert tensor.shape == (3, size[1], size[0])
        shrunk = np.asarray(some_image(128, 96, mode).convert("RGB").resize(size, Image.Resampling.BOX), dtype=float)
        assert np.abs(as_bytes(tensor) - shrunk).mean() < 6


def test_other_formats_stay_as_they_are() -> None:
    data = encoded(some_image(120, 90, "RGB"), "PNG")
    assert rgb_tensor(data, 10).shape == (3, 90, 120)
