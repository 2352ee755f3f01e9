"""The programme of the README's results, in small: runs, table, pictures, and what a second start does."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import data
import reproduce
import vis
from runtime import run_script

SMALL = ['--dataset', 'mnist-5k', '--num-epochs', '1', '--num-examples', '500', '--seeds', '1']


@pytest.fixture(scope='module')
def programme(tmp_path_factory):
    """Two runs, finished: their folder and what was told."""
    folder = tmp_path_factory.mktemp('programme')
    result = subprocess.run(
        [sys.executable, reproduce.__file__, *SMALL, '--only', 'ring', '--images', 'images'],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_table_has_what_was_measured(programme):
    folder, result = programme
    digits = data.load_digits('mnist-5k')
    for name in ('ring-softmax', 'ring-joint'):
        embeddings, logits = vis.embed(
            str(folder / 'reproduction' / 'seed-0' / name), 1, digits.val_images
        )
        measured = [
            np.mean(logits.argmax(axis=1) == digits.val_labels),
            *vis.cluster_statistics(embeddings, digits.val_labels),
        ]
        (row,) = (
            line
            for line in result.stdout.splitlines()
            if line.startswith(f'| `{reproduce.RUNS[name]}` | 1 | ')
        )
        assert row.split(' | ')[2:6] == [
            form.format(value)
            for form, value in zip(('{:.2%}', '{:.3f}', '{:.3f}', '{:.4f}'), measured)
        ]
    assert '1 epochs' in result.stdout and '--num-examples=500' in result.stdout


def test_the_pictures_are_drawn_by_the_commands_that_are_shown(programme):
    folder, result = programme
    assert [path.name for path in (folder / 'images').iterdir()] == ['ring.png']
    assert re.search(
        r'^\$ python vis\.py --compare ring-softmax --model-prefix ring-joint --output \S+/images/ring\.png --dataset=mnist-5k$',
        result.stdout,
        re.MULTILINE,
    )


def test_finished_runs_are_not_repeated_and_another_programme_does_not_mix(
    programme, monkeypatch, capsys
):
    folder, result = programme
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('seed-0/*')}
    monkeypatch.setattr(sys, 'argv', ['reproduce.py', *SMALL, '--only', 'ring'])
    reproduce.main()
    told = [line for line in result.stdout.splitlines() if line.startswith('|')]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith('|')] == told
    monkeypatch.setattr(
        sys, 'argv', ['reproduce.py', *SMALL, '--only', 'ring', '--num-examples', '400']
    )
    with pytest.raises(SystemExit) as leave:
        run_script(reproduce.main)
    assert leave.value.code == 2 and 'is of another command' in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('seed-0/*')} == before


def test_a_stopped_programme_goes_on_where_it_was(tmp_path, monkeypatch):
    line = [
        '--dataset',
        'mnist-5k',
        '--num-examples',
        '500',
        '--seeds',
        '1',
        '--only',
        'ring',
        '--jobs',
        '2',
    ]
    process = subprocess.Popen(
        [sys.executable, reproduce.__file__, *line, '--num-epochs', '60'],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / 'reproduction' / 'seed-0'
    names = reproduce.PARTS['ring']
    deadline = time.monotonic() + 60
    while (
        not all((folder / f'{name}-0001.params').exists() for name in names)
        and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    process.stderr.close()
    done = {
        name: max(int(path.stem[-4:]) for path in folder.glob(f'{name}-*.params')) for name in names
    }
    num_epochs = max(done.values()) + 1
    for name in names:  # both were on their way, and have less of it left now
        record = json.loads((folder / f'{name}.json').read_text())
        assert 'result' not in record
        record['command'] = [
            option.replace('--num-epochs=60', f'--num-epochs={num_epochs}')
            for option in record['command']
        ]
        (folder / f'{name}.json').write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['reproduce.py', *line, '--num-epochs', str(num_epochs)])
    reproduce.main()
    for name in names:
        log = (folder / f'{name}.txt').read_text()
        assert f'resuming from {name}-{done[name]:04d}.params' in log
        assert [
            int(epoch) for epoch in re.findall(r'Epoch\[(\d+)\] Validation-accuracy', log)
        ] == list(range(num_epochs))
        assert json.loads((folder / f'{name}.json').read_text())['result'].keys() == {
            'accuracy',
            'intra',
            'inter',
            'ratio',
            's/epoch',
        }
    assert {path.name for path in folder.glob('*.params')} == {
        f'{name}-{num_epochs:04d}.params' for name in names
    } and not list(folder.glob('*.states'))


def test_means_and_spreads_over_the_seeds():
    columns = {'intra': 1.0, 'inter': 2.0, 'ratio': 0.5, 's/epoch': 3.0}
    found = [{'accuracy': accuracy, **columns} for accuracy in (0.98, 0.99, 0.985)]
    row = reproduce.table({'softmax': [*found, {'failure': 'training diverged'}]}).splitlines()[-1]
    assert (
        row
        == '| `--center-loss-weight=0` | 4, 1 diverged | 98.50% ± 0.50 | 1.000 ± 0.000 | 2.000 ± 0.000 | 0.5000 ± 0.0000 | 3.0 ± 0.0 |'
    )
    assert reproduce.table({'softmax': []}) == ''


def test_every_run_belongs_to_a_part_and_has_a_command_that_train_takes():
    import train

    assert {name for part in reproduce.PARTS.values() for name in part} == reproduce.RUNS.keys()
    for options in reproduce.RUNS.values():
        train.parse_args(options.split())
    for part, file, options in reproduce.PICTURES:
        vis.parse_args(options)
        used = {option.removesuffix('.txt') for option in options if not option.startswith('--')}
        assert used <= set(reproduce.PARTS[part]), file
