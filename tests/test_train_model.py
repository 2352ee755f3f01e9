"""Training, checkpoints, resume and what happens when a run is stopped or cannot go on; on real digits, with a small network."""

import functools
import logging
import os
import re
import resource
import signal
import subprocess
import sys
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
    net = mx.sym.Activation(mx.sym.FullyConnected(net, num_hidden=hidden, name='fc1'), act_type='tanh')
    embedding = mx.sym.FullyConnected(net, num_hidden=embedding_dim, name='embedding')
    softmax = mx.sym.SoftmaxOutput(mx.sym.FullyConnected(embedding, num_hidden=10, name='fc2'), name='softmax')
    center = mx.sym.Custom(data=embedding, label=mx.sym.var('center_label'), op_type='centerloss', name='center_loss',
                           num_class=10, scale=weight, normalization='null')
    return mx.sym.Group([softmax, center])


def options(*line):
    return train.parse_args(['--batch-size', '50', '--num-examples', '1000', '--num-epochs', '3', '--lr', '0.1', *map(str, line)])


def train_small(*line, network=None, **arguments):
    args = options(*line)
    loader = functools.partial(data.mnist_iterator, dataset='mnist-5k', seed=args.seed, num_examples=args.num_examples)
    return fit(args, small_network() if network is None else network, loader, (1, 28, 28), **arguments)


def arrays_of(path):
    return {name: value.asnumpy() for name, value in mx.nd.load(str(path)).items()}


def assert_same_arrays(first, second):
    first, second = arrays_of(first), arrays_of(second)
    assert first.keys() == second.keys()
    for name in first.keys() - {'digest', 'options'}:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def without_times(log):
    """The lines of a log but for the times and the speeds, and for what is said before the first batch."""
    return [re.sub(r'Speed: \S+|Time cost=\S+|^\S+ \S+ ', '', line) for line in log.splitlines() if 'Epoch[' in line]


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
    assert without_times(Path('log.txt').read_text()) == without_times((uninterrupted / 'log.txt').read_text())
    train_small('--save-model-prefix', 'other', '--seed', 1, '--num-epochs', 1)
    assert (arrays_of('other-0001.params')['arg:fc1_weight'] != arrays_of('run-0001.params')['arg:fc1_weight']).any()


@pytest.mark.parametrize('devices', [1, 2])
def test_a_continued_run_equals_one_that_was_never_stopped(devices, tmp_path):
    contexts = [mx.cpu(i) for i in range(devices)]
    folder = tmp_path / 'uninterrupted'
    folder.mkdir()
    line = ['--lr-factor-epoch', 1.5]  # the schedule goes on as well
    train_small(*line, '--save-model-prefix', folder / 'run', '--log_dir', folder, devices=contexts)
    train_small(*line, '--save-model-prefix', 'run', '--num-epochs', 1, devices=contexts)
    train_small(*line, '--save-model-prefix', 'run', '--num-epochs', 2, '--resume', devices=contexts)
    train_small(*line, '--save-model-prefix', 'run', '--resume', devices=contexts)
    assert_equals(folder)
    assert without_times(Path('log.txt').read_text()) == without_times((folder / 'log.txt').read_text())


def test_resuming_where_there_is_nothing_begins_at_the_beginning(uninterrupted):
    train_small('--save-model-prefix', 'run', '--resume')
    assert_equals(uninterrupted)
    assert 'no checkpoint of run to resume from: starting at the beginning' in Path('log.txt').read_text()


def test_resuming_a_finished_run_says_so_and_changes_nothing(uninterrupted, caplog):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.glob('run*')}
    train_small('--save-model-prefix', uninterrupted / 'run', '--resume')
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.glob('run*')} == before
    assert 'has all of the 3 epochs already: raise --num-epochs' in caplog.text


@pytest.mark.parametrize('harm', ['truncate', 'flip', 'states missing', 'states of another epoch', 'empty', 'states truncated'])
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
    assert 'run-0002.states' in caplog.text and 'going back to the checkpoint before it' in caplog.text
    assert_equals(uninterrupted)


