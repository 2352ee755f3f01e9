"""The pictures: panels, titles, points, captions and curves, held against the numbers they stand for."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import seaborn
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

import data
import train
import vis
from runtime import InputError, mx, run_script
from train_model import INITIALIZERS

ROOT = Path(__file__).resolve().parent.parent
NAMES = list('0123456789')


@pytest.fixture(scope='module')
def sample():
    return data.load_digits('mnist-5k')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with two runs on the embedded digits, center_loss (2 epochs) and softmax (1 epoch), each with its log, and an untrained
    checkpoint each of three dimensions, of one, and of another network."""
    folder = tmp_path_factory.mktemp('trained')
    for line in (
        '--num-epochs 2 --center-loss-weight 0.1',
        '--num-epochs 1 --center-loss-weight 0 --save-model-prefix softmax --log-file softmax.txt',
    ):
        subprocess.run(
            [
                sys.executable,
                ROOT / 'train.py',
                '--dataset',
                'mnist-5k',
                '--num-examples',
                '1500',
                *line.split(),
            ],
            cwd=folder,
            check=True,
            stderr=subprocess.DEVNULL,
            timeout=120,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )
    untrained(folder / 'wide', train.get_symbol(embedding_dim=3))
    untrained(folder / 'narrow', train.get_symbol(embedding_dim=1))
    untrained(folder / 'six', train.get_symbol(num_classes=6, embedding_dim=3))
    layers = train.get_symbol().get_internals()
    other = mx.sym.SoftmaxOutput(
        mx.sym.FullyConnected(layers['tanh3_output'], num_hidden=10, name='fc2'), name='softmax'
    )
    untrained(folder / 'other', other)
    plain = mx.sym.SoftmaxOutput(layers['fc2_output'], name='softmax')
    untrained(folder / 'plain', plain)
    return folder


def untrained(prefix, network):
    """Write a checkpoint of epoch 1 of a network with fixed random weights."""
    mx.random.seed(1)
    np.random.seed(1)
    labels = [name for name in network.list_arguments() if name.endswith('label')]
    module = mx.mod.Module(network, label_names=labels)
    module.bind([('data', (2, 1, 28, 28))], [(name, (2,)) for name in labels])
    module.init_params(INITIALIZERS['xavier'])
    mx.model.save_checkpoint(str(prefix), 1, network, *module.get_params())


@pytest.fixture(autouse=True)
def in_the_folder_of_the_runs(request, monkeypatch):
    if 'trained' in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue('trained'))
    yield
    plt.close('all')


def run(*options, cwd, **environment):
    return subprocess.run(
        [sys.executable, ROOT / 'vis.py', *map(str, options)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **{name: value for name, value in os.environ.items() if not name.endswith('DISPLAY')},
            **environment,
        },
    )


@pytest.fixture
def command(monkeypatch):
    """``python vis.py OPTIONS`` on the embedded digits, in this process."""

    def run_here(*options):
        dataset = [] if '--curves' in options else ['--dataset', 'mnist-5k']
        monkeypatch.setattr(sys, 'argv', ['vis.py', *dataset, *map(str, options)])
        run_script(vis.main)

    return run_here


@pytest.fixture
def picture(command, monkeypatch):
    """The figure that ``python vis.py OPTIONS`` would write."""

    def draw(*options):
        figures = []
        monkeypatch.setattr(vis, 'save', lambda figure, path: figures.append(figure))
        command(*options)
        return figures[0]

    return draw


def by_hand(prefix, epoch, images):
    """Embeddings and probabilities of a checkpoint in one piece, with MXNet's own loader."""
    network, arg_params, aux_params = mx.model.load_checkpoint(prefix, epoch)
    layers = network.get_internals()
    executor = mx.sym.Group([layers['embedding_output'], layers['softmax_output']]).simple_bind(
        mx.cpu(), grad_req='null', data=(len(images), 1, 28, 28), softmax_label=(len(images),)
    )
    executor.copy_params_from(arg_params, allow_extra_params=True)
    return [
        output.asnumpy() for output in executor.forward(data=mx.nd.array(images[:, None] / 256))
    ]


def accuracy_by_hand(prefix, epoch, images, labels):
    return np.mean(by_hand(prefix, epoch, images)[1].argmax(axis=1) == labels)


def statistics_by_hand(embeddings, labels):
    embeddings = embeddings.astype(np.float64)
    means = [embeddings[labels == label].mean(axis=0) for label in range(10)]
    intra = np.mean([np.sqrt(((x - means[y]) ** 2).sum()) for x, y in zip(embeddings, labels)])
    inter = np.mean(
        [
            np.sqrt(((means[a] - means[b]) ** 2).sum())
            for a in range(10)
            for b in range(10)
            if a != b
        ]
    )
    return intra, inter, intra / inter


def points(ax):
    """Points of each class by its name."""
    return {
        collection.get_label(): np.asarray(collection.get_offsets())
        for collection in ax.collections
    }


def caption(ax):
    """What stands below a panel, and the numbers in it."""
    text = ax.texts[-1].get_text()
    return re.sub(r' +', ' ', re.sub(r'[\d.]+', 'N', text)), [
        float(value) for value in re.findall(r'[\d.]+', text)
    ]


