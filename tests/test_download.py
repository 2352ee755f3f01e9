"""Downloads from servers on this machine, good and bad ones."""

import contextlib
import functools
import gzip
import http.server
import logging
import multiprocessing
import os
from pathlib import Path
import re
import socket
import socketserver
import threading
import time

import pytest

from common import download as download_module
from common.errors import InputError
import data
from data import FILES, load_digits, load_digits_of_run

SAMPLE = Path(__file__).resolve().parent.parent / 'data' / 'mnist-5k'
BODIES = {f'{file}.gz': (SAMPLE / f'{file}.gz').read_bytes() for file in FILES}
WHOLE = sorted(BODIES)
IMAGES, LABELS = FILES[:2]


@pytest.fixture
def empty_machine(tmp_path, monkeypatch):
    """A machine without MNIST: an empty data folder but for the bundled digits, no mirror."""
    folder = tmp_path / 'data'
    folder.mkdir()
    (folder / 'mnist-5k').symlink_to(SAMPLE)
    monkeypatch.setattr(data, 'FOLDER', folder)
    monkeypatch.setattr(data, 'DEBIAN_FOLDERS', {'fashion-mnist': tmp_path / 'debian'})
    monkeypatch.setattr(download_module, 'ALLOWED_ADDRESSES', ['https://', 'http://127.0.0.1:'])
    monkeypatch.setattr(download_module, 'TIMEOUTS', (1, 1))
    offer(monkeypatch)
    return folder


