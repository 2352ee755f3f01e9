"""The same training in PyTorch, for tests/benchmark.py: prints images per second.

    python tests/benchmark_torch.py THREADS pooling-first|tanh-first

LeNet with softmax and center loss, SGD with momentum, data and metrics included, written the way a careful PyTorch user would: no Python per sample.
tanh-first is the order of LeNet as it is usually written, pooling-first the same function in the order that train.py computes it in.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import nn

from data import load_digits
from runtime import run_script

BATCH_SIZE = 128
ALPHA, WEIGHT = 0.5, 0.01


def main():
    torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    digits = load_digits('mnist-5k')
    # By way of bytes: it does not depend on which NumPy this PyTorch was built for.
    images = torch.frombuffer(bytearray(digits.train_images.tobytes()), dtype=torch.uint8).reshape(
        -1, 1, 28, 28
    )
    labels = torch.frombuffer(bytearray(digits.train_labels.tobytes()), dtype=torch.uint8).long()
    activation = (
        [nn.MaxPool2d(2), nn.Tanh()]
        if sys.argv[2] == 'pooling-first'
        else [nn.Tanh(), nn.MaxPool2d(2)]
    )
    features = nn.Sequential(
        nn.Conv2d(1, 20, 5),
        *activation,
        nn.Conv2d(20, 50, 5),
        *activation,
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.Tanh(),
        nn.Linear(500, 2),
    )
    classifier = nn.Linear(2, 10)
    centers = torch.zeros(10, 2)
    optimizer = torch.optim.SGD(
        [*features.parameters(), *classifier.parameters()], lr=0.01, momentum=0.9, weight_decay=5e-4
    )
    seconds = []
    for epoch in range(6):
        order = np.random.default_rng((0, epoch)).permutation(len(images))
        order = torch.frombuffer(bytearray(order.astype(np.int64).tobytes()), dtype=torch.int64)
        begin, correct, total = time.perf_counter(), 0, 0.0
        for first in range(0, len(order) - BATCH_SIZE + 1, BATCH_SIZE):
            index = order[first : first + BATCH_SIZE]
            image, label = images[index].float() / 256, labels[index]
            embedding = features(image)
            logits = classifier(embedding)
            difference = embedding - centers[label]
            center_loss = difference.square().sum() / 2 / BATCH_SIZE
            optimizer.zero_grad(set_to_none=True)
            (nn.functional.cross_entropy(logits, label) + WEIGHT * center_loss).backward()
            optimizer.step()
            with torch.no_grad():
                count = torch.bincount(label, minlength=10)
                centers += (
                    ALPHA
                    * torch.zeros_like(centers).index_add_(0, label, difference)
                    / (1 + count)[:, None]
                )
                correct += int((logits.argmax(1) == label).sum())
                total += float(center_loss)
        seconds.append(time.perf_counter() - begin)
    print(len(order) // BATCH_SIZE * BATCH_SIZE / statistics.median(seconds[1:]))


if __name__ == '__main__':
    run_script(main)
