"""The iterators, the wrapper, and which files are read."""

import argparse
import collections
import gzip
import io
import logging
import os
from pathlib import Path
import re
import socket
import subprocess
import sys

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
from PIL import Image
import pytest

from common.environment import mx
from common.errors import InputError
import data
from data import FILES, DualLabelIter, DualLabelWrapper, load_digits, mnist_iterator, read_idx

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / 'data' / 'mnist-5k'
RAW = {file: gzip.decompress((SAMPLE / f'{file}.gz').read_bytes()) for file in FILES}
IMAGES, LABELS, VAL_IMAGES, VAL_LABELS = FILES


@pytest.fixture(scope='module')
def sample():
    return load_digits('mnist-5k')


def iterators(*arguments, **options):
    return mnist_iterator(*arguments, dataset='mnist-5k', **options)


def epoch_of(iterator):
    """Every batch until the end: images (N, ...), labels (N,), sizes of the batches."""
    images, labels, sizes = [], [], []
    for batch in iterator:
        (image,), (softmax_label, center_label) = batch.data, batch.label
        assert image.dtype == softmax_label.dtype == center_label.dtype == np.float32
        assert batch.pad == 0
        np.testing.assert_array_equal(softmax_label.asnumpy(), center_label.asnumpy())
        images.append(image.asnumpy())
        labels.append(softmax_label.asnumpy())
        sizes.append(len(image))
    return np.concatenate(images), np.concatenate(labels), sizes


def as_bytes(images):
    return (images * 256).astype(np.uint8)


def sorted_pairs(images, labels):
    """Images with their labels in a canonical order, to compare sets of them."""
    pairs = zip((image.tobytes() for image in images), labels.tolist(), strict=True)
    return sorted(pairs)


# ---- mnist_iterator


def test_training_epoch_is_every_image_once(sample):
    train, _ = iterators(100)
    images, labels, sizes = epoch_of(train)
    assert sizes == [100] * 40 and train.num_batches == 40
    assert images.shape == (4000, 1, 28, 28)
    assert sorted_pairs(as_bytes(images), labels) == sorted_pairs(
        sample.train_images, sample.train_labels
    )


def test_pixels_are_bytes_over_256(sample):
    images = epoch_of(iterators(100)[1])[0]
    assert images.min() == 0 and images.max() == 255 / 256
    np.testing.assert_array_equal(images[:, 0], sample.val_images / np.float32(256))


def test_descriptions_fit_the_batches():
    train, _ = iterators(100)
    batch = next(train)
    assert [(desc.name, desc.shape) for desc in train.provide_data] == [('data', (100, 1, 28, 28))]
    assert [(desc.name, desc.shape) for desc in train.provide_label] == [
        ('softmax_label', (100,)),
        ('center_label', (100,)),
    ]
    assert [array.shape for array in batch.data + batch.label] == [
        desc.shape for desc in train.provide_data + train.provide_label
    ]


def test_order_depends_on_seed_and_epoch():
    first, second, other = (iterators(100, seed=seed)[0] for seed in (1, 1, 2))
    orders = []
    for _ in range(2):
        a, b, c = (epoch_of(iterator)[0] for iterator in (first, second, other))
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
        orders.append(a)
        for iterator in (first, second, other):
            iterator.reset()
    assert (orders[0] != orders[1]).any()


@pytest.mark.parametrize('seed, epoch', [(0, 0), (0, 7), (5, 2)])
def test_order_is_the_one_of_earlier_versions(seed, epoch, sample):
    """A run is the same, bit for bit, as with every version since c9a6961."""
    order = np.random.default_rng((seed, epoch)).permutation(4000)[:3968]
    train, _ = iterators(64, seed=seed)
    train.start_epoch(epoch)
    np.testing.assert_array_equal(epoch_of(train)[1], sample.train_labels[order])


def test_start_epoch_continues_an_unbroken_run():
    unbroken = iterators(64)[0]
    continued = iterators(64)[0]
    next(continued)
    for epoch in range(3):
        continued.start_epoch(epoch)
        for part, expected in zip(epoch_of(continued)[:2], epoch_of(unbroken)[:2], strict=True):
            np.testing.assert_array_equal(part, expected)
        unbroken.reset()


