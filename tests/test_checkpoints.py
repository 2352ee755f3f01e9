"""Checkpoints: what is found, refused, kept and removed, and that nothing is lost."""

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from common.environment import mx
from common.array_file import decode_arrays, encode_arrays
from common.checkpoints import Checkpoints
from common.errors import DamagedCheckpoint, InputError, UncheckedCheckpoint
from common.former_checkpoints import rename_original
from common.symbol_file import decode_symbol, encode_symbol, output_shapes, parameter_mismatches

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = {'lr': 0.1, 'network': 'λ', 'list': [1, None]}
pytestmark = pytest.mark.usefixtures('in_own_folder')


def network(hidden=4):
    embedding = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=hidden, name='embedding')
    logits = mx.sym.FullyConnected(embedding, num_hidden=3, name='fc2')
    center = mx.sym.Custom(
        embedding, mx.sym.var('center_label'), op_type='centerloss', num_class=3, name='center_loss'
    )
    return mx.sym.Group([mx.sym.SoftmaxOutput(logits, name='softmax'), center])


def arrays(seed=0):
    """What ``save`` takes: weights, centers and state of :func:`network`."""
    generator = np.random.default_rng(seed)
    shapes = {
        'embedding_weight': (4, 5),
        'embedding_bias': (4,),
        'fc2_weight': (3, 4),
        'fc2_bias': (3,),
    }
    arg_params, momentum = (
        {name: mx.nd.array(generator.normal(size=shape)) for name, shape in shapes.items()}
        for _ in range(2)
    )
    aux_params = {'center_loss_center_bias': mx.nd.array(generator.normal(size=(3, 4)))}
    return arg_params, aux_params, {f'optimizer0:{name}': a for name, a in momentum.items()}


def save(*epochs, prefix='run', seed=0, **options):
    checkpoints, symbol = Checkpoints(prefix), network()
    for epoch in epochs:
        checkpoints.save(epoch, symbol, *arrays(seed + epoch), OPTIONS, **options)
    return checkpoints


def assert_same(measured, expected):
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name].dtype == value.dtype
        np.testing.assert_array_equal(measured[name].asnumpy(), value.asnumpy(), err_msg=name)


def assert_whole(checkpoints, epoch, seed=0):
    """The checkpoint of an epoch is what :func:`save` wrote."""
    checkpoint = checkpoints.load(epoch)
    assert (checkpoint.epoch, checkpoint.options) == (epoch, OPTIONS)
    for measured, expected in zip(checkpoint[1:4], arrays(seed + epoch), strict=True):
        assert_same(measured, expected)


def contents(folder='.'):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def flip(path, position, bit=0):
    data = bytearray(Path(path).read_bytes())
    data[position] ^= 1 << bit
    Path(path).write_bytes(data)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# What is saved


def test_load_returns_what_was_saved():
    checkpoints = save(1, 2)
    assert sorted(os.listdir()) == [
        *(f'run-000{epoch}.{kind}' for epoch in (1, 2) for kind in ('json', 'params', 'resume')),
        'run-symbol.json',
    ]
    assert checkpoints.epochs() == [1, 2]
    for epoch in (1, 2):
        assert_whole(checkpoints, epoch)
        for measured, expected in zip(checkpoints.load_params(epoch), arrays(epoch), strict=False):
            assert_same(measured, expected)
    assert checkpoints.newest_whole().epoch == 2
    assert checkpoints.load_symbol().tojson() == network().tojson()


def test_json_says_what_it_was_trained_with():
    save(7)
    content = json.loads(Path('run-0007.json').read_text())
    assert content['epoch'] == 7 and content['options'] == OPTIONS
    assert content['files']['params']['size'] == Path('run-0007.params').stat().st_size
    assert content['versions'].keys() == {
        *('program', 'python', 'numpy', 'mxnet', 'instruction_set', 'threads')
    }
    assert content['versions']['mxnet'] == mx.__version__


def test_mxnet_reads_params_and_symbol():
    save(3)
    symbol, *params = mx.model.load_checkpoint('run', 3)
    assert symbol.list_outputs() == network().list_outputs()
    for measured, expected in zip(params, arrays(3), strict=False):
        assert_same(measured, expected)


def test_arrays_are_mxnets_bytes():
    kinds = ['float32', 'float64', 'float16', 'uint8', 'int32', 'int8', 'int64', 'bool']
    expected = {
        f'é{kind}': mx.nd.array(np.arange(24).reshape(2, 3, 4) % 7, dtype=kind) for kind in kinds
    }
    mx.nd.save('file', expected)
    written = Path('file').read_bytes()
    assert b''.join(encode_arrays(expected)) == written
    assert_same(decode_arrays(written), expected)
    assert decode_arrays(b''.join(encode_arrays({}))) == {}


def test_arrays_of_older_mxnet_are_read():
    values = np.arange(6, dtype='f').tobytes()
    name = struct.pack('<QQ', 1, 1) + b'x'
    for header in (struct.pack('<III', 2, 2, 3), struct.pack('<IIqq', 0xF993FAC8, 2, 2, 3)):
        data = struct.pack('<QQQ', 0x112, 0, 1) + header + struct.pack('<iii', 1, 0, 0) + values
        assert decode_arrays(data + name)['x'].asnumpy().tolist() == [[0, 1, 2], [3, 4, 5]]


