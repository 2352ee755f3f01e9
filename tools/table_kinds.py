"""How the tables of the documentation look: Markdown from what ``tools.reproduce`` has measured.

A table is a dict: ``tools.tables`` explains it.
"""

from collections.abc import Callable, Iterable, Sequence
import math
import statistics

import numpy as np

from tools.experiments import ORIGINAL_COURSES

FORMS = {
    **{'accuracy': '{:.2%}', 'intra': '{:.3f}', 'inter': '{:.3f}', 'ratio': '{:.4f}'},
    # verification of unseen classes, by Euclidean distance and by cosine
    **{'AUC': '{:.4f}', 'TA at 1% FA': '{:.1%}'},
    **{'AUC (cosine)': '{:.4f}', 'TA (cosine)': '{:.1%}'},
}
SEEN = ('accuracy', 'intra', 'inter', 'ratio')
UNSEEN = ('AUC', 'TA at 1% FA', 'AUC (cosine)', 'TA (cosine)')
LEVELS = (0.95, 0.97, 0.98, 0.985)  # of accuracy, for the speed of convergence
NOT_REACHED = 'not reached'


def whole_runs(row: dict) -> list[dict]:
    """Return the runs of a row that did not diverge."""
    return [run for run in row['runs'] if 'failure' not in run]


def diverged(row: dict) -> str:
    """Return how many of the runs of a row diverged, '' for none."""
    failed = len(row['runs']) - len(whole_runs(row))
    return f', {failed} diverged' if failed else ''


def by_seed(row: dict, column: str) -> dict[int, float]:
    """Return a value by seed: where a row has several splits, their mean."""
    values = {}
    for run in whole_runs(row):
        values.setdefault(run['seed'], []).append(run[column])
    return {seed: statistics.mean(found) for seed, found in values.items()}


def mean_and_deviation(form: str, values: Sequence[float]) -> str:
    """Return 'mean ± standard deviation', with a form such as '{:.2%}'."""
    if len(values) < 2:
        return ''.join(map(form.format, values))
    deviation = form.format(statistics.stdev(values)).rstrip('%')
    return f'{form.format(statistics.mean(values))} ± {deviation}'


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [head, ['---'] * len(head), *rows]
    return [f'| {" | ".join(line)} |' for line in lines]


def options_of(row: dict) -> str:
    """Return the options that all runs of a row have, but for those that name seen classes."""
    first, *others = (options.split() for options in row['options'])
    shared = [option for option in first if all(option in other for other in others)]
    return f'`{" ".join(shared)}`' if shared else ''


def options_by_row(table: dict) -> str:
    """Return a line with the options of each row, for a table that has no column of them."""
    return '- options: ' + '; '.join(f'{row["title"]} {options_of(row)}' for row in table['rows'])


def results_table(
    table: dict, columns: Sequence[str] = SEEN, listed: str = 'accuracy'
) -> list[str]:
    """Tabulate columns: mean ± standard deviation over seeds, and one of them for every seed."""
    rows = []
    for row in table['rows']:
        values = {column: [*by_seed(row, column).values()] for column in columns}
        cells = [mean_and_deviation(FORMS[column], values[column]) for column in columns]
        each = ', '.join(FORMS[listed].format(value).rstrip('%') for value in values[listed])
        rows.append([row['title'], options_of(row), *cells, each + diverged(row)])
    lines = markdown(['', 'options', *columns, f'{listed} of each seed'], rows)
    for ours, theirs in compared_rows(table):
        found = [comparison(ours, theirs, c) for c in columns if c in ('accuracy', *UNSEEN)]
        lines.append(f'- {ours["title"]} against {theirs["title"]}: {"; ".join(found)}')
    return lines


def open_set_table(table: dict) -> list[str]:
    """Tabulate verification of unseen classes; the accuracy is that on the seen ones."""
    lists = dict.fromkeys(run['classes'] for row in table['rows'] for run in row['runs'])
    trained = f'Trained on the classes {"; ".join(lists)} and verified on pairs of the others.'
    return [trained, '', *results_table(table, ('accuracy', *UNSEEN), 'AUC')]


def compared_rows(table: dict) -> list[tuple[dict, dict]]:
    """Return the pairs of rows that are compared."""
    rows = {row['title']: row for row in table['rows']}
    return [(rows[ours], rows[theirs]) for ours, theirs in table['compare']]


