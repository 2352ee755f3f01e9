"""Training of a network that ends in a softmax and a center loss, with ``mx.mod.Module``.

:func:`fit` reads from top to bottom as the list of decisions that a training run makes. It knows
nothing of the network and of the data but what it is given.
"""

import argparse
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import inspect
import itertools
import json
import logging
import os
from pathlib import Path

import numpy as np

from common.environment import mx
from center_loss import Accuracy, CenterLossMetric, CrossEntropy
from common.averaging import Average
from common.checkpoints import Checkpoints
from common.data_facts import check_data_facts
from common.devices import check_enough_images, check_equal_shares
from common.distributed import check_agreement, connected
from common.errors import Failure, InputError
from common.log_file import log_to, log_when_stopped
from common.module import Module
from common.monitoring import OwnDistance, TrainingMonitor, WidestDifference, check_not_diverged
from common.start import (
    Start,
    begin_at_epoch,
    describe_saved,
    find_start,
    match_parameters,
    share_start,
    warn_of_changes,
)
from common.versions import versions

logger = logging.getLogger(__name__)

LOG_EVERY = 50  # batches between two lines of the log
CHECKED_BATCHES = 10  # of validation images, to see a collapse that an average hides

# Options that a continued run may change without changing a single weight.
NOT_COMPARED = {
    'data_dir',
    'dataset',  # trained_on and data_sha256 are compared
    'keep_checkpoints',
    'load_epoch',
    'log_dir',
    'log_file',
    'model_prefix',
    'num_epochs',
    'resume',
    'save_model_prefix',
}


