"""Where digits come from, what is refused, and what the iterators hand out."""

import contextlib
import gzip
import http.server
import logging
import multiprocessing
import os
import re
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from data import FILES, DataError, load_digits, mnist_iterator, read_idx

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / 'data' / 'mnist-5k'
RAW = {file: gzip.decompress((SAMPLE / f'{file}.gz').read_bytes()) for file in FILES}
IMAGES, LABELS = FILES[:2]


def iterators(*arguments, **options):
    return mnist_iterator(*arguments, dataset='mnist-5k', **options)


def epoch_of(iterator):
    """Every batch until the end: images (N, ...), labels (N,), sizes of the batches. Checks what each batch says of itself."""
    images, labels, sizes = [], [], []
    for batch in iterator:
        (image,), (softmax_label, center_label) = batch.data, batch.label
        assert [(desc.name, desc.shape) for desc in batch.provide_data] == [('data', image.shape)]
        assert [(desc.name, desc.shape) for desc in batch.provide_label] == [
            ('softmax_label', softmax_label.shape),
            ('center_label', center_label.shape),
        ]
        assert image.dtype == softmax_label.dtype == center_label.dtype == np.float32
        assert batch.pad == 0
        np.testing.assert_array_equal(softmax_label.asnumpy(), center_label.asnumpy())
        images.append(image.asnumpy())
        labels.append(softmax_label.asnumpy())
        sizes.append(len(image))
    return np.concatenate(images), np.concatenate(labels), sizes


def sorted_pairs(images, labels):
    """Images with their labels as rows in a canonical order, to compare sets of them."""
    return sorted(zip((image.tobytes() for image in images), labels.tolist()))


# ---- the iterators


def test_an_epoch_is_every_training_image_once_with_its_label():
    train, _ = iterators(100)
    sample = load_digits('mnist-5k')
    images, labels, sizes = epoch_of(train)
    assert sizes == [100] * 40 and train.num_batches == 40
    assert images.shape == (4000, 1, 28, 28)
    assert sorted_pairs((images * 256).astype(np.uint8), labels) == sorted_pairs(
        sample.train_images[:, None], sample.train_labels
    )


def test_pixels_are_the_bytes_over_256():
    images = epoch_of(iterators(100)[1])[0]
    assert images.min() == 0 and images.max() == 255 / 256
    np.testing.assert_array_equal(
        images[:, 0], load_digits('mnist-5k').val_images / np.float32(256)
    )


def test_every_epoch_has_an_order_of_its_own_that_the_seed_decides():
    first, second, other = (
        iterators(100, seed=1)[0],
        iterators(100, seed=1)[0],
        iterators(100, seed=2)[0],
    )
    orders = []
    for _ in range(2):
        (a, _, _), (b, _, _), (c, _, _) = epoch_of(first), epoch_of(second), epoch_of(other)
        np.testing.assert_array_equal(a, b)
        assert (a != c).any()
        orders.append(a)
        for iterator in (first, second, other):
            iterator.reset()
    assert (orders[0] != orders[1]).any()


def test_a_run_continued_at_an_epoch_sees_what_an_unbroken_one_sees():
    unbroken = iterators(64)[0]
    for epoch in range(3):
        continued = iterators(64, first_epoch=epoch)[0]
        for part, expected in zip(epoch_of(continued)[:2], epoch_of(unbroken)[:2]):
            np.testing.assert_array_equal(part, expected)
        unbroken.reset()


