"""How fast this is: variants that run interleaved, and what each trick for speed brings.

    python -m tools.benchmark                               the table, on the bundled digits
    python -m tools.benchmark --data-dir=DIR --json=FILE    train.py and vis.py on all of MNIST
    python -m tools.benchmark --only operator start-up      some parts

The variants of a comparison are interleaved, and what counts is the ratio of two of them in the
same round: the median over the rounds, with its quartiles. Such ratios hold on a noisy machine,
where seconds do not. Every part runs in a process of its own, so that the threads of one do not
disturb another. PyTorch is compared where it is installed (``pip install torch``).
"""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import functools
import importlib.util
import json
import logging
from pathlib import Path
import sys
import tempfile
import time
import tracemalloc
from unittest import mock

import numpy as np
from tqdm import tqdm

from common.environment import mx
from common import vectorized
from common.averaging import Average
from common.command_line import ArgumentParser, number, run_script
from common.files import check_output, replace_when_whole
from common.versions import versions
from data import load_digits
from tools.benchmark_torch import FORMS, OPERATOR_FORMS, OPERATOR_STEPS
from tools.measuring import (
    LABELS,
    ROOT,
    Report,
    Training,
    TrainingProcess,
    absolute,
    add_only,
    processor,
    run_python,
)
from tools.operator_forms import operator_step, with_operator
from train import VECTORIZED_NETWORKS, get_symbol
from train import main as train_main

MAX_ROUNDS = 1000
OPERATOR_SHAPES = ((128, 2, 10), (256, 128, 1000), (256, 512, 1_000_000))  # (B, d, K)


def measure_joint(report: Report, args: argparse.Namespace) -> None:
    """Compare the joint objective with softmax only."""
    network = get_symbol(vectorized=True)
    for batch_size in (32, 128, 512):
        joint = Training(network, batch_size)
        softmax = Training(network['softmax_output'], batch_size)
        seconds = report.interleave(joint, softmax, rounds=200)
        what = f'images/s, joint objective over softmax only, batch {batch_size}'
        report.add(what, seconds[1] / seconds[0])
        speed = joint.num_steps * batch_size / seconds[0]
        report.add(f'    joint objective, batch {batch_size}', speed, 'images/s')


def measure_average(report: Report, args: argparse.Namespace) -> None:
    """Measure what --average-weights costs."""
    network = get_symbol(vectorized=True)
    for batch_size in (32, 128):
        plain, averaged = (Training(network, batch_size) for _ in range(2))
        averaged.batch_end_callback = Average(0.1, averaged.module, {})
        seconds = report.interleave(plain, averaged, rounds=100)
        what = f'images/s, with --average-weights over without, batch {batch_size}'
        report.add(what, seconds[0] / seconds[1])


def lenet_variant(image: mx.sym.Symbol, pairs: bool, pooling_first: bool) -> mx.sym.Symbol:
    """``vectorized.lenet`` with or without the pairs of rows, and either order of the layers."""
    pool = functools.partial(mx.sym.Pooling, kernel=(2, 2), stride=(2, 2), pool_type='max')
    tanh = functools.partial(mx.sym.Activation, act_type='tanh')
    weight, shape = mx.sym.var('conv1_weight', shape=(20, 1, 5, 5)), (20, 1, 5, 5)
    if pairs:
        image, weight = vectorized.pairs_of_rows(image, weight, 'conv1')
        shape = (20, 3, 2, 5)
    net = vectorized.padded_convolution(image, weight, shape, 'conv1')
    net = tanh(pool(net)) if pooling_first else pool(tanh(net))
    weight, shape = mx.sym.var('conv2_weight', shape=(50, 20, 5, 5)), (50, 20, 5, 5)
    net = vectorized.padded_convolution(net, weight, shape, 'conv2')
    net = tanh(pool(net)) if pooling_first else pool(tanh(net))
    net = mx.sym.flatten(mx.sym.slice_axis(net, axis=1, begin=0, end=50))
    return tanh(mx.sym.FullyConnected(net, num_hidden=500, name='fc1'))


def network_variant(**options: bool) -> mx.sym.Symbol:
    """LeNet's objective with such features."""
    features = functools.partial(lenet_variant, **options)
    with mock.patch.dict(VECTORIZED_NETWORKS, lenet=features):
        return get_symbol(vectorized=True)


