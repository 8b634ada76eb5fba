"""No key outside the secret pages: every process of the daemon is scanned after each way of using keys."""

from __future__ import annotations

import base64
import os

import pytest

from tests.harness import Daemon, memscan
from tests.harness.memscan import Secret, scan

pytestmark = pytest.mark.skipif(bool(memscan.cannot_scan()), reason=memscan.cannot_scan() or "-")


def use(daemon: Daemon, rounds: int) -> list[Secret]:
    """Work with keys of every kind; returns the secrets that went through."""
    dek, marker = os.urandom(32), os.urandom(48)
    text = base64.b64encode(marker).decode()
    with daemon.session() as kms:
        wrapped = kms.ok("POST", "/wrap", {"dek": base64.b64encode(dek).decode()})["wrapped"]
        key = kms.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        for _ in range(rounds):
            sealed = kms.ok("POST", "/encrypt", {"wrapped": wrapped, "plaintext": text})["ciphertext"]
            kms.ok("POST", "/decrypt", {"wrapped": wrapped, "ciphertext": sealed})
            kms.ok("POST", "/encrypt_batch", {"items": [{"key_id": key, "plaintext": text}] * 10})
            assert kms.request("POST", "/decrypt", {"key_id": key, "ciphertext": sealed}).status == 422
        assert kms.ok("POST", "/unwrap", {"wrapped": wrapped})["dek"] == base64.b64encode(dek).decode()
    return [Secret("DEK", dek), Secret("plaintext", marker, key=False)]


@pytest.mark.parametrize("source", ["hexfile", "rawfile", "yaml", "credential"])
def test_start_and_use_leave_no_copy(source: str) -> None:
    with Daemon(source=source, workers=2) as daemon:
        secrets = [Secret("KEK", daemon.kek), *use(daemon, 10)]
        scan(daemon.pids(), secrets).assert_clean()


def test_rotation_and_a_refused_rotation_leave_no_copy() -> None:
    new, rejected = os.urandom(32), os.urandom(32)
    with Daemon(workers=2) as daemon:
        secrets = [Secret("KEK", daemon.kek), *use(daemon, 2)]
        refused = daemon.request("POST", "/rotate_kek", {"new_kek_hex": rejected.hex(), "unknown": 1})
        assert refused.status == 400
        daemon.ok("POST", "/rotate_kek", {"new_kek_hex": new.hex()})
        secrets += [*use(daemon, 2), Secret("new KEK", new), Secret("rejected KEK", rejected)]
        scan(daemon.pids(), secrets).assert_clean()
