"""Center loss as an MXNet operator, and the two metrics of the joint objective.

Y. Wen, K. Zhang, Z. Li, Y. Qiao: A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016.

For a batch of B embeddings x_i with labels y_i, every class j has a center c_j, learned along with the network:

    Eq. 2   L_C = 1/2 sum_i ||x_i - c_{y_i}||^2                                  (the operator's output is L_C / B)
    Eq. 3   dL_C/dx_i = x_i - c_{y_i}
    Eq. 4   delta c_j = sum_i [y_i = j] (c_j - x_i) / (1 + sum_i [y_i = j])      c_j <- c_j - alpha delta c_j

Importing this module registers the operator:

    mx.sym.Custom(data=x, label=y, op_type='centerloss', name='center_loss', num_class=10, alpha=0.5)
"""

import atexit
import contextlib
import warnings

import numpy as np

from runtime import SYNCHRONOUS, memory_of, mx

__all__ = [
    'Accuracy',
    'CenterLoss',
    'CenterLossMetric',
    'CenterLossProp',
    'read_centers',
    'write_centers',
]

FEW = 2**15  # multiplications, see CenterLoss
MOST_QUEUED = (
    32  # batches that a metric has yet to count: as many may lie in memory, waiting for the device
)

# Of a training that diverges: the metric shows it. np.errstate around each callback would take as long as the arithmetic of a small batch.
warnings.filterwarnings('ignore', category=RuntimeWarning, module=__name__)