def test_the_panel_shows_every_validation_image_of_the_newest_epoch(trained, sample, picture):
    (ax,) = picture().axes
    embeddings, _ = by_hand('center_loss', 2, sample.val_images)
    accuracy = accuracy_by_hand('center_loss', 2, sample.val_images, sample.val_labels)
    assert ax.get_title() == f'softmax + center loss, λ = 0.1 (epoch 2): {accuracy:.2%}'
    drawn = points(ax)
    assert list(drawn) == NAMES
    for label, offsets in drawn.items():
        np.testing.assert_allclose(offsets, embeddings[sample.val_labels == int(label)], atol=1e-4)
    assert (ax.get_xlabel(), ax.get_ylabel()) == (
        'activation of the 1st neuron',
        'activation of the 2nd neuron',
    )
    assert len({tuple(collection.get_facecolor()[0][:3]) for collection in ax.collections}) == 10


def test_a_step_is_as_long_on_both_axes(trained, picture):
    figure = picture()
    figure.canvas.draw()
    (ax,) = figure.axes
    (left, bottom), (right, top) = ax.transData.transform([(0, 0), (1, 1)])
    assert right - left == pytest.approx(top - bottom)


def test_every_class_is_named_at_the_median_of_its_cluster_in_its_colour_on_white(trained, picture):
    (ax,) = picture().axes
    assert [text.get_text() for text in ax.texts[:-1]] == NAMES
    for text, collection in zip(ax.texts, ax.collections):
        np.testing.assert_allclose(
            text.get_position(), np.median(points(ax)[text.get_text()], axis=0), rtol=1e-5
        )
        assert text.get_color() == tuple(collection.get_facecolor()[0][:3])
        (effect,) = text.get_path_effects()
        assert effect._gc['foreground'] == 'white'


def test_the_caption_says_how_compact_the_clusters_are(trained, sample, picture):
    (ax,) = picture().axes
    expected = statistics_by_hand(
        by_hand('center_loss', 2, sample.val_images)[0], sample.val_labels
    )
    words, numbers = caption(ax)
    assert words == 'accuracy N% intra N inter N ratio N'
    assert numbers == pytest.approx(
        [100 * accuracy_by_hand('center_loss', 2, sample.val_images, sample.val_labels), *expected],
        abs=0.0006,
    )


@pytest.mark.parametrize('compared', ['softmax', 'six'])
def test_nothing_covers_the_caption(compared, trained, picture):
    figure = picture('--compare', compared)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    for ax in figure.axes:
        below, label, title = (
            ax.texts[-1].get_window_extent(),
            ax.xaxis.label.get_window_extent(),
            ax.title.get_window_extent(),
        )
        assert (
            below.y1 < label.y0
            and label.y1 < ax.get_window_extent().y0 < ax.get_window_extent().y1 < title.y0
        )
        assert below.y0 >= 0 and title.y1 <= height
        assert 0 <= min(below.x0, title.x0) and max(below.x1, title.x1) <= width
    assert (
        figure.axes[0].texts[-1].get_window_extent().x1
        < figure.axes[1].texts[-1].get_window_extent().x0
    )


def test_statistics_of_clusters_that_are_known():
    corners = np.array([[0, 0], [0, 2], [10, 0], [10, 2]], 'f')
    assert vis.cluster_statistics(corners, np.array([3, 3, 7, 7])) == pytest.approx((1, 10, 0.1))
    three = np.array([[0, 0], [3, 0], [0, 4]], 'f')  # distances 3, 4, 5
    assert vis.cluster_statistics(three, np.array([0, 1, 2])) == pytest.approx((0, 4, 0))
    # Every image counts the same, not every class.
    uneven = np.array([[-1, 0], [1, 0], [-1, 0], [1, 0], [100, -7], [100, 7]], 'f')
    assert vis.cluster_statistics(uneven, np.array([0, 0, 0, 0, 1, 1])) == pytest.approx(
        (3, 100, 0.03)
    )


@pytest.mark.filterwarnings('error')
def test_statistics_of_one_class_or_one_point_are_not_numbers():
    one = vis.cluster_statistics(np.array([[0, 0], [0, 2]], 'f'), np.array([3, 3]))
    assert one.intra == 1 and np.isnan(one[1:]).all()
    point = vis.cluster_statistics(np.zeros((4, 2), 'f'), np.array([0, 0, 1, 1]))
    assert point[:2] == (0, 0) and np.isnan(point.ratio)


def verification_by_hand(embeddings, labels, distance):
    """Every pair of one class against every pair of two, one by one."""
    same, different = [], []
    for i in range(len(labels)):
        for j in range(i):
            (same if labels[i] == labels[j] else different).append(
                float(distance(embeddings[i].astype(float), embeddings[j].astype(float)))
            )
    wins = sum((one < two) + (one == two) / 2 for one in same for two in different)
    # Of all thresholds that accept at most 1% of the pairs of two classes, the one that accepts the most of one class.
    accepts = [
        sum(one <= threshold for one in same)
        for threshold in [-1, *same]
        if sum(two <= threshold for two in different) <= 0.01 * len(different)
    ]
    return wins / len(same) / len(different), max(accepts) / len(same)


@pytest.mark.parametrize('dimensions, step', [(2, 0.5), (3, 0), (20, 0)])
def test_verification_is_what_counting_the_pairs_gives(dimensions, step):
    """On a coarse grid (step) many pairs are equally far."""
    rng = np.random.default_rng(dimensions)
    labels = rng.integers(6, 10, 40)
    embeddings = (
        rng.normal(size=(40, dimensions))
        + 3 / dimensions**0.5 * rng.normal(size=(10, dimensions))[labels]
    )
    embeddings = (np.round(embeddings / step) * step if step else embeddings).astype('f')
    measured = vis.verification(embeddings, labels)
    assert measured == pytest.approx(
        verification_by_hand(embeddings, labels, lambda x, y: np.linalg.norm(x - y))
    )
    assert 0.5 < measured.auc < 1 and 0 < measured.true_accepts < 1
    if not step:
        seen = (
            np.concatenate([embeddings, embeddings[:9]]),
            np.concatenate([labels, np.arange(9) % 6]),
        )
        unseen = vis.verify_unseen(*seen, num_seen=6)
        assert unseen['Euclidean'] == pytest.approx(measured)
        assert unseen['cosine'] == pytest.approx(
            verification_by_hand(
                embeddings, labels, lambda x, y: -x @ y / np.linalg.norm(x) / np.linalg.norm(y)
            )
        )


