"""The life of a DEK over the socket: made, found, listed, disabled, enabled, deleted, shredded."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any
from unittest import mock

import pytest

from progressdb_kms.store.contract import DekRecord
from progressdb_kms.wire.deks import LOOK, list_deks
from tests.harness import Daemon, Session
from tests.harness.wire import b64

DESCRIPTION = {"key_id", "thread_id", "kek_id", "kek_version", "created_at", "state"}
TOLD = DESCRIPTION | {"usage"}


def use(kms: Session, key: str) -> int:
    return kms.request("POST", "/encrypt", {"key_id": key, "plaintext": "aGk="}).status


class TestMade:
    @pytest.mark.parametrize("name", ["thread_id", "thread_key"])
    def test_for_a_thread_as_the_servers_client_asks(self, kms: Session, name: str) -> None:
        made = kms.ok("POST", "/create_dek_for_thread", {name: "thread 1"})
        assert set(made) == {"key_id", "wrapped", "kek_id", "kek_version"}
        assert all(isinstance(value, str) for value in made.values()) and made["kek_version"] == "1"
        assert made["key_id"].startswith("k_")
        assert kms.ok("GET", "/get_wrapped?key_id=" + made["key_id"]) == {
            name: made[name] for name in ("wrapped", "kek_id", "kek_version")
        }
        assert kms.ok("GET", "/deks/" + made["key_id"])["thread_id"] == "thread 1"

    def test_each_call_makes_a_new_one(self, kms: Session) -> None:
        made = [kms.create_dek("t") for _ in range(3)]
        assert len({one["key_id"] for one in made}) == len({one["wrapped"] for one in made}) == 3

    def test_both_names_of_the_thread(self, kms: Session) -> None:
        kms.ok("POST", "/create_dek_for_thread", {"thread_id": "t", "thread_key": "t"})
        reply = kms.request("POST", "/create_dek_for_thread", {"thread_id": "t", "thread_key": "u"})
        assert (reply.status, reply.code) == (400, "invalid_thread_id")

    def test_with_a_key_id_of_the_callers_choice(self, kms: Session) -> None:
        made = kms.ok("POST", "/deks", {"thread_id": "t", "key_id": "mine:1"}, status=201)
        assert made["key_id"] == "mine:1" and made["kek_version"] == "1" and set(made) > DESCRIPTION
        assert kms.ok("POST", "/deks", {"thread_key": "t", "key_id": "mine:1"}, status=201) == made
        reply = kms.request("POST", "/deks", {"thread_id": "u", "key_id": "mine:1"})
        assert (reply.status, reply.code) == (409, "key_exists")
        assert kms.ok("POST", "/deks", {"thread_id": "t"}, status=201)["key_id"].startswith("k_")

    @pytest.mark.parametrize("thread", ["ünï 🔐", "x" * 512, '"; DROP TABLE deks; --'])
    def test_a_thread_id_comes_back_as_it_was(self, kms: Session, thread: str) -> None:
        key = kms.create_dek(thread)["key_id"]
        assert kms.ok("GET", "/deks/" + key)["thread_id"] == thread

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({"thread_id": 7}, "invalid_thread_id"),
            ({"thread_id": ""}, "invalid_thread_id"),
            ({"thread_id": "x" * 513}, "invalid_thread_id"),
            ({"thread_id": "a\nb"}, "invalid_thread_id"),
            ({"thread_id": "t", "key_id": "a/b"}, "invalid_key_id"),
            ({"thread_id": "t", "key_id": "x" * 129}, "invalid_key_id"),
            ({"thread_id": "t", "key_id": 1}, "invalid_key_id"),
            ({"thread_id": "t", "other": 1}, "unknown_field"),
        ],
        ids=str,
    )
    def test_bad_fields_are_named(self, kms: Session, fields: dict[str, Any], code: str) -> None:
        reply = kms.request("POST", "/deks", fields)
        assert (reply.status, reply.code) == (400, code)


@pytest.fixture(scope="module")
def keys(daemon: Daemon) -> list[str]:
    made = [f"listed:{n}" for n in range(7)]
    with daemon.session() as kms:
        for n, key in enumerate(made):
            kms.ok("POST", "/deks", {"thread_id": f"listed {n % 2}", "key_id": key}, status=201)
    return made


class TestListed:
    def test_page_by_page(self, kms: Session, keys: list[str]) -> None:
        found: list[str] = []
        cursor = "listed"
        while cursor:
            page = kms.ok("GET", f"/deks?limit=3&cursor={cursor}")
            assert len(page["deks"]) <= 3
            found += [row["key_id"] for row in page["deks"]]
            cursor = page["next_cursor"]
        assert found[: len(keys)] == keys and len(found) == len(set(found))

    @pytest.mark.parametrize("size", [1, LOOK - 1, LOOK, 2 * LOOK, 2 * LOOK + 1, 130, 1000])
    def test_others_are_let_in_behind_each_few(self, size: int) -> None:
        """All of it is told once, in order, and each page but the last is full."""
        store = [DekRecord(f"k{n:03}", "t", b"", "", 0, "") for n in range(130)]
        service = mock.Mock()
        service.page = lambda after, limit, _: [one for one in store if one.key_id > after][:limit]
        service.usage.return_value = {}
        found, cursor = [], ""
        for begun in range(0, len(store), size):
            call: Any = mock.Mock(rights=None)
            call.head.query = {"limit": str(size), "cursor": cursor}
            page = json.loads(list_deks(mock.Mock(service=service), call).body)
            here, whole = min(size, len(store) - begun), begun + size >= len(store)
            assert len(page["deks"]) == here
            assert call.breathe.call_count == (here + LOOK - 1) // LOOK - whole
            found += [row["key_id"] for row in page["deks"]]
            cursor = page["next_cursor"]
            assert (cursor is None) == whole
        assert found == [one.key_id for one in store]

    def test_of_a_thread(self, kms: Session, keys: list[str]) -> None:
        page = kms.ok("GET", "/deks?thread_id=listed%201")
        assert [row["key_id"] for row in page["deks"]] == keys[1::2] and page["next_cursor"] is None
        assert all(set(row) == TOLD for row in page["deks"])  # and so no wrapped bytes

    @pytest.mark.parametrize(
        ("query", "code"),
        [
            ("limit=0", "invalid_limit"),
            ("limit=1001", "invalid_limit"),
            ("limit=1_0", "invalid_limit"),
            ("limit=-1", "invalid_limit"),
            ("limit=", "invalid_limit"),
            ("cursor=a/b", "invalid_cursor"),
            ("thread_id=", "invalid_thread_id"),
            ("page=2", "unknown_field"),
            ("unused_for=", "invalid_unused_for"),
            ("unused_for=90d", "invalid_unused_for"),
            ("unused_for=-1", "invalid_unused_for"),
            ("unused_for=10000000000", "invalid_unused_for"),
        ],
    )
    def test_bad_queries_are_named(self, kms: Session, query: str, code: str) -> None:
        reply = kms.request("GET", "/deks?" + query)
        assert (reply.status, reply.code) == (400, code)


class TestUnknown:
    @pytest.mark.parametrize(
        ("method", "path", "body"),
        [
            ("GET", "/get_wrapped?key_id=k_absent", None),
            ("GET", "/deks/k_absent", None),
            ("POST", "/deks/k_absent/disable", None),
            ("POST", "/deks/k_absent/enable", None),
            ("DELETE", "/deks/k_absent", None),
            ("POST", "/encrypt", {"key_id": "k_absent", "plaintext": ""}),
            ("POST", "/decrypt", {"key_id": "k_absent", "ciphertext": "AAAA"}),
            ("POST", "/rewrap", {"key_id": "k_absent", "new_kek_hex": "0123456789abcdee" * 4}),
            ("POST", "/encrypt?key_id=k_absent", b"raw"),
        ],
    )
    def test_404(self, kms: Session, method: str, path: str, body: Any) -> None:
        reply = kms.request(method, path, body)
        assert (reply.status, reply.code) == (404, "key_not_found")

    @pytest.mark.parametrize("key_id", ["%2e%2e%2fetc", "a%20b", "x" * 129, "_x"])
    def test_malformed(self, kms: Session, key_id: str) -> None:
        for path in (f"/deks/{key_id}", f"/get_wrapped?key_id={key_id}"):
            assert kms.request("GET", path).status in (400, 404)

    def test_get_wrapped_wants_a_key_id(self, kms: Session) -> None:
        assert kms.request("GET", "/get_wrapped").code == "missing_key_id"
        assert kms.request("GET", "/get_wrapped?key_id=a&x=1").code == "unknown_field"


class TestStates:
    def state(self, kms: Session, key: str) -> str:
        return str(kms.ok("GET", "/deks/" + key)["state"])

    def test_disabled_and_enabled(self, kms: Session) -> None:
        key = kms.create_dek("t")["key_id"]
        sealed = kms.encrypt(key, b"text")
        for _ in range(2):  # a caller that lost the answer asks again
            assert kms.ok("POST", f"/deks/{key}/disable")["state"] == "disabled"
        for path, body in (
            ("/encrypt", {"key_id": key, "plaintext": ""}),
            ("/decrypt", {"key_id": key, "ciphertext": "AAAA"}),
        ):
            reply = kms.request("POST", path, body)
            assert (reply.status, reply.code) == (423, "key_disabled") and "enable" in reply.json()["error"][
                "hint"
            ]
        assert kms.request("GET", f"/get_wrapped?key_id={key}").status == 423
        for _ in range(2):
            assert kms.ok("POST", f"/deks/{key}/enable")["state"] == "enabled"
        assert kms.decrypt(key, sealed) == b"text"

    def test_an_unwrap_of_a_disabled_one(self, kms: Session) -> None:
        made = kms.create_dek("t")
        kms.ok("POST", f"/deks/{made['key_id']}/disable")
        assert kms.request("POST", "/unwrap", {"wrapped": made["wrapped"]}).status == 423

    def test_deletion_is_scheduled_and_cancelled(self, kms: Session) -> None:
        key = kms.create_dek("t")["key_id"]
        pending = kms.ok("DELETE", "/deks/" + key)
        assert pending["state"] == "pending_deletion" and pending["delete_at"] > pending["created_at"]
        assert use(kms, key) == 423
        again = kms.ok("DELETE", "/deks/" + key, {"pending_days": 365})
        assert again["delete_at"] > pending["delete_at"]
        assert "delete_at" not in kms.ok("POST", f"/deks/{key}/enable")
        assert use(kms, key) == 200

    def test_the_default_is_seven_days(self, kms: Session) -> None:
        key = kms.create_dek("t")["key_id"]
        at = datetime.strptime(kms.ok("DELETE", "/deks/" + key)["delete_at"], "%Y-%m-%dT%H:%M:%S.%fZ")
        left = at.replace(tzinfo=timezone.utc) - datetime.now(timezone.utc)
        assert timedelta(days=6, hours=23) < left <= timedelta(days=7)

    def test_shredded_for_ever(self, kms: Session) -> None:
        made = kms.create_dek("t")
        key = made["key_id"]
        sealed = kms.encrypt(key, b"text")
        for _ in range(2):
            gone = kms.ok("DELETE", "/deks/" + key, {"immediately": True})
            assert gone["state"] == "shredded" and gone["shredded_at"]
        for reply in (
            kms.request("POST", "/decrypt", {"key_id": key, "ciphertext": "AAAA"}),
            kms.request("GET", "/get_wrapped?key_id=" + key),
            kms.request("POST", "/unwrap", {"wrapped": made["wrapped"]}),
            kms.request("POST", "/rewrap", {"key_id": key, "new_kek_hex": "0123456789abcdee" * 4}),
        ):
            assert (reply.status, reply.code) == (410, "key_shredded")
        for action in ("enable", "disable"):
            assert kms.request("POST", f"/deks/{key}/{action}").status == 410
        assert kms.request("DELETE", "/deks/" + key).status == 410
        assert kms.request("POST", "/deks", {"thread_id": "t", "key_id": key}).status == 410
        assert self.state(kms, key) == "shredded"
        other = kms.create_dek("t")["key_id"]
        assert kms.request("POST", "/decrypt", {"key_id": other, "ciphertext": b64(sealed)}).status == 422

    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({"immediately": "yes"}, "invalid_immediately"),
            ({"pending_days": 0}, "invalid_pending_days"),
            ({"pending_days": 366}, "invalid_pending_days"),
            ({"pending_days": 1.5}, "invalid_pending_days"),
            ({"pending_days": True}, "invalid_pending_days"),
            ({"pending_days": 3, "immediately": True}, "invalid_pending_days"),
            ({"now": True}, "unknown_field"),
        ],
        ids=str,
    )
    def test_bad_fields_delete_nothing(self, kms: Session, fields: dict[str, Any], code: str) -> None:
        key = kms.create_dek("t")["key_id"]
        reply = kms.request("DELETE", "/deks/" + key, fields)
        assert (reply.status, reply.code) == (400, code)
        assert self.state(kms, key) == "enabled" and use(kms, key) == 200