class CenterLoss(mx.operator.CustomOp):
    """Center loss (Eq. 2), its gradient (Eq. 3), and the movement of the centers (Eq. 4), for one device.

    The work grows with the batch alone, O(B d): of many classes only the centers of those that occur in it are read or written.

    On the CPU the arrays' own memory is read and written through NumPy. The engine has granted it for the duration of the callback, so
    nothing is queued behind the backward pass that is under way. Between two convolutions the caches hold nothing of Python, and every function that is
    called costs ten times what it does in a loop of its own: therefore few are, and backward takes over what forward has found. Where classes and batch
    are few, a product of matrices sums over the samples of every class; no more than FEW multiplications, or NumPy would share it among threads of its
    own, which get in the way of MXNet's. Elsewhere the samples are sorted by class. On any other device the same steps are ``mx.nd`` operations.

    Parameters
    ----------
    num_class : int
        K, the number of classes.
    alpha : float
        Learning rate of the centers (alpha in Eq. 4).
    scale : float
        Factor of the gradient with respect to the embeddings.
    normalization : {'batch', 'null'}
        Whether that gradient is divided by B or not.
    shape : tuple of int
        (B, d), of the embeddings.
    on_cpu : bool
        Whether the arrays' memory can be reached by this process.
    """

    def __init__(self, num_class, alpha, scale, normalization, shape, on_cpu):
        super().__init__()
        self.num_class = num_class
        self.alpha = alpha
        self.factor = scale / shape[0] if normalization == 'batch' else scale
        self.shape = tuple(shape)
        self.on_cpu = on_cpu
        self.one_hot = (
            np.eye(num_class, dtype=np.float32)
            if num_class * max(num_class, shape[0]) * shape[1] <= FEW
            else None
        )  # (K, K)
        self.of_forward = None  # what a forward in training leaves to its backward

    def forward(self, is_train, req, in_data, out_data, aux):
        """Write the mean center loss of the batch, shape (1,). The centers stay where they are."""
        data, label = in_data
        if self.on_cpu:
            found = difference, _, _ = self._in_memory(data, label, aux[0])
            self.of_forward = found if is_train else None
            total = (
                np.vdot(difference, difference)
                if self.one_hot is not None
                else np.add.reduce(np.square(difference), axis=None)
            )
            _write(memory_of(out_data[0], (1,)), req[0], total / (2 * self.shape[0]))
        else:
            self._check(label.asnumpy())
            difference = data - mx.nd.take(aux[0], label)
            self.assign(
                out_data[0],
                req[0],
                mx.nd.sum(difference * difference).reshape((1,)) / (2 * self.shape[0]),
            )

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        """Write the gradient of the embeddings, shape (B, d), from the present centers; then move the centers."""
        data, label = in_data
        if self.on_cpu:
            difference, classes, centers = self.of_forward or self._in_memory(data, label, aux[0])
            self.of_forward = None  # another backward finds the centers elsewhere
            if req[0] != 'null':
                _write(memory_of(in_grad[0], self.shape), req[0], self.factor * difference)
            if req[1] != 'null':
                _write(memory_of(in_grad[1], self.shape[:1]), req[1], 0)
            move = self._move_all if self.one_hot is not None else self._move_occurring
            move(difference, classes, centers)
        else:
            difference = data - mx.nd.take(aux[0], label)
            self.assign(in_grad[0], req[0], self.factor * difference)
            self.assign(in_grad[1], req[1], mx.nd.zeros_like(label))
            self._move_centers(difference, label, aux[0])

    def _in_memory(self, data, label, centers):
        """x_i - c_{y_i}, float32 (B, d), the classes y_i, int64 (B,), and the centers, (K, d)."""
        label = memory_of(label, self.shape[:1])
        classes = label.astype(np.int64)
        # Comparing bytes takes a fraction of comparing numbers; among unsigned numbers the negative ones are the largest.
        if (
            classes.astype(np.float32).tobytes() != label.tobytes()
            or np.maximum.reduce(classes.view(np.uint64)) >= self.num_class
        ):
            self._check(label)
        centers = memory_of(centers, (self.num_class, self.shape[1]))
        return memory_of(data, self.shape) - centers.take(classes, axis=0), classes, centers

    def _move_all(self, difference, classes, centers):
        """Eq. 4 on all centers; the step of those that do not occur in the batch is 0."""
        step = self.one_hot.take(classes, axis=1).dot(difference)  # (K, d)
        step *= (self.alpha / (1 + np.bincount(classes, minlength=self.num_class)))[:, None]
        centers += step

    def _move_occurring(self, difference, classes, centers):
        """Eq. 4 on the centers that occur in the batch: sorted by class, the samples of one class are a run that one sum covers."""
        order = classes.argsort(kind='stable')
        classes = classes[order]
        begins = np.ones(
            len(classes) + 1, bool
        )  # where the run of a class begins, and the end of the last
        np.not_equal(classes[1:], classes[:-1], out=begins[1:-1])
        bounds = begins.nonzero()[0]
        first, count = bounds[:-1], bounds[1:] - bounds[:-1]
        step = difference[order[first]]  # (classes in the batch, d)
        repeated = count > 1
        if repeated.any():  # with many classes most occur once, and have their sum already
            members, size = order[repeated.repeat(count)], count[repeated]
            step[repeated] = np.add.reduceat(difference[members], size.cumsum() - size, axis=0)
        step *= np.divide(self.alpha, 1 + count, dtype=np.float32)[:, None]
        centers[classes[first]] += step

    def _move_centers(self, difference, label, centers):
        """Eq. 4 without a loop over the samples: with E[i, j] = [y_i = y_j], shape (B, B), row i of E.difference / (1 + sum_j E[i, j])
        is the step of the center of sample i. It is the same for every sample of that class, so that a scatter that sets is well defined.
        """
        same = mx.nd.broadcast_equal(label.reshape((-1, 1)), label.reshape((1, -1)))
        step = mx.nd.broadcast_div(
            mx.nd.dot(same, difference), 1 + mx.nd.sum(same, axis=1, keepdims=True)
        )
        centers[label] = mx.nd.take(centers, label) + self.alpha * step

    def _check(self, label):
        """Raise ValueError for a label, of float32 (B,), that is no class."""
        wrong = (label != np.trunc(label)) | ~(label >= 0) | (label >= self.num_class)
        if wrong.any():
            position = int(wrong.argmax())
            raise ValueError(
                f'centerloss: label {label[position]:g} at position {position} of the batch is not a whole number '
                f'from 0 to {self.num_class - 1} (num_class={self.num_class})'
            )


def _write(target, req, value):
    """Store a result the way the executor asks for: 'null' not at all, 'add' on top of what is there, otherwise in its place."""
    if req == 'add':
        target += value
    elif req != 'null':
        target[...] = value


