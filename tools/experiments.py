"""The runs, tables and pictures of the documentation, which ``tools.reproduce`` makes."""

from collections.abc import Sequence
from typing import NamedTuple

JOINT = '--center-loss-weight=1'  # where one lambda stands for center loss
OBJECTIVES = {'softmax': '--center-loss-weight=0', 'joint': JOINT}
OBJECTIVE_RUNS = ['softmax', 'lambda-1']  # of the recipe
LAMBDAS = ('0', '0.001', '0.01', '0.1', '1')  # of the paper's Figures 2 and 3
PAPER_LR = 0.01  # at 0.04 softmax only without biases diverges in its fourth epoch, seed 0
ORIGINAL = '--recipe=original --batch-size=128'
RANDOM = '--initial-embedding=random'


def lenet_plus_plus(lr: float = 0.04) -> str:
    """Return the recipe of LeNet++ for six epochs.

    An epoch takes some thirteen times as long as LeNet's: fewer epochs, of smaller batches,
    averaged as LeNet's. The rate is close to the limit: on AVX-512 softmax only diverges with
    seed 1.
    """
    return (
        f'--network=lenet++ --num-epochs=6 --lr={lr} --lr-factor=1 --average-weights=0.1 '
        '--embedding-lr-mult=0.25 --batch-size=64'
    )


# Unseen are the four classes that follow each other from class 0, 3 or 6 on; the rest is trained.
SPLITS = {
    first: ','.join(str(label) for label in range(10) if not first <= label < first + 4)
    for first in (0, 3, 6)
}
OPEN_SET = [(dim, weight) for dim in (2, 32) for weight in ('0', '0.01', '1')]


def open_set(classes: str, dim: int, weight: str) -> str:
    """Return the options of a run that is trained on some of the classes."""
    return f'--classes={classes} --embedding-dim={dim} --center-loss-weight={weight}'


RUNS = {
    'original-softmax': f'{ORIGINAL} --center-loss-weight=0',
    'original': ORIGINAL,
    'softmax': OBJECTIVES['softmax'],
    **{f'lambda-{value}': f'--center-loss-weight={value}' for value in LAMBDAS[1:-1]},
    'lambda-1': JOINT,
    'dim-10-softmax': f'{OBJECTIVES["softmax"]} --embedding-dim=10',
    'dim-10': f'{JOINT} --embedding-dim=10',
    'longer-dim-10': f'--num-epochs=20 {JOINT} --embedding-dim=10',
    **{f'alpha-{alpha}': f'{JOINT} --alpha={alpha}' for alpha in ('0.01', '0.1', '1')},
    # The recipe with one thing changed.
    **{f'random-{name}': f'{RANDOM} {objective}' for name, objective in OBJECTIVES.items()},
    **{f'longer-{name}': f'--num-epochs=20 {objective}' for name, objective in OBJECTIVES.items()},
    **{f'ring-{name}': f'--no-bias {objective}' for name, objective in OBJECTIVES.items()},
    **{f'lenet++-{name}': f'{lenet_plus_plus()} {value}' for name, value in OBJECTIVES.items()},
    **{
        f'lenet++-128-{name}': f'{lenet_plus_plus()} --embedding-dim=128 {value}'
        for name, value in OBJECTIVES.items()
    },
    **{
        f'paper-{value}': f'{lenet_plus_plus(PAPER_LR)} --no-bias --center-loss-weight={value}'
        for value in LAMBDAS
    },
    **{
        f'open-set-{first}-{dim}-{weight}': open_set(classes, dim, weight)
        for first, classes in SPLITS.items()
        for dim, weight in OPEN_SET
    },
}
# By default; three of all others. Any two seeds are independent.
FIVE_SEEDS = [*OBJECTIVE_RUNS, 'original-softmax', 'original', 'longer-dim-10']
FIVE_SEEDS += [f'{kind}-{name}' for kind in ('random', 'longer') for name in OBJECTIVES]
NUM_SEEDS = {**dict.fromkeys(FIVE_SEEDS, 5), **{f'paper-{value}': 1 for value in LAMBDAS}}
ANIMATED = 'lambda-1'  # with seed 0
REFERENCE = 'dim-10'  # its confusions are compared with the arrangement of the classes in the plane

# Test accuracy after some epochs of YYuanAnyVision/mxnet_center_loss: one run each at batch 128.
ORIGINAL_COURSES = {
    'softmax only': {1: 0.879, 2: 0.941, 3: 0.943, 4: 0.957},
    'softmax + center loss': {1: 0.799, 2: 0.880, 3: 0.918, 4: 0.951, 10: 0.973},
}


class Part(NamedTuple):
    """A table of the documentation.

    Attributes
    ----------
    rows
        What a row is called: the names of its runs, over which it is the average.
    kind
        How the table is made, see ``tools.table_kinds.KINDS``.
    compare
        Pairs of rows whose runs are compared, seed by seed.
    """

    rows: dict[str, list[str]]
    kind: str = 'results'
    compare: Sequence[tuple[str, str]] = ()

    def runs(self) -> list[str]:
        """Return the names of all runs that the table needs."""
        reference = [REFERENCE] if self.kind == 'arrangement' else []
        return [name for names in self.rows.values() for name in names] + reference


