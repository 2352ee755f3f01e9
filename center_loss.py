"""Center loss for MXNet: an operator, a Gluon block, and the metrics of the joint objective.

This file is all that a program needs. It imports MXNet and NumPy and changes nothing around it.

Every class j has a center c_j that is learned along with the network. For a batch of B embeddings
x_i with labels y_i (Wen, Zhang, Li, Qiao: A Discriminative Feature Learning Approach for Deep Face
Recognition, ECCV 2016)::

    Eq. 2   L_C       = 1/2 sum_i ||x_i - c_{y_i}||^2          (the operator returns the B terms)
    Eq. 3   dL_C/dx_i = x_i - c_{y_i}
    Eq. 4   delta c_j = sum_i [y_i = j] (c_j - x_i) / (1 + sum_i [y_i = j])
            c_j      <- c_j - alpha delta c_j

:class:`CenterLossProp` shows the operator in a Module and with ``autograd``,
:class:`CenterLossBlock` is the same for Gluon. What the program around them has to know:

* MXNet 1.9.1 needs aliases that NumPy 1.24 removed. Restore them before ``import mxnet``::

      import numpy as np
      np.bool, np.int, np.float, np.object = bool, int, float, object

* Call ``mx.nd.waitall()`` before the program ends. MXNet's exit handler stops the threads that run
  operators written in Python; one that is still running would wait for ever. (With the engine
  ``ThreadedEngine`` delete the Module first: at exit MXNet may abort while it frees operators.)
* Forking while MXNet runs or frees an operator written in Python hangs (5 of 16 times with one that
  only doubles its input). Start worker processes before the first step, or call
  ``mx.nd.waitall()``, and after imperative calls, whose operators are freed later, also
  ``time.sleep(0.1)``.
* The centers move in the training forward, as the moving averages of a BatchNorm, and MXNet
  computes asynchronously: as with any auxiliary state, read the operator's output before you read
  the centers. :class:`CenterLossMetric` does; a metric of the softmax alone does not.
* In a plain Module and in Gluon each of several contexts moves its own copy of the centers by its
  own share of the batch, not by Eq. 4 of all of it. ``common/module.py`` here synchronizes them.
* MXNet 1.9.1 keeps one list of the arrays that backward needs, for all operators written in Python:
  that of the operator created last. Once that is one with a head gradient (the default; the block
  below is one, too), backward here fails with 'unknown storage type: -1'. In such a program use
  ``mx.sym.MakeLoss(mx.sym.Custom(..., name='center', out_grad=True), name='center_loss')``, which
  is the same, but for the name of the centers, ``center_center_bias``.
* Two operators of one Symbol cannot share their centers: MXNet runs both at once, and moves are
  lost. Concatenate the embeddings and the labels (``dim=0``): Eq. 4 is then of all of them.
* MXNet's default metric, 'acc', takes both outputs: with one label it fails, with two it averages
  over both without a word. Pass those of this file, or ``mx.metric.Accuracy`` with ``output_names=
  ['softmax_output']`` and ``label_names=``, a list of the one name of the classes' label.
"""

from __future__ import annotations

from collections.abc import Sequence
import ctypes
import math
from types import ModuleType, SimpleNamespace

import mxnet as mx
import numpy as np


def memory_view(array: mx.nd.NDArray) -> np.ndarray:
    """Return the memory of an NDArray on the CPU as a NumPy array, without a copy.

    It does not wait for the engine: use it in an operator, which was granted its arrays, or where
    nothing else writes the array. The view keeps the NDArray alive.
    """
    address = ctypes.c_void_p()
    mx.base.check_call(mx.base._LIB.MXNDArrayGetData(array.handle, ctypes.byref(address)))
    shape, dtype = array.shape, np.dtype(array.dtype)
    memory = {'version': 3, 'shape': shape, 'typestr': dtype.str, 'data': (address.value, False)}
    return np.asarray(SimpleNamespace(__array_interface__=memory, owner=array))


