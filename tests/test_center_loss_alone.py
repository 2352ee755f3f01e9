"""center_loss.py alone in an empty folder, in fresh processes, under each of MXNet's engines."""

import ast
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / 'center_loss.py'
READS = int(os.environ.get('STALE_READS', 100))  # of centers, in each way of training
FITS = int(os.environ.get('STALE_FITS', 10))
every_engine = pytest.mark.parametrize(
    'engine',
    [
        'ThreadedEnginePerDevice',
        pytest.param('ThreadedEngine', marks=pytest.mark.slow),
        pytest.param('NaiveEngine', marks=pytest.mark.slow),
    ],
)

# The lines that the docstring gives to paste.
ALIASES = '\n'.join(
    line.strip()
    for line in ast.get_docstring(ast.parse(MODULE.read_text())).splitlines()
    if line.strip() == 'import numpy as np' or line.strip().startswith('np.bool')
)
PRELUDE = f"""
{ALIASES}
import atexit, os, signal, sys, warnings
import mxnet as mx
from mxnet import autograd, gluon
"""
USE = """
x = mx.nd.ones((4, 2))
x.attach_grad()
y = mx.nd.zeros(4)
def use():
    import center_loss
    center = center_loss.CenterLossBlock(3, 2)
    center.initialize()
    with autograd.record():
        loss = center(x, y)
    loss.backward()
    assert loss.asnumpy().tolist() == [1, 1, 1, 1] and x.grad.asnumpy().all()
    metric = center_loss.CenterLossMetric()
    metric.update([y], [loss])
    assert metric.get()[1] == 1
"""
NETWORK = """
import numpy as np
import center_loss
rng = np.random.default_rng(0)
def batch(size=128):
    return mx.nd.array(rng.normal(size=(size, 20))), mx.nd.array(rng.integers(0, 100, size))
def network():
    data = mx.sym.var('data')
    hidden = mx.sym.FullyConnected(data, num_hidden=64, name='hidden')
    embedding = mx.sym.FullyConnected(mx.sym.tanh(hidden), num_hidden=256, name='embedding')
    logits = mx.sym.FullyConnected(embedding, num_hidden=100, name='fc')
    return mx.sym.Group([
        mx.sym.SoftmaxOutput(logits, mx.sym.var('softmax_label'), name='softmax'),
        mx.sym.Custom(data=embedding, label=mx.sym.var('center_label'), op_type='centerloss',
                      name='center_loss', num_class=100, scale=0.1, normalization='null')])
labels = ['softmax_label', 'center_label']
"""