@pytest.mark.parametrize('workers', [2, 3])
def test_workers_share_every_total_batch_of_the_one_that_works_alone(workers):
    alone = epoch_of(iterators(30 * workers, seed=4)[0])
    parts = [
        iterators(30, seed=4, num_parts=workers, part_index=index)[0] for index in range(workers)
    ]
    assert {part.num_batches for part in parts} == {4000 // (30 * workers)}
    for number, batches in enumerate(zip(*parts)):
        together = slice(number * 30 * workers, (number + 1) * 30 * workers)
        np.testing.assert_array_equal(
            np.concatenate([batch.data[0].asnumpy() for batch in batches]), alone[0][together]
        )
        np.testing.assert_array_equal(
            np.concatenate([batch.label[0].asnumpy() for batch in batches]), alone[1][together]
        )


@pytest.mark.parametrize('batch_size', [1, 7, 128, 999, 1000, 1001, 4000])
def test_validation_is_every_image_once_at_any_batch_size(batch_size):
    val = iterators(batch_size)[1]
    sample = load_digits('mnist-5k')
    for _ in range(2):
        images, labels, sizes = epoch_of(val)
        np.testing.assert_array_equal(labels, sample.val_labels)
        np.testing.assert_array_equal(images[:, 0], sample.val_images / np.float32(256))
        assert (
            max(sizes) <= batch_size
            and max(sizes) - min(sizes) <= 1
            and len(sizes) == val.num_batches
        )
        val.reset()


def test_flat_images_are_the_same_images():
    train, _ = iterators(50, (784,))
    assert train.provide_data[0].shape == (50, 784)
    np.testing.assert_array_equal(
        epoch_of(train)[0].reshape(-1, 1, 28, 28), epoch_of(iterators(50)[0])[0]
    )


def test_num_examples_are_the_first_ones():
    sample = load_digits('mnist-5k')
    images, labels, _ = epoch_of(iterators(10, num_examples=30)[0])
    assert sorted_pairs((images * 256).astype(np.uint8), labels) == sorted_pairs(
        sample.train_images[:30, None], sample.train_labels[:30]
    )
    assert iterators(10, num_examples=10**9)[0].num_batches == 400


def test_some_classes_are_all_of_their_images_in_both_splits():
    sample = load_digits('mnist-5k')
    train, val = iterators(100, num_classes=3)
    for iterator, images, labels in (
        (train, sample.train_images, sample.train_labels),
        (val, sample.val_images, sample.val_labels),
    ):
        found, found_labels, _ = epoch_of(iterator)
        assert sorted_pairs((found * 256).astype(np.uint8), found_labels) == sorted_pairs(
            images[labels < 3][:, None], labels[labels < 3]
        )
    some, _ = iterators(10, num_classes=3, num_examples=30)
    assert sorted(epoch_of(some)[1]) == sorted(sample.train_labels[sample.train_labels < 3][:30])


def test_the_tail_that_fills_no_batch_is_left_out_of_the_epoch():
    train, _ = iterators(300)
    assert epoch_of(train)[2] == [300] * 13


@pytest.mark.parametrize(
    'options, said',
    [
        (
            {'batch_size': 4001},
            '--batch-size=4001 is too large: it takes more images than the 4000',
        ),
        ({'batch_size': 11, 'num_examples': 10}, 'the 10 there are'),
        ({'batch_size': 2001, 'num_parts': 2}, '2 workers take 4002 images than the 4000'),
        ({'batch_size': 10, 'input_shape': (3, 28, 28)}, r'input shape \(3, 28, 28\)'),
    ],
)
def test_what_cannot_be_batched_is_told(options, said):
    with pytest.raises(DataError, match=said):
        iterators(**options)


# ---- files


def write_set(folder, compress=True, files=RAW):
    folder.mkdir(exist_ok=True, parents=True)
    for file, raw in files.items():
        if compress:
            (folder / f'{file}.gz').write_bytes(gzip.compress(raw, 1))
        else:
            (folder / file).write_bytes(raw)
    return folder


@pytest.mark.parametrize('dataset', ['auto', 'mnist-5k'])
@pytest.mark.parametrize('compress', [True, False])
def test_a_data_dir_is_read_compressed_or_not(dataset, compress, tmp_path):
    digits = load_digits(dataset, write_set(tmp_path, compress))
    assert (digits.dataset, digits.source) == ('mnist-5k', str(tmp_path))
    for array, file in zip(digits, FILES):
        assert array.dtype == np.uint8 and RAW[file].endswith(array.tobytes())
    assert digits.train_images.shape == (4000, 28, 28) and digits.val_labels.shape == (1000,)
    assert (
        np.bincount(digits.train_labels).tolist() == [400] * 10
        and np.bincount(digits.val_labels).tolist() == [100] * 10
    )


def test_digits_of_ones_own_are_taken_as_they_are_and_said_to_be_unknown(tmp_path, caplog):
    changed = bytearray(RAW[IMAGES])
    changed[-1] ^= 1
    write_set(tmp_path, files={**RAW, IMAGES: bytes(changed)})
    assert load_digits('auto', tmp_path).dataset == 'custom'
    assert f'the files in {tmp_path} are of no data set known here' in caplog.text
    with pytest.raises(
        DataError,
        match=rf'{IMAGES}.gz is not the file of mnist-5k: its SHA-256 is [0-9a-f]{{64}}, not df907b1d',
    ):
        load_digits('mnist-5k', tmp_path)


def test_a_folder_that_lacks_a_file_is_told(tmp_path):
    write_set(tmp_path)
    (tmp_path / f'{LABELS}.gz').unlink()
    with pytest.raises(DataError, match=f'{tmp_path} has no {LABELS} and no {LABELS}.gz'):
        load_digits('auto', tmp_path)


def raw_images(count=3, shape=(28, 28), magic=b'\0\0\x08\x03', content=None):
    header = magic + np.array([count, *shape], '>u4').tobytes()
    return header + (bytes(count * int(np.prod(shape))) if content is None else content)


@pytest.mark.parametrize(
    'content, said',
    [
        (b'', 'begins with nothing, not with 00 00 08 03'),
        (b'\0\0\x08', 'begins with 00 00 08, not with'),
        (
            raw_images(magic=b'\0\0\x08\x01'),
            'not an IDX file of images: it begins with 00 00 08 01',
        ),
        (raw_images(magic=b'\0\0\x0d\x03'), 'begins with 00 00 0d 03'),
        (gzip.compress(raw_images()), 'begins with 1f 8b'),
        (raw_images()[:10], 'is truncated: its header has 10 of 16 bytes'),
        (raw_images(shape=(32, 32)), 'images of 32 x 32 pixels, not of 28 x 28'),
        (raw_images(0), 'announces 0 items: it has to be from 1 to 1000000'),
        (raw_images(2**32 - 1, content=b'x'), 'announces 4294967295 items'),
        (raw_images()[:-1], 'announces 2352 bytes and has only 2351'),
        (raw_images(1_000_000, content=b'x'), 'announces 784000000 bytes and has only 1'),
        (raw_images() + b'x', 'announces 2352 bytes and goes on after them'),
    ],
)
@pytest.mark.parametrize('compress', [False, True])
def test_a_file_that_is_not_right_is_told(content, said, compress, tmp_path):
    path = tmp_path / ('images.gz' if compress else 'images')
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(DataError, match=re.escape(said)) as error:
        read_idx(path, (28, 28))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    'content, said',
    [
        (raw_images(), 'not a gzip file'),
        (b'', 'begins with nothing'),
        (gzip.compress(raw_images())[:-9], 'is damaged'),
        (gzip.compress(raw_images(content=os.urandom(2352)))[:1000], 'is damaged'),
        (gzip.compress(raw_images())[:-8] + bytes(8), 'not a gzip file, or a damaged one'),
        (gzip.compress(raw_images())[:10] + b'\xff' * 40, 'is damaged'),
    ],
    ids=['raw', 'empty', 'no end', 'half', 'wrong checksum', 'invalid'],
)
def test_a_damaged_gzip_file_is_told(content, said, tmp_path):
    path = tmp_path / 'images.gz'
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_idx(path, (28, 28))