class CenterLoss(mx.operator.CustomOp):
    """Eq. 2 to 4 on a CPU, in O(B d) for any number of classes.

    NumPy works on the arrays' own memory. The ``mx.nd`` operations of :class:`CenterLossGPU` take 6
    times as long at (B, d, K) = (128, 2, 10), 7 times at (256, 512, 1e6), and a step of LeNet at
    batch 32 takes 1.07 times as long with them (``tools/benchmark.py``, parts operator and tricks).
    """

    def __init__(self, num_class: int, alpha: float, factor: float, out_grad: bool):
        super().__init__()
        self.num_class = num_class
        self.alpha = alpha
        self.factor = factor  # of the gradient
        self.out_grad = out_grad
        self.difference = None  # x - c_y in the last forward, before it moved the centers

    def forward(
        self,
        is_train: bool,
        req: list[str],
        in_data: list[mx.nd.NDArray],
        out_data: list[mx.nd.NDArray],
        aux: list[mx.nd.NDArray],
    ) -> None:
        """Write the loss of every sample, (B,); in training, move the centers."""
        self.difference = None
        data, label, centers = map(memory_view, [*in_data, *aux])  # (B, d), (B,), (K, d)
        classes = _check_labels(label, self.num_class)
        with np.errstate(over='ignore', invalid='ignore'):  # the metric shows that a run diverges
            self.difference = data - centers[classes]
            loss = 0.5 * np.einsum('ij,ij->i', self.difference, self.difference)
            _write(out_data[0], req[0], loss)
            if is_train:
                self._move_centers(classes, centers)

    def backward(
        self,
        req: list[str],
        out_grad: list[mx.nd.NDArray],
        in_data: list[mx.nd.NDArray],
        out_data: list[mx.nd.NDArray],
        in_grad: list[mx.nd.NDArray],
        aux: list[mx.nd.NDArray],
    ) -> None:
        """Write the gradient of the embeddings, (B, d); labels have none."""
        if self.difference is None:
            return  # the forward has failed, and MXNet raises its error
        with np.errstate(over='ignore', invalid='ignore'):
            gradient = self.factor * self.difference
            if self.out_grad:
                gradient *= memory_view(out_grad[0])[:, None]
            _write(in_grad[0], req[0], gradient)
        _write(in_grad[1], req[1], 0)

    def _move_centers(self, classes, centers):
        """Eq. 4. Sorted by class, the samples of one class are a run, which one sum covers."""
        order = classes.argsort(kind='stable')
        classes = classes[order]
        is_bound = np.ones(len(order) + 1, bool)
        np.not_equal(classes[1:], classes[:-1], out=is_bound[1:-1])
        bounds = is_bound.nonzero()[0]
        first, count = bounds[:-1], bounds[1:] - bounds[:-1]
        total = self.difference[order[first]]  # (runs, d)
        # reduceat over runs of one as well takes 6 times as long when most classes occur once.
        longer = count > 1
        if longer.any():
            members, length = order[longer.repeat(count)], count[longer]
            begin = length.cumsum() - length
            total[longer] = np.add.reduceat(self.difference[members], begin, axis=0)
        rate = (self.alpha / (1 + count)).astype(np.float32)
        centers[classes[first]] += rate[:, None] * total


