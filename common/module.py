"""A Module for networks with center losses, on several devices and workers."""

from collections.abc import Iterable
import json

import numpy as np

from common.environment import mx
from center_loss import memory_view
from common.distributed import broadcast_from_rank_0
from common.errors import InputError
from common.grouped_updater import GroupedUpdater


class Module(mx.mod.Module):
    """A Module whose centers are the same on all devices and workers after every step.

    The operator on a device sees its share of a batch alone: n_d samples of class j move its copy
    of the center by m_d = alpha * sum_i (x_i - c_j) / (1 + n_d). Eq. 4 over the whole batch is then
    sum_d (1 + n_d) m_d / (1 + sum_d n_d).

    Parameters
    ----------
    symbol
        The network that is bound.
    initial_state
        The optimizer's state by name, as :meth:`optimizer_state` returns it, to continue from.
    **kwargs
        As for ``mx.mod.Module``.
    """

    def __init__(
        self,
        symbol: mx.sym.Symbol,
        initial_state: dict[str, mx.nd.NDArray] | None = None,
        **kwargs,
    ):
        super().__init__(symbol, **kwargs)
        self.initial_state = initial_state
        self.validation_scores: dict[str, float] = {}  # of the last epoch that was validated
        center_losses = find_center_losses(symbol)
        self._center_losses = dict(center_losses)
        if len(self._center_losses) < len(center_losses):
            raise InputError(
                'two center losses of the network share their centers, and MXNet would run both at '
                'once: take one, of their embeddings and labels concatenated (dim=0)'
            )
        self._before_step: list[tuple[np.ndarray, np.ndarray]] = []  # (labels, their centers)
        self._table_shape = 0, 0  # (workers, B), see _gather_from_workers

    def init_optimizer(self, *args, **kwargs) -> None:
        """Set up the optimizer as MXNet does, then take over initial state and rank 0's arrays."""
        super().init_optimizer(*args, **kwargs)
        for label in self._center_losses.values() if self._is_shared() else ():
            if label not in self._label_names:
                raise InputError(
                    'several devices or workers synchronize the centers by the labels of a batch, '
                    f'and {label}, that of a center loss, is missing: add it to the labels'
                )
        self._updater = GroupedUpdater(self._optimizer)
        if self.initial_state is not None:
            self._create_optimizer_state()
            for name, copies in self._optimizer_state_arrays():
                for copy in copies if name in self.initial_state else ():
                    copy[:] = self.initial_state[name]
        if self._num_workers() > 1:
            self._take_arrays_from_rank_0()

    def _create_optimizer_state(self):
        for position, weights in enumerate(self._exec_group.param_arrays):
            for device, weight in enumerate(weights):
                index = position * len(weights) + device
                state = self._optimizer.create_state_multi_precision(index, weight)
                self._updater.states[index] = state
                self._updater.states_synced[index] = True

    def _optimizer_state_arrays(self):
        """Pairs ('optimizer0:NAME', the arrays on every device); 1, ... where there are several."""
        num_devices = len(self._context)
        for position, name in enumerate(self._param_names):
            indices = range(position * num_devices, (position + 1) * num_devices)
            states = [self._updater.states.get(index) for index in indices]
            states = [state if isinstance(state, tuple) else (state,) for state in states]
            for number, copies in enumerate(zip(*states, strict=True)):
                if isinstance(copies[0], mx.nd.NDArray):
                    yield f'optimizer{number}:{name}', copies

    def _take_arrays_from_rank_0(self):
        for name, copies in zip(self._param_names, self._exec_group.param_arrays, strict=True):
            self._kvstore.pull(name, out=copies)  # init_optimizer has put rank 0's there
        if self.initial_state is not None:
            for name, copies in self._optimizer_state_arrays():
                array = broadcast_from_rank_0(self._kvstore, name, copies[0].copyto(mx.cpu()))
                for copy in copies:
                    copy[:] = array
        for name, copies in self._centers():
            self._kvstore.init(name, copies[0])
            self._kvstore.pull(name, out=copies)
            self._table_shape = self._num_workers(), self._exec_group.batch_size
            columns = 2 + copies[0].shape[1]
            self._kvstore.init(f'steps:{name}', mx.nd.zeros((*self._table_shape, columns)))
        self._params_dirty = True

    def _is_shared(self):
        """Whether a batch is shared by several devices or workers."""
        return len(self._context) > 1 or self._num_workers() > 1

    def _num_workers(self):
        return self._kvstore.num_workers if self._kvstore else 1

    def optimizer_state(self) -> dict[str, mx.nd.NDArray]:
        """Return copies of the optimizer's state on the CPU; all devices and workers hold the same.

        SGD's momentum of a weight is 'optimizer0:NAME'.
        """
        return {name: copies[0].copyto(mx.cpu()) for name, copies in self._optimizer_state_arrays()}

    def present_arrays(self) -> dict[str, mx.nd.NDArray]:
        """Return weights ('arg:NAME') and centers ('aux:NAME') on the first device, not copied."""
        group = self._exec_group
        kinds = (
            ('arg', self._param_names, group.param_arrays),
            ('aux', self._aux_names, group.aux_arrays),
        )
        return {
            f'{kind}:{name}': copies[0]
            for kind, names, arrays in kinds
            for name, copies in zip(names, arrays, strict=True)
        }

    def num_updates(self) -> int:
        """Return the number of steps since the beginning of the run."""
        return self._optimizer.num_update

    def _centers(self):
        """Pairs (name, copies on the devices) of the centers (K, d) of every center loss."""
        arrays = dict(zip(self._aux_names, self._exec_group.aux_arrays, strict=True))
        return [(name, arrays[name]) for name in self._center_losses]

    def forward_backward(self, data_batch: mx.io.DataBatch) -> None:
        """Compute outputs and gradients of one batch; the centers of each device move."""
        if self._is_shared():
            names = [desc[0] for desc in self.label_shapes]  # as bound, whatever label_names
            labels = dict(zip(names, data_batch.label, strict=True))
            for name, copies in self._centers():
                label = labels[self._center_losses[name]].asnumpy().astype(np.int64)  # (B,)
                self._before_step.append((label, read_rows(copies[0], label)))
        super().forward_backward(data_batch)

    def update(self) -> None:
        """Update the weights, and synchronize the centers of all devices and workers."""
        super().update()
        if self._before_step:
            for executor in self._exec_group.execs:
                for output in executor.outputs:
                    output.wait_to_read()  # by then the centers have moved
            for (name, copies), before in zip(self._centers(), self._before_step, strict=True):
                self._synchronize(name, copies, *before)
            self._before_step = []

    def _synchronize(self, name, copies, label, before):
        """Apply Eq. 4 over the whole batch to every copy (K, d) of the centers.

        ``label`` (B,) is of this worker's batch, ``before`` (B, d) are the centers of these labels
        before the step.
        """
        parts = []
        for copy, share in zip(copies, self._exec_group.slices, strict=True):
            classes, first, count = np.unique(label[share], return_index=True, return_counts=True)
            moved = read_rows(copy, classes) - before[share][first]
            parts.append((classes, count, (1 + count[:, None]) * moved))
        classes, count, step = merge_class_sums(parts)
        if self._num_workers() > 1:
            parts = self._gather_from_workers(name, classes, count, step)
            classes, count, step = merge_class_sums(parts)
        start = read_rows(copies[0], classes)
        own, first = np.unique(label, return_index=True)
        # The centers of other workers' classes stood still.
        start[np.isin(classes, own)] = before[first]
        moved = start + step / (1 + count[:, None])
        for copy in copies:
            write_rows(copy, classes, moved)

    def _gather_from_workers(self, name, classes, count, step):
        """Return every worker's (classes, count, step), in the order of their ranks.

        The kvstore can only sum: every worker fills its own rows of a table (workers, B, 2 + d),
        where B is the first batch's: the last one may be smaller. The traffic grows with the total
        batch, not with K.
        """
        table = np.zeros((*self._table_shape, 2 + step.shape[1]), np.float32)
        table[self._kvstore.rank, : len(classes)] = np.column_stack([classes, count, step])
        table = mx.nd.array(table)
        self._kvstore.pushpull(f'steps:{name}', table, out=table)
        filled = [part[part[:, 1] > 0] for part in table.asnumpy()]
        return [(part[:, 0].astype(np.int64), part[:, 1], part[:, 2:]) for part in filled]


