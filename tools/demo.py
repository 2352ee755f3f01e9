"""Draw a digit in the browser and watch its embedding move among the clusters.

    python -m tools.demo                                        one run
    python -m tools.demo --compare-with=data/trained/softmax    softmax only beside it, on the left

The page shows the embeddings of the test images, where the drawing lies among them, its
probability of each class, its distance to each center, and whether it is like none of the classes:
farther from every center than 99% of the validation images are from their own. Its address is
printed; it is served to this machine alone, until Ctrl-C.
"""

from __future__ import annotations

import argparse
from base64 import b64encode
from collections.abc import Sequence
import os
from pathlib import Path
import threading
import webbrowser

import numpy as np
from tqdm import tqdm

from common.command_line import ArgumentParser, add_run_arguments, number, run_script
from common.embedder import Embedder, choose_run
from common.errors import InputError
from common.image_files import HANDWRITTEN
from common.images import prepare_digit, resize
from common.log_file import log_to_stderr
from common.pictures import distinct_colors, viewing_plane
import data
from tools.demo_server import Server
from vis import panel_names

PAGE = Path(__file__).with_suffix('.html')
SIDE = 224  # pixels of a drawing, one byte each: 0 is paper, 255 ink
CHUNK = 500  # images between two moves of the progress bar


def rounded(array: np.ndarray) -> list:
    """Return numbers as JSON has them, without digits that nobody sees."""
    return array.astype(float).round(4).tolist()


class Panel:
    """One run on the page: its clusters, and where a drawing lies among them.

    Parameters
    ----------
    embedder
        The network.
    name
        What the panel is called.
    images, labels
        Validation images uint8 (N, H, W) and labels (N,) of the run's classes.
    dataset
        Their name.
    """

    def __init__(
        self, embedder: Embedder, name: str, images: np.ndarray, labels: np.ndarray, dataset: str
    ):
        self.embedder = embedder
        prefix = embedder.checkpoints.prefix
        starts = range(0, len(images), CHUNK)
        progress = tqdm(starts, str(prefix), leave=False, disable=None)
        embedded = [embedder(images[i : i + CHUNK]) for i in progress]
        embeddings = np.concatenate([part.embeddings for part in embedded])
        if embeddings.shape[1] < 2:
            raise InputError(f'{prefix} embeds in 1 dimension, the page needs 2 or more')
        self.is_correct = np.concatenate([part.classes for part in embedded]) == labels
        self.plane = viewing_plane(embeddings)
        caption = [
            f'{prefix}, epoch {embedder.epoch}: accuracy {self.is_correct.mean():.2%} on '
            f'{len(labels):,} test images of {dataset}.'
        ]
        if embeddings.shape[1] > 2:
            caption.append(f'Shown are {" and ".join(self.plane.names)}.')
        limit = embedder.rejection_distance
        if limit is not None:
            caption.append(
                'What is farther than the limit from every center is like none of the classes: '
                f'99% of the validation images are within {limit:.2f} of the center of their own.'
            )
        self.description = {
            'name': name,
            'caption': ' '.join(caption),
            'isPlane': embeddings.shape[1] == 2,
            'points': self.view(embeddings),
            'labels': labels.tolist(),
            'centers': None if embedder.centers is None else self.view(embedder.centers),
            'rejectionDistance': limit,
        }

    def view(self, embeddings: np.ndarray) -> list:
        """Return where embeddings (N, d) are seen in the plane, (N, 2)."""
        return rounded((embeddings - self.plane.origin) @ self.plane.axes.T)

    def answer(self, image: np.ndarray) -> dict:
        """Return what the network says of an image uint8 (H, W)."""
        embedded = self.embedder(image[None])
        distances = embedded.distances
        return {
            'point': self.view(embedded.embeddings)[0],
            'class': int(embedded.classes[0]),
            'probabilities': rounded(embedded.probabilities[0]),
            'distances': None if distances is None else rounded(distances[0]),
            'isUnlikeAll': bool(embedded.is_unlike_all[0]),
        }


