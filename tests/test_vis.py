"""The pictures: panels, titles, points, captions and curves, held against the numbers they stand for."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import data
import vis
from runtime import InputError, mx, run_script
from train_model import Checkpoints

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with two runs on the embedded digits: center_loss (2 epochs) and softmax (1 epoch), each with its log."""
    folder = tmp_path_factory.mktemp('trained')
    for line in ('--num-epochs 2 --center-loss-weight 0.1', '--num-epochs 1 --center-loss-weight 0 --save-model-prefix softmax --log-file softmax.txt'):
        subprocess.run([sys.executable, ROOT / 'train.py', '--dataset', 'mnist-5k', '--lr', '0.03', *line.split()],
                       cwd=folder, check=True, stderr=subprocess.DEVNULL, timeout=120)
    return folder


@pytest.fixture(autouse=True)
def in_the_folder_of_the_runs(request, monkeypatch):
    if 'trained' in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue('trained'))
    yield
    plt.close('all')


def run(*options, cwd):
    return subprocess.run([sys.executable, ROOT / 'vis.py', *map(str, options)], cwd=cwd, capture_output=True, text=True, timeout=120)


def picture(*options, monkeypatch):
    """The figure that ``python vis.py OPTIONS`` writes."""
    figures = []
    monkeypatch.setattr(sys, 'argv', ['vis.py', '--dataset', 'mnist-5k', *map(str, options)])
    monkeypatch.setattr(vis, 'save', lambda figure, path: figures.append(figure))
    run_script(vis.main)
    return figures[0]


def by_hand(prefix, epoch, images):
    """Embeddings and probabilities of a checkpoint in one piece, with MXNet's own loader."""
    network, arg_params, aux_params = mx.model.load_checkpoint(prefix, epoch)
    layers = network.get_internals()
    executor = mx.sym.Group([layers['embedding_output'], layers['softmax_output']]).simple_bind(
        mx.cpu(), grad_req='null', data=(len(images), 1, 28, 28), softmax_label=(len(images),))
    executor.copy_params_from(arg_params, allow_extra_params=True)
    return [output.asnumpy() for output in executor.forward(data=mx.nd.array(images[:, None] / 256))]


def points(ax):
    """Points of each class by its name."""
    return {collection.get_label(): np.asarray(collection.get_offsets()) for collection in ax.collections}


def test_the_panel_shows_every_validation_image_of_the_newest_epoch(trained, monkeypatch):
    ax, = picture(monkeypatch=monkeypatch).axes
    sample = data.load_digits('mnist-5k')
    embeddings, probability = by_hand('center_loss', 2, sample.val_images)
    accuracy = np.mean(probability.argmax(axis=1) == sample.val_labels)
    assert ax.get_title() == f'softmax + center loss, λ = 0.1 (epoch 2): {accuracy:.2%}'
    drawn = points(ax)
    assert list(drawn) == list('0123456789')
    for label, offsets in drawn.items():
        np.testing.assert_allclose(offsets, embeddings[sample.val_labels == int(label)], atol=1e-4)
    assert ax.get_aspect() == 1
    assert len({tuple(collection.get_facecolor()[0][:3]) for collection in ax.collections}) == 10


def test_every_class_is_named_at_the_median_of_its_cluster_in_its_colour_on_white(trained, monkeypatch):
    ax, = picture(monkeypatch=monkeypatch).axes
    assert [text.get_text() for text in ax.texts] == list('0123456789')
    for text, collection in zip(ax.texts, ax.collections):
        np.testing.assert_allclose(text.get_position(), np.median(points(ax)[text.get_text()], axis=0), rtol=1e-5)
        assert text.get_color() == tuple(collection.get_facecolor()[0][:3])
        effect, = text.get_path_effects()
        assert effect._gc['foreground'] == 'white'


