"""``fit``: continued runs, options, validation, use as a library, divergence, disks, signals."""

import contextlib
import json
import logging
import os
from pathlib import Path
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from common.environment import mx
from common.averaging import Average
from common.checkpoints import Checkpoints
from common.discriminants import discriminant_params
from common.errors import InputError
from common.module import Module
from common.monitoring import Diverged
import data
from helpers import (
    LABELS,
    NUM_BATCHES,
    ROOT,
    assert_same_arrays,
    assert_same_checkpoints,
    digits,
    epoch_lines,
    logged,
    numpy_params,
    run_python,
    run_train,
    saved_params,
    saved_state,
    small_data,
    small_network,
    train_small,
)
import train
import train_model
from train_model import count_batches, fit, lr_schedule

pytestmark = pytest.mark.usefixtures('in_own_folder')


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """Three epochs in one go: the run that every stopped and continued one has to equal."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    train_small(save_model_prefix=str(folder / 'run'), log_dir=str(folder))
    return folder


def learning_rates(found):
    """Return a batch-end callback that notes (epoch, batch, learning rate of that step)."""

    def note(param):
        optimizer = param.locals['self']._optimizer
        found.append((param.epoch, param.nbatch, optimizer.learning_rate))

    return note


# ---- repetitions and continued runs


def test_same_seed_same_run(uninterrupted):
    train_small()
    assert_same_checkpoints('run', uninterrupted / 'run', (1, 2, 3))
    assert epoch_lines() == epoch_lines(uninterrupted / 'log.txt')
    train_small(save_model_prefix='other', seed=1, num_epochs=1)
    other, own = saved_params('other', 1), saved_params('run', 1)
    assert (other['fc1_weight'] != own['fc1_weight']).any()


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'average_weights': 0.3},
        {'optimizer': 'adam', 'lr': 0.01},
        {'initial_params': discriminant_params},
        pytest.param({'optimizer': 'nag', 'average_weights': 1}, marks=pytest.mark.slow),
        pytest.param({'momentum': 0}, marks=pytest.mark.slow),
    ],
    ids=lambda options: '-'.join(options) or 'sgd',
)
@pytest.mark.parametrize('devices', [1, 2])
def test_resume_is_exact(devices, options):
    """Weights, centers, state, and every line of the log; the learning rate falls on the way."""
    options = {'devices': [mx.cpu(i) for i in range(devices)], 'lr_factor_epoch': 1.5, **options}
    train_small(save_model_prefix='whole', log_file='whole.txt', **options)
    for epoch in (1, 2, 3):
        train_small(num_epochs=epoch, resume=True, **options)
    assert_same_checkpoints('run', 'whole', (1, 2, 3))
    assert epoch_lines() == epoch_lines('whole.txt')


def test_initial_params_are_of_new_runs(uninterrupted):
    """Given by name; the other ones are the initializer's. Loaded weights stay."""

    def ones(network, train, initializer):
        assert network.list_outputs() and len(next(train).label) == 2
        return {'embedding_bias': mx.nd.ones(2)}

    options = {'lr': 1e-9, 'num_epochs': 1}
    train_small(save_model_prefix='random', **options)
    train_small(initial_params=ones, **options)
    random, ours = saved_params('random', 1), saved_params('run', 1)
    np.testing.assert_allclose(ours['embedding_bias'], 1, atol=1e-6)
    np.testing.assert_allclose(ours['fc1_weight'], random['fc1_weight'], atol=1e-6)
    options = {'model_prefix': 'random', 'load_epoch': 1, 'save_model_prefix': 'loaded'}
    train_small(initial_params=ones, lr=1e-9, num_epochs=2, **options)
    loaded = saved_params('loaded', 2)
    np.testing.assert_allclose(loaded['embedding_bias'], random['embedding_bias'], atol=1e-6)


def test_resume_from_nothing(uninterrupted):
    train_small(resume=True)
    assert_same_checkpoints('run', uninterrupted / 'run', (1, 2, 3))
    assert (
        'no checkpoint of run to resume from: starting at the beginning'
        in Path('log.txt').read_text()
    )


def test_resume_of_a_finished_run(uninterrupted, caplog):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.glob('run*')}
    module = train_small(save_model_prefix=str(uninterrupted / 'run'), resume=True)
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.glob('run*')} == before
    assert 'has all of the 3 epochs already: raise --num-epochs' in caplog.text
    assert module.validation_scores == {}


def test_resume_passes_over_damage(uninterrupted, caplog):
    train_small(num_epochs=2)
    content = bytearray(Path('run-0002.params').read_bytes())
    content[len(content) // 2] ^= 1
    Path('run-0002.params').write_bytes(content)
    train_small(resume=True)
    assert 'run-0002.params is damaged' in caplog.text
    assert 'resuming from run-0001.params' in caplog.text
    assert_same_checkpoints('run', uninterrupted / 'run', (1, 2, 3))


def test_changed_options_are_reported(caplog):
    train_small(num_epochs=1, record={'alpha': 0.5})
    train_small(
        num_epochs=2,
        resume=True,
        lr=0.05,
        num_examples=500,
        record={'alpha': 0.1, 'data_dir': 'elsewhere'},
    )
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        'resuming with alpha=0.1, while run-0001.params was trained with 0.5',
        'resuming with batches_per_epoch=10, while run-0001.params was trained with 20',
        'resuming with lr=0.05, while run-0001.params was trained with 0.1',
    ]


def test_resume_needs_the_same_network():
    train_small(num_epochs=1)
    with pytest.raises(
        InputError, match=r'run-0001.params is a checkpoint of another network: .*embedding_weight'
    ):
        train_small(small_network(embedding_dim=3), resume=True)


def test_resume_from_unaveraged(uninterrupted):
    """And the other way round: training goes on from the last step."""
    train_small(num_epochs=1, average_weights=0.5)
    train_small(resume=True)
    assert_same_checkpoints('run', uninterrupted / 'run', (2, 3))
    train_small(save_model_prefix='mixed', num_epochs=1)
    train_small(save_model_prefix='mixed', num_epochs=2, resume=True, average_weights=0.5)
    last = {
        name.split(':', 2)[2]: value
        for name, value in saved_state('mixed', 2).items()
        if name.startswith('last:')
    }
    assert_same_arrays(last, saved_params(uninterrupted / 'run', 2))


