"""The generated tables of the documentation: that they are of their files, and how they look."""

import json

import pytest

from common.errors import InputError
from tools import table_kinds, tables
from tools.experiments import ORIGINAL_COURSES

MADE_BY = {
    **{'processor': '2 of X', 'instruction_set': 'avx2', 'threads': '1', 'mxnet': '1.9.1'},
    'program': 'abc',
}
OTHERS = {'intra': 1.0, 'inter': 2.0, 'ratio': 0.5, 's/epoch': 3.0}


def row(title, *runs, options=('--center-loss-weight=0',)):
    return {'title': title, 'options': options, 'runs': runs}


def accuracies(title, *values):
    runs = [{'seed': seed, 'accuracy': value, **OTHERS} for seed, value in enumerate(values)]
    return row(title, *runs)


def table_of(kind, *rows, compare=(), **others):
    """A made-up table, as ``tools.reproduce`` writes it."""
    facts = {'command': 'python -m tools.reproduce', 'options': 'python train.py', **others}
    return {'kind': kind, **facts, 'made_by': [MADE_BY], 'compare': compare, 'rows': rows}


def lines_of(*args, **kwargs):
    table = table_of(*args, **kwargs)
    return table_kinds.KINDS[table['kind']](table)


def test_pages_agree_with_results():
    """``python -m tools.tables --write`` mends it where this fails."""
    pages = {page: page.read_text() for page in tables.PAGES}
    for page, text in pages.items():
        assert tables.fill(text) == text, page.name
    assert tables.unshown(pages.values()) == []


def test_page_is_filled(tmp_path):
    table = table_of('results', accuracies('softmax only', 0.98, 0.99))
    (tmp_path / 'one.json').write_text(json.dumps(table))
    (tmp_path / 'two.json').write_text(json.dumps(table))
    page = 'Before.\n\n<!-- one.json -->\n| old |\n<!-- end -->\n\nAfter.\n'
    filled = tables.fill(page, tmp_path)
    assert filled.startswith('Before.\n\n<!-- one.json -->\n\nMade by `python -m tools.reproduce`.')
    assert filled.endswith('| 98.00, 99.00 |\n\n<!-- end -->\n\nAfter.\n')
    assert '| old |' not in filled
    assert tables.fill(filled, tmp_path) == filled
    assert tables.fill(filled.replace('98.50', '98.51'), tmp_path) == filled
    assert tables.unshown([filled], tmp_path) == ['two.json']


def test_main_writes(tmp_path, monkeypatch, capsys):
    page, results = tmp_path / 'page.md', tmp_path / 'results'
    results.mkdir()
    (results / 'one.json').write_text(json.dumps(table_of('results', accuracies('a', 0.5))))
    page.write_text('<!-- one.json -->\n<!-- end -->\n')
    monkeypatch.setattr(tables, 'ROOT', tmp_path)
    monkeypatch.setattr(tables, 'PAGES', [page])
    monkeypatch.setattr(tables, 'fill', lambda text, fill=tables.fill: fill(text, results))
    monkeypatch.setattr(tables, 'unshown', lambda pages: [])
    with pytest.raises(InputError, match=r'page\.md and docs/results/ differ'):
        tables.main()
    tables.main(['--write'])
    assert '50.00%' in page.read_text()
    tables.main()
    assert capsys.readouterr().out.splitlines()[-1] == '1 generated tables, 0 pages written'


@pytest.mark.parametrize(
    'page',
    [
        '<!-- one.json -->\n\n',
        '<!-- end -->\n',
        '<!-- one.json -->\n<!-- one.json -->\n<!-- end -->\n',
    ],
)
def test_unpaired_marks(page, tmp_path):
    (tmp_path / 'one.json').write_text(json.dumps(table_of('results')))
    with pytest.raises(InputError, match='has to stand between'):
        tables.fill(page, tmp_path)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match=r'shows one\.json, which is not in'):
        tables.fill('<!-- one.json -->\n<!-- end -->\n', tmp_path)


def test_results():
    ours = accuracies('lambda 1', 0.98, 0.99, 0.985)
    ours['runs'] += ({'seed': 3, 'failure': 'training diverged'},)
    assert lines_of('results', ours)[-1] == (
        '| lambda 1 | `--center-loss-weight=0` | 98.50% ± 0.50 | 1.000 ± 0.000 | '
        '2.000 ± 0.000 | 0.5000 ± 0.0000 | 98.00, 99.00, 98.50, 1 diverged |'
    )


def test_paired_seeds():
    softmax, close = accuracies('softmax', 0.98, 0.981), accuracies('close', 0.981, 0.979)
    better = accuracies('better', 0.9812, 0.9841, 0.99)  # whose third seed has no other
    compare = [('better', 'softmax'), ('close', 'softmax')]
    assert lines_of('results', softmax, close, better, compare=compare)[-2:] == [
        '- better against softmax: higher accuracy in 2 of 2 seeds, by 0.12 to 0.31 points',
        '- close against softmax: higher accuracy in 1 of 2 seeds, the differences are -0.20 to '
        '+0.10 points',
    ]


