"""schemathesis holds the running daemon against the description that it gives of itself: what the schema
allows is not refused as malformed, what it forbids is refused, and each answer is as described."""

from __future__ import annotations

import os
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, settings

from progressdb_kms.tools.openapi import document
from tests.harness import Daemon
from tests.harness.wire import connect

schemathesis = pytest.importorskip("schemathesis", "4", reason="schemathesis 4 wants Python 3.10")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")

# A key may be shredded or disabled by then, and random data never opens; what is too long is refused unread.
ACCEPTED = ["2xx", 404, 409, 410, 422, 423, 503]
REFUSED = [400, 404, 405, 413, 414, 415]
CONFIG = schemathesis.Config.from_dict(
    {
        "checks": {
            "positive_data_acceptance": {"expected-statuses": ACCEPTED},
            "negative_data_rejection": {"expected-statuses": REFUSED},
        }
    }
)
schema = schemathesis.openapi.from_dict(document(), config=CONFIG)

# What can have the form that the schema asks for and still not be one: a wrapped DEK, a DEK, a KEK.
FORM_ONLY = ("/encrypt", "/decrypt", "/wrap", "/unwrap", "/rewrap", "/rotate_kek")
# Where an error is the item's: the answer is 200.
BY_ITEM = ("/encrypt_batch", "/decrypt_batch", "/reencrypt")

SHORT = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(SHORT, max_examples=1000, derandomize=False)


class _Forwarder(socketserver.ThreadingTCPServer):
    """A loopback port that leads to the daemon's socket: schemathesis speaks TCP alone."""

    daemon_threads = True
    request_queue_size = 64
    target: Daemon

    def finish_request(self, request: object, client_address: object) -> None:
        assert isinstance(request, socket.socket)
        with connect(self.target.socket, 60) as upstream:
            threading.Thread(target=_pump, args=(upstream, request), daemon=True).start()
            _pump(request, upstream)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with Daemon(workers=1) as daemon, _Forwarder(("127.0.0.1", 0), None) as server:  # type: ignore[arg-type]
        server.target = daemon
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        assert "Traceback" not in daemon.stderr


def hold(case: schemathesis.Case, url: str) -> None:
    left_out = []
    if case.operation.path in FORM_ONLY:
        left_out.append(checks.positive_data_acceptance)
    if case.operation.path in BY_ITEM:
        left_out.append(checks.negative_data_rejection)
    case.call_and_validate(base_url=url, excluded_checks=left_out)


@schema.parametrize()
@SHORT
def test_as_described(case: schemathesis.Case, url: str) -> None:
    hold(case, url)


if (
    "TESTS_WARM" not in os.environ
):  # else the run is no long one, and to make the cases takes each process a second

    @pytest.mark.long
    @schema.parametrize()
    @LONG
    def test_as_described_at_length(case: schemathesis.Case, url: str) -> None:
        hold(case, url)
