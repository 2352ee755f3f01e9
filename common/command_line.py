"""What the command lines share: the parser, types for its options, and how a script ends."""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import io
import math
import os
import signal
import sys
import threading
from typing import NoReturn, TextIO

from common.environment import mx
from common.errors import Failure, InputError, Terminated

# What MXNet says where memory, or memory for a thread, cannot be allocated.
OUT_OF_MEMORY = ('Failed to allocate', 'Malloc', 'bad_alloc', 'out of memory', 'unavailable')


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default that says something, and the lines of the description as they are."""

    def _get_help_string(self, action):
        if action.default in (None, '') or action.default is False:
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """A parser whose help shows defaults and whose errors are raised as :class:`InputError`."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise the message as an InputError, which :func:`run_script` prints."""
        raise InputError(message)


def number(
    kind: type, minimum: float = -math.inf, maximum: float = math.inf, above: float = -math.inf
) -> Callable[[str], float]:
    """Return an argparse type: a finite int or float in [minimum, maximum] and above ``above``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
        except (ValueError, OverflowError):
            noun = 'a whole number' if kind is int else 'a finite number'
            raise argparse.ArgumentTypeError(f'{text!r} is not {noun}') from None
        for wrong, bound in (
            (value <= above, f'greater than {above}'),
            (value < minimum, f'at least {minimum}'),
            (value > maximum, f'at most {maximum}'),
        ):
            if wrong:
                raise argparse.ArgumentTypeError(f'{text} is out of range: it has to be {bound}')
        return value

    return parse


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--model-prefix`` and ``--epoch`` of the programs that use a trained network."""
    parser.add_argument(
        '--model-prefix',
        metavar='P',
        help='run whose network is used, the --save-model-prefix of train.py (default: '
        'center_loss, or where that is missing the network that comes with the program, '
        'data/trained/center_loss)',
    )
    parser.add_argument(
        '--epoch',
        type=number(int, minimum=1, maximum=10**9),
        metavar='N',
        help='checkpoint of epoch N of this run, counted from 1, instead of the newest',
    )


class LossyStream:
    """A stream that drops what it cannot write: a lost terminal or reader stops no script."""

    def __init__(self, stream: TextIO | None):
        self._stream = stream or io.StringIO()  # None: it was closed from the start
        if hasattr(stream, 'reconfigure'):  # the name of a file may be no text in its encoding
            stream.reconfigure(errors='backslashreplace')

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the text if it can be written."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be written."""
        with contextlib.suppress(OSError):
            self._stream.flush()


def run_script(main: Callable[[Sequence[str]], None]) -> None:
    """Run ``main(sys.argv[1:])`` as a script.

    A :class:`Failure`, or a lack of memory, is printed as one line on stderr and sets the exit
    status; Ctrl-C and SIGTERM end with status 130 and 143, without a traceback.
    """

    def interrupt(number, frame):
        # While MXNet binds a custom operator it calls Python; an exception raised in there does
        # not reach the caller, and MXNet would go on with unfilled results and crash.
        while frame is not None:
            if frame.f_code.co_filename == mx.operator.__file__:
                os._exit(128 + number)
            if frame.f_code.co_name == '__del__':  # where Python would ignore the exception
                threading.Timer(0.01, os.kill, (os.getpid(), number)).start()
                return
            frame = frame.f_back
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    for signal_number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(signal_number) != signal.SIG_IGN:
            signal.signal(signal_number, interrupt)
    sys.stdout, sys.stderr = LossyStream(sys.stdout), LossyStream(sys.stderr)
    try:
        main(sys.argv[1:])
    except Failure as failure:
        failure.exit_script()
    except (MemoryError, mx.MXNetError) as error:
        if isinstance(error, mx.MXNetError) and not any(t in str(error) for t in OUT_OF_MEMORY):
            raise
        Failure(
            'there is too little memory: end other programs, or take less at once'
        ).exit_script()
    except KeyboardInterrupt as stop:
        sys.exit(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))