# What is damaged


@pytest.mark.parametrize('kind', ['params', 'resume', 'json'])
def test_flipped_bit_is_found(kind):
    checkpoints, path = save(1), Path(f'run-0001.{kind}')
    whole, generator = path.read_bytes(), random.Random(0)
    for _ in range(40):
        flip(path, generator.randrange(len(whole)), generator.randrange(8))
        with pytest.raises(DamagedCheckpoint, match=f'run-0001.{kind} is damaged: '):
            checkpoints.load(1)
        if kind != 'resume':
            with pytest.raises(DamagedCheckpoint):
                checkpoints.load_params(1)
        path.write_bytes(whole)


def truncate(path):
    os.truncate(path, 100)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b'\0')


def empty(path):
    path.write_bytes(b'')


def take_epoch_1(path):
    shutil.copy(f'run-0001{path.suffix}', path)


def take_other_run(path):
    save(2, prefix='other', seed=9)
    shutil.copy(f'other-0002{path.suffix}', path)


@pytest.mark.parametrize('kind', ['params', 'resume', 'json'])
@pytest.mark.parametrize('harm', [truncate, lengthen, empty, take_epoch_1, take_other_run])
def test_damaged_is_passed_over_and_kept(harm, kind, caplog):
    checkpoints, path = save(1, 2), Path(f'run-0002.{kind}')
    harm(path)
    harmed = {name: data for name, data in contents().items() if name.startswith('run-0002')}
    assert checkpoints.newest_whole().epoch == 1
    assert any('run-0002.' in line and 'is damaged' in line for line in warnings(caplog))
    save(2)
    assert_whole(checkpoints, 2)
    kept = contents()
    assert all(kept[name.replace('run', 'run-kept1')] == data for name, data in harmed.items())
    assert 'run-0002.params is kept as run-kept1-0002.params' in warnings(caplog)
    assert checkpoints.epochs() == [1, 2]


def test_copied_epoch_is_found():
    checkpoints = save(1)
    for kind in ('params', 'resume', 'json'):
        shutil.copy(f'run-0001.{kind}', f'run-0002.{kind}')
    with pytest.raises(DamagedCheckpoint, match=r'run-0002.json is damaged: it is of epoch 1'):
        checkpoints.load(2)


def test_names_of_many_classes(monkeypatch):
    names = [f'identity {number:06d}' for number in range(400_000)]
    checkpoints = save(1, inference={'class_names': names})
    assert Path('run-0001.json').stat().st_size > 2**23
    assert checkpoints.load_inference(1) == {'class_names': names}
    monkeypatch.setattr('common.checkpoints.MAX_JSON_SIZE', 1000)
    before = contents()
    with pytest.raises(InputError, match='of epoch 2: the options and data facts of run are '):
        save(2, inference={'class_names': names[:100]})
    assert contents() == before


def test_saved_since():
    """Finished epochs alone: the .json is written last."""
    checkpoints = save(1, 2, 3)
    Path('run-0003.json').unlink()
    assert checkpoints.saved_since(0) == [Path('run-0001.params'), Path('run-0002.params')]
    os.utime('run-0001.params', (1000, 1000))
    assert checkpoints.saved_since(1001) == [Path('run-0002.params')]


def test_none_whole_is_refused():
    checkpoints = save(1, 2)
    flip('run-0001.resume', 50)
    flip('run-0002.params', 50)
    before = contents()
    with pytest.raises(InputError, match='no checkpoint of run is whole'):
        checkpoints.newest_whole()
    assert contents() == before


# What cannot be read


