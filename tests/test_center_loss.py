"""The operator against Eq. 2 to 4 in float64, the Gluon block, and the metrics against counting."""

import ast
from pathlib import Path
import warnings

import numpy as np
import pytest

from common.environment import mx
from center_loss import (
    Accuracy,
    CenterLoss,
    CenterLossBlock,
    CenterLossGPU,
    CenterLossMetric,
    CenterLossProp,
    CrossEntropy,
    memory_view,
)


@mx.operator.register('centerloss_gpu')
class GPUFormProp(CenterLossProp):
    """The form for GPUs, which runs on the CPU as well."""

    def create_operator(self, ctx, in_shapes, in_dtypes):
        return super().create_operator(mx.gpu(), in_shapes, in_dtypes)


FORMS = ['centerloss', 'centerloss_gpu']
every_form = pytest.mark.parametrize('form', FORMS)


def symbol(form='centerloss', **parameters):
    return mx.sym.Custom(
        data=mx.sym.var('data'), label=mx.sym.var('label'), op_type=form, name='loss', **parameters
    )


def bind(form, x, y, centers, grad_req='write', label_type='float32', **parameters):
    """An executor that holds the given embeddings (B, d), labels (B,) and centers (K, d)."""
    executor = symbol(form, num_class=len(centers), **parameters).simple_bind(
        mx.cpu(), grad_req=grad_req, type_dict={'label': label_type}, data=x.shape
    )
    executor.arg_dict['data'][:] = x
    executor.arg_dict['label'][:] = mx.nd.array(y, dtype=label_type)
    executor.aux_dict['loss_center_bias'][:] = centers
    mx.nd.waitall()
    return executor


def step(executor, head=None):
    """One forward and backward: the losses (B,), the gradient (B, d), the centers (K, d)."""
    loss = executor.forward(is_train=True)[0].asnumpy()
    centers = executor.aux_dict['loss_center_bias'].asnumpy()
    executor.backward(None if head is None else [mx.nd.array(head)])
    return loss, executor.grad_dict['data'].asnumpy(), centers


def reference(x, y, centers, alpha=0.5, scale=1.0, normalization='batch'):
    """Eq. 2, 3 and 4 as the paper has them, sample by sample and class by class, in float64."""
    x, centers = x.astype(np.float64), centers.astype(np.float64)
    loss = np.array([0.5 * np.sum((x[i] - centers[y[i]]) ** 2) for i in range(len(x))])
    gradient = np.array([scale * (x[i] - centers[y[i]]) for i in range(len(x))])
    if normalization == 'batch':
        gradient /= len(x)
    moved = centers.copy()
    for j in range(len(centers)):
        members = [i for i in range(len(x)) if y[i] == j]
        delta = sum((centers[j] - x[i] for i in members), np.zeros_like(centers[j]))
        moved[j] = centers[j] - alpha * delta / (1 + len(members))
    return loss, gradient, moved


def random_problem(seed):
    rng = np.random.default_rng(seed)
    batch, dim, classes = rng.integers(1, 40), rng.integers(1, 20), rng.integers(1, 30)
    y = {
        'any': lambda: rng.integers(0, classes, batch),
        'one class alone': lambda: np.full(batch, rng.integers(0, classes)),
        'few of many': lambda: rng.choice(rng.integers(0, classes, 2), batch),
        'each at most once': lambda: rng.permutation(max(batch, classes))[:batch] % classes,
    }[rng.choice(['any', 'one class alone', 'few of many', 'each at most once'])]()
    spread = 10.0 ** rng.integers(-2, 3)
    x = rng.normal(0, spread, (batch, dim)).astype('f')
    return x, y, rng.normal(0, spread, (classes, dim)).astype('f')


def assert_close(measured, expected, size=1.0):
    for first, second in zip(measured, expected, strict=True):
        np.testing.assert_allclose(first, second, rtol=2e-5, atol=2e-6 * size)


# The operator: values, gradients, centers


@every_form
@pytest.mark.parametrize('seed', range(200))
def test_step_follows_the_equations(form, seed):
    rng = np.random.default_rng(seed)
    x, y, centers = random_problem(seed)
    parameters = {
        'alpha': rng.choice([0, 0.01, 0.5, 1]),
        'scale': rng.choice([0, 0.01, 1, 3]),
        'normalization': rng.choice(['batch', 'null']),
    }
    head = rng.normal(size=len(x)) if rng.random() < 0.5 else None
    label_type = rng.choice(['float32', 'int8', 'int32', 'int64', 'uint8'])
    executor = bind(
        form, x, y, centers, 'write', label_type, out_grad=head is not None, **parameters
    )
    loss, gradient, moved = reference(x, y, centers, **parameters)
    if head is not None:
        gradient *= head[:, None]
    size = max(np.abs(x).max(), np.abs(centers).max())
    assert_close(step(executor, head), (loss, gradient, moved), size)


