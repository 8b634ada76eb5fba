"""Import, export, verify and the snapshots of rotations, on data-dirs of real daemons."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import shutil
import socket
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from progressdb_kms.encoding import b64encode, timestamp
from progressdb_kms.store.contract import DekRecord, Usage
from progressdb_kms.tools import imports, ledgers
from progressdb_kms.tools.imports import MAX_LINE, read_entry
from tests.conftest import MakeDaemon
from tests.harness.daemon import REPO, Daemon, write_secret

NOW = 1_790_000_000.0
BLOB = bytes(60)
USED = {"encrypts": 1, "decrypts": 2, "first": 3, "last": 4, "uid": -1}
DEAD = "2025-01-02T03:04:05Z"


def line(**fields: Any) -> bytes:
    values = {"key_id": "k_1", "thread_id": "t", "wrapped": b64encode(BLOB), **fields}
    return json.dumps({name: value for name, value in values.items() if value is not None}).encode()


def record_of(data: bytes, key_id: str | None, now: float) -> DekRecord:
    return read_entry(data, key_id, now)[0]


def test_a_ledger_that_release_1_signed_is_taken_for_ever(tmp_path: Path) -> None:
    """Put together here, and not by the code that signs them now."""
    key, path = bytes(range(32)), tmp_path / "ledger"
    row = '{"key_id":"a","old_kek_id":"00","new_kek_id":"11","old_sha256":"aa","new_sha256":"bb"}\n'
    totals = f'{{"rewrapped":1,"new_kek_id":"11","sha256":"{hashlib.sha256(row.encode()).hexdigest()}"}}'
    sig = b64encode(hmac.digest(key, totals.encode(), "sha256"))
    path.write_text(f'{row}{{"totals":{totals},"sig":"{sig}"}}\n')
    assert ledgers.signed(path, memoryview(key), lambda line: True) == {"a": "aa"}


def test_root_reads_a_file_bit_by_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It opens it, and reads as the owner of the data-dir: a million DEKs would be a gigabyte of memory."""
    became: list[Path] = []
    monkeypatch.setattr(imports.asowner, "become", became.append)
    monkeypatch.setattr(imports.asowner, "switches", lambda folder: True)
    loaded: Any = SimpleNamespace(settings=SimpleNamespace(data_dir=tmp_path))
    file = tmp_path / "lines"
    file.write_bytes(line(key_id="k_1") + b"\n")
    with imports.entries(file, loaded) as found:
        assert became == [tmp_path]
        with open(file, "ab") as more:
            more.write(line(key_id="k_2") + b"\n")
        assert [json.loads(entry.data)["key_id"] for entry in found] == ["k_1", "k_2"]


class TestReadEntry:
    def test_how_much_it_was_used_however_that_is_spelled(self) -> None:
        row = {**json.loads(line()), "usage": USED}
        for text in (
            json.dumps(row),
            json.dumps(row, separators=(" , ", " : ")),
            json.dumps(row).replace("usage", "us\\u0061ge"),
        ):
            assert read_entry(text.encode(), None, NOW)[1] == Usage(**USED)
        assert read_entry(line(), None, NOW)[1] is None

    def test_a_line_of_ours(self) -> None:
        made = "2026-01-02T03:04:05.678901Z"
        data = line(kek_id="0" * 16, kek_version=3, created_at=made, state="disabled", format=1)
        record = record_of(data, None, NOW)
        assert (record.key_id, record.thread_id, record.state) == ("k_1", "t", "disabled")
        assert (record.created_at, record.wrapped) == (made, BLOB)

    @pytest.mark.parametrize(
        ("given", "stored"),
        [
            ("2025-01-02T03:04:05Z", "2025-01-02T03:04:05.000000Z"),
            ("2025-01-02T03:04:05.123456789+01:00", "2025-01-02T02:04:05.123456Z"),
            ("2025-01-02T03:04:05.5-00:30", "2025-01-02T03:34:05.500000Z"),
            ("2025-12-31T23:30:00-00:30", "2026-01-01T00:00:00.000000Z"),
            ("1969-12-31T23:00:00Z", "1970-01-01T00:00:00.000000Z"),
            ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"),
            (1735787045, "2025-01-02T03:04:05.000000Z"),
        ],
    )
    def test_times(self, given: Any, stored: str) -> None:
        assert record_of(line(created_at=given), None, NOW).created_at == stored

    @pytest.mark.parametrize("prefix", ["k_", "dek_", "t:"])
    def test_the_time_in_an_id(self, prefix: str) -> None:
        key_id = prefix + "1735787045000000000"
        assert record_of(line(key_id=key_id), None, NOW).created_at == "2025-01-02T03:04:05.000000Z"
        assert record_of(line(key_id="k_17"), None, NOW).created_at == timestamp(NOW)

    def test_either_name(self) -> None:
        old = json.dumps({"id": "k_1", "thread_key": "t", "wrapped": b64encode(BLOB)}).encode()
        assert record_of(old, None, NOW) == record_of(line(), None, NOW)
        assert record_of(line(thread_key="t", id="k_1"), "k_1", NOW).thread_id == "t"

    def test_the_name_of_the_file(self) -> None:
        data = json.dumps({"wrapped": b64encode(BLOB)}).encode()
        assert record_of(data, "k_9", NOW).key_id == "k_9"

    def test_without_a_thread_it_is_its_own(self) -> None:
        assert record_of(line(thread_id=None), None, NOW).thread_id == "k_1"

    @pytest.mark.parametrize("blob", [BLOB, b"{" + BLOB[1:], b"\x01" * 80], ids=["zeros", "brace", "ours"])
    def test_wrapped_dek_in_its_three_spellings(self, blob: bytes) -> None:
        held = {"ciphertext": b64encode(blob), "key_info": {}}
        for value in (
            held,
            b64encode(json.dumps(held).encode()),
            b64encode(blob),
            {"ciphertext": b64encode(blob)},
        ):
            data = line(wrapped=None, wrapped_dek=value, kek_id="whatever", kek_version="", version=2)
            assert record_of(data, None, NOW).wrapped == blob

    @pytest.mark.parametrize(
        ("data", "why"),
        [
            (line(wrapped_dek=b64encode(BLOB)), "both wrapped and wrapped_dek"),
            (line(usage=[]), "`usage` of an unknown form"),
            (line(usage={"encrypts": 1}), "`usage` of an unknown form"),
            (line(usage={**USED, "decrypts": True}), "numbers in `usage` that can't be"),
            (line(usage={**USED, "encrypts": -1}), "numbers in `usage` that can't be"),
            (line(usage={**USED, "last": 1 << 53}), "numbers in `usage` that can't be"),
            (line(wrapped=None, wrapped_dek=7), "unknown form"),
            (line(wrapped=None, wrapped_dek=b64encode(b"[]")), "unknown form"),
            (line(wrapped=None, wrapped_dek={"key_info": {}}), "unknown form"),
            (line(wrapped=None, wrapped_dek={"ciphertext": "", "wrapped": ""}), "unknown form"),
            (line(wrapped=None, wrapped_dek={"ciphertext": "@"}), "no strict base64"),
            (line(wrapped=None, wrapped_dek={"ciphertext": ""}), "empty `wrapped`"),
            (b"", "not JSON"),
            (b"[]", "not a JSON object"),
            (b'{"key_id":"k_1","key_id":"k_2"}', "not JSON"),
            (b"\xff", "not JSON"),
            (b"[" * 60000, "not JSON"),
            (b" " * (MAX_LINE + 1), "more than"),
            (line(x=1), "unknown field 'x'"),
            (line(key_id=None), "no key_id"),
            (line(key_id="../k"), "malformed key_id"),
            (line(key_id=7), "no text in key_id"),
            (line(id="k_2"), "key_id and id, and they differ"),
            (line(thread_key="u"), "thread_id and thread_key, and they differ"),
            (line(thread_id="t" * 513), "more than 512"),
            (line(wrapped=None), "empty `wrapped`"),
            (line(wrapped="@@@@"), "no strict base64"),
            (line(wrapped=[1]), "no strict base64"),
            (line(state="gone"), "unknown state"),
            (line(state=[]), "unknown state"),
            (line(state="shredded", shredded_at=DEAD), "has a wrapped DEK"),
            (line(state="shredded", wrapped=""), "times don't fit"),
            (line(state="pending_deletion"), "times don't fit"),
            (line(delete_at=DEAD), "times don't fit"),
            (line(created_at="yesterday"), "malformed time"),
            (line(created_at="2025-13-02T03:04:05Z"), "malformed time"),
            (line(created_at=True), "malformed time"),
            (line(created_at="2025-01-02T03:04:05.\u0663Z"), "malformed time"),
            (line(created_at="9999-12-31T23:59:59-01:00"), "malformed time"),
            (line(created_at="0001-01-01T00:00:00+01:00"), "malformed time"),
            (line(created_at=-5), "malformed time"),
            (line(kek_id="xyz"), "malformed kek_id"),
        ],
    )
    def test_bad(self, data: bytes, why: str) -> None:
        with pytest.raises(ValueError, match="^(?:is|has|holds) ") as error:
            record_of(data, None, NOW)
        assert why in str(error.value)

    def test_another_key_than_the_name_says(self) -> None:
        with pytest.raises(ValueError, match="holds the key k_1"):
            record_of(line(), "k_2", NOW)


