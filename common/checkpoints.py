"""Checkpoints: after every epoch the network, its parameters and what training goes on from.

    PREFIX-symbol.json     the network, one for all epochs; MXNet's format
    PREFIX-0001.params     'arg:NAME' weights and 'aux:NAME' centers; MXNet's format
    PREFIX-0001.resume     what ``--resume`` needs besides, as named arrays: the optimizer's state
    PREFIX-0001.json       epoch, sizes and SHA-256 of these two, options and versions, and a
                           checksum of itself; written last, it makes the checkpoint

A checkpoint is one thing: every reader compares the checksums before it parses anything. Files are
written under temporary names, synced, renamed, and then the folder is synced. What was there before
is removed where the caller says so, and otherwise kept under another prefix.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import platform
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.array_file import decode_arrays, encode_arrays, is_array_file
from common.environment import mx
from common.errors import InputError
from common.files import temporary_path
from common.symbol_file import decode_symbol, encode_symbol

Arrays = Mapping[str, mx.nd.NDArray]

KINDS = ('json', 'params', 'resume', 'states')  # in the order in which they are removed
MAX_JSON_SIZE = 2**24


class DamagedCheckpoint(InputError):
    """A checkpoint whose bytes are not those that were written."""


class UncheckedCheckpoint(InputError):
    """A checkpoint without a checksum: of another program, or not finished."""


class Checkpoint(NamedTuple):
    """All that was saved of an epoch, see :meth:`Checkpoints.save`."""

    epoch: int
    arg_params: dict[str, mx.nd.NDArray]
    aux_params: dict[str, mx.nd.NDArray]
    state: dict[str, mx.nd.NDArray]
    options: dict


class Checkpoints:
    """The checkpoints of one prefix, which belong to one run.

    Parameters
    ----------
    prefix
        The path that the names of all files begin with.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = os.fspath(prefix)
        self._folder = Path(self.prefix).parent
        self._name = os.path.basename(self.prefix)
        self._symbol = self._symbol_bytes = None  # the one that was saved last
        self._reported = False  # that there are checkpoints without a checksum

    @property
    def symbol_path(self) -> Path:
        """The file of the network."""
        return Path(f'{self.prefix}-symbol.json')

    def params_path(self, epoch: int) -> Path:
        """Return the file of an epoch's parameters."""
        return self._path(epoch, 'params')

    def _path(self, epoch, kind):
        return Path(f'{self.prefix}-{epoch:04d}.{kind}')

    def _epochs_of(self, kind):
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise InputError(f'cannot read the folder {self._folder}: {error.strerror}') from None
        pattern = re.escape(self._name) + rf'-([0-9]{{4}}|[1-9][0-9]{{4,}})\.{kind}'
        return {int(match[1]) for match in (re.fullmatch(pattern, name) for name in names) if match}

    def epochs(self) -> list[int]:
        """Return the epochs that have a checkpoint, whole or not, in order."""
        unfinished = self._epochs_of('resume') & self._epochs_of('json')
        return sorted(self._epochs_of('params') | unfinished)

    def owns(self, path: str | os.PathLike) -> bool:
        """Whether a path is, or would be, a file of one of these checkpoints."""
        pattern = (
            rf'\.?{re.escape(self._name)}-(symbol\.json|[0-9]{{4,}}\.({"|".join(KINDS)}))(\.\d+)?'
        )
        path, folder = Path(os.path.abspath(path)), self._folder.resolve()
        return any(
            re.fullmatch(pattern, place.name) is not None and place.parent.resolve() == folder
            for place in (path, path.resolve())
        )

    def check_writable(self) -> None:
        """Raise InputError where no checkpoint can be written."""
        trial, problem = temporary_path(self.symbol_path), None
        try:
            str(trial).encode()  # as a message has to show it
            if self._name in ('', '.', '..'):
                problem = 'it has to end with the beginning of a file name'
            elif self.symbol_path.is_dir():
                problem = f'{self.symbol_path} is a folder'
            else:
                trial.touch()
                trial.unlink()
        except OSError as error:
            problem = f'{error.strerror} ({self._folder})'
        except UnicodeEncodeError:
            problem = 'it is not UTF-8'
        if problem:
            raise InputError(
                f'cannot write checkpoints to {self.prefix}: {problem}; see --save-model-prefix'
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing these checkpoints; remove what they left half-written.

        Raises
        ------
        InputError
            If another process has the lock. It loses the lock when it ends, however it ends.
        """
        path = self._folder / f'.{self._name}.lock'
        try:
            descriptor = _lock_file(path)
        except BlockingIOError:
            with contextlib.suppress(OSError):
                owner = path.read_text()
            raise InputError(
                f'process {owner or "?"} is writing checkpoints to {self.prefix}: wait for it, '
                'or choose another --save-model-prefix'
            ) from None
        except OSError as error:
            raise InputError(f'cannot lock {path}: {error.strerror}') from None
        try:
            pattern = (
                rf'\.{re.escape(self._name)}-(symbol\.json|[0-9]{{4,}}\.({"|".join(KINDS)}))\.\d+'
            )
            for name in os.listdir(self._folder):
                if re.fullmatch(pattern, name):
                    (self._folder / name).unlink(missing_ok=True)
            yield
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)

    def save(
        self,
        epoch: int,
        symbol: mx.sym.Symbol,
        arg_params: Arrays,
        aux_params: Arrays,
        state: Arrays,
        options: dict,
        remove: Iterable[int] = (),
    ) -> None:
        """Write a whole checkpoint, or leave everything as it was.

        Parameters
        ----------
        epoch
            Number of finished epochs.
        symbol
            The network.
        arg_params, aux_params
            Weights and centers by name.
        state
            What else training goes on from: 'optimizer0:NAME', and where the weights are averages
            'last:arg:NAME' and 'last:aux:NAME'.
        options
            What determines the result, as JSON keeps it.
        remove
            Epochs that go when the new one is ready. An epoch of this number that is not among them
            is kept under another prefix; so are, in any case, those without a checksum.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        if symbol is not self._symbol:  # MXNet loses memory whenever it encodes one
            self._symbol, self._symbol_bytes = symbol, encode_symbol(symbol)
        paths = {kind: self._path(epoch, kind) for kind in ('resume', 'params', 'json')}
        temporary = {path: temporary_path(path) for path in [*paths.values(), self.symbol_path]}
        try:
            files = {
                kind: _write(temporary[paths[kind]], encode_arrays(arrays))
                for kind, arrays in (('resume', state), ('params', tagged(arg_params, aux_params)))
            }
            content = {
                'epoch': epoch,
                'files': files,
                'options': options,
                'versions': versions(),
            }
            _write(temporary[paths['json']], [_with_checksum(content)])
            if not self._has_symbol():
                _write(temporary[self.symbol_path], [self._symbol_bytes])
            for old in sorted({*remove} - {epoch}, reverse=True):
                self._clear(old, remove=True)
            self._clear(epoch, remove=epoch in remove)
            if temporary[self.symbol_path].exists():
                os.replace(temporary[self.symbol_path], self.symbol_path)
            os.replace(temporary[paths['resume']], paths['resume'])
            os.replace(temporary[paths['params']], paths['params'])
            _sync_folder(self._folder)
            os.replace(temporary[paths['json']], paths['json'])
            _sync_folder(self._folder)
        except OSError as error:
            raise InputError(
                f'cannot write the checkpoint of epoch {epoch} to {self.params_path(epoch)}: '
                f'{error.strerror or error}'
            ) from None
        finally:
            for path in temporary.values():
                path.unlink(missing_ok=True)

    def _has_symbol(self):
        """Whether the file of the network is the one to be saved."""
        try:
            return read_regular_file(self.symbol_path) == self._symbol_bytes
        except InputError:
            return False

    def _clear(self, epoch, remove):
        """Remove the files of an epoch, or move them to another prefix: first what makes them one."""
        there = [kind for kind in KINDS if os.path.lexists(self._path(epoch, kind))]
        remove = there == ['resume'] or (remove and ('json' in there or 'resume' in there))
        kept = self._unused_prefix(epoch)
        for kind in there:
            path = self._path(epoch, kind)
            if remove and not path.is_dir():
                path.unlink()
            else:
                os.rename(path, kept._path(epoch, kind))
            if kind == 'json':
                _sync_folder(self._folder)
        if there and not remove:
            logging.warning('%s is kept as %s', self.params_path(epoch), kept.params_path(epoch))

    def _unused_prefix(self, epoch):
        number = 1
        while True:
            kept = Checkpoints(f'{self.prefix}-kept{number}')
            if not any(os.path.lexists(kept._path(epoch, kind)) for kind in KINDS):
                return kept
            number += 1

    def load(self, epoch: int) -> Checkpoint:
        """Return a whole checkpoint.

        Raises
        ------
        DamagedCheckpoint
            If its bytes are not those that were written.
        UncheckedCheckpoint
            If it has no checksum.
        InputError
            If a file is missing or cannot be read.
        """
        content = self._content(epoch)
        if content is None:
            return self._load_without_json(epoch)
        params, state = (
            self._decode(epoch, kind, self._checked(epoch, kind, content['files'][kind]))
            for kind in ('params', 'resume')
        )
        return Checkpoint(epoch, *untagged(params), state, content['options'])

    def load_params(self, epoch: int) -> tuple[dict, dict]:
        """Return the weights and the centers of an epoch by name; see :meth:`load` for the errors.

        A checkpoint of another program, which has no checksum, is read as well, with a warning.
        """
        if epoch not in self.epochs():
            there = ', '.join(map(str, self.epochs())) or 'none'
            raise InputError(
                f'there is no {self.params_path(epoch)}; '
                f'epochs of {self.prefix} that have a checkpoint: {there}'
            )
        content = self._content(epoch)
        if content is not None:
            data = self._checked(epoch, 'params', content['files']['params'])
        else:
            data = read_regular_file(self.params_path(epoch))
            digest = self._digest_in_states(epoch)
            if digest is None and not self._reported:
                self._reported = True
                logging.warning('%s has no checksum: it is read as it is', self.params_path(epoch))
            elif digest is not None and hashlib.sha256(data).digest() != digest:
                raise DamagedCheckpoint(self._damage(epoch, 'params', 'its checksum differs'))
        return untagged(self._decode(epoch, 'params', data))

    def load_symbol(self) -> mx.sym.Symbol:
        """Return the network. Raises InputError where it is missing, damaged or not let through."""
        try:
            return decode_symbol(read_regular_file(self.symbol_path))
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f'{self.symbol_path} is not the network of a checkpoint: {error}'
            ) from None

    def newest_whole(self) -> Checkpoint | None:
        """Return the newest whole checkpoint, None where there is none to begin with.

        Checkpoints without a checksum and damaged ones are passed over with a warning.

        Raises
        ------
        InputError
            If a newer one cannot be read, or if all are damaged.
        """
        damaged = False
        for epoch in reversed(self.epochs()):
            try:
                return self.load(epoch)
            except UncheckedCheckpoint as error:
                logging.warning('%s; it is passed over', error)
            except DamagedCheckpoint as error:
                logging.warning('%s; going back to the checkpoint before it', error)
                damaged = True
        if damaged:
            raise InputError(
                f'no checkpoint of {self.prefix} is whole: start a new run, '
                'or choose another --save-model-prefix'
            )
        return None

    def _content(self, epoch):
        """Return what the .json of an epoch says, None where there is none."""
        path = self._path(epoch, 'json')
        if not os.path.lexists(path):
            return None
        data = read_regular_file(path, MAX_JSON_SIZE)
        try:
            content = json.loads(data)
            if _with_checksum(content) != data:
                raise ValueError
        except (ValueError, AttributeError, TypeError, RecursionError):
            raise DamagedCheckpoint(self._damage(epoch, 'json', 'its checksum differs')) from None
        if content['epoch'] != epoch:
            raise DamagedCheckpoint(self._damage(epoch, 'json', f'it is of {content["epoch"]}'))
        return content

    def _damage(self, epoch, kind, reason):
        return f'{self._path(epoch, kind)} is damaged: {reason}'

    def _checked(self, epoch, kind, file):
        """Return the bytes of a file that have the size and the digest that were written down."""
        data = read_regular_file(self._path(epoch, kind))
        if len(data) != file['size']:
            reason = f'it has {len(data)} bytes instead of {file["size"]}'
            raise DamagedCheckpoint(self._damage(epoch, kind, reason))
        if hashlib.sha256(data).hexdigest() != file['sha256']:
            raise DamagedCheckpoint(self._damage(epoch, kind, 'its checksum differs'))
        return data

    def _decode(self, epoch, kind, data):
        try:
            return decode_arrays(data)
        except ValueError as error:
            raise DamagedCheckpoint(self._damage(epoch, kind, error)) from None

    def _states(self, epoch):
        """Return the .states as this program wrote them in 2024, None where there are no such."""
        path = self._path(epoch, 'states')
        data = read_regular_file(path) if os.path.lexists(path) else b''
        return self._decode(epoch, 'states', data) if is_array_file(data) else None

    def _digest_in_states(self, epoch):
        states = self._states(epoch) or {}
        return states['digest'].asnumpy().tobytes() if 'digest' in states else None

    def _load_without_json(self, epoch):
        """Return a checkpoint in the former form, whose .states have the digest of its .params."""
        states = self._states(epoch)
        if states is None or not {'digest', 'options'} <= states.keys():
            raise UncheckedCheckpoint(
                f'{self.params_path(epoch)} has no checksum: it is of another program, or its '
                'writing was cut short'
            )
        arg_params, aux_params = self.load_params(epoch)
        logging.warning('%s has no checksum of its own', self._path(epoch, 'states'))
        state = {}
        for name, value in states.items():
            if name.startswith('momentum:'):
                state[f'optimizer0:{name[9:]}'] = value
            elif name.startswith('last:'):
                state[name] = value
        wanted = {f'optimizer0:{name}': value for name, value in arg_params.items()}
        if any(name.startswith('last:') for name in state):
            params = tagged(arg_params, aux_params)
            wanted.update({f'last:{name}': value for name, value in params.items()})
        shapes = ({name: (a.shape, a.dtype) for name, a in d.items()} for d in (wanted, state))
        try:
            options = json.loads(states['options'].asnumpy().tobytes())
        except (ValueError, RecursionError):
            options = None
        if next(shapes) != next(shapes) or not isinstance(options, dict):
            raise DamagedCheckpoint(
                self._damage(epoch, 'states', 'it does not fit to the parameters')
            )
        return Checkpoint(epoch, arg_params, aux_params, state, options)


