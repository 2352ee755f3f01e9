"""The operator against Eq. 2 to 4 written out in float64, and the metrics against counting."""

import numpy as np
import pytest

import center_loss
from runtime import mx


@mx.operator.register('centerloss_nd')
class CenterLossNDProp(center_loss.CenterLossProp):
    """The operator in its form for GPUs, which runs on the CPU as well."""

    def create_operator(self, ctx, in_shapes, in_dtypes):
        return center_loss.CenterLoss(
            self.num_class, self.alpha, self.scale, self.normalization, in_shapes[0], on_cpu=False
        )


@mx.operator.register('centerloss_sorted')
class CenterLossSortedProp(center_loss.CenterLossProp):
    """The operator in its form for many classes, whatever their number."""

    def create_operator(self, ctx, in_shapes, in_dtypes):
        operator = super().create_operator(ctx, in_shapes, in_dtypes)
        operator.one_hot = None
        return operator


FORMS = ['centerloss', 'centerloss_sorted', 'centerloss_nd']


def symbol(form='centerloss', **parameters):
    return mx.sym.Custom(
        data=mx.sym.var('data'), label=mx.sym.var('label'), op_type=form, name='loss', **parameters
    )


def bind(form, x, y, centers, grad_req='write', **parameters):
    """An executor that holds the given embeddings (B, d), labels (B,) and centers (K, d)."""
    executor = symbol(form, num_class=len(centers), **parameters).simple_bind(
        mx.cpu(), grad_req=grad_req, data=x.shape
    )
    executor.arg_dict['data'][:] = x
    executor.arg_dict['label'][:] = y
    executor.aux_dict['loss_center_bias'][:] = centers
    mx.nd.waitall()
    return executor


def step(executor):
    """One forward and backward: the loss (1,), the gradient (B, d), the centers after it (K, d)."""
    loss = executor.forward(is_train=True)[0].asnumpy()
    executor.backward()
    mx.nd.waitall()
    return (
        loss,
        executor.grad_dict['data'].asnumpy(),
        executor.aux_dict['loss_center_bias'].asnumpy(),
    )


def reference(x, y, centers, alpha, scale, normalization):
    """Eq. 2, 3 and 4 as they stand in the paper, one sample and one class after the other, in float64."""
    x, centers = x.astype(np.float64), centers.astype(np.float64)
    loss = sum(0.5 * np.sum((x[i] - centers[y[i]]) ** 2) for i in range(len(x))) / len(x)
    gradient = np.array([scale * (x[i] - centers[y[i]]) for i in range(len(x))])
    if normalization == 'batch':
        gradient /= len(x)
    moved = centers.copy()
    for j in range(len(centers)):
        members = [i for i in range(len(x)) if y[i] == j]
        delta = sum((centers[j] - x[i] for i in members), np.zeros_like(centers[j])) / (
            1 + len(members)
        )
        moved[j] = centers[j] - alpha * delta
    return loss, gradient, moved