class CenterLossGPU(CenterLoss):
    """The same in ``mx.nd`` operations, without a copy to the host.

    So a label that is no class is no error here: the loss of its sample is NaN, its gradient is 0,
    and it moves no center.
    """

    def forward(
        self,
        is_train: bool,
        req: list[str],
        in_data: list[mx.nd.NDArray],
        out_data: list[mx.nd.NDArray],
        aux: list[mx.nd.NDArray],
    ) -> None:
        """Write the loss of every sample, (B,); in training, move the centers."""
        data, label, centers = *in_data, *aux  # (B, d), (B,), (K, d)
        label = label.astype('float64')  # exact for every type that a label may have
        valid = (label >= 0) * (label < self.num_class) * (label == label.floor())
        classes = mx.nd.where(valid, label, mx.nd.zeros_like(label)).astype('int32')
        valid = valid.astype('float32')
        difference = data - mx.nd.take(centers, classes)
        difference = mx.nd.where(valid, difference, mx.nd.zeros_like(difference))
        loss = 0.5 * mx.nd.sum(difference * difference, axis=1)
        self.assign(out_data[0], req[0], loss / valid)  # 0 / 0 is NaN
        if is_train:
            # If E[i, j] = [y_i = y_j and j is valid], row i of E difference / (1 + sum_j E[i, j])
            # is the step of the center of sample i: the same for all samples of its class, so it
            # does not matter which of them the assignment takes.
            same = mx.nd.broadcast_equal(classes.reshape((-1, 1)), classes.reshape((1, -1)))
            same = mx.nd.broadcast_mul(same.astype('float32'), valid.reshape((1, -1)))  # (B, B)
            count = mx.nd.sum(same, axis=1, keepdims=True)
            step = mx.nd.broadcast_div(mx.nd.dot(same, difference), 1 + count)
            centers[classes] = mx.nd.take(centers, classes) + self.alpha * step
        self.difference = difference

    def backward(
        self,
        req: list[str],
        out_grad: list[mx.nd.NDArray],
        in_data: list[mx.nd.NDArray],
        out_data: list[mx.nd.NDArray],
        in_grad: list[mx.nd.NDArray],
        aux: list[mx.nd.NDArray],
    ) -> None:
        """Write the gradient of the embeddings, (B, d); labels have none."""
        gradient = self.factor * self.difference
        if self.out_grad:
            gradient = mx.nd.broadcast_mul(gradient, out_grad[0].reshape((-1, 1)))
        self.assign(in_grad[0], req[0], gradient)
        self.assign(in_grad[1], req[1], mx.nd.zeros_like(in_grad[1]))


def _write(target: mx.nd.NDArray, req: str, value: np.ndarray | float) -> None:
    """Store a result as MXNet requests it: not at all, added, or in place of the old one."""
    if req == 'add':
        memory_view(target)[...] += value
    elif req != 'null':
        memory_view(target)[...] = value


def _check_labels(label: np.ndarray, num_class: int) -> np.ndarray:
    """Return labels as int64; raise ValueError for one that is no class."""
    with np.errstate(invalid='ignore'):
        classes = label.astype(np.int64)
    invalid = (classes != label) | (classes < 0) | (classes >= num_class)
    if invalid.any():
        position = int(invalid.argmax())
        raise ValueError(
            f'centerloss: label {label[position]:g} at position {position} of the batch is not a '
            f'whole number from 0 to {num_class - 1} (num_class={num_class})'
        )
    return classes


def _check_shapes(data: Sequence[int], label: Sequence[int]) -> None:
    """Raise ValueError for shapes that do not fit; () and 0 are not known yet."""
    if len(data) != 2:
        raise ValueError(f'centerloss: data of shape {tuple(data)} is not (batch, dimension)')
    if label and (len(label) != 1 or 0 < label[0] != data[0] > 0):
        raise ValueError(
            f'centerloss: label of shape {tuple(label)} does not belong to data of shape '
            f'{tuple(data)}: it has to be ({data[0]},)'
        )


def _check_types(data: type | None, label: type | None) -> None:
    """Raise ValueError for types that do not fit; None is not known yet."""
    if data not in (None, np.float32):
        raise ValueError(f'centerloss: data of type {np.dtype(data)} is not float32')
    if label not in (None, np.float32) and not np.issubdtype(label, np.integer):
        raise ValueError(
            f'centerloss: label of type {np.dtype(label)} is neither float32 nor an integer type'
        )


