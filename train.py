"""Train LeNet or LeNet++ on MNIST with softmax and center loss together.

    python train.py                                      eight epochs on the CPU
    python train.py --batch-size=128 --center-loss-weight=0.1
    python train.py --center-loss-weight=0 --save-model-prefix=softmax    softmax only
    python train.py --recipe=original                    as the MXNet version of 2016 trains
    python train.py --network=lenet++ --no-bias          the paper's network for its figures
    python train.py --classes=0,2,5 --embedding-dim=32   three digits; vis.py verifies the others
    python train.py --gpus=0,1 --batch-size=256
    python train.py --num-workers=2 --batch-size=64      two workers, 128 images in every step
    python train.py --resume                             continue after a stop

The objective is Eq. 5 of Wen, Zhang, Li, Qiao: A Discriminative Feature Learning Approach for Deep
Face Recognition, ECCV 2016,

    L = L_softmax + lambda L_C,

with both terms the mean over the batch. ``tail -f log.txt`` follows a run, ``python vis.py`` shows
its embeddings.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
import inspect
from pathlib import Path
import shlex
import sys
import time

from common.environment import ROLE, mx
import center_loss  # noqa: F401  (registers the operator)
from common import vectorized
from common.checkpoints import Checkpoints
from common.command_line import ArgumentParser, number, run_script
from common.devices import check_equal_shares, choose_devices
from common.discriminants import discriminant_params
from common.distributed import serve
from common.errors import InputError
from common.launcher import run_workers
from common.start import describe_saved
from common.training_options import add_training_arguments
import data
from train_model import fit

SCRIPT = sys.argv[0] if __name__ == '__main__' else __file__  # a program may call main()


def lenet(image: mx.sym.Symbol) -> mx.sym.Symbol:
    """Return the features that feed the embedding: (B, 1, 28, 28) -> (B, 500)."""
    # first convolution: (B, 20, 24, 24), pooled to (B, 20, 12, 12)
    net = mx.sym.Convolution(image, kernel=(5, 5), num_filter=20, name='conv1')
    net = mx.sym.Activation(net, act_type='tanh', name='tanh1')
    net = mx.sym.Pooling(net, kernel=(2, 2), stride=(2, 2), pool_type='max', name='pool1')
    # second convolution: (B, 50, 8, 8), pooled to (B, 50, 4, 4)
    net = mx.sym.Convolution(net, kernel=(5, 5), num_filter=50, name='conv2')
    net = mx.sym.Activation(net, act_type='tanh', name='tanh2')
    net = mx.sym.Pooling(net, kernel=(2, 2), stride=(2, 2), pool_type='max', name='pool2')
    # dense layer
    net = mx.sym.FullyConnected(mx.sym.flatten(net, name='flatten'), num_hidden=500, name='fc1')
    return mx.sym.Activation(net, act_type='tanh', name='tanh3')


def plain_prelu(x: mx.sym.Symbol, slope: mx.sym.Symbol, channels: int, name: str) -> mx.sym.Symbol:
    """Return x where x > 0 and slope * x elsewhere; slope (C, 1, 1, 1) is per channel."""
    rectified = mx.sym.Activation(x, act_type='relu', name=f'{name}_relu')
    slope = mx.sym.reshape(slope, shape=(1, channels, 1, 1), name=f'{name}_slope_per_channel')
    negative = mx.sym.broadcast_mul(slope, x - rectified, name=f'{name}_negative')
    return mx.sym.elemwise_add(rectified, negative, name=name)


def lenet_plus_plus(
    image: mx.sym.Symbol, prelu: Callable[..., mx.sym.Symbol] = plain_prelu
) -> mx.sym.Symbol:
    """Return the features of the paper's Table 1: (B, 1, 28, 28) -> (B, 1152).

    The convolutions begin at the scale of He et al. (ICCV 2015) and the slopes of PReLU at 0.25,
    whatever the initializer: from a smaller scale, six convolutions would leave nothing of the
    image. A slope's name does not end in ``weight``, so that it has no weight decay, which would
    pull PReLU towards ReLU.
    """
    net, he = image, mx.init.Xavier(factor_type='in', rnd_type='gaussian', magnitude=2)
    for stage, filters in enumerate((32, 64, 128), 1):
        for name in (f'{stage}_1', f'{stage}_2'):
            weight = mx.sym.var(f'conv{name}_weight', init=he)
            slope = mx.sym.var(
                f'prelu{name}_slope', shape=(filters, 1, 1, 1), init=mx.init.Constant(0.25)
            )
            net = mx.sym.Convolution(
                net, weight, kernel=(5, 5), pad=(2, 2), num_filter=filters, name=f'conv{name}'
            )
            net = prelu(net, slope, filters, f'prelu{name}')
        # (B, 32, 14, 14), (B, 64, 7, 7), (B, 128, 3, 3)
        net = mx.sym.Pooling(
            net, kernel=(2, 2), stride=(2, 2), pool_type='max', name=f'pool{stage}'
        )
    return mx.sym.flatten(net, name='flatten')


NETWORKS = {'lenet': lenet, 'lenet++': lenet_plus_plus}
# The same functions of the same parameters, in the forms that a CPU computes faster.
VECTORIZED_NETWORKS = {
    'lenet': vectorized.lenet,
    'lenet++': functools.partial(lenet_plus_plus, prelu=vectorized.prelu),
}


def get_symbol(
    *,
    num_classes: int = 10,
    center_loss_weight: float = 0.01,
    alpha: float = 0.5,
    embedding_dim: int = 2,
    no_bias: bool = False,
    embedding_lr_mult: float = 0.05,
    network: str = 'lenet',
    vectorized: bool = False,
) -> mx.sym.Symbol:
    """Return a network with the joint objective.

    Parameters
    ----------
    num_classes
        K.
    center_loss_weight
        lambda of Eq. 5. With 0 the operator stays: the centers follow the embeddings and the loss
        is reported; only its gradient is zero.
    alpha
        Learning rate of the centers (Eq. 4), from 0 to 1.
    embedding_dim
        d, the dimension of the embedding.
    no_bias
        Leave the biases out of the embedding and of the last layer: classes then differ by angle
        alone, and the clusters lie on a ring, as in the paper's Figures 2 and 3.
    embedding_lr_mult
        Learning rate of the embedding's weights relative to all others. To them the center loss is
        a quadratic of curvature lambda ||h||^2, with h the 500 tanh activations of LeNet, so that
        ||h||^2 < 500; SGD of rate r with momentum m is stable while r lambda ||h||^2 < 2 (1 + m).
        At a twentieth of LeNet's rate that holds for every lambda up to 1. LeNet++'s features have
        no such bound, and its convolutions most of the curvature: its rate is smaller instead.
    network
        'lenet' or 'lenet++': the layers before the embedding.
    vectorized
        Compute the same in the forms of ``common/vectorized.py``, with the same parameters.

    Returns
    -------
    mx.sym.Symbol
        Group of ``softmax_output`` (B, K) and ``center_loss_output`` (B,), with the inputs ``data``
        (B, 1, 28, 28), ``softmax_label`` (B,) and ``center_label`` (B,).
    """
    features = (VECTORIZED_NETWORKS if vectorized else NETWORKS)[network](mx.sym.var('data'))
    embedding = mx.sym.FullyConnected(
        features,
        mx.sym.var('embedding_weight', lr_mult=embedding_lr_mult),
        num_hidden=embedding_dim,
        no_bias=no_bias,
        name='embedding',
    )  # (B, d)
    logits = mx.sym.FullyConnected(embedding, num_hidden=num_classes, no_bias=no_bias, name='fc2')
    softmax = mx.sym.SoftmaxOutput(logits, name='softmax')  # (B, K)
    # A Module divides every gradient by the batch. SoftmaxOutput's gradient is a sum over the
    # batch, and with 'null' so is the center loss's: the objective is mean softmax loss plus
    # lambda times mean center loss at any batch size.
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


def gaussian(variance: float) -> mx.init.Initializer:
    """Return an initializer of that variance, as a multiple of 1 / fan-in."""
    return mx.init.Xavier(factor_type='in', rnd_type='gaussian', magnitude=variance)


LAST_LAYER = '^fc2_weight$'
INITIALIZERS = {
    # Small weights learn their features rather than keep random ones: of variances from 1/16 to 3 a
    # quarter validated best, and it trains at lambda 0 to 1.
    'xavier': gaussian(0.25),
    # A last layer close to 0: images, not random weights, decide where a class comes to lie. The
    # embedding keeps small weights: until the last layer separates the classes, center loss draws
    # all of them together, with a curvature that grows with the embedding's weights.
    'small-head': mx.init.Mixed(
        [LAST_LAYER, '^embedding_weight$', '.*'],
        [mx.init.Normal(0.01), gaussian(0.25), gaussian(1)],
    ),
    # That of the original: standard deviations 0.0632 (conv1), 0.04 (conv2), 0.0632 (fc1), 1
    # (embedding) and 0.001 (last layer).
    'original': mx.init.Mixed(
        [LAST_LAYER, '.*'],
        [
            mx.init.Normal(0.001),
            mx.init.Xavier(factor_type='out', rnd_type='gaussian', magnitude=2),
        ],
    ),
}

SMALLEST_IMAGE = {'lenet': 16, 'lenet++': 8}  # pixels of a side

# (recipe, network) -> defaults of the options a recipe decides. LeNet's tuned recipe was chosen on
# 10,000 training images that were held out (--validate-on=held-out); clipping keeps it stable up to
# twice that rate (docs/options.md). LeNet++'s rate is the one that is stable where batches are few.
# The original is https://github.com/YYuanAnyVision/mxnet_center_loss (2016), whose operator divides
# by the batch twice, so that lambda is 1 / batch.
RECIPES = {
    ('tuned', 'lenet'): {
        'initializer': 'small-head',
        'initial_embedding': 'discriminants',
        'num_epochs': 8,
        'lr': 0.1,
        'lr_factor': 1,
        'lr_factor_epoch': 1,
        'average_weights': 0.1,
        'warmup_epochs': 1,
        'clip_gradient': 0.05,
        'embedding_lr_mult': 0.05,
        'center_loss_weight': 0.01,
    },
    ('tuned', 'lenet++'): {
        'initializer': 'xavier',
        'initial_embedding': 'random',
        'num_epochs': 20,
        'lr': 0.01,
        'lr_factor': 0.1,
        'lr_factor_epoch': 10,
        'average_weights': 0,
        'warmup_epochs': 1,
        'clip_gradient': 0,
        'embedding_lr_mult': 0.1,
        'center_loss_weight': 0.01,
    },
    ('original', 'lenet'): {
        'initializer': 'original',
        'initial_embedding': 'random',
        'num_epochs': 20,
        'lr': 0.01,
        'lr_factor': 0.5,
        'lr_factor_epoch': 20,
        'average_weights': 0,
        'warmup_epochs': 0,
        'clip_gradient': 0,
        'embedding_lr_mult': 1,
        'center_loss_weight': '1/B',
    },
}


def parse_args(argv: Sequence[str] = ()) -> argparse.Namespace:
    """Return the options of a command line, checked as far as no file has to be touched."""
    parser = ArgumentParser(
        description='Train LeNet or LeNet++ on MNIST with softmax and center loss '
        '(Wen et al., ECCV 2016).',
        epilog=recipe_table(),
    )
    data.add_data_arguments(parser)
    parser.add_argument(
        '--validate-on',
        choices=['test', 'held-out'],
        default='test',
        help='images to validate on: the test images, or, to choose options by, a sixth of the '
        'training images, the same for every --seed, which are not trained on',
    )
    parser.add_argument(
        '--num-examples',
        type=number(int, minimum=1),
        metavar='N',
        help='use only the first N training images (default: all)',
    )
    parser.add_argument(
        '--num-classes',
        type=number(int, minimum=2, maximum=256),
        metavar='K',
        help='train and validate on the classes 0 to K-1 only (default: all): vis.py then shows '
        'how well the embedding separates the other ones',
    )
    parser.add_argument(
        '--classes',
        type=class_list,
        metavar='LIST',
        help='the same with the classes of a list, such as 0,2,5',
    )

    objective = parser.add_argument_group('network and objective')
    objective.add_argument(
        '--recipe',
        choices=['tuned', 'original'],
        default='tuned',
        help='sets the options below whose default is by recipe: tuned ones, or those of the MXNet '
        'version of 2016 (YYuanAnyVision/mxnet_center_loss; LeNet only); options given explicitly '
        'win',
    )
    objective.add_argument(
        '--network',
        choices=['lenet', 'lenet++'],
        default='lenet',
        help="lenet++ is the paper's network for its figures: six convolutions with PReLU, which "
        'take some thirteen times as long',
    )
    objective.add_argument(
        '--embedding-dim',
        type=number(int, minimum=1, maximum=10**6),
        default=2,
        metavar='D',
        help='dimension of the embedding',
    )
    objective.add_argument(
        '--center-loss-weight',
        type=number(float, minimum=0, maximum=1e6),
        default=argparse.SUPPRESS,
        metavar='LAMBDA',
        help='lambda of L = L_softmax + lambda L_C, both the mean over the batch; 0 is softmax '
        'only (default: by recipe)',
    )
    objective.add_argument(
        '--alpha',
        type=number(float, minimum=0, maximum=1),
        default=0.5,
        help='learning rate of the centers: how far they move towards the embeddings of their '
        'class in every batch',
    )
    objective.add_argument(
        '--no-bias',
        action='store_true',
        help='no biases in the embedding and the last layer: the clusters lie on a ring',
    )
    objective.add_argument(
        '--initializer',
        type=initializer_name,
        choices=sorted(INITIALIZERS),
        default=argparse.SUPPRESS,
        help='initial weights: small-head has a last layer close to 0, and larger weights before '
        'the embedding; xavier has all of one scale; original is that of the MXNet version of '
        '2016 (default: by recipe)',
    )
    objective.add_argument(
        '--initial-embedding',
        choices=['random', 'discriminants'],
        default=argparse.SUPPRESS,
        help="initial weights of the embedding: the initializer's, or the linear discriminants "
        '(Fisher) of the features of some 5,000 training images, so that more of the digits that '
        'look alike begin as neighbors (default: by recipe)',
    )

    add_training_arguments(parser)

    args = parser.parse_args(list(argv))
    if args.model_prefix is not None and args.load_epoch is None:
        parser.error('--model-prefix requires --load-epoch')
    if args.classes and args.num_classes:
        parser.error('--classes and --num-classes both name the classes: give one of them')
    if args.gpus and args.cpus:
        parser.error('--gpus and --cpus both name the devices: give one of them')
    recipe = RECIPES.get((args.recipe, args.network))
    if recipe is None:
        parser.error(f'--recipe={args.recipe} is for lenet: leave out --network={args.network}')
    for name, value in recipe.items():
        vars(args).setdefault(name, 1 / args.batch_size if value == '1/B' else value)
    if args.num_workers and 'dist' not in args.kv_store:
        args.kv_store = 'dist_device_sync' if args.kv_store == 'device' else 'dist_sync'
    return args


def recipe_table() -> str:
    """Return the defaults of each recipe, as the help shows them."""
    heads = [f'{recipe} {network}' for recipe, network in RECIPES]
    rows = [('', *heads)]
    for option in next(iter(RECIPES.values())):
        values = [str(recipe[option]) for recipe in RECIPES.values()]
        rows.append((f'--{option.replace("_", "-")}', *values))
    lines = [f'  {row[0]:<22}' + ''.join(f'{value:<18}' for value in row[1:]) for row in rows]
    return '\n'.join(
        map(str.rstrip, ['defaults by recipe and network (B: the batch size):', *lines])
    )


def class_list(text: str) -> list[int]:
    """Convert an argparse value: '0,2,5' -> [0, 2, 5]."""
    classes = [int(label) for label in text.split(',') if label.isdecimal()]
    if len(classes) != text.count(',') + 1 or len({*classes}) < max(2, len(classes)):
        raise argparse.ArgumentTypeError(f'{text!r} is not a list of two or more different classes')
    return classes


def initializer_name(text: str) -> str:
    """Check an argparse value: say what has become of an earlier name."""
    if text == 'mixed':
        raise argparse.ArgumentTypeError(
            'mixed was not what it said and is gone: original is the initial weights of the '
            'MXNet version of 2016, --recipe=original its whole recipe'
        )
    return text


def start_workers(
    args: argparse.Namespace,
    argv: Sequence[str],
    load_data: Callable,
    devices: Sequence[mx.Context],
    how_to_continue: str,
) -> None:
    """Check what every worker would check, then run the workers until all have finished."""
    checkpoints = Checkpoints(args.save_model_prefix)
    checkpoints.check_writable()
    check_equal_shares(args.batch_size, devices)
    load_data(args.batch_size, num_parts=args.num_workers)
    begin = 0 if args.resume else time.time()

    def resume_hint():
        return describe_saved(checkpoints.prefix, checkpoints.saved_since(begin), how_to_continue)

    run_workers([sys.executable, SCRIPT, *argv], args.num_workers, resume_hint)


def main(argv: Sequence[str] = ()) -> None:
    """Train as the command line says, and print how accurate the result is."""
    args = parse_args(argv)
    command = ['python', SCRIPT, *argv, *([] if args.resume else ['--resume'])]
    how_to_continue = f'continue with: {shlex.join(command)}'
    if ROLE in ('scheduler', 'server'):
        serve(lambda: how_to_continue)
        return
    devices = choose_devices(args.gpus, args.cpus)
    load_data = functools.partial(
        data.mnist_iterator,
        dataset=args.dataset,
        data_dir=args.data_dir,
        seed=args.seed,
        num_examples=args.num_examples,
        num_classes=args.num_classes,
        classes=args.classes,
        validate_on=args.validate_on,
    )
    if args.num_workers and ROLE is None:
        start_workers(args, argv, load_data, devices, how_to_continue)
        return

    def network(train, vectorized=False):
        height, width = train.data_facts['image_shape']
        if min(height, width) < SMALLEST_IMAGE[args.network]:
            side = SMALLEST_IMAGE[args.network]
            raise InputError(
                f'images of {height} x {width} pixels are too small for --network={args.network}: '
                f'it takes {side} x {side} or more'
            )
        options = arguments_of(get_symbol, args)
        options['num_classes'] = len(train.data_facts['class_names'])
        return get_symbol(**options, vectorized=vectorized)

    options = arguments_of(fit, args)
    options['initializer'] = INITIALIZERS[args.initializer]
    if args.initial_embedding == 'discriminants':
        options['initial_params'] = discriminant_params
    if not args.gpus:
        options['compute_network'] = functools.partial(network, vectorized=True)
    module = fit(
        network,
        load_data,
        **options,
        devices=devices,
        record=vars(args),
        how_to_continue=how_to_continue,
    )
    if module.validation_scores:
        images = 'test' if args.validate_on == 'test' else 'held-out training'
        draw = ['python', str(Path(SCRIPT).with_name('vis.py'))]
        if args.save_model_prefix != 'center_loss':
            draw.append(f'--model-prefix={args.save_model_prefix}')
        if args.data_dir is not None:
            draw.append(f'--data-dir={args.data_dir}')
        hint = f'; {shlex.join(draw)} draws the embeddings' if args.embedding_dim > 1 else ''
        print(f'accuracy on the {images} images {module.validation_scores["accuracy"]:.2%}{hint}')


def arguments_of(function: Callable, args: argparse.Namespace) -> dict:
    """Return the options that are keyword-only arguments of a function."""
    parameters = inspect.signature(function).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    return {name: value for name, value in vars(args).items() if name in names}


if __name__ == '__main__':
    run_script(main)
