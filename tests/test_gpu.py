"""The GPU build: how it is loaded, what is said where it cannot be, and what a run on GPUs does."""

import ctypes
import os
from pathlib import Path
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest

from common.environment import mx
from center_loss import CenterLossGPU
from common import mxnet_build
from common.array_file import encode_arrays
from common.averaging import Average
from common.devices import choose_devices
from common.errors import InputError
from helpers import ROOT, assert_same_checkpoints, run_python, train_small
import train

HAS_CUDA = mx.runtime.Features().is_enabled('CUDA')
# What MXNet needs of the driver to be loaded; the version is CUDA 11.7, error 100 is no device.
DRIVER = 'int cuDriverGetVersion(int *version) { *version = 11070; return 0; }\n' + ''.join(
    f'int cu{name}(void) {{ return 100; }}\n'
    for name in (
        *('Init', 'DeviceGet', 'DevicePrimaryCtxRetain', 'GetErrorString', 'LaunchKernel'),
        *('GraphKernelNodeGetParams', 'GraphNodeGetType', 'ModuleGetFunction', 'ModuleLoadData'),
        *('ModuleLoadDataEx', 'ModuleUnload'),
    )
)
NO_DRIVER = (
    'MXNet is installed for GPUs and does not load without the NVIDIA driver (libcuda.so.1): '
    'install the driver, start the container with --gpus=all, or, for the CPU, pip install -r '
    'requirements.txt in a fresh environment'
)
NO_GPU = (
    '--gpus=0: there is no GPU 0, MXNet finds none at all; nvidia-smi lists those of this machine, '
    'CUDA_VISIBLE_DEVICES may hide some, and the driver has to be 450.80 or newer'
)
NOT_LOADED = {  # what the dynamic linker says: what the program says
    'libcuda.so.1: cannot open shared object file: No such file or directory': NO_DRIVER,
    'libcublas.so.11: cannot open shared object file: No such file or directory': (
        'MXNet needs the NVIDIA library libcublas.so.11: pip install -r requirements-gpu.txt'
    ),
    'libnccl.so.2: cannot open shared object file: No such file or directory': (
        'MXNet needs the NVIDIA library libnccl.so.2: pip install -r requirements-gpu.txt'
    ),
    'libgomp.so.1: cannot open shared object file: No such file or directory': (
        'MXNet needs the system library libgomp.so.1: apt-get install libgomp1 libquadmath0 '
        '(Debian, Ubuntu; elsewhere libgomp and libquadmath)'
    ),
    'libquadmath.so.0: cannot open shared object file: No such file or directory': (
        'MXNet needs the system library libquadmath.so.0: apt-get install libgomp1 libquadmath0 '
        '(Debian, Ubuntu; elsewhere libgomp and libquadmath)'
    ),
    '/x/libmxnet.so: invalid ELF header': 'MXNet does not load: /x/libmxnet.so: invalid ELF header',
}


def compile_library(path, source='', needed=()):
    """Compile a shared library of that name, which needs others."""
    compiler = shutil.which('cc') or shutil.which('gcc')
    if compiler is None:
        pytest.skip('no compiler')
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [compiler, '-shared', '-fPIC', '-x', 'c', '-', '-o', path, f'-Wl,-soname,{path.name}']
    command += ['-x', 'none', '-Wl,--no-as-needed', '-Wl,--allow-shlib-undefined', *needed]
    subprocess.run(command, input=source, text=True, check=True)
    return path


def fake_mxnet(folder, text):
    """Put a package mxnet into a folder that PYTHONPATH may begin with."""
    package = folder / 'mxnet' / '__init__.py'
    package.parent.mkdir()
    package.write_text(text)


def assert_sentence(result, sentence, script='train.py'):
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr == f'{script}: error: {sentence}\n'


@pytest.mark.parametrize('message', NOT_LOADED)
def test_missing_library(message, tmp_path):
    fake_mxnet(tmp_path, f'raise OSError({message!r})')
    result = run_python(ROOT / 'train.py', '--help', PYTHONPATH=str(tmp_path))
    assert_sentence(result, NOT_LOADED[message])


