"""How fast it is: ratios of things that run side by side, and where the time goes.

    python tests/benchmark.py                                  the table, on the embedded digits
    python tests/benchmark.py --data-dir DIR --json FILE       on all of MNIST, and for machines
    python tests/benchmark.py --only operator start-up         some parts

The two sides of every comparison take turns, and the ratio is the median of the ratios of the turns: such ratios hold on a noisy machine, where seconds
do not. Every part runs in a process of its own, so that no threads of one stand in the way of another. PyTorch is compared where it is installed
(``pip install torch``).
"""

import contextlib
import itertools
import json
import logging
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import ArgumentParser, Failure, available_cpus, mx, run_script  # noqa: E402  (first, for a Ctrl-C while all this is imported)

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

import center_loss  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
from train_model import INITIALIZERS, Average, Module, metrics  # noqa: E402

ROUNDS = 7
OPTIMIZER = {'learning_rate': 0.01, 'momentum': 0.9, 'wd': 5e-4}


class PerSampleLoop(mx.operator.CustomOp):
    """Center loss as it is usually written: one NDArray operation after the other for every sample. Here for comparison only."""

    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha

    def forward(self, is_train, req, in_data, out_data, aux):
        labels = in_data[1].asnumpy().astype(int)
        loss = 0
        for i, label in enumerate(labels):
            difference = in_data[0][i] - aux[0][label]
            loss = loss + mx.nd.sum(difference * difference)
        self.assign(out_data[0], req[0], (loss / 2 / len(labels)).reshape((1,)))

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        labels = in_data[1].asnumpy().astype(int)
        steps = {}
        for i, label in enumerate(labels):
            difference = in_data[0][i] - aux[0][label]
            in_grad[0][i] = difference
            step, count = steps.get(label, (0, 0))
            steps[label] = step + difference, count + 1
        for label, (step, count) in steps.items():
            aux[0][label] += self.alpha * step / (1 + count)


@mx.operator.register('centerloss_loop')
class PerSampleLoopProp(center_loss.CenterLossProp):
    def create_operator(self, ctx, in_shapes, in_dtypes):
        return PerSampleLoop(self.alpha)


@mx.operator.register('centerloss_nd')
class CenterLossNDProp(center_loss.CenterLossProp):
    def create_operator(self, ctx, in_shapes, in_dtypes):
        return center_loss.CenterLoss(
            self.num_class, self.alpha, self.scale, self.normalization, in_shapes[0], on_cpu=False
        )


class Nothing(mx.operator.CustomOp):
    """What MXNet takes to call back into Python and to go on: no operator that is written in Python takes less."""

    def forward(self, is_train, req, in_data, out_data, aux):
        pass

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        pass


@mx.operator.register('centerloss_nothing')
class NothingProp(center_loss.CenterLossProp):
    def create_operator(self, ctx, in_shapes, in_dtypes):
        return Nothing()


class Table:
    """Rows of (number of the target, what, measured, unit, goal, whether it is met)."""

    def __init__(self):
        self.rows = []

    def add(self, target, what, measured, unit='', at_least=None, at_most=None):
        goal = (
            f'>= {at_least}'
            if at_least is not None
            else f'<= {at_most}'
            if at_most is not None
            else ''
        )
        met = (
            None
            if not goal or measured is None
            else measured >= at_least
            if at_least is not None
            else measured <= at_most
        )
        self.rows.append(
            {
                'target': target,
                'what': what,
                'measured': measured,
                'unit': unit,
                'goal': goal,
                'met': met,
            }
        )

    def __str__(self):
        lines = [f'{"":3} {"what":82} {"measured":>12} {"":9} {"goal":>9}']
        for row in self.rows:
            measured = (
                '-'
                if row['measured'] is None
                else f'{row["measured"]:,.3f}'
                if abs(row['measured']) < 100
                else f'{row["measured"]:,.0f}'
            )
            met = {True: 'met', False: 'NOT MET', None: ''}[row['met']]
            lines.append(
                f'{row["target"]:<3} {row["what"]:82} {measured:>12} {row["unit"]:9} {row["goal"]:>9} {met}'
            )
        return '\n'.join(lines)


