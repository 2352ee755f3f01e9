"""See what was learned: the embeddings of the digits, models side by side, and the course of training.

    python vis.py                                        the newest checkpoint of center_loss -> center_loss.png
    python vis.py --compare softmax                      softmax only on the left, softmax + center loss on the right
    python vis.py --grid small large                     a panel for every run, each with its lambda -> grid.png
    python vis.py --animate center_loss.gif              how the clusters form: a frame for every epoch
    python vis.py --curves log.txt                       accuracy and center loss over the epochs -> curves.png

The pictures follow Figures 2 and 3 of Wen, Zhang, Li, Qiao: A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV
2016. Under each panel stand, besides the accuracy,

    intra   the mean over the images of the Euclidean distance of an embedding to the mean of its class (the spread of a cluster),
    inter   the mean over the pairs of classes of the distance between their means,
    ratio   intra / inter: the smaller, the better the clusters are told apart.

They are computed in all d dimensions of the embedding. Where d > 2, the picture shows its first two principal components.

Of a run that was trained on some of the classes (train.py --num-classes) the others are drawn as crosses, and the accuracy is that of the images it
can know. The open-set claim of the paper is then measured by verification: by the distance of their embeddings alone, which pairs of images of unseen
classes are of the same class? AUC is the probability that a pair of one class is closer than a pair of two (0.5: by chance); the true accepts at 1% false
accepts are the share of the pairs of one class within the distance that 1% of the pairs of two have.
"""

from runtime import (
    ArgumentParser,
    InputError,
    mx,
    number,
    run_script,
)  # first, for a Ctrl-C while all this is imported

import contextlib
import itertools
import math
import os
import re
import subprocess
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.animation
import matplotlib.patheffects
import matplotlib.pyplot as plt
import numpy as np
import seaborn
from PIL import Image
from tqdm import tqdm

import center_loss  # noqa: F401  (a checkpoint's network names the operator)
import data
from train_model import Checkpoints

PALETTE = 'tab10'
DPI = 110  # of a picture; a panel is 7.5 inches wide alone or as one of two, less in a grid
VERIFIED_IMAGES = 4000  # 8 million pairs: all of the test images of four digits
FALSE_ACCEPTS = 0.01
FRAME_DPI = 80  # of an animation: with so many pixels, points and colours twenty epochs stay within some hundred kB
FRAME_IMAGES = 2000
FRAME_COLOURS = 128
FRAMES_PER_SECOND = 3
NO_BREAK = '\xa0'  # between words of a title that stay on one line

LOG_LINE = re.compile(
    r'^(?!.*Node\[[1-9]).*Epoch\[(\d+)\] (Train|Validation)-(accuracy|center_loss)=(nan|inf|\d+(?:\.\d+)?)$',
    re.M,
)

# Options that say nothing to a mode, and are refused there rather than ignored.
NOT_WITH = {
    'grid': ['model_prefix'],
    'animate': ['epoch', 'output'],
    'curves': ['model_prefix', 'epoch', 'split', 'dataset', 'data_dir'],
}


class ClusterStatistics(NamedTuple):
    """How compact and how far apart the classes are, as in this module's docstring."""

    intra: float
    inter: float
    ratio: float


class Verification(NamedTuple):
    """How well distances tell pairs of one class from pairs of two, as in this module's docstring."""

    auc: float
    true_accepts: float


class Plane(NamedTuple):
    """A plane to look at embeddings in: ``origin`` (d,), ``axes`` (2, d), orthonormal, and the ``names`` of the two."""

    origin: np.ndarray
    axes: np.ndarray
    names: tuple


class Panel(NamedTuple):
    """What one panel shows: ``embeddings`` float32 (N, d), ``labels`` uint8 (N,), the ``title`` above and the ``caption`` below it; of the classes,
    training has seen the first ``num_seen`` (None: all).
    """

    embeddings: np.ndarray
    labels: np.ndarray
    title: str
    caption: str
    num_seen: int = None


def newest_epoch(prefix, option='--model-prefix'):
    """The highest epoch that has a checkpoint. Raises InputError, which names the command line's ``option``, where there is none."""
    epochs = Checkpoints(prefix).epochs()
    if not epochs:
        raise InputError(
            f'there is no checkpoint of {prefix}: run python train.py first, or name the run with {option}'
        )
    return epochs[-1]


