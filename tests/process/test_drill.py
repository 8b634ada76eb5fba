"""`backup --check`, and the rule of schemas: who may open what, the other way round too."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from progressdb_kms.store import sqlite
from progressdb_kms.tools import backup as backups
from tests.harness.daemon import Daemon, write_secret
from tests.harness.fakekms import kek_id_of
from tests.harness.vectors import load, secret


class Site(NamedTuple):
    daemon: Daemon
    backup: Path
    first: bytes  # the KEK of the backup
    other: bytes  # that of one DEK in it


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """A backup with a DEK under another KEK and a tombstone; the daemon was rotated since, and is stopped."""
    with Daemon(workers=1) as daemon:
        first, other = daemon.kek, os.urandom(32)
        with daemon.session() as kms:
            keys = [kms.create_dek(f"t{number}")["key_id"] for number in range(5)]
            kms.ok("POST", "/rewrap", {"key_id": keys[0], "new_kek_hex": other.hex()})
            kms.ok("DELETE", f"/deks/{keys[1]}", {"immediately": True})
            file = daemon.home / "b"
            assert daemon.offline("backup", str(file)).returncode == 0
            kms.rotate(os.urandom(32))
        daemon.stop()
        yield Site(daemon, file, first, other)


def configured(site: Site, *keys: bytes) -> None:
    master, *previous = keys
    write_secret(site.daemon.kek_file, master.hex().encode())
    site.daemon.write_config({"previous_master_keys": [{"hex": key.hex()} for key in previous]})


def check(site: Site, *args: str) -> Any:
    """Also where there is no data-dir at all."""
    away = ("--data-dir", str(site.daemon.home / "nowhere"))
    found = site.daemon.offline("backup", "--check", str(site.backup), *args, *away)
    assert not (site.daemon.home / "nowhere").exists() and b"internal" not in found.stderr
    return found


class TestCheck:
    def test_it_opens_every_dek_and_says_what_it_needs(self, site: Site) -> None:
        configured(site, site.first, site.other)
        before = site.backup.read_bytes()
        done = check(site, "--json")
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert (found["deks"], found["opened"], found["shredded"]) == (4, 4, 1)
        assert sorted(found["needs"]) == sorted(
            [
                f"{kek_id_of(site.first)} (master_key_file {site.daemon.kek_file}): 3 DEKs, the active one",
                f"{kek_id_of(site.other)} (previous_master_keys in {site.daemon.config_file}): 1 DEKs",
            ]
        ) or "previous_master_keys entry 1" in " ".join(found["needs"])
        assert site.backup.read_bytes() == before

    def test_a_previous_key_will_do(self, site: Site) -> None:
        """The configuration of today, after a rotation: the restore would work with it, too."""
        configured(site, os.urandom(32), site.first, site.other)
        assert check(site).returncode == 0

    def test_a_key_that_is_not_configured(self, site: Site) -> None:
        configured(site, site.first)
        done = check(site)
        assert done.returncode == 1 and done.stdout == b""
        assert (
            f"needs the KEK {kek_id_of(site.other)}, which is not configured, for 1 DEKs".encode()
            in done.stderr
        )
        assert b"previous_master_keys" in done.stderr and b"genkey" not in done.stderr
        configured(site, os.urandom(32))
        assert kek_id_of(site.first).encode() in check(site).stderr

    def test_a_dek_that_does_not_open(self, site: Site, short_tmp: Path) -> None:
        """As a defect or a hand would leave it: the checksum fits."""
        configured(site, site.first, site.other)
        bad = short_tmp / "bad"
        bad.write_bytes(site.backup.read_bytes()[: backups.last_line(site.backup).size])
        with contextlib.closing(sqlite3.connect(bad)) as db, db:
            rows = db.execute("SELECT key, value FROM deks WHERE json_extract(value, '$.state') = 'enabled'")
            (one, text), (two, _), *_ = rows.fetchall()
            db.execute("UPDATE deks SET value = ? WHERE key = ?", (text, two))
        with open(bad, "ab") as file:
            file.write(backups._describe(bad).line())
        done = site.daemon.offline("backup", "--check", str(bad))
        assert done.returncode == 1 and two[5:].encode() in done.stderr
        assert b"do not open" in done.stderr or b"as it was written" in done.stderr

    @pytest.mark.parametrize(
        "edit",
        [
            "UPDATE deks SET value = replace(value, '\"t2\"', '\"t3\"')",
            "DELETE FROM deks WHERE json_extract(value, '$.thread_id') = 't2'",
        ],
    )
    def test_what_was_changed_after_it_was_made(self, site: Site, short_tmp: Path, edit: str) -> None:
        """By who knows how to make the checksum; each DEK that is there opens."""
        configured(site, site.first, site.other)
        bad = short_tmp / "bad"
        bad.write_bytes(site.backup.read_bytes()[: backups.last_line(site.backup).size])
        with contextlib.closing(sqlite3.connect(bad)) as db, db:
            assert db.execute(edit).rowcount
        with open(bad, "ab") as file:
            file.write(backups._describe(bad).line())
        done = site.daemon.offline("backup", "--check", str(bad))
        assert done.returncode == 1, done.stdout
        assert b"not as the daemon wrote it" in done.stderr or b"don't add up" in done.stderr

    def test_one_that_release_1_made_is_taken_for_ever(self, short_tmp: Path) -> None:
        """Put together here, and not by the code that writes them now."""
        told, file = load("store"), short_tmp / "b"
        with contextlib.closing(sqlite3.connect(file)) as db, db:
            for sql in told["tables"]:
                db.execute(sql)
            for table in ("deks", "kms"):
                db.executemany(f"INSERT INTO {table} VALUES (?, ?)", told[table].items())
            for name in ("application_id", "user_version"):
                db.execute(f"PRAGMA {name} = {told[name]}")
        copy = file.read_bytes()
        line = told["backup"].replace("SIZE", str(len(copy)))
        digest = hashlib.sha256(copy + line.replace("SHA256", "").encode()).hexdigest()
        file.write_bytes(copy + line.replace("SHA256", digest).encode())
        with backups.opened(file, lambda done, total: None) as found:
            found.unlock(secret(told["row_key"]))
            found.check_all()
            ((record, genuine),) = found.records()
        assert genuine and (record.key_id, record.wrapped, record.state) == ("a", b"wrapped a", "enabled")
        assert found.contents.kek_ids == ["0" * 16]

    def test_damage(self, site: Site, short_tmp: Path) -> None:
        bad = short_tmp / "bad"
        content = bytearray(site.backup.read_bytes())
        content[5000] ^= 1
        bad.write_bytes(content)
        done = site.daemon.offline("backup", "--check", str(bad))
        assert done.returncode == 1 and b"checksum" in done.stderr


class TestSchema:
    """A newer store is refused by each that opens one, with the same words and what to do; so is an older."""

    COMMANDS = (["serve"], ["verify"], ["doctor"], ["export", "-"], ["backup", "x"], ["restore", "b"])

    @pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
    def test_a_newer_store(self, site: Site, command: list[str]) -> None:
        configured(site, os.urandom(32), site.first, site.other)
        twin = site.daemon.copy()
        try:
            (twin.home / "b").write_bytes(site.backup.read_bytes())
            with contextlib.closing(sqlite3.connect(twin.data_dir / "kms.db")) as db:
                db.execute("PRAGMA user_version=99")
            before = (twin.data_dir / "kms.db").read_bytes()
            own = ["--socket", str(twin.socket)] if command == ["serve"] else []
            done = twin.offline(*command, *own)
            said = (done.stdout + done.stderr).decode()
            assert done.returncode == 1, said
            assert f"kms.db has schema version 99, and this release knows {sqlite.SCHEMA_VERSION}" in said
            assert "the newer release that wrote it" in said or "--force" in said
            assert (twin.data_dir / "kms.db").read_bytes() == before and not (twin.home / "x").exists()
        finally:
            twin.close()

    def test_a_newer_store_and_a_snapshot(self, site: Site) -> None:
        """Its indexes were made anew before anybody looked at the version."""
        configured(site, os.urandom(32), site.first, site.other)
        with contextlib.closing(site.daemon.copy()) as twin:
            with contextlib.closing(sqlite3.connect(twin.data_dir / "kms.db")) as db:
                db.execute("PRAGMA user_version=99")
            before = (twin.data_dir / "kms.db").read_bytes()
            (folder,) = (path for path in (twin.data_dir / "kms-deks-backup").iterdir() if path.is_dir())
            done = twin.offline("restore", "--snapshot", str(folder))
            assert done.returncode == 1 and b"kms.db has schema version 99" in done.stderr
            assert (twin.data_dir / "kms.db").read_bytes() == before

    def test_a_backup_of_a_newer_release(self, site: Site, short_tmp: Path) -> None:
        newer = short_tmp / "newer"
        contents = backups.last_line(site.backup)
        newer.write_bytes(site.backup.read_bytes()[: contents.size])
        with open(newer, "ab") as file:
            file.write(contents._replace(schema=99, sha256="").sealed(newer, lambda *_: None).line())
        for command in (["restore"], ["backup", "--check"]):
            done = site.daemon.offline(*command, str(newer))
            assert done.returncode == 1 and b"has schema version 99" in done.stderr
            assert b"the newer release that wrote it" in done.stderr

    def test_an_older_store(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        """Seen from the release to come: it says how to go on, and changes nothing."""
        monkeypatch.setattr(sqlite, "SCHEMA_VERSION", sqlite.SCHEMA_VERSION + 1)
        before = (site.daemon.data_dir / "kms.db").read_bytes()
        for opened in (sqlite.SqliteReader, sqlite.SqliteStore):
            with pytest.raises(sqlite.StoreDamaged) as caught:
                opened(site.daemon.data_dir)
            assert "`export` with the older release" in caught.value.hint
        assert (site.daemon.data_dir / "kms.db").read_bytes() == before
