"""The course of training: the numbers in the logs of train.py, and their curves."""

from __future__ import annotations

from collections.abc import Sequence
import itertools
from pathlib import Path
import re
from typing import TYPE_CHECKING

from common.errors import InputError
from common.files import printable
from common.pictures import distinct_colors, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MAX_NAME = 50  # characters of a path in the legend
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
    """Return what the last run of a log that has a number validated on: 'test' or 'held-out'."""
    text = _read_text(path)
    *_, end = 0, *(line.start() for line in LINE.finditer(text))
    named = re.findall(r"start with arguments .*\bvalidate_on='([\w-]+)'", text[:end])
    return named[-1] if named else 'test'


def _read_text(path):
    try:
        return Path(path).read_text(errors='replace')
    except OSError as error:
        raise InputError(f'the log {path} cannot be read: {error.strerror}') from None


def draw_curves(paths: Sequence[str]) -> tuple[Figure, list[str]]:
    """Draw the metrics of logs over the epochs: a color for each log, dashed for training.

    Returns
    -------
    figure : matplotlib.figure.Figure
        With a panel for every metric that is in one of the logs; accuracy in any case.
    report : list of str
        A line about the last epoch of each log.
    """
    logs = [read_log(path) for path in paths]
    logged = {metric for log in logs for _, metric in log} | {'accuracy'}
    metrics = [metric for metric in METRICS if metric in logged]
    figure, (axes,) = new_figure(1, len(metrics), 6.5 if len(metrics) < 3 else 5.5, 5)
    report = []
    for path, log, color in zip(paths, logs, distinct_colors(len(logs)), strict=True):
        names = {'Train': 'training', 'Validation': validation_images(path)}
        for (ax, metric), split in itertools.product(zip(axes, metrics, strict=True), names):
            curve = log.get((split, metric), {})
            style = {'ls': '--', 'alpha': 0.7} if split == 'Train' else {'marker': 'o', 'ms': 3.5}
            if len(curve) == 1:
                style['marker'] = 'o'
            label = f'{short_name(path)}, {names[split]} images'
            ax.plot(list(curve), list(curve.values()), color=color, label=label, **style)
        last = [
            f'{names[split]} {metric.replace("_", " ")} {list(curve.values())[-1]:.4f}'
            for (split, metric), curve in log.items()
        ]
        epoch = max(map(max, log.values()))
        report.append(f'{printable(path)}: epoch {epoch}, last: {", ".join(last)}')
    for ax, metric in zip(axes, metrics, strict=True):
        style_curves(ax, metric)
    add_legend(figure, *axes[0].get_legend_handles_labels(), max_columns=min(len(logs), 3))
    return figure, report


def short_name(path: str) -> str:
    """Return the end of a path that fits a legend; matplotlib leaves out what begins with _."""
    name = printable(path)
    if len(name) > MAX_NAME:
        return f'…{name[1 - MAX_NAME :]}'
    return f'./{name}' if name.startswith('_') else name


def add_legend(
    figure: Figure, lines: Sequence[Line2D], labels: Sequence[str], max_columns: int
) -> None:
    """Write a legend below the panels, in as many columns as fit."""
    for columns in range(max_columns, 0, -1):
        legend = figure.legend(
            lines, labels, loc='outside lower center', ncols=columns, frameon=False, fontsize=11
        )
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            return
        legend.remove()


def style_curves(ax: Axes, metric: str) -> None:
    """Label a panel of curves and choose its scale."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    ax.set(title=metric.replace('_', ' '), xlabel='epoch')
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    if metric == 'accuracy':
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        # The first epochs would press the others against the upper edge.
        ends = [line.get_ydata()[-1] for line in ax.get_lines() if len(line.get_ydata())]
        bottom = min(1 - 5 * (1 - min(ends, default=0)), 0.999)  # 1 where all ends are
        if bottom > ax.get_ylim()[0]:
            ax.set_ylim(bottom, 1 + 0.04 * (1 - bottom))
    elif any(value > 0 for line in ax.get_lines() for value in line.get_ydata()):
        ax.set_yscale('log')  # the loss of one run may be a hundred times that of another
        ax.yaxis.set_major_formatter('{x:g}')
        low, high = ax.get_ylim()
        labeled = '123456789' if high < 3 * low else '235'  # first digits
        ax.yaxis.set_minor_formatter(lambda x, _: f'{x:g}' if f'{x:e}'[0] in labeled else '')
        ax.grid(which='minor')
