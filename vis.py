"""Draw what was learned: the embeddings of one run or of several, and the course of training.

    python vis.py                                the newest checkpoint of center_loss
    python vis.py --compare=softmax              softmax only left, with center loss right
    python vis.py --grid softmax large           a panel for every run, each with its lambda
    python vis.py --split=both                   training and test images side by side
    python vis.py --animate=center_loss.gif      how the clusters form, a frame for every epoch
    python vis.py --curves log.txt               accuracy and losses over the epochs
    python vis.py --images digit.png scans/      where images of your own lie among the others

The pictures follow Figures 2 and 3 of Wen, Zhang, Li, Qiao: A Discriminative Feature Learning
Approach for Deep Face Recognition, ECCV 2016. Below each panel stand the accuracy on its images and

    intra   mean over the images of the Euclidean distance of an embedding to its class's mean,
    inter   mean over the pairs of classes of the distance between their means,
    ratio   intra / inter: the smaller, the more compact the clusters are for their distance,

measured in all d dimensions of the embedding. If d > 2, the picture shows the first two principal
components.

If a run was trained on some of the classes (train.py --classes or --num-classes), the others are
drawn as crosses, and the accuracy is that on the images of the classes seen in training. The
open-set claim of the paper is then measured by verification: which pairs of images of unseen
classes are of the same class, judged by the distance of their embeddings alone? AUC is the
probability that a pair of one class is closer than a pair of two (0.5: chance); true accepts at 1%
false accepts are the share of the pairs of one class that are closer than all but 1% of the pairs
of two classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
import itertools
import logging
import math
from pathlib import Path
import textwrap
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from common import pictures
from common.checkpoints import Checkpoints
from common.command_line import ArgumentParser, number, run_script
from common.curves import draw_curves
from common.embedder import Embedder
from common.errors import InputError
from common.evaluation import FALSE_ACCEPTS, center_loss_weight, embed, evaluate
from common.image_files import OwnImages, load_images
from common.log_file import log_to_stderr
import data

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

__all__ = ['embed', 'main', 'plot_embeddings']

FRAME_IMAGES = 2000  # of an animation
MAX_LISTED_CLASSES = 10
MAX_NAME = 24  # characters of the name beside a star
NO_BREAK = '\xa0'  # between the words of a title that stay on one line
DEFAULT_OUTPUT = {'grid': 'grid.png', 'curves': 'curves.png'}

# Options that would have no effect in a mode.
NOT_WITH = {
    'grid': ['model_prefix'],
    'animate': ['epoch', 'output', 'images'],
    'curves': ['model_prefix', 'epoch', 'split', 'dataset', 'data_dir', 'images'],
}


class Panel(NamedTuple):
    """One panel: embeddings float32 (N, d), labels (N,), the title above and the caption below it.

    ``seen`` are the labels of the classes in training (None: all), ``report`` is what is printed,
    ``marked`` are the names and embeddings (d,) of other images, ``plane`` is what all of them are
    viewed in (None: :func:`common.pictures.viewing_plane`).
    """

    embeddings: np.ndarray
    labels: np.ndarray
    title: str
    caption: str
    seen: Sequence[int] | None = None
    report: str = ''
    marked: Sequence[tuple[str, np.ndarray]] = ()
    plane: pictures.Plane | None = None


def make_panel(
    checkpoints: Checkpoints,
    epoch: int,
    name: str,
    digits: data.Digits,
    split: str,
    own: OwnImages | None = None,
) -> Panel:
    """Evaluate a checkpoint on all images of a split, 'train' or 'test', and describe it.

    Images of the user's own are marked in it.
    """
    images, labels = digits[:2] if split == 'train' else digits[2:4]
    measured = evaluate(checkpoints, epoch, images, labels)
    if measured.embeddings.shape[1] < 2:
        raise InputError(
            f'{checkpoints.prefix} embeds in 1 dimension, a picture needs 2 or more: '
            'choose another prefix'
        )
    split = 'training' if split == 'train' else 'test'
    dataset = Path(digits.source).name if digits.dataset == 'custom' else digits.dataset
    accuracy = f'{split} accuracy {measured.accuracy:.2%}'
    statistics = 'intra {:.3f}, inter {:.3f}, ratio {:.4f}'.format(*measured.clusters)
    report = (
        f'{checkpoints.params_path(epoch)}: {measured.num_classified:,} {split} images of '
        f'{dataset}, {accuracy}, {statistics}'
    )
    caption = [
        f'{dataset}: {accuracy} ({measured.num_classified:,} images)',
        statistics.replace(', ', '    '),
    ]
    names = [n for label, n in enumerate(digits.class_names) if label not in measured.seen]
    listed = ', '.join(names) if len(names) <= MAX_LISTED_CLASSES else f'{len(names)} classes'
    if names and not measured.verification:
        report += f'\n    unseen in training: {listed}; to verify pairs takes two classes or more'
        caption.append(f'× unseen in training: {listed}')
    elif names:
        unseen = f'unseen in training: {listed}; pairs of their images by distance,'
        verified = [
            f'{distance}: AUC {auc:.4f}, {accepts:.1%} true accepts at {FALSE_ACCEPTS:.0%} false'
            for distance, (auc, accepts) in measured.verification.items()
        ]
        report += f'\n    {unseen} {"; ".join(verified)}'
        caption += [f'× {unseen}', *verified]
    marked = ()
    if own is not None:
        own_embeddings, _ = embed(checkpoints, epoch, own.images)
        marked = list(zip((Path(name).name for name in own.names), own_embeddings, strict=True))
    return Panel(
        measured.embeddings,
        labels,
        title=f'{name} (epoch{NO_BREAK}{epoch}):{NO_BREAK}{measured.accuracy:.2%}',
        caption='\n'.join(caption),
        seen=measured.seen,
        report=report,
        marked=marked,
    )


def warn_of_other_data(path: Path, trained_on: str | None, dataset: str) -> None:
    """Warn where a checkpoint is not measured on the data set that it was trained on."""
    if trained_on not in (None, dataset):
        seen = trained_on == 'mnist' and dataset == 'mnist-5k'
        logger.warning(
            '%s was trained on %s and is measured on %s%s',
            path,
            trained_on,
            dataset,
            ', whose images are among the training images of mnist' if seen else '',
        )


def panel_names(prefixes: Sequence[str]) -> list[str]:
    """Name the runs by their objectives, or by prefix and lambda if two have the same objective."""
    weights = [center_loss_weight(prefix) for prefix in prefixes]
    objectives = [
        'softmax only' if weight == 0 else f'softmax + center loss, λ = {weight:g}'
        for weight in weights
        if weight is not None
    ]
    if len(set(objectives)) == len(set(prefixes)):
        return objectives
    return [
        prefix if weight is None else f'{prefix}, λ = {weight:g}'
        for prefix, weight in zip(prefixes, weights, strict=True)
    ]


def plot_embeddings(
    ax: Axes,
    embeddings: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    title: str,
    caption: str,
    seen: Sequence[int] | None = None,
    plane: pictures.Plane | None = None,
    marked: Sequence[tuple[str, np.ndarray]] = (),
) -> None:
    """Draw embeddings: a color and a name per class, crosses for unseen classes, equal axes.

    Parameters
    ----------
    ax
        The axes to draw into.
    embeddings
        float32 (N, d), d >= 2.
    labels
        int (N,), positions in ``class_names``.
    class_names
        Each is written at the median of its cluster.
    title, caption
        Text above and below.
    seen
        Labels of the classes that were seen in training; by default all.
    plane
        The plane they are viewed in, by default :func:`common.pictures.viewing_plane`.
    marked
        Names and embeddings (d,) of further images, a star each, with its name beside it.
    """
    from matplotlib.patheffects import withStroke

    plane = plane or pictures.viewing_plane(embeddings)
    points = (embeddings - plane.origin) @ plane.axes.T  # (N, 2)
    many = len(class_names) > 20 or max(map(len, class_names)) > 2
    name_style = {
        'fontsize': 11 if many else 15,
        'fontweight': 'bold',
        'ha': 'center',
        'va': 'center',
        'path_effects': [withStroke(linewidth=3 if many else 4, foreground='white')],
    }
    size = np.clip(25000 / len(labels), 1.5, 10)
    seen_style = {'s': size, 'linewidths': 0}
    unseen_style = {'s': 4 * size, 'linewidths': 0.7, 'marker': 'x'}
    for label, color in enumerate(pictures.distinct_colors(len(class_names))):
        cluster = points[labels == label]
        if len(cluster):
            style = seen_style if seen is None or label in seen else unseen_style
            name = class_names[label]
            ax.scatter(*cluster.T, **style, color=color, alpha=0.5, rasterized=True, label=name)
            name_color = color if len(class_names) <= 10 else 0.7 * np.array(color)  # some are pale
            ax.text(*np.median(cluster, axis=0), name, color=name_color, **name_style)
    for name, embedding in marked:
        point = (embedding - plane.origin) @ plane.axes.T
        ax.plot(*point, '*', ms=13, color='black', mec='white', mew=0.8, zorder=4)
        outline = [withStroke(linewidth=2.5, foreground='white')]
        if len(name) > MAX_NAME:
            name = f'{name[: MAX_NAME // 2]}…{name[-MAX_NAME // 2 :]}'
        # Towards the middle of the panel, and without a say in its size.
        is_left = 2 * point[0] < points[:, 0].min() + points[:, 0].max()
        beside = {'xytext': (6 if is_left else -6, 4), 'ha': 'left' if is_left else 'right'}
        beside |= {'textcoords': 'offset points', 'fontsize': 9, 'zorder': 5}
        text = ax.annotate(name, point, **beside, color='black', path_effects=outline)
        text.set_in_layout(False)
    ax.set_aspect('equal', adjustable='datalim')
    inches = ax.get_window_extent().width / ax.figure.dpi
    ax.set_title(textwrap.fill(title, int(11.5 * inches)).replace(NO_BREAK, ' '))
    caption = '\n'.join(textwrap.fill(line, int(14.5 * inches)) for line in caption.splitlines())
    ax.set(xlabel=plane.names[0], ylabel=plane.names[1])
    below_the_label = {'xy': (0.5, 0), 'xycoords': ax.xaxis.label}
    below_the_label |= {'xytext': (0, -8), 'textcoords': 'offset points', 'va': 'top'}
    ax.annotate(caption, **below_the_label, ha='center', fontsize=11)


def draw_embeddings(
    panels: Sequence[Panel], class_names: Sequence[str], in_pairs: bool = False
) -> Figure:
    """Return a figure of the panels: up to three in one row, more of them nearly in a square.

    ``in_pairs`` keeps the first and the second, the third and the fourth, ... in one row.
    """
    columns = len(panels) if len(panels) <= 3 else math.ceil(math.sqrt(len(panels)))
    if in_pairs:
        columns += columns % 2
    rows = math.ceil(len(panels) / columns)
    width, height = (7.5, 8.1) if len(panels) <= 2 else (5.5, 6.2)
    figure, axes = pictures.new_figure(rows, columns, width, height)
    for ax, panel in itertools.zip_longest(axes.flat, panels):
        if panel is None:
            ax.remove()
        else:
            plot_embeddings(
                ax,
                panel.embeddings,
                panel.labels,
                class_names,
                panel.title,
                panel.caption,
                panel.seen,
                panel.plane,
                panel.marked,
            )
    return figure


def animate(panels: Sequence[Panel], class_names: Sequence[str], path: Path) -> None:
    """Write the panels as frames: the same sample of the images in all of them, on fixed axes."""
    labels = panels[-1].labels
    sample = np.sort(np.random.default_rng(0).permutation(len(labels))[:FRAME_IMAGES])
    plane = pictures.viewing_plane(panels[-1].embeddings, 'the final variance')
    points = np.concatenate(
        [(panel.embeddings[sample] - plane.origin) @ plane.axes.T for panel in panels]
    )
    low, high = points.min(axis=0), points.max(axis=0)
    half = 0.53 * max(*(high - low), 1e-6)  # a square around all points of all frames
    limits = np.stack([(low + high) / 2 - half, (low + high) / 2 + half])
    figure, ((ax,),) = pictures.new_figure(1, 1, 6, 6.6)
    figure.set_dpi(pictures.FRAME_DPI)

    def draw(panel):
        ax.clear()
        plot_embeddings(
            ax,
            panel.embeddings[sample],
            labels[sample],
            class_names,
            panel.title,
            panel.caption,
            panel.seen,
            plane,
        )
        ax.set_aspect('equal', adjustable='box')
        ax.set(xlim=limits[:, 0], ylim=limits[:, 1])

    draw(panels[-1])
    figure.canvas.draw()
    figure.set_layout_engine('none')  # the panel stays where the last frame has it
    pictures.save_animation(figure, draw, progress(panels, 'rendering', 'frame'), path)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; raise InputError for a mistake."""
    parser = ArgumentParser(description=__doc__)
    data.add_data_arguments(parser, of_run=True)
    parser.add_argument(
        '--model-prefix',
        default='center_loss',
        metavar='P',
        help='run whose embeddings are drawn, the --save-model-prefix of train.py',
    )
    parser.add_argument(
        '--epoch',
        type=number(int, minimum=1, maximum=10**9),
        metavar='N',
        help='checkpoint of epoch N, counted from 1, instead of the newest; with --compare, of '
        '--model-prefix only',
    )
    parser.add_argument(
        '--split',
        type=lambda name: 'test' if name == 'val' else name,
        choices=['train', 'test', 'both'],
        default='test',
        help='embed all of the training or of the test images (val is another name of test), or '
        'draw a panel for each',
    )
    parser.add_argument(
        '--images',
        nargs='+',
        metavar='IMAGE',
        help='mark your own images by stars with their names: PNG, JPEG or TIFF files, folders '
        'of them, or IDX files, prepared as by python -m tools.embed',
    )
    parser.add_argument(
        '--output',
        type=Path,
        metavar='FILE',
        help='the picture, .png, .pdf, .svg or another kind that matplotlib writes (default: '
        'center_loss.png; grid.png for --grid, curves.png for --curves)',
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        '--compare',
        metavar='P',
        help='draw the newest embeddings of this run, softmax only for example, on the left',
    )
    modes.add_argument(
        '--grid',
        nargs='+',
        metavar='P',
        help='draw a panel for each of these runs, of several lambda for example',
    )
    modes.add_argument(
        '--animate',
        type=Path,
        metavar='FILE',
        help='write an animation with a frame for each checkpoint: .gif, or .mp4, which needs '
        'ffmpeg',
    )
    modes.add_argument(
        '--curves',
        nargs='+',
        metavar='LOG',
        help='draw accuracy, cross-entropy and center loss over the epochs from these logs, '
        'of each the last run in it',
    )
    args = parser.parse_args(argv)
    args.mode = next((mode for mode in NOT_WITH if getattr(args, mode)), None)
    for option in NOT_WITH.get(args.mode, ()):
        if getattr(args, option) != parser.get_default(option):
            parser.error(
                f'--{option.replace("_", "-")} has no effect with --{args.mode}: leave it out'
            )
    if args.split == 'both' and args.animate:
        parser.error('--split=both draws two panels, and an animation has one: take train or test')
    args.output = args.output or Path(DEFAULT_OUTPUT.get(args.mode, 'center_loss.png'))
    return args