def random_problem(rng):
    batch, dim, classes = rng.integers(1, 40), rng.integers(1, 20), rng.integers(1, 30)
    y = {
        'any': lambda: rng.integers(0, classes, batch),
        'one class alone': lambda: np.full(batch, rng.integers(0, classes)),
        'few of many': lambda: rng.choice(rng.integers(0, classes, 2), batch),
        'each at most once': lambda: rng.permutation(max(batch, classes))[:batch] % classes,
    }[rng.choice(['any', 'one class alone', 'few of many', 'each at most once'])]()
    spread = 10.0 ** rng.integers(-2, 3)
    return (
        rng.normal(0, spread, (batch, dim)).astype('f'),
        y,
        rng.normal(0, spread, (classes, dim)).astype('f'),
    )


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('seed', range(200))
def test_one_step_follows_the_equations(form, seed):
    rng = np.random.default_rng(seed)
    x, y, centers = random_problem(rng)
    parameters = {
        'alpha': rng.choice([0, 0.01, 0.5, 1]),
        'scale': rng.choice([0, 0.01, 1, 3]),
        'normalization': rng.choice(['batch', 'null']),
    }
    loss, gradient, moved = step(bind(form, x, y, centers, **parameters))
    expected = reference(x, y, centers, **parameters)
    size = max(np.abs(x).max(), np.abs(centers).max())
    assert loss.shape == (1,)
    np.testing.assert_allclose(loss[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-6 * size)
    np.testing.assert_allclose(moved, expected[2], rtol=1e-5, atol=2e-6 * size)


@pytest.mark.parametrize('form', FORMS)
def test_defaults_are_alpha_a_half_scale_one_and_the_mean_over_the_batch(form):
    x, y, centers = random_problem(np.random.default_rng(1))
    for measured, expected in zip(
        step(bind(form, x, y, centers)), reference(x, y, centers, 0.5, 1.0, 'batch')
    ):
        np.testing.assert_allclose(np.squeeze(measured), np.squeeze(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('form', FORMS)
def test_the_gradient_is_the_slope_of_the_loss(form):
    rng = np.random.default_rng(0)
    x, y, centers = (
        rng.normal(size=(6, 4)).astype('f'),
        rng.integers(0, 3, 6),
        rng.normal(size=(3, 4)).astype('f'),
    )
    executor = bind(form, x, y, centers)
    slope = np.empty_like(x)
    for index in np.ndindex(
        x.shape
    ):  # the loss is quadratic: a central difference is exact but for rounding
        sides = []
        for shift in (0.5, -0.5):
            shifted = x.copy()
            shifted[index] += shift
            executor.arg_dict['data'][:] = shifted
            sides.append(executor.forward(is_train=True)[0].asscalar())
        slope[index] = sides[0] - sides[1]
    executor.arg_dict['data'][:] = x
    np.testing.assert_allclose(step(executor)[1], slope, atol=1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_centers_move_once_per_backward_and_never_in_forward(form):
    x, y, centers = random_problem(np.random.default_rng(2))
    executor = bind(form, x, y, centers)
    for is_train in (True, False, True):
        executor.forward(is_train=is_train)
        mx.nd.waitall()
        np.testing.assert_array_equal(executor.aux_dict['loss_center_bias'].asnumpy(), centers)
    for _ in range(3):
        centers = reference(x, y, centers, 0.5, 1.0, 'batch')[2]
        np.testing.assert_allclose(step(executor)[2], centers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_a_second_backward_begins_at_where_the_first_has_left_the_centers(form):
    x, y, centers = random_problem(np.random.default_rng(9))
    executor = bind(form, x, y, centers)
    executor.forward(is_train=True)
    for _ in range(2):
        _, gradient, centers = reference(x, y, centers, 0.5, 1.0, 'batch')
        executor.backward()
        mx.nd.waitall()
        np.testing.assert_allclose(
            executor.grad_dict['data'].asnumpy(), gradient, rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            executor.aux_dict['loss_center_bias'].asnumpy(), centers, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize('form', FORMS)
def test_the_centers_outlive_a_rebind_to_another_batch_size(form):
    rng = np.random.default_rng(3)
    centers = np.zeros((5, 3), 'f')
    executor = bind(form, np.zeros((4, 3)), np.zeros(4), centers)
    for batch in (4, 9, 1, 9, 30):
        x, y = rng.normal(size=(batch, 3)).astype('f'), rng.integers(0, 5, batch)
        executor = executor.reshape(allow_up_sizing=True, data=x.shape, label=y.shape)
        executor.arg_dict['data'][:] = x
        executor.arg_dict['label'][:] = y
        loss, gradient, moved = step(executor)
        expected = reference(x, y, centers, 0.5, 1.0, 'batch')
        np.testing.assert_allclose(loss[0], expected[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(moved, expected[2], rtol=1e-5, atol=1e-6)
        centers = moved


@pytest.mark.parametrize('form', FORMS)
def test_gradients_are_stored_as_asked_and_the_label_has_none(form):
    x, y, centers = random_problem(np.random.default_rng(4))
    once = step(bind(form, x, y, centers))[1]
    executor = bind(form, x, y, centers, grad_req='add', alpha=0)
    executor.grad_dict['data'][:] = 1
    executor.grad_dict['label'][:] = 7
    step(executor)
    np.testing.assert_allclose(step(executor)[1], 1 + 2 * once, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(executor.grad_dict['label'].asnumpy(), np.full(len(y), 7))
    executor = bind(form, x, y, centers)
    executor.grad_dict['label'][:] = 7
    step(executor)
    np.testing.assert_array_equal(executor.grad_dict['label'].asnumpy(), np.zeros(len(y)))


def test_the_forms_for_cpus_and_gpus_agree_at_the_scale_of_faces():
    rng = np.random.default_rng(5)
    x, y, centers = (
        rng.normal(size=(256, 128)).astype('f'),
        rng.integers(0, 1000, 256),
        rng.normal(size=(1000, 128)).astype('f'),
    )
    for first, second in zip(
        *(
            step(bind(form, x, y, centers, normalization='null'))
            for form in ('centerloss', 'centerloss_nd')
        )
    ):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-5)


def test_it_has_one_state_that_initializers_set_to_zero_whatever_the_batch():
    net = symbol(num_class=7)
    assert net.list_outputs() == ['loss_output']
    assert net.list_auxiliary_states() == ['loss_center_bias']
    for batch in (1, 64):
        assert net.infer_shape(data=(batch, 3)) == ([(batch, 3), (batch,)], [(1,)], [(7, 3)])
    centers = mx.nd.ones((7, 3))
    mx.init.Xavier()(mx.init.InitDesc('loss_center_bias'), centers)
    assert not centers.asnumpy().any()


@pytest.mark.parametrize('form', FORMS)
def test_minus_zero_is_class_0(form):
    zero, minus_zero = (
        step(bind(form, np.ones((2, 3)), np.array([label, 1]), np.zeros((2, 3))))
        for label in (0.0, -0.0)
    )
    for first, second in zip(zero, minus_zero):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize(
    'label, shown',
    [(4, '4'), (-1, '-1'), (1.5, '1.5'), (np.nan, 'nan'), (np.inf, 'inf'), (3e9, '3e+09')],
)
def test_a_label_that_is_no_class_is_named(form, label, shown, capfd):
    executor = bind(form, np.ones((3, 2)), np.array([0, 1, label]), np.zeros((4, 2)))
    with pytest.raises(mx.MXNetError):
        executor.forward(is_train=True)[0].asnumpy()
    assert (
        f'label {shown} at position 2 of the batch is not a whole number from 0 to 3 (num_class=4)'
        in capfd.readouterr().out
    )


@pytest.mark.parametrize(
    'parameters, problem',
    [
        ({'num_class': 0}, 'num_class=0 is not a whole number of at least 1'),
        ({}, 'num_class=None is not'),
        ({'num_class': 3, 'alpha': 1.5}, 'alpha=1.5 is not a number from 0 to 1'),
        ({'num_class': 3, 'alpha': 'fast'}, 'alpha=fast is not'),
        ({'num_class': 3, 'scale': 'nan'}, 'scale=nan is not a finite number'),
        (
            {'num_class': 3, 'normalization': 'valid'},
            "normalization='valid' is neither 'batch' nor 'null'",
        ),
        ({'num_class': 3, 'lambda': 1}, 'lambda: no such parameter'),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(parameters, problem, capfd):
    with pytest.raises(mx.MXNetError):
        symbol(**parameters).infer_shape(data=(4, 2))
    assert problem in capfd.readouterr().out


@pytest.mark.parametrize(
    'shapes, problem',
    [
        ({'data': (4, 2, 1)}, 'data of shape (4, 2, 1) is not (batch, dimension)'),
        ({'data': (4,)}, 'data of shape (4,) is not'),
        (
            {'data': (4, 2), 'label': (5,)},
            'label of shape (5,) does not belong to data of shape (4, 2)',
        ),
        ({'data': (4, 2), 'label': (4, 1)}, 'label of shape (4, 1) does not belong'),
    ],
)
def test_a_shape_that_does_not_fit_is_named(shapes, problem, capfd):
    with pytest.raises(mx.MXNetError):
        symbol(num_class=3).infer_shape(**shapes)
    assert problem in capfd.readouterr().out


def test_inputs_other_than_float32_are_refused(capfd):
    with pytest.raises(mx.MXNetError):
        symbol(num_class=3).infer_type(data=np.float64, label=np.float64)
    assert "['float64', 'float64'] are not float32" in capfd.readouterr().out


@pytest.fixture(params=['synchronous', 'queued'])
def engine(request, monkeypatch):
    """The metrics in their forms for the engine of this process and for one that works beside it."""
    monkeypatch.setattr(center_loss, 'SYNCHRONOUS', request.param == 'synchronous')


def test_accuracy_counts_every_image_once(engine):
    metric = center_loss.Accuracy()
    hits = []
    rng = np.random.default_rng(6)
    for batch in (8, 8, 3):
        probability, label = rng.random((batch, 10)).astype('f'), rng.integers(0, 10, batch)
        label[0] = probability[0].argmax()
        metric.update_dict(
            {'softmax_label': mx.nd.array(label), 'center_label': mx.nd.zeros(batch)},
            {'softmax_output': mx.nd.array(probability), 'center_loss_output': mx.nd.zeros(1)},
        )
        hits.extend(probability.argmax(axis=1) == label)
    assert metric.get() == ('accuracy', np.mean(hits))
    metric.reset_local()
    assert np.isnan(metric.get()[1])
    assert metric.get_global() == ('accuracy', np.mean(hits))


@pytest.mark.parametrize('devices', [1, 2, 3, 4])
def test_center_loss_is_the_mean_over_the_images_however_they_are_shared(devices, engine):
    metric = center_loss.CenterLossMetric()
    rng = np.random.default_rng(7)
    losses = []
    for batch in (12, 12, 7):
        per_image = rng.random(batch)
        losses.extend(per_image)
        shares = [
            per_image[part] for part in mx.executor_manager._split_input_slice(batch, [1] * devices)
        ]
        assert sum(map(len, shares)) == batch
        metric.update([mx.nd.zeros(batch)], [mx.nd.array([share.mean() for share in shares])])
    assert metric.get()[1] == pytest.approx(np.mean(losses), rel=1e-6)


@pytest.mark.parametrize('batches', [1, 3, center_loss.MOST_QUEUED, center_loss.MOST_QUEUED + 5])
def test_metrics_count_what_a_batch_had_when_it_was_given(batches, engine):
    accuracy, loss = center_loss.Accuracy(), center_loss.CenterLossMetric()
    probability, label, mean = mx.nd.zeros((4, 10)), mx.nd.zeros(4), mx.nd.zeros(1)
    rng = np.random.default_rng(8)
    hits, losses = [], []
    for _ in range(batches):  # an executor writes into the same arrays at every step
        probability[:], label[:], mean[:] = (
            rng.random((4, 10)),
            rng.integers(0, 3, 4),
            rng.random(1),
        )
        accuracy.update([label], [probability])
        loss.update([label], [mean])
        hits.append(probability.asnumpy().argmax(axis=1) == label.asnumpy())
        losses.append(mean.asscalar())
    probability[:] = label[:] = mean[:] = 0
    assert accuracy.get()[1] == accuracy.get_global()[1] == np.mean(hits)
    assert loss.get()[1] == loss.get_global()[1] == pytest.approx(np.mean(losses), rel=1e-6)


def test_resetting_a_metric_loses_no_batch_and_keeps_none(engine):
    metric = center_loss.CenterLossMetric()
    metric.update([mx.nd.zeros(2)], [mx.nd.array([3])])
    metric.reset_local()
    assert np.isnan(metric.get()[1]) and metric.get_global()[1] == 3
    metric.update([mx.nd.zeros(2)], [mx.nd.array([5])])
    assert metric.get()[1] == 5 and metric.get_global()[1] == 4
    metric.update([mx.nd.zeros(2)], [mx.nd.array([7])])
    metric.reset()
    assert np.isnan(metric.get()[1]) and np.isnan(metric.get_global()[1])