@pytest.mark.parametrize('workers', [2, 3])
def test_workers_share_every_batch(workers):
    alone = epoch_of(iterators(30 * workers, seed=4)[0])
    parts = [
        iterators(30, seed=4, num_parts=workers, part_index=index)[0] for index in range(workers)
    ]
    assert {part.num_batches for part in parts} == {4000 // (30 * workers)}
    for number, batches in enumerate(zip(*parts, strict=True)):
        together = slice(number * 30 * workers, (number + 1) * 30 * workers)
        for whole, arrays in (
            (alone[0], [batch.data[0] for batch in batches]),
            (alone[1], [batch.label[0] for batch in batches]),
        ):
            joined = np.concatenate([array.asnumpy() for array in arrays])
            np.testing.assert_array_equal(joined, whole[together])


@pytest.mark.parametrize('batch_size', [1, 7, 128, 999, 1000, 1001, 4000])
def test_validation_is_every_image_once(batch_size, sample):
    val = iterators(batch_size)[1]
    for _ in range(2):
        images, labels, sizes = epoch_of(val)
        np.testing.assert_array_equal(labels, sample.val_labels)
        np.testing.assert_array_equal(images[:, 0], sample.val_images / np.float32(256))
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
        assert len(sizes) == val.num_batches
        val.reset()


def test_held_out_images_are_a_fixed_sixth(sample):
    seen = []
    for seed in (0, 3):
        train, val = iterators(1667, seed=seed, validate_on='held-out')
        images, labels, _ = epoch_of(val)
        assert len(labels) == 4000 // 6
        trained, trained_labels, _ = epoch_of(train)
        assert len(trained) == 4000 - 4000 // 6
        assert sorted_pairs(
            as_bytes(np.concatenate([images, trained])), np.concatenate([labels, trained_labels])
        ) == sorted_pairs(sample.train_images, sample.train_labels)
        assert np.bincount(labels.astype(int)).min() > 40  # 67 expected of each class
        seen.append(images)
    np.testing.assert_array_equal(*seen)


def test_held_out_with_fewer_images_and_classes(sample):
    _, whole = iterators(100, validate_on='held-out')
    images, labels, _ = epoch_of(whole)
    train, val = iterators(10, validate_on='held-out', num_classes=3, num_examples=50)
    found, found_labels, _ = epoch_of(val)
    np.testing.assert_array_equal(found, images[labels < 3])
    np.testing.assert_array_equal(found_labels, labels[labels < 3])
    trained, trained_labels, _ = epoch_of(train)
    assert len(trained) == 50 and max(trained_labels) == 2
    held_out = {image.tobytes() for image in images}
    assert not held_out & {image.tobytes() for image in trained}


def test_log_says_what_is_validated_on(caplog):
    caplog.set_level(logging.INFO)
    iterators(100)
    iterators(100, validate_on='held-out')
    assert [record.getMessage().split(', from')[0] for record in caplog.records] == [
        'data: mnist-5k, 4000 training images, validation on 1000 test images',
        'data: mnist-5k, 3334 training images, validation on 666 held-out training images',
    ]


def test_flat_images_are_the_same_images():
    train, _ = iterators(50, (784,))
    assert train.provide_data[0].shape == (50, 784)
    np.testing.assert_array_equal(
        epoch_of(train)[0].reshape(-1, 1, 28, 28), epoch_of(iterators(50)[0])[0]
    )


def test_num_examples_are_the_first(sample):
    images, labels, _ = epoch_of(iterators(10, num_examples=30)[0])
    assert sorted_pairs(as_bytes(images), labels) == sorted_pairs(
        sample.train_images[:30], sample.train_labels[:30]
    )
    assert iterators(10, num_examples=10**9)[0].num_batches == 400


def test_num_classes_keeps_all_of_their_images(sample):
    train, val = iterators(100, num_classes=3)
    for iterator, images, labels in (
        (train, sample.train_images, sample.train_labels),
        (val, sample.val_images, sample.val_labels),
    ):
        found, found_labels, _ = epoch_of(iterator)
        assert sorted_pairs(as_bytes(found), found_labels) == sorted_pairs(
            images[labels < 3], labels[labels < 3]
        )
    some, _ = iterators(10, num_classes=3, num_examples=30)
    assert sorted(epoch_of(some)[1]) == sorted(sample.train_labels[sample.train_labels < 3][:30])


def test_incomplete_batch_is_left_out():
    assert epoch_of(iterators(300)[0])[2] == [300] * 13


@pytest.mark.parametrize(
    'options, message',
    [
        (
            {'batch_size': 4001},
            '--batch-size=4001 is too large: it takes more images than the 4000',
        ),
        ({'batch_size': 11, 'num_examples': 10}, 'than the 10 there are to train on'),
        ({'batch_size': 2001, 'num_parts': 2}, '2 workers take 4002, more images than the 4000'),
        ({'batch_size': 9, 'input_shape': (3, 28, 28)}, r'\(3, 28, 28\) does not hold 28 x 28 p'),
        ({'batch_size': 10, 'validate_on': 'train'}, '--validate-on=train is neither'),
    ],
)
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        iterators(**options)


def test_data_arguments():
    parser = argparse.ArgumentParser()
    data.add_data_arguments(parser)
    assert vars(parser.parse_args([])) == {'dataset': 'auto', 'data_dir': None}


def test_training_through_a_module():
    """Batches of two sizes and two labels pass through MXNet's own Module."""
    train, val = iterators(64, num_examples=640)
    flat = mx.sym.flatten(mx.sym.Variable('data'))
    output = mx.sym.SoftmaxOutput(mx.sym.FullyConnected(flat, num_hidden=10), name='softmax')
    network = mx.sym.Group(
        [output, mx.sym.BlockGrad(mx.sym.Variable('center_label', shape=(0,)), name='copy')]
    )
    module = mx.mod.Module(network, label_names=['softmax_label', 'center_label'])
    metric = mx.metric.Accuracy(output_names=['softmax_output'], label_names=['softmax_label'])
    module.fit(train, val, metric, num_epoch=2, optimizer_params={'learning_rate': 0.1})
    assert metric.num_inst == 1000
    assert module.score(val, metric)[0][1] > 0.5


# ---- DualLabelWrapper

VALUES = np.arange(130, dtype=np.float32)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A folder with 130 rows or images, number i of them with label i."""
    folder = tmp_path_factory.mktemp('iterators')
    np.savetxt(folder / 'data.csv', VALUES[:, None].repeat(4, 1), '%d', ',')
    np.savetxt(folder / 'label.csv', VALUES, '%d')
    records = mx.recordio.MXIndexedRecordIO(str(folder / 'idx'), str(folder / 'rec'), 'w')
    for number in range(130):
        png = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(png, 'png')
        header = mx.recordio.IRHeader(0, float(number), number, 0)
        records.write_idx(number, mx.recordio.pack(header, png.getvalue()))
    records.close()
    (folder / 'images').write_bytes(RAW[VAL_IMAGES])
    (folder / 'labels').write_bytes(RAW[VAL_LABELS])
    return folder


def nd_iterator(folder=None, **options):
    return mx.io.NDArrayIter(VALUES[:, None].repeat(4, 1), VALUES, 50, **options)


def csv_iterator(folder):
    try:
        return mx.io.CSVIter(
            data_csv=str(folder / 'data.csv'),
            data_shape=(4,),
            label_csv=str(folder / 'label.csv'),
            batch_size=50,
        )
    except mx.MXNetError as error:  # MXNet's own, seen once in a process that had done much else
        if 'bad_alloc' not in str(error):
            raise
        pytest.skip("MXNet's CSVIter cannot be made: std::bad_alloc")


def record_iterator(folder, batch_size=50, **options):
    return mx.io.ImageRecordIter(
        path_imgrec=str(folder / 'rec'),
        path_imgidx=str(folder / 'idx'),
        data_shape=(3, 8, 8),
        batch_size=batch_size,
        preprocess_threads=1,
        verbose=False,
        **options,
    )


def image_iterator(folder):
    return mx.image.ImageIter(
        50, (3, 8, 8), path_imgrec=str(folder / 'rec'), path_imgidx=str(folder / 'idx')
    )


@pytest.mark.parametrize(
    'make',
    [
        nd_iterator,
        lambda folder: nd_iterator(shuffle=True),
        lambda folder: mx.io.NDArrayIter(VALUES[:, None], VALUES[:, None], 50),
        lambda folder: mx.io.PrefetchingIter(nd_iterator()),
        lambda folder: mx.io.ResizeIter(nd_iterator(), 3),
        csv_iterator,
        lambda folder: mx.io.PrefetchingIter(csv_iterator(folder)),
        record_iterator,
        lambda folder: record_iterator(folder, shuffle=True),
        lambda folder: record_iterator(folder, 7),
        lambda folder: record_iterator(folder, 128),
        lambda folder: record_iterator(folder, 26),
        pytest.param(image_iterator, marks=pytest.mark.slow),
    ],
    ids=[
        'NDArrayIter',
        'shuffled NDArrayIter',
        'label of shape (N, 1)',
        'PrefetchingIter',
        'ResizeIter',
        'CSVIter',
        'prefetched CSVIter',
        'ImageRecordIter',
        'shuffled ImageRecordIter',
        'small batches',
        'nearly all in one batch',
        'no padding',
        'ImageIter',
    ],
)
def test_wrapped_iterator_counts_every_image_once(make, files):
    wrapped = DualLabelWrapper(make(files), num_classes=130)
    assert [desc.name for desc in wrapped.provide_label] == ['softmax_label', 'center_label']
    for epoch in range(4):
        images, labels, sizes = epoch_of(wrapped)
        assert sorted(labels) == VALUES.tolist(), epoch
        np.testing.assert_array_equal(images.reshape(130, -1)[:, 0], labels)
        assert max(sizes) <= wrapped.batch_size
        assert wrapped.provide_label[0].shape == (wrapped.batch_size,)
        wrapped.reset()


def test_wrapped_mnist_iterator(files, sample):
    """It drops the tail: 3 batches of 300 of 1000 images."""
    wrapped = DualLabelWrapper(
        mx.io.MNISTIter(
            image=str(files / 'images'),
            label=str(files / 'labels'),
            batch_size=300,
            shuffle=False,
            silent=True,
        )
    )
    for _ in range(3):
        images, labels, sizes = epoch_of(wrapped)
        assert sizes == [300] * 3
        np.testing.assert_array_equal(labels, sample.val_labels[:900])
        np.testing.assert_array_equal(images[:, 0], sample.val_images[:900] / np.float32(256))
        wrapped.reset()


@pytest.mark.parametrize('make', [nd_iterator, csv_iterator, record_iterator])
@pytest.mark.parametrize('num_batches', [0, 1, 3])
def test_wrapped_iterator_can_be_reset_early(num_batches, make, files):
    wrapped = DualLabelWrapper(make(files))
    for _ in range(3):
        wrapped.reset()
        for _ in range(num_batches):
            next(wrapped)
        wrapped.reset()
        assert sorted(epoch_of(wrapped)[1]) == VALUES.tolist()


@pytest.mark.parametrize('prefetch', [lambda iterator: iterator, mx.io.PrefetchingIter])
def test_wrapper_keeps_images_that_roll_over(prefetch):
    wrapped = DualLabelWrapper(prefetch(nd_iterator(last_batch_handle='roll_over')))
    counts = collections.Counter()
    for _ in range(5):
        labels = epoch_of(wrapped)[1]
        assert len(labels) in (100, 150)
        counts.update(labels.tolist())
        wrapped.reset()
    assert len(counts) == 130 and max(counts.values()) - min(counts.values()) <= 1


def test_iterator_with_plain_tuples():
    class Plain(mx.io.DataIter):
        provide_data = [('data', (50, 4))]  # noqa: RUF012  (as a user writes it)
        provide_label = [('label', (50, 1))]  # noqa: RUF012

        def next(self):
            return mx.io.DataBatch([mx.nd.zeros((50, 4))], [mx.nd.ones((50, 1))], pad=30)

    wrapped = DualLabelWrapper(Plain())
    assert [(desc.name, desc.shape) for desc in wrapped.provide_data] == [('data', (50, 4))]
    labels = [(desc.name, desc.shape, desc.dtype) for desc in wrapped.provide_label]
    assert labels == [(name, (50,), np.float32) for name in ('softmax_label', 'center_label')]
    assert [label.shape for label in next(wrapped).label] == [(20,), (20,)]


def test_batches_are_on_the_cpu():
    """Wherever MXNet's current context is: on another device, the write would go astray."""
    train, _ = iterators(50)
    with mx.Context('cpu', 1):
        batch = next(train)
    assert {array.context for array in [*batch.data, *batch.label]} == {mx.cpu()}


def test_wrapper_passes_num_batches_only_if_known():
    class Counted(mx.io.DataIter):
        num_batches = 3
        provide_data = (mx.io.DataDesc('data', (50, 4)),)
        provide_label = (mx.io.DataDesc('label', (50,)),)

        def start_epoch(self, epoch):
            self.epoch = epoch

    counted = Counted()
    wrapped = DualLabelWrapper(counted)
    wrapped.start_epoch(5)
    assert (wrapped.num_batches, counted.epoch, wrapped.batch_size) == (3, 5, 50)
    plain = DualLabelWrapper(nd_iterator())
    assert not hasattr(plain, 'num_batches') and not hasattr(plain, 'start_epoch')


@pytest.mark.parametrize('wrong', [130, -1, 0.5, np.nan])
def test_wrapper_refuses_labels_out_of_range(wrong):
    labels = VALUES.copy()
    labels[120] = wrong
    wrapped = DualLabelWrapper(mx.io.NDArrayIter(VALUES[:, None], labels, 50), num_classes=130)
    next(wrapped), next(wrapped)
    with pytest.raises(InputError, match=f'^label {wrong:g} is not a whole number from 0 to 129$'):
        next(wrapped)


def test_program_keeps_its_log(monkeypatch):
    """The root logger gets no handler, with which every line of ``fit`` would appear twice."""
    root = logging.getLogger()
    monkeypatch.setattr(root, 'handlers', [])
    iterators(50)
    assert root.handlers == []


def test_wrapper_ignores_labels_in_the_padding():
    """Only C++ iterators may have anything in there; here, the first images with a wrong label."""
    labels = VALUES.copy()
    labels[0] = 1000
    iterator = mx.io.NDArrayIter(VALUES[:, None], labels, 50)
    wrapped = DualLabelWrapper(iterator)
    assert sorted(epoch_of(wrapped)[1])[-1] == 1000
    iterator.reset()
    next(iterator)
    wrapped = DualLabelWrapper(iterator, num_classes=130)
    assert sum(len(batch.label[0]) for batch in wrapped) == 80


@pytest.mark.parametrize('label', [4, -1, 1.5, np.nan, 2.0000002, 1000001])
def test_label_that_is_no_class(label):
    images, labels = np.zeros((3, 2, 2), np.uint8), np.array([0, 3, label])
    with pytest.raises(InputError, match=f'^label {label} is not a whole number from 0 to 3$'):
        DualLabelIter(images, labels, (4,), lambda epoch: [np.arange(3)], num_classes=4)
    DualLabelIter(images, np.array([0, 3, 1], np.uint8), (4,), lambda epoch: [np.arange(3)], 4)


@pytest.mark.parametrize(
    'label',
    [None, VALUES[:, None].repeat(2, 1), {'a': VALUES, 'b': VALUES}],
    ids=['none', 'two numbers', 'two labels'],
)
def test_wrapper_needs_one_label(label):
    with pytest.raises(InputError, match='one label for each image is needed, not'):
        DualLabelWrapper(mx.io.NDArrayIter(VALUES[:, None], label, 50))


def test_module_scores_every_wrapped_image(files):
    """A Module rebinds itself for the last batch, and the metric counts 130 images, not 150."""
    symbol = mx.sym.SoftmaxOutput(
        mx.sym.FullyConnected(mx.sym.Variable('data'), num_hidden=130), name='softmax'
    )
    for make in (nd_iterator, csv_iterator, record_iterator):
        wrapped = DualLabelWrapper(make(files))
        module = mx.mod.Module(symbol)
        module.bind(wrapped.provide_data, wrapped.provide_label[:1], for_training=False)
        module.init_params()
        metric = mx.metric.Accuracy(label_names=['softmax_label'])
        for _ in range(3):
            module.score(wrapped, metric)
            assert metric.num_inst == 130


# ---- files


def write_set(folder, compress=True, files=RAW):
    folder.mkdir(exist_ok=True, parents=True)
    for file, raw in files.items():
        if compress:
            (folder / f'{file}.gz').write_bytes(gzip.compress(raw, 1))
        else:
            (folder / file).write_bytes(raw)
    return folder


def raw_images(count=3, shape=(28, 28), magic=b'\0\0\x08\x03', content=None):
    header = magic + np.array([count, *shape], '>u4').tobytes()
    return header + (bytes(count * int(np.prod(shape))) if content is None else content)


def raw_labels(labels):
    return b'\0\0\x08\x01' + np.array([len(labels)], '>u4').tobytes() + bytes(labels)


def custom_set(shape=(32, 32), num_classes=47, val_shape=None, labels=None, val_labels=None):
    """Two images of each class for training, one to test on, as raw files."""
    labels = [*range(num_classes)] * 2 if labels is None else labels
    val_labels = [*range(num_classes)] if val_labels is None else val_labels
    return {
        IMAGES: raw_images(2 * num_classes, shape),
        LABELS: raw_labels(labels),
        VAL_IMAGES: raw_images(num_classes, val_shape or shape),
        VAL_LABELS: raw_labels(val_labels),
    }


@pytest.mark.parametrize('dataset', ['auto', 'mnist-5k'])
@pytest.mark.parametrize('compress', [True, False])
def test_data_dir_is_read_raw_or_compressed(dataset, compress, tmp_path):
    digits = load_digits(dataset, write_set(tmp_path, compress))
    assert (digits.dataset, digits.source) == ('mnist-5k', str(tmp_path))
    for array, file in zip(digits[:4], FILES, strict=True):
        assert array.dtype == np.uint8 and RAW[file].endswith(array.tobytes())
    assert digits.train_images.shape == (4000, 28, 28) and digits.val_labels.shape == (1000,)
    assert np.bincount(digits.train_labels).tolist() == [400] * 10
    assert np.bincount(digits.val_labels).tolist() == [100] * 10


def test_names_of_files_do_not_decide_what_is_in_them(tmp_path):
    write_set(tmp_path)
    (tmp_path / f'{LABELS}.gz').write_bytes(RAW[LABELS])
    (tmp_path / f'{IMAGES}.gz').rename(tmp_path / IMAGES)
    assert load_digits('auto', tmp_path).dataset == 'mnist-5k'


def test_changed_file_is_another_data_set(tmp_path, caplog):
    changed = bytearray(RAW[IMAGES])
    changed[-1] ^= 1
    write_set(tmp_path, files={**RAW, IMAGES: bytes(changed)})
    assert load_digits('auto', tmp_path).dataset == 'custom'
    assert f'the files in {tmp_path} are of no data set known here' in caplog.text
    with pytest.raises(
        InputError,
        match=rf'{IMAGES}.gz is not of mnist-5k: its SHA-256 is [0-9a-f]{{64}}, not df907b1d',
    ):
        load_digits('mnist-5k', tmp_path)


@pytest.mark.parametrize('shape, num_classes', [((32, 32), 47), ((20, 31), 256), ((1, 1), 2)])
def test_own_data_of_any_size(shape, num_classes, tmp_path, caplog):
    write_set(tmp_path, files=custom_set(shape, num_classes))
    digits = load_digits('auto', tmp_path)
    assert digits.class_names == tuple(str(label) for label in range(num_classes))
    assert digits.train_images.shape == (2 * num_classes, *shape)
    assert f'images of {shape[0]} x {shape[1]} pixels, {num_classes} classes' in caplog.text
    train, val = mnist_iterator(2, data_dir=tmp_path)
    assert train.provide_data[0].shape == (2, 1, *shape)
    assert len(epoch_of(val)[0]) == num_classes
    with pytest.raises(InputError, match=f'does not hold {shape[0]} x {shape[1]} pixels'):
        mnist_iterator(2, (1, 28, 28), data_dir=tmp_path)


@pytest.mark.parametrize(
    'options, message',
    [
        ({'val_shape': (28, 32)}, 'images of 32 x 32 and of 28 x 32 pixels'),
        ({'val_labels': [0] * 46 + [47]}, f'label 47 at position 46 of {VAL_LABELS} is larger'),
        ({'labels': range(47)}, r'94 \+ 47 images do not fit 47 \+ 47 labels'),
        ({'val_labels': [1]}, r'94 \+ 47 images do not fit 94 \+ 1 labels'),
    ],
)
def test_own_data_that_do_not_fit_are_refused(options, message, tmp_path):
    write_set(tmp_path, files=custom_set(**options))
    with pytest.raises(InputError, match=f'{tmp_path}: {message}'):
        load_digits('auto', tmp_path)


def test_pixels_of_0_and_1_are_refused(tmp_path):
    files = custom_set((2, 2), 2)
    write_set(tmp_path, files={**files, IMAGES: raw_images(4, (2, 2), content=b'\0\1\1\0' * 4)})
    with pytest.raises(
        InputError, match='are from 0 to 1, not from 0 to 255: multiply them by 255'
    ):
        load_digits('auto', tmp_path)


def test_labels_are_no_images(tmp_path):
    write_set(tmp_path, files={**RAW, VAL_IMAGES: RAW[VAL_LABELS]})
    with pytest.raises(InputError, match='images need 3 dimensions'):
        load_digits('auto', tmp_path)


def test_too_few_images_to_hold_out(tmp_path):
    write_set(tmp_path, files=custom_set(num_classes=2))
    with pytest.raises(InputError, match='custom has no held-out training images'):
        mnist_iterator(1, data_dir=tmp_path, validate_on='held-out')
    with pytest.raises(InputError, match=r'custom has no test images of the classes 0$'):
        write_set(tmp_path, files=custom_set(num_classes=2, val_labels=[1, 1]))
        mnist_iterator(1, data_dir=tmp_path, num_classes=1)


def test_missing_file_is_named(tmp_path):
    write_set(tmp_path)
    (tmp_path / f'{LABELS}.gz').unlink()
    with pytest.raises(InputError, match=f'{tmp_path}/{LABELS}: No such file'):
        load_digits('auto', tmp_path)


def test_unknown_data_set_is_named(tmp_path):
    with pytest.raises(InputError, match='--dataset=svhn is not one of auto, mnist, '):
        load_digits('svhn')


def test_data_dir_of_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    write_set(tmp_path / 'x')
    assert load_digits('auto', '~/x').source == str(tmp_path / 'x')
    with pytest.raises(InputError, match=r'~nobody-of-that-name/x/.*No such file'):
        load_digits('auto', '~nobody-of-that-name/x')


def test_data_dir_that_is_not_utf8(tmp_path, caplog):
    folder = write_set(tmp_path / os.fsdecode(b'caf\xe9'), files=custom_set())
    digits = load_digits('auto', folder)
    assert digits.source == rf'{tmp_path}/caf\xe9'
    assert r'caf\xe9' in caplog.text
    (folder / f'{LABELS}.gz').write_bytes(b'damaged')
    with pytest.raises(InputError) as error:
        load_digits('auto', folder)
    for text in (caplog.text, str(error.value)):
        text.encode()  # a log file takes it


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'not an IDX file of bytes: it begins with nothing, not with 00 00 08 01'),
        (b'\0\0\x08', 'begins with 00 00 08, not with'),
        (raw_images(magic=b'\0\0\x08\x04'), 'begins with 00 00 08 04'),
        (raw_images(magic=b'\0\0\x08\x00'), 'begins with 00 00 08 00'),
        (raw_images(magic=b'\0\0\x0d\x03'), 'begins with 00 00 0d 03'),
        (raw_images()[:10], 'its header is truncated'),
        (raw_images(0), 'its header announces (0, 28, 28)'),
        (raw_images(3, (28, 0)), 'its header announces (3, 28, 0)'),
        (raw_images(2**32 - 1, content=b'x'), 'its header announces (4294967295, 28, 28)'),
        (raw_images(1369569, content=b'x'), 'announces (1369569, 28, 28): not from 1 byte to 1 G'),
        (raw_images()[:-1], 'its size is 2367 bytes, its header announces 2368'),
        (raw_images(1_000_000, content=b'x'), 'its size is 17 bytes, its header announces 784000'),
        (raw_images() + b'x', 'its size is 2369 bytes, its header announces 2368'),
    ],
)
@pytest.mark.parametrize('compress', [False, True], ids=['raw', 'gzip'])
def test_faulty_file_is_refused(content, message, compress, tmp_path):
    path = tmp_path / 'images'
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(InputError, match=re.escape(message)) as error:
        read_idx(path)
    assert str(error.value).startswith(f'{path}: ')


