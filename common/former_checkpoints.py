"""Checkpoints of others: the first form of this program's, and those of the original of 2016."""

from collections.abc import Collection, Mapping
import json

from common.array_file import MAGIC, decode_arrays

# Of YYuanAnyVision/mxnet_center_loss, and what they are called here.
ORIGINAL_NAMES = {
    'convolution0': 'conv1',
    'convolution1': 'conv2',
    'fullyconnected0': 'fc1',
    'center_loss__center': 'center_loss_center_bias',
}


def rename_original(params: Mapping, wanted: Collection[str]) -> dict:
    """Return parameters with the names that those of the original of 2016 have here.

    Those names were given by MXNet. They stay where the network, whose parameters are called
    ``wanted``, has them too, or has not what they are called here.
    """

    def renamed(name):
        layer, separator, rest = name.partition('_')
        new = ORIGINAL_NAMES.get(name, ORIGINAL_NAMES.get(layer, layer) + separator + rest)
        return new if name not in wanted and new in wanted else name

    return {renamed(name): value for name, value in params.items()}


def decode_former_states(data: bytes) -> dict | None:
    """Return what a .states says that this program wrote in its first form, None for another's.

    It has the momentum, the last step where weights are averages, the options, and the digest of
    the .params. Raises ValueError if it is damaged, as far as that can be told.
    """
    if not data.startswith(MAGIC):
        return None  # a pickle of MXNet's
    arrays = decode_arrays(data)
    try:
        digest, options = (arrays.pop(name).asnumpy().tobytes() for name in ('digest', 'options'))
        options = {**json.loads(options)}
    except (KeyError, TypeError):
        raise ValueError('it has no digest, or no options') from None
    return {
        'files': {'params': {'sha256': digest.hex()}},
        'options': options,
        'state': {
            name.replace('momentum:', 'optimizer0:', 1): value for name, value in arrays.items()
        },
    }


def former_state_fits(state: Mapping, params: Mapping) -> bool:
    """Whether a state in its first form has all arrays, in the shapes of the tagged ``params``."""
    momentum = {
        name.replace('arg:', 'optimizer0:', 1): value.shape
        for name, value in params.items()
        if name.startswith('arg:')
    }
    last = {f'last:{name}': value.shape for name, value in params.items()}
    return {name: value.shape for name, value in state.items()} in (momentum, {**momentum, **last})
