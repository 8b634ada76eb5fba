"""A stand-in for the daemon, for the tests of the harness alone: same command line, a few of the calls.

    python -m tests.harness.standin --socket S --data-dir D --config C

What it does wrong is said by the environment: STANDIN_EXIT (ends at once with that code), STANDIN_CODE (exit
code after SIGTERM), STANDIN_ORPHAN (its worker outlives it), STANDIN_LOST (leaves a process whose parent is
gone, so that no tree shows it), STANDIN_DEAF (never listens).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socketserver
import sys
import time
from http.server import BaseHTTPRequestHandler

PR_SET_PDEATHSIG = 1


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self.answer(200, b"ok", "text/plain")

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        if length > 1 << 20:
            self.close_connection = True
            self.answer(413, b'{"error": {"code": "too_large", "message": "too large"}}')
            return
        body = self.rfile.read(length)
        if self.path == "/slow":
            time.sleep(60)
        if self.path == "/echo":
            seen = {"headers": dict(self.headers), "length": len(body), "pid": os.getpid()}
            self.answer(200, json.dumps(seen).encode())
        elif self.path == "/create_dek_for_thread":
            thread = json.loads(body)["thread_id"]
            self.answer(200, json.dumps({"key_id": "k_" + thread}).encode())
        else:
            self.answer(404, b'{"error": {"code": "not_found", "message": "no such path"}}')

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)


class Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("--socket", "--data-dir", "--config"):
        parser.add_argument(name)
    args = parser.parse_args()
    if os.environ.get("STANDIN_EXIT"):
        print("standin: refused: the reason why", file=sys.stderr)
        sys.exit(int(os.environ["STANDIN_EXIT"]))
    if os.environ.get("STANDIN_DEAF"):
        time.sleep(600)
    if os.path.exists(args.socket):
        os.unlink(args.socket)
    with Server(args.socket, Handler) as server:
        serve(server)


def lose_a_process() -> None:
    between = os.fork()
    if between == 0:
        if os.fork() == 0:
            time.sleep(600)
        os._exit(0)
    os.waitpid(between, 0)


def serve(server: Server) -> None:
    if os.environ.get("STANDIN_LOST"):
        lose_a_process()
    worker = os.fork()
    if worker == 0:
        if not os.environ.get("STANDIN_ORPHAN"):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        server.serve_forever()

    def stop(number: int, frame: object) -> None:
        if not os.environ.get("STANDIN_ORPHAN"):
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
        os._exit(int(os.environ.get("STANDIN_CODE", "0")))

    signal.signal(signal.SIGTERM, stop)
    print("standin: ready", file=sys.stderr, flush=True)
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
