"""Other forms of the operator to compare it with, as ``centerloss_loop`` and so on."""

from collections.abc import Callable

import numpy as np

from common.environment import mx
from center_loss import CenterLoss, CenterLossGPU, CenterLossProp


class PerSampleLoop(CenterLoss):
    """Center loss with a per-sample loop: ``mx.nd`` operations for one sample after the other."""

    def forward(self, is_train, req, in_data, out_data, aux):
        """Write the loss of every sample, (B,); in training, move the centers."""
        classes = in_data[1].asnumpy().astype(int).tolist()
        self.difference = [in_data[0][i] - aux[0][j] for i, j in enumerate(classes)]
        losses = [mx.nd.sum(difference * difference) / 2 for difference in self.difference]
        self.assign(out_data[0], req[0], mx.nd.concat(*losses, dim=0))
        if is_train:
            steps = {}
            for j, difference in zip(classes, self.difference, strict=True):
                step, count = steps.get(j, (0, 0))
                steps[j] = step + difference, count + 1
            for j, (step, count) in steps.items():
                aux[0][j] += self.alpha * step / (1 + count)

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        """Write the gradient of the embeddings, (B, d)."""
        for i, difference in enumerate(self.difference):
            in_grad[0][i] = self.factor * difference


class OneReduceat(CenterLoss):
    """Center loss whose centers move by one sum over all classes, also those of one sample."""

    def _move_centers(self, classes, centers):
        order = classes.argsort(kind='stable')
        present, first, count = np.unique(classes[order], return_index=True, return_counts=True)
        rate = (self.alpha / (1 + count)).astype(np.float32)
        centers[present] += rate[:, None] * np.add.reduceat(self.difference[order], first, axis=0)


class EmptyOperator(CenterLoss):
    """What MXNet takes to call an operator that is written in Python."""

    def forward(self, is_train, req, in_data, out_data, aux):
        """Do nothing."""

    def backward(self, req, out_grad, in_data, out_data, in_grad, aux):
        """Do nothing."""


def register(op_type: str, form: type[CenterLoss]) -> None:
    """Register a form of the operator that ``normalization`` does not change."""

    class Prop(CenterLossProp):
        def create_operator(self, ctx, in_shapes, in_dtypes):
            return form(self.num_class, self.alpha, self.scale, self.out_grad)

    mx.operator.register(op_type)(Prop)


register('centerloss_loop', PerSampleLoop)
register('centerloss_nd', CenterLossGPU)
register('centerloss_reduceat', OneReduceat)
register('centerloss_empty', EmptyOperator)


def with_operator(network: mx.sym.Symbol, op_type: str) -> mx.sym.Symbol:
    """Return the network with another form of the operator."""
    return mx.sym.load_json(network.tojson().replace('"centerloss"', f'"{op_type}"'))


def operator_step(
    op_type: str, batch_size: int, dim: int, num_class: int, labels: np.ndarray | None = None
) -> Callable:
    """Return a function that runs forward and backward of one form of the operator.

    The labels, (B,), are random ones by default.
    """
    rng = np.random.default_rng(0)
    symbol = mx.sym.Custom(
        data=mx.sym.var('data'),
        label=mx.sym.var('label'),
        op_type=op_type,
        name='loss',
        num_class=num_class,
    )
    executor = symbol.simple_bind(mx.cpu(), data=(batch_size, dim))
    executor.arg_dict['data'][:] = rng.normal(size=(batch_size, dim))
    executor.arg_dict['label'][:] = (
        rng.integers(num_class, size=batch_size) if labels is None else labels
    )

    def step():
        executor.forward(is_train=True)
        executor.backward()
        executor.grad_dict['data'].wait_to_read()

    return step
