"""The pictures: panels, titles, points, captions, curves, compared with the numbers they show."""

import itertools
import logging
import os
from pathlib import Path
import re
import subprocess
import sys

import matplotlib
from matplotlib.figure import Figure
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image
import pytest
import seaborn
from test_evaluation import embed_by_hand, save_untrained, statistics_by_hand

from common.environment import mx
from common import pictures
from common.checkpoints import Checkpoints
from common.curves import METRICS, draw_curves, read_log, validation_images
from common.embedder import TRAINED
from common.errors import Failure, InputError
from common.evaluation import verify
import data
from helpers import ROOT, logged, run_python, small_network
import train
import vis

pytestmark = pytest.mark.filterwarnings('error::RuntimeWarning')

NAMES = list('0123456789')
LOG = """\
2026-11-24 12:00:00,000 Node[0] start with arguments Namespace(dataset='auto')
2026-11-24 12:00:01,000 Node[0] Epoch[0] Batch [0-50]\tSpeed: 70.00 samples/sec\taccuracy=0.100000
2026-11-24 12:00:02,000 Node[0] Epoch[0] Train-accuracy=0.500000
2026-11-24 12:00:02,000 Node[0] Epoch[0] Train-cross-entropy=2.250000
2026-11-24 12:00:02,000 Node[0] Epoch[0] Train-center_loss=4.000000
2026-11-24 12:00:02,000 Node[0] Epoch[0] Time cost=1.000
2026-11-24 12:00:03,000 Node[0] Epoch[0] Validation-accuracy=0.400000
2026-11-24 12:00:03,000 Node[0] Epoch[0] Validation-cross-entropy=2.125000
2026-11-24 12:00:03,000 Node[0] Epoch[0] Validation-center_loss=5.000000
2026-11-24 12:00:04,000 Node[0] Epoch[1] Train-accuracy=0.600000
2026-11-24 12:00:05,000 Node[0] Epoch[1] Validation-accuracy=0.550000
2026-11-24 12:00:06,000 Node[0] Epoch[2] Train-accuracy=0.700000
"""
CURVES = {
    ('Train', 'accuracy'): {1: 0.5, 2: 0.6, 3: 0.7},
    ('Train', 'cross-entropy'): {1: 2.25},
    ('Train', 'center_loss'): {1: 4.0},
    ('Validation', 'accuracy'): {1: 0.4, 2: 0.55},
    ('Validation', 'cross-entropy'): {1: 2.125},
    ('Validation', 'center_loss'): {1: 5.0},
}
OLD_LOG = ''.join(line for line in LOG.splitlines(True) if 'cross-entropy' not in line)


