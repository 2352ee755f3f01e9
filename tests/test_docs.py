"""The documentation: its size, links, commands and examples."""

import ast
import gzip
import importlib
import importlib.util
from pathlib import Path
import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from common.environment import mx
from common.command_line import ArgumentParser
from common.embedder import Embedder
from common.idx import read_idx
import data
import train
import vis

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
README = PAGES[0].read_text()
TEST_COMMAND = (
    'pip install -r tests/requirements.txt -r requirements.txt '
    '&& python -m pytest -n auto --dist=loadfile tests'
)


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.*)$', page.read_text(), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def shell_lines(text):
    """The lines of code blocks that are indented, or fenced but not as Python."""
    fenced = re.findall(r'^```(?:sh|bash|)\n(.*?)^```', text, re.M | re.S)
    text = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
    return [*re.findall(r'^    (.*)$', text, re.M), *''.join(fenced).splitlines()]


def python_commands(text):
    """The arguments of every command ``python ...`` in code blocks and in backquotes."""
    quoted = re.findall(r'`(python [^`\n]+)`', text)
    for line in [*shell_lines(text), *quoted]:
        for command in line.split(' && '):
            if command := re.fullmatch(r'(?:\w+=\S*\s+)*python\s+(.+)', command):
                yield shlex.split(command[1], comments=True)


COMMANDS = {
    f'{page.name}: {shlex.join(command)}': command
    for page in PAGES
    if page.name != 'changes.md'
    for command in python_commands(page.read_text())
}


class Parsed(Exception):
    """Raised in the place of running a tool whose arguments are right."""


def test_readme_is_short():
    assert len(README.encode()) < 10_000


def test_readme_shows_the_test_command():
    assert f'    {TEST_COMMAND}\n' in README


def test_commands_are_found():
    assert ['train.py', '--batch-size=128'] in COMMANDS.values()
    assert len(COMMANDS) > 30


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)]+)\)', page.read_text()):
        if not target.startswith(('http:', 'https:')):
            name, _, anchor = target.partition('#')
            linked = page.parent / name if name else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize('command', COMMANDS.values(), ids=COMMANDS)
def test_command_parses(command, monkeypatch):
    if command[0] == 'train.py':
        if not {'-h', '--help'} & {*command}:
            train.parse_args([word.replace('SEED', '1') for word in command[1:]])
    elif command[0] == 'vis.py':
        if not {'-h', '--help'} & {*command}:
            vis.parse_args(command[1:])
    elif command[0] == '-m' and command[1].startswith('tools.'):

        def parse_args(self, argv):
            original(self, argv)
            raise Parsed

        original = ArgumentParser.parse_args
        monkeypatch.setattr(ArgumentParser, 'parse_args', parse_args)
        if command[1] == 'tools.benchmark_torch':
            pytest.importorskip('torch')
        with pytest.raises(Parsed):
            importlib.import_module(command[1]).main(command[2:])
    elif command[0] == '-m':
        assert importlib.util.find_spec(command[1])
    elif command[0] != '-c':
        assert (ROOT / command[0]).is_file()


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_options_exist(page):
    sources = [*ROOT.glob('*.py'), *(ROOT / 'common').glob('*.py'), *(ROOT / 'tools').glob('*.py')]
    declared = {name for path in sources for name in re.findall(r"'(--[\w-]+)'", path.read_text())}
    declared |= {'--help', '--dist', '--index-url'}  # the latter two are pytest's and pip's
    gone = {'--parts', '--dimension'}  # of c9a6961, in changes.md
    assert {*re.findall(r'(?<![\w-])--[a-z][\w-]+', page.read_text())} <= declared | gone


def test_tools_are_documented():
    named = {command[1] for command in COMMANDS.values() if command[0] == '-m'}
    scripts = [path for path in (ROOT / 'tools').glob('*.py') if 'def main' in path.read_text()]
    changes = (ROOT / 'docs' / 'changes.md').read_text()
    for name in (f'tools.{path.stem}' for path in scripts):
        assert name in named or f'python -m {name}' in changes


@pytest.mark.parametrize('folder', ['common', 'tools'])
def test_every_module_is_listed(folder):
    listed = re.findall(r'``(\w+)``', importlib.import_module(folder).__doc__)
    modules = (path.stem for path in (ROOT / folder).glob('*.py') if path.stem != '__init__')
    assert sorted(listed) == sorted(modules)


