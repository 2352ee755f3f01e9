"""The experiment: the network, the joint objective by hand, several devices, and the command line."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest

import data
import train
import train_model
from runtime import InputError, mx, run_script

ROOT = Path(__file__).resolve().parent.parent
LABELS = ['softmax_label', 'center_label']


def run(*options, cwd):
    """``python train.py OPTIONS`` as a user types it, in a folder of the test's own."""
    return subprocess.run(
        [sys.executable, ROOT / 'train.py', *map(str, options)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


def digits(count):
    """The first digits of the embedded sample: images (count, 1, 28, 28), as the network takes them, and labels (count,)."""
    sample = data.load_digits('mnist-5k')
    return sample.train_images[:count, None].astype('f') / 256, sample.train_labels[:count].astype(
        'f'
    )


def module_for(network, batch_size, devices=1, seed=0):
    mx.random.seed(seed)
    module = train_model.Module(
        network, label_names=LABELS, context=[mx.cpu(i) for i in range(devices)]
    )
    module.bind([('data', (batch_size, 1, 28, 28))], [(name, (batch_size,)) for name in LABELS])
    module.init_params(train_model.INITIALIZERS['xavier'])
    return module


def train_on(module, images, labels, **optimizer_options):
    """One step on one batch. Returns the outputs."""
    if not module.optimizer_initialized:
        module.init_optimizer(
            kvstore='local' if len(module._context) > 1 else None,
            optimizer_params={'momentum': 0.9, 'wd': 5e-4, **optimizer_options},
        )
    label = mx.nd.array(labels)
    module.forward_backward(mx.io.DataBatch([mx.nd.array(images)], [label, label]))
    outputs = [output.asnumpy() for output in module.get_outputs()]
    module.update()
    return outputs


def params_of(module):
    arg_params, aux_params = module.get_params()
    return {name: value.asnumpy() for name, value in {**arg_params, **aux_params}.items()}


def test_the_network_is_the_lenet_of_the_paper_with_named_layers():
    network = train.get_symbol()
    shapes, outputs, centers = network.infer_shape(data=(7, 1, 28, 28))
    assert dict(zip(network.list_arguments(), shapes)) == {
        'data': (7, 1, 28, 28),
        'conv1_weight': (20, 1, 5, 5),
        'conv1_bias': (20,),
        'conv2_weight': (50, 20, 5, 5),
        'conv2_bias': (50,),
        'fc1_weight': (500, 800),
        'fc1_bias': (500,),
        'embedding_weight': (2, 500),
        'embedding_bias': (2,),
        'fc2_weight': (10, 2),
        'fc2_bias': (10,),
        'softmax_label': (7,),
        'center_label': (7,),
    }
    assert dict(zip(network.list_outputs(), outputs)) == {
        'softmax_output': (7, 10),
        'center_loss_output': (1,),
    }
    assert dict(zip(network.list_auxiliary_states(), centers)) == {
        'center_loss_center_bias': (10, 2)
    }


def test_the_features_are_those_of_lenet_as_it_is_written_in_the_paper():
    """conv - tanh - pool twice, dense, tanh: what lenet() reorders and pads is the same function, with the same gradients, of real digits."""
    net = mx.sym.var('data')
    for i, filters in enumerate((20, 50), 1):
        net = mx.sym.Activation(
            mx.sym.Convolution(net, kernel=(5, 5), num_filter=filters, name=f'conv{i}'),
            act_type='tanh',
        )
        net = mx.sym.Pooling(net, kernel=(2, 2), stride=(2, 2), pool_type='max')
    plain = mx.sym.Activation(
        mx.sym.FullyConnected(mx.sym.flatten(net), num_hidden=500, name='fc1'), act_type='tanh'
    )
    images, _ = digits(32)
    rng = np.random.default_rng(0)
    features, gradients = [], []
    above = mx.nd.array(rng.normal(size=(32, 500)))
    executors = [
        network.simple_bind(mx.cpu(), data=images.shape)
        for network in (plain, train.lenet(mx.sym.var('data')))
    ]
    for name, array in executors[0].arg_dict.items():
        value = images if name == 'data' else rng.normal(0, 0.1, array.shape)
        for executor in executors:
            executor.arg_dict[name][:] = value
    for executor in executors:
        features.append(executor.forward(is_train=True)[0].asnumpy())
        executor.backward([above])
        gradients.append({name: array.asnumpy() for name, array in executor.grad_dict.items()})
    assert gradients[0].keys() == gradients[1].keys()
    np.testing.assert_allclose(features[1], features[0], atol=1e-5)
    for name, gradient in gradients[0].items():
        np.testing.assert_allclose(
            gradients[1][name],
            gradient,
            rtol=1e-3,
            atol=1e-4 * np.abs(gradient).max(),
            err_msg=name,
        )


def test_without_biases_the_embedding_and_the_last_layer_have_none():
    assert set(train.get_symbol().list_arguments()) - set(
        train.get_symbol(no_bias=True).list_arguments()
    ) == {'embedding_bias', 'fc2_bias'}


def test_lenet_plus_plus_is_that_of_the_paper_with_named_layers():
    network = train.get_symbol(num_classes=6, embedding_dim=3, network='lenet++')
    shapes, outputs, centers = network.infer_shape(data=(7, 1, 28, 28))
    convolutions = {
        '1_1': (32, 1),
        '1_2': (32, 32),
        '2_1': (64, 32),
        '2_2': (64, 64),
        '3_1': (128, 64),
        '3_2': (128, 128),
    }
    assert dict(zip(network.list_arguments(), shapes)) == {
        'data': (7, 1, 28, 28),
        **{f'conv{name}_weight': (*filters, 5, 5) for name, filters in convolutions.items()},
        **{f'conv{name}_bias': filters[:1] for name, filters in convolutions.items()},
        **{f'prelu{name}_slope': (filters[0], 1, 1, 1) for name, filters in convolutions.items()},
        'embedding_weight': (3, 1152),
        'embedding_bias': (3,),
        'fc2_weight': (6, 3),
        'fc2_bias': (6,),
        'softmax_label': (7,),
        'center_label': (7,),
    }
    assert dict(zip(network.list_outputs(), outputs)) == {
        'softmax_output': (7, 6),
        'center_loss_output': (1,),
    }
    assert dict(zip(network.list_auxiliary_states(), centers)) == {
        'center_loss_center_bias': (6, 3)
    }
    layers = network.get_internals()
    _, sizes, _ = layers.infer_shape(data=(1, 1, 28, 28))
    assert [
        dict(zip(layers.list_outputs(), sizes))[f'pool{stage}_output'][2:] for stage in (1, 2, 3)
    ] == [(14, 14), (7, 7), (3, 3)]


@pytest.mark.parametrize('shape', [(5, 32, 28, 28), (3, 7, 5, 4), (1, 1, 1, 1)])
def test_prelu_and_its_gradients_are_those_of_mxnets_own(shape):
    rng = np.random.default_rng(0)
    x, head, slope = (
        rng.normal(size=shape),
        rng.normal(size=shape),
        rng.normal(size=shape[1]),
    )  # slopes below 0 and above 1 as well
    x.flat[::11] = 0
    found = []
    for symbol, slope_shape in (
        (train.prelu(mx.sym.var('x'), shape[1], 'a'), (-1, 1, 1, 1)),
        (mx.sym.LeakyReLU(mx.sym.var('x'), gamma=mx.sym.var('a_slope'), act_type='prelu'), (-1,)),
    ):
        arguments = {'x': mx.nd.array(x), 'a_slope': mx.nd.array(slope.reshape(slope_shape))}
        gradients = {name: mx.nd.zeros_like(value) for name, value in arguments.items()}
        executor = symbol.bind(mx.cpu(), arguments, gradients)
        (output,) = executor.forward(is_train=True)
        executor.backward(mx.nd.array(head))
        found.append(
            [output.asnumpy(), gradients['x'].asnumpy(), gradients['a_slope'].asnumpy().ravel()]
        )
    for name, ours, mxnets, size in zip(
        ('output', 'x', 'slope'), *found, (1, 1, np.prod(shape) ** 0.5)
    ):
        np.testing.assert_allclose(ours, mxnets, rtol=1e-4, atol=1e-6 * size, err_msg=name)
    np.testing.assert_allclose(
        found[0][0], np.where(x > 0, x, x * slope[:, None, None]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    'line, expected',
    [
        ('', ('small-head', 0.1, 0.05, 14, 0.05)),
        ('--network=lenet++', ('xavier', 0.01, 0.1, 10, 0)),
        ('--network=lenet++ --lr=0.05 --clip-gradient=1', ('xavier', 0.05, 0.1, 10, 1)),
        (
            '--initializer=mixed --lr=0.01 --embedding-lr-mult=1 --lr-factor-epoch=20 --clip-gradient=0',
            ('mixed', 0.01, 1, 20, 0),
        ),
    ],
)
def test_a_network_has_a_recipe_of_which_every_part_can_be_given(line, expected):
    args = train.parse_args(line.split())
    assert (
        args.initializer,
        args.lr,
        args.embedding_lr_mult,
        args.lr_factor_epoch,
        args.clip_gradient,
    ) == expected


def test_the_help_shows_the_recipes(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(['--help'])
    told = ' '.join(capsys.readouterr().out.split())
    assert (
        '(default: small-head for lenet, xavier for lenet++)' in told
        and '(default: 0.1 for lenet, 0.01 for lenet++)' in told
    )


def test_with_a_small_head_all_classes_begin_alike():
    images, _ = digits(200)
    spread = {}
    for initializer in ('xavier', 'small-head'):
        module = train_model.Module(train.get_symbol(), label_names=LABELS)
        module.bind(
            [('data', images.shape)],
            [(name, (len(images),)) for name in LABELS],
            for_training=False,
        )
        mx.random.seed(0)
        module.init_params(train_model.INITIALIZERS[initializer])
        module.forward(mx.io.DataBatch([mx.nd.array(images)], [mx.nd.zeros(len(images))] * 2))
        probabilities = module.get_outputs()[0].asnumpy()
        spread[initializer] = probabilities.max() - probabilities.min()
    assert (
        1e-5 < spread['small-head'] < 0.2 * spread['xavier'] < 0.1
    )  # although its features begin at twice the size


@pytest.mark.parametrize('initializer', sorted(train_model.INITIALIZERS))
def test_slopes_begin_at_a_quarter_and_learn_without_weight_decay(initializer):
    module = train_model.Module(train.get_symbol(network='lenet++'), label_names=LABELS)
    module.bind([('data', (4, 1, 28, 28))], [(name, (4,)) for name in LABELS])
    module.init_params(train_model.INITIALIZERS[initializer])
    before = params_of(module)
    slopes = [name for name in before if name.endswith('slope')]
    assert len(slopes) == 6 and all((before[name] == 0.25).all() for name in slopes)
    assert len(np.unique(before['conv3_2_weight'])) > 1000
    images, labels = digits(4)
    train_on(module, images, labels, learning_rate=0.01, wd=5)
    after = params_of(module)
    for name, decay in (('prelu3_1_slope', 0), ('conv3_2_weight', 5)):
        gradient = module._exec_group.execs[0].grad_dict[name].asnumpy()
        assert np.abs(gradient).max() > 0
        np.testing.assert_allclose(
            before[name] - after[name],
            0.01 * (gradient / 4 + decay * before[name]),
            rtol=1e-3,
            atol=1e-7,
            err_msg=name,
        )


@pytest.mark.parametrize('batch_size', [20, 50])
def test_one_step_of_the_joint_objective_equals_the_hand_computed_one(batch_size):
    """lambda means lambda at any batch size: L = mean softmax loss + lambda * mean center loss, on real digits, in float64."""
    weight, alpha, lr, mult, decay = 0.3, 0.5, 0.1, 0.4, 5e-4
    network = train.get_symbol(center_loss_weight=weight, alpha=alpha, embedding_lr_mult=mult)
    module = module_for(network, batch_size)
    images, labels = digits(batch_size)
    centers = np.random.default_rng(0).normal(size=(10, 2)).astype('f')
    module.set_params(module.get_params()[0], {'center_loss_center_bias': mx.nd.array(centers)})
    before = {name: value.astype(np.float64) for name, value in params_of(module).items()}

    features = mx.mod.Module(network.get_internals()['tanh3_output'], label_names=None)
    features.bind([('data', images.shape)], for_training=False)
    features.set_params(*module.get_params(), allow_extra=True)
    features.forward(mx.io.DataBatch([mx.nd.array(images)]))
    h = features.get_outputs()[0].asnumpy().astype(np.float64)  # (B, 500)

    y = labels.astype(int)
    x = h @ before['embedding_weight'].T + before['embedding_bias']
    logits = x @ before['fc2_weight'].T + before['fc2_bias']
    probability = np.exp(logits - logits.max(axis=1, keepdims=True))
    probability /= probability.sum(axis=1, keepdims=True)
    to_logits = (probability - np.eye(10)[y]) / batch_size
    to_x = to_logits @ before['fc2_weight'] + weight * (x - centers[y]) / batch_size
    gradients = {
        'fc2_weight': to_logits.T @ x,
        'fc2_bias': to_logits.sum(axis=0),
        'embedding_weight': to_x.T @ h,
        'embedding_bias': to_x.sum(axis=0),
        'fc1_bias': (to_x @ before['embedding_weight'] * (1 - h**2)).sum(axis=0),
    }

    outputs = train_on(module, images, labels, learning_rate=lr)
    after = params_of(module)
    np.testing.assert_allclose(outputs[0], probability, atol=1e-5)
    np.testing.assert_allclose(
        outputs[1], [0.5 * ((x - centers[y]) ** 2).sum() / batch_size], rtol=1e-4
    )
    for name, gradient in gradients.items():
        step = (
            lr
            * (mult if name == 'embedding_weight' else 1)
            * (gradient + (decay * before[name] if name.endswith('weight') else 0))
        )
        np.testing.assert_allclose(
            before[name] - after[name], step, rtol=1e-3, atol=1e-6, err_msg=name
        )
    for j in range(10):
        delta = (centers[j] - x[y == j]).sum(axis=0) / (1 + (y == j).sum())
        np.testing.assert_allclose(
            after['center_loss_center_bias'][j], centers[j] - alpha * delta, rtol=1e-4, atol=1e-6
        )


def test_lambda_zero_is_softmax_alone_with_centers_that_follow():
    joint, alone = train.get_symbol(center_loss_weight=0), train.get_symbol()['softmax_output']
    modules = [module_for(joint, 50), mx.mod.Module(alone, label_names=LABELS[:1])]
    modules[1].bind([('data', (50, 1, 28, 28))], [('softmax_label', (50,))])
    modules[1].init_params(arg_params=modules[0].get_params()[0])
    images, labels = digits(150)
    for first in (0, 50, 100):
        part = slice(first, first + 50)
        loss = train_on(modules[0], images[part], labels[part], learning_rate=0.05)[1]
        if not modules[1].optimizer_initialized:
            modules[1].init_optimizer(
                optimizer_params={'momentum': 0.9, 'wd': 5e-4, 'learning_rate': 0.05}
            )
        modules[1].forward_backward(
            mx.io.DataBatch([mx.nd.array(images[part])], [mx.nd.array(labels[part])])
        )
        modules[1].update()
    joint_params, alone_params = params_of(modules[0]), params_of(modules[1])
    for name, value in alone_params.items():
        np.testing.assert_array_equal(joint_params[name], value, err_msg=name)
    assert loss[0] > 0
    assert (np.abs(joint_params['center_loss_center_bias']).max(axis=1) > 0).all()


@pytest.mark.parametrize('devices', [2, 4])
def test_a_step_on_several_devices_equals_the_step_on_one(devices):
    """From the same centers the weights agree to rounding: the gradient is that of the whole batch, with lambda at its value."""
    network = train.get_symbol(center_loss_weight=1.0)
    images, labels = digits(64)
    one, many = module_for(network, 64), module_for(network, 64, devices)
    outputs = [train_on(module, images, labels, learning_rate=0.1) for module in (one, many)]
    np.testing.assert_allclose(outputs[1][0], outputs[0][0], atol=1e-5)
    assert outputs[1][1].shape == (devices,)
    assert outputs[1][1].mean() == pytest.approx(outputs[0][1][0], rel=1e-5)
    expected, measured = params_of(one), params_of(many)
    for name in expected:
        if name != 'center_loss_center_bias':
            np.testing.assert_allclose(measured[name], expected[name], atol=1e-5, err_msg=name)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Two epochs by the command line on the embedded sample, and what they left."""
    folder = tmp_path_factory.mktemp('trained')
    result = run(
        '--dataset',
        'mnist-5k',
        '--num-epochs',
        2,
        '--batch-size',
        64,
        '--log-file',
        'run.log',
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    return folder, result


def test_a_run_leaves_what_it_says(trained):
    folder, result = trained
    assert {path.name for path in folder.iterdir()} == {
        'run.log',
        'center_loss-symbol.json',
        *(f'center_loss-000{epoch}.{kind}' for epoch in (1, 2) for kind in ('params', 'states')),
    }
    network, arg_params, aux_params = mx.model.load_checkpoint(str(folder / 'center_loss'), 2)
    assert network.tojson() == train.get_symbol().tojson()
    assert aux_params['center_loss_center_bias'].shape == (10, 2)
    assert {name: value.shape for name, value in arg_params.items()}['embedding_weight'] == (2, 500)
    assert result.stdout == ''
    assert '\r' not in result.stderr, 'a progress bar in a pipe'


def test_a_terminal_has_a_bar_below_the_whole_lines_of_the_log(tmp_path):
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack('4H', 40, 150, 0, 0))
    with subprocess.Popen(
        [
            sys.executable,
            ROOT / 'train.py',
            '--dataset=mnist-5k',
            '--num-epochs=1',
            '--num-examples=1200',
            '--batch-size=50',
        ],
        cwd=tmp_path,
        stderr=stderr,
    ) as process:
        os.close(stderr)
        shown = b''
        with contextlib.suppress(OSError):  # a pseudo-terminal that nobody writes to any more
            while part := os.read(terminal, 1 << 16):
                shown += part
    os.close(terminal)
    assert process.returncode == 0
    frames = re.split('[\r\n]+', shown.decode())
    bars = [frame for frame in frames if frame.startswith('epoch 1/1: ')]
    assert (
        ' 0.00/1.20k ' in bars[0]
        and 'images/s, accuracy=0.' in bars[-1]
        and 'center_loss=' in bars[-1]
    )
    lines = (tmp_path / 'log.txt').read_text().splitlines()
    assert [frame for frame in frames if ' Node[0] ' in frame] == lines


def test_the_log_is_in_mxnets_format_and_the_same_as_the_console(trained):
    folder, result = trained
    lines = (folder / 'run.log').read_text().splitlines()
    assert lines == result.stderr.splitlines()
    number = r'\d+\.\d+'
    for epoch in (0, 1):
        expected = [
            rf'Epoch\[{epoch}\] Batch \[0-50\]\tSpeed: {number} samples/sec\taccuracy={number}\tcenter_loss={number}',
            rf'Epoch\[{epoch}\] Train-accuracy={number}',
            rf'Epoch\[{epoch}\] Train-center_loss={number}',
            rf'Epoch\[{epoch}\] Time cost={number}',
            rf'Epoch\[{epoch}\] Validation-accuracy={number}',
            rf'Epoch\[{epoch}\] Validation-center_loss={number}',
        ]
        found = [line for line in lines if f'Epoch[{epoch}]' in line]
        assert len(found) == len(expected)
        for line, pattern in zip(found, expected):
            assert re.fullmatch(
                rf'\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} Node\[0\] {pattern}', line
            ), line


def test_the_logged_validation_is_that_of_every_held_out_digit(trained):
    folder, _ = trained
    sample = data.load_digits('mnist-5k')
    network, arg_params, aux_params = mx.model.load_checkpoint(str(folder / 'center_loss'), 2)
    module = mx.mod.Module(
        mx.sym.Group(
            [network.get_internals()['softmax_output'], network.get_internals()['embedding_output']]
        ),
        label_names=['softmax_label'],
    )
    module.bind([('data', (1000, 1, 28, 28))], for_training=False)
    module.set_params(arg_params, aux_params, allow_extra=True)
    module.forward(mx.io.DataBatch([mx.nd.array(sample.val_images[:, None] / 256)]))
    probability, embedding = (output.asnumpy() for output in module.get_outputs())
    accuracy = np.mean(probability.argmax(axis=1) == sample.val_labels)
    to_center = embedding - aux_params['center_loss_center_bias'].asnumpy()[sample.val_labels]
    log = (folder / 'run.log').read_text()
    assert float(re.findall(r'Epoch\[1\] Validation-accuracy=(\S+)', log)[0]) == pytest.approx(
        accuracy, abs=1e-6
    )
    assert float(re.findall(r'Epoch\[1\] Validation-center_loss=(\S+)', log)[0]) == pytest.approx(
        0.5 * (to_center**2).sum(axis=1).mean(), rel=1e-4
    )


def test_two_cpu_contexts_learn_what_one_learns(trained, tmp_path):
    result = run(
        '--dataset',
        'mnist-5k',
        '--num-epochs',
        2,
        '--batch-size',
        64,
        '--cpus',
        '0,1',
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    for name in ('Train-accuracy', 'Validation-accuracy', 'Validation-center_loss'):
        one, two = (
            float(re.findall(rf'Epoch\[1\] {name}=(\S+)', log)[0])
            for log in (trained[1].stderr, result.stderr)
        )
        assert two == pytest.approx(one, rel=0.2), name


def test_lambda_1_trains_on_few_batches(tmp_path):
    """A run that collapsed before gradients were cut: where the rate has risen after 40 batches, the center loss overshoots."""
    result = run(
        '--dataset',
        'mnist-5k',
        '--num-epochs',
        8,
        '--center-loss-weight',
        1,
        '--seed',
        1,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert float(re.findall(r'Epoch\[7\] Validation-accuracy=(\S+)', result.stderr)[0]) > 0.8


def test_some_digits_only_in_lenet_plus_plus_with_a_wide_embedding(tmp_path):
    line = [
        '--dataset',
        'mnist-5k',
        '--num-examples',
        40,
        '--batch-size',
        20,
        '--num-classes',
        2,
        '--embedding-dim',
        5,
        '--network',
        'lenet++',
    ]
    for epochs in (1, 2):
        result = run(*line, '--num-epochs', epochs, '--resume', cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert 'data: mnist-5k, 40 training and 200 validation images' in result.stderr
    network, arg_params, aux_params = mx.model.load_checkpoint(str(tmp_path / 'center_loss'), 2)
    assert (arg_params['embedding_weight'].shape, arg_params['fc2_weight'].shape) == (
        (5, 1152),
        (2, 5),
    )
    assert aux_params['center_loss_center_bias'].shape == (2, 5)
    assert (arg_params['prelu1_1_slope'].asnumpy() != 0.25).any()
    other = run(*line, '--num-classes', 3, '--num-epochs', 3, '--resume', cwd=tmp_path)
    assert other.returncode == 2 and 'is a checkpoint of another network' in other.stderr


@pytest.mark.parametrize(
    'options, said',
    [
        (['--gpus=a'], "--gpus: 'a' is not a list of device numbers"),
        (['--gpus=0,0'], "--gpus: '0,0' names a device twice"),
        (['--gpus=-1'], "--gpus: '-1' is not a list"),
        (['--gpus=0', '--cpus=0'], '--gpus and --cpus'),
        (['--cpus=0,1,2.5'], "--cpus: '0,1,2.5' is not a list of device numbers"),
        (['--cpus=1,16'], "--cpus: '1,16' names a device above 15"),
        (['--gpus=99999999999999999999'], "--gpus: '99999999999999999999' names a device above 15"),
        (['--batch-size=0'], '--batch-size: 0 is out of range: it has to be at least 1'),
        (['--batch-size=1e3'], "--batch-size: '1e3' is not a whole number"),
        (
            ['--batch-size=99', '--cpus=0,1'],
            '--batch-size=99 cannot be shared equally by 2 devices',
        ),
        (['--batch-size=4001'], '4001'),
        (['--batch-size=999999999999999999999'], '999999999999999999999'),
        (['--num-examples=0'], '--num-examples: 0 is out of range'),
        (['--num-examples=all'], "--num-examples: 'all' is not a whole number"),
        (['--num-examples=99'], '--batch-size=100 is too large: it takes more images than the 99'),
        (['--num-classes=1'], '--num-classes: 1 is out of range: it has to be at least 2'),
        (['--num-classes=11'], '--num-classes: 11 is out of range: it has to be at most 10'),
        (['--embedding-dim=0'], '--embedding-dim: 0 is out of range: it has to be at least 1'),
        (['--network=resnet'], "--network: invalid choice: 'resnet'"),
        (['--num-epochs=-3'], '--num-epochs: -3 is out of range'),
        (['--num-epochs=2.5'], "--num-epochs: '2.5' is not a whole number"),
        (['--lr=0'], '--lr: 0 is out of range: it has to be greater than 0'),
        (['--lr=nan'], "--lr: 'nan' is not a finite number"),
        (['--lr=fast'], "--lr: 'fast' is not a finite number"),
        (['--lr=1e308'], '--lr: 1e308 is out of range: it has to be at most 1000000'),
        (['--lr-factor=0'], '--lr-factor: 0 is out of range: it has to be greater than 0'),
        (['--lr-factor=half'], "--lr-factor: 'half' is not a finite number"),
        (['--lr-factor=1.5'], '--lr-factor: 1.5 is out of range: it has to be at most 1'),
        (['--lr-factor-epoch=0'], '--lr-factor-epoch: 0 is out of range'),
        (['--lr-factor-epoch=1e308'], '--lr-factor-epoch: 1e308 is out of range'),
        (['--lr-factor-epoch=inf'], "--lr-factor-epoch: 'inf' is not a finite number"),
        (['--center-loss-weight=-0.1'], '--center-loss-weight: -0.1 is out of range'),
        (['--center-loss-weight=big'], "--center-loss-weight: 'big' is not a finite number"),
        (['--alpha=2'], '--alpha: 2 is out of range: it has to be at most 1'),
        (['--alpha=-0.5'], '--alpha: -0.5 is out of range: it has to be at least 0'),
        (['--alpha=x'], "--alpha: 'x' is not a finite number"),
        (['--warmup-epochs=-1'], '--warmup-epochs: -1 is out of range: it has to be at least 0'),
        (['--warmup-epochs=one'], "--warmup-epochs: 'one' is not a finite number"),
        (['--embedding-lr-mult=0'], '--embedding-lr-mult: 0 is out of range'),
        (['--embedding-lr-mult=1e308'], '--embedding-lr-mult: 1e308 is out of range'),
        (['--embedding-lr-mult=x'], "--embedding-lr-mult: 'x' is not a finite number"),
        (['--clip-gradient=1e308'], '--clip-gradient: 1e308 is out of range'),
        (['--clip-gradient=1e-320'], '--clip-gradient: 1e-320 is out of range'),
        (['--clip-gradient=x'], "--clip-gradient: 'x' is not a finite number"),
        (['--clip-gradient=-0.1'], '--clip-gradient: -0.1 is out of range'),
        (
            ['--average-weights=1.5'],
            '--average-weights: 1.5 is out of range: it has to be at most 1',
        ),
        (
            ['--average-weights=-0.1'],
            '--average-weights: -0.1 is out of range: it has to be at least 0',
        ),
        (['--seed=-1'], '--seed: -1 is out of range'),
        (['--seed=99999999999'], '--seed: 99999999999 is out of range'),
        (['--seed=x'], "--seed: 'x' is not a whole number"),
        (['--no-bias=1'], '--no-bias: ignored explicit argument'),
        (['--resume=1'], '--resume: ignored explicit argument'),
        (['--initializer=zeros'], "--initializer: invalid choice: 'zeros'"),
        (
            ['--kv-store=dist_async'],
            '--kv-store: dist_async lets every worker go on with weights of its own age',
        ),
        (['--kv-store=nccl'], "--kv-store: invalid choice: 'nccl'"),
        (['--kv-store=dist_sync'], '--kv-store=dist_sync needs DMLC_ROLE, '),
        (['--num-workers=0'], '--num-workers: 0 is out of range'),
        (['--dataset=cifar'], "--dataset: invalid choice: 'cifar'"),
        (['--data-dir=nowhere'], 'nowhere'),
        (['--data-dir='], 'has no train-images-idx3-ubyte'),
        (['--data-dir=/dev/null'], '/dev/null has no train-images-idx3-ubyte'),
        (['--load-epoch=1'], '--load-epoch needs --model-prefix'),
        (['--load-epoch=0', '--model-prefix=x'], '--load-epoch: 0 is out of range'),
        (['--load-epoch=last', '--model-prefix=x'], "--load-epoch: 'last' is not a whole number"),
        (['--model-prefix=x'], '--model-prefix needs --load-epoch'),
        (
            ['--model-prefix=x', '--load-epoch=3'],
            'there is no x-0003.params; epochs of x that have a checkpoint: none',
        ),
        (['--save-model-prefix=no/where'], '--save-model-prefix=no/where'),
        (
            ['--save-model-prefix='],
            '--save-model-prefix=: it has to end with the beginning of a file name',
        ),
        (
            ['--save-model-prefix=runs/'],
            '--save-model-prefix=runs/: it has to end with the beginning of a file name',
        ),
        (
            ['--save-model-prefix=..'],
            '--save-model-prefix=..: it has to end with the beginning of a file name',
        ),
        (
            ['--save-model-prefix=/proc/x'],
            '--save-model-prefix=/proc/x: No such file or directory (/proc)',
        ),
        ([f'--save-model-prefix={"x" * 300}'], 'File name too long'),
        (['--log_dir=nowhere'], 'nowhere/log.txt'),
        (['--log_file=.'], 'cannot write the log file'),
        (['--log_file='], 'cannot write the log file .: Is a directory'),
        (
            ['--log_file=/dev/full'],
            'cannot write the log file /dev/full: [Errno 28] No space left on device',
        ),
        (['--batch', '100'], 'unrecognized arguments: --batch'),
        (['digits'], 'unrecognized arguments: digits'),
    ],
)
def test_a_wrong_command_line_is_told_in_one_sentence_and_touches_nothing(
    options, said, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    dataset = (
        []
        if any('dataset' in option or 'data-dir' in option for option in options)
        else ['--dataset', 'mnist-5k']
    )
    monkeypatch.setattr(sys, 'argv', ['train.py', *dataset, *options])
    with pytest.raises(SystemExit) as leave:
        run_script(train.main)
    assert leave.value.code == 2
    told = capsys.readouterr().err
    assert said in told and told.startswith('train.py: error: ') and told.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(mx.runtime.Features().is_enabled('CUDA'), reason='this MXNet has CUDA')
def test_a_gpu_on_a_build_without_cuda_is_told_in_one_sentence(tmp_path):
    result = run('--gpus=0', cwd=tmp_path)
    assert (result.returncode, result.stdout, list(tmp_path.iterdir())) == (2, '', [])
    assert re.fullmatch(
        r'train\.py: error: --gpus=0: .*built for the CPU alone; install .*mxnet-cu112.*\n',
        result.stderr,
    )


def test_devices_are_the_gpus_else_the_cpu_contexts_else_the_first_cpu():
    assert train_model.choose_devices([], []) == [mx.cpu(0)]
    assert train_model.choose_devices([], [0, 2]) == [mx.cpu(0), mx.cpu(2)]
    with pytest.raises(InputError):
        train_model.choose_devices([99], [])
