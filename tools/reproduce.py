"""The README's results: every training run, the table and the pictures.

    python tests/reproduce.py --data-dir DIR --images images           everything, three seeds each, in reproduction/: most of a day on two cores
    python tests/reproduce.py --only lambda ring --seeds 1             some parts
    python tests/reproduce.py --dataset mnist-5k --num-epochs 5        a trial on the embedded digits

A run is ``python train.py`` with the options that stand in the table. As many go side by side as there are processors, which they share evenly: for networks
of this size one thread each is faster than one run with all of them. Started again, it skips the runs that are finished and continues those that were interrupted.
Of a finished run only the last parameters stay, and those of every epoch of the one that is animated.
"""

import concurrent.futures
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import (  # noqa: E402  (first, for a Ctrl-C while all this is imported)
    THREADS_ARE_CHOSEN_HERE,
    ArgumentParser,
    Failure,
    InputError,
    available_cpus,
    number,
    run_script,
)

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
import vis  # noqa: E402
from train_model import Checkpoints  # noqa: E402

JOINT = '--center-loss-weight=1'  # where one lambda stands for center loss
OBJECTIVES = {'softmax': '--center-loss-weight=0', 'joint': JOINT}
RUNS = {
    'softmax': OBJECTIVES['softmax'],
    **{
        f'lambda-{weight}': f'--center-loss-weight={weight}'
        for weight in ('0.001', '0.01', '0.1', '1')
    },
    **{
        f'alpha-{alpha}': f'{JOINT} --alpha={alpha}' for alpha in ('0.01', '0.1', '1')
    },  # 0.5 is the default: lambda-1
    # The rate stays high, and what is measured is the average over about the last tenth of all steps.
    **{
        f'averaged-{name}': f'--average-weights=0.1 --lr-factor=1 {objective}'
        for name, objective in OBJECTIVES.items()
    },
    **{f'ring-{name}': f'--no-bias {objective}' for name, objective in OBJECTIVES.items()},
    # Each epoch is of thirteen times the work, so that there are fewer, of smaller batches; with so many of them to warm up in, a higher rate is stable.
    **{
        f'lenet++-{name}': f'--network=lenet++ --num-epochs=6 --lr=0.04 --embedding-lr-mult=0.25 --lr-factor-epoch=4 --batch-size=64 {objective}'
        for name, objective in OBJECTIVES.items()
    },
    **{
        f'open-set-{dim}-{weight}': f'--num-classes=6 --embedding-dim={dim} --center-loss-weight={weight}'
        for dim in (2, 32)
        for weight in ('0', '0.01', '0.1', '1')
    },
}
LAMBDAS = ['softmax', 'lambda-0.001', 'lambda-0.01', 'lambda-0.1', 'lambda-1']
ALPHAS = ['alpha-0.01', 'alpha-0.1', 'lambda-1', 'alpha-1']
ANIMATED = 'lambda-1'
PARTS = {
    'objectives': ['softmax', 'lambda-1'],
    'lambda': LAMBDAS,
    'alpha': ALPHAS,
    'averaged': ['lambda-1', 'averaged-softmax', 'averaged-joint'],
    **{
        part: [name for name in RUNS if name.startswith(part)]
        for part in ('ring', 'lenet++', 'open-set')
    },
}

# (part, file, options of vis.py), of the first seed
PICTURES = [
    ('objectives', 'mnist.png', ['--compare', 'softmax', '--model-prefix', 'lambda-1']),
    ('objectives', 'curves.png', ['--curves', 'softmax.txt', 'lambda-1.txt']),
    ('objectives', 'evolution.gif', ['--model-prefix', ANIMATED]),
    ('lambda', 'lambda.png', ['--grid', *LAMBDAS]),
    ('alpha', 'alpha.png', ['--grid', *ALPHAS]),
    ('averaged', 'averaged.png', ['--curves', 'lambda-1.txt', 'averaged-joint.txt']),
    ('ring', 'ring.png', ['--compare', 'ring-softmax', '--model-prefix', 'ring-joint']),
    ('lenet++', 'lenet++.png', ['--compare', 'lenet++-softmax', '--model-prefix', 'lenet++-joint']),
    *[
        (
            'open-set',
            f'open-set-{dim}.png',
            ['--compare', f'open-set-{dim}-0', '--model-prefix', f'open-set-{dim}-1'],
        )
        for dim in (2, 32)
    ],
]

COLUMNS = {
    'accuracy': '{:.2%}',
    'intra': '{:.3f}',
    'inter': '{:.3f}',
    'ratio': '{:.4f}',
    's/epoch': '{:.1f}',
    'AUC': '{:.4f}',
    'TA at 1% FA': '{:.1%}',
    'AUC (cosine)': '{:.4f}',
    'TA (cosine)': '{:.1%}',
}


