"""Downloads over TLS that give up in time: :func:`fetch`."""

import http.client
import logging
import queue
import threading
import time
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from tqdm import tqdm

from common.errors import InputError

SILENCE_SECONDS = 8  # a server that sends nothing for so long is given up; two take less than 20 s
SLOW_SECONDS, SLOW_BYTES = 20, 200_000  # less in so many seconds is too slow
NOTICE_SECONDS = 1
CHUNK_SIZE = 1 << 13


class DownloadError(InputError):
    """A download that failed: the host and, in a few words, the reason."""


class SlowNetworkError(DownloadError):
    """No time is left, or the network is too slow for another server to help."""


def fetch(url: str, max_size: int, deadline: float, notice: str | None = None) -> bytes:
    """Download ``url`` into memory, with a progress bar on a terminal.

    A thread of its own receives, so that nothing (a name server that hangs, headers that come byte
    by byte) can hold up the caller.

    Parameters
    ----------
    url
        An https address; http on this machine only, which also holds for redirects.
    max_size
        In bytes; a longer answer is refused.
    deadline
        On the clock of ``time.monotonic``.
    notice
        What is logged, once, if nothing has come after a second.

    Raises
    ------
    DownloadError
        For any failure.
    """
    host = urlsplit(url).hostname
    chunks: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    stopped = threading.Event()
    body = bytearray()
    begin = last = window_begin = time.monotonic()
    window_size = 0
    with tqdm(
        desc=url.rsplit('/', 1)[-1], unit='B', unit_scale=True, disable=None, leave=False
    ) as progress:
        threading.Thread(
            target=_receive, args=(url, chunks, stopped, progress), daemon=True
        ).start()
        try:
            while True:
                try:
                    chunk = chunks.get(timeout=0.1)
                except queue.Empty:
                    chunk = None
                now = time.monotonic()
                if isinstance(chunk, Exception):
                    raise DownloadError(f'{host}: {_reason(chunk)}')
                if chunk == b'':
                    return bytes(body)
                if chunk is not None:
                    body += chunk
                    progress.update(len(chunk))
                    last = now
                if len(body) > max_size:
                    raise DownloadError(f'{host}: it sends more than {max_size} bytes')
                if now > deadline:
                    raise SlowNetworkError(f'{host}: not done in time')
                if now - last > SILENCE_SECONDS:
                    what = 'stalled' if body else 'no answer'
                    raise DownloadError(f'{host}: {what} for {SILENCE_SECONDS} s')
                if now - window_begin > SLOW_SECONDS:
                    if len(body) - window_size < SLOW_BYTES:
                        rate = SLOW_BYTES // SLOW_SECONDS // 1000
                        raise SlowNetworkError(f'{host}: slower than {rate} kB/s')
                    window_begin, window_size = now, len(body)
                if notice and not body and now - begin > NOTICE_SECONDS:
                    logging.info('%s', notice)
                    notice = None
        finally:
            stopped.set()


def _receive(url, chunks, stopped, progress):
    """Put the body of ``url`` into ``chunks``, then b'', or the exception that ended it."""
    try:
        _require_tls(url)
        with _Session().get(
            url,
            headers={'Accept-Encoding': 'identity'},
            stream=True,
            timeout=SILENCE_SECONDS,
        ) as response:
            response.raise_for_status()
            progress.total = response.raw.length_remaining
            for chunk in response.raw.stream(CHUNK_SIZE, decode_content=False):
                if stopped.is_set():
                    return
                if chunk:
                    chunks.put(chunk)
        chunks.put(b'')
    except Exception as error:  # from requests, urllib3, http.client, ValueError: all the same here
        chunks.put(error)


class _Session(requests.Session):
    """A session that goes to https addresses only (or to this machine), wherever redirected."""

    def get_redirect_target(self, response):
        target = super().get_redirect_target(response)
        if target:
            _require_tls(urljoin(response.url, target))
        return target


def _require_tls(url):
    address = urlsplit(url)
    if address.scheme != 'https' and address.hostname not in ('127.0.0.1', 'localhost', '::1'):
        raise requests.exceptions.InvalidURL(f'{url[:100]!r} is not an https address')


def _reason(error: Exception) -> str:
    """Return a network error in a few words, none of them the server's."""
    if isinstance(error, requests.HTTPError):
        status = error.response.status_code
        return f'{status} {http.client.responses.get(status, "")}'.strip()
    if isinstance(error, requests.exceptions.InvalidURL):
        return str(error)
    if isinstance(error, requests.TooManyRedirects):
        return 'too many redirects'
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError):
        return f'no answer for {SILENCE_SECONDS} s'
    if isinstance(error, requests.exceptions.SSLError):
        return 'no valid TLS certificate'
    if isinstance(error, requests.ConnectionError) and isinstance(
        error.args[0] if error.args else None, urllib3.exceptions.MaxRetryError
    ):
        return 'no connection'
    return f'the answer is damaged ({type(error).__name__})'