@pytest.mark.filterwarnings('error')
def test_verification_at_its_ends():
    labels = np.array([6, 6, 7, 7])
    assert vis.verification(np.array([[0, 0], [0, 1], [9, 0], [9, 1]], 'f'), labels) == (1, 1)
    assert vis.verification(np.array([[0, 0], [9, 0], [0, 0], [9, 0]], 'f'), labels) == (0.25, 0)
    assert vis.verification(np.zeros((4, 2), 'f'), labels) == (0.5, 0)
    assert np.isnan(vis.verification(np.eye(4, 2, dtype='f'), np.full(4, 9))).all()
    assert np.isnan(vis.verification(np.zeros((0, 2), 'f'), np.zeros(0))).all()
    zeros = vis.verify_unseen(np.zeros((4, 2), 'f'), labels, num_seen=6)
    assert zeros['cosine'] == (0.5, 0)


@pytest.mark.parametrize('dimensions', [2, 5])
def test_statistics_are_those_of_all_dimensions(dimensions):
    rng = np.random.default_rng(dimensions)
    labels = rng.integers(0, 10, 500)
    embeddings = (
        rng.normal(size=(500, dimensions)) + rng.normal(size=(10, dimensions))[labels] * 5
    ).astype('f')
    assert vis.cluster_statistics(embeddings, labels) == pytest.approx(
        statistics_by_hand(embeddings, labels), rel=1e-6
    )


def test_the_epoch_and_the_split_can_be_chosen(trained, sample, picture):
    (ax,) = picture('--epoch', 1, '--split', 'train').axes
    accuracy = accuracy_by_hand('center_loss', 1, sample.train_images, sample.train_labels)
    assert ax.get_title().endswith(f'(epoch 1): {accuracy:.2%}')
    assert {label: len(offsets) for label, offsets in points(ax).items()} == dict.fromkeys(
        NAMES, 400
    )
    np.testing.assert_allclose(
        points(ax)['3'],
        by_hand('center_loss', 1, sample.train_images)[0][sample.train_labels == 3],
        atol=1e-4,
    )


def test_the_compared_run_is_on_the_left_in_the_same_colours(trained, sample, picture):
    left, right = picture('--compare', 'softmax').axes
    accuracy = accuracy_by_hand('softmax', 1, sample.val_images, sample.val_labels)
    assert left.get_title() == f'softmax only (epoch 1): {accuracy:.2%}'
    assert right.get_title().startswith('softmax + center loss, λ = 0.1 (epoch 2): ')
    assert left.get_position().x0 < right.get_position().x0
    np.testing.assert_allclose(
        points(left)['5'],
        by_hand('softmax', 1, sample.val_images)[0][sample.val_labels == 5],
        atol=1e-4,
    )
    for one, other in zip(left.collections, right.collections):
        np.testing.assert_array_equal(one.get_facecolor(), other.get_facecolor())


def test_two_runs_of_one_objective_are_told_apart_by_their_prefix(trained, picture):
    for name in ('symbol.json', '0001.params'):
        Path(f'again-{name}').write_bytes(Path(f'center_loss-{name}').read_bytes())
    left, right = picture('--compare', 'again').axes
    assert left.get_title().startswith('again, λ = 0.1 (epoch 1): ')
    assert right.get_title().startswith('center_loss, λ = 0.1 (epoch 2): ')


def test_the_grid_has_a_panel_for_every_run(trained, sample, picture):
    prefixes = ['softmax', 'center_loss', 'plain', str(trained / 'softmax'), 'wide']
    figure = picture('--grid', *prefixes)
    assert len(figure.axes) == 5
    accuracy = accuracy_by_hand('center_loss', 2, sample.val_images, sample.val_labels)
    titles = [ax.get_title().replace('\n', '') for ax in figure.axes]
    assert titles[0].startswith('softmax, λ = 0 (epoch 1): ')
    assert titles[1] == f'center_loss, λ = 0.1 (epoch 2): {accuracy:.2%}'
    assert titles[2].startswith('plain (epoch 1): ')
    assert titles[3].replace(' ', '').startswith(f'{trained}/softmax,λ=0(epoch1):'.replace(' ', ''))
    np.testing.assert_allclose(
        points(figure.axes[1])['7'],
        by_hand('center_loss', 2, sample.val_images)[0][sample.val_labels == 7],
        atol=1e-4,
    )
    figure.canvas.draw()
    assert sorted({round(ax.get_position().y0, 3) for ax in figure.axes[:3]}) == [
        round(figure.axes[0].get_position().y0, 3)
    ]
    assert figure.axes[3].get_position().y1 < figure.axes[0].get_position().y0
    assert all(ax.title.get_window_extent().width <= figure.bbox.width / 3 for ax in figure.axes)


def test_the_epoch_of_a_grid_is_that_of_all_its_runs(trained, picture):
    assert [
        '(epoch 1)' in ax.get_title()
        for ax in picture('--grid', 'softmax', 'center_loss', '--epoch', 1).axes
    ] == [True, True]


