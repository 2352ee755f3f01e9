"""The recipe of the best-known PyTorch version of center loss, on the LeNet of train.py.

    python -m tools.torch_recipe --data-dir=DIR --tables=docs/results

trains as https://github.com/KaiyangZhou/pytorch-center-loss does by default, but for the network,
and prints the test accuracy of every epoch until 98.5% are reached. PyTorch's own initial weights;
pixels minus 0.1307, over 0.3081; SGD at 0.001, halved every 20 of 100 epochs, momentum 0.9, weight
decay 0.0005; batches of 128, the last one smaller; centers from N(0, 1), learned by SGD at 0.5 from
the gradient of the masked loss, lambda 1. The number of threads is OMP_NUM_THREADS, by default 1.
"""

from collections.abc import Sequence
import json
import os
from pathlib import Path
import statistics
import time

import numpy as np

from common.environment import THREADS_CHOSEN_BY_USER
from common.command_line import ArgumentParser, number, run_script
from common.errors import InputError
from common.files import check_output, replace_when_whole
from common.versions import versions
from data import load_digits
from tools.benchmark_torch import image_tensor, label_tensor, lenet, masked_loss, torch
from tools.measuring import processor
from tools.table_kinds import LEVELS, render

RECIPE = {'lr': 0.001, 'momentum': 0.9, 'weight_decay': 5e-4}
STEP, GAMMA, CENTER_LR, BATCH_SIZE = 20, 0.5, 0.5, 128


class Training:
    """A network that is trained epoch by epoch."""

    def __init__(self, seed: int, images: np.ndarray, labels: np.ndarray):
        nn = torch.nn
        torch.manual_seed(seed)
        self.images, self.labels = normalized(images), label_tensor(labels)
        self.features, self.classifier = lenet(), nn.Linear(2, 10)
        self.centers = torch.randn(10, 2, requires_grad=True)
        weights = [*self.features.parameters(), *self.classifier.parameters()]
        self.optimizers = [
            torch.optim.SGD(weights, **RECIPE),
            torch.optim.SGD([self.centers], lr=CENTER_LR),
        ]
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizers[0], STEP, GAMMA)

    def train_epoch(self) -> None:
        """Train on all images once, in a new order."""
        for index in torch.randperm(len(self.images)).split(BATCH_SIZE):
            label = self.labels[index]
            embedding = self.features(self.images[index])
            loss = torch.nn.functional.cross_entropy(self.classifier(embedding), label)
            loss = loss + masked_loss(embedding, label, self.centers)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
        self.schedule.step()

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the share of images that are classified correctly."""
        with torch.no_grad():
            predicted = [
                self.classifier(self.features(batch)).argmax(1)
                for batch in normalized(images).split(1000)
            ]
        return float((torch.cat(predicted) == label_tensor(labels)).double().mean())


def normalized(images: np.ndarray) -> 'torch.Tensor':
    """Return images as the recipe has them, float32 (N, 1, 28, 28)."""
    return (image_tensor(images).float() / 255 - 0.1307) / 0.3081


def main(argv: Sequence[str] = ()) -> None:
    """Train until the highest level of the tables of convergence is reached."""
    parser = ArgumentParser(
        prog='python -m tools.torch_recipe',
        description='Train with the recipe of KaiyangZhou/pytorch-center-loss in PyTorch.',
    )
    parser.add_argument('--dataset', default='mnist', help='as in train.py')
    parser.add_argument('--data-dir', type=Path, metavar='DIR', help='as in train.py')
    parser.add_argument(
        '--num-epochs', type=number(int, minimum=1), default=100, metavar='N', help='at most'
    )
    parser.add_argument('--seed', type=number(int, minimum=0), default=0, help='of PyTorch')
    parser.add_argument('--tables', type=Path, metavar='DIR', help='write DIR/pytorch.json')
    args = parser.parse_args(list(argv))
    if args.tables:
        check_output(args.tables / 'pytorch.json', '--tables', ['json'])
    if torch is None:
        raise InputError('PyTorch is not installed: pip install torch')
    threads = os.environ['OMP_NUM_THREADS'] if THREADS_CHOSEN_BY_USER else '1'
    torch.set_num_threads(int(threads))
    digits = load_digits(args.dataset, args.data_dir)
    training = Training(args.seed, digits.train_images, digits.train_labels)
    course, seconds = [], []
    while len(course) < args.num_epochs and max(course, default=0) < max(LEVELS):
        begin = time.perf_counter()
        training.train_epoch()
        seconds.append(time.perf_counter() - begin)
        course.append(training.accuracy(digits.val_images, digits.val_labels))
        print(
            f'epoch {len(course)}: {seconds[-1]:.1f} s, test accuracy {course[-1]:.2%}', flush=True
        )
    command = f'python -m tools.torch_recipe --dataset={args.dataset} --seed={args.seed}'
    if args.num_epochs != parser.get_default('num_epochs'):
        command += f' --num-epochs={args.num_epochs}'
    run = {'seed': args.seed, 's/epoch': statistics.median(seconds), 'course': course}
    row = {'title': 'PyTorch, softmax + center loss', 'options': [''], 'runs': [run]}
    made_by = {
        **{'processor': processor(), **versions(), 'threads': threads},
        'torch': torch.__version__,
    }
    table = {
        'kind': 'convergence',
        'command': command,
        'made_by': [made_by],
        'compare': [],
        'rows': [row],
    }
    print(render(table))
    if args.tables:
        with replace_when_whole(args.tables / 'pytorch.json') as path:
            path.write_text(json.dumps(table, indent=1) + '\n')


if __name__ == '__main__':
    run_script(main)
