"""Images of one's own as the network saw its images in training: resized, or as MNIST's digits."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

FRAME, BOX = 28, 20  # pixels: the side of an image of MNIST, the longer side of its digit
WORKING_SIZE = 1000  # pixels: larger images are reduced first
COARSE_SIZE = 28  # pixels: of the image in which a digit is found; it averages the noise
INK_FOUND, INK_KEPT = 0.2, 0.1  # of the strongest ink; chosen on digits made like photographs


def resize(image: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Resize an image, uint8 (H, W), to a shape (height, width)."""
    height, width = shape
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _border(image):
    """Return a mask (H, W) of the outermost twentieth of an image."""
    width = max(1, min(image.shape) // 20)
    border = np.ones(image.shape, bool)
    border[width:-width, width:-width] = False
    return border


def is_dark_on_light(image: np.ndarray) -> bool:
    """Whether what differs from the brightness of an image's border is darker than that.

    The cube lets few pixels of ink, (H, W) in all, outweigh noise in both directions.
    """
    difference = image - np.median(image[_border(image)])
    return bool((difference**3).sum() < 0)


def _ink(image):
    """Return how far each pixel is from its ground, float32 (H, W), at least 0.

    The ground is the plane through the border, so that light may fall from one side.
    """
    border = _border(image)
    y, x = np.nonzero(border)
    values = image[border].astype(np.float32)
    near = abs(values - np.median(values)) <= np.ptp(image) / 2  # the digit may touch the border
    terms = np.stack([y, x, np.ones_like(x)], axis=1)[near]
    (down, right, level), *_ = np.linalg.lstsq(terms, values[near], rcond=None)
    height, width = image.shape
    ground = level + down * np.arange(height)[:, None] + right * np.arange(width)
    ink = ground - image if is_dark_on_light(image) else image - ground
    return ink.clip(0).astype(np.float32)


def prepare_digit(image: np.ndarray) -> np.ndarray:
    """Prepare a digit as MNIST's makers prepared theirs.

    It fits into a box of 20 x 20 pixels, with its center of mass at the middle of 28 x 28, and is
    light on black: a dark digit on a light background is inverted.

    Parameters
    ----------
    image
        uint8 (H, W), with one digit anywhere in it.

    Returns
    -------
    numpy.ndarray
        uint8 (28, 28); all 0 for an image without a digit.
    """
    picture = Image.fromarray(image)
    picture = picture.reduce(max(1, max(picture.size) // WORKING_SIZE))
    ink = Image.fromarray(_ink(np.asarray(picture)))
    # An image of MNIST's own size stays as it is: there, faint pixels are no noise.
    found, kept = (INK_FOUND, INK_KEPT) if max(image.shape) > FRAME else (0, 0)
    if np.max(ink) < 1:
        return np.zeros((FRAME, FRAME), np.uint8)
    while True:  # a small digit in a large image is found more exactly in a part of it
        factor = max(1, max(ink.size) // COARSE_SIZE)
        coarse = np.asarray(ink.reduce(factor))
        y, x = np.nonzero(coarse > found * coarse.max())
        box = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) * factor
        if factor == 1 or max(box[2:] - box[:2]) > 0.8 * max(ink.size):
            break
        margin = np.array([-factor, -factor, factor, factor])
        ink = ink.crop(np.clip(box + margin, 0, [*ink.size, *ink.size]).tolist())
    ink = ink.crop(np.minimum(box, [*ink.size, *ink.size]).tolist())
    scale = BOX / max(ink.size)
    size = [max(1, round(scale * side)) for side in ink.size]
    digit = np.asarray(ink.resize(size, Image.Resampling.BICUBIC))
    digit = ((digit / digit.max() - kept) / (1 - kept)).clip(0, 1)
    height, width = digit.shape
    # The middle of MNIST's images is the middle of the pixel with the index 14.
    mass_y = digit.sum(axis=1) @ np.arange(height) / digit.sum()
    mass_x = digit.sum(axis=0) @ np.arange(width) / digit.sum()
    top = np.clip(round(FRAME / 2 - mass_y), 0, FRAME - height)
    left = np.clip(round(FRAME / 2 - mass_x), 0, FRAME - width)
    frame = np.zeros((FRAME, FRAME), np.uint8)
    frame[top : top + height, left : left + width] = np.round(255 * digit)
    return frame