def read_centers(centers, classes):
    """The centers of some classes, (n, d), from an NDArray (K, d). It waits until everything has come to rest: the engine is not told that the
    operator's backward writes the centers, and would let them be read while a step is under way.
    """
    mx.nd.waitall()
    if centers.context.device_type == 'gpu':
        return mx.nd.take(centers, mx.nd.array(classes, ctx=centers.context)).asnumpy()
    return memory_of(centers)[classes.astype(np.int64)]


def write_centers(centers, classes, values):
    """Put ``values`` (n, d) in the place of what :func:`read_centers` reads."""
    mx.nd.waitall()
    if centers.context.device_type == 'gpu':
        centers[mx.nd.array(classes, ctx=centers.context)] = mx.nd.array(
            values, ctx=centers.context
        )
    else:  # a hundredth of the time, with MXNet's threads waiting actively
        memory_of(centers)[classes.astype(np.int64)] = values


@mx.operator.register('centerloss')
class CenterLossProp(mx.operator.CustomOpProp):
    """The operator ``centerloss``: its inputs, shapes and parameters.

    Inputs are ``data`` (B, d), the embeddings, and ``label`` (B,), whole numbers in [0, K), both float32. The output (1,) is the batch's
    mean center loss, sum_i ||x_i - c_{y_i}||^2 / (2 B), whatever ``scale`` is. The one auxiliary state, ``NAME_center_bias`` (K, d),
    holds the centers; MXNet's initializers zero it because its name ends in ``bias``. It moves in backward only, once per backward.

    Parameters
    ----------
    num_class : int
        K, the number of classes.
    alpha : float, default 0.5
        Learning rate of the centers, from 0 (they stay) to 1 (alpha in Eq. 4).
    scale : float, default 1.0
        Factor of the gradient with respect to ``data``; lambda of the joint objective (Eq. 5).
    normalization : {'batch', 'null'}
        As in SoftmaxOutput: the gradient is scale (x - c_y) / B, or scale (x - c_y). A Module divides every gradient by the total
        batch itself: 'null' makes it the gradient of the mean there.

    Raises
    ------
    ValueError
        For a parameter or an input shape that does not fit, and for a label that is no class. MXNet prints it, with the value, and
        raises its own MXNetError where the result is asked for.

    References
    ----------
    Wen, Zhang, Li, Qiao, ECCV 2016, Eq. 2 to 5.
    """

    def __init__(self, num_class=None, alpha=0.5, scale=1.0, normalization='batch', **unknown):
        super().__init__(need_top_grad=False)
        # MXNet crashes when a constructor raises. A parameter that does not fit is told by infer_shape, which may.
        self.problem = None
        self.num_class = self._number(
            'num_class', num_class, int, 'a whole number of at least 1', lambda value: value >= 1
        )
        self.alpha = self._number(
            'alpha', alpha, float, 'a number from 0 to 1', lambda value: 0 <= value <= 1
        )
        self.scale = self._number('scale', scale, float, 'a finite number', np.isfinite)
        self.normalization = normalization
        if normalization not in ('batch', 'null'):
            self.problem = f"normalization={normalization!r} is neither 'batch' nor 'null'"
        if unknown:
            self.problem = f'{", ".join(unknown)}: no such parameter'

    def _number(self, name, text, kind, wanted, fits):
        """The parameter ``text`` as a number of that kind; what is wrong with it goes to ``self.problem``."""
        try:
            value = kind(text)
        except (TypeError, ValueError):
            value = None
        if value is None or not fits(value):
            self.problem = f'{name}={text} is not {wanted}'
        return value

    def list_arguments(self):
        return ['data', 'label']

    def list_outputs(self):
        return ['output']

    def list_auxiliary_states(self):
        return ['center_bias']

    def infer_shape(self, in_shape):
        if self.problem:
            raise ValueError(f'centerloss: {self.problem}')
        data, label = in_shape
        if len(data) != 2:
            raise ValueError(f'centerloss: data of shape {tuple(data)} is not (batch, dimension)')
        if label and label != data[:1]:  # an empty shape is one that is still to be inferred
            raise ValueError(
                f'centerloss: label of shape {tuple(label)} does not belong to data of shape {tuple(data)}: '
                f'it has to be ({data[0]},)'
            )
        return [data, data[:1]], [[1]], [[self.num_class, data[1]]]

    def infer_type(self, in_type):
        if any(given != np.float32 for given in in_type):
            raise ValueError(
                f'centerloss: inputs of type {[np.dtype(given).name for given in in_type]} are not float32'
            )
        return in_type, [np.float32], [np.float32]

    def create_operator(self, ctx, in_shapes, in_dtypes):
        return CenterLoss(
            self.num_class,
            self.alpha,
            self.scale,
            self.normalization,
            in_shapes[0],
            on_cpu=ctx.device_type != 'gpu',
        )


