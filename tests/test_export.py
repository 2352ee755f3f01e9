"""tools/export.py: files that other programs load, and the pages of docs/ that show it."""

import errno
import importlib.util
import json
from pathlib import Path
import re
import sys
import types

import numpy as np
import pytest

from common.environment import mx
from common import embedder
from common.checkpoints import Checkpoints
from common.embedder import Embedder
from common.errors import InputError
import data
from helpers import LABELS, ROOT, digits, make_module, run_python, train_small
from tools import export
import train

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ('onnx', 'onnxruntime'))),
    reason='onnx or onnxruntime is missing: pip install -r requirements-onnx.txt',
)
MXNET_FILES = ['digits-0000.params', 'digits-symbol.json']
PAGE = (ROOT / 'docs' / 'export.md').read_text()
ONNX_CODE, MXNET_CODE, LAYERS_CODE = re.findall(r'^```python\n(.*?)^```', PAGE, re.M | re.S)


def save_steps(prefix, network, num_steps=3, **inference):
    """Save a network after a few steps on digits."""
    module = make_module(network, 20, train.INITIALIZERS['xavier'])
    module.init_optimizer(optimizer_params={'learning_rate': 0.02, 'momentum': 0.9})
    for step in range(num_steps):
        images, labels = map(mx.nd.array, digits(20, 20 * step))
        module.forward_backward(mx.io.DataBatch([images], [labels] * len(LABELS)))
        module.update()
    mx.nd.waitall()
    Checkpoints(prefix).save(1, network, *module.get_params(), {}, {}, inference=inference)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """The prefixes of a run of LeNet with two epochs, and of LeNet++ after some steps."""
    folder = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lenet = train.get_symbol(center_loss_weight=0.5)
        options = {'num_examples': 500, 'num_epochs': 2, 'save_model_prefix': 'center_loss'}
        train_small(lenet, **options, initializer=train.INITIALIZERS['small-head'])
        save_steps('deep', train.get_symbol(network='lenet++', embedding_dim=3, no_bias=True))
    return {'lenet': str(folder / 'center_loss'), 'lenet++': str(folder / 'deep')}


