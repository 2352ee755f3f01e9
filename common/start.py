"""Where a run begins: at its beginning, at a checkpoint to resume, or at one to load."""

from collections.abc import Sequence
import dataclasses
import logging
import os
from pathlib import Path

from common.environment import mx
from common.array_file import tagged, untagged
from common.checkpoints import Checkpoints
from common.distributed import broadcast_from_rank_0
from common.errors import InputError
from common.former_checkpoints import rename_original
from common.symbol_file import decode_symbol, encode_symbol, output_shapes, parameter_mismatches

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run begins; by default at the beginning, with initial weights.

    ``average`` are the averaged arrays of a resumed run, ``arg_params`` and ``aux_params`` what its
    training goes on with, ``options`` what it was trained with.
    """

    epoch: int = 0
    resumed: bool = False
    arg_params: dict | None = None
    aux_params: dict | None = None
    optimizer_state: dict | None = None
    average: dict = dataclasses.field(default_factory=dict)
    options: dict = dataclasses.field(default_factory=dict)
    path: Path | None = None


def find_start(
    checkpoints: Checkpoints,
    source: Checkpoints,
    load_epoch: int | None,
    resume: bool,
    num_epochs: int,
) -> Start:
    """Read the checkpoint that a run begins with, if any, and say what will become of others."""
    existing = checkpoints.epochs()
    if resume:
        found = checkpoints.newest_whole()
        if found is not None:
            path = checkpoints.params_path(found.epoch)
            logger.info('resuming from %s', path)
            if found.epoch >= num_epochs:
                logger.warning(
                    '%s has all of the %d epochs already: raise --num-epochs to go on',
                    checkpoints.prefix,
                    num_epochs,
                )
            last = {
                name.removeprefix('last:'): array
                for name, array in found.state.items()
                if name.startswith('last:')
            }
            saved = found.arg_params, found.aux_params
            arg_params, aux_params = untagged(last) if last else saved
            optimizer_state = {
                name: array for name, array in found.state.items() if name.startswith('optimizer')
            }
            return Start(
                epoch=found.epoch,
                resumed=True,
                arg_params=arg_params,
                aux_params=aux_params,
                optimizer_state=optimizer_state,
                average=tagged(*saved),
                options=found.options,
                path=path,
            )
        begin = 'starting at the beginning' if load_epoch is None else 'loading another one'
        logger.info('no checkpoint of %s to resume from: %s', checkpoints.prefix, begin)
    if load_epoch is not None:
        same = os.path.abspath(source.prefix) == os.path.abspath(checkpoints.prefix)
        if in_the_way := [epoch for epoch in existing if not same or epoch > load_epoch]:
            raise InputError(
                f'{checkpoints.prefix} has the epochs {", ".join(map(str, in_the_way))} already: '
                'continue them with --resume, or choose another --save-model-prefix'
            )
        path = source.params_path(load_epoch)
        arg_params, aux_params = source.load_params(load_epoch)
        if load_epoch >= num_epochs:
            raise InputError(
                f'--num-epochs={num_epochs} is the last epoch: it has to be above '
                f'--load-epoch={load_epoch}'
            )
        logger.info('%s: continuing at epoch %d; momentum begins at 0', path, load_epoch)
        return Start(load_epoch, arg_params=arg_params, aux_params=aux_params, path=path)
    if existing and not resume:
        logger.warning(
            'checkpoints of an earlier run of %s (%d) are replaced once the first epoch is saved; '
            'stop now and give --resume to continue that run, or another --save-model-prefix to '
            'keep it',
            checkpoints.prefix,
            len(existing),
        )
    return Start()


def match_parameters(start: Start, network: mx.sym.Symbol, train: mx.io.DataIter) -> Start:
    """Check that the parameters are those of the network, or take those that are.

    A run that is resumed needs all of them; one that begins with loaded parameters takes what fits.
    Raises InputError, too, where the network does not take the data.
    """
    try:
        decode_symbol(encode_symbol(network))
    except ValueError as error:
        logger.warning('vis.py and the tools will not load checkpoints of this network: %s', error)
    shapes = {name: shape for name, shape, *_ in [*train.provide_data, *train.provide_label]}
    if start.path is None:
        output_shapes(network, shapes)
        return start
    if not start.resumed:
        wanted = {*network.list_arguments(), *network.list_auxiliary_states()}
        start = dataclasses.replace(
            start,
            arg_params=rename_original(start.arg_params, wanted),
            aux_params=rename_original(start.aux_params, wanted),
        )
    mismatches = list(parameter_mismatches(network, shapes, start.arg_params, start.aux_params))
    if start.resumed:
        if mismatches:
            names = ', '.join(name for name, _ in mismatches)
            raise InputError(
                f'{start.path} is a checkpoint of another network: {names} do not fit; resume with '
                'the options it was trained with, or start from it with --load-epoch'
            )
        return start
    for name, why in mismatches:
        logger.info('%s: %s not taken, %s', start.path, name, why)
    left = {name for name, _ in mismatches}
    arg_params, aux_params = (
        {name: value for name, value in params.items() if name not in left}
        for params in (start.arg_params, start.aux_params)
    )
    if not arg_params:
        raise InputError(
            f'{start.path} is a checkpoint of another network: nothing of it fits; choose another '
            '--model-prefix'
        )
    logger.info('%s: took %s', start.path, ', '.join([*arg_params, *aux_params]))
    return dataclasses.replace(start, arg_params=arg_params, aux_params=aux_params)


def share_start(kv: mx.kv.KVStore, start: Start) -> Start:
    """Let every worker begin where rank 0 does; arrays follow when the optimizer is set up."""
    if kv.num_workers == 1:
        return start
    numbers = mx.nd.array([start.epoch, start.resumed, start.optimizer_state is not None])
    epoch, resumed, has_state = broadcast_from_rank_0(kv, 'start', numbers).asnumpy()
    if kv.rank == 0:
        return start
    return Start(int(epoch), bool(resumed), optimizer_state={} if has_state else None)


def begin_at_epoch(train: mx.io.DataIter, epoch: int) -> None:
    """Let a training iterator begin at an epoch, counted from 0, where it can.

    At epoch 0, too: images of it may have been used before.
    """
    if hasattr(train, 'start_epoch'):
        train.start_epoch(epoch)
    elif epoch:
        logger.warning(
            'the training data cannot begin at epoch %d: this run continues, but not exactly as if '
            'it had never been stopped',
            epoch,
        )


def warn_of_changes(start: Start, options: dict) -> None:
    """Warn of every option that differs from the one that the resumed run was trained with."""
    for name in sorted(options.keys() & start.options.keys()):
        if options[name] != start.options[name]:
            logger.warning(
                'resuming with %s=%s, while %s was trained with %s',
                name,
                options[name],
                start.path,
                start.options[name],
            )


def describe_saved(prefix: str, params_paths: Sequence[Path], how_to_continue: str) -> str:
    """Return the end of a message about a run that was stopped: what is saved, how to continue."""
    if not params_paths:
        return f'this run of {prefix} has finished no epoch, there is nothing of it to resume'
    return f'the last whole checkpoint is {params_paths[-1]}; {how_to_continue}'