class Turns:
    """Seconds of each side of a comparison, ``seconds[side]``; the sides took turns, after a round that does not count."""

    def __init__(self, *sides, rounds=ROUNDS, times=1):
        self.seconds = [[] for _ in sides]
        for turn in range(rounds + 1):
            for side, measured in zip(sides, self.seconds):
                begin = time.perf_counter()
                for _ in range(times):
                    side()
                mx.nd.waitall()
                if turn:
                    measured.append((time.perf_counter() - begin) / times)

    def median(self, side=0):
        return statistics.median(self.seconds[side])

    def ratio(self, side, other):
        """How many times as long ``side`` takes as ``other``."""
        return median_ratio(self.seconds[side], self.seconds[other])


def median_ratio(first, second):
    return statistics.median(one / other for one, other in zip(first, second))


def module_of(network, batch_size, labels=('softmax_label', 'center_label')):
    module = Module(network, label_names=list(labels))
    module.bind([('data', (batch_size, 1, 28, 28))], [(name, (batch_size,)) for name in labels])
    module.init_params(INITIALIZERS['xavier'])
    module.init_optimizer(kvstore=None, optimizer_params=OPTIMIZER)
    return module


def networks():
    """The joint objective, the same with the per-sample loop, and softmax only."""
    joint = train.get_symbol()
    loop = mx.sym.load_json(joint.tojson().replace('"centerloss"', '"centerloss_loop"'))
    return joint, loop, joint['softmax_output']


def endless(batches):
    """The batches of one epoch after the other."""
    while True:
        yield from batches
        batches.reset()


def train_on(module, batches, metric, with_center_label=True):
    """Training as Module.fit does it."""
    for batch in batches:
        if not with_center_label:
            batch.label = batch.label[:1]
            batch.provide_label = batch.provide_label[:1]
        module.forward_backward(batch)
        module.update()
        module.update_metric(metric, batch.label)


def measure_throughput(table, args):
    """Target 1: the joint objective over softmax only, in turns of a tenth of a second: what is looked for is a difference of one step in fifty."""
    joint, _, softmax = networks()
    for batch_size, steps in ((32, 12), (128, 4), (512, 1)):
        batches = endless(data.mnist_iterator(batch_size, dataset='mnist-5k')[0])
        modules = module_of(joint, batch_size), module_of(softmax, batch_size, ['softmax_label'])
        turns = Turns(
            lambda: train_on(modules[0], itertools.islice(batches, steps), metrics()),
            lambda: train_on(
                modules[1],
                itertools.islice(batches, steps),
                center_loss.Accuracy(),
                with_center_label=False,
            ),
            rounds=200,
        )
        table.add(
            1,
            f'training, joint objective over softmax only, batch {batch_size}',
            turns.ratio(1, 0),
            'x',
            at_least=0.98,
        )
        if batch_size == 128:
            table.add(
                '',
                'training, joint objective, batch 128',
                steps * batch_size / turns.median(),
                'images/s',
            )


def measure_average(table, args):
    """What --average-weights costs: a step that is followed by it, and the step alone."""
    for batch_size, steps in ((32, 12), (128, 4)):
        batches = endless(data.mnist_iterator(batch_size, dataset='mnist-5k')[0])
        modules = [module_of(train.get_symbol(), batch_size) for _ in range(2)]
        average = Average(0.1, modules[1])

        def averaged(metric):
            for batch in itertools.islice(batches, steps):
                train_on(modules[1], [batch], metric)
                average(None)

        turns = Turns(
            lambda: train_on(modules[0], itertools.islice(batches, steps), metrics()),
            lambda: averaged(metrics()),
            rounds=100,
        )
        table.add(
            '',
            f'training with --average-weights over training, batch {batch_size}',
            turns.ratio(0, 1),
            'x',
        )


