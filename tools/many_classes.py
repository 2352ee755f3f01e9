"""Training at the scale of face recognition: K classes, d dimensions, checkpoints, resuming.

    python -m tools.many_classes                                    K = 100,000, d = 512
    python -m tools.many_classes --num-classes=10000 --dim=128
    python -m tools.many_classes --cpus=0,1                         on several devices
    python -m tools.many_classes --num-workers=2                    with several workers

The data are random: a class is a direction, its samples are that direction with noise. An
embedding (d, d) and a softmax over all classes are trained by ``train_model.fit`` for an epoch;
then the run is resumed for another one. Printed are memory, the sizes of the files, and the time of
a step with and without center loss.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
import resource
import sys
import tempfile
import time

import numpy as np

from common.environment import ROLE, mx
from common.checkpoints import Checkpoints
from common.command_line import ArgumentParser, number, run_script
from common.devices import choose_devices
from common.distributed import serve
from common.launcher import run_workers
from common.module import Module
from common.training_options import device_numbers
from tools.measuring import LABELS
from train_model import fit

CENTERS = 'center_loss_center_bias'


class RandomFaces(mx.io.DataIter):
    """Batches of vectors (B, d) around the directions of their classes, with the label twice."""

    def __init__(self, num_classes: int, dim: int, batch_size: int, num_batches: int, seed: int):
        super().__init__(batch_size)
        self.num_classes = num_classes
        self.dim = dim
        self.num_batches = num_batches
        self.seed = seed
        self.provide_data = [mx.io.DataDesc('data', (batch_size, dim))]
        self.provide_label = [mx.io.DataDesc(name, (batch_size,)) for name in LABELS]
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; all are equal."""
        self.position = 0

    def reset(self) -> None:
        """Go to the beginning of the next epoch."""
        self.position = 0

    def next(self) -> mx.io.DataBatch:
        """Return the next batch of this epoch."""
        if self.position == self.num_batches:
            raise StopIteration
        rng = np.random.default_rng((self.seed, self.position))
        self.position += 1
        classes = rng.integers(self.num_classes, size=self.batch_size)
        directions = [np.random.default_rng(j).standard_normal(self.dim) for j in classes]
        noise = 0.3 * rng.standard_normal((self.batch_size, self.dim))
        label = mx.nd.array(classes)
        return mx.io.DataBatch([mx.nd.array(np.stack(directions) + noise)], [label, label], pad=0)


def joint_objective(num_classes: int, dim: int) -> mx.sym.Symbol:
    """Return softmax and center loss on one dense layer."""
    embedding = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=dim, name='embedding')
    logits = mx.sym.FullyConnected(embedding, num_hidden=num_classes, no_bias=True, name='fc2')
    center_loss = mx.sym.Custom(
        data=embedding,
        label=mx.sym.var('center_label'),
        op_type='centerloss',
        name='center_loss',
        num_class=num_classes,
        scale=0.01,
        normalization='null',
    )
    return mx.sym.Group([mx.sym.SoftmaxOutput(logits, name='softmax'), center_loss])


def print_memory(when: str) -> None:
    """Print the resident memory of this process, now and at its peak, in MiB."""
    pages = int(Path('/proc/self/statm').read_text().split()[1])
    now = pages * resource.getpagesize() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(f'{when}: {now:,.0f} MiB resident, {peak:,.0f} MiB at the peak', flush=True)


def seconds_per_step(network: mx.sym.Symbol, faces: RandomFaces, num_steps: int = 5) -> float:
    """Return the median over some steps on one device, without the first."""
    labels = [name for name in LABELS if name in network.list_arguments()]
    module = Module(network, label_names=labels)
    module.bind(faces.provide_data, [(name, (faces.batch_size,)) for name in labels])
    module.init_params(mx.init.Xavier())
    module.init_optimizer(kvstore=None, optimizer_params={'learning_rate': 0.01, 'momentum': 0.9})
    seconds = []
    for _ in range(num_steps + 1):
        faces.reset()
        batch = faces.next()
        begin = time.perf_counter()
        module.forward_backward(mx.io.DataBatch(batch.data, batch.label[: len(labels)]))
        module.update()
        mx.nd.waitall()
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[1:]))


def run_in(folder: Path, args: argparse.Namespace) -> None:
    """Train an epoch, compare the checkpoint with the module, resume, and time the steps."""
    network, checkpoints = joint_objective(args.num_classes, args.dim), Checkpoints(folder / 'run')

    def load_data(batch_size, num_parts, part_index):
        return tuple(
            RandomFaces(args.num_classes, args.dim, batch_size, num_batches, part_index)
            for num_batches in (args.num_batches, 1)
        )

    def train_until(epoch):
        module = fit(
            network,
            load_data,
            devices=choose_devices(cpus=args.cpus),
            batch_size=args.batch_size,
            num_epochs=epoch,
            kv_store='dist_sync' if ROLE else 'local',
            save_model_prefix=checkpoints.prefix,
            resume=epoch > 1,
            log_dir=str(folder),
        )
        print_memory(f'epoch {epoch}')
        return module.get_params()[1][CENTERS].asnumpy()

    centers = train_until(1)
    moved = np.count_nonzero(np.abs(centers).sum(axis=1))
    print(f'centers: {centers.shape}, {moved:,} have moved')
    saved = checkpoints.load_params(1)[1][CENTERS].asnumpy()
    print(f'centers of the checkpoint are those of the module: {np.array_equal(centers, saved)}')
    for path in sorted(folder.glob('run-*')):
        print(f'{path.name}: {path.stat().st_size / 2**20:,.1f} MiB')
    if ROLE:
        return
    train_until(2)
    faces = RandomFaces(args.num_classes, args.dim, args.batch_size, 1, 0)
    for name, objective in (
        ('softmax and center loss', network),
        ('softmax alone', network['softmax_output']),
        ('center loss alone', network['center_loss_output']),
    ):
        print(f'{name}: {1e3 * seconds_per_step(objective, faces):.1f} ms a step', flush=True)
    print_memory('in all')


def main(argv: Sequence[str] = ()) -> None:
    """Run in this process, or start the workers and run in each of them."""
    count = number(int, minimum=1)
    parser = ArgumentParser(
        prog='python -m tools.many_classes',
        description='Train with very many classes, on random data.',
    )
    add = parser.add_argument
    add('--num-classes', type=count, default=100_000, metavar='K', help='number of classes')
    add('--dim', type=count, default=512, metavar='D', help='dimension of the embedding')
    add('--num-batches', type=count, default=8, metavar='N', help='batches in an epoch')
    add('--batch-size', type=count, default=128, metavar='B', help='samples in a batch')
    add('--cpus', type=device_numbers, default='', metavar='LIST', help='CPU contexts, as 0,1')
    add('--num-workers', type=count, metavar='W', help='run W workers on this machine')
    add('--folder', type=Path, help='of the checkpoints (default: a temporary one)')
    args = parser.parse_args(list(argv))
    if ROLE in ('scheduler', 'server'):
        serve(lambda: 'start again')
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.num_workers and ROLE is None:
            command = [sys.executable, '-m', 'tools.many_classes', *argv, f'--folder={folder}']
            run_workers(command, args.num_workers, lambda: 'start again')
        else:
            run_in(folder, args)


if __name__ == '__main__':
    run_script(main)
