"""Center loss for MXNet: an operator, a Gluon block and the metrics of the joint objective."""

import ctypes
from collections.abc import Sequence

import mxnet as mx
import numpy as np

__all__ = [
    'Accuracy',
    'CenterLoss',
    'CenterLossBlock',
    'CenterLossProp',
    'CenterLossMetric',
    'CrossEntropy',
    'memory_view',
]


def memory_view(array: mx.nd.NDArray) -> np.ndarray:
    """Return the memory of an NDArray on the CPU as a NumPy array, without a copy.

    It does not wait for the engine: use it where nothing else writes the array. The view keeps the
    NDArray alive.
    """
    address = ctypes.c_void_p()
    mx.base.check_call(mx.base._LIB.MXNDArrayGetData(array.handle, ctypes.byref(address)))
    shape, dtype = array.shape, np.dtype(array.dtype)
    memory = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(address.value)
    memory.owner = array
    return np.frombuffer(memory, dtype).reshape(shape)


def _check_shapes(data: Sequence[int], label: Sequence[int]) -> None:
    if len(data) != 2:
        raise ValueError(f'centerloss: data of shape {tuple(data)} is not (batch, dimension)')
    if label and (len(label) != 1 or 0 < label[0] != data[0] > 0):  # 0: not known yet
        raise ValueError(
            f'centerloss: label of shape {tuple(label)} does not belong to data of shape '
            f'{tuple(data)}: it has to be ({data[0]},)'
        )


def _check_types(data: type | None, label: type | None) -> None:
    if data not in (None, np.float32):
        raise ValueError(f'centerloss: data of type {np.dtype(data)} is not float32')
    if label not in (None, np.float32) and not np.issubdtype(label, np.integer):
        raise ValueError(
            f'centerloss: label of type {np.dtype(label)} is neither float32 nor an integer type'
        )


def _check_labels(label: np.ndarray, num_class: int) -> np.ndarray:
    """Return the labels as int64, (B,)."""
    with np.errstate(invalid='ignore'):
        classes = label.astype(np.int64)
    wrong = (classes != label) | (classes < 0) | (classes >= num_class)
    if wrong.any():
        position = int(wrong.argmax())
        raise ValueError(
            f'centerloss: label {label[position]:g} at position {position} of the batch is not '
            f'a whole number from 0 to {num_class - 1} (num_class={num_class})'
        )
    return classes


def _write(target: np.ndarray, req: str, value: np.ndarray | float) -> None:
    """Store a result as the executor requests: not at all, added, or in place of the old one."""
    if req == 'add':
        target += value
    elif req != 'null':
        target[...] = value


class CenterLoss(mx.operator.CustomOp):
    """Eq. 2 to 4 for one device: the form for the CPU."""

    def __init__(self, num_class, alpha, factor, out_grad):
        super().__init__()
        self.num_class = num_class
        self.alpha = alpha
        self.factor = factor
        self.out_grad = out_grad
        self.difference = None  # x - c_y of the last forward, which its backward needs

    def forward(self, is_train, req, in_data, out_data, aux):
        """Write the loss of every sample, (B,); in training also move the centers."""
        data, label, centers = map(memory_view, (*in_data, *aux))
        classes = _check_labels(label, self.num_class)
        with np.errstate(over='ignore', invalid='ignore'):  # a training that diverges
            difference = data - centers[classes]  # (B, d)
            loss = 0.5 * np.einsum('ij,ij->i', difference, difference)
            _write(memory_view(out_data[0]), req[0], loss)
            if is_train:
                self._move_centers(difference, classes, centers)
        self.difference = difference

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        """Write the gradient of the embeddings, (B, d); the label has none."""
        with np.errstate(over='ignore', invalid='ignore'):
            gradient = self.factor * self.difference
            if self.out_grad:
                gradient *= memory_view(out_grad[0])[:, None]
            _write(memory_view(in_grad[0]), req[0], gradient)
        _write(memory_view(in_grad[1]), req[1], 0)

    def _move_centers(self, difference, classes, centers):
        """Eq. 4 on the centers of the classes in the batch."""
        order = classes.argsort(kind='stable')  # the samples of a class stand side by side
        present, first, count = np.unique(classes[order], return_index=True, return_counts=True)
        total = difference[order[first]]  # (classes present, d)
        several = count > 1
        if several.any():
            begin = np.cumsum(count[several]) - count[several]
            members = order[several.repeat(count)]
            total[several] = np.add.reduceat(difference[members], begin, axis=0)
        centers[present] += (self.alpha / (1 + count)).astype(np.float32)[:, None] * total


class CenterLossND(CenterLoss):
    """The form for GPUs: mx.nd operations only, and no copy to the host."""

    def forward(self, is_train, req, in_data, out_data, aux):
        """Write the loss of every sample, NaN where the label is no class; move the centers."""
        data, label, centers = *in_data, *aux
        label = label.astype('float64')
        good = (label >= 0) * (label < self.num_class) * (label == label.floor())
        classes = mx.nd.where(good, label, mx.nd.zeros_like(label)).astype('int32')
        good = good.astype('float32')
        difference = data - mx.nd.take(centers, classes)
        difference = mx.nd.where(good, difference, mx.nd.zeros_like(difference))
        loss = 0.5 * mx.nd.sum(difference * difference, axis=1)
        self.assign(out_data[0], req[0], loss / good)  # 0 / 0 is NaN
        if is_train:
            same = mx.nd.broadcast_equal(classes.reshape((-1, 1)), classes.reshape((1, -1)))
            same = mx.nd.broadcast_mul(same.astype('float32'), good.reshape((1, -1)))
            step = mx.nd.broadcast_div(
                mx.nd.dot(same, difference), 1 + mx.nd.sum(same, axis=1, keepdims=True)
            )
            centers[classes] = mx.nd.take(centers, classes) + self.alpha * step
        self.difference = difference

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        """Write the gradient of the embeddings, (B, d); the label has none."""
        gradient = self.factor * self.difference
        if self.out_grad:
            gradient = mx.nd.broadcast_mul(gradient, out_grad[0].reshape((-1, 1)))
        self.assign(in_grad[0], req[0], gradient)
        self.assign(in_grad[1], req[1], mx.nd.zeros_like(in_grad[1]))


