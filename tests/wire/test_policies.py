"""Policies on the real daemon: by operation, key, thread and rate, by item in batches, for lists too; renewed
by SIGHUP, all or nothing; refusals are counted on the record with the entry that decides."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from progressdb_kms.wire.routes import ROUTES
from tests.harness import Daemon
from tests.harness.procs import wait_until
from tests.harness.wire import Reply, b64
from tests.wire.test_peers import as_user

APP, OTHER = 20_002, 20_003
MANUAL = Path(__file__).parents[2] / "progressdb_kms" / "manual"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can connect as another user")

POLICIES: list[dict[str, Any]] = [
    {
        "uid": APP,
        "operations": ["encrypt", "decrypt", "list_deks", "describe_dek", "create_dek", "reencrypt"],
    },
    {"uid": APP, "threads": ["room-*"]},
    {"gid": APP, "keys": ["k_*"]},
]


def serve(workers: int, policies: list[dict[str, Any]]) -> Daemon:
    daemon = Daemon({"policies": policies}, workers=workers).start()
    daemon.home.chmod(0o755)
    daemon.socket.chmod(0o666)
    with daemon.session() as kms:
        for key_id, thread in (("k_1", "room-1"), ("k_2", "hall"), ("x_3", "room-3"), ("k_4", "room-4")):
            kms.ok("POST", "/deks", {"key_id": key_id, "thread_id": thread}, 201)
    return daemon


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    one = serve(2, POLICIES)
    yield one
    one.close()


def ask(daemon: Daemon, method: str, path: str, body: Any = None, uid: int = APP) -> Reply:
    with as_user(uid):
        return daemon.request(method, path, body)


def encrypt(key_id: str) -> dict[str, str]:
    return {"key_id": key_id, "plaintext": b64(b"hi")}


def entry(reply: Reply) -> str:
    assert (reply.status, reply.code) == (403, "policy_refused")
    return str(reply.json()["error"]["message"].rpartition("entry ")[2].rstrip(")"))


def test_what_is_allowed_works(daemon: Daemon) -> None:
    sealed = ask(daemon, "POST", "/encrypt", encrypt("k_1"))
    assert sealed.status == 200
    again = ask(daemon, "POST", "/decrypt", {"key_id": "k_1", "ciphertext": sealed.json()["ciphertext"]})
    assert again.json() == {"plaintext": b64(b"hi")}
    assert ask(daemon, "POST", "/deks", {"thread_id": "room-9"}).status == 201


def test_each_entry_refuses_and_is_named(daemon: Daemon) -> None:
    assert entry(ask(daemon, "GET", "/get_wrapped?key_id=k_1")) == "1"
    assert entry(ask(daemon, "DELETE", "/deks/k_1", {"immediately": True})) == "1"
    assert entry(ask(daemon, "POST", "/encrypt", encrypt("k_2"))) == "2"
    assert entry(ask(daemon, "POST", "/encrypt", encrypt("x_3"))) == "3"
    assert entry(ask(daemon, "GET", "/deks/k_2")) == "2"
    assert entry(ask(daemon, "POST", "/deks", {"thread_id": "cellar"})) == "2"
    assert entry(ask(daemon, "POST", "/deks", {"thread_id": "room-1", "key_id": "y"})) == "3"
    move = {"key_id": "k_1", "new_key_id": "k_2", "ciphertext": b64(bytes(28))}
    assert entry(ask(daemon, "POST", "/reencrypt", move)) == "2"


def counted(daemon: Daemon, name: str) -> int:
    page = daemon.request("GET", "/metrics").body.decode()
    return int(page.split(f"\nprogressdb_kms_{name} ")[1].split("\n")[0])


def test_others_are_as_before(daemon: Daemon) -> None:
    assert ask(daemon, "POST", "/encrypt", encrypt("k_2"), uid=OTHER).status == 200
    assert ask(daemon, "GET", "/get_wrapped?key_id=k_1", uid=OTHER).status == 200
    assert ask(daemon, "GET", "/healthz").status == 200


def test_a_raw_body_and_an_inline_blob_are_judged_too(daemon: Daemon) -> None:
    with as_user(APP):
        raw = daemon.request("POST", "/encrypt?key_id=k_2", b"hi")
    assert entry(raw) == "2"
    blob = ask(daemon, "GET", "/get_wrapped?key_id=k_2", uid=OTHER).json()["wrapped"]
    assert entry(ask(daemon, "POST", "/encrypt", {"wrapped": blob, "plaintext": ""})) == "2"
    unknown = ask(daemon, "POST", "/wrap", {"dek": b64(bytes(range(32))), "key_id": "k_77"}, uid=OTHER)
    inline = {"wrapped": unknown.json()["wrapped"], "plaintext": ""}
    assert entry(ask(daemon, "POST", "/encrypt", inline)) == "2"  # nobody knows its thread


def test_what_one_may_not_use_looks_like_what_is_not_there(daemon: Daemon) -> None:
    """Whether it is there, disabled or shredded is no matter of theirs; by all calls alike."""
    daemon.ok("POST", "/deks", {"key_id": "k_5", "thread_id": "hall"}, 201)
    daemon.ok("POST", "/deks", {"key_id": "k_6", "thread_id": "hall"}, 201)
    daemon.ok("POST", "/deks/k_5/disable", {})
    daemon.ok("DELETE", "/deks/k_6", {"immediately": True})
    for key_id in ("k_5", "k_6", "k_none"):
        assert entry(ask(daemon, "POST", "/encrypt", encrypt(key_id))) == "2"
        assert entry(ask(daemon, "GET", f"/deks/{key_id}")) == "2"
        items = ask(daemon, "POST", "/encrypt_batch", {"items": [encrypt(key_id)]}).json()["items"]
        assert items[0]["error"]["code"] == "policy_refused"
    assert ask(daemon, "POST", "/encrypt", encrypt("k_none"), uid=OTHER).status == 404


def test_batches_are_judged_by_item(daemon: Daemon) -> None:
    items = [encrypt(key_id) for key_id in ("k_1", "k_2", "k_4", "x_3")]
    before = counted(daemon, "policy_denials_total")
    reply = ask(daemon, "POST", "/encrypt_batch", {"items": items})
    found = [item.get("error", {}).get("code", "ok") for item in reply.json()["items"]]
    assert reply.status == 200 and found == ["ok", "policy_refused", "ok", "policy_refused"]
    last = json.loads(daemon.audit_log.read_bytes().splitlines()[-1])["event"]
    assert (last["op"], last["failed"], last["denied_by"]) == ("encrypt_batch", 2, [2, 3])
    assert entry(ask(daemon, "POST", "/encrypt", encrypt("k_2"))) == "2"
    assert counted(daemon, "policy_denials_total") == before + 3


def test_what_one_may_not_use_one_does_not_see(daemon: Daemon) -> None:
    seen, cursor = [], ""
    while True:
        page = ask(daemon, "GET", f"/deks?limit=1&cursor={cursor}").json()
        seen += [dek["key_id"] for dek in page["deks"]]
        if page["next_cursor"] is None:
            break
        cursor = page["next_cursor"]
    everything = [dek["key_id"] for dek in daemon.ok("GET", "/deks")["deks"]]
    assert {"k_1", "k_4"} <= set(seen) and {"k_2", "x_3"}.isdisjoint(seen)
    assert set(seen) < set(everything) and len(seen) == len(set(seen))


@pytest.mark.fresh  # its key is drawn when the module is loaded
def test_a_page_that_is_not_the_last_names_nobody_else_s_dek() -> None:
    """Where more is hidden than one call looks through. Both workers know the cursor, nobody else made it."""
    daemon = serve(2, [{"uid": APP, "threads": ["room-*"]}])
    try:
        with daemon.session() as kms:
            for number in range(70):
                body = {"key_id": f"others-{number:02}", "thread_id": "cellar"}
                kms.ok("POST", "/deks", body, 201)
        seen, cursors = [], [""]
        while cursors[-1] is not None:
            page = ask(daemon, "GET", f"/deks?limit=1&cursor={cursors[-1]}").json()
            seen += [dek["key_id"] for dek in page["deks"]]
            cursors.append(page["next_cursor"])
        assert seen == ["k_1", "k_4", "x_3"]
        assert not any("others" in (cursor or "") for cursor in cursors)
        veiled = next(cursor for cursor in cursors if cursor and cursor.startswith("~"))
        for wrong in ("~00", veiled[:-2], veiled[:-1] + ("0" if veiled[-1] != "0" else "1"), "~", "~xy"):
            reply = ask(daemon, "GET", f"/deks?cursor={wrong}")
            told = (400, "invalid_cursor") if wrong in ("~", "~xy") else (409, "wrong_cursor")
            assert (reply.status, reply.code) == told, wrong
        daemon.stop()
        daemon.start()
        daemon.socket.chmod(0o666)
        assert ask(daemon, "GET", f"/deks?cursor={veiled}").code == "wrong_cursor"
        for malformed in ("limit=0", "thread_id=%00", "unused_for=x"):
            assert ask(daemon, "GET", f"/deks?cursor={veiled}&{malformed}").status == 400
    finally:
        daemon.close()


def test_refusals_are_counted_on_the_record(short_tmp: Any) -> None:
    daemon = serve(1, POLICIES)
    try:
        for _ in range(20):
            assert entry(ask(daemon, "POST", "/encrypt", encrypt("k_2"))) == "2"
        daemon.stop()
        records = [json.loads(line)["event"] for line in daemon.audit_log.read_bytes().splitlines()]
        denied = [event for event in records if event["outcome"] == "refused"]
        assert [(event["op"], event["policy"], event["count"]) for event in denied] == [
            ("encrypt", 2, 1),
            ("encrypt", 2, 19),
        ]
        assert {event["uid"] for event in denied} == {APP} and {event["status"] for event in denied} == {403}
    finally:
        daemon.close()


def test_a_rate_holds_over_workers() -> None:
    daemon = serve(2, [{"uid": APP, "per_second": 20}])
    try:
        answers: list[Reply] = []
        begun = time.monotonic()
        for _ in range(30):
            with as_user(APP):  # each over a connection of its own: both workers serve
                answers.append(daemon.request("POST", "/encrypt", encrypt("k_1")))
        seconds = int(time.monotonic() - begun) + 2
        late = [reply for reply in answers if reply.status == 429]
        assert {reply.status for reply in answers} <= {200, 429}
        assert len(answers) - len(late) <= (20 + 1) * seconds
        assert all(reply.code == "rate_limited" and reply.headers["Retry-After"] == "1" for reply in late)
        time.sleep(1.1)
        batch = ask(daemon, "POST", "/encrypt_batch", {"items": [encrypt("k_1")] * 50})
        codes = [item.get("error", {}).get("code", "ok") for item in batch.json()["items"]]
        assert codes.count("ok") == 20 and codes.count("rate_limited") == 30
        assert ask(daemon, "POST", "/encrypt", encrypt("k_1"), uid=OTHER).status == 200
    finally:
        daemon.close()


def test_every_call_is_within_the_rate_and_a_batch_by_its_items() -> None:
    """One of `reencrypt` too, and what is refused or malformed: each is at least a line of the audit log."""
    daemon = serve(1, [{"uid": APP, "per_second": 2}])
    try:
        move = {"key_id": "k_1", "new_key_id": "k_4", "ciphertext": b64(bytes(28))}
        calls: list[tuple[str, Any]] = [
            ("/reencrypt", move),
            ("/encrypt_batch", {"items": [{}]}),
            ("/decrypt_batch", {"no": "items"}),
            ("/encrypt_batch", {"items": [encrypt("k_none")]}),
        ]
        for path, body in calls:
            begun = time.monotonic()
            statuses = [ask(daemon, "POST", path, body).status for _ in range(30)]
            seconds = int(time.monotonic() - begun) + 2
            assert len(statuses) - statuses.count(429) <= 2 * seconds, (path, statuses)
    finally:
        daemon.close()


def test_a_peer_is_in_all_of_its_groups(daemon: Daemon) -> None:
    """The group of the socket is seldom the first one of those that are let in by it."""
    before = os.getgroups()
    os.setgroups([OTHER + 1, APP])
    try:
        assert entry(ask(daemon, "POST", "/encrypt", encrypt("x_3"), uid=OTHER)) == "3"
        assert ask(daemon, "POST", "/encrypt", encrypt("k_2"), uid=OTHER).status == 200
        os.setgroups(range(30_000, 30_300))  # more than one can ask for: any may be among them
        assert entry(ask(daemon, "POST", "/encrypt", encrypt("x_3"), uid=OTHER)) == "3"
    finally:
        os.setgroups(before)
    assert ask(daemon, "POST", "/encrypt", encrypt("x_3"), uid=OTHER).status == 200


@pytest.mark.parametrize("workers", [1, 2])
def test_sighup_renews_them_all_or_nothing(workers: int) -> None:
    daemon = serve(workers, POLICIES)
    try:
        assert ask(daemon, "POST", "/encrypt", encrypt("k_2")).status == 403
        with as_user(APP):
            kms = daemon.session()
            assert kms.request("POST", "/encrypt", encrypt("k_2")).status == 403
        with kms:
            for config, allowed, told in (
                ([{"uid": APP, "keys": ["k_1"]}], False, "SIGHUP: policies in force: 1"),
                ([{"uid": APP, "key": ["k_2"]}], False, "unknown key 'key', did you mean 'keys'?\n"),
                ([], True, "SIGHUP: policies in force: 0; peer rules and limits are those of the start"),
            ):
                daemon.write_config({"policies": config})
                daemon.signal(signal.SIGHUP)
                wait_until(lambda told=told: told in daemon.stderr, 20, told)  # type: ignore[misc]
                status = 200 if allowed else 403
                wait_until(
                    lambda status=status: kms.request("POST", "/encrypt", encrypt("k_2")).status == status,  # type: ignore[misc]
                    20,
                    f"{status} on the connection that is open",
                )
    finally:
        daemon.close()


def links_elsewhere(path: Path) -> None:
    path.rename(path.with_suffix(".mine"))
    other = path.with_suffix(".other")
    other.write_text("policies: []\n")
    os.chown(other, APP, APP)
    path.symlink_to(other)


def is_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DISTRUSTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (Path.unlink, "can't be read: No such file or directory"),
    "others may write": (lambda path: path.chmod(0o666), "may be written by others (mode 0666)"),
    "another's": (lambda path: os.chown(path, APP, APP), f"belongs to uid {APP}"),
    "a link to another's": (links_elsewhere, f"belongs to uid {APP}"),
    "a pipe": (is_a_pipe, "is no regular file"),
    "too long": (lambda path: path.write_text("# long\n" * 200_000), "is larger than 1048576 bytes"),
    "no YAML": (lambda path: path.write_bytes(b"policies: [\xff\xfe"), "bytes that are no text"),
    "deep": (lambda path: path.write_text("policies: " + "[" * 50_000), "nested"),
    "a bomb": (lambda path: path.write_text("a: &a [1,1]\nb: &b [*a,*a]\npolicies: [*b,*b]\n"), "alias"),
    "too many": (
        lambda path: path.write_text("policies: [" + "{uid: 1, keys: [a]}," * 101 + "]"),
        "at most 100",
    ),
}


def test_a_file_that_can_t_be_trusted_changes_nothing() -> None:
    """Who may write to it could take the policies away from himself."""
    daemon = serve(1, POLICIES)
    try:
        for name, (spoil, told) in DISTRUSTED.items():
            daemon.config_file.unlink(missing_ok=True)
            daemon.write_config({"policies": []})
            spoil(daemon.config_file)
            seen = len(daemon.stderr)
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: "the policies stay as they were" in daemon.stderr[seen:], 60, name)  # noqa: B023
            line = next(line for line in daemon.stderr[seen:].splitlines() if "stay as they were" in line)
            assert told in line, (name, line)
            assert ask(daemon, "POST", "/encrypt", encrypt("k_2")).status == 403, name
    finally:
        daemon.close()


def test_the_manual_s_entry_for_a_scraper_leaves_no_more_than_it_says() -> None:
    """DEKs are listed to it, and it sees none; what has no operation is whoever's is served."""
    found = re.search(r"`(policies: \[\{uid: 33, .*\])`, by which", (MANUAL / "monitoring.md").read_text())
    assert found is not None
    entry_of_manual = yaml.safe_load(found[1])["policies"][0]
    daemon = serve(1, [{**entry_of_manual, "uid": APP}])
    try:
        for route in ROUTES:
            path = route.path.replace("{key_id}", "k_1")
            reply = ask(daemon, route.method, path, None if route.method == "GET" else {})
            allowed = not route.op or route.op == "list_deks"
            assert (reply.status == 200) if allowed else (reply.code == "policy_refused"), route.path
        assert ask(daemon, "GET", "/deks").json() == {"deks": [], "next_cursor": None}
    finally:
        daemon.close()