def load_network(prefix):
    """The network of a run, as an ``mx.sym.Symbol``."""
    path = Path(f'{prefix}-symbol.json')
    try:
        return mx.sym.load(str(path))
    except (mx.MXNetError, ValueError, TypeError):
        raise InputError(
            f'{path} is {"not the network of a checkpoint" if path.exists() else "missing"}: '
            'train again, or choose another prefix'
        ) from None


def center_loss_weight(prefix):
    """lambda of a run (the operator's ``scale``), or None for a network without a center loss."""
    for attributes in load_network(prefix).attr_dict().values():
        if attributes.get('op_type') == 'centerloss':
            with contextlib.suppress(ValueError):
                return float(attributes.get('scale', 1))
    return None


def embed(prefix, epoch, images, batch_size=1000):
    """Embed images with a checkpoint, on the CPU.

    Parameters
    ----------
    prefix : str
        Prefix of the checkpoints.
    epoch : int
        Which of them, counted from 1.
    images : numpy.ndarray
        uint8 (N, 28, 28).
    batch_size : int
        Images embedded at once; the last batch is smaller where they do not fill it.

    Returns
    -------
    embeddings : numpy.ndarray
        float32 (N, d).
    logits : numpy.ndarray
        float32 (N, K), one for each class that training has seen. The most probable class has the largest.

    Raises
    ------
    InputError
        Where there is no such checkpoint, or one of another network, or one that embeds in a single dimension.
    """
    arg_params, aux_params = Checkpoints(prefix).load_params(epoch)
    layers = load_network(prefix).get_internals()
    try:
        # Without the softmax and the center loss no labels are needed.
        outputs = mx.sym.Group(
            [layers['embedding_output'], layers['softmax_output'].get_children()[0]]
        )
        module = mx.mod.Module(outputs, label_names=None)
        module.bind(
            [('data', (min(batch_size, len(images)), 1, *images.shape[1:]))], for_training=False
        )
        module.set_params(arg_params, aux_params, allow_extra=True)
    except (mx.MXNetError, RuntimeError, ValueError, TypeError):
        raise InputError(
            f'{prefix}-symbol.json and {Checkpoints(prefix).params(epoch)} are not a network of train.py and its parameters: '
            'train again, or choose another prefix'
        ) from None
    outputs = []
    for first in range(0, len(images), batch_size):
        pixels = np.multiply(
            images[first : first + batch_size, None], np.float32(1 / 256), dtype=np.float32
        )  # (B, 1, 28, 28)
        module.forward(mx.io.DataBatch([mx.nd.array(pixels)]), is_train=False)
        outputs.append([output.asnumpy() for output in module.get_outputs()])
    embeddings, logits = map(np.concatenate, zip(*outputs))
    if embeddings.shape[1] < 2:
        raise InputError(
            f'{prefix} embeds in {embeddings.shape[1]} dimension, a picture needs 2 or more: choose another prefix'
        )
    if not np.isfinite(embeddings).all():
        raise InputError(
            f'{Checkpoints(prefix).params(epoch)} embeds images as numbers that are not finite: choose an earlier --epoch'
        )
    return embeddings, logits


def cluster_statistics(embeddings, labels):
    """The :class:`ClusterStatistics` of embeddings (N, d) with labels (N,). nan where there is one class only, or all is one point."""
    classes, members = np.unique(labels, return_inverse=True)
    means = np.stack(
        [embeddings[labels == label].mean(axis=0, dtype=np.float64) for label in classes]
    )  # (K, d)
    intra = float(np.linalg.norm(embeddings - means[members], axis=1).mean())
    distances = [np.linalg.norm(one - other) for one, other in itertools.combinations(means, 2)]
    inter = float(np.mean(distances)) if distances else math.nan
    return ClusterStatistics(intra, inter, intra / inter if inter else math.nan)


