"""Embeddings and what is measured on them, compared with loops over all images and pairs."""

import math

import numpy as np
import pytest

from common.environment import mx
from common import evaluation
from common.checkpoints import Checkpoints
from common.errors import InputError
from common.evaluation import (
    center_loss_weight,
    cluster_statistics,
    embed,
    evaluate,
    verification,
    verify,
)
import data
from helpers import small_network
import train
import vis

pytestmark = pytest.mark.filterwarnings('error::RuntimeWarning')


@pytest.fixture(scope='module')
def sample():
    return data.load_digits('mnist-5k')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with untrained checkpoints: small, six (of ten classes), other (another network)."""
    folder = tmp_path_factory.mktemp('runs')
    save_untrained(folder / 'small', small_network(weight=0.1))
    save_untrained(folder / 'six', small_network(num_classes=6, embedding_dim=3))
    hidden = small_network().get_internals()['fc1_output']
    logits = mx.sym.FullyConnected(hidden, num_hidden=10, name='fc2')
    save_untrained(folder / 'other', mx.sym.SoftmaxOutput(logits, name='softmax'))
    return folder


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def random_params(symbol, seed=1, size=28):
    """Weights of a network, normal with standard deviation 1 / sqrt(inputs), and zero centers."""
    rng = np.random.default_rng(seed)
    shapes, _, aux_shapes = symbol.infer_shape(data=(1, 1, size, size))
    arg_params = {
        name: mx.nd.array(rng.normal(size=shape) / math.sqrt(math.prod(shape[1:])))
        for name, shape in zip(symbol.list_arguments(), shapes, strict=True)
        if name != 'data' and not name.endswith('label')
    }
    names = symbol.list_auxiliary_states()
    return arg_params, {
        name: mx.nd.zeros(shape) for name, shape in zip(names, aux_shapes, strict=True)
    }


def save_untrained(prefix, symbol, epoch=1, **options):
    arg_params, aux_params = random_params(symbol, epoch, **options)
    Checkpoints(prefix).save(epoch, symbol, arg_params, aux_params, {}, {})


def embed_by_hand(prefix, epoch, images):
    """Embeddings and probabilities of a checkpoint in one batch, with MXNet's own loader."""
    symbol, arg_params, aux_params = mx.model.load_checkpoint(str(prefix), epoch)
    layers = symbol.get_internals()
    executor = mx.sym.Group([layers['embedding_output'], layers['softmax_output']]).simple_bind(
        mx.cpu(), grad_req='null', data=(len(images), 1, 28, 28), softmax_label=(len(images),)
    )
    executor.copy_params_from(arg_params, aux_params, allow_extra_params=True)
    outputs = executor.forward(data=mx.nd.array(images[:, None] / 256))
    return [output.asnumpy() for output in outputs]


def statistics_by_hand(embeddings, labels):
    embeddings = embeddings.astype(np.float64)
    means = [embeddings[labels == label].mean(axis=0) for label in range(10)]
    intra = np.mean([np.linalg.norm(x - means[y]) for x, y in zip(embeddings, labels, strict=True)])
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b]
    inter = np.mean([np.linalg.norm(means[a] - means[b]) for a, b in pairs])
    return intra, inter, intra / inter


def verification_by_hand(embeddings, labels, distance):
    """Every pair of one class against every pair of two, one by one."""
    same, different = [], []
    for i in range(len(labels)):
        for j in range(i):
            (same if labels[i] == labels[j] else different).append(
                float(distance(embeddings[i].astype(float), embeddings[j].astype(float)))
            )
    wins = sum((one < two) + (one == two) / 2 for one in same for two in different)
    # Of all thresholds that accept at most 1% of the pairs of two classes, the one that accepts the
    # most pairs of one class.
    accepts = [
        sum(one <= threshold for one in same)
        for threshold in [-1, *same]
        if sum(two <= threshold for two in different) <= 0.01 * len(different)
    ]
    return wins / len(same) / len(different), max(accepts) / len(same)


@pytest.mark.parametrize('count, batch_size', [(1, 100), (250, 100), (50, 7), (40, 50)])
def test_embed(count, batch_size, runs, sample):
    images = sample.train_images[:count]
    embeddings, logits = embed(str(runs / 'small'), 1, images, batch_size)
    expected, probability = embed_by_hand(runs / 'small', 1, images)
    np.testing.assert_allclose(embeddings, expected, atol=1e-4)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(softmax, probability, atol=1e-5)
    assert embeddings.dtype == logits.dtype == np.float32


def test_vis_embed():
    assert vis.embed is embed


@pytest.mark.parametrize('name', ['lenet', 'lenet++'])
def test_saved_form_does_not_matter(name, sample):
    """c9a6961 saved the vectorized form of the network, with MXNet's own function."""
    plain, fast = (
        train.get_symbol(network=name, vectorized=form, center_loss_weight=0.3)
        for form in (False, True)
    )
    params = random_params(plain)
    Checkpoints('plain').save(1, plain, *params, {}, {})
    mx.model.save_checkpoint('fast', 1, fast, *params)
    images = sample.val_images[:20]
    for measured, expected in zip(embed('fast', 1, images), embed('plain', 1, images), strict=True):
        np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-4)
    assert center_loss_weight('fast') == center_loss_weight('plain') == 0.3


