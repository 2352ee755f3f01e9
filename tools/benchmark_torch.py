"""The same training in PyTorch, for ``tools.benchmark``.

    python -m tools.benchmark_torch usual --epochs=5                   the seconds of every epoch
    python -m tools.benchmark_torch mask --shape 128 2 10 --epochs=5   of 20 steps of the loss alone

LeNet with softmax and center loss on the bundled digits, SGD with momentum, data and metrics
included, as a careful PyTorch user would write it: no Python per sample. Or center loss alone,
forward, backward and the step of the centers, in the two forms that are usual. The number of
threads is OMP_NUM_THREADS.
"""

from collections.abc import Callable, Sequence
import os
import sys
import time

import numpy as np

from common.command_line import ArgumentParser, number, run_script
from common.errors import InputError
from data import load_digits

try:
    import torch
except ModuleNotFoundError:
    torch = None

BATCH_SIZE = 128
ALPHA, CENTER_LOSS_WEIGHT = 0.5, 0.01
FORMS = {
    'usual': 'as usually written',
    'pooling-first': 'pooling before tanh, fused SGD',
    'channels-last': 'the same with channels_last',
}
# As in KaiyangZhou/pytorch-center-loss and in jxgu1016/MNIST_center_loss_pytorch.
OPERATOR_FORMS = {
    'mask': 'all distances (B, K), masked',
    'gather': 'the centers of the labels, Eq. 4 as a gradient (K, d)',
}
OPERATOR_STEPS = 20  # in what is timed as one


def lenet(pooling_first: bool = False) -> 'torch.nn.Module':
    """Return the LeNet of train.py with its 2-D embedding, (B, 1, 28, 28) -> (B, 2)."""
    nn = torch.nn
    layers = [nn.Tanh(), nn.MaxPool2d(2)]
    if pooling_first:  # the same function: tanh is monotonic
        layers.reverse()
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        *layers,
        nn.Conv2d(20, 50, 5),
        *layers,
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.Tanh(),
        nn.Linear(500, 2),
    )


def masked_loss(
    x: 'torch.Tensor', label: 'torch.Tensor', centers: 'torch.Tensor'
) -> 'torch.Tensor':
    """Return the mean of ||x - c_y||^2 over the batch, from all distances (B, K), masked."""
    distances = x.square().sum(1, keepdim=True) + centers.square().sum(1)  # (B, K)
    distances = distances.addmm(x, centers.t(), alpha=-2)
    mask = label[:, None] == torch.arange(len(centers))
    return (distances * mask).clamp(1e-12, 1e12).sum() / len(x)


def training(form: str) -> Callable[[], None]:
    """Return a function that trains an epoch."""
    nn = torch.nn
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    torch.manual_seed(0)
    memory_format = torch.channels_last if form == 'channels-last' else torch.contiguous_format
    digits = load_digits('mnist-5k')
    images, labels = image_tensor(digits.train_images), label_tensor(digits.train_labels)
    features = lenet(pooling_first=form != 'usual').to(memory_format=memory_format)
    classifier, centers = nn.Linear(2, 10), torch.zeros(10, 2)
    optimizer = torch.optim.SGD(
        [*features.parameters(), *classifier.parameters()],
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        fused=None if form == 'usual' else True,
    )
    rng = np.random.default_rng(0)

    def train_epoch():
        order = to_tensor(rng.permutation(len(images)), torch.int64)
        correct, total = 0, 0.0
        for index in order.split(BATCH_SIZE)[: len(order) // BATCH_SIZE]:
            image = (images[index].float() / 256).contiguous(memory_format=memory_format)
            label = labels[index]  # (B,)
            embedding = features(image)  # (B, 2)
            logits = classifier(embedding)  # (B, 10)
            difference = embedding - centers[label]
            center_loss = difference.square().sum() / 2 / BATCH_SIZE
            loss = nn.functional.cross_entropy(logits, label) + CENTER_LOSS_WEIGHT * center_loss
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                count = torch.bincount(label, minlength=10)
                step = torch.zeros_like(centers).index_add_(0, label, difference)
                centers.add_(ALPHA * step / (1 + count)[:, None])
                correct += int((logits.argmax(1) == label).sum())
                total += float(loss)

    return train_epoch


def operator_steps(form: str, batch_size: int, dim: int, num_class: int) -> Callable[[], None]:
    """Return a function that makes ``OPERATOR_STEPS`` steps of center loss alone."""
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    torch.manual_seed(0)
    x = torch.randn(batch_size, dim, requires_grad=True)
    label = torch.randint(num_class, (batch_size,))
    centers = torch.zeros(num_class, dim, requires_grad=True)
    optimizer = torch.optim.SGD([centers], lr=ALPHA)

    class Gathered(torch.autograd.Function):
        @staticmethod
        def forward(context, x, label, centers):
            context.save_for_backward(x, label, centers)
            return (x - centers[label]).square().sum() / 2 / batch_size

        @staticmethod
        def backward(context, gradient):
            x, label, centers = context.saved_tensors
            difference = centers[label] - x
            count = centers.new_ones(num_class).scatter_add_(0, label, torch.ones(batch_size))
            step = torch.zeros_like(centers).index_add_(0, label, difference)
            return -gradient * difference / batch_size, None, step / count[:, None]

    def train():
        for _ in range(OPERATOR_STEPS):
            x.grad = None
            optimizer.zero_grad(set_to_none=True)
            loss = (masked_loss if form == 'mask' else Gathered.apply)(x, label, centers)
            loss.backward()
            optimizer.step()

    return train


def image_tensor(images: np.ndarray) -> 'torch.Tensor':
    """Return images, uint8 (N, 1, 28, 28)."""
    return to_tensor(images, torch.uint8).reshape(-1, 1, 28, 28)


def label_tensor(labels: np.ndarray) -> 'torch.Tensor':
    """Return labels, int64 (N,)."""
    return to_tensor(labels, torch.uint8).long()


def to_tensor(array: np.ndarray, dtype: 'torch.dtype') -> 'torch.Tensor':
    """Convert by way of bytes: that works whatever NumPy this PyTorch was built for."""
    return torch.frombuffer(bytearray(array.tobytes()), dtype=dtype)


def main(argv: Sequence[str] = ()) -> None:
    """Train an epoch for every line on stdin, or some epochs."""
    parser = ArgumentParser(
        prog='python -m tools.benchmark_torch',
        description='Train LeNet with center loss in PyTorch.',
    )
    parser.add_argument('form', choices=[*FORMS, *OPERATOR_FORMS])
    parser.add_argument(
        '--shape',
        nargs=3,
        type=number(int, minimum=1),
        metavar=('B', 'D', 'K'),
        help='images of a batch, dimension, classes, of center loss alone (default: 128 2 10)',
    )
    parser.add_argument(
        '--epochs',
        type=number(int, minimum=1),
        metavar='N',
        help='train N epochs (default: one for every line on stdin)',
    )
    args = parser.parse_args(list(argv))
    if args.shape and args.form in FORMS:
        parser.error(f'--shape is for center loss alone: leave it out with {args.form}')
    if torch is None:
        raise InputError('PyTorch is not installed: pip install torch')
    if args.form in FORMS:
        train_epoch = training(args.form)
    else:
        train_epoch = operator_steps(args.form, *(args.shape or (128, 2, 10)))
    for _ in range(args.epochs) if args.epochs else sys.stdin:
        begin = time.perf_counter()
        train_epoch()
        print(f'{time.perf_counter() - begin:.4f}', flush=True)


if __name__ == '__main__':
    run_script(main)