def offer(monkeypatch, *mirrors):
    """Let the bundled digits stand for MNIST and Fashion-MNIST, offered by these mirrors."""
    known = dict(data.DATASETS)
    for name in ('mnist', 'fashion-mnist'):
        known[name] = known['mnist-5k']._replace(
            mirrors=mirrors, class_names=known[name].class_names
        )
    monkeypatch.setattr(data, 'DATASETS', known)


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves the four files; ``server.manner`` decides how well, ``server.requests`` has names."""

    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        manner, name = self.server.manner, self.path.rsplit('/', 1)[-1]
        self.server.requests.append(name)
        body = BODIES.get(name)
        status, headers = 200, {}
        if manner == 'hang':
            self.server.closing.wait(30)
            self.close_connection = True
            return
        if manner == '404' or body is None:
            self.send_error(404)
            return
        if manner in ('to http', 'in a circle', 'to an invalid address'):
            status, body = 302, b''
            headers['Location'] = {
                'to http': f'http://mirror.example/{name}',
                'in a circle': self.path,
                'to an invalid address': 'http://[::1/',
            }[manner]
        elif manner == 'HTML':
            body, headers['Content-Type'] = b'<html>Please log in</html>' * 100, 'text/html'
        elif manner == 'another file':
            body = BODIES[f'{LABELS}.gz' if name.startswith(IMAGES) else f'{IMAGES}.gz']
        elif manner == 'not compressed':
            body = gzip.decompress(body)
        headers.setdefault('Content-Length', str(len(body) + (manner == 'stall')))
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        if manner == 'break off' and name.startswith(IMAGES):
            body = body[: len(body) // 2]
            self.close_connection = True
        if manner == 'slow':
            for start in range(0, len(body), 1000):
                self.wfile.write(body[start : start + 1000])
                if self.server.closing.wait(0.05):
                    return
            return
        self.wfile.write(body)
        if manner == 'stall':
            self.server.closing.wait(30)

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving(manner='well', handler=Mirror):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    server.daemon_threads = True
    server.manner, server.requests, server.closing = manner, [], threading.Event()
    server.url = f'http://127.0.0.1:{server.server_port}/mnist/'
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


class Raw(socketserver.BaseRequestHandler):
    """Answers with ``server.manner``: bytes, or a function that sends some."""

    def handle(self):
        self.request.recv(1 << 16)
        answer = self.server.manner
        with contextlib.suppress(OSError):
            if callable(answer):
                answer(self.request, self.server.closing)
            else:
                self.request.sendall(answer)


def byte_by_byte(content, request, closing):
    for byte in content:
        request.sendall(bytes([byte]))
        if closing.wait(0.2):
            return


def files_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize('dataset', ['auto', 'mnist', 'fashion-mnist'])
def test_download_is_checked_and_kept(dataset, empty_machine, monkeypatch):
    with serving() as server:
        offer(monkeypatch, server.url)
        digits = load_digits(dataset)
        name = 'mnist' if dataset == 'auto' else dataset
        assert (digits.dataset, len(digits.train_images)) == (name, 4000)
        assert digits.class_names == data.DATASETS[name].class_names
        assert files_in(empty_machine / name) == WHOLE
        assert server.requests == [f'{file}.gz' for file in FILES]
        assert load_digits(dataset).dataset == name
        assert len(server.requests) == 4
    assert load_digits(dataset).source == str(empty_machine / name)


def test_second_mirror_is_asked(empty_machine, monkeypatch):
    with serving('404') as first, serving() as second:
        offer(monkeypatch, first.url, second.url)
        assert load_digits('mnist').dataset == 'mnist'
        assert len(first.requests) == 1 and len(second.requests) == 4


def test_second_mirror_continues_the_first(empty_machine, monkeypatch):
    with serving() as first, serving() as second:
        first.RequestHandlerClass = type('OneFile', (Mirror,), {})
        monkeypatch.setattr(
            first.RequestHandlerClass,
            'do_GET',
            lambda self: (
                Mirror.do_GET(self) if self.path.endswith(f'{IMAGES}.gz') else self.send_error(503)
            ),
        )
        offer(monkeypatch, first.url, second.url)
        assert load_digits('mnist').dataset == 'mnist'
        assert second.requests == [f'{file}.gz' for file in FILES[1:]]


@pytest.mark.parametrize(
    'manner, reason',
    [
        ('404', 'status 404'),
        ('HTML', f'what it sends is not {IMAGES}.gz'),
        ('another file', f'what it sends is not {IMAGES}.gz'),
        ('hang', 'no answer in 1 s'),
        ('stall', 'no answer in 1 s'),
        ('break off', r'the answer is invalid \(\w+\)'),
        ('to http', 'redirected to an address without TLS'),
        ('in a circle', r'the answer is invalid \(TooManyRedirects\)'),
        ('to an invalid address', r'the answer is invalid \(ValueError\)'),
    ],
)
def test_bad_mirror(manner, reason, empty_machine, monkeypatch, caplog):
    with serving(manner) as server:
        offer(monkeypatch, server.url)
        begin = time.monotonic()
        with pytest.raises(
            InputError, match=f'^mnist is unavailable .127.0.0.1: {reason}.: put .* use --data-dir$'
        ):
            load_digits('mnist')
        assert load_digits('auto').dataset == 'mnist-5k'
        assert time.monotonic() - begin < 8
    assert files_in(empty_machine / 'mnist') == []
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert re.match(f'MNIST is unavailable .127.0.0.1: {reason}.: falling back to', warning)


OK = b'HTTP/1.1 200 OK\r\n'


@pytest.mark.parametrize(
    'answer',
    [
        b'',
        b'\0\xff\xfe garbage',
        b'SSH-2.0-OpenSSH_9.2\r\n',
        b'HTTP/1.1 abc\r\n\r\n',
        b'HTTP/1.1 -200 OK\r\n\r\n',
        OK,
        OK + b'no colon\r\n\r\nbody',
        OK + b'X: ' + b'x' * 100_000 + b'\r\n\r\n',
        OK + b'X: y\r\n' * 200 + b'\r\n',
        OK + b'Content-Length: many\r\n\r\nbody',
        OK + b'Content-Length: -5\r\n\r\nbody',
        OK + b'Content-Length: 7, 8\r\n\r\nbody',
        OK + b'Content-Length: 99999999999999999999\r\n\r\nbody',
        OK + b'Transfer-Encoding: chunked\r\n\r\n-5\r\nbody',
        OK + b'Transfer-Encoding: chunked\r\n\r\nzz\r\nbody',
        OK + b'Transfer-Encoding: chunked\r\n\r\n' + b'f' * 30 + b'\r\nbody',
        OK + b'Transfer-Encoding: chunked\r\n\r\n5\r\nbod',
        OK + b'Content-Encoding: gzip\r\n\r\nbody',
        OK + b'Set-Cookie: \xff=\0\r\n\r\nbody',
        b'HTTP/1.1 302 Found\r\nLocation: \xff\xfe\r\n\r\n',
        b'HTTP/1.1 302 Found\r\nLocation: https://\xff.example/\r\n\r\n',
        b'HTTP/1.1 302 Found\r\nLocation: ftp://mirror.example/\r\n\r\n',
        b'HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n',
        b'HTTP/1.1 302 Found\r\nLocation: https://user:secret@:99999/\r\n\r\n',
        b'HTTP/1.1 100 Continue\r\n\r\n' * 50,
        b'HTTP/1.1 500 \x1b[31mred\r\n\r\n',
    ],
)
def test_invalid_answers_fall_back(answer, empty_machine, monkeypatch, caplog):
    with serving(answer, Raw) as server:
        offer(monkeypatch, server.url)
        begin = time.monotonic()
        assert load_digits('auto').dataset == 'mnist-5k'
        assert time.monotonic() - begin < 5
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == 'WARNING']
    assert len(warning) < 350 and warning.isprintable()
    assert files_in(empty_machine / 'mnist') == []


@pytest.mark.parametrize('content', [b'HTTP/1.1 200 OK\r\n' * 99, OK + b'\r\n' + bytes(9999)])
def test_bytes_that_trickle_in(content, empty_machine, monkeypatch, caplog):
    """Each comes before the socket's time-out; the thread is given up all the same."""
    monkeypatch.setattr(download_module, 'ANSWER_SECONDS', 2)
    caplog.set_level(logging.INFO)
    with serving(functools.partial(byte_by_byte, content), Raw) as server:
        offer(monkeypatch, server.url)
        begin = time.monotonic()
        assert load_digits('auto').dataset == 'mnist-5k'
        assert 1.9 < time.monotonic() - begin < 10
    assert re.search(r'127\.0\.0\.1: 0 kB in \d s', caplog.text)
    assert caplog.text.count('looking for mnist at 127.0.0.1') == 1