def verification(embeddings, labels):
    """The :class:`Verification` by Euclidean distance over all pairs of embeddings (N, d) with labels (N,). nan where the pairs are of one kind only.

    On embeddings of length 1 it is that by cosine: ||x - y||^2 = 2 - 2 cos(x, y) there, and only the order of the distances counts.
    """
    embeddings = embeddings.astype(np.float64)
    same, different = [np.empty(0)], [np.empty(0)]
    for i in range(len(labels) - 1):
        distances, is_same = (
            np.linalg.norm(embeddings[i + 1 :] - embeddings[i], axis=1),
            labels[i + 1 :] == labels[i],
        )
        same.append(distances[is_same])
        different.append(distances[~is_same])
    same, different = (np.sort(np.concatenate(distances)) for distances in (same, different))
    if not len(same) or not len(different):
        return Verification(math.nan, math.nan)
    farther = len(different) - np.searchsorted(
        different, same, 'right'
    )  # pairs of two classes, for each pair of one
    as_far = len(different) - np.searchsorted(different, same, 'left') - farther
    first_reject = different[
        int(FALSE_ACCEPTS * len(different))
    ]  # fewer are accepted where several pairs are just as far
    return Verification(
        np.mean(farther + as_far / 2) / len(different),
        np.searchsorted(same, first_reject, 'left') / len(same),
    )


def verify_unseen(embeddings, labels, num_seen):
    """The :class:`Verification` among the classes from ``num_seen`` on, of up to VERIFIED_IMAGES of their images: {'Euclidean': ..., 'cosine': ...}."""
    unseen = np.random.default_rng(0).permutation(np.flatnonzero(labels >= num_seen))[
        :VERIFIED_IMAGES
    ]
    embeddings, labels = embeddings[unseen], labels[unseen]
    directions = embeddings / np.maximum(
        np.linalg.norm(embeddings, axis=1, keepdims=True), np.finfo('f').tiny
    )
    return {
        'Euclidean': verification(embeddings, labels),
        'cosine': verification(directions, labels),
    }


def viewing_plane(embeddings):
    """The :class:`Plane` of the two dimensions of embeddings (N, 2), or of the first two principal components of embeddings (N, d)."""
    dimensions = embeddings.shape[1]
    if dimensions == 2:
        return Plane(
            np.zeros(2), np.eye(2), ('activation of the 1st neuron', 'activation of the 2nd neuron')
        )
    # The covariance has the axes of the centred embeddings, and is d x d instead of N x d.
    _, variances, axes = np.linalg.svd(np.cov(embeddings, rowvar=False, bias=True))
    axes = axes[:2]
    axes *= np.sign(axes[range(2), abs(axes).argmax(axis=1)])[
        :, None
    ]  # an axis and its opposite are as good: always take the same
    shares = variances[:2] / max(variances.sum(), np.finfo(float).tiny)
    names = (
        f'principal component {i} of {dimensions} dimensions ({share:.0%} of the variance)'
        for i, share in enumerate(shares, 1)
    )
    return Plane(embeddings.mean(axis=0, dtype=np.float64), axes, tuple(names))


def make_panel(prefix, epoch, name, images, labels, source, class_names):
    """Embed the images, tell the numbers on stdout, and return the :class:`Panel`. ``source`` says what the images are from."""
    embeddings, logits = embed(prefix, epoch, images)
    num_seen = logits.shape[1]
    seen = labels < num_seen
    accuracy = np.mean(logits.argmax(axis=1)[seen] == labels[seen])
    statistics = cluster_statistics(embeddings, labels)
    told = [
        f'{Checkpoints(prefix).params(epoch)}: {len(labels)} images of {source}, accuracy {accuracy:.2%}, '
        'intra {:.3f}, inter {:.3f}, ratio {:.4f}'.format(*statistics)
    ]
    captions = [
        f'accuracy {accuracy:.2%}    '
        + 'intra {:.3f}    inter {:.3f}    ratio {:.3f}'.format(*statistics)
    ]
    if num_seen < len(class_names):
        unseen = f'unseen in training: {", ".join(class_names[num_seen:])}'
        verified = [
            f'{distance}: AUC {auc:.4f}, {accepts:.1%} true accepts at {FALSE_ACCEPTS:.0%} false'
            for distance, (auc, accepts) in verify_unseen(embeddings, labels, num_seen).items()
        ]
        told.append(f'    {unseen}; pairs of their images by distance, {"; ".join(verified)}')
        captions += [f'× {unseen}; pairs of their images by distance,', *verified]
    tqdm.write('\n'.join(told))
    return Panel(
        embeddings,
        labels,
        f'{name} (epoch{NO_BREAK}{epoch}):{NO_BREAK}{accuracy:.2%}',
        '\n'.join(captions),
        num_seen,
    )


