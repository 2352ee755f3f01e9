"""Embed images of your own with a trained network.

    python -m tools.embed photo.jpg scans/           files and folders of them
    python -m tools.embed --output=own.csv scans/    with embeddings, probabilities and distances
    python -m tools.embed --model-prefix=softmax digit.png

Of each image the table has the most probable class, its probability, and the distance of the
embedding to the nearest center. An image that is farther from every center than 99% of the
validation images were from their own is like none of the classes.
"""

import argparse
from collections.abc import Sequence
import csv
from pathlib import Path

import numpy as np

from common.command_line import ArgumentParser, add_run_arguments, run_script
from common.embedder import Embedded, Embedder, choose_run
from common.errors import InputError
from common.files import check_output, replace_when_whole
from common.image_files import load_images
from common.log_file import log_to_stderr

KINDS = ('npz', 'csv')


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; raise InputError for a mistake."""
    parser = ArgumentParser(prog='python -m tools.embed', description=__doc__)
    parser.add_argument(
        'images',
        nargs='+',
        metavar='IMAGE',
        help='PNG, JPEG or TIFF files of any size and color, folders of them, or IDX files',
    )
    add_run_arguments(parser)
    parser.add_argument(
        '--output',
        type=Path,
        metavar='FILE',
        help='write everything to this file too, with the embeddings: .npz or .csv',
    )
    args = parser.parse_args(argv)
    if args.output is not None:
        check_output(args.output, '--output', KINDS)
    return args


def table(names: Sequence[str], embedded: Embedded, class_names: Sequence[str]) -> list[str]:
    """Return the lines of the table: a heading, then one for each image."""
    rows = [('image', 'class', 'probability', 'distance', '')]
    for i, (name, label) in enumerate(zip(names, embedded.classes, strict=True)):
        rows.append(
            (
                name,
                class_names[label],
                f'{embedded.probabilities[i, label]:.4f}',
                '' if embedded.distances is None else f'{embedded.distances[i].min():.3f}',
                'like none of the classes' if embedded.is_unlike_all[i] else '',
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ['  '.join(map(str.ljust, row, widths)).rstrip() for row in rows]


def write(path: Path, names: Sequence[str], embedded: Embedded, class_names: Sequence[str]) -> None:
    """Write everything about the images to a .npz or .csv file."""
    # Arrays of N, or (N, columns) with the columns' names.
    arrays = {
        'image': np.array(names),
        'class': np.array(class_names)[embedded.classes],
        'is_unlike_all': embedded.is_unlike_all,
        'embedding': embedded.embeddings,
        'probability': embedded.probabilities,
    }
    if embedded.distances is not None:
        arrays['distance'] = embedded.distances
    try:
        with replace_when_whole(path) as temporary:
            if path.suffix.lower() == '.npz':
                rejection = {}
                if embedded.rejection_distance is not None:
                    rejection['rejection_distance'] = embedded.rejection_distance
                with open(temporary, 'wb') as file:
                    np.savez(file, **arrays, class_names=np.array(class_names), **rejection)
                return
            heading, columns = [], []
            for name, array in arrays.items():
                if array.ndim == 1:
                    heading.append(name)
                else:
                    suffixes = range(array.shape[1]) if name == 'embedding' else class_names
                    heading += [f'{name}_{suffix}' for suffix in suffixes]
                columns += [array] if array.ndim == 1 else [*array.T]
            with open(temporary, 'w', newline='', encoding='utf-8') as file:
                writer = csv.writer(file)
                writer.writerow(heading)
                writer.writerows(zip(*columns, strict=True))
    except OSError as error:
        raise InputError(f'--output={path} cannot be written: {error.strerror}') from None


def main(argv: Sequence[str] = ()) -> None:
    """Embed the images of the command line, print a table, and write a file if one is wanted.

    Raises InputError for a mistake, and Failure, at the end, if some files could not be read.
    """
    args = parse_args(argv)
    with log_to_stderr():
        embedder = Embedder(choose_run(args.model_prefix), args.epoch)
    own = load_images(args.images, embedder.dataset, embedder.image_shape)
    embedded = embedder(own.images)
    if args.output is not None:
        write(args.output, own.names, embedded, embedder.class_names)
    print(embedder.description)
    if own.num_inverted:
        number = own.num_inverted
        print(f'images with dark digits on a light background, which were inverted: {number}')
    print(*table(own.names, embedded, embedder.class_names), sep='\n')
    if args.output is not None:
        print(f'wrote {args.output}')
    own.check_complete()


if __name__ == '__main__':
    run_script(main)