def paired(ours: dict, theirs: dict) -> list[tuple[dict, dict]]:
    """Return the pairs of runs of two rows with the same seed and the same seen classes."""
    others = {(run.get('classes'), run['seed']): run for run in whole_runs(theirs)}
    keys = [((run.get('classes'), run['seed']), run) for run in whole_runs(ours)]
    return [(run, others[key]) for key, run in keys if key in others]


def comparison(ours: dict, theirs: dict, column: str) -> str:
    """Return in how many seeds a value is higher, and by how much."""
    pairs = paired(ours, theirs)
    if not pairs:
        return f'{column} with no seed in common'
    scale, form, unit = (100, '.2f', ' points') if '%' in FORMS[column] else (1, '.4f', '')
    differences = sorted(scale * (run[column] - other[column]) for run, other in pairs)
    above = sum(difference > 0 for difference in differences)
    low, high = differences[0], differences[-1]
    if above < len(pairs):
        span = f'the differences are {low:+{form}} to {high:+{form}}{unit}'
    else:
        span = f'by {low:{form}} to {high:{form}}{unit}'
    repetitions = 'seeds and splits' if len(ours['options']) > 1 else 'seeds'
    return f'higher {column} in {above} of {len(pairs)} {repetitions}, {span}'


def original_table(table: dict) -> list[str]:
    """Tabulate the accuracy by epoch, beside the original's one run of each objective.

    The epochs are those of the original's, and our last one.
    """
    head, columns = ['epoch'], []
    for row in table['rows']:
        courses = [run['course'] for run in whole_runs(row)]
        if courses:
            columns.append((courses, ORIGINAL_COURSES[row['title']]))
            mean = f'{row["title"]}: mean of {len(courses)} seeds{diverged(row)}'
            head += [mean, 'range', 'the original, one run']
    rows = []
    shown = {epoch for _, original in columns for epoch in original}
    shown |= {max(map(len, courses)) for courses, _ in columns}
    for epoch in sorted(shown):
        cells = [str(epoch)]
        for courses, original in columns:
            ours = [course[epoch - 1] for course in courses if len(course) >= epoch]
            span = f'{min(ours):.1%} to {max(ours):.1%}' if ours else ''
            theirs = f'{original[epoch]:.1%}' if epoch in original else ''
            cells += [f'{statistics.mean(ours):.1%}' if ours else '', span, theirs]
        rows.append(cells)
    return [*markdown(head, rows), options_by_row(table)]


def epochs_to(level: float, course: Sequence[float]) -> float:
    """Return the first epoch with such an accuracy; infinity if there is none."""
    return next((epoch for epoch, value in enumerate(course, 1) if value >= level), math.inf)


def epochs_cell(level: float, run: dict) -> str:
    """Return :func:`epochs_to` of a run in words."""
    if 'failure' in run:
        return 'diverged'
    epochs = epochs_to(level, run['course'])
    return NOT_REACHED if math.isinf(epochs) else str(epochs)


def mean_seconds(level: float, runs: Sequence[dict]) -> str:
    """Return the mean time of training until an accuracy, such as ' (72 s)'; '' if not reached."""
    seconds = [epochs_to(level, run['course']) * run['s/epoch'] for run in runs]
    if not seconds or math.inf in seconds:
        return ''
    return f' ({statistics.mean(seconds):.0f} s)'


def convergence_table(table: dict) -> list[str]:
    """Tabulate the epochs that each seed needs to some accuracies, and their mean in seconds."""
    rows = []
    for row in table['rows']:
        cells = [row['title'], options_of(row)]
        for level in LEVELS:
            epochs = [epochs_cell(level, run) for run in row['runs']]
            listed = NOT_REACHED if {*epochs} == {NOT_REACHED} else ', '.join(epochs)
            cells.append(listed + mean_seconds(level, whole_runs(row)))
        rows.append(cells)
    lines = markdown(['', 'options', *(f'epochs to {100 * level:.4g}%' for level in LEVELS)], rows)
    for ours, theirs in compared_rows(table):
        pairs = paired(ours, theirs)
        found = [sooner_or_later(level, pairs) for level in LEVELS] if pairs else []
        courses = [(run['course'], other['course']) for run, other in pairs]
        higher = [a > b for course in courses for a, b in zip(*course, strict=False)]
        found.append(f'more accurate after {sum(higher)} of {len(higher)} epochs')
        heading = f'{ours["title"]} against {theirs["title"]}, {len(pairs)} seeds'
        lines.append(f'- {heading}: {"; ".join(found)}')
    return lines