def test_resuming_advises_no_resume(caplog):
    """Where nothing can be resumed."""
    train_small(num_epochs=1)
    Path('run-0001.json').unlink()
    train_small(num_epochs=1, resume=True)
    assert 'no checkpoint of run to resume from' in caplog.text
    assert 'give --resume' not in caplog.text


def test_new_run_replaces_the_old(caplog):
    train_small()
    train_small(save_model_prefix='running', num_epochs=1)
    train_small(num_epochs=2, seed=3)
    assert 'checkpoints of an earlier run of run (3) are replaced' in caplog.text
    assert Checkpoints('run').epochs() == [1, 2]
    assert Checkpoints('running').epochs() == [1]
    assert not list(Path().glob('run-0003*'))


@pytest.mark.slow
@pytest.mark.parametrize('keep', [1, 2, 4, 9])
def test_keep_checkpoints(keep):
    """Only those of this run count, also when it is resumed; an earlier run's go at once."""
    train_small(num_epochs=5, num_examples=50)
    train_small(num_epochs=3, num_examples=50, seed=1, keep_checkpoints=keep)
    assert Checkpoints('run').epochs() == [1, 2, 3][-keep:]
    train_small(num_epochs=6, num_examples=50, seed=1, keep_checkpoints=keep, resume=True)
    assert Checkpoints('run').epochs() == [1, 2, 3, 4, 5, 6][-keep:]
    train_small(save_model_prefix='whole', num_epochs=6, num_examples=50, seed=1)
    assert_same_checkpoints('run', 'whole', [6])


def test_keep_checkpoints_keeps_the_one_that_was_loaded():
    train_small(num_epochs=1, num_examples=50)
    train_small(num_epochs=3, num_examples=50, keep_checkpoints=1, load_epoch=1)
    assert Checkpoints('run').epochs() == [1, 3]
    train_small(num_epochs=4, num_examples=50, keep_checkpoints=1, resume=True)
    assert Checkpoints('run').epochs() == [1, 4]


# ---- starting from a checkpoint that is loaded


def test_load_epoch_continues(uninterrupted, caplog):
    """Numbers, schedule and data go on; momentum does not, which is said."""
    caplog.set_level(logging.INFO)
    rates, expected = [], []
    schedule = {'lr_factor_epoch': 1.5, 'lr_factor': 0.5, 'warmup_epochs': 1.25}
    train_small(save_model_prefix='whole', **schedule, batch_end_callback=learning_rates(expected))
    train_small(num_epochs=1, **schedule)
    before = Path('run-0001.params').read_bytes()
    log = Path('log.txt').stat().st_size
    train_small(load_epoch=1, **schedule, batch_end_callback=learning_rates(rates))
    assert rates == [step for step in expected if step[0] >= 1]
    assert len({rate for _, _, rate in rates}) > 5
    assert Checkpoints('run').epochs() == [1, 2, 3]
    assert Path('run-0001.params').read_bytes() == before
    epochs = re.findall(r'Epoch\[(\d)\] Validation-accuracy', Path('log.txt').read_text()[log:])
    assert epochs == ['1', '2']
    assert 'run-0001.params: continuing at epoch 1; momentum begins at 0' in caplog.text
    assert 'run-0001.params: took fc1_weight, ' in caplog.text
    other, own = saved_params('whole', 2), saved_params('run', 2)
    assert (other['fc1_weight'] != own['fc1_weight']).any()


def test_load_epoch_without_momentum_is_exact():
    options = {'momentum': 0, 'lr_factor_epoch': 1.5}
    train_small(save_model_prefix='whole', **options)
    train_small(save_model_prefix='other', model_prefix='whole', load_epoch=2, **options)
    assert Checkpoints('whole').epochs() == [1, 2, 3]
    assert Checkpoints('other').epochs() == [3]
    assert_same_checkpoints('other', 'whole', [3])


def test_loaded_run_is_resumed(uninterrupted):
    """The command that is said after a stop, with --resume added, goes on from the newest."""
    options = {'model_prefix': str(uninterrupted / 'run'), 'load_epoch': 1}
    train_small(save_model_prefix='whole', **options)
    train_small(num_epochs=2, resume=True, **options)
    train_small(resume=True, **options)
    assert_same_checkpoints('run', 'whole', (2, 3))
    assert Checkpoints('run').epochs() == [2, 3]


@pytest.mark.parametrize(
    'options, said',
    [
        (
            {'load_epoch': 3},
            r'--num-epochs=3 is the last epoch: it has to be above --load-epoch=3',
        ),
        (
            {'load_epoch': 1},
            r'run has the epochs 2, 3 already: continue them with --resume, '
            r'or choose another --save-model-prefix',
        ),
        (
            {'load_epoch': 2, 'model_prefix': 'other'},
            r'run has the epochs 1, 2, 3 already: .*choose another --save-model-prefix',
        ),
        (
            {'load_epoch': 2, 'save_model_prefix': 'other'},
            r'there is no other-0002.params; epochs of other that have a checkpoint: none',
        ),
    ],
)
def test_load_epoch_is_refused(options, said, uninterrupted):
    for path in uninterrupted.glob('run*'):
        shutil.copy(path, path.name)
    before = {path.name: path.read_bytes() for path in Path().iterdir()}
    with pytest.raises(InputError, match=said):
        train_small(**options)
    assert {path.name: path.read_bytes() for path in Path().iterdir()} == before


