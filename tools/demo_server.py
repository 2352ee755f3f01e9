"""The page of tools.demo over HTTP, for this machine alone and no other site in its browser."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import contextlib
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import re
import socket
import sys

from common.errors import InputError

POLICY = (
    "default-src 'self'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Server(ThreadingHTTPServer):
    """Serves a page on 127.0.0.1: GET / and /scene, POST /embed with a drawing.

    It takes its port at once, and serves what :meth:`show` has given it.

    Parameters
    ----------
    page
        HTML with one script and one style element, the only ones that a browser will run.
    drawing_size
        Bytes of a drawing; any other number is refused unread.
    port
        Port to listen on; 0 is a free one. ``url`` has the address of the page.
    """

    def __init__(self, page: str, drawing_size: int, port: int = 0):
        inline = re.findall(r'<(script|style)>(.*?)</\1>', page, re.S)
        hashes = {tag: hashlib.sha256(content.encode()).digest() for tag, content in inline}
        self.policy = POLICY.format(**{tag: b64encode(h).decode() for tag, h in hashes.items()})
        self.contents = {'/': ('text/html; charset=utf-8', page.encode())}
        self.answering = ThreadPoolExecutor(max_workers=1)
        self.drawing_size = drawing_size
        try:
            super().__init__(('127.0.0.1', port), Handler)
        except OSError as error:
            raise InputError(
                f'--port={port} cannot be used: {error.strerror}; leave it out for a free one'
            ) from None
        self.hosts = [f'{name}:{self.server_port}' for name in ('127.0.0.1', 'localhost')]
        self.url = f'http://{self.hosts[0]}/'

    def show(self, scene: dict, answer: Callable[[bytes], dict]) -> None:
        """Set what the page shows, as JSON has it, and what it says of a drawing.

        ``answer(pixels)`` is called in one thread only: an Embedder is not made for several, and
        MXNet keeps memory for every thread that has ever called it. Its InputError is sent to the
        page.
        """
        self.contents['/scene'] = ('application/json', json.dumps(scene).encode())
        self.answer = answer

    def handle_error(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        """Report an error, but not that a browser has gone away."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    timeout = 10  # seconds that a connection may be silent
    default_request_version = 'HTTP/1.0'  # of a request that has none: 0.9 has no status

    def parse_request(self) -> bool:
        """Refuse what another site, or a name that leads to this machine, makes a browser ask."""
        if not super().parse_request():
            return False
        hosts = [[host] for host in self.server.hosts]
        origins = [None, *([f'http://{host}'] for host in self.server.hosts)]
        if self.headers.get_all('Host') not in hosts:
            self.send_error(400, f'Host has to be {self.server.hosts[0]}.')
        elif self.headers.get_all('Origin') not in origins:
            self.send_error(400, f'Origin has to be http://{self.server.hosts[0]}.')
        else:
            return True
        return False

    def do_GET(self) -> None:
        """Send the page, or what it shows."""
        if self.path in self.server.contents:
            self.send(200, *self.server.contents[self.path])
        else:
            self.send_error(404, 'There is nothing here but / and /scene.')

    def do_POST(self) -> None:
        """Answer to a drawing."""
        size = self.server.drawing_size
        if self.path != '/embed':
            self.send_error(404, 'Drawings go to /embed.')
        elif self.headers.get_all('Content-Length') != [str(size)]:
            self.send_error(400, f'A drawing has {size} bytes: Content-Length has to say so.')
        elif len(pixels := self.rfile.read(size)) < size:
            self.send_error(400, f'The drawing ends after {len(pixels)} of {size} bytes.')
        else:
            try:
                answer = self.server.answering.submit(self.server.answer, pixels).result()
            except InputError as error:
                self.send_error(400, f'{error}.')
            else:
                self.send(200, 'application/json', json.dumps(answer).encode())

    def send(self, status: int, kind: str, content: bytes) -> None:
        """Send a whole response."""
        self.send_response(status)
        for name, value in (
            ('Content-Type', kind),
            ('Content-Length', str(len(content))),
            ('Content-Security-Policy', self.server.policy),
            ('X-Content-Type-Options', 'nosniff'),
            ('Referrer-Policy', 'no-referrer'),
            ('Cache-Control', 'no-store'),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send a sentence and end the connection, reading what is still on its way.

        A connection that is closed with unread bytes is reset, and the sentence may get lost.
        """
        self.send(code, 'text/plain; charset=utf-8', f'{message}\n'.encode())
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(1)
            for _ in range(100):
                if not self.connection.recv(2**16):
                    break

    def log_message(self, *args: object) -> None:
        """Log nothing: drawing a digit takes some hundred requests."""