def test_more_than_two_dimensions_are_seen_in_their_principal_components(trained, sample, picture):
    (ax,) = picture('--model-prefix', 'wide').axes
    embeddings = by_hand('wide', 1, sample.val_images)[0].astype(np.float64)
    centred = embeddings - embeddings.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    shares = values[::-1] / values.sum()
    for label, drawn in points(ax).items():
        expected = centred[sample.val_labels == int(label)] @ vectors[:, [2, 1]]
        for axis in range(2):
            np.testing.assert_allclose(abs(drawn[:, axis]), abs(expected[:, axis]), atol=1e-4)
    assert (
        ax.get_xlabel()
        == f'principal component 1 of 3 dimensions ({shares[0]:.0%} of the variance)'
    )
    assert (
        ax.get_ylabel()
        == f'principal component 2 of 3 dimensions ({shares[1]:.0%} of the variance)'
    )
    assert caption(ax)[1][1:] == pytest.approx(
        statistics_by_hand(embeddings, sample.val_labels), abs=0.0006
    )  # of all three


def test_unseen_classes_are_crosses_and_verified(trained, sample, picture, capsys):
    (ax,) = picture('--model-prefix', 'six').axes
    embeddings, probability = by_hand('six', 1, sample.val_images)
    seen = sample.val_labels < 6
    accuracy = np.mean(probability.argmax(axis=1)[seen] == sample.val_labels[seen])
    assert ax.get_title().endswith(f': {accuracy:.2%}')
    drawn = points(ax)
    assert list(drawn) == NAMES and sum(map(len, drawn.values())) == len(sample.val_labels)
    crosses = [len(collection.get_paths()[0].vertices) == 4 for collection in ax.collections]
    assert crosses == [False] * 6 + [True] * 4
    expected = vis.verify_unseen(embeddings, sample.val_labels, 6)
    said = [
        f'{distance}: AUC {expected[distance].auc:.4f}, {expected[distance].true_accepts:.1%} true accepts at 1% false'
        for distance in ('Euclidean', 'cosine')
    ]
    assert ax.texts[-1].get_text().splitlines()[1:] == [
        '× unseen in training: 6, 7, 8, 9; pairs of their images by distance,',
        *said,
    ]
    assert (
        capsys.readouterr().out.splitlines()[1]
        == f'    unseen in training: 6, 7, 8, 9; pairs of their images by distance, {"; ".join(said)}'
    )


def test_a_plane_does_not_depend_on_the_order_and_turns_nothing_over():
    rng = np.random.default_rng(0)
    embeddings = (rng.normal(size=(300, 4)) * [1, 5, 3, 0.5] + 7).astype('f')
    plane = vis.viewing_plane(embeddings)
    np.testing.assert_allclose(plane.axes @ plane.axes.T, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(plane.axes, [[0, 1, 0, 0], [0, 0, 1, 0]], atol=0.2)
    np.testing.assert_allclose(vis.viewing_plane(embeddings[::-1]).axes, plane.axes, atol=1e-6)


def test_the_command_writes_the_picture_and_says_the_numbers(trained, sample):
    result = run('--dataset', 'mnist-5k', '--compare', 'softmax', cwd=trained)
    assert result.returncode == 0, result.stderr
    softmax, joint, wrote = result.stdout.splitlines()
    assert re.fullmatch(
        r'softmax-0001\.params: 1000 images of mnist-5k \(val\), accuracy [\d.]+%, intra [\d.]+, inter [\d.]+, ratio [\d.]+',
        softmax,
    )
    accuracy = accuracy_by_hand('center_loss', 2, sample.val_images, sample.val_labels)
    expected = statistics_by_hand(
        by_hand('center_loss', 2, sample.val_images)[0], sample.val_labels
    )
    assert joint.startswith(
        f'center_loss-0002.params: 1000 images of mnist-5k (val), accuracy {accuracy:.2%}, '
    )
    assert [
        float(value) for value in re.findall(r'(?:intra|inter|ratio) ([\d.]+)', joint)
    ] == pytest.approx(expected, abs=0.0006)
    assert wrote == 'wrote center_loss.png'
    height, width, _ = plt.imread(trained / 'center_loss.png').shape
    assert (width, height) == (1650, 869)


def test_the_accuracy_is_the_one_in_the_log(trained, sample):
    log = (trained / 'log.txt').read_text()
    logged = float(re.findall(r'Epoch\[1\] Validation-accuracy=(\S+)', log)[0])
    _, logits = vis.embed('center_loss', 2, sample.val_images)
    assert np.mean(logits.argmax(axis=1) == sample.val_labels) == pytest.approx(logged, abs=1e-6)


@pytest.mark.parametrize('count, batch_size', [(1, 1000), (999, 1000), (2001, 1000), (50, 7)])
def test_any_number_of_images_is_embedded_once(count, batch_size, trained, sample):
    embeddings, logits = vis.embed('center_loss', 2, sample.train_images[:count], batch_size)
    expected, probability = by_hand('center_loss', 2, sample.train_images[:count])
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)
    np.testing.assert_allclose(
        np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), probability, atol=1e-5
    )
    assert embeddings.dtype == logits.dtype == np.float32


def test_the_newest_epoch_is_the_highest(tmp_path):
    for epoch in (2, 10, 9):
        (tmp_path / f'run-{epoch:04d}.params').touch()
    (tmp_path / 'running-0099.params').touch()
    (tmp_path / 'run-0011.params.part').touch()
    assert vis.newest_epoch(str(tmp_path / 'run')) == 10


