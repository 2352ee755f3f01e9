"""Files: read without waiting, written whole or not at all."""

from collections.abc import Iterable, Iterator
import contextlib
import errno
import hashlib
import os
from pathlib import Path
import stat

from common.errors import InputError


def temporary_path(path: Path) -> Path:
    """Return where this process writes what is moved to ``path`` once it is whole."""
    return path.with_name(f'.{path.name}.{os.getpid()}')


@contextlib.contextmanager
def replace_when_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; move it there on success, remove it on failure."""
    temporary = temporary_path(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_regular_file(path: Path, max_bytes: int | None = None) -> bytes:
    """Return the first bytes of a file, by default all; a pipe or a device is refused.

    Raises InputError if it cannot be read. It never waits.
    """

    def open_without_waiting(name, flags):
        return os.open(name, flags | os.O_NONBLOCK)

    try:
        with open(path, 'rb', opener=open_without_waiting) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read(max_bytes)
            reason = 'it is not a regular file'
    except MemoryError:
        reason = 'it does not fit in memory'
    except FileNotFoundError:
        reason = 'it is a dangling link' if os.path.islink(path) else 'it is missing'
    except OSError as error:
        reason = 'it is a socket' if error.errno == errno.ENXIO else error.strerror
    raise InputError(f'cannot read {path}: {reason}')


def write_synced(path: Path, chunks: Iterable[bytes]) -> dict:
    """Write a file that is on the disk afterwards; return its size and SHA-256."""
    digest = hashlib.sha256()
    with open(path, 'wb') as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
        return {'size': file.tell(), 'sha256': digest.hexdigest()}


def sync_folder(folder: Path) -> None:
    """Make sure that names that were given or removed in a folder are so on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(path: Path, option: str, kinds: Iterable[str]) -> None:
    """Raise InputError if no file can be written to a path.

    Parameters
    ----------
    path
        The file.
    option
        The option of the command line that named it.
    kinds
        Suffixes that it may have, without the dot.
    """
    problem = None
    if path.suffix[1:].lower() not in kinds:
        problem = f'the file name has to end in one of .{", .".join(sorted(kinds))}'
    elif os.path.isdir(path):
        problem = 'it is a folder'
    elif not os.path.isdir(path.parent):
        problem = f'there is no folder {path.parent}'
    elif not os.access(path.parent, os.W_OK | os.X_OK):
        problem = f'no permission to write to {path.parent.resolve()}, name another folder'
    if problem:
        raise InputError(f'{option}={path} cannot be written: {problem}')


def printable(path: str | os.PathLike) -> str:
    """Return a path as text that any log can hold, whatever the bytes of its name."""
    return os.fsencode(path).decode('utf-8', 'backslashreplace')
