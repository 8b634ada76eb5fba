"""Health, readiness, status, metrics, receipts: what an operator and a monitor are told."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from progressdb_kms import __version__
from progressdb_kms.wire.gauges import FAMILIES
from tests.harness import Daemon, Session, procs, raw

RECEIPT = re.compile(r"[0-9]+\.[0-9.]+:[1-9][0-9]*:[0-9a-f]{16}")


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with Daemon(workers=2) as running:
        yield running


def events(daemon: Daemon) -> list[dict[str, Any]]:
    """Those of calls: the keeper's own, such as an anchor, come when they come."""
    lines = daemon.audit_log.read_text().splitlines()
    return [event for event in (json.loads(line)["event"] for line in lines) if "request_id" in event]


class TestHealth:
    @pytest.mark.parametrize("path", ["/healthz", "/health"])
    def test_alive(self, kms: Session, path: str) -> None:
        reply = kms.request("GET", path)
        assert (reply.status, reply.body) == (200, b"ok") and reply.headers["Content-Type"].startswith(
            "text/plain"
        )

    @pytest.mark.parametrize("path", ["/healthz", "/status", "/metrics", "/deks", "/openapi.json"])
    def test_head_is_get_without_the_body(self, kms: Session, path: str) -> None:
        reply = kms.request("HEAD", path)
        assert reply.status == 200 and reply.body == b"" and int(reply.headers["Content-Length"]) > 1
        assert kms.request("GET", "/healthz").status == 200 and kms.connections == 1

    def test_ready(self, kms: Session) -> None:
        assert kms.ok("GET", "/readyz") == {"ready": True, "reasons": [], "warnings": []}

    def test_answers_are_not_to_be_kept(self, kms: Session) -> None:
        headers = kms.request("GET", "/status").headers
        assert headers["Cache-Control"] == "no-store" and "Server" not in headers


class TestNotReady:
    """Liveness stays, readiness says why not, and nothing is answered that can't be recorded."""

    def refused(self, daemon: Daemon, says: str) -> None:
        reply = daemon.request("GET", "/readyz")
        assert reply.status == 503 and any(says in reason for reason in reply.json()["reasons"])
        assert daemon.request("GET", "/healthz").status == 200
        assert daemon.ok("GET", "/status")["state"] == "not_ready"
        made = daemon.request("POST", "/create_dek_for_thread", {"thread_id": "t"})
        assert (made.status, made.code) == (503, "audit_unavailable") and "key_id" not in made.json()
        found = values(daemon)
        assert (found["ready"], found["audit_writable"], found["store_writable"]) == (0, 0, 1)

    def test_the_audit_log_was_unlinked(self) -> None:
        with Daemon(workers=2) as daemon:
            key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
            daemon.audit_log.unlink()
            for _ in range(4):  # whichever worker is asked
                self.refused(daemon, "unlinked")
            reply = daemon.request("POST", "/encrypt", {"key_id": key, "plaintext": ""})
            assert (reply.status, reply.code) == (503, "audit_unavailable")

    def test_the_audit_log_was_cut(self) -> None:
        with Daemon(workers=1) as daemon:
            for _ in range(3):
                daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
            os.truncate(daemon.audit_log, 10)
            self.refused(daemon, "shorter")

    def test_a_folder_stands_in_its_place(self) -> None:
        with Daemon(workers=1) as daemon:
            daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})
            daemon.audit_log.rename(daemon.data_dir / "moved")
            daemon.audit_log.mkdir()
            self.refused(daemon, "opened")


class TestStatus:
    def test_what_it_tells(self, kms: Session, daemon: Daemon) -> None:
        made = kms.create_dek("t")
        status = kms.ok("GET", "/status")
        assert status["version"] == __version__ and status["state"] == "ready"
        assert status["kek_id"] == made["kek_id"] and status["kek_version"] == "1"
        assert status["workers"] == 2 and status["uptime_seconds"] >= 0 and "rotation" in status
        assert status["deks"]["by_kek"][made["kek_id"]]["count"] == status["deks"]["total"] >= 1
        assert status["memory"]["kind"] in ("memfd_secret", "mlock", "unlocked")
        assert daemon.kek.hex() not in json.dumps(status)


