"""The errors that end a script with one sentence on stderr instead of a traceback."""

from pathlib import Path
import sys
from typing import NoReturn


class Failure(Exception):
    """What ends a script. The text is one sentence: what was wrong, which value, what to do."""

    exit_status = 1

    def exit_script(self) -> NoReturn:
        """Print the sentence as one line on stderr, and end the script with the exit status."""
        line = ''.join(repr(c)[1:-1] if c in '\n\r\t' else c for c in str(self))
        print(f'{Path(sys.argv[0]).name}: error: {line}', file=sys.stderr)
        sys.exit(self.exit_status)


class InputError(Failure, ValueError):
    """A mistake in what the program was given: an option, a file, the data."""

    exit_status = 2


class DamagedCheckpoint(InputError):
    """A checkpoint whose bytes are not those that were written."""


class UncheckedCheckpoint(InputError):
    """A checkpoint without a checksum: of another program, or not finished."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""