def frames_of(path):
    """The frames of an animation as RGB arrays, and how long each is shown."""
    with Image.open(path) as animation:
        frames = []
        for index in range(animation.n_frames):
            animation.seek(index)
            frames.append((np.asarray(animation.convert('RGB')), animation.info['duration']))
        return zip(*frames)


@pytest.mark.parametrize('prefix, dimensions', [('center_loss', 2), ('wide', 3)])
def test_an_animation_has_a_frame_for_every_epoch_and_nothing_moves_but_the_points(
    prefix, dimensions, trained, sample, command, monkeypatch, capsys
):
    if prefix == 'wide':  # a second epoch, whose embeddings lie elsewhere
        network, arg_params, aux_params = mx.model.load_checkpoint('wide', 1)
        arg_params['embedding_weight'] = arg_params['embedding_weight'] * 3
        mx.model.save_checkpoint('wide', 2, network, arg_params, aux_params)
    seen = []
    grab_frame = vis.GifWriter.grab_frame

    def look(writer, **options):
        grab_frame(writer, **options)
        (ax,) = writer.fig.axes
        seen.append(
            (
                ax.get_title(),
                points(ax),
                (ax.get_xlim(), ax.get_ylim(), ax.get_position().bounds, ax.get_xlabel()),
                [tuple(collection.get_facecolor()[0]) for collection in ax.collections],
            )
        )

    monkeypatch.setattr(vis.GifWriter, 'grab_frame', look)
    monkeypatch.setattr(vis, 'FRAME_IMAGES', 300)
    command('--model-prefix', prefix, '--animate', 'film.gif')
    frames, durations = frames_of('film.gif')
    assert len(frames) == len(seen) == 2 and durations[0] < durations[1]
    assert not np.array_equal(*frames)
    accuracies = [
        accuracy_by_hand(prefix, epoch, sample.val_images, sample.val_labels) for epoch in (1, 2)
    ]
    assert [title.split(' (')[1] for title, *_ in seen] == [
        f'epoch {epoch}): {accuracy:.2%}' for epoch, accuracy in zip((1, 2), accuracies)
    ]
    (_, first, still, colours), (_, second, still_there, colours_again) = seen
    assert still == still_there and colours == colours_again
    (x0, x1), (y0, y1) = still[:2]
    assert x1 - x0 == pytest.approx(y1 - y0)
    for drawn in (first, second):
        assert sum(map(len, drawn.values())) == 300
        everywhere = np.concatenate(list(drawn.values()))
        assert (everywhere > [x0, y0]).all() and (everywhere < [x1, y1]).all()
    if dimensions == 2:
        for epoch, drawn in ((1, first), (2, second)):  # of the same images in every frame
            embeddings = by_hand(prefix, epoch, sample.val_images)[0]
            order = np.sort(np.random.default_rng(0).permutation(1000)[:300])
            np.testing.assert_allclose(
                drawn['4'], embeddings[order][sample.val_labels[order] == 4], atol=1e-4
            )
    else:
        bias = mx.nd.load('wide-0001.params')['arg:embedding_bias'].asnumpy()
        assert not bias.any()
        plane = vis.viewing_plane(by_hand('wide', 2, sample.val_images)[0])
        back = (
            first['4'] + plane.axes @ plane.origin
        )  # in the plane of the last epoch both are the same but for the size
        np.testing.assert_allclose(3 * back, second['4'] + plane.axes @ plane.origin, atol=1e-3)
    assert capsys.readouterr().out.splitlines()[-1] == 'wrote film.gif'


def test_an_animation_keeps_the_colours_of_the_classes_and_is_small(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 300)
    angle = labels * 2 * np.pi / 10
    around = np.stack([np.cos(angle), np.sin(angle)], axis=1) * 10
    panels = [
        vis.Panel(
            (around + rng.normal(size=(3000, 2)) * spread).astype('f'),
            labels,
            f'epoch {epoch}',
            'caption',
        )
        for epoch, spread in enumerate(np.linspace(3, 0.5, 20), 1)
    ]
    vis.animate(panels, NAMES, tmp_path / 'film.gif')
    frames, _ = frames_of(tmp_path / 'film.gif')
    assert len(frames) == 20
    assert (tmp_path / 'film.gif').stat().st_size < 500_000
    for colour in np.array(vis.seaborn.color_palette(vis.PALETTE, 10)) * 255:
        distance = np.linalg.norm(frames[0].astype(float) - colour, axis=2)
        assert distance.min() < 16  # the names are written in the full colour
    assert (frames[0][0, 0] == 255).all()


def test_an_mp4_needs_ffmpeg_and_leaves_what_is_there_when_that_fails(
    trained, tmp_path, command, monkeypatch, capsys
):
    film = tmp_path / 'film.mp4'
    film.write_text('of an earlier run')
    for program, said in (
        (
            None,
            'film.mp4: an .mp4 needs the program ffmpeg, which is not there: install it, or write a .gif\n',
        ),
        ('#!/bin/sh\nexit 3\n', 'film.mp4 cannot be written: ffmpeg ended with status 3\n'),
    ):
        if program:
            (tmp_path / 'ffmpeg').write_text(program)
            (tmp_path / 'ffmpeg').chmod(0o755)
        monkeypatch.setenv('PATH', str(tmp_path))
        with pytest.raises(SystemExit) as leave:
            command('--animate', film)
        assert leave.value.code == 2
        told = capsys.readouterr().err
        assert told.endswith(said) and told.count('\n') == 1
        assert film.read_text() == 'of an earlier run'
        assert {path.name for path in tmp_path.iterdir()} <= {'film.mp4', 'ffmpeg'}


