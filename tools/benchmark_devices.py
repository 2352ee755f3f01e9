"""Several devices and workers on the CPU: how far centers drift apart, cost, and scaling.

    python -m tools.benchmark_devices
    python -m tools.benchmark_devices --only drift

drift    how far the copies of the centers on several devices would drift apart by themselves
cost     what keeping them equal costs a step
scaling  seconds of an epoch on several devices and with several workers

The variants take turns, and the ratios count. CPU contexts share the cores of one machine: they
show that nothing is lost, not what several GPUs gain.
"""

from collections.abc import Sequence
import os
from pathlib import Path
import re
import statistics
import tempfile
import time

import numpy as np

from common.environment import THREADS_CHOSEN_BY_USER, mx
from common.command_line import ArgumentParser, run_script
from common.module import Module
from data import mnist_iterator
from tools.measuring import LABELS, ROOT, add_only, run_python
from train import INITIALIZERS, get_symbol


class SeparateCenters(Module):
    """A Module whose devices move their own copies of the centers, as in MXNet alone."""

    def forward_backward(self, data_batch: mx.io.DataBatch) -> None:
        """Compute outputs and gradients, and keep nothing to synchronize the centers with."""
        mx.mod.Module.forward_backward(self, data_batch)


def prepare(module: Module, batches: mx.io.DataIter | mx.io.DataBatch) -> Module:
    """Bind a module, with the same initial weights as any other, and set up its optimizer."""
    mx.random.seed(0)
    module.bind(batches.provide_data, batches.provide_label)
    module.init_params(INITIALIZERS['xavier'])
    module.init_optimizer(
        kvstore='local',
        optimizer_params={'learning_rate': 0.02, 'momentum': 0.9, 'wd': 5e-4},
    )
    return module


def step(module: Module, batch: mx.io.DataBatch) -> None:
    """Make a training step."""
    module.forward_backward(batch)
    module.update()
    mx.nd.waitall()


def measure_drift(num_devices: Sequence[int] = (2, 4), num_epochs: int = 5) -> None:
    """Print the largest distance between two copies of a center, on the bundled digits."""
    for count in num_devices:
        contexts = [mx.cpu(i) for i in range(count)]
        batches, _ = mnist_iterator(128, dataset='mnist-5k')
        separate, synchronized = (
            prepare(kind(get_symbol(), label_names=LABELS, context=contexts), batches)
            for kind in (SeparateCenters, Module)
        )
        for epoch in range(num_epochs):
            widest, relative = 0, []
            for batch in batches:
                step(separate, batch)
                step(synchronized, batch)
                copies = np.stack([copy.asnumpy() for copy in separate._centers()[0][1]])
                means = copies.mean(axis=0)  # of copies (devices, K, d)
                between = np.linalg.norm(means[:, None] - means, axis=2)  # (K, K)
                nearest = (between + np.diag([np.inf] * len(between))).min(axis=1)
                distance = np.linalg.norm(copies - copies[:1], axis=2).max(axis=0)  # (K,)
                widest = max(widest, distance.max())
                relative.append(np.median(distance / nearest))
            mean, exact = (
                module.get_params()[1]['center_loss_center_bias'].asnumpy()
                for module in (separate, synchronized)
            )
            separate.set_params(*separate.get_params())  # MXNet averages the copies once an epoch
            batches.reset()
            print(
                f'{count} devices, epoch {epoch + 1}: copies up to {widest:.3f} apart, in the '
                f'median {np.median(relative):.1%} of the distance to the nearest other center; '
                f'their mean up to {np.linalg.norm(mean - exact, axis=1).max():.3f} from the exact '
                f'centers (mean norm {np.linalg.norm(exact, axis=1).mean():.2f})'
            )


def center_loss_alone(num_classes: int, dim: int) -> mx.sym.Symbol:
    """Return a center loss on one dense layer: the operator and the Module around it remain."""
    embedding = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=dim, name='embedding')
    return mx.sym.Custom(
        data=embedding,
        label=mx.sym.var('center_label'),
        op_type='centerloss',
        name='center_loss',
        num_class=num_classes,
        normalization='null',
    )


