"""The log of a run: line by line to a file and to stderr."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import logging
import logging.handlers
import os
from pathlib import Path
import sys

from tqdm.contrib.logging import logging_redirect_tqdm

from common.errors import Failure, InputError


class LogFile(logging.handlers.WatchedFileHandler):
    """A log file that is made by its first line, with its folder, and anew when it is deleted.

    A line that cannot be written, on a full disk say, stops no run: it is reported once on stderr.
    So is another run that writes to the file: worker 0 of a run holds a lock on it.
    """

    is_incomplete = is_shared = False

    def __init__(self, path: Path, rank: int = 0):
        super().__init__(path, delay=True)
        self.rank = rank

    def _open(self):
        Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
        stream = super()._open()
        try:
            if self.rank == 0:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not self.is_shared:
                self.is_shared = True
                print(
                    f'another run writes to {self.baseFilename}, too: vis.py --curves cannot tell '
                    'the two apart; give each a --log-file of its own',
                    file=sys.stderr,
                )
        except OSError:  # a file system without locks
            pass
        return stream

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        try:
            super().emit(record)
        except OSError:  # the file cannot be made anew
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Report, once, that the log is incomplete."""
        if not self.is_incomplete:
            self.is_incomplete = True
            print(
                f'cannot write the log file {self.baseFilename} ({sys.exc_info()[1]}): '
                'training goes on without it',
                file=sys.stderr,
            )


def check_log_path(path: Path) -> None:
    """Raise InputError where a log file, or the folder that it needs, could not be written."""
    problem = None
    try:
        nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
        if nearest == path and not path.is_file():
            problem = 'it is not a regular file'
        elif nearest != path and not nearest.is_dir():
            problem = f'{nearest} is not a folder'
        elif not os.access(nearest, os.W_OK):
            problem = 'no permission'
    except OSError as error:
        problem = error.strerror
    if problem:
        raise InputError(
            f'cannot write the log file {path}: {problem}; see --log_dir and --log_file'
        )


@contextlib.contextmanager
def log_to(path: Path, rank: int = 0) -> Iterator[None]:
    """Send the root logger, which MXNet writes to, to a file and to stderr.

    On a terminal the lines appear above the progress bar. A :class:`Failure` that ends the block is
    logged to the file, unless nothing has been logged before it: a mistake that is found at once
    writes no log.

    Parameters
    ----------
    path
        The file, which is appended to.
    rank
        The number of this worker, which every line names.
    """
    check_log_path(path)
    logger, file, console = logging.getLogger(), LogFile(path, rank), logging.StreamHandler()
    level = logger.level
    logger.setLevel(logging.INFO)
    for handler in (file, console):
        handler.setFormatter(logging.Formatter(f'%(asctime)-15s Node[{rank}] %(message)s'))
        logger.addHandler(handler)
    try:
        with logging_redirect_tqdm() if sys.stderr.isatty() else contextlib.nullcontext():
            yield
    except Failure as failure:
        logger.removeHandler(console)  # the script prints it on stderr
        if file.stream is not None:
            logging.error('%s', failure)
        raise
    finally:
        logger.setLevel(level)
        for handler in (file, console):
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # a full disk has been reported
                handler.close()


@contextlib.contextmanager
def log_when_stopped(resume_hint: Callable[[], str]) -> Iterator[None]:
    """Log which checkpoint stands and how to continue where Ctrl-C or SIGTERM ends the block."""
    try:
        yield
    except KeyboardInterrupt:
        logging.warning('stopped: %s', resume_hint())
        raise


@contextlib.contextmanager
def log_to_stderr(but_warnings_of: str = '') -> Iterator[None]:
    """Log plain lines to stderr within the block, unless the program has a log of its own.

    Warnings of one module, named by ``but_warnings_of``, may be left out.
    """
    logger = logging.getLogger()
    if logger.handlers:
        yield
        return
    level, handler = logger.level, logging.StreamHandler()
    handler.addFilter(
        lambda record: record.module != but_warnings_of or record.levelno < logging.WARNING
    )
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
