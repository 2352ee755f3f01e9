"""The programs of tools/: each one's help, and what they measure, in tiny runs."""

import json
from pathlib import Path
import re
import time

import numpy as np
import pytest

from common.environment import mx
from common.errors import Failure, InputError
from helpers import ROOT, run_python
from tools import (
    benchmark,
    benchmark_devices,
    benchmark_torch,
    many_classes,
    reproduce,
    torch_recipe,
)
from tools.measuring import Report, Training, TrainingProcess
from tools.operator_forms import with_operator
import train

PROGRAMS = sorted(
    path.stem for path in (ROOT / 'tools').glob('*.py') if 'def main(' in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize('name', PROGRAMS)
def test_help(name):
    result = run_python('-m', f'tools.{name}', '--help', cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f'usage: python -m tools.{name} ') and not result.stderr


def test_variants_are_interleaved():
    turns = []
    report = Report(max_rounds=3)
    seconds = report.interleave(
        lambda: turns.append('a'), lambda: (turns.append('b'), time.sleep(0.01)), rounds=9, times=2
    )
    assert ''.join(turns) == 'aabb' * 4  # the first round is not counted
    assert seconds.shape == (2, 3)
    assert np.all(seconds[1] >= 0.01) and seconds[0].min() < seconds[1].min()


def test_report_shows_quartiles():
    report = Report(max_rounds=1)
    report.add('one over the other', [1, 2, 3, 4, 5])
    report.add('fast', [12345.6], 'images/s')
    first, second = str(report).splitlines()[1:]
    assert re.fullmatch(r'one over the other +3\.00 x +2\.00 to 4\.00', first)
    assert re.fullmatch(r'fast +12,346 images/s', second)


def outputs_and_centers(network):
    """Outputs of a training forward, gradients of a step, and the centers after it."""
    mx.random.seed(0)
    module = Training(network, 32).module
    rng = np.random.default_rng(0)
    label = mx.nd.array(rng.integers(10, size=32))
    images = mx.nd.array(rng.random((32, 1, 28, 28)))
    module.forward_backward(mx.io.DataBatch([images], [label, label]))
    arrays = [output.asnumpy() for output in module.get_outputs()]
    mx.nd.waitall()
    gradient = module._exec_group.execs[0].grad_dict['embedding_weight']
    return [*arrays, gradient.asnumpy(), *(a.asnumpy() for a in module.get_params()[1].values())]


@pytest.mark.parametrize('op_type', ['centerloss_loop', 'centerloss_nd', 'centerloss_reduceat'])
def test_operator_forms_agree(op_type):
    network = train.get_symbol(vectorized=True, center_loss_weight=1)
    expected = outputs_and_centers(network)
    for one, other in zip(
        outputs_and_centers(with_operator(network, op_type)), expected, strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('options', [(False, True), (True, False)])
def test_network_variants_agree(options):
    variant = benchmark.network_variant(pairs=options[0], pooling_first=options[1])
    network = train.get_symbol(vectorized=True)
    assert sorted(variant.list_arguments()) == sorted(network.list_arguments())
    inputs = {'data': (2, 1, 28, 28)}
    parameters = dict(zip(network.list_arguments(), network.infer_shape(**inputs)[0], strict=True))
    rng = np.random.default_rng(0)
    values = {name: mx.nd.array(rng.normal(size=shape)) for name, shape in parameters.items()}
    results = []
    for symbol in (network, variant):
        logits = symbol.get_internals()['fc2_output']
        used = {name: values[name] for name in logits.list_arguments()}
        results.append(logits.bind(mx.cpu(), used).forward()[0].asnumpy())
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('part', ['average', 'tricks', 'loop', 'operator', 'overhead', 'start-up'])
def test_benchmark_part(part, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, 'OPERATOR_SHAPES', [(16, 2, 10)])
    benchmark.main([f'--part={part}', '--rounds=1'])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert rows and all(np.isfinite(row['median']) for row in rows)
    # A difference between the memory of two processes may come to less than its noise.
    assert all(row['median'] > 0 for row in rows if 'memory' not in row['what'])


@pytest.mark.slow
def test_benchmark_table(in_own_folder):
    options = ['--only', 'joint', '--rounds=1', '--json=table.json']
    result = run_python('-m', 'tools.benchmark', *options, cwd=in_own_folder, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert re.match(r'processor \d+ of .*, mxnet 1\.9\.1, instruction_set ', result.stdout)
    table = json.loads((in_own_folder / 'table.json').read_text())
    assert table['machine'].keys() >= {'processor', 'instruction_set', 'threads', 'mxnet'}
    assert all(row['what'] in result.stdout for row in table['rows'])


@pytest.mark.slow
def test_training_process_is_stopped_between():
    with TrainingProcess('tools.benchmark', '--train-on-request') as training:
        training()
        status = Path(f'/proc/{training.process.pid}/status')
        deadline = time.monotonic() + 10
        while 'stopped' not in status.read_text():
            assert time.monotonic() < deadline
        training()
    assert training.process.poll() is not None


def test_process_that_has_ended():
    with TrainingProcess('tools.no_such_tool') as training:
        training.process.wait(60)
        with pytest.raises(Failure, match='no_such_tool has failed'):
            training()


@pytest.mark.parametrize(
    'main, options, said',
    [
        (benchmark.main, ['--json=missing/table.json'], 'there is no folder missing'),
        (benchmark.main, ['--json=table.csv'], 'has to end in one of .json'),
        (benchmark.main, ['--data-dir=missing'], 'missing/train-images-idx3-ubyte: No such file'),
        (benchmark_torch.main, ['usual', '--shape', '1', '2', '3'], 'leave it out with usual'),
        (torch_recipe.main, ['--tables=missing'], 'there is no folder missing'),
        (reproduce.main, ['--tables=file'], 'cannot write to file: File exists'),
        (reproduce.main, ['--images=file/images'], 'cannot write to file/images: Not a directory'),
        (reproduce.main, ['--work=file'], 'cannot write to file: File exists'),
        (reproduce.main, ['--options="'], '--options=": No closing quotation'),
        (reproduce.main, [f'--work={"x" * 300}'], 'File name too long'),
    ],
)
def test_mistakes_are_told_before_work_begins(main, options, said, in_own_folder):
    Path('file').touch()
    with pytest.raises(InputError, match=said):
        main(options)


@pytest.mark.slow
def test_benchmark_torch():
    pytest.importorskip('torch')
    for form in benchmark_torch.FORMS:
        result = run_python('-m', 'tools.benchmark_torch', form, '--epochs=1', cwd=ROOT)
        assert float(result.stdout) > 0, result.stderr
    benchmark.measure_operator(Report(1), None)


def test_torch_recipe(tmp_path, capsys):
    pytest.importorskip('torch')
    torch_recipe.main(['--dataset=mnist-5k', '--num-epochs=2', f'--tables={tmp_path}'])
    first, second, *table = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r'epoch 1: [\d.]+ s, test accuracy [\d.]+%', first)
    (run,) = json.loads((tmp_path / 'pytorch.json').read_text())['rows'][0]['runs']
    assert len(run['course']) == 2
    assert 0.5 > run['course'][1] > 0.05  # a low rate: 64 steps are not enough
    assert second.endswith(f'{run["course"][1]:.2%}')
    command = 'python -m tools.torch_recipe --dataset=mnist-5k --seed=0 --num-epochs=2'
    assert table[0].startswith(f'Made by `{command}`.')


@pytest.mark.slow
def test_separate_centers_drift(capsys):
    benchmark_devices.measure_drift(num_devices=(2,), num_epochs=1)
    printed = capsys.readouterr().out
    apart = re.fullmatch(r'2 devices, epoch 1: copies up to (\S+) apart, .*\n', printed)[1]
    assert float(apart) > 0.01


@pytest.mark.slow
def test_cost_of_joining(capsys):
    benchmark_devices.measure_cost(['K=10, d=2'], batch_size=8, num_steps=10)
    assert re.match(r'K=10, d=2: \S+ ms with separate centers, ', capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize('options', [['--cpus=0,1'], ['--num-workers=2']])
def test_many_classes(options, in_own_folder):
    small = ['--num-classes=50', '--dim=8', '--num-batches=2', '--batch-size=16']
    result = run_python(
        '-m', 'tools.many_classes', *small, *options, cwd=in_own_folder, PYTHONPATH=str(ROOT)
    )
    assert result.returncode == 0, result.stderr
    assert 'centers of the checkpoint are those of the module: True' in result.stdout
    assert ('a step' in result.stdout) == (options == ['--cpus=0,1'])


def test_random_faces_repeat():
    faces = many_classes.RandomFaces(num_classes=9, dim=3, batch_size=4, num_batches=2, seed=0)
    first = [batch.data[0].asnumpy() for batch in faces]
    faces.reset()
    second = [batch.data[0].asnumpy() for batch in faces]
    assert len(first) == 2
    np.testing.assert_array_equal(first, second)
