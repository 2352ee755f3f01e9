"""Images of one's own: digits prepared as MNIST's, files read, what is wrong with them."""

import gzip
import os
from pathlib import Path
import struct
import zlib

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
import pytest

from common.embedder import TRAINED, Embedder
from common.errors import Failure, InputError
from common.image_files import find_files, load_images, read_image
from common.images import is_dark_on_light, prepare_digit
import data

FONTS = [
    *('DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSans-Oblique', 'DejaVuSansMono', 'DejaVuSerif'),
    *('DejaVuSerif-Bold', 'STIXGeneral', 'STIXGeneralItalic', 'cmr10', 'cmss10'),
]
pytestmark = pytest.mark.usefixtures('in_own_folder')


@pytest.fixture(scope='module')
def embedder():
    return Embedder(TRAINED)


def rendered(font='DejaVuSans', digit=7):
    """A digit printed in black on white."""
    path = Path(matplotlib.get_data_path(), 'fonts', 'ttf', f'{font}.ttf')
    image = Image.new('L', (128, 160), 255)
    font = ImageFont.truetype(str(path), 96)
    ImageDraw.Draw(image).text((32, 24), str(digit), 0, font=font)
    return np.asarray(image)


def like_a_photograph(digit, rng):
    """A digit of MNIST 3 to 7 times as large, as gray ink anywhere on noisy, uneven paper."""
    size = int(rng.integers(84, 196))
    height, width = rng.integers(size, 2 * size + 1, 2)
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    ink, paper = rng.uniform(20, 80), rng.uniform(170, 240)
    large = Image.fromarray(digit).resize((size, size), Image.Resampling.BICUBIC)
    image = paper + rng.uniform(-40, 40) * np.linspace(-1, 1, width) + np.zeros((height, 1))
    image[top : top + size, left : left + size] += (ink - paper) / 255 * np.asarray(large)
    image += rng.normal(0, 12, image.shape)
    return image.clip(0, 255).round().astype(np.uint8)


def test_rendered_digits(embedder):
    labels = [digit for _ in FONTS for digit in range(10)]
    images = [prepare_digit(rendered(font, digit)) for font in FONTS for digit in range(10)]
    assert np.mean(embedder(np.stack(images)).classes == labels) >= 0.85


def test_photographed_digits(embedder):
    """Of digits that the network was trained on: docs/embed.md has its accuracy on others."""
    rng, sample = np.random.default_rng(0), data.load_digits('mnist-5k')
    images = [prepare_digit(like_a_photograph(image, rng)) for image in sample.val_images[:100]]
    assert np.mean(embedder(np.stack(images)).classes == sample.val_labels[:100]) >= 0.95


def test_digits_of_mnist_stay_as_they_are():
    """But for the few that reach the border."""
    images = data.load_digits('mnist-5k').val_images[:200]
    same = [abs(prepare_digit(image).astype(int) - image).max() <= 2 for image in images]
    assert np.mean(same) >= 0.97


def test_box_and_center_of_mass():
    prepared = prepare_digit(rendered()).astype(float)
    rows, columns = np.nonzero(prepared)
    assert np.ptp(rows) + 1 == 20 and np.ptp(columns) + 1 <= 20
    for axis in (0, 1):
        mass = prepared.sum(axis=1 - axis)
        assert abs(mass @ np.arange(28) / mass.sum() - 14) <= 0.5


def test_inverted():
    image = rendered()
    assert is_dark_on_light(image) and not is_dark_on_light(255 - image)
    assert abs(prepare_digit(image).astype(int) - prepare_digit(255 - image)).max() <= 1


def test_small_in_a_large_image(embedder):
    large = np.full((3000, 2000), 255, np.uint8)
    large[2000:2160, 1500:1628] = rendered()
    assert embedder(prepare_digit(large)[None]).classes == 7


@pytest.mark.parametrize('shape', [(1, 1), (1, 50), (50, 1), (2, 2), (28, 28), (1500, 3)])
def test_blank(shape):
    for value in (0, 90, 255):
        assert not prepare_digit(np.full(shape, value, np.uint8)).any()


def test_noise_of_any_size():
    rng = np.random.default_rng(0)
    for _ in range(30):
        image = rng.integers(0, 256, rng.integers(1, 60, 2), np.uint8)
        assert prepare_digit(image).shape == (28, 28)


def rgba_on_white(image):
    transparent = Image.new('RGBA', image.size, (0, 0, 0, 0))
    transparent.putalpha(Image.eval(image, lambda value: 255 - value))
    return transparent


def sixteen_bits(image):
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)


