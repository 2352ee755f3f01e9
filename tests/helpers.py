"""What several test files share: a small network, small runs of it, comparisons of results."""

import functools
import os
from pathlib import Path
import re
import subprocess
import sys

import numpy as np

from common.environment import mx
from common.checkpoints import Checkpoints
from common.module import Module
import data
from train_model import fit

ROOT = Path(__file__).resolve().parent.parent
LABELS = ['softmax_label', 'center_label']
NUM_BATCHES = 20  # of 50 images, in an epoch of train_small


def small_network(embedding_dim=2, hidden=16, weight=0.1, label=None, num_classes=10):
    net = mx.sym.flatten(mx.sym.var('data'))
    net = mx.sym.FullyConnected(net, num_hidden=hidden, name='fc1')
    net = mx.sym.Activation(net, act_type='tanh')
    embedding = mx.sym.FullyConnected(net, num_hidden=embedding_dim, name='embedding')
    logits = mx.sym.FullyConnected(embedding, num_hidden=num_classes, name='fc2')
    center = mx.sym.Custom(
        data=embedding,
        label=mx.sym.var('center_label') if label is None else label,
        op_type='centerloss',
        name='center_loss',
        num_class=num_classes,
        scale=weight,
        normalization='null',
    )
    return mx.sym.Group([mx.sym.SoftmaxOutput(logits, name='softmax'), center])


def small_data(num_examples=1000, seed=0, **options):
    """What ``fit`` takes: the first so many bundled digits, validated on the 1,000 others."""
    return functools.partial(
        data.mnist_iterator, dataset='mnist-5k', num_examples=num_examples, seed=seed, **options
    )


def train_small(network=None, num_examples=1000, **options):
    """Three epochs of 20 batches of the small network, written to run-*; returns the module."""
    options = {
        'data': small_data(num_examples, options.get('seed', 0)),
        'batch_size': 50,
        'num_epochs': 3,
        'lr': 0.1,
        'warmup_epochs': 1,
        'clip_gradient': 0.05,
        'save_model_prefix': 'run',
        **options,
    }
    return fit(small_network() if network is None else network, options.pop('data'), **options)


def digits(count, first=0):
    """Embedded training images (count, 1, 28, 28), as the network takes them, and their labels."""
    sample = data.load_digits('mnist-5k')
    part = slice(first, first + count)
    return (
        sample.train_images[part, None].astype('f') / 256,
        sample.train_labels[part].astype('f'),
    )


def make_module(network, batch_size, initializer=None, devices=1, seed=0):
    """Bind a network to images of MNIST and initialize it."""
    module = Module(network, label_names=LABELS, context=[mx.cpu(i) for i in range(devices)])
    module.bind([('data', (batch_size, 1, 28, 28))], [(name, (batch_size,)) for name in LABELS])
    mx.random.seed(seed)
    module.init_params(initializer or mx.init.Xavier(magnitude=1))
    return module


def numpy_params(module):
    arg_params, aux_params = module.get_params()
    return {name: value.asnumpy() for name, value in {**arg_params, **aux_params}.items()}


def saved_params(prefix, epoch):
    """Weights and centers of a checkpoint by name."""
    arg_params, aux_params = Checkpoints(prefix).load_params(epoch)
    return {name: value.asnumpy() for name, value in {**arg_params, **aux_params}.items()}


def saved_state(prefix, epoch):
    """What training goes on from besides: the optimizer's state, the last step's weights."""
    return {name: value.asnumpy() for name, value in Checkpoints(prefix).load(epoch).state.items()}


def assert_same_arrays(measured, expected):
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(measured[name], value, err_msg=name)


def assert_same_checkpoints(measured, expected, epochs):
    """Compare parameters and states of two prefixes bit for bit."""
    for epoch in epochs:
        assert_same_arrays(saved_params(measured, epoch), saved_params(expected, epoch))
        assert_same_arrays(saved_state(measured, epoch), saved_state(expected, epoch))


def epoch_lines(path='log.txt'):
    """The lines of a log that are of an epoch, without times and speeds."""
    return [
        re.sub(r'Speed: \S+|Time cost=\S+|^\S+ \S+ ', '', line)
        for line in Path(path).read_text().splitlines()
        if 'Epoch[' in line
    ]


def logged(name, path='log.txt'):
    """The numbers of one name in a log, such as Validation-accuracy, in order."""
    return [float(value) for value in re.findall(rf' {name}=(\S+)', Path(path).read_text())]


def run_python(*arguments, cwd=None, unset=(), **environment):
    """Run ``python ARGUMENTS`` with an environment that is changed by names and values."""
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_train(*options, cwd):
    """Run ``python train.py OPTIONS`` as a user types it."""
    return run_python(ROOT / 'train.py', *options, cwd=cwd)