def missing(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def dangling_link(path):
    path.unlink()
    path.symlink_to('nowhere')


def loop_of_links(path):
    path.unlink()
    path.symlink_to(path.name)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def device(path):
    path.unlink()
    path.symlink_to('/dev/zero')


def bound_socket(path):
    path.unlink()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


REASONS = {
    missing: 'it is missing',
    folder: 'Is a directory',
    dangling_link: 'it is a dangling link',
    loop_of_links: 'Too many levels of symbolic links',
    pipe: 'it is not a regular file',
    device: 'it is not a regular file',
    bound_socket: 'it is a socket',
}


@pytest.mark.parametrize(
    'harm, kind',
    [
        (harm, kind)
        for harm in REASONS
        for kind in ('params', 'resume', 'json')
        if (harm, kind) != (missing, 'json')  # see test_unfinished_is_passed_over
    ],
)
def test_unreadable_newest_is_refused(harm, kind):
    checkpoints = save(1, 2)
    harm(Path(f'run-0002.{kind}'))
    begin, before = time.monotonic(), sorted(os.listdir())
    with pytest.raises(InputError, match=f'cannot read run-0002.{kind}: {REASONS[harm]}') as error:
        checkpoints.newest_whole()
    assert not isinstance(error.value, DamagedCheckpoint)
    assert time.monotonic() - begin < 1 and sorted(os.listdir()) == before


@contextlib.contextmanager
def ordinary_user():
    """Be a user who may not read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_no_permission_is_refused():
    with tempfile.TemporaryDirectory() as name:
        checkpoints = save(1, 2, prefix=f'{name}/run')
        os.chmod(name, 0o755)
        os.chmod(f'{name}/run-0002.resume', 0)
        with ordinary_user(), pytest.raises(InputError, match=r'0002\.resume: Permission denied'):
            checkpoints.newest_whole()
        os.chmod(name, 0o311)
        with ordinary_user(), pytest.raises(InputError, match=r'cannot read the folder .*denied'):
            checkpoints.newest_whole()
        os.chmod(name, 0o755)


@pytest.mark.parametrize('harm', REASONS)
def test_unreadable_symbol_is_refused(harm):
    checkpoints = save(1)
    harm(checkpoints.symbol_path)
    with pytest.raises(InputError, match=f'cannot read run-symbol.json: {REASONS[harm]}'):
        checkpoints.load_symbol()


def test_missing_epoch_names_the_others():
    checkpoints = save(1, 3)
    with pytest.raises(InputError, match=r'no run-0002.params; .* have a checkpoint: 1, 3'):
        checkpoints.load_params(2)
    with pytest.raises(InputError, match=r'no none-0001.params; .* have a checkpoint: none'):
        Checkpoints('none').load_params(1)
    with pytest.raises(InputError, match=r'no gone/run-0001.params'):
        Checkpoints('gone/run').load_params(1)
    assert Checkpoints('gone/run').newest_whole() is None


# Checkpoints without a checksum


def save_unchecked(*epochs):
    for epoch in epochs:
        mx.model.save_checkpoint('run', epoch, network(), *arrays(epoch)[:2])


def test_another_programs_is_read_with_one_warning(caplog):
    save_unchecked(1, 2)
    checkpoints = Checkpoints('run')
    for epoch in (1, 2):
        assert_same(checkpoints.load_params(epoch)[0], arrays(epoch)[0])
    assert warnings(caplog) == ['run-0001.params has no checksum, and cannot be checked']
    assert checkpoints.load_symbol().list_outputs() == network().list_outputs()


def test_another_programs_is_kept(caplog):
    save_unchecked(1, 2)
    before = contents()
    assert Checkpoints('run').newest_whole() is None
    assert [line for line in warnings(caplog) if 'run-0002.params has no checksum' in line]
    save(1, remove=[1, 2])
    assert Checkpoints('run').epochs() == [1]
    for epoch in (1, 2):
        assert contents()[f'run-kept1-000{epoch}.params'] == before[f'run-000{epoch}.params']
    assert contents()['run-kept1-symbol.json'] == before['run-symbol.json']
    assert mx.model.load_checkpoint('run-kept1', 2)[0].tojson() == network().tojson()
    flip('run-0001.params', 60)
    save(1)
    assert Checkpoints('run-kept2').epochs() == [1]


def test_unfinished_is_passed_over(caplog):
    checkpoints = save(1, 2)
    Path('run-0002.json').unlink()
    assert checkpoints.newest_whole().epoch == 1
    assert 'run-0002.params has no checksum: of another program, or unfinished' in caplog.text
    Path('run-0002.params').unlink()
    assert checkpoints.epochs() == [1]
    save(2)
    assert not list(Path().glob('*kept*'))


def save_first_form(epoch, momentum=None, last=False, **others):
    """Write a checkpoint as the program did before it had a .json (c9a6961)."""

    def as_array(data):
        return mx.nd.array(np.frombuffer(data, np.uint8), dtype=np.uint8)

    mx.model.save_checkpoint('run', epoch, network(), *arrays(epoch)[:2])
    params = mx.nd.load(f'run-{epoch:04d}.params')
    momentum = {n[11:]: a for n, a in arrays(epoch)[2].items()} if momentum is None else momentum
    states = {f'momentum:{name}': value for name, value in momentum.items()}
    states.update({f'last:{name}': value + 1 for name, value in params.items()} if last else {})
    states['options'] = as_array(json.dumps(OPTIONS).encode())
    digest = hashlib.sha256(Path(f'run-{epoch:04d}.params').read_bytes()).digest()
    states['digest'] = as_array(digest)
    mx.nd.save(f'run-{epoch:04d}.states', {**states, **others})


@pytest.mark.parametrize('last', [False, True])
def test_first_form_is_resumed(last, caplog):
    save_first_form(4, last=last)
    checkpoint = Checkpoints('run').newest_whole()
    arg_params, aux_params, state = arrays(4)
    if last:
        state.update({f'last:arg:{name}': value + 1 for name, value in arg_params.items()})
        state.update({f'last:aux:{name}': value + 1 for name, value in aux_params.items()})
    assert (checkpoint.epoch, checkpoint.options) == (4, OPTIONS)
    assert_same(checkpoint.arg_params, arg_params)
    assert_same(checkpoint.aux_params, aux_params)
    assert_same(checkpoint.state, state)
    assert warnings(caplog) == [
        'run-0004.params: its .states have no checksum, and cannot be checked'
    ]


def test_first_form_is_checked_as_far_as_it_goes():
    checkpoints = Checkpoints('run')
    save_first_form(1)
    flip('run-0001.params', 100)
    for read in (checkpoints.load, checkpoints.load_params):
        with pytest.raises(DamagedCheckpoint, match=r'run-0001.params is damaged: its checksum'):
            read(1)
    full = {name[11:]: value for name, value in arrays(1)[2].items()}
    for momentum, others in (
        ({}, {}),
        ({**full, 'fc2_biar': full['fc2_bias']}, {}),
        ({**full, 'fc2_bias': mx.nd.zeros(4)}, {}),
        (full, {'last:arg:fc2_bias': mx.nd.zeros(3)}),
        (full, {'options': mx.nd.zeros(3)}),
        (full, {'digest': mx.nd.zeros(3)}),
    ):
        save_first_form(1, momentum, **others)
        with pytest.raises(DamagedCheckpoint, match=r'run-0001.(states|params) is damaged'):
            checkpoints.load(1)
    save_first_form(1)
    whole, generator = Path('run-0001.states').read_bytes(), random.Random(0)
    for _ in range(40):  # what is wrong in it is found, or is a number of the momentum
        flip('run-0001.states', generator.randrange(len(whole)), generator.randrange(8))
        with contextlib.suppress(DamagedCheckpoint, UncheckedCheckpoint):
            checkpoints.load(1)
        Path('run-0001.states').write_bytes(whole)


def test_states_of_mxnet_are_another_programs():
    save_unchecked(1)
    Path('run-0001.states').write_bytes(pickle.dumps({0: None}))
    with pytest.raises(UncheckedCheckpoint):
        Checkpoints('run').load(1)


# Files that mean harm


ONE_NAME = struct.pack('<QQ', 1, 1) + b'x'


def array_file(header, values=b'', count=1, names=ONE_NAME):
    return struct.pack('<QQQ', 0x112, 0, count) + header + values + names


V2 = 0xF993FAC9
FLOAT = struct.pack('<iii', 1, 0, 0)


@pytest.mark.parametrize(
    'data',
    [
        b'',
        b'\x12\x01',
        array_file(struct.pack('<IiI', V2, 0, 2**32 - 1)),
        array_file(struct.pack('<IiIqq', V2, 0, 2, 2**32 - 1, 2**32 - 1) + FLOAT),
        array_file(struct.pack('<IiIqq', V2, 0, 2, -1, -4) + FLOAT, bytes(16)),
        array_file(struct.pack('<IiIq', V2, 0, 1, 2**62) + FLOAT),
        array_file(struct.pack('<IiIq', V2, 0, 1, 0) + FLOAT),
        array_file(struct.pack('<IiI', V2, 0, 0)),
        array_file(struct.pack('<IiI33q', V2, 0, 33, *[1] * 33) + FLOAT, bytes(4)),
        array_file(struct.pack('<IiIqiii', V2, 0, 1, 1, 1, 0, 99), bytes(4)),
        array_file(struct.pack('<IiIqiii', V2, 0, 1, 1, 1, 0, -1), bytes(4)),
        array_file(struct.pack('<IiIq', V2, 1, 1, 1) + FLOAT, bytes(4)),
        array_file(struct.pack('<IiIq', V2, 0, 1, 1) + FLOAT, bytes(4), count=2**62),
        array_file(struct.pack('<IiIq', V2, 0, 1, 1) + FLOAT, bytes(4), names=bytes(8)),
        array_file(
            struct.pack('<IiIq', V2, 0, 1, 1) + FLOAT, bytes(4), names=struct.pack('<Q', 2**62)
        ),
        array_file(
            struct.pack('<IiIq', V2, 0, 1, 1) + FLOAT,
            bytes(4),
            names=struct.pack('<QQ', 1, 2**62) + b'x',
        ),
        array_file(
            struct.pack('<IiIq', V2, 0, 1, 1) + FLOAT,
            bytes(4),
            names=struct.pack('<QQ', 1, 1) + b'\xff',
        ),
        array_file(struct.pack('<IiIq', V2, 0, 1, 1) + FLOAT, bytes(5)),
    ],
)
def test_false_header_is_refused(data):
    begin = time.monotonic()
    Path('run-0001.params').write_bytes(data)
    with pytest.raises(DamagedCheckpoint, match='is damaged: '):
        Checkpoints('run').load_params(1)
    assert time.monotonic() - begin < 1


def operator(name, num_inputs=1, **attributes):
    """A graph of one operator, as a file of MXNet has it."""
    nodes = [{'op': 'null', 'name': f'x{i}', 'inputs': []} for i in range(num_inputs)]
    inputs = [[i, 0, 0] for i in range(num_inputs)]
    nodes.append({'op': name, 'name': 'y', 'attrs': attributes, 'inputs': inputs})
    return {
        'nodes': nodes,
        'arg_nodes': list(range(num_inputs)),
        'heads': [[num_inputs, 0, 0]],
        'attrs': {'mxnet_version': ['int', 10901]},
    }


def convolution(**attributes):
    return operator('Convolution', 3, **{'kernel': '(3, 3)', 'num_filter': '4', **attributes})


def test_one_operator_is_allowed():
    """What the following ones are refused for is what they differ in."""
    for graph in (
        convolution(),
        operator('Custom', 3, op_type='centerloss', num_class='10'),
        operator('SliceChannel', 1, num_outputs='3'),
        {**operator('SliceChannel', 1, num_outputs='3'), 'heads': [[1, 2, 0]]},
        operator('Embedding', 2, input_dim='1000000', output_dim='64'),
        operator('_full', 0, shape='(1, 2)', value='1.0'),
    ):
        assert decode_symbol(json.dumps(graph).encode()).list_outputs()


@pytest.mark.parametrize(
    'graph',
    [
        operator('_Native', info='0x41414141', need_top_grad='True'),
        operator('_NDArray', info='0x41414141'),
        operator('Custom', 3, op_type='softmax', num_class='10'),
        operator('Custom', 3),
        operator('Custom', 3, op_type='centerloss', self='1'),
        operator('Custom', 1, op_type='centerloss', num_class='10'),
        operator('_CustomFunction'),
        operator('_TensorRT'),
        operator('_sg_onednn_conv'),
        operator('_npi_add', 2),
        operator('where', 3),
        operator('nothing'),
        convolution(num_group='0'),
        convolution(stride='(0, 1)'),
        convolution(dilate='(1, 0)'),
        convolution(num_filter='1000000000'),
        convolution(num_filter='9' * 400),
        convolution(kernel='(1000000000, 3)'),
        convolution(pad='(100000, 100000)'),
        operator('_zeros', 0, shape='(100000,100000)'),
        operator('SliceChannel', 1, num_outputs='1000000'),
        operator('elemwise_add', 1),
        operator('Activation', 2, act_type='relu'),
        operator('Activation', 1, act_type='rel'),
        {**operator('Activation'), 'heads': [[2, 0, 0]]},
        {**operator('Activation'), 'heads': [[-1, 0, 0]]},
        {**operator('Activation'), 'heads': [[0, 1, 0]]},
        {**operator('Activation'), 'heads': [[0, 0, 0, 0, 'x'], 'x']},
        {**operator('Activation'), 'heads': [[1e400, 0, 0]]},
        {**operator('Activation', 0), 'nodes': [{'op': 'exp', 'name': 'y', 'inputs': [[0, 0, 0]]}]},
        {**operator('exp'), 'nodes': [{'op': 'null', 'name': 'x', 'inputs': []}] * 2},
        {
            **operator('exp', 0),
            'nodes': [{'op': 'null', 'name': 'y', 'inputs': [], 'subgraphs': [operator('exp')]}],
        },
        {'nodes': [{}], 'heads': []},
        {'nodes': 3, 'heads': []},
        {},
        [],
        3,
    ],
)
def test_operator_is_refused(graph):
    with pytest.raises(ValueError):
        decode_symbol(json.dumps(graph).encode())


def test_refused_operator_is_named():
    Path('run-symbol.json').write_text(json.dumps(operator('_Native', info='0x41414141')))
    with pytest.raises(
        InputError, match=r'cannot load run-symbol.json: the operator _Native of y is not allowed'
    ):
        Checkpoints('run').load_symbol()


@pytest.mark.parametrize('data', [b'', b'\xff', b'[' * 100_000, b'{"nodes": [1, 2', b'NaN'])
def test_no_json_is_refused(data):
    with pytest.raises(ValueError):
        decode_symbol(data)


def test_second_key_is_not_read():
    text = json.dumps(operator('exp')).replace('"op": "exp"', '"op": "_Native", "op": "exp"')
    assert '_Native' not in decode_symbol(text.encode()).tojson()


def test_flipped_bit_in_symbol_is_found():
    checkpoints = save(1)
    whole, generator = checkpoints.symbol_path.read_bytes(), random.Random(0)
    expected = network().tojson()
    for _ in range(40):
        flip(checkpoints.symbol_path, generator.randrange(len(whole)), generator.randrange(8))
        with contextlib.suppress(InputError):  # of a bit in the name of the checksum
            assert checkpoints.load_symbol().tojson() == expected
        checkpoints.symbol_path.write_bytes(whole)


@pytest.mark.parametrize('shape', ['(10, 10)', '(7, -1)', '(0,)', '(100000,)', '(-1, 5, 5)'])
def test_reshape_to_another_size_is_refused(shape):
    """MXNet itself writes beyond the memory."""
    symbol = decode_symbol(json.dumps(operator('Reshape', 1, shape=shape)).encode())
    with pytest.raises(InputError, match=r'does not take .*y changes the number of values'):
        output_shapes(symbol, {'x0': (2, 3, 8, 8)})


def test_reshape_of_a_second_name_is_refused():
    graph = operator('Reshape', 1, shape='(10, 10)')
    graph['nodes'][0]['name'] = 'y_output'
    symbol = decode_symbol(json.dumps(graph).encode())
    with pytest.raises(InputError, match='two of its outputs have one name'):
        output_shapes(symbol, {'y_output': (2, 3, 8, 8)})


def test_too_much_memory_is_refused():
    net = mx.sym.var('data')
    for _ in range(5):
        net = mx.sym.tile(net, reps=(100, 1))
    with pytest.raises(InputError, match='its outputs have more than'):
        output_shapes(decode_symbol(encode_symbol(net)), {'data': (1, 100)}, max_values=2**31)


def first_form_of_lenet():
    """The operators of c9a6961's networks, with its padded channels and pairs of rows."""
    image, weight = mx.sym.var('data'), mx.sym.var('conv1_weight', shape=(20, 1, 5, 5))
    rows = [mx.sym.slice_axis(weight, axis=2, begin=b, end=b + 1 or None) for b in range(-5, 0)]
    six = mx.sym.concat(*rows[:4], mx.sym.zeros_like(rows[0]), rows[4], dim=2)
    six = mx.sym.reshape(six, shape=(0, 3, 2, 5))
    six = mx.sym.concat(six, mx.sym.zeros((4, 3, 2, 5)), dim=0)
    bias = mx.sym.concat(mx.sym.var('conv1_bias', shape=(20,)), mx.sym.zeros((4,)), dim=0)
    images = [mx.sym.slice_axis(image, axis=2, begin=b, end=-3 + b or None) for b in (0, 1, 3)]
    net = mx.sym.concat(*images, dim=1)
    net = mx.sym.Convolution(net, weight=six, bias=bias, kernel=(2, 5), num_filter=24, name='conv1')
    slope = mx.sym.var('slope', init=mx.init.Constant(0.25))
    channels = {'kernel': (1, 1), 'num_filter': 24, 'num_group': 24, 'no_bias': True}
    rest = mx.sym.Convolution(mx.sym.relu(net), weight=1 - slope, **channels)
    net = mx.sym.elemwise_add(mx.sym.Convolution(net, weight=slope, **channels), rest)
    return mx.sym.FullyConnected(mx.sym.flatten(net), num_hidden=2, name='embedding')


def ordinary_convnet():
    net = mx.sym.var('data')
    for filters in (4, 8):
        net = mx.sym.Convolution(net, kernel=(3, 3), pad=(1, 1), num_filter=filters)
        net = mx.sym.BatchNorm(net, fix_gamma=False)
        net = mx.sym.LeakyReLU(net, act_type='prelu')
        net = mx.sym.Pooling(net, kernel=(2, 2), stride=(2, 2), pool_type='max')
    net = mx.sym.Dropout(net, p=0.5) * 2 + 1
    left, right = mx.sym.split(net, num_outputs=2, axis=1)
    net = mx.sym.L2Normalization(mx.sym.flatten(mx.sym.broadcast_mul(left, right)))
    words = mx.sym.Embedding(mx.sym.var('words'), input_dim=10, output_dim=4)
    net = mx.sym.concat(net, mx.sym.mean(words, axis=1), mx.sym.LayerNorm(net))
    net = mx.sym.FullyConnected(net, num_hidden=10)
    return mx.sym.SoftmaxOutput(mx.sym.clip(net, -5, 5), name='softmax')


@pytest.mark.parametrize('make', [first_form_of_lenet, ordinary_convnet, network])
def test_network_is_allowed(make):
    symbol, shapes = make(), {'data': (2, 1, 28, 28)}
    if make is ordinary_convnet:
        shapes['words'] = (2, 5)
    expected = symbol.tojson()
    for data in (expected.encode(), encode_symbol(symbol)):
        read = decode_symbol(data)
        assert read.tojson() == expected
        inferred = output_shapes(read, shapes)
        arguments = zip(read.list_arguments(), symbol.infer_shape(**shapes)[0], strict=True)
        assert all(inferred[name] == shape for name, shape in arguments)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['resnet18_v2', 'vgg11_bn', 'mobilenet_v2_1_0', 'densenet121'])
