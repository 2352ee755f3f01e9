"""``train.py``: a run by the command line, its options, and mistakes."""

import contextlib
import fcntl
import inspect
import json
import os
from pathlib import Path
import pty
import re
import struct
import subprocess
import sys
import termios
import types

import numpy as np
import pytest

from common.environment import mx
from common.checkpoints import Checkpoints
from common.command_line import run_script
from common.devices import check_equal_shares, choose_devices
from common.discriminants import discriminant_params
from common.errors import InputError
from common.evaluation import evaluate, verify
from common.monitoring import Diverged
import data
from helpers import ROOT, epoch_lines, logged, run_train, saved_params
import train
import train_model
import vis

VIS = ROOT / 'vis.py'  # as a run in another folder names it
QUICK = ['--dataset=mnist-5k', '--num-examples=200', '--num-epochs=1', '--batch-size=50']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Two epochs on the bundled digits."""
    folder = tmp_path_factory.mktemp('trained')
    line = ['--dataset=mnist-5k', '--num-epochs=2', '--batch-size=64', '--log-file=run.log']
    result = run_train(*line, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.fixture
def main(in_own_folder, capfd):
    """Call train.main in this process, as a program does; return what it wrote."""

    def call(*argv):
        train.main(argv)
        return capfd.readouterr()

    return call


# ---- what a run writes


@pytest.mark.slow
def test_files(trained):
    folder, result = trained
    assert {path.name for path in folder.iterdir()} == {
        'run.log',
        'center_loss-symbol.json',
        *(
            f'center_loss-000{epoch}.{kind}'
            for epoch in (1, 2)
            for kind in ('json', 'params', 'resume')
        ),
    }
    network, arg_params, aux_params = mx.model.load_checkpoint(str(folder / 'center_loss'), 2)
    assert aux_params['center_loss_center_bias'].shape == (10, 2)
    assert arg_params['embedding_weight'].shape == (2, 500)
    # The plain network, not the vectorized one that was bound.
    plain = train.get_symbol()
    for nodes, expected in zip(
        *(json.loads(symbol.tojson())['nodes'] for symbol in (network, plain)), strict=True
    ):
        assert (nodes['op'], nodes['name']) == (expected['op'], expected['name'])
        assert nodes.get('attrs') == expected.get('attrs')
    assert '\r' not in result.stderr, 'a progress bar in a pipe'


@pytest.mark.slow
def test_log(trained):
    """MXNet's format, the same in the file and on the console."""
    folder, result = trained
    lines = (folder / 'run.log').read_text().splitlines()
    assert lines == result.stderr.splitlines()
    x = r'\d+\.\d+'
    values = rf'accuracy={x}\tcross-entropy={x}\tcenter_loss={x}'
    for epoch in (0, 1):
        names = ('accuracy', 'cross-entropy', 'center_loss')
        expected = [
            rf'Batch \[0-50\]\tSpeed: {x} samples/sec\t{values}',
            *(f'Train-{name}={x}' for name in names),
            f'Time cost={x}',
            *(f'Validation-{name}={x}' for name in names),
        ]
        found = [line for line in lines if f'Epoch[{epoch}]' in line]
        for line, pattern in zip(found, expected, strict=True):
            assert re.fullmatch(
                r'\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} Node\[0\] '
                rf'Epoch\[{epoch}\] {pattern}',
                line,
            ), line


@pytest.mark.slow
def test_closing_line(trained):
    folder, result = trained
    accuracy = logged(r'Epoch\[1\] Validation-accuracy', folder / 'run.log')[0]
    assert accuracy > 0.5
    assert result.stdout == (
        f'accuracy on the test images {accuracy:.2%}; python {VIS} draws the embeddings\n'
    )


@pytest.mark.slow
def test_finished_run_is_resumed(trained):
    folder, _ = trained
    line = ['--dataset=mnist-5k', '--num-epochs=2', '--batch-size=64', '--log-file=other.log']
    result = run_train(*line, '--resume', cwd=folder)
    assert (result.returncode, result.stdout) == (0, '')
    assert 'center_loss has all of the 2 epochs already' in result.stderr
    assert 'Traceback' not in result.stderr
    (folder / 'other.log').unlink()