@pytest.fixture
def without_onnx(monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnx', None)


def val_images(count):
    return data.load_digits('mnist-5k').val_images[:count]


def embedded(prefix, images):
    """Embeddings and probabilities of the checkpoint itself."""
    return Embedder(prefix)(images)[:2]


def assert_agree(outputs, expected):
    """Compare to 1e-5 of the largest value of each output."""
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.dtype == np.float32 and output.shape == wanted.shape
        assert np.abs(output - wanted).max() <= 1e-5 * np.abs(wanted).max()


def file_names(folder='.'):
    return sorted(path.name for path in Path(folder).iterdir())


# MXNet alone


@pytest.mark.slow
@pytest.mark.parametrize('network', ['lenet', 'lenet++'])
def test_loads_without_center_loss(network, runs, in_own_folder, without_onnx):
    with pytest.raises(InputError):
        export.main([f'--model-prefix={runs[network]}', '--output=digits'])
    images = val_images(100)
    np.save('images.npy', images[:, None] * np.float32(1 / 256))
    save = 'np.savez({!r}, embeddings.asnumpy(), probabilities.asnumpy())\n'
    with_module, with_block = MXNET_CODE.split('\n\nblock')
    (in_own_folder / 'use.py').write_text(
        'import importlib.util\nassert importlib.util.find_spec("center_loss") is None\n'
        'import numpy as np\nimages = np.load("images.npy")\n'
        f'{with_module}\n{save.format("module")}block{with_block}{save.format("block")}'
    )
    result = run_python('use.py', cwd=in_own_folder, unset=['PYTHONPATH'])
    assert result.returncode == 0, result.stderr
    expected = embedded(runs[network], images)
    for way in ('module', 'block'):
        with np.load(f'{way}.npz') as outputs:
            assert_agree(outputs.values(), expected)


@pytest.mark.parametrize('network', ['lenet', 'lenet++'])
def test_network_is_plain(network, runs):
    symbol, arg_params, aux_params = export.inference_network(Embedder(runs[network]))
    operators = {node['op'] for node in json.loads(symbol.tojson())['nodes']}
    assert not operators & {'Custom', 'SoftmaxOutput'} and 'softmax' in operators
    assert {*symbol.list_arguments()} == {'data', *arg_params} and not aux_params
    assert symbol.list_outputs() == ['embedding_output', 'probability_output']


def test_chooses_epoch(runs, in_own_folder, without_onnx, capsys):
    with pytest.raises(InputError):
        export.main([f'--model-prefix={runs["lenet"]}', '--epoch=1', '--output=digits'])
    saved = Checkpoints(runs['lenet']).load_params(1)[0]['fc2_weight']
    exported = mx.nd.load('digits-0000.params')['arg:fc2_weight']
    np.testing.assert_array_equal(exported.asnumpy(), saved.asnumpy())
    shown = capsys.readouterr().out
    assert '-0001.params: trained on' in shown
    assert shown.endswith('\nwrote digits-symbol.json and digits-0000.params for MXNet\n')


@pytest.mark.parametrize('folder_has_run', [True, False])
def test_default_run(folder_has_run, runs, in_own_folder, without_onnx, monkeypatch, capsys):
    if folder_has_run:
        monkeypatch.chdir(Path(runs['lenet']).parent)
    else:
        monkeypatch.setattr(embedder, 'TRAINED', Path(runs['lenet++']))
    with pytest.raises(InputError):
        export.main([f'--output={in_own_folder}/digits'])
    used = 'center_loss-0002.params: ' if folder_has_run else 'deep-0001.params: '
    assert used in capsys.readouterr().out


# ONNX


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize('network', ['lenet', 'lenet++'])
def test_onnx_agrees(network, runs, in_own_folder, capfd):
    import onnx
    import onnxruntime

    export.main([f'--model-prefix={runs[network]}', '--output=digits'])
    shown = capfd.readouterr()
    assert re.fullmatch(r'.*\nwrote .* for MXNet\nwrote digits.onnx for ONNX\n', shown.out)
    assert not shown.err
    assert file_names() == [*MXNET_FILES, 'digits.onnx']
    model = onnx.load('digits.onnx')
    onnx.checker.check_model(model, full_check=True)
    assert not {node.op_type for node in model.graph.node} & {'PRelu', 'Custom'}

    session = onnxruntime.InferenceSession('digits.onnx')
    dimension = {'lenet': 2, 'lenet++': 3}[network]
    assert [(i.name, i.type, i.shape) for i in session.get_inputs()] == [
        ('image', 'tensor(float)', ['batch', 1, 28, 28])
    ]
    assert [(output.name, output.shape) for output in session.get_outputs()] == [
        ('embedding', ['batch', dimension]),
        ('probability', ['batch', 10]),
    ]
    images = val_images(1000)
    pixels, expected = images[:, None].astype(np.float32) / 256, embedded(runs[network], images)
    assert_agree(session.run(None, {'image': pixels}), expected)
    assert_agree(session.run(None, {'image': pixels[:1]}), [array[:1] for array in expected])
    assert not capfd.readouterr().err  # onnxruntime warns of what is not used


@needs_onnx
def test_metadata(in_own_folder):
    import onnx

    names = [*'abcdefghi', 'ß']
    save_steps(
        'run',
        train.get_symbol(center_loss_weight=0.25),
        num_steps=1,
        dataset='custom',
        class_names=names,
        image_shape=[28, 28],
        rejection_distance=1.5,
    )
    export.main(['--model-prefix=run', '--output=digits'])
    facts = {p.key: json.loads(p.value) for p in onnx.load('digits.onnx').metadata_props}
    assert (
        facts.pop('run').items()
        >= {
            'dataset': 'custom',
            'center_loss_weight': 0.25,
            'checkpoint': 'run-0001.params',
        }.items()
    )
    centers = Checkpoints('run').load_params(1)[1]['center_loss_center_bias'].asnumpy()
    assert facts == {
        'pixel_scale': 1 / 256,
        'image_shape': [28, 28],
        'class_names': names,
        'centers': centers.tolist(),
        'rejection_distance': 1.5,
    }


@pytest.mark.parametrize('installed', [None, types.ModuleType('onnx')], ids=['none', 'too new'])
def test_without_suitable_onnx(installed, runs, in_own_folder, monkeypatch):
    for name in [name for name in sys.modules if name.startswith('onnx.')]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'onnx', installed)
    with pytest.raises(InputError, match=r'onnx 1\.13 to 1\.18.*requirements-onnx\.txt'):
        export.main([f'--model-prefix={runs["lenet"]}', '--output=digits'])
    assert file_names() == MXNET_FILES