def panel_names(prefixes):
    """What to call the models in their titles: by what they were trained with, or by prefix and lambda where that is not enough."""
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
        for prefix, weight in zip(prefixes, weights)
    ]


def new_figure(rows, columns, width, height):
    """A figure with so many panels, each of so many inches, in one style: (figure, axes (rows, columns))."""
    seaborn.set_theme(
        style='whitegrid',
        rc={
            'grid.color': '0.93',
            'axes.edgecolor': '0.8',
            'text.color': '0.15',
            'axes.labelcolor': '0.4',
            'xtick.color': '0.4',
            'ytick.color': '0.4',
            'xtick.labelsize': 10,
            'ytick.labelsize': 10,
            'axes.labelsize': 10,
            'axes.titlesize': 13,
            'axes.titlepad': 10,
        },
    )

    size = (width * columns, height * rows)
    try:
        figure = plt.figure(figsize=size, layout='constrained')
    except Exception:  # whatever a window system says that is chosen (MPLBACKEND) and cannot be had: a picture needs none
        plt.switch_backend('agg')
        figure = plt.figure(figsize=size, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_embeddings(ax, embeddings, labels, class_names, title, caption, num_seen=None, plane=None):
    """Draw embeddings into an axes: one colour per class, the class's name at the median of its cluster, crosses for unseen classes, equal axes.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    embeddings : numpy.ndarray
        float32 (N, d), d >= 2.
    labels : numpy.ndarray
        int (N,), positions in ``class_names``.
    class_names : sequence of str
    title, caption : str
        What stands above and below.
    num_seen : int, optional
        Training has seen the first so many classes; by default all.
    plane : Plane, optional
        The plane that they are seen in, by default that of :func:`viewing_plane`.
    """
    plane = plane or viewing_plane(embeddings)
    points = (embeddings - plane.origin) @ plane.axes.T  # (N, 2)
    outline = [matplotlib.patheffects.withStroke(linewidth=4, foreground='white')]
    font_size = 15 if max(map(len, class_names)) <= 2 else 11
    for label, colour in enumerate(seaborn.color_palette(PALETTE, len(class_names))):
        cluster = points[labels == label]
        if len(cluster):
            size = np.clip(25000 / len(labels), 1.5, 10)
            marker = (
                {'linewidths': 0}
                if num_seen is None or label < num_seen
                else {'marker': 'x', 'linewidths': 0.7, 's': 4 * size}
            )
            ax.scatter(
                *cluster.T,
                **{'s': size, **marker},
                color=colour,
                alpha=0.5,
                rasterized=True,
                label=class_names[label],
            )
            ax.text(
                *np.median(cluster, axis=0),
                class_names[label],
                color=colour,
                fontsize=font_size,
                fontweight='bold',
                ha='center',
                va='center',
                path_effects=outline,
            )
    ax.set_aspect('equal', adjustable='datalim')
    characters = 11.5 * ax.get_window_extent().width / ax.figure.dpi
    ax.set_title(textwrap.fill(title, int(characters)).replace(NO_BREAK, ' '))
    ax.set_xlabel(plane.names[0])
    ax.set_ylabel(plane.names[1])
    ax.annotate(
        caption,
        (0.5, 0),
        (0, -8),
        xycoords=ax.xaxis.label,
        textcoords='offset points',
        ha='center',
        va='top',
        fontsize=11,
    )


def draw_embeddings(panels, class_names):
    """A figure of the panels, row by row: up to three in one row, more of them nearly in a square."""
    columns = len(panels) if len(panels) <= 3 else math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(rows, columns, *((7.5, 7.9) if len(panels) <= 2 else (5.5, 6)))
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
                panel.num_seen,
            )
    return figure