def test_missing_library_in_a_tool(tmp_path):
    fake_mxnet(tmp_path, f'raise OSError({next(iter(NOT_LOADED))!r})')
    result = run_python('-m', 'tools.benchmark', cwd=ROOT, PYTHONPATH=str(tmp_path))
    assert_sentence(result, NO_DRIVER, script='benchmark.py')


def test_nvidia_libraries_are_found(tmp_path):
    """One that MXNet needs, in NVIDIA's package, which needs another there, and the driver."""
    blas = compile_library(tmp_path / 'nvidia' / 'test_blas' / 'lib' / 'libcutestblas.so.11')
    solver = tmp_path / 'nvidia' / 'test_solver' / 'lib' / 'libcutestsolver.so.11'
    compile_library(solver, needed=[blas])
    (tmp_path / 'nvidia' / '__init__.py').touch()
    driver = compile_library(tmp_path / 'driver' / 'libcuda.so.1', DRIVER)
    compile_library(tmp_path / 'mxnet' / 'libmxnet.so', needed=[solver, driver])
    (tmp_path / 'mxnet' / '__init__.py').write_text(
        'import ctypes, types\n'
        f'ctypes.CDLL({str(tmp_path / "mxnet" / "libmxnet.so")!r})\n'
        'nd, MXNetError = types.SimpleNamespace(waitall=print), RuntimeError\n'
    )
    command = ['-c', 'from common.environment import mx; print(mx.MXNetError)']

    def load(**environment):
        return run_python(*command, cwd=ROOT, PYTHONPATH=str(tmp_path), **environment)

    result = load(LD_LIBRARY_PATH=str(driver.parent))
    assert (result.stdout, result.stderr) == ("<class 'RuntimeError'>\n\n", '')
    try:
        ctypes.CDLL('libcuda.so.1')
    except OSError:
        assert_sentence(load(), NO_DRIVER, '-c')
    solver.unlink()
    sentence = (
        'MXNet needs the NVIDIA library libcutestsolver.so.11: pip install -r requirements-gpu.txt'
    )
    assert_sentence(load(LD_LIBRARY_PATH=str(driver.parent)), sentence, '-c')


@pytest.mark.skipif(not HAS_CUDA, reason='this MXNet has no CUDA')
@pytest.mark.slow
def test_driver_without_a_gpu(tmp_path):
    """With the GPU build itself: training on the CPU works, and no stray line is printed."""
    driver = compile_library(tmp_path / 'libcuda.so.1', DRIVER).parent
    command = [ROOT / 'train.py', '--dataset=mnist-5k', '--num-epochs=1']
    result = run_python(*command, '--gpus=0', cwd=tmp_path, LD_LIBRARY_PATH=str(driver))
    assert_sentence(result, NO_GPU)
    result = run_python(*command, cwd=tmp_path, LD_LIBRARY_PATH=str(driver))
    assert result.returncode == 0
    assert all(' Node[0] ' in line for line in result.stderr.splitlines())


@pytest.mark.skipif(HAS_CUDA, reason='this MXNet has CUDA')
def test_cpu_build(in_own_folder):
    with pytest.raises(InputError) as error:
        train.main(['--gpus=0'])
    assert str(error.value) == (
        '--gpus=0: this MXNet is built for the CPU alone: pip install -r requirements-gpu.txt in a '
        'fresh environment (over this one it would break both builds), or leave --gpus out'
    )
    assert os.listdir() == []