@every_form
def test_defaults(form):
    x, y, centers = random_problem(1)
    assert_close(step(bind(form, x, y, centers)), reference(x, y, centers, 0.5, 1.0, 'batch'), 10)


@every_form
def test_gradient_is_the_slope_of_the_mean(form):
    rng = np.random.default_rng(0)
    x, y, centers = rng.normal(size=(6, 4)).astype('f'), rng.integers(0, 3, 6), np.ones((3, 4))
    executor = bind(form, x, y, centers)
    slope = np.empty_like(x)
    for index in np.ndindex(x.shape):  # of a quadratic: a central difference is exact
        sides = []
        for shift in (0.5, -0.5):
            shifted = x.copy()
            shifted[index] += shift
            executor.arg_dict['data'][:] = shifted
            sides.append(executor.forward(is_train=False)[0].asnumpy().mean())
        slope[index] = sides[0] - sides[1]
    executor.arg_dict['data'][:] = x
    np.testing.assert_allclose(step(executor)[1], slope, atol=1e-5)


@every_form
def test_centers_move_in_training_forwards_alone(form):
    x, y, centers = random_problem(2)
    executor = bind(form, x, y, centers)
    for is_train in (False, True, False, False, True, True):
        executor.forward(is_train=is_train)[0].wait_to_read()
        if is_train:
            centers = reference(x, y, centers)[2]
        assert_close([executor.aux_dict['loss_center_bias'].asnumpy()], [centers])
        executor.backward()
        mx.nd.waitall()
        assert_close([executor.aux_dict['loss_center_bias'].asnumpy()], [centers])


@every_form
def test_gradient_is_from_before_the_move(form):
    x, y, centers = random_problem(9)
    executor = bind(form, x, y, centers, alpha=1)
    executor.forward(is_train=True)
    for _ in range(2):  # a second backward as well
        executor.grad_dict['data'][:] = 0
        executor.backward()
        assert_close([executor.grad_dict['data'].asnumpy()], [reference(x, y, centers)[1]])


@every_form
def test_gradient_of_a_scoring_forward(form):
    x, y, centers = random_problem(9)
    executor = bind(form, x, y, centers)
    step(executor)
    executor.aux_dict['loss_center_bias'][:] = centers + 1
    executor.forward(is_train=False)
    executor.backward()
    expected = reference(x, y, centers + 1)[1]
    assert_close([executor.grad_dict['data'].asnumpy()], [expected])


@every_form
def test_centers_outlive_a_rebind(form):
    rng = np.random.default_rng(3)
    centers = np.zeros((5, 3), 'f')
    executor = bind(form, np.zeros((4, 3)), np.zeros(4), centers)
    for batch in (4, 9, 1, 9, 30):
        x, y = rng.normal(size=(batch, 3)).astype('f'), rng.integers(0, 5, batch)
        executor = executor.reshape(allow_up_sizing=True, data=x.shape, label=y.shape)
        executor.arg_dict['data'][:] = x
        executor.arg_dict['label'][:] = y
        expected = reference(x, y, centers)
        measured = step(executor)
        assert_close(measured, expected)
        centers = measured[2]