def test_load_takes_what_fits(uninterrupted, caplog):
    caplog.set_level(logging.INFO)
    prefix = str(uninterrupted / 'run')
    wider = small_network(embedding_dim=3)
    train_small(wider, model_prefix=prefix, load_epoch=1, num_epochs=2, lr=1e-30)
    old, new = saved_params(prefix, 1), saved_params('run', 2)
    for name in ('fc1_weight', 'fc1_bias', 'fc2_bias'):
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)
    assert new['embedding_weight'].shape == (3, 16)
    assert new['center_loss_center_bias'].shape == (10, 3)
    for said in (
        r'run-0001.params: embedding_weight not taken, of shape \(2, 16\) where the network has '
        r'\(3, 16\)$',
        r'run-0001.params: center_loss_center_bias not taken, of shape \(10, 2\)',
        r'run-0001.params: took fc1_weight, fc1_bias, fc2_bias$',
    ):
        assert re.search(said, caplog.text, re.MULTILINE)


def test_load_takes_centers(uninterrupted):
    prefix = str(uninterrupted / 'run')
    network = small_network()
    train_small(
        network,
        model_prefix=prefix,
        load_epoch=1,
        num_epochs=2,
        num_examples=50,
        lr=1e-30,
    )
    old, new = saved_params(prefix, 1), saved_params('run', 2)
    centers = [params.pop('center_loss_center_bias') for params in (old, new)]
    assert_same_arrays(new, old)
    moved = np.abs(centers[1] - centers[0]).max()  # by one step
    assert 0 < moved < np.abs(centers[0]).max()


def test_load_of_another_network_is_refused():
    arrays = {'arg:fc1_weight': mx.nd.zeros((3, 3)), 'arg:dense_bias': mx.nd.zeros(3)}
    mx.nd.save('other-0001.params', arrays)
    with pytest.raises(
        InputError,
        match=r'other-0001.params is a checkpoint of another network: nothing of it fits',
    ):
        train_small(model_prefix='other', load_epoch=1)
    assert not list(Path().glob('run*'))


def test_load_of_the_original(caplog):
    """A checkpoint of the MXNet version of 2016, whose layers have MXNet's own names."""
    caplog.set_level(logging.INFO)
    rng = np.random.default_rng(0)
    shapes = {
        'arg:convolution0_weight': (20, 1, 5, 5),
        'arg:convolution0_bias': (20,),
        'arg:convolution1_weight': (50, 20, 5, 5),
        'arg:convolution1_bias': (50,),
        'arg:fullyconnected0_weight': (500, 800),
        'arg:fullyconnected0_bias': (500,),
        'arg:embedding_weight': (2, 500),
        'arg:embedding_bias': (2,),
        'arg:fc2_weight': (10, 2),
        'arg:fc2_bias': (10,),
        'aux:center_loss__center': (10, 2),
        'aux:center_loss__sum': (10, 2),
        'aux:center_loss__diff': (100, 2),
    }
    arrays = {name: mx.nd.array(rng.normal(0, 0.02, shape)) for name, shape in shapes.items()}
    mx.nd.save('original-0010.params', arrays)
    train_small(
        train.get_symbol(alpha=0),
        model_prefix='original',
        load_epoch=10,
        num_epochs=11,
        num_examples=50,
        lr=1e-30,
    )
    params = saved_params('run', 11)
    for old, new in {
        'arg:convolution0_weight': 'conv1_weight',
        'arg:convolution1_bias': 'conv2_bias',
        'arg:fullyconnected0_weight': 'fc1_weight',
        'arg:embedding_weight': 'embedding_weight',
        'arg:fc2_bias': 'fc2_bias',
        'aux:center_loss__center': 'center_loss_center_bias',
    }.items():
        np.testing.assert_array_equal(params[new], arrays[old].asnumpy(), err_msg=new)
    assert re.search(
        r'original-0010.params: center_loss__sum not taken, which the network', caplog.text
    )
    assert 'original-0010.params has no checksum' in caplog.text
    assert re.findall(r'Epoch\[(\d+)\] Validation-accuracy', caplog.text) == ['10']


def test_load_of_a_network_with_names_by_mxnet():
    """Some of which the original's network has, too."""
    network = mx.sym.load_json(small_network().tojson().replace('fc1', 'fullyconnected0'))
    train_small(network, num_epochs=1, num_examples=100)
    train_small(
        network,
        model_prefix='run',
        load_epoch=1,
        save_model_prefix='longer',
        num_epochs=2,
        num_examples=50,
        lr=1e-30,
    )
    old, new = saved_params('run', 1), saved_params('longer', 2)
    for params in (old, new):
        del params['center_loss_center_bias']
    assert_same_arrays(new, old)


def test_iterators_that_describe_themselves_by_plain_tuples(uninterrupted):
    iterators = small_data(1000, 0)(50)
    for iterator in iterators:
        iterator.provide_data = [(desc.name, desc.shape) for desc in iterator.provide_data]
        iterator.provide_label = [(desc.name, desc.shape) for desc in iterator.provide_label]
    train_small(data=iterators)
    assert_same_checkpoints('run', str(uninterrupted / 'run'), [3])


def test_initial_params_leave_the_first_epoch_whole():
    batches = []
    train_small(
        data=plain_iterators(250),
        initial_params=discriminant_params,
        num_epochs=1,
        batch_end_callback=lambda param: batches.append(param.nbatch),
    )
    assert batches == [0, 1, 2, 3, 4]


def test_options_that_change_no_weight_are_not_compared():
    names = {
        *('data_dir', 'dataset', 'keep_checkpoints', 'load_epoch', 'log_dir', 'log_file'),
        *('model_prefix', 'num_epochs', 'resume', 'save_model_prefix'),
    }
    train_small(num_epochs=1, num_examples=50, record=dict.fromkeys(names, 1))
    assert not names & {*Checkpoints('run').load(1).options}


# ---- the optimizer


@pytest.mark.parametrize(
    'factor_epochs, falls', [(0.5, [10, 20, 30]), (1, [20, 40]), (1.25, [25, 50])]
)
def test_learning_rate_falls(factor_epochs, falls):
    rate = lr_schedule(0.8, 0.5, factor_epochs * NUM_BATCHES, 0)
    for number, update in enumerate(falls):
        assert rate(update) == pytest.approx(0.8 * 0.5**number)
        assert rate(update + 1) == pytest.approx(0.8 * 0.5 ** (number + 1))


