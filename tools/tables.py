"""The tables of the documentation, made from the JSON files that ``tools.reproduce`` writes.

    python -m tools.tables            compare every generated table with its JSON file
    python -m tools.tables --write    write the tables into README.md and docs/

In a page, the table of docs/results/NAME.json stands between the lines ``<!-- NAME.json -->`` and
``<!-- end -->``. A file has

    kind       how the table is made: a name in ``table_kinds.KINDS``
    command    that made the runs
    options    of train.py, the same for all runs
    made_by    processor and versions, a list in case that runs differ
    compare    pairs of rows that are compared seed by seed
    rows       their title, the options of their runs, and the results of these
    reference  of the arrangement: the options and the confusions of the reference runs
"""

from collections.abc import Iterable, Sequence
import json
from pathlib import Path
import re

from common.command_line import ArgumentParser, run_script
from common.errors import InputError
from common.files import replace_when_whole
from tools.table_kinds import render

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'docs' / 'results'
PAGES = (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
START, END = r'<!-- (\S+\.json) -->\n', r'<!-- end -->$'
GENERATED = re.compile(rf'^{START}(?:(?!<!--).*\n)*{END}', re.M)
MARK = re.compile(rf'^(?:{START}|{END})', re.M)


def fill(page: str, folder: Path = RESULTS) -> str:
    """Return the text of a page with its generated tables made anew.

    Raises
    ------
    InputError
        If a file is missing, or if a table is not enclosed by its two lines.
    """

    def made_anew(match):
        path = folder / match[1]
        if not path.is_file():
            raise InputError(
                f'a page shows {match[1]}, which is not in {folder}: python -m tools.reproduce '
                f'--tables={folder} writes it'
            )
        table = render(json.loads(path.read_text()))
        return f'<!-- {match[1]} -->\n\n{table}\n<!-- end -->'

    marks = [match[0].strip() for match in MARK.finditer(page)]
    if len(marks) != 2 * len(GENERATED.findall(page)):
        raise InputError(
            'a generated table has to stand between the lines <!-- NAME.json --> and '
            f'<!-- end -->, but the page has {", ".join(marks)}'
        )
    return GENERATED.sub(made_anew, page)


def unshown(pages: Iterable[str], folder: Path = RESULTS) -> list[str]:
    """Return the names of the JSON files that no page shows."""
    shown = {name for page in pages for name in GENERATED.findall(page)}
    return sorted({path.name for path in folder.glob('*.json')} - shown)


def main(argv: Sequence[str] = ()) -> None:
    """Compare the pages with the JSON files, or write the tables into them."""
    parser = ArgumentParser(
        prog='python -m tools.tables',
        description='Compare the generated tables of README.md and docs/ with docs/results/*.json.',
    )
    parser.add_argument('--write', action='store_true', help='write the tables into the pages')
    args = parser.parse_args(list(argv))
    texts = {page: page.read_text() for page in PAGES}
    different = []
    for page, text in texts.items():
        filled = fill(text)
        if filled != text:
            different.append(str(page.relative_to(ROOT)))
            if args.write:
                with replace_when_whole(page) as path:
                    path.write_text(filled)
    if different and not args.write:
        raise InputError(
            f'{", ".join(different)} and docs/results/ differ: python -m tools.tables --write '
            'writes the tables'
        )
    tables = sum(len(GENERATED.findall(text)) for text in texts.values())
    print(f'{tables} generated tables, {len(different)} pages written')
    if missing := unshown(texts.values()):
        print(f'shown on no page: {", ".join(missing)}')


if __name__ == '__main__':
    run_script(main)