@pytest.mark.parametrize(
    'file, convert',
    [
        ('gray.png', lambda image: image),
        ('rgb.PNG', lambda image: image.convert('RGB')),
        ('palette.png', lambda image: image.convert('P')),
        ('rgba.png', rgba_on_white),
        ('sixteen.png', sixteen_bits),
        ('sixteen.tif', sixteen_bits),
        ('cmyk.tif', lambda image: image.convert('RGB').convert('CMYK')),
        ('photo.jpeg', lambda image: image.convert('RGB')),
    ],
)
def test_read(file, convert):
    image = rendered()
    convert(Image.fromarray(image)).save(file)
    measured = read_image(file)
    assert measured.dtype == np.uint8 and measured.shape == image.shape
    assert abs(measured.astype(int) - image).mean() < 1


def test_orientation():
    exif = Image.Exif()
    exif[0x112] = 8  # turned by a quarter
    turned = Image.fromarray(rendered()).rotate(-90, expand=True)
    turned.save('turned.png', exif=exif)
    np.testing.assert_array_equal(read_image('turned.png'), rendered())


def write_bad_files():
    Path('text.png').write_text('no image')
    Image.fromarray(rendered()).save('whole.jpg')
    whole = Path('whole.jpg').read_bytes()
    Path('half.jpg').write_bytes(whole[: len(whole) // 2])
    Image.new('1', (1, 1)).save('huge.png')
    pixel = Path('huge.png').read_bytes()
    header = b'IHDR' + struct.pack('>II', 30_000, 30_000) + pixel[24:29]
    checksum = struct.pack('>I', zlib.crc32(header))
    Path('huge.png').write_bytes(pixel[:12] + header + checksum + pixel[33:])
    Image.fromarray(np.zeros((9, 9), np.float32)).save('real.tif')
    Path('empty').mkdir()
    os.mkfifo('pipe.png')
    Path('labels.gz').write_bytes(gzip.compress(struct.pack('>II', 0x801, 2) + b'\1\2'))
    Path('short').write_bytes(struct.pack('>IIII', 0x803, 2, 28, 28))


BAD_FILES = {
    'text.png': 'not a PNG, JPEG or TIFF image',
    'half.jpg': 'it cannot be read: image file is truncated',
    'huge.png': 'it has more than 89,478,485 pixels',
    'real.tif': 'it cannot be read: its pixels are not whole numbers',
    'empty': 'no PNG, JPEG or TIFF file is in this folder',
    'pipe.png': 'not a regular file',
    'missing.png': 'there is no such file',
    f'{"x" * 300}.png': 'there is no such file',
    'labels.gz': 'an IDX file of labels, not of images',
    'short': 'damaged: its size is 16 bytes',
}


def test_bad_files(capsys):
    write_bad_files()
    for file, reason in BAD_FILES.items():
        with pytest.raises(InputError, match=f'^{file}: {reason}'):
            load_images([file], 'mnist', (28, 28))
    own = load_images([*BAD_FILES, 'whole.jpg'], 'mnist', (28, 28))
    assert own.names == ['whole.jpg'] and len(own.failures) == len(BAD_FILES)
    with pytest.raises(Failure, match=f'could not be read and were left out: {len(BAD_FILES)}'):
        own.check_complete()
    assert capsys.readouterr().err.splitlines() == own.failures


def test_folders_in_order():
    for name in ('b/2.png', 'b/1.TIF', 'a.jpg', 'b/.hidden.png', 'b/notes.txt', 'b/c/0.jpeg'):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    found = list(map(str, find_files(['b', 'a.jpg'])))
    assert found == ['b/1.TIF', 'b/2.png', 'b/c/0.jpeg', 'a.jpg']


def test_idx():
    """Of the network's size as it is, else prepared as any image; other data is only resized."""
    images = data.load_digits('mnist-5k').val_images[:3]
    for name, array in (('same', images), ('large', np.stack([rendered()] * 3))):
        header = struct.pack('>IIII', 0x803, *array.shape)
        Path(name).write_bytes(header + array.tobytes())
    own = load_images(['same', 'large'], 'mnist', (28, 28))
    assert own.names == [f'{name}[{i}]' for name in ('same', 'large') for i in range(3)]
    np.testing.assert_array_equal(own.images[:3], images)
    np.testing.assert_array_equal(own.images[3], prepare_digit(rendered()))
    assert own.num_inverted == 3
    other = load_images(['large'], 'fashion-mnist', (28, 28))
    assert other.num_inverted == 0 and other.images[0, 0, 0] == 255
