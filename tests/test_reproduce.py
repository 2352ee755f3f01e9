"""The program of the documentation's results, in small: runs, tables, pictures, a second start."""

import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from common.checkpoints import Checkpoints
from common.errors import InputError
from common.evaluation import cluster_statistics, embed
import data
from helpers import ROOT, run_python
from tools import experiments, reproduce
import train
import vis

REPRODUCE = ['-m', 'tools.reproduce']
SMALL = ['--dataset=mnist-5k', '--num-epochs=1', '--num-examples=500', '--seeds=1', '--only=ring']
PICTURE = (
    r'^\$ python vis\.py --compare ring-softmax --model-prefix ring-joint '
    r'--output \S+/images/ring\.png --dataset=mnist-5k$'
)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Two finished runs: their folder and what was printed."""
    folder = tmp_path_factory.mktemp('reproduce')
    result = run_python(*REPRODUCE, *SMALL, '--images=images', cwd=folder, PYTHONPATH=str(ROOT))
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
    assert re.match(r'2 epochs to train in 2 runs, [12] side by side\n', printed)


@pytest.mark.slow
def test_table_has_measurements(finished):
    folder, printed = finished
    digits = data.load_digits('mnist-5k')
    for name in ('ring-softmax', 'ring-joint'):
        prefix = str(folder / 'reproduction' / 'seed-0' / name)
        embeddings, logits = embed(prefix, 1, digits.val_images)
        accuracy = np.mean(logits.argmax(axis=1) == digits.val_labels)
        clusters = cluster_statistics(embeddings, digits.val_labels)
        beginning = f'| `{experiments.RUNS[name]}` | 1 | '
        (row,) = (row for row in table_rows(printed) if row.startswith(beginning))
        forms = ('{:.2%}', '{:.3f}', '{:.3f}', '{:.4f}')
        cells = [form.format(x) for form, x in zip(forms, (accuracy, *clusters), strict=True)]
        assert row.split(' | ')[2:6] == cells
        record = json.loads(Path(f'{prefix}.json').read_text())
        assert record['result']['course'] == [pytest.approx(accuracy, abs=1e-6)]
        assert f'--save-model-prefix={name}' in record['command']


@pytest.mark.slow
def test_pictures_are_drawn(finished):
    folder, printed = finished
    assert [path.name for path in (folder / 'images').iterdir()] == ['ring.png']
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
def test_stopped_program_continues(in_own_folder):
    names = experiments.PARTS['ring']
    prefixes = {name: in_own_folder / 'reproduction' / 'seed-0' / name for name in names}
    process = subprocess.Popen(
        [sys.executable, *REPRODUCE, *SMALL, '--jobs=2', '--num-epochs=500'],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    with process:
        seen = set()
        while len(seen) < 2 and process.poll() is None:
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


def test_mean_and_deviation():
    columns = {'intra': 1.0, 'inter': 2.0, 'ratio': 0.5, 's/epoch': 3.0}
    found = [{'accuracy': accuracy, **columns} for accuracy in (0.98, 0.99, 0.985)]
    found.append({'failure': 'training diverged'})
    row = reproduce.table({'softmax': found}).splitlines()[-1]
    assert row == (
        '| `--center-loss-weight=0` | 4, 1 diverged | 98.50% ± 0.50 | 1.000 ± 0.000 | '
        '2.000 ± 0.000 | 0.5000 ± 0.0000 | 3.0 ± 0.0 |'
    )
    assert reproduce.table({'softmax': []}) == ''


def test_original_table():
    courses = [(0.768, 0.812, 0.917, 0.94), (0.784, 0.815, 0.915, 0.932)]
    rows = reproduce.original_table(courses).splitlines()[-4:]
    assert rows[0] == '| 1 | 77.6% | 76.8% to 78.4% | 79.9% |'
    assert rows[3] == '| 4 | 93.6% | 93.2% to 94.0% | 95.1% |'


def test_runs_are_in_parts():
    named = {name for part in experiments.PARTS.values() for name in part}
    assert named == experiments.RUNS.keys()


def test_options_parse():
    for options in experiments.RUNS.values():
        train.parse_args(options.split())
    for part, file, options in experiments.PICTURES:
        vis.parse_args(options)
        used = {option.removesuffix('.txt') for option in options if not option.startswith('--')}
        assert used <= set(experiments.PARTS[part]), file


def test_original_recipe_is_the_original():
    args = train.parse_args(experiments.RUNS['original'].split())
    assert (args.lr, args.initializer, args.batch_size) == (0.01, 'original', 128)
    assert args.center_loss_weight == 0.0078125
    assert args.num_epochs == len(reproduce.ORIGINAL_COURSE)
