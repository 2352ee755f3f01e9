"""The Module: a step by hand, several devices, the optimizer's state, races with the engine."""

import numpy as np
import pytest

from common.environment import mx
from common.errors import InputError
from common.grouped_updater import MAX_GROUPED_SIZE, GroupedUpdater
from common.module import (
    Module,
    find_center_losses,
    merge_class_sums,
    read_rows,
    write_rows,
)
from helpers import (
    LABELS,
    ROOT,
    assert_same_arrays,
    assert_same_checkpoints,
    digits,
    make_module,
    numpy_params,
    run_python,
    small_data,
    small_network,
)
import train

CENTERS = 'center_loss_center_bias'


def step(module, images, labels, **optimizer_options):
    """Train on one batch; return the outputs."""
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


@pytest.mark.parametrize('batch_size', [20, 50])
def test_joint_step_by_hand(batch_size):
    """L = mean softmax loss + lambda * mean center loss at any batch size, in float64."""
    weight, alpha, lr, mult, decay = 0.3, 0.5, 0.1, 0.4, 5e-4
    network = train.get_symbol(center_loss_weight=weight, alpha=alpha, embedding_lr_mult=mult)
    module = make_module(network, batch_size)
    images, labels = digits(batch_size)
    centers = np.random.default_rng(0).normal(size=(10, 2)).astype('f')
    module.set_params(module.get_params()[0], {CENTERS: mx.nd.array(centers)})
    before = {name: value.astype(np.float64) for name, value in numpy_params(module).items()}

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

    outputs = step(module, images, labels, learning_rate=lr)
    after = numpy_params(module)
    np.testing.assert_allclose(outputs[0], probability, atol=1e-5)
    np.testing.assert_allclose(outputs[1], 0.5 * ((x - centers[y]) ** 2).sum(axis=1), rtol=1e-4)
    for name, gradient in gradients.items():
        rate = lr * mult if name == 'embedding_weight' else lr
        gradient = gradient + (decay * before[name] if name.endswith('weight') else 0)
        np.testing.assert_allclose(
            before[name] - after[name], rate * gradient, rtol=1e-3, atol=1e-6, err_msg=name
        )
    for j in range(10):
        delta = (centers[j] - x[y == j]).sum(axis=0) / (1 + (y == j).sum())
        np.testing.assert_allclose(
            after[CENTERS][j], centers[j] - alpha * delta, rtol=1e-4, atol=1e-6
        )


def test_lambda_zero_is_softmax():
    """The weights are those of softmax alone, bit for bit; the centers follow the embeddings."""
    joint, alone = train.get_symbol(center_loss_weight=0), train.get_symbol()['softmax_output']
    module, softmax = make_module(joint, 50), mx.mod.Module(alone, label_names=LABELS[:1])
    softmax.bind([('data', (50, 1, 28, 28))], [('softmax_label', (50,))])
    softmax.init_params(arg_params=module.get_params()[0])
    softmax.init_optimizer(optimizer_params={'momentum': 0.9, 'wd': 5e-4, 'learning_rate': 0.05})
    for first in (0, 50, 100):
        images, labels = digits(50, first)
        loss = step(module, images, labels, learning_rate=0.05)[1]
        softmax.forward_backward(mx.io.DataBatch([mx.nd.array(images)], [mx.nd.array(labels)]))
        softmax.update()
    params = numpy_params(module)
    assert (loss > 0).all()
    assert (np.abs(params.pop(CENTERS)).max(axis=1) > 0).all()
    assert_same_arrays(params, numpy_params(softmax))


@pytest.mark.parametrize('devices', [2, 4])
def test_devices_equal_one(devices):
    """Weights, centers and outputs after two steps."""
    network = train.get_symbol(center_loss_weight=1)
    one, many = (make_module(network, 64, devices=count) for count in (1, devices))
    for first in (0, 64):
        outputs = [step(module, *digits(64, first), learning_rate=0.1) for module in (one, many)]
        assert outputs[1][1].shape == (64,)
        for measured, expected in zip(*outputs, strict=True):
            np.testing.assert_allclose(measured, expected, rtol=1e-4, atol=1e-5)
    expected, measured = numpy_params(one), numpy_params(many)
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    for copies in many._exec_group.param_arrays + many._exec_group.aux_arrays:
        for copy in copies:
            np.testing.assert_array_equal(copy.asnumpy(), copies[0].asnumpy())