def test_model_zoo_is_allowed(name):
    net = getattr(mx.gluon.model_zoo.vision, name)()(mx.sym.var('data'))
    read = decode_symbol(encode_symbol(net))
    assert read.tojson() == net.tojson()
    assert output_shapes(read, {'data': (1, 3, 224, 224)})


# What is written, and in which order


def test_new_run_replaces_the_old(caplog):
    save(1, 2, 3, 12345)
    save(1, prefix='running')
    checkpoints = save(1, seed=50, remove=[1, 2, 3, 12345])
    assert checkpoints.epochs() == [1] and Checkpoints('running').epochs() == [1]
    assert_whole(checkpoints, 1, seed=50)
    assert len(os.listdir()) == 8 and not warnings(caplog)


def test_oldest_is_removed_only_when_the_newest_is_there(monkeypatch):
    checkpoints, seen, original = save(1), [], os.replace

    def replace(*paths):
        seen.append(checkpoints.newest_whole().epoch)
        original(*paths)

    monkeypatch.setattr(os, 'replace', replace)
    save(2, remove=[1])
    assert seen == [1] * 4 and checkpoints.epochs() == [2]


def test_everything_is_synced_before_it_counts(monkeypatch):
    """What was not synced would be gone after a power cut."""
    steps = []

    def traced(name, original):
        def call(first, *others):
            if name == 'fsync':
                steps.append((name, Path(os.readlink(f'/proc/self/fd/{first}'))))
            else:
                steps.append((name, Path(first).absolute(), Path(others[0]).absolute()))
            return original(first, *others)

        return call

    for name in ('fsync', 'replace', 'rename'):
        monkeypatch.setattr(os, name, traced(name, getattr(os, name)))
    save(1)
    save(1, seed=1)
    here, renamed = Path.cwd(), [step for step in steps if step[0] == 'replace']
    assert [step[2].name for step in renamed] == [
        *('run-symbol.json', 'run-0001.resume', 'run-0001.params', 'run-0001.json')
    ] * 2
    for step in renamed:
        assert ('fsync', step[1]) in steps[: steps.index(step)]
    for number, step in enumerate(steps):
        if step[0] == 'rename' and step[1].suffix == '.json':
            assert steps[number + 1] == ('fsync', here)
        if step[0] == 'replace' and step[2].name == 'run-0001.json':
            assert steps[number - 1] == steps[number + 1] == ('fsync', here)