def choose_runs(args: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the pairs (prefix, epoch) of the panels or frames, in order."""
    if args.grid:
        newest = [newest_epoch(prefix, '--grid') for prefix in args.grid]
        return [
            (prefix, args.epoch or epoch) for prefix, epoch in zip(args.grid, newest, strict=True)
        ]
    newest = newest_epoch(args.model_prefix)
    if args.animate:
        return [(args.model_prefix, epoch) for epoch in Checkpoints(args.model_prefix).epochs()]
    runs = [(args.model_prefix, args.epoch or newest)]
    if args.compare is not None:
        runs.insert(0, (args.compare, newest_epoch(args.compare, '--compare')))
    return runs


def progress(items: Sequence, doing: str, unit: str) -> Iterable:
    """Return the items with a progress bar on a terminal."""
    return tqdm(items, doing, unit=unit, leave=False, disable=None)


def newest_epoch(prefix: str, option: str = '--model-prefix') -> int:
    """Return the highest epoch that has a checkpoint.

    Raises InputError, which names the ``option`` of the command line, if there is none.
    """
    epochs = Checkpoints(prefix).epochs()
    if not epochs:
        raise InputError(
            f'there is no checkpoint of {prefix}: run python train.py first, '
            f'or name the run with {option}'
        )
    return epochs[-1]


def main(argv: Sequence[str] = ()) -> None:
    """Draw what the command line asks for. Raises InputError for a mistake in it."""
    args = parse_args(argv)
    output = args.animate or args.output
    if args.animate:
        pictures.check_picture(output, '--animate', pictures.ANIMATIONS)
    else:
        pictures.check_picture(output, '--output')
    own = None
    # Training has shown the warnings of data.py, and the data set is named in what is drawn.
    with log_to_stderr(but_warnings_of='data'), pictures.picture_style():
        if args.curves:
            figure, report = draw_curves(args.curves)
        else:
            # Before the digits are searched for: the first thing to go wrong is a missing run.
            runs = choose_runs(args)
            names = panel_names([prefix for prefix, _ in runs])
            checkpoints = {prefix: Checkpoints(prefix) for prefix, _ in runs}
            trained_on = {
                prefix: checkpoints[prefix].load_inference(epoch).get('dataset')
                for prefix, epoch in dict(runs).items()
            }
            last, _ = runs[-1]
            digits = data.load_digits_of_run(last, trained_on[last], args.dataset, args.data_dir)
            for prefix, epoch in dict(runs).items():
                path = checkpoints[prefix].params_path(epoch)
                warn_of_other_data(path, trained_on[prefix], digits.dataset)
            if args.images:
                embedder = Embedder(*runs[-1])
                own = load_images(args.images, embedder.dataset, embedder.image_shape)
            splits = ['train', 'test'] if args.split == 'both' else [args.split]
            wanted = list(itertools.product(zip(runs, names, strict=True), splits))
            panels = [
                make_panel(checkpoints[prefix], epoch, name, digits, split, own)
                for ((prefix, epoch), name), split in progress(wanted, 'embedding', 'checkpoint')
            ]
            if args.split == 'both':  # in one plane: the axes of the two mean the same
                planes = [
                    pictures.viewing_plane(training.embeddings, 'the training variance')
                    for training in panels[::2]
                ]
                panels = [panel._replace(plane=planes[i // 2]) for i, panel in enumerate(panels)]
            report = [panel.report for panel in panels]
            if args.animate:
                animate(panels, digits.class_names, output)
            else:
                figure = draw_embeddings(panels, digits.class_names, args.split == 'both')
        if not args.animate:
            pictures.save_picture(figure, output)
    # After the picture is written, so that a closed pipe costs no picture.
    print(*report, f'wrote {output}', sep='\n')
    if own is not None:
        own.check_complete()


if __name__ == '__main__':
    run_script(main)
