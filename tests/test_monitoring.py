"""Divergence, collapse, and the progress bar."""

import sys

import numpy as np
import pytest

from common.environment import mx
from common.monitoring import (
    COLLAPSED,
    Diverged,
    OwnDistance,
    TrainingMonitor,
    WidestDifference,
    check_not_diverged,
)
from train_model import metrics


def batch_end(epoch, nbatch, eval_metric):
    return mx.model.BatchEndParam(epoch, nbatch, eval_metric, None)


def count_batch(eval_metric, loss, devices=1):
    """Take in a batch of 4 per device, whose center loss is ``loss`` on the last device."""
    labels = [mx.nd.zeros(4)] * devices
    probability = [mx.nd.full((4, 2), 0.5)] * devices
    losses = [mx.nd.full(4, 1)] * (devices - 1) + [mx.nd.full(4, loss)]
    for metric in eval_metric.metrics:
        is_center_loss = metric.output_names == ['center_loss_output']
        metric.update(labels, losses if is_center_loss else probability)


@pytest.mark.parametrize('devices', [1, 2])
@pytest.mark.parametrize('first', [1, 7, 25])
@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_divergence_is_of_its_batch(value, first, devices):
    eval_metric, seen = metrics(), 0
    with (
        TrainingMonitor(4 * devices, 25, 3, shown=False) as monitor,
        pytest.raises(
            Diverged,
            match=rf'center_loss is {value} in epoch 2, batch {first}; try a smaller learning rate',
        ),
    ):
        for batch in range(1, 26):
            seen = batch
            count_batch(eval_metric, 0.5 if batch < first else value, devices)
            monitor(batch_end(1, batch - 1, eval_metric))
    assert seen == first


def test_sound_epochs_pass():
    eval_metric = metrics()
    with TrainingMonitor(4, 5, 2, shown=False) as monitor:
        for epoch in range(2):
            eval_metric.reset()
            for batch in range(5):
                count_batch(eval_metric, 3)
                monitor(batch_end(epoch, batch, eval_metric))
    assert dict(eval_metric.get_name_value())['center_loss'] == 3


def test_no_bar_in_a_pipe(capsys):
    """Nor where it is not to be shown."""
    assert not sys.stderr.isatty()
    eval_metric = metrics()
    count_batch(eval_metric, 3)
    for shown in (False, True):
        with TrainingMonitor(4, 1, 1, shown) as monitor:
            monitor(batch_end(0, 0, eval_metric))
            assert monitor.bar.disable
    assert capsys.readouterr() == ('', '')


def test_bar_is_closed(capsys, monkeypatch):
    """At the end of an epoch, and where the training ends within one."""
    monkeypatch.setattr(type(sys.stderr), 'isatty', lambda self: True, raising=False)
    eval_metric = metrics()
    count_batch(eval_metric, 3)
    bars = []
    with pytest.raises(KeyboardInterrupt), TrainingMonitor(4, 2, 9) as monitor:
        for batch in (0, 1, 0):
            monitor(batch_end(4, batch, eval_metric))
            if all(monitor.bar is not bar for bar in bars):
                bars.append(monitor.bar)
        raise KeyboardInterrupt
    assert len(bars) == 2 and all(bar.disable for bar in bars)  # as tqdm marks a closed one
    shown = capsys.readouterr().err
    assert 'epoch 5/9 (Epoch[4])' in shown and ' images/s' in shown


@pytest.mark.parametrize('value, collapsed', [(0.1, True), (0.2, False)])
def test_widest_difference_is_over_all_batches(value, collapsed):
    difference = WidestDifference()
    for first in (0.1, 0.1, value, 0.1):
        difference.update([], [mx.nd.array([[first, 1 - first]] * 3)])
    assert difference.get()[1] == pytest.approx(2 * (value - 0.1), abs=1e-6)
    assert (difference.get()[1] < COLLAPSED) == collapsed
    difference.reset()
    difference.update([], [mx.nd.array([[0.9, 0.1], [0.8, 0.2]])])
    assert difference.get()[1] == pytest.approx(0.2, abs=1e-6)


def test_own_distance_is_over_all_batches():
    distances = np.random.default_rng(0).random(130)
    measured = OwnDistance()
    for batch in np.split(distances, [50, 100]):
        measured.update([], [mx.nd.array(batch**2 / 2)])
    assert measured.get()[1] == pytest.approx(np.percentile(distances, 99), rel=1e-5)


SOUND = {'accuracy': 0.5, 'cross-entropy': 1.0, 'center_loss': 2.0}


@pytest.mark.parametrize(
    'scores, difference, array, said',
    [
        ({'cross-entropy': np.nan}, 1, 0, 'Validation-cross-entropy is nan'),
        ({'center_loss': np.inf}, 1, 0, 'Validation-center_loss is inf'),
        ({}, np.nan, 0, 'Validation-widest_difference is nan'),
        ({}, 1, np.nan, 'fc1_weight is not finite'),
        ({}, 1, -np.inf, 'fc1_weight is not finite'),
        (
            {},
            0.9 * COLLAPSED,
            0,
            r'all classes are on one point of the embedding, Validation-accuracy is 0\.5000',
        ),
    ],
)
def test_not_sound(scores, difference, array, said):
    arrays = [('fc1_bias', mx.nd.ones(3)), ('fc1_weight', mx.nd.array([1, array]))]
    with pytest.raises(Diverged, match=f'training diverged: {said} in epoch 1, batch 7; try'):
        check_not_diverged('epoch 1, batch 7', {**SOUND, **scores}, difference, arrays)


def test_sound():
    arrays = [('fc1_weight', mx.nd.ones(3))]
    check_not_diverged('here', SOUND, 1.1 * COLLAPSED, iter(arrays))
    check_not_diverged('here', {**SOUND, 'accuracy': 1}, 0, arrays)  # images of a single class