def parsed(text: str) -> dict[str, dict[str, float]]:
    """A strict reading of the Prometheus text format: {family: {sample: value}}. AssertionError where it
    is another format."""
    families: dict[str, dict[str, float]] = {}
    name = kind = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            assert name not in families and re.fullmatch("[a-z_:][a-z0-9_:]*", name)
            families[name] = {}
        elif line.startswith("# TYPE "):
            _, _, typed, kind = line.split(" ")
            assert typed == name and kind in ("counter", "gauge", "histogram")
            assert (kind == "counter") == name.endswith("_total")
        else:
            sample = re.fullmatch(r'([a-z_:]+)((?:\{(?:[a-z_]+="[^"\\\n]*",?)+\})?) ([0-9.e+-]+)', line)
            assert sample is not None, line
            bare = re.sub("_(bucket|sum|count)$", "", sample[1]) if kind == "histogram" else sample[1]
            assert bare == name and sample[1] + sample[2] not in families[name]
            families[name][sample[1] + sample[2]] = float(sample[3])
    return families


def values(daemon: Daemon) -> dict[str, float]:
    """The samples without a label, by short names."""
    families = parsed(daemon.request("GET", "/metrics").body.decode())
    found = {name.replace("progressdb_kms_", ""): samples.get(name) for name, samples in families.items()}
    return {name: value for name, value in found.items() if value is not None}


UNKNOWN = {
    "kek_max_age_seconds",
    "backup_age_seconds",
    "backup_checked_age_seconds",
    "threads_limit",
    "open_files_limit",
    "locked_bytes_limit",
}
"""Families without a sample where the configuration or the shell sets no limit."""


class TestMetrics:
    def test_what_readyz_and_status_know(self, daemon: Daemon) -> None:
        key = daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
        before = values(daemon)
        daemon.ok("DELETE", f"/deks/{key}", {"pending_days": 30})
        found, status = values(daemon), daemon.ok("GET", "/status")
        assert (found["ready"], found["audit_writable"], found["store_writable"]) == (1, 1, 1)
        assert found["deletions_scheduled"] == before["deletions_scheduled"] + 1
        assert status["deletions"]["scheduled"] == found["deletions_scheduled"]
        assert status["deletions"]["next_at"] <= daemon.ok("GET", f"/deks/{key}")["delete_at"]
        assert (found["rotation_deks"], found["erasures_due"], found["erasures_held"]) == (0, 0, 0)
        assert 0 < found["kek_age_seconds"] <= status["kek_age_seconds"] < status["uptime_seconds"] + 60
        assert found["disk_free_bytes"] > 0 and "backup_age_seconds" not in found

    def test_limits_and_what_is_used_of_them(self, daemon: Daemon) -> None:
        """Of all workers, whichever answers; open files and threads are looked at each half second."""
        procs.wait_until(lambda: values(daemon)["open_files"] > 5, 60, "the workers to look at their files")
        with daemon.session() as first, daemon.session() as second:
            for session in (first, second):
                assert session.request("GET", "/healthz").status == 200
            found, limits = values(daemon), daemon.ok("GET", "/status")["limits"]
        assert found["connections"] >= 2 and found["connections_limit"] == 2048
        assert found["threads"] > 2 and found["body_bytes_limit"] > found["body_bytes"] >= 0
        assert limits["connections"]["limit"] == 2048 and limits["locked_bytes"]["used"] > 0
        for name, use in limits.items():
            assert (f"{name}_limit" in found) == (use["limit"] is not None)

    def test_the_format(self, kms: Session) -> None:
        reply = kms.request("GET", "/metrics")
        assert reply.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        families = parsed(reply.body.decode())
        names = {name.replace("progressdb_kms_", "") for name in families}
        assert names >= {"requests_total", "request_seconds", "audit_lines_total"}
        assert names >= {*FAMILIES} - UNKNOWN

    def test_audit_records_are_counted(self, daemon: Daemon) -> None:
        """Of all workers, some seconds late: no call waits for it."""
        daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)
        procs.wait_until(lambda: values(daemon)["audit_lines_total"] > 0, 60, "them to be counted")

    def test_histograms_add_up(self, kms: Session) -> None:
        kms.create_dek("t")
        seconds = parsed(kms.request("GET", "/metrics").body.decode())["progressdb_kms_request_seconds"]
        buckets: dict[str, list[float]] = {}
        for sample, value in seconds.items():
            if "_bucket" in sample:
                buckets.setdefault(re.findall('op="([a-z_]+)"', sample)[0], []).append(value)
        for op, counts in buckets.items():
            assert counts == sorted(counts)
            assert counts[-1] == seconds[f'progressdb_kms_request_seconds_count{{op="{op}"}}']
        assert buckets["create_dek"][-1] >= 1

    def test_summed_over_the_workers(self, daemon: Daemon) -> None:
        def count(status: str) -> float:
            found = parsed(daemon.request("GET", "/metrics").body.decode())
            return found["progressdb_kms_requests_total"][
                f'progressdb_kms_requests_total{{op="encrypt",status="{status}"}}'
            ]

        key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        before = count("2xx"), count("4xx")
        sessions = [daemon.session() for _ in range(8)]
        for session in sessions:
            session.ok("POST", "/encrypt", {"key_id": key, "plaintext": ""})
            session.request("POST", "/encrypt", {"key_id": key})
        assert (count("2xx"), count("4xx")) == (before[0] + 8, before[1] + 8)
        for session in sessions:
            session.close()