def sooner_or_later(level: float, pairs: Sequence[tuple[dict, dict]]) -> str:
    """Return in how many pairs of runs the first one needs fewer, or more, epochs to a level."""
    needed = [[epochs_to(level, run['course']) for run in pair] for pair in pairs]
    counts = {
        'sooner': sum(first < second for first, second in needed),
        'later': sum(first > second for first, second in needed),
        'equally soon': sum(first == second < math.inf for first, second in needed),
        'reached by neither': sum(first == second == math.inf for first, second in needed),
    }
    return f'{100 * level:.4g}% ' + ', '.join(
        f'{word} {count}' for word, count in counts.items() if count
    )


def ranks(values: Sequence[float]) -> np.ndarray:
    """Return the rank of each value; equal ones share the mean of theirs."""
    values = np.asarray(values, float)
    higher = values[:, None] > values
    equal = values[:, None] == values
    return higher.sum(axis=1) + (equal.sum(axis=1) + 1) / 2


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> str:
    """Return Spearman's, such as '0.61'; 'undefined' where all values of one kind are equal."""
    if len({*xs}) < 2 or len({*ys}) < 2:
        return 'undefined'
    return f'{np.corrcoef(ranks(xs), ranks(ys))[0, 1]:.2f}'


def arrangement_table(table: dict) -> list[str]:
    """Tabulate the runs, each row's by accuracy; correlate share and accuracy."""
    rows, within = [], []
    for row in table['rows']:
        runs = sorted(whole_runs(row), key=lambda run: run['accuracy'])
        for run in runs:
            cells = (f'{run["share"]:.1%}', f'{run["accuracy"]:.2%}')
            rows.append([row['title'], str(run['seed']), *cells])
        found = np.array([(run['share'], run['accuracy']) for run in runs]).reshape(-1, 2)
        within.append((found, found - found.mean(axis=0) if len(found) else found))
    both = [np.concatenate(arrays).round(12).T for arrays in zip(*within, strict=True)]
    overall, in_row = (rank_correlation(*columns) for columns in both)
    count = sum(table['reference']['confusions'].values())
    return [
        *markdown(['', 'seed', 'confusions between neighbors', 'test accuracy'], rows),
        options_by_row(table),
        f'- rank correlation of the two columns over {len(rows)} runs: {overall}; of their '
        f'differences to the means of the same objective and start: {in_row}',
        f'- reference: the {count} confusions of `{table["reference"]["options"]}`, seeds '
        f'{", ".join(map(str, table["reference"]["seeds"]))}',
    ]


KINDS: dict[str, Callable[[dict], list[str]]] = {
    'results': results_table,
    'open-set': open_set_table,
    'original': original_table,
    'convergence': convergence_table,
    'arrangement': arrangement_table,
}


def machine(made: dict) -> str:
    """Return on what a table was made."""
    count, kind = made['processor'].split(' of ', 1)
    library = f'PyTorch {made["torch"]}' if 'torch' in made else f'MXNet {made["mxnet"]}'
    threads = f'{made["threads"]} thread{"" if made["threads"] == "1" else "s"} a run'
    return f'{kind} ({made["instruction_set"]}, {count} processors), {threads}, {library}'


def render(table: dict) -> str:
    """Return Markdown of a table, with the command that makes it and the machine."""
    made_by = '; '.join(dict.fromkeys(map(machine, table['made_by'])))
    made_of = ''
    if 'options' in table:
        made_of = f' Every run is `{table["options"]}` and the options of its row.'
    found = KINDS[table['kind']](table)
    spread = ' ± is the standard deviation over seeds.' if '±' in ''.join(found) else ''
    lines = [f'Made by `{table["command"]}`.{made_of}{spread} Measured on {made_by}.', '']
    for line in found:
        if line.startswith('- ') and lines[-1].startswith('|'):
            lines.append('')  # a list begins
        lines.append(line)
    return '\n'.join(lines) + '\n'