def test_other_image_size():
    save_untrained('large', train.get_symbol(num_classes=47), size=32)
    images = np.zeros((5, 32, 32), np.uint8)
    embeddings, logits = embed('large', 1, images)
    assert embeddings.shape == (5, 2) and logits.shape == (5, 47)
    with pytest.raises(InputError, match=r'network of train\.py for images of 28 x 28 pixels'):
        embed('large', 1, images[:, :28, :28])


@pytest.mark.parametrize(
    'images',
    [
        np.zeros((2, 28, 28), 'f'),
        np.zeros((2, 28, 28, 3), np.uint8),
        np.zeros((28, 28), np.uint8),
        np.zeros((0, 28, 28), np.uint8),
    ],
)
def test_wrong_images(images, runs):
    with pytest.raises(InputError, match='images to embed have to be uint8 of shape'):
        embed(runs / 'small', 1, images)


def test_missing_epoch(runs, sample):
    with pytest.raises(InputError, match=r'there is no .*small-0009\.params'):
        embed(runs / 'small', 9, sample.val_images)


def test_embedding_that_is_a_convolution(sample, tmp_path):
    """Whose output is (B, 2, 1, 1)."""
    net = mx.sym.Convolution(mx.sym.var('data'), kernel=(28, 28), num_filter=2, name='embedding')
    net = mx.sym.FullyConnected(net, num_hidden=10, name='fc2')
    save_untrained(tmp_path / 'run', mx.sym.SoftmaxOutput(net, name='softmax'))
    with pytest.raises(InputError, match=r'are not a network of train\.py'):
        embed(tmp_path / 'run', 1, sample.val_images[:10])


def test_missing_symbol(runs, sample, tmp_path):
    (tmp_path / 'alone-0001.params').write_bytes((runs / 'small-0001.params').read_bytes())
    with pytest.raises(InputError, match=r'alone-symbol\.json'):
        embed('alone', 1, sample.val_images)


@pytest.mark.parametrize('prefix', ['other', 'small_of_other'])
def test_other_network(prefix, runs, sample, tmp_path):
    """A network without an embedding, and parameters of another network than the symbol's."""
    for source, name in (('small', 'symbol.json'), ('other', '0001.params')):
        (tmp_path / f'small_of_other-{name}').write_bytes((runs / f'{source}-{name}').read_bytes())
    folder = runs if prefix == 'other' else tmp_path
    with pytest.raises(InputError, match=r'are not a network of train\.py for images of 28'):
        embed(folder / prefix, 1, sample.val_images[:10])


def test_not_finite(sample):
    symbol = small_network()
    arg_params, aux_params = random_params(symbol)
    arg_params['embedding_bias'][:] = np.nan
    Checkpoints('nan').save(1, symbol, arg_params, aux_params, {}, {})
    with pytest.raises(InputError, match=r'nan-0001\.params embeds images as numbers that are not'):
        embed('nan', 1, sample.val_images[:10])


def test_center_loss_weight(runs):
    assert center_loss_weight(runs / 'small') == 0.1
    assert center_loss_weight(runs / 'other') is None


def test_evaluate(runs, sample):
    images, labels = sample.val_images[::4], sample.val_labels[::4]
    measured = evaluate(runs / 'small', 1, images, labels)
    embeddings, probability = embed_by_hand(runs / 'small', 1, images)
    np.testing.assert_allclose(measured.embeddings, embeddings, atol=1e-4)
    assert measured.accuracy == np.mean(probability.argmax(axis=1) == labels)
    assert measured.clusters == pytest.approx(statistics_by_hand(embeddings, labels), rel=1e-4)
    assert (measured.seen, measured.num_classified) == (tuple(range(10)), 250)
    assert measured.verification == {}


def test_evaluate_unseen_classes(runs, sample):
    images, labels = sample.val_images[::4], sample.val_labels[::4]
    measured = evaluate(runs / 'six', 1, images, labels)
    _, probability = embed_by_hand(runs / 'six', 1, images)
    seen = labels < 6
    assert measured.accuracy == np.mean(probability.argmax(axis=1)[seen] == labels[seen])
    assert (measured.seen, measured.num_classified) == (tuple(range(6)), seen.sum())
    assert measured.verification == verify(measured.embeddings[~seen], labels[~seen])
    by_hand = statistics_by_hand(measured.embeddings, labels)  # of all classes
    assert measured.clusters == pytest.approx(by_hand, rel=1e-4)
    only_unseen = evaluate(runs / 'six', 1, images[~seen], labels[~seen])
    assert math.isnan(only_unseen.accuracy) and only_unseen.num_classified == 0
    one_unseen = labels < 7
    assert evaluate(runs / 'six', 1, images[one_unseen], labels[one_unseen]).verification == {}