def test_splits_are_averaged():
    """Over the splits of a seed first: the spread is that over seeds."""

    def split_runs(title, weight, gain):
        names = ('AUC', 'TA at 1% FA', 'AUC (cosine)', 'TA (cosine)', 'accuracy')
        found = {('0,1', 0): 0.6, ('2,3', 0): 0.8, ('0,1', 1): 0.7, ('2,3', 1): 0.9}
        runs = [
            {'classes': classes, 'seed': seed, **dict.fromkeys(names, value + gain)}
            for (classes, seed), value in found.items()
        ]
        shared = f'--embedding-dim=2 --center-loss-weight={weight}'
        return row(title, *runs, options=[f'--classes={c} {shared}' for c in ('0,1', '2,3')])

    softmax, ours = split_runs('softmax', 0, 0), split_runs('ours', 1, 0.01)
    lines = lines_of('open-set', softmax, ours, compare=[('ours', 'softmax')])
    assert lines[0] == 'Trained on the classes 0,1; 2,3 and verified on pairs of the others.'
    assert lines[4].startswith('| softmax | `--embedding-dim=2 --center-loss-weight=0` | 75.00% ± ')
    assert ' | 0.7500 ± 0.0707 | 75.0% ± 7.1 | ' in lines[4]
    assert lines[4].endswith(' | 0.7000, 0.8000 |')
    assert lines[-1].startswith(
        '- ours against softmax: higher accuracy in 4 of 4 seeds and splits, by 1.00 '
    )
    assert '; higher AUC in 4 of 4 seeds and splits, by 0.0100 to 0.0100; ' in lines[-1]


def test_original():
    courses = [(0.768, 0.812, 0.917, 0.94), (0.784, 0.815, 0.915, 0.932)]
    title = 'softmax + center loss'
    assert ORIGINAL_COURSES[title][1] == 0.799
    runs = [{'seed': seed, 'course': course} for seed, course in enumerate(courses)]
    rows = lines_of('original', row(title, *runs))[2:]
    assert rows[0] == '| 1 | 77.6% | 76.8% to 78.4% | 79.9% |'
    assert rows[3] == '| 4 | 93.6% | 93.2% to 94.0% | 95.1% |'
    options = f'- options: {title} `--center-loss-weight=0`'
    assert rows[4:] == ['| 10 |  |  | 97.3% |', options]
    runs[0]['course'] += (0.96,) * 16
    assert lines_of('original', row(title, *runs))[-2] == '| 20 | 96.0% | 96.0% to 96.0% |  |'


def test_convergence():
    def courses(title, *courses):
        runs = ({'seed': s, 'course': c, 's/epoch': 10} for s, c in enumerate(courses))
        return row(title, *runs)

    softmax = courses('softmax', (0.9, 0.96, 0.975), (0.95, 0.96, 0.96))
    center = courses('center', (0.96, 0.97, 0.97), (0.9, 0.94, 0.95))
    lines = lines_of('convergence', softmax, center, compare=[('center', 'softmax')])
    none, options = 'not reached', '`--center-loss-weight=0`'
    assert lines[2:4] == [
        f'| softmax | {options} | 2, 1 (15 s) | 3, not reached | {none} | {none} |',
        f'| center | {options} | 1, 3 (20 s) | 2, not reached | {none} | {none} |',
    ]
    assert lines[4:] == [
        '- center against softmax, 2 seeds: 95% sooner 1, later 1; 97% sooner 1, reached by '
        'neither 1; 98% reached by neither 2; 98.5% reached by neither 2; more accurate after 2 of '
        '6 epochs',
    ]
    softmax['runs'] += ({'seed': 2, 'failure': 'training diverged'},)
    center['runs'] += ({'seed': 2, 'course': (0.95,), 's/epoch': 10},)
    lines = lines_of('convergence', softmax, center, compare=[('center', 'softmax')])
    assert lines[2].startswith(f'| softmax | {options} | 2, 1, diverged (15 s) | ')
    assert lines[4].startswith('- center against softmax, 2 seeds: ')
    assert lines[4].endswith('after 2 of 6 epochs')


def test_arrangement():
    def runs(title, *pairs):
        return row(
            title,
            *({'seed': s, 'share': share, 'accuracy': a} for s, (share, a) in enumerate(pairs)),
        )

    reference = {'options': '--embedding-dim=10', 'seeds': [0, 1], 'confusions': {'4-9': 5}}
    rows = runs('a', (0.9, 0.98), (0.8, 0.97)), runs('b', (0.5, 0.999), (0.4, 0.998))
    lines = lines_of('arrangement', *rows, reference=reference)
    assert lines[2:4] == ['| a | 1 | 80.0% | 97.00% |', '| a | 0 | 90.0% | 98.00% |']
    # Accuracy rises with the share in each row, and falls from row to row.
    assert 'over 4 runs: -0.60;' in lines[-2]
    assert lines[-2].endswith('the means of the same objective and start: 0.89')
    assert lines[-1] == '- reference: the 5 confusions of `--embedding-dim=10`, seeds 0, 1'


def test_rank_correlation():
    assert table_kinds.ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]
    assert table_kinds.rank_correlation([1, 2, 30], [0.1, 0.2, 0.3]) == '1.00'
    assert table_kinds.rank_correlation([1, 2, 30], [3, 2, 1]) == '-1.00'
    assert table_kinds.rank_correlation([1, 1], [1, 2]) == 'undefined'