def test_sgd_by_hand():
    """Momentum, weight decay and learning rates of parameters large and small."""
    module = make_module(train.get_symbol(embedding_lr_mult=0.1), 50)
    expected = numpy_params(module)
    del expected[CENTERS]
    momentum = dict.fromkeys(expected, 0)
    for first in (0, 50, 100):
        step(module, *digits(50, first), learning_rate=0.1, rescale_grad=1 / 50)
        gradients = module._exec_group.execs[0].grad_dict
        params = numpy_params(module)
        for name, value in expected.items():
            decay = 0 if name.endswith('bias') else 5e-4
            rate = 0.01 if name == 'embedding_weight' else 0.1
            gradient = gradients[name].asnumpy() / 50 + decay * value
            momentum[name] = 0.9 * momentum[name] - rate * gradient
            expected[name] = value + momentum[name]
            np.testing.assert_allclose(
                params[name], expected[name], rtol=1e-4, atol=1e-7, err_msg=name
            )
    state = module.optimizer_state()
    assert state.keys() == {f'optimizer0:{name}' for name in expected}
    for name, value in momentum.items():
        np.testing.assert_allclose(
            state[f'optimizer0:{name}'].asnumpy(), value, rtol=1e-3, atol=1e-7, err_msg=name
        )
    assert {value.size > MAX_GROUPED_SIZE for value in expected.values()} == {False, True}


def test_large_parameters_are_grouped():
    """Without small parameters, and without large ones, every parameter is still updated."""
    sizes = 3, MAX_GROUPED_SIZE + 1
    for chosen in (sizes, sizes[:1], sizes[1:]):
        updater = GroupedUpdater(mx.optimizer.SGD(learning_rate=0.5, wd=0))
        weights = [mx.nd.ones(size) for size in chosen]
        updater([*range(len(chosen))], [mx.nd.ones(size) for size in chosen], weights)
        for weight in weights:
            assert (weight.asnumpy() == 0.5).all()


@pytest.mark.parametrize('devices', [1, 2])
@pytest.mark.parametrize(
    'optimizer, options, states',
    [
        ('sgd', {'momentum': 0.9}, ['optimizer0']),
        ('sgd', {'momentum': 0}, []),
        ('adam', {}, ['optimizer0', 'optimizer1']),
    ],
)
def test_optimizer_state_is_taken_over(optimizer, options, states, devices):
    """A module that begins with another's state goes on as that one would."""

    def start(initial_state=None):
        module = Module(
            small_network(),
            initial_state,
            label_names=LABELS,
            context=[mx.cpu(i) for i in range(devices)],
        )
        module.bind([('data', (50, 1, 28, 28))], [(name, (50,)) for name in LABELS])
        return module

    def train_on(module, first, begin):
        if not module.optimizer_initialized:
            kvstore = mx.kv.create('local') if devices > 1 else None
            more = {'learning_rate': 0.01, 'begin_num_update': begin}
            module.init_optimizer(kvstore, optimizer, {**options, **more})
        step(module, *digits(50, first))

    one = start()
    one.init_params(mx.init.Xavier())
    for first in (0, 50):
        train_on(one, first, 0)
    state = one.optimizer_state()
    assert state.keys() == {f'{kind}:{name}' for kind in states for name in one._param_names}
    two = start(state)
    two.init_params(arg_params=one.get_params()[0], aux_params=one.get_params()[1])
    for module in (one, two):
        train_on(module, 100, 2)
    assert one.num_updates() == two.num_updates() == 3
    assert_same_arrays(numpy_params(two), numpy_params(one))
    assert_same_arrays(
        {name: value.asnumpy() for name, value in two.optimizer_state().items()},
        {name: value.asnumpy() for name, value in one.optimizer_state().items()},
    )


def test_label_of_a_shared_batch_is_one_of_its_labels():
    label = mx.sym.Cast(mx.sym.var('center_label'), dtype='float32', name='cast')
    network = small_network(label=label)
    make_module(network, 20).init_optimizer(kvstore=None)
    module = make_module(network, 20, devices=2)
    with pytest.raises(InputError, match='and cast, that of a center loss, is missing: add it'):
        module.init_optimizer(kvstore='local')


def test_center_losses_are_found_in_the_symbol():
    """Names of layer and label are the network's."""
    x, label = mx.sym.var('x'), mx.sym.var('id')
    first = mx.sym.Custom(x, label, op_type='centerloss', num_class=3, name='a')
    second = mx.sym.Custom(x, op_type='centerloss', num_class=3, name='b')
    assert find_center_losses(mx.sym.Group([first, second])) == [
        ('a_center_bias', 'id'),
        ('b_center_bias', 'b_label'),
    ]
    assert find_center_losses(mx.sym.FullyConnected(x, num_hidden=2)) == []


def test_center_losses_do_not_share_centers():
    """MXNet would run both at once, and moves would be lost."""
    x, centers = mx.sym.var('data'), mx.sym.var('centers')
    options = {'op_type': 'centerloss', 'num_class': 3}
    losses = [mx.sym.Custom(x, mx.sym.var(name), centers, **options) for name in ('y', 'z')]
    with pytest.raises(InputError, match='two center losses of the network share their centers'):
        Module(mx.sym.Group(losses), label_names=['y', 'z'])


