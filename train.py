"""Train LeNet or LeNet++ on MNIST with softmax and center loss together.

    python train.py                                      20 epochs on the CPU
    python train.py --batch-size=128 --center-loss-weight=0.1
    python train.py --center-loss-weight=0 --save-model-prefix=softmax    the softmax-only baseline, measured by the same yardstick
    python train.py --network=lenet++ --no-bias          the paper's network for its figures, clusters on a ring
    python train.py --num-classes=6 --embedding-dim=32   six digits only: what is the embedding worth for the four that it has never seen?
    python train.py --gpus=0,1 --batch-size=256
    python train.py --num-workers=2 --batch-size=64      two workers on this machine, with 128 images in every step
    python train.py --resume                             continue after a stop

The objective is Eq. 5 of Wen, Zhang, Li, Qiao: A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016,

    L = L_softmax + lambda L_C,

with both terms the mean over the batch. ``tail -f log.txt`` follows a run, ``python vis.py`` shows what came of it.
"""

from runtime import (
    ROLE,
    ArgumentParser,
    mx,
    number,
    run_script,
)  # first, for a Ctrl-C while all this is imported

import argparse
import functools

import center_loss  # noqa: F401  (registers the operator)
import data
from distributed import run_workers, serve
from train_model import INITIALIZERS, Checkpoints, fit

IMAGE_SHAPE = (1, 28, 28)
NUM_CLASSES = 10
MAX_DEVICE = 15  # MXNet knows no more of a kind, and hangs


def get_symbol(
    num_classes=NUM_CLASSES,
    center_loss_weight=0.01,
    alpha=0.5,
    embedding_dim=2,
    no_bias=False,
    embedding_lr_mult=0.05,
    network='lenet',
):
    """A network with the joint objective.

    Parameters
    ----------
    num_classes : int
        K, the number of classes.
    center_loss_weight : float
        lambda of Eq. 5. With 0 the operator stays: the centers follow the embeddings and the loss is reported, only its gradient is zero.
    alpha : float
        Learning rate of the centers (Eq. 4), from 0 to 1.
    embedding_dim : int
        d, the dimension of the embedding.
    no_bias : bool
        Leave the biases out of the embedding and of the last layer: the classes are then told apart by angle alone, and the clusters lie
        on a ring, as in the paper's Figures 2 and 3.
    embedding_lr_mult : float
        Learning rate of the embedding's weights relative to that of all others. To them the center loss is a quadratic of curvature
        lambda ||h||^2, h the 500 tanh activations that feed them, so ||h||^2 < 500; SGD of rate r with momentum m is stable on it while
        r lambda ||h||^2 < 2 (1 + m) = 3.8. At a twentieth of LeNet's default rate that holds for every lambda up to 1, whatever h becomes.
        LeNet++'s features have no such bound, and its convolutions carry most of the curvature: it has a smaller default rate.
    network : {'lenet', 'lenet++'}
        What computes the features that feed the embedding.

    Returns
    -------
    mx.sym.Symbol
        Group of ``softmax_output`` (B, K) and ``center_loss_output`` (1,), with the inputs ``data`` (B, 1, 28, 28), ``softmax_label`` (B,) and
        ``center_label`` (B,).
    """
    embedding = mx.sym.FullyConnected(
        NETWORKS[network](mx.sym.var('data')),
        weight=mx.sym.var('embedding_weight', lr_mult=embedding_lr_mult),
        num_hidden=embedding_dim,
        no_bias=no_bias,
        name='embedding',
    )  # (B, d)
    logits = mx.sym.FullyConnected(
        embedding, num_hidden=num_classes, no_bias=no_bias, name='fc2'
    )  # (B, K)
    softmax = mx.sym.SoftmaxOutput(logits, name='softmax')
    # A Module divides every gradient by the total batch. SoftmaxOutput's gradient is a sum over the batch, and with 'null' so is the
    # center loss's: what is minimised is the mean softmax loss plus lambda times the mean center loss at any batch size.
    center = mx.sym.Custom(
        data=embedding,
        label=mx.sym.var('center_label'),
        op_type='centerloss',
        name='center_loss',
        num_class=num_classes,
        alpha=alpha,
        scale=center_loss_weight,
        normalization='null',
    )
    return mx.sym.Group([softmax, center])