class Run:
    """One training run: a name of RUNS and a seed, in the folder of the seed. Its record, a .json file, has the command and, at the end, the result."""

    def __init__(self, name, seed, args):
        self.name = name
        self.folder = args.work / f'seed-{seed}'
        self.record = self.folder / f'{name}.json'
        self.keep_all = name == ANIMATED and seed == 0
        self.command = [
            *common_options(args),
            *shlex.split(RUNS[name]),
            f'--seed={seed}',
            f'--save-model-prefix={name}',
            f'--log-file={name}.txt',
        ]
        self.options = train.parse_args(self.command)
        self.process = None
        self.stopped = False

    def result(self):
        """What is measured of the finished run, by column, or {'failure': sentence}; None where it is not finished."""
        if not self.record.exists():
            return None
        record = json.loads(self.record.read_text())
        if record['command'] != self.command:
            raise InputError(
                f'{self.record} is of another command, {shlex.join(record["command"])}: choose another --work, or remove it'
            )
        return record.get('result')

    def write(self, **result):
        beside = self.record.with_name(f'.{self.record.name}')
        beside.write_text(json.dumps({'command': self.command, **result}, indent=1))
        beside.replace(self.record)

    def train(self, progress, threads):
        """Train to the end, from wherever it is, with so many ``threads``. ``progress`` is moved on by every epoch. Returns None, or the sentence that says
        how it diverged. Several runs may do this at once, each in a thread of its own.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write()
        progress.update(len(Checkpoints(str(self.folder / self.name)).epochs()))
        with subprocess.Popen(
            [sys.executable, ROOT / 'train.py', *self.command, '--resume'],
            cwd=self.folder,
            stderr=subprocess.PIPE,
            text=True,
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
        sentence = last.strip().removeprefix('train.py: error: ')
        if 'diverged' not in sentence:
            raise Failure(f'{self.name}, {self.folder.name}: {sentence}')
        return sentence

    def stop(self):
        """Stop the training, from another thread, at the end of the batch: the next start continues it."""
        self.stopped = True
        if self.process:
            self.process.terminate()

    def finish(self, failure):
        """Write the result of a training that returned ``failure``, and remove what nobody needs any more."""
        self.write(result={'failure': failure} if failure else self.measure())
        self.clean_up()

    def measure(self):
        """Embed all validation images with the last checkpoint, and measure."""
        digits = data.load_digits(self.options.dataset, self.options.data_dir)
        embeddings, logits = vis.embed(
            str(self.folder / self.name), self.options.num_epochs, digits.val_images
        )
        num_seen, labels = logits.shape[1], digits.val_labels
        seen = labels < num_seen
        seconds = re.findall(r'Time cost=(\S+)', (self.folder / f'{self.name}.txt').read_text())
        values = [
            np.mean(logits.argmax(axis=1)[seen] == labels[seen]),
            *vis.cluster_statistics(embeddings, labels),
            statistics.median(map(float, seconds)),
        ]
        if num_seen < len(digits.class_names):
            values += [
                value
                for verified in vis.verify_unseen(embeddings, labels, num_seen).values()
                for value in verified
            ]
        return dict(zip(COLUMNS, map(float, values)))

    def clean_up(self):
        checkpoints = Checkpoints(str(self.folder / self.name))
        for epoch in checkpoints.epochs():
            checkpoints.states(epoch).unlink(missing_ok=True)
            if epoch < self.options.num_epochs and not self.keep_all:
                checkpoints.params(epoch).unlink()


def train_all(runs, jobs):
    """Train and measure the runs, up to ``jobs`` of them side by side, with a progress bar on a terminal. OMP_NUM_THREADS is respected."""
    jobs = min(jobs, len(runs))
    threads = (
        available_cpus() // jobs or 1 if THREADS_ARE_CHOSEN_HERE else os.environ['OMP_NUM_THREADS']
    )
    with (
        tqdm(
            total=sum(run.options.num_epochs for run in runs), unit='epoch', disable=None
        ) as progress,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        trainings = {pool.submit(run.train, progress, threads): run for run in runs}
        try:
            for training in concurrent.futures.as_completed(trainings):
                trainings[training].finish(training.result())  # MXNet measures in this thread alone
        except BaseException:  # Ctrl-C, or one of them failed
            pool.shutdown(wait=False, cancel_futures=True)
            for run in runs:
                run.stop()
            raise


def common_options(args):
    """The options of train.py that are the same in all runs."""
    return [
        f'--dataset={args.dataset}',
        *([f'--data-dir={Path(args.data_dir).resolve()}'] if args.data_dir else []),
        f'--num-epochs={args.num_epochs}',
        f'--num-examples={args.num_examples}',
        *shlex.split(args.options),
    ]


def table(results):
    """Markdown of {name: [result of each seed that is finished]}: mean and standard deviation over the seeds."""
    lines = []
    for with_unseen in (False, True):
        columns = list(COLUMNS) if with_unseen else list(COLUMNS)[:5]
        rows = {
            name: found
            for name, found in results.items()
            if found and ('--num-classes' in RUNS[name]) == with_unseen
        }
        if rows:
            lines += [
                '',
                f'| options | seeds | {" | ".join(columns)} |',
                '| --- | --- |' + ' ---: |' * len(columns),
            ]
        for name, found in rows.items():
            whole = [result for result in found if 'failure' not in result]
            cells = [
                mean_and_spread(COLUMNS[column], [result[column] for result in whole])
                for column in columns
            ]
            failed = f', {len(found) - len(whole)} diverged' if len(whole) < len(found) else ''
            lines.append(f'| `{RUNS[name]}` | {len(found)}{failed} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def mean_and_spread(form, values):
    if not values:
        return ''
    mean = form.format(statistics.mean(values))
    return (
        mean
        if len(values) == 1
        else f'{mean} ± {form.format(statistics.stdev(values)).rstrip("%")}'
    )


def draw(args):
    """Write the pictures of the chosen parts whose runs are there, and show the command of each."""
    source = [
        f'--dataset={args.dataset}',
        *([f'--data-dir={Path(args.data_dir).resolve()}'] if args.data_dir else []),
    ]
    args.images.mkdir(parents=True, exist_ok=True)
    for part, file, options in PICTURES:
        if part in args.only:
            target = str((args.images / file).resolve())
            options = [
                *options,
                '--animate' if file.endswith('.gif') else '--output',
                target,
                *(source if '--curves' not in options else []),
            ]
            print('$', shlex.join(['python', 'vis.py', *options]))
            drawn = subprocess.run(
                [sys.executable, ROOT / 'vis.py', *options], cwd=args.work / 'seed-0'
            )
            if drawn.returncode:
                print(f'{file} was not drawn', file=sys.stderr)


def main():
    parser = ArgumentParser(
        description="Make the README's results: training runs, table, pictures."
    )
    data.add_data_arguments(parser)
    parser.set_defaults(dataset='mnist')
    parser.add_argument(
        '--work',
        type=Path,
        default='reproduction',
        metavar='DIR',
        help='folder of the runs, and where a stopped programme continues',
    )
    parser.add_argument(
        '--images', type=Path, metavar='DIR', help='write the pictures to this folder'
    )
    parser.add_argument(
        '--only',
        nargs='+',
        choices=list(PARTS),
        default=list(PARTS),
        metavar='PART',
        help='some of: ' + ', '.join(PARTS),
    )
    parser.add_argument(
        '--seeds',
        type=number(int, minimum=1),
        default=3,
        metavar='N',
        help='every run with the seeds 0 to N-1',
    )
    parser.add_argument(
        '--jobs',
        type=number(int, minimum=1),
        default=available_cpus(),
        metavar='N',
        help='train N runs side by side',
    )
    parser.add_argument(
        '--num-epochs',
        type=number(int, minimum=1),
        default=20,
        metavar='N',
        help='epochs of every run that does not say otherwise',
    )
    parser.add_argument(
        '--num-examples',
        type=number(int, minimum=1),
        default=60000,
        metavar='N',
        help='use only the first N training images',
    )
    parser.add_argument(
        '--options',
        default='--batch-size=128',
        help='options of train.py for every run, as one argument',
    )
    args = parser.parse_args()

    names = [name for name in RUNS if any(name in PARTS[part] for part in args.only)]
    runs = [Run(name, seed, args) for seed in range(args.seeds) for name in names]
    unfinished = [run for run in runs if run.result() is None]
    if unfinished:
        train_all(unfinished, args.jobs)
    seeds = f'{args.seeds} seeds (mean ± standard deviation)' if args.seeds > 1 else '1 seed'
    print(
        f'\n{args.data_dir or args.dataset}, {args.num_epochs} epochs, {seeds}, {available_cpus()} processors; every run: '
        f'python train.py {shlex.join(common_options(args))} and'
    )
    print(table({name: [run.result() for run in runs if run.name == name] for name in names}))
    if args.images:
        draw(args)


if __name__ == '__main__':
    run_script(main)