# ---- with a data-dir ---------------------------------------------------------------------------------


@pytest.fixture
def site(make_daemon: MakeDaemon) -> Daemon:
    """Laid out, never started."""
    return make_daemon(start=False, workers=1)


def go_blob(kek: bytes, dek: bytes | None = None) -> str:
    """As the Go service wrapped: nonce, ciphertext, tag; no AAD."""
    nonce = os.urandom(12)
    return base64.b64encode(nonce + AESGCM(kek).encrypt(nonce, dek or os.urandom(32), None)).decode()


def run(daemon: Daemon, *args: str, code: int = 0, **options: Any) -> tuple[str, str]:
    done = daemon.offline(*args, **options)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == code, out + err
    assert "internal error" not in err
    return out, err


def json_of(daemon: Daemon, *args: str, **options: Any) -> Any:
    return json.loads(run(daemon, *args, "--json", **options)[0])


def lines(path: Path, *rows: Any) -> str:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text)
    return str(path)


def stored(daemon: Daemon) -> dict[str, dict[str, Any]]:
    rows = map(json.loads, run(daemon, "export")[0].splitlines())
    return {row["key_id"]: row for row in rows}


def change(daemon: Daemon, sql: str, *args: Any) -> None:
    with contextlib.closing(sqlite3.connect(daemon.data_dir / "kms.db")) as db, db:
        db.execute(sql, args)
    db.close()


def break_blob(daemon: Daemon, key_id: str) -> None:
    blob = bytearray(base64.b64decode(stored(daemon)[key_id]["wrapped"]))
    blob[-1] ^= 1
    sql = "UPDATE deks SET value = json_set(value, '$.wrapped', ?) WHERE key = ?"
    change(daemon, sql, b64encode(blob), f"meta:{key_id}")


def lose(daemon: Daemon, key_id: str) -> None:
    """One of three rows, as if it had never been there."""
    change(daemon, "DELETE FROM deks WHERE key = ?", f"meta:{key_id}")