@pytest.fixture(scope='module')
def sample():
    return data.load_digits('mnist-5k')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with untrained runs: center_loss (2 epochs), softmax, and some special ones."""
    folder = tmp_path_factory.mktemp('runs')
    for epoch in (1, 2):
        save_untrained(folder / 'center_loss', small_network(weight=0.1), epoch)
    save_untrained(folder / 'softmax', small_network(weight=0))
    save_untrained(folder / 'again', small_network(weight=0.1))
    save_untrained(folder / 'wide', small_network(embedding_dim=3))
    save_untrained(folder / 'narrow', small_network(embedding_dim=1))
    save_untrained(folder / 'six', small_network(num_classes=6, embedding_dim=3))
    layers = small_network().get_internals()
    save_untrained(folder / 'plain', mx.sym.SoftmaxOutput(layers['fc2_output'], name='softmax'))
    logits = mx.sym.FullyConnected(layers['fc1_output'], num_hidden=10, name='fc2')
    save_untrained(folder / 'other', mx.sym.SoftmaxOutput(logits, name='softmax'))
    (folder / 'log.txt').write_text(LOG)
    (folder / 'old.txt').write_text(OLD_LOG)
    return folder


@pytest.fixture(autouse=True)
def working_folder(request, tmp_path, monkeypatch):
    """The folder of the runs, where a test uses them."""
    uses_runs = 'runs' in request.fixturenames
    monkeypatch.chdir(request.getfixturevalue('runs') if uses_runs else tmp_path)


def run_vis(*options):
    dataset = [] if '--curves' in options else ['--dataset', 'mnist-5k']
    vis.main([*dataset, *map(str, options)])


@pytest.fixture
def draw(monkeypatch):
    """The figure that ``python vis.py OPTIONS`` writes, as a function of the options."""

    def figure_of(*options):
        figures = []
        monkeypatch.setattr(pictures, 'save_picture', lambda figure, path: figures.append(figure))
        run_vis(*options)
        return figures[0]

    return figure_of


def accuracy_by_hand(prefix, epoch, images, labels):
    return np.mean(embed_by_hand(prefix, epoch, images)[1].argmax(axis=1) == labels)


def points(ax):
    """The points of each class by its name."""
    return {
        collection.get_label(): np.asarray(collection.get_offsets())
        for collection in ax.collections
    }


def caption(ax):
    """What stands below a panel with every number as N, and the numbers."""
    text = ax.texts[-1].get_text()
    words = re.sub(r' +', ' ', re.sub(r'\d[\d.,]*', 'N', text.replace('mnist-5k', 'DATA')))
    numbers = re.findall(r'\d[\d.,]*', text.replace('mnist-5k', ''))
    return words, [float(number.replace(',', '')) for number in numbers]


def test_every_test_image_is_drawn(runs, sample, draw):
    (ax,) = draw().axes
    embeddings, _ = embed_by_hand('center_loss', 2, sample.val_images)
    accuracy = accuracy_by_hand('center_loss', 2, sample.val_images, sample.val_labels)
    assert ax.get_title() == f'softmax + center loss, λ = 0.1 (epoch 2): {accuracy:.2%}'
    drawn = points(ax)
    assert list(drawn) == NAMES
    for label, offsets in drawn.items():
        np.testing.assert_allclose(offsets, embeddings[sample.val_labels == int(label)], atol=1e-4)
    assert ax.get_xlabel() == 'activation of the 1st neuron'
    assert ax.get_ylabel() == 'activation of the 2nd neuron'
    assert len({tuple(collection.get_facecolor()[0][:3]) for collection in ax.collections}) == 10


def test_axes_are_equal(runs, draw):
    figure = draw()
    figure.canvas.draw()
    (ax,) = figure.axes
    (left, bottom), (right, top) = ax.transData.transform([(0, 0), (1, 1)])
    assert right - left == pytest.approx(top - bottom, rel=1e-4)


def test_class_names(runs, draw):
    """At the median of its cluster, in its color, on white."""
    (ax,) = draw().axes
    assert [text.get_text() for text in ax.texts[:-1]] == NAMES
    for text, collection in zip(ax.texts[:-1], ax.collections, strict=True):
        median = np.median(points(ax)[text.get_text()], axis=0)
        np.testing.assert_allclose(text.get_position(), median, rtol=1e-5)
        assert text.get_color() == tuple(collection.get_facecolor()[0][:3])
        (effect,) = text.get_path_effects()
        assert effect._gc['foreground'] == 'white'


def test_caption(runs, sample, draw):
    (ax,) = draw().axes
    words, numbers = caption(ax)
    assert words == 'DATA: test accuracy N% (N images)\nintra N inter N ratio N'
    accuracy = accuracy_by_hand('center_loss', 2, sample.val_images, sample.val_labels)
    embeddings, _ = embed_by_hand('center_loss', 2, sample.val_images)
    statistics = statistics_by_hand(embeddings, sample.val_labels)
    assert numbers == pytest.approx([100 * accuracy, 1000, *statistics], abs=0.0006)


@pytest.mark.parametrize('compared', ['softmax', 'six'])
def test_nothing_overlaps(compared, runs, draw):
    figure = draw('--compare', compared)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    captions = [ax.texts[-1].get_window_extent() for ax in figure.axes]
    for ax, below in zip(figure.axes, captions, strict=True):
        label, title = ax.xaxis.label.get_window_extent(), ax.title.get_window_extent()
        inside = ax.get_window_extent()
        assert 0 <= below.y0 < below.y1 < label.y0 < label.y1 < inside.y0
        assert inside.y1 < title.y0 < title.y1 <= height
        assert min(below.x0, title.x0) >= 0 and max(below.x1, title.x1) <= width
    assert captions[0].x1 < captions[1].x0


def test_epoch_and_split(runs, sample, draw):
    (ax,) = draw('--epoch', 1, '--split', 'train').axes
    accuracy = accuracy_by_hand('center_loss', 1, sample.train_images, sample.train_labels)
    assert ax.get_title().endswith(f'(epoch 1): {accuracy:.2%}')
    assert caption(ax)[0].startswith('DATA: training accuracy N% (N images)')
    assert {name: len(offsets) for name, offsets in points(ax).items()} == dict.fromkeys(NAMES, 400)
    embeddings, _ = embed_by_hand('center_loss', 1, sample.train_images)
    np.testing.assert_allclose(points(ax)['3'], embeddings[sample.train_labels == 3], atol=1e-4)


def test_both_splits_of_two_runs(runs, sample, draw):
    axes = draw('--compare', 'softmax', '--split', 'both').axes
    splits = {'training': sample[:2], 'test': sample[2:4]}
    drawn = itertools.product([('softmax', 1), ('center_loss', 2)], splits)
    for ax, (run, split) in zip(axes, drawn, strict=True):
        accuracy = accuracy_by_hand(*run, *splits[split])
        assert ax.get_title().endswith(f'(epoch {run[1]}): {accuracy:.2%}')
        assert caption(ax)[0].startswith(f'DATA: {split} accuracy N% (N images)')


def test_val_means_test():
    assert vis.parse_args(['--split=val']) == vis.parse_args(['--split=test']) == vis.parse_args([])


def test_compare(runs, sample, draw):
    left, right = draw('--compare', 'softmax').axes
    accuracy = accuracy_by_hand('softmax', 1, sample.val_images, sample.val_labels)
    assert left.get_title() == f'softmax only (epoch 1): {accuracy:.2%}'
    assert right.get_title().startswith('softmax + center loss, λ = 0.1 (epoch 2): ')
    assert left.get_position().x0 < right.get_position().x0
    embeddings, _ = embed_by_hand('softmax', 1, sample.val_images)
    np.testing.assert_allclose(points(left)['5'], embeddings[sample.val_labels == 5], atol=1e-4)
    for one, other in zip(left.collections, right.collections, strict=True):
        np.testing.assert_array_equal(one.get_facecolor(), other.get_facecolor())


def test_same_objective(runs, draw):
    left, right = draw('--compare', 'again').axes
    assert left.get_title().startswith('again, λ = 0.1 (epoch 1): ')
    assert right.get_title().startswith('center_loss, λ = 0.1 (epoch 2): ')


def test_grid(runs, sample, draw):
    prefixes = ['softmax', 'center_loss', 'plain', str(runs / 'softmax'), 'wide']
    figure = draw('--grid', *prefixes)
    assert len(figure.axes) == 5
    accuracy = accuracy_by_hand('center_loss', 2, sample.val_images, sample.val_labels)
    titles = [ax.get_title().replace('\n', '').replace(' ', '') for ax in figure.axes]
    assert titles[0].startswith('softmax,λ=0(epoch1):')
    assert titles[1] == f'center_loss,λ=0.1(epoch2):{accuracy:.2%}'
    assert titles[2].startswith('plain(epoch1):')
    assert titles[3].startswith(f'{runs}/softmax,λ=0(epoch1):')
    embeddings, _ = embed_by_hand('center_loss', 2, sample.val_images)
    drawn = points(figure.axes[1])['7']
    np.testing.assert_allclose(drawn, embeddings[sample.val_labels == 7], atol=1e-4)
    figure.canvas.draw()
    first_row = {round(ax.get_position().y0, 3) for ax in figure.axes[:3]}
    assert len(first_row) == 1
    assert figure.axes[3].get_position().y1 < first_row.pop()
    assert all(ax.title.get_window_extent().width <= figure.bbox.width / 3 for ax in figure.axes)


def test_grid_epoch(runs, draw):
    axes = draw('--grid', 'softmax', 'center_loss', '--epoch', 1).axes
    assert all('(epoch 1)' in ax.get_title() for ax in axes)


def test_principal_components(runs, sample, draw):
    (ax,) = draw('--model-prefix', 'wide').axes
    embeddings = embed_by_hand('wide', 1, sample.val_images)[0].astype(np.float64)
    centered = embeddings - embeddings.mean(axis=0)
    values, vectors = np.linalg.eigh(centered.T @ centered)
    shares = values[::-1] / values.sum()
    for name, drawn in points(ax).items():
        expected = centered[sample.val_labels == int(name)] @ vectors[:, [2, 1]]
        for axis in range(2):
            np.testing.assert_allclose(abs(drawn[:, axis]), abs(expected[:, axis]), atol=1e-4)
    for label, number in ((ax.get_xlabel(), 1), (ax.get_ylabel(), 2)):
        share = f'{shares[number - 1]:.0%} of the variance'
        assert label == f'principal component {number} of 3 dimensions ({share})'
    in_all_dimensions = statistics_by_hand(embeddings, sample.val_labels)
    assert caption(ax)[1][2:] == pytest.approx(in_all_dimensions, abs=0.0006)


def test_viewing_plane():
    """The same axes whatever the order of the images, and none is mirrored."""
    rng = np.random.default_rng(0)
    embeddings = (rng.normal(size=(300, 4)) * [1, 5, 3, 0.5] + 7).astype('f')
    plane = pictures.viewing_plane(embeddings)
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(plane.axes, [[0, 1, 0, 0], [0, 0, 1, 0]], atol=0.2)
    np.testing.assert_allclose(pictures.viewing_plane(embeddings[::-1]).axes, plane.axes, atol=1e-6)


def test_unseen_classes(runs, sample, draw, capsys):
    (ax,) = draw('--model-prefix', 'six').axes
    embeddings, probability = embed_by_hand('six', 1, sample.val_images)
    seen = sample.val_labels < 6
    accuracy = np.mean(probability.argmax(axis=1)[seen] == sample.val_labels[seen])
    assert ax.get_title().endswith(f': {accuracy:.2%}')
    drawn = points(ax)
    assert list(drawn) == NAMES and sum(map(len, drawn.values())) == len(sample.val_labels)
    crosses = [len(collection.get_paths()[0].vertices) == 4 for collection in ax.collections]
    assert crosses == [False] * 6 + [True] * 4
    first, _, unseen, *verified = ax.texts[-1].get_text().splitlines()
    assert first.endswith(f'{accuracy:.2%} (600 images)')
    assert unseen == '× unseen in training: 6, 7, 8, 9; pairs of their images by distance,'
    assert verified == [
        f'{distance}: AUC {auc:.4f}, {accepts:.1%} true accepts at 1% false'
        for distance, (auc, accepts) in verify(embeddings[~seen], sample.val_labels[~seen]).items()
    ]
    assert capsys.readouterr().out.splitlines()[1].endswith('; '.join(verified))


def test_other_data_are_named(tmp_path, caplog):
    """The accuracy on images that a network was trained on looks too good."""
    prefix = ROOT / 'data' / 'trained' / 'center_loss'
    output = f'--output={tmp_path / "picture.png"}'
    vis.main([f'--model-prefix={prefix}', '--dataset=mnist-5k', output])
    said = 'was trained on mnist and is measured on mnist-5k, whose images are among the training '
    assert f'{prefix}-0008.params {said}' in caplog.text


def test_warning_of_other_data(caplog):
    said = 'x was trained on fashion-mnist and is measured on mnist-5k'
    for trained_on, dataset, expected in (
        ('mnist', 'mnist', []),
        (None, 'mnist', []),
        ('fashion-mnist', 'mnist-5k', [said]),
    ):
        caplog.clear()
        vis.warn_of_other_data(Path('x'), trained_on, dataset)
        assert caplog.messages == expected


def test_warning_is_of_the_run_with_other_data(caplog, draw):
    trained = Checkpoints(TRAINED)
    facts = {'dataset': 'mnist-5k'}
    Checkpoints('own').save(1, trained.load_symbol(), *trained.load_params(8), {}, {}, (), facts)
    draw('--compare', str(TRAINED), '--model-prefix=own', '--dataset=mnist-5k')
    warned = [message.split(' was trained on')[0] for message in caplog.messages]
    assert warned == [f'{TRAINED}-0008.params']


@pytest.mark.parametrize('options', [[], ['--grid', 'center_loss', 'softmax']])
def test_missing_epoch_is_found_before_the_data(options, runs, monkeypatch):
    monkeypatch.setattr(data, 'load_digits', lambda *_: pytest.fail('the data were searched for'))
    with pytest.raises(InputError, match=r'there is no center_loss-0009\.params; epochs of '):
        vis.main(['--epoch=9', *options])


def fake_panel(num_classes, count=3000, spread=0.5, title='title'):
    """Clusters around a circle."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % num_classes
    angle = labels * 2 * np.pi / num_classes
    around = 10 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    embeddings = around + spread * rng.normal(size=around.shape)
    return vis.Panel(embeddings.astype('f'), labels, title, 'caption')


