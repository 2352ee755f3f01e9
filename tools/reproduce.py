"""The results of the documentation: every training run, the tables and the pictures.

    python -m tools.reproduce --data-dir=DIR --images=images    everything, in reproduction/
    python -m tools.reproduce --only original                   beside the MXNet version of 2016
    python -m tools.reproduce --only lambda ring --seeds=1      some parts, one seed
    python -m tools.reproduce --dataset=mnist-5k --num-epochs=5    a trial on the embedded digits

A run is ``python train.py`` with the options that the table shows. As many runs train side by side
as there are processors, with one thread each: for networks of this size that is faster than one run
after the other with all threads. Started again, the program skips the runs that are finished and
continues those that were interrupted. A run keeps its newest checkpoint, the animated one all.
"""

import argparse
from collections.abc import Sequence
import concurrent.futures
import functools
import itertools
import json
import os
from pathlib import Path
import re
import shlex
import statistics
import subprocess
import sys

from tqdm import tqdm

from common.environment import THREADS_CHOSEN_BY_USER, available_cpus
from common.checkpoints import Checkpoints
from common.command_line import ArgumentParser, number, run_script
from common.curves import read_log
from common.errors import Failure, InputError
from common.evaluation import evaluate
from common.files import replace_when_whole
from data import DATASETS, load_digits
from tools.experiments import ANIMATED, NUM_SEEDS, PARTS, PICTURES, RUNS
from train import parse_args

ROOT = Path(__file__).resolve().parent.parent

COLUMNS = {
    **{'accuracy': '{:.2%}', 'intra': '{:.3f}', 'inter': '{:.3f}', 'ratio': '{:.4f}'},
    's/epoch': '{:.1f}',
    # verification of unseen classes, by Euclidean distance and by cosine
    **{'AUC': '{:.4f}', 'TA at 1% FA': '{:.1%}'},
    **{'AUC (cosine)': '{:.4f}', 'TA (cosine)': '{:.1%}'},
}
SEEN_COLUMNS = 5  # of these, the columns of a run that has seen all classes

# Test accuracy after epochs 1 to 4 of YYuanAnyVision/mxnet_center_loss: one run at batch 128.
ORIGINAL_COURSE = (0.799, 0.880, 0.918, 0.951)