def with_palette(image, colours):
    """The image with a palette of so many colours, chosen so that every class keeps its own."""
    return image.quantize(colours, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)


class GifWriter(matplotlib.animation.AbstractMovieWriter):
    """Writes a GIF whose frames share one palette, without dithering: a fraction of the size, and nothing flickers."""

    def setup(self, fig, outfile, dpi=None):
        super().setup(fig, outfile, dpi)
        self.frames = []

    def grab_frame(self, **savefig_kwargs):
        self.fig.canvas.draw()
        self.frames.append(Image.fromarray(np.array(self.fig.canvas.buffer_rgba())).convert('RGB'))

    def finish(self):
        if not self.frames:  # interrupted before the first
            return
        palette = with_palette(self.frames[-1], FRAME_COLOURS)
        frames = [
            frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in self.frames
        ]
        duration = 1000 // self.fps  # ms
        frames[0].save(
            self.outfile,
            save_all=True,
            append_images=frames[1:],
            loop=0,
            duration=[duration] * (len(frames) - 1) + [6 * duration],
        )


def animate(panels, class_names, path):
    """Write the panels, all of the same images, as the frames of an animation: fixed axes, and the same sample of the images in all."""
    labels = panels[-1].labels
    shown = np.sort(np.random.default_rng(0).permutation(len(labels))[:FRAME_IMAGES])
    plane = viewing_plane(panels[-1].embeddings)
    points = np.concatenate(
        [(panel.embeddings[shown] - plane.origin) @ plane.axes.T for panel in panels]
    )
    low, high = points.min(axis=0), points.max(axis=0)
    limits = (low + high) / 2 + np.array([[-0.53], [0.53]]) * max(
        *(high - low), 1e-6
    )  # (2, 2): a square around all points of all frames
    plt.switch_backend('agg')
    figure, ((ax,),) = new_figure(1, 1, 6, 6.4)
    figure.set_dpi(FRAME_DPI)

    def draw(panel):
        ax.clear()
        plot_embeddings(
            ax,
            panel.embeddings[shown],
            labels[shown],
            class_names,
            panel.title,
            panel.caption,
            panel.num_seen,
            plane,
        )
        ax.set_aspect('equal', adjustable='box')
        ax.set(xlim=limits[:, 0], ylim=limits[:, 1])

    draw(panels[-1])
    figure.canvas.draw()
    figure.set_layout_engine('none')  # the panel stays where the last frame has it
    writer = (GifWriter if path.suffix.lower() == '.gif' else matplotlib.animation.FFMpegWriter)(
        FRAMES_PER_SECOND
    )
    with written_whole(path) as beside, writer.saving(figure, beside, FRAME_DPI):
        for panel in tqdm(panels, 'rendering', unit='frame', leave=False, disable=None):
            draw(panel)
            writer.grab_frame()


def read_log(path):
    """The numbers of each epoch from a log of train.py.

    Parameters
    ----------
    path : str
        The log file. Of several runs one after another the last one counts: when the number of the epoch falls back, what was there from
        that epoch on is forgotten, so that a run that was resumed goes on where it was. Of several workers the first one counts.

    Returns
    -------
    dict
        (split, metric) -> {epoch: value}, split 'Train' or 'Validation', metric 'accuracy' or 'center_loss', the epoch counted from 1.

    Raises
    ------
    InputError
        For a file that cannot be read, or has no such numbers.
    """
    try:
        text = Path(path).read_text(errors='replace')
    except OSError as error:
        raise InputError(f'--curves: {path} cannot be read: {error.strerror}') from None
    curves, newest = {}, 0
    for line in LOG_LINE.finditer(text):
        epoch, curve = int(line[1]) + 1, line.group(2, 3)
        if epoch < newest or epoch in curves.get(curve, {}):
            curves = {
                kept: {before: value for before, value in values.items() if before < epoch}
                for kept, values in curves.items()
            }
        newest = epoch
        curves.setdefault(curve, {})[epoch] = float(line[4])
    if not curves:
        raise InputError(
            f'--curves: {path} has no line such as Epoch[0] Validation-accuracy=0.9: it is not a log of train.py'
        )
    return {curve: values for curve, values in curves.items() if values}