@pytest.mark.parametrize('num_classes', [10, 20, 47])
def test_many_classes(num_classes, tmp_path):
    """Every class has a color of its own, which the file keeps, and a name in a darker one."""
    names = [chr(ord('A') + label) for label in range(num_classes)]
    figure = vis.draw_embeddings([fake_panel(num_classes)], names)
    (ax,) = figure.axes
    colors = np.array([collection.get_facecolor()[0][:3] for collection in ax.collections])
    distances = np.linalg.norm(colors[:, None] - colors, axis=2)
    assert distances[~np.eye(num_classes, dtype=bool)].min() > 0.05
    assert [text.get_text() for text in ax.texts[:-1]] == names
    dark = np.array([matplotlib.colors.to_rgb(text.get_color()) for text in ax.texts[:-1]])
    np.testing.assert_allclose(dark, colors if num_classes == 10 else 0.7 * colors, atol=1e-6)
    pictures.save_picture(figure, tmp_path / 'picture.png')
    with Image.open(tmp_path / 'picture.png') as image:
        assert image.mode == 'P'
        saved = np.array([color for _, color in image.convert('RGB').getcolors()])
    for color in 255 * dark:
        assert np.abs(saved - color).max(axis=1).min() < (16 if num_classes <= 20 else 24)


def test_many_unseen_classes(runs, sample, draw, monkeypatch):
    """The caption counts them instead of naming all."""
    custom = sample._replace(
        class_names=tuple(f'class {label}' for label in range(47)),
        val_labels=np.arange(1000, dtype=np.uint8) % 47,
        dataset='custom',
        source='/data/emnist',
    )
    monkeypatch.setattr(data, 'load_digits', lambda dataset, data_dir: custom)
    (ax,) = draw().axes
    text = ax.texts[-1].get_text().replace('\n', ' ')
    assert text.startswith('emnist: test accuracy ')
    assert '× unseen in training: 37 classes; pairs of their images' in text