def measure_tricks(report: Report, args: argparse.Namespace) -> None:
    """Measure what each trick for speed brings: a step without it over a step with it."""
    network = get_symbol(vectorized=True)
    for batch_size in (32, 128):
        make = functools.partial(Training, batch_size=batch_size)
        variants = {
            'vectorized layers': make(get_symbol()),
            'pairs of rows': make(network_variant(pairs=False, pooling_first=True)),
            'pooling before tanh': make(network_variant(pairs=True, pooling_first=False)),
            'GroupedUpdater': make(network, kind=mx.mod.Module),
            "the operator's direct memory": make(with_operator(network, 'centerloss_nd')),
        }
        ours, *others = report.interleave(make(network), *variants.values(), rounds=100)
        for name, seconds in zip(variants, others, strict=True):
            report.add(f'step, without {name} over with, batch {batch_size}', seconds / ours)


def measure_lenet_plus_plus(report: Report, args: argparse.Namespace) -> None:
    """Measure what the vectorized layers of LeNet++ bring."""
    plain, ours = (
        Training(get_symbol(network='lenet++', vectorized=is_vectorized), 64, num_steps=1)
        for is_vectorized in (False, True)
    )
    seconds = report.interleave(plain, ours, rounds=20)
    what = 'step of LeNet++, without vectorized layers over with, batch 64'
    report.add(what, seconds[0] / seconds[1])


def measure_loop(report: Report, args: argparse.Namespace) -> None:
    """Compare with an operator that loops over the samples."""
    network = get_symbol(vectorized=True)
    ours, loop = Training(network, 128), Training(with_operator(network, 'centerloss_loop'), 128)
    seconds = report.interleave(ours, loop, rounds=30)
    report.add('images/s, ours over the per-sample loop, batch 128', seconds[1] / seconds[0])


def copy_bandwidth() -> float:
    """Return the bytes per second that this machine reads and writes while it copies memory."""
    source = np.ones(2**25, np.float32)
    target = np.empty_like(source)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - begin)
    return 2 * source.nbytes / np.median(seconds[1:])


def measure_operator(report: Report, args: argparse.Namespace) -> None:
    """Measure the operator by itself, its other forms, and PyTorch's.

    A step has to read the embeddings, and the centers of the labels, to write the gradient, and to
    read and write these centers once more: 5 B d numbers. At the speed of a copy that is the least
    time that it could take.
    """
    has_torch = importlib.util.find_spec('torch') is not None
    for shape in OPERATOR_SHAPES:
        batch_size, dim, num_class = shape
        names = ('centerloss', 'centerloss_empty', 'centerloss_nd')
        steps = [operator_step(name, *shape) for name in names]
        rounds, times = (20, 50) if num_class < 10**6 else (10, 10)
        ours, empty, nd = report.interleave(*steps, rounds=rounds, times=times)
        report.add(f'operator, forward and backward, (B, d, K) = {shape}', 1e3 * ours, 'ms')
        report.add('    an operator that does nothing', 1e3 * empty, 'ms')
        limit = 4 * 5 * batch_size * dim / copy_bandwidth()
        report.add('    share of the limit by memory traffic', limit / ours)
        report.add('    with mx.nd operations over on direct memory', nd / ours)
        forms = [form for form in OPERATOR_FORMS if form == 'gather' or num_class < 10**6]
        for form in forms if has_torch else ():
            options = [form, '--shape', *map(str, shape)]
            with TrainingProcess('tools.benchmark_torch', *options) as torch:
                own, theirs = report.interleave(
                    lambda step=steps[0]: [step() for _ in range(OPERATOR_STEPS)],
                    torch,
                    rounds=rounds if num_class < 10**6 else 3,
                )
            report.add(f'    PyTorch, {OPERATOR_FORMS[form]}, over ours', theirs / own)
    steps = [operator_step(name, 128, 2, 10) for name in ('centerloss', 'centerloss_loop')]
    ours, loop = report.interleave(*steps, rounds=7, times=3)
    report.add('operator, per-sample loop over ours, (B, d, K) = (128, 2, 10)', loop / ours)


def measure_classes(report: Report, args: argparse.Namespace) -> None:
    """Measure the operator with a million classes, of which a batch has most once at most."""
    labels = np.random.default_rng(0).integers(1000, size=256)
    few, many = (operator_step('centerloss', 256, 512, k, labels) for k in (1000, 1_000_000))
    reduceat = operator_step('centerloss_reduceat', 256, 512, 100_000)
    ours = operator_step('centerloss', 256, 512, 100_000)
    seconds = report.interleave(few, many, ours, reduceat, rounds=20, times=30)
    report.add(
        'operator, K = 1,000,000 over K = 1,000, (B, d) = (256, 512)', seconds[1] / seconds[0]
    )
    report.add(
        '    with one reduceat over the sums of all classes over ours', seconds[3] / seconds[2]
    )
    tracemalloc.start()
    many()
    size = 4 * 256 * 512 / 2**20
    report.add('    memory of a step', [tracemalloc.get_traced_memory()[1] / 2**20], 'MiB')
    report.add('    a batch of embeddings', [size], 'MiB')
    tracemalloc.stop()


