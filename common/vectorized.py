"""LeNet and LeNet++ in forms that a CPU computes faster, with the same parameters and results.

oneDNN (2.4.4 in MXNet 1.9.1) has vectorized convolutions for channels in multiples of 8, with
AVX-512 of 16 (of 8 it takes its AVX2 code there: a step takes 1.2 times as long), and no vectorized
weight gradient for a single input channel. Textbook LeNet takes 1.31 times as long a
step as the form here (batch 128, 1 thread; 1.13 without the pairs of rows, 1.25 with each tanh
before its pooling), LeNet++ with MXNet's LeakyReLU about twice as long as with ``prelu``
(``python -m tools.benchmark --only tricks lenet++``). On a GPU the slices and concatenations only
cost. Parameters have the names and shapes of the plain networks in ``train.py``, so that a
checkpoint is of both.
"""

from common.environment import mx
from common.versions import instruction_set

BLOCK = 16 if instruction_set() == 'avx512f' else 8  # channels


def lenet(image: mx.sym.Symbol) -> mx.sym.Symbol:
    """Compute the features of ``train.lenet``: (B, 1, H, W) -> (B, 500).

    Each tanh comes after its pooling: it is monotonic, so the two commute. The shapes below are
    with a BLOCK of 8.
    """
    net, weight = pairs_of_rows(image, mx.sym.var('conv1_weight', shape=(20, 1, 5, 5)), 'conv1')
    net = padded_convolution(net, weight, (20, 3, 2, 5), 'conv1')  # (B, 24, 24, 24)
    net = mx.sym.Pooling(net, kernel=(2, 2), stride=(2, 2), pool_type='max', name='pool1')
    net = mx.sym.Activation(net, act_type='tanh', name='tanh1')  # (B, 24, 12, 12)
    weight = mx.sym.var('conv2_weight', shape=(50, 20, 5, 5))
    net = padded_convolution(net, weight, (50, 20, 5, 5), 'conv2')  # (B, 56, 8, 8)
    net = mx.sym.Pooling(net, kernel=(2, 2), stride=(2, 2), pool_type='max', name='pool2')
    net = mx.sym.slice_axis(net, axis=1, begin=0, end=50, name='pool2_without_padding')
    net = mx.sym.Activation(net, act_type='tanh', name='tanh2')  # (B, 50, 4, 4)
    net = mx.sym.FullyConnected(mx.sym.flatten(net, name='flatten'), num_hidden=500, name='fc1')
    return mx.sym.Activation(net, act_type='tanh', name='tanh3')


def pairs_of_rows(
    image: mx.sym.Symbol, weight: mx.sym.Symbol, name: str
) -> tuple[mx.sym.Symbol, mx.sym.Symbol]:
    """Turn a 5x5 convolution over one channel into a 2x5 convolution over three channels.

    Rows 0 and 1, 2 and 3, 3 and 4 of the filters become one channel each, with zeros for row 3 in
    the last pair: (B, 1, H, W), (F, 1, 5, 5) -> (B, 3, H - 3, W), (F, 3, 2, 5).
    """
    shifted = [
        mx.sym.slice_axis(image, axis=2, begin=first, end=end, name=f'image_from_row_{first}')
        for first, end in ((0, -3), (2, -1), (3, None))
    ]
    rows = mx.sym.slice_axis(weight, axis=2, begin=0, end=4, name=f'{name}_rows_0_to_3')
    last = mx.sym.slice_axis(weight, axis=2, begin=4, end=5, name=f'{name}_row_4')
    zeros = mx.sym.zeros_like(last, name=f'{name}_row_of_zeros')
    six_rows = mx.sym.concat(rows, zeros, last, dim=2, name=f'{name}_six_rows')  # (F, 1, 6, 5)
    return (
        mx.sym.concat(*shifted, dim=1, name='image_three_times'),
        mx.sym.reshape(six_rows, shape=(0, 3, 2, 5), name=f'{name}_pairs_of_rows'),
    )


def padded_convolution(
    x: mx.sym.Symbol, weight: mx.sym.Symbol, shape: tuple[int, ...], name: str
) -> mx.sym.Symbol:
    """Convolve with filters and channels padded with zeros to multiples of ``BLOCK``.

    Parameters
    ----------
    x
        Input; its channels beyond those of ``shape`` may hold any finite number. Three channels
        stay three: oneDNN has a vectorized form for the first layer.
    weight
        Filters of ``shape`` (filters, channels, height, width); the bias is ``NAME_bias``.

    Returns
    -------
    mx.sym.Symbol
        The result, whose further channels are 0.
    """

    def with_zeros(parameter, shape, axis, what):
        zeros = mx.sym.zeros(shape, name=f'{name}_zero_{what}')
        return mx.sym.concat(parameter, zeros, dim=axis, name=f'{name}_with_zero_{what}')

    filters, channels, *kernel = shape
    more_filters, more_channels = -filters % BLOCK, -channels % BLOCK if channels > 3 else 0
    bias = mx.sym.var(f'{name}_bias', shape=(filters,))
    if more_channels:
        weight = with_zeros(weight, (filters, more_channels, *kernel), 1, 'channels')
    weight = with_zeros(weight, (more_filters, channels + more_channels, *kernel), 0, 'filters')
    bias = with_zeros(bias, (more_filters,), 0, 'biases')
    return mx.sym.Convolution(
        x, weight=weight, bias=bias, kernel=kernel, num_filter=filters + more_filters, name=name
    )


def prelu(x: mx.sym.Symbol, slope: mx.sym.Symbol, channels: int, name: str) -> mx.sym.Symbol:
    """Compute PReLU as slope * x + (1 - slope) * relu(x): (B, C, H, W) -> (B, C, H, W).

    A factor per channel, slope (C, 1, 1, 1), is a 1x1 convolution of each channel by itself:
    oneDNN does that, and the sum for the slope's gradient, in its own memory layout.
    """
    per_channel = {
        'kernel': (1, 1),
        'num_filter': channels,
        'num_group': channels,
        'no_bias': True,
    }
    straight = mx.sym.Convolution(x, weight=slope, name=f'{name}_straight', **per_channel)
    rectified = mx.sym.Activation(x, act_type='relu', name=f'{name}_relu')
    rest = mx.sym.Convolution(rectified, weight=1 - slope, name=f'{name}_rest', **per_channel)
    return mx.sym.elemwise_add(straight, rest, name=name)