def operator_step(form, batch, dim, classes):
    """A function that runs forward and backward of one form of the operator, on arrays that are there."""
    rng = np.random.default_rng(0)
    executor = mx.sym.Custom(
        data=mx.sym.var('data'),
        label=mx.sym.var('label'),
        op_type=form,
        name='loss',
        num_class=classes,
    ).simple_bind(mx.cpu(), data=(batch, dim))
    executor.arg_dict['data'][:] = rng.normal(size=(batch, dim))
    executor.arg_dict['label'][:] = rng.integers(0, classes, batch)

    def step():
        executor.forward(is_train=True)
        executor.backward()
        executor.grad_dict['data'].wait_to_read()

    return step


def measure_operator(table, args):
    """Targets 2 and 4: the operator by itself."""
    ours, nd, loop = (
        operator_step(form, 128, 2, 10)
        for form in ('centerloss', 'centerloss_nd', 'centerloss_loop')
    )
    turns = Turns(ours, nd, loop, times=5)
    table.add(
        2,
        'operator, per-sample loop over ours, (B 128, d 2, K 10)',
        turns.ratio(2, 0),
        'x',
        at_least=40,
    )
    table.add(
        '',
        'operator, the mx.nd form on the CPU over the one on memory, (128, 2, 10)',
        turns.ratio(1, 0),
        'x',
    )
    for shape in ((128, 2, 10), (256, 128, 1000)):
        turns = Turns(
            *(operator_step(form, *shape) for form in ('centerloss', 'centerloss_nothing')),
            times=100,
        )
        table.add(
            4,
            f'operator, forward + backward, ({shape[0]}, {shape[1]}, {shape[2]:,})',
            1e3 * turns.median(0),
            'ms',
            at_most=0.5,
        )
        table.add(
            '', '    of that, what an operator takes that does nothing', 1e3 * turns.median(1), 'ms'
        )
    turns = Turns(
        *(operator_step('centerloss', 256, 512, classes) for classes in (1000, 1_000_000)), times=30
    )
    table.add(
        4,
        'operator, forward + backward, (256, 512, 1,000,000)',
        1e3 * turns.median(1),
        'ms',
        at_most=3,
    )
    table.add(
        4,
        'operator, K = 1,000,000 over K = 1,000 at (256, 512, K)',
        turns.ratio(1, 0),
        'x',
        at_most=1.5,
    )
    for classes in (1000, 1_000_000):
        added = float(run_part('--memory-of-operator', str(classes)))
        table.add(
            4,
            f'operator, memory added by 20 steps at (256, 512, {classes:,}), centers aside',
            added,
            'MB',
            at_most=8,
        )


def run_part(*options, script=__file__, **environment):
    """What a script prints that runs in a process of its own."""
    result = subprocess.run(
        [sys.executable, script, *options],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if result.returncode:
        raise Failure(
            f'{Path(script).name} {" ".join(options)} ended with status {result.returncode}: {result.stderr.strip()}'
        )
    return result.stdout


def memory_of_operator(classes):
    """MB of resident memory that steps of the operator add to what its arrays take."""
    step = operator_step('centerloss', 256, 512, classes)
    step_of_another_size = operator_step(
        'centerloss', 8, 512, classes
    )  # the engine's threads and buffers
    centers_touched = 256 * 512 * 4 / 1e6
    step_of_another_size()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3 - centers_touched)


def measure_loop(table, args):
    """Target 2: training with the per-sample loop."""
    joint, loop, _ = networks()
    batches = endless(data.mnist_iterator(128, dataset='mnist-5k')[0])
    modules = [module_of(network, 128) for network in (joint, loop)]
    turns = Turns(
        *(
            lambda module=module: train_on(module, itertools.islice(batches, 2), metrics())
            for module in modules
        ),
        rounds=30,
    )
    table.add(
        2, 'training, ours over the per-sample loop, batch 128', turns.ratio(1, 0), 'x', at_least=4
    )