@pytest.mark.slow
def test_bar_on_a_terminal(in_own_folder):
    """Below the log's lines, which stay whole."""
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack('4H', 40, 150, 0, 0))
    command = [sys.executable, ROOT / 'train.py', *QUICK, '--num-examples=1200']
    with subprocess.Popen(command, stderr=stderr, stdout=subprocess.DEVNULL) as process:
        os.close(stderr)
        shown = b''
        with contextlib.suppress(OSError):  # a terminal that nobody writes to any more
            while part := os.read(terminal, 1 << 16):
                shown += part
    os.close(terminal)
    assert process.returncode == 0
    frames = re.split('[\r\n]+', shown.decode())
    bars = [frame for frame in frames if frame.startswith('epoch 1/1 (Epoch[0]): ')]
    assert ' 0.00/1.20k ' in bars[0]
    for said in ('images/s, ', 'accuracy=0.', 'cross-entropy=', 'center_loss='):
        assert said in bars[-1]
    lines = Path('log.txt').read_text().splitlines()
    assert [frame for frame in frames if ' Node[0] ' in frame] == lines


# ---- options


@pytest.mark.slow
def test_two_cpu_contexts(trained, in_own_folder):
    line = ['--dataset=mnist-5k', '--num-epochs=2', '--batch-size=64', '--cpus=0,1']
    result = run_train(*line, cwd='.')
    assert result.returncode == 0, result.stderr
    for name in ('Train-accuracy', 'Validation-accuracy', 'Validation-center_loss'):
        one, two = (
            logged(rf'Epoch\[1\] {name}', log)[0] for log in (trained[0] / 'run.log', 'log.txt')
        )
        assert two == pytest.approx(one, rel=0.2), name


@pytest.mark.slow
def test_clipping_keeps_twice_the_rate_stable(main):
    line = ['--dataset=mnist-5k', '--num-epochs=2', '--seed=2']
    line += ['--center-loss-weight=1', '--lr=0.2']
    main(*line)
    assert logged(r'Epoch\[1\] Validation-accuracy')[0] > 0.15
    with pytest.raises(Diverged, match='training diverged'):
        main(*line, '--clip-gradient=0')


@pytest.mark.slow
def test_original_recipe_trains(main):
    main('--dataset=mnist-5k', '--num-epochs=3', '--recipe=original')
    accuracy = logged(r'Epoch\[2\] Validation-accuracy')[0]
    assert 0.5 < accuracy < 0.95
    # Embeddings begin at the scale of 500 features times weights of standard deviation 1.
    assert logged(r'Epoch\[0\] Train-center_loss')[0] > 3


@pytest.mark.slow
def test_some_digits_in_lenet_plus_plus(main):
    line = [
        *('--dataset=mnist-5k', '--num-examples=40', '--batch-size=20', '--num-classes=2'),
        *('--embedding-dim=5', '--network=lenet++'),
    ]
    for epochs in (1, 2):
        main(*line, f'--num-epochs={epochs}', '--resume')
    assert 'mnist-5k, 40 training images, validation on 200 test' in Path('log.txt').read_text()
    params = saved_params('center_loss', 2)
    assert params['embedding_weight'].shape == (5, 1152)
    assert params['fc2_weight'].shape == params['center_loss_center_bias'].shape == (2, 5)
    assert (params['prelu1_1_slope'] != 0.25).any()
    with pytest.raises(InputError, match='is a checkpoint of another network'):
        main(*line, '--num-classes=3', '--num-epochs=3', '--resume')


