"""Checkpoints: after every epoch the network, its parameters and what training goes on from.

    PREFIX-symbol.json   the network, one for all epochs; MXNet's format with a checksum
    PREFIX-0001.params   weights 'arg:NAME' and centers 'aux:NAME'; MXNet's format
    PREFIX-0001.resume   what an exact continuation needs besides, in the same format
    PREFIX-0001.json     epoch, sizes and SHA-256 of these two, options, versions, what inference
                         needs, and a checksum of itself: written last, it makes the checkpoint

A checkpoint is checked as one thing before anything in it is parsed. Files are written under
temporary names, synced and renamed; what had their names before goes where :meth:`Checkpoints.save`
is asked to remove it, and is otherwise kept under another prefix.
"""

from collections.abc import Iterable, Mapping
import hashlib
import json
import logging
import os
from typing import NamedTuple

from common.environment import mx
from common.array_file import decode_arrays, encode_arrays, tagged, untagged
from common.checkpoint_files import CheckpointFiles
from common.errors import DamagedCheckpoint, InputError, UncheckedCheckpoint
from common.files import read_regular_file, sync_folder, temporary_path, write_synced
from common.former_checkpoints import decode_former_states, former_state_fits
from common.symbol_file import decode_symbol, encode_symbol
from common.versions import versions

logger = logging.getLogger(__name__)

Arrays = Mapping[str, mx.nd.NDArray]

MAX_JSON_SIZE = 2**25  # room for the names of a million classes
MAX_SYMBOL_SIZE = 2**22


class Checkpoint(NamedTuple):
    """What was saved after an epoch, see :meth:`Checkpoints.save`."""

    epoch: int
    arg_params: dict[str, mx.nd.NDArray]
    aux_params: dict[str, mx.nd.NDArray]
    state: dict[str, mx.nd.NDArray]
    options: dict


