"""Files that are written whole or not at all."""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path


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