# Of a fixed time and content, so that every process of pytest-xdist names the cases alike.
PACKED = gzip.compress(raw_images(), mtime=0)
RANDOM = gzip.compress(raw_images(content=np.random.default_rng(0).bytes(2352)), mtime=0)


@pytest.mark.parametrize(
    'content, message',
    [
        (PACKED[:-9], 'damaged: its size'),
        (RANDOM[:1000], 'damaged: its size'),
        (PACKED[:-8] + bytes(8), 'damaged: its size is 0 bytes'),
        (PACKED[:-8] + bytes(4) + b'\x40\t\0\0', 'CRC check failed'),
        (PACKED[:10] + b'\xff' * 36 + b'\x40\t\0\0', 'invalid block type'),
        (gzip.compress(raw_images()[:999], mtime=0) + b'\x40\t\0\0', 'Not a gzipped file'),
        (PACKED * 2, 'damaged: its size is not what'),
        (b'\x1f\x8b', 'Invalid argument'),
        (b'\x1f\x8b\x08\0\0\0', 'ended before the end'),
    ],
)
def test_damaged_gzip_file_is_refused(content, message, tmp_path):
    path = tmp_path / 'images.gz'
    path.write_bytes(content)
    with pytest.raises(InputError, match=f'{path}: .*{message}'):
        read_idx(path)


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / 'socket'))
    (tmp_path / 'loop').symlink_to('loop')
    (tmp_path / 'zero').symlink_to('/dev/zero')
    for name in ('', 'pipe', 'socket', 'zero'):
        with pytest.raises(InputError, match='not a regular file'):
            read_idx(tmp_path / name)
    server.close()
    with pytest.raises(InputError, match='loop: Too many levels of symbolic links'):
        read_idx(tmp_path / 'loop')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_unreadable_file_is_refused(tmp_path):
    path = tmp_path / 'images'
    path.write_bytes(raw_images())
    path.chmod(0)
    with pytest.raises(InputError, match='images: Permission denied'):
        read_idx(path)