@atexit.register
def come_to_rest():
    """Let the steps that are under way come to their end before MXNet's own exit handler runs: it stops the threads that call back into Python first,
    and would then wait for ever for a backward pass that still needs them.
    """
    with contextlib.suppress(
        mx.MXNetError
    ):  # of a step that failed: whoever asked for its result was told
        mx.nd.waitall()


def _as_numpy(array):
    return array if isinstance(array, np.ndarray) else array.asnumpy()


class _MeanOverImages(mx.metric.EvalMetric):
    """The mean over images of a quantity; what is local goes with ``reset_local``, what is global lasts until ``reset``.

    A batch is queued without waiting for the device, so that the next steps can be queued behind it, and counted when somebody asks for the mean.
    The arrays that it was given may change in between. Where MXNet is synchronous they are there already, and NumPy is faster than another operation.
    ``not_finite`` is None, or (images, mean) by the first batch since ``reset`` that was not finite.
    """

    def __init__(self, name, output_names, label_names):
        super().__init__(
            name,
            output_names=list(output_names),
            label_names=list(label_names),
            has_global_stats=True,
        )

    def reset(self):
        self._queued = []
        self.not_finite = None
        super().reset()

    def reset_local(self):
        self._count_queued()
        super().reset_local()

    def update(self, labels, preds):
        self._queued.append(self._queue(labels, preds))
        if len(self._queued) == MOST_QUEUED:
            self._count_queued()

    def get(self):
        self._count_queued()
        return super().get()

    def get_global(self):
        self._count_queued()
        return super().get_global()

    def _count_queued(self):
        queued, self._queued = self._queued, []
        for batch in queued:
            total, images = self._count(*batch)
            self.sum_metric += total
            self.global_sum_metric += total
            self.num_inst += images
            self.global_num_inst += images
            if self.not_finite is None and not np.isfinite(total):
                self.not_finite = (
                    self.global_num_inst,
                    self.global_sum_metric / self.global_num_inst,
                )


class Accuracy(_MeanOverImages):
    """Share of the images whose most probable class is their label; every image counts once, whatever the batches.

    It takes the output ``softmax_output`` (B, K) and the label ``softmax_label`` (B,).
    """

    def __init__(
        self, name='accuracy', output_names=('softmax_output',), label_names=('softmax_label',)
    ):
        super().__init__(name, output_names, label_names)

    def _queue(self, labels, preds):
        predicted = (
            preds[0].asnumpy().argmax(axis=1) if SYNCHRONOUS else mx.nd.argmax(preds[0], axis=1)
        )
        return predicted, labels[0].asnumpy()

    def _count(self, predicted, label):
        return np.count_nonzero(_as_numpy(predicted) == label), len(label)


class CenterLossMetric(_MeanOverImages):
    """Mean over the images of 1/2 ||x_i - c_{y_i}||^2 (Eq. 2), from the operator's output, whatever the batches and devices.

    It takes the output ``center_loss_output``, shape (1,), or one number per device in a Module's merged outputs, and the label
    ``center_label`` (B,). Each number is the mean of its device's share of the batch and weighs as much as that share.
    """

    def __init__(
        self,
        name='center_loss',
        output_names=('center_loss_output',),
        label_names=('center_label',),
    ):
        super().__init__(name, output_names, label_names)

    def _queue(self, labels, preds):
        return preds[0].asnumpy() if SYNCHRONOUS else preds[0].copy(), len(labels[0])

    def _count(self, means, batch_size):
        means = _as_numpy(means).astype(np.float64)
        shares = mx.executor_manager._split_input_slice(batch_size, [1] * len(means))
        images = [share.stop - share.start for share in shares]
        return float(np.dot(means, images)), sum(images)