def test_an_mp4_is_what_ffmpeg_makes_of_the_frames(trained, tmp_path, command, monkeypatch):
    ffmpeg = tmp_path / 'ffmpeg'
    ffmpeg.write_text(
        f'#!{sys.executable}\nimport sys\nopen(sys.argv[-1], "wb").write(sys.stdin.buffer.read())\n'
    )
    ffmpeg.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    command('--animate', tmp_path / 'film.mp4')
    frames = np.fromfile(tmp_path / 'film.mp4', np.uint8).reshape(2, 512, 480, 4)
    assert (frames[0] != frames[1]).any() and (frames == 255).all(axis=(1, 2, 3)).sum() == 0


LOG = """2026-11-24 12:00:00,000 Node[0] start with arguments Namespace(...)
2026-11-24 12:00:01,000 Node[0] Epoch[0] Batch [0-50]\tSpeed: 7000.00 samples/sec\taccuracy=0.100000\tcenter_loss=9.000000
2026-11-24 12:00:02,000 Node[0] Epoch[0] Train-accuracy=0.500000
2026-11-24 12:00:02,000 Node[0] Epoch[0] Train-center_loss=4.000000
2026-11-24 12:00:02,000 Node[0] Epoch[0] Time cost=1.000
2026-11-24 12:00:03,000 Node[0] Epoch[0] Validation-accuracy=0.400000
2026-11-24 12:00:03,000 Node[0] Epoch[0] Validation-center_loss=5.000000
2026-11-24 12:00:04,000 Node[0] Epoch[1] Train-accuracy=0.600000
2026-11-24 12:00:05,000 Node[0] Epoch[1] Validation-accuracy=0.550000
2026-11-24 12:00:06,000 Node[0] Epoch[2] Train-accuracy=0.700000
"""
OF_LOG = {
    ('Train', 'accuracy'): {1: 0.5, 2: 0.6, 3: 0.7},
    ('Train', 'center_loss'): {1: 4.0},
    ('Validation', 'accuracy'): {1: 0.4, 2: 0.55},
    ('Validation', 'center_loss'): {1: 5.0},
}


@pytest.mark.parametrize(
    'after, curves',
    [
        ('', OF_LOG),
        # Another run, of which only this is there: nothing of the run before it is mixed in.
        (
            'x start with arguments\nx Epoch[0] Train-accuracy=0.95\n',
            {('Train', 'accuracy'): {1: 0.95}},
        ),
        # One that continues goes on where it was, one that repeats an epoch from there.
        (
            'x Epoch[3] Train-accuracy=0.8\n',
            {**OF_LOG, ('Train', 'accuracy'): {1: 0.5, 2: 0.6, 3: 0.7, 4: 0.8}},
        ),
        (
            'x Epoch[2] Train-accuracy=0.75\nx Epoch[3] Train-accuracy=0.8\n',
            {**OF_LOG, ('Train', 'accuracy'): {1: 0.5, 2: 0.6, 3: 0.75, 4: 0.8}},
        ),
        (
            'x Epoch[1] Train-accuracy=0.65\n',
            {
                **OF_LOG,
                ('Train', 'accuracy'): {1: 0.5, 2: 0.65},
                ('Validation', 'accuracy'): {1: 0.4},
            },
        ),
        # Another worker of the same run, a line that is cut off, and what is no number.
        ('x Node[1] Epoch[0] Train-accuracy=0.1\nx Node[12] Epoch[2] Train-accuracy=0.2\n', OF_LOG),
        (
            'x Node[0] Epoch[3] Train-accuracy=\nx Epoch[3] Train-accuracy=0.\nx Epoch[3] Train-accuracy=-\nx Epoch[3] Train-accuracy=0.1.2',
            OF_LOG,
        ),
    ],
)
def test_curves_are_the_numbers_of_the_last_run_of_the_log(after, curves, tmp_path):
    (tmp_path / 'log.txt').write_text(LOG + after)
    assert vis.read_log(tmp_path / 'log.txt') == curves


def test_another_run_of_a_single_epoch_replaces_the_one_before_it(tmp_path):
    epoch = 'x Epoch[0] Train-accuracy=0.{0}\nx Epoch[0] Validation-accuracy=0.{0}\n'
    (tmp_path / 'log.txt').write_text(epoch.format(5) + epoch.format(7).splitlines()[0] + '\n')
    assert vis.read_log(tmp_path / 'log.txt') == {('Train', 'accuracy'): {1: 0.7}}