def measure_settings(report: Report, args: argparse.Namespace) -> None:
    """Measure settings of OpenMP, memory and MXNet; the first changes nothing.

    How long a thread spins before it sleeps is set in common/environment.py.
    """
    variants = {
        'no change': {},
        'threads that sleep': {'OMP_WAIT_POLICY': 'passive', 'GOMP_SPINCOUNT': '0'},
        'threads that spin for long': {'OMP_WAIT_POLICY': 'active', 'GOMP_SPINCOUNT': '10000000'},
        'OMP_PROC_BIND=true': {'OMP_PROC_BIND': 'true'},
        'large pages': {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'},
        'bulks of up to 100 operators': {'MXNET_EXEC_BULK_EXEC_MAX_NODE_TRAIN': '100'},
        'no bulks': {'MXNET_EXEC_BULK_EXEC_TRAIN': '0'},
    }
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(TrainingProcess('tools.benchmark', '--train-on-request', **changed))
            for changed in ({}, *variants.values())
        ]
        ours, *others = report.interleave(*processes, rounds=12)
    for name, seconds in zip(variants, others, strict=True):
        report.add(f'step, with {name} over as it is, batch 128', seconds / ours)


def measure_torch(report: Report, args: argparse.Namespace) -> None:
    """Compare with PyTorch, in processes that take turns by the epoch."""
    with contextlib.ExitStack() as stack:
        processes = [TrainingProcess('tools.benchmark', '--train-on-request')]
        processes += [TrainingProcess('tools.benchmark_torch', form) for form in FORMS]
        for process in processes:
            stack.enter_context(process)
        ours, *others = report.interleave(*processes, rounds=15)
    for form, seconds in zip(FORMS.values(), others, strict=True):
        report.add(f'images/s, ours over PyTorch, {form}', seconds / ours)