@mx.operator.register('centerloss')
class CenterLossProp(mx.operator.CustomOpProp):
    """The operator ``centerloss``.

    Inputs: ``data`` (B, d), float32, and ``label`` (B,), float32 or integers, whole numbers in
    [0, K). Output: 1/2 ||x_i - c_{y_i}||^2, (B,), whatever ``scale`` is. Auxiliary state: the
    centers ``NAME_center_bias`` (K, d), which MXNet's initializers zero because of ``bias``. Called
    imperatively, the operator takes them as third positional argument.

    Like SoftmaxOutput it is a loss head: ``scale`` weights its gradient; a factor, ``MakeLoss`` or
    ``BlockGrad`` on its output is ignored. With ``out_grad=True`` the head gradient multiplies the
    gradient, sample by sample: with autograd use that and ``normalization='null'``. In a Module,
    too, use 'null': it divides gradients by the batch size itself, and 'batch' divides again.

    Parameters
    ----------
    num_class : int
        K, the number of classes.
    alpha : float, default 0.5
        Learning rate of the centers (Eq. 4), from 0 to 1.
    scale : float, default 1.0
        Factor of the gradient: lambda in L_softmax + lambda L_C (Eq. 5).
    normalization : {'batch', 'null'}, default 'batch'
        As in SoftmaxOutput: the gradient is scale (x - c_y) / B or scale (x - c_y).
    out_grad : bool, default False
        As in SoftmaxOutput: whether the head gradient multiplies the gradient.

    Raises
    ------
    ValueError
        For what does not fit, with its value. MXNet prints it and raises an MXNetError of its own.

    Examples
    --------
    In a Module:

    >>> import mxnet as mx
    >>> from center_loss import Accuracy, CenterLossMetric
    >>> label = mx.sym.var('label')
    >>> embedding = mx.sym.FullyConnected(mx.sym.var('data'), num_hidden=2, name='embedding')
    >>> logits = mx.sym.FullyConnected(embedding, num_hidden=3, name='fc')
    >>> softmax = mx.sym.SoftmaxOutput(logits, label, name='softmax')
    >>> center_loss = mx.sym.Custom(
    ...     embedding, label, op_type='centerloss', name='center_loss',
    ...     num_class=3, alpha=0.5, scale=0.01, normalization='null')
    >>> module = mx.mod.Module(mx.sym.Group([softmax, center_loss]), label_names=['label'])
    >>> images, labels = mx.nd.random.uniform(shape=(60, 8)), mx.nd.arange(60) % 3
    >>> batches = mx.io.NDArrayIter(images, labels, batch_size=20, label_name='label')
    >>> module.fit(batches, num_epoch=2, eval_metric=[Accuracy(), CenterLossMetric()])
    >>> module.get_params()[1]['center_loss_center_bias'].shape
    (3, 2)
    >>> mx.nd.waitall()

    With autograd (the center moves by 0.5 (1 + 3) / (1 + 2)):

    >>> x, y, centers = mx.nd.array([[1, 0], [3, 0]]), mx.nd.array([0, 0]), mx.nd.zeros((1, 2))
    >>> x.attach_grad()
    >>> with mx.autograd.record():
    ...     loss = 0.5 * mx.nd.Custom(x, y, centers, op_type='centerloss', num_class=1,
    ...                               normalization='null', out_grad=True)
    >>> loss.backward()
    >>> print(loss.asnumpy(), x.grad.asnumpy().tolist(), centers.asnumpy())
    [0.25 2.25] [[0.5, 0.0], [1.5, 0.0]] [[0.6666667 0.       ]]
    """

    def __init__(
        self,
        num_class: int | str = '',  # MXNet passes all of them as strings
        alpha: float | str = 0.5,
        scale: float | str = 1,
        normalization: str = 'batch',
        out_grad: bool | str = False,
        **unknown: str,
    ):
        self.problem = None  # MXNet crashes when a constructor raises: infer_shape does
        number = self._number
        self.num_class = number('num_class', num_class, int, 1, math.inf, 'a whole number above 0')
        self.alpha = number('alpha', alpha, float, 0, 1, 'a number from 0 to 1')
        self.scale = number('scale', scale, float, -1e38, 1e38, 'a finite number')
        self.normalization = normalization
        if normalization not in ('batch', 'null'):
            self.problem = f"normalization={normalization!r} is neither 'batch' nor 'null'"
        self.out_grad = str(out_grad).lower() in ('true', '1')
        if str(out_grad).lower() not in ('true', '1', 'false', '0'):
            self.problem = f'out_grad={out_grad} is neither True nor False'
        for name in unknown:
            if not name.startswith('__'):  # as __ctx_group__, which any operator may have
                self.problem = f'{name}: no such parameter'
        super().__init__(need_top_grad=self.out_grad)

    def _number(self, name, text, kind, minimum, maximum, description):
        """Return a parameter as a number; note it as a problem if it is none in that range."""
        try:
            value = kind(text)
            if minimum <= value <= maximum and value == float(text):
                return value
        except (ValueError, OverflowError):
            pass
        self.problem = f'{name}={text} is not {description}'

    def list_arguments(self) -> list[str]:
        """Name the inputs."""
        return ['data', 'label']

    def list_auxiliary_states(self) -> list[str]:
        """Name the state: ``bias`` makes MXNet's initializers zero it."""
        return ['center_bias']

    def infer_shape(self, in_shape: list[list[int]]) -> tuple[list, list, list]:
        """Infer the shapes of labels, loss and centers from that of the embeddings."""
        if self.problem:
            raise ValueError(f'centerloss: {self.problem}')
        data, label = in_shape[0] or [0, 0], in_shape[1]
        _check_shapes(data, label)
        return [data, label or data[:1]], [data[:1]], [[self.num_class, data[1]]]

    def infer_type(self, in_type: list[type | None]) -> tuple[list, list, list]:
        """Check the types; where no labels are given they are float32."""
        data, label = in_type
        _check_types(data, label)
        return [np.float32, label or np.float32], [np.float32], [np.float32]

    def create_operator(
        self, ctx: mx.Context, in_shapes: list[list[int]], in_dtypes: list[type]
    ) -> CenterLoss:
        """Create the form of the operator for a device."""
        form = CenterLossGPU if ctx.device_type == 'gpu' else CenterLoss
        batch_size = in_shapes[0][0] if self.normalization == 'batch' else 1
        return form(self.num_class, self.alpha, self.scale / batch_size, self.out_grad)


