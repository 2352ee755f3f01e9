"""See what was learned: the embeddings of the digits, two models side by side, and the course of training.

    python vis.py                                        the newest checkpoint of center_loss -> center_loss.png
    python vis.py --compare softmax                      softmax only on the left, softmax + center loss on the right
    python vis.py --curves log.txt                       accuracy and center loss over the epochs -> curves.png

The pictures follow Figures 2 and 3 of Wen, Zhang, Li, Qiao: A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016.
Under each panel stand, besides the accuracy,

    intra   the mean distance of an embedding to the mean of its class (the spread of a cluster),
    inter   the mean distance between the means of two classes,
    ratio   intra / inter: the smaller, the better the clusters are told apart.
"""

import itertools
import os
import re
from pathlib import Path
from typing import NamedTuple

import matplotlib
import matplotlib.patheffects
import matplotlib.pyplot as plt
import numpy as np
import seaborn

import center_loss  # noqa: F401  (a checkpoint's network names the operator)
import data
from runtime import ArgumentParser, InputError, mx, number, run_script
from train_model import Checkpoints

BATCH_SIZE = 1000  # images embedded at once
PALETTE = 'tab10'


class Embedded(NamedTuple):
    """A model's view of some images: ``embeddings`` float32 (N, 2), ``predictions`` int (N,), ``labels`` uint8 (N,), and the model's ``name``."""

    embeddings: np.ndarray
    predictions: np.ndarray
    labels: np.ndarray
    name: str


class ClusterStatistics(NamedTuple):
    """How compact and how far apart the classes are, as in this module's docstring."""

    intra: float
    inter: float
    ratio: float


def embed(prefix, epoch, images, labels):
    """Embed images with a checkpoint.

    Parameters
    ----------
    prefix : str
        Prefix of the checkpoints.
    epoch : int or None
        Which of them, counted from 1; None for the newest.
    images : numpy.ndarray
        uint8 (N, 28, 28).
    labels : numpy.ndarray
        uint8 (N,), only handed on.

    Returns
    -------
    Embedded

    Raises
    ------
    InputError
        Where there is no such checkpoint, or one of another network.
    """
    checkpoints = Checkpoints(prefix)
    epochs = checkpoints.epochs()
    if not epochs:
        raise InputError(f'there is no checkpoint {prefix}-0001.params or later: run python train.py first, or name the run with --model-prefix')
    epoch = epoch or epochs[-1]
    arg_params, aux_params = checkpoints.load_params(epoch)
    try:
        network = mx.sym.load(f'{prefix}-symbol.json')
        layers = network.get_internals()
        embedding, logits = layers['embedding_output'], layers['softmax_output'].get_children()[0]
        module = mx.mod.Module(mx.sym.Group([embedding, logits]), label_names=None)
        module.bind([('data', (min(BATCH_SIZE, len(images)), 1, *images.shape[1:]))], for_training=False)
        module.set_params(arg_params, aux_params, allow_extra=True)
    except (mx.MXNetError, RuntimeError, ValueError, TypeError):
        raise InputError(f'{prefix}-symbol.json and {checkpoints.params(epoch)} are not a network of train.py and its parameters: '
                         'train again, or choose another --model-prefix') from None
    outputs = []
    for first in range(0, len(images), BATCH_SIZE):
        pixels = np.multiply(images[first:first + BATCH_SIZE, None], np.float32(1 / 256), dtype=np.float32)  # (B, 1, 28, 28)
        module.forward(mx.io.DataBatch([mx.nd.array(pixels)]), is_train=False)
        outputs.append([output.asnumpy() for output in module.get_outputs()])
    embeddings, scores = map(np.concatenate, zip(*outputs))
    if embeddings.shape[1] != 2:
        raise InputError(f'{prefix} embeds in {embeddings.shape[1]} dimensions, a picture has 2: choose another --model-prefix')
    weight = float(network.attr_dict()['center_loss']['scale'])
    name = f'softmax + center loss, λ = {weight:g}' if weight else 'softmax only'
    return Embedded(embeddings, scores.argmax(axis=1), labels, f'{name} (epoch {epoch})')


def cluster_statistics(embeddings, labels):
    """:class:`ClusterStatistics` of embeddings (N, d) with labels (N,)."""
    classes, members = np.unique(labels, return_inverse=True)
    means = np.stack([embeddings[labels == label].mean(axis=0, dtype=np.float64) for label in classes])  # (K, d)
    intra = np.linalg.norm(embeddings - means[members], axis=1).mean()
    inter = np.mean([np.linalg.norm(a - b) for a, b in itertools.combinations(means, 2)])
    return ClusterStatistics(intra, inter, intra / inter)


def plot_embeddings(ax, embedded, class_names):
    """Draw the embeddings of one model into an axes, one colour per class, with the class's name at the median of its cluster."""
    embeddings, predictions, labels, name = embedded
    for label, colour in enumerate(seaborn.color_palette(PALETTE, len(class_names))):
        of_class = embeddings[labels == label]
        if not len(of_class):
            continue
        ax.scatter(*of_class.T, s=max(1.5, min(8, 20000 / len(labels))), color=colour, alpha=0.5, linewidths=0, rasterized=True, label=class_names[label])
        ax.text(*np.median(of_class, axis=0), class_names[label], color=colour, fontsize=15, fontweight='bold', ha='center', va='center',
                path_effects=[matplotlib.patheffects.withStroke(linewidth=4, foreground='white')])
    accuracy = np.mean(predictions == labels)
    statistics = cluster_statistics(embeddings, labels)
    ax.set_aspect('equal', adjustable='datalim')
    ax.set_title(f'{name}: {accuracy:.2%}', fontsize=13, pad=10)
    ax.set_xlabel(f'accuracy {accuracy:.2%}     intra {statistics.intra:.2f}     inter {statistics.inter:.2f}     ratio {statistics.ratio:.3f}',
                  fontsize=11, labelpad=10)


