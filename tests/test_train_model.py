"""Training, checkpoints, resume and what happens when a run is stopped or cannot go on; on real digits, with a small network."""

import contextlib
import functools
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

import data
import train
import train_model
from runtime import Failure, InputError, mx
from train_model import Checkpoints, DamagedCheckpoint, Diverged, fit

ROOT = Path(__file__).resolve().parent.parent
NUM_BATCHES = 20  # of 50 images, in an epoch


def small_network(embedding_dim=2, hidden=16, weight=0.1):
    net = mx.sym.flatten(mx.sym.var('data'))
    net = mx.sym.Activation(
        mx.sym.FullyConnected(net, num_hidden=hidden, name='fc1'), act_type='tanh'
    )
    embedding = mx.sym.FullyConnected(net, num_hidden=embedding_dim, name='embedding')
    softmax = mx.sym.SoftmaxOutput(
        mx.sym.FullyConnected(embedding, num_hidden=10, name='fc2'), name='softmax'
    )
    center = mx.sym.Custom(
        data=embedding,
        label=mx.sym.var('center_label'),
        op_type='centerloss',
        name='center_loss',
        num_class=10,
        scale=weight,
        normalization='null',
    )
    return mx.sym.Group([softmax, center])


def options(*line):
    return train.parse_args(
        [
            '--batch-size',
            '50',
            '--num-examples',
            '1000',
            '--num-epochs',
            '3',
            '--lr',
            '0.1',
            *map(str, line),
        ]
    )


def train_small(*line, network=None, **arguments):
    args = options(*line)
    loader = functools.partial(
        data.mnist_iterator, dataset='mnist-5k', seed=args.seed, num_examples=args.num_examples
    )
    return fit(
        args, small_network() if network is None else network, loader, (1, 28, 28), **arguments
    )


def arrays_of(path):
    return {name: value.asnumpy() for name, value in mx.nd.load(str(path)).items()}