def measure_torch(table, args):
    """Target 3: the same in PyTorch. Each side has a process of its own, and they take turns: neither has threads that wait in the other's way."""
    what = 'training with data and metrics, ours over PyTorch, batch 128'
    if subprocess.run([sys.executable, '-c', 'import torch'], capture_output=True).returncode:
        table.add(3, f'{what}: torch is not installed', None, 'x', at_least=1.25)
        return
    ours, torch, usual = [], [], []
    for _ in range(4):
        ours.append(float(run_part('--epochs-of-training', '128')))
        for order, measured in (('pooling-first', torch), ('tanh-first', usual)):
            measured.append(
                float(
                    run_part(
                        os.environ['OMP_NUM_THREADS'],
                        order,
                        script=ROOT / 'tests' / 'benchmark_torch.py',
                    )
                )
            )
    table.add(3, what, median_ratio(ours, torch), 'x', at_least=1.25)
    table.add(
        '',
        'the same over PyTorch with each tanh before its pooling, as it is usually written',
        median_ratio(ours, usual),
        'x',
    )
    table.add(
        '',
        'training with data and metrics, PyTorch, batch 128',
        statistics.median(torch),
        'images/s',
    )


def measure_engine(table, args):
    """What MXNet's synchronous engine brings, see runtime.py."""
    for batch_size in (32, 128):
        ours, usual = [], []
        for _ in range(3):
            ours.append(float(run_part('--epochs-of-training', str(batch_size))))
            usual.append(
                float(
                    run_part(
                        '--epochs-of-training',
                        str(batch_size),
                        MXNET_ENGINE_TYPE='ThreadedEnginePerDevice',
                    )
                )
            )
        table.add(
            '',
            f"training with data and metrics, ours over MXNet's usual engine, batch {batch_size}",
            median_ratio(ours, usual),
            'x',
        )


def epochs_of_training(batch_size):
    """Images per second of training on the embedded digits, the first epoch aside."""
    batches, _ = data.mnist_iterator(batch_size, dataset='mnist-5k')
    module = module_of(train.get_symbol(), batch_size)

    def epoch():
        batches.reset()
        train_on(module, batches, metrics())

    print(batches.num_batches * batch_size / Turns(epoch, rounds=5).median())