@pytest.mark.parametrize('dimensions', [2, 5])
def test_statistics(dimensions):
    rng = np.random.default_rng(dimensions)
    labels = rng.integers(0, 10, 500)
    embeddings = rng.normal(size=(500, dimensions)) + 5 * rng.normal(size=(10, dimensions))[labels]
    expected = statistics_by_hand(embeddings.astype('f'), labels)
    assert cluster_statistics(embeddings.astype('f'), labels) == pytest.approx(expected, rel=1e-6)


def test_statistics_of_known_clusters():
    corners = np.array([[0, 0], [0, 2], [10, 0], [10, 2]], 'f')
    assert cluster_statistics(corners, np.array([3, 3, 7, 7])) == pytest.approx((1, 10, 0.1))
    triangle = np.array([[0, 0], [3, 0], [0, 4]], 'f')  # distances 3, 4, 5
    assert cluster_statistics(triangle, np.array([0, 1, 2])) == pytest.approx((0, 4, 0))
    # Every image counts the same, not every class.
    uneven = np.array([[-1, 0], [1, 0], [-1, 0], [1, 0], [100, -7], [100, 7]], 'f')
    measured = cluster_statistics(uneven, np.array([0, 0, 0, 0, 1, 1]))
    assert measured == pytest.approx((3, 100, 0.03))


def test_undefined_statistics():
    one_class = cluster_statistics(np.array([[0, 0], [0, 2]], 'f'), np.array([3, 3]))
    assert one_class.intra == 1 and np.isnan(one_class[1:]).all()
    one_point = cluster_statistics(np.zeros((4, 2), 'f'), np.array([0, 0, 1, 1]))
    assert one_point[:2] == (0, 0) and np.isnan(one_point.ratio)


@pytest.mark.parametrize('dimensions, step', [(2, 0.5), (3, 0), (20, 0)])
def test_verification(dimensions, step):
    """On a coarse grid, of this step, many pairs are equally far."""
    rng = np.random.default_rng(dimensions)
    labels = rng.integers(6, 10, 40)
    means = 3 / math.sqrt(dimensions) * rng.normal(size=(10, dimensions))
    embeddings = (rng.normal(size=(40, dimensions)) + means[labels]).astype('f')
    if step:
        embeddings = np.round(embeddings / step) * step
    measured = verification(embeddings, labels)
    expected = verification_by_hand(embeddings, labels, lambda x, y: np.linalg.norm(x - y))
    assert measured == pytest.approx(expected)
    assert 0.5 < measured.auc < 1 and 0 < measured.true_accepts < 1


@pytest.mark.parametrize('dimensions', [3, 20])
def test_verify(dimensions, monkeypatch):
    rng = np.random.default_rng(dimensions)
    labels = rng.integers(6, 10, 40)
    means = rng.normal(size=(10, dimensions))
    embeddings = (rng.normal(size=(40, dimensions)) + means[labels]).astype('f')
    measured = verify(embeddings, labels)
    distances = {
        'Euclidean': lambda x, y: np.linalg.norm(x - y),
        'cosine': lambda x, y: -x @ y / np.linalg.norm(x) / np.linalg.norm(y),
    }
    assert list(measured) == list(distances)
    for name, distance in distances.items():
        assert measured[name] == pytest.approx(verification_by_hand(embeddings, labels, distance))

    assert evaluation.VERIFIED_IMAGES == 4000
    monkeypatch.setattr(evaluation, 'VERIFIED_IMAGES', 30)
    sample = np.random.default_rng(0).permutation(40)[:30]
    for name, distance in distances.items():
        by_hand = verification_by_hand(embeddings[sample], labels[sample], distance)
        assert verify(embeddings, labels)[name] == pytest.approx(by_hand)


def test_verification_limits():
    labels = np.array([6, 6, 7, 7])
    assert verification(np.array([[0, 0], [0, 1], [9, 0], [9, 1]], 'f'), labels) == (1, 1)
    assert verification(np.array([[0, 0], [9, 0], [0, 0], [9, 0]], 'f'), labels) == (0.25, 0)
    assert verification(np.zeros((4, 2), 'f'), labels) == (0.5, 0)
    assert np.isnan(verification(np.eye(4, 2, dtype='f'), np.full(4, 9))).all()
    assert np.isnan(verification(np.zeros((0, 2), 'f'), np.zeros(0))).all()
    assert verify(np.zeros((4, 2), 'f'), labels)['cosine'] == (0.5, 0)


@pytest.mark.parametrize('options, expected', [({}, 1), ({'scale': 'x'}, None)])
def test_lambda_that_is_not_there(options, expected):
    inputs = mx.sym.var('data'), mx.sym.var('center_label')
    symbol = mx.sym.Custom(*inputs, op_type='centerloss', num_class=3, name='c', **options)
    Checkpoints('run').save(1, symbol, {}, {}, {}, {})
    assert center_loss_weight('run') == expected


def test_intra_far_from_the_origin():
    embeddings = (1e4 + np.random.default_rng(0).normal(size=(4000, 2))).astype('f')
    intra = np.linalg.norm(embeddings - embeddings.mean(axis=0, dtype=float), axis=1).mean()
    measured = cluster_statistics(embeddings, np.zeros(4000))
    assert measured.intra == pytest.approx(intra, rel=1e-6)
