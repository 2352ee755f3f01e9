"""The errors that end a script with one sentence on stderr instead of a traceback."""


class Failure(Exception):
    """What ends a script. The text is one sentence: what was wrong, which value, what to do."""

    exit_status = 1


class InputError(Failure, ValueError):
    """A mistake in what the program was given: an option, a file, the data."""

    exit_status = 2


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""
