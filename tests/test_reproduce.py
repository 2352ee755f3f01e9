"""The program of the documentation's results, in small: runs, tables, pictures, a second start."""

import argparse
import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from common.checkpoints import Checkpoints
from common.embedder import TRAINED, Embedder
from common.errors import Failure, InputError
from common.evaluation import (
    ClusterStatistics,
    Evaluation,
    Verification,
    cluster_statistics,
    embed,
)
from common.pictures import picture_style
import data
from helpers import ROOT, run_python
from tools import arrangement, experiments, reproduce, runs
from tools.table_kinds import KINDS, render
import train
import vis

REPRODUCE = ['-m', 'tools.reproduce']
SMALL = ['--dataset=mnist-5k', '--num-epochs=1', '--num-examples=500', '--seeds=1', '--only=ring']
PICTURE = (
    r'^\$ python vis\.py --compare ring-softmax --model-prefix ring-joint '
    r'--output \S+/images/ring-mnist-5k\.png --dataset=mnist-5k$'
)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Two finished runs: their folder and what was printed."""
    folder = tmp_path_factory.mktemp('reproduce')
    options = ['--images=images', '--tables=tables']
    result = run_python(*REPRODUCE, *SMALL, *options, cwd=folder, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def whole_epochs(prefix):
    """Epochs whose .json, which is written last, is there."""
    return sorted(int(path.stem[-4:]) for path in prefix.parent.glob(f'{prefix.name}-[0-9]*.json'))


def table_rows(printed):
    return [line for line in printed.splitlines() if line.startswith('|')]


@pytest.mark.slow
def test_epochs_are_announced(finished):
    _, printed = finished
    assert re.match(r'2 runs, 2 epochs, [12] side by side: less than two minutes\n', printed)


@pytest.mark.slow
def test_table_has_measurements(finished):
    folder, printed = finished
    digits = data.load_digits('mnist-5k')
    for name in ('ring-softmax', 'ring-joint'):
        prefix = str(folder / 'reproduction-mnist-5k' / 'seed-0' / name)
        embeddings, logits = embed(prefix, 1, digits.val_images)
        accuracy = np.mean(logits.argmax(axis=1) == digits.val_labels)
        clusters = cluster_statistics(embeddings, digits.val_labels)
        options = f' | `{experiments.RUNS[name]}` | '
        (row,) = (row for row in table_rows(printed) if options in row)
        forms = ('{:.2%}', '{:.3f}', '{:.3f}', '{:.4f}')
        cells = [form.format(x) for form, x in zip(forms, (accuracy, *clusters), strict=True)]
        assert row.split(' | ')[2:6] == cells
        record = json.loads(Path(f'{prefix}.json').read_text())
        assert record['result']['course'] == [pytest.approx(accuracy, abs=1e-6)]
        assert f'--save-model-prefix={name}' in record['command']
        wrong = logits.argmax(axis=1) != digits.val_labels
        assert sum(record['result']['confusions'].values()) == wrong.sum()
        assert np.shape(record['result']['centers']) == (10, 2)


@pytest.mark.slow
def test_table_is_written(finished):
    """In a file that the printed table can be made of, without a path of this machine."""
    folder, printed = finished
    text = (folder / 'tables' / 'ring-mnist-5k.json').read_text()
    table = json.loads(text)
    assert render(table) in printed
    assert table['rows'][0]['runs'][0]['seed'] == 0
    (made_by,) = table['made_by']
    assert made_by['mxnet'] == '1.9.1' and made_by['processor']
    assert table['command'] == (
        'python -m tools.reproduce --only ring --dataset=mnist-5k --seeds=1 --num-epochs=1 '
        '--num-examples=500'
    )
    assert str(folder) not in text


@pytest.mark.slow
def test_pictures_are_drawn(finished):
    folder, printed = finished
    assert [path.name for path in (folder / 'images').iterdir()] == ['ring-mnist-5k.png']
    assert re.search(PICTURE, printed, re.MULTILINE)


@pytest.mark.slow
def test_finished_runs_are_skipped(finished, monkeypatch, capsys):
    folder, printed = finished
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('seed-0/*')}
    reproduce.main(SMALL)
    assert table_rows(capsys.readouterr().out) == table_rows(printed)
    with pytest.raises(InputError, match='is of another command'):
        reproduce.main([*SMALL, '--num-examples=400'])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('seed-0/*')} == before


@pytest.mark.slow
def test_stopped_program_continues(in_own_folder, monkeypatch):
    monkeypatch.setattr(runs, 'estimate', lambda *arguments: 0)  # of the second start
    names = experiments.PARTS['ring'].runs()
    prefixes = {name: in_own_folder / 'reproduction-mnist-5k' / 'seed-0' / name for name in names}
    process = subprocess.Popen(
        [sys.executable, *REPRODUCE, *SMALL, '--jobs=2', '--num-epochs=500'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    with process:
        seen = set()
        deadline = time.monotonic() + 120
        while len(seen) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
            seen = {name for name, prefix in prefixes.items() if whole_epochs(prefix)}
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    done = {name: whole_epochs(prefix)[-1] for name, prefix in prefixes.items()}
    num_epochs = max(done.values()) + 1
    for prefix in prefixes.values():  # both were under way, and have less of it left now
        record = Path(f'{prefix}.json')
        text = record.read_text()
        assert 'result' not in json.loads(text)
        record.write_text(text.replace('--num-epochs=500', f'--num-epochs={num_epochs}'))
    reproduce.main([*SMALL, '--jobs=2', f'--num-epochs={num_epochs}'])
    for name, prefix in prefixes.items():
        log = Path(f'{prefix}.txt').read_text()
        assert f'resuming from {name}-{done[name]:04d}.params' in log
        record = json.loads(Path(f'{prefix}.json').read_text())
        assert len(record['result']['course']) == num_epochs
        assert Checkpoints(prefix).epochs() == [num_epochs]


def test_neighbors():
    corners = [(0, 0), (4, 0), (4, 3), (0, 3)]
    assert arrangement.neighbors([*corners, (2, 1)]) == {
        *((0, 1), (1, 2), (2, 3), (0, 3)),
        *((corner, 4) for corner in range(4)),
    }
    for unfit in ([(0, 0), (1, 1)], [(0, 0), (1, 1), (2, 2)], [(0, 0)] * 3):
        with pytest.raises(InputError, match='no Delaunay triangulation'):
            arrangement.neighbors(unfit)


def test_share_between_neighbors():
    labels, predicted = np.array([0, 2, 1, 3, 4, 0, 4]), np.array([2, 0, 3, 3, 0, 0, 1])
    confused = arrangement.confusions(labels, predicted)
    assert confused == {'0-2': 2, '0-4': 1, '1-3': 1, '1-4': 1}
    square = [(0, 0), (4, 0), (4, 3), (0, 3), (2, 1)]
    assert arrangement.share_between_neighbors(square, confused) == 2 / 5
    assert arrangement.confusions(labels, labels) == {}
    with pytest.raises(InputError, match='the reference runs have no confusions'):
        arrangement.share_between_neighbors(square, {})


@pytest.mark.slow
def test_arrangements_are_drawn():
    digits = data.load_digits('mnist-5k')
    few = digits._replace(val_images=digits.val_images[::5], val_labels=digits.val_labels[::5])
    prefixes = [TRAINED.with_name(name) for name in ('center_loss', 'softmax')]
    with picture_style():
        figure = arrangement.draw_arrangements(prefixes, ['seed 0', 'seed 1'], [0.25, 0.5], few)
    for ax, prefix, share in zip(figure.axes, prefixes, ('25.0%', '50.0%'), strict=True):
        edges = len(arrangement.neighbors(Embedder(prefix).centers))
        (drawn, _) = ax.get_lines()  # edges, and no markers
        assert np.isfinite(drawn.get_xdata()).sum() == 2 * edges
        texts = [text.get_text() for text in ax.texts]
        assert any(
            f'{share} of the reference confusions are between neighbors' in text for text in texts
        )
    assert [ax.get_title()[:6] for ax in figure.axes] == ['seed 0', 'seed 1']


def test_arrangement_table(tmp_path, monkeypatch):
    """Shares are of the confusions of all reference runs; a run that diverged has none."""
    square = [[0, 0], [4, 0], [4, 3], [0, 3], [2, 1]]
    made_by = {'processor': 'X'}
    found = {
        'dim-10': {'accuracy': 0.99, 'confusions': {'0-2': 3, '0-1': 1}, 'made_by': made_by},
        'softmax': {'failure': 'training diverged: NaN; continue with: python /home/x/train.py'},
    }

    def result(run):
        others = {'accuracy': 0.98, 'centers': square, 'made_by': made_by}
        return found.get(run.name, others)

    monkeypatch.setattr(runs.Run, 'result', result)
    options = {'num_epochs': 20, 'num_examples': 60000, 'options': '', 'data_dir': None}
    args = SimpleNamespace(work=tmp_path, dataset='mnist', **options)
    names = experiments.PARTS['arrangement'].runs()
    both = {name: [runs.Run(name, seed, args) for seed in range(2)] for name in names}
    table = reproduce.make_table('arrangement', both, args, [])
    assert table['reference']['confusions'] == {'0-2': 6, '0-1': 2}
    assert table['reference']['seeds'] == [0, 1]
    diverged, *others = table['rows']
    assert diverged['runs'][0] == {'seed': 0, 'failure': 'training diverged: NaN'}
    assert all(run['share'] == 2 / 8 for row in others for run in row['runs'])
    assert table['made_by'] == [made_by]
    assert 'centers' not in others[0]['runs'][0]


def test_duration():
    texts = {50: 'less than two minutes', 3000: 'about 50 min', 18500: 'about 5 h 10 min'}
    for seconds, text in {**texts, 7100: 'about 2 h'}.items():
        assert runs.duration(seconds) == text


def made_up_run(epochs_left, network='lenet', classes=None):
    """What ``estimate`` asks a run."""
    options = ['--dataset=mnist-5k', f'--network={network}']
    options += [f'--classes={classes}'] if classes else []
    args = train.parse_args(options)
    return SimpleNamespace(options=args, epochs_left=lambda: epochs_left)


def test_batch_larger_than_what_is_measured(monkeypatch):
    monkeypatch.setattr(runs, 'run_python', lambda *arguments, **_: arguments[-1][-6:-2])
    run = made_up_run(1)
    run.options.batch_size, run.options.num_examples = 60000, None
    monkeypatch.setattr(runs, 'steps_per_epoch', lambda *arguments, **_: 1)
    assert runs.estimate([run], 1, 1) == 4000 * 60000 / 4000


def test_estimate(monkeypatch):
    """Steps of each network are measured once for each job; those of finished epochs are left."""
    measured = []

    def run_python(*arguments, **environment):
        measured.append((arguments[-1], environment))
        return '0.5\n' if "'lenet'," in arguments[-1] else '5\n'

    monkeypatch.setattr(runs, 'run_python', run_python)
    both = [made_up_run(left) for left in (1, 3)]
    # 4,000 images to train on and 1,000 to validate on: 40 steps, and 10 at a third of the cost
    epoch = (40 + 10 / 3) * 0.5
    assert runs.estimate(both, jobs=2, threads=1) == pytest.approx(3 * epoch)  # the longest one
    assert len(measured) == 2 and measured[0][1] == {'OMP_NUM_THREADS': '1'}
    assert runs.estimate(both, jobs=1, threads=1) == pytest.approx(4 * epoch)
    assert runs.estimate([made_up_run(0)], jobs=1, threads=1) == 0
    mixed = [made_up_run(1), made_up_run(1, 'lenet++')]
    assert runs.estimate(mixed, jobs=1, threads=1) == pytest.approx(11 * epoch)
    seen = runs.estimate([made_up_run(1, classes='0,1')], jobs=1, threads=1)
    assert 0 < seen < epoch / 3


def test_runs_are_in_parts():
    named = {name for part in experiments.PARTS.values() for name in part.runs()}
    assert named == experiments.RUNS.keys()
    for part in experiments.PARTS.values():
        assert {row for pair in part.compare for row in pair} <= part.rows.keys()
        assert part.kind in KINDS


@pytest.mark.parametrize('dataset', ['mnist', 'fashion-mnist', 'mnist-5k'])
def test_parts_by_dataset(dataset, in_own_folder, monkeypatch):
    """Each has the runs of its tables, and no other."""
    started = {}

    def train_none(unfinished, jobs):
        started.update({run.name: run.options for run in unfinished})
        raise InputError('enough')

    monkeypatch.setattr(reproduce, 'train_all', train_none)
    with pytest.raises(InputError, match='enough'):
        reproduce.main([f'--dataset={dataset}', '--num-epochs=3'])
    fashion = {'lenet++', 'lenet++-128', 'open-set-6'}
    parts = {'fashion-mnist': fashion, 'mnist-5k': {'lambda', 'alpha'}}.get(
        dataset, {*experiments.PARTS} - {'lenet++-128'}
    )
    assert started.keys() == {name for part in parts for name in experiments.PARTS[part].runs()}
    for name, options in started.items():  # those of a run win over those of all of them
        plus_plus = name.startswith(('lenet++', 'paper'))
        assert options.batch_size == (64 if plus_plus else 128)
        given = {'longer': 20, 'lenet++': 6, 'paper': 6}
        assert options.num_epochs == given.get(name.partition('-')[0], 3)


def run_args(folder, **options):
    """What a ``Run`` needs of the command line."""
    defaults = {'dataset': 'mnist-5k', 'data_dir': None, 'num_epochs': None, 'num_examples': None}
    return argparse.Namespace(**{'work': folder, **defaults, 'options': '', **options})


def test_command_of_a_run(tmp_path):
    """The animated one keeps all checkpoints; the data are found from any folder."""
    args = run_args(tmp_path, data_dir=Path('own'))
    commands = {
        (name, seed): runs.Run(name, seed, args).command
        for name in (experiments.ANIMATED, 'softmax')
        for seed in (0, 1)
    }
    keep_all = [key for key, line in commands.items() if '--keep-checkpoints=1' not in line]
    assert keep_all == [(experiments.ANIMATED, 0)]
    assert all(f'--data-dir={Path("own").absolute()}' in line for line in commands.values())


def test_run_that_fails(tmp_path, monkeypatch):
    """One that diverged is a result, anything else stops the program."""
    monkeypatch.setattr(runs, 'ROOT', tmp_path)
    run = runs.Run('softmax', 0, run_args(tmp_path))
    script = 'import sys; sys.exit("train.py: error: {}")'
    (tmp_path / 'train.py').write_text(script.format('training diverged: x is nan'))
    assert run.train(None, 1) == 'training diverged: x is nan'
    (tmp_path / 'train.py').write_text(script.format('no space'))
    with pytest.raises(Failure, match='softmax, seed-0: no space'):
        run.train(None, 1)


def test_jobs_share_the_processors(monkeypatch):
    threads_of_runs = []

    def made_up():
        return SimpleNamespace(
            options=SimpleNamespace(num_epochs=1),
            epochs_left=lambda: 1,
            train=lambda progress, threads: threads_of_runs.append(threads),
            measure=dict,
            write=lambda result: None,
        )

    monkeypatch.setattr(runs, 'available_cpus', lambda: 8)
    monkeypatch.setattr(runs, 'THREADS_CHOSEN_BY_USER', False)
    monkeypatch.setattr(runs, 'estimate', lambda *arguments: 0)
    runs.train_all([made_up() for _ in range(3)], 2)
    runs.train_all([made_up() for _ in range(2)], 5)  # no more jobs than runs
    assert threads_of_runs == [4] * 5


def test_values_have_their_names(in_own_folder, monkeypatch):
    """Those of unseen classes too, and of the seconds the median."""
    measured = Evaluation(
        embeddings=np.zeros((5, 2), 'f'),
        predicted=np.array([0, 1, 1, 0, 0]),
        seen=(0, 1),
        num_classified=4,
        accuracy=0.5,
        clusters=ClusterStatistics(1, 2, 3),
        verification={'Euclidean': Verification(0.9, 0.8), 'cosine': Verification(0.7, 0.6)},
    )
    digits = SimpleNamespace(val_images=None, val_labels=np.array([0, 0, 1, 1, 2]))
    centers = SimpleNamespace(centers=np.zeros((2, 2)))
    monkeypatch.setattr(runs, 'evaluate', lambda *arguments: measured)
    monkeypatch.setattr(runs, 'load_digits', lambda *arguments: digits)
    monkeypatch.setattr(runs, 'Embedder', lambda *arguments: centers)
    run = runs.Run('open-set-0-2-1', 0, run_args(in_own_folder))
    run.folder.mkdir()
    lines = [f'x Epoch[{epoch}] Validation-accuracy=0.{epoch + 1}' for epoch in range(8)]
    lines += [f'x Epoch[0] Time cost={seconds}' for seconds in (1, 9, 2)]
    lines += [f'x versions: {{"mxnet": "{version}"}}' for version in ('1.6.0', '1.9.1')]  # resumed
    run.log.write_text('\n'.join([*lines, '']))
    found = run.measure()
    expected = {'accuracy': 0.5, 'intra': 1, 'inter': 2, 'ratio': 3, 's/epoch': 2}
    expected |= {'AUC': 0.9, 'TA at 1% FA': 0.8, 'AUC (cosine)': 0.7, 'TA (cosine)': 0.6}
    assert {name: found[name] for name in runs.VALUES} == expected
    assert found['course'] == [(epoch + 1) / 10 for epoch in range(8)]
    assert found['confusions'] == {'0-1': 2}
    assert found['made_by']['mxnet'] == '1.9.1'


def test_splits_leave_four_classes_out():
    unseen = [{*range(10)} - {*map(int, seen.split(','))} for seen in experiments.SPLITS.values()]
    assert unseen == [{0, 1, 2, 3}, {3, 4, 5, 6}, {6, 7, 8, 9}]
    assert len(experiments.PARTS['open-set'].rows) == 6
    for names in experiments.PARTS['open-set'].rows.values():
        options = [experiments.RUNS[name].split(maxsplit=1) for name in names]
        assert [first for first, _ in options] == [
            f'--classes={seen}' for seen in experiments.SPLITS.values()
        ]
        assert len({others for _, others in options}) == 1


def test_options_parse():
    for options in experiments.RUNS.values():
        train.parse_args(options.split())
    for part, file, options in experiments.PICTURES:
        vis.parse_args(options)
        used = {option.removesuffix('.txt') for option in options if not option.startswith('--')}
        assert used <= {*experiments.PARTS[part].runs()}, file


def test_original_recipe_is_the_original():
    args = train.parse_args(experiments.RUNS['original'].split())
    assert (args.lr, args.initializer, args.batch_size) == (0.01, 'original', 128)
    assert args.center_loss_weight == 0.0078125
    softmax = train.parse_args(experiments.RUNS['original-softmax'].split())
    different = {name for name, value in vars(args).items() if value != getattr(softmax, name)}
    assert different == {'center_loss_weight'} and softmax.center_loss_weight == 0
