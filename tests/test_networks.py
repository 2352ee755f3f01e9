"""LeNet and LeNet++: shapes, what they compute, and their vectorized forms."""

from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
import pytest

from common.environment import mx
from common import vectorized
from common.versions import instruction_set
from helpers import digits
import train

LENET = {
    'conv1_weight': (20, 1, 5, 5),
    'conv1_bias': (20,),
    'conv2_weight': (50, 20, 5, 5),
    'conv2_bias': (50,),
    'fc1_weight': (500, 800),
    'fc1_bias': (500,),
}
CHANNELS = {
    '1_1': (32, 1),
    '1_2': (32, 32),
    '2_1': (64, 32),
    '2_2': (64, 64),
    '3_1': (128, 64),
    '3_2': (128, 128),
}
LENET_PLUS_PLUS = {
    **{f'conv{name}_weight': (*channels, 5, 5) for name, channels in CHANNELS.items()},
    **{f'conv{name}_bias': channels[:1] for name, channels in CHANNELS.items()},
    **{f'prelu{name}_slope': (channels[0], 1, 1, 1) for name, channels in CHANNELS.items()},
}


def head_shapes(features, num_classes=10, dimension=2):
    return {
        'embedding_weight': (dimension, features),
        'embedding_bias': (dimension,),
        'fc2_weight': (num_classes, dimension),
        'fc2_bias': (num_classes,),
    }


@pytest.fixture(params=[8, 16])
def block(request, monkeypatch):
    """The vectorized forms with blocks of channels as for AVX2, and as for AVX-512."""
    monkeypatch.setattr(vectorized, 'BLOCK', request.param)


@pytest.mark.parametrize(
    'limit, flags, expected',
    [
        ('', 'avx avx2 avx512f', 'avx512f'),
        ('', 'avx avx2', 'avx2'),
        ('ALL', 'avx avx2 avx512f', 'avx512f'),
        ('AVX512_CORE', 'avx avx2 avx512f', 'avx512f'),
        ('AVX512_CORE', 'avx avx2', 'avx2'),
        ('AVX2', 'avx avx2 avx512f', 'avx2'),
        ('AVX', 'avx avx2 avx512f', 'avx'),
        ('SSE41', 'avx avx2 avx512f', 'sse'),
        ('', 'fpu', 'sse'),
    ],
)
def test_instruction_set(limit, flags, expected, monkeypatch):
    monkeypatch.setenv('DNNL_MAX_CPU_ISA', limit)
    monkeypatch.setattr(Path, 'read_text', lambda path: f'flags : {flags} end')
    assert instruction_set.__wrapped__() == expected


@pytest.mark.parametrize('vectorized', [False, True])
@pytest.mark.parametrize(
    'network, options, parameters',
    [
        ('lenet', {}, {**LENET, **head_shapes(500)}),
        (
            'lenet++',
            {'num_classes': 6, 'embedding_dim': 3},
            {**LENET_PLUS_PLUS, **head_shapes(1152, 6, 3)},
        ),
    ],
)
def test_shapes(network, options, parameters, vectorized, block):
    symbol = train.get_symbol(network=network, **options, vectorized=vectorized)
    shapes, outputs, centers = symbol.infer_shape(data=(7, 1, 28, 28))
    inputs = {'data': (7, 1, 28, 28), 'softmax_label': (7,), 'center_label': (7,)}
    found = dict(zip(symbol.list_arguments(), shapes, strict=True))
    assert found == {**inputs, **parameters}
    num_classes, dimension = parameters['fc2_weight']
    assert dict(zip(symbol.list_outputs(), outputs, strict=True)) == {
        'softmax_output': (7, num_classes),
        'center_loss_output': (7,),
    }
    assert symbol.list_auxiliary_states() == ['center_loss_center_bias']
    assert centers == [(num_classes, dimension)]