def lenet(image):
    """The features that feed the embedding: (B, 1, 28, 28) -> (B, 500).

    Three things make it faster and leave the function as it is. Each tanh is taken after the pooling instead of before it: tanh grows with its
    argument, so the largest tanh of a window is the tanh of the largest. The convolutions have 24 and 56 channels instead of 20 and 50, the
    last of them zeros: oneDNN's vectorised layout wants multiples of 8, and without it MXNet falls back on slower convolutions and poolings.
    And conv1 is computed over three input channels, see ``in_pairs_of_rows``.
    """
    net, weight = in_pairs_of_rows(image, mx.sym.var('conv1_weight', shape=(20, 1, 5, 5)), 'conv1')
    net = padded_convolution(net, weight, (20, 3, 2, 5), (24, 3), 'conv1')  # (B, 24, 24, 24)
    net = mx.sym.Pooling(
        net, kernel=(2, 2), stride=(2, 2), pool_type='max', name='pool1'
    )  # (B, 24, 12, 12)
    net = mx.sym.Activation(net, act_type='tanh', name='tanh1')
    net = padded_convolution(
        net, mx.sym.var('conv2_weight', shape=(50, 20, 5, 5)), (50, 20, 5, 5), (56, 24), 'conv2'
    )  # (B, 56, 8, 8)
    net = mx.sym.Pooling(
        net, kernel=(2, 2), stride=(2, 2), pool_type='max', name='pool2'
    )  # (B, 56, 4, 4)
    net = mx.sym.slice_axis(
        net, axis=1, begin=0, end=50, name='pool2_without_padding'
    )  # (B, 50, 4, 4)
    net = mx.sym.Activation(net, act_type='tanh', name='tanh2')
    net = mx.sym.FullyConnected(mx.sym.flatten(net, name='flatten'), num_hidden=500, name='fc1')
    return mx.sym.Activation(net, act_type='tanh', name='tanh3')


def in_pairs_of_rows(image, weight, name):
    """A 5x5 convolution over one channel as one of 2x5 over three: the two rows of each are rows 0 and 1, 2 and 3, 3 and 4 of the five, with zeros for
    the row that would come twice. oneDNN has vectorised code for the gradient of the weights of three channels, and none for one.

    (B, 1, H, W) and (F, 1, 5, 5) -> (B, 3, H - 3, W) and (F, 3, 2, 5).
    """
    images = [
        mx.sym.slice_axis(image, axis=2, begin=first, end=end, name=f'image_from_row_{first}')
        for first, end in ((0, -3), (2, -1), (3, None))
    ]
    rows = mx.sym.slice_axis(weight, axis=2, begin=0, end=4, name=f'{name}_rows_0_to_3')
    last = mx.sym.slice_axis(weight, axis=2, begin=4, end=5, name=f'{name}_row_4')
    six_rows = mx.sym.concat(
        rows,
        mx.sym.zeros_like(last, name=f'{name}_row_of_zeros'),
        last,
        dim=2,
        name=f'{name}_six_rows',
    )  # (F, 1, 6, 5)
    return mx.sym.concat(*images, dim=1, name='image_three_times'), mx.sym.reshape(
        six_rows, shape=(0, 3, 2, 5), name=f'{name}_pairs_of_rows'
    )


def padded_convolution(x, weight, shape, padded, name):
    """A convolution with a ``weight`` of ``shape`` (filters, channels, height, width), computed with zeros around it as one of ``padded``
    (filters, channels). The further channels of ``x`` have to be finite; those of the result are 0.
    """

    def with_zeros(parameter, shape, axis, what):
        return mx.sym.concat(
            parameter,
            mx.sym.zeros(shape, name=f'{name}_zero_{what}'),
            dim=axis,
            name=f'{name}_with_zero_{what}',
        )

    num_filter, channels, *kernel = shape
    bias = mx.sym.var(f'{name}_bias', shape=(num_filter,))
    if padded[1] > channels:
        weight = with_zeros(weight, (num_filter, padded[1] - channels, *kernel), 1, 'channels')
    weight = with_zeros(weight, (padded[0] - num_filter, padded[1], *kernel), 0, 'filters')
    bias = with_zeros(bias, (padded[0] - num_filter,), 0, 'biases')
    return mx.sym.Convolution(
        x, weight=weight, bias=bias, kernel=kernel, num_filter=padded[0], name=name
    )