class TestImport:
    def test_lines_of_the_go_service(self, site: Daemon) -> None:
        dek, nonce = os.urandom(32), os.urandom(12)
        box = nonce + AESGCM(dek).encrypt(nonce, b"from before", None)
        other = "dek_1735787045000000000"
        file = lines(
            site.home / "in",
            {"key_id": "k_1", "thread_id": "t1", "wrapped": go_blob(site.kek, dek)},
            "",
            {"key_id": other, "thread_key": "t2", "wrapped": go_blob(site.kek)},
        )
        assert json_of(site, "import", file) == {"imported": 2, "unchanged": 0, "skipped": 0}
        blob = base64.b64decode(stored(site)["k_1"]["wrapped"])
        assert len(blob) == 1 + 8 + 1 + 3 + 60, "not bound to its key_id"
        run(site, "verify")
        run(site, "audit", "verify")
        with site.start().session() as kms:
            assert kms.decrypt("k_1", box) == b"from before"
            assert kms.ok("GET", "/deks?thread_id=t2")["deks"][0]["key_id"] == other
        log = [json.loads(text)["event"] for text in site.audit_log.read_text().splitlines()]
        assert [event["key_id"] for event in log if event["op"] == "import"] == ["k_1", other]

    def test_it_goes_on_with_the_number_of_changes(self, site: Daemon) -> None:
        """Above whatever store and log know of; the log's end tells it, so that an older store is found."""

        def number() -> int:
            with contextlib.closing(sqlite3.connect(site.data_dir / "kms.db")) as db, db:
                (value,) = db.execute("SELECT value FROM kms WHERE key = 'store:state'").fetchone()
            db.close()
            return int(json.loads(value)["change"])

        def recorded() -> list[int]:
            return [json.loads(line)["event"]["change"] for line in site.audit_log.read_bytes().splitlines()]

        run(site, "import", lines(site.home / "in", {"key_id": "k_0", "wrapped": go_blob(site.kek)}))
        shutil.copytree(site.data_dir, site.home / "older")
        before = max(number(), *recorded())
        rows = [{"key_id": f"k_{n}", "wrapped": go_blob(site.kek)} for n in range(1, 4)]
        run(site, "import", lines(site.home / "in", *rows))
        assert number() == before + 3 == recorded()[-1]
        for path in (site.home / "older").glob("kms.db*"):
            shutil.copy(path, site.data_dir)
        error = run(site, "import", lines(site.home / "in", *rows), code=1)[1]
        assert "older" in error or "put back" in error

    def test_a_key_twice_in_one_source(self, site: Daemon) -> None:
        """Also where neither is in the store yet: the same DEK is no fault, another one is."""
        dek = os.urandom(32)
        rows = [{"key_id": "k_1", "wrapped": go_blob(site.kek, dek)} for _ in range(2)]
        result = json_of(site, "import", lines(site.home / "in", *rows))
        assert (result["imported"], result["unchanged"]) == (1, 1)
        rows = [{"key_id": "k_2", "wrapped": go_blob(site.kek)} for _ in range(2)]
        error = run(site, "import", lines(site.home / "in", *rows), code=1)[1]
        assert "in:2: the key_id k_2 is taken by another DEK" in error
        assert set(stored(site)) == {"k_1"}

    def test_what_is_bound_under_the_active_kek_comes_as_it_is(self, site: Daemon) -> None:
        """It was opened, and to wrap it once more would use the KEK up a little; one that is damaged is told,
        and one that is another key's or another KEK's is not taken for it."""
        run(site, "import", lines(site.home / "in", {"key_id": "k_1", "wrapped": go_blob(site.kek)}))
        row = stored(site)["k_1"]
        given = {"key_id": "k_1", "wrapped": row["wrapped"]}
        blob = base64.b64decode(row["wrapped"])
        for name, wrong in (("k_1", blob[:-1] + bytes([blob[-1] ^ 1])), ("k_2", blob)):
            shutil.rmtree(site.data_dir)
            site.data_dir.mkdir(0o700)
            file = lines(site.home / "in", {"key_id": name, "wrapped": b64encode(wrong)})
            run(site, "import", file, code=1)
            assert json_of(site, "import", lines(site.home / "in", given))["imported"] == 1
            assert stored(site)["k_1"]["wrapped"] == row["wrapped"]
        write_secret(site.home / "new", os.urandom(32).hex().encode())
        shutil.rmtree(site.data_dir)
        site.data_dir.mkdir(0o700)
        settings = {"master_key_file": str(site.home / "new")}
        site.write_config({**settings, "previous_master_keys": [{"file": str(site.kek_file)}]})
        assert json_of(site, "import", lines(site.home / "in", given))["imported"] == 1
        assert stored(site)["k_1"]["wrapped"] != row["wrapped"]
        assert json_of(site, "verify")["result"] == "ok"

    def test_more_than_are_stored_at_once(self, site: Daemon) -> None:
        """What is wrong is told in the source's order, and what comes behind it is looked at too."""
        many = 2 * imports.AT_ONCE + 1
        rows: list[Any] = [{"key_id": f"k_{n}", "wrapped": go_blob(site.kek)} for n in range(many)]
        result = json_of(site, "import", lines(site.home / "in", *rows))
        assert result["imported"] == many == len(stored(site))
        rows[2], rows[5] = "{", {**rows[5], "wrapped": go_blob(site.kek)}
        rows[-1] = {**rows[-1], "wrapped": b64encode(BLOB)}
        told = run(site, "import", lines(site.home / "in", *rows), code=1)[1].splitlines()
        assert [line.split(": ")[0].rpartition(":")[2] for line in told[:3]] == ["3", "6", str(many)]
        assert told[3].startswith("progressdb-kms: 3 of the entries can't be taken")
        assert json_of(site, "verify")["result"] == "ok"

    def test_its_folders(self, site: Daemon) -> None:
        deks, backups = site.home / "kms-deks", site.home / "kms-deks-backup"
        deks.mkdir()
        backups.mkdir()
        old_kek, dek = os.urandom(32), os.urandom(32)
        lines(deks / "k_1.json", {"id": "k_1", "created_at": DEAD, "wrapped": go_blob(site.kek)})
        lines(backups / "k_2.20250101T000000", {"thread_key": "then", "wrapped": go_blob(old_kek, dek)})
        lines(backups / "k_2.20250301T000000", {"thread_id": "now", "wrapped": go_blob(site.kek, dek)})
        assert json_of(site, "import", str(deks))["imported"] == 1
        error = run(site, "import", str(backups), code=1)[1]
        assert f"{backups}/k_2.20250101T000000: does not open under any configured KEK" in error
        assert list(stored(site)) == ["k_1"], "something was stored nonetheless"
        write_secret(site.home / "old", old_kek.hex().encode())
        site.write_config({"previous_master_keys": [{"file": str(site.home / "old")}]})
        assert json_of(site, "import", str(backups)) == {"imported": 1, "unchanged": 1, "skipped": 0}
        assert json_of(site, "import", str(deks)) == {"imported": 0, "unchanged": 1, "skipped": 0}
        assert {row["kek_version"] for row in stored(site).values()} == {1}
        assert stored(site)["k_1"]["created_at"] == "2025-01-02T03:04:05.000000Z"
        assert stored(site)["k_2"]["thread_id"] == "now"

    def test_snapshots_with_json_in_their_names(self, site: Daemon) -> None:
        backups = site.home / "kms-deks-backup"
        backups.mkdir()
        old, new = os.urandom(32), os.urandom(32)
        lines(backups / "t:1.20250301T000000", {"thread_id": "t", "wrapped": go_blob(site.kek, new)})
        lines(backups / "t:1.json.20250101T000000", {"thread_id": "t", "wrapped": go_blob(site.kek, old)})
        lines(backups / "k_2.json.1735787045000000000", {"wrapped": go_blob(site.kek), "version": 1})
        error = run(site, "import", str(backups), code=1)[1]
        assert f"{backups}/t:1.json.20250101T000000: the key_id t:1 is taken by another DEK" in error
        done = site.offline("import", str(backups), "--skip-bad", "--json")
        assert json.loads(done.stdout) == {"imported": 2, "unchanged": 0, "skipped": 1}
        nonce = os.urandom(12)
        box = nonce + AESGCM(new).encrypt(nonce, b"from before", None)
        with site.start().session() as kms:
            assert kms.decrypt("t:1", box) == b"from before"

    def test_bad_lines(self, site: Daemon) -> None:
        good = {"key_id": "k_1", "thread_id": "t", "wrapped": go_blob(site.kek)}
        foreign = {"key_id": "k_2", "thread_id": "t", "wrapped": go_blob(os.urandom(32))}
        taken = {"key_id": "k_1", "thread_id": "t", "wrapped": go_blob(site.kek)}
        file = lines(site.home / "in", good, "{", foreign, taken)
        out, err = run(site, "import", file, code=1)
        assert out == ""
        assert err.splitlines() == [
            f"{file}:2: is not JSON",
            f"{file}:3: does not open under any configured KEK (previous_master_keys may name more)",
            f"{file}:4: the key_id k_1 is taken by another DEK",
            "progressdb-kms: 3 of the entries can't be taken; nothing was stored "
            "(mend them, or leave them out with --skip-bad)",
        ]
        assert stored(site) == {}
        assert '"op":"import","outcome":"ok"' not in site.audit_log.read_text()
        done = site.offline("import", file, "--skip-bad", "--json")
        assert json.loads(done.stdout) == {"imported": 1, "unchanged": 0, "skipped": 3}
        assert done.stderr.decode().splitlines() == err.splitlines()[:3]
        run(site, "verify")
        run(site, "audit", "verify")

    def test_bad_lines_are_all_counted(self, site: Daemon) -> None:
        """1,000 was what it said of any larger number, and it kept the text of each."""
        good = {"key_id": "k_1", "thread_id": "t", "wrapped": go_blob(site.kek)}
        file = lines(site.home / "in", *["{"] * 1500, good)
        out, err = run(site, "import", file, code=1)
        assert err.count("is not JSON") == 1000 and "1500 of the entries" in err
        done = site.offline("import", file, "--skip-bad", "--json")
        assert json.loads(done.stdout) == {"imported": 1, "unchanged": 0, "skipped": 1500}
        assert done.stderr.count(b"\n") == 1000

    @pytest.mark.parametrize("name", ["/dev/zero", "/dev/full", "/dev/urandom", "fifo", "socket"])
    def test_what_may_never_end_or_begin_is_no_file(self, site: Daemon, name: str) -> None:
        """It waited, and held the data-dir meanwhile, so that no daemon could start."""
        source = site.home / name
        with socket.socket(socket.AF_UNIX) as server:
            if name == "fifo":
                os.mkfifo(source)
            if name == "socket":
                server.bind(str(source))
            out, err = run(site, "import", str(source), code=1)
        assert out == "" and (f"{source} is no regular file" in err or "No such device" in err)

    def test_what_a_shell_opened_is_read(self, site: Daemon) -> None:
        row = {"key_id": "k_1", "thread_id": "t", "wrapped": go_blob(site.kek)}
        lines(site.home / "in", row)
        done = site.offline("import", "--json", wrapper=["bash", "-c", 'exec "$@" <(cat in)', "bash"])
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"imported": 1, "unchanged": 0, "skipped": 0}

    def test_a_stream_without_an_end(self, site: Daemon) -> None:
        words = ["bash", "-c", 'exec "$@" </dev/zero', "bash"]
        done = site.offline("import", "-", "--skip-bad", wrapper=words)
        assert done.returncode == 1 and b"stdin:1: goes on and on" in done.stderr

    def test_a_blob_of_another_key(self, site: Daemon) -> None:
        """Two rows of a store were swapped before they were exported."""
        rows = ({"key_id": key_id, "wrapped": go_blob(site.kek)} for key_id in "ab")
        run(site, "import", lines(site.home / "in", *rows))
        one, two = stored(site).values()
        one["wrapped"], two["wrapped"] = two["wrapped"], one["wrapped"]
        twin = site.copy(data=False)
        try:
            error = run(twin, "import", lines(site.home / "swapped", one, two), code=1)[1]
            assert "swapped:1: holds the DEK of b" in error
            assert "swapped:2: holds the DEK of a" in error
        finally:
            twin.close()

    def test_what_export_writes(self, site: Daemon, short_tmp: Path) -> None:
        """To another data-dir with another master key, through stdin: states, times and tombstones too."""
        with site.start().session() as kms:
            keys = [kms.create_dek(f"t{number}")["key_id"] for number in range(4)]
            box = kms.encrypt(keys[0], b"secret")
            kms.ok("POST", f"/deks/{keys[1]}/disable", {})
            kms.ok("DELETE", f"/deks/{keys[2]}", {"pending_days": 5})
            kms.ok("DELETE", f"/deks/{keys[3]}", {"immediately": True})
        run(site, "export", str(short_tmp / "out"))  # beside the daemon
        assert stat.S_IMODE((short_tmp / "out").stat().st_mode) == 0o600
        site.stop()
        twin = site.copy(data=False)
        try:
            twin.write_kek(os.urandom(32))
            write_secret(twin.home / "old", site.kek.hex().encode())
            twin.write_config({"previous_master_keys": [{"file": str(twin.home / "old")}]})
            data = (short_tmp / "out").read_bytes()
            assert json_of(twin, "import", "-", stdin=data) == {"imported": 4, "unchanged": 0, "skipped": 0}
            assert json_of(twin, "import", "-", stdin=data) == {"imported": 0, "unchanged": 4, "skipped": 0}
            run(twin, "verify")
            twin.write_config({})  # nothing needs the old key any more
            run(twin, "verify")
            same = ("thread_id", "created_at", "state", "delete_at", "shredded_at")
            for old, new in zip(stored(site).values(), stored(twin).values()):
                assert [old.get(name) for name in same] == [new.get(name) for name in same]
            with twin.start().session() as kms:
                assert kms.decrypt(keys[0], box) == b"secret"
        finally:
            twin.close()

    def test_the_shredded_never_come_back(self, site: Daemon) -> None:
        with site.start().session() as kms:
            key_id = kms.create_dek("t")["key_id"]
            row = run(site, "export")[0]
            kms.ok("DELETE", f"/deks/{key_id}", {"immediately": True})
        site.stop()
        (site.home / "in").write_text(row)
        assert "was shredded: nothing brings it back" in run(site, "import", str(site.home / "in"), code=1)[1]
        assert json_of(site, "import", str(site.home / "in"), "--skip-bad")["imported"] == 0
        assert stored(site)[key_id]["wrapped"] == ""

    def test_nor_where_the_audit_log_alone_knows(self, site: Daemon) -> None:
        """The tombstone's row is lost."""
        with site.start().session() as kms:
            key_id = kms.create_dek("t")["key_id"]
            row = run(site, "export")[0]
            kms.ok("DELETE", f"/deks/{key_id}", {"immediately": True})
        site.stop()
        change(site, "DELETE FROM deks WHERE key = ?", f"meta:{key_id}")
        (site.home / "in").write_text(row)
        assert "was shredded, says the audit log" in run(site, "import", str(site.home / "in"), code=1)[1]

    def test_a_tombstone_shreds_nothing(self, site: Daemon) -> None:
        run(site, "import", lines(site.home / "in", {"key_id": "k_1", "wrapped": go_blob(site.kek)}))
        dead = {"key_id": "k_1", "state": "shredded", "shredded_at": DEAD, "wrapped": ""}
        assert "in use here" in run(site, "import", lines(site.home / "dead", dead), code=1)[1]
        assert stored(site)["k_1"]["state"] == "enabled"

    def test_not_beside_a_daemon(self, site: Daemon) -> None:
        site.start()
        file = lines(site.home / "in", {"key_id": "k_1", "wrapped": go_blob(site.kek)})
        assert "stop the daemon first" in run(site, "import", file, code=1)[1]

    def test_no_such_source(self, site: Daemon) -> None:
        run(site, "import", str(site.home / "none"), code=1)
        (site.home / "empty").mkdir()
        assert "there is no DEK in" in run(site, "import", str(site.home / "empty"), code=1)[1]