@mx.operator.register('centerloss')
class CenterLossProp(mx.operator.CustomOpProp):
    """The operator ``centerloss``: its inputs, shapes and parameters."""

    def __init__(
        self,
        num_class=None,
        alpha=0.5,
        scale=1.0,
        normalization='batch',
        out_grad=False,
        **unknown,
    ):
        # MXNet crashes when a constructor raises; infer_shape, which may raise, reports a problem.
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
        self.out_grad = str(out_grad).lower() in ('true', '1')
        if str(out_grad).lower() not in ('true', '1', 'false', '0'):
            self.problem = f'out_grad={out_grad} is neither True nor False'
        unknown = [key for key in unknown if not key.startswith('__')]  # attributes as __ctx_group__
        if unknown:
            self.problem = f'{", ".join(unknown)}: no such parameter'
        super().__init__(need_top_grad=self.out_grad)

    def _number(self, name, text, kind, wanted, fits):
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
        data = data or [0, 0]  # not known yet
        _check_shapes(data, label)
        return [data, data[:1]], [data[:1]], [[self.num_class, data[1]]]

    def infer_type(self, in_type):
        data, label = in_type
        _check_types(data, label)
        return [np.float32, label or np.float32], [np.float32], [np.float32]

    def create_operator(self, ctx, in_shapes, in_dtypes):
        form = CenterLossND if ctx.device_type == 'gpu' else CenterLoss
        batch = in_shapes[0][0] if self.normalization == 'batch' else 1
        return form(self.num_class, self.alpha, self.scale / batch, self.out_grad)


class CenterLossBlock(mx.gluon.HybridBlock):
    """Center loss as a Gluon loss, (B,): ``ce(output, y) + lam * center(embedding, y)``."""

    def __init__(
        self, num_classes: int, dimension: int, alpha: float = 0.5, prefix=None, params=None
    ):
        super().__init__(prefix=prefix, params=params)
        self.num_classes = num_classes
        self.alpha = alpha
        with self.name_scope():
            self.centers = self.params.get(
                'center_bias',
                shape=(num_classes, dimension),
                init='zeros',
                grad_req='null',
                differentiable=False,
            )

    def forward(self, embedding, label):
        """Check what can be checked here, so that Python's exception has the sentence."""
        if isinstance(embedding, mx.nd.NDArray):
            _check_shapes(embedding.shape, label.shape)
            _check_types(embedding.dtype, label.dtype)
            if label.context.device_type != 'gpu':
                _check_labels(label.asnumpy(), self.num_classes)
        return super().forward(embedding, label)

    def hybrid_forward(self, F, embedding, label, centers):
        """Compute the loss with the operator."""
        return F.Custom(
            embedding,
            label,
            centers,
            op_type='centerloss',
            num_class=self.num_classes,
            alpha=self.alpha,
            normalization='null',
            out_grad=True,
        )


class _MeanOverImages(mx.metric.EvalMetric):
    """The mean over images of a quantity that ``per_image`` computes from a label and an output."""

    def __init__(self, name, output_names, label_names):
        super().__init__(
            name,
            output_names=list(output_names),
            label_names=list(label_names),
            has_global_stats=True,
        )

    def update_dict(self, label, pred):
        """Update from labels and outputs by name; one label under any name is the label."""
        if len(label) == 1:
            label = dict.fromkeys(self.label_names, *label.values())
        super().update_dict(label, pred)

    def update(self, labels, preds):
        """Count the images of a batch: lists of NDArrays, one of each for every device."""
        for label, pred in zip(labels, preds):
            values = self.per_image(label.asnumpy(), pred.asnumpy())
            total = float(values.sum(dtype=np.float64))
            self.sum_metric += total
            self.global_sum_metric += total
            self.num_inst += len(values)
            self.global_num_inst += len(values)


class Accuracy(_MeanOverImages):
    """Share of the images whose most probable class is their label."""

    def __init__(
        self, name='accuracy', output_names=('softmax_output',), label_names=('softmax_label',)
    ):
        super().__init__(name, output_names, label_names)

    def per_image(self, label, probability):
        """1 where the most probable class is the label, otherwise 0."""
        return probability.argmax(axis=1) == label


class CrossEntropy(_MeanOverImages):
    """Mean over the images of -log p[label]."""

    def __init__(
        self, name='cross_entropy', output_names=('softmax_output',), label_names=('softmax_label',)
    ):
        super().__init__(name, output_names, label_names)

    def per_image(self, label, probability):
        """-log p[label], at most 87.3, or NaN."""
        chosen = probability[np.arange(len(label)), label.astype(np.int64)]
        return -np.log(np.maximum(chosen, np.finfo(np.float32).tiny))


class CenterLossMetric(_MeanOverImages):
    """Mean over the images of 1/2 ||x_i - c_{y_i}||^2 (Eq. 2), the operator's output."""

    def __init__(
        self,
        name='center_loss',
        output_names=('center_loss_output',),
        label_names=('center_label',),
    ):
        super().__init__(name, output_names, label_names)

    def per_image(self, label, loss):
        """The operator's output."""
        return loss