def test_resuming_with_other_options_says_which(uninterrupted, caplog):
    train_small('--save-model-prefix', 'run', '--num-epochs', 1)
    train_small('--save-model-prefix', 'run', '--num-epochs', 2, '--resume', '--lr', 0.05, '--alpha', 0.1)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == ['resuming with alpha=0.1, while run-0001.params was trained with 0.5',
                    'resuming with lr=0.05, while run-0001.params was trained with 0.1']


def test_resuming_with_another_network_is_refused():
    train_small('--save-model-prefix', 'run', '--num-epochs', 1)
    with pytest.raises(InputError, match='run-0001.params is a checkpoint of another network: .*embedding_weight'):
        train_small('--save-model-prefix', 'run', '--resume', network=small_network(embedding_dim=3))


def test_a_new_run_says_what_it_overwrites_and_leaves_nothing_of_the_old_one(caplog):
    train_small('--save-model-prefix', 'run', '--num-epochs', 3)
    train_small('--save-model-prefix', 'running', '--num-epochs', 1)
    train_small('--save-model-prefix', 'run', '--num-epochs', 2, '--seed', 3)
    assert 'the 3 checkpoints of an earlier run of run are overwritten' in caplog.text
    assert Checkpoints('run').epochs() == [1, 2]
    assert Checkpoints('running').epochs() == [1]
    assert sorted(path.name for path in Path().glob('run-*')) == [
        'run-0001.params', 'run-0001.states', 'run-0002.params', 'run-0002.states', 'run-symbol.json']


def test_fine_tuning_takes_what_fits_and_says_so(caplog):
    caplog.set_level(logging.INFO)
    train_small('--save-model-prefix', 'old', '--num-epochs', 1)
    wider = small_network(embedding_dim=3)
    train_small('--save-model-prefix', 'new', '--num-epochs', 1, '--model-prefix', 'old', '--load-epoch', 1, '--lr', 1e-30, network=wider)
    old, new = arrays_of('old-0001.params'), arrays_of('new-0001.params')
    for name in ('arg:fc1_weight', 'arg:fc1_bias', 'arg:fc2_bias'):
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)
    assert new['arg:embedding_weight'].shape == (3, 16) and new['aux:center_loss_center_bias'].shape == (10, 3)
    said = caplog.text
    assert re.search(r'old-0001.params: left embedding_weight, of shape \(2, 16\) where the network has \(3, 16\)', said)
    assert re.search(r'old-0001.params: left center_loss_center_bias, of shape \(10, 2\)', said)
    assert re.search(r'old-0001.params: took fc1_weight, fc1_bias, fc2_bias$', said, re.MULTILINE)


def test_fine_tuning_takes_the_centers_where_they_fit():
    train_small('--save-model-prefix', 'old', '--num-epochs', 1)
    taken = {}

    def loader(*arguments, **options):
        taken['batches'] = data.mnist_iterator(*arguments, **options, dataset='mnist-5k', num_examples=50)
        return taken['batches']

    fit(options('--save-model-prefix', 'new', '--num-epochs', 1, '--model-prefix', 'old', '--load-epoch', 1, '--lr', 1e-30),
        small_network(), loader, (1, 28, 28))
    old, new = arrays_of('old-0001.params'), arrays_of('new-0001.params')
    moved = np.abs(new['aux:center_loss_center_bias'] - old['aux:center_loss_center_bias'])  # one step of alpha / 2 at the most
    assert moved.max() < np.abs(old['aux:center_loss_center_bias']).max()
    np.testing.assert_array_equal(new['arg:embedding_weight'], old['arg:embedding_weight'])


def test_the_learning_rate_falls_where_the_schedule_says():
    for line, fallen in ((['--lr-factor-epoch', 0.5], [10, 20, 30]), (['--lr-factor-epoch', 1], [20, 40]), (['--lr-factor-epoch', 1.25], [25, 50])):
        args = options('--lr', 0.8, '--lr-factor', 0.5, *line)
        rate = train_model.optimizer_options(args, NUM_BATCHES, 0)['lr_scheduler']
        for number, update in enumerate(fallen):
            assert rate(update) == pytest.approx(0.8 * 0.5 ** number)
            assert rate(update + 1) == pytest.approx(0.8 * 0.5 ** (number + 1))
    assert train_model.optimizer_options(args, NUM_BATCHES, 3)['begin_num_update'] == 60