@contextlib.contextmanager
def trained(epochs, *options):
    """A folder in which train.py has run."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                sys.executable,
                ROOT / 'train.py',
                '--batch-size=128',
                f'--num-epochs={epochs}',
                *options,
            ],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        yield Path(folder)


def data_options(args):
    return (
        ['--data-dir', str(Path(args.data_dir).resolve())]
        if args.data_dir
        else ['--dataset', 'mnist-5k']
    )


def measure_overhead(table, args):
    """Target 5: train.py, with everything it does, over a bare loop that does the same computations on one batch that lies in memory. The two take turns
    by the epoch, in one process: a shared machine changes its pace from one second to the next."""
    digits = data.load_digits('auto' if args.data_dir else 'mnist-5k', args.data_dir)
    steps, forwards = len(digits.train_images) // 128, round(len(digits.val_images) / 128)
    module = module_of(train.get_symbol(), 128)
    label = mx.nd.array(digits.train_labels[:128])
    batch = mx.io.DataBatch([mx.nd.array(digits.train_images[:128, None] / 256)], [label, label])

    def bare():
        for _ in range(steps):
            module.forward_backward(batch)
            module.update()
        for _ in range(forwards):
            module.forward(batch, is_train=False)
        mx.nd.waitall()

    turns = AtEpochEnd(bare)
    logging.getLogger().addHandler(turns)
    with tempfile.TemporaryDirectory() as folder:
        sys.argv[1:] = [
            '--batch-size=128',
            f'--num-epochs={5 if args.data_dir else 40}',
            f'--save-model-prefix={folder}/run',
            f'--log_dir={folder}',
            *data_options(args),
        ]
        train.main()
    between, inserted = (
        turns.between[1:],
        turns.inserted[:-1],
    )  # the first epoch aside; an epoch and the loop before it are a pair
    table.add(
        5,
        'train.py over a bare loop of the same forwards, backwards and updates',
        median_ratio(inserted, between),
        'x',
        at_least=0.95,
    )
    table.add(
        '',
        'train.py, training images with validation, log and checkpoints',
        steps * 128 / statistics.median(between),
        'images/s',
    )


class AtEpochEnd(logging.Handler):
    """Calls a function whenever train.py logs the end of an epoch: seconds of it, ``inserted``, and of the epochs between, ``between``."""

    def __init__(self, call):
        super().__init__()
        self.call = call
        self.between, self.inserted = [], []
        self.begin = time.perf_counter()

    def emit(self, record):
        if 'Validation-center_loss' in record.getMessage():
            end = time.perf_counter()
            self.call()
            self.between.append(end - self.begin)
            self.begin = time.perf_counter()
            self.inserted.append(self.begin - end)


def flops_per_image():
    """Floating-point operations of a training step per image: two a multiplication and addition; the backward pass has two products for the forward's
    one, but the first layer needs no gradient of the image."""
    network = train.get_symbol()
    layers = network.get_internals()
    _, outputs, _ = layers.infer_shape(data=(1, 1, 28, 28))
    shapes = dict(zip(layers.list_outputs(), outputs))
    products = {
        name.removesuffix('_weight'): int(
            np.prod(shapes[name]) * np.prod(shapes[f'{name.removesuffix("_weight")}_output'][2:])
        )
        for name in network.list_arguments()
        if name.endswith('_weight')
    }
    return 2 * sum((2 if name == 'conv1' else 3) * count for name, count in products.items())


def measure_flops(table, args):
    """Target 6: the arithmetic achieved, as a share of what a product of large matrices achieves."""
    size = 2048
    a, b = mx.nd.ones((size, size)), mx.nd.ones((size, size))
    turns = Turns(lambda: mx.nd.dot(a, b), thirty_steps())
    product, step = turns.median(0), turns.median(1)
    table.add('', 'operations of a training step per image', flops_per_image() / 1e6, 'Mflop')
    table.add(
        '', f'product of two matrices of {size} x {size}', 2 * size**3 / product / 1e9, 'Gflop/s'
    )
    table.add('', 'training step, batch 128', flops_per_image() * 128 * 30 / step / 1e9, 'Gflop/s')
    table.add(
        6,
        'training step over the product of matrices, share of its rate',
        flops_per_image() * 128 * 30 / step / (2 * size**3 / product),
        'x',
    )
    table.rows += json.loads(
        run_part('--part', 'profile', MXNET_ENGINE_TYPE='ThreadedEnginePerDevice')
    )  # the synchronous one tells every operator twice


def thirty_steps():
    """A function that makes 30 training steps of batch 128, of a module of its own."""
    module, label = module_of(train.get_symbol(), 128), mx.nd.zeros(128)
    batch = mx.io.DataBatch([mx.nd.zeros((128, 1, 28, 28))], [label, label])

    def steps():
        for _ in range(30):
            module.forward_backward(batch)
            module.update()
        mx.nd.waitall()

    return steps


def profile(table, args):
    """Rows of what the operators of a step take, one by one instead of in the groups that the engine runs as one otherwise."""
    os.environ['MXNET_EXEC_BULK_EXEC_TRAIN'] = '0'
    steps = thirty_steps()
    steps()
    mx.profiler.set_config(
        profile_symbolic=True, profile_imperative=True, aggregate_stats=True, filename=os.devnull
    )
    mx.profiler.set_state('run')
    steps()
    mx.profiler.set_state('stop')
    spent = {
        name: float(total) / 30
        for name, total in re.findall(
            r'^(\S+) +\d+ +([\d.]+) ', mx.profiler.dumps(reset=True), re.MULTILINE
        )
        if 'Memory' not in name and not name.startswith('MX')
    }  # MX: calls of the library, which wait for the operators
    for name, milliseconds in sorted(spent.items(), key=lambda item: -item[1])[:16]:
        table.add('', f'    of a step of batch 128: {name}', milliseconds, 'ms')


def measure_start_up(table, args):
    """Target 7: from the command to the first batch, and the memory by then."""
    program = (
        f'import sys, time, resource; sys.path.insert(0, {str(ROOT)!r})\n'
        'from runtime import mx\n'
        'bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
        'import train, train_model, os\n'
        'def first(self, batch):\n'
        '    print(time.time(), bare, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)\n'
        '    os._exit(0)\n'
        'train_model.Module.forward_backward = first\n'
        'train.main()\n'
    )
    sets = [('the embedded digits', ['--dataset', 'mnist-5k'], 3)] + (
        [('all of MNIST', data_options(args), 5)] if args.data_dir else []
    )
    for name, options, limit in sets:
        seconds, added = [], []
        for _ in range(4):
            with tempfile.TemporaryDirectory() as folder:
                begin = time.time()
                result = subprocess.run(
                    [sys.executable, '-c', program, '--batch-size=128', *options],
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    check=True,
                )
            now, bare, used = map(float, result.stdout.split())
            seconds.append(now - begin)
            added.append((used - bare) / 1e3)
        table.add(
            7,
            f'from the command to the first batch, {name}',
            statistics.median(seconds),
            's',
            at_most=limit,
        )
        table.add(
            7,
            f'memory above the bare import at the first batch, {name}',
            statistics.median(added),
            'MB',
            at_most=500,
        )


def measure_vis(table, args):
    """Target 8: embedding and drawing every image there is."""
    with trained(1, *data_options(args)) as folder:
        begin = time.perf_counter()
        told = [
            subprocess.run(
                [sys.executable, ROOT / 'vis.py', '--split', split, *data_options(args)],
                cwd=folder,
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            for split in ('train', 'val')
        ]
        seconds = time.perf_counter() - begin
    images = sum(int(re.search(r': (\d+) images of ', text)[1]) for text in told)
    table.add(8, f'vis.py, both splits, {images:,} images', seconds, 's', at_most=25)


PARTS = {
    'throughput': measure_throughput,
    'average': measure_average,
    'engine': measure_engine,
    'operator': measure_operator,
    'loop': measure_loop,
    'torch': measure_torch,
    'overhead': measure_overhead,
    'flops': measure_flops,
    'start-up': measure_start_up,
    'vis': measure_vis,
}


def main():
    parser = ArgumentParser(
        description='How fast it is, as ratios of things that run side by side.'
    )
    parser.add_argument(
        '--data-dir',
        metavar='DIR',
        help='folder of the IDX files for the parts that train.py runs in; the embedded digits without it',
    )
    parser.add_argument(
        '--only',
        nargs='+',
        choices=list(PARTS),
        default=list(PARTS),
        metavar='PART',
        help='these parts',
    )
    parser.add_argument(
        '--json', type=Path, metavar='FILE', help='write the table for machines, too'
    )
    parts = parser.add_argument_group('what runs in a process of its own')
    parts.add_argument(
        '--part', choices=[*PARTS, 'profile'], help='print the rows of this part as JSON'
    )
    parts.add_argument(
        '--memory-of-operator',
        type=int,
        metavar='K',
        help='print the memory that the operator adds with K classes',
    )
    parts.add_argument(
        '--epochs-of-training',
        type=int,
        metavar='B',
        help='print the images per second of training with batches of B',
    )
    args = parser.parse_args()
    if args.part:
        table = Table()
        {**PARTS, 'profile': profile}[args.part](table, args)
        print(json.dumps(table.rows))
    elif args.memory_of_operator:
        memory_of_operator(args.memory_of_operator)
    elif args.epochs_of_training:
        epochs_of_training(args.epochs_of_training)
    else:
        run_all(args)


def run_all(args):
    """Every part in turn, and the table."""
    table = Table()
    for name in tqdm(args.only, desc='parts', disable=None):
        table.rows += json.loads(
            run_part('--part', name, *(['--data-dir', args.data_dir] if args.data_dir else []))
        )
    print(
        f'{available_cpus()} cores, {os.environ["OMP_NUM_THREADS"]} threads, MXNet {mx.__version__}'
    )
    print(table)
    if args.json:
        beside = args.json.with_name(f'.{args.json.name}')
        beside.write_text(
            json.dumps(
                {
                    'cores': available_cpus(),
                    'threads': int(os.environ['OMP_NUM_THREADS']),
                    'rows': table.rows,
                },
                indent=1,
            )
            + '\n'
        )
        beside.replace(args.json)


if __name__ == '__main__':
    run_script(main)
