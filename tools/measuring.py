"""What the benchmarks share: interleaved variants, training steps, and processes to compare."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
import contextlib
import itertools
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time

import numpy as np

from common.environment import available_cpus, mx
from common.errors import Failure
from common.module import Module
from data import mnist_iterator
from train import INITIALIZERS, get_symbol
from train_model import metrics

ROOT = Path(__file__).resolve().parent.parent
LABELS = ('softmax_label', 'center_label')


class Report:
    """Measurements: a table of medians, with their quartiles.

    Parameters
    ----------
    max_rounds
        No comparison takes more rounds.
    """

    def __init__(self, max_rounds: int):
        self.max_rounds = max_rounds
        self.rows = []

    def add(self, what: str, values: Sequence[float], unit: str = 'x') -> None:
        """Add a row."""
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        self.rows.append({'what': what, 'median': median, 'low': low, 'high': high, 'unit': unit})

    def interleave(self, *variants: Callable, rounds: int, times: int = 1) -> np.ndarray:
        """Return the seconds of every variant in every round, (variants, rounds).

        In a round every variant takes its turn, ``times`` times. A first round is not counted.
        """
        seconds = np.empty((len(variants), min(rounds, self.max_rounds) + 1))
        for number in range(seconds.shape[1]):
            for variant, own in zip(variants, seconds, strict=True):
                begin = time.perf_counter()
                for _ in range(times):
                    variant()
                mx.nd.waitall()
                own[number] = (time.perf_counter() - begin) / times
        return seconds[:, 1:]

    def __str__(self) -> str:
        lines = [f'{"":72} {"median":>10} {"":8}  quartiles']
        for row in self.rows:
            median, low, high = (significant(row[key]) for key in ('median', 'low', 'high'))
            spread = '' if low == high else f'  {low} to {high}'
            lines.append(f'{row["what"]:72} {median:>10} {row["unit"]:8}{spread}')
        return '\n'.join(lines)


def significant(value: float) -> str:
    """Return a number with three significant digits, such as 1.03, 12.5 and 2,410."""
    return f'{value:,.0f}' if abs(value) >= 100 else f'{value:#.3g}'


class Training:
    """Some steps as ``fit`` makes them, on shuffled batches of the bundled digits.

    Parameters
    ----------
    network
        What is trained, with or without a center loss.
    batch_size
        Images in a batch.
    num_steps
        Steps of a call; by default so many that a turn takes some tenths of a second.
    kind
        The class of the Module.
    """

    def __init__(
        self,
        network: mx.sym.Symbol,
        batch_size: int,
        num_steps: int | None = None,
        kind: type[mx.mod.Module] = Module,
    ):
        labels = [name for name in LABELS if name in network.list_arguments()]
        self.num_labels = len(labels)
        self.num_steps = num_steps or max(1, 512 // batch_size)
        self.batches = endless(mnist_iterator(batch_size, dataset='mnist-5k')[0])
        self.module = kind(network, label_names=labels)
        label_shapes = [(name, (batch_size,)) for name in labels]
        self.module.bind([('data', (batch_size, 1, 28, 28))], label_shapes)
        self.module.init_params(INITIALIZERS['small-head'])
        self.module.init_optimizer(
            kvstore=None,
            optimizer_params={'learning_rate': 0.01, 'momentum': 0.9, 'wd': 5e-4},
        )
        outputs = network.list_outputs()
        self.metric = mx.metric.CompositeEvalMetric(
            [metric for metric in metrics().metrics if metric.output_names[0] in outputs]
        )
        self.batch_end_callback = None

    def __call__(self) -> None:
        """Train."""
        self.metric.reset()
        for batch in itertools.islice(self.batches, self.num_steps):
            batch.label = batch.label[: self.num_labels]
            self.module.forward_backward(batch)
            self.module.update()
            self.module.update_metric(self.metric, batch.label)
            if self.batch_end_callback is not None:
                self.batch_end_callback(None)
        mx.nd.waitall()


def endless(batches: mx.io.DataIter) -> Iterator[mx.io.DataBatch]:
    """Yield the batches of one epoch after the other."""
    while True:
        yield from batches
        batches.reset()


def absolute(folder: Path) -> Path:
    """Return the folder that an option names, for a process in another folder."""
    return Path(os.path.expanduser(folder)).resolve()


def step_seconds(network: str, batch_size: int) -> float:
    """Measure a training step of one of train.py's networks, for a second."""
    training = Training(get_symbol(network=network, vectorized=True), batch_size, num_steps=1)
    training()  # the first step prepares memory
    steps, begin = 0, time.perf_counter()
    while time.perf_counter() < begin + 1:
        training()
        steps += 1
    return (time.perf_counter() - begin) / steps


def add_only(parser: argparse.ArgumentParser, parts: Iterable[str], default: str = 'all') -> None:
    """Add the option --only, which names some of the parts of a program."""
    parser.add_argument(
        '--only',
        nargs='+',
        choices=list(parts),
        metavar='PART',
        help=f'take these parts only: {", ".join(parts)} (default: {default})',
    )


class TrainingProcess:
    """A program that trains for every line on its stdin, and is stopped in between.

    The threads of a process that is stopped (SIGSTOP) cannot spin and take time from the others.

    Parameters
    ----------
    *arguments
        A module of ``tools`` and its options. It writes a line whenever it has trained.
    **environment
        Variables to set.
    """

    def __init__(self, *arguments: str, **environment: str):
        self.process = subprocess.Popen(
            [sys.executable, '-m', *arguments],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> 'TrainingProcess':
        return self

    def __exit__(self, *error: object) -> None:
        with self.process:
            self.process.kill()

    def __call__(self) -> None:
        """Let it train once."""
        self.process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # where it has ended, there is no answer either
            os.write(self.process.stdin.fileno(), b'\n')
        if not self.process.stdout.readline():
            raise Failure(f'python {" ".join(self.process.args[1:])} has failed')
        self.process.send_signal(signal.SIGSTOP)


def processor() -> str:
    """Return how many processors there are, and of what kind: '2 of AMD EPYC'."""
    names = []
    with contextlib.suppress(OSError):
        names = re.findall(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text())
    return f'{available_cpus()} of {names[0] if names else "unknown"}'


def run_python(*arguments: object, cwd: str | Path = ROOT, **environment: str) -> str:
    """Return what a Python program prints; raise Failure, with its stderr, if it fails."""
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        command = ' '.join(map(str, arguments))
        raise Failure(f'python {command} ended with {result.returncode}: {result.stderr.strip()}')
    return result.stdout