@pytest.mark.parametrize('before', ['epoch 1', 'keep 1', 'old run', 'damaged'])
def test_kill_between_any_two_steps_loses_nothing(before, monkeypatch):
    """Before anything is done to the folder it is copied: that is what a kill there leaves."""
    checkpoints = save(1, 2, 3) if before == 'old run' else save(1)
    epoch, remove = (1, [1, 2, 3]) if before == 'old run' else (2, [1] * (before == 'keep 1'))
    if before == 'damaged':
        save(2)
        flip('run-0002.params', 99)
    old, copies = contents(), []

    def copying(original):
        def step(*arguments, **options):
            copies.append(Path(f'copy{len(copies)}'))
            shutil.copytree('.', copies[-1], ignore=shutil.ignore_patterns('copy*'))
            return original(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        for owner, name in ((os, 'replace'), (os, 'rename'), (Path, 'unlink'), (os, 'fsync')):
            patch.setattr(owner, name, copying(getattr(owner, name)))
        save(epoch, seed=50, remove=remove)
    assert len(copies) > 12
    done = False
    for copy in [*copies, Path()]:
        found = Checkpoints(copy / 'run')
        newest = found.newest_whole()
        done = done or (newest is not None and newest.options == OPTIONS and is_new(newest, epoch))
        if done:
            assert_whole(found, epoch, seed=50)
        else:  # all that there was is still there, where it was or under the other prefix
            assert set(old.values()) - {old['run-symbol.json']} <= set(contents(copy).values())
            assert newest is None or not is_new(newest, epoch)
            if before == 'old run':
                assert found.epochs() == [1, 2, 3][: len(found.epochs())]
            for other in found.epochs() if before == 'old run' else ():
                with contextlib.suppress(UncheckedCheckpoint):
                    assert_whole(found, other)
        with found.lock():
            assert not list(copy.glob('.*[0-9]'))
    assert done and not list(Path().glob('.run*'))
    assert checkpoints.epochs() == ([2] if before == 'keep 1' else [*range(1, epoch + 1)])


def is_new(checkpoint, epoch):
    expected = arrays(50 + epoch)[0]['fc2_bias'].asnumpy()
    return (checkpoint.arg_params['fc2_bias'].asnumpy() == expected).all()


@contextlib.contextmanager
def largest_file(size):
    """What a full disk looks like: a write that comes up short."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_everything_as_it_was():
    checkpoints = save(1)
    before = contents()
    for size in (0, 300, Path('run-0001.params').stat().st_size - 1):
        for epoch, remove in ((1, [1]), (2, [])):
            with largest_file(size), pytest.raises(InputError) as error:
                save(epoch, seed=7, remove=remove)
            text = f'cannot write the checkpoint of epoch {epoch} to run-000{epoch}.params: '
            assert str(error.value) == f'{text}File too large'
            assert contents() == before
    assert_whole(checkpoints, 1)


def test_vanished_folder_is_told():
    os.mkdir('folder')
    checkpoints = save(1, prefix='folder/run')
    shutil.rmtree('folder')
    with pytest.raises(InputError, match=r'epoch 2 to folder/run-0002.params: No such file'):
        checkpoints.save(2, network(), *arrays(), OPTIONS)


@pytest.mark.slow
def test_memory_is_flat():
    """In a process of its own: memory that earlier tests have freed would be taken again."""
    program = """if True:
        from common.environment import mx
        from common.checkpoints import Checkpoints
        def resident_pages():
            return int(open('/proc/self/statm').read().split()[1])
        checkpoints, symbol = Checkpoints('run'), mx.sym.var('data')
        for _ in range(300):
            symbol = mx.sym.FullyConnected(symbol, num_hidden=10)
        weights = {'w': mx.nd.ones((200, 500))}
        for epoch in range(1, 201):
            checkpoints.save(epoch, symbol, weights, {}, {}, {}, remove=[epoch - 1])
            if epoch == 20:
                before = resident_pages()
        print(resident_pages() - before)"""
    pages = subprocess.check_output(
        [sys.executable, '-c', program], env={**os.environ, 'PYTHONPATH': str(ROOT)}, text=True
    )
    assert int(pages) * os.sysconf('SC_PAGESIZE') < 2**20


# One run at a time


def take_lock(prefix):
    with Checkpoints(prefix).lock():
        pass


def start_holding_lock(prefix):
    program = (
        'import sys, time; from common.checkpoints import Checkpoints\n'
        'with Checkpoints(sys.argv[1]).lock(): print("locked", flush=True); time.sleep(60)'
    )
    process = subprocess.Popen(
        [sys.executable, '-c', program, prefix],
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == 'locked\n'
    return process


@pytest.mark.slow
def test_second_run_is_refused_until_the_first_is_dead():
    process = start_holding_lock('run')
    try:
        for _ in range(2):
            with pytest.raises(InputError, match=f'process {process.pid} is writing checkpoints'):
                take_lock('run')
        take_lock('running')
    finally:
        process.kill()
        process.communicate()
    assert Path('.run.lock').exists()
    take_lock('run')
    assert os.listdir() == []


def test_lock_is_given_back():
    for _ in range(2):
        with pytest.raises(KeyError), Checkpoints('run').lock():
            with pytest.raises(InputError, match=f'process {os.getpid()} is writing'):
                take_lock('run')
            raise KeyError
    assert os.listdir() == []


@pytest.mark.parametrize('harm', [folder, dangling_link, loop_of_links])
def test_lock_that_cannot_be_had_is_told(harm):
    Path('.run.lock').touch()
    harm(Path('.run.lock'))
    with pytest.raises(InputError, match=r'cannot lock .run.lock: '):
        take_lock('run')


def test_half_written_files_are_removed():
    half = [
        '.run-symbol.json.12',
        '.run-0001.params.123',
        '.run-12345.json.5',
        '.run-0002.resume.1',
    ]
    other = ['.running-0001.params.12', '.run-0001.other.12', 'run-0001.params.12', '.run-1.json.1']
    for name in [*half, *other]:
        Path(name).touch()
    take_lock('run')
    assert sorted(os.listdir()) == sorted(other)


def test_unwritable_prefix_is_told():
    save(1)
    os.mkdir('folder-symbol.json')
    for prefix, reason in (
        ('gone/run', r'No such file or directory \(gone\)'),
        ('', 'it has to end with the beginning of a file name'),
        ('./', 'it has to end with the beginning of a file name'),
        ('folder/..', 'it has to end with'),
        ('run-0001.params/run', 'Not a directory'),
        ('\udcff', 'it is not UTF-8'),
        ('a\nb', 'it has characters that cannot be printed'),
        ('x' * 300, 'File name too long'),
        ('folder', 'folder-symbol.json is a folder'),
    ):
        with pytest.raises(InputError, match=f'(?s)cannot write checkpoints to .*: {reason}'):
            Checkpoints(prefix).check_writable()
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        with ordinary_user(), pytest.raises(InputError, match='Permission denied'):
            Checkpoints(f'{name}/run').check_writable()
    before = contents()
    Checkpoints('run').check_writable()
    assert contents() == before


def test_owns_its_files():
    os.mkdir('folder')
    os.symlink('../run-0001.params', 'folder/log.txt')
    os.symlink('x', 'x')
    for prefix in ('run', os.path.abspath('run'), Path('folder/../run')):
        checkpoints = Checkpoints(prefix)
        for name in ('run-symbol.json', 'run-0001.json', './run-12345.resume', 'folder/log.txt'):
            assert checkpoints.owns(name) and checkpoints.owns(os.path.abspath(name))
        for name in ('log.txt', 'run', 'folder/run-0001.json', 'run-1.json', 'run-0001.txt', 'x'):
            assert not checkpoints.owns(name)


# Parameters and networks


def test_parameter_mismatches():
    shapes, (arg_params, aux_params, _) = {'data': (7, 5)}, arrays()
    assert list(parameter_mismatches(network(), shapes, arg_params, aux_params)) == []
    shapes = [mx.io.DataDesc('data', (7, 5)), mx.io.DataDesc('softmax_label', (7,))]
    assert list(parameter_mismatches(network(), shapes, arg_params, aux_params)) == []
    arg_params['other'] = arg_params.pop('fc2_bias')
    found = dict(parameter_mismatches(network(hidden=6), shapes, arg_params, aux_params))
    assert found == {
        'other': 'which the network does not have',
        'fc2_bias': 'which is not there',
        'embedding_weight': 'of shape (4, 5) where the network has (6, 5)',
        'embedding_bias': 'of shape (4,) where the network has (6,)',
        'fc2_weight': 'of shape (3, 4) where the network has (3, 6)',
        'center_loss_center_bias': 'of shape (3, 4) where the network has (3, 6)',
    }
    with pytest.raises(InputError, match='the network does not take'):
        list(parameter_mismatches(network(), {'data': ()}, {}, {}))


def test_kept_checkpoint_has_its_network():
    save(1, 2)
    flip('run-0002.params', 60)
    save(2)
    assert Checkpoints('run-kept1').load_symbol().tojson() == network().tojson()


def test_originals_names():
    here = {
        'convolution0_weight': 'conv1_weight',
        'convolution1_bias': 'conv2_bias',
        'fullyconnected0_weight': 'fc1_weight',
        'fc2_bias': 'fc2_bias',
        'embedding_weight': 'embedding_weight',
        'center_loss__center': 'center_loss_center_bias',
    }
    params = {name: name for name in here}
    renamed = rename_original(params, here.values())
    assert renamed == {new: original for original, new in here.items()}
    assert rename_original(params, here.keys()) == params  # of a network with MXNet's own names
    assert rename_original(params, ['dense_weight']) == params