def tagged(arg_params: Arrays, aux_params: Arrays) -> dict[str, mx.nd.NDArray]:
    """Return weights and centers in one dict, as in a .params file: 'arg:NAME' and 'aux:NAME'."""
    return {
        **{f'arg:{name}': value for name, value in arg_params.items()},
        **{f'aux:{name}': value for name, value in aux_params.items()},
    }


def untagged(arrays: Arrays) -> tuple[dict, dict]:
    """Return (arg_params, aux_params) of what :func:`tagged` returns."""
    return tuple(
        {name[4:]: value for name, value in arrays.items() if name.startswith(tag)}
        for tag in ('arg:', 'aux:')
    )


def parameter_mismatches(
    network: mx.sym.Symbol, data_shapes: Mapping[str, tuple], arg_params: Arrays, aux_params: Arrays
) -> Iterator[tuple[str, str]]:
    """Yield (name, why) of every parameter that the network does not have, misses, or has otherwise.

    ``data_shapes`` are the shapes of the inputs by name; those of the labels may be left out.
    """
    data_shapes = dict(data_shapes)
    arg_shapes, _, aux_shapes = network.infer_shape(**data_shapes)
    names = network.list_arguments() + network.list_auxiliary_states()
    wanted = {
        name: shape
        for name, shape in zip(names, arg_shapes + aux_shapes, strict=True)
        if name not in data_shapes and not name.endswith('label')
    }
    given = {name: value.shape for name, value in {**arg_params, **aux_params}.items()}
    for name, shape in given.items():
        if name not in wanted:
            yield name, 'which the network does not have'
        elif shape != wanted[name]:
            yield name, f'of shape {shape} where the network has {wanted[name]}'
    for name in wanted:
        if name not in given:
            yield name, 'which is not there'