class TestPebble:
    """Its folders, as rocksdict writes them: Pebble's default format is RocksDB's."""

    @staticmethod
    def folder(path: Path, rows: dict[str, str], flush: bool = True) -> str:
        rocksdict = pytest.importorskip("rocksdict", reason="rocksdict, which reads Pebble, is not here")
        options = rocksdict.Options(raw_mode=True)
        options.create_if_missing(True)
        store = rocksdict.Rdict(str(path), options)
        for key, value in rows.items():
            store[key.encode()] = value.encode()
        if flush:
            store.close()
        else:  # as after kill -9: in the write-ahead log alone
            store.flush_wal(True)
            shutil.copytree(path, path.with_name("copy"))
            store.close()
            shutil.rmtree(path)
            path.with_name("copy").rename(path)
        return str(path)

    @pytest.mark.parametrize("flush", [True, False], ids=["tables", "log alone"])
    def test_both_generations(self, site: Daemon, flush: bool) -> None:
        dek, nonce = os.urandom(32), os.urandom(12)
        box = nonce + AESGCM(dek).encrypt(nonce, b"from before", None)
        held = json.dumps({"ciphertext": go_blob(site.kek, dek), "key_info": {}})
        old = json.dumps({"wrapped": go_blob(site.kek), "thread_id": "room", "version": 1})
        rows = {"dek:t:1730000000000000000": held, "meta:k_1": old, "other": "x", "zz": "y", "a": "b"}
        found = self.folder(site.home / "kms.db", rows, flush)
        before = {path.name: path.stat().st_mtime_ns for path in Path(found).iterdir()}
        assert json_of(site, "import", found) == {"imported": 2, "unchanged": 0, "skipped": 0}
        assert json_of(site, "import", str(site.home)) == {"imported": 0, "unchanged": 2, "skipped": 0}
        assert {path.name: path.stat().st_mtime_ns for path in Path(found).iterdir()} == before
        assert stored(site)["k_1"]["thread_id"] == "room"
        with site.start().session() as kms:
            assert kms.decrypt("t:1730000000000000000", box) == b"from before"
            again = kms.ok("POST", "/deks", {"key_id": "t:1730000000000000000"}, status=201)
            assert again["created_at"] == "2024-10-27T03:33:20.000000Z"

    def test_each_dek_is_opened_first(self, site: Daemon) -> None:
        rows = {
            "dek:t:1": json.dumps({"ciphertext": go_blob(os.urandom(32)), "key_info": {}}),
            "dek:t:2": "x",
        }
        found = self.folder(site.home / "peb", rows)
        error = run(site, "import", found, code=1)[1]
        assert f"{found}:t:1: does not open under any configured KEK" in error
        assert f"{found}:t:2: is not JSON" in error and stored(site) == {}

    def test_one_without_deks(self, site: Daemon) -> None:
        found = self.folder(site.home / "peb", {"thread:1": "{}"})
        assert "holds no DEK" in run(site, "import", found, code=1)[1]

    def test_one_that_is_damaged(self, site: Daemon) -> None:
        found = Path(self.folder(site.home / "peb", {"dek:t:1": "{}"}))
        next(found.glob("MANIFEST-*")).write_bytes(b"junk")
        error = run(site, "import", str(found), code=1)[1]
        assert f"the Pebble store {found} can't be read: Corruption" in error and "a copy of" in error

    def test_without_rocksdict(self, site: Daemon) -> None:
        found = site.home / "peb"
        found.mkdir()
        (found / "CURRENT").write_text("MANIFEST-000001\n")
        (found / "MANIFEST-000001").touch()
        (site.home / "rocksdict.py").write_text("raise ImportError")
        path = os.pathsep.join((str(site.home), str(REPO)))
        error = run(site, "import", str(found), code=1, env={"PYTHONPATH": path})[1]
        assert (
            f"{found} is a Pebble store" in error
            and "progressdb-kms[pebble]" in error
            and "`export`" in error
        )