@needs_onnx
def test_layer_without_converter(in_own_folder, monkeypatch):
    def features(image):
        return mx.sym.erf(mx.sym.FullyConnected(image, num_hidden=4, name='fc1'))

    monkeypatch.setitem(train.NETWORKS, 'lenet', features)
    save_steps('run', train.get_symbol(), num_steps=0)
    with pytest.raises(InputError, match=r'^digits.onnx is not written: .* op type erf'):
        export.main(['--model-prefix=run', '--output=digits'])
    assert [name for name in file_names() if 'digits' in name] == MXNET_FILES


# Mistakes


@pytest.mark.parametrize(
    'output, problem',
    [
        ('missing/digits', 'there is no folder missing'),
        ('folder', 'it is a folder'),
        ('.', 'it is a folder'),
        ('other', 'other-symbol.json is a folder'),
        ('digits.onnx', 'leave out .onnx'),
        ('/proc/digits', 'No such file'),
        ('x' * 250, 'File name too long'),
        ('x' * 300, 'File name too long'),
    ],
)
def test_output_that_cannot_be(output, problem, runs, in_own_folder):
    Path('folder').mkdir()
    Path('other-symbol.json').mkdir()
    with pytest.raises(InputError, match=re.escape(problem)):
        export.main([f'--model-prefix={runs["lenet"]}', f'--output={output}'])
    assert file_names() == ['folder', 'other-symbol.json'] and not file_names('folder')


def test_run_is_not_overwritten(runs):
    before = {path: path.read_bytes() for path in Path(runs['lenet']).parent.iterdir()}
    for prefix in runs.values():
        with pytest.raises(InputError, match='a run has its checkpoints there'):
            export.main([f'--model-prefix={runs["lenet"]}', f'--output={prefix}'])
    assert {path: path.read_bytes() for path in Path(runs['lenet']).parent.iterdir()} == before


def test_full_disk(runs, in_own_folder, without_onnx, monkeypatch):
    with pytest.raises(InputError):
        export.main([f'--model-prefix={runs["lenet"]}', '--output=digits'])
    before = [Path(name).read_bytes() for name in MXNET_FILES]

    def write_some(path, chunks):
        write(path, [b'{}'])
        if path.name.startswith('.digits-0000'):
            raise OSError(errno.ENOSPC, 'No space left on device')

    write = export.write_synced
    monkeypatch.setattr(export, 'write_synced', write_some)
    with pytest.raises(InputError, match='No space left on device'):
        export.main([f'--model-prefix={runs["lenet++"]}', '--output=digits'])
    assert file_names() == MXNET_FILES
    assert [Path(name).read_bytes() for name in MXNET_FILES] == before


def test_missing_run(in_own_folder):
    with pytest.raises(InputError, match='there is no checkpoint of nothing'):
        export.main(['--model-prefix=nothing', '--output=digits'])
    assert not file_names()


# The page


@needs_onnx
def test_onnx_example(runs, in_own_folder, capsys):
    assert len([line for line in ONNX_CODE.splitlines() if line]) <= 15
    export.main([f'--model-prefix={runs["lenet"]}', '--output=digits'])
    (in_own_folder / 'data').symlink_to(ROOT / 'data')
    capsys.readouterr()
    exec(ONNX_CODE, {})
    shown = capsys.readouterr().out
    classes = Embedder(runs['lenet'])(val_images(1000)[::200]).classes
    assert re.findall(r'^(\d) \d+\.\d% at ', shown, re.M) == [*map(str, classes)]


@pytest.mark.parametrize('network', ['lenet', 'lenet++'])
def test_layers_example(network, runs, in_own_folder, capsys):
    """On both networks as they are saved."""
    exec(LAYERS_CODE.replace('data/trained/center_loss-symbol', f'{runs[network]}-symbol'), {})
    shown = capsys.readouterr().out
    params, _ = Checkpoints(runs[network]).load_params(1)
    count = sum(value.size for name, value in params.items() if 'slope' not in name)
    assert f'Total params: {count}\n' in shown
    graph = Path('network.gv').read_text()
    layers = set(re.findall(r'^(\w+)\(\w+\) ', shown, re.M))
    assert {'data', 'embedding', 'fc2', 'softmax', 'center_loss'} <= layers
    for layer in layers:
        assert f'\t{layer} [label=' in graph
    assert 'fc2 -> embedding' in graph and 'center_loss -> embedding' in graph
