"""End training in every way there is, many times: no run hangs, aborts or shows a traceback, and runs of one seed write one log.

    python tests/exit_cleanly.py --runs 200

By turns: a run that finishes, one on two CPU contexts, one that diverges, a mistake on the command line, and runs that are stopped at a random
moment, from the first import to the last thing before the exit, by Ctrl-C, by SIGTERM, and by Ctrl-C twice.
"""

import collections
import itertools
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import ArgumentParser, number, run_script  # noqa: E402  (first, for a Ctrl-C while all this is imported)

from tqdm import tqdm  # noqa: E402

COMMAND = [
    sys.executable,
    str(ROOT / 'train.py'),
    '--dataset',
    'mnist-5k',
    '--num-examples',
    '300',
    '--batch-size',
    '50',
    '--num-epochs',
    '1',
]
SECONDS = 60  # after which a run hangs

# Name, options, signals, exit status. Who is stopped at a random moment may have finished before.
MANNERS = [
    ('finished', [], [], {0}),
    ('finished, 2 contexts', ['--cpus=0,1'], [], {0}),
    ('Ctrl-C', [], [signal.SIGINT], {0, 130}),
    ('SIGTERM', [], [signal.SIGTERM], {0, 143}),
    ('Ctrl-C twice', ['--cpus=0,1'], [signal.SIGINT] * 2, {0, 130}),
    ('diverged', ['--lr=1e6', '--clip-gradient=0'], [], {1}),
    ('mistake', ['--num-examples=7'], [], {2}),
]


def without_times(log):
    return re.sub(r'Speed: \S+|Time cost=\S+|^\S+ \S+ ', '', log, flags=re.M)


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--runs', type=number(int, minimum=1), default=200, help='how many runs')
    parser.add_argument(
        '--seconds',
        type=number(float, above=0),
        default=1800,
        help='begin nothing more after so long, and say how far it came',
    )
    parser.add_argument('--seed', type=number(int, minimum=0), default=0, help='of the moments')
    args = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # in the background a shell has Ctrl-C ignored, and so would every run
    moments = random.Random(args.seed)
    outcomes, logs, wrong, duration = collections.Counter(), collections.defaultdict(set), [], 4
    start = time.monotonic()
    for manner, options, signals, expected in tqdm(
        list(itertools.islice(itertools.cycle(MANNERS), args.runs)), unit=' runs', disable=None
    ):
        if time.monotonic() - start > args.seconds:
            break
        with tempfile.TemporaryDirectory() as folder:
            begin = time.monotonic()
            process = subprocess.Popen(
                [*COMMAND, *options],
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for moment in sorted(moments.uniform(0, duration) for _ in signals):
                try:
                    process.wait(max(0, begin + moment - time.monotonic()))
                except subprocess.TimeoutExpired:
                    process.send_signal(signals[0])
            try:
                _, told = process.communicate(timeout=SECONDS)
                status = process.returncode
            except subprocess.TimeoutExpired:
                process.kill()
                (_, told), status = process.communicate(), 'hangs'
            if manner == 'finished':
                duration = time.monotonic() - begin
            if not signals:
                log = Path(folder, 'log.txt')
                logs[manner].add(without_times(log.read_text()) if log.exists() else '')
            if signals and (
                status == -signals[0] or 'init_import_site' in told
            ):  # Python itself was starting, in its own code or in site's
                status = 'ended by the signal before train.py began'
            elif status not in expected or 'Traceback' in told or 'Exception ignored' in told:
                wrong.append(f'{manner}: status {status}\n{told}')
        outcomes[manner, status] += 1
    for (manner, status), count in sorted(outcomes.items(), key=str):
        print(
            f'{count:5d}  {manner:21s} {f"status {status}" if isinstance(status, int) else status}'
        )
    different = [manner for manner, kinds in logs.items() if len(kinds) > 1]
    print(
        f'runs: {outcomes.total()} in {time.monotonic() - start:.0f} s, wrong: {len(wrong)}, logs that differ in more than times: {len(different)}'
    )
    for what in [*wrong[:10], *different]:
        print(f'wrong: {what}', file=sys.stderr)
    sys.exit(1 if wrong or different else 0)


if __name__ == '__main__':
    run_script(main)