class TestVerify:
    @pytest.fixture
    def full(self, site: Daemon) -> Daemon:
        rows = ({"key_id": f"k_{n}", "thread_id": "t", "wrapped": go_blob(site.kek)} for n in range(3))
        run(site, "import", lines(site.home / "in", *rows))
        return site

    def test_all_is_well(self, full: Daemon) -> None:
        assert json_of(full, "verify") == {"result": "ok", "deks": 3, "shredded": 0, "ledgers": 0}
        full.start()
        assert json_of(full, "verify")["deks"] == 3

    def test_a_changed_blob(self, full: Daemon) -> None:
        break_blob(full, "k_1")
        error = run(full, "verify", code=1)[1]
        assert error.startswith("k_1: its row is not as the daemon wrote it")
        assert "1 faults were found" in error

    def test_swapped_rows(self, full: Daemon) -> None:
        one = stored(full)["k_1"]["wrapped"]
        change(full, "UPDATE deks SET value = json_set(value, '$.wrapped', ?) WHERE key = 'meta:k_2'", one)
        assert "k_2: its row is not as the daemon wrote it" in run(full, "verify", code=1)[1]

    def test_wrong_counts(self, full: Daemon) -> None:
        change(full, "DELETE FROM deks WHERE key = 'meta:k_1'")
        assert "DEKs by KEK are counted as" in run(full, "verify", code=1)[1]

    def test_a_damaged_page(self, full: Daemon) -> None:
        file = full.data_dir / "kms.db"
        change(full, "PRAGMA wal_checkpoint(TRUNCATE)")
        with contextlib.closing(sqlite3.connect(file)) as db, db:
            sql = "SELECT rootpage FROM sqlite_master WHERE name LIKE 'deks_thread_%'"
            (page,) = db.execute(sql).fetchone()
        db.close()
        with open(file, "r+b") as raw:
            raw.seek((page - 1) * 4096 + 4064)
            raw.write(bytes(20))
        assert "kms.db: " in run(full, "verify", code=1)[1]

    def test_a_kek_that_is_not_configured(self, full: Daemon) -> None:
        full.write_kek(os.urandom(32))
        error = run(full, "verify", code=1)[1]
        assert error.count("which is not configured") == 3
        assert "the audit key does not open" in error

    def test_a_deletion_that_the_janitor_would_miss(self, full: Daemon) -> None:
        with full.start().session() as kms:
            kms.ok("DELETE", "/deks/k_1", {"pending_days": 5})
        full.stop()
        run(full, "verify")
        change(full, "DELETE FROM kms WHERE key LIKE 'deletion:%'")
        assert "k_1: is to be deleted" in run(full, "verify", code=1)[1]

    def test_a_forged_ledger(self, full: Daemon) -> None:
        new = os.urandom(32)
        with full.start().session() as kms:
            ledger = Path(kms.rotate(new)["backup"] + ".ledger")
        full.write_kek(new)
        full.stop()
        assert json_of(full, "verify")["ledgers"] == 1
        text = ledger.read_text()
        for old, forged in (
            ('"k_1"', '"k_7"'),
            ('"rewrapped":3', '"rewrapped":2'),
            ('{"key_id"', "no JSON"),
            ('"old_sha256"', '"older"'),
        ):
            assert old in text
            ledger.write_text(text.replace(old, forged))
            assert "the ledger is not the one that was signed" in run(full, "verify", code=1)[1]

    def test_no_store(self, site: Daemon) -> None:
        for command in (["verify"], ["export"], ["backup", str(site.home / "b")]):
            assert "there is no store" in run(site, *command, code=1)[1]
        assert os.listdir(site.data_dir) == []


