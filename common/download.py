"""Downloads over TLS that are checked before use and given up in time."""

from collections.abc import Callable
import logging
from pathlib import Path
import tempfile
import threading
import time
from types import SimpleNamespace
from urllib.parse import urljoin, urlsplit

import requests
from tqdm import tqdm
from urllib3.exceptions import MaxRetryError

from common.errors import InputError
from common.files import printable, replace_when_whole

logger = logging.getLogger(__name__)

ALLOWED_ADDRESSES = ['https://']  # beginnings; the tests add their own server
MAX_SIZE = 64_000_000  # bytes; the largest of the files has 47 million before compression
TIMEOUTS = (2, 8)  # seconds to connect to one of a mirror's addresses, and to wait for more
# All is given up without a byte in ANSWER_SECONDS, below MIN_RATE bytes/s over RATE_SECONDS, and
# after MAX_SECONDS.
ANSWER_SECONDS = 18
MIN_RATE, RATE_SECONDS = 10_000, 20
MAX_SECONDS = 300
# Of a header that it cannot parse it logs a traceback.
logging.getLogger('urllib3').setLevel(logging.ERROR)


def download(
    name: str,
    mirrors: tuple[str, ...],
    folder: Path,
    sha256: dict[str, str],
    digest_of: Callable[[Path], str | None],
) -> None:
    """Download what a folder lacks of a data set, from the first of several mirrors that has it.

    A thread receives, so that nothing holds up the caller for longer than is said above, neither a
    name server that hangs nor headers that come byte by byte. Several processes may download at
    once: each moves whole files into place.

    Parameters
    ----------
    name
        What the data set is called in messages.
    mirrors
        Addresses of folders, ending in a slash.
    sha256
        ``digest_of`` each file, by its name.

    Raises
    ------
    InputError
        With the reason for each mirror; or if a file is there that is of other data.
    """
    for file, digest in sha256.items():
        if digest_of(folder / file) not in (None, digest):
            raise InputError(f'{printable(folder / file)} is of other data, and not replaced')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f'its folder cannot be written to: {error.strerror}') from None
    state = SimpleNamespace(host='', received=0, failures=[], is_done=False, is_stopped=False)
    arguments = (state, mirrors, folder, sha256, digest_of)
    thread = threading.Thread(target=_try_mirrors, args=arguments, daemon=True)
    begin = window_begin = time.monotonic()
    window_received, is_announced = 0, False
    thread.start()
    with tqdm(desc=name, unit='B', unit_scale=True, disable=None, leave=False) as bar:
        while thread.is_alive():
            thread.join(0.1)
            bar.update(state.received - bar.n)
            elapsed, window = time.monotonic() - begin, time.monotonic() - window_begin
            if elapsed > 1 and not state.received and not is_announced:
                logger.info(f'looking for {name} at {state.host}')
                is_announced = True
            is_slow = state.received - window_received < MIN_RATE * RATE_SECONDS
            if (
                elapsed > MAX_SECONDS
                or (elapsed > ANSWER_SECONDS and not state.received)
                or (window > RATE_SECONDS and is_slow)
            ):
                state.is_stopped = True
                received = f'{state.received / 1000:.0f} kB in {elapsed:.0f} s'
                state.failures.append(f'{state.host}: {received}')
                break
            if window > RATE_SECONDS or not window_received:
                window_begin, window_received = time.monotonic(), state.received
    if not state.is_done:
        raise InputError('; '.join(state.failures))


def _try_mirrors(state, mirrors, folder, sha256, digest_of):
    for mirror in mirrors:
        if state.is_stopped:
            return
        state.host = urlsplit(mirror).hostname
        try:
            with requests.Session() as session:
                session.adapters.clear()  # no other address is asked, wherever it is redirected
                for beginning in ALLOWED_ADDRESSES:
                    session.mount(beginning, requests.adapters.HTTPAdapter())
                for file, digest in sha256.items():
                    if digest_of(folder / file) == digest:
                        continue
                    body = _fetch(session, urljoin(mirror, file), state)
                    with replace_when_whole(folder / file) as temporary:
                        temporary.write_bytes(body)
                        if digest_of(temporary) != digest:
                            raise InputError(f'what it sends is not {file}')
            state.is_done = True
            return
        except Exception as error:  # of requests, urllib3, http.client, ...: all the same here
            state.failures.append(f'{state.host}: {_reason(error)}')


def _fetch(session, url, state):
    body = bytearray()
    headers = {'Accept-Encoding': 'identity'}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUTS) as response:
        response.raise_for_status()
        for chunk in response.raw.stream(1 << 13, decode_content=False):
            body += chunk
            state.received += len(chunk)
            if state.is_stopped or len(body) > MAX_SIZE:
                raise InputError(f'it sends more than {MAX_SIZE} bytes')
    return body


def _reason(error):
    """Return an error in a few words, none of them the server's."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, requests.HTTPError):
        return f'status {error.response.status_code}'
    if isinstance(error, requests.exceptions.InvalidSchema):
        return 'redirected to an address without TLS'
    cause = error.args[0] if error.args else None
    if isinstance(cause, MaxRetryError):
        return f'no connection ({type(cause.reason).__name__})'
    if 'Timeout' in type(error).__name__:
        return f'no answer in {TIMEOUTS[1]} s'
    return getattr(error, 'strerror', None) or f'the answer is invalid ({type(error).__name__})'