class Run:
    """A training run: a name in ``RUNS`` and a seed, in the folder of the seed.

    Its record, a .json file, has the command and, at the end, the result.
    """

    def __init__(self, name: str, seed: int, args: argparse.Namespace):
        self.name = name
        self.seed = seed
        self.folder = args.work / f'seed-{seed}'
        self.record = self.folder / f'{name}.json'
        self.log = self.folder / f'{name}.txt'
        self.command = [
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
        if not self.record.exists():
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

    def epochs_done(self) -> int:
        """Return the number of epochs that have been trained."""
        return max(Checkpoints(self.folder / self.name).epochs(), default=0)

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
        """Return the columns of the table, from all test images and the last checkpoint.

        'course' is the test accuracy of every epoch, from the log.
        """
        digits = load_digits(self.options.dataset, self.options.data_dir)
        prefix, num_epochs = str(self.folder / self.name), self.options.num_epochs
        evaluation = evaluate(prefix, num_epochs, digits.val_images, digits.val_labels)
        course = read_log(self.log)['Validation', 'accuracy']
        seconds = re.findall(r'Time cost=(\S+)', self.log.read_text())
        values = [evaluation.accuracy, *evaluation.clusters, statistics.median(map(float, seconds))]
        for verification in evaluation.verification.values():
            values += verification
        return {
            **dict(zip(COLUMNS, values, strict=False)),
            'course': [course[epoch] for epoch in range(1, num_epochs + 1)],
        }


def common_options(args: argparse.Namespace) -> list[str]:
    """Return the options of train.py that are the same in all runs."""
    return [
        *data_options(args),
        f'--num-epochs={args.num_epochs}',
        f'--num-examples={args.num_examples}',
        *shlex.split(args.options),
    ]


def data_options(args: argparse.Namespace) -> list[str]:
    """Return the options of train.py and vis.py that name the data."""
    folder = [f'--data-dir={args.data_dir.resolve()}'] if args.data_dir else []
    return [f'--dataset={args.dataset}', *folder]


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Train and measure the runs, up to ``jobs`` side by side, with a bar on a terminal."""
    jobs = min(jobs, len(runs))
    threads = available_cpus() // jobs or 1
    if THREADS_CHOSEN_BY_USER:
        threads = os.environ['OMP_NUM_THREADS']
    total = sum(run.options.num_epochs for run in runs)
    done = sum(run.epochs_done() for run in runs)
    print(f'{total - done} epochs to train in {len(runs)} runs, {jobs} side by side', flush=True)
    with (
        tqdm(total=total, initial=done, unit='epoch', disable=None) as progress,
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


def table(results: dict[str, list[dict]]) -> str:
    """Return Markdown of the results of every seed by name: mean ± standard deviation."""
    lines = []
    for columns, unseen in ((list(COLUMNS)[:SEEN_COLUMNS], False), (list(COLUMNS), True)):
        names = [name for name in results if ('--num-classes' in RUNS[name]) == unseen]
        rows = {name: results[name] for name in names if results[name]}
        if rows:
            lines += ['', f'| options | seeds | {" | ".join(columns)} |']
            lines += ['| --- | --- |' + ' ---: |' * len(columns)]
        for name, found in rows.items():
            whole = [result for result in found if 'failure' not in result]
            cells = [
                mean_and_deviation(COLUMNS[column], [result[column] for result in whole])
                for column in columns
            ]
            failed = f', {len(found) - len(whole)} diverged' if len(whole) < len(found) else ''
            lines.append(f'| `{RUNS[name]}` | {len(found)}{failed} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def mean_and_deviation(form: str, values: Sequence[float]) -> str:
    """Return 'mean ± standard deviation', with a form such as '{:.2%}'."""
    if len(values) < 2:
        return ''.join(map(form.format, values))
    deviation = form.format(statistics.stdev(values)).rstrip('%')
    return f'{form.format(statistics.mean(values))} ± {deviation}'


def original_table(courses: Sequence[Sequence[float]]) -> str:
    """Return Markdown of the test accuracy by epoch, beside the original's one run."""
    lines = ['', f'| epoch | mean of {len(courses)} seeds | range | the original, one run |']
    lines += ['| --- | ---: | ---: | ---: |']
    for epoch, (original, *ours) in enumerate(zip(ORIGINAL_COURSE, *courses, strict=True), 1):
        span = f'{min(ours):.1%} to {max(ours):.1%}'
        lines.append(f'| {epoch} | {statistics.mean(ours):.1%} | {span} | {original:.1%} |')
    return '\n'.join(lines)


def draw(args: argparse.Namespace) -> None:
    """Draw the pictures of the chosen parts, and print the command of each."""
    args.images.mkdir(parents=True, exist_ok=True)
    for part, file, options in PICTURES:
        if part in args.only:
            option = '--animate' if file.endswith('.gif') else '--output'
            source = data_options(args) if '--curves' not in options else []
            options = [*options, option, str((args.images / file).resolve()), *source]
            print('$', shlex.join(['python', 'vis.py', *options]), flush=True)
            drawn = subprocess.run(
                [sys.executable, ROOT / 'vis.py', *options],
                cwd=args.work / 'seed-0',
                env={**os.environ, 'MPLBACKEND': 'Agg'},
            )
            if drawn.returncode:
                print(f'{file} was not drawn', file=sys.stderr)


def main(argv: Sequence[str] = ()) -> None:
    """Train what is missing, then print the tables and draw the pictures."""
    count = number(int, minimum=1)
    parser = ArgumentParser(
        prog='python -m tools.reproduce',
        description='Make the results of the documentation: training runs, tables, pictures.',
    )
    add = functools.partial(parser.add_argument, metavar='N')
    add('--dataset', choices=list(DATASETS), default='mnist', metavar=None, help='as in train.py')
    add('--data-dir', type=Path, metavar='DIR', help='folder of the four IDX files, as in train.py')
    add('--work', type=Path, default='reproduction', metavar='DIR', help='folder of the runs')
    add('--images', type=Path, metavar='DIR', help='draw the pictures in this folder')
    parts = list(PARTS)
    add('--only', nargs='+', choices=parts, default=parts, metavar='PART', help='make these parts')
    seeds_help = 'train every run with the seeds 0 to N-1 (default: 3, and 5 of the part original)'
    add('--seeds', type=count, help=seeds_help)
    add('--jobs', type=count, default=available_cpus(), help='train N runs side by side')
    add('--num-epochs', type=count, default=20, help='of the runs that do not name it themselves')
    add('--num-examples', type=count, default=60000, help='train on the first N images')
    add('--options', default='--batch-size=128', help='of train.py, for all runs, in one argument')
    args = parser.parse_args(list(argv))

    names = [name for name in RUNS if any(name in PARTS[part] for part in args.only)]
    runs = {
        name: [Run(name, seed, args) for seed in range(args.seeds or NUM_SEEDS.get(name, 3))]
        for name in names
    }
    by_seed = sorted(itertools.chain(*runs.values()), key=lambda run: run.seed)
    unfinished = [run for run in by_seed if run.result() is None]
    if unfinished:
        train_all(unfinished, args.jobs)
    print(
        f'\n{args.data_dir or args.dataset}, {available_cpus()} processors, test accuracy; mean ± '
        f'standard deviation; every run: python train.py {shlex.join(common_options(args))} and'
    )
    results = {name: [run.result() for run in runs[name]] for name in names}
    print(table(results))
    courses = [result['course'] for result in results.get('original', []) if 'course' in result]
    if courses:
        print(original_table(courses))
    if args.images:
        draw(args)


if __name__ == '__main__':
    run_script(main)