ORIGINAL_NAMES = {
    'convolution0': 'conv1',
    'convolution1': 'conv2',
    'fullyconnected0': 'fc1',
    'center_loss__center': 'center_loss_center_bias',
}


def rename_original(arg_params: Arrays, aux_params: Arrays) -> tuple[dict, dict]:
    """Return parameters of the original of 2016 under the names that they have here."""

    def renamed(name):
        layer, separator, rest = name.partition('_')
        if name in ORIGINAL_NAMES:
            return ORIGINAL_NAMES[name]
        return ORIGINAL_NAMES.get(layer, layer) + separator + rest

    return tuple(
        {renamed(name): value for name, value in arrays.items()}
        for arrays in (arg_params, aux_params)
    )


def versions() -> dict[str, str]:
    """Return what a result may depend on besides the options: versions and the machine."""
    with contextlib.suppress(OSError):
        flags = Path('/proc/cpuinfo').read_text().split()
    return {
        'python': platform.python_version(),
        'numpy': np.__version__,
        'mxnet': mx.__version__,
        'instruction_set': next((f for f in ('avx512f', 'avx2', 'avx') if f in flags), 'sse2'),
        'threads': os.environ.get('OMP_NUM_THREADS', ''),
    }


def read_regular_file(path: Path, max_size: float = float('inf')) -> bytes:
    """Return the content of a file, which has to be one: a pipe or a device might never end.

    Raises
    ------
    InputError
        If it cannot be read.
    """

    def open_without_waiting(name, flags):
        return os.open(name, flags | os.O_NONBLOCK)

    try:
        with open(path, 'rb', opener=open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f'{path} is not a regular file')
            if status.st_size > max_size:
                raise InputError(f'{path} has {status.st_size} bytes')
            return file.read()
    except MemoryError:
        reason = 'it does not fit into memory'
    except FileNotFoundError:
        reason = 'it is a link to nothing' if os.path.islink(path) else 'it is missing'
    except OSError as error:
        reason = 'it is a socket' if error.errno == errno.ENXIO else error.strerror
    raise InputError(f'cannot read {path}: {reason}')


def _with_checksum(content):
    """Return the .json of a checkpoint: the content with a checksum of itself."""
    content = {key: value for key, value in content.items() if key != 'sha256'}
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, 'sha256': checksum}, indent=1) + '\n').encode()


def _write(path, chunks):
    """Write and sync a file, read it again, and return its size and digest."""
    digest = hashlib.sha256()
    with open(path, 'wb') as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
    written = path.read_bytes()
    if hashlib.sha256(written).digest() != digest.digest():
        raise OSError(errno.EIO, 'what was written reads differently')
    return {'size': len(written), 'sha256': digest.hexdigest()}


def _sync_folder(folder):
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock_file(path):
    """Return the descriptor of a file that is locked and has this process's number in it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, str(os.getpid()).encode())
                    return descriptor  # else its last owner has removed it meanwhile
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