def test_a_gradient_is_clipped_to_what_is_asked(caplog):
    train_small('--save-model-prefix', 'clipped', '--num-epochs', 1, '--num-examples', 50, '--clip-gradient', 1e-7)
    train_small('--save-model-prefix', 'free', '--num-epochs', 1, '--num-examples', 50)
    moved = [arrays_of(f'{name}-0001.states')['momentum:embedding_bias'] for name in ('clipped', 'free')]
    assert np.abs(moved[0]).max() <= 0.1 * 1.001e-7  # momentum after one step is lr times the gradient
    assert np.abs(moved[1]).max() > 1e-5


def test_divergence_stops_with_where_and_what_and_keeps_the_last_checkpoint():
    train_small('--save-model-prefix', 'run', '--num-epochs', 1)
    before = Path('run-0001.params').read_bytes()
    with pytest.raises(Diverged, match=r'center_loss is (nan|inf) in epoch 2, batch \d+; try a smaller --lr .* checkpoint is run-0001.params'):
        train_small('--save-model-prefix', 'run', '--resume', '--lr', 1e4)
    assert Path('run-0001.params').read_bytes() == before
    assert Checkpoints('run').epochs() == [1]
    assert 'training diverged' in Path('log.txt').read_text().splitlines()[-1]


def test_a_checkpoint_that_cannot_be_written_leaves_the_ones_before_it(uninterrupted):
    train_small('--save-model-prefix', 'run', '--num-epochs', 1)
    before = {path.name: path.read_bytes() for path in Path().glob('run*')}
    size = Path('run-0001.params').stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1000, limits[1]))  # what a full disk looks like: a write that comes up short
    try:
        with pytest.raises(InputError, match='cannot write the checkpoint of epoch 2 to run-0002.params'):
            train_small('--save-model-prefix', 'run', '--resume')
        with pytest.raises(InputError, match='cannot write the checkpoint of epoch 1'):
            train_small('--save-model-prefix', 'run', '--seed', 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in Path().glob('*run*')} == before
    train_small('--save-model-prefix', 'run', '--resume')
    assert_equals(uninterrupted)


def test_a_log_that_cannot_be_written_stops_the_run():
    if not os.path.exists('/dev/full'):
        pytest.skip('no /dev/full on this machine')
    with pytest.raises(InputError, match='cannot write the log file /dev/full: .*No space left'):
        train_small('--log_dir', '/dev', '--log_file', 'full')


def test_a_checkpoint_without_its_file_names_those_that_are_there(uninterrupted):
    checkpoints = Checkpoints(uninterrupted / 'run')
    with pytest.raises(DamagedCheckpoint, match='there is no .*run-0009.params; epochs of .*run that have a checkpoint: 1, 2, 3'):
        checkpoints.load_params(9)


def start_training(*line):
    command = [sys.executable, ROOT / 'train.py', '--dataset', 'mnist-5k', '--num-examples', 2000, '--batch-size', 50, *line]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read() if process.poll() is not None else 'too slow'
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
    assert f'stopped: the last whole checkpoint is center_loss-{newest:04d}.params; continue with: python ' in last and last.endswith('--resume')
    assert last == Path('log.txt').read_text().splitlines()[-1]


def test_a_run_that_is_stopped_in_its_first_epoch_says_that_nothing_is_left():
    process = start_training('--num-epochs', 500, '--num-examples', 4000, '--batch-size', 1)
    wait_for(lambda: Path('log.txt').exists() and 'Batch [0-50]' in Path('log.txt').read_text(), process)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 143
    assert 'stopped: no epoch of center_loss was finished, there is nothing to continue from' in told.splitlines()[-1]


def test_killed_at_random_it_resumes_to_the_same_weights(tmp_path):
    """A few of what tests/kill_at_random.py does many times."""
    result = subprocess.run([sys.executable, ROOT / 'tests' / 'kill_at_random.py', '--kills', '4', '--seed', '1'],
                            capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r'kills: 4\b', result.stdout)


def test_a_failure_of_any_kind_is_one_sentence():
    for kind, status in ((Failure, 1), (InputError, 2), (DamagedCheckpoint, 2), (Diverged, 1)):
        assert kind('so it is').status == status