@pytest.fixture
def run(tmp_path):
    """Run a program in a folder that holds nothing but center_loss.py; return what it prints."""
    shutil.copy(MODULE, tmp_path)

    def run(program, engine='ThreadedEnginePerDevice', timeout=300):
        ours = ('OMP_', 'GOMP_', 'MXNET_', 'DMLC_', 'PYTHON')
        environ = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        environ.update(MXNET_ENGINE_TYPE=engine, PYTHONWARNINGS='ignore')
        end = 'mx.nd.waitall()'
        if engine == 'ThreadedEngine':
            # At exit its threads may abort while they free operators that are written in Python:
            # 212 of 300 programs with a Module and a plain operator did. See the docstring.
            end += '; sys.stdout.flush(); os._exit(0)'
        (tmp_path / 'program.py').write_text(f'{program}\n{end}\n')
        done = subprocess.run(
            [sys.executable, 'program.py'],
            cwd=tmp_path,
            env=environ,
            timeout=timeout,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


@every_engine
@pytest.mark.parametrize('used', [False, True], ids=['fresh', 'used'])
def test_host_is_unchanged(run, engine, used):
    run(
        PRELUDE
        + USE
        + f"""
if {used}:
    (x + 1).asnumpy()
def state():
    return {{
        'environment': dict(os.environ),
        'warnings': list(warnings.filters),
        'numpy': {{name: id(value) for name, value in vars(np).items()}},
        'floating-point errors': np.geterr(),
        'exit hooks': atexit._ncallbacks(),
        'signals': {{number: signal.getsignal(number) for number in signal.valid_signals()}},
        'path': list(sys.path),
        'streams': (sys.stdout, sys.stderr),
    }}
before, modules = state(), set(sys.modules)
import center_loss
assert state() == before
assert set(sys.modules) - modules == {{'center_loss'}}
use()
after = state()
for key in before:
    assert after[key] == before[key], (key, before[key], after[key])
""",
        engine,
    )


LOADER = """
data = gluon.data.ArrayDataset(np.ones((10, 2), 'float32'), np.zeros(10, 'int64'))
def load(**options):
    loader = gluon.data.DataLoader(data, batch_size=4, num_workers=2, **options)
    assert [len(x) for x, y in loader] == [4, 4, 2]
"""


@every_engine
def test_forked_workers_answer(run, engine):
    """As in plain MXNet, after an operation and with this file imported."""
    run(
        PRELUDE
        + LOADER
        + """
import multiprocessing
import center_loss
(mx.nd.ones((4, 2)) + 1).asnumpy()
with multiprocessing.Pool(2) as pool:
    assert pool.map(abs, [-1, 2, -3]) == [1, 2, 3]
load()
""",
        engine,
        timeout=100,
    )


@pytest.mark.slow
@every_engine
def test_forked_workers_answer_after_a_step(run, engine):
    """Once MXNet is done with the operators, as the docstring says: waitall, Gluon's freed too."""
    run(
        PRELUDE
        + NETWORK
        + USE
        + LOADER
        + """
import multiprocessing, time
def fork():
    with multiprocessing.Pool(2) as pool:
        assert pool.map(abs, [-1, 2, -3]) == [1, 2, 3]
    load()
images, classes = batch()
module = mx.mod.Module(network(), label_names=labels)
module.bind([('data', (128, 20))], [(name, (128,)) for name in labels])
module.init_params()
module.init_optimizer()
module.forward_backward(mx.io.DataBatch([images], [classes, classes]))
module.update()
mx.nd.waitall()
fork()
use()
mx.nd.waitall()
time.sleep(1)
fork()
""",
        engine,
        timeout=100,
    )


@every_engine
def test_threaded_workers_answer(run, engine):
    """Forking is MXNet's own problem once any operator in Python has run; threads are not."""
    run(PRELUDE + USE + LOADER + 'use()\nload(thread_pool=True)\nuse()\n', engine, timeout=100)


@every_engine
def test_module_reads_moved_centers(run, engine):
    run(
        PRELUDE
        + NETWORK
        + f"""
module = mx.mod.Module(network(), label_names=labels)
module.bind([('data', (128, 20))], [(name, (128,)) for name in labels])
module.init_params(mx.init.Xavier())
module.init_optimizer()
metric = center_loss.CenterLossMetric()
stale = 0
for _ in range({READS}):
    x, y = batch()
    module.forward_backward(mx.io.DataBatch([x], [y, y]))
    module.update()
    module.update_metric(metric, [y, y])
    first = module.get_params()[1]['center_loss_center_bias'].asnumpy()
    mx.nd.waitall()
    module._params_dirty = True
    second = module.get_params()[1]['center_loss_center_bias'].asnumpy()
    stale += not np.array_equal(first, second)
print(stale, 'of', {READS})
assert not stale
""",
        engine,
    )


@every_engine
@pytest.mark.parametrize('hybridize', [False, True])
def test_gluon_reads_moved_centers(run, engine, hybridize):
    run(
        PRELUDE
        + NETWORK
        + f"""
embed, classify = gluon.nn.HybridSequential(), gluon.nn.Dense(100)
embed.add(gluon.nn.Dense(64, activation='tanh'), gluon.nn.Dense(256))
ce, center = gluon.loss.SoftmaxCrossEntropyLoss(), center_loss.CenterLossBlock(100, 256)
model = gluon.nn.HybridSequential()
model.add(embed, classify, center)
model.initialize()
model.hybridize({hybridize})
trainer = gluon.Trainer(model.collect_params(), 'sgd')
stale = 0
for _ in range({READS}):
    x, y = batch()
    with autograd.record():
        embedding = embed(x)
        loss = ce(classify(embedding), y) + 0.1 * center(embedding, y)
    loss.backward()
    trainer.step(len(x))
    loss.asnumpy()
    first = center.centers.data().asnumpy()
    mx.nd.waitall()
    stale += not np.array_equal(first, center.centers.data().asnumpy())
print(stale, 'of', {READS})
assert not stale
""",
        engine,
    )


@pytest.mark.slow
@every_engine
def test_fit_saves_moved_centers(run, engine):
    run(
        PRELUDE
        + NETWORK
        + f"""
x, y = (array.asnumpy() for array in batch(1280))
data = mx.io.NDArrayIter(x, dict.fromkeys(labels, y), batch_size=128)
def module():
    return mx.mod.Module(network(), label_names=labels)
replay = module()
replay.bind(data.provide_data, data.provide_label)
replay.init_params(mx.init.Xavier())
replay.init_optimizer()
start = [{{name: value.copy() for name, value in part.items()}} for part in replay.get_params()]
for batch in data:
    replay.forward_backward(batch)
    replay.update()
    mx.nd.waitall()
centers = replay.get_params()[1]['center_loss_center_bias'].asnumpy()
stale = 0
for _ in range({FITS}):
    data.reset()
    metrics = [center_loss.Accuracy(), center_loss.CenterLossMetric()]
    module().fit(data, num_epoch=1, eval_metric=metrics, arg_params=start[0], aux_params=start[1],
                 epoch_end_callback=mx.callback.do_checkpoint('net'))
    saved = mx.model.load_checkpoint('net', 1)[2]['center_loss_center_bias'].asnumpy()
    stale += not np.allclose(saved, centers, rtol=1e-4, atol=1e-6)
print(stale, 'of', {FITS})
assert not stale
""",
        engine,
    )


@every_engine
@pytest.mark.parametrize('beside', ['operator', 'block'])
def test_module_trains_beside_operators_with_a_head_gradient(run, engine, beside):
    """In the form that the docstring has for it; without, MXNet mixes up what backward needs."""
    run(
        PRELUDE
        + NETWORK
        + USE
        + f"""
class Double(mx.operator.CustomOp):
    def forward(self, is_train, req, in_data, out_data, aux):
        self.assign(out_data[0], req[0], 2 * in_data[0])
    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        self.assign(in_grad[0], req[0], 2 * out_grad[0])
@mx.operator.register('double')
class DoubleProp(mx.operator.CustomOpProp):
    def create_operator(self, ctx, in_shapes, in_dtypes):
        return Double()
images, classes = batch(512)
def train(beside, out_grad):
    embedding = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=2, name='embedding')
    label = mx.sym.var('label')
    options = dict(op_type='centerloss', num_class=100, scale=0.1, normalization='null')
    if out_grad:
        loss = mx.sym.Custom(embedding, label, name='center', out_grad=True, **options)
        loss = mx.sym.MakeLoss(loss, name='center_loss')
    else:
        loss = mx.sym.Custom(embedding, label, name='center_loss', **options)
    doubled = 2 * embedding
    if beside == 'operator':
        doubled = mx.sym.Custom(embedding, op_type='double')
    logits = mx.sym.FullyConnected(doubled, num_hidden=100, name='fc')
    softmax = mx.sym.SoftmaxOutput(logits, label, name='softmax')
    module = mx.mod.Module(mx.sym.Group([softmax, loss]), label_names=['label'])
    data = mx.io.NDArrayIter(images, classes, batch_size=128, label_name='label')
    module.bind(data.provide_data, data.provide_label)
    if beside == 'block':
        use()
    mx.random.seed(0)
    module.init_params(mx.init.Uniform(0.1))
    metrics = [center_loss.Accuracy(), center_loss.CenterLossMetric()]
    module.fit(data, num_epoch=2, eval_metric=metrics)
    mx.nd.waitall()
    parameters, centers = module.get_params()
    (centers,) = centers.values()
    return [value.asnumpy() for _, value in sorted(parameters.items())] + [centers.asnumpy()]
measured, expected = train({beside!r}, out_grad=True), train(None, out_grad=False)
for first, second in zip(measured, expected, strict=True):
    np.testing.assert_array_equal(first, second)
""",
        engine,
    )


@every_engine
def test_docstring_examples(run, engine):
    out = run(
        PRELUDE
        + """
import doctest
import center_loss
result = doctest.testmod(center_loss)
assert result.attempted > 25 and not result.failed
""",
        engine,
    )
    assert 'Error' not in out


@pytest.mark.slow
def test_gluon_page_prints_what_it_says(tmp_path):
    page = (ROOT / 'docs' / 'gluon.md').read_text()
    program, printed = re.search(r'```python\n(.*?)```.*?```\n(.*?)```', page, re.DOTALL).groups()
    environ = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONWARNINGS': 'ignore'}
    (tmp_path / 'data').symlink_to(ROOT / 'data')
    done = subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, env=environ, text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    lines, expected = done.stdout.splitlines(), printed.splitlines()
    assert len(lines) == len(expected) == 6
    for line, other in zip(lines, expected, strict=True):
        assert re.sub(r'[\d.]+', '', line) == re.sub(r'[\d.]+', '', other)
    accuracy, center_loss = (float(number) for number in re.findall(r'\d+\.\d+', lines[-1]))
    assert accuracy > 0.93 and 0.5 < center_loss < 2
    assert (tmp_path / 'gluon.params').exists()