def test_the_caption_says_how_compact_the_clusters_are(trained, monkeypatch):
    ax, = picture(monkeypatch=monkeypatch).axes
    sample = data.load_digits('mnist-5k')
    embeddings, probability = by_hand('center_loss', 2, sample.val_images)
    embeddings = embeddings.astype(np.float64)
    means = [embeddings[sample.val_labels == k].mean(axis=0) for k in range(10)]
    intra = np.mean([np.sqrt(((x - means[y]) ** 2).sum()) for x, y in zip(embeddings, sample.val_labels)])
    inter = np.mean([np.sqrt(((means[a] - means[b]) ** 2).sum()) for a in range(10) for b in range(10) if a != b])
    shown = [float(value) for value in re.findall(r'[\d.]+', ax.get_xlabel())]
    assert shown == pytest.approx([100 * np.mean(probability.argmax(axis=1) == sample.val_labels), intra, inter, intra / inter], abs=0.006)
    assert re.sub(r' +', ' ', re.sub(r'[\d.]+', 'N', ax.get_xlabel())) == 'accuracy N% intra N inter N ratio N'


def test_statistics_of_clusters_that_are_known():
    corners = np.array([[0, 0], [0, 2], [10, 0], [10, 2]], 'f')
    assert vis.cluster_statistics(corners, np.array([3, 3, 7, 7])) == pytest.approx((1, 10, 0.1))


def test_the_epoch_and_the_split_can_be_chosen(trained, monkeypatch):
    ax, = picture('--epoch', 1, '--split', 'train', monkeypatch=monkeypatch).axes
    sample = data.load_digits('mnist-5k')
    embeddings, probability = by_hand('center_loss', 1, sample.train_images)
    assert f'(epoch 1): {np.mean(probability.argmax(axis=1) == sample.train_labels):.2%}' in ax.get_title()
    assert {label: len(offsets) for label, offsets in points(ax).items()} == dict.fromkeys('0123456789', 400)
    np.testing.assert_allclose(points(ax)['3'], embeddings[sample.train_labels == 3], atol=1e-4)


def test_the_compared_run_is_on_the_left_in_the_same_colours(trained, monkeypatch):
    left, right = picture('--compare', 'softmax', monkeypatch=monkeypatch).axes
    assert left.get_title().startswith('softmax only (epoch 1): ') and right.get_title().startswith('softmax + center loss, λ = 0.1 (epoch 2): ')
    assert left.get_position().x0 < right.get_position().x0
    sample = data.load_digits('mnist-5k')
    np.testing.assert_allclose(points(left)['5'], by_hand('softmax', 1, sample.val_images)[0][sample.val_labels == 5], atol=1e-4)
    for one, other in zip(left.collections, right.collections):
        np.testing.assert_array_equal(one.get_facecolor(), other.get_facecolor())


def test_the_command_writes_the_picture_and_says_the_numbers(trained):
    result = run('--dataset', 'mnist-5k', '--compare', 'softmax', cwd=trained)
    assert result.returncode == 0, result.stderr
    softmax, joint, wrote = result.stdout.splitlines()
    number = r'\d+\.\d+'
    assert re.fullmatch(rf'softmax only \(epoch 1\): 1000 images of mnist-5k, accuracy {number}%, intra {number}, inter {number}, ratio {number}', softmax)
    assert joint.startswith('softmax + center loss') and wrote == 'wrote center_loss.png'
    height, width, _ = plt.imread(trained / 'center_loss.png').shape
    assert (width, height) == (1650, 836)


def test_the_accuracy_is_the_one_in_the_log(trained):
    log = (trained / 'log.txt').read_text()
    logged = float(re.findall(r'Epoch\[1\] Validation-accuracy=(\S+)', log)[0])
    sample = data.load_digits('mnist-5k')
    embedded = vis.embed('center_loss', 2, sample.val_images, sample.val_labels)
    assert np.mean(embedded.predictions == sample.val_labels) == pytest.approx(logged, abs=1e-6)