def test_curves_are_drawn_for_every_log(trained, picture, capsys):
    figure = picture('--curves', 'softmax.txt', 'log.txt')
    accuracy, loss = figure.axes
    assert (accuracy.get_title(), loss.get_title()) == ('accuracy', 'center loss')
    assert (accuracy.get_xlabel(), loss.get_xlabel()) == ('epoch', 'epoch')
    labels = [
        f'{path}, {split}'
        for path, split in itertools.product(('softmax.txt', 'log.txt'), ('training', 'validation'))
    ]
    assert (
        [line.get_label() for line in accuracy.get_lines()]
        == [line.get_label() for line in loss.get_lines()]
        == labels
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    log = (trained / 'log.txt').read_text()
    for ax, metric in ((accuracy, 'accuracy'), (loss, 'center_loss')):
        for line, split in zip(ax.get_lines()[2:], ('Train', 'Validation')):
            logged = [float(value) for value in re.findall(rf'{split}-{metric}=(\S+)', log)]
            np.testing.assert_allclose(line.get_xydata(), np.column_stack([[1, 2], logged]))
    assert accuracy.get_lines()[0].get_color() == accuracy.get_lines()[1].get_color()
    assert (
        accuracy.get_lines()[0].get_color()
        != accuracy.get_lines()[2].get_color()
        == loss.get_lines()[3].get_color()
    )
    last = float(re.findall(r'Validation-accuracy=(\S+)', log)[-1])
    assert re.search(
        rf'^log\.txt: 2 epochs, .*validation accuracy {last:.4f}',
        capsys.readouterr().out,
        re.MULTILINE,
    )


def test_the_first_epochs_do_not_press_the_other_ones_together(tmp_path):
    values = [0.1, 0.8, 0.97, 0.98]
    (tmp_path / 'log.txt').write_text(
        ''.join(
            f'x Epoch[{epoch}] Validation-accuracy={value}\n' for epoch, value in enumerate(values)
        )
    )
    bottom, top = vis.draw_curves([tmp_path / 'log.txt']).axes[0].get_ylim()
    assert bottom == pytest.approx(0.9) and 1 < top < 1.01


def test_curves_are_written_to_a_file_of_their_own(trained):
    result = run('--curves', 'log.txt', cwd=trained)
    assert result.stdout.endswith('\nwrote curves.png\n') and result.stderr == ''
    assert plt.imread(trained / 'curves.png').shape[:2] == (550, 1430)


def test_no_window_is_opened_without_a_display(trained, picture, monkeypatch):
    monkeypatch.setattr(plt, 'show', lambda: pytest.fail('a window'))
    picture()


def test_a_window_is_opened_where_there_is_a_display(trained, picture, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, 'show', lambda: shown.append(True))
    monkeypatch.setattr(FigureCanvasAgg, 'required_interactive_framework', 'qt')
    picture()
    assert shown == [True]


def test_a_window_system_that_cannot_be_reached_costs_no_picture(trained, picture, monkeypatch):
    make_figure, refusals = plt.figure, []

    def refuse_once(**options):
        if not refusals:
            refusals.append(True)
            raise RuntimeError("couldn't connect to display")
        return make_figure(**options)

    monkeypatch.setattr(plt, 'figure', refuse_once)
    monkeypatch.setattr(plt, 'show', lambda: pytest.fail('a window'))
    assert len(picture('--curves', 'log.txt').axes) == 2


def test_a_backend_with_windows_needs_no_display(trained, tmp_path):
    result = run(
        '--curves', 'log.txt', '--output', tmp_path / 'curves.png', cwd=trained, MPLBACKEND='TkAgg'
    )
    assert (result.returncode, result.stderr) == (0, '')
    assert plt.imread(tmp_path / 'curves.png').shape[:2] == (550, 1430)


def test_a_damaged_checkpoint_is_told(trained, tmp_path, sample):
    for name in ('broken-symbol.json', 'broken-0001.params'):
        (tmp_path / name).write_bytes((trained / name.replace('broken', 'softmax')).read_bytes())
    images, prefix = sample.val_images[:10], str(tmp_path / 'broken')
    vis.embed(prefix, 1, images)
    whole = (tmp_path / 'broken-0001.params').read_bytes()
    (tmp_path / 'broken-0001.params').write_bytes(whole[:5000])
    with pytest.raises(InputError, match='broken-0001.params is not a whole file of named arrays'):
        vis.embed(prefix, 1, images)
    arrays = mx.nd.load(str(trained / 'softmax-0001.params'))
    mx.nd.save(
        str(tmp_path / 'broken-0001.params'),
        {name: value for name, value in arrays.items() if name != 'arg:fc1_weight'},
    )
    with pytest.raises(
        InputError,
        match='broken-symbol.json and .*broken-0001.params are not a network of train.py and its parameters',
    ):
        vis.embed(prefix, 1, images)
    arrays['arg:embedding_bias'][:] = np.nan
    mx.nd.save(str(tmp_path / 'broken-0001.params'), arrays)
    with pytest.raises(
        InputError, match='broken-0001.params embeds images as numbers that are not finite'
    ):
        vis.embed(prefix, 1, images)
    (tmp_path / 'broken-0001.params').write_bytes(whole)
    for symbol in ('', '{}', '[1, 2]', (trained / 'softmax-symbol.json').read_text()[:700]):
        (tmp_path / 'broken-symbol.json').write_text(symbol)
        with pytest.raises(
            InputError, match='broken-symbol.json is not the network of a checkpoint'
        ):
            vis.embed(prefix, 1, images)
    (tmp_path / 'broken-symbol.json').unlink()
    with pytest.raises(InputError, match='broken-symbol.json is missing'):
        vis.embed(prefix, 1, images)


@pytest.mark.parametrize(
    'options, said',
    [
        (
            ['--model-prefix', 'nothing'],
            'there is no checkpoint of nothing: run python train.py first',
        ),
        (
            ['--compare', 'nothing'],
            'there is no checkpoint of nothing: run python train.py first, or name the run with --compare',
        ),
        (
            ['--compare', ''],
            'there is no checkpoint of : run python train.py first, or name the run with --compare',
        ),
        (
            ['--grid', 'softmax', 'nothing'],
            'there is no checkpoint of nothing: run python train.py first, or name the run with --grid',
        ),
        (
            ['--animate', 'film.gif', '--model-prefix', 'nothing'],
            'there is no checkpoint of nothing: run python train.py first',
        ),
        (
            ['--epoch', '9'],
            'there is no center_loss-0009.params; epochs of center_loss that have a checkpoint: 1, 2',
        ),
        (['--epoch', '0'], '--epoch: 0 is out of range'),
        (['--epoch', 'last'], "--epoch: 'last' is not a whole number"),
        (['--epoch', '1' + '0' * 300], '--epoch: 1000'),
        (['--model-prefix', 'x' * 300], 'there is no checkpoint of xxx'),
        (['--dataset', 'cifar'], "--dataset: invalid choice: 'cifar'"),
        (['--data-dir', 'nowhere'], 'nowhere has no train-images-idx3-ubyte'),
        (['--data-dir', 'log.txt'], 'log.txt has no train-images-idx3-ubyte'),
        (['--split', 'test'], "--split: invalid choice: 'test'"),
        (['--model-prefix', 'narrow'], 'narrow embeds in 1 dimension, a picture needs 2 or more'),
        (
            ['--model-prefix', 'other'],
            'other-symbol.json and other-0001.params are not a network of train.py and its parameters',
        ),
        (['--output', 'picture.xyz'], '--output=picture.xyz: it can be written as '),
        (['--output', 'picture'], '--output=picture: it can be written as '),
        (
            ['--output', 'no/picture.png'],
            '--output=no/picture.png cannot be written: no such folder',
        ),
        (
            ['--output', 'log.txt/picture.png'],
            '--output=log.txt/picture.png cannot be written: no such folder',
        ),
        (['--output', 'folder.png'], '--output=folder.png cannot be written: it is a folder'),
        (['--animate', 'film.png'], '--animate=film.png: it can be written as gif, mp4'),
        (['--animate', 'no/film.gif'], '--animate=no/film.gif cannot be written: no such folder'),
        (['--curves', 'nolog.txt'], '--curves: nolog.txt cannot be read: No such file'),
        (
            ['--curves', 'log.txt', 'softmax-symbol.json'],
            '--curves: softmax-symbol.json has no line such as',
        ),
        (['--curves'], '--curves: expected at least one argument'),
        (['--grid'], '--grid: expected at least one argument'),
        *[
            ([*one, *other], f'not allowed with argument {one[0]}')
            for one, other in itertools.combinations(
                [
                    ['--compare', 'softmax'],
                    ['--grid', 'softmax'],
                    ['--animate', 'film.gif'],
                    ['--curves', 'log.txt'],
                ],
                2,
            )
        ],
        (
            ['--curves', 'log.txt', '--epoch', '1'],
            '--epoch has no meaning with --curves: leave it out',
        ),
        (['--curves', '.'], '--curves: . cannot be read: Is a directory'),
        (
            ['--grid', 'softmax', '--epoch', '7'],
            'there is no softmax-0007.params; epochs of softmax that have a checkpoint: 1',
        ),
        (['softmax'], 'unrecognized arguments: softmax'),
        (
            ['--curves', 'log.txt', '--data-dir', '.'],
            '--data-dir has no meaning with --curves: leave it out',
        ),
        (
            ['--animate', 'film.gif', '--output', 'film.png'],
            '--output has no meaning with --animate: leave it out',
        ),
        (
            ['--grid', 'softmax', '--model-prefix', 'wide'],
            '--model-prefix has no meaning with --grid: leave it out',
        ),
    ],
)
def test_a_wrong_command_line_is_told_in_one_sentence_and_touches_nothing(
    options, said, trained, command, capsys
):
    (trained / 'folder.png').mkdir(exist_ok=True)
    for name in ('center_loss.png', 'curves.png', 'film.gif', 'grid.png'):
        (trained / name).write_text('of an earlier run')
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    with pytest.raises(SystemExit) as leave:
        command(*options)
    told = capsys.readouterr().err
    assert leave.value.code == 2
    assert said in told and told.startswith('vis.py: error: ') and told.count('\n') == 1
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_before_any_training_it_says_what_to_run_first(tmp_path):
    result = run(cwd=tmp_path)
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
def test_a_picture_that_cannot_be_written_leaves_the_one_before_it(
    error, said, tmp_path, monkeypatch
):
    target = tmp_path / 'picture.png'
    target.write_text('of an earlier run')

    def fail(self, path, **options):
        Path(path).write_text('half')
        raise error

    monkeypatch.setattr(plt.Figure, 'savefig', fail)
    with pytest.raises(InputError, match=f'picture.png cannot be written: {said}'):
        vis.save(plt.figure(), target)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ('picture.png', 'of an earlier run')
    ]