def test_readme_examples():
    """The snippets run, given the network and the data that they take as given."""
    module_example, gluon_example = re.findall(r'^```python\n(.*?)^```', README, re.M | re.S)
    assert len([line for line in (module_example + gluon_example).splitlines() if line]) <= 15
    label, images = mx.sym.var('label'), np.random.default_rng(0).random((40, 8), np.float32)
    labels = np.arange(40, dtype=np.float32) % 10
    embedding = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=2)
    names = {
        'label': label,
        'embedding': embedding,
        'logits': mx.sym.FullyConnected(embedding, num_hidden=10),
        'batches': mx.io.NDArrayIter(images, labels, batch_size=20, label_name='label'),
    }
    exec(module_example, names)
    centers = names['module'].get_params()[1]['center_loss_center_bias']
    assert centers.shape == (10, 2) and abs(centers.asnumpy()).max() > 0

    embed, classify = (mx.gluon.nn.Dense(units) for units in (2, 10))
    embed.initialize()
    classify.initialize()
    cross_entropy = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    names = {'mx': mx, 'embed': embed, 'classify': classify, 'cross_entropy': cross_entropy}
    exec(gluon_example, {**names, 'images': mx.nd.array(images), 'labels': mx.nd.array(labels)})
    assert abs(embed.weight.grad().asnumpy()).max() > 0


def test_output_of_default_epochs():
    """The pages show the last checkpoint that the default recipe writes."""
    last = f'center_loss-{train.parse_args([]).num_epochs:04d}.params: '
    for page in ('README.md', 'docs/export.md'):
        assert {*re.findall(r'center_loss-\d{4}\.params: ', (ROOT / page).read_text())} == {last}


@pytest.mark.slow
def test_first_epoch_on_a_cpu(in_own_folder):
    """As the page shows it, which a GPU is compared with."""
    form = r'Epoch\[0\] ((?:Train|Validation)\S+)=(\S+)$'
    shown = dict(re.findall(form, (ROOT / 'docs' / 'gpu.md').read_text(), re.M))
    train.main(['--num-epochs=1', '--dataset=mnist-5k'])
    logged = dict(re.findall(form, Path('log.txt').read_text(), re.M))
    assert len(shown) == 6 and shown.keys() == logged.keys()
    for name, value in shown.items():
        assert float(logged[name]) == pytest.approx(float(value), rel=0.05), name


def python_blocks(page):
    """The code of a page's blocks of Python."""
    return re.findall(r'^```python\n(.*?)^```', (ROOT / 'docs' / page).read_text(), re.M | re.S)


def test_idx_files_are_written(in_own_folder):
    names = {}
    exec(python_blocks('own-data.md')[0], names)
    for name, array in zip(data.FILES, (names['images'], names['labels']), strict=False):
        np.testing.assert_array_equal(read_idx(Path(name))[0], array)


def test_emnist_is_prepared(in_own_folder):
    """The lines undo what EMNIST did, here to the bundled digits."""
    Path('gzip').mkdir()
    digits = data.load_digits('mnist-5k')
    parts = zip(('train', 'test'), (digits[:2], digits[2:4]), strict=True)
    for part, (images, labels) in parts:
        name = 'train' if part == 'train' else 't10k'
        for kind, array in (('images-idx3', images.transpose(0, 2, 1)), ('labels-idx1', labels)):
            raw = gzip.decompress((data.FOLDER / f'mnist-5k/{name}-{kind}-ubyte.gz').read_bytes())
            header = raw[: len(raw) - array.size]
            path = Path(f'gzip/emnist-balanced-{part}-{kind}-ubyte.gz')
            path.write_bytes(gzip.compress(header + array.tobytes(), 1))
    exec(python_blocks('own-data.md')[1], {})
    assert data.load_digits('mnist-5k', 'emnist').source == 'emnist'


@pytest.mark.slow
def test_own_network(in_own_folder, capsys, monkeypatch):
    """On the bundled digits, made as small: scikit-learn's SciPy slows down ``import mxnet``."""
    digits = data.load_digits('mnist-5k')
    images = digits.train_images[::2, 2:26, 2:26].reshape(-1, 8, 3, 8, 3).mean(axis=(2, 4)) // 16
    small = SimpleNamespace(images=images, target=digits.train_labels[::2].astype(np.int64))
    monkeypatch.setitem(sys.modules, 'sklearn', SimpleNamespace())
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', SimpleNamespace(load_digits=lambda: small))
    example = python_blocks('own-data.md')[2]
    assert len(example.splitlines()) < 40
    exec(example, {})
    assert ast.literal_eval(capsys.readouterr().out)['accuracy'] > 0.7
    embedder = Embedder('digits8x8')
    assert (embedder.dataset, embedder.image_shape) == ('digits 8x8', (8, 8))
    assert embedder.rejection_distance > 0