def fit(
    network: mx.sym.Symbol | Callable,
    data: Callable | tuple[mx.io.DataIter, mx.io.DataIter],
    *,
    compute_network: mx.sym.Symbol | Callable | None = None,
    devices: Sequence[mx.Context] | None = None,
    batch_size: int = 100,
    num_epochs: int = 20,
    optimizer: str = 'sgd',
    lr: float = 0.01,
    momentum: float = 0.9,
    wd: float = 5e-4,
    clip_gradient: float | None = None,
    lr_factor: float = 0.1,
    lr_factor_epoch: float = 14,
    warmup_epochs: float = 0,
    average_weights: float = 0,
    initializer: mx.init.Initializer | None = None,
    initial_params: Callable | None = None,
    seed: int = 0,
    kv_store: str = 'local',
    save_model_prefix: str = 'center_loss',
    keep_checkpoints: int | None = None,
    resume: bool = False,
    model_prefix: str | None = None,
    load_epoch: int | None = None,
    log_file: str = 'log.txt',
    log_dir: str = '.',
    batch_end_callback: Callable | Sequence[Callable] = (),
    record: dict | None = None,
    how_to_continue: str = 'continue with resume=True',
) -> Module:
    """Train a network, with validation and a checkpoint after every epoch.

    Parameters
    ----------
    network
        A group of the outputs ``softmax_output`` (B, K) and ``center_loss_output`` (B,), or a
        function that returns it, given ``train``. It is what the checkpoints hold.
    data
        ``(train, val)``, two iterators whose batches have the inputs and labels of the network; or
        a function ``data(batch_size, num_parts=, part_index=)`` that returns them for worker
        ``part_index`` of ``num_parts``. A continued run is exact if ``train.start_epoch(epoch)``
        exists, as for ``data.DualLabelIter``; not with Dropout, SGLD or Nadam, parts of whose state
        are not saved. A dict ``train.data_facts`` is saved for inference, see ``check_data_facts``.
    compute_network
        The same, with the same parameters and outputs, in a form that is faster to compute: it is
        bound in the place of ``network``.
    devices
        Contexts that share every batch; by default the first CPU.
    batch_size
        Images in a batch of this worker, over all its devices.
    num_epochs
        Number of the last epoch, counted from 1.
    optimizer
        Name of an MXNet optimizer; ``momentum`` is for those that have one.
    lr, momentum, wd
        Learning rate, momentum, and weight decay (none on biases) of the mean objective.
    clip_gradient
        Clip gradients elementwise to [-C, C]; None or 0: never.
    lr_factor, lr_factor_epoch
        The learning rate is multiplied by ``lr_factor`` every ``lr_factor_epoch`` epochs.
    warmup_epochs
        The learning rate rises from 0 over the first ``warmup_epochs`` epochs.
    average_weights
        Validate and save the average over this share of the last steps, see ``Average``.
    initializer
        Initial weights; by default MXNet's Xavier.
    initial_params
        Function of the network, ``train`` and ``initializer`` that returns initial parameters by
        name, such as ``common.discriminants.discriminant_params``.
    seed
        Of the initial weights. Any two seeds are independent.
    kv_store
        Name of the MXNet kvstore that sums gradients over devices and workers.
    save_model_prefix, keep_checkpoints
        Where checkpoints are written, and how many of the newest are kept (None: all).
    resume
        Continue the run of ``save_model_prefix`` from its newest whole checkpoint, if any.
    model_prefix, load_epoch
        Continue at epoch ``load_epoch`` with the parameters of that checkpoint that fit. The prefix
        is by default ``save_model_prefix``.
    log_file, log_dir
        The log, which is appended to.
    batch_end_callback
        Called after every batch, as in ``mx.mod.Module.fit``.
    record
        Further options of the run, such as those of data and network: logged, kept with every
        checkpoint, and compared when a run is resumed.
    how_to_continue
        Ends the message about a run that was stopped.

    Returns
    -------
    Module
        With the weights of the last step. ``module.validation_scores`` are the metrics of what was
        saved after the last epoch, with ``average_weights`` of the average.

    Raises
    ------
    InputError
        For options that do not fit each other, this machine or the files that are there.
    Diverged
        Where the training diverged; the checkpoints before stay.
    """
    devices = list(devices or [mx.cpu()])
    check_equal_shares(batch_size, devices)
    momentum_option = {'momentum': momentum} if has_momentum(optimizer) else {}
    checkpoints = Checkpoints(save_model_prefix)
    log_path = Path(os.path.expanduser(log_dir)) / os.path.expanduser(log_file)
    if checkpoints.owns(log_path):
        raise InputError(f'--log_file={log_path} is a checkpoint of {save_model_prefix}')

    saved_epochs: list[int] = []  # of this run, including those that it resumes

    def resume_hint():
        paths = map(checkpoints.params_path, saved_epochs)
        return describe_saved(save_model_prefix, list(paths), how_to_continue)

    with contextlib.ExitStack() as stack:
        kv = stack.enter_context(connected(kv_store, resume_hint))
        stack.enter_context(log_to(log_path, kv.rank))
        stack.enter_context(log_when_stopped(resume_hint))
        if kv.rank == 0:
            checkpoints.check_writable()
            stack.enter_context(checkpoints.lock())

        # Where to begin: at a checkpoint that rank 0 has read, or at epoch 0.
        start, earlier, first_epoch = Start(), [], 0
        if kv.rank == 0:
            earlier = checkpoints.epochs()
            source = Checkpoints(model_prefix or save_model_prefix)
            start = find_start(checkpoints, source, load_epoch, resume, num_epochs)
            first_epoch = start.options.get('first_epoch', 0) if start.resumed else start.epoch
            saved_epochs += [epoch for epoch in earlier if first_epoch < epoch <= start.epoch]

        # The data, and how much there is of it.
        load = data if callable(data) else lambda *args, **parts: data
        train, val = load(batch_size, num_parts=kv.num_workers, part_index=kv.rank)
        check_enough_images(val, len(devices), 'validation')
        if not hasattr(train, 'num_batches'):  # those of a DualLabelIter are all of one size
            check_enough_images(train, len(devices), 'training')
        num_batches, data_facts = count_batches(train), getattr(train, 'data_facts', {})
        network, compute_network = (
            form if form is None or isinstance(form, mx.sym.Symbol) else form(train)
            for form in (network, compute_network)
        )
        computed = network if compute_network is None else compute_network
        mx.random.seed(independent_seed(seed))
        initializer = initializer or mx.init.Xavier()
        if kv.rank == 0:
            start = match_parameters(start, network, train)
            if initial_params and not start.path:
                # of the images of all workers, so that their number makes no difference
                whole = train
                if kv.num_workers > 1:
                    whole, _ = load(batch_size * kv.num_workers, num_parts=1, part_index=0)
                arg_params = initial_params(computed, whole, initializer)
                start = dataclasses.replace(start, arg_params=arg_params)
                whole.reset()
        start = share_start(kv, start)
        if kv.rank > 0 and start.resumed:
            saved_epochs.append(start.epoch)
        begin_at_epoch(train, start.epoch)

        # What determines the result. Workers have to agree on it, and a continuation is compared.
        options = {
            **{key: value for key, value in (record or {}).items() if key not in NOT_COMPARED},
            'batch_size': batch_size,
            'optimizer': optimizer,
            'lr': lr,
            'momentum': momentum,
            'wd': wd,
            'clip_gradient': clip_gradient,
            'lr_factor': lr_factor,
            'lr_factor_epoch': lr_factor_epoch,
            'warmup_epochs': warmup_epochs,
            'average_weights': average_weights,
            'seed': seed,
            'kv_store': kv_store,
            'num_workers': kv.num_workers,
            'batches_per_epoch': num_batches,
            'trained_on': data_facts.get('dataset'),
            'data_sha256': data_facts.get('sha256'),
        }
        options, data_facts = json.loads(json.dumps([options, data_facts], default=as_plain))
        check_data_facts(data_facts, 'train.data_facts')
        logger.info('versions: %s', json.dumps(versions()))
        arguments = {**(record or {}), **options}
        given = {name: value for name, value in arguments.items() if value is not None}
        logger.info('start with arguments %s', argparse.Namespace(**given))
        warn_of_changes(start, options)
        if kv.num_workers > 1:
            check_agreement(kv, {**options, 'num_epochs': num_epochs})

        module = Module(
            computed,
            initial_state=start.optimizer_state,
            data_names=[name for name, *_ in train.provide_data],
            label_names=[name for name, *_ in train.provide_label],
            context=devices,
        )
        average = Average(average_weights if kv.rank == 0 else 0, module, start.average)

        def finish_epoch(epoch, symbol, *params_of_last_step):
            """Validate and save on rank 0, while the others wait.

            An epoch that has a checkpoint has all its numbers in the log, and they are sound.
            """
            if kv.rank == 0:
                where = f'epoch {epoch + 1}, batch {num_batches}'
                state = module.optimizer_state()
                if average.share:  # a collapse shows at once in the last step, later in the average
                    last_step = itertools.chain(*(params.items() for params in params_of_last_step))
                    scores, difference, _ = validate(module, val, CHECKED_BATCHES)
                    check_not_diverged(where, scores, difference, last_step)
                with average.in_use() as last:
                    scores, difference, distance = validate(module, val)
                    for name, value in scores.items():
                        logger.info('Epoch[%d] Validation-%s=%f', epoch, name, value)
                    params = module.get_params()
                    arrays = itertools.chain(params[0].items(), params[1].items(), state.items())
                    check_not_diverged(where, scores, difference, arrays)
                    state.update({f'last:{name}': array for name, array in last.items()})
                    kept = {**options, 'first_epoch': first_epoch}  # what lies before is not ours
                    facts = {**data_facts, 'rejection_distance': distance}
                    checkpoints.save(epoch + 1, network, *params, state, kept, outdated(), facts)
                module.validation_scores = scores
            if kv.num_workers > 1:
                kv._barrier()
            saved_epochs.append(epoch + 1)

        def outdated():
            """Epochs to remove: of the run that had the prefix before, and the oldest of this."""
            replaced = [] if start.epoch or saved_epochs else earlier
            kept = keep_checkpoints - 1 if keep_checkpoints else len(saved_epochs)
            return [*replaced, *saved_epochs[: max(0, len(saved_epochs) - kept)]]

        monitor = TrainingMonitor(batch_size, num_batches, num_epochs, shown=kv.rank == 0)
        callbacks = [average] if average.share else []
        callbacks.append(stack.enter_context(monitor))
        callbacks += [batch_end_callback] if callable(batch_end_callback) else batch_end_callback
        callbacks.append(mx.callback.Speedometer(batch_size, LOG_EVERY))  # it resets the metrics
        try:
            module.fit(
                train,
                eval_metric=metrics(),
                kvstore=kv if len(devices) * kv.num_workers > 1 else None,
                optimizer=optimizer,
                optimizer_params={
                    'learning_rate': lr,
                    'wd': wd,
                    'clip_gradient': clip_gradient or None,
                    'begin_num_update': start.epoch * num_batches,
                    'lr_scheduler': lr_schedule(
                        lr, lr_factor, lr_factor_epoch * num_batches, warmup_epochs * num_batches
                    ),
                    **momentum_option,
                },
                initializer=initializer,
                arg_params=start.arg_params,
                aux_params=start.aux_params,
                allow_missing=True,
                begin_epoch=start.epoch,
                num_epoch=num_epochs,
                batch_end_callback=callbacks,
                epoch_end_callback=finish_epoch,
            )
        except Failure as failure:
            failure.args = (f'{failure}; {resume_hint()}',)
            raise
    return module