@pytest.mark.parametrize(
    'name, value, reason',
    [('RATE_SECONDS', 1, r'\d+ kB in \d s'), ('MAX_SECONDS', 2, r'kB in \d s')],
)
def test_slow_mirror_is_given_up(name, value, reason, empty_machine, monkeypatch):
    """20 kB/s are too slow at a limit of 100, and 1.4 MB take longer than 2 s."""
    monkeypatch.setattr(download_module, 'MIN_RATE', 100_000 if name == 'RATE_SECONDS' else 1)
    monkeypatch.setattr(download_module, name, value)
    with serving('slow') as server, serving() as second:
        offer(monkeypatch, server.url, second.url)
        with pytest.raises(InputError, match=reason):
            load_digits('mnist')
        time.sleep(0.5)
        assert second.requests == []  # the network, not the mirror, is taken to be slow
    assert files_in(empty_machine / 'mnist') == []


def test_slow_mirror_within_the_limits(empty_machine, monkeypatch):
    monkeypatch.setattr(download_module, 'MIN_RATE', 1000)
    monkeypatch.setattr(download_module, 'RATE_SECONDS', 1)
    small = {name: body for name, body in BODIES.items() if 'labels' in name}
    with serving('slow') as server:
        write_set(empty_machine / 'mnist', [name for name in BODIES if name not in small])
        offer(monkeypatch, server.url)
        assert load_digits('mnist').dataset == 'mnist'


