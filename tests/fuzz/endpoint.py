"""What the endpoint of a judge answers."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.fuzz.changes import byte_changes, value_changes

COMMANDS = {"endpoint": ""}  # its port is known when it is there
_GOOD = {"choices": [{"message": {"role": "assistant", "content": "Rating: [[7]]"}}]}


class _Endpoint(BaseHTTPRequestHandler):
    answer: tuple[int, dict[str, str], bytes] = (200, {}, b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        status, headers, body = self.answer
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def mutations(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    COMMANDS["endpoint"] = (
        "judge moe out --questions questions.jsonl --max-new-tokens 2 "
        f"--endpoint http://127.0.0.1:{server.server_port}/v1"
    )
    good = json.dumps(_GOOD).encode()
    answers: dict[str, tuple[int, dict[str, str], bytes]] = {
        what: (200, {}, body) for what, body in byte_changes(good, 120)
    }
    for what, record in value_changes(_GOOD, 100):
        answers[what] = (200, {}, json.dumps(record).encode())
    for status in (100, 204, 301, 302, 400, 401, 403, 404, 413, 429, 500, 599):
        answers[f"status {status}"] = (status, {}, good)
    bomb = gzip.compress(bytes(1 << 30), 1)
    packed = {"Content-Encoding": "gzip"}
    answers |= {
        "a redirect": (302, {"Location": "http://localhost:9/steal"}, b""),
        "a bomb": (200, packed, bomb),
        "a cut archive": (200, packed, gzip.compress(good)[:-9]),
        "no archive": (200, packed, good),
        "too short": (200, {"Content-Length": "10000"}, good),
        "too long": (200, {"Content-Length": "3"}, good),
        "a strange length": (200, {"Content-Length": "x"}, good),
        "a long header": (200, {"X": "x" * 100_000}, good),
        "many marks": (200, {}, good.replace(b"[[7]]", b"[[7]]" * 100_000)),
        "a huge mark": (200, {}, good.replace(b"7", b"9" * 5000)),
        "16 MB": (200, {}, good.replace(b"Rating", b"x" * 20_000_000)),
    }
    try:
        for what, answer in answers.items():
            yield f"endpoint: {what}", partial(setattr, _Endpoint, "answer", answer)
    finally:
        server.shutdown()
        server.server_close()