def lenet_plus_plus(image):
    """The features of the paper's Table 1: (B, 1, 28, 28) -> (B, 1152), in three stages of two convolutions each.

    Its convolutions begin at the scale of He et al. (ICCV 2015), whatever the initializer: from a smaller one, six of them would leave nothing
    of the image.
    """
    net, he = image, mx.init.Xavier(factor_type='in', rnd_type='gaussian', magnitude=2)
    for stage, num_filter in enumerate((32, 64, 128), 1):
        for name in (f'{stage}_1', f'{stage}_2'):
            weight = mx.sym.var(f'conv{name}_weight', init=he)
            net = mx.sym.Convolution(
                net,
                weight=weight,
                kernel=(5, 5),
                pad=(2, 2),
                num_filter=num_filter,
                name=f'conv{name}',
            )
            net = prelu(net, num_filter, f'prelu{name}')
        # (B, 32, 14, 14), (B, 64, 7, 7), (B, 128, 3, 3)
        net = mx.sym.Pooling(
            net, kernel=(2, 2), stride=(2, 2), pool_type='max', name=f'pool{stage}'
        )
    return mx.sym.flatten(net, name='flatten')


def prelu(x, channels, name):
    """PReLU (He et al., ICCV 2015) with a slope a for each channel: x where x > 0, a x elsewhere. (B, C, H, W) -> (B, C, H, W).

    Written as a x + (1 - a) relu(x), where a factor for each channel is a 1x1 convolution of every channel by itself: the CPU's library
    for convolutions does that, and the sum for the slope's gradient, in its own layout. LeNet++ trains twice as fast as with MXNet's LeakyReLU.

    The slope begins at 0.25, whatever the initializer. It is no ``_weight`` by its name, so that MXNet leaves it out of the weight decay, as the
    authors of PReLU do: decay would pull it towards ReLU.
    """
    slope = mx.sym.var(f'{name}_slope', init=mx.init.Constant(0.25))  # (C, 1, 1, 1)
    per_channel = {'kernel': (1, 1), 'num_filter': channels, 'num_group': channels, 'no_bias': True}
    straight = mx.sym.Convolution(x, weight=slope, name=f'{name}_straight', **per_channel)
    rectified = mx.sym.Activation(x, act_type='relu', name=f'{name}_relu')
    return mx.sym.elemwise_add(
        straight,
        mx.sym.Convolution(rectified, weight=1 - slope, name=f'{name}_rest', **per_channel),
        name=name,
    )


NETWORKS = {'lenet': lenet, 'lenet++': lenet_plus_plus}
# What each of them trains with unless it is told otherwise. LeNet's was chosen on 10,000 training images that were held out; uncut gradients collapse with
# it at lambda 1 where batches are few, as those of the embedded digits are. LeNet++'s rate is the one that is stable there.
RECIPES = {
    'lenet': {
        'initializer': 'small-head',
        'lr': 0.1,
        'embedding_lr_mult': 0.05,
        'lr_factor_epoch': 14,
        'clip_gradient': 0.05,
    },
    'lenet++': {
        'initializer': 'xavier',
        'lr': 0.01,
        'embedding_lr_mult': 0.1,
        'lr_factor_epoch': 10,
        'clip_gradient': 0,
    },
}