@pytest.mark.parametrize('epochs', [0.5, 2])
def test_learning_rate_rises(epochs):
    rises = round(epochs * NUM_BATCHES)
    rate = lr_schedule(0.8, 0.5, 3 * NUM_BATCHES, rises)
    assert [rate(update) for update in (1, 2, rises - 1)] == pytest.approx(
        [0.8 / rises, 1.6 / rises, 0.8 - 0.8 / rises]
    )
    assert [rate(update) for update in (rises, 60, 61)] == pytest.approx([0.8, 0.8, 0.4])


def test_learning_rate_falls_after_every_step():
    rate = lr_schedule(0.8, 0.5, 0.2, 0)
    assert [rate(update) for update in (1, 2, 3)] == pytest.approx([0.8, 0.4, 0.2])


def test_learning_rate_has_no_lower_limit():
    assert lr_schedule(1e-9, 0.5, 10, 0)(11) == pytest.approx(5e-10, abs=0)


def test_constant_learning_rate(caplog):
    """Without a line of the log that says it has changed."""
    caplog.set_level(logging.INFO)
    rate = lr_schedule(0.8, 1, NUM_BATCHES, 0)
    assert [rate(update) for update in (1, NUM_BATCHES, 100 * NUM_BATCHES)] == [0.8] * 3
    assert not caplog.records


def test_fit_follows_the_schedule():
    rates = []
    train_small(
        num_epochs=2,
        lr=0.8,
        warmup_epochs=0.5,
        lr_factor=0.5,
        lr_factor_epoch=1,
        batch_end_callback=learning_rates(rates),
    )
    rates = [rate for _, _, rate in rates]
    expected = [*(0.08 * step for step in range(1, 10)), *[0.8] * 11, *[0.4] * 20]
    assert rates == pytest.approx(expected)


