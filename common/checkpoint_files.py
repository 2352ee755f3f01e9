"""The files of checkpoints: their names, a lock on them, and reading and writing them safely."""

from collections.abc import Iterator
import contextlib
import fcntl
import itertools
import os
from pathlib import Path
import re

from common.errors import InputError
from common.files import sync_folder, temporary_path, write_synced

KINDS = ('json', 'params', 'resume', 'states')  # .states: of the first form


class CheckpointFiles:
    """The files of one prefix, the path that all their names begin with."""

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = os.fspath(prefix)
        self._folder = Path(self.prefix).parent
        self._name = os.path.basename(self.prefix)
        epoch_file = rf'([0-9]{{4}}|[1-9][0-9]{{4,}})\.({"|".join(KINDS)})'
        # Groups: epoch and kind, and of a temporary file the dot and the process that it ends with.
        self._names = re.compile(
            rf'(\.?){re.escape(self._name)}-(?:symbol\.json|{epoch_file})((?:\.[0-9]+)?)'
        )

    @property
    def symbol_path(self) -> Path:
        """The file of the network."""
        return Path(f'{self.prefix}-symbol.json')

    def params_path(self, epoch: int) -> Path:
        """Return the file of the parameters of an epoch."""
        return self._path(epoch, 'params')

    def _path(self, epoch, kind):
        return Path(f'{self.prefix}-{epoch:04d}.{kind}')

    def _kinds(self, epoch):
        """Return which files of an epoch are there, dangling links included."""
        return [kind for kind in KINDS if os.path.lexists(self._path(epoch, kind))]

    def _matches(self):
        """Return matches of the names in the folder that are names of these files."""
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            names = []
        except OSError as error:
            raise InputError(f'cannot read the folder {self._folder}: {error.strerror}') from None
        return filter(None, map(self._names.fullmatch, names))

    def epochs(self) -> list[int]:
        """Return the epochs that have a checkpoint, whole or not, in order."""
        found = {int(match[2]) for match in self._matches() if match[2] and not match[1] + match[4]}
        # A .resume alone was left by a killed save; a .json alone may be anybody's.
        return sorted(
            epoch
            for epoch in found
            if 'params' in self._kinds(epoch) or {'json', 'resume'} <= {*self._kinds(epoch)}
        )

    def check_epoch(self, epoch: int) -> None:
        """Raise InputError where an epoch has no checkpoint."""
        if epoch not in self.epochs():
            raise InputError(
                f'there is no {self.params_path(epoch)}; epochs of {self.prefix} that have a '
                f'checkpoint: {", ".join(map(str, self.epochs())) or "none"}'
            )

    def saved_since(self, begin: float) -> list[Path]:
        """Return the parameters of the finished epochs saved at that time or later, in order."""
        finished = [
            self.params_path(epoch)
            for epoch in self.epochs()
            if {'json', 'states'} & {*self._kinds(epoch)}  # written last, now and formerly
        ]
        return [path for path in finished if path.exists() and path.stat().st_mtime >= begin]

    def _move(self, epoch, with_symbol=False):
        """Move the files of an epoch to another prefix, first its .json; return that prefix.

        ``with_symbol`` is for an epoch that stays there: its network gets the second name too.
        """
        if self._kinds(epoch) == ['resume']:  # left by a killed save
            self._path(epoch, 'resume').unlink()
        kinds, symbol = self._kinds(epoch), self._encoded_network()
        prefixes = (CheckpointFiles(f'{self.prefix}-kept{n}') for n in itertools.count(1))
        kept = next(
            prefix
            for prefix in prefixes
            if not prefix._kinds(epoch) and prefix._encoded_network() in (None, symbol)
        )
        if kinds and with_symbol and symbol is not None:
            try:
                os.link(self.symbol_path, kept.symbol_path)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                write_synced(kept.symbol_path, [symbol])
        for kind in kinds:
            os.rename(self._path(epoch, kind), kept._path(epoch, kind))
            if kind == 'json':
                sync_folder(self._folder)
        return kept

    def _encoded_network(self):
        """Return what the file of the network holds, None where there is none."""
        return self.symbol_path.read_bytes() if self.symbol_path.is_file() else None

    def _remove(self, epoch):
        """Remove the files of an epoch, first its .json; those of one without it stay."""
        kinds = self._kinds(epoch)
        for kind in kinds if 'json' in kinds else ():
            self._path(epoch, kind).unlink()
            if kind == 'json':
                sync_folder(self._folder)

    def owns(self, path: str | os.PathLike) -> bool:
        """Whether a path is, or may become, a file of these checkpoints."""
        return any(
            os.path.realpath(folder) == os.path.realpath(self._folder)
            and self._names.fullmatch(name) is not None
            for folder, name in map(os.path.split, (path, os.path.realpath(path)))
        )

    def check_writable(self) -> None:
        """Raise InputError where no checkpoint could be written."""
        problem, trial = None, temporary_path(self.symbol_path)
        try:
            str(trial).encode()
            trial.touch()
            trial.unlink()
            if self.symbol_path.is_dir():
                problem = f'{self.symbol_path} is a folder'
        except OSError as error:
            problem = f'{error.strerror} ({self._folder})'
        except UnicodeEncodeError:
            problem = 'it is not UTF-8'
        if self._name in ('', '.', '..'):
            problem = 'it has to end with the beginning of a file name'
        elif problem is None and not self.prefix.isprintable():
            problem = 'it has characters that cannot be printed'
        if problem:
            raise InputError(
                f'cannot write checkpoints to --save-model-prefix={self.prefix}: {problem}'
            )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the prefix against other runs; remove what a killed one left half-written.

        Raises InputError where another run has the lock, which ends with its process.
        """
        path, owner = self._folder / f'.{self._name}.lock', ''
        try:
            descriptor = _open_locked(path)
        except BlockingIOError:
            with contextlib.suppress(OSError):  # it may have ended since
                owner = path.read_text()
            raise InputError(
                f'process {owner} is writing checkpoints to {self.prefix}: wait for its '
                'end, or choose another --save-model-prefix'
            ) from None
        except OSError as error:
            raise InputError(f'cannot lock {path}: {error.strerror}') from None
        try:
            for match in self._matches():
                if match[1] and match[4]:
                    (self._folder / match[0]).unlink(missing_ok=True)
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _open_locked(path):
    """Return the descriptor of a locked file that has this process's number in it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.truncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor
        except FileNotFoundError:  # its last owner has removed it in between
            pass
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