def parse_args(argv=None):
    """The command line (by default ``sys.argv``) as a namespace, checked as far as it can be without touching a file."""
    parser = ArgumentParser(
        description='Train LeNet or LeNet++ on MNIST with softmax and center loss (Wen et al., ECCV 2016).'
    )
    data.add_data_arguments(parser)
    parser.add_argument(
        '--num-examples',
        type=number(int, minimum=1),
        default=60000,
        metavar='N',
        help='use only the first N training images',
    )
    parser.add_argument(
        '--num-classes',
        type=number(int, minimum=2, maximum=NUM_CLASSES),
        default=NUM_CLASSES,
        metavar='K',
        help='train and validate on the digits 0 to K-1 only: vis.py then shows how well the embedding tells the other ones apart',
    )

    network = parser.add_argument_group('network and objective')
    network.add_argument(
        '--network',
        choices=sorted(NETWORKS),
        default='lenet',
        help="lenet++ is the paper's network for its figures: six convolutions with PReLU, some twenty times the work",
    )
    network.add_argument(
        '--embedding-dim',
        type=number(int, minimum=1),
        default=2,
        metavar='D',
        help='dimension of the embedding',
    )
    network.add_argument(
        '--center-loss-weight',
        type=number(float, minimum=0),
        default=0.01,
        metavar='LAMBDA',
        help='lambda of L = L_softmax + lambda L_C, both the mean over the batch; 0 is softmax only',
    )
    network.add_argument(
        '--alpha',
        type=number(float, minimum=0, maximum=1),
        default=0.5,
        help='learning rate of the centers: how far they move towards the embeddings of their class in every batch',
    )
    network.add_argument(
        '--no-bias',
        action='store_true',
        help='no biases in the embedding and the last layer: the clusters lie on a ring',
    )
    network.add_argument(
        '--initializer',
        choices=sorted(INITIALIZERS),
        default=argparse.SUPPRESS,
        help='initial weights: small-head has a last layer close to 0, and larger weights before the embedding; xavier has all of one '
        f'scale; mixed (dense layers close to 0) is the widely known recipe, for lambda 0.01 and below {by_network("initializer")}',
    )

    training = parser.add_argument_group('training')
    training.add_argument(
        '--gpus',
        type=device_numbers,
        default='',
        metavar='LIST',
        help='GPUs that share every batch, such as 0,1; empty: the CPU',
    )
    training.add_argument(
        '--cpus',
        type=device_numbers,
        default='',
        metavar='LIST',
        help='CPU contexts that share every batch as GPUs would, such as 0,1; empty: one',
    )
    training.add_argument(
        '--batch-size',
        type=number(int, minimum=1),
        default=100,
        metavar='B',
        help='images in a batch of one worker, over all its devices',
    )
    training.add_argument(
        '--num-epochs',
        type=number(int, minimum=1),
        default=20,
        metavar='N',
        help='epochs in all, with those before --resume',
    )
    training.add_argument(
        '--lr',
        type=number(float, above=0, maximum=1e6),
        default=argparse.SUPPRESS,
        help=f'learning rate of SGD (momentum 0.9, weight decay 5e-4) {by_network("lr")}',
    )
    training.add_argument(
        '--embedding-lr-mult',
        type=number(float, above=0, maximum=1e6),
        default=argparse.SUPPRESS,
        metavar='M',
        help=f"the embedding's weights learn at M times --lr: what keeps them stable at large lambda {by_network('embedding_lr_mult')}",
    )
    training.add_argument(
        '--lr-factor',
        type=number(float, above=0, maximum=1),
        default=0.1,
        metavar='F',
        help='the learning rate is multiplied by F every --lr-factor-epoch epochs; 1 keeps it',
    )
    training.add_argument(
        '--lr-factor-epoch',
        type=number(float, above=0, maximum=1e6),
        default=argparse.SUPPRESS,
        metavar='E',
        help=f'in epochs; 0.5 is half an epoch {by_network("lr_factor_epoch")}',
    )
    training.add_argument(
        '--warmup-epochs',
        type=number(float, minimum=0, maximum=1e6),
        default=1,
        metavar='E',
        help='the learning rate rises from 0 to --lr over the first E epochs: what keeps the start stable at a high rate',
    )
    training.add_argument(
        '--clip-gradient',
        type=clipping,
        default=argparse.SUPPRESS,
        metavar='C',
        help='cut every element of a gradient (of the mean over the batch) to [-C, C]: what keeps the first epochs stable where batches '
        f'are few; 0: never {by_network("clip_gradient")}',
    )
    training.add_argument(
        '--average-weights',
        type=number(float, minimum=0, maximum=1),
        default=0,
        metavar='F',
        help='validate and save the average of the weights over about the last F of all steps so far, such as 0.1, instead of those of the '
        'last step; training goes on as without it',
    )
    training.add_argument(
        '--kv-store',
        type=kvstore,
        choices=['local', 'device', 'dist_sync', 'dist_device_sync'],
        default='local',
        help='how gradients are summed: over the devices of this process (local: on the CPU, device: on the GPUs), or over machines',
    )
    training.add_argument(
        '--num-workers',
        type=number(int, minimum=1),
        metavar='W',
        help='run W workers on this machine, with a scheduler and a server for them, instead of one process; --kv-store is dist_sync then',
    )
    training.add_argument(
        '--seed',
        type=number(int, minimum=0, maximum=2**31 - 1),
        default=0,
        help='of the initial weights and of the shuffles',
    )

    files = parser.add_argument_group('checkpoints and log')
    files.add_argument(
        '--save-model-prefix',
        default='center_loss',
        metavar='P',
        help='checkpoints are written to P-0001.params and so on',
    )
    files.add_argument(
        '--resume',
        action='store_true',
        help='continue the run of --save-model-prefix from its newest whole checkpoint, where there is one',
    )
    files.add_argument(
        '--model-prefix',
        metavar='P',
        help='with --load-epoch: start a new run from the parameters of P that fit (fine-tuning)',
    )
    files.add_argument(
        '--load-epoch',
        type=number(int, minimum=1, maximum=10**9),
        metavar='N',
        help='the epoch of --model-prefix to start from',
    )
    files.add_argument(
        '--log_file',
        '--log-file',
        default='log.txt',
        help='name of the log file, which is appended to',
    )
    files.add_argument('--log_dir', '--log-dir', default='.', help='folder of the log file')

    args = parser.parse_args(argv)
    if (args.model_prefix is None) != (args.load_epoch is None):
        given, missing = (
            ('--load-epoch', '--model-prefix')
            if args.model_prefix is None
            else ('--model-prefix', '--load-epoch')
        )
        parser.error(f'{given} needs {missing} beside it')
    if args.gpus and args.cpus:
        parser.error('--gpus and --cpus both name the devices: give one of them')
    for name, value in RECIPES[args.network].items():
        vars(args).setdefault(name, value)
    if args.num_workers and 'dist' not in args.kv_store:
        args.kv_store = 'dist_device_sync' if args.kv_store == 'device' else 'dist_sync'
    return args