def test_newest_epoch(tmp_path):
    for epoch in (2, 10, 9):
        (tmp_path / f'run-{epoch:04d}.params').touch()
    (tmp_path / 'running-0099.params').touch()
    (tmp_path / 'run-0011.params.part').touch()
    assert vis.newest_epoch('run') == 10


def read_frames(path):
    """The frames of an animation as RGB arrays, and how long each is shown."""
    frames, durations = [], []
    with Image.open(path) as animation:
        for index in range(animation.n_frames):
            animation.seek(index)
            frames.append(np.asarray(animation.convert('RGB')))
            durations.append(animation.info['duration'])
    return frames, durations


def test_animation(runs, sample, monkeypatch, capsys):
    """A frame for every epoch, of the same images, in which nothing moves but the points."""
    seen = []
    plot = vis.plot_embeddings

    def look(ax, *args):
        plot(ax, *args)
        seen.append((ax, ax.get_title(), points(ax)))

    monkeypatch.setattr(vis, 'plot_embeddings', look)
    monkeypatch.setattr(vis, 'FRAME_IMAGES', 300)
    run_vis('--animate', 'film.gif')
    frames, durations = read_frames('film.gif')
    assert len(frames) == 2 and durations[0] < durations[1]
    assert not np.array_equal(*frames)
    border = np.abs(frames[0].astype(int) - frames[1]).max(axis=2)[60:460, 10:50]
    assert border.max() == 0  # the axis with its numbers
    order = np.sort(np.random.default_rng(0).permutation(1000)[:300])
    for epoch, (ax, title, drawn) in enumerate(seen[1:], 1):  # the first is drawn for the layout
        embeddings, probability = embed_by_hand('center_loss', epoch, sample.val_images)
        accuracy = np.mean(probability.argmax(axis=1) == sample.val_labels)
        assert title.endswith(f'(epoch {epoch}): {accuracy:.2%}')
        expected = embeddings[order][sample.val_labels[order] == 4]
        np.testing.assert_allclose(drawn['4'], expected, atol=1e-4)
        (x0, x1), (y0, y1) = ax.get_xlim(), ax.get_ylim()
        assert x1 - x0 == pytest.approx(y1 - y0)
        everywhere = np.concatenate(list(drawn.values()))
        assert len(everywhere) == 300
        assert (everywhere > [x0, y0]).all() and (everywhere < [x1, y1]).all()
    assert capsys.readouterr().out.splitlines()[-1] == 'wrote film.gif'


