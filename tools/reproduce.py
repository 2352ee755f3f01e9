"""The results of the documentation: every training run, the tables and the pictures.

    python -m tools.reproduce --images=images --tables=docs/results    of MNIST, in reproduction/
    python -m tools.reproduce --dataset=fashion-mnist           in reproduction-fashion-mnist/
    python -m tools.reproduce --only original                   beside the MXNet version of 2016
    python -m tools.reproduce --only lambda ring --seeds=1      some parts, one seed
    python -m tools.reproduce --dataset=mnist-5k --work=trial --num-epochs=5 --only lambda

A run is ``python train.py`` with the options that the table shows. As many runs train side by side
as there are processors, with one thread each: for networks of this size that is faster than one run
after the other with all threads. Started again, the program skips the runs that are finished and
continues those that were interrupted. A run keeps its newest checkpoint, the animated one all.
``python -m tools.tables --write`` writes the tables of --tables into the documentation.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
import functools
import json
import os
from pathlib import Path
import shlex
import subprocess
import sys

from common.environment import available_cpus
from common.command_line import ArgumentParser, number, run_script
from common.errors import Failure, InputError
from common.files import replace_when_whole
from common.pictures import picture_style, save_picture
from data import DATASETS, load_digits
from tools.arrangement import draw_arrangements, share_between_neighbors
from tools.experiments import (
    DATASET_PARTS,
    MNIST_PARTS,
    NUM_SEEDS,
    PARTS,
    PICTURES,
    REFERENCE,
    RUNS,
)
from tools.measuring import ROOT, add_only
from tools.runs import Run, common_options, data_options, train_all
from tools.table_kinds import render

ARRANGED = 'random-joint'  # whose seeds the picture of the arrangements shows
NOT_IN_TABLES = {'confusions', 'centers', 'made_by'}

Runs = dict[str, list[Run]]  # of every seed, by name


def make_table(part: str, runs: Runs, args: argparse.Namespace, command: Sequence[str]) -> dict:
    """Return what the JSON file of a part has; see ``tools.tables``."""
    rows, kind, compare = PARTS[part]
    unlisted = NOT_IN_TABLES | (set() if kind in ('original', 'convergence') else {'course'})
    results = {run: run.result() for name in PARTS[part].runs() for run in runs[name]}
    made_by = [result['made_by'] for result in results.values() if 'made_by' in result]
    common = [f'--dataset={args.dataset}', *common_options(args), '--seed=SEED']
    table = {
        'kind': kind,
        'command': shlex.join(['python', '-m', 'tools.reproduce', '--only', part, *command]),
        'options': shlex.join(['python', 'train.py', *common]),
        'made_by': [made for i, made in enumerate(made_by) if made not in made_by[:i]],
        'compare': compare,
        'rows': [
            {
                'title': title,
                'options': [RUNS[name] for name in names],
                'runs': [
                    entry(run, results[run], unlisted) for name in names for run in runs[name]
                ],
            }
            for title, names in rows.items()
        ],
    }
    if kind == 'arrangement':
        table['reference'] = reference(runs)
        for row, names in zip(table['rows'], rows.values(), strict=True):
            for found, run in zip(row['runs'], runs[names[0]], strict=True):
                if 'failure' not in found:
                    found['share'] = share(run, table['reference'])
    return table


def entry(run: Run, result: dict, unlisted: set[str]) -> dict:
    """Return what a table has of a run, without the ``unlisted`` values."""
    classes = run.options.classes
    listed = {'classes': ','.join(map(str, classes))} if classes else {}
    values = {name: value for name, value in result.items() if name not in unlisted}
    if 'failure' in values:  # without the advice, which has paths of this machine
        values['failure'] = values['failure'].partition(';')[0]
    return {'seed': run.seed, **listed, **values}


def reference(runs: Runs) -> dict:
    """Return the confusions of the reference runs, all seeds together."""
    results = {run.seed: run.result() for run in runs[REFERENCE]}
    whole = {seed: result for seed, result in results.items() if 'failure' not in result}
    total = sum((Counter(result['confusions']) for result in whole.values()), Counter())
    return {'options': RUNS[REFERENCE], 'seeds': list(whole), 'confusions': dict(total)}


def share(run: Run, reference: dict) -> float:
    """Return the share of the reference's confusions whose classes are neighbors in a run."""
    return share_between_neighbors(run.result()['centers'], reference['confusions'])