Rotated = tuple[Daemon, list[str], dict[str, bytes]]


class TestSnapshots:
    @pytest.fixture
    def rotated(self, site: Daemon) -> Iterator[Rotated]:
        """A stopped daemon that was rotated twice; the snapshots; what was encrypted before."""
        first, second, third = site.kek, os.urandom(32), os.urandom(32)
        with site.start().session() as kms:
            keys = [kms.create_dek(f"t{number}")["key_id"] for number in range(3)]
            boxes = {key_id: kms.encrypt(key_id, b"secret") for key_id in keys}
            paths = [kms.rotate(second)["backup"], kms.rotate(third)["backup"]]
        site.stop()
        for name, kek in (("1", first), ("2", second)):
            write_secret(site.home / name, kek.hex().encode())
        site.write_kek(third)
        site.write_config({"previous_master_keys": [{"file": str(site.home / name)} for name in "12"]})
        yield site, paths, boxes

    def test_list(self, rotated: Rotated) -> None:
        daemon, paths, _ = rotated
        rows = [json.loads(text) for text in run(daemon, "backups", "list", "--json")[0].splitlines()]
        assert [row["path"] for row in rows] == paths
        assert [(row["deks"], row["rewrapped"], row["finished"]) for row in rows] == [(3, 3, True)] * 2
        assert rows[0]["time"].endswith("Z")
        assert paths[0] in run(daemon, "backups", "list")[0]
        assert json_of(daemon, "verify")["ledgers"] == 2

    def test_prune(self, rotated: Rotated) -> None:
        daemon, paths, _ = rotated
        root = Path(paths[0]).parent
        (root / "k_1.20250101T000000").write_text("{}")
        assert json_of(daemon, "backups", "prune", "--older-than", "1") == {"removed": 0, "paths": []}
        assert json_of(daemon, "backups", "prune", "--keep", "2")["removed"] == 0
        assert json_of(daemon, "backups", "prune", "--keep", "1") == {"removed": 1, "paths": paths[:1]}
        last = os.path.basename(paths[1])
        assert sorted(os.listdir(root)) == sorted([last, last + ".ledger", "k_1.20250101T000000"])

    def test_prune_by_age(self, site: Daemon) -> None:
        root, now = site.data_dir / "kms-deks-backup", time.time()
        names = {}
        for days in (1, 3, 5):
            when = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now - days * 86400))
            names[days] = root / f"{when}-0123456789abcdef"
            names[days].mkdir(parents=True)
        assert json_of(site, "backups", "prune", "--older-than", "4")["paths"] == [str(names[5])]
        both = ("backups", "prune", "--older-than", "2", "--keep")
        assert json_of(site, *both, "2")["paths"] == [], "where both are given, both must say so"
        assert json_of(site, *both, "1")["paths"] == [str(names[3])]

    def test_a_snapshot_that_is_being_written_stays(self, rotated: Rotated) -> None:
        daemon, paths, _ = rotated
        ledger = Path(paths[0] + ".ledger")
        ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-1]))
        with open(ledger) as held:  # as the rotation that writes it does
            fcntl.flock(held, fcntl.LOCK_EX)
            assert json_of(daemon, "backups", "prune", "--keep", "1")["removed"] == 0
            assert Path(paths[0]).is_dir()
        assert json_of(daemon, "backups", "prune", "--keep", "1")["paths"] == paths[:1]

    def test_an_interrupted_prune_is_finished(self, rotated: Rotated) -> None:
        daemon, paths, _ = rotated
        for name in os.listdir(paths[0]):
            os.unlink(os.path.join(paths[0], name))
        os.rmdir(paths[0])
        assert json_of(daemon, "backups", "prune", "--keep", "1")["paths"] == paths[:1]
        assert not os.path.exists(paths[0] + ".ledger")

    def test_nothing_to_bring_back(self, rotated: Rotated) -> None:
        daemon, paths, _ = rotated
        before = stored(daemon)
        assert json_of(daemon, "restore", "--snapshot", paths[0])["unchanged"] == 3
        assert stored(daemon) == before

    def test_one_damaged_dek(self, rotated: Rotated) -> None:
        daemon, paths, boxes = rotated
        key_id = next(iter(boxes))
        with daemon.start().session() as kms:
            kms.ok("POST", f"/deks/{key_id}/disable", {})
        daemon.stop()
        break_blob(daemon, key_id)
        run(daemon, "verify", code=1)
        found = json_of(daemon, "restore", "--snapshot", paths[0], "--key", key_id)
        assert (found["restored"], found["unchanged"]) == (1, 0)
        run(daemon, "verify")
        run(daemon, "audit", "verify")
        assert stored(daemon)[key_id]["state"] == "disabled", "a restore must not enable a key"
        with daemon.start().session() as kms:
            kms.ok("POST", f"/deks/{key_id}/enable", {})
            assert all(kms.decrypt(key_id, box) == b"secret" for key_id, box in boxes.items())

    def test_a_damaged_line_hides_no_other(self, rotated: Rotated) -> None:
        """Who searched by halves came upon it, and was told to prune the snapshot."""
        daemon, paths, boxes = rotated
        folder = Path(paths[0])
        rows = sorted(
            (path.read_bytes() for path in folder.glob("*.json")), key=lambda row: json.loads(row)["key_id"]
        )
        for path in folder.iterdir():
            path.unlink()
        key_id = json.loads(rows[0])["key_id"]
        break_blob(daemon, key_id)
        for harm in (b"x", b"{}"):
            (folder / "all.lines").write_bytes(rows[0] + harm + rows[1][len(harm) :] + rows[2])
            found = json_of(daemon, "restore", "--snapshot", paths[0], "--key", key_id)
            assert found["restored"] + found["unchanged"] == 1
        run(daemon, "verify")

    def test_a_lost_row(self, rotated: Rotated) -> None:
        daemon, paths, boxes = rotated
        key_id = next(iter(boxes))
        before = stored(daemon)
        lose(daemon, key_id)
        assert json_of(daemon, "restore", "--snapshot", paths[0])["restored"] == 1
        run(daemon, "verify")
        after = stored(daemon)
        assert after[key_id]["wrapped"] != before[key_id]["wrapped"]
        before[key_id]["wrapped"] = after[key_id]["wrapped"]
        assert after == before

    def test_a_lost_row_comes_back_as_it_was_left(self, site: Daemon) -> None:
        """A deletion that was called off since would shred it, one that was scheduled since be forgotten."""
        states = {"off": "disabled", "on": "pending_deletion", "later": "pending_deletion"}
        with site.start().session() as kms:
            for key_id in states:
                kms.ok("POST", "/deks", {"thread_id": "t", "key_id": key_id}, 201)
            kms.ok("DELETE", "/deks/off", {"pending_days": 1})
            kms.ok("DELETE", "/deks/later", {"pending_days": 1})
            kms.ok("POST", "/deks/on/disable")
            new, old = os.urandom(32), site.kek
            folder = kms.rotate(new)["backup"]
            kms.ok("POST", "/deks/off/enable")
            due = {
                key_id: kms.ok("DELETE", f"/deks/{key_id}", {"pending_days": 9}) for key_id in ("on", "later")
            }
        site.stop()
        write_secret(site.home / "old", old.hex().encode())
        site.write_kek(new)
        site.write_config({"previous_master_keys": [{"file": str(site.home / "old")}]})
        for key_id in states:
            lose(site, key_id)
        assert json_of(site, "restore", "--snapshot", folder)["restored"] == 3
        run(site, "verify")
        rows = stored(site)
        assert {key_id: rows[key_id]["state"] for key_id in states} == states
        assert "delete_at" not in rows["off"]
        assert {key_id: rows[key_id]["delete_at"] for key_id in due} == {
            key_id: told["delete_at"] for key_id, told in due.items()
        }

    def test_another_dek_is_replaced_by_force_only(self, rotated: Rotated) -> None:
        daemon, paths, boxes = rotated
        key_id = next(iter(boxes))
        lose(daemon, key_id)
        run(daemon, "import", lines(daemon.home / "in", {"key_id": key_id, "wrapped": go_blob(daemon.kek)}))
        before = stored(daemon)
        assert "taken by another DEK" in run(daemon, "restore", "--snapshot", paths[0], code=1)[1]
        assert stored(daemon) == before
        assert json_of(daemon, "restore", "--snapshot", paths[0], "--force")["restored"] == 1
        run(daemon, "verify")
        with daemon.start().session() as kms:
            assert kms.decrypt(key_id, boxes[key_id]) == b"secret"

    def test_a_chosen_dek_in_the_place_of_another(self, rotated: Rotated) -> None:
        """By force it comes, and as what nobody vouches for: nobody uses it unasked."""
        daemon, paths, boxes = rotated
        key_id = next(iter(boxes))
        with daemon.start().session() as kms:
            chosen = kms.ok("POST", "/wrap", {"dek": b64encode(os.urandom(32)), "key_id": key_id})["wrapped"]
        daemon.stop()
        path = Path(paths[0], f"{key_id}.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "wrapped": chosen}))
        assert stored(daemon)[key_id]["state"] == "enabled"
        one = ("restore", "--snapshot", paths[0], "--key", key_id, "--force")
        assert json_of(daemon, *one)["restored"] == 1
        assert stored(daemon)[key_id]["state"] == "disabled"

    def test_a_chosen_dek(self, rotated: Rotated) -> None:
        """The service wraps what a caller brings, for a key_id that exists too: who writes it into a snapshot
        chooses a DEK. Only the signed ledger tells that another one was there."""
        daemon, paths, boxes = rotated
        key_id = next(iter(boxes))
        with daemon.start().session() as kms:
            chosen = kms.ok("POST", "/wrap", {"dek": b64encode(os.urandom(32)), "key_id": key_id})["wrapped"]
        daemon.stop()
        lose(daemon, key_id)
        path = Path(paths[0], f"{key_id}.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "wrapped": chosen}))
        one = ("restore", "--snapshot", paths[0], "--key", key_id)
        assert "is not as the rotation found it" in run(daemon, *one, code=1)[1]
        assert key_id not in stored(daemon)
        assert json_of(daemon, *one, "--force")["restored"] == 1
        assert stored(daemon)[key_id]["state"] == "disabled"
        ledger = Path(paths[1] + ".ledger")
        text = ledger.read_text()
        for old, forged in (('"new_sha256":"', '"new_sha256":"0'), ('{"key_id"', "no JSON")):
            ledger.write_text(text.replace(old, forged, 1))
            error = run(daemon, "restore", "--snapshot", paths[1], code=1)[1]
            assert "is not the one that was signed: nothing tells whether the snapshot is as" in error
        ledger.unlink()
        assert "can't be read" in run(daemon, "restore", "--snapshot", paths[1], code=1)[1]

    @pytest.mark.parametrize(
        "edited",
        [
            {"thread_id": "room-of-another"},
            {"state": "pending_deletion", "delete_at": "2026-01-01T00:00:00.000000Z"},
            {"created_at": "2020-01-01T00:00:00.000000Z"},
        ],
        ids=lambda edited: next(iter(edited)),
    )
    def test_a_row_that_was_edited(self, rotated: Rotated, edited: dict[str, str]) -> None:
        """The blob is the right one. But policies go by threads, and the janitor by times."""
        daemon, paths, boxes = rotated
        key_id = next(iter(boxes))
        before = stored(daemon)[key_id]
        lose(daemon, key_id)
        path = Path(paths[0], f"{key_id}.json")
        text = path.read_text()
        path.write_text(json.dumps({**json.loads(text), **edited}))
        one = ("restore", "--snapshot", paths[0], "--key", key_id)
        assert "is not as the rotation found it" in run(daemon, *one, code=1)[1]
        assert key_id not in stored(daemon)
        assert json_of(daemon, *one, "--force")["restored"] == 1
        assert stored(daemon)[key_id]["state"] == "disabled"
        lose(daemon, key_id)
        path.write_text(text)
        assert json_of(daemon, *one)["restored"] == 1
        assert {**stored(daemon)[key_id], "wrapped": ""} == {**before, "wrapped": ""}

    def test_never_a_shredded_one(self, rotated: Rotated, short_tmp: Path) -> None:
        daemon, paths, boxes = rotated
        key_id = next(iter(boxes))
        name = f"{key_id}.json"
        kept = Path(paths[0], name).read_bytes()
        with daemon.start().session() as kms:
            kms.ok("DELETE", f"/deks/{key_id}", {"immediately": True})
        daemon.stop()
        assert not Path(paths[0], name).exists()
        one = ("restore", "--snapshot", paths[0], "--key", key_id)
        assert "there is no snapshot" in run(daemon, *one, code=1)[1]
        (short_tmp / name).write_bytes(kept)
        error = run(daemon, "restore", "--snapshot", str(short_tmp), "--force", code=1)[1]
        assert "was shredded: nothing brings it back" in error

    def test_without_the_old_key(self, rotated: Rotated) -> None:
        daemon, paths, _ = rotated
        change(daemon, "DELETE FROM deks")
        daemon.write_config({})
        error = run(daemon, "restore", "--snapshot", paths[0], code=1)[1]
        assert error.count("which is not configured") == 3
        assert stored(daemon) == {}

    def test_no_such_snapshot(self, rotated: Rotated) -> None:
        daemon, paths, _ = rotated
        run(daemon, "restore", "--snapshot", str(daemon.home / "none"), code=1)
        run(daemon, "restore", "--snapshot", paths[0], "--key", "../../kek", code=1)
