"""The operator at the scale of face recognition: K classes, d dimensions, one epoch with a checkpoint, and its continuation.

    python tests/many_classes.py                                     K = 100,000, d = 512
    python tests/many_classes.py --num-classes=10000 --dimension=128
    python tests/many_classes.py --cpus=0,1                          on several devices
    python tests/many_classes.py --num-workers=2                     with several workers

The data are random: every class is a direction, its samples that direction with noise. What is trained is an embedding (d, d) and a softmax over all classes,
by train_model.fit, as train.py does it. What is printed: seconds of a step with the center loss and without, size of the checkpoint, memory.
"""

import re
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from runtime import ROLE, ArgumentParser, mx, number, run_script  # noqa: E402  (first, for a Ctrl-C while all this is imported)

import numpy as np  # noqa: E402

import distributed  # noqa: E402
import train  # noqa: E402
import train_model  # noqa: E402


class RandomFaces(mx.io.DataIter):
    """Batches of vectors (B, d) around the directions of their classes, with the label twice."""

    def __init__(self, num_classes, dimension, batch_size, num_batches, seed):
        super().__init__(batch_size)
        self.num_classes, self.dimension, self.num_batches, self.seed = (
            num_classes,
            dimension,
            num_batches,
            seed,
        )
        self.provide_data = [mx.io.DataDesc('data', (batch_size, dimension))]
        self.provide_label = [
            mx.io.DataDesc(name, (batch_size,)) for name in ('softmax_label', 'center_label')
        ]
        self.position = 0

    def reset(self):
        self.position = 0

    def next(self):
        if self.position == self.num_batches:
            raise StopIteration
        rng = np.random.default_rng((self.seed, self.position))
        self.position += 1
        classes = rng.integers(self.num_classes, size=self.batch_size)
        faces = np.stack(
            [np.random.default_rng(one).standard_normal(self.dimension) for one in classes]
        )
        label = mx.nd.array(classes)
        return mx.io.DataBatch(
            [mx.nd.array(faces + 0.3 * rng.standard_normal(faces.shape))], [label, label], pad=0
        )


def network(num_classes, dimension, weight=0.01):
    embedding = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=dimension, name='embedding')
    softmax = mx.sym.SoftmaxOutput(
        mx.sym.FullyConnected(embedding, num_hidden=num_classes, no_bias=True, name='fc2'),
        name='softmax',
    )
    center = mx.sym.Custom(
        data=embedding,
        label=mx.sym.var('center_label'),
        op_type='centerloss',
        name='center_loss',
        num_class=num_classes,
        scale=weight,
        normalization='null',
    )
    return mx.sym.Group([softmax, center])


def memory(when):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    now = int(re.search(r'VmRSS:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024
    print(f'{when}: {now:,.0f} MB resident, {peak:,.0f} MB at the most', flush=True)


def time_per_step(symbol, faces, steps):
    """Seconds of every step after the first, of a symbol that is trained on one device."""
    module = train_model.Module(
        symbol,
        label_names=[
            name for name in ('softmax_label', 'center_label') if name in symbol.list_arguments()
        ],
    )
    labels = [
        description for description in faces.provide_label if description.name in module.label_names
    ]
    module.bind(faces.provide_data, labels)
    module.init_params(train_model.INITIALIZERS['xavier'])
    module.init_optimizer(kvstore=None, optimizer_params={'learning_rate': 0.01, 'momentum': 0.9})
    seconds = []
    for number in range(steps + 1):
        faces.reset()
        batch = faces.next()
        begin = time.perf_counter()
        module.forward_backward(mx.io.DataBatch(batch.data, batch.label[: len(labels)]))
        module.update()
        mx.nd.waitall()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[1:]))


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--num-classes', type=number(int, minimum=1), default=100_000)
    parser.add_argument('--dimension', type=number(int, minimum=1), default=512)
    parser.add_argument('--num-batches', type=number(int, minimum=1), default=8)
    parser.add_argument('--batch-size', default='128')
    parser.add_argument('--cpus', default='0')
    parser.add_argument('--num-workers', type=number(int, minimum=1))
    parser.add_argument(
        '--folder', help='of the checkpoints; by default one that goes with the run'
    )
    own = parser.parse_args()
    if ROLE in ('scheduler', 'server'):
        return distributed.serve()
    with tempfile.TemporaryDirectory() as folder:
        if own.num_workers and ROLE is None:
            sys.argv.append(f'--folder={folder}')
            return distributed.run_workers(
                own.num_workers, train_model.Checkpoints(f'{folder}/faces'), resume=False
            )
        run_in(Path(own.folder or folder), own)


def run_in(folder, own):
    def loader(batch_size, shape, num_parts, part_index, first_epoch):
        return [
            RandomFaces(own.num_classes, own.dimension, batch_size, batches, part_index)
            for batches in (own.num_batches, 1)
        ]

    def train_until(epoch, *line):
        args = train.parse_args(
            [
                f'--batch-size={own.batch_size}',
                f'--cpus={own.cpus}',
                '--lr=0.01',
                f'--num-epochs={epoch}',
                f'--log-dir={folder}',
                f'--save-model-prefix={folder}/faces',
                '--kv-store=dist_sync' if ROLE else '--kv-store=local',
                *line,
            ]
        )
        module = train_model.fit(
            args, network(own.num_classes, own.dimension), loader, (own.dimension,)
        )
        memory(f'epoch {epoch}')
        return module

    module = train_until(1)
    centers = module.get_params()[1]['center_loss_center_bias'].asnumpy()
    print(f'centers: {centers.shape}, {np.count_nonzero(np.abs(centers).sum(axis=1)):,} have moved')
    saved = (
        train_model.Checkpoints(folder / 'faces')
        .load_params(1)[1]['center_loss_center_bias']
        .asnumpy()
    )
    print(f'centers of the checkpoint are those of the module: {np.array_equal(centers, saved)}')
    print(
        'files: '
        + ', '.join(
            f'{path.name} {path.stat().st_size / 1e6:,.0f} MB'
            for path in sorted(folder.glob('faces-*'))
        )
    )
    del module, centers, saved
    if not ROLE:
        train_until(2, '--resume')
        faces = RandomFaces(own.num_classes, own.dimension, int(own.batch_size), 1, 0)
        joint = network(own.num_classes, own.dimension)
        objectives = {
            'softmax and center loss': joint,
            'softmax alone': joint['softmax_output'],
            'center loss alone': joint['center_loss_output'],
        }
        for name, symbol in objectives.items():
            print(f'{name}: {1000 * time_per_step(symbol, faces, 5):.1f} ms a step', flush=True)
        memory('in all')


if __name__ == '__main__':
    run_script(main)