def write_idx(folder, size, num_classes):
    """Two training images and a test image of every class: bars at a place of their own."""
    images = np.zeros((num_classes, size, size), np.uint8)
    for label, image in enumerate(images):
        image[label * size // num_classes, :] = image[:, label % size] = 255
    for part, repeats in (('train', 2), ('t10k', 1)):
        labels = np.tile(np.arange(num_classes, dtype=np.uint8), repeats)
        for kind, array in (('images-idx3', images[labels]), ('labels-idx1', labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, '>u4').tobytes()
            (folder / f'{part}-{kind}-ubyte').write_bytes(header + array.tobytes())


@pytest.mark.slow
@pytest.mark.parametrize('network, features', [('lenet', 50 * 5 * 5), ('lenet++', 128 * 4 * 4)])
def test_own_data(main, network, features, tmp_path):
    """Images of 32 x 32 pixels and 47 classes, as those of EMNIST's balanced set."""
    write_idx(tmp_path, 32, 47)
    line = [f'--data-dir={tmp_path}', '--batch-size=47', f'--network={network}']
    said = main(*line, '--num-epochs=1').out
    assert said.endswith(f'; python {VIS} --data-dir={tmp_path} draws the embeddings\n')
    params = saved_params('center_loss', 1)
    assert params['fc2_weight'].shape == params['center_loss_center_bias'].shape == (47, 2)
    wide = 'fc1_weight' if network == 'lenet' else 'embedding_weight'
    assert params[wide].shape[1] == features
    facts = Checkpoints('center_loss').load_inference(1)
    assert (facts['dataset'], facts['image_shape']) == ('custom', [32, 32])
    assert facts['class_names'] == [str(label) for label in range(47)]
    vis.main([f'--data-dir={tmp_path}'])
    with pytest.raises(InputError, match='center_loss was trained on data of your own: name their'):
        vis.main()
    main(*line, '--num-epochs=2', '--resume')
    assert 'resuming with' not in Path('log.txt').read_text()
    with pytest.raises(InputError, match='custom has the classes 0 to 46, and no class 47'):
        main(*line, '--num-classes=48')


@pytest.mark.slow
def test_resume_names_other_data(main, tmp_path):
    write_idx(tmp_path, 28, 10)
    main(f'--data-dir={tmp_path}', '--batch-size=10', '--num-epochs=1')
    main(*QUICK[:2], '--batch-size=10', '--num-epochs=2', '--resume')
    said = (
        'resuming with trained_on=mnist-5k, while center_loss-0001.params was trained with custom'
    )
    assert said in Path('log.txt').read_text()


def test_resume_takes_the_same_data_by_another_name(main):
    main(*QUICK)
    folder = f'--data-dir={ROOT / "data" / "mnist-5k"}'
    main(folder, *QUICK[1:], '--num-epochs=2', '--resume')
    assert 'resuming with' not in Path('log.txt').read_text()
    assert Path('center_loss-0002.params').exists()


def test_resume_names_other_classes(main):
    """An option that one of the two runs did not have is one that differs."""
    main(*QUICK, '--num-classes=3')
    main(*QUICK, '--classes=2,1,0', '--num-epochs=2', '--resume')
    log = Path('log.txt').read_text()
    for said in 'classes=[2, 1, 0], while {} with None', 'num_classes=None, while {} with 3':
        assert f'resuming with {said.format("center_loss-0001.params was trained")}' in log


def test_resume_names_other_files(main, tmp_path):
    for name, size in ('one', 28), ('other', 28):
        (tmp_path / name).mkdir()
        write_idx(tmp_path / name, size, 10)
    changed = tmp_path / 'other' / 't10k-images-idx3-ubyte'
    changed.write_bytes(changed.read_bytes()[:-1] + b'\7')
    line = ['--batch-size=10', '--resume']
    main(*line, f'--data-dir={tmp_path / "one"}', '--num-epochs=1')
    (tmp_path / 'one').rename(tmp_path / 'moved')
    main(*line, f'--data-dir={tmp_path / "moved"}', '--num-epochs=2')
    assert 'resuming with' not in Path('log.txt').read_text()
    main(*line, f'--data-dir={tmp_path / "other"}', '--num-epochs=3')
    assert 'resuming with data_sha256=' in Path('log.txt').read_text()


def test_options_arrive(monkeypatch):
    """At the network, in both its forms, at the data and at fit."""
    seen = {}

    def fit(network, load_data, **options):
        seen.update(options, network=network, data=load_data.keywords)
        raise KeyboardInterrupt

    fit.__signature__ = inspect.signature(train_model.fit)
    monkeypatch.setattr(train, 'fit', fit)
    line = '--seed=3 --alpha=0.25 --no-bias --center-loss-weight=0.3 --embedding-lr-mult=0.4'
    with pytest.raises(KeyboardInterrupt):
        train.main([*line.split(), '--wd=0.01', '--momentum=0.5', '--validate-on=held-out'])
    assert seen['data']['seed'] == seen['seed'] == 3
    assert seen['data']['validate_on'] == 'held-out'
    assert (seen['wd'], seen['momentum']) == (0.01, 0.5)
    assert seen['initializer'] is train.INITIALIZERS['small-head']
    assert seen['initial_params'] is discriminant_params
    facts = {'class_names': tuple('0123456789'), 'image_shape': [28, 28]}
    for form in ('network', 'compute_network'):
        network = seen[form](types.SimpleNamespace(data_facts=facts))
        attributes = network.attr_dict()
        center_loss = attributes['center_loss']
        assert (center_loss['alpha'], center_loss['scale']) == ('0.25', '0.3')
        assert attributes['embedding_weight']['__lr_mult__'] == '0.4'
        assert not {'embedding_bias', 'fc2_bias'} & {*network.list_arguments()}


def test_every_option_is_used():
    """By the network, the training or the data; main itself takes the others."""
    used = {'cpus', 'gpus', 'initial_embedding', 'num_workers', 'recipe'}
    for function in (train.get_symbol, train_model.fit, data.mnist_iterator):
        used |= inspect.signature(function).parameters.keys()
    assert vars(train.parse_args([])).keys() <= used


def test_no_picture_of_one_dimension(main):
    assert main(*QUICK, '--embedding-dim=1').out.endswith('0%\n')


@pytest.mark.slow
def test_some_classes(main):
    """Networks, accuracy and verification are the same whatever the classes are called."""
    line = ['--dataset=mnist-5k', '--num-epochs=3', '--batch-size=50']
    said = main(*line, '--classes=7,0,4').out
    accuracy = float(re.search(r'accuracy on the test images (\S+)%', said)[1])
    assert accuracy > 80
    params = saved_params('center_loss', 3)
    assert params['fc2_weight'].shape == params['center_loss_center_bias'].shape == (3, 2)
    facts = Checkpoints('center_loss').load_inference(3)
    assert (facts['classes'], facts['class_names']) == ([7, 0, 4], ['7', '0', '4'])
    digits = data.load_digits('mnist-5k')
    measured = evaluate('center_loss', 3, digits.val_images, digits.val_labels)
    assert measured.seen == (7, 0, 4) and measured.num_classified == 300
    assert round(100 * measured.accuracy, 2) == accuracy
    unseen = ~np.isin(digits.val_labels, [7, 0, 4])
    assert measured.verification == verify(measured.embeddings[unseen], digits.val_labels[unseen])


def test_images_too_small_for_the_network(main, tmp_path):
    for network, size in ('lenet', 16), ('lenet++', 8):
        said = f'images of {size - 1} x {size - 1} pixels are too small for --network={network}'
        for side, expected in (
            (size - 1, pytest.raises(InputError, match=re.escape(said))),
            (
                size,
                contextlib.nullcontext(),
            ),
        ):
            write_idx(tmp_path, side, 2)
            line = [f'--data-dir={tmp_path}', '--batch-size=2', '--num-epochs=1']
            with expected:
                main(*line, f'--network={network}', f'--save-model-prefix={network}')


def test_library_call(main, monkeypatch):
    """Another program's own options are not those of train.py."""
    monkeypatch.setattr(sys, 'argv', ['other.py', '--batch-size=7', '--nonsense'])
    wrote = main(*QUICK, '--log_dir=new/folder', '--save-model-prefix=mine')
    assert wrote.out.endswith(f'; python {VIS} --model-prefix=mine draws the embeddings\n')
    log = Path('new/folder/log.txt').read_text()
    assert 'batch_size=50' in log and "dataset='mnist-5k'" in log
    assert Checkpoints('mine').load(1).options['batch_size'] == 50
    with pytest.raises(InputError, match=r'--batch-size: 0 is out of range'):
        main('--batch-size=0')


def test_defaults_without_arguments():
    """main() is the command line without options, whatever sys.argv has."""
    args = vars(train.parse_args())
    assert args['batch_size'] == 100 and args['num_epochs'] == 8 and args['dataset'] == 'auto'
    assert args['num_examples'] is None  # all, also of larger data sets


def test_abbreviations():
    args = train.parse_args(['--batch=128', '--num-ep=3', '--save-model=x', '--center=0.1'])
    assert (args.batch_size, args.num_epochs, args.save_model_prefix) == (128, 3, 'x')
    assert args.center_loss_weight == 0.1


def test_options_of_the_original():
    """All 13 of its command line."""
    args = train.parse_args(
        [
            *('--gpus=0', '--batch-size=128', '--num-epochs=20', '--lr=0.01', '--lr-factor=0.5'),
            *('--lr-factor-epoch=20', '--model-prefix=x', '--save-model-prefix=y'),
            *('--num-examples=60000', '--load-epoch=1', '--kv-store=device'),
            *('--log_file=a', '--log_dir=b'),
        ]
    )
    assert args.gpus == [0] and args.log_file == 'a' and args.log_dir == 'b'
    assert args.lr_factor_epoch == 20 and args.load_epoch == 1 and args.kv_store == 'device'


def test_held_out(main):
    wrote = main(*QUICK, '--validate-on=held-out')
    assert wrote.out.startswith('accuracy on the held-out training images ')
    assert 'mnist-5k, 200 training images, validation on 666 held-out' in wrote.err


def test_folder_of_a_user_who_is_not_there(main):
    main(*QUICK, '--log_dir=~no_such_user/logs')
    assert Path('~no_such_user/logs/log.txt').exists()


@pytest.mark.parametrize('option', ['--log_dir=~', '--log_file=~/log.txt'])
def test_log_in_the_home_folder(option, main, monkeypatch):
    monkeypatch.setenv('HOME', str(Path('home').absolute()))
    main(*QUICK, option)
    assert Path('home/log.txt').exists()


def test_load_epoch(main):
    """The prefix is that of the checkpoints that are written; Epoch[N] follows epoch N."""
    main(*QUICK, '--save-model-prefix=a')
    log = len(epoch_lines())
    wrote = main(*QUICK, '--save-model-prefix=a', '--load-epoch=1', '--num-epochs=2')
    assert Checkpoints('a').epochs() == [1, 2]
    assert all(line.startswith('Node[0] Epoch[1] ') for line in epoch_lines()[log:])
    assert 'a-0001.params: continuing at epoch 1; momentum begins at 0' in wrote.err
    main(*QUICK, '--model-prefix=a', '--load-epoch=2', '--num-epochs=3', '--keep-checkpoints=1')
    assert Checkpoints('a').epochs() == [1, 2] and Checkpoints('center_loss').epochs() == [3]


def test_keep_checkpoints(main):
    main(*QUICK, '--num-epochs=3', '--keep-checkpoints=2')
    assert Checkpoints('center_loss').epochs() == [2, 3]


def test_workers_are_train(main, monkeypatch):
    """Also where another program calls main."""
    calls = []
    monkeypatch.setattr(sys, 'argv', ['other.py'])
    monkeypatch.setattr(train, 'run_workers', lambda *arguments: calls.append(arguments))
    main(*QUICK, '--num-workers=2')
    ((command, count, hint),) = calls
    assert command == [sys.executable, str(ROOT / 'train.py'), *QUICK, '--num-workers=2']
    assert count == 2 and hint() == (
        'this run of center_loss has finished no epoch, there is nothing of it to resume'
    )


def test_hint_of_workers_is_of_this_run(main, monkeypatch):
    main(*QUICK)
    os.utime('center_loss-0001.params', (1000, 1000))
    hints = []
    monkeypatch.setattr(train, 'run_workers', lambda command, count, hint: hints.append(hint()))
    main(*QUICK, '--num-workers=2')
    main(*QUICK, '--num-workers=2', '--resume')
    assert 'has finished no epoch' in hints[0]
    assert 'the last whole checkpoint is center_loss-0001.params' in hints[1]


def test_num_workers_choose_the_kvstore():
    for line, kind in (
        ('', 'local'),
        ('--kv-store=device', 'device'),
        ('--num-workers=2', 'dist_sync'),
        ('--num-workers=2 --kv-store=device', 'dist_device_sync'),
        ('--num-workers=2 --kv-store=dist_device_sync', 'dist_device_sync'),
    ):
        assert train.parse_args(line.split()).kv_store == kind


# ---- mistakes


MISTAKES = {
    '--gpus=a': "--gpus: 'a' is not a list of device numbers",
    '--gpus=0,0': "--gpus: '0,0' names a device twice",
    '--gpus=-1': "--gpus: '-1' is not a list",
    '--gpus=0 --cpus=0': '--gpus and --cpus',
    '--cpus=0,1,2.5': "--cpus: '0,1,2.5' is not a list of device numbers",
    '--cpus=1,16': "--cpus: '1,16' names a device above 15",
    '--gpus=99999999999999999999': "--gpus: '99999999999999999999' names a device above 15",
    '--batch-size=0': '--batch-size: 0 is out of range: it has to be at least 1',
    '--batch-size=1e3': "--batch-size: '1e3' is not a whole number",
    '--batch=0': '--batch-size: 0 is out of range: it has to be at least 1',
    '--batch-size=99 --cpus=0,1': '--batch-size=99 cannot be shared equally by 2 devices',
    '--batch-size=4001': '--batch-size=4001 is too large',
    '--batch-size=999999999999999999999': '999999999999999999999',
    '--num-examples=0': '--num-examples: 0 is out of range',
    '--num-examples=all': "--num-examples: 'all' is not a whole number",
    '--num-examples=99': '--batch-size=100 is too large',
    '--num-classes=1': '--num-classes: 1 is out of range: it has to be at least 2',
    '--num-classes=1000000000000': '--num-classes: 1000000000000 is out of range',
    '--classes=3': "--classes: '3' is not a list of two or more different classes",
    '--classes=3,4,3': "--classes: '3,4,3' is not a list of two or more different classes",
    '--classes=3,x': "--classes: '3,x' is not a list of two or more different classes",
    '--classes=3,10': 'mnist-5k has the classes 0 to 9, and no class 10',
    '--classes=3,4 --num-classes=2': '--classes and --num-classes both name the classes',
    '--load-epoch=20': 'there is no center_loss-0020.params',
    '--embedding-dim=0': '--embedding-dim: 0 is out of range: it has to be at least 1',
    '--embedding-dim=10000000000': '--embedding-dim: 10000000000 is out of range',
    '--center-loss-weight=1e39': '--center-loss-weight: 1e39 is out of range',
    '--network=resnet': "--network: invalid choice: 'resnet'",
    '--recipe=new': "--recipe: invalid choice: 'new'",
    '--recipe=original --network=lenet++': '--recipe=original is for lenet: leave out',
    '--num-epochs=-3': '--num-epochs: -3 is out of range',
    '--num-epochs=2.5': "--num-epochs: '2.5' is not a whole number",
    '--lr=0': '--lr: 0 is out of range: it has to be greater than 0',
    '--lr=nan': "--lr: 'nan' is not a finite number",
    '--lr=fast': "--lr: 'fast' is not a finite number",
    '--lr=1e308': '--lr: 1e308 is out of range: it has to be at most 1000000',
    '--momentum=1.5': '--momentum: 1.5 is out of range',
    '--momentum=-0.1': '--momentum: -0.1 is out of range',
    '--wd=-1': '--wd: -1 is out of range',
    '--lr-factor=0': '--lr-factor: 0 is out of range: it has to be greater than 0',
    '--lr-factor=half': "--lr-factor: 'half' is not a finite number",
    '--lr-factor=1.5': '--lr-factor: 1.5 is out of range: it has to be at most 1',
    '--lr-factor-epoch=0': '--lr-factor-epoch: 0 is out of range',
    '--lr-factor-epoch=1e308': '--lr-factor-epoch: 1e308 is out of range',
    '--lr-factor-epoch=inf': "--lr-factor-epoch: 'inf' is not a finite number",
    '--center-loss-weight=-0.1': '--center-loss-weight: -0.1 is out of range',
    '--center-loss-weight=big': "--center-loss-weight: 'big' is not a finite number",
    '--alpha=2': '--alpha: 2 is out of range: it has to be at most 1',
    '--alpha=-0.5': '--alpha: -0.5 is out of range: it has to be at least 0',
    '--alpha=x': "--alpha: 'x' is not a finite number",
    '--warmup-epochs=-1': '--warmup-epochs: -1 is out of range: it has to be at least 0',
    '--warmup-epochs=one': "--warmup-epochs: 'one' is not a finite number",
    '--embedding-lr-mult=0': '--embedding-lr-mult: 0 is out of range',
    '--embedding-lr-mult=1e308': '--embedding-lr-mult: 1e308 is out of range',
    '--embedding-lr-mult=x': "--embedding-lr-mult: 'x' is not a finite number",
    '--clip-gradient=1e308': '--clip-gradient: 1e308 is out of range',
    '--clip-gradient=1e-320': '--clip-gradient: 1e-320 is out of range',
    '--clip-gradient=x': "--clip-gradient: 'x' is not a finite number",
    '--clip-gradient=-0.1': '--clip-gradient: -0.1 is out of range',
    '--average-weights=1.5': '--average-weights: 1.5 is out of range: it has to be at most 1',
    '--average-weights=-1': '--average-weights: -1 is out of range: it has to be at least 0',
    '--seed=-1': '--seed: -1 is out of range',
    '--seed=99999999999': '--seed: 99999999999 is out of range',
    '--seed=x': "--seed: 'x' is not a whole number",
    '--no-bias=1': '--no-bias: ignored explicit argument',
    '--resume=1': '--resume: ignored explicit argument',
    '--initializer=zeros': "--initializer: invalid choice: 'zeros'",
    '--initializer=mixed': '--initializer: mixed was not what it said and is gone: original',
    '--kv-store=dist_async': '--kv-store: dist_async lets every worker go on with weights of',
    '--kv-store=nccl': "--kv-store: invalid choice: 'nccl'",
    '--kv-store=dist_sync': '--kv-store=dist_sync needs DMLC_ROLE, ',
    '--num-workers=0': '--num-workers: 0 is out of range',
    '--num-workers=2 --batch-size=2001': '--batch-size=2001',
    '--dataset=cifar': "--dataset: invalid choice: 'cifar'",
    '--validate-on=train': "--validate-on: invalid choice: 'train'",
    '--data-dir=nowhere': 'nowhere',
    '--data-dir=': 'train-images-idx3-ubyte',
    '--data-dir=/dev/null': '/dev/null',
    '--keep-checkpoints=0': '--keep-checkpoints: 0 is out of range',
    '--load-epoch=0': '--load-epoch: 0 is out of range',
    '--load-epoch=last': "--load-epoch: 'last' is not a whole number",
    '--load-epoch=3': 'there is no center_loss-0003.params; epochs of center_loss that have',
    '--model-prefix=x': '--model-prefix requires --load-epoch',
    '--model-prefix=x --load-epoch=3': 'there is no x-0003.params; epochs of x that have a chec',
    '--save-model-prefix=no/where': 'no/where',
    '--save-model-prefix=': 'it has to end with the beginning of a file name',
    '--save-model-prefix=runs/': 'it has to end with the beginning of a file name',
    '--save-model-prefix=..': 'it has to end with the beginning of a file name',
    '--save-model-prefix=/proc/x': 'No such file or directory (/proc)',
    f'--save-model-prefix={"x" * 300}': 'File name too long',
    '--log_file=.': 'cannot write the log file .: it is not a regular file',
    '--log_file=': 'cannot write the log file .: it is not a regular file',
    '--log_file=/dev/full': 'cannot write the log file /dev/full: it is not a regular file',
    '--log_file=center_loss-0001.params': '-0001.params is a checkpoint of center_loss',
    '--log_dir=new --batch-size=4001': '--batch-size=4001 is too large',
    '--log=x': 'ambiguous option: --log',
    'digits': 'unrecognized arguments: digits',
    '--no-such-option': 'unrecognized arguments: --no-such-option',
}


@pytest.mark.parametrize('options', MISTAKES)
def test_mistake(options, in_own_folder, restore_process, monkeypatch, capsys):
    """One sentence, exit status 2, and nothing is touched."""
    line = options.split(' ')
    if '--data' not in options:
        line.insert(0, '--dataset=mnist-5k')
    monkeypatch.setattr(sys, 'argv', ['train.py', *line])
    with pytest.raises(SystemExit) as leave:
        run_script(train.main)
    assert leave.value.code == 2
    shown = capsys.readouterr()
    assert MISTAKES[options] in shown.err
    assert shown.err.startswith('train.py: error: ') and shown.err.count('\n') == 1
    assert shown.out == '' and os.listdir() == []


@pytest.mark.slow
def test_mistake_as_a_script(in_own_folder):
    result = run_train('--batch=0', cwd='.')
    assert (result.returncode, result.stdout, os.listdir()) == (2, '', [])
    assert re.fullmatch(r'train\.py: error: .*--batch-size: 0 is out of range.*\n', result.stderr)


def test_mistake_in_a_program():
    """InputError is a ValueError, not an exit."""
    for argv in (['--batch-size=0'], ['--gpus=a'], ['--nonsense'], ['--model-prefix=x']):
        with pytest.raises(InputError) as error:
            train.main(argv)
        assert isinstance(error.value, ValueError)


def test_devices():
    assert choose_devices() == [mx.cpu(0)]
    assert choose_devices([], [0, 2]) == [mx.cpu(0), mx.cpu(2)]
    with pytest.raises(InputError):
        choose_devices([99])
    check_equal_shares(6, [mx.cpu(0), mx.cpu(1)])
    with pytest.raises(InputError, match='cannot be shared equally by 2 devices: take a multiple'):
        check_equal_shares(5, [mx.cpu(0), mx.cpu(1)])
