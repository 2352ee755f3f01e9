"""What is chosen before MXNet is imported: the engine and the threads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tests'))

from test_train_model import assert_same_arrays  # noqa: E402

USUAL_ENGINE = {
    'MXNET_ENGINE_TYPE': 'ThreadedEnginePerDevice'
}  # what MXNet takes where nobody chooses
CHOSEN = ('MXNET_ENGINE_TYPE', 'OMP_NUM_THREADS', 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')


def python(*arguments, cwd=None, **environment):
    """``python ARGUMENTS`` with nothing in its environment of what is chosen, but ``environment``."""
    environment = {
        **{name: value for name, value in os.environ.items() if name not in CHOSEN},
        **environment,
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def program(text):
    """The arguments for python of a program that imports ``runtime`` first."""
    return (
        '-c',
        f'import os, sys, threading\nsys.path.insert(0, {str(ROOT)!r})\nimport runtime\n{text}',
    )


# Prints whether the operator in Python was called in the thread that asked for its result.
CALLS_BACK = """
import center_loss
threads, forward = [], center_loss.CenterLoss.forward
def noted(*arguments, **named):
    threads.append(threading.current_thread())
    forward(*arguments, **named)
center_loss.CenterLoss.forward = noted
network = runtime.mx.sym.Custom(data=runtime.mx.sym.var('data'), op_type='centerloss', name='loss', num_class=2)
network.simple_bind(runtime.mx.cpu(), data=(3, 2)).forward()[0].asnumpy()
print(runtime.SYNCHRONOUS, threads == [threading.main_thread()])
"""


@pytest.mark.parametrize(
    'arguments, synchronous',
    [((), True), (('--cpus=0,1',), True), (('--gpus=0',), False), (('--gpus', '0,1'), False)],
)
def test_without_a_gpu_every_operation_is_executed_by_the_thread_that_asks_for_it(
    arguments, synchronous
):
    result = python(*program(CALLS_BACK), *arguments)
    assert (result.stdout, result.stderr) == (f'{synchronous} {synchronous}\n', '')


def test_the_engine_and_the_threads_that_the_user_has_chosen_stay():
    assert python(*program(CALLS_BACK), **USUAL_ENGINE).stdout == 'False False\n'
    assert (
        python(*program('print(os.environ["OMP_NUM_THREADS"])'), OMP_NUM_THREADS='3').stdout
        == '3\n'
    )


def test_other_processes_choose_their_engine_for_themselves():
    assert python(*program('print(os.environ.get("MXNET_ENGINE_TYPE"))')).stdout == 'None\n'


def test_as_many_threads_as_this_process_may_use():
    result = python(
        '-c',
        'import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n'
        + program('print(os.environ["OMP_NUM_THREADS"])')[1],
    )
    assert result.stdout == '1\n'


def test_both_engines_learn_the_same(tmp_path):
    line = [
        '--dataset=mnist-5k',
        '--num-examples=640',
        '--batch-size=64',
        '--num-epochs=2',
        '--center-loss-weight=1',
    ]
    for name, environment in (('synchronous', {}), ('usual', USUAL_ENGINE)):
        python(ROOT / 'train.py', *line, f'--save-model-prefix={name}', cwd=tmp_path, **environment)
    assert_same_arrays(tmp_path / 'synchronous-0002.params', tmp_path / 'usual-0002.params')
    assert_same_arrays(tmp_path / 'synchronous-0002.states', tmp_path / 'usual-0002.states')
