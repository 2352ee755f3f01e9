"""The runs and pictures of the documentation, which ``tools.reproduce`` makes."""

JOINT = '--center-loss-weight=1'  # where one lambda stands for center loss
OBJECTIVES = {'softmax': '--center-loss-weight=0', 'joint': JOINT}
# An epoch of LeNet++ is thirteen times the work: fewer epochs, of smaller batches. With so many
# batches to warm up in, a higher rate is stable.
LENET_PLUS_PLUS = (
    '--network=lenet++ --num-epochs=6 --lr=0.04 --embedding-lr-mult=0.25 --lr-factor-epoch=4 '
    '--batch-size=64'
)
RUNS = {
    'original': '--recipe=original --batch-size=128 --num-epochs=4',
    'softmax': OBJECTIVES['softmax'],
    **{f'lambda-{value}': f'--center-loss-weight={value}' for value in ('0.001', '0.01', '0.1')},
    'lambda-1': JOINT,
    **{f'alpha-{alpha}': f'{JOINT} --alpha={alpha}' for alpha in ('0.01', '0.1', '1')},
    # The rate stays high; the average over about the last tenth of all steps is measured.
    **{f'averaged-{k}': f'--average-weights=0.1 --lr-factor=1 {v}' for k, v in OBJECTIVES.items()},
    **{f'ring-{name}': f'--no-bias {objective}' for name, objective in OBJECTIVES.items()},
    **{f'lenet++-{name}': f'{LENET_PLUS_PLUS} {value}' for name, value in OBJECTIVES.items()},
    **{
        f'open-set-{dim}-{weight}': f'--num-classes=6 --embedding-dim={dim} '
        f'--center-loss-weight={weight}'
        for dim in (2, 32)
        for weight in ('0', '0.01', '0.1', '1')
    },
}
LAMBDAS = ['softmax', 'lambda-0.001', 'lambda-0.01', 'lambda-0.1', 'lambda-1']
ALPHAS = ['alpha-0.01', 'alpha-0.1', 'lambda-1', 'alpha-1']  # 0.5 is the default: lambda-1
PARTS = {
    'original': ['original'],
    'objectives': ['softmax', 'lambda-1'],
    'lambda': LAMBDAS,
    'alpha': ALPHAS,
    'averaged': ['lambda-1', 'averaged-softmax', 'averaged-joint'],
    **{
        part: [name for name in RUNS if name.startswith(part)]
        for part in ('ring', 'lenet++', 'open-set')
    },
}
NUM_SEEDS = {'original': 5}  # by default; three of all others
ANIMATED = 'lambda-1'  # with seed 0

# (part, file, options of vis.py), of seed 0
PICTURES = [
    ('objectives', 'mnist.png', ['--compare', 'softmax', '--model-prefix', 'lambda-1']),
    ('objectives', 'curves.png', ['--curves', 'softmax.txt', 'lambda-1.txt']),
    ('objectives', 'evolution.gif', ['--model-prefix', ANIMATED]),
    ('lambda', 'lambda.png', ['--grid', *LAMBDAS]),
    ('alpha', 'alpha.png', ['--grid', *ALPHAS]),
    ('averaged', 'averaged.png', ['--curves', 'lambda-1.txt', 'averaged-joint.txt']),
    *(
        (part, f'{name}.png', ['--compare', f'{name}-{left}', '--model-prefix', f'{name}-{right}'])
        for part, name, left, right in (
            ('ring', 'ring', 'softmax', 'joint'),
            ('lenet++', 'lenet++', 'softmax', 'joint'),
            ('open-set', 'open-set-2', '0', '1'),
            ('open-set', 'open-set-32', '0', '1'),
        )
    ),
]
