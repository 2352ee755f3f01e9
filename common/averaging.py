"""Weights averaged over the steps of a run."""

from collections.abc import Iterator
import contextlib

from common.environment import mx
from common.array_file import tagged, untagged
from common.module import Module

# Weights of neighboring steps are alike. After SPARSE_AFTER steps only every EVERY-th is averaged,
# which costs 2 to 3% of the training's time; every step costs 7% with batches of 128, 16% with 32.
SPARSE_AFTER, EVERY = 100, 10


class Average:
    """The average of weights and centers over the last steps; validated and saved in their place.

    SGD at a constant rate wanders around a minimum; the average of its steps is closer to it than
    any of them (Polyak and Juditsky, SIAM J. Control and Optimization 1992), and training itself is
    unchanged. Step t = 1, 2, ... moves the average by 1 / (1 + share * (t - 1)) of the way to the
    present weights, so that it covers about the last ``share`` of all steps so far, however many
    there are (polynomial-decay averaging, Shamir and Zhang, ICML 2013). After 100 steps every tenth
    moves it ten times as far, at most all the way.

    Parameters
    ----------
    share
        From 0 (no average) to 1 (the mean of all steps).
    module
        The module whose parameters are averaged.
    arrays
        The average that a resumed run begins with ('arg:NAME' and 'aux:NAME'), else empty.
    """

    def __init__(self, share: float, module: Module, arrays: dict[str, mx.nd.NDArray]):
        self.share = share
        self.module = module
        self.arrays = dict(arrays)

    def __call__(self, param: mx.model.BatchEndParam) -> None:
        """Take in the step that has just ended (a batch-end callback)."""
        step = self.module.num_updates()
        if self.arrays and step > SPARSE_AFTER and step % EVERY:
            return
        stands_for = EVERY if step > SPARSE_AFTER else 1
        rate = min(1, stands_for / (1 + self.share * (step - 1)))
        for name, present in self.module.present_arrays().items():
            if name.startswith('aux:'):
                # MXNet does not order a reader of centers before the forward that moves them next;
                # the forward that moved them last has ended, since its output has been read.
                present = mx.nd.array(present.asnumpy(), ctx=present.context)
            if name not in self.arrays:
                self.arrays[name] = present.copy()
            average = self.arrays[name].as_in_context(present.context)
            # (1 - rate) * average + rate * present in one pass: SGD on a weight that decays.
            mx.nd.sgd_update(average, present, lr=rate, wd=1, rescale_grad=-1, out=average)
            self.arrays[name] = average

    @contextlib.contextmanager
    def in_use(self) -> Iterator[dict[str, mx.nd.NDArray]]:
        """Give the module the average, and its own arrays back at the end.

        Yields the arrays of the last step by tagged name; an empty dict where nothing is averaged.
        """
        if not self.share:
            yield {}
            return
        last = {name: array.copy() for name, array in tagged(*self.module.get_params()).items()}
        self.module.set_params(*untagged(self.arrays))
        yield last
        self.module.set_params(*untagged(last))