class TestAudit:
    CALLS = [
        ("POST", "/create_dek_for_thread", {"thread_id": "t"}, "create_dek"),
        ("GET", "/get_wrapped?key_id=KEY", None, "get_wrapped"),
        ("POST", "/encrypt", {"key_id": "KEY", "plaintext": ""}, "encrypt"),
        ("POST", "/decrypt", {"key_id": "KEY", "ciphertext": "AAAA"}, "decrypt"),
        ("POST", "/encrypt", {"key_id": "KEY"}, "encrypt"),
        ("POST", "/encrypt_batch", {"items": [{"key_id": "KEY", "plaintext": ""}]}, "encrypt_batch"),
        ("POST", "/wrap", {"dek": "x"}, "wrap"),
        ("POST", "/unwrap", {"wrapped": "x"}, "unwrap"),
        ("POST", "/rewrap", {"key_id": "KEY", "new_kek_hex": "x"}, "rewrap"),
        ("POST", "/rotate_kek", {"new_kek_hex": "x"}, "rotate_kek"),
        ("GET", "/deks", None, "list_deks"),
        ("GET", "/deks/KEY", None, "describe_dek"),
        ("POST", "/deks/KEY/disable", None, "disable_dek"),
        ("POST", "/deks/KEY/enable", None, "enable_dek"),
        ("DELETE", "/deks/KEY", None, "delete_dek"),
        ("POST", "/clock/accept", None, "accept_clock"),
    ]

    @pytest.mark.parametrize(("method", "path", "body", "op"), CALLS, ids=lambda value: str(value)[:30])
    def test_one_record_a_call_and_its_receipt(
        self, kms: Session, daemon: Daemon, method: str, path: str, body: Any, op: str
    ) -> None:
        key = kms.create_dek("thread 7")["key_id"]
        before = len(events(daemon))
        fields = {name: key if value == "KEY" else value for name, value in body.items()} if body else None
        if fields and "items" in fields:
            fields = {"items": [{"key_id": key, "plaintext": ""}]}
        reply = kms.request(method, path.replace("KEY", key), fields)
        (event,) = events(daemon)[before:]
        assert event["op"] == op and event["status"] == reply.status
        assert event["outcome"] == ("ok" if reply.status < 300 else "failed")
        assert (event["uid"], event["gid"], event["pid"]) == (os.geteuid(), os.getegid(), os.getpid())
        assert event["request_id"] and event["ts"].endswith("Z")
        assert reply.status < 300 or event["code"] == reply.code
        chain, seq, _ = reply.headers["X-KMS-Audit"].split(":")
        assert RECEIPT.fullmatch(reply.headers["X-KMS-Audit"]) and (event["chain"], event["seq"]) == (
            chain,
            int(seq),
        )
        if op in ("encrypt", "get_wrapped") and reply.status == 200:
            assert (event["key_id"], event["thread_id"]) == (key, "thread 7")

    def test_a_batch_is_one_record_with_its_keys(self, kms: Session, daemon: Daemon) -> None:
        keys = sorted(kms.create_dek("t")["key_id"] for _ in range(3))
        items = [{"key_id": key, "plaintext": ""} for key in [*keys, keys[0], "k_absent"]]
        kms.ok("POST", "/encrypt_batch", {"items": items})
        event = events(daemon)[-1]
        assert (event["count"], event["failed"], event["keys"]) == (5, 1, [*keys, "k_absent"])

    def test_what_is_no_key_operation_has_no_receipt(self, kms: Session) -> None:
        for path in ("/healthz", "/status", "/metrics", "/nothing"):
            assert "X-KMS-Audit" not in kms.request("GET", path).headers

    @pytest.mark.parametrize(
        ("path", "header", "status"),
        [
            ("/encrypt", "Content-Length: 999999999", 413),
            ("/encrypt", "Content-Length: 2\r\nContent-Encoding: gzip", 415),
            ("/wrap", "Transfer-Encoding: chunked", 411),
        ],
    )
    def test_what_is_refused_by_its_head_is_no_operation_yet(
        self, daemon: Daemon, path: str, header: str, status: int
    ) -> None:
        before = len(events(daemon))
        request = f"POST {path} HTTP/1.1\r\nHost: u\r\nContent-Type: application/json\r\n{header}\r\n\r\n"
        answer = raw(daemon.socket, [request.encode()])
        assert answer.startswith(b"HTTP/1.1 %d " % status) and b"x-kms-audit" not in answer.lower()
        assert len(events(daemon)) == before

    def test_receipts_hold_the_log_to_what_callers_saw(self, tmp_path: Any) -> None:
        with Daemon(workers=2) as daemon:
            receipts = []
            for _ in range(6):
                reply = daemon.request("POST", "/create_dek_for_thread", {"thread_id": "t"})
                receipts.append(reply.headers["X-KMS-Audit"])
            daemon.stop()
            file = tmp_path / "receipts"
            file.write_text("".join(f"{receipt} message {n}\n" for n, receipt in enumerate(receipts)))
            good = daemon.offline("audit", "verify", "--receipts", str(file))
            assert good.returncode == 0, good.stderr
            file.write_text(receipts[0][:-16] + "0" * 16 + "\n")
            bad = daemon.offline("audit", "verify", "--receipts", str(file))
            assert bad.returncode == 1 and b"receipt" in bad.stderr + bad.stdout


class TestOpenapi:
    def test_each_route_is_described(self, kms: Session) -> None:
        from progressdb_kms.wire.routes import ROUTES

        document = kms.ok("GET", "/openapi.json")
        assert document["openapi"].startswith("3.1") and document["info"]["version"] == __version__
        described = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
        assert described == {(route.method, route.path) for route in ROUTES}


def test_a_scrape_stops_nobody(daemon: Daemon) -> None:
    """Calls go on while metrics are read again and again."""
    key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
    stop = threading.Event()
    scraped: list[int] = []

    def scrape() -> None:
        with daemon.session() as session:
            while not stop.is_set():
                scraped.append(session.request("GET", "/metrics").status)

    thread = threading.Thread(target=scrape)
    thread.start()
    with daemon.session() as session:
        for _ in range(200):
            session.ok("POST", "/encrypt", {"key_id": key, "plaintext": ""})
    stop.set()
    thread.join()
    assert scraped and set(scraped) == {200}
