"""From an image's bytes to what scoring is given: a PIL image for users' transforms, or the default tensor.

JPEGs take most of the time of scoring where they are large. Two things make them cheaper:

* Where the default tensor is asked for, simplejpeg decodes them, if it is installed (the extra `jpeg`): two thirds of
  PIL's time, and the same pixels to the bit. What it refuses, PIL decodes, or says what is wrong with it.
* `least_side` decodes them at 1/2, 1/4 or 1/8 of their size while both sides keep so many pixels. A transform that
  shrinks them anyway hardly sees it; the pixels are others, though.
"""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

_JPEG = b"\xff\xd8\xff"
_AS_PIL_HAS_THEM = ("YCbCr", "Gray")
"""Colours of JPEGs whose conversion to RGB is the same in both; CMYK is not."""


def open_image(data: bytes, least_side: int | None = None) -> Image.Image:
    """The image as PIL opens it, its mode untouched.

    Args:
        data: the file's bytes.
        least_side: decode a JPEG at 1/2, 1/4 or 1/8 of its size as long as both sides keep so many pixels.

    Raises:
        OSError, SyntaxError, ValueError: as PIL does, of what is no image.
    """
    image = Image.open(io.BytesIO(data))
    if least_side is not None:
        image.draft(None, (least_side, least_side))  # the mode stays; other formats ignore it
    return image


def rgb_tensor(data: bytes, least_side: int | None = None) -> Tensor:
    """RGB, float32, channels first, in [0, 1]: shape (3, height, width). Arguments and errors as for `open_image`."""
    pixels = _decode_jpeg(data) if least_side is None else None
    if pixels is None:
        with open_image(data, least_side) as image:
            pixels = np.array(image.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255)


def _decode_jpeg(data: bytes) -> npt.NDArray[np.uint8] | None:
    """A JPEG's pixels by simplejpeg; None where PIL has to see to it."""
    if simplejpeg is None or not data.startswith(_JPEG):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in _AS_PIL_HAS_THEM or height * width > (Image.MAX_IMAGE_PIXELS or 0):
            return None
        pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None
    return pixels
