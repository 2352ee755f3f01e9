"""The numbers in the logs of train.py."""

from pathlib import Path
import re

from common.errors import InputError

METRICS = ('accuracy', 'cross-entropy', 'center_loss')
# A line of the first worker, in MXNet's format.
LINE = re.compile(
    r'^(?!.*Node\[[1-9]).*Epoch\[(\d+)\] (Train|Validation)-(accuracy|cross[-_]entropy|center_loss)'
    r'=(nan|inf|\d+(?:\.\d+)?)$',
    re.M,
)

Curves = dict[tuple[str, str], dict[int, float]]


def read_log(path: str | Path) -> Curves:
    """Read the metrics of every epoch from a log.

    Of several runs in one file the last one counts: if the number of the epoch falls back, what was
    logged from that epoch on is dropped, so that a resumed run continues where it was. Of several
    workers the first one counts.

    Parameters
    ----------
    path
        The log file.

    Returns
    -------
    dict
        (split, metric) -> {epoch: value}: split 'Train' or 'Validation', metric one of ``METRICS``,
        epochs counted from 1.

    Raises
    ------
    InputError
        If the file cannot be read, or has no such numbers.
    """
    curves: Curves = {}
    newest = 0
    for line in LINE.finditer(_read_text(path)):
        epoch, curve = int(line[1]) + 1, (line[2], line[3].replace('cross_', 'cross-'))
        if epoch < newest or epoch in curves.get(curve, {}):
            curves = {
                kept: {before: value for before, value in values.items() if before < epoch}
                for kept, values in curves.items()
            }
        newest = epoch
        curves.setdefault(curve, {})[epoch] = float(line[4])
    if not curves:
        raise InputError(
            f'{path} has no line such as Epoch[0] Validation-accuracy=0.9: '
            'it is not a log of train.py'
        )
    return {curve: values for curve, values in curves.items() if values}


def validation_images(path: str | Path) -> str:
    """Return what the last run of a log validated on: 'test' or 'held-out'."""
    named = re.findall(r"start with arguments .*\bvalidate_on='([\w-]+)'", _read_text(path))
    return named[-1] if named else 'test'


def _read_text(path):
    try:
        return Path(path).read_text(errors='replace')
    except OSError as error:
        raise InputError(f'the log {path} cannot be read: {error.strerror}') from None