def draw_curves(paths):
    """A figure of accuracy and center loss over the epochs, each log in a colour, validation solid and training dashed."""
    logs = [read_log(path) for path in paths]
    figure, (axes,) = new_figure(1, 2, 6.5, 5)
    colours = seaborn.color_palette(PALETTE if len(logs) <= 10 else 'husl', len(logs))
    for ax, metric in zip(axes, ('accuracy', 'center_loss')):
        for path, curves, colour in zip(paths, logs, colours):
            for split, style in (
                ('Train', {'linestyle': '--', 'alpha': 0.7}),
                ('Validation', {'marker': 'o', 'markersize': 3.5}),
            ):
                curve = curves.get((split, metric), {})
                label = f'{path}, {"training" if split == "Train" else "validation"}'
                ax.plot(list(curve), list(curve.values()), color=colour, label=label, **style)
        ax.set(title=metric.replace('_', ' '), xlabel='epoch')
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=None))
    ends = [
        list(curve.values())[-1]
        for curves in logs
        for (_, metric), curve in curves.items()
        if metric == 'accuracy'
    ]
    bottom = 1 - 5 * (
        1 - min(ends, default=0)
    )  # the first epochs would press all that follows against the upper edge
    if bottom > axes[0].get_ylim()[0]:
        axes[0].set_ylim(bottom, 1 + 0.04 * (1 - bottom))
    axes[1].set_yscale('log')  # the center loss of one run may be a hundred times that of another
    axes[1].yaxis.set_major_formatter('{x:g}')
    axes[1].yaxis.set_minor_formatter(lambda x, position: f'{x:g}' if f'{x:e}'[0] in '235' else '')
    axes[1].grid(which='minor')
    figure.legend(
        *axes[0].get_legend_handles_labels(),
        loc='outside lower center',
        ncols=min(len(logs), 3),
        frameon=False,
        fontsize=11,
    )
    for path, curves in zip(paths, logs):
        last = [
            f'{split.lower()} {metric} {list(curve.values())[-1]:.4f}'
            for (split, metric), curve in curves.items()
        ]
        print(f'{path}: {max(map(max, curves.values()))} epochs, in the last one {", ".join(last)}')
    return figure


def check_output(path, option, kinds):
    """Raise InputError where no picture of one of the kinds (ends of names) could be written."""
    if path.suffix[1:].lower() not in kinds:
        raise InputError(
            f'{option}={path}: it can be written as {", ".join(sorted(kinds))}, told by the end of the name'
        )
    if path.is_dir():
        raise InputError(f'{option}={path} cannot be written: it is a folder')
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(
            f'{option}={path} cannot be written: no such folder, or no permission ({path.parent})'
        )


@contextlib.contextmanager
def written_whole(path):
    """A place beside ``path`` to write to. What was written is moved there when it is whole, and nothing is left of it otherwise."""
    beside = path.with_name(f'.{os.getpid()}.{path.name}')
    try:
        yield beside
        os.replace(beside, path)
    except subprocess.CalledProcessError as error:
        raise InputError(
            f'{path} cannot be written: ffmpeg ended with status {error.returncode}'
        ) from None
    except (OSError, RuntimeError) as error:
        raise InputError(
            f'{path} cannot be written: {getattr(error, "strerror", None) or error}'
        ) from None
    finally:
        beside.unlink(missing_ok=True)
    print(f'wrote {path}')


def save(figure, path):
    """Write the figure as a picture of the kind that the name says; a PNG with a palette, which is a third of the size and looks the same."""
    with written_whole(path) as beside:
        figure.savefig(beside, dpi=DPI)
        if path.suffix.lower() == '.png':
            with Image.open(beside) as image:
                smaller = with_palette(image.convert('RGB'), 256)
            smaller.save(beside, dpi=(DPI, DPI), optimize=True)