@every_form
def test_grad_req(form):
    x, y, centers = random_problem(4)
    once = step(bind(form, x, y, centers))[1]
    executor = bind(form, x, y, centers, grad_req='add', alpha=0)
    executor.grad_dict['data'][:] = 1
    executor.grad_dict['label'][:] = 7
    step(executor)
    np.testing.assert_allclose(step(executor)[1], 1 + 2 * once, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(executor.grad_dict['label'].asnumpy(), np.full(len(y), 7))
    executor = bind(form, x, y, centers, grad_req={'data': 'null', 'label': 'write'})
    executor.grad_dict['label'][:] = 7
    executor.forward(is_train=True)
    executor.backward()
    np.testing.assert_array_equal(executor.grad_dict['label'].asnumpy(), np.zeros(len(y)))


def test_forms_agree_at_the_scale_of_faces():
    rng = np.random.default_rng(5)
    x, y = rng.normal(size=(256, 128)).astype('f'), rng.integers(0, 1000, 256)
    centers = rng.normal(size=(1000, 128)).astype('f')
    results = [step(bind(form, x, y, centers, normalization='null')) for form in FORMS]
    for first, second in zip(*results, strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


@every_form
def test_minus_zero_is_class_0(form):
    zero, minus_zero = (
        step(bind(form, np.ones((2, 3)), np.array([label, 1]), np.zeros((2, 3))))
        for label in (0.0, -0.0)
    )
    for first, second in zip(zero, minus_zero, strict=True):
        np.testing.assert_array_equal(first, second)


def test_divergence_shows_in_the_loss_without_warnings():
    x = np.array([[1e30, 0], [np.inf, 0], [np.nan, 0], [1, 1]])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loss, _, _ = step(bind('centerloss', x, np.arange(4), np.zeros((4, 2)), scale=1e30))
    np.testing.assert_array_equal(loss, [np.inf, np.inf, np.nan, 1])


# Head gradients: a factor on the loss


@every_form
@pytest.mark.parametrize(
    'follow',
    [
        lambda loss: mx.sym.MakeLoss(loss, grad_scale=0.25),
        lambda loss: mx.sym.MakeLoss(0.25 * loss),
        lambda loss: mx.sym.BlockGrad(loss),
    ],
    ids=['MakeLoss', 'factor', 'BlockGrad'],
)
def test_factors_count_with_out_grad_alone(form, follow):
    x, y, centers = random_problem(6)
    expected = reference(x, y, centers, normalization='null')[1]
    factor = 0 if follow(symbol(form, num_class=1)).name.startswith('blockgrad') else 0.25
    for out_grad in (False, True):
        network = follow(
            symbol(form, num_class=len(centers), normalization='null', out_grad=out_grad)
        )
        executor = network.simple_bind(mx.cpu(), data=x.shape)
        executor.arg_dict['data'][:] = x
        executor.arg_dict['label'][:] = y
        executor.aux_dict['loss_center_bias'][:] = centers
        executor.forward(is_train=True)
        executor.backward()
        measured = executor.grad_dict['data'].asnumpy()
        assert_close([measured], [expected * (factor if out_grad else 1)])


@every_form
def test_autograd_takes_a_head_gradient_per_sample(form):
    x, y, centers = random_problem(7)
    head = np.random.default_rng(7).normal(size=len(x)).astype('f')
    data, state = mx.nd.array(x), mx.nd.array(centers)
    data.attach_grad()
    with mx.autograd.record():
        loss = mx.nd.Custom(
            data,
            mx.nd.array(y, dtype='int64'),
            state,
            op_type=form,
            num_class=len(centers),
            normalization='null',
            out_grad=True,
        )
    loss.backward(mx.nd.array(head))
    expected = reference(x, y, centers, normalization='null')
    measured = loss.asnumpy(), data.grad.asnumpy(), state.asnumpy()
    assert_close(measured, (expected[0], expected[1] * head[:, None], expected[2]))


# The operator: shapes, types and mistakes


def test_shapes_and_names():
    net = symbol(num_class=7)
    assert net.list_outputs() == ['loss_output']
    assert net.list_auxiliary_states() == ['loss_center_bias']
    for batch in (1, 64):
        shapes = [(batch, 3), (batch,)], [(batch,)], [(7, 3)]
        assert net.infer_shape(data=(batch, 3)) == shapes


def test_unknown_shapes_and_types_are_inferred():
    net = symbol(num_class=7)
    assert net.infer_shape_partial()[2] == [(7, 0)]
    assert net.infer_shape_partial(data=(0, 3))[2] == [(7, 3)]
    assert net.infer_shape_partial(label=(4,))[0][1] == (4,)
    float32 = np.float32
    assert net.infer_type() == ([float32, float32], [float32], [float32])
    assert net.infer_type(label='int64') == ([float32, np.int64], [float32], [float32])


def test_initializers_zero_the_centers():
    centers = mx.nd.ones((7, 3))
    mx.init.Xavier()(mx.init.InitDesc('loss_center_bias'), centers)
    assert not centers.asnumpy().any()


def test_attributes_of_any_operator_are_no_parameters():
    with mx.AttrScope(ctx_group='dev1', lr_mult='2'):
        assert symbol(num_class=7).infer_shape(data=(4, 3))[1] == [(4,)]


NO_CLASS = [(4, '4'), (-1, '-1'), (1.5, '1.5'), (np.nan, 'nan'), (np.inf, 'inf'), (3e9, '3e+09')]


@pytest.mark.parametrize('label, shown', NO_CLASS)
def test_invalid_label_is_named(label, shown, capfd):
    executor = bind('centerloss', np.ones((3, 2)), np.array([0, 1, label]), np.zeros((4, 2)))
    with pytest.raises(mx.MXNetError):
        executor.forward(is_train=True)[0].asnumpy()
    message = f'label {shown} at position 2 of the batch is not a whole number from 0 to 3'
    assert f'{message} (num_class=4)' in capfd.readouterr().out


@pytest.mark.parametrize('label', [label for label, _ in NO_CLASS])
@pytest.mark.parametrize('y', [[0, 1, 0, 2], [3, 1, 1, 2]])  # beside class 0 or without it
def test_invalid_label_is_nan_on_a_gpu(label, y):
    rng = np.random.default_rng(0)
    x, centers = rng.normal(size=(5, 2)).astype('f'), rng.normal(size=(4, 2)).astype('f')
    parameters = {'normalization': 'null'}
    expected = reference(x[:4], y, centers, **parameters)
    x[4] = np.nan  # spreads to no center
    executor = bind('centerloss_gpu', x, np.array([*y, label]), centers, **parameters)
    loss, gradient, moved = step(executor)
    assert np.isnan(loss[4]) and not gradient[4].any()
    assert_close((loss[:4], gradient[:4], moved), expected)


@pytest.mark.parametrize(
    'parameters, problem',
    [
        ({'num_class': 0}, 'num_class=0 is not a whole number above 0'),
        ({'num_class': 2.5}, 'num_class=2.5 is not'),
        ({}, 'num_class= is not'),
        ({'num_class': 3, 'alpha': 1.5}, 'alpha=1.5 is not a number from 0 to 1'),
        ({'num_class': 3, 'alpha': 'fast'}, 'alpha=fast is not'),
        ({'num_class': 3, 'scale': 'nan'}, 'scale=nan is not a finite number'),
        ({'num_class': 3, 'scale': 'inf'}, 'scale=inf is not a finite number'),
        ({'num_class': 3, 'normalization': 'valid'}, "'valid' is neither 'batch' nor 'null'"),
        ({'num_class': 3, 'out_grad': 'yes'}, 'out_grad=yes is neither True nor False'),
        ({'num_class': 3, 'lambda': 1}, 'lambda: no such parameter'),
    ],
)
def test_wrong_parameter_is_named(parameters, problem, capfd):
    with pytest.raises(mx.MXNetError):
        symbol(**parameters).infer_shape(data=(4, 2))
    assert problem in capfd.readouterr().out


WRONG_SHAPES = [
    ((4, 2, 1), (4,), 'data of shape (4, 2, 1) is not (batch, dimension)'),
    ((4,), (4,), 'data of shape (4,) is not (batch, dimension)'),
    ((4, 2), (5,), 'label of shape (5,) does not belong to data of shape (4, 2)'),
    ((4, 2), (4, 1), 'label of shape (4, 1) does not belong to data of shape (4, 2)'),
]
WRONG_TYPES = [
    ('float16', 'float32', 'data of type float16 is not float32'),
    ('float64', 'float32', 'data of type float64 is not float32'),
    ('float32', 'float16', 'label of type float16 is neither float32 nor an integer type'),
    ('float32', 'float64', 'label of type float64 is neither float32 nor an integer type'),
]


@pytest.mark.parametrize('data, label, problem', WRONG_SHAPES)
def test_wrong_shape_is_named(data, label, problem, capfd):
    with pytest.raises(mx.MXNetError):
        symbol(num_class=3).infer_shape(data=data, label=label)
    assert problem in capfd.readouterr().out


@pytest.mark.parametrize('data, label, problem', WRONG_TYPES)
def test_wrong_type_is_named(data, label, problem, capfd):
    with pytest.raises(mx.MXNetError):
        symbol(num_class=3).infer_type(data=data, label=label)
    assert problem in capfd.readouterr().out


# The Gluon block


def block(num_classes=3, dimension=2, hybridize=False, **options):
    center = CenterLossBlock(num_classes, dimension, **options)
    center.initialize()
    if hybridize:
        center.hybridize(static_alloc=hybridize == 'static', static_shape=hybridize == 'static')
    return center


@pytest.mark.parametrize('hybridize', [False, True, 'static'])
@pytest.mark.parametrize('label_type', ['float32', 'int32', 'int64', 'uint8'])
def test_block_follows_the_equations(hybridize, label_type):
    x, y, centers = random_problem(8)
    center = block(*centers.shape, hybridize, alpha=0.3)
    center.centers.set_data(mx.nd.array(centers))
    data, label = mx.nd.array(x), mx.nd.array(y, dtype=label_type)
    data.attach_grad()
    for _ in range(3):
        expected = reference(x, y, centers, 0.3, 0.01, 'null')
        np.testing.assert_allclose(center(data, label).asnumpy(), expected[0], rtol=1e-5)  # scores
        with mx.autograd.record():
            loss = center(data, label)
            weighted = 0.01 * loss
        weighted.backward()
        centers = center.centers.data().asnumpy()
        assert_close((loss.asnumpy(), data.grad.asnumpy(), centers), expected)


class Joint(mx.gluon.HybridBlock):
    """Embeds with one matrix, classifies with another; returns the joint loss and the logits."""

    def __init__(self, lam):
        super().__init__()
        self.lam = lam
        with self.name_scope():
            self.embed = mx.gluon.nn.Dense(2, use_bias=False, in_units=4)
            self.classify = mx.gluon.nn.Dense(3, use_bias=False, in_units=2)
            self.ce = mx.gluon.loss.SoftmaxCrossEntropyLoss()
            self.center = CenterLossBlock(3, 2)

    def hybrid_forward(self, F, x, y):
        embedding = self.embed(x)
        logits = self.classify(embedding)
        return self.ce(logits, y) + self.lam * self.center(embedding, y), logits


@pytest.mark.parametrize('hybridize', [False, True])
@pytest.mark.parametrize('lam', [0, 0.003, 2])
def test_gluon_step_is_that_of_the_joint_loss(lam, hybridize):
    rng = np.random.default_rng(10)
    net = Joint(lam)
    net.initialize(mx.init.Normal(0.5))
    if hybridize:
        net.hybridize()
    trainer = mx.gluon.Trainer(net.collect_params(), 'sgd', {'learning_rate': 0.1})
    x, y = rng.normal(size=(8, 4)), rng.integers(0, 3, 8)
    for _ in range(3):
        w, v, c = (
            parameter.data().asnumpy().astype(np.float64)
            for parameter in (net.embed.weight, net.classify.weight, net.center.centers)
        )
        with mx.autograd.record():
            loss, _ = net(mx.nd.array(x), mx.nd.array(y, dtype='int32'))
        loss.backward()
        trainer.step(len(x))
        embedding = x @ w.T
        p = np.exp(embedding @ v.T)
        p /= p.sum(axis=1, keepdims=True)
        center, to_center, moved = reference(embedding, y, c, 0.5, lam, 'null')
        to_logits = p - np.eye(3)[y]
        to_embedding = to_logits @ v + to_center
        expected = (
            -np.log(p[range(8), y]) + lam * center,
            w - 0.1 * to_embedding.T @ x / 8,
            v - 0.1 * to_logits.T @ embedding / 8,
            moved,
        )
        measured = (
            loss.asnumpy(),
            net.embed.weight.data().asnumpy(),
            net.classify.weight.data().asnumpy(),
            net.center.centers.data().asnumpy(),
        )
        assert_close(measured, expected)


def test_block_is_exported_and_imported(tmp_path):
    net = Joint(0.1)
    net.initialize(mx.init.Normal(0.5))
    net.hybridize()
    x, y = mx.nd.random.normal(shape=(8, 4)), mx.nd.arange(8) % 3
    with mx.autograd.record():
        net(x, y)  # moves the centers
    loss, logits = net(x, y)
    net.export(str(tmp_path / 'net'))
    imported = mx.gluon.SymbolBlock.imports(
        str(tmp_path / 'net-symbol.json'), ['data0', 'data1'], str(tmp_path / 'net-0000.params')
    )
    for first, second in zip(imported(x, y), (loss, logits), strict=True):
        np.testing.assert_allclose(first.asnumpy(), second.asnumpy(), rtol=1e-6)
    centers = net.center.centers.data().asnumpy()
    assert centers.any()
    _, _, aux_params = mx.model.load_checkpoint(str(tmp_path / 'net'), 0)
    np.testing.assert_array_equal(next(iter(aux_params.values())).asnumpy(), centers)
    with mx.autograd.record():
        imported(x, y)[0].backward()
    moved = imported.params[net.center.centers.name].data().asnumpy()
    assert not np.array_equal(moved, centers)


def test_block_is_saved_and_loaded(tmp_path):
    center, other = block(), block()
    center.centers.set_data(mx.nd.ones((3, 2)))
    center.save_parameters(str(tmp_path / 'center.params'))
    other.load_parameters(str(tmp_path / 'center.params'))
    assert other.centers.data().asnumpy().all()


def test_centers_never_have_a_gradient():
    center = block()
    center.collect_params().setattr('grad_req', 'add')
    assert center.centers.grad_req == 'null'


def test_block_on_two_contexts_has_a_copy_on_each():
    contexts = [mx.cpu(0), mx.cpu(1)]
    center = CenterLossBlock(2, 1)
    center.initialize(ctx=contexts)
    for context, value in zip(contexts, (2, 4), strict=True):
        with mx.autograd.record():
            center(mx.nd.full((1, 1), value, context), mx.nd.zeros(1, context))
    moved = [copy.asnumpy()[0, 0] for copy in center.centers.list_data()]
    assert moved == [0.5, 1]  # each by its own share; Eq. 4 over both moves by 1


@pytest.mark.parametrize('hybridize', [False, True])
@pytest.mark.parametrize('data, label, problem', WRONG_SHAPES)
def test_block_raises_for_a_wrong_shape(data, label, problem, hybridize):
    with pytest.raises(ValueError) as error:
        block(hybridize=hybridize)(mx.nd.ones(data), mx.nd.zeros(label))
    assert problem in str(error.value)


@pytest.mark.parametrize('data, label, problem', WRONG_TYPES)
def test_block_raises_for_a_wrong_type(data, label, problem):
    with pytest.raises(ValueError, match=problem):
        block()(mx.nd.ones((4, 2), dtype=data), mx.nd.zeros(4, dtype=label))


def test_block_raises_for_a_wrong_parameter():
    with pytest.raises(ValueError, match='alpha=2 is not a number from 0 to 1'):
        CenterLossBlock(3, 2, alpha=2)
    for number in (0, 2.5, 10**400):
        with pytest.raises(ValueError, match=f'num_class={number} is not a whole number above 0'):
            CenterLossBlock(number, 2)
    assert block(3.0).centers.shape == (3, 2)


@pytest.mark.parametrize('hybridize', [False, True])
@pytest.mark.parametrize('label, shown', NO_CLASS)
def test_block_raises_for_an_invalid_label(label, shown, hybridize):
    center = block(4, 2, hybridize)
    with pytest.raises(ValueError) as error:
        center(mx.nd.ones((3, 2)), mx.nd.array([0, 1, label]))
    assert f'label {shown} at position 2 of the batch' in str(error.value)
    assert not center.centers.data().asnumpy().any()


def test_invalid_label_in_a_hybridized_network(capfd):
    """One sentence is printed; a backward does not follow a forward that failed."""

    class Joint(mx.gluon.HybridBlock):
        def __init__(self):
            super().__init__()
            with self.name_scope():
                self.center = CenterLossBlock(3, 2)

        def hybrid_forward(self, F, x, label):
            return self.center(x * 2, label)

    net, x = Joint(), mx.nd.ones((4, 2))
    net.initialize()
    net.hybridize()
    x.attach_grad()
    for label in (1, 7):
        with mx.autograd.record():
            loss = net(x, mx.nd.full(4, label))
        loss.backward()
        if label == 7:
            with pytest.raises(mx.MXNetError):
                x.grad.asnumpy()
    said = capfd.readouterr().out
    assert 'label 7 at position 0 of the batch' in said and 'TypeError' not in said


# In a Module


def joint_symbol(center_label='center_label', **options):
    embedding = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=2, name='embedding')
    logits = mx.sym.FullyConnected(embedding, num_hidden=3, name='fc')
    options = {'num_class': 3, 'scale': 0.1, 'normalization': 'null', **options}
    labels = {name: mx.sym.var(name) for name in ('softmax_label', center_label)}
    return mx.sym.Group(
        [
            mx.sym.SoftmaxOutput(logits, labels['softmax_label'], name='softmax'),
            mx.sym.Custom(
                data=embedding,
                label=labels[center_label],
                op_type='centerloss',
                name='center_loss',
                **options,
            ),
        ]
    )


def batches(count=50, batch_size=16, labels=('softmax_label', 'center_label')):
    rng = np.random.default_rng(11)
    x, y = rng.normal(size=(count, 4)).astype('f'), rng.integers(0, 3, count)
    return mx.io.NDArrayIter(x, dict.fromkeys(labels, y), batch_size)


def fitted(data, options=None, labels=('softmax_label', 'center_label'), devices=1):
    contexts = [mx.cpu(i) for i in range(devices)]
    module = mx.mod.Module(joint_symbol(**options or {}), label_names=labels, context=contexts)
    metrics = [Accuracy(), CrossEntropy(), CenterLossMetric()]
    module.fit(data, num_epoch=2, eval_metric=metrics, initializer=mx.init.Xavier())
    return module


def test_null_in_a_module_is_the_mean_over_the_batch():
    data = batches(16)
    weights = []
    for options in ({'normalization': 'null'}, {'normalization': 'batch', 'scale': 1.6}):
        mx.random.seed(0)
        weights.append(fitted(data, options).get_params()[0])
    for name in weights[0]:  # the Module divides by 16 itself, so that 'batch' has a 16th left
        np.testing.assert_allclose(
            weights[0][name].asnumpy(), weights[1][name].asnumpy(), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize('devices', [1, 2])
def test_module_predicts_a_padded_batch(devices):
    module = fitted(batches(48), devices=devices)
    data = batches(50)
    probability, loss = module.predict(data)
    assert probability.shape == (50, 3) and loss.shape == (50,)
    weight, bias = (module.get_params()[0][f'embedding_{name}'] for name in ('weight', 'bias'))
    embedding = data.data[0][1].asnumpy() @ weight.asnumpy().T + bias.asnumpy()
    centers = module.get_params()[1]['center_loss_center_bias'].asnumpy()
    if devices == 1:  # several have centers of their own
        expected = reference(embedding, data.label[0][1].asnumpy().astype(int), centers)[0]
        np.testing.assert_allclose(loss.asnumpy(), expected, rtol=1e-4, atol=1e-6)


def test_loaded_module_predicts_without_labels(tmp_path):
    fitted(batches(48)).save_checkpoint(str(tmp_path / 'net'), 2)
    image = mx.nd.ones((1, 4))
    for label_names in (['softmax_label', 'center_label'], []):
        module = mx.mod.Module.load(str(tmp_path / 'net'), 2, label_names=label_names)
        module.bind([('data', (1, 4))], for_training=False)
        module.forward(mx.io.DataBatch([image]))
        probability, loss = module.get_outputs()
        assert probability.shape == (1, 3) and loss.shape == (1,)
        assert np.isfinite(loss.asnumpy()).all()


@pytest.mark.parametrize('devices', [1, 2, 3])
def test_metrics_in_a_module(devices):
    module = fitted(batches(48), devices=devices)
    data = batches(48)
    metrics = [Accuracy(), CrossEntropy(), CenterLossMetric()]
    scores = dict(module.score(data, metrics))
    probability, loss = (output.asnumpy() for output in module.predict(data))
    label = data.label[0][1].asnumpy().astype(int)
    assert scores['accuracy'] == np.mean(probability.argmax(axis=1) == label)
    chosen = probability[range(48), label]
    assert scores['cross_entropy'] == pytest.approx(-np.log(chosen).mean(), rel=1e-5)
    assert devices > 1 or scores['center_loss'] == pytest.approx(loss.mean(), rel=1e-5)


def test_one_label_for_both_heads():
    data = batches(labels=['softmax_label'])
    module = fitted(data, {'center_label': 'softmax_label'}, ['softmax_label'])
    scores = dict(module.score(data, [Accuracy(), CrossEntropy(), CenterLossMetric()]))
    assert np.isfinite(list(scores.values())).all()
    with pytest.raises(KeyError):
        CenterLossMetric(label_names=['other']).update_dict(
            {'softmax_label': mx.nd.zeros(1), 'center_label': mx.nd.zeros(1)},
            {'center_loss_output': mx.nd.zeros(1)},
        )


def test_default_acc_averages_over_both_heads():
    data = batches(48)
    module = fitted(data)
    softmax_alone = mx.metric.Accuracy(
        output_names=['softmax_output'], label_names=['softmax_label']
    )
    accuracy, ours, default = (
        module.score(data, metric)[0][1] for metric in (softmax_alone, Accuracy(), 'acc')
    )
    assert accuracy == ours
    _, loss = module.predict(data)
    other = np.mean(loss.asnumpy().astype(int) == data.label[0][1].asnumpy())
    assert default == pytest.approx((accuracy + other) / 2)


# Metrics


def test_accuracy():
    metric = Accuracy()
    hits = []
    rng = np.random.default_rng(6)
    for batch in (8, 8, 3):
        probability, label = rng.random((batch, 10)).astype('f'), rng.integers(0, 10, batch)
        label[0] = probability[0].argmax()
        metric.update_dict(
            {'softmax_label': mx.nd.array(label), 'center_label': mx.nd.zeros(batch)},
            {'softmax_output': mx.nd.array(probability), 'center_loss_output': mx.nd.zeros(batch)},
        )
        hits.extend(probability.argmax(axis=1) == label)
    assert metric.get() == ('accuracy', np.mean(hits))


def test_cross_entropy():
    metric = CrossEntropy()
    probability = mx.nd.array([[0.5, 0.5], [0.25, 0.75], [1, 0]])
    metric.update([mx.nd.array([0, 1], dtype='int32')], [probability[:2]])
    assert metric.get()[1] == pytest.approx(-np.log([0.5, 0.75]).mean(), rel=1e-6)
    metric.update([mx.nd.array([1])], [probability[2:]])
    assert 87 / 3 < metric.get()[1] < 89 / 3 + 1
    metric.update([mx.nd.array([1])], [mx.nd.array([[np.nan, np.nan]])])
    assert np.isnan(metric.get()[1])


@pytest.mark.parametrize('label', [2, -1, 0.5, np.nan])
def test_cross_entropy_of_a_label_that_is_no_class(label):
    with pytest.raises(ValueError, match=f'label {label:g} at position 1 of the batch is not a '):
        CrossEntropy().update([mx.nd.array([0, label])], [mx.nd.array([[0.5, 0.5], [0.5, 0.5]])])


@pytest.mark.parametrize('devices', [1, 2, 3])
def test_center_loss_metric(devices):
    metric = CenterLossMetric()
    rng = np.random.default_rng(7)
    losses = []
    for batch in (12, 12, 7):
        losses.extend(rng.random(batch))
        shares = [mx.nd.array(share) for share in np.array_split(losses[-batch:], devices)]
        metric.update([mx.nd.zeros(len(share)) for share in shares], shares)
    assert metric.get() == ('center_loss', pytest.approx(np.mean(losses), rel=1e-6))


def test_metric_is_of_the_moment_of_its_update():
    metric = CenterLossMetric()
    loss = mx.nd.ones(4)
    metric.update([mx.nd.zeros(4)], [loss])
    loss[:] = 7  # an executor writes into the same array at every step
    assert metric.get()[1] == 1


def test_reset_local_keeps_the_global_mean():
    metric = CenterLossMetric()
    metric.update([mx.nd.zeros(2)], [mx.nd.array([3, 3])])
    metric.reset_local()
    assert np.isnan(metric.get()[1]) and metric.get_global()[1] == 3
    metric.update([mx.nd.zeros(2)], [mx.nd.array([5, 5])])
    assert metric.get()[1] == 5 and metric.get_global()[1] == 4
    metric.reset()
    assert np.isnan(metric.get()[1]) and np.isnan(metric.get_global()[1])


# Memory, and the Pythons that MXNet has


@pytest.mark.parametrize('dtype', ['float32', 'float64', 'int32', 'int64', 'uint8'])
def test_memory_view_is_the_memory_of_the_array(dtype):
    array = mx.nd.array([[1, 2, 3], [4, 5, 6]], dtype=dtype)
    array.wait_to_read()
    view = memory_view(array)
    assert view.dtype == dtype
    np.testing.assert_array_equal(view, array.asnumpy())
    view[1] = 7
    np.testing.assert_array_equal(array.asnumpy(), [[1, 2, 3], [7, 7, 7]])
    del array
    others = [mx.nd.zeros((2, 3), dtype=dtype) for _ in range(10)]
    mx.nd.waitall()
    np.testing.assert_array_equal(view, [[1, 2, 3], [7, 7, 7]])
    assert len(others) == 10


def test_source_is_python_3_8():
    source = Path(__file__).resolve().parent.parent / 'center_loss.py'
    ast.parse(source.read_text(), feature_version=(3, 8))


def test_no_gradient_after_a_forward_that_failed():
    """Not that of the batch before."""
    operator = CenterLoss(num_class=2, alpha=0.5, factor=1, out_grad=False)
    x, centers, loss = mx.nd.ones((1, 2)), mx.nd.zeros((2, 2)), mx.nd.zeros(1)
    gradients = [mx.nd.zeros((1, 2)), mx.nd.zeros(1)]
    good, bad = mx.nd.array([0]), mx.nd.array([7])
    mx.nd.waitall()
    operator.forward(True, ['write'], [x, good], [loss], [centers])
    with pytest.raises(ValueError, match='7'):
        operator.forward(True, ['write'], [x, bad], [loss], [centers])
    operator.backward(['write'] * 2, [], [x, bad], [loss], gradients, [centers])
    assert not gradients[0].asnumpy().any()


def test_labels_above_the_integers_of_float32():
    """On a GPU, which has operations of ``mx.nd`` alone."""
    num_class = 2**24 + 2
    operator = CenterLossGPU(num_class=num_class, alpha=1, factor=1, out_grad=False)
    x, centers = mx.nd.ones((1, 1)), mx.nd.zeros((num_class, 1))
    label = mx.nd.array([num_class - 1], dtype='int64')
    operator.forward(True, ['write'], [x, label], [mx.nd.zeros(1)], [centers])
    assert centers[num_class - 1].asscalar() == 0.5


def test_metric_adds_up_in_float64():
    metric = CenterLossMetric()
    metric.update([mx.nd.zeros(4)], [mx.nd.array([2**24, 1, 1, 1])])
    assert metric.get()[1] == (2**24 + 3) / 4
