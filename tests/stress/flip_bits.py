"""Flip single bits in the files of a checkpoint of LeNet, and see that every reader finds them.

python tests/stress/flip_bits.py --flips 200
"""

from collections.abc import Sequence
from pathlib import Path
import random
import resource
import sys
import tempfile
import time

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from common.environment import mx  # noqa: E402
from common.checkpoints import Checkpoints  # noqa: E402
from common.command_line import ArgumentParser, number, run_script  # noqa: E402
from common.errors import DamagedCheckpoint, Failure  # noqa: E402
from train import get_symbol  # noqa: E402


def write_checkpoint(checkpoints):
    """Write epoch 1 with random weights, centers and momentum."""
    network, generator = get_symbol(), np.random.default_rng(0)
    arg_shapes, _, aux_shapes = network.infer_shape(data=(1, 1, 28, 28))

    def random_arrays(names, shapes):
        return {
            name: mx.nd.array(generator.normal(size=shape))
            for name, shape in zip(names, shapes, strict=True)
            if name != 'data' and not name.endswith('label')
        }

    arg_params = random_arrays(network.list_arguments(), arg_shapes)
    momentum = random_arrays(network.list_arguments(), arg_shapes)
    state = {f'optimizer0:{name}': array for name, array in momentum.items()}
    aux_params = random_arrays(network.list_auxiliary_states(), aux_shapes)
    checkpoints.save(1, network, arg_params, aux_params, state, {'lr': 0.1})


def count_found(path, read, flips, generator):
    """Count how many of so many flipped bits of a file ``read`` finds."""
    whole, found = path.read_bytes(), 0
    for _ in range(flips):
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        try:
            read(1)
        except DamagedCheckpoint:
            found += 1
    path.write_bytes(whole)
    return found


def main(argv: Sequence[str] = ()) -> None:
    """Flip, read, count, print; exit status 1 if a reader did not find a bit."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--flips', type=number(int, minimum=1), default=200, help='in every file')
    parser.add_argument('--seed', type=number(int, minimum=0), default=0, help='of the places')
    args = parser.parse_args(argv)
    generator, missed = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder, 'run'))
        write_checkpoint(checkpoints)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for reader, read, kinds in (
            ('--resume', checkpoints.load, ('params', 'resume', 'json')),
            ('vis.py and --load-epoch', checkpoints.load_params, ('params', 'json')),
        ):
            for kind in kinds:
                start = time.monotonic()
                path = checkpoints.params_path(1).with_suffix(f'.{kind}')
                found = count_found(path, read, args.flips, generator)
                missed += args.flips - found
                seconds = time.monotonic() - start
                print(f'{reader}: {found} of {args.flips} in .{kind} found in {seconds:.1f} s')
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    print(f'memory: {memory / 1024:.0f} MiB more than before')
    if missed:
        raise Failure(f'{missed} flipped bits were not found')


if __name__ == '__main__':
    run_script(main)
