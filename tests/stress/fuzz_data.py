"""Feed the reader mutated IDX files: it returns checked arrays or raises InputError.

python tests/stress/fuzz_data.py --files 20000
"""

import collections
import gzip
from pathlib import Path
import random
import re
import resource
import sys
import tempfile
import time

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from common.command_line import ArgumentParser, number, run_script
from common.errors import InputError
from data import read_idx

MEMORY = 50_000  # kB that all of them may take


def mutate(content, chance):
    """One to four random edits: bytes overwritten, cut, repeated, inserted, or a header field."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        if not content:
            break
        position = (
            chance.randrange(len(content))
            if chance.random() < 0.5
            else chance.randrange(min(24, len(content)))
        )
        kind = chance.randrange(7)
        if kind == 0:
            content[position] = chance.randrange(256)
        elif kind == 1:
            content[position] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del content[position:]
        elif kind == 3:
            del content[position : position + chance.randint(1, 64)]
        elif kind == 4:
            content[position:position] = chance.randbytes(chance.randint(1, 64))
        elif kind == 5:
            content += content[:position]
        else:
            value = chance.choice(
                [
                    0,
                    1,
                    27,
                    29,
                    255,
                    2**16,
                    999_999,
                    1_000_000,
                    1_000_001,
                    2**31 - 1,
                    2**31,
                    2**32 - 1,
                ]
            )
            field = 4 * (position // 4 % 4)
            content[field : field + 4] = value.to_bytes(4, 'big')
    return bytes(content)


def main(argv=()):
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--files', type=number(int, minimum=1), default=20000, help='how many files'
    )
    parser.add_argument('--seed', type=number(int, minimum=0), default=0, help='of the mutations')
    args = parser.parse_args(argv)
    chance = random.Random(args.seed)
    images = b'\0\0\x08\x03' + np.array([20, 28, 28], '>u4').tobytes() + chance.randbytes(20 * 784)
    labels = (
        b'\0\0\x08\x01'
        + np.array([500], '>u4').tobytes()
        + bytes(chance.randrange(10) for _ in range(500))
    )
    outcomes, wrong = collections.Counter(), []
    begin, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(args.files), unit=' files', disable=None):
            raw = chance.choice([images, labels])
            manner = chance.choice(['raw', 'mutated, then compressed', 'compressed, then mutated'])
            content = raw if manner.startswith('compressed') else mutate(raw, chance)
            content = content if manner == 'raw' else gzip.compress(content, 1)
            content = mutate(content, chance) if manner.startswith('compressed') else content
            path = Path(folder, 'idx' if manner == 'raw' else 'idx.gz')
            path.write_bytes(content)
            try:
                array, _ = read_idx(path)
                outcome = 'read'
                if array.dtype != np.uint8 or not 1 <= array.ndim <= 3 or not array.size:
                    wrong.append((manner, f'array {array.dtype} {array.shape}'))
            except InputError as error:
                outcome = re.sub(
                    r'begins with [\da-f ]+|\d+', 'N', str(error).replace(str(path), 'FILE')
                )[:60]
            except Exception as error:
                wrong.append((manner, repr(error)))
                outcome = type(error).__name__
            outcomes[manner, outcome] += 1
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    for (manner, outcome), count in sorted(outcomes.items()):
        print(f'{count:7d}  {manner:25s} {outcome}')
    seconds = time.monotonic() - begin
    print(f'{args.files} files in {seconds:.0f} s, {memory} kB of memory, {len(wrong)} wrong')
    for manner, what in wrong[:20]:
        print(f'wrong: {manner}: {what}', file=sys.stderr)
    sys.exit(1 if wrong or memory > MEMORY else 0)


if __name__ == '__main__':
    run_script(main)
