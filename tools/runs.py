"""Training runs of ``tools.reproduce``: how long they take, side by side, and what came of them."""

import argparse
from collections.abc import Sequence
import concurrent.futures
import functools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys

import numpy as np
from tqdm import tqdm

from common.environment import THREADS_CHOSEN_BY_USER, available_cpus
from common.checkpoints import Checkpoints
from common.curves import read_log
from common.embedder import Embedder
from common.errors import Failure, InputError
from common.evaluation import evaluate
from common.files import replace_when_whole
from data import load_digits, mnist_iterator
from tools.arrangement import confusions
from tools.experiments import ANIMATED, RUNS
from tools.measuring import ROOT, absolute, processor, run_python
from train import parse_args

# What is measured of a run, in this order; the last four are verification of unseen classes, by
# Euclidean distance and by cosine.
VALUES = (
    *('accuracy', 'intra', 'inter', 'ratio', 's/epoch'),
    *('AUC', 'TA at 1% FA', 'AUC (cosine)', 'TA (cosine)'),
)
LARGEST_MEASURED = 4000  # images of a batch whose step is measured: those of mnist-5k


class Run:
    """A training run: a name in ``RUNS`` and a seed, in the folder of the seed.

    Its record, a .json file, has the command and, at the end, the result.
    """

    def __init__(self, name: str, seed: int, args: argparse.Namespace):
        self.name = name
        self.seed = seed
        self.folder = args.work / f'seed-{seed}'
        self.prefix = self.folder / name
        self.record = self.folder / f'{name}.json'
        self.log = self.folder / f'{name}.txt'
        self.command = [
            *data_options(args),
            *common_options(args),
            *shlex.split(RUNS[name]),
            *([] if name == ANIMATED and seed == 0 else ['--keep-checkpoints=1']),
            f'--seed={seed}',
            f'--save-model-prefix={name}',
            f'--log-file={self.log.name}',
        ]
        self.options = parse_args(self.command)
        self.process = None
        self.stopped = False

    def result(self) -> dict | None:
        """Return what :meth:`measure` has found, or {'failure': message}; None if unfinished."""
        if not os.path.exists(self.record):
            return None
        record = json.loads(self.record.read_text())
        if record['command'] != self.command:
            raise InputError(
                f'{self.record} is of another command, {shlex.join(record["command"])}: choose '
                'another --work, or remove it'
            )
        return record.get('result')

    def write(self, **result: dict) -> None:
        """Write the record."""
        with replace_when_whole(self.record) as path:
            path.write_text(json.dumps({'command': self.command, **result}, indent=1))

    def epochs_left(self) -> int:
        """Return the number of epochs that are still to be trained."""
        return self.options.num_epochs - max(Checkpoints(self.prefix).epochs(), default=0)

    def train(self, progress: tqdm, threads: int) -> str | None:
        """Train to the end, from wherever it is; several runs may do so in threads of this process.

        Returns None, or the message of a run that diverged.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        with subprocess.Popen(
            [sys.executable, ROOT / 'train.py', *self.command, '--resume'],
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, 'OMP_NUM_THREADS': str(threads)},
        ) as self.process:
            if self.stopped:
                self.process.terminate()
            last = ''
            for last in self.process.stderr:
                if 'Validation-center_loss' in last:
                    progress.update()
        if not self.process.returncode:
            return None
        message = last.strip().removeprefix('train.py: error: ')
        if 'diverged' not in message:
            raise Failure(f'{self.name}, {self.folder.name}: {message}')
        return message

    def stop(self) -> None:
        """Stop the training, from another thread, at the end of the batch."""
        self.stopped = True
        if self.process:
            self.process.terminate()

    def measure(self) -> dict:
        """Return the result, from all test images and the last checkpoint.

        That is the values of ``VALUES`` by name; 'course', the test accuracy of every epoch, from
        the log; 'confusions' and 'centers' (K, d), for ``tools.arrangement``; 'made_by', processor
        and versions.
        """
        digits = load_digits(self.options.dataset, self.options.data_dir)
        prefix, num_epochs = str(self.prefix), self.options.num_epochs
        evaluation = evaluate(prefix, num_epochs, digits.val_images, digits.val_labels)
        course = read_log(self.log)['Validation', 'accuracy']
        log = self.log.read_text()
        seconds = map(float, re.findall(r'Time cost=(\S+)', log))
        values = [evaluation.accuracy, *evaluation.clusters, statistics.median(seconds)]
        for verification in evaluation.verification.values():
            values += verification
        seen = np.isin(digits.val_labels, evaluation.seen)
        versions = json.loads(re.findall(r'versions: (\{.*\})', log)[-1])
        return {
            **dict(zip(VALUES, values, strict=False)),
            'course': [course[epoch] for epoch in range(1, num_epochs + 1)],
            'confusions': confusions(digits.val_labels[seen], evaluation.predicted[seen]),
            'centers': Embedder(prefix, num_epochs).centers.tolist(),
            'made_by': {'processor': processor(), **versions},
        }


def common_options(args: argparse.Namespace) -> list[str]:
    """Return the options of train.py that are the same in all runs, except for the data."""
    limits = {'--num-epochs': args.num_epochs, '--num-examples': args.num_examples}
    given = [f'{option}={limit}' for option, limit in limits.items() if limit]
    try:
        return [*given, *shlex.split(args.options)]
    except ValueError as error:
        raise InputError(f'--options={args.options}: {error}') from None


def data_options(args: argparse.Namespace) -> list[str]:
    """Return the options of train.py and vis.py that name the data."""
    folder = [f'--data-dir={absolute(args.data_dir)}'] if args.data_dir else []
    return [f'--dataset={args.dataset}', *folder]


@functools.cache
def steps_per_epoch(batch_size: int, **options: object) -> float:
    """Return the number of steps; validation, forward only, counts a third of a training step."""
    train, val = mnist_iterator(batch_size, **options)
    return train.num_batches + val.num_batches / 3


def estimate(runs: Sequence[Run], jobs: int, threads: int) -> float:
    """Return how many seconds the runs will take: a few steps of each network are measured.

    As many processes measure side by side as there will be jobs.
    """
    measured = {}
    work = []
    for run in runs:
        args = run.options
        batch_size = min(args.batch_size, LARGEST_MEASURED)
        network = args.network, batch_size
        if not run.epochs_left():
            continue
        if network not in measured:
            code = f'from tools.measuring import step_seconds; print(step_seconds{network})'
            measure = functools.partial(run_python, '-c', code, OMP_NUM_THREADS=str(threads))
            with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
                printed = [pool.submit(measure) for _ in range(jobs)]
            measured[network] = statistics.mean(float(future.result()) for future in printed)
        names = ('dataset', 'data_dir', 'num_examples', 'num_classes')
        images = {name: getattr(args, name) for name in names}
        images['classes'] = args.classes and tuple(args.classes)
        steps = steps_per_epoch(args.batch_size, **images)
        seconds = measured[network] * args.batch_size / batch_size
        work.append(run.epochs_left() * steps * seconds)
    return max(sum(work) / jobs, max(work, default=0))


def duration(seconds: float) -> str:
    """Return a rounded duration in words, such as 'about 5 h 10 min'."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return 'less than two minutes'
    if minutes < 60:
        return f'about {minutes} min'
    hours, minutes = divmod(round(minutes, -1), 60)
    return f'about {hours} h' + (f' {minutes} min' if minutes else '')


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Train and measure the runs, up to ``jobs`` side by side, with a bar on a terminal."""
    jobs = min(jobs, len(runs))
    threads = available_cpus() // jobs or 1
    if THREADS_CHOSEN_BY_USER:
        threads = os.environ['OMP_NUM_THREADS']
    total = sum(run.options.num_epochs for run in runs)
    left = sum(run.epochs_left() for run in runs)
    needed = duration(estimate(runs, jobs, threads))
    print(f'{len(runs)} runs, {left} epochs, {jobs} side by side: {needed}', flush=True)
    with (
        tqdm(total=total, initial=total - left, unit='epoch', disable=None) as progress,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        trainings = {pool.submit(run.train, progress, threads): run for run in runs}
        try:
            for training in concurrent.futures.as_completed(trainings):
                run, failure = trainings[training], training.result()
                # MXNet is used in this thread alone.
                run.write(result={'failure': failure} if failure else run.measure())
        except BaseException:  # Ctrl-C, or one of them failed
            pool.shutdown(wait=False, cancel_futures=True)
            for run in runs:
                run.stop()
            raise
