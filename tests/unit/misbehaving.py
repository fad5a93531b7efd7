"""A server on a real socket whose answers a test writes, sound or not."""

import contextlib
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """``answers[n]`` answers request n, and the last one every later request; each is called with the handler.

    ``requests`` holds (path, headers, body, time) of what came.
    """

    daemon_threads = True

    def __init__(self, *answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = answers
        self.requests = []
        self.lock = threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that hangs up is what some of the tests are about."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append((self.path, dict(self.headers), body, time.monotonic()))
        answers = self.server.answers
        self.body = body
        answers[min(number, len(answers) - 1)](self)

    def log_message(self, *words):
        """Nothing."""


@contextlib.contextmanager
def serving(*answers):
    server = Server(*answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def sends(body, code=200, **headers):
    """An answer of ``body``, which may be computed from the request's."""

    def answer(handler):
        content = body(handler.body) if callable(body) else body
        handler.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def hangs(handler):
    """No answer, until the client has gone."""
    handler.rfile.read(1)


def goes_away(handler):
    """No answer, and from now on nobody listens."""
    handler.close_connection = True
    handler.server.shutdown()
    handler.server.server_close()


def drips(handler):
    """A byte now and then, without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while True:
        handler.wfile.write(b"\x00")
        handler.wfile.flush()
        time.sleep(0.02)


def never_ends(handler, **headers):
    handler.send_response(200)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    part = b"\x00" * 65536
    while True:
        handler.wfile.write(part)


def hangs_up(handler):
    """In the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"\x81")
    handler.close_connection = True