def test_an_animation_that_is_interrupted_leaves_the_one_before_it(tmp_path, monkeypatch):
    target = tmp_path / 'film.gif'
    target.write_text('of an earlier run')

    def interrupt(self, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(vis.GifWriter, 'grab_frame', interrupt)
    labels = np.arange(10)
    with pytest.raises(KeyboardInterrupt):
        vis.animate(
            [vis.Panel(np.eye(10, 2, dtype='f'), labels, 'title', 'caption')], NAMES, target
        )
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ('film.gif', 'of an earlier run')
    ]


def test_a_saved_png_keeps_the_colour_of_every_class(tmp_path):
    labels = np.arange(5000) % 10
    angle = labels * np.pi / 5
    points = np.random.default_rng(0).normal(
        10 * np.stack([np.cos(angle), np.sin(angle)], axis=1), 1
    )
    figure, ax = plt.subplots(figsize=(8, 8))
    vis.plot_embeddings(
        ax, points, labels, data.load_digits('mnist-5k').class_names, 'title', 'caption', 10
    )
    vis.save(figure, tmp_path / 'picture.png')
    plt.close(figure)
    with Image.open(tmp_path / 'picture.png') as image:
        assert image.mode == 'P'
        drawn = np.array([colour for _, colour in image.convert('RGB').getcolors()])
    for colour in 255 * np.array(seaborn.color_palette(vis.PALETTE, 10)):
        assert np.abs(drawn - colour).max(axis=1).min() < 8
