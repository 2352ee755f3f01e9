"""End training in every way there is, many times: no run hangs, aborts or shows a traceback.

    python tests/stress/exit_cleanly.py --runs 200
    python tests/stress/exit_cleanly.py --runs 200 --only finished --engine ThreadedEngine

Takes turns: a run that finishes, one on two CPU contexts, one that diverges, a mistake on the
command line, and runs that are stopped at a random moment by Ctrl-C, by SIGTERM, and by Ctrl-C
twice. Runs that are not stopped have to write the same log. A run that is stopped while Python is
still importing may end with Python's own traceback.
"""

import collections
from collections.abc import Sequence
import itertools
import os
from pathlib import Path
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from common.command_line import ArgumentParser, number, run_script  # noqa: E402

COMMAND = [sys.executable, str(ROOT / 'train.py'), '--dataset=mnist-5k']
COMMAND += ['--num-examples=300', '--batch-size=50', '--num-epochs=1']
ENGINES = ('ThreadedEnginePerDevice', 'ThreadedEngine', 'NaiveEngine')
TIMEOUT = 120  # seconds after which a run is taken to hang

# Options, signals, exit statuses. Who is stopped at a random moment may have finished before.
ENDINGS = {
    'finished': ([], [], {0}),
    'two contexts': (['--cpus=0,1'], [], {0}),
    'Ctrl-C': ([], [signal.SIGINT], {0, 130}),
    'SIGTERM': ([], [signal.SIGTERM], {0, 143}),
    'Ctrl-C twice': (['--cpus=0,1'], [signal.SIGINT] * 2, {0, 130}),
    'diverged': (['--lr=1e6', '--clip-gradient=0'], [], {1}),
    'mistake': (['--num-examples=7'], [], {2}),
}


def run(options, signals, moments, engine):
    """Run training in an empty folder: (exit status or 'hangs', stderr, log)."""
    environment = {**os.environ, **({'MXNET_ENGINE_TYPE': engine} if engine else {})}
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        process = subprocess.Popen(
            [*COMMAND, *options],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for signal_number, moment in zip(signals, moments, strict=True):
            try:
                process.wait(max(0, start + moment - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal_number)
        try:
            _, stderr = process.communicate(timeout=TIMEOUT)
            status = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            (_, stderr), status = process.communicate(), 'hangs'
        log = Path(folder, 'log.txt')
        return status, stderr, without_times(log.read_text()) if log.exists() else ''


def without_times(log):
    """Remove what differs between two runs: moments, speeds, durations."""
    return re.sub(r'Speed: \S+|Time cost=\S+|^\S+ \S+ ', '', log, flags=re.M)


def is_wrong(status, stderr, expected, signals):
    """Whether a run has ended otherwise than it should."""
    at_once = {-number for number in signals}  # before the script begins, and when it has ended
    if 'Traceback' in stderr and 'in run_script' not in stderr:
        return not signals or status not in {1, *at_once}  # Python was importing
    trouble = ('Traceback', 'Exception ignored', 'terminate called')
    return status not in expected | at_once or any(text in stderr for text in trouble)


def main(argv: Sequence[str] = ()) -> None:
    """Run, count, print; exit status 1 if a run was wrong."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--runs', type=number(int, minimum=1), default=200, help='how many runs')
    parser.add_argument(
        '--seconds', type=number(float, above=0), default=3600, help='start no run after so many'
    )
    parser.add_argument('--seed', type=number(int, minimum=0), default=0, help='of the moments')
    parser.add_argument('--engine', choices=ENGINES, help="MXNet's engine; none: its default")
    parser.add_argument('--only', choices=ENDINGS, help='one way of ending instead of all')
    args = parser.parse_args(argv)
    # In the background a shell has Ctrl-C ignored, and every run would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random_moments = random.Random(args.seed)
    outcomes, logs, wrong, duration = collections.Counter(), {}, [], 4
    start = time.monotonic()
    endings = itertools.cycle([args.only] if args.only else ENDINGS)
    for ending in tqdm(itertools.islice(endings, args.runs), total=args.runs, disable=None):
        if time.monotonic() - start > args.seconds:
            break
        options, signals, expected = ENDINGS[ending]
        moments = sorted(random_moments.uniform(0, duration) for _ in signals)
        begin = time.monotonic()
        status, stderr, log = run(options, signals, moments, args.engine)
        if ending == 'finished':
            duration = time.monotonic() - begin
        outcomes[ending, status] += 1
        if is_wrong(status, stderr, expected, signals):
            wrong.append(f'{ending}: status {status}\n{stderr}')
        if not signals and logs.setdefault(ending, log) != log:
            wrong.append(f'{ending}: another log than that of the first run\n{log}')
    for (ending, status), count in sorted(outcomes.items(), key=str):
        print(f'{count:5d}  {ending:13s} {status}')
    print(f'runs: {outcomes.total()} in {time.monotonic() - start:.0f} s, wrong: {len(wrong)}')
    for report in wrong[:10]:
        print(f'wrong: {report}', file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == '__main__':
    run_script(main)
