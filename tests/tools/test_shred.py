"""`shred` of one DEK, of several, of a thread: what it asks, what it does, what it says."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progressdb_kms.tools.shredcmd import ago
from tests.harness.daemon import cli
from tests.harness.fakekms import FakeKms
from tests.tools.test_online import on_terminal


@pytest.fixture
def kms(short_tmp: Path) -> Iterator[FakeKms]:
    with FakeKms(short_tmp / "s") as fake:
        for number in range(3):
            fake.create("room", f"k_{number}")
        fake.create("hall", "k_9")
        yield fake


def states(kms: FakeKms) -> dict[str, Any]:
    return {key_id: dek["state"] for key_id, dek in kms.deks.items()}


def run(kms: FakeKms, *words: str) -> Any:
    return cli("shred", *words, "--socket", str(kms.path))


def test_one_dek_off_a_terminal_is_taken_at_its_word(kms: FakeKms) -> None:
    assert run(kms, "k_0", "--now").returncode == 0
    assert states(kms) == {"k_0": "shredded", "k_1": "enabled", "k_2": "enabled", "k_9": "enabled"}


@pytest.mark.parametrize("words", [["--thread-id", ""], ["--thread-id="], [""], ["k_0", ""]])
def test_an_unset_variable_of_a_script_means_nothing(kms: FakeKms, words: list[str]) -> None:
    """`--thread-id "$THREAD" --yes` shredded every DEK that there was."""
    done = run(kms, *words, "--now", "--yes")
    assert done.returncode == 2 and b"what is given is empty" in done.stderr
    assert set(states(kms).values()) == {"enabled"}


def test_several_need_yes_where_nobody_can_be_asked(kms: FakeKms) -> None:
    for words in (["k_0", "k_1"], ["--thread-id", "room"]):
        done = run(kms, *words, "--now")
        assert done.returncode == 2 and b"give --yes, or --dry-run to see them" in done.stderr
    assert set(states(kms).values()) == {"enabled"}
    done = run(kms, "k_0", "k_1", "k_1", "--now", "--yes")
    assert done.returncode == 0 and done.stdout.count(b"shredded") == 2


def test_a_thread(kms: FakeKms) -> None:
    run(kms, "k_1", "--now")
    done = run(kms, "--thread-id", "room", "--dry-run", "--now")
    assert done.returncode == 0 and b"k_0" in done.stdout and b"k_1" not in done.stdout
    assert done.stderr == b"2 DEKs would be shredded at once; nothing was done\n"
    done = run(kms, "--thread-id", "room", "--yes", "--json")
    assert [json.loads(line)["state"] for line in done.stdout.splitlines()] == ["pending_deletion"] * 2
    assert states(kms)["k_9"] == "enabled"
    assert b"nothing to shred" in run(kms, "--thread-id", "nowhere", "--yes").stderr


def test_of_several_with_json_each_error_is_a_line(kms: FakeKms) -> None:
    kms.refuse["/deks/k_0"] = (503, "audit_unavailable", "no room")
    done = run(kms, "--thread-id", "room", "--yes", "--json")
    first, *others = [json.loads(line) for line in done.stdout.splitlines()]
    assert first == {"key_id": "k_0", "error": {"code": "audit_unavailable", "message": "no room"}}
    assert [dek["state"] for dek in others] == ["pending_deletion"] * 2
    failed = json.loads(done.stderr)["error"]
    assert done.returncode == 1 and (failed["code"], failed["message"]) == ("command_failed", "1 of 3 failed")


@pytest.mark.parametrize("words", [[], ["k_0", "--thread-id", "room"]])
def test_either_deks_or_a_thread(kms: FakeKms, words: list[str]) -> None:
    done = run(kms, *words)
    assert done.returncode == 2 and b"name either DEKs or --thread-id" in done.stderr


def test_one_that_fails_leaves_the_others_to_be_done(kms: FakeKms) -> None:
    kms.refuse["/deks/k_1"] = (503, "store_unavailable", "a copy remains")
    done = run(kms, "--thread-id", "room", "--now", "--yes")
    assert done.returncode == 1 and b"k_1: a copy remains" in done.stderr
    assert b"1 of 3 failed (repeating it is safe)" in done.stderr
    assert states(kms) == {"k_0": "shredded", "k_1": "enabled", "k_2": "shredded", "k_9": "enabled"}


@pytest.mark.parametrize(
    "answer, code, state", [(b"y\n", 0, "shredded"), (b"\n", 1, "enabled"), (b"", 1, "enabled")]
)
def test_a_person_is_asked(kms: FakeKms, answer: bytes, code: int, state: str) -> None:
    done, shown = asked(kms, answer, "k_0", "k_1", "--now")
    assert done == code and "2 DEKs will be shredded at once." in shown and "gone for ever" in shown
    assert states(kms)["k_0"] == states(kms)["k_1"] == state


def test_a_person_is_not_asked_for_what_can_be_cancelled(kms: FakeKms) -> None:
    done, shown = asked(kms, b"", "k_0")
    assert done == 0 and "[y/N]" not in shown and states(kms)["k_0"] == "pending_deletion"


def test_a_person_hears_when_it_was_used_last(kms: FakeKms) -> None:
    used = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(time.time() - 2.5 * 3600))
    kms.deks["k_0"]["usage"] = {"encrypts": 5, "decrypts": 1, "last_used_at": used, "last_uid": 1000}
    kms.deks["k_1"]["usage"] = {"encrypts": 0, "decrypts": 0}
    _, shown = asked(kms, b"\n", "k_0", "k_1", "k_2", "--now")
    assert "  k_0  room  (enabled, last used 2 h ago by uid 1000)" in shown
    assert "  k_1  room  (enabled, never used)" in shown and "  k_2  room  (enabled)" in shown
    listed = run(kms, "--thread-id", "room", "--dry-run").stdout
    assert b"last used 2 h ago by uid 1000  room\n" in listed


@pytest.mark.parametrize(
    ("past", "told"), [(0, "0 s"), (59, "59 s"), (60, "1 min"), (7199, "1 h"), (200_000, "2 d"), (-5, "0 s")]
)
def test_times_are_told_in_the_largest_unit(past: int, told: str) -> None:
    assert ago("2026-11-24T02:13:32.123456Z", 1795486412 + past) == told


def asked(kms: FakeKms, answer: bytes, *words: str) -> tuple[int, str]:
    return on_terminal("shred", *words, "--socket", str(kms.path), typed=answer)


def test_one_that_is_shredded_is_no_reason_to_ask(kms: FakeKms) -> None:
    run(kms, "k_0", "--now")
    done, shown = asked(kms, b"", "k_0", "--now")
    assert done == 0 and "[y/N]" not in shown
    assert (
        run(kms, "k_0", "k_1", "--dry-run").stderr == b"1 DEK would be shredded in 7 days; nothing was done\n"
    )
    _, shown = asked(kms, b"\n", "k_0", "k_1", "--now")
    assert "1 DEK will be shredded at once. What was encrypted under it is gone" in shown
