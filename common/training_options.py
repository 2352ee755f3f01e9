"""The options of a training run, as :func:`train_model.fit` takes them."""

import argparse

from common.command_line import number

MAX_DEVICE = 15  # MXNet knows no more of a kind, and hangs


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of devices, optimization, checkpoints and log.

    Those whose default is the recipe's are missing from the namespace where they are not given.
    """
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
        default=argparse.SUPPRESS,
        metavar='N',
        help='number of the last epoch; those before --resume or --load-epoch count (default: by '
        'recipe)',
    )
    training.add_argument(
        '--lr',
        type=number(float, above=0, maximum=1e6),
        default=argparse.SUPPRESS,
        help='learning rate of the mean objective (default: by recipe)',
    )
    training.add_argument(
        '--momentum',
        type=number(float, minimum=0, maximum=1),
        default=0.9,
        metavar='M',
        help='momentum of SGD; the centers have none',
    )
    training.add_argument(
        '--wd',
        type=number(float, minimum=0, maximum=1e6),
        default=5e-4,
        help='weight decay: adds wd / 2 ||w||^2 to the objective; none on biases and centers',
    )
    training.add_argument(
        '--embedding-lr-mult',
        type=number(float, above=0, maximum=1e6),
        default=argparse.SUPPRESS,
        metavar='M',
        help="the embedding's weights learn at M times --lr, which keeps them stable at large "
        'lambda (default: by recipe)',
    )
    training.add_argument(
        '--lr-factor',
        type=number(float, above=0, maximum=1),
        default=argparse.SUPPRESS,
        metavar='F',
        help='the learning rate is multiplied by F every --lr-factor-epoch epochs; 1 keeps it '
        '(default: by recipe)',
    )
    training.add_argument(
        '--lr-factor-epoch',
        type=number(float, above=0, maximum=1e6),
        default=argparse.SUPPRESS,
        metavar='E',
        help='epochs between two falls of the learning rate, such as 0.5 (default: by recipe)',
    )
    training.add_argument(
        '--warmup-epochs',
        type=number(float, minimum=0, maximum=1e6),
        default=argparse.SUPPRESS,
        metavar='E',
        help='the learning rate rises from 0 to --lr over the first E epochs, which keeps a high '
        'rate stable (default: by recipe)',
    )
    training.add_argument(
        '--clip-gradient',
        type=clipping,
        default=argparse.SUPPRESS,
        metavar='C',
        help='clip gradients (of the mean over the batch) elementwise to [-C, C], which keeps high '
        'rates stable where batches are few; 0: never (default: by recipe)',
    )
    training.add_argument(
        '--average-weights',
        type=number(float, minimum=0, maximum=1),
        default=argparse.SUPPRESS,
        metavar='F',
        help='validate and save the average of the weights over about the last F of all steps, '
        'such as 0.1, instead of those of the last step (0); training itself is unchanged '
        '(default: by recipe)',
    )
    training.add_argument(
        '--kv-store',
        type=kvstore,
        choices=['local', 'device', 'dist_sync', 'dist_device_sync'],
        default='local',
        help='how gradients are summed: over the devices of this process (local: on the CPU, '
        'device: on the GPUs), or over machines',
    )
    training.add_argument(
        '--num-workers',
        type=number(int, minimum=1),
        metavar='W',
        help='run W workers on this machine, with a scheduler and a server for them, instead of '
        'one process; --kv-store is dist_sync or dist_device_sync then',
    )
    training.add_argument(
        '--seed',
        type=number(int, minimum=0, maximum=2**31 - 1),
        default=0,
        help='of the initial weights and of the shuffles; any two seeds are independent',
    )

    files = parser.add_argument_group('checkpoints and log')
    files.add_argument(
        '--save-model-prefix',
        default='center_loss',
        metavar='P',
        help='checkpoints are written to P-0001.params and so on',
    )
    files.add_argument(
        '--keep-checkpoints',
        type=number(int, minimum=1),
        metavar='N',
        help='keep only the checkpoints of the newest N epochs of this run (default: all)',
    )
    files.add_argument(
        '--resume',
        action='store_true',
        help='continue the run of --save-model-prefix from its newest whole checkpoint, where '
        'there is one',
    )
    files.add_argument(
        '--load-epoch',
        type=number(int, minimum=1, maximum=10**9),
        metavar='N',
        help='continue from the checkpoint of epoch N of --model-prefix, with the parameters that '
        'fit; momentum begins at 0; beside --resume only where nothing can be resumed',
    )
    files.add_argument(
        '--model-prefix',
        metavar='P',
        help='the run that --load-epoch is of (default: --save-model-prefix)',
    )
    files.add_argument(
        '--log_file', '--log-file', default='log.txt', help='the log file, which is appended to'
    )
    files.add_argument(
        '--log_dir', '--log-dir', default='.', help='folder of the log file; it is created'
    )


def clipping(text: str) -> float:
    """Convert an argparse value: 0, or a number that MXNet's float32 does not take for 0."""
    return 0 if number(float)(text) == 0 else number(float, minimum=1e-30, maximum=1e30)(text)


def kvstore(text: str) -> str:
    """Check an argparse value: say why one of MXNet's kvstores is missing among the choices."""
    if text == 'dist_async':
        raise argparse.ArgumentTypeError(
            'dist_async lets every worker go on with weights of its own age, and the centers of '
            'Eq. 4 would belong to none of them: take dist_sync'
        )
    return text


def device_numbers(text: str) -> list[int]:
    """Convert an argparse value: '0,1' -> [0, 1], '' -> []."""
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