def by_network(option):
    """The defaults of an option that depends on the network, as the help shows them."""
    return (
        '(default: '
        + ', '.join(f'{recipe[option]} for {network}' for network, recipe in RECIPES.items())
        + ')'
    )


def clipping(text):
    """An argparse type: 0, or a number that is none to MXNet's float32 either."""
    return 0 if number(float)(text) == 0 else number(float, minimum=1e-30, maximum=1e30)(text)


def kvstore(text):
    """An argparse type that says why one of MXNet's kvstores is missing among the choices."""
    if text == 'dist_async':
        raise argparse.ArgumentTypeError(
            'dist_async lets every worker go on with weights of its own age, and the centers of Eq. 4 would belong to none of '
            'them: take dist_sync'
        )
    return text


def device_numbers(text):
    """An argparse type: '0,1' -> [0, 1], '' -> []."""
    numbers = text.split(',') if text else []
    if not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(
            f'{text!r} is not a list of device numbers such as 0 or 0,1'
        )
    if len({int(number) for number in numbers}) < len(numbers):
        raise argparse.ArgumentTypeError(f'{text!r} names a device twice')
    if any(int(number) > MAX_DEVICE for number in numbers):
        raise argparse.ArgumentTypeError(f'{text!r} names a device above {MAX_DEVICE}')
    return [int(number) for number in numbers]


def main():
    args = parse_args()
    if ROLE in ('scheduler', 'server'):
        return serve()
    if args.num_workers and ROLE is None:
        return run_workers(args.num_workers, Checkpoints(args.save_model_prefix), args.resume)
    network = get_symbol(
        args.num_classes,
        args.center_loss_weight,
        args.alpha,
        args.embedding_dim,
        args.no_bias,
        args.embedding_lr_mult,
        args.network,
    )
    data_loader = functools.partial(
        data.mnist_iterator,
        dataset=args.dataset,
        data_dir=args.data_dir,
        seed=args.seed,
        num_examples=args.num_examples,
        num_classes=args.num_classes,
    )
    fit(args, network, data_loader, IMAGE_SHAPE)


if __name__ == '__main__':
    run_script(main)