def test_first_step_by_options():
    """lr, wd, momentum and clip_gradient arrive: what one step does with and without each."""

    def after_one_step(**options):
        options = {'num_epochs': 1, 'num_examples': 50, 'warmup_epochs': 0, **options}
        train_small(**{'clip_gradient': None, 'wd': 0, **options})
        return saved_params('run', 1), saved_state('run', 1)

    initial, _ = after_one_step(lr=1e-30)
    plain, state = after_one_step(lr=0.1)
    decayed, _ = after_one_step(lr=0.1, wd=0.5)
    clipped, _ = after_one_step(lr=0.1, clip_gradient=1e-4)
    _, none = after_one_step(lr=0.1, momentum=0)
    assert none == {}
    for name, value in plain.items():
        if name == 'center_loss_center_bias':
            continue
        change = value - initial[name]
        assert np.abs(change).max() > 1e-4
        np.testing.assert_allclose(state[f'optimizer0:{name}'], change, atol=1e-6, err_msg=name)
        decay = 0 if name.endswith('bias') else 0.1 * 0.5 * initial[name]
        np.testing.assert_allclose(decayed[name], value - decay, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(
            clipped[name] - initial[name], np.clip(change, -1e-5, 1e-5), atol=1e-6, err_msg=name
        )


def test_unknown_optimizer():
    with pytest.raises(InputError, match=r"^optimizer='sdg': MXNet has no such optimizer$"):
        train_small(optimizer='sdg')
    assert os.listdir() == []


# ---- averaged weights


@pytest.mark.parametrize('share', [0.1, 1])
def test_average_is_saved(share, uninterrupted, monkeypatch):
    """The average of all steps by its formula; it is what is validated; training is unchanged."""
    steps, validated = [], []

    def present(module):
        return {
            name.split(':')[1]: array.asnumpy() for name, array in module.present_arrays().items()
        }

    class Recorded(Average):
        def __call__(self, param):
            super().__call__(param)
            steps.append(present(self.module))

        @contextlib.contextmanager
        def in_use(self):
            with super().in_use() as last:
                validated.append(present(self.module))
                yield last

    monkeypatch.setattr(train_model, 'Average', Recorded)
    train_small(average_weights=share)
    assert len(steps) == 3 * NUM_BATCHES
    for epoch in (1, 2, 3):
        params, state = saved_params('run', epoch), saved_state('run', epoch)
        alone = saved_params(uninterrupted / 'run', epoch)
        weights = np.ones(epoch * NUM_BATCHES)  # of every step so far in the average
        for t in range(1, len(weights)):
            weights[t] = 1 / (1 + share * t)
            weights[:t] *= 1 - weights[t]
        assert np.allclose(weights, 1 / len(weights)) == (share == 1)
        assert params.keys() == alone.keys()
        for name, value in params.items():
            average = np.tensordot(weights, [step[name] for step in steps[: len(weights)]], 1)
            np.testing.assert_allclose(value, average, rtol=1e-4, atol=1e-5, err_msg=name)
            np.testing.assert_array_equal(value, validated[epoch - 1][name], err_msg=name)
            kind = 'aux' if name == 'center_loss_center_bias' else 'arg'
            np.testing.assert_array_equal(state[f'last:{kind}:{name}'], alone[name], err_msg=name)


def test_average_is_of_its_step(monkeypatch):
    """Although MXNet computes it later than the step after it."""
    options = {'num_epochs': 1, 'num_examples': 250, 'average_weights': 1}
    train_small(save_model_prefix='expected', **options)

    class Late(Average):
        def __call__(self, param):
            large = mx.nd.ones((1000, 1000))
            zero = (mx.nd.dot(large, large) * 0).sum()  # takes longer than a step
            for name, array in self.arrays.items():
                self.arrays[name] = mx.nd.broadcast_add(array, zero)
            super().__call__(param)

    monkeypatch.setattr(train_model, 'Average', Late)
    train_small(**options)
    assert_same_checkpoints('run', 'expected', [1])


def test_average_of_many_steps():
    """From step 100 on one in ten is taken in, for all ten; with share 1 it is the plain mean."""

    class Steps:
        def num_updates(self):
            return self.step

        def present_arrays(self):
            return {'arg:w': mx.nd.array([self.step])}

    module = Steps()
    average = Average(1, module, {})
    for module.step in range(1, 208):
        average(None)
    mean = np.mean([*range(1, 101), *np.repeat(range(110, 201, 10), 10)])
    assert average.arrays['arg:w'].asscalar() == pytest.approx(mean)
    average = Average(0.001, module, {})  # a window of less than a step
    for module.step in range(1, 121):
        average(None)
    assert average.arrays['arg:w'].asscalar() == 120
    average = Average(0.1, module, {})  # of a run that continues a loaded checkpoint
    for module.step in (151, 152, 160):
        average(None)
        first = 151 + min(1, 10 / (1 + 0.1 * 159)) * 9 if module.step == 160 else 151
        assert average.arrays['arg:w'].asscalar() == pytest.approx(first)


@pytest.mark.slow
def test_average_is_more_accurate():
    """While the learning rate is high."""
    for name, share in ('last', 0), ('averaged', 0.1):
        train_small(
            save_model_prefix=name,
            log_file=f'{name}.txt',
            lr=0.3,
            lr_factor=1,
            num_examples=4000,
            num_epochs=10,
            average_weights=share,
        )
    last, averaged = (
        np.mean(logged('Epoch.* Validation-accuracy', f'{name}.txt')[5:])
        for name in ('last', 'averaged')
    )
    assert averaged > last + 0.01


# ---- validation


@pytest.mark.slow
@pytest.mark.parametrize('batch_size, average', [(50, 0), (50, 0.5), (64, 0), (1000, 0)])
def test_validation_is_of_the_saved_weights(batch_size, average):
    """LeNet in the form that is bound; 50 and 1000 divide the 1,000 images, 64 does not.

    An executor for scoring alone would keep weights of its first batch, where MXNet fuses
    operators; one that is bound anew for every other size would not show that.
    """
    options = {'center_loss_weight': 0.3}
    module = fit(
        train.get_symbol(**options),
        small_data(num_examples=max(100, batch_size)),
        compute_network=train.get_symbol(**options, vectorized=True),
        batch_size=batch_size,
        num_epochs=2,
        lr=0.1,
        average_weights=average,
    )
    network, arg_params, aux_params = mx.model.load_checkpoint('center_loss', 2)
    layers = network.get_internals()
    outputs = mx.sym.Group([layers['softmax_output'], layers['embedding_output']])
    scored = mx.mod.Module(outputs, label_names=['softmax_label'])
    sample = data.load_digits('mnist-5k')
    images, labels = sample.val_images[:, None] / 256, sample.val_labels
    scored.bind([('data', images.shape)], [('softmax_label', labels.shape)], for_training=False)
    scored.set_params(arg_params, aux_params, allow_extra=True)
    scored.forward(mx.io.DataBatch([mx.nd.array(images)], [mx.nd.array(labels)]))
    probability, embedding = (output.asnumpy() for output in scored.get_outputs())
    to_center = embedding - aux_params['center_loss_center_bias'].asnumpy()[labels]
    expected = {
        'accuracy': np.mean(probability.argmax(axis=1) == labels),
        'cross-entropy': -np.log(probability[np.arange(len(labels)), labels]).mean(),
        'center_loss': 0.5 * (to_center**2).sum(axis=1).mean(),
    }
    assert module.validation_scores == pytest.approx(expected, rel=1e-4)
    for name, value in expected.items():
        first, second = logged(rf'Epoch\[\d\] Validation-{name}')
        assert second == pytest.approx(value, rel=1e-4, abs=1e-6)
        assert second != first or name == 'accuracy'


def test_objective_is_logged():
    """Cross-entropy plus lambda times center loss, computed by hand, of weights that stay."""
    weight = 0.3
    train_small(
        small_network(weight=weight), num_epochs=1, num_examples=50, lr=1e-30, initializer=None
    )
    params = saved_params('run', 1)
    images, labels = digits(50)
    h = np.tanh(images.reshape(50, -1) @ params['fc1_weight'].T + params['fc1_bias'])
    x = h @ params['embedding_weight'].T + params['embedding_bias']
    logits = x @ params['fc2_weight'].T + params['fc2_bias']
    cross_entropy = np.log(np.exp(logits).sum(axis=1)) - logits[range(50), labels.astype(int)]
    center_loss = 0.5 * (x**2).sum(axis=1)  # from centers at 0
    objective = cross_entropy.mean() + weight * center_loss.mean()
    (logged_entropy,), (logged_center,) = (
        logged(rf'Epoch\[0\] Train-{name}') for name in ('cross-entropy', 'center_loss')
    )
    assert logged_entropy + weight * logged_center == pytest.approx(objective, rel=1e-5)
    assert logged_entropy == pytest.approx(cross_entropy.mean(), rel=1e-5)


def test_held_out():
    """Validated on a fixed sixth of the training images, trained on the others."""
    order = np.random.default_rng(0).permutation(4000)
    sample = data.load_digits('mnist-5k')
    seen = []
    for seed in (0, 1):
        load = small_data(None, seed, validate_on='held-out')
        train_small(data=load, seed=seed, num_epochs=1)
        batches, _ = load(1)
        seen.append({batch.data[0].asnumpy().tobytes() for batch in batches})
    text = Path('log.txt').read_text()
    said = 'mnist-5k, 3334 training images, validation on 666 held-out training images'
    assert text.count(said) == 2
    assert 'batches_per_epoch=66' in text
    assert seen[0] == seen[1]
    held_out, held_out_labels = (
        (values[order[: 4000 // 6]]) for values in (sample.train_images, sample.train_labels)
    )
    pixels = held_out.astype('f') / 256
    assert not seen[0] & {image.tobytes() for image in pixels}
    params = saved_params('run', 1)
    h = np.tanh(pixels.reshape(len(pixels), -1) @ params['fc1_weight'].T + params['fc1_bias'])
    x = h @ params['embedding_weight'].T + params['embedding_bias']
    logits = x @ params['fc2_weight'].T + params['fc2_bias']
    accuracy = np.mean(logits.argmax(axis=1) == held_out_labels)
    assert logged(r'Epoch\[0\] Validation-accuracy')[1] == pytest.approx(accuracy, abs=1e-6)


# ---- as a library


def plain_iterators(count=230, batch_size=50, **options):
    """A pair of MXNet's own iterators, with two labels; the last batch of the first is padded."""
    found = []
    for first in (0, 2000):
        images, labels = digits(count, first)
        named = dict.fromkeys(LABELS, labels)
        found.append(mx.io.NDArrayIter({'data': images}, named, batch_size, **options))
    return tuple(found)


def test_defaults_and_plain_iterators(caplog):
    """Batches are counted; a resumed run says that it is not exact."""
    caplog.set_level(logging.INFO)
    fit(small_network(), plain_iterators(100, 100), num_epochs=1)
    assert Checkpoints('center_loss').epochs() == [1]
    assert 'batches_per_epoch=1' in caplog.text and 'cannot begin at epoch' not in caplog.text
    assert "optimizer='sgd', lr=0.01, momentum=0.9, wd=0.0005" in caplog.text
    fit(small_network(), plain_iterators(100, 100), num_epochs=2, resume=True)
    assert 'the training data cannot begin at epoch 1: this run continues, but not' in caplog.text


@pytest.mark.parametrize('devices', [1, 2])
def test_plain_iterators_train_alike(devices):
    """The same images in the same order give the same weights, with padding and without."""
    options = {'devices': [mx.cpu(i) for i in range(devices)]}

    class Counted(mx.io.NDArrayIter):
        num_batches = 5

    assert count_batches(plain_iterators()[0]) == 5
    train, val = plain_iterators()
    train_small(data=(train, val), **options)
    images, labels = digits(230)
    index = np.arange(250) % 230
    counted = Counted({'data': images[index]}, dict.fromkeys(LABELS, labels[index]), 50)
    train_small(data=lambda *_, **__: (counted, val), save_model_prefix='same', **options)
    assert_same_checkpoints('run', 'same', (1, 2, 3))


def test_dual_label_wrapper(uninterrupted):
    """An iterator with one label, as MXNet's users have it."""
    images, labels = digits(1000)
    sample = data.load_digits('mnist-5k')
    val = sample.val_images[:, None] / 256, sample.val_labels
    pair = tuple(
        data.DualLabelWrapper(mx.io.NDArrayIter(*arrays, batch_size=64))
        for arrays in ((images, labels), val)
    )
    module = train_small(data=pair)
    assert module.validation_scores['accuracy'] > 0.3
    assert logged(r'Epoch\[2\] Validation-accuracy')[0] * 1000 % 1 == pytest.approx(0, abs=1e-3)


def test_batch_end_callback():
    calls, others = [], []
    train_small(
        num_epochs=2,
        batch_end_callback=[
            lambda param: calls.append((param.epoch, param.nbatch)),
            lambda param: others.append(dict(param.eval_metric.get_name_value())),
        ],
    )
    assert calls == [(epoch, batch) for epoch in (0, 1) for batch in range(NUM_BATCHES)]
    assert all(value.keys() == {'accuracy', 'cross-entropy', 'center_loss'} for value in others)


def test_callback_sees_the_metrics_of_every_batch():
    """Those of the 50th, too, after which the log begins to count anew."""
    seen = []
    train_small(
        num_examples=4000,
        num_epochs=1,
        batch_end_callback=lambda param: seen.append(param.eval_metric.get()[1]),
    )
    assert np.shape(seen) == (80, 3) and np.isfinite(seen).all()


def test_used_iterators_begin_anew():
    train, val = small_data()(50)
    next(train), next(val)
    for prefix in ('first', 'second'):
        train_small(data=(train, val), num_epochs=2, save_model_prefix=prefix)
    train_small(num_epochs=2, save_model_prefix='fresh')
    assert_same_arrays(saved_params('first', 2), saved_params('fresh', 2))
    assert_same_arrays(saved_params('second', 2), saved_params('fresh', 2))


def test_options_may_be_numbers_of_numpy(caplog):
    for lr in (0.1, np.float64(0.1)):
        train_small(seed=np.int64(3), lr=lr, record={'dims': np.arange(2)}, num_epochs=1)
    options = Checkpoints('run').load(1).options
    assert (options['seed'], options['lr'], options['dims']) == (3, 0.1, [0, 1])
    train_small(seed=3, record={'dims': [0, 1]}, num_epochs=2, resume=True)
    assert 'resuming with' not in caplog.text


def test_facts_are_checked_before_the_training():
    train, val = small_data()(50)
    train.data_facts = {'image_shape': (1, 28, 28)}
    with pytest.raises(InputError, match='image_shape has to be two whole numbers'):
        train_small(data=(train, val))
    assert not Path('run-0001.params').exists()


def test_network_that_the_tools_will_not_load(caplog):
    """It is trained and saved, and the log says so before."""
    train_small(num_epochs=1)
    assert 'will not load' not in caplog.text
    label = mx.sym.var('center_label')
    train_small(small_network(label=mx.sym.where(label > 5, label, label)), num_epochs=1)
    assert 'vis.py and the tools will not load checkpoints' in caplog.text
    assert 'the operator _greater_scalar of' in caplog.text


def test_record_is_logged_and_unchanged():
    record = {'network': 'small', 'initializer': 'xavier', 'log_file': 'elsewhere', 'lr': 7}
    before = dict(record)
    train_small(num_epochs=1, record=record)
    assert record == before
    options = Checkpoints('run').load(1).options
    assert options['network'] == 'small' and options['lr'] == 0.1 and 'log_file' not in options
    assert options['batches_per_epoch'] == NUM_BATCHES
    (line,) = re.findall('start with arguments (.*)', Path('log.txt').read_text())
    assert line.startswith('Namespace(') and "network='small'" in line and 'lr=0.1' in line


def test_network_is_saved_and_compute_network_bound():
    plain, fast = train.get_symbol(), train.get_symbol(vectorized=True)
    module = fit(plain, small_data(50), compute_network=fast, batch_size=50, num_epochs=1)
    assert module.symbol.tojson() == fast.tojson()
    saved = Checkpoints('center_loss').load_symbol()
    assert saved.list_arguments() == plain.list_arguments()
    nodes = [json.loads(symbol.tojson())['nodes'] for symbol in (saved, plain)]
    assert [node['name'] for node in nodes[0]] == [node['name'] for node in nodes[1]]


@pytest.mark.slow
def test_compute_network_trains_alike():
    """The plain network and the one that is bound in its place give the same weights."""
    for name, compute_network in (('plain', None), ('fast', train.get_symbol(vectorized=True))):
        fit(
            train.get_symbol(),
            small_data(200),
            compute_network=compute_network,
            batch_size=50,
            num_epochs=1,
            lr=0.05,
            save_model_prefix=name,
        )
    plain, fast = saved_params('plain', 1), saved_params('fast', 1)
    for name, value in plain.items():
        np.testing.assert_allclose(fast[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


def test_batches_are_shared_by_devices():
    with pytest.raises(
        InputError, match='a validation batch of 1 images cannot be shared by 2 devices'
    ):
        pair = small_data(100)(100)[0], mx.io.NDArrayIter(*digits(1), batch_size=1)
        train_small(data=pair, devices=[mx.cpu(0), mx.cpu(1)])
    with pytest.raises(InputError, match='a training batch of 1 images cannot be shared by 2 dev'):
        uneven = data.DualLabelWrapper(mx.io.NDArrayIter(*digits(51), batch_size=50))
        train_small(data=(uneven, small_data(100)(100)[1]), devices=[mx.cpu(0), mx.cpu(1)])
    with pytest.raises(InputError, match='cannot be shared equally by 2 devices'):
        train_small(batch_size=25, devices=[mx.cpu(0), mx.cpu(1)])


def test_log_is_no_checkpoint():
    with pytest.raises(InputError, match=r'--log_file=run-symbol.json is a checkpoint of run'):
        train_small(log_file='run-symbol.json')


# ---- divergence and collapse


def test_divergence_is_reported():
    train_small(num_epochs=1)
    before = Path('run-0001.params').read_bytes()
    with pytest.raises(
        Diverged,
        match=r'training diverged: (center_loss|cross-entropy) is (nan|inf) in epoch 2, '
        r'batch \d+; try a smaller learning rate .*; the last whole checkpoint is '
        r'run-0001.params; continue with resume=True',
    ):
        train_small(resume=True, lr=1e4, clip_gradient=0)
    assert Path('run-0001.params').read_bytes() == before
    assert Checkpoints('run').epochs() == [1]
    assert 'training diverged' in Path('log.txt').read_text().splitlines()[-1]


@pytest.mark.slow
def test_collapse_is_not_saved():
    """Initial weights at a lambda that they cannot stand: every tanh saturates in an epoch."""
    options = {'center_loss_weight': 1, 'embedding_lr_mult': 0.1}
    train_small(num_epochs=1, num_examples=100)
    before = {path.name: path.read_bytes() for path in Path().glob('run*')}
    with pytest.raises(
        Diverged,
        match=r'all classes are on one point of the embedding, Validation-accuracy is 0\.1000 in '
        r'epoch 1, batch 40; .*; this run of run has finished no epoch',
    ):
        train_small(
            train.get_symbol(**options),
            compute_network=train.get_symbol(**options, vectorized=True),
            initializer=mx.init.Mixed(
                ['.*fc.*', '.*'],
                [mx.init.Normal(0.001), mx.init.Xavier('gaussian', 'out', magnitude=2)],
            ),
            lr=0.02,
            warmup_epochs=0,
            clip_gradient=0,
            batch_size=100,
            num_examples=4000,
        )
    assert {path.name: path.read_bytes() for path in Path().glob('run*')} == before


@pytest.mark.slow
@pytest.mark.parametrize('initializer', train.INITIALIZERS)
def test_untrained_is_no_collapse(initializer):
    train_small(
        train.get_symbol(),
        initializer=train.INITIALIZERS[initializer],
        num_epochs=1,
        num_examples=100,
        lr=1e-7,
    )
    assert Checkpoints('run').epochs() == [1]


@pytest.mark.parametrize('averaged', [0, pytest.param(0.1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'name, place, wrong',
    [
        ('fc1_weight', (3, 5), np.nan),
        ('fc1_weight', (3, 5), np.inf),
        ('embedding_weight', slice(None), 0),
    ],
)
def test_spoiled_last_step_is_not_saved(name, place, wrong, averaged, monkeypatch):
    """No metric of that epoch shows it, and an average has nearly nothing of the last step."""
    train_small(num_epochs=1, average_weights=averaged)
    original = Module.update

    def update(self):
        original(self)
        if self.num_updates() == 2 * NUM_BATCHES:
            arg_params, aux_params = self.get_params()
            arg_params[name][place] = wrong
            self.set_params(arg_params, aux_params)

    monkeypatch.setattr(Module, 'update', update)
    with pytest.raises(
        Diverged,
        match=r'fc1_weight is not finite|Validation-[\w-]+ is nan|all classes are on one point',
    ) as divergence:
        train_small(resume=True, average_weights=averaged)
    assert re.search(
        r'in epoch 2, batch 20; .* the last whole checkpoint is run-0001.params',
        str(divergence.value),
    )
    assert Checkpoints('run').epochs() == [1]


# ---- disks


def test_failed_save_keeps_the_checkpoints(uninterrupted):
    """A file that cannot grow, as on a full disk: everything stays as it was."""
    train_small(num_epochs=1)
    before = {path.name: path.read_bytes() for path in Path().glob('*run*')}
    size = Path('run-0001.params').stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, limits[1]))
    try:
        with pytest.raises(
            InputError,
            match=r'cannot write the checkpoint of epoch 2 to run-0002.params: .*; the last whole '
            r'checkpoint is run-0001.params; continue with resume=True',
        ):
            train_small(resume=True)
        with pytest.raises(
            InputError, match=r'cannot write the checkpoint of epoch 1 .*; this run of run has'
        ):
            train_small(seed=5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in Path().glob('*run*')} == before
    train_small(resume=True)
    assert_same_checkpoints('run', uninterrupted / 'run', (1, 2, 3))


@pytest.fixture
def small_disk(tmp_path):
    """A disk that holds one checkpoint of LeNet, not two; a function mounts it otherwise."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(options):
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder]
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode

    if not shutil.which('mount') or mount('size=5m'):
        pytest.skip('no disk can be mounted here')
    try:
        yield folder, mount
    finally:
        subprocess.run(['umount', folder], check=True)


def fill(disk):
    (disk / 'rest').write_bytes(bytes(8))
    with contextlib.suppress(OSError), open(disk / 'rest', 'ab', 0) as rest:
        while True:
            rest.write(bytes(4096))


def test_log_on_a_full_disk(small_disk, capsys):
    """It is reported once, and training goes on."""
    disk, _ = small_disk
    fill(disk)
    train_small(num_epochs=2, log_dir=str(disk))
    said = capsys.readouterr().err
    assert said.count('cannot write the log file') == 1
    assert 'log.txt ([Errno 28] No space left on device): training goes on without it' in said
    assert 'Traceback' not in said and 'Logging error' not in said
    assert Checkpoints('run').epochs() == [1, 2]


@pytest.mark.slow
def test_full_disk(small_disk):
    """The last whole checkpoint stays, and the run goes on when there is room."""
    disk, mount = small_disk
    line = ['--dataset=mnist-5k', '--num-examples=200', '--num-epochs=2']
    result = run_train(*line, cwd=disk)
    assert result.returncode == 2
    assert re.match(
        'train.py: error: cannot write the checkpoint of epoch 2 to center_loss-0002.params: .*; '
        'the last whole checkpoint is center_loss-0001.params; continue with: python .* --resume',
        result.stderr.splitlines()[-1],
    )
    assert 'Traceback' not in result.stderr and 'Logging error' not in result.stderr
    names = {path.name for path in disk.iterdir()}
    assert not [name for name in names if '0002' in name] and 'center_loss-0001.params' in names
    fill(disk)
    result = run_train(*line, '--resume', cwd=disk)
    assert result.returncode == 2 and 'Traceback' not in result.stderr
    assert re.search('No space left on device|disk is full', result.stderr)
    (disk / 'rest').unlink()
    mount('remount,size=20m')
    assert run_train(*line, '--resume', cwd=disk).returncode == 0
    assert Checkpoints(disk / 'center_loss').epochs() == [1, 2]


@pytest.mark.slow
def test_read_only_disk(small_disk):
    """It is found before the training."""
    disk, mount = small_disk
    mount('remount,ro')
    line = ['--dataset=mnist-5k', '--num-examples=200']
    for option, said in (
        (f'--save-model-prefix={disk}/run', f'cannot write checkpoints to .*{disk}/run: Read-only'),
        (f'--log_dir={disk}', f'cannot write the log file {disk}/log.txt: '),
        (f'--log_dir={disk}/new', f'cannot write the log file {disk}/new/log.txt: '),
    ):
        result = run_train(*line, option, cwd='.')
        assert result.returncode == 2
        assert re.fullmatch(rf'train.py: error: {said}.*\n', result.stderr)
    assert os.listdir() == ['disk'] and os.listdir(disk) == []


# ---- stopped


def start_training(*line):
    command = [sys.executable, ROOT / 'train.py', '--dataset=mnist-5k', '--batch-size=50', *line]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, 'too slow'
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_run_says_how_to_continue(number, status):
    with start_training('--num-examples=500', '--num-epochs=500') as process:
        wait_for(Path('center_loss-0002.json').exists, process)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == status
    assert 'Traceback' not in said
    last = said.splitlines()[-1]
    found = re.search(
        r'stopped: the last whole checkpoint is center_loss-(\d+).params; continue with: python ',
        last,
    )
    # A checkpoint that is being written when the signal comes may be whole afterwards.
    assert 0 <= Checkpoints('center_loss').epochs()[-1] - int(found[1]) <= 1
    assert last.endswith('--resume')
    assert last == Path('log.txt').read_text().splitlines()[-1]


@pytest.mark.slow
def test_stopped_in_the_first_epoch():
    with start_training('--batch-size=1', '--initial-embedding=random') as process:
        wait_for(
            lambda: Path('log.txt').exists() and 'Batch [0-50]' in Path('log.txt').read_text(),
            process,
        )
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.splitlines()[-1].endswith(
        'stopped: this run of center_loss has finished no epoch, there is nothing of it to resume'
    )


def test_interrupt_leaves_the_library(caplog):
    """KeyboardInterrupt comes through, after a line about what is saved."""

    def stop(param):
        if param.epoch == 1:
            raise KeyboardInterrupt

    level, handlers = logging.getLogger().level, list(logging.getLogger().handlers)
    with pytest.raises(KeyboardInterrupt):
        train_small(batch_end_callback=stop)
    assert 'stopped: the last whole checkpoint is run-0001.params; continue with' in caplog.text
    assert (logging.getLogger().level, logging.getLogger().handlers) == (level, handlers)
    train_small(num_epochs=2, resume=True)  # the lock is free


def test_trained_module_is_returned():
    module = train_small()
    assert_same_arrays(numpy_params(module), saved_params('run', 3))
    assert module.validation_scores['accuracy'] == pytest.approx(
        logged(r'Epoch\[2\] Validation-accuracy')[0], abs=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    'line, said',
    [
        ('exit_cleanly.py --runs 7', r'runs: 7 in \d+ s, wrong: 0'),
        ('kill_at_random.py --kills 2 --seed 1', r'kills: 2 in .* damaged checkpoints: 0, '),
    ],
    ids=['exit_cleanly', 'kill_at_random'],
)
def test_stress(line, said):
    """A few of what these programs do many times."""
    name, *options = line.split()
    result = run_python(ROOT / 'tests' / 'stress' / name, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(said, result.stdout)