class Checkpoints(CheckpointFiles):
    """The checkpoints of one run: of one prefix, the path that their names begin with."""

    def __init__(self, prefix: str | os.PathLike):
        super().__init__(prefix)
        self._symbol = self._encoded_symbol = None  # the one that was saved last
        self._reported = False  # that there are checkpoints without a checksum

    def save(
        self,
        epoch: int,
        symbol: mx.sym.Symbol,
        arg_params: Arrays,
        aux_params: Arrays,
        state: Arrays,
        options: dict,
        remove: Iterable[int] = (),
        inference: dict | None = None,
    ) -> None:
        """Write a whole checkpoint, or leave everything as it was.

        Parameters
        ----------
        epoch
            The number of epochs that are done.
        symbol, arg_params, aux_params
            The network; its weights and its centers by name.
        state
            What training goes on from: 'optimizer0:NAME', and where the weights are averages those
            of the last step, 'last:arg:NAME' and 'last:aux:NAME'.
        options, inference
            What determines the result, and what the network is used with, both as JSON has it.
        remove
            Epochs that go when this one is ready. Where this epoch is not among them, one that was
            there before is kept under another prefix; so is one without a checksum in any case.

        Raises
        ------
        InputError
            If it cannot be written.
        """
        params, remove = tagged(arg_params, aux_params), {*remove}
        if symbol is not self._symbol:  # every use of symbol.tojson() leaks
            self._symbol, self._encoded_symbol = symbol, encode_symbol(symbol)
        kinds = ('symbol', 'resume', 'params', 'json')
        places = [self.symbol_path, *(self._path(epoch, kind) for kind in kinds[1:])]
        new = dict(zip(kinds, map(temporary_path, places), strict=True))
        try:
            write_synced(new['symbol'], [self._encoded_symbol])
            files = {
                kind: write_synced(new[kind], encode_arrays(arrays))
                for kind, arrays in (('params', params), ('resume', state))
            }
            content = {'epoch': epoch, 'files': files, 'options': options, 'versions': versions()}
            content['inference'] = inference or {}
            encoded = _with_checksum(content)
            if len(encoded) > MAX_JSON_SIZE:
                raise InputError(
                    f'cannot write the checkpoint of epoch {epoch}: the options and data facts of '
                    f'{self.prefix} are {len(encoded):,} bytes of JSON, and no more than '
                    f'{MAX_JSON_SIZE:,} are read again'
                )
            write_synced(new['json'], [encoded])
            # A kill between any two steps leaves at most one epoch unfinished, and loses nothing
            # but the network of the run that this one replaces.
            unchecked = {old for old in remove if 'json' not in self._kinds(old)}
            others = {old for old in remove if old > epoch} | unchecked  # of an earlier run
            moved = [
                (old, self._move(old, with_symbol=old in unchecked or old not in remove))
                for old in sorted({*others, epoch}, reverse=True)
            ]
            for kind, place in zip(kinds, places, strict=True):
                if kind == 'json':
                    sync_folder(self._folder)
                os.replace(new[kind], place)
            sync_folder(self._folder)
            moved += [(old, self._move(old)) for old in sorted(remove - others) if old < epoch]
            for old, kept in moved:
                if old in remove:
                    kept._remove(old)
                if kept._kinds(old):
                    path = kept.params_path(old)
                    logger.warning('%s is kept as %s', self.params_path(old), path)
        except (OSError, MemoryError) as error:
            raise InputError(
                f'cannot write the checkpoint of epoch {epoch} to {self.params_path(epoch)}: '
                f'{getattr(error, "strerror", "too little memory")}'
            ) from None
        finally:
            for path in new.values():
                path.unlink(missing_ok=True)

    def load(self, epoch: int) -> Checkpoint:
        """Return a whole checkpoint.

        Raises DamagedCheckpoint if its bytes are not those that were written, UncheckedCheckpoint
        if it has no checksum, and another InputError if a file is missing or cannot be read.
        """
        content = self._content(epoch)
        path = self.params_path(epoch)
        if content is None:
            raise UncheckedCheckpoint(f'{path} has no checksum: of another program, or unfinished')
        params = self._arrays(epoch, 'params', content)
        if 'state' in content:  # of the former .states
            logger.warning('%s: its .states have no checksum, and cannot be checked', path)
            state = content['state']
            if not former_state_fits(state, params):
                raise self._damage(epoch, 'states', 'it does not fit the parameters')
        else:
            state = self._arrays(epoch, 'resume', content)
        return Checkpoint(epoch, *untagged(params), state, content['options'])

    def load_params(self, epoch: int) -> tuple[dict, dict]:
        """Return weights and centers by name; warn without a checksum; errors as :meth:`load`."""
        self.check_epoch(epoch)
        content = self._content(epoch)
        if content is None and not self._reported:
            self._reported = True
            logger.warning('%s has no checksum, and cannot be checked', self.params_path(epoch))
        return untagged(self._arrays(epoch, 'params', content))

    def load_inference(self, epoch: int) -> dict:
        """Return ``inference`` of an epoch, see :meth:`save`; empty where it was not saved."""
        self.check_epoch(epoch)
        return (self._content(epoch) or {}).get('inference', {})

    def load_symbol(self) -> mx.sym.Symbol:
        """Return the network; before it is bound, :func:`parameter_mismatches` has to be called.

        Raises InputError where it is missing, damaged, or holds what is not allowed.
        """
        data = read_regular_file(self.symbol_path, MAX_SYMBOL_SIZE)
        try:
            return decode_symbol(data)
        except ValueError as error:
            raise InputError(f'cannot load {self.symbol_path}: {error}') from None

    def newest_whole(self) -> Checkpoint | None:
        """Return the newest whole checkpoint; None where there is none to begin with.

        Damaged ones, and those without a checksum, are passed over with a warning. Raises
        InputError if a newer one cannot be read, or if all are damaged.
        """
        damage = None
        for epoch in reversed(self.epochs()):
            try:
                return self.load(epoch)
            except UncheckedCheckpoint as error:
                logger.warning('%s; it is passed over', error)
            except DamagedCheckpoint as error:
                logger.warning('%s; going back to the checkpoint before it', error)
                damage = error
        if damage:
            raise InputError(
                f'no checkpoint of {self.prefix} is whole: begin a new run, with another '
                '--save-model-prefix if you want to keep them'
            )
        return None

    def _content(self, epoch):
        """Return what the .json of an epoch says, or the former .states; None without both."""
        kind = next((kind for kind in ('json', 'states') if kind in self._kinds(epoch)), None)
        if kind is None:
            return None
        data = read_regular_file(self._path(epoch, kind), MAX_JSON_SIZE if kind == 'json' else None)
        if kind == 'states':
            return self._decoded(epoch, kind, data, decode_former_states)
        content = self._decoded(epoch, kind, data, json.loads)
        if not isinstance(content, dict) or _with_checksum(content) != data:
            raise self._damage(epoch, kind, 'its checksum differs')
        if content['epoch'] != epoch:
            raise self._damage(epoch, kind, f'it is of epoch {content["epoch"]}')
        return content

    def _arrays(self, epoch, kind, content):
        """Return the arrays of a file, which has to be the one that ``content`` describes."""
        file = content['files'][kind] if content else {}
        max_bytes = file['size'] + 1 if 'size' in file else None
        data = read_regular_file(self._path(epoch, kind), max_bytes)
        if file and hashlib.sha256(data).hexdigest() != file['sha256']:
            raise self._damage(epoch, kind, 'its checksum differs')
        return self._decoded(epoch, kind, data, decode_arrays)

    def _decoded(self, epoch, kind, data, decode):
        try:
            return decode(data)
        except (ValueError, RecursionError) as error:
            raise self._damage(epoch, kind, error) from None

    def _damage(self, epoch, kind, reason):
        return DamagedCheckpoint(f'{self._path(epoch, kind)} is damaged: {reason}')


def _with_checksum(content):
    """Return the .json of a checkpoint, with its checksum."""
    content = {key: value for key, value in content.items() if key != 'sha256'}
    checksum = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, 'sha256': checksum}, indent=1).encode()
