"""A network bound for images of one's own, and the command and the picture that use it."""

import csv
from pathlib import Path
import shutil

import numpy as np
from PIL import Image
import pytest

from common.checkpoints import Checkpoints
from common.embedder import TRAINED, Embedded, Embedder, choose_run
from common.errors import Failure, InputError
from common.evaluation import embed
import data
from helpers import ROOT, run_python, train_small
from tools import embed as tool
import vis

pytestmark = pytest.mark.usefixtures('in_own_folder')


@pytest.fixture(scope='module')
def sample():
    return data.load_digits('mnist-5k')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The prefix of a run of the small network."""
    prefix = tmp_path_factory.mktemp('trained') / 'run'
    train_small(save_model_prefix=str(prefix), log_dir=str(prefix.parent))
    return prefix


@pytest.fixture
def run(trained):
    for path in trained.parent.glob('run-*'):
        shutil.copy(path, path.name)
    return 'run'


def test_embedded(run, sample):
    embedder = Embedder(run)
    images = sample.val_images[:130]  # more than one batch
    embedded = embedder(images)
    embeddings, logits = embed(run, 3, images)
    centers = Checkpoints(run).load_params(3)[1]['center_loss_center_bias'].asnumpy()
    powers = np.exp(logits.astype(np.float64))
    np.testing.assert_array_equal(embedded.embeddings, embeddings)
    np.testing.assert_array_equal(embedder.centers, centers)
    np.testing.assert_allclose(
        embedded.probabilities, powers / powers.sum(axis=1, keepdims=True), rtol=1e-4, atol=1e-7
    )
    for i, k in ((0, 0), (50, 3), (129, 9)):
        distance = np.linalg.norm(embeddings[i] - centers[k])
        assert embedded.distances[i, k] == pytest.approx(distance, rel=1e-5)
    np.testing.assert_array_equal(embedded.classes, logits.argmax(axis=1))
    alone = embedder(images[7:8])
    np.testing.assert_allclose(alone.embeddings, embeddings[7:8], atol=1e-5)


def test_facts_of_a_run(run, sample):
    """The distance is the 99th percentile over the validation images, of all epochs their own."""
    for epoch in (1, 3):
        embedder = Embedder(run, epoch)
        embedded = embedder(sample.val_images)
        own = embedded.distances[np.arange(1000), sample.val_labels]
        assert embedder.rejection_distance == pytest.approx(np.percentile(own, 99), rel=1e-4)
        unlike = embedded.distances.min(axis=1) > embedder.rejection_distance
        np.testing.assert_array_equal(embedded.is_unlike_all, unlike)
    assert embedder.dataset == 'mnist-5k' and embedder.image_shape == (28, 28)
    assert embedder.class_names == tuple('0123456789')
    assert 'inference' not in Checkpoints(run).load(3).options


def test_facts_of_the_data():
    train, _ = data.mnist_iterator(50, dataset='mnist-5k', num_classes=6)
    facts = {'dataset': 'mnist-5k', 'classes': list(range(6)), 'class_names': list('012345')}
    sha256 = data.load_digits('mnist-5k').sha256
    assert train.data_facts == {**facts, 'image_shape': [28, 28], 'sha256': sha256}


@pytest.mark.parametrize(
    'facts, problem',
    [
        ({'image_shape': [1, 28, 28]}, 'image_shape has to be two whole numbers, height and width'),
        ({'image_shape': [784]}, 'image_shape has to be two whole numbers'),
        ({'class_names': list(range(10))}, 'class_names has to be a list of texts, not '),
        ({'classes': [0, 1.5]}, 'classes has to be a list of whole numbers'),
        ({'classes': [0, 1]}, r'classes has to be .* one for each class, not \[0, 1\]'),
    ],
)
def test_facts_that_are_something_else(run, facts, problem):
    saved, symbol = Checkpoints(run).load(3), Checkpoints(run).load_symbol()
    arrays = saved.arg_params, saved.aux_params, {}
    Checkpoints('facts').save(1, symbol, *arrays, {}, inference=facts)
    with pytest.raises(InputError, match=f'^facts-0001.params: {problem}'):
        Embedder('facts')


def test_older_checkpoint(run, sample):
    """Without the facts: MNIST is assumed, and nothing is like none of the classes."""
    saved = Checkpoints(run).load(3)
    symbol = Checkpoints(run).load_symbol()
    Checkpoints('old').save(1, symbol, saved.arg_params, saved.aux_params, {}, {})
    embedder = Embedder('old')
    assert (embedder.dataset, embedder.image_shape) == ('mnist', (28, 28))
    assert embedder.class_names == tuple('0123456789') and embedder.rejection_distance is None
    assert not embedder(np.stack([np.full((28, 28), 255, np.uint8)])).is_unlike_all.any()


def test_unlike_all():
    """Beyond the distance to the nearest center, not at it."""
    distances = np.array([[3, 1.9], [2, 9], [2.1, 2.2]], 'f')
    embedded = Embedded(np.zeros((3, 2)), np.full((3, 2), 0.5), distances, np.float32(2))
    assert embedded.is_unlike_all.tolist() == [False, False, True]
    digits = data.load_digits('mnist-5k').val_images[:200]
    assert Embedder(TRAINED)(digits).is_unlike_all.mean() <= 0.03


def test_images_of_another_size(run):
    with pytest.raises(InputError, match='was trained on images of 28 x 28 pixels, and these have'):
        Embedder(run, image_shape=(24, 24))


@pytest.mark.parametrize(
    'images',
    [
        np.zeros((2, 28, 28), 'f'),
        np.zeros((2, 28, 28), int),
        np.zeros((2, 27, 28), np.uint8),
        np.zeros((28, 28), np.uint8),
        np.zeros((0, 28, 28), np.uint8),
        np.eye(28, dtype=np.uint8)[None],  # from 0 to 1
    ],
)
def test_wrong_arrays(run, images):
    with pytest.raises(
        InputError, match=r'images to embed have to be uint8 of shape \(N, 28, 28\)'
    ):
        Embedder(run)(images)


def test_no_checkpoint():
    with pytest.raises(
        InputError, match=r'there is no checkpoint of nothing: run python train\.py'
    ):
        Embedder('nothing')


def test_choose_run(run):
    assert choose_run('other') == 'other'
    assert Path(choose_run(None)).resolve() == TRAINED


@pytest.fixture
def digits(sample):
    """Three test digits as files, dark on light, and their names."""
    Path('digits').mkdir()
    names = [f'digits/{i}.png' for i in range(3)]
    for name, image in zip(names, sample.val_images, strict=False):
        Image.fromarray(255 - image).resize((84, 84)).save(name)
    return names


def test_table_and_files(digits, sample, capsys):
    for output in ('own.csv', 'own.npz'):
        tool.main(['digits', f'--output={output}'])
        assert f'wrote {output}' in capsys.readouterr().out
    tool.main(['digits'])
    facts, inverted, heading, *rows = capsys.readouterr().out.splitlines()
    assert 'center_loss-0008.params: trained on mnist' in facts and 'beyond a distance of' in facts
    assert inverted == 'images with dark digits on a light background, which were inverted: 3'
    assert heading.split() == ['image', 'class', 'probability', 'distance']
    with np.load('own.npz') as arrays, open('own.csv', newline='') as file:
        for i, (row, line) in enumerate(zip(rows, csv.DictReader(file), strict=True)):
            label = str(sample.val_labels[i])
            assert row.split()[:2] == [digits[i], label] == [line['image'], line['class']]
            assert arrays['image'][i] == digits[i] and arrays['class'][i] == label
            probability = arrays['probability'][i, int(label)]
            assert float(line[f'probability_{label}']) == pytest.approx(probability, rel=1e-6)
            assert float(row.split()[2]) == pytest.approx(probability, abs=1e-4)
            assert float(row.split()[3]) == pytest.approx(arrays['distance'][i].min(), abs=1e-3)
            assert float(line['embedding_1']) == pytest.approx(arrays['embedding'][i, 1], rel=1e-6)


def test_the_others_go_on(digits, capsys):
    Path('text.png').write_text('no image')
    with pytest.raises(Failure, match='could not be read and were left out: 1') as failure:
        tool.main(['text.png', 'digits', '--output=own.csv'])
    assert failure.value.exit_status == 1
    said = capsys.readouterr()
    assert said.err == 'text.png: not a PNG, JPEG or TIFF image\n' and 'wrote own.csv' in said.out
    assert len(Path('own.csv').read_text().splitlines()) == 4


@pytest.mark.parametrize(
    'arguments, said',
    [
        (['missing.png'], 'missing.png: there is no such file'),
        (['digits', '--output=own.txt'], r'own\.txt cannot be written: the file name has to end'),
        (['digits', '--output=no/own.csv'], 'there is no folder no'),
        (['digits', '--model-prefix=none'], 'there is no checkpoint of none'),
        (['digits', '--epoch=3'], r'there is no .*center_loss-0003\.params'),
        ([], 'the following arguments are required: IMAGE'),
    ],
)
def test_mistakes(digits, arguments, said):
    with pytest.raises(InputError, match=said):
        tool.main(arguments)
    assert [path.name for path in Path().iterdir()] == ['digits']


@pytest.mark.slow
def test_exit_status(digits):
    Path('text.png').write_text('no image')
    for images, status in ((digits, 0), ([*digits, 'text.png'], 1), (['text.png'], 2)):
        result = run_python('-m', 'tools.embed', *images, PYTHONPATH=str(ROOT))
        assert result.returncode == status
        assert len(result.stderr.splitlines()) == (0, 2, 1)[status]


@pytest.mark.slow
def test_warnings_are_plain_lines(run, digits):
    Path('run-0003.json').unlink()
    result = run_python('-m', 'tools.embed', *digits, '--model-prefix=run', PYTHONPATH=str(ROOT))
    assert result.returncode == 0
    assert result.stderr == 'run-0003.params has no checksum, and cannot be checked\n'


def test_marked_in_the_picture(run, digits, sample, monkeypatch):
    figures = []
    monkeypatch.setattr(vis.pictures, 'save_picture', lambda figure, path: figures.append(figure))
    vis.main(['--model-prefix=run', '--dataset=mnist-5k', '--images', 'digits'])
    (ax,) = figures[0].axes
    own = vis.load_images(['digits'], 'mnist', (28, 28))
    points, _ = embed(run, 3, own.images)
    marks = {text.get_text(): text.xy for text in ax.texts if text.get_text().endswith('.png')}
    assert list(marks) == ['0.png', '1.png', '2.png']
    np.testing.assert_allclose(list(marks.values()), points, atol=1e-5)
    with pytest.raises(InputError, match='--images has no effect with --curves'):
        vis.main(['--curves', 'log.txt', '--images', 'digits'])
