"""What is set before MXNet is imported, and what happens at exit."""

import os
import re

import pytest

import common.environment
from common.environment import available_cpus
from common import versions
from helpers import ROOT, run_python

CHOSEN = ('MXNET_ENGINE_TYPE', 'OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'DMLC_ROLE')


# What the set-up needs of MXNet, whose import takes two seconds.
STUB = """
import sys, types
mx = sys.modules['mxnet'] = types.ModuleType('mxnet')
mx.nd, mx.MXNetError = types.SimpleNamespace(waitall=lambda: print('waited')), RuntimeError
"""


def run_program(text, stub=True, **environment):
    """Run a program with nothing chosen but what is given; return the words that it prints."""
    program = f'import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n{STUB * stub}\n{text}'
    result = run_python('-c', program, unset=CHOSEN, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def chosen(**environment):
    """The variables that a program finds set, in the order of CHOSEN."""
    text = f'import common.environment\nprint(*(os.environ.get(name) for name in {CHOSEN}))'
    return run_program(text, **environment)[:-1]


def test_threads():
    """One process uses all processors, and its threads spin; several share the machine."""
    cpus = str(available_cpus())
    assert chosen() == ['None', cpus, 'active', '3000', 'None']
    assert chosen(DMLC_ROLE='worker') == ['None', cpus, 'passive', '0', 'worker']
    assert chosen(DMLC_ROLE='server') == ['None', '1', 'passive', '0', 'server']


def test_choice_of_the_user_stays():
    assert chosen(OMP_NUM_THREADS='3') == ['None', '3', 'None', 'None', 'None']
    assert chosen(OMP_WAIT_POLICY='passive')[2:4] == ['passive', 'None']
    assert chosen(GOMP_SPINCOUNT='7')[3] == '7'
    for engine in ('NaiveEngine', 'ThreadedEngine'):
        assert chosen(MXNET_ENGINE_TYPE=engine)[0] == engine


@pytest.mark.slow
def test_role_does_not_start_in_the_import():
    """MXNet's own import in a process of that role does not return."""
    text = 'from common.environment import ROLE, mx\nprint(ROLE, os.environ["DMLC_ROLE"])'
    assert run_program(text, stub=False, DMLC_ROLE='scheduler') == ['scheduler', 'scheduler']


def test_role():
    text = 'from common.environment import ROLE, THREADS_CHOSEN_BY_USER as chosen'
    text += '\nprint(ROLE, chosen, os.environ["MXNET_UPDATE_ON_KVSTORE"])'
    assert run_program(text) == ['None', 'False', '0', 'waited']
    environment = {'DMLC_ROLE': 'server', 'OMP_NUM_THREADS': '1'}
    assert run_program(text, **environment) == ['server', 'True', '0', 'waited']


def test_affinity_counts():
    text = """
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import common.environment
print(os.environ['OMP_NUM_THREADS'])
"""
    assert run_program(text)[0] == '1'


@pytest.mark.parametrize(
    'files, expected',
    [
        ({'/sys/fs/cgroup/cpu.max': '300000 100000'}, 3),
        ({'/sys/fs/cgroup/cpu.max': '50000 100000'}, 1),
        ({'/sys/fs/cgroup/cpu.max': 'max 100000'}, 8),
        (
            {
                '/sys/fs/cgroup/cpu/cpu.cfs_quota_us': '250000',
                '/sys/fs/cgroup/cpu/cpu.cfs_period_us': '100000',
            },
            2,
        ),
        (
            {
                '/sys/fs/cgroup/cpu/cpu.cfs_quota_us': '-1',
                '/sys/fs/cgroup/cpu/cpu.cfs_period_us': '100000',
            },
            8,
        ),
        ({}, 8),
    ],
)
def test_quota_of_a_container_counts(files, expected, monkeypatch):
    def read_text(path):
        try:
            return files[str(path)]
        except KeyError:
            raise FileNotFoundError(path) from None

    monkeypatch.setattr(common.environment.Path, 'read_text', read_text)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)))
    assert available_cpus() == expected


def test_package_that_is_missing():
    program = "import sys; sys.modules['mxnet'] = None; import common.environment"
    result = run_python('-c', program, cwd=ROOT)
    assert result.returncode == 2
    assert re.fullmatch(
        r'-c: error: .*mxnet.*: pip install -r requirements.txt, in the environment of \S+\n',
        result.stderr,
    )


def test_aliases_of_numpy():
    text = """
from common.environment import mx
import numpy as np
print(*(vars(np).get(kind.__name__) is kind for kind in (bool, int, float, object)))
"""
    assert run_program(text) == [*['True'] * 4, 'waited']


@pytest.mark.slow
@pytest.mark.parametrize('engine', ['ThreadedEnginePerDevice', 'ThreadedEngine', 'NaiveEngine'])
def test_exit_waits_for_operators(engine):
    """Of many center losses, the last are still running when the program ends."""
    text = """
from common.environment import mx
import center_loss
x, centers = mx.nd.ones((500, 20)), mx.nd.zeros((3, 20))
for step in range(300):
    with mx.autograd.record():
        mx.nd.Custom(x, mx.nd.full(500, step % 3), centers, op_type='centerloss', num_class=3)
print('end')
"""
    assert run_program(text, stub=False, MXNET_ENGINE_TYPE=engine) == ['end']


def test_versions_with_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    """An editor's lock is a dangling link beside the script that is being edited."""
    (tmp_path / 'common').mkdir()
    (tmp_path / 'script.py').write_text('1')
    monkeypatch.setattr(versions, '__file__', str(tmp_path / 'common' / 'versions.py'))
    before = versions.versions.__wrapped__()
    (tmp_path / '.#script.py').symlink_to('someone@somewhere.1')
    (tmp_path / 'folder.py').mkdir()
    assert versions.versions.__wrapped__() == before
    (tmp_path / 'script.py').write_text('2')
    assert versions.versions.__wrapped__() != before
