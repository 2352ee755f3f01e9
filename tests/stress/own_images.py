"""How well the networks that come with the program read images of one's own (docs/embed.md).

    python tests/stress/own_images.py --data-dir=DIR

Rendered digits, test digits of MNIST as they are and made like photographs, and what is no digit at
all: noise, and capital letters. DIR has the four files of MNIST.
"""

from pathlib import Path
import sys

import numpy as np

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])

from test_images import FONTS, like_a_photograph, rendered  # noqa: E402

from common.command_line import ArgumentParser, run_script  # noqa: E402
from common.embedder import TRAINED, Embedder  # noqa: E402
from common.images import prepare_digit  # noqa: E402
import data  # noqa: E402

OTHERS = slice(5000, 6000)  # no choice of the program was made by these


def main(argv=()):
    """Print the tables."""
    parser = ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--data-dir', metavar='DIR', help='folder of the four IDX files')
    digits = data.load_digits('mnist', parser.parse_args(list(argv)).data_dir)
    images, labels = digits.val_images, digits.val_labels
    rng = np.random.default_rng(0)

    def photographed(part):
        return [prepare_digit(like_a_photograph(image, rng)) for image in images[part]]

    printed = [prepare_digit(rendered(font, digit)) for font in FONTS for digit in range(10)]
    read = {
        f'100 digits rendered in {len(FONTS)} fonts': (printed, [*range(10)] * len(FONTS)),
        'the first 100 test digits, like photographs': (photographed(slice(100)), labels[:100]),
        '1,000 other test digits, like photographs': (photographed(OTHERS), labels[OTHERS]),
        'these 1,000 as they are': (images[OTHERS], labels[OTHERS]),
    }
    noise = rng.integers(0, 256, (100, 28, 28), dtype=np.uint8)
    letters = [prepare_digit(rendered(digit=chr(ord('A') + i))) for i in range(26)]
    networks = {name: Embedder(TRAINED.with_name(name)) for name in ('center_loss', 'softmax')}
    print(f'{"accuracy":45}', *(f'{name:>12}' for name in networks))
    for what, (found, expected) in read.items():
        shares = [np.mean(n(np.stack(found)).classes == expected) for n in networks.values()]
        print(f'{what:45}', *(f'{share:12.1%}' for share in shares))
    for what, found in {'100 of noise': noise, '26 capital letters': np.stack(letters)}.items():
        counts = [n(found).is_unlike_all.sum() for n in networks.values()]
        print(f'{f"like none of the classes, of {what}":45}', *(f'{count:12}' for count in counts))


if __name__ == '__main__':
    run_script(main)