CASES = {  # network, names of its labels, shape of an image, K
    'LeNet, K=10, d=2': (get_symbol(), LABELS, (1, 28, 28), 10),
    'K=10, d=2': (center_loss_alone(10, 2), LABELS[1:], (2,), 10),
    'K=100,000, d=512': (center_loss_alone(100_000, 512), LABELS[1:], (512,), 100_000),
}


def random_batch(
    rng: np.random.Generator,
    batch_size: int,
    labels: Sequence[str],
    shape: tuple[int, ...],
    num_classes: int,
) -> mx.io.DataBatch:
    """Return a batch of random images and labels."""
    label = mx.nd.array(rng.integers(num_classes, size=batch_size))
    return mx.io.DataBatch(
        [mx.nd.array(rng.random((batch_size, *shape)))],
        [label] * len(labels),
        provide_data=[mx.io.DataDesc('data', (batch_size, *shape))],
        provide_label=[mx.io.DataDesc(name, (batch_size,)) for name in labels],
    )


def measure_cost(
    cases: Sequence[str] = tuple(CASES), batch_size: int = 128, num_steps: int = 60
) -> None:
    """Print the milliseconds of a step on two devices: separate centers, and synchronized ones."""
    for name in cases:
        network, labels, *described = CASES[name]
        rng = np.random.default_rng(0)
        batches = [random_batch(rng, batch_size, labels, *described) for _ in range(8)]
        modules = [
            prepare(kind(network, label_names=labels, context=[mx.cpu(0), mx.cpu(1)]), batches[0])
            for kind in (SeparateCenters, Module)
        ]
        seconds = np.empty((num_steps, 2))
        for i in range(num_steps):
            for j, module in enumerate(modules):
                begin = time.perf_counter()
                step(module, batches[i % len(batches)])
                seconds[i, j] = time.perf_counter() - begin
        separate, synchronized = 1e3 * np.median(seconds[min(5, num_steps // 2) :], axis=0)
        print(
            f'{name}: {separate:.2f} ms with separate centers, {synchronized:.2f} ms with '
            f'synchronized ones, difference {synchronized - separate:.2f} ms, ratio '
            f'{synchronized / separate:.3f}'
        )


def measure_scaling(total_batch: int = 96, num_rounds: int = 2) -> None:
    """Print the seconds of an epoch of the bundled digits, all with the same total batch."""
    variants = {
        'one process': '--cpus=0',
        'two devices': '--cpus=0,1',
        'four devices': '--cpus=0,1,2,3',
        **{f'{count} workers': f'--num-workers={count}' for count in (1, 2, 3)},
    }
    seconds = {name: [] for name in variants}
    if not THREADS_CHOSEN_BY_USER:  # every variant shares the processors in its own way
        for name in ('OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'):
            os.environ.pop(name, None)
    for _ in range(num_rounds):
        for name, option in variants.items():
            workers = int(option[-1]) if 'workers' in option else 1
            options = ['--dataset=mnist-5k', f'--batch-size={total_batch // workers}', option]
            with tempfile.TemporaryDirectory() as folder:
                run_python(ROOT / 'train.py', *options, '--num-epochs=4', cwd=folder)
                log = Path(folder, 'log.txt').read_text()
            epochs = re.findall(r'Node\[0\] Epoch\[[1-9]\] Time cost=(\S+)', log)
            accuracy = re.findall(r'Epoch\[3\] Validation-accuracy=(\S+)', log)[-1]
            seconds[name] += map(float, epochs)
            print(f'{name}: {", ".join(epochs)} s, accuracy {accuracy}', flush=True)
    one = statistics.median(seconds['one process'])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f'{name}: {median:.2f} s an epoch, {one / median:.2f} times as fast as one process')


PARTS = {'drift': measure_drift, 'cost': measure_cost, 'scaling': measure_scaling}


def main(argv: Sequence[str] = ()) -> None:
    """Measure the chosen parts."""
    parser = ArgumentParser(
        prog='python -m tools.benchmark_devices',
        description='Measure several devices and workers on the CPU.',
    )
    add_only(parser, PARTS)
    for part in parser.parse_args(list(argv)).only or PARTS:
        PARTS[part]()


if __name__ == '__main__':
    run_script(main)