def test_any_number_of_images_is_embedded_once(trained):
    sample = data.load_digits('mnist-5k')
    for count in (1, 999, 1001, 2500):
        embedded = vis.embed('center_loss', 2, sample.train_images[:count], sample.train_labels[:count])
        np.testing.assert_allclose(embedded.embeddings, by_hand('center_loss', 2, sample.train_images[:count])[0], atol=1e-4)


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


def test_curves_are_the_numbers_of_the_log(tmp_path):
    (tmp_path / 'log.txt').write_text(LOG)
    assert vis.read_log(tmp_path / 'log.txt') == {('Train', 'accuracy'): {1: 0.5, 2: 0.6, 3: 0.7}, ('Train', 'center_loss'): {1: 4.0},
                                                  ('Validation', 'accuracy'): {1: 0.4, 2: 0.55}, ('Validation', 'center_loss'): {1: 5.0}}


def test_of_several_runs_in_a_log_the_last_one_counts_and_a_resumed_one_goes_on(tmp_path):
    (tmp_path / 'again.txt').write_text(LOG + 'x start with arguments\nx Epoch[0] Train-accuracy=0.95\n')
    assert vis.read_log(tmp_path / 'again.txt')['Train', 'accuracy'] == {1: 0.95}
    resumed = 'x Epoch[1] Train-accuracy=0.65\nx Epoch[2] Train-accuracy=0.75\nx Epoch[3] Train-accuracy=0.80\n'
    (tmp_path / 'resumed.txt').write_text(LOG + resumed)
    assert vis.read_log(tmp_path / 'resumed.txt')['Train', 'accuracy'] == {1: 0.5, 2: 0.65, 3: 0.75, 4: 0.8}


def test_curves_are_drawn_for_every_log(trained, monkeypatch):
    accuracy, loss = picture('--curves', 'softmax.txt', 'log.txt', monkeypatch=monkeypatch).axes
    assert (accuracy.get_title(), loss.get_title()) == ('accuracy', 'center loss')
    assert [line.get_label() for line in accuracy.get_lines()] == [
        f'{path}, {split}' for path, split in itertools.product(('softmax.txt', 'log.txt'), ('training', 'validation'))]
    logged = [float(value) for value in re.findall(r'Validation-center_loss=(\S+)', (trained / 'log.txt').read_text())]
    np.testing.assert_allclose(loss.get_lines()[3].get_xydata(), np.column_stack([[1, 2], logged]))
    assert accuracy.get_lines()[0].get_color() != accuracy.get_lines()[2].get_color() == loss.get_lines()[3].get_color()


def test_curves_are_written_to_a_file_of_their_own(trained):
    assert run('--curves', 'log.txt', cwd=trained).stdout == 'wrote curves.png\n'
    assert plt.imread(trained / 'curves.png').shape[:2] == (550, 1430)


def test_no_window_is_opened_without_a_display(trained, monkeypatch):
    monkeypatch.setattr(plt, 'show', lambda: pytest.fail('a window'))
    picture(monkeypatch=monkeypatch)


def test_a_window_is_opened_where_there_is_a_display(trained, monkeypatch):
    shown = []
    monkeypatch.setattr(plt, 'show', lambda: shown.append(True))
    monkeypatch.setattr(FigureCanvasAgg, 'required_interactive_framework', 'qt')
    picture(monkeypatch=monkeypatch)
    assert shown == [True]