def test_builds_over_each_other(tmp_path, monkeypatch):
    other = tmp_path / 'mxnet_cu112-1.9.1.dist-info'
    other.mkdir()
    (other / 'METADATA').write_text('Metadata-Version: 2.1\nName: mxnet-cu112\nVersion: 1.9.1\n')
    (other / 'top_level.txt').write_text('dmlc_tracker\nmxnet\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as error:
        train.main(['--gpus=0'])
    builds = 'mxnet-cu112 and mxnet-cu117' if HAS_CUDA else 'mxnet and mxnet-cu112'
    assert str(error.value) == (
        f'{builds} are installed over each other, in the same folder mxnet/: in a fresh '
        'environment, pip install -r requirements-gpu.txt or, for the CPU, requirements.txt'
    )


@pytest.fixture
def two_gpus(monkeypatch):
    """A fake of MXNet with CUDA on a machine of two GPUs; yields the operations on them.

    What is put into ``failures`` by GPU is raised when the result is read.
    """

    class Result:
        def __init__(self, shape, ctx):
            self.gpu = ctx.device_id

        def asnumpy(self):
            operations.append(self.gpu)
            if self.gpu in failures:
                raise mx.MXNetError(failures[self.gpu])

    operations, failures = [], {}
    monkeypatch.setattr(mx.runtime.Features, 'is_enabled', lambda self, name: name == 'CUDA')
    monkeypatch.setattr(mx.context, 'num_gpus', lambda: 2)
    monkeypatch.setattr(mx.nd, 'ones', Result)
    return operations, failures


def test_every_gpu_is_tried(two_gpus):
    assert choose_devices([1, 0]) == [mx.gpu(1), mx.gpu(0)]
    assert two_gpus[0] == [1, 0]


def test_fewer_gpus(two_gpus, monkeypatch):
    with pytest.raises(InputError, match=r'^--gpus=0,2: there is no GPU 2, MXNet finds only 0, 1;'):
        choose_devices([0, 2])
    monkeypatch.setattr(mx.context, 'num_gpus', lambda: 0)
    with pytest.raises(InputError) as error:
        choose_devices([0])
    assert str(error.value) == NO_GPU


def test_gpu_without_machine_code(two_gpus):
    two_gpus[1][1] = (
        'Traceback (most recent call last):\n'
        '  File "../src/operator/contrib/./../tensor/../mxnet_op.h", line 1143\n'
        'MXNetError: Check failed: err == cudaSuccess (209 vs. 0) : Name: mxnet_generic_kernel '
        'ErrStr:no kernel image is available for execution on the device'
    )
    with pytest.raises(InputError) as error:
        choose_devices([0, 1])
    assert str(error.value) == (
        '--gpus=0,1: this MXNet has no machine code for GPU 1: it runs on the generations Maxwell, '
        'Pascal, Volta, Turing, Ampere and Ada, not on Hopper or Blackwell; leave --gpus out to '
        'train on the CPU'
    )


def test_gpu_that_fails(two_gpus):
    two_gpus[1][0] = 'Traceback (...):\n  File "x"\nMXNetError: Check failed: out of memory'
    with pytest.raises(InputError) as error:
        choose_devices([0])
    assert str(error.value) == '--gpus=0: GPU 0 does not compute: Check failed: out of memory'


def test_gpus_compute_the_plain_network(monkeypatch):
    seen = {}

    def fit(network, load_data, **options):
        seen.update(options, network=network)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, 'fit', fit)
    monkeypatch.setattr(train, 'choose_devices', lambda gpus, cpus: [mx.cpu()])
    for argv, vectorized in (['--gpus=0'], False), ([], True):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            train.main(argv)
        assert ('compute_network' in seen) == vectorized
        facts = {'class_names': tuple('0123456789'), 'image_shape': [28, 28]}
        digits = SimpleNamespace(data_facts=facts)
        operations = seen['network'](digits).get_internals().list_outputs()
        assert 'conv1_output' in operations and 'image_three_times_output' not in operations
        if vectorized:
            operations = seen['compute_network'](digits).get_internals().list_outputs()
            assert 'image_three_times_output' in operations


def test_settings():
    """They keep NVRTC and two kinds of lines out, and the user's choice stays."""
    names = ('MXNET_USE_FUSION', 'MXNET_CUDNN_AUTOTUNE_DEFAULT', 'MXNET_CUDA_LIB_CHECKING')
    program = f"""
import os, sys, types
mx = sys.modules['mxnet'] = types.ModuleType('mxnet')
mx.nd, mx.MXNetError = types.SimpleNamespace(waitall=lambda: None), RuntimeError
import common.environment
print(*(os.environ[name] for name in {names}))
"""
    result = run_python('-c', program, cwd=ROOT, unset=names)
    assert result.stdout == '0 0 0\n'
    result = run_python('-c', program, cwd=ROOT, unset=names, MXNET_USE_FUSION='1')
    assert result.stdout == '1 0 0\n'