# ---- the command ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, code, told",
    [
        (["--op", "decrypt"], 0, "every policy that names this peer allows it"),
        (["--op", "decrypt_batch", "--key-id", "k_1", "--thread-id", "room-1"], 0, "[1, 2]"),
        (["--op", "unwrap"], 1, "may not unwrap (policies, entry 1)"),
        (["--op", "decrypt", "--thread-id", "hall"], 1, "entry 2)"),
        (["--op", "decrypt", "--key-id", "x", "--gid", str(APP), "--thread-id", "room-1"], 1, "entry 3)"),
        (["--op", "list", "--thread-id", "room-1"], 0, "every policy"),
        (["--op", "decrypt"], 0, "--key-id and --thread-id ask about one"),
        (
            ["--op", "decrypt", "--key-id", "k_1"],
            2,
            "entry 2 of policies names threads: give --thread-id too",
        ),
        (["--op", "create_dek", "--key-id", "room-1"], 0, "[1, 2]"),
        (["--op", "shred"], 1, "may not delete_dek (policies, entry 1)"),
        (["--op", "POST /deks/{key_id}/disable"], 1, "may not disable_dek (policies, entry 1)"),
        (["--op", "crypt"], 2, "known: accept_clock, create_dek, decrypt, delete_dek, "),
    ],
)
def test_policy_test(daemon: Daemon, words: list[str], code: int, told: str) -> None:
    done = daemon.offline("policy", "test", "--uid", str(APP), *words, "--json")
    assert done.returncode == code and told in (done.stdout + done.stderr).decode(), done