def test_no_bias():
    names = [set(train.get_symbol(no_bias=no_bias).list_arguments()) for no_bias in (False, True)]
    assert names[0] - names[1] == {'embedding_bias', 'fc2_bias'}


def test_keyword_only():
    with pytest.raises(TypeError):
        train.get_symbol(10, 0.1)


@pytest.mark.parametrize('network', train.NETWORKS)
def test_options_reach_the_operator(network):
    symbol = train.get_symbol(
        network=network,
        num_classes=7,
        center_loss_weight=0.3,
        alpha=0.25,
        embedding_lr_mult=0.4,
    )
    attributes = symbol.attr_dict()
    center = attributes['center_loss']
    assert {name: center[name] for name in ('num_class', 'alpha', 'scale', 'normalization')} == {
        'num_class': '7',
        'alpha': '0.25',
        'scale': '0.3',
        'normalization': 'null',
    }
    assert attributes['embedding_weight']['__lr_mult__'] == '0.4'
    assert [name for name in attributes if '__lr_mult__' in attributes[name]] == [
        'embedding_weight'
    ]


@pytest.mark.parametrize('network, count', [('lenet', 427_102), ('lenet++', 797_184)])
def test_print_summary(network, count, capsys):
    mx.viz.print_summary(train.get_symbol(network=network), shape={'data': (1, 1, 28, 28)})
    shown = capsys.readouterr().out
    assert f'Total params: {count}' in shown
    assert 'pool2(Pooling)' in shown and 'embedding(FullyConnected)' in shown


def numpy_convolution(x, weight, bias, padding=0):
    x = np.pad(x, ((0, 0), (0, 0), (padding,) * 2, (padding,) * 2))
    patches = sliding_window_view(x, weight.shape[2:], axis=(2, 3))  # (B, C, H, W, 5, 5)
    return np.einsum('bchwij,fcij->bfhw', patches, weight, optimize=True) + bias[:, None, None]


def numpy_pooling(x):
    height, width = x.shape[2] // 2, x.shape[3] // 2
    x = x[:, :, : 2 * height, : 2 * width]
    return x.reshape(*x.shape[:2], height, 2, width, 2).max(axis=(3, 5))


def numpy_lenet(x, p):
    for layer in ('conv1', 'conv2'):
        x = numpy_pooling(np.tanh(numpy_convolution(x, p[f'{layer}_weight'], p[f'{layer}_bias'])))
    return np.tanh(x.reshape(len(x), -1) @ p['fc1_weight'].T + p['fc1_bias'])


def numpy_lenet_plus_plus(x, p):
    for name in CHANNELS:
        x = numpy_convolution(x, p[f'conv{name}_weight'], p[f'conv{name}_bias'], padding=2)
        x = np.where(x > 0, x, p[f'prelu{name}_slope'][:, 0] * x)
        if name.endswith('_2'):
            x = numpy_pooling(x)
    return x.reshape(len(x), -1)


def random_parameters(symbol, seed=0, **shapes):
    """Small random weights, and slopes of PReLU below 0 and above 1 as well."""
    rng = np.random.default_rng(seed)
    arg_shapes, _, _ = symbol.infer_shape(**shapes)
    found = {}
    for name, shape in zip(symbol.list_arguments(), arg_shapes, strict=True):
        if not name.endswith('label') and name != 'data':
            fan_in = np.prod(shape[1:]) if len(shape) > 1 else 100
            found[name] = rng.normal(0, 1 if name.endswith('slope') else fan_in**-0.5, shape)
    return found