@pytest.mark.parametrize('label_names', [LABELS, LABELS[::-1]])
def test_centers_are_synchronized_by_their_own_label(label_names):
    """Where the two labels differ, in whatever order a Module was given their names."""
    images, labels = digits(40)
    labels = {'softmax_label': labels, 'center_label': np.floor(labels / 2)}

    def centers(devices):
        batches = mx.io.NDArrayIter(images, labels, batch_size=20)
        contexts = [mx.cpu(i) for i in range(devices)]
        module = Module(small_network(), label_names=label_names, context=contexts)
        module.bind(batches.provide_data, batches.provide_label)
        mx.random.seed(0)
        module.init_params(mx.init.Xavier())
        module.init_optimizer(kvstore='local')
        for batch in batches:
            module.forward_backward(batch)
            module.update()
        mx.nd.waitall()
        return module.get_params()[1]['center_loss_center_bias'].asnumpy()

    assert np.abs(centers(1)[:5]).min() > 0 and not centers(1)[5:].any()
    np.testing.assert_allclose(centers(2), centers(1), atol=1e-5)


@pytest.mark.parametrize('devices', [1, 2])
def test_two_center_losses_with_one_label(devices):
    """Both sets of centers move by Eq. 4 of the whole batch."""

    image, label = mx.sym.flatten(mx.sym.var('data')), mx.sym.var('y')

    def embedding(name):
        x = mx.sym.FullyConnected(image, num_hidden=2, name=name)
        options = {'num_class': 10, 'normalization': 'null', 'name': f'{name}_loss'}
        return mx.sym.Custom(x, label, op_type='centerloss', **options), x

    (a, to_a), (b, to_b) = embedding('a'), embedding('b')
    network = mx.sym.Group([a, b, mx.sym.BlockGrad(to_a), mx.sym.BlockGrad(to_b)])
    module = Module(network, label_names=['y'], context=[mx.cpu(i) for i in range(devices)])
    module.bind([('data', (40, 1, 28, 28))], [('y', (40,))])
    module.init_params(mx.init.Xavier())
    module.init_optimizer(mx.kv.create('local') if devices > 1 else None)
    images, labels = digits(40)
    module.forward_backward(mx.io.DataBatch([mx.nd.array(images)], [mx.nd.array(labels)]))
    *_, at_a, at_b = (output.asnumpy() for output in module.get_outputs())
    module.update()
    centers = module.get_params()[1]
    for name, x in (('a', at_a), ('b', at_b)):
        for j in range(10):
            own = x[labels == j]
            np.testing.assert_allclose(
                centers[f'{name}_loss_center_bias'].asnumpy()[j],
                0.5 * own.sum(axis=0) / (1 + len(own)),
                rtol=1e-4,
                atol=1e-6,
            )


def test_merge_class_sums():
    parts = [
        (np.array([1, 4]), np.array([2, 1]), np.array([[1.0, 2], [3, 4]])),
        (np.array([0, 4]), np.array([5, 3]), np.array([[10.0, 20], [30, 40]])),
    ]
    classes, count, steps = merge_class_sums(iter(parts))
    assert classes.tolist() == [0, 1, 4]
    assert count.tolist() == [5, 2, 4]
    assert steps.tolist() == [[10, 20], [1, 2], [33, 44]]


def test_rows_are_read_and_written():
    array = mx.nd.array(np.arange(12).reshape(6, 2)) + 1  # not yet computed
    rows = np.array([4, 0])
    values = read_rows(array, rows)
    assert values.tolist() == [[9, 10], [1, 2]]
    write_rows(array, rows, values + 100)
    values[:] = 0  # a copy
    assert array.asnumpy().tolist() == [[101, 102], [3, 4], [5, 6], [7, 8], [109, 110], [11, 12]]


RACES = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import test_module
test_module.train_for_races()
"""


def train_for_races():
    """Write checkpoints that depend on every step, also on averages of all of them."""
    from helpers import train_small

    for devices in (1, 2):
        train_small(
            small_network(weight=1, hidden=128),
            devices=[mx.cpu(i) for i in range(devices)],
            average_weights=0.5,
            num_epochs=4,
            save_model_prefix=f'run{devices}',
        )


@pytest.fixture(scope='module')
def in_order(tmp_path_factory):
    """Checkpoints of an engine that does one thing after the other."""
    folder = tmp_path_factory.mktemp('in_order')
    result = run_python('-c', RACES, cwd=folder, MXNET_ENGINE_TYPE='NaiveEngine')
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('engine', ['ThreadedEnginePerDevice', 'ThreadedEngine'])
def test_no_engine_is_ahead(engine, in_order, in_own_folder):
    """Centers, averages and checkpoints are of their step, whatever the engine does at once."""
    result = run_python('-c', RACES, MXNET_ENGINE_TYPE=engine)
    assert result.returncode == 0, result.stderr
    for prefix in ('run1', 'run2'):
        assert_same_checkpoints(prefix, in_order / prefix, (1, 2, 3, 4))


def test_scoring_moves_no_centers():
    """Nor does it change with the batch size, up or down."""
    module = make_module(small_network(), 50)
    step(module, *digits(50), learning_rate=0.1)
    before = numpy_params(module)
    _, val = small_data()(64)
    scores = []
    for size in (64, 1000, 10, 64):
        _, val = small_data()(size)
        scores.append(dict(module.score(val, [*train_metrics()])))
        assert_same_arrays(numpy_params(module), before)
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], rel=1e-5)


def train_metrics():
    from train_model import metrics

    return metrics().metrics