def path_of(folder: Path, file: str, dataset: str) -> Path:
    """Return where a file goes: its name has the dataset where that is not MNIST."""
    path = folder / file
    return path if dataset == 'mnist' else path.with_stem(f'{path.stem}-{dataset}')


def draw(args: argparse.Namespace, runs: Runs) -> None:
    """Draw the pictures of the chosen parts, and print the command of each that vis.py draws.

    Raises Failure, at the end, if some could not be drawn.
    """
    not_drawn = []
    for part, file, options in PICTURES:
        if part in args.only:
            option = '--animate' if file.endswith('.gif') else '--output'
            source = data_options(args) if '--curves' not in options else []
            path = path_of(args.images, file, args.dataset)
            options = [*options, option, str(path.resolve()), *source]
            print('$', shlex.join(['python', 'vis.py', *options]), flush=True)
            drawn = subprocess.run(
                [sys.executable, ROOT / 'vis.py', *options],
                cwd=args.work / 'seed-0',
                env={**os.environ, 'MPLBACKEND': 'Agg'},
            )
            if drawn.returncode:
                not_drawn.append(path.name)
    if 'arrangement' in args.only:
        whole = [run for run in runs[ARRANGED] if 'failure' not in run.result()]
        whole.sort(key=lambda run: run.result()['accuracy'])
        path = path_of(args.images, 'arrangement.png', args.dataset)
        if whole:
            confused = reference(runs)
            with picture_style():
                figure = draw_arrangements(
                    [run.prefix for run in whole],
                    [f'seed {run.seed}' for run in whole],
                    [share(run, confused) for run in whole],
                    load_digits(args.dataset, args.data_dir),
                )
                save_picture(figure, path)
        else:
            not_drawn.append(path.name)
    if not_drawn:
        raise Failure(f'not drawn: {", ".join(not_drawn)}')


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
    add('--work', type=Path, metavar='DIR', help='folder of the runs (default: by dataset)')
    add('--images', type=Path, metavar='DIR', help='draw the pictures in this folder')
    add('--tables', type=Path, metavar='DIR', help='write a JSON file for each part to this folder')
    add_only(parser, PARTS, default='by dataset')
    add('--seeds', type=count, help='train every run with the seeds 0 to N-1 (default: 1, 3 or 5)')
    add('--jobs', type=count, default=available_cpus(), help='train N runs side by side')
    add('--num-epochs', type=count, help='of the runs that do not name it (default: by recipe)')
    add('--num-examples', type=count, help='train on the first N images (default: all)')
    add(
        '--options',
        default='--batch-size=128',
        metavar='OPTIONS',
        help='of train.py, for all runs, in one argument',
    )
    args = parser.parse_args(list(argv))
    args.only = args.only or DATASET_PARTS.get(args.dataset, MNIST_PARTS)
    args.work = args.work or path_of(Path(), 'reproduction', args.dataset)
    for folder in filter(None, (args.work, args.images, args.tables)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f'cannot write to {folder}: {error.strerror}') from None

    needed = {name for part in args.only for name in PARTS[part].runs()}
    runs = {
        name: [Run(name, seed, args) for seed in range(args.seeds or NUM_SEEDS.get(name, 3))]
        for name in RUNS
        if name in needed
    }
    by_seed = sorted((run for group in runs.values() for run in group), key=lambda run: run.seed)
    unfinished = [run for run in by_seed if run.result() is None]
    if unfinished:
        train_all(unfinished, args.jobs)
    determining = ('dataset', 'seeds', 'num_epochs', 'num_examples', 'options')
    command = [
        f'--{name.replace("_", "-")}={getattr(args, name)}'
        for name in determining
        if getattr(args, name) != parser.get_default(name)
    ]
    for part in args.only:
        table = make_table(part, runs, args, command)
        print(f'\n{part}\n\n{render(table)}', end='')
        if args.tables:
            with replace_when_whole(path_of(args.tables, f'{part}.json', args.dataset)) as path:
                path.write_text(json.dumps(table, indent=1) + '\n')
    if args.images:
        draw(args, runs)


if __name__ == '__main__':
    run_script(main)
