"""Kill training with SIGKILL at random moments, resume, and see that nothing is lost.

    python tests/kill_at_random.py --kills 100

Every run trains on the embedded sample until it is killed, and the next one goes on with ``--resume``; a run that finishes is compared with one
that was never killed, bit for bit, and the next begins over it. After every kill each file at its final name has to load, no resume may fail, and
a run that finishes leaves nothing half-written behind.
"""

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from runtime import ArgumentParser, mx, number, run_script  # noqa: E402  (first, for a Ctrl-C while all this is imported)

from tqdm import tqdm  # noqa: E402

from train_model import Checkpoints, DamagedCheckpoint  # noqa: E402

EPOCHS = 3
COMMAND = [
    sys.executable,
    str(ROOT / 'train.py'),
    '--dataset',
    'mnist-5k',
    '--num-examples',
    '1000',
    '--batch-size',
    '50',
    '--num-epochs',
    str(EPOCHS),
    '--average-weights',
    '0.1',
]


def arrays(folder):
    """Every average of a weight or center, every momentum, and every weight and center of the last step, after the last epoch, as bytes by name."""
    *named_arrays, _ = Checkpoints(folder / 'center_loss').load(EPOCHS)
    return [
        {name: value.asnumpy().tobytes() for name, value in named.items()} for named in named_arrays
    ]


def count_damaged(folder):
    """How many files at their final names do not load. An epoch's pair may be of two moments (the resume sees that and goes back)."""
    damaged = 0
    for path in folder.glob('[!.]*.params'), folder.glob('[!.]*.states'):
        for file in path:
            try:
                assert mx.nd.load(str(file))
            except (AssertionError, mx.MXNetError):
                damaged += 1
    for file in folder.glob('[!.]*-symbol.json'):
        mx.sym.load(str(file))
    return damaged


def main():
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--kills', type=number(int, minimum=1), default=100, help='how often to kill'
    )
    parser.add_argument(
        '--seconds',
        type=number(float, above=0),
        default=1200,
        help='begin nothing more after so long, and say how far it came',
    )
    parser.add_argument('--seed', type=number(int, minimum=0), default=0, help='of the moments')
    args = parser.parse_args()
    moments = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name, 'whole'), Path(name, 'killed')
        whole.mkdir()
        killed.mkdir()
        begin = time.monotonic()
        subprocess.run(COMMAND, cwd=whole, check=True, stderr=subprocess.DEVNULL)
        duration = time.monotonic() - begin
        expected = arrays(whole)
        kills = finished = damaged = failed = different = unpaired = half_written = 0
        with tqdm(total=args.kills, unit=' kills', disable=None) as progress:
            while kills < args.kills and time.monotonic() - begin < args.seconds:
                process = subprocess.Popen(
                    [*COMMAND, '--resume'], cwd=killed, stderr=subprocess.PIPE, text=True
                )
                try:
                    _, told = process.communicate(timeout=moments.uniform(0.2, 0.9 * duration))
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.communicate()
                    kills += 1
                    progress.update()
                    damaged += count_damaged(killed)
                    for epoch in Checkpoints(killed / 'center_loss').epochs():
                        try:
                            Checkpoints(killed / 'center_loss').load(epoch)
                        except DamagedCheckpoint:
                            unpaired += 1
                    continue
                if process.returncode:
                    failed += 1
                    print(told, file=sys.stderr)
                    break
                finished += 1
                different += arrays(killed) != expected
                half_written += len(list(killed.glob('.*')))
                for path in killed.iterdir():
                    path.unlink()
    print(
        f'kills: {kills} in {time.monotonic() - begin:.0f} s, runs finished: {finished}, resumes that failed: {failed}, files that do not load: {damaged}, '
        f'pairs of two moments: {unpaired}, finished runs that differ: {different}, half-written files they left: {half_written}'
    )
    sys.exit(1 if failed or damaged or different or half_written else 0)


if __name__ == '__main__':
    run_script(main)