def test_animation_in_one_plane(monkeypatch, tmp_path):
    """All frames are seen in the principal components of the last epoch."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(300, 3)).astype('f')
    panels = [
        vis.Panel(scale * embeddings, np.arange(300) % 10, 'title', 'caption') for scale in (1, 3)
    ]
    seen = []
    plot = vis.plot_embeddings
    monkeypatch.setattr(
        vis, 'plot_embeddings', lambda ax, *args: (plot(ax, *args), seen.append(points(ax)['4']))
    )
    vis.animate(panels, NAMES, tmp_path / 'film.gif')
    plane = pictures.viewing_plane(panels[1].embeddings)
    _, first, second = (drawn + plane.axes @ plane.origin for drawn in seen)
    np.testing.assert_allclose(3 * first, second, atol=1e-4)


@pytest.mark.slow
def test_animation_colors(tmp_path):
    """Twenty frames are small, keep the colors of the classes, and gray stays gray."""
    panels = [fake_panel(10, 3000, spread) for spread in np.linspace(3, 0.5, 20)]
    with pictures.picture_style():
        vis.animate(panels, NAMES, tmp_path / 'film.gif')
    frames, _ = read_frames(tmp_path / 'film.gif')
    assert len(frames) == 20
    assert (tmp_path / 'film.gif').stat().st_size < 500_000
    for color in 255 * np.array(seaborn.color_palette('tab10', 10)):
        assert np.linalg.norm(frames[0] - color, axis=2).min() < 16  # the names have the full color
    assert (frames[0][0, 0] == 255).all()
    assert np.ptp(frames[0][200:203, 50:60].astype(int), axis=2).max() <= 3  # the left edge


def test_interrupted_animation(tmp_path, monkeypatch):
    film = tmp_path / 'film.gif'
    film.write_text('of an earlier run')

    def interrupt(image, *args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, 'quantize', interrupt)
    with pytest.raises(KeyboardInterrupt):
        vis.animate([fake_panel(10, 100)], NAMES, film)
    assert [path.name for path in tmp_path.iterdir()] == ['film.gif']
    assert film.read_text() == 'of an earlier run'


@pytest.mark.parametrize(
    'program, said',
    [
        (None, 'an .mp4 needs the program ffmpeg: install it, or write a .gif'),
        ('#!/bin/sh\nexit 3\n', 'ffmpeg ended with status 3'),
    ],
)
def test_mp4_without_ffmpeg(program, said, runs, tmp_path, monkeypatch):
    film = tmp_path / 'film.mp4'
    film.write_text('of an earlier run')
    if program:
        (tmp_path / 'ffmpeg').write_text(program)
        (tmp_path / 'ffmpeg').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(InputError, match=rf'film\.mp4 cannot be written: {re.escape(said)}$'):
        run_vis('--animate', film)
    assert film.read_text() == 'of an earlier run'
    assert {path.name for path in tmp_path.iterdir()} <= {'film.mp4', 'ffmpeg'}


def test_mp4(runs, tmp_path, monkeypatch):
    """What ffmpeg gets are the frames."""
    program = 'import sys\nopen(sys.argv[-1], "wb").write(sys.stdin.buffer.read())\n'
    (tmp_path / 'ffmpeg').write_text(f'#!{sys.executable}\n{program}')
    (tmp_path / 'ffmpeg').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    run_vis('--animate', tmp_path / 'film.mp4')
    frames = np.fromfile(tmp_path / 'film.mp4', np.uint8).reshape(2, 528, 480, 4)
    assert (frames[0] != frames[1]).any() and (frames == 255).all(axis=(1, 2, 3)).sum() == 0


@pytest.mark.parametrize(
    'added, curves',
    [
        ('', CURVES),
        # Another run, of which only this is there: nothing of the run before it is mixed in.
        (
            'x start with arguments\nx Epoch[0] Train-accuracy=0.95\n',
            {('Train', 'accuracy'): {1: 0.95}},
        ),
        # A resumed run continues where it was; one that repeats an epoch, from there.
        (
            'x Epoch[3] Train-accuracy=0.8\n',
            {**CURVES, ('Train', 'accuracy'): {1: 0.5, 2: 0.6, 3: 0.7, 4: 0.8}},
        ),
        (
            'x Epoch[2] Train-accuracy=0.75\nx Epoch[3] Train-accuracy=0.8\n',
            {**CURVES, ('Train', 'accuracy'): {1: 0.5, 2: 0.6, 3: 0.75, 4: 0.8}},
        ),
        (
            'x Epoch[1] Train-accuracy=0.65\n',
            {
                **CURVES,
                ('Train', 'accuracy'): {1: 0.5, 2: 0.65},
                ('Validation', 'accuracy'): {1: 0.4},
            },
        ),
        # Another worker of the same run, a line that is cut off, and what is no number.
        (
            'x Node[1] Epoch[0] Train-accuracy=0.1\nx Node[12] Epoch[2] Train-accuracy=0.2\n',
            CURVES,
        ),
        (
            'x Node[0] Epoch[3] Train-accuracy=\nx Epoch[3] Train-accuracy=0.\n'
            'x Epoch[3] Train-accuracy=-\nx Epoch[3] Train-accuracy=0.1.2',
            CURVES,
        ),
        (
            'x Epoch[0] Train-cross_entropy=0.5\n',  # another spelling
            {('Train', 'cross-entropy'): {1: 0.5}},
        ),
    ],
)
def test_read_log(added, curves, tmp_path):
    (tmp_path / 'log.txt').write_text(LOG + added)
    assert read_log('log.txt') == curves


def test_read_log_of_one_epoch(tmp_path):
    """Another run of a single epoch replaces the one before it."""
    epoch = 'x Epoch[0] Train-accuracy=0.{0}\nx Epoch[0] Validation-accuracy=0.{0}\n'
    (tmp_path / 'log.txt').write_text(epoch.format(5) + epoch.format(7).splitlines()[0] + '\n')
    assert read_log('log.txt') == {('Train', 'accuracy'): {1: 0.7}}


def test_validation_images(tmp_path):
    start = 'x start with arguments Namespace(dataset=None, validate_on={!r}, seed=0)\n'
    epoch = 'x Epoch[0] Validation-accuracy=0.5\n'
    for text, expected in (
        (LOG, 'test'),
        (start.format('held-out') + epoch, 'held-out'),
        (start.format('held-out') + epoch + start.format('test') + epoch, 'test'),
        (start.format('held-out') + epoch + start.format('test'), 'held-out'),  # stopped at once
    ):
        (tmp_path / 'log.txt').write_text(text)
        assert validation_images('log.txt') == expected


def test_curves(runs, draw, capsys):
    figure = draw('--curves', 'old.txt', 'log.txt')
    assert [ax.get_title() for ax in figure.axes] == ['accuracy', 'cross-entropy', 'center loss']
    assert {ax.get_xlabel() for ax in figure.axes} == {'epoch'}
    labels = [
        f'{path}, {split} images'
        for path in ('old.txt', 'log.txt')
        for split in ('training', 'test')
    ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    logs = [
        {key: curve for key, curve in CURVES.items() if key[1] != 'cross-entropy'},
        CURVES,
    ]
    for ax, metric in zip(figure.axes, METRICS, strict=True):
        lines = ax.get_lines()
        assert [line.get_label() for line in lines] == labels
        for line, (log, split) in zip(
            lines, itertools.product(logs, ('Train', 'Validation')), strict=True
        ):
            curve = log.get((split, metric), {})
            assert dict(zip(*line.get_data(), strict=True)) == curve
        colors = [line.get_color() for line in lines]
        assert colors[0] == colors[1] != colors[2] == colors[3]
    out = capsys.readouterr().out
    assert 'log.txt: epoch 3, last: ' in out and 'test accuracy 0.5500' in out
    assert 'training cross-entropy 2.2500' in out and 'test center loss 5.0000' in out


def test_names_are_shown_as_they_are(tmp_path, draw):
    """No formula is made of them, and they need not be UTF-8."""
    names = ['$\\q$.txt', os.fsdecode(b'\xff.txt')]
    for name in names:
        (tmp_path / name).write_text('x Epoch[0] Validation-accuracy=0.5\n')
    figure = draw('--curves', *names)
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[1] == '$\\q$.txt, test images' and labels[3] == '\\xff.txt, test images'


def test_curves_of_old_log(runs, draw):
    assert [ax.get_title() for ax in draw('--curves', 'old.txt').axes] == [
        'accuracy',
        'center loss',
    ]


def test_curves_of_odd_numbers(tmp_path, draw):
    lines = ('Train-accuracy=nan', 'Train-cross-entropy=inf', 'Validation-center_loss=0.000000')
    (tmp_path / 'log.txt').write_text(''.join(f'x Epoch[0] {line}\n' for line in lines))
    figure = draw('--curves', 'log.txt')
    figure.canvas.draw()
    assert len(figure.axes) == 3


@pytest.mark.filterwarnings('error')
def test_accuracy_of_one(tmp_path):
    (tmp_path / 'log.txt').write_text('x Epoch[0] Validation-accuracy=1.000000\n')
    figure, _ = draw_curves([tmp_path / 'log.txt'])
    bottom, top = figure.axes[0].get_ylim()
    assert bottom < 1 < top


def one_epoch_log():
    """The lines of a log after one epoch."""
    curves = itertools.product(('Train', 'Validation'), METRICS)
    return ''.join(f'x Epoch[0] {split}-{metric}=0.5\n' for split, metric in curves)


def test_curves_of_one_epoch(tmp_path):
    (tmp_path / 'log.txt').write_text(one_epoch_log())
    figure, _ = draw_curves(['log.txt'])
    for ax in figure.axes:
        assert [line.get_marker() for line in ax.get_lines()] == ['o', 'o']
        assert [tick for tick in ax.get_xticks() if 0.9 < tick < 1.1] == [1]


@pytest.mark.parametrize('losses', [(1.9, 1.6), (0.7, 0.05), (40, 31)])
def test_losses_have_labeled_ticks(losses, tmp_path):
    lines = [f'x Epoch[{i}] Train-cross-entropy={loss}\n' for i, loss in enumerate(losses)]
    (tmp_path / 'log.txt').write_text(''.join(lines))
    figure, _ = draw_curves(['log.txt'])
    figure.canvas.draw()
    axis, (low, high) = figure.axes[1].yaxis, figure.axes[1].get_ylim()
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    shown = [tick for tick in ticks if low <= tick.get_loc() <= high and tick.label1.get_text()]
    assert len(shown) >= 2


@pytest.mark.parametrize(
    'paths',
    [['_a.txt', 'b.txt'], ['c' * 96, 'd' * 96], [f'{"long-" * 10}/{i}.txt' for i in range(3)]],
)
def test_legend_is_whole(paths, tmp_path):
    for path in paths:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(one_epoch_log())
    figure, _ = draw_curves(paths)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 2 * len(paths)
    assert legend.get_window_extent().width < figure.bbox.width


@pytest.mark.parametrize('length', [5, 200])
@pytest.mark.parametrize('panels', [1, 3])
def test_name_of_a_star_leaves_the_panel_its_size(length, panels):
    star = ('n' * length, np.array([9.0, 0.0]))
    sizes = []
    for marked in ([], [star]):
        panel = fake_panel(10)._replace(marked=marked)
        figure = vis.draw_embeddings([panel] * panels, NAMES)
        figure.canvas.draw()
        sizes.append(figure.axes[0].get_window_extent().width)
        texts = [text for ax in figure.axes for text in ax.texts if 'n' in text.get_text()]
        for text in texts:
            assert text.get_window_extent().x1 < figure.bbox.width
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_both_splits_are_in_one_row():
    figure = vis.draw_embeddings([fake_panel(10)] * 6, NAMES, in_pairs=True)
    rows = [ax.get_subplotspec().rowspan.start for ax in figure.axes]
    assert rows[::2] == rows[1::2]


def test_both_splits_are_in_one_plane(runs, sample, draw):
    left, right = draw('--model-prefix', 'wide', '--split=both').axes
    assert left.get_xlabel() == right.get_xlabel()
    assert right.get_xlabel().endswith('of the training variance)')
    training, _ = embed_by_hand('wide', 1, sample.train_images)
    test, _ = embed_by_hand('wide', 1, sample.val_images)
    plane = pictures.viewing_plane(training)
    for label, drawn in points(right).items():
        members = test[sample.val_labels == int(label)]
        np.testing.assert_allclose(drawn, (members - plane.origin) @ plane.axes.T, atol=1e-4)


def test_each_run_has_its_plane(sample, draw):
    for epoch, run in enumerate(('one', 'two'), 1):
        save_untrained(run, small_network(embedding_dim=3), epoch)  # with other weights
    panels = draw('--compare', 'one', '--model-prefix', 'two', '--split=both').axes
    for epoch, run, axes in ((1, 'one', panels[:2]), (2, 'two', panels[2:])):
        plane = pictures.viewing_plane(embed_by_hand(run, epoch, sample.train_images)[0])
        for ax, (images, labels) in zip(axes, (sample[:2], sample[2:4]), strict=True):
            expected = (embed_by_hand(run, epoch, images)[0] - plane.origin) @ plane.axes.T
            np.testing.assert_allclose(points(ax)['3'], expected[labels == 3], atol=1e-4)


def test_epoch_is_not_of_the_run_beside(runs, draw):
    left, right = draw('--compare', 'center_loss', '--model-prefix=softmax', '--epoch=1').axes
    assert '(epoch 2)' in left.get_title() and '(epoch 1)' in right.get_title()


def test_one_unseen_class(draw, capsys):
    save_untrained('nine', small_network(num_classes=9))
    (ax,) = draw('--model-prefix=nine').axes
    assert ax.texts[-1].get_text().splitlines()[-1] == '× unseen in training: 9'
    assert '9; to verify pairs takes two classes or more' in capsys.readouterr().out


@pytest.mark.filterwarnings('error')
def test_name_that_the_font_lacks(tmp_path):
    figure, ((ax,),) = pictures.new_figure(1, 1, 3, 3)
    ax.set_title('数字')
    pictures.save_picture(figure, tmp_path / 'picture.png')
    assert (tmp_path / 'picture.png').exists()


def test_accuracy_limits(tmp_path):
    """The first epochs do not press the others against the upper edge."""
    lines = [
        f'x Epoch[{epoch}] Validation-accuracy={accuracy}\n'
        for epoch, accuracy in enumerate([0.1, 0.8, 0.97, 0.98])
    ]
    (tmp_path / 'log.txt').write_text(''.join(lines))
    figure, _ = draw_curves(['log.txt'])
    bottom, top = figure.axes[0].get_ylim()
    assert bottom == pytest.approx(0.9) and 1 < top < 1.01


@pytest.mark.slow
def test_command(runs, sample):
    result = run_python(ROOT / 'vis.py', '--dataset', 'mnist-5k', '--compare', 'softmax', cwd=runs)
    assert (result.returncode, result.stderr) == (0, '')
    softmax, joint, wrote = result.stdout.splitlines()
    assert re.fullmatch(
        r'softmax-0001\.params: 1,000 test images of mnist-5k, test accuracy [\d.]+%, '
        r'intra [\d.]+, inter [\d.]+, ratio [\d.]+',
        softmax,
    )
    accuracy = accuracy_by_hand('center_loss', 2, sample.val_images, sample.val_labels)
    assert joint.startswith(
        'center_loss-0002.params: 1,000 test images of mnist-5k, '
        f'test accuracy {accuracy:.2%}, intra '
    )
    assert wrote == 'wrote center_loss.png'
    with Image.open('center_loss.png') as image:
        assert image.size == (1650, 891)


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['garbage', 'module://nowhere'])
def test_mplbackend_is_ignored(backend, runs, tmp_path):
    output = tmp_path / 'curves.png'
    options = ['--curves', 'log.txt', '--output', output]
    result = run_python(
        ROOT / 'vis.py',
        *options,
        cwd=runs,
        unset=['DISPLAY', 'WAYLAND_DISPLAY'],
        MPLBACKEND=backend,
    )
    assert (result.returncode, result.stderr) == (0, '')
    with Image.open(output) as image:
        assert image.size == (1815, 550)


@pytest.mark.slow
@pytest.mark.parametrize(
    'redirect, name',
    [
        ('| true', 'picture.png'),
        ('>&-', 'picture.png'),
        ('>/dev/full', 'picture.png'),
        ('>&- 2>&-', 'film.gif'),
    ],
)
def test_closed_output(redirect, name, runs, tmp_path):
    """What was asked for is drawn, whoever reads what is printed."""
    option = '--animate' if name.endswith('gif') else '--output'
    command = f'"{sys.executable}" "{ROOT}/vis.py" --dataset=mnist-5k {option}="{tmp_path}/{name}"'
    subprocess.run(f'{command} {redirect}', shell=True, cwd=runs, timeout=120, stderr=-3)
    with Image.open(tmp_path / name) as image:
        image.load()


def test_main_in_a_program(runs, monkeypatch, tmp_path):
    """Nothing of the host is read or changed."""
    monkeypatch.setattr(sys, 'argv', ['notebook', '-f', 'kernel.json'])
    monkeypatch.setenv('MPLBACKEND', 'module://nowhere')
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    style, figures = dict(matplotlib.rcParams), plt.get_fignums()
    vis.main(['--dataset', 'mnist-5k', '--output', str(tmp_path / 'picture.png')])
    assert (tmp_path / 'picture.png').exists()
    assert dict(matplotlib.rcParams) == style and plt.get_fignums() == figures
    assert logging.getLogger().handlers == handlers and logging.getLogger().level == level
    assert os.environ['MPLBACKEND'] == 'module://nowhere'
    with pytest.raises(InputError, match='unrecognized arguments: -f'):
        vis.main(['-f', 'kernel.json'])


def test_main_without_arguments(tmp_path):
    with pytest.raises(InputError, match='there is no checkpoint of center_loss'):
        vis.main()


@pytest.mark.slow
def test_help_is_quick(capsys):
    """It imports nothing that draws."""
    code = 'import sys, vis\nprint(sorted({"matplotlib", "seaborn", "pandas"} & set(sys.modules)))'
    assert run_python('-c', code, cwd=ROOT).stdout == '[]\n'


def test_messages(runs, draw, monkeypatch, tmp_path, capsys):
    """Messages are plain lines; the warnings about the data are not repeated."""
    for path in data.FOLDER.iterdir():
        if path.name != 'mnist':
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setattr(data, 'FOLDER', tmp_path)
    dataset = data.DATASETS['mnist']._replace(mirrors=())
    monkeypatch.setitem(data.DATASETS, 'mnist', dataset)
    symbol, arg_params, aux_params = mx.model.load_checkpoint('center_loss', 1)
    mx.model.save_checkpoint(str(tmp_path / 'unchecked'), 1, symbol, arg_params, aux_params)
    monkeypatch.setattr(logging.getLogger(), 'handlers', [])
    capsys.readouterr()
    draw('--dataset=auto', f'--model-prefix={tmp_path}/unchecked')
    out, err = capsys.readouterr()
    assert re.fullmatch(r'\S+unchecked-0001\.params has no checksum[^\n]*\n', err)
    assert '1,000 test images of mnist-5k' in out


WRONG_OPTIONS = [
    ('--model-prefix=nothing', 'there is no checkpoint of nothing: run python train.py first'),
    ('--compare=nothing', 'run python train.py first, or name the run with --compare'),
    ('--compare=', 'there is no checkpoint of : run python train.py first'),
    ('--grid softmax nothing', 'there is no checkpoint of nothing: .* name the run with --grid'),
    ('--animate=film.gif --model-prefix=nothing', 'there is no checkpoint of nothing'),
    ('--epoch=9', r'there is no center_loss-0009\.params; .* have a checkpoint: 1, 2$'),
    ('--epoch=0', '--epoch: 0 is out of range'),
    ('--epoch=last', "--epoch: 'last' is not a whole number"),
    (f'--epoch=1{"0" * 300}', '--epoch: 1000'),
    (f'--model-prefix={"x" * 300}', 'there is no checkpoint of xxx'),
    ('--dataset=cifar', "--dataset: invalid choice: 'cifar'"),
    ('--data-dir=nowhere', 'nowhere.* train-images-idx3-ubyte|nowhere/train-images-idx3-ubyte: No'),
    ('--split=validation', "--split: invalid choice: 'validation'"),
    ('--model-prefix=narrow', 'narrow embeds in 1 dimension, a picture needs 2 or more'),
    ('--model-prefix=other', r'other-symbol\.json and other-0001\.params are not a network'),
    ('--output=picture.xyz', r'--output=picture\.xyz cannot be written: .* has to end in one of'),
    ('--output=picture', 'the file name has to end in one of .*, .png, '),
    ('--output=no/picture.png', '--output=no/picture.png cannot be written: there is no folder no'),
    ('--output=log.txt/picture.png', 'cannot be written: there is no folder log.txt'),
    ('--output=folder.png', '--output=folder.png cannot be written: it is a folder'),
    ('--animate=film.png', r'--animate=film\.png .* has to end in one of \.gif, \.mp4'),
    ('--animate=no/film.gif', '--animate=no/film.gif cannot be written: there is no folder'),
    ('--curves nolog.txt', r'the log nolog\.txt cannot be read: No such file'),
    ('--curves .', 'the log . cannot be read: Is a directory'),
    ('--curves log.txt softmax-symbol.json', r'softmax-symbol\.json has no line such as Epoch'),
    ('--curves', '--curves: expected at least one argument'),
    ('--grid', '--grid: expected at least one argument'),
    ('--compare=softmax --grid softmax', '--grid: not allowed with argument --compare'),
    ('--animate=film.gif --curves log.txt', '--curves: not allowed with argument --animate'),
    ('--curves log.txt --epoch=1', '--epoch has no effect with --curves: leave it out'),
    ('--curves log.txt --data-dir=.', '--data-dir has no effect with --curves: leave it out'),
    ('--animate=film.gif --output=film.png', '--output has no effect with --animate'),
    ('--animate=film.gif --split=both', '--split=both draws two panels, and an animation has one'),
    ('--grid softmax --model-prefix=wide', '--model-prefix has no effect with --grid'),
    ('--grid softmax --epoch=7', r'there is no softmax-0007\.params'),
    ('softmax', 'unrecognized arguments: softmax'),
]


@pytest.mark.parametrize('options, said', WRONG_OPTIONS)
def test_wrong_options(options, said, runs):
    (runs / 'folder.png').mkdir(exist_ok=True)
    for name in ('center_loss.png', 'curves.png', 'film.gif', 'grid.png'):
        (runs / name).write_text('of an earlier run')
    before = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    with pytest.raises(InputError, match=said) as error:
        run_vis(*options.split())
    assert '\n' not in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in runs.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason='root writes anywhere')
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match=r'--output=center_loss\.png .*no permission'):
        vis.main()


@pytest.mark.slow
def test_before_any_training(tmp_path):
    result = run_python(ROOT / 'vis.py', cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr == (
        'vis.py: error: there is no checkpoint of center_loss: run python train.py first, '
        'or name the run with --model-prefix\n'
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'error, said',
    [
        (OSError(28, 'No space left on device'), 'No space left on device'),
        (RuntimeError('no TeX here'), 'no TeX here'),
    ],
)
def test_failed_write(error, said, tmp_path, monkeypatch):
    """The picture of an earlier run stays, and nothing else."""
    picture = tmp_path / 'picture.png'
    picture.write_text('of an earlier run')

    def fail(figure, path, **options):
        Path(path).write_text('half')
        raise error

    monkeypatch.setattr(Figure, 'savefig', fail)
    figure, _ = pictures.new_figure(1, 1, 2, 2)
    with pytest.raises(Failure, match=rf'picture\.png cannot be written: {said}'):
        pictures.save_picture(figure, picture)
    assert [path.name for path in tmp_path.iterdir()] == ['picture.png']
    assert picture.read_text() == 'of an earlier run'


@pytest.mark.slow
def test_accuracy_is_the_logged_one(sample):
    options = '--dataset=mnist-5k --num-epochs=1 --num-examples=1000 --batch-size=50'
    train.main(options.split())
    _, logits = vis.embed('center_loss', 1, sample.val_images)
    accuracy = np.mean(logits.argmax(axis=1) == sample.val_labels)
    assert logged('Validation-accuracy') == pytest.approx([accuracy], abs=1e-6)