@pytest.mark.slow
@pytest.mark.parametrize(
    'manner, answer_seconds',
    [('hang', 18), ('headers byte by byte', 5), ('name server', 5), ('no route', 18)],
)
def test_fall_back_takes_less_than_20_seconds(
    manner, answer_seconds, empty_machine, monkeypatch, caplog
):
    """With the limits that users have; a name server that is silent is given up as anything is."""
    assert download_module.ANSWER_SECONDS == 18
    monkeypatch.setattr(download_module, 'ANSWER_SECONDS', answer_seconds)
    monkeypatch.setattr(download_module, 'TIMEOUTS', (2, 8))
    caplog.set_level(logging.INFO)
    with contextlib.ExitStack() as stack:
        if manner == 'headers byte by byte':
            trickle = functools.partial(byte_by_byte, b'HTTP/1.1 200 OK\r\n' * 99)
            servers = [stack.enter_context(serving(trickle, Raw)) for _ in range(2)]
        else:
            servers = [stack.enter_context(serving('hang')) for _ in range(2)]
        if manner == 'name server':
            monkeypatch.setattr(socket, 'getaddrinfo', lambda *args, **kwargs: time.sleep(60))
        if manner == 'no route':  # a listener whose backlog is full drops SYNs
            full = stack.enter_context(socket.create_server(('127.0.0.1', 0), backlog=0))
            for _ in range(3):
                client = stack.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(full.getsockname())
            url = f'http://127.0.0.1:{full.getsockname()[1]}/'
            offer(monkeypatch, url, url)
        else:
            offer(monkeypatch, *(server.url for server in servers))
        begin = time.monotonic()
        assert load_digits('auto').dataset == 'mnist-5k'
        assert time.monotonic() - begin < answer_seconds + 2
    assert 'looking for mnist at 127.0.0.1' in caplog.text


def test_too_large_a_file_is_refused(empty_machine, monkeypatch):
    monkeypatch.setattr(download_module, 'MAX_SIZE', 10_000)
    with serving() as server:
        offer(monkeypatch, server.url)
        with pytest.raises(InputError, match='it sends more than 10000 bytes'):
            load_digits('mnist')
    assert files_in(empty_machine / 'mnist') == []


def test_uncompressed_answer_is_accepted(empty_machine, monkeypatch):
    """The checksum is that of the raw file: what a server has unpacked is the file all the same."""
    with serving('not compressed') as server:
        offer(monkeypatch, server.url)
        assert load_digits('mnist').dataset == 'mnist'
    assert load_digits('mnist').dataset == 'mnist'


def write_set(folder, names=WHOLE):
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(BODIES[name])


@pytest.mark.parametrize('name', [f'{LABELS}.gz', LABELS])
def test_damaged_file_is_fetched_again(name, empty_machine, monkeypatch, caplog):
    write_set(empty_machine / 'mnist', [name for name in WHOLE if not name.startswith(LABELS)])
    (empty_machine / 'mnist' / name).write_bytes(b'damaged')
    with serving() as server:
        offer(monkeypatch, server.url)
        assert load_digits('mnist').dataset == 'mnist'
        assert server.requests == [f'{LABELS}.gz']
    assert f'mnist/{name}: not an IDX file' in caplog.text


def test_files_of_other_data_are_not_replaced(empty_machine, monkeypatch, caplog):
    write_set(empty_machine / 'mnist', WHOLE)
    other, content = empty_machine / 'mnist' / f'{LABELS}.gz', BODIES[f'{FILES[3]}.gz']
    other.write_bytes(content)
    with serving() as server:
        offer(monkeypatch, server.url)
        with pytest.raises(InputError, match=f'{LABELS}.gz is of other data, and not replaced'):
            load_digits('mnist')
        assert load_digits('auto').dataset == 'mnist-5k'
        assert not server.requests
    assert other.read_bytes() == content


@pytest.mark.parametrize('kind', ['a file', 'read-only'])
def test_folder_that_cannot_be_written_to(kind, empty_machine, monkeypatch):
    """Nothing is downloaded then."""
    folder = empty_machine / 'mnist'
    if kind == 'a file':
        folder.touch()
    else:
        folder.mkdir()
        monkeypatch.setattr(
            download_module.tempfile,
            'TemporaryFile',
            lambda dir: os.open('/proc/nothing', os.O_WRONLY | os.O_CREAT),
        )
    with serving() as server:
        offer(monkeypatch, server.url)
        with pytest.raises(InputError, match='its folder cannot be written to: '):
            load_digits('mnist')
        assert load_digits('auto').dataset == 'mnist-5k'
        assert server.requests == []


def test_full_disk(empty_machine, monkeypatch):
    def full(self, content):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, 'write_bytes', full)
    with serving() as server:
        offer(monkeypatch, server.url)
        with pytest.raises(InputError, match='No space left on device'):
            load_digits('mnist')
    assert files_in(empty_machine / 'mnist') == []