class Demo:
    """What the page shows: a panel for each run, samples, and the answers to a drawing."""

    def __init__(self, embedders: Sequence[Embedder], digits: data.Digits):
        first = embedders[0]
        index = np.flatnonzero(np.isin(digits.val_labels, first.labels))
        if not len(index):
            raise InputError(
                f'{digits.dataset} has no image of the classes of {first.checkpoints.prefix}: '
                'choose its data with --dataset or --data-dir'
            )
        images = digits.val_images[index]
        position = {label: i for i, label in enumerate(first.labels)}
        labels = np.array([position[label] for label in digits.val_labels[index].tolist()])
        for run in embedders:
            if run.image_shape != images.shape[1:] or run.class_names != first.class_names:
                raise InputError(
                    f'{run.checkpoints.prefix} was trained on images of another size than those '
                    f'of {digits.dataset}, or on other classes than {first.checkpoints.prefix}: '
                    'choose its data with --dataset or --data-dir, and compare runs on the same '
                    'classes'
                )
        colors = distinct_colors(len(first.class_names))
        names = panel_names([run.checkpoints.prefix for run in embedders])
        self.panels = [
            Panel(run, name, images, labels, digits.dataset)
            for run, name in zip(embedders, names, strict=True)
        ]
        self.is_handwritten = first.dataset in HANDWRITTEN
        self.image_shape = first.image_shape
        # Of each class the first image that all runs recognize.
        is_correct = np.all([panel.is_correct for panel in self.panels], axis=0)
        samples = {int(labels[i]): i for i in np.flatnonzero(is_correct)[::-1]}
        self.scene = {
            'title': 'Draw a digit' if self.is_handwritten else 'Draw one of the classes',
            'side': SIDE,
            'imageShape': self.image_shape,
            'classNames': first.class_names,
            'colors': [[round(255 * c) for c in rgb] for rgb in colors],
            'samples': {label: _base64(images[i].tobytes()) for label, i in samples.items()},
            'runs': [panel.description for panel in self.panels],
        }

    def answer(self, pixels: bytes) -> dict:
        """Return what the runs say of a drawing, SIDE x SIDE bytes."""
        drawing = np.frombuffer(pixels, np.uint8).reshape(SIDE, SIDE)
        image = prepare_digit(drawing) if self.is_handwritten else resize(drawing, self.image_shape)
        runs = [panel.answer(image) for panel in self.panels]
        return {'image': _base64(image.tobytes()), 'runs': runs}


def _base64(content):
    return b64encode(content).decode()


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; raise InputError for a mistake."""
    parser = ArgumentParser(prog='python -m tools.demo', description=__doc__)
    data.add_data_arguments(parser, of_run=True)
    add_run_arguments(parser)
    parser.add_argument(
        '--compare-with',
        metavar='P',
        help='show the newest epoch of this run, softmax only for example, on the left',
    )
    parser.add_argument(
        '--port',
        type=number(int, minimum=1024, maximum=65535),
        metavar='N',
        help='port on 127.0.0.1 (default: a free one)',
    )
    parser.add_argument(
        '--no-browser',
        action='store_true',
        help='only print the address, do not open it in a browser',
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] = ()) -> None:
    """Serve the page until Ctrl-C; raise InputError for a mistake."""
    args = parse_args(argv)
    with Server(PAGE.read_text(encoding='utf-8'), SIDE * SIDE, args.port or 0) as server:
        with log_to_stderr():
            embedders = [Embedder(choose_run(args.model_prefix), args.epoch)]
            if args.compare_with is not None:
                embedders.insert(0, Embedder(args.compare_with))
            print(*(embedder.description for embedder in embedders), sep='\n')
            shown = embedders[-1]
            digits = data.load_digits_of_run(
                shown.checkpoints.prefix, shown.dataset, args.dataset, args.data_dir
            )
            demo = Demo(embedders, digits)
        server.show(demo.scene, demo.answer)
        print(f'draw at {server.url}, end with Ctrl-C', flush=True)
        # Without a display, Python would open a browser in the terminal.
        if not args.no_browser and {'DISPLAY', 'WAYLAND_DISPLAY', 'BROWSER'} & {*os.environ}:
            threading.Thread(target=webbrowser.open, args=[server.url], daemon=True).start()
        server.serve_forever()


if __name__ == '__main__':
    run_script(main)
