"""Several devices and several workers on the CPU: how far centers would drift apart, what keeping them equal costs, and how the work scales.

    python tests/benchmark_devices.py --parts drift cost scaling

All times are of sides that take turns in one run; what counts are the ratios. CPU contexts share the cores of one machine: they show that nothing
is lost, not what several GPUs gain.
"""

import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import ArgumentParser, mx, run_script  # noqa: E402  (first, for a Ctrl-C while all this is imported)

import numpy as np  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
import train_model  # noqa: E402

LABELS = ['softmax_label', 'center_label']


class Apart(train_model.Module):
    """A Module whose devices move their own copies of the centers until the epoch ends, as MXNet alone would have it."""

    def forward_backward(self, data_batch):
        super(train_model.Module, self).forward_backward(data_batch)

    def update(self):
        super(train_model.Module, self).update()


def ready(module, batches):
    mx.random.seed(0)
    module.bind(batches.provide_data, batches.provide_label)
    module.init_params(train_model.INITIALIZERS['xavier'])
    module.init_optimizer(
        kvstore='local' if len(module._context) > 1 else None,
        optimizer_params={'learning_rate': 0.02, 'momentum': 0.9, 'wd': 5e-4},
    )
    return module


def step(module, batch):
    module.forward_backward(batch)
    module.update()
    mx.nd.waitall()


def drift(epochs=5):
    """Two or four devices on the embedded sample: the largest distance between two copies of a center, against the distance to the nearest other center."""
    for devices in (2, 4):
        contexts = [mx.cpu(i) for i in range(devices)]
        apart, exact = (
            kind(train.get_symbol(), label_names=LABELS, context=contexts)
            for kind in (Apart, train_model.Module)
        )
        batches, _ = data.mnist_iterator(128, dataset='mnist-5k')
        ready(apart, batches), ready(exact, batches)
        for epoch in range(epochs):
            worst, typical = 0, []
            for batch in batches:
                step(apart, batch)
                step(exact, batch)
                copies = np.stack(
                    [copy.asnumpy() for copy in apart._centers()[0][1]]
                )  # (devices, K, d)
                between = np.linalg.norm(copies.mean(axis=0)[:, None] - copies.mean(axis=0), axis=2)
                nearest = (between + np.diag([np.inf] * len(between))).min(axis=1)
                distance = np.linalg.norm(copies - copies[:1], axis=2).max(axis=0)  # (K,)
                worst, typical = (
                    max(worst, distance.max()),
                    [*typical, np.median(distance / nearest)],
                )
            centers = [
                module.get_params()[1]['center_loss_center_bias'].asnumpy()
                for module in (apart, exact)
            ]
            off = np.linalg.norm(centers[0] - centers[1], axis=1).max()
            apart.set_params(*apart.get_params())
            batches.reset()
            print(
                f'{devices} devices, epoch {epoch + 1}: copies up to {worst:.3f} apart, in the median {statistics.median(typical):.1%} of the distance to '
                f'the nearest other center; their mean up to {off:.3f} from the exact centers (norm {np.linalg.norm(centers[1], axis=1).mean():.2f})'
            )


def embedding_alone(num_class, dimension):
    """Embeddings straight from the data, and the center loss on them: what is left is the operator and the Module around it."""
    embedding = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=dimension, name='embedding')
    return mx.sym.Custom(
        data=embedding,
        label=mx.sym.var('center_label'),
        op_type='centerloss',
        name='center_loss',
        num_class=num_class,
        normalization='null',
    )


def cost(batch_size=128, steps=60):
    """Milliseconds of a step on two devices, with centers apart and with exact ones."""
    rng = np.random.default_rng(0)
    cases = {
        'LeNet, K=10, d=2': (train.get_symbol(), LABELS, (1, 28, 28), 10),
        'K=10, d=2': (embedding_alone(10, 2), LABELS[1:], (2,), 10),
        'K=100,000, d=512': (embedding_alone(100_000, 512), LABELS[1:], (512,), 100_000),
    }
    for name, (network, labels, shape, num_class) in cases.items():

        def batch(shape=shape, labels=labels, num_class=num_class):
            label = mx.nd.array(rng.integers(num_class, size=batch_size))
            images = mx.nd.array(rng.random((batch_size, *shape)))
            return mx.io.DataBatch(
                [images],
                [label] * len(labels),
                provide_data=[mx.io.DataDesc('data', images.shape)],
                provide_label=[mx.io.DataDesc(one, label.shape) for one in labels],
            )

        batches = [batch() for _ in range(8)]
        modules = [
            ready(kind(network, label_names=labels, context=[mx.cpu(0), mx.cpu(1)]), batches[0])
            for kind in (Apart, train_model.Module)
        ]
        times = [[], []]
        for number in range(steps):
            for module, own in zip(modules, times):
                begin = time.perf_counter()
                step(module, batches[number % len(batches)])
                own.append(time.perf_counter() - begin)
        apart, exact = (statistics.median(own[5:]) for own in times)
        print(
            f'{name}: {1000 * apart:.2f} ms apart, {1000 * exact:.2f} ms exact, difference {1000 * (exact - apart):.2f} ms, ratio {exact / apart:.3f}'
        )


def scaling(total_batch=96, rounds=2):
    """Seconds of an epoch of the embedded sample at one total batch: in one process, on devices, with workers."""
    sides = {
        'one process': ['--cpus=0'],
        'two devices': ['--cpus=0,1'],
        'four devices': ['--cpus=0,1,2,3'],
        '1 worker': ['--num-workers=1'],
        '2 workers': ['--num-workers=2'],
        '3 workers': ['--num-workers=3'],
    }
    times = {side: [] for side in sides}
    environment = {
        name: value for name, value in train_model.os.environ.items() if not name.startswith('OMP_')
    }
    for _ in range(rounds):
        for side, line in sides.items():
            workers = int(line[0].split('=')[1]) if 'workers' in line[0] else 1
            with tempfile.TemporaryDirectory() as folder:
                result = subprocess.run(
                    [
                        sys.executable,
                        str(ROOT / 'train.py'),
                        '--dataset=mnist-5k',
                        f'--batch-size={total_batch // workers}',
                        '--num-epochs=4',
                        *line,
                    ],
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    env=environment,
                )
                epochs = re.findall(r'Node\[0\] Epoch\[[1-9]\] Time cost=(\S+)', result.stderr)
                accuracy = re.findall(r'Epoch\[3\] Validation-accuracy=(\S+)', result.stderr)[-1]
            times[side] += map(float, epochs)
            print(f'{side}: {", ".join(epochs)} s, validation accuracy {accuracy}', flush=True)
    alone = statistics.median(times['one process'])
    for side, own in times.items():
        print(
            f'{side}: {statistics.median(own):.2f} s an epoch, {alone / statistics.median(own):.2f} times the speed of one process'
        )


PARTS = {'drift': drift, 'cost': cost, 'scaling': scaling}


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    for part in parser.parse_args().parts:
        PARTS[part]()


if __name__ == '__main__':
    run_script(main)