def test_what_is_no_file_is_told(tmp_path):
    with pytest.raises(DataError, match='is not a file'):
        read_idx(tmp_path, (28, 28))
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(DataError, match='is not a file'):
        read_idx(tmp_path / 'pipe', (28, 28))


def test_a_file_without_permission_is_told(tmp_path):
    path = tmp_path / 'images'
    path.write_bytes(raw_images())
    path.chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(DataError, match='images cannot be read: Permission denied'):
            read_idx(path, (28, 28))
    finally:
        os.seteuid(user)


def test_labels_that_do_not_belong_are_told(tmp_path):
    too_few = RAW[LABELS][:4] + np.array([3999], '>u4').tobytes() + RAW[LABELS][8:-1]
    with pytest.raises(DataError, match=f'3999 labels in {LABELS} do not belong to 4000 images'):
        load_digits('auto', write_set(tmp_path / 'few', files={**RAW, LABELS: too_few}))
    wrong = bytearray(RAW[LABELS])
    wrong[8 + 17] = 10
    with pytest.raises(
        DataError, match=f'label 10 at position 17 of {LABELS} is not a class from 0 to 9'
    ):
        load_digits('auto', write_set(tmp_path / 'wrong', files={**RAW, LABELS: bytes(wrong)}))


def test_a_gzip_bomb_is_not_inflated(tmp_path):
    """A gigabyte of zeros behind a header for three images: memory stays where it was."""
    bomb = tmp_path / 'bomb.gz'
    with gzip.open(bomb, 'wb', 1) as file:
        file.write(raw_images())
        for _ in range(1024):
            file.write(bytes(1 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match='goes on after them'):
        read_idx(bomb, (28, 28))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


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
def test_whatever_a_file_holds_it_is_read_or_told(count, edits, cut, compress, damage, tmp_path):
    content = bytearray(raw_images(count))
    for position, value in edits:
        content[position % len(content)] = value
    content = content[: len(content) - cut] if cut >= 0 else content + bytes(-cut)
    if compress:
        content = bytearray(gzip.compress(bytes(content)))
    for position, value in damage if content else ():
        content[position % len(content)] = value
    path = tmp_path / ('fuzz.gz' if compress else 'fuzz')
    path.write_bytes(content)
    try:
        array, digest = read_idx(path, (28, 28))
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert array.dtype == np.uint8 and array.shape[1:] == (28, 28) and len(digest) == 64


# ---- where they come from


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    """A machine without MNIST: an empty download folder beside the embedded digits, no Debian package, no mirror."""
    folder = tmp_path / 'data'
    folder.mkdir()
    (folder / 'mnist-5k').symlink_to(SAMPLE)
    monkeypatch.setattr(data, 'FOLDER', folder)
    monkeypatch.setattr(data, 'DEBIAN_FOLDERS', {'fashion-mnist': tmp_path / 'debian'})
    monkeypatch.setattr(data, 'STALL_SECONDS', 1)
    monkeypatch.setattr(data, 'RESPONSE_SECONDS', 1)
    offer(monkeypatch)
    return folder


def offer(monkeypatch, *mirrors):
    """Let the embedded digits stand for MNIST and Fashion-MNIST, to be had from these mirrors."""
    known = dict(data.DATASETS)
    for name in ('mnist', 'fashion-mnist'):
        known[name] = known['mnist-5k']._replace(
            mirrors=mirrors, class_names=known[name].class_names
        )
    monkeypatch.setattr(data, 'DATASETS', known)


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves the four files from memory. ``server.manner`` decides how well; ``server.requests`` notes (path, Range) of every request."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        manner, name = self.server.manner, self.path.rsplit('/', 1)[-1]
        self.server.requests.append((name, self.headers['Range']))
        body = self.server.files.get(name)
        if manner == 'hang':
            self.server.closing.wait(30)
            self.close_connection = True
            return
        if manner == '404' or body is None:
            self.send_error(404)
            return
        if manner == 'redirect':
            self.send_response(302)
            self.send_header('Location', f'http://mirror.example/{name}')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        if manner == 'wrong bytes':
            body = gzip.compress(b'these are no digits')
        start = 0
        if self.headers['Range'] and manner != 'no ranges':
            start = int(re.fullmatch(r'bytes=(\d+)-', self.headers['Range'])[1])
            if start >= len(body):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header('Content-Length', str(len(body) - start))
        self.end_headers()
        part = body[start:]
        if manner == 'truncate' and name.startswith(IMAGES):
            part = part[: len(part) // 2]
            self.close_connection = True
        self.wfile.write(part)
        if manner == 'stall':
            self.server.closing.wait(30)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(manner='whole'):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Mirror)
    server.daemon_threads = True
    server.manner, server.requests, server.closing = manner, [], threading.Event()
    server.files = {f'{file}.gz': (SAMPLE / f'{file}.gz').read_bytes() for file in FILES}
    server.url = f'http://127.0.0.1:{server.server_port}/mnist/'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


WHOLE = sorted(f'{file}.gz' for file in FILES)


@pytest.mark.parametrize('dataset', ['auto', 'mnist', 'fashion-mnist'])
def test_a_download_is_checked_kept_and_not_repeated(dataset, empty_machine, monkeypatch):
    with serving() as server:
        offer(monkeypatch, server.url)
        digits = load_digits(dataset)
        name = 'mnist' if dataset == 'auto' else dataset
        assert (digits.dataset, len(digits.train_images)) == (name, 4000)
        assert digits.class_names == data.DATASETS[name].class_names
        assert files_in(empty_machine / name) == WHOLE
        assert [request for request, _ in server.requests] == [f'{file}.gz' for file in FILES]
        assert load_digits(dataset).dataset == name
        assert len(server.requests) == 4
    assert load_digits(dataset).source == str(empty_machine / name)


def test_the_second_mirror_is_asked_when_the_first_has_nothing(empty_machine, monkeypatch):
    with serving('404') as first, serving() as second:
        offer(monkeypatch, first.url, second.url)
        assert load_digits('mnist').dataset == 'mnist'
        assert len(first.requests) == 1 and len(second.requests) == 4


@pytest.mark.parametrize(
    'manner, said',
    [
        ('404', '404 Not Found'),
        ('wrong bytes', 'what it sends is not train-images-idx3-ubyte'),
        ('hang', 'no answer in 1 s'),
        ('stall', 'no answer in 1 s'),
        ('truncate', 'the connection broke off'),
        ('redirect', 'http://mirror.example/.* is not an https address'),
    ],
)
def test_what_a_bad_mirror_does_is_told_and_leaves_no_data(
    manner, said, empty_machine, monkeypatch
):
    with serving(manner) as server:
        offer(monkeypatch, server.url)
        if manner == 'stall':
            server.files = {name: body[:-1] for name, body in server.files.items()}
            original = Mirror.send_header
            monkeypatch.setattr(
                Mirror,
                'send_header',
                lambda self, key, value: original(
                    self, key, str(int(value) + 1) if key == 'Content-Length' else value
                ),
            )
        begin = time.monotonic()
        with pytest.raises(DataError, match=f'--dataset=mnist cannot be had .*{said}.*--data-dir'):
            load_digits('mnist')
        assert time.monotonic() - begin < 8
    assert not set(
        files_in(empty_machine / 'mnist') if (empty_machine / 'mnist').exists() else []
    ) & set(WHOLE + list(FILES))


def test_a_second_try_continues_where_the_first_broke_off(empty_machine, monkeypatch):
    with serving('truncate') as server:
        offer(monkeypatch, server.url)
        with pytest.raises(DataError):
            load_digits('mnist')
        part = empty_machine / 'mnist' / f'{IMAGES}.part.gz'
        received = part.stat().st_size
        assert received == len(server.files[f'{IMAGES}.gz']) // 2
        server.manner = 'whole'
        assert load_digits('mnist').dataset == 'mnist'
        assert server.requests[1] == (f'{IMAGES}.gz', f'bytes={received}-')
    assert files_in(empty_machine / 'mnist') == WHOLE


@pytest.mark.parametrize(
    'left, manner',
    [('too long', 'whole'), ('of another file', 'whole'), ('its beginning', 'no ranges')],
)
def test_a_part_that_cannot_be_continued_is_begun_afresh(left, manner, empty_machine, monkeypatch):
    with serving(manner) as server:
        offer(monkeypatch, server.url)
        body = server.files[f'{IMAGES}.gz']
        (empty_machine / 'mnist').mkdir()
        (empty_machine / 'mnist' / f'{IMAGES}.part.gz').write_bytes(
            {
                'too long': body + b'more',
                'of another file': bytes(1000),
                'its beginning': body[:1000],
            }[left]
        )
        assert load_digits('mnist').dataset == 'mnist'
    assert files_in(empty_machine / 'mnist') == WHOLE


@pytest.mark.parametrize('length, comes', [('many', True), ('7, 8', False), ('-5', True)])
def test_a_length_that_is_no_number_does_no_harm(length, comes, empty_machine, monkeypatch):
    original = Mirror.send_header
    monkeypatch.setattr(Mirror, 'protocol_version', 'HTTP/1.0')
    monkeypatch.setattr(
        Mirror,
        'send_header',
        lambda self, key, value: original(self, key, length if key == 'Content-Length' else value),
    )
    with serving() as server:
        offer(monkeypatch, server.url)
        assert load_digits('auto').dataset == ('mnist' if comes else 'mnist-5k')


def test_more_than_any_file_has_is_not_taken(empty_machine, monkeypatch):
    monkeypatch.setattr(data, 'MAX_DOWNLOAD', 10_000)
    with serving() as server:
        offer(monkeypatch, server.url)
        with pytest.raises(DataError, match='it sends more than 10000 bytes'):
            load_digits('mnist')
    assert sum(path.stat().st_size for path in (empty_machine / 'mnist').iterdir()) == 0


@pytest.mark.parametrize('compress', [True, False])
def test_a_damaged_file_in_the_download_folder_is_told_and_fetched_anew(
    compress, empty_machine, monkeypatch, caplog
):
    write_set(empty_machine / 'mnist', compress)
    name = f'{LABELS}.gz' if compress else LABELS
    (empty_machine / 'mnist' / name).write_bytes(b'damaged')
    with serving() as server:
        offer(monkeypatch, server.url)
        assert load_digits('mnist').dataset == 'mnist'
        assert [request for request, _ in server.requests] == [f'{LABELS}.gz']
    assert f'mnist/{name} ' in caplog.text


def fetch(folder, url, results):
    """What one of two processes does."""
    data.FOLDER = folder
    data.DATASETS = {**data.DATASETS, 'mnist': data.DATASETS['mnist-5k']._replace(mirrors=(url,))}
    results.put(load_digits('mnist').dataset)


def test_two_processes_that_download_at_once_do_not_disturb_each_other(empty_machine):
    context = multiprocessing.get_context('spawn')
    results = context.Queue()
    with serving() as server:
        both = [
            context.Process(target=fetch, args=(empty_machine, server.url, results))
            for _ in range(2)
        ]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [0, 0]
        assert [results.get(timeout=5) for _ in both] == ['mnist', 'mnist']
        assert len(server.requests) == 4
    assert files_in(empty_machine / 'mnist') == WHOLE


def test_the_proxy_of_the_environment_is_asked(empty_machine, monkeypatch):
    with serving() as proxy:
        offer(monkeypatch, 'http://localhost:9/mnist/')
        monkeypatch.setenv('http_proxy', proxy.url)
        monkeypatch.setenv('no_proxy', '')
        assert load_digits('mnist').dataset == 'mnist'
        assert len(proxy.requests) == 4


def test_plain_http_is_refused_but_on_this_machine(empty_machine, monkeypatch):
    offer(monkeypatch, 'http://mirror.example/mnist/')
    with pytest.raises(
        DataError,
        match='http://mirror.example/mnist/train-images-idx3-ubyte.gz is not an https address',
    ):
        load_digits('mnist')


def test_the_mirrors_are_https_addresses():
    for name in ('mnist', 'fashion-mnist'):
        assert len(data.DATASETS[name].mirrors) >= 2
        assert all(re.fullmatch(r'https://\S+/', mirror) for mirror in data.DATASETS[name].mirrors)
        assert (
            len(set(data.DATASETS[name].sha256)) == 4 and len(data.DATASETS[name].class_names) == 10
        )


def test_debians_package_is_used_before_a_download(empty_machine, monkeypatch):
    write_set(data.DEBIAN_FOLDERS['fashion-mnist'])
    with serving() as server:
        offer(monkeypatch, server.url)
        digits = load_digits('fashion-mnist')
        assert (digits.dataset, digits.source) == (
            'fashion-mnist',
            str(data.DEBIAN_FOLDERS['fashion-mnist']),
        )
        assert digits.class_names[9] == 'Ankle boot'
        assert server.requests == []


def test_auto_falls_back_on_the_embedded_digits_and_says_so(empty_machine, monkeypatch, caplog):
    with serving('404') as server:
        offer(monkeypatch, server.url)
        digits = load_digits('auto')
    assert digits.dataset == 'mnist-5k' and len(digits.train_images) == 4000
    (warning,) = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert (
        'going on with mnist-5k' in warning
        and '404 Not Found' in warning
        and '--data-dir' in warning
    )


@pytest.mark.parametrize('dataset', ['mnist', 'fashion-mnist'])
def test_a_data_set_that_was_asked_for_is_never_replaced(dataset, empty_machine):
    with pytest.raises(
        DataError,
        match=f'--dataset={dataset} cannot be had .*: put its four files .* into {empty_machine / dataset}',
    ):
        load_digits(dataset)
    assert 'mnist' not in files_in(empty_machine)


def test_with_mirrors_that_never_answer_the_fall_back_takes_less_than_20_seconds(
    empty_machine, monkeypatch
):
    monkeypatch.undo()  # the time-outs as users have them
    with serving('hang') as first, serving('hang') as second:
        monkeypatch.setattr(data, 'FOLDER', empty_machine)
        offer(monkeypatch, first.url, second.url)
        begin = time.monotonic()
        assert load_digits('auto').dataset == 'mnist-5k'
        assert time.monotonic() - begin < 20


def test_the_readers_fuzzer_finds_nothing_in_a_few_hundred_files():
    """A few of what tests/fuzz_data.py does many times."""
    result = subprocess.run(
        [sys.executable, ROOT / 'tests' / 'fuzz_data.py', '--files', '500'],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r'500 files', result.stdout)
