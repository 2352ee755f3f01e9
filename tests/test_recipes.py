"""Recipes, initial weights, and seeds."""

import argparse
import math

import numpy as np
import pytest

from common.environment import mx
from common.errors import InputError
from helpers import digits, make_module, numpy_params, saved_params, small_network, train_small
import train
from train_model import independent_seed

OPTIONS = ('initializer', 'initial_embedding', 'num_epochs', 'lr', 'lr_factor', 'lr_factor_epoch')
OPTIONS += ('average_weights', 'warmup_epochs', 'clip_gradient', 'embedding_lr_mult')
OPTIONS += ('center_loss_weight',)
TUNED = ('small-head', 'discriminants', 8, 0.1, 1, 1, 0.1, 1, 0.05, 0.05, 0.01)
ORIGINAL = ('original', 'random', 20, 0.01, 0.5, 20, 0, 0, 0, 1)
RECIPES = {
    '': TUNED,
    '--recipe=tuned': TUNED,
    '--network=lenet++': ('xavier', 'random', 20, 0.01, 0.1, 10, 0, 1, 0, 0.1, 0.01),
    '--recipe=original': (*ORIGINAL, 0.01),
    '--recipe=original --batch-size=128': (*ORIGINAL, 0.0078125),
    '--network=lenet++ --lr=0.05 --clip-gradient=1': (
        *('xavier', 'random', 20, 0.05, 0.1, 10, 0, 1, 1, 0.1, 0.01),
    ),
    '--recipe=original --initializer=xavier --initial-embedding=discriminants --num-epochs=9 '
    '--lr=0.1 --lr-factor=1 --lr-factor-epoch=3 --average-weights=0.2 --warmup-epochs=2 '
    '--clip-gradient=5 --embedding-lr-mult=0.5 --center-loss-weight=0': (
        *('xavier', 'discriminants', 9, 0.1, 1, 3, 0.2, 2, 5, 0.5, 0),
    ),
}


@pytest.mark.parametrize('line', RECIPES)
def test_recipe(line):
    args = train.parse_args(line.split())
    assert tuple(getattr(args, name) for name in OPTIONS) == RECIPES[line]
    assert (args.momentum, args.wd, args.alpha) == (0.9, 5e-4, 0.5)


def test_original_is_lenet():
    with pytest.raises(InputError, match=r'--recipe=original is for lenet: leave out --network='):
        train.parse_args(['--recipe=original', '--network=lenet++'])


def test_mixed_has_gone():
    with pytest.raises(InputError, match=r'mixed was not what it said and is gone: .*original'):
        train.parse_args(['--initializer=mixed'])


def test_help_shows_recipes(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(['--help'])
    shown = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in shown if line.startswith('  --')]
    assert ['--lr', '0.1', '0.01', '0.01'] in rows
    assert ['--initializer', 'small-head', 'xavier', 'original'] in rows
    assert ['--center-loss-weight', '0.01', '0.01', '1/B'] in rows


def initial_values(initializer, name, shape, seeds):
    """Values of a parameter from so many seeds."""
    array, found = mx.nd.zeros(shape), []
    for seed in range(seeds):
        mx.random.seed(independent_seed(seed))
        initializer(mx.init.InitDesc(name), array)
        found.append(array.asnumpy())
    return np.array(found)


@pytest.mark.parametrize(
    'layer, std',
    [
        ('conv1', 0.0632),
        ('conv2', 0.04),
        ('fc1', 0.0632),
        ('embedding', 1),
        pytest.param('fc2', 0.001, marks=pytest.mark.slow),  # 500 seeds
    ],
)
def test_original_initial_weights(layer, std):
    network = train.get_symbol()
    shapes, _, _ = network.infer_shape(data=(100, 1, 28, 28))
    shape = dict(zip(network.list_arguments(), shapes, strict=True))[f'{layer}_weight']
    initializer = train.INITIALIZERS['original']
    seeds = max(2, math.ceil(10_000 / math.prod(shape)))  # a standard error is 0.7% then
    weights = initial_values(initializer, f'{layer}_weight', shape, seeds)
    assert weights.std() == pytest.approx(std, rel=0.02)
    assert abs(weights.mean()) < 0.02 * std
    assert np.abs(weights).max() > 3 * std, 'not a normal distribution'
    assert not initial_values(initializer, f'{layer}_bias', shape[:1], 2).any()