class CenterLossBlock(mx.gluon.HybridBlock):
    """Center loss in Gluon, so that ``ce(output, y) + lam * center(embedding, y)`` holds.

    Called with embeddings (B, d) and labels (B,) it returns one loss per sample, (B,), as Gluon's
    losses do. ``center.centers`` is a Parameter without gradient: training forwards move it, not a
    Trainer. Save it with the network, as a child of the same block or by ``save_parameters``.

    Parameters
    ----------
    num_classes : int
        K, the number of classes.
    dimension : int
        d, the dimension of the embeddings.
    alpha : float, default 0.5
        Learning rate of the centers (Eq. 4), from 0 to 1.
    **kwargs
        ``prefix`` and ``params`` of any Gluon block.

    Examples
    --------
    >>> import mxnet as mx
    >>> from mxnet import gluon
    >>> from center_loss import CenterLossBlock
    >>> embed, classify = gluon.nn.Dense(2), gluon.nn.Dense(3)
    >>> ce, center = gluon.loss.SoftmaxCrossEntropyLoss(), CenterLossBlock(3, 2)
    >>> for block in embed, classify, center:
    ...     block.initialize()
    >>> parameters = embed.collect_params()
    >>> parameters.update(classify.collect_params())
    >>> trainer = gluon.Trainer(parameters, 'sgd')
    >>> x, y = mx.nd.random.uniform(shape=(20, 8)), mx.nd.arange(20) % 3
    >>> with mx.autograd.record():
    ...     embedding = embed(x)
    ...     loss = ce(classify(embedding), y) + 0.01 * center(embedding, y)
    >>> loss.backward()
    >>> trainer.step(batch_size=20)
    >>> print(loss.shape, center.centers.data().shape)
    (20,) (3, 2)
    """

    def __init__(self, num_classes: int, dimension: int, alpha: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        checked = CenterLossProp(num_class=num_classes, alpha=alpha)
        if checked.problem:
            raise ValueError(f'centerloss: {checked.problem}')
        self.num_classes = checked.num_class
        self.alpha = checked.alpha
        with self.name_scope():
            self.centers = self.params.get(
                'centers', shape=(self.num_classes, dimension), init='zeros', differentiable=False
            )

    def forward(self, embedding: mx.nd.NDArray, label: mx.nd.NDArray) -> mx.nd.NDArray:
        """Compute the loss. Of arrays, what an operator only prints is raised as a ValueError."""
        if isinstance(embedding, mx.nd.NDArray):
            _check_shapes(embedding.shape, label.shape)
            _check_types(embedding.dtype, label.dtype)
            if label.context.device_type != 'gpu':
                _check_labels(label.asnumpy(), self.num_classes)
        return super().forward(embedding, label)

    def hybrid_forward(
        self,
        F: ModuleType,
        embedding: mx.nd.NDArray | mx.sym.Symbol,
        label: mx.nd.NDArray | mx.sym.Symbol,
        centers: mx.nd.NDArray | mx.sym.Symbol,
    ) -> mx.nd.NDArray | mx.sym.Symbol:
        """Compute the loss of arrays or symbols, ``F`` being ``mx.nd`` or ``mx.sym``."""
        parameters = {'num_class': self.num_classes, 'alpha': self.alpha, 'normalization': 'null'}
        arrays = embedding, label, centers
        return F.Custom(*arrays, op_type='centerloss', out_grad=True, **parameters)


class _MeanOverImages(mx.metric.EvalMetric):
    """Mean of ``per_image`` over the images since ``reset_local``, or ``reset`` if global."""

    names = ()  # by default: of the metric, its output and its label

    def __init__(
        self,
        name: str | None = None,
        output_names: Sequence[str] | None = None,
        label_names: Sequence[str] | None = None,
    ):
        metric, output, label = self.names
        outputs, labels = list(output_names or [output]), list(label_names or [label])
        super().__init__(name or metric, outputs, labels, has_global_stats=True)

    def update_dict(self, label: dict[str, mx.nd.NDArray], pred: dict[str, mx.nd.NDArray]) -> None:
        """Count a batch; if there is one label it is that, whatever its name."""
        if len(label) == 1:
            (only,) = label.values()
            label = dict.fromkeys(self.label_names, only)
        super().update_dict(label, pred)

    def update(self, labels: Sequence[mx.nd.NDArray], preds: Sequence[mx.nd.NDArray]) -> None:
        """Count a batch, given as one label and one output per device."""
        for values in map(self.per_image, labels, preds):
            total = float(values.sum(dtype=np.float64))
            self.sum_metric += total
            self.global_sum_metric += total
            self.num_inst += len(values)
            self.global_num_inst += len(values)


class Accuracy(_MeanOverImages):
    """Share of the images whose most probable class is their label."""

    names = 'accuracy', 'softmax_output', 'softmax_label'

    def per_image(self, label: mx.nd.NDArray, probability: mx.nd.NDArray) -> np.ndarray:
        """Return whether the most probable of the classes, (B, K), is the label, (B,)."""
        return probability.asnumpy().argmax(axis=1) == label.asnumpy()


class CrossEntropy(_MeanOverImages):
    """Mean over the images of -log p[label]."""

    names = 'cross_entropy', 'softmax_output', 'softmax_label'

    def per_image(self, label: mx.nd.NDArray, probability: mx.nd.NDArray) -> np.ndarray:
        """Return -log p[label]; 87.3 where p is 0 in float32, NaN where it is NaN."""
        probability = probability.asnumpy()
        classes = _check_labels(label.asnumpy(), probability.shape[1])
        chosen = probability[np.arange(len(classes)), classes]
        return -np.log(np.maximum(chosen, np.finfo(np.float32).tiny))


class CenterLossMetric(_MeanOverImages):
    """Mean over the images of 1/2 ||x_i - c_{y_i}||^2, the operator's output."""

    names = 'center_loss', 'center_loss_output', 'center_label'

    def per_image(self, label: mx.nd.NDArray, loss: mx.nd.NDArray) -> np.ndarray:
        """Return the operator's output, (B,)."""
        return loss.asnumpy()