@pytest.mark.parametrize(
    'network, in_numpy',
    [('lenet', numpy_lenet), ('lenet++', numpy_lenet_plus_plus)],
)
def test_features_are_those_of_the_paper(network, in_numpy):
    images, _ = digits(2)
    symbol = train.NETWORKS[network](mx.sym.var('data'))
    parameters = random_parameters(symbol, data=images.shape)
    executor = symbol.simple_bind(mx.cpu(), data=images.shape)
    executor.copy_params_from({name: mx.nd.array(value) for name, value in parameters.items()})
    measured = executor.forward(data=mx.nd.array(images))[0].asnumpy()
    expected = in_numpy(images.astype(np.float64), parameters)
    np.testing.assert_allclose(measured, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    'network, batch_size, options',
    [
        ('lenet', 32, {}),
        ('lenet', 5, {'no_bias': True, 'embedding_dim': 5, 'center_loss_weight': 2}),
        ('lenet++', 4, {}),
    ],
)
def test_vectorized_equals_plain(network, batch_size, options, block):
    """Outputs, gradients of all parameters and of the image, and centers after the step."""
    images, labels = digits(batch_size)
    symbols = [
        train.get_symbol(network=network, **options, vectorized=vectorized)
        for vectorized in (False, True)
    ]
    parameters = random_parameters(symbols[0], data=images.shape)
    inputs = {'data': images, 'softmax_label': labels, 'center_label': labels}
    results = []
    for symbol in symbols:
        executor = symbol.simple_bind(mx.cpu(), data=images.shape)
        arrays = {**parameters, **inputs}
        executor.copy_params_from({name: mx.nd.array(value) for name, value in arrays.items()})
        # All outputs are read: MXNet runs an operator with the is_train of the newest forward.
        scored = [output.asnumpy() for output in executor.forward()]
        found = {'scored': scored[0]}
        outputs = executor.forward(is_train=True)
        found.update(zip(symbol.list_outputs(), [o.asnumpy() for o in outputs], strict=True))
        executor.backward()
        for name, gradient in executor.grad_dict.items():
            if not name.endswith('label'):
                found[f'gradient of {name}'] = gradient.asnumpy()
        found['centers'] = executor.aux_arrays[0].asnumpy()
        results.append(found)
    plain, fast = results
    assert plain.keys() == fast.keys() and len(plain) > 12
    for name, value in plain.items():
        assert np.abs(value).max() > 0, name
        np.testing.assert_allclose(
            fast[name], value, rtol=1e-3, atol=1e-4 * np.abs(value).max(), err_msg=name
        )


@pytest.mark.parametrize('prelu', [train.plain_prelu, vectorized.prelu])
@pytest.mark.parametrize('shape', [(5, 32, 28, 28), (3, 7, 5, 4), (1, 1, 1, 1)])
def test_prelu_is_mxnets(shape, prelu):
    """Values and gradients, with slopes below 0 and above 1, and where x is 0."""
    rng = np.random.default_rng(0)
    x, head, slope = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=shape[1])
    x.flat[::11] = 0
    own = prelu(mx.sym.var('x'), mx.sym.var('slope', shape=(shape[1], 1, 1, 1)), shape[1], 'a')
    theirs = mx.sym.LeakyReLU(mx.sym.var('x'), gamma=mx.sym.var('slope'), act_type='prelu')
    found = []
    for symbol, slope_shape in ((own, (-1, 1, 1, 1)), (theirs, (-1,))):
        arguments = {'x': mx.nd.array(x), 'slope': mx.nd.array(slope.reshape(slope_shape))}
        gradients = {name: mx.nd.zeros_like(value) for name, value in arguments.items()}
        executor = symbol.bind(mx.cpu(), arguments, gradients)
        (output,) = executor.forward(is_train=True)
        executor.backward(mx.nd.array(head))
        found.append([output, gradients['x'], gradients['slope'].reshape(-1)])
    for name, ours, mxnets, size in zip(
        ('output', 'x', 'slope'), *found, (1, 1, np.prod(shape) ** 0.5), strict=True
    ):
        np.testing.assert_allclose(
            ours.asnumpy(), mxnets.asnumpy(), rtol=1e-4, atol=1e-6 * size, err_msg=name
        )
    expected = np.where(x > 0, x, x * slope[:, None, None])
    np.testing.assert_allclose(found[0][0].asnumpy(), expected, rtol=1e-5, atol=1e-6)
