"""Training of a symbol that ends in a softmax and a center loss, with ``mx.mod.Module``.

``fit`` reads from top to bottom as the list of decisions that a training run makes: log file, kvstore, devices, data, learning rate, initial
weights, the epochs. It knows nothing of the network and of the data but what it is given.

A run leaves, for every epoch (counted from 1):

    PREFIX-symbol.json   the network
    PREFIX-0001.params   weights ('arg:NAME') and centers ('aux:NAME'), what ``mx.model.load_checkpoint`` reads
    PREFIX-0001.states   what an exact continuation needs besides: momentum, the options, and the digest of the .params they belong to; where weights
                         are averaged, those of the last step as well

A prefix holds one run. Each file is written beside its place and moved there when it is whole.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import logging.handlers
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from center_loss import Accuracy, CenterLossMetric, read_centers, write_centers
from distributed import check_agreement, connected, of_rank_0, told_once
from runtime import Failure, InputError, Terminated, mx

MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
LOG_EVERY = 50  # batches between two lines of the log
COLLAPSED = 1e-4  # of 1/K, see stop_unless_sound
SMALL = 10_000  # elements of a parameter, see Updater
AHEAD, MOST_STEPS = 0.4, 10  # seconds and steps, see Watch

# What may differ between a run and its continuation without changing a single weight.
NOT_OF_THE_RUN = {
    'data_dir',
    'log_dir',
    'log_file',
    'load_epoch',
    'model_prefix',
    'num_epochs',
    'resume',
    'save_model_prefix',
}


@told_once()
def fit(args, network, data_loader, data_shape, devices=None):
    """Train a network, with validation and a checkpoint after every epoch.

    Parameters
    ----------
    args : argparse.Namespace
        The options of ``train.py``: ``gpus``, ``cpus``, ``batch_size``, ``lr``, ``lr_factor``, ``lr_factor_epoch``, ``warmup_epochs``, ``clip_gradient``,
        ``average_weights``, ``initializer``, ``num_epochs``, ``kv_store``, ``model_prefix``, ``load_epoch``, ``save_model_prefix``, ``resume``, ``log_file``,
        ``log_dir``, ``seed``.
    network : mx.sym.Symbol
        A group of the outputs ``softmax_output`` (B, K) and ``center_loss_output`` (1,), with the labels ``softmax_label`` and
        ``center_label``, both (B,).
    data_loader : callable
        ``data_loader(batch_size, data_shape, num_parts=, part_index=, first_epoch=) -> (train, val)``: two ``mx.io.DataIter``, the first of this
        worker's share of the training data, with the attribute ``num_batches``.
    data_shape : tuple of int
        Shape of one example, such as (1, 28, 28).
    devices : list of mx.Context, optional
        Devices that share every batch. By default what ``args.gpus`` or ``args.cpus`` name, else the first CPU.

    Returns
    -------
    mx.mod.Module
        The trained module.

    Raises
    ------
    InputError
        For options that do not fit each other, this machine or the files that are there.
    """
    devices = devices or choose_devices(args.gpus, args.cpus)
    if args.batch_size % len(devices):
        raise InputError(
            f'--batch-size={args.batch_size} cannot be shared equally by {len(devices)} devices: take a multiple of {len(devices)}'
        )
    checkpoints = Checkpoints(args.save_model_prefix)
    log_path = Path(args.log_dir) / args.log_file
    with (
        connected(args.kv_store, checkpoints) as kv,
        logging_to(log_path, kv.rank) as begin_log,
        told_when_stopped(checkpoints),
    ):
        args.num_workers = kv.num_workers
        logging.info('start with arguments %s', args)
        mx.random.seed(args.seed)
        np.random.seed(args.seed)
        module = Module(network, label_names=['softmax_label', 'center_label'], context=devices)
        average = Average(args.average_weights if kv.rank == 0 else 0, module)
        first_epoch, arg_params, aux_params = 0, None, None
        if kv.rank == 0:
            first_epoch, arg_params, aux_params = starting_point(
                args, checkpoints, module, average, data_shape
            )
        if kv.num_workers > 1:
            first_epoch = follow_rank_0(kv, checkpoints, module, first_epoch)
        train, val = data_loader(
            args.batch_size,
            data_shape,
            num_parts=kv.num_workers,
            part_index=kv.rank,
            first_epoch=first_epoch,
        )
        options = options_of_the_run(args, train)
        say_what_differs(checkpoints, options)
        if kv.num_workers > 1:
            check_agreement(kv, options)
        begin_log()

        def finish_epoch(epoch, symbol, *params_of_the_last_step):
            """Validation, then the checkpoint: an epoch that has a checkpoint has all its numbers in the log, and they are sound. One worker does it, the
            others wait."""
            if kv.rank == 0:
                where, momentum = f'epoch {epoch + 1}, batch {train.num_batches}', module.momentum()
                if (
                    average.share
                ):  # a collapse shows in the last step at once, and in the average late
                    stop_unless_sound(
                        where, *validate(module, val, stop_request), *params_of_the_last_step
                    )
                with average.in_use() as last:
                    reported, difference = validate(module, val, stop_request)
                    for name, value in reported.get_name_value():
                        logging.info('Epoch[%d] Validation-%s=%f', epoch, name, value)
                    params = module.get_params()
                    stop_unless_sound(where, reported, difference, *params, momentum)
                    checkpoints.save(epoch + 1, symbol, *params, momentum, last, options)
            if kv.num_workers > 1:
                kv._barrier()
                checkpoints.current = epoch + 1

        with (
            StopRequest() as stop_request,
            Watch(args.batch_size, train.num_batches, args.num_epochs, shown=kv.rank == 0) as watch,
        ):
            try:
                module.fit(
                    train,
                    eval_metric=metrics(),
                    kvstore=kv
                    if len(devices) * kv.num_workers > 1
                    else None,  # one device has nothing to share
                    optimizer='sgd',
                    optimizer_params=optimizer_options(args, train.num_batches, first_epoch),
                    initializer=INITIALIZERS[args.initializer],
                    arg_params=arg_params,
                    aux_params=aux_params,
                    allow_missing=True,
                    begin_epoch=first_epoch,
                    num_epoch=args.num_epochs,
                    batch_end_callback=[
                        average,
                        watch,
                        stop_request,
                        mx.callback.Speedometer(args.batch_size, LOG_EVERY),
                    ],
                    epoch_end_callback=finish_epoch,
                )
            except Failure as failure:
                failure.args = (f'{failure}; {checkpoints.how_to_continue()}',)
                raise
    return module


def follow_rank_0(kv, checkpoints, module, first_epoch):
    """Every worker begins where worker 0 does, which alone reads checkpoints: the number of finished epochs. The module takes the arrays over itself."""
    first_epoch = int(of_rank_0(kv, 'first_epoch', mx.nd.array([first_epoch])).asscalar())
    if first_epoch:
        checkpoints.current = first_epoch
        module.initial_momentum = module.initial_momentum or {}
    return first_epoch


def gaussian(variance):
    """Weights of that variance, as a multiple of 1 / fan-in."""
    return mx.init.Xavier(factor_type='in', rnd_type='gaussian', magnitude=variance)


INITIALIZERS = {
    # Small, so that the features are learned rather than found among the random ones at the start: of variances from 1/16 to 3 a quarter validated best,
    # and it trains at lambda 0 to 1.
    'xavier': gaussian(0.25),
    # The last layer begins close to 0, so that where a class comes to lie is not decided by its random weights there, but by its images. With it, a
    # variance of 1 validated best. The embedding keeps the smaller one: as long as the last layer holds nothing apart, center loss draws all classes
    # together, with a curvature that grows with the embedding's weights.
    'small-head': mx.init.Mixed(
        ['fc2_weight', 'embedding_weight', '.*'],
        [mx.init.Normal(0.01), gaussian(0.25), gaussian(1)],
    ),
    # The recipe of the best-known MXNet version: an embedding that starts as nearly one point. It trains at small lambda only.
    'mixed': mx.init.Mixed(
        ['.*fc.*', '.*'],
        [
            mx.init.Normal(0.001),
            mx.init.Xavier(factor_type='out', rnd_type='gaussian', magnitude=2),
        ],
    ),
}


def metrics():
    """The two numbers that are reported of training and validation alike."""
    return mx.metric.CompositeEvalMetric([Accuracy(), CenterLossMetric()])


def choose_devices(gpus, cpus):
    """The contexts for lists of device numbers: the GPUs, else the CPU contexts, else the first CPU.

    Raises InputError where this build of MXNet has no CUDA or this machine no such GPU.
    """
    if gpus and not mx.runtime.Features().is_enabled('CUDA'):
        raise InputError(
            f'--gpus={",".join(map(str, gpus))}: this MXNet is built for the CPU alone; install a CUDA build in its place '
            '(pip install mxnet-cu112, say), or leave --gpus out'
        )
    if gpus and max(gpus) >= mx.context.num_gpus():
        raise InputError(
            f'--gpus={",".join(map(str, gpus))}: there is no GPU {max(gpus)}, MXNet sees {mx.context.num_gpus()} on this machine'
        )
    return [mx.gpu(i) for i in gpus] or [mx.cpu(i) for i in cpus] or [mx.cpu()]


class StopRequest:
    """Within it, the first Ctrl-C or SIGTERM stops at the end of the batch that is under way; a second one acts at once.

    In between MXNet may be calling back into Python, where an exception would not come through. As a batch-end callback it raises
    KeyboardInterrupt, or its kind Terminated.
    """

    def __enter__(self):
        self.requested = None
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():
            self.handlers = {
                number: signal.signal(number, self.request)
                for number in (signal.SIGINT, signal.SIGTERM)
                if signal.getsignal(number) != signal.SIG_IGN
            }
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def request(self, number, frame):
        self.requested = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.__exit__()

    def __call__(self, param):
        if self.requested:
            raise self.requested


class Diverged(Failure):
    """Training that cannot come to anything any more."""

    def __init__(self, what, where):
        super().__init__(
            f'training diverged: {what} in {where}; try a smaller --lr or --center-loss-weight, a longer --warmup-epochs, --clip-gradient, '
            'or the default --initializer'
        )


class WidestDifference(mx.metric.EvalMetric):
    """The widest difference between the probabilities, ``softmax_output`` (B, K), that two images get for one class, as a multiple of 1/K."""

    def __init__(self):
        super().__init__(
            'widest_difference', output_names=['softmax_output'], label_names=['softmax_label']
        )

    def reset(self):
        self.lowest, self.highest = (
            [],
            [],
        )  # of every batch (K,), on the device: nobody waits for them before the end

    def update(self, labels, preds):
        self.lowest.append(mx.nd.min(preds[0], axis=0))
        self.highest.append(mx.nd.max(preds[0], axis=0))

    def get(self):
        low = np.min([array.asnumpy() for array in self.lowest], axis=0)
        high = np.max([array.asnumpy() for array in self.highest], axis=0)
        return self.name, float(np.max(high - low)) * low.size


def validate(module, val, stop_request):
    """The metrics and the widest difference over the validation images, with the parameters that the module has."""
    reported, difference = metrics(), WidestDifference()
    module.for_batches_of(val).score(
        val,
        mx.metric.CompositeEvalMetric([*reported.metrics, difference]),
        batch_end_callback=stop_request,
    )
    return reported, difference


def stop_unless_sound(where, reported, difference, *parameters):
    """Raise Diverged when the validation or a parameter is no longer finite, or when all images are on one point of the embedding.

    They are on one point when they all get the same probabilities. In collapsed runs these differ by the rounding of float32, by less than
    1e-5 / K, and stay like that, since every tanh is saturated. ``mixed`` begins with 6e-4 / K, and comes apart from there where it learns.
    """
    for name, value in [*reported.get_name_value(), difference.get()]:
        if not math.isfinite(value):
            raise Diverged(f'Validation-{name} is {value}', where)
    for name, value in itertools.chain.from_iterable(arrays.items() for arrays in parameters):
        if not np.isfinite(value.asnumpy()).all():  # pooling can hide it from the metrics
            raise Diverged(f'{name} is not finite', where)
    scores = dict(reported.get_name_value())
    if (
        difference.get()[1] < COLLAPSED and scores['accuracy'] < 1
    ):  # else the images are of one class
        raise Diverged(
            f'all classes are on one point of the embedding, Validation-accuracy is {scores["accuracy"]:.4f}',
            where,
        )


class LogFile(logging.FileHandler):
    """A log file that stops the run when it cannot be written, instead of going on without a record."""

    def handleError(self, record):
        raise InputError(
            f'cannot write the log file {self.baseFilename}: {sys.exc_info()[1]}; see --log_dir and --log_file'
        ) from None


@contextlib.contextmanager
def told_when_stopped(checkpoints):
    """Where Ctrl-C or SIGTERM ends it, the log says which checkpoint stands and how to continue."""
    try:
        yield
    except KeyboardInterrupt:
        logging.warning('stopped: %s', checkpoints.how_to_continue())
        raise


@contextlib.contextmanager
def logging_to(path, rank):
    """Send the root logger, which MXNet writes to, line by line to a file and to stderr; on a terminal, above the progress bar.

    It gives a function that begins the log. Until then the lines are held back, and a mistake that is found before leaves no log behind.
    """
    logger = logging.getLogger()
    level = logger.level
    held = logging.handlers.MemoryHandler(math.inf, flushLevel=math.inf, flushOnClose=False)
    handlers = []

    def begin():
        try:
            handlers.extend([LogFile(path), logging.StreamHandler()])
        except OSError as error:
            raise InputError(
                f'cannot write the log file {path}: {error.strerror}; see --log_dir and --log_file'
            ) from None
        logger.removeHandler(held)
        for handler in handlers:
            handler.setFormatter(logging.Formatter(f'%(asctime)-15s Node[{rank}] %(message)s'))
            logger.addHandler(handler)
            for record in held.buffer:
                handler.handle(record)
        if sys.stderr.isatty():  # elsewhere there is no bar, and a line is written as one: those of several workers stay apart
            redirected.enter_context(logging_redirect_tqdm())

    logger.setLevel(logging.INFO)
    logger.addHandler(held)
    try:
        with contextlib.ExitStack() as redirected:
            yield begin
    except Failure as failure:
        for handler in handlers[1:]:
            logger.removeHandler(handler)  # the script tells it on stderr when it ends
        with contextlib.suppress(InputError):  # of the log itself, which is what is being told
            logging.error('%s', failure)
        raise
    except KeyboardInterrupt:
        if not handlers:
            begin()
        raise
    finally:
        logger.setLevel(level)
        for handler in [held, *handlers]:
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # a log that could not be written has been told
                handler.close()


def optimizer_options(args, batches_per_epoch, first_epoch):
    """Options of SGD. The schedule is given in epochs and counted in updates, from the first update of the run, not of this process."""

    def updates(epochs):
        return round(epochs * batches_per_epoch)

    return {
        'learning_rate': args.lr,
        'momentum': MOMENTUM,
        'wd': WEIGHT_DECAY,
        'clip_gradient': args.clip_gradient or None,
        'lr_scheduler': mx.lr_scheduler.FactorScheduler(
            max(1, updates(args.lr_factor_epoch)),
            args.lr_factor,
            stop_factor_lr=0,
            base_lr=args.lr,
            warmup_steps=updates(args.warmup_epochs),
        ),
        'begin_num_update': first_epoch * batches_per_epoch,
    }


def starting_point(args, checkpoints, module, average, data_shape):
    """Where the run begins: the number of finished epochs, and the weights and centers by name (None: what the initializer makes).

    ``args.resume`` continues the prefix from its newest whole checkpoint; ``args.load_epoch`` begins a new run with whatever fits of the
    parameters of another one.
    """
    if args.resume:
        for epoch in reversed(checkpoints.epochs()):
            try:
                arg_params, aux_params, momentum, last, options = checkpoints.load(epoch)
            except DamagedCheckpoint as damage:
                logging.warning('%s; going back to the checkpoint before it', damage)
                continue
            left = [
                name for name, why in misfits(module.symbol, data_shape, arg_params, aux_params)
            ]
            if left:
                raise InputError(
                    f'{checkpoints.params(epoch)} is a checkpoint of another network: {", ".join(left)} do not fit; '
                    'resume with the options it was trained with, or start from it with --model-prefix and --load-epoch'
                )
            logging.info('resuming from %s', checkpoints.params(epoch))
            if epoch >= args.num_epochs:
                logging.warning(
                    '%s has all of the %d epochs already: raise --num-epochs to go on',
                    checkpoints.prefix,
                    args.num_epochs,
                )
            module.initial_momentum = momentum
            average.arrays = tagged(arg_params, aux_params)
            checkpoints.current, checkpoints.trained_with = epoch, options
            return epoch, *(untagged(last) if last else (arg_params, aux_params))
        logging.info(
            'no checkpoint of %s to resume from: starting at the beginning', checkpoints.prefix
        )
    existing = checkpoints.epochs()
    if existing:
        logging.warning(
            'the %d checkpoints of an earlier run of %s are overwritten when the first epoch is done; '
            'stop now and give --resume to continue that run, or another --save-model-prefix to keep it',
            len(existing),
            checkpoints.prefix,
        )
    if args.load_epoch is None:
        return 0, None, None
    source = Checkpoints(args.model_prefix)
    arg_params, aux_params = source.load_params(args.load_epoch)
    for name, why in misfits(module.symbol, data_shape, arg_params, aux_params):
        logging.info('%s: left %s, %s', source.params(args.load_epoch), name, why)
        arg_params.pop(name, None)
        aux_params.pop(name, None)
    taken = ', '.join([*arg_params, *aux_params])
    if not taken:
        raise InputError(
            f'{source.params(args.load_epoch)} is a checkpoint of another network: nothing of it fits; choose another --model-prefix'
        )
    logging.info('%s: took %s', source.params(args.load_epoch), taken)
    return 0, arg_params, aux_params


def misfits(network, data_shape, arg_params, aux_params):
    """Pairs (name, why) of the given parameters that the network does not have, or has in another shape, and of those that it misses."""
    arg_shapes, _, aux_shapes = network.infer_shape(data=(1, *data_shape))
    wanted = dict(
        zip(network.list_arguments() + network.list_auxiliary_states(), arg_shapes + aux_shapes)
    )
    given = {**arg_params, **aux_params}
    inputs = {name for name in wanted if name == 'data' or name.endswith('label')}
    for name in given.keys() - (wanted.keys() - inputs):
        yield name, 'which the network does not have'
    for name in wanted.keys() - inputs - given.keys():
        yield name, 'which is not there'
    for name in given.keys() & wanted.keys():
        if given[name].shape != wanted[name]:
            yield name, f'of shape {given[name].shape} where the network has {wanted[name]}'


def options_of_the_run(args, train):
    """What decides what the weights become, as JSON keeps it: options, and how much there is to train on."""
    options = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}
    return json.loads(json.dumps({**options, 'batches_per_epoch': train.num_batches}))


def say_what_differs(checkpoints, options):
    """Warn of every option that is another one than those of the checkpoint that is resumed."""
    for name, value in options.items() if checkpoints.trained_with is not None else ():
        before = checkpoints.trained_with.get(name)
        if value != before:
            logging.warning(
                'resuming with %s=%s, while %s was trained with %s',
                name,
                value,
                checkpoints.params(checkpoints.current),
                before,
            )


class Module(mx.mod.Module):
    """A Module whose centers are the same on all devices and workers after every step, and are read when they have come to rest; whose momentum goes by
    the names of the parameters, without pickle.

    The operator on each device knows its share of a batch: of class j, n_d samples that move its copy of the center by
    m_d = alpha sum_i (x_i - c_j) / (1 + n_d). The step of Eq. 4 over the whole batch is then sum_d (1 + n_d) m_d / (1 + sum_d n_d).
    """

    initial_momentum = None
    _scoring = None  # see for_batches_of
    _before = None  # labels and centers before the step that is under way, where its parts are to be joined

    def get_params(self):
        # The engine is not told that the operator's backward writes the centers: without this it lets them be read while the last step is under way.
        mx.nd.waitall()
        return super().get_params()

    def init_optimizer(self, *args, **kwargs):
        super().init_optimizer(*args, **kwargs)
        self._updater = Updater(self._optimizer)
        if self._num_workers() > 1:
            self._take_from_rank_0()
        if self.initial_momentum is not None:
            self._updater.states = {
                index: self.initial_momentum[name].copy()
                for index, name in self._optimizer.idx2name.items()
            }
            self._updater.states_synced = dict.fromkeys(
                self._updater.states, False
            )  # each is moved to its device at the next update

    def _take_from_rank_0(self):
        """Weights, centers and, where the run is a continued one, momentum."""
        for name, copies in zip(
            self._param_names, self._exec_group.param_arrays
        ):  # as the kvstore got them from init_optimizer
            self._kvstore.pull(name, out=copies)
            if self.initial_momentum is not None:
                momentum = self.initial_momentum.get(name)
                self.initial_momentum[name] = of_rank_0(
                    self._kvstore,
                    f'momentum:{name}',
                    mx.nd.zeros(copies[0].shape) if momentum is None else momentum,
                )
        for name, copies in self._centers():
            self._kvstore.init(name, copies[0])
            self._kvstore.pull(name, out=copies)
            self._kvstore.init(
                f'steps:{name}',
                mx.nd.zeros(
                    (self._num_workers(), self._exec_group.batch_size, 2 + copies[0].shape[1])
                ),
            )
        self._params_dirty = True

    def _num_workers(self):
        return self._kvstore.num_workers if self._kvstore else 1

    def _centers(self):
        """Pairs (name, copies): the centers (K, d) of every center loss, on every device."""
        return [
            (name, copies)
            for name, copies in zip(self._aux_names, self._exec_group.aux_arrays)
            if name.endswith('center_bias')
        ]

    def forward_backward(self, data_batch):
        centers = self._centers()
        if centers and (len(self._context) > 1 or self._num_workers() > 1):
            label = data_batch.label[
                [name for name, _ in self.label_shapes].index('center_label')
            ].asnumpy()  # (B,)
            self._before = label, [read_centers(copies[0], label) for _, copies in centers]
        super().forward_backward(data_batch)

    def update(self):
        super().update()
        if self._before is not None:
            label, before = self._before
            for (name, copies), start in zip(self._centers(), before):
                self._join_steps(name, copies, label, start)

    def _join_steps(self, name, copies, label, before):
        """Eq. 4 over the whole batch, on every copy (K, d) of the centers, from what each of them has done with its share.

        ``label`` (B,) of this worker's batch, ``before`` (B, d) the centers of these labels before the step.
        """
        parts = []
        for copy, share in zip(copies, self._exec_group.slices):
            classes, first, count = np.unique(label[share], return_index=True, return_counts=True)
            parts.append(
                (
                    classes,
                    count,
                    (1 + count[:, None]) * (read_centers(copy, classes) - before[share][first]),
                )
            )
        classes, count, step = summed(parts)
        if self._num_workers() > 1:
            classes, count, step = summed(self._of_all_workers(name, classes, count, step))
        start = read_centers(copies[0], classes)
        own, first = np.unique(label, return_index=True)
        start[np.isin(classes, own)] = before[
            first
        ]  # those of other workers' classes have not moved here
        joined = start + step / (1 + count[:, None])
        for copy in copies:
            write_centers(copy, classes, joined)

    def _of_all_workers(self, name, classes, count, step):
        """What every worker has for the center loss ``name``, in the order of their ranks: [(classes, count, step)].

        The kvstore can only sum: every worker fills its own rows of a table (workers, B, 2 + d) that is zero elsewhere. The traffic grows with the
        total batch, not with K.
        """
        table = np.zeros(
            (self._num_workers(), self._exec_group.batch_size, 2 + step.shape[1]), np.float32
        )
        table[self._kvstore.rank, : len(classes)] = np.column_stack([classes, count, step])
        table = mx.nd.array(table)
        self._kvstore.pushpull(f'steps:{name}', table, out=table)
        filled = [part[part[:, 1] > 0] for part in table.asnumpy()]
        return [(part[:, 0], part[:, 1], part[:, 2:]) for part in filled]

    def update_metric(self, eval_metric, labels, pre_sliced=False):
        if len(self._context) > 1 or pre_sliced:
            super().update_metric(eval_metric, labels, pre_sliced)
        else:  # nothing to slice, which takes MXNet longer than the metrics
            eval_metric.update_dict(
                {name: label for (name, _), label in zip(self.label_shapes, labels)},
                dict(zip(self.output_names, self.get_outputs())),
            )

    def for_batches_of(self, batches):
        """A module for scoring, with the same parameters in the same memory. For batches of another size this one would be bound anew, twice an epoch."""
        if self._scoring is None:
            self._scoring = Module(
                self.symbol, label_names=self._label_names, context=self._context
            )
            # Bound for training: otherwise MXNet fuses operators that keep the weights as they were in their first batch.
            self._scoring.bind(
                batches.provide_data, batches.provide_label, for_training=True, shared_module=self
            )
        return self._scoring

    def present_arrays(self):
        """Weights ('arg:NAME') and centers ('aux:NAME') after the last step, on the first device: not copies, but what the next step changes."""
        mx.nd.waitall()  # see get_params
        group = self._exec_group
        return tagged(
            *(
                {name: copies[0] for name, copies in zip(names, arrays)}
                for names, arrays in (
                    (self._param_names, group.param_arrays),
                    (self._aux_names, group.aux_arrays),
                )
            )
        )

    def num_updates(self):
        """Steps since the beginning of the run."""
        return self._optimizer.num_update

    def momentum(self):
        """Momentum of every parameter by name. All devices and workers hold the same."""
        return {
            self._optimizer.idx2name[index]: state for index, state in self._updater.states.items()
        }


class Updater(mx.optimizer.Updater):
    """MXNet's, with one operation for all small parameters together: most of what an update of a small one takes is Python.

    MXNet's common operation runs over the length of its longest array once for every array, so that each large parameter keeps one of its own.
    """

    groups = None  # positions in the lists that __call__ gets, the same in every call

    def __call__(self, index, grad, weight):
        if self.groups is None:
            small = [i for i, array in enumerate(weight) if array.size <= SMALL]
            self.groups = [[i] for i in range(len(weight)) if i not in small] + [small] * bool(
                small
            )
        for group in self.groups:
            super().__call__(*([values[i] for i in group] for values in (index, grad, weight)))


class Average:
    """Weights and centers averaged over the steps of the run: what is validated and saved in place of those of the last step.

    SGD at a constant rate does not come to rest, but wanders around the place where it would; the average of its steps is closer to that place than any of
    them (Polyak and Juditsky, SIAM J. Control and Optimization 1992), and training goes on untouched. Step t = 1, 2, ... moves the average by
    1 / (1 + share (t - 1)) of the way to where that step led, so that it reaches back over about the last ``share`` of all steps, however many there have
    been (polynomial-decay averaging, Shamir and Zhang, ICML 2013). With a share of 1 it is the mean of all steps, with 0 there is none.

    Parameters
    ----------
    share : float
        From 0 to 1.
    module : Module
        Whose parameters are averaged.
    """

    def __init__(self, share, module):
        self.share = share
        self.module = module
        self.arrays = {}  # by tagged name; of a run that is continued, what it begins with

    def __call__(self, param):
        """A batch-end callback."""
        if self.share:
            rate = 1 / (1 + self.share * (self.module.num_updates() - 1))
            for name, present in self.module.present_arrays().items():
                average = self.arrays.get(name, present)
                if average is present or average.context != present.context:
                    average = self.arrays[name] = average.copyto(present.context)
                # (1 - rate) average + rate present in one pass over the memory: what SGD does to a weight that decays
                mx.nd.sgd_update(average, present, lr=rate, wd=1, rescale_grad=-1, out=average)

    @contextlib.contextmanager
    def in_use(self):
        """Within it the module has the averages. It gives the tagged arrays of the last step, which the module has again afterwards; none where nothing is
        averaged.
        """
        if not self.share:
            yield {}
            return
        last = {name: array.copy() for name, array in tagged(*self.module.get_params()).items()}
        self.module.set_params(*untagged(self.arrays))
        yield last
        self.module.set_params(*untagged(last))


def tagged(arg_params, aux_params):
    """Weights and centers in one dict, as a .params file has them: 'arg:NAME' and 'aux:NAME'."""
    return {
        **{f'arg:{name}': value for name, value in arg_params.items()},
        **{f'aux:{name}': value for name, value in aux_params.items()},
    }


def untagged(arrays):
    """(arg_params, aux_params) of what :func:`tagged` returns, or of a .params file."""
    return tuple(
        {name[4:]: value for name, value in arrays.items() if name.startswith(kind)}
        for kind in ('arg:', 'aux:')
    )


def summed(parts):
    """Sums by class over parts (classes, counts, steps (classes, d)), each of which has a class once: (classes, counts, steps)."""
    classes, place = np.unique(np.concatenate([part[0] for part in parts]), return_inverse=True)
    count = np.zeros(len(classes), np.float32)
    step = np.zeros((len(classes), parts[0][2].shape[1]), np.float32)
    end = 0
    for part_classes, part_count, part_step in parts:
        begin, end = end, end + len(part_classes)
        count[place[begin:end]] += part_count
        step[place[begin:end]] += part_step
    return classes, count, step


class DamagedCheckpoint(InputError):
    """A checkpoint that is not whole, or not there."""


class Checkpoints:
    """The checkpoints of one run: the files of one prefix.

    Parameters
    ----------
    prefix : str
        Path that the names of all the files begin with.
    """

    def __init__(self, prefix):
        self.prefix = prefix
        self.current = None  # the newest epoch of the run that this process is at
        self.trained_with = None  # the options of the epoch that it resumed

    def check_folder(self):
        """Raise InputError where no checkpoint could be written. What a killed process left half-written is removed."""
        problem, beside = None, self.beside(self.symbol())
        if os.path.basename(self.prefix) in ('', '.', '..'):
            problem = 'it has to end with the beginning of a file name'
        else:
            try:
                str(beside).encode()  # as MXNet will have it
                beside.touch()
                beside.unlink()
                for path in beside.parent.iterdir():
                    left = re.fullmatch(
                        re.escape(f'.{Path(self.prefix).name}')
                        + r'-(?:symbol\.json|\d{4,}\.(?:params|states))\.(\d{1,9})',
                        path.name,
                    )
                    if left and not is_running(int(left[1])):
                        path.unlink(missing_ok=True)
            except OSError as error:
                problem = f'{error.strerror} ({beside.parent})'
            except UnicodeEncodeError:
                problem = 'it is not UTF-8'
        if problem:
            raise InputError(
                f'cannot write checkpoints to --save-model-prefix={self.prefix}: {problem}'
            )

    def how_to_continue(self):
        """What is left of a run that stops, as a phrase."""
        if self.current is None:
            return f'no epoch of {self.prefix} was finished, there is nothing to continue from'
        command = shlex.join(
            ['python', *sys.argv, *(['--resume'] if '--resume' not in sys.argv else [])]
        )
        return f'the last whole checkpoint is {self.params(self.current)}; continue with: {command}'

    def symbol(self):
        return Path(f'{self.prefix}-symbol.json')

    def params(self, epoch):
        return Path(f'{self.prefix}-{epoch:04d}.params')

    def states(self, epoch):
        return Path(f'{self.prefix}-{epoch:04d}.states')

    def beside(self, place):
        """Where this process writes what is moved to a place when it is whole."""
        return place.with_name(f'.{place.name}.{os.getpid()}')

    def epochs(self):
        """The epochs of which there is a .params file, in order."""
        prefix = Path(self.prefix)
        try:
            names = os.listdir(prefix.parent)
        except OSError:
            names = []
        found = (
            re.fullmatch(re.escape(prefix.name) + r'-(\d{4,})\.params', name) for name in names
        )
        return sorted(int(match[1]) for match in found if match)

    def look(self, since):
        """Take the newest epoch for the current one, if its .params were written at the time ``since`` or later."""
        written = [epoch for epoch in self.epochs() if self.params(epoch).stat().st_mtime >= since]
        self.current = max(written, default=None)

    def save(self, epoch, symbol, arg_params, aux_params, momentum, last, options):
        """Write a whole checkpoint, or leave everything as it was.

        ``last`` has the tagged arrays that training goes on from, where they are others. The .states name the digest of the .params they belong to, so
        that two files of different moments are never taken for a pair. The first epoch begins a run: checkpoints that an earlier one left under the
        prefix go when the new one is ready to take their place.
        """
        places = [self.symbol(), self.states(epoch), self.params(epoch)]
        beside = [self.beside(place) for place in places]
        new_symbol, new_states, new_params = beside
        try:
            new_symbol.write_text(symbol.tojson())
            save_arrays(new_params, tagged(arg_params, aux_params))
            save_arrays(
                new_states,
                {
                    **{f'momentum:{name}': value for name, value in momentum.items()},
                    **{f'last:{name}': value for name, value in last.items()},
                    'options': bytes_to_array(json.dumps(options).encode()),
                    'digest': bytes_to_array(digest(new_params)),
                },
            )
            if epoch == 1:
                for old in reversed(self.epochs()):
                    self.params(old).unlink()
                    self.states(old).unlink(missing_ok=True)
            for source, place in zip(beside, places):
                os.replace(source, place)
            self.current = epoch
        except (OSError, mx.MXNetError) as error:
            reason = getattr(error, 'strerror', None) or 'the disk is full or cannot be written'
            raise InputError(
                f'cannot write the checkpoint of epoch {epoch} to {self.params(epoch)}: {reason}'
            ) from None
        finally:
            for path in beside:
                path.unlink(missing_ok=True)

    def load(self, epoch):
        """The whole checkpoint: (arg_params, aux_params, momentum, last, options), see :meth:`save`. Raises DamagedCheckpoint."""
        states = load_arrays(self.states(epoch))
        if (
            'digest' not in states
            or digest(self.params(epoch)) != states['digest'].asnumpy().tobytes()
        ):
            raise DamagedCheckpoint(f'{self.states(epoch)} does not belong to {self.params(epoch)}')
        momentum, last = (
            {key.split(':', 1)[1]: value for key, value in states.items() if key.startswith(kind)}
            for kind in ('momentum:', 'last:')
        )
        return (
            *self.load_params(epoch),
            momentum,
            last,
            json.loads(states['options'].asnumpy().tobytes()),
        )

    def load_params(self, epoch):
        """The weights and centers by name: (arg_params, aux_params). Raises DamagedCheckpoint."""
        path = self.params(epoch)
        if epoch not in self.epochs():
            there = ', '.join(map(str, self.epochs())) or 'none'
            raise DamagedCheckpoint(
                f'there is no {path}; epochs of {self.prefix} that have a checkpoint: {there}'
            )
        return untagged(load_arrays(path))


def is_running(pid):
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def save_arrays(path, arrays):
    """Write named arrays and make sure that what is on the disk can be read."""
    path.touch()  # an OSError tells more than MXNet would
    mx.nd.save(str(path), arrays)
    with open(path, 'rb') as written:
        os.fsync(written.fileno())
    mx.nd.load(str(path))


def load_arrays(path):
    """Read named arrays. Raises DamagedCheckpoint for a file that is not there, or holds something else."""
    try:
        arrays = mx.nd.load(str(path))
    except mx.MXNetError:
        arrays = None
    if not isinstance(arrays, dict):
        raise DamagedCheckpoint(
            f'{path} is {"not a whole file of named arrays" if path.exists() else "missing"}'
        )
    return arrays


def digest(path):
    """SHA-256 of a file, 32 bytes."""
    return hashlib.sha256(path.read_bytes()).digest()


def bytes_to_array(data):
    return mx.nd.array(np.frombuffer(data, np.uint8), dtype=np.uint8)


class Watch:
    """A batch-end callback that looks at the metrics: it stops a run that diverges, and on a terminal it moves a bar for every epoch, with images/s,
    accuracy and center loss.

    Looking waits for the device. Between two looks the steps are queued, a few and for no more than AHEAD seconds of work: queueing them together takes
    this process a fraction of the time, which the device's threads have on the same processors.
    """

    def __init__(self, batch_size, num_batches, num_epochs, shown=True):
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.num_epochs = num_epochs
        self.hidden = None if shown else True  # None: shown on a terminal
        self.bar = None
        self.steps = 1  # from one look to the next

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.bar is not None:
            self.bar.close()

    def __call__(self, param):
        done = param.nbatch + 1
        if param.nbatch == 0:
            self.bar = tqdm(
                total=self.num_batches * self.batch_size,
                desc=f'epoch {param.epoch + 1}/{self.num_epochs}',
                unit=' images',
                unit_scale=True,
                leave=False,
                disable=self.hidden,
            )
            self.seen, self.seen_at = 0, time.monotonic()
        if done - self.seen < self.steps and done < self.num_batches:
            return
        values = param.eval_metric.get_global_name_value()
        for metric in param.eval_metric.metrics:
            if metric.not_finite:
                images, value = metric.not_finite
                raise Diverged(
                    f'{metric.name} is {value}',
                    f'epoch {param.epoch + 1}, batch {math.ceil(images / self.batch_size)}',
                )
        if not self.bar.disable:
            self.bar.set_postfix({name: f'{value:.4f}' for name, value in values}, refresh=False)
        self.bar.update(self.batch_size * (done - self.seen))
        now = time.monotonic()
        self.steps = min(MOST_STEPS, max(1, int(AHEAD * (done - self.seen) / (now - self.seen_at))))
        self.seen, self.seen_at = done, now
        if done == self.num_batches:
            self.bar.close()
