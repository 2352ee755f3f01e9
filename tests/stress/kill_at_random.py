"""Kill training with SIGKILL at random moments, resume, and see that nothing is lost.

    python tests/stress/kill_at_random.py --kills 100

Every run trains on the bundled digits until it is killed, and the next one continues it with
``--resume``. A run that finishes is compared with one that was never killed, bit for bit, and the
next begins in an empty folder. After every kill each checkpoint but an unfinished one has to be
whole, no resume may fail, and a run that finishes leaves no temporary file behind.
"""

from collections.abc import Sequence
from pathlib import Path
import random
import subprocess
import sys
import tempfile
import time

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from common.checkpoints import Checkpoints  # noqa: E402
from common.command_line import ArgumentParser, number, run_script  # noqa: E402
from common.errors import Failure, InputError, UncheckedCheckpoint  # noqa: E402

EPOCHS = 3
COMMAND = [sys.executable, str(ROOT / 'train.py'), '--dataset=mnist-5k', '--num-examples=1000']
COMMAND += ['--batch-size=50', f'--num-epochs={EPOCHS}', '--average-weights=0.1']


def saved_arrays(folder):
    """All arrays of the last checkpoint, as bytes by name: parameters, momentum, last step."""
    checkpoint = Checkpoints(folder / 'center_loss').load(EPOCHS)
    named = (checkpoint.arg_params, checkpoint.aux_params, checkpoint.state)
    return [{name: value.asnumpy().tobytes() for name, value in part.items()} for part in named]


def count_damaged(folder):
    """Count checkpoints that are neither whole nor unfinished."""
    checkpoints, damaged = Checkpoints(folder / 'center_loss'), 0
    for epoch in checkpoints.epochs():
        try:
            checkpoints.load(epoch)
            checkpoints.load_symbol()
        except UncheckedCheckpoint:
            continue  # killed before the last of its files was there
        except InputError as error:
            print(error, file=sys.stderr)
            damaged += 1
    return damaged


def run(folder, seconds=None):
    """Train or continue, and kill it after so many seconds: whether it has finished by then."""
    process = subprocess.Popen(
        [*COMMAND, '--resume'],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False
    if process.returncode:
        raise Failure(f'a run or a resume failed with status {process.returncode}: {stderr}')
    return True


def main(argv: Sequence[str] = ()) -> None:
    """Kill, resume, compare, print; exit status 1 if something was lost."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=number(int, minimum=1), default=100, help='how often')
    parser.add_argument(
        '--seconds', type=number(float, above=0), default=3600, help='start no run after so many'
    )
    parser.add_argument('--seed', type=number(int, minimum=0), default=0, help='of the moments')
    args = parser.parse_args(argv)
    moments = random.Random(args.seed)
    kills = finished = damaged = different = half_written = 0
    with tempfile.TemporaryDirectory() as name:
        whole, killed = Path(name, 'whole'), Path(name, 'killed')
        whole.mkdir()
        killed.mkdir()
        start = time.monotonic()
        run(whole)
        duration = time.monotonic() - start
        expected = saved_arrays(whole)
        with tqdm(total=args.kills, unit=' kills', disable=None) as progress:
            while kills < args.kills and time.monotonic() - start < args.seconds:
                if not run(killed, moments.uniform(0.2, duration)):
                    kills += 1
                    progress.update()
                    damaged += count_damaged(killed)
                    continue
                finished += 1
                different += saved_arrays(killed) != expected
                half_written += len(list(killed.glob('.*')))
                for path in killed.iterdir():
                    path.unlink()
    print(
        f'kills: {kills} in {time.monotonic() - start:.0f} s, runs finished: {finished}, '
        f'damaged checkpoints: {damaged}, finished runs that differ: {different}, '
        f'half-written files they left: {half_written}'
    )
    sys.exit(1 if damaged or different or half_written else 0)


if __name__ == '__main__':
    run_script(main)