def fetch(folder, url, results):
    """What one of two processes does."""
    data.FOLDER = folder
    data.DATASETS = {**data.DATASETS, 'mnist': data.DATASETS['mnist-5k']._replace(mirrors=(url,))}
    download_module.ALLOWED_ADDRESSES.append('http://127.0.0.1:')
    results.put(load_digits('mnist').dataset)


@pytest.mark.slow
def test_two_processes_download_at_once(empty_machine):
    context = multiprocessing.get_context('spawn')
    results = context.Queue()
    with serving() as server:
        arguments = (empty_machine, server.url, results)
        both = [context.Process(target=fetch, args=arguments) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [0, 0]
        assert [results.get(timeout=5) for _ in both] == ['mnist', 'mnist']
    assert files_in(empty_machine / 'mnist') == WHOLE


def test_proxy_of_the_environment_is_asked(empty_machine, monkeypatch):
    with serving() as proxy:
        monkeypatch.setattr(download_module, 'ALLOWED_ADDRESSES', ['http://localhost:9/'])
        offer(monkeypatch, 'http://localhost:9/mnist/')
        monkeypatch.setenv('http_proxy', proxy.url)
        monkeypatch.setenv('no_proxy', '')
        assert load_digits('mnist').dataset == 'mnist'
        assert len(proxy.requests) == 4


@pytest.mark.parametrize('url', ['http://mirror.example/', 'http://127.0.0.1:9/', 'ftp://mirror/'])
def test_only_tls_is_spoken(url, empty_machine, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(data, 'FOLDER', empty_machine)
    offer(monkeypatch, url)
    with pytest.raises(InputError, match='an address without TLS'):
        load_digits('mnist')


def test_mirrors_are_https_addresses():
    for name in ('mnist', 'fashion-mnist'):
        known = data.DATASETS[name]
        assert len(known.mirrors) >= 2
        assert all(re.fullmatch(r'https://\S+/', mirror) for mirror in known.mirrors)
        assert len(set(known.sha256)) == 4 and len(known.class_names) == 10


def test_debian_package_comes_before_a_download(empty_machine, monkeypatch):
    write_set(data.DEBIAN_FOLDERS['fashion-mnist'])
    with serving() as server:
        offer(monkeypatch, server.url)
        digits = load_digits('fashion-mnist')
        assert digits.dataset == 'fashion-mnist'
        assert digits.source == str(data.DEBIAN_FOLDERS['fashion-mnist'])
        assert digits.class_names[9] == 'Ankle boot'
        assert server.requests == []


def test_data_of_a_run(empty_machine):
    """A trained network is shown the data that it was trained on, unless others are named."""
    write_set(data.DEBIAN_FOLDERS['fashion-mnist'])
    assert load_digits_of_run('run', 'fashion-mnist').dataset == 'fashion-mnist'
    assert load_digits_of_run('run', 'mnist-5k').dataset == 'mnist-5k'
    for trained_on in 'mnist', None:  # of MNIST, which is not there, its sample
        assert load_digits_of_run('run', trained_on).dataset == 'mnist-5k'
    assert load_digits_of_run('run', 'fashion-mnist', 'mnist-5k').dataset == 'mnist-5k'
    for trained_on in 'custom', 'digits 8x8':
        message = r'run was trained on data of your own: .* --data-dir'
        with pytest.raises(InputError, match=message):
            load_digits_of_run('run', trained_on)
    folder = data.FOLDER / 'mnist-5k'
    assert load_digits_of_run('run', 'custom', data_dir=folder).source == str(folder)


@pytest.mark.parametrize('dataset', ['mnist', 'fashion-mnist'])
def test_named_data_set_is_never_replaced(dataset, empty_machine):
    with pytest.raises(InputError, match=f'{dataset} is unavailable .*{empty_machine / dataset}'):
        load_digits(dataset)


def test_damaged_embedded_digits(empty_machine):
    (empty_machine / 'mnist-5k').unlink()
    write_set(empty_machine / 'mnist-5k')
    (empty_machine / 'mnist-5k' / f'{LABELS}.gz').write_bytes(b'damaged')
    for dataset in ('auto', 'mnist-5k'):
        with pytest.raises(InputError, match=f'{LABELS}.gz: not an IDX file'):
            load_digits(dataset)