def parse_args(argv=None):
    """The command line (by default ``sys.argv``) as a namespace."""
    parser = ArgumentParser(
        description='Draw the embeddings of a trained model (Wen et al., ECCV 2016, Figures 2, 3). Under each panel: '
        'accuracy; intra, the mean distance of an embedding to the mean of its class; inter, the mean distance between '
        'the means of two classes; ratio = intra / inter, the smaller the better.'
    )
    data.add_data_arguments(parser)
    parser.add_argument(
        '--model-prefix',
        default='center_loss',
        metavar='P',
        help='the run whose embeddings are drawn',
    )
    parser.add_argument(
        '--epoch',
        type=number(int, minimum=1, maximum=10**9),
        metavar='N',
        help='the checkpoint of that epoch instead of the newest; with --compare, of --model-prefix alone',
    )
    parser.add_argument(
        '--split',
        choices=['train', 'val'],
        default='val',
        help='embed all of the training or of the validation images',
    )
    parser.add_argument(
        '--output',
        type=Path,
        metavar='FILE',
        help='the picture (default: center_loss.png; grid.png for --grid, curves.png for --curves)',
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        '--compare',
        metavar='P',
        help='draw the newest embeddings of this run (softmax only, say) on the left',
    )
    modes.add_argument(
        '--grid',
        nargs='+',
        metavar='P',
        help='draw a panel for each of these runs (of several lambda, say)',
    )
    modes.add_argument(
        '--animate',
        type=Path,
        metavar='FILE',
        help='write an animation, a frame for each checkpoint: .gif, or .mp4 where there is ffmpeg',
    )
    modes.add_argument(
        '--curves',
        nargs='+',
        metavar='LOG',
        help='draw accuracy and center loss over the epochs from these logs',
    )
    args = parser.parse_args(argv)
    for mode, options in NOT_WITH.items():
        for option in options:
            if getattr(args, mode) and getattr(args, option) != parser.get_default(option):
                parser.error(
                    f'--{option.replace("_", "-")} has no meaning with --{mode}: leave it out'
                )
    args.output = args.output or Path(
        'grid.png' if args.grid else 'curves.png' if args.curves else 'center_loss.png'
    )
    return args


def choose_runs(args):
    """The pairs (prefix, epoch) of the panels or frames, in order."""
    if args.grid:
        newest = [newest_epoch(prefix, '--grid') for prefix in args.grid]
        return [(prefix, args.epoch or epoch) for prefix, epoch in zip(args.grid, newest)]
    newest = newest_epoch(args.model_prefix)
    if args.animate:
        return [(args.model_prefix, epoch) for epoch in Checkpoints(args.model_prefix).epochs()]
    compared = (
        [(args.compare, newest_epoch(args.compare, '--compare'))]
        if args.compare is not None
        else []
    )
    return [*compared, (args.model_prefix, args.epoch or newest)]


def main():
    args = parse_args()
    if args.animate:
        if (
            args.animate.suffix.lower() == '.mp4'
            and not matplotlib.animation.FFMpegWriter.isAvailable()
        ):
            raise InputError(
                f'--animate={args.animate}: an .mp4 needs the program ffmpeg, which is not there: install it, or write a .gif'
            )
        check_output(args.animate, '--animate', ['gif', 'mp4'])
    else:
        check_output(
            args.output,
            '--output',
            matplotlib.backend_bases.FigureCanvasBase.get_supported_filetypes(),
        )
    if args.curves:
        figure = draw_curves(args.curves)
    else:
        runs = choose_runs(
            args
        )  # before the digits are searched for: the first thing to go wrong is a run that is not there
        names = panel_names([prefix for prefix, _ in runs])
        digits = data.load_digits(args.dataset, args.data_dir)
        images, labels = (
            (digits.train_images, digits.train_labels)
            if args.split == 'train'
            else (digits.val_images, digits.val_labels)
        )
        bar = tqdm(
            list(zip(runs, names)),
            'embedding',
            unit='checkpoint',
            leave=False,
            disable=None if args.animate else True,
        )
        panels = [
            make_panel(
                *run, name, images, labels, f'{digits.dataset} ({args.split})', digits.class_names
            )
            for run, name in bar
        ]
        if args.animate:
            animate(panels, digits.class_names, args.animate)
            return
        figure = draw_embeddings(panels, digits.class_names)
    save(figure, args.output)
    if figure.canvas.required_interactive_framework:
        plt.show()


if __name__ == '__main__':
    run_script(main)