def count_batches(train: mx.io.DataIter) -> int:
    """Return the number of batches in an epoch, counted where the iterator does not say it."""
    if hasattr(train, 'num_batches'):
        return train.num_batches
    train.reset()
    count = sum(1 for _ in train)
    train.reset()
    return count


def as_plain(value: object) -> object:
    """Return a NumPy number or array as numbers and lists, anything else as text."""
    return value.tolist() if hasattr(value, 'tolist') else str(value)


def independent_seed(seed: int) -> int:
    """Spread a seed over the range of MXNet's, so that any two seeds are independent.

    MXNet starts its i-th parallel generator at seed + i: neighboring seeds share most weights.
    """
    return int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)


def has_momentum(optimizer: str) -> bool:
    """Return whether an MXNet optimizer takes the option momentum."""
    kind = mx.optimizer.Optimizer.opt_registry.get(optimizer.lower())
    if kind is None:
        raise InputError(f'optimizer={optimizer!r}: MXNet has no such optimizer')
    return 'momentum' in inspect.signature(kind).parameters


def lr_schedule(
    lr: float, factor: float, factor_updates: float, warmup_updates: float
) -> mx.lr_scheduler.LRScheduler:
    """Return a linear warm-up to ``lr``, multiplied by ``factor`` every ``factor_updates`` updates.

    Updates are counted from the first of the run, not of this process.
    """
    constant = factor == 1  # MXNet would log a change after every so many updates
    return mx.lr_scheduler.FactorScheduler(
        2**62 if constant else max(1, round(factor_updates)),
        factor,
        stop_factor_lr=0,
        base_lr=lr,
        warmup_steps=round(warmup_updates),
    )


def metrics() -> mx.metric.CompositeEvalMetric:
    """Return the metrics; the objective is their cross-entropy plus lambda times center loss."""
    cross_entropy = CrossEntropy('cross-entropy')  # MXNet's name for it
    return mx.metric.CompositeEvalMetric([Accuracy(), cross_entropy, CenterLossMetric()])


def validate(
    module: Module, val: mx.io.DataIter, num_batches: int | None = None
) -> tuple[dict[str, float], float, float]:
    """Return the metrics over the validation images, ``WidestDifference`` and ``OwnDistance``.

    Of the first ``num_batches`` batches, by default of all.
    """
    reported, difference, distance = metrics(), WidestDifference(), OwnDistance()
    watched = mx.metric.CompositeEvalMetric([*reported.metrics, difference, distance])
    module.score(val, watched, num_batches)
    return dict(reported.get_name_value()), difference.get()[1], distance.get()[1]