def draw_embeddings(models, class_names):
    """A figure with a panel for each :class:`Embedded`, from left to right."""
    seaborn.set_theme(style='whitegrid', rc={'grid.color': '0.92', 'axes.edgecolor': '0.8', 'axes.labelcolor': '0.25'})
    figure, axes = plt.subplots(1, len(models), figsize=(7.5 * len(models), 7.6), squeeze=False, layout='constrained')
    for ax, embedded in zip(axes[0], models):
        plot_embeddings(ax, embedded, class_names)
    return figure


def read_log(path):
    """The numbers of each epoch from a log of train.py.

    Parameters
    ----------
    path : str
        The log file. Of several runs one after another the last one counts: a line for an epoch that was there before begins anew from there.

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
    curves = {}
    for epoch, split, metric, value in re.findall(r'Epoch\[(\d+)\] (Train|Validation)-(accuracy|center_loss)=(\S+)', text):
        epoch, curve = int(epoch) + 1, curves.get((split, metric), {})
        curves[split, metric] = {**{before: kept for before, kept in curve.items() if before < epoch}, epoch: float(value)}
    if not curves:
        raise InputError(f'--curves: {path} has no line such as Epoch[0] Validation-accuracy=0.9: it is not a log of train.py')
    return curves


def draw_curves(paths):
    """A figure of accuracy and center loss over the epochs, each log in a colour, validation solid and training dashed."""
    logs = [read_log(path) for path in paths]
    seaborn.set_theme(style='whitegrid', rc={'grid.color': '0.92', 'axes.edgecolor': '0.8'})
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout='constrained')
    for ax, metric, title in zip(axes, ('accuracy', 'center_loss'), ('accuracy', 'center loss')):
        for path, curves, colour in zip(paths, logs, itertools.cycle(seaborn.color_palette(PALETTE))):
            for split, style in (('Train', '--'), ('Validation', '-')):
                curve = curves.get((split, metric), {})
                ax.plot(list(curve), list(curve.values()), style, color=colour, marker='.' if split == 'Validation' else None,
                        label=f'{path}, {"training" if split == "Train" else "validation"}')
        ax.set_title(title)
        ax.set_xlabel('epoch')
        ax.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    axes[0].yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1, decimals=None))
    axes[0].legend(loc='lower right')
    return figure


def check_output(path):
    """Raise InputError where no picture could be written."""
    kinds = matplotlib.backend_bases.FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise InputError(f'--output={path}: pictures are written as {", ".join(sorted(kinds))}, told by the end of the name')
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InputError(f'--output={path} cannot be written: {"it is a folder" if path.is_dir() else f"no such folder, or no permission ({path.parent})"}')


def save(figure, path):
    """Write the figure beside its place and move it there when it is whole."""
    beside = path.with_name(f'.{os.getpid()}.{path.name}')
    try:
        figure.savefig(beside, dpi=110)
        os.replace(beside, path)
    except OSError as error:
        raise InputError(f'--output={path} cannot be written: {error.strerror}') from None
    finally:
        beside.unlink(missing_ok=True)
    print(f'wrote {path}')


def parse_args(argv=None):
    """The command line (by default ``sys.argv``) as a namespace."""
    parser = ArgumentParser(description='Draw the embeddings of a trained model (Wen et al., ECCV 2016, Figures 2 and 3).')
    data.add_data_arguments(parser)
    parser.add_argument('--model-prefix', default='center_loss', metavar='P', help='the run whose embeddings are drawn')
    parser.add_argument('--epoch', type=number(int, minimum=1), metavar='N', help='the checkpoint of that epoch instead of the newest')
    parser.add_argument('--split', choices=['train', 'val'], default='val', help='the images that are embedded: all of the validation or of the training set')
    parser.add_argument('--output', type=Path, metavar='FILE', help='the picture: center_loss.png, or curves.png for --curves')
    extra = parser.add_mutually_exclusive_group()
    extra.add_argument('--compare', metavar='P', help='draw the newest embeddings of this run (softmax only, say) on the left')
    extra.add_argument('--curves', nargs='+', metavar='LOG', help='draw accuracy and center loss over the epochs from these logs instead')
    args = parser.parse_args(argv)
    args.output = args.output or Path('curves.png' if args.curves else 'center_loss.png')
    return args


def main():
    args = parse_args()
    check_output(args.output)
    if args.curves:
        figure = draw_curves(args.curves)
    else:
        runs = [(args.compare, None)] * bool(args.compare) + [(args.model_prefix, args.epoch)]
        for prefix, _ in runs:  # before the digits are searched for
            if not Checkpoints(prefix).epochs():
                raise InputError(f'there is no checkpoint of {prefix}: run python train.py first, or name the run with '
                                 f'{"--compare" if prefix == args.compare else "--model-prefix"}')
        digits = data.load_digits(args.dataset, args.data_dir)
        images, labels = (digits.train_images, digits.train_labels) if args.split == 'train' else (digits.val_images, digits.val_labels)
        models = [embed(prefix, epoch, images, labels) for prefix, epoch in runs]
        for embedded in models:
            print(f'{embedded.name}: {len(labels)} images of {digits.dataset}, accuracy {np.mean(embedded.predictions == labels):.2%}, '
                  'intra {:.3f}, inter {:.3f}, ratio {:.4f}'.format(*cluster_statistics(embedded.embeddings, labels)))
        figure = draw_embeddings(models, digits.class_names)
    save(figure, args.output)
    if figure.canvas.required_interactive_framework:
        plt.show()


if __name__ == '__main__':
    run_script(main)