def train_on_request() -> None:
    """Train an epoch on the bundled digits for every line on stdin."""
    training = Training(get_symbol(vectorized=True), 128, num_steps=4000 // 128)
    for _ in sys.stdin:
        training()
        print('done', flush=True)


class AtEpochEnd(logging.Handler):
    """Calls a function whenever train.py logs the end of an epoch.

    ``between`` are the seconds from the end of one call to the beginning of the next, ``called``
    those of the calls.
    """

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function
        self.between, self.called = [], []
        self.begin = time.perf_counter()

    def emit(self, record: logging.LogRecord) -> None:
        """Take in a line of the log."""
        if 'Validation-center_loss' in record.getMessage():
            end = time.perf_counter()
            self.function()
            self.between.append(end - self.begin)
            self.begin = time.perf_counter()
            self.called.append(self.begin - end)


def measure_overhead(report: Report, args: argparse.Namespace) -> None:
    """Compare train.py, with all that it does, with a bare loop; they alternate by epochs."""
    digits = load_digits(args.dataset, args.data_dir)
    num_steps, num_forwards = len(digits.train_images) // 128, round(len(digits.val_images) / 128)
    module = Training(get_symbol(vectorized=True), 128).module
    images, label = digits.train_images[:128, None] / 256, mx.nd.array(digits.train_labels[:128])
    batch = mx.io.DataBatch([mx.nd.array(images)], [label] * len(LABELS))

    def bare_epoch():
        for _ in range(num_steps):
            module.forward_backward(batch)
            module.update()
        for _ in range(num_forwards):
            module.forward(batch, is_train=False)
        mx.nd.waitall()

    handler = AtEpochEnd(bare_epoch)
    num_epochs = 1 + min(4 if args.data_dir else 40, report.max_rounds)
    options = ['--batch-size=128', f'--num-epochs={num_epochs}', *args.data_options]
    logging.getLogger().addHandler(handler)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        train_main([*options, f'--save-model-prefix={folder}/run', f'--log-dir={folder}'])
    logging.getLogger().removeHandler(handler)
    # A call and the epoch after it are a pair; the first epoch does not count.
    between, called = np.array(handler.between[1:]), np.array(handler.called[:-1])
    report.add('images/s, train.py over a bare loop of the same computations', called / between)
    report.add('    train.py with all that it does', num_steps * 128 / between, 'images/s')


FIRST_BATCH = """
import os, re, sys, time
from common.environment import mx
def peak():  # kB; ru_maxrss would begin with that of the process that has started this one
    return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])
bare = peak()
import common.module, train
def print_and_exit(*arguments):
    print(time.time(), peak() - bare, flush=True)
    os._exit(0)
common.module.Module.forward_backward = print_and_exit
train.main(sys.argv[1:])
"""


def measure_start_up(report: Report, args: argparse.Namespace) -> None:
    """Measure the time from the command to the first batch."""
    seconds, added, helped = [], [], []
    for _ in range(min(5, report.max_rounds)):
        with tempfile.TemporaryDirectory() as folder:
            begin = time.time()
            options = ['--batch-size=128', *args.data_options]
            printed = run_python('-c', FIRST_BATCH, *options, cwd=folder, PYTHONPATH=str(ROOT))
            now, kilobytes = map(float, printed.split())
            seconds.append(now - begin)
            added.append(kilobytes / 1024)
            begin = time.time()
            run_python(ROOT / 'vis.py', '--help')
            helped.append(time.time() - begin)
    report.add('from python train.py to the first batch', seconds, 's')
    report.add('    memory by then, above that of the imported MXNet', added, 'MiB')
    report.add('python vis.py --help', helped, 's')


def measure_vis(report: Report, args: argparse.Namespace) -> None:
    """Measure how long vis.py takes for all training and all test images."""
    digits, seconds = load_digits(args.dataset, args.data_dir), []
    with tempfile.TemporaryDirectory() as folder:
        options = ['--batch-size=128', '--num-epochs=1', *args.data_options]
        run_python(ROOT / 'train.py', *options, cwd=folder)
        for _ in range(min(3, report.max_rounds)):
            begin = time.perf_counter()
            for split in ('train', 'test'):
                options = [f'--split={split}', *args.data_options]
                run_python(ROOT / 'vis.py', *options, cwd=folder, MPLBACKEND='Agg')
            seconds.append(time.perf_counter() - begin)
    count = len(digits.train_images) + len(digits.val_images)
    report.add(f'python vis.py, both splits, {count:,} images', seconds, 's')


PARTS = {
    'joint': measure_joint,
    'average': measure_average,
    'tricks': measure_tricks,
    'lenet++': measure_lenet_plus_plus,
    'loop': measure_loop,
    'operator': measure_operator,
    'classes': measure_classes,
    'settings': measure_settings,
    'torch': measure_torch,
    'overhead': measure_overhead,
    'start-up': measure_start_up,
    'vis': measure_vis,
}


def machine() -> dict[str, str]:
    """Return the processor, its instruction set, the number of threads, and versions."""
    return {'processor': processor(), **versions()}


def main(argv: Sequence[str] = ()) -> None:
    """Run the parts, each in a process of its own, and print the table."""
    parser = ArgumentParser(
        prog='python -m tools.benchmark',
        description='Measure how fast this is, by interleaved comparisons.',
    )
    add = parser.add_argument
    add('--data-dir', type=Path, metavar='DIR', help='folder of the IDX files for train.py, vis.py')
    add_only(parser, PARTS)
    add(
        '--rounds',
        type=number(int, minimum=1),
        default=MAX_ROUNDS,
        metavar='N',
        help='take at most N rounds a comparison',
    )
    add('--json', type=Path, metavar='FILE', help='write the table to this file')
    # What this program gives to its own processes: measure here and print JSON; train an epoch for
    # every line on stdin.
    add('--part', choices=list(PARTS), help=argparse.SUPPRESS)
    add('--train-on-request', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args(list(argv))
    args.dataset, args.data_options = 'mnist-5k', ['--dataset=mnist-5k']
    if args.data_dir:
        args.data_dir = absolute(args.data_dir)
        args.dataset, args.data_options = 'auto', [f'--data-dir={args.data_dir}']
        if not args.part:
            load_digits(args.dataset, args.data_dir)  # what is wrong with them is said at once
    if args.json:
        check_output(args.json, '--json', ['json'])
    report = Report(args.rounds)
    if args.train_on_request:
        train_on_request()
    elif args.part:
        PARTS[args.part](report, args)
        print(json.dumps(report.rows))
    else:
        measure_all(report, args)


def measure_all(report: Report, args: argparse.Namespace) -> None:
    """Measure the chosen parts, and print the table."""
    print(', '.join(f'{key} {value}' for key, value in machine().items()), flush=True)
    data_dir = [f'--data-dir={args.data_dir}'] if args.data_dir else []
    for part in tqdm(args.only or PARTS, desc='parts', disable=None):
        if part == 'torch' and importlib.util.find_spec('torch') is None:
            print('PyTorch is not compared: it is not installed (pip install torch)')
            continue
        options = [f'--part={part}', f'--rounds={args.rounds}', *data_dir]
        report.rows += json.loads(run_python('-m', 'tools.benchmark', *options))
    print(report)
    if args.json:
        with replace_when_whole(args.json) as path:
            path.write_text(json.dumps({'machine': machine(), 'rows': report.rows}, indent=1))


if __name__ == '__main__':
    run_script(main)