@pytest.mark.slow
@pytest.mark.parametrize('network', train.NETWORKS)
@pytest.mark.parametrize('initializer', train.INITIALIZERS)
def test_seeds_are_independent(initializer, network):
    """Less than 1% of a layer's initial weights are another seed's, wherever they stand in it."""
    weights = {}
    module = make_module(train.get_symbol(network=network), 1)
    for seed in (0, 1, 101, 102):
        mx.random.seed(independent_seed(seed))
        module.init_params(train.INITIALIZERS[initializer], force_init=True)
        weights[seed] = {
            name: value.view(np.uint32)
            for name, value in numpy_params(module).items()
            if name.endswith('weight')
        }
    assert len(weights[0]) == (5 if network == 'lenet' else 8)
    for first, second in ((0, 1), (101, 102), (1, 101)):
        for name in weights[0]:
            shared = np.isin(weights[second][name], weights[first][name]).mean()
            assert shared < 0.01, (name, first, second)


@pytest.mark.parametrize('initializer', [None, train.INITIALIZERS['small-head']])
def test_fit_has_independent_seeds(initializer, in_own_folder):
    """Also what MXNet shares between 0 and 1 with its own seeds, and the default initializer."""
    found = []
    for seed in (0, 1):
        train_small(
            small_network(hidden=64),
            initializer=initializer,
            seed=seed,
            num_epochs=1,
            num_examples=50,
            lr=1e-30,
        )
        found.append(saved_params('run', 1)['fc1_weight'].view(np.uint32))
    assert np.isin(*found).mean() < 0.01
    shared = []
    for seed in (0, 1):
        mx.random.seed(seed)
        module = make_module(small_network(hidden=64), 1, initializer, seed=seed)
        shared.append(numpy_params(module)['fc1_weight'].view(np.uint32))
    assert np.isin(*shared).mean() > 0.5, 'this measure would not see a shift'


def test_small_head_begins_alike():
    """Not the initial weights but the images decide where a class comes to lie."""
    images, _ = digits(200)
    spread = {}
    for initializer in ('xavier', 'small-head'):
        module = make_module(train.get_symbol(), len(images), train.INITIALIZERS[initializer])
        batch = mx.io.DataBatch([mx.nd.array(images)], [mx.nd.zeros(len(images))] * 2)
        module.forward(batch, is_train=False)
        probabilities = module.get_outputs()[0].asnumpy()
        spread[initializer] = probabilities.max() - probabilities.min()
    assert 1e-5 < spread['small-head'] < 0.2 * spread['xavier'] < 0.1


@pytest.mark.parametrize('initializer', train.INITIALIZERS)
def test_slopes_and_he(initializer):
    """LeNet++'s slopes begin at 0.25, its convolutions at He's scale, whatever the initializer."""
    module = make_module(
        train.get_symbol(network='lenet++'), 1, train.INITIALIZERS[initializer], seed=1
    )
    params = numpy_params(module)
    slopes = [name for name in params if name.endswith('slope')]
    assert len(slopes) == 6 and all((params[name] == 0.25).all() for name in slopes)
    for name in ('conv1_2_weight', 'conv3_2_weight'):
        fan_in = params[name][0].size
        assert params[name].std() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02), name


def test_slopes_have_no_decay():
    network = train.get_symbol(network='lenet++')
    module = make_module(network, 4)
    before = numpy_params(module)
    images, labels = digits(4)
    module.init_optimizer(kvstore=None, optimizer_params={'learning_rate': 0.01, 'wd': 5})
    label = mx.nd.array(labels)
    module.forward_backward(mx.io.DataBatch([mx.nd.array(images)], [label, label]))
    module.update()
    after = numpy_params(module)
    for name, decay in (('prelu3_1_slope', 0), ('conv3_2_weight', 5)):
        gradient = module._exec_group.execs[0].grad_dict[name].asnumpy()
        assert np.abs(gradient).max() > 0
        step = 0.01 * (gradient / 4 + decay * before[name])
        np.testing.assert_allclose(
            before[name] - after[name], step, rtol=1e-3, atol=1e-7, err_msg=name
        )


def test_lenet_follows_initializer():
    """Initial weights of LeNet are the initializer's, not the symbol's."""
    assert not [
        name for name, value in train.get_symbol().attr_dict().items() if '__init__' in value
    ]


def test_every_initializer_is_an_option():
    for name in train.INITIALIZERS:
        assert train.parse_args([f'--initializer={name}']).initializer == name
    assert isinstance(train.parse_args(), argparse.Namespace)