def assert_same_arrays(first, second):
    first, second = arrays_of(first), arrays_of(second)
    assert first.keys() == second.keys()
    for name in first.keys() - {'digest', 'options'}:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def without_times(log):
    """The lines of a log but for the times and the speeds, and for what is said before the first batch."""
    return [
        re.sub(r'Speed: \S+|Time cost=\S+|^\S+ \S+ ', '', line)
        for line in log.splitlines()
        if 'Epoch[' in line
    ]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    """Three epochs in one go: the run that every stopped and continued one has to equal."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    train_small('--save-model-prefix', folder / 'run', '--log_dir', folder)
    return folder


def assert_equals(uninterrupted, epochs=(1, 2, 3)):
    for epoch in epochs:
        assert_same_arrays(f'run-{epoch:04d}.params', uninterrupted / f'run-{epoch:04d}.params')
        assert_same_arrays(f'run-{epoch:04d}.states', uninterrupted / f'run-{epoch:04d}.states')


def test_the_same_seed_gives_the_same_run_and_another_seed_another(uninterrupted):
    train_small('--save-model-prefix', 'run')
    assert_equals(uninterrupted)
    assert without_times(Path('log.txt').read_text()) == without_times(
        (uninterrupted / 'log.txt').read_text()
    )
    train_small('--save-model-prefix', 'other', '--seed', 1, '--num-epochs', 1)
    assert (
        arrays_of('other-0001.params')['arg:fc1_weight']
        != arrays_of('run-0001.params')['arg:fc1_weight']
    ).any()


@pytest.mark.parametrize('averaged', [0, 0.3])
@pytest.mark.parametrize('devices', [1, 2])
def test_a_continued_run_equals_one_that_was_never_stopped(devices, averaged, tmp_path):
    contexts = [mx.cpu(i) for i in range(devices)]
    folder = tmp_path / 'uninterrupted'
    folder.mkdir()
    line = ['--lr-factor-epoch', 1.5, '--average-weights', averaged]  # the schedule goes on as well
    train_small(*line, '--save-model-prefix', folder / 'run', '--log_dir', folder, devices=contexts)
    train_small(*line, '--save-model-prefix', 'run', '--num-epochs', 1, devices=contexts)
    train_small(
        *line, '--save-model-prefix', 'run', '--num-epochs', 2, '--resume', devices=contexts
    )
    train_small(*line, '--save-model-prefix', 'run', '--resume', devices=contexts)
    assert_equals(folder)
    assert without_times(Path('log.txt').read_text()) == without_times(
        (folder / 'log.txt').read_text()
    )


def test_resuming_where_there_is_nothing_begins_at_the_beginning(uninterrupted):
    train_small('--save-model-prefix', 'run', '--resume')
    assert_equals(uninterrupted)
    assert (
        'no checkpoint of run to resume from: starting at the beginning'
        in Path('log.txt').read_text()
    )


def test_resuming_a_finished_run_says_so_and_changes_nothing(uninterrupted, caplog):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.glob('run*')}
    train_small('--save-model-prefix', uninterrupted / 'run', '--resume')
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.glob('run*')} == before
    assert 'has all of the 3 epochs already: raise --num-epochs' in caplog.text


@pytest.mark.parametrize(
    'harm',
    ['truncate', 'flip', 'states missing', 'states of another epoch', 'empty', 'states truncated'],
)
def test_a_checkpoint_that_is_not_whole_is_passed_over(uninterrupted, harm, caplog):
    train_small('--save-model-prefix', 'run', '--num-epochs', 2)
    params, states = Path('run-0002.params'), Path('run-0002.states')
    if harm == 'truncate':
        params.write_bytes(params.read_bytes()[:1000])
    elif harm == 'flip':
        content = bytearray(params.read_bytes())
        content[len(content) // 2] ^= 1
        params.write_bytes(content)
    elif harm == 'states missing':
        states.unlink()
    elif harm == 'states of another epoch':
        states.write_bytes(Path('run-0001.states').read_bytes())
    elif harm == 'empty':
        params.write_bytes(b'')
    else:
        states.write_bytes(states.read_bytes()[:500])
    train_small('--save-model-prefix', 'run', '--resume')
    assert (
        'run-0002.states' in caplog.text and 'going back to the checkpoint before it' in caplog.text
    )
    assert_equals(uninterrupted)


def test_resuming_with_other_options_says_which(uninterrupted, caplog):
    train_small('--save-model-prefix', 'run', '--num-epochs', 1)
    train_small(
        '--save-model-prefix', 'run', '--num-epochs', 2, '--resume', '--lr', 0.05, '--alpha', 0.1
    )
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == [
        'resuming with alpha=0.1, while run-0001.params was trained with 0.5',
        'resuming with lr=0.05, while run-0001.params was trained with 0.1',
    ]


def test_resuming_with_other_data_than_before_says_so(caplog):
    train_small('--save-model-prefix', 'run', '--num-epochs', 1)
    loader = functools.partial(data.mnist_iterator, dataset='mnist-5k', num_examples=500)
    fit(
        options('--save-model-prefix', 'run', '--num-epochs', 2, '--resume'),
        small_network(),
        loader,
        (1, 28, 28),
    )
    assert (
        'resuming with batches_per_epoch=10, while run-0001.params was trained with 20'
        in caplog.text
    )


def test_resuming_with_another_network_is_refused():
    train_small('--save-model-prefix', 'run', '--num-epochs', 1)
    with pytest.raises(
        InputError, match='run-0001.params is a checkpoint of another network: .*embedding_weight'
    ):
        train_small(
            '--save-model-prefix', 'run', '--resume', network=small_network(embedding_dim=3)
        )


def test_a_new_run_says_what_it_overwrites_and_leaves_nothing_of_the_old_one(caplog):
    train_small('--save-model-prefix', 'run', '--num-epochs', 3)
    train_small('--save-model-prefix', 'running', '--num-epochs', 1)
    train_small('--save-model-prefix', 'run', '--num-epochs', 2, '--seed', 3)
    assert 'the 3 checkpoints of an earlier run of run are overwritten' in caplog.text
    assert Checkpoints('run').epochs() == [1, 2]
    assert Checkpoints('running').epochs() == [1]
    assert sorted(path.name for path in Path().glob('run-*')) == [
        'run-0001.params',
        'run-0001.states',
        'run-0002.params',
        'run-0002.states',
        'run-symbol.json',
    ]


def test_fine_tuning_takes_what_fits_and_says_so(caplog):
    caplog.set_level(logging.INFO)
    train_small('--save-model-prefix', 'old', '--num-epochs', 1)
    wider = small_network(embedding_dim=3)
    train_small(
        '--save-model-prefix',
        'new',
        '--num-epochs',
        1,
        '--model-prefix',
        'old',
        '--load-epoch',
        1,
        '--lr',
        1e-30,
        network=wider,
    )
    old, new = arrays_of('old-0001.params'), arrays_of('new-0001.params')
    for name in ('arg:fc1_weight', 'arg:fc1_bias', 'arg:fc2_bias'):
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)
    assert new['arg:embedding_weight'].shape == (3, 16) and new[
        'aux:center_loss_center_bias'
    ].shape == (10, 3)
    said = caplog.text
    assert re.search(
        r'old-0001.params: left embedding_weight, of shape \(2, 16\) where the network has \(3, 16\)',
        said,
    )
    assert re.search(r'old-0001.params: left center_loss_center_bias, of shape \(10, 2\)', said)
    assert re.search(r'old-0001.params: took fc1_weight, fc1_bias, fc2_bias$', said, re.MULTILINE)


def test_fine_tuning_takes_the_centers_where_they_fit():
    train_small('--save-model-prefix', 'old', '--num-epochs', 1)
    taken = {}

    def loader(*arguments, **options):
        taken['batches'] = data.mnist_iterator(
            *arguments, **options, dataset='mnist-5k', num_examples=50
        )
        return taken['batches']

    fit(
        options(
            '--save-model-prefix',
            'new',
            '--num-epochs',
            1,
            '--model-prefix',
            'old',
            '--load-epoch',
            1,
            '--lr',
            1e-30,
        ),
        small_network(),
        loader,
        (1, 28, 28),
    )
    old, new = arrays_of('old-0001.params'), arrays_of('new-0001.params')
    moved = np.abs(
        new['aux:center_loss_center_bias'] - old['aux:center_loss_center_bias']
    )  # one step of alpha / 2 at the most
    assert moved.max() < np.abs(old['aux:center_loss_center_bias']).max()
    np.testing.assert_array_equal(new['arg:embedding_weight'], old['arg:embedding_weight'])


def test_fine_tuning_from_a_network_of_which_nothing_fits_is_refused():
    mx.nd.save(
        'other-0001.params',
        {'arg:fc1_weight': mx.nd.zeros((3, 3)), 'arg:dense_bias': mx.nd.zeros(3)},
    )
    with pytest.raises(
        InputError, match='other-0001.params is a checkpoint of another network: nothing of it fits'
    ):
        train_small('--model-prefix', 'other', '--load-epoch', 1)
    assert os.listdir() == ['other-0001.params']


def test_the_learning_rate_falls_where_the_schedule_says():
    for line, fallen in (
        (['--lr-factor-epoch', 0.5], [10, 20, 30]),
        (['--lr-factor-epoch', 1], [20, 40]),
        (['--lr-factor-epoch', 1.25], [25, 50]),
    ):
        args = options('--lr', 0.8, '--lr-factor', 0.5, '--warmup-epochs', 0, *line)
        rate = train_model.optimizer_options(args, NUM_BATCHES, 0)['lr_scheduler']
        for number, update in enumerate(fallen):
            assert rate(update) == pytest.approx(0.8 * 0.5**number)
            assert rate(update + 1) == pytest.approx(0.8 * 0.5 ** (number + 1))
    assert train_model.optimizer_options(args, NUM_BATCHES, 3)['begin_num_update'] == 60


def test_the_learning_rate_rises_to_its_place_over_the_first_epochs():
    for epochs in (0.5, 2):
        args = options(
            '--lr', 0.8, '--warmup-epochs', epochs, '--lr-factor', 0.5, '--lr-factor-epoch', 3
        )
        rate = train_model.optimizer_options(args, NUM_BATCHES, 0)['lr_scheduler']
        risen = epochs * NUM_BATCHES
        assert [rate(update) for update in (1, 2, risen - 1)] == pytest.approx(
            [0.8 / risen, 1.6 / risen, 0.8 - 0.8 / risen]
        )
        assert [rate(update) for update in (risen, 60, 61)] == pytest.approx([0.8, 0.8, 0.4])


def test_every_parameter_small_or_large_moves_by_sgd_with_momentum_and_weight_decay():
    train_iterator, _ = data.mnist_iterator(50, dataset='mnist-5k')
    module = train_model.Module(
        train.get_symbol(embedding_lr_mult=0.1), label_names=['softmax_label', 'center_label']
    )
    module.bind(train_iterator.provide_data, train_iterator.provide_label)
    module.init_params(train_model.INITIALIZERS['xavier'])
    module.init_optimizer(
        kvstore=None,
        optimizer_params=train_model.optimizer_options(
            options('--warmup-epochs=0', '--clip-gradient=0'), 80, 0
        ),
    )
    expected = {name: value.asnumpy() for name, value in module.get_params()[0].items()}
    momentum = dict.fromkeys(expected, 0)
    for batch in (next(train_iterator) for _ in range(3)):
        module.forward_backward(batch)
        for name, value in expected.items():
            gradient = (
                module._exec_group.execs[0].grad_dict[name].asnumpy() / 50
                + (0 if name.endswith('bias') else 5e-4) * value
            )
            momentum[name] = (
                0.9 * momentum[name] - (0.01 if name == 'embedding_weight' else 0.1) * gradient
            )
            expected[name] = value + momentum[name]
        module.update()
        for name, value in module.get_params()[0].items():
            np.testing.assert_allclose(
                value.asnumpy(), expected[name], rtol=1e-4, atol=1e-7, err_msg=name
            )
    assert {value.size > train_model.SMALL for value in expected.values()} == {False, True}


@pytest.mark.parametrize('share', [0.1, 1])
def test_the_average_over_the_steps_is_what_is_validated_and_saved_and_training_goes_on_without_it(
    share, uninterrupted, monkeypatch
):
    steps, validated = [], []

    class Recorded(train_model.Average):
        def __call__(self, param):
            super().__call__(param)
            steps.append(
                {name: array.asnumpy() for name, array in self.module.present_arrays().items()}
            )

        @contextlib.contextmanager
        def in_use(self):
            with super().in_use() as last:
                validated.append(
                    {name: array.asnumpy() for name, array in self.module.present_arrays().items()}
                )
                yield last

    monkeypatch.setattr(train_model, 'Average', Recorded)
    train_small('--save-model-prefix', 'run', '--average-weights', share)
    assert len(steps) == 3 * NUM_BATCHES
    for epoch in (1, 2, 3):
        params, states, alone = (
            arrays_of(path)
            for path in (
                f'run-{epoch:04d}.params',
                f'run-{epoch:04d}.states',
                uninterrupted / f'run-{epoch:04d}.params',
            )
        )
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
            np.testing.assert_array_equal(states[f'last:{name}'], alone[name], err_msg=name)


def test_of_a_run_that_was_averaged_training_goes_on_from_the_last_step(uninterrupted):
    train_small('--save-model-prefix', 'run', '--num-epochs', 1, '--average-weights', 0.5)
    train_small('--save-model-prefix', 'run', '--resume')
    assert_equals(uninterrupted, epochs=(2, 3))


def test_while_the_rate_is_high_the_average_is_more_accurate_than_the_last_step():
    for name, share in ('last', 0), ('averaged', 0.1):
        train_small(
            '--save-model-prefix',
            name,
            '--log-file',
            f'{name}.txt',
            '--lr',
            0.3,
            '--lr-factor',
            1,
            '--num-examples',
            4000,
            '--num-epochs',
            10,
            '--average-weights',
            share,
        )
    last, averaged = (
        np.array(re.findall(r'Validation-accuracy=(\S+)', Path(f'{name}.txt').read_text()), float)
        for name in ('last', 'averaged')
    )
    assert averaged[5:].mean() > last[5:].mean() + 0.01


def test_a_gradient_is_clipped_to_what_is_asked(caplog):
    train_small(
        '--save-model-prefix',
        'clipped',
        '--num-epochs',
        1,
        '--num-examples',
        50,
        '--clip-gradient',
        1e-7,
    )
    train_small(
        '--save-model-prefix', 'free', '--num-epochs', 1, '--num-examples', 50, '--clip-gradient', 0
    )
    moved = [
        arrays_of(f'{name}-0001.states')['momentum:embedding_bias'] for name in ('clipped', 'free')
    ]
    assert (
        np.abs(moved[0]).max() <= 0.1 * 1.001e-7
    )  # momentum after one step is lr times the gradient
    assert np.abs(moved[1]).max() > 1e-5


def test_divergence_stops_with_where_and_what_and_keeps_the_last_checkpoint():
    train_small('--save-model-prefix', 'run', '--num-epochs', 1)
    before = Path('run-0001.params').read_bytes()
    with pytest.raises(
        Diverged,
        match=r'center_loss is (nan|inf) in epoch 2, batch \d+; try a smaller --lr .* checkpoint is run-0001.params',
    ):
        train_small('--save-model-prefix', 'run', '--resume', '--lr', 1e4, '--clip-gradient', 0)
    assert Path('run-0001.params').read_bytes() == before
    assert Checkpoints('run').epochs() == [1]
    assert 'training diverged' in Path('log.txt').read_text().splitlines()[-1]


def test_a_collapsed_embedding_stops_and_is_not_saved():
    """The recipe that starts as nearly one point, at a lambda that it cannot stand: every tanh saturates within an epoch."""
    train_small('--save-model-prefix', 'run', '--num-epochs', 1, '--num-examples', 100)
    before = {path.name: path.read_bytes() for path in Path().glob('run*')}
    with pytest.raises(
        Diverged,
        match=r'all classes are on one point of the embedding, Validation-accuracy is 0\.1000 in epoch 1, batch 40; '
        'try a smaller --lr or --center-loss-weight, a longer --warmup-epochs, --clip-gradient, or the default --initializer; '
        'no epoch of run',
    ):
        train_small(
            '--save-model-prefix',
            'run',
            '--initializer',
            'mixed',
            '--lr',
            0.02,
            '--warmup-epochs',
            0,
            '--clip-gradient',
            0,
            '--batch-size',
            100,
            '--num-examples',
            4000,
            network=train.get_symbol(center_loss_weight=1, embedding_lr_mult=0.1),
        )
    assert {path.name: path.read_bytes() for path in Path().glob('run*')} == before


@pytest.mark.parametrize('initializer', sorted(train_model.INITIALIZERS))
def test_a_network_that_has_learned_nothing_yet_is_no_collapsed_one(initializer):
    train_small(
        '--initializer',
        initializer,
        '--num-epochs',
        1,
        '--num-examples',
        100,
        '--lr',
        1e-7,
        network=train.get_symbol(),
    )
    assert Checkpoints('center_loss').epochs() == [1]


def test_images_of_one_class_are_no_collapse():
    accuracy, difference = train_model.metrics(), train_model.WidestDifference()
    probability = mx.nd.array(np.eye(10)[[3, 3, 3]])
    difference.update([mx.nd.array([3, 3, 3])], [probability])
    accuracy.metrics[0].update([mx.nd.array([3, 3, 3])], [probability])
    accuracy.metrics[1].update([mx.nd.array([3, 3, 3])], [mx.nd.array([0.5])])
    train_model.stop_unless_sound('epoch 1, batch 1', accuracy, difference)
    accuracy.metrics[0].update([mx.nd.array([4])], [probability[:1]])
    with pytest.raises(Diverged, match=r'Validation-accuracy is 0\.7500'):
        train_model.stop_unless_sound('epoch 1, batch 1', accuracy, difference)


@pytest.mark.parametrize('value, collapsed', [(0.1, True), (0.2, False)])
def test_the_widest_difference_is_over_all_batches(value, collapsed):
    difference = train_model.WidestDifference()
    for first in (0.1, 0.1, value, 0.1):
        difference.update([], [mx.nd.array([[first, 1 - first]] * 3)])
    assert difference.get()[1] == pytest.approx(2 * (value - 0.1), abs=1e-6)
    assert (difference.get()[1] < train_model.COLLAPSED) == collapsed


@pytest.mark.parametrize(
    'seconds, looks',
    [(0.01, [1, 11, 21, 25]), (0.125, [*range(1, 26, 3)]), (1, list(range(1, 26)))],
)
def test_steps_are_queued_for_some_tenths_of_a_second_between_two_looks_at_the_metrics(
    seconds, looks, monkeypatch
):
    clock, seen = [0], []

    class Metrics(mx.metric.CompositeEvalMetric):
        def get_global_name_value(self):
            clock[0] = (
                param.nbatch * seconds + seconds
            )  # it waits for the device, which has done all that was queued
            seen.append(param.nbatch + 1)
            return super().get_global_name_value()

    monkeypatch.setattr(train_model.time, 'monotonic', lambda: clock[0])
    metrics = Metrics(train_model.metrics().metrics)
    with train_model.Watch(50, 25, 1, shown=False) as watch:
        for nbatch in range(25):
            param = mx.model.BatchEndParam(0, nbatch, metrics, None)
            watch(param)
    assert seen == looks


@pytest.mark.parametrize('devices', [1, 2])
@pytest.mark.parametrize('spoiled', [1, 2, 7, 24, 25])
@pytest.mark.parametrize('values', [(np.nan, np.nan), (np.inf, np.nan)])
def test_a_divergence_is_told_of_its_first_batch_whenever_it_is_seen(values, spoiled, devices):
    metrics = train_model.metrics()
    with train_model.Watch(50, 25, 1, shown=False) as watch:
        with pytest.raises(
            Diverged, match=rf'center_loss is {values[0]} in epoch 1, batch {spoiled};'
        ):
            for batch in range(1, 26):
                for device in range(devices):
                    loss = (
                        0.5 if batch < spoiled or device + 1 < devices else values[batch > spoiled]
                    )
                    metrics.metrics[1].update([mx.nd.zeros(50 // devices)], [mx.nd.array([loss])])
                watch(mx.model.BatchEndParam(0, batch - 1, metrics, None))
    assert batch - spoiled < train_model.MOST_STEPS


@pytest.mark.parametrize('averaged', [0, 0.1])
@pytest.mark.parametrize(
    'name, place, wrong',
    [
        ('fc1_weight', (3, 5), np.nan),
        ('fc1_weight', (3, 5), np.inf),
        ('embedding_weight', slice(None), 0),
    ],
)
def test_weights_that_the_last_batch_of_an_epoch_spoiled_are_not_saved(
    name, place, wrong, averaged, monkeypatch
):
    """No metric of that epoch shows them any more, in a max pooling NaN is no number that could be seen in the output, and in an average there is nearly
    nothing of the last step.
    """
    train_small('--save-model-prefix', 'run', '--num-epochs', 1, '--average-weights', averaged)
    original = train_model.Module.update

    def update(self):
        original(self)
        if self._optimizer.num_update == 2 * NUM_BATCHES:
            arg_params, _ = self.get_params()
            arg_params[name][place] = wrong
            self.set_params(*self.get_params())

    monkeypatch.setattr(train_model.Module, 'update', update)
    with pytest.raises(
        Diverged,
        match=r'fc1_weight is not finite|Validation-\w+ is nan|all classes are on one point',
    ) as divergence:
        train_small('--save-model-prefix', 'run', '--resume', '--average-weights', averaged)
    assert re.search(
        r'in epoch 2, batch 20; .* the last whole checkpoint is run-0001.params',
        str(divergence.value),
    )
    assert Checkpoints('run').epochs() == [1]


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before_it(uninterrupted):
    train_small('--save-model-prefix', 'run', '--num-epochs', 1)
    before = {path.name: path.read_bytes() for path in Path().glob('run*')}
    size = Path('run-0001.params').stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (size - 1000, limits[1])
    )  # what a full disk looks like: a write that comes up short
    try:
        with pytest.raises(
            InputError, match='cannot write the checkpoint of epoch 2 to run-0002.params'
        ):
            train_small('--save-model-prefix', 'run', '--resume')
        with pytest.raises(InputError, match='cannot write the checkpoint of epoch 1'):
            train_small('--save-model-prefix', 'run', '--seed', 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in Path().glob('*run*')} == before
    train_small('--save-model-prefix', 'run', '--resume')
    assert_equals(uninterrupted)


@pytest.mark.parametrize('begin', ['second epoch', 'over an old run'])
def test_killed_between_any_two_steps_of_a_checkpoint_only_whole_ones_are_found(
    begin, uninterrupted, monkeypatch
):
    """Whatever was done to the folder, a copy is made before: that is what a kill there leaves."""
    for path in uninterrupted.glob('run-*'):
        if begin == 'over an old run' or '0001' in path.name:
            shutil.copy(path, path.name)
    steps = []

    def watched(original):
        def step(*arguments, **options):
            steps.append(Path(f'step{len(steps)}'))
            shutil.copytree('.', steps[-1], ignore=shutil.ignore_patterns('step*'))
            return original(*arguments, **options)

        return step

    line = (
        ['--resume', '--num-epochs', 2]
        if begin == 'second epoch'
        else ['--seed', 1, '--num-epochs', 1]
    )
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', watched(os.replace))
        patch.setattr(Path, 'unlink', watched(Path.unlink))
        train_small('--save-model-prefix', 'run', *line)
    assert len(steps) >= 6
    finished = {
        uninterrupted / 'run-0001.params',
        uninterrupted / 'run-0002.params',
        uninterrupted / 'run-0003.params',
        Path('run-0001.params').resolve(),
    }
    whole = {train_model.digest(path) for path in finished}
    for step in steps:
        checkpoints = Checkpoints(str(step / 'run'))
        for epoch in checkpoints.epochs():
            try:
                checkpoints.load(epoch)
            except DamagedCheckpoint:
                assert begin == 'over an old run' and epoch == 1
            else:
                assert train_model.digest(checkpoints.params(epoch)) in whole
        if begin == 'second epoch':
            assert checkpoints.epochs()[0] == 1


def test_what_a_killed_process_left_half_written_is_removed():
    ended = subprocess.Popen(['true'])
    ended.wait()
    names = [
        f'.run-{name}.{pid}'
        for pid in (ended.pid, os.getppid())
        for name in ('symbol.json', '0002.params', '12345.states')
    ]
    for name in [*names, f'.running-0001.params.{ended.pid}', f'.run-0002.other.{ended.pid}']:
        Path(name).touch()
    Checkpoints('run').check_folder()
    assert sorted(os.listdir()) == sorted(
        [*names[3:], f'.running-0001.params.{ended.pid}', f'.run-0002.other.{ended.pid}']
    )


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own that holds one checkpoint of LeNet, not two, and a function that mounts it anew with other options."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(options):
        return subprocess.run(
            ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', folder], stderr=subprocess.DEVNULL
        ).returncode

    if not shutil.which('mount') or mount('size=5m'):
        pytest.skip('no disk can be mounted here')
    try:
        yield folder, mount
    finally:
        subprocess.run(['umount', folder], check=True)


def script(name, *line, cwd):
    result = subprocess.run(
        [sys.executable, ROOT / name, '--dataset', 'mnist-5k', *map(str, line)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert 'Traceback' not in result.stderr and 'Logging error' not in result.stderr
    return result.returncode, result.stderr.splitlines()[-1] if result.stderr else ''


def test_on_a_full_disk_the_last_whole_checkpoint_stays_and_the_run_goes_on_later(small_disk):
    disk, mount = small_disk
    line = ['--num-examples', 200, '--num-epochs', 2]
    status, told = script('train.py', *line, cwd=disk)
    assert status == 2
    assert re.match(
        'train.py: error: cannot write the checkpoint of epoch 2 to center_loss-0002.params: .*; '
        'the last whole checkpoint is center_loss-0001.params; continue with: python .* --resume',
        told,
    )
    assert sorted(path.name for path in disk.iterdir()) == [
        'center_loss-0001.params',
        'center_loss-0001.states',
        'center_loss-symbol.json',
        'log.txt',
    ]
    (disk / 'rest').write_bytes(bytes(8))
    with contextlib.suppress(OSError), open(disk / 'rest', 'ab', 0) as rest:
        while True:
            rest.write(bytes(4096))
    status, told = script('vis.py', cwd=disk)
    assert (status, told) == (
        2,
        'vis.py: error: center_loss.png cannot be written: No space left on device',
    )
    assert not (disk / 'center_loss.png').exists()
    status, told = script('train.py', *line, '--resume', cwd=disk)
    assert status == 2 and re.search('No space left on device|disk is full', told)
    (disk / 'rest').unlink()
    mount('remount,size=20m')
    assert script('train.py', *line, '--resume', cwd=disk)[0] == 0
    assert Checkpoints(disk / 'center_loss').epochs() == [1, 2]


def test_on_a_disk_that_may_only_be_read_it_is_told_before_the_training(small_disk):
    disk, mount = small_disk
    mount('remount,ro')
    assert script('train.py', '--save-model-prefix', disk / 'run', cwd='.') == (
        2,
        f'train.py: error: cannot write checkpoints to --save-model-prefix={disk}/run: Read-only file system ({disk})',
    )
    assert script('train.py', '--log_dir', disk, cwd='.') == (
        2,
        f'train.py: error: cannot write the log file {disk}/log.txt: Read-only file system; see --log_dir and --log_file',
    )
    assert script('vis.py', '--output', disk / 'picture.png', cwd='.') == (
        2,
        f'vis.py: error: --output={disk}/picture.png cannot be written: no such folder, or no permission ({disk})',
    )
    assert os.listdir() == ['disk'] and os.listdir(disk) == []


def test_a_prefix_that_mxnet_cannot_take_is_told():
    with pytest.raises(InputError, match='it is not UTF-8'):
        Checkpoints('\udcff').check_folder()


def test_without_permission_it_is_told_before_the_training():
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        if user == 0:  # who may write everywhere
            os.seteuid(65534)
        try:
            with pytest.raises(
                InputError,
                match='cannot write checkpoints to --save-model-prefix=.*/run: Permission denied',
            ):
                Checkpoints(f'{folder}/run').check_folder()
        finally:
            os.seteuid(user)


def test_a_log_that_cannot_be_written_stops_the_run():
    if not os.path.exists('/dev/full'):
        pytest.skip('no /dev/full on this machine')
    with pytest.raises(InputError, match='cannot write the log file /dev/full: .*No space left'):
        train_small('--log_dir', '/dev', '--log_file', 'full')


def test_a_log_that_cannot_be_written_any_more_stops_the_run_and_says_how_to_go_on(monkeypatch):
    original = train_model.Checkpoints.save

    def save(self, *arguments):
        original(self, *arguments)
        (log,) = (
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, train_model.LogFile)
        )
        log.setStream(open('/dev/full', 'a')).close()

    monkeypatch.setattr(train_model.Checkpoints, 'save', save)
    with pytest.raises(
        InputError,
        match='cannot write the log file .*log.txt: .*No space left.*the last whole checkpoint is run-0001.params; continue',
    ):
        train_small('--save-model-prefix', 'run')
    assert Checkpoints('run').epochs() == [1]


def test_a_checkpoint_without_its_file_names_those_that_are_there(uninterrupted):
    checkpoints = Checkpoints(uninterrupted / 'run')
    with pytest.raises(
        DamagedCheckpoint,
        match='there is no .*run-0009.params; epochs of .*run that have a checkpoint: 1, 2, 3',
    ):
        checkpoints.load_params(9)


def start_training(*line):
    command = [
        sys.executable,
        ROOT / 'train.py',
        '--dataset',
        'mnist-5k',
        '--num-examples',
        2000,
        '--batch-size',
        50,
        *line,
    ]
    return subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, (
            process.stderr.read() if process.poll() is not None else 'too slow'
        )
        time.sleep(0.01)


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_how_to_continue(number, status):
    process = start_training('--num-epochs', 500)
    wait_for(Path('center_loss-0002.params').exists, process)
    process.send_signal(number)
    _, told = process.communicate(timeout=30)
    assert process.returncode == status
    assert 'Traceback' not in told
    last = told.splitlines()[-1]
    newest = Checkpoints('center_loss').epochs()[-1]
    assert (
        f'stopped: the last whole checkpoint is center_loss-{newest:04d}.params; continue with: python '
        in last
        and last.endswith('--resume')
    )
    assert last == Path('log.txt').read_text().splitlines()[-1]


def test_a_run_that_is_stopped_in_its_first_epoch_says_that_nothing_is_left():
    process = start_training('--num-epochs', 500, '--num-examples', 4000, '--batch-size', 1)
    wait_for(
        lambda: Path('log.txt').exists() and 'Batch [0-50]' in Path('log.txt').read_text(), process
    )
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 143
    assert (
        'stopped: no epoch of center_loss was finished, there is nothing to continue from'
        in told.splitlines()[-1]
    )


@pytest.mark.parametrize(
    'name',
    [
        'train.py',
        'vis.py',
        *(
            f'tests/{name}.py'
            for name in (
                'benchmark',
                'benchmark_devices',
                'exit_cleanly',
                'fuzz_data',
                'kill_at_random',
                'many_classes',
                'reproduce',
            )
        ),
    ],
)
@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_it_is_imported_it_ends_without_a_word(name, number, status):
    process = subprocess.Popen(
        [sys.executable, ROOT / name], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: 'libmxnet' in Path(f'/proc/{process.pid}/maps').read_text(), process)
    process.send_signal(number)
    assert (*process.communicate(timeout=30), process.returncode) == ('', '', status)
    assert os.listdir() == []


@pytest.mark.parametrize('number, status', [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_while_mxnet_calls_back_into_python_it_ends_without_a_word(number, status):
    """An exception would not come through there: MXNet went on with what the callback had not filled in, and crashed."""
    program = f"""if True:
        import os, sys; sys.path.insert(0, {str(ROOT)!r})
        from runtime import run_script, mx
        import center_loss
        @mx.operator.register('stopped')
        class Stopped(center_loss.CenterLossProp):
            def list_arguments(self):
                os.kill(os.getpid(), {int(number)})
                return super().list_arguments()
        run_script(lambda: mx.sym.Custom(mx.sym.var('x'), mx.sym.var('y'), op_type='stopped', num_class=3))"""
    result = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, timeout=60
    )
    assert (result.stdout, result.stderr, result.returncode) == ('', '', status)


def test_every_way_to_end_a_run_is_clean():
    """A few of what tests/exit_cleanly.py does many times."""
    result = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'exit_cleanly.py', '--runs', '7'],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r'runs: 7 in \d+ s, wrong: 0', result.stdout)


def test_killed_at_random_it_resumes_to_the_same_weights(tmp_path):
    """A few of what tests/kill_at_random.py does many times."""
    result = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'kill_at_random.py', '--kills', '4', '--seed', '1'],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r'kills: 4\b', result.stdout)


def test_a_failure_of_any_kind_is_one_sentence():
    for kind, status in ((Failure, 1), (InputError, 2), (DamagedCheckpoint, 2), (Diverged, 1)):
        assert kind.status == status