SOFTMAX, CENTER = 'softmax only', 'lambda 1'
BOTH = [(CENTER, SOFTMAX)]
OBJECTIVE_ROWS = {SOFTMAX: ['softmax'], CENTER: ['lambda-1']}
LAMBDA_ROWS = {
    SOFTMAX: ['softmax'],
    **{f'lambda {value}': [f'lambda-{value}'] for value in LAMBDAS[1:]},
}
ALPHA_ROWS = {
    'alpha 0.01': ['alpha-0.01'],
    'alpha 0.1': ['alpha-0.1'],
    'alpha 0.5': ['lambda-1'],  # the default
    'alpha 1': ['alpha-1'],
}
RECIPES = {
    'the recipe': OBJECTIVE_RUNS,
    'random initial embedding': ['random-softmax', 'random-joint'],
    '20 epochs': ['longer-softmax', 'longer-joint'],
}
RECIPE_ROWS = {
    f'{title}, {objective}': [run]
    for title, runs in RECIPES.items()
    for objective, run in zip((SOFTMAX, CENTER), runs, strict=True)
}
RANDOM_ROWS = {title: runs for title, runs in RECIPE_ROWS.items() if title.startswith('random')}
ORIGINAL_ROWS = {'softmax only': ['original-softmax'], 'softmax + center loss': ['original']}


def open_set_part(splits: Sequence[int]) -> Part:
    """Return the table of unseen classes, averaged over splits."""
    names = {'0': SOFTMAX, '0.01': 'lambda 0.01', '1': CENTER}
    rows = {
        f'{dim}-D, {names[weight]}': [f'open-set-{split}-{dim}-{weight}' for split in splits]
        for dim, weight in OPEN_SET
    }
    compare = [(f'{d}-D, {names[w]}', f'{d}-D, {SOFTMAX}') for d, w in OPEN_SET if w != '0']
    return Part(rows, 'open-set', compare)


PARTS = {
    'original': Part(ORIGINAL_ROWS, 'original'),
    'objectives': Part(OBJECTIVE_ROWS, compare=BOTH),
    'lambda': Part(LAMBDA_ROWS, compare=[(row, SOFTMAX) for row in LAMBDA_ROWS if row != SOFTMAX]),
    'alpha': Part(ALPHA_ROWS),
    'recipe': Part(
        RECIPE_ROWS,
        compare=[
            *((f'{title}, {CENTER}', f'{title}, {SOFTMAX}') for title in RECIPES),
            (f'the recipe, {CENTER}', f'random initial embedding, {CENTER}'),
            (f'20 epochs, {CENTER}', f'the recipe, {CENTER}'),
        ],
    ),
    'dimension': Part(
        {
            CENTER: ['lambda-1'],
            f'{SOFTMAX}, 10-D': ['dim-10-softmax'],
            f'{CENTER}, 10-D': ['dim-10'],
            f'{CENTER}, 10-D, 20 epochs': ['longer-dim-10'],
        },
        compare=[
            (f'{CENTER}, 10-D', f'{SOFTMAX}, 10-D'),
            (f'{CENTER}, 10-D', CENTER),
            (f'{CENTER}, 10-D, 20 epochs', f'{CENTER}, 10-D'),
        ],
    ),
    **{
        part: Part({SOFTMAX: [f'{part}-softmax'], CENTER: [f'{part}-joint']}, compare=BOTH)
        for part in ('ring', 'lenet++', 'lenet++-128')
    },
    'paper': Part(
        {SOFTMAX: ['paper-0'], **{f'lambda {value}': [f'paper-{value}'] for value in LAMBDAS[1:]}}
    ),
    'convergence': Part(
        {
            **OBJECTIVE_ROWS,
            **{f'original recipe, {row}': names for row, names in ORIGINAL_ROWS.items()},
        },
        'convergence',
        [*BOTH, tuple(f'original recipe, {row}' for row in reversed(ORIGINAL_ROWS))],
    ),
    'arrangement': Part({**OBJECTIVE_ROWS, **RANDOM_ROWS}, 'arrangement'),
    'open-set': open_set_part([*SPLITS]),
    'open-set-6': open_set_part([6]),  # one split
}
# What is made of a dataset by default.
DATASET_PARTS = {
    'fashion-mnist': ['lenet++', 'lenet++-128', 'open-set-6'],
    'mnist-5k': ['lambda', 'alpha'],
}
MNIST_PARTS = [part for part in PARTS if part not in ('lenet++-128', 'open-set-6')]

# (part, file, options of vis.py), of seed 0
PICTURES = [
    ('objectives', 'mnist.png', ['--compare', 'softmax', '--model-prefix', 'lambda-1']),
    ('objectives', 'curves.png', ['--curves', 'softmax.txt', 'lambda-1.txt']),
    ('objectives', 'evolution.gif', ['--model-prefix', ANIMATED]),
    ('lambda', 'lambda.png', ['--grid', *PARTS['lambda'].runs()]),
    ('paper', 'figure-2.png', ['--model-prefix', 'paper-0', '--split=both']),
    ('paper', 'figure-3.png', ['--grid', *(f'paper-{value}' for value in LAMBDAS[1:])]),
    *(
        (part, f'{name}.png', ['--compare', f'{name}-{left}', '--model-prefix', f'{name}-{right}'])
        for part, name, left, right in (
            ('ring', 'ring', 'softmax', 'joint'),
            ('lenet++', 'lenet++', 'softmax', 'joint'),
            ('open-set', 'open-set-6-2', '0', '1'),
            ('open-set', 'open-set-6-32', '0', '1'),
        )
    ),
]