BOMB = """
import re, sys, time
sys.path.insert(0, '.')
from pathlib import Path
from common.errors import InputError
from common.idx import read_idx
def peak():  # kB, of this process alone: ru_maxrss begins with that of the one it was forked from
    return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])
before, begin = peak(), time.monotonic()
try:
    read_idx(Path(sys.argv[1]))
except InputError as error:
    print(error)
print(peak() - before, time.monotonic() - begin)
"""


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['zeros', 'three images', 'million images', 'raw', 'over 1 GiB'])
def test_large_file_is_refused_at_once(kind, tmp_path):
    """Zeros that a header does not announce are neither inflated nor read."""
    path = tmp_path / 'images'
    header = {'three images': raw_images(3), 'zeros': b''}.get(
        kind, raw_images(1_000_000, content=b'')
    )
    if kind in ('raw', 'over 1 GiB'):
        count = 999_999 if kind == 'raw' else 2_000_000
        path.write_bytes(raw_images(count, content=b''))
        os.truncate(path, 784_000_016 if kind == 'raw' else 16 + 784 * count)
    else:
        with gzip.open(path, 'wb', 1) as file:
            file.write(header)
            for _ in range(256):
                file.write(bytes(1 << 20))
    result = subprocess.run(
        [sys.executable, '-c', BOMB, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    message, numbers = result.stdout.splitlines()
    memory, seconds = map(float, numbers.split())
    assert message.startswith(f'{path}: ')
    assert memory < 20_000 and seconds < 2  # kB


def test_read_uses_the_memory_of_the_array_alone(tmp_path):
    path = tmp_path / 'images'
    path.write_bytes(raw_images(50_000, content=b''))
    os.truncate(path, 16 + 50_000 * 784)
    result = subprocess.run(
        [sys.executable, '-c', BOMB, path], cwd=ROOT, capture_output=True, text=True, check=True
    )
    memory, _ = map(float, result.stdout.split())  # kB
    assert 0.9 < memory / (50_000 * 784 / 1024) < 1.3


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(1, 5),
    edits=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6),
    cut=st.integers(-20, 4000),
    compress=st.booleans(),
    damage=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=3),
)
def test_any_file_is_read_or_refused(count, edits, cut, compress, damage, tmp_path):
    content = bytearray(raw_images(count))
    for position, value in edits:
        content[position % len(content)] = value
    content = content[: len(content) - cut] if cut >= 0 else content + bytes(-cut)
    if compress:
        content = bytearray(gzip.compress(bytes(content)))
    for position, value in damage if content else ():
        content[position % len(content)] = value
    path = tmp_path / 'fuzz'
    path.write_bytes(content)
    try:
        array, digest = read_idx(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert array.dtype == np.uint8 and 1 <= array.ndim <= 3 and array.size
        assert len(digest) == 64


@pytest.mark.slow
def test_fuzzer_finds_nothing():
    """A few of what tests/stress/fuzz_data.py does many times."""
    result = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'stress' / 'fuzz_data.py', '--files', '500'],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert '500 files' in result.stdout


def test_iterator_of_own_arrays():
    images = np.arange(4 * 6, dtype=np.uint8).reshape(4, 2, 3)
    iterator = DualLabelIter(images, np.arange(4), (6,), lambda epoch: [np.array([3, epoch])])
    iterator.start_epoch(2)
    batch = next(iterator)
    assert batch.label[0].asnumpy().tolist() == [3, 2]
    np.testing.assert_array_equal(batch.data[0].asnumpy() * 256, images[[3, 2]].reshape(2, 6))


def test_facts_of_oblong_images(tmp_path):
    write_set(tmp_path, files=custom_set((20, 31), 5))
    assert mnist_iterator(2, data_dir=tmp_path)[0].data_facts['image_shape'] == [20, 31]