def test_policy_test_asks_in_the_order_of_the_daemon(short_tmp: Any) -> None:
    """What a policy refuses is counted, and of many times one line a minute: so it is asked before the list
    of admins, whose every refusal is a line."""
    config = {"admin_peer_uids": [0], "policies": [{"uid": APP, "operations": ["encrypt"], "per_second": 2}]}
    with Daemon(config, workers=1) as daemon:
        daemon.home.chmod(0o755)
        daemon.socket.chmod(0o666)
        codes = {ask(daemon, "POST", "/rotate_kek", {"new_kek_hex": "x"}).code for _ in range(5)}
        assert codes == {"policy_refused"}
        done = daemon.offline("policy", "test", "--uid", str(APP), "--op", "rotate_kek")
        assert done.returncode == 1 and b"policies, entry 1" in done.stdout


def test_policy_test_asks_the_other_rules_first(short_tmp: Any) -> None:
    daemon = Daemon({"allowed_peer_uids": [0, APP], "admin_peer_uids": [0]}, workers=1)
    try:
        stranger = daemon.offline("policy", "test", "--uid", str(OTHER), "--op", "encrypt")
        assert stranger.returncode == 1 and b"allowed_peer_uids" in stranger.stdout
        caller = daemon.offline("policy", "test", "--uid", str(APP), "--op", "rotate_kek")
        assert caller.returncode == 1 and b"admin_peer_uids" in caller.stdout
        assert daemon.offline("policy", "test", "--uid", str(APP), "--op", "encrypt").returncode == 0
    finally:
        daemon.close()
