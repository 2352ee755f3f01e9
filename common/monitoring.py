"""Watching over a training run: its progress on a terminal, and whether it diverged."""

from collections.abc import Iterable
import math

import numpy as np
from tqdm import tqdm

from common.environment import mx
from common.errors import Failure

COLLAPSED = 1e-4  # as a multiple of 1 / K, see check_not_diverged
REJECTED = 99  # percentile, see OwnDistance


class Diverged(Failure):
    """A training run that diverged or collapsed."""

    def __init__(self, what: str, where: str):
        super().__init__(
            f'training diverged: {what} in {where}; try a smaller learning rate (--lr) or '
            '--center-loss-weight, a longer --warmup-epochs, --clip-gradient, or the default '
            '--initializer'
        )


class TrainingMonitor:
    """A batch-end callback: it stops a run whose metrics are no longer finite, and shows a bar.

    On a terminal there is a bar for every epoch with images/s and the metrics so far.

    Parameters
    ----------
    batch_size
        Images in a batch.
    num_batches
        Batches in an epoch.
    num_epochs
        Epochs of the run.
    shown
        Whether there may be a bar.
    """

    def __init__(self, batch_size: int, num_batches: int, num_epochs: int, shown: bool = True):
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.num_epochs = num_epochs
        self.disable = None if shown else True  # None: shown on a terminal only
        self.bar = None

    def __enter__(self) -> 'TrainingMonitor':
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def __call__(self, param: mx.model.BatchEndParam) -> None:
        """Take in the batch that has just ended."""
        if param.nbatch == 0:
            self.bar = tqdm(
                total=self.num_batches * self.batch_size,
                desc=f'epoch {param.epoch + 1}/{self.num_epochs} (Epoch[{param.epoch}])',
                unit=' images',
                unit_scale=True,
                leave=False,
                dynamic_ncols=True,
                disable=self.disable,
            )
        values = param.eval_metric.get_global_name_value()
        for name, value in values:
            if not math.isfinite(value):
                raise Diverged(
                    f'{name} is {value}', f'epoch {param.epoch + 1}, batch {param.nbatch + 1}'
                )
        if not self.bar.disable:
            shown = {name: f'{value:.4f}' for name, value in values}
            self.bar.set_postfix(shown, refresh=False)
        self.bar.update(self.batch_size)
        if param.nbatch + 1 == self.num_batches:
            self.bar.close()


class WidestDifference(mx.metric.EvalMetric):
    """The widest difference between two images' probabilities for one class, as a multiple of 1/K.

    It takes the output ``softmax_output`` (B, K).
    """

    def __init__(self):
        super().__init__('widest_difference', output_names=['softmax_output'], label_names=[])

    def reset(self) -> None:
        """Forget all images."""
        self.lowest, self.highest = math.inf, -math.inf

    def update(self, labels: list, preds: list) -> None:
        """Take in the probabilities of a batch."""
        probability = preds[0].asnumpy()
        self.lowest = np.minimum(self.lowest, probability.min(axis=0))
        self.highest = np.maximum(self.highest, probability.max(axis=0))

    def get(self) -> tuple[str, float]:
        """Return (name, value)."""
        return self.name, float(np.max(self.highest - self.lowest)) * np.size(self.highest)


class OwnDistance(mx.metric.EvalMetric):
    """The ``REJECTED``-th percentile of the images' distance to the center of their own class.

    Farther from every center than that, an image is like none of the classes. It takes the output
    ``center_loss_output`` (B,), 1/2 of the squared distance.
    """

    def __init__(self):
        super().__init__('own_distance', output_names=['center_loss_output'], label_names=[])

    def reset(self) -> None:
        """Forget all images."""
        self.losses = []

    def update(self, labels: list, preds: list) -> None:
        """Take in the center losses of a batch."""
        self.losses.append(preds[0].asnumpy())

    def get(self) -> tuple[str, float]:
        """Return (name, value)."""
        distances = np.sqrt(2 * np.concatenate(self.losses))
        return self.name, float(np.percentile(distances, REJECTED))


def check_not_diverged(
    where: str,
    scores: dict[str, float],
    difference: float,
    arrays: Iterable[tuple[str, mx.nd.NDArray]],
) -> None:
    """Raise :class:`Diverged` where a score or a parameter is not finite, or the run collapsed.

    In a collapsed run all images lie on one point of the embedding: every tanh is saturated, and
    the images' probabilities differ by the rounding of float32, by less than 1e-5 / K. A run that
    learns differs more from the start.

    Parameters
    ----------
    where
        Which epoch and batch, for the message.
    scores
        The validation metrics by name.
    difference
        The value of :class:`WidestDifference` over the validation images.
    arrays
        Names and values of the parameters; max pooling may hide a NaN among them from the metrics.
    """
    for name, value in {**scores, 'widest_difference': difference}.items():
        if not math.isfinite(value):
            raise Diverged(f'Validation-{name} is {value}', where)
    for name, array in arrays:
        if not np.isfinite(array.asnumpy()).all():
            raise Diverged(f'{name} is not finite', where)
    if difference < COLLAPSED and scores['accuracy'] < 1:  # at 1 there is a single class
        raise Diverged(
            'all classes are on one point of the embedding, Validation-accuracy is '
            f'{scores["accuracy"]:.4f}',
            where,
        )
