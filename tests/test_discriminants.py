"""The initial embedding: Fisher's linear discriminants of the features of real digits."""

import itertools
import logging

import numpy as np
import pytest

from common.environment import mx
from common.discriminants import SHRINKAGE, discriminant_params, fisher_discriminants
from common.errors import InputError
from data import mnist_iterator
from helpers import LABELS
from train import INITIALIZERS, get_symbol

INITIALIZER = INITIALIZERS['small-head']


def test_constants(caplog):
    """Those of the documentation, which the measured results have."""
    caplog.set_level(logging.INFO)
    train, _ = mnist_iterator(100, dataset='mnist-5k')
    discriminant_params(get_symbol(), train, INITIALIZER)
    assert 'as linear discriminants of 4000 images' in caplog.text  # all: fewer than 5,000
    assert SHRINKAGE == 0.1


def test_directions_maximize_the_ratio():
    """Of the spread of the class means to that within the classes, which are correlated."""
    rng = np.random.default_rng(0)
    labels = np.arange(600) % 4
    means = 2 * rng.normal(size=(4, 6))
    features = rng.normal(size=(600, 6)) @ rng.normal(size=(6, 6)) + means[labels]
    directions = fisher_discriminants(features, labels)
    assert directions.shape == (3, 6)
    classes = [features[labels == label] for label in range(4)]
    within = sum(np.cov(members.T, bias=True) for members in classes) / 4
    within += SHRINKAGE * np.trace(within) / 6 * np.eye(6)
    means = np.stack([members.mean(axis=0) for members in classes])
    between = (means - means.mean(axis=0)).T @ (means - means.mean(axis=0))
    ratios = np.array([w @ between @ w / (w @ within @ w) for w in directions])
    np.testing.assert_allclose(
        between @ directions.T, within @ directions.T * ratios, rtol=1e-6, atol=1e-9
    )
    largest = np.linalg.eigvals(np.linalg.solve(within, between)).real.max()
    assert (np.diff(ratios) < 0).all() and ratios[0] == pytest.approx(largest)
    other_names = fisher_discriminants(features, 7 - labels)
    np.testing.assert_allclose(abs(other_names), abs(directions), rtol=1e-6)


def test_few_images():
    """Fewer images than features, and one image of a class."""
    rng = np.random.default_rng(1)
    directions = fisher_discriminants(rng.normal(size=(5, 50)), np.array([0, 0, 1, 1, 4]))
    assert directions.shape == (2, 50)
    assert np.isfinite(directions).all()


def test_one_image_of_each_class():
    """Their differences are the directions."""
    images = np.array([[1.0, 0, 0], [-1, 0, 0]])
    (direction,) = fisher_discriminants(images, np.array([0, 1]))
    assert abs(direction[0]) > 0 and not direction[1:].any()


def test_images_that_are_all_the_same():
    """The weights stay the initializer's."""
    train, _ = mnist_iterator(100, dataset='mnist-5k')
    train.images = np.zeros_like(train.images)
    mx.random.seed(3)
    found = discriminant_params(get_symbol(), train, INITIALIZER)['embedding_weight'].asnumpy()
    mx.random.seed(3)
    module = mx.mod.Module(get_symbol(), label_names=LABELS)
    module.bind(train.provide_data, train.provide_label)
    module.init_params(INITIALIZER)
    np.testing.assert_array_equal(found, module.get_params()[0]['embedding_weight'].asnumpy())


def test_layer_of_another_name():
    train, _ = mnist_iterator(100, dataset='mnist-5k')
    with pytest.raises(InputError, match='the network has no layer features to begin as linear'):
        discriminant_params(get_symbol(), train, INITIALIZER, layer='features')


def test_layer_behind_a_convolution():
    """Which flattens what it gets."""
    train, _ = mnist_iterator(100, dataset='mnist-5k', num_examples=300)
    net = mx.sym.Convolution(mx.sym.var('data'), kernel=(5, 5), stride=(4, 4), num_filter=3)
    net = mx.sym.FullyConnected(net, num_hidden=2, name='embedding')
    labels = [mx.sym.BlockGrad(mx.sym.var(desc.name)) for desc in train.provide_label]
    found = discriminant_params(mx.sym.Group([net, *labels]), train, INITIALIZER)
    assert found['embedding_weight'].shape == (2, 3 * 6 * 6)


def test_layer_that_is_a_convolution():
    train, _ = mnist_iterator(100, dataset='mnist-5k', num_examples=300)
    net = mx.sym.Convolution(mx.sym.var('data'), kernel=(28, 28), num_filter=2, name='embedding')
    labels = [mx.sym.BlockGrad(mx.sym.var(desc.name)) for desc in train.provide_label]
    with pytest.raises(InputError, match='the layer embedding is not dense'):
        discriminant_params(mx.sym.Group([net, *labels]), train, INITIALIZER)


def begin(**options):
    """Return a network, its initial parameters with discriminants, and random ones."""
    train, val = mnist_iterator(100, dataset='mnist-5k')
    network = get_symbol(**options)
    mx.random.seed(3)
    params = discriminant_params(network, train, INITIALIZER)
    mx.random.seed(3)
    module = mx.mod.Module(network, label_names=['softmax_label', 'center_label'])
    module.bind(train.provide_data, train.provide_label)
    module.init_params(INITIALIZER)
    return network, params, module.get_params()[0], val


def embeddings(network, params, val):
    """Embed the validation images: (N, d), and their labels."""
    embed = mx.mod.Module(network.get_internals()['embedding_output'], label_names=None)
    embed.bind(val.provide_data, for_training=False)
    embed.set_params(params, {}, allow_extra=True)
    val.reset()
    labels = np.concatenate([batch.label[0].asnumpy() for batch in val])
    val.reset()
    return embed.predict(val).asnumpy(), labels.astype(int)


def separation(x, labels):
    """Return the mean distance of two class means over that of an image to its class's."""
    means = np.stack([x[labels == label].mean(axis=0) for label in range(10)])
    intra = np.linalg.norm(x - means[labels], axis=1).mean()
    distances = [np.linalg.norm(p - q) for p, q in itertools.combinations(means, 2)]
    return np.mean(distances) / intra


def test_digits_are_separated():
    """Images that the discriminants have not seen, and better than by random weights."""
    network, params, random, val = begin()
    x, labels = embeddings(network, params, val)
    assert abs(x.mean(axis=0)).max() < 0.05  # around the origin
    assert separation(x, labels) > 2.5 * separation(*embeddings(network, random, val))


@pytest.mark.parametrize('options', [{}, {'no_bias': True}, {'embedding_dim': 12}])
def test_everything_else_is_the_initializers(options):
    _, params, random, _ = begin(**options)
    assert params.keys() == random.keys()
    for name in params.keys() - {'embedding_weight', 'embedding_bias'}:
        np.testing.assert_array_equal(params[name].asnumpy(), random[name].asnumpy(), name)
    weight, before = (p['embedding_weight'].asnumpy() for p in (params, random))
    np.testing.assert_allclose(
        np.linalg.norm(weight, axis=1), np.linalg.norm(before, axis=1), rtol=1e-5
    )
    assert not np.isclose(weight[:9], before[:9]).all(axis=1).any()
    np.testing.assert_array_equal(weight[9:], before[9:])  # ten classes have nine discriminants