def test_a_damaged_checkpoint_is_told(trained, tmp_path):
    for name in ('broken-symbol.json', 'broken-0001.params'):
        (tmp_path / name).write_bytes((trained / name.replace('broken', 'softmax')).read_bytes())
    sample = data.load_digits('mnist-5k')
    images, labels = sample.val_images[:10], sample.val_labels[:10]
    prefix = str(tmp_path / 'broken')
    vis.embed(prefix, 1, images, labels)
    whole = (tmp_path / 'broken-0001.params').read_bytes()
    (tmp_path / 'broken-0001.params').write_bytes(whole[:5000])
    with pytest.raises(InputError, match='broken-0001.params is not a whole file of named arrays'):
        vis.embed(prefix, 1, images, labels)
    (tmp_path / 'broken-0001.params').write_bytes(whole)
    for symbol in ('', '{}', '[1, 2]', (mx.sym.var('data') * 2).tojson()):
        (tmp_path / 'broken-symbol.json').write_text(symbol)
        with pytest.raises(InputError, match='broken-symbol.json and .*broken-0001.params are not a network of train.py and its parameters'):
            vis.embed(prefix, 1, images, labels)


@pytest.mark.parametrize('options, said', [
    (['--model-prefix', 'nothing'], 'there is no checkpoint of nothing: run python train.py first'),
    (['--compare', 'nothing'], 'there is no checkpoint of nothing: run python train.py first, or name the run with --compare'),
    (['--epoch', '9'], 'there is no center_loss-0009.params; epochs of center_loss that have a checkpoint: 1, 2'),
    (['--epoch', '0'], '--epoch: 0 is out of range'),
    (['--epoch', 'last'], "--epoch: 'last' is not a whole number"),
    (['--split', 'test'], "--split: invalid choice: 'test'"),
    (['--output', 'picture.xyz'], '--output=picture.xyz: pictures are written as '),
    (['--output', 'picture'], '--output=picture: pictures are written as '),
    (['--output', 'no/picture.png'], '--output=no/picture.png cannot be written: no such folder'),
    (['--output', 'folder.png'], '--output=folder.png cannot be written: it is a folder'),
    (['--curves', 'nolog.txt'], '--curves: nolog.txt cannot be read: No such file'),
    (['--curves', 'softmax-symbol.json'], '--curves: softmax-symbol.json has no line such as'),
    (['--curves'], '--curves: expected at least one argument'),
    (['--curves', 'log.txt', '--compare', 'softmax'], '--compare: not allowed with argument --curves'),
])
def test_a_wrong_command_line_is_told_in_one_sentence_and_touches_nothing(options, said, trained, monkeypatch, capsys):
    (trained / 'folder.png').mkdir(exist_ok=True)
    for name in ('center_loss.png', 'curves.png'):
        (trained / name).write_text('of an earlier run')
    before = {path: path.stat().st_mtime_ns for path in trained.iterdir()}
    monkeypatch.setattr(sys, 'argv', ['vis.py', '--dataset', 'mnist-5k', *options])
    with pytest.raises(SystemExit) as leave:
        run_script(vis.main)
    told = capsys.readouterr().err
    assert leave.value.code == 2
    assert said in told and told.startswith('vis.py: error: ') and told.count('\n') == 1
    assert {path: path.stat().st_mtime_ns for path in trained.iterdir()} == before


def test_before_any_training_it_says_what_to_run_first(tmp_path):
    result = run(cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr == ('vis.py: error: there is no checkpoint of center_loss: run python train.py first, '
                             'or name the run with --model-prefix\n')
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_leaves_the_one_before_it(tmp_path, monkeypatch):
    target = tmp_path / 'picture.png'
    target.write_text('of an earlier run')

    def fail(self, path, **options):
        Path(path).write_text('half')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(plt.Figure, 'savefig', fail)
    with pytest.raises(InputError, match='picture.png cannot be written: No space left on device'):
        vis.save(plt.figure(), target)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [('picture.png', 'of an earlier run')]


def test_the_newest_checkpoint_is_that_of_the_highest_epoch(tmp_path):
    for epoch in (2, 10, 9):
        (tmp_path / f'run-{epoch:04d}.params').touch()
    (tmp_path / 'running-0099.params').touch()
    (tmp_path / 'run-0011.params.part').touch()
    assert Checkpoints(tmp_path / 'run').epochs() == [2, 9, 10]