def find_center_losses(symbol: mx.sym.Symbol) -> list[tuple[str, str]]:
    """Return the center losses of a network: (name of the centers, name of the label's input)."""
    nodes = json.loads(symbol.tojson())['nodes']
    found = []
    for node in nodes:
        if node['op'] == 'Custom' and node['attrs'].get('op_type') == 'centerloss':
            _, label, centers = (nodes[position[0]]['name'] for position in node['inputs'])
            found.append((centers, label))
    return found


def merge_class_sums(
    parts: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Add up parts (classes (n,), counts (n,), steps (n, d)), each of which has a class once."""
    parts = list(parts)
    merged = np.unique(np.concatenate([classes for classes, _, _ in parts]))
    count = np.zeros(len(merged), np.float32)
    step = np.zeros((len(merged), parts[0][2].shape[1]), np.float32)
    for part_classes, part_count, part_step in parts:
        place = np.searchsorted(merged, part_classes)
        count[place] += part_count
        step[place] += part_step
    return merged, count, step


def read_rows(array: mx.nd.NDArray, rows: np.ndarray) -> np.ndarray:
    """Copy rows (n,) of an NDArray (K, d) to a NumPy array (n, d), whatever the size of K."""
    if array.context.device_type == 'gpu':
        return mx.nd.take(array, mx.nd.array(rows, ctx=array.context, dtype=np.int64)).asnumpy()
    array.wait_to_read()
    return memory_view(array)[rows]


def write_rows(array: mx.nd.NDArray, rows: np.ndarray, values: np.ndarray) -> None:
    """Replace rows (n,) of an NDArray (K, d) by values (n, d), whatever the size of K."""
    if array.context.device_type == 'gpu':
        index = mx.nd.array(rows, ctx=array.context, dtype=np.int64)
        array[index] = mx.nd.array(values, ctx=array.context)
    else:
        mx.base.check_call(mx.base._LIB.MXNDArrayWaitToWrite(array.handle))
        memory_view(array)[rows] = values
