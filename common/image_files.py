"""Files of images of one's own: found, read, and prepared for a network."""

from collections.abc import Iterable
import os
from pathlib import Path
import sys
from typing import NamedTuple
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from common.errors import Failure, InputError
from common.files import printable
from common.idx import read_idx
from common.images import FRAME, is_dark_on_light, prepare_digit, resize

FORMATS = ('PNG', 'JPEG', 'TIFF')  # Pillow would also run other programs, Ghostscript for one
SUFFIXES = {'.png', '.jpg', '.jpeg', '.tif', '.tiff'}
IDX_BEGINNINGS = (b'\0\0\x08', b'\x1f\x8b')  # raw, gzip

HANDWRITTEN = ('mnist', 'mnist-5k')  # data sets whose images were made as by prepare_digit


class OwnImages(NamedTuple):
    """Images that were read.

    Attributes
    ----------
    names
        A name for each image: the path of its file, with its number in an IDX file.
    images
        uint8 (N, height, width), as the network takes them.
    num_inverted
        How many had dark digits on a light background.
    failures
        A sentence for each file that could not be read.
    """

    names: list[str]
    images: np.ndarray
    num_inverted: int
    failures: list[str]

    def check_complete(self) -> None:
        """Name on stderr what could not be read; raise a Failure, status 1, if there is any."""
        if self.failures:
            print(*self.failures, sep='\n', file=sys.stderr)
            raise Failure(f'files that could not be read and were left out: {len(self.failures)}')


def load_images(
    paths: Iterable[str | os.PathLike], dataset: str, image_shape: tuple[int, int]
) -> OwnImages:
    """Read image files, folders of them, and IDX files, and prepare them for a network.

    Parameters
    ----------
    paths
        PNG, JPEG or TIFF files; folders, of which all such files are taken, those of their folders
        too, in sorted order; IDX files of images.
    dataset
        What the network was trained on. For MNIST, digits are prepared by :func:`prepare_digit`;
        for other data, images are resized.
    image_shape
        (height, width) of the network's images. Images of an IDX file that have it already are
        taken as they are.

    Raises
    ------
    InputError
        If nothing could be read.
    """
    is_digit = dataset in HANDWRITTEN and image_shape == (FRAME, FRAME)
    names, images, failures, num_inverted = [], [], [], 0
    for path in tqdm(find_files(paths), 'reading', unit='file', leave=False, disable=None):
        try:
            for name, image, is_prepared in _read(path, image_shape):
                names.append(name)
                if is_prepared:
                    images.append(image)
                elif is_digit:
                    num_inverted += is_dark_on_light(image)
                    images.append(prepare_digit(image))
                else:
                    images.append(resize(image, image_shape))
        except InputError as error:
            failures.append(str(error))
    if not images:
        raise InputError('; '.join(failures[:3]) + ('; ...' if len(failures) > 3 else ''))
    return OwnImages(names, np.stack(images), num_inverted, failures)


def find_files(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """Return files as they are, and in place of a folder its images, in sorted order."""
    found = []
    for path in map(Path, paths):
        inside = sorted(path.rglob('*')) if os.path.isdir(path) else []
        inside = [file for file in inside if file.suffix.lower() in SUFFIXES]
        inside = [file for file in inside if file.name[0] != '.' and os.path.isfile(file)]
        found += inside or [path]  # a folder without images is named when it cannot be read
    return found


def _read(path, image_shape):
    """Return (name, image, whether it is as the network takes it) of the images of a file."""
    name = printable(path)
    if os.path.isdir(path):
        raise InputError(f'{name}: no PNG, JPEG or TIFF file is in this folder')
    if not os.path.exists(path):
        raise InputError(f'{name}: there is no such file')
    if not os.path.isfile(path):
        raise InputError(f'{name}: not a regular file')
    try:
        with open(path, 'rb') as file:
            is_idx = file.read(3).startswith(IDX_BEGINNINGS)
    except OSError as error:
        raise InputError(f'{name}: {error.strerror}') from None
    if not is_idx:
        return [(name, read_image(path), False)]
    images, _ = read_idx(path)
    if images.ndim != 3:
        raise InputError(f'{name}: an IDX file of labels, not of images')
    is_prepared = images.shape[1:] == image_shape
    return [(f'{name}[{i}]', image, is_prepared) for i, image in enumerate(images)]


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read a PNG, JPEG or TIFF file in shades of gray, uint8 (H, W).

    Transparent pixels are white, the orientation is that of its EXIF data, 16 bits become 8. Of
    several pages the first one is read.

    Raises
    ------
    InputError
        If it is not such a file, damaged, or of more than Pillow's ``Image.MAX_IMAGE_PIXELS``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of damaged metadata
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return _gray(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        reason = 'not a PNG, JPEG or TIFF image'
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        reason = f'it has more than {Image.MAX_IMAGE_PIXELS:,} pixels'
    except MemoryError:
        reason = 'it does not fit in memory'
    except Exception as error:  # Pillow's readers of damaged files raise errors of any kind
        reason = f'it cannot be read: {error}'
    raise InputError(f'{printable(path)}: {reason}')


def _gray(image):
    """Return a Pillow image as uint8 (H, W)."""
    if image.mode == 'F':
        raise ValueError('its pixels are not whole numbers: save it with 8 or 16 bits')
    if image.mode.startswith('I'):
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError('its pixels have more than 16 bits')
        return (pixels // 257).astype(np.uint8)
    if 'A' in image.mode.upper() or 'transparency' in image.info:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return np.asarray(image.convert('L'))