def test_operator_copies_nothing_to_the_host(monkeypatch):
    operator = CenterLossGPU(num_class=3, alpha=0.5, factor=1, out_grad=False)
    x, y = mx.nd.array([[1, 0], [3, 0], [0, 2]]), mx.nd.array([1, 1, 0])
    centers, loss, gradient = mx.nd.zeros((3, 2)), mx.nd.empty(3), mx.nd.empty((3, 2))
    with monkeypatch.context() as patch:
        for name in ('SyncCopyToCPU', 'SyncCopyFromCPU', 'WaitToRead', 'GetData'):
            patch.setattr(mx.base._LIB, f'MXNDArray{name}', None)
        with pytest.raises(TypeError):  # so the patch is met
            y.asnumpy()
        operator.forward(True, ['write'], [x, y], [loss], [centers])
        operator.backward(['write'] * 2, [], [x, y], [loss], [gradient, mx.nd.empty(3)], [centers])
    np.testing.assert_allclose(loss.asnumpy(), [0.5, 4.5, 2])
    np.testing.assert_allclose(centers.asnumpy(), [[0, 0.5], [2 / 3, 0], [0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(gradient.asnumpy(), x.asnumpy())


def test_average_is_on_the_device_of_the_weights():
    """Where a checkpoint's arrays, which are on the CPU, have to go first."""
    weight = mx.nd.ones(1, ctx=mx.cpu(3))
    module = SimpleNamespace(num_updates=lambda: 2, present_arrays=lambda: {'arg:w': weight})
    average = Average(1, module, {'arg:w': mx.nd.zeros(1)})
    average(None)
    assert average.arrays['arg:w'].context == mx.cpu(3)
    assert average.arrays['arg:w'].asscalar() == 0.5


def test_run_moves_to_other_devices(in_own_folder):
    """Nothing in a checkpoint is on the device that it was trained on."""
    options = {'average_weights': 0.5, 'num_examples': 200}
    train_small(save_model_prefix='whole', **options)
    module = train_small(save_model_prefix='moved', num_epochs=2, devices=[mx.cpu(3)], **options)
    saved = [*module.get_params(), module.optimizer_state()]
    assert {array.context for arrays in saved for array in arrays.values()} == {mx.cpu(0)}
    train_small(save_model_prefix='moved', resume=True, devices=[mx.cpu(0)], **options)
    assert_same_checkpoints('moved', 'whole', [1, 2, 3])


def test_file_names_no_device(in_own_folder):
    written = encode_arrays({'x': mx.nd.ones(2, ctx=mx.cpu(3))})
    Path('x').write_bytes(b''.join(written))
    assert mx.nd.load('x')['x'].context == mx.cpu(0)


def test_numpy_is_too_new(monkeypatch):
    monkeypatch.setattr(np, '__version__', '2.4.6')
    with pytest.raises(InputError, match='MXNet does not work with NumPy'):
        mxnet_build.import_mxnet()


def test_requirements():
    """Both builds share one file, and what tests need brings neither of them."""
    files = {
        path.name if path.parent == ROOT else 'tests': {
            line.partition('#')[0].strip() for line in path.read_text().splitlines()
        }
        - {''}
        for path in (*ROOT.glob('requirements*.txt'), ROOT / 'tests' / 'requirements.txt')
    }
    common = {'-r requirements-common.txt'}
    assert files['requirements.txt'] == {*common, 'mxnet==1.9.1'}
    gpu = files['requirements-gpu.txt'] - common
    assert 'mxnet-cu117==1.9.1' in gpu and len(gpu) == 11 and all('==' in line for line in gpu)
    assert {line for line in files['tests'] if '-r' in line} == {'-r ../requirements-onnx.txt'}
    for name in ('tests', 'requirements-onnx.txt', 'requirements-common.txt'):
        assert not any('mxnet' in line for line in files[name])
