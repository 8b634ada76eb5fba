"""Commands on files: genkey, kek-id, audit tail."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import IO

import pytest

from progressdb_kms.tools import auditcmd
from tests.harness.daemon import cli, write_secret
from tests.harness.fakekms import kek_id_of
from tests.tools.test_online import spawn


class TestGenkey:
    def test_it_makes_a_private_file(self, short_tmp: Path) -> None:
        done = cli("genkey", "k", cwd=short_tmp)
        text = (short_tmp / "k").read_text()
        assert len(text) == 65 and stat.S_IMODE((short_tmp / "k").stat().st_mode) == 0o600
        kek_id = kek_id_of(bytes.fromhex(text))
        assert (done.returncode, done.stdout.decode(), done.stderr) == (
            0,
            f"file    k\nkek_id  {kek_id}\n",
            b"",
        )
        assert os.listdir(short_tmp) == ["k"]
        assert json.loads(cli("genkey", "other", "--json", cwd=short_tmp).stdout)["file"] == "other"
        assert (short_tmp / "other").read_text() != text

    def test_it_never_overwrites(self, short_tmp: Path) -> None:
        (short_tmp / "k").write_text("precious")
        done = cli("genkey", "k", cwd=short_tmp)
        assert (done.returncode, done.stdout) == (1, b"")
        assert (
            done.stderr == b"progressdb-kms: k exists, and a key is never overwritten (name another file)\n"
        )
        assert (short_tmp / "k").read_text() == "precious" and os.listdir(short_tmp) == ["k"]

    def test_a_stream_is_refused(self, short_tmp: Path) -> None:
        done = cli("genkey", "-", cwd=short_tmp)
        assert (done.returncode, done.stdout, os.listdir(short_tmp)) == (2, b"", [])
        assert b"`-` is refused" in done.stderr
        assert cli("genkey", "./-", cwd=short_tmp).returncode == 0

    def test_no_such_folder(self, short_tmp: Path) -> None:
        done = cli("genkey", "no/k", cwd=short_tmp)
        assert done.returncode == 1
        assert done.stderr == (
            b"progressdb-kms: no/k can't be made: No such file or directory (nothing was changed: the folder "
            b"no must exist, be writable and have room)\n"
        )


def test_kek_id(short_tmp: Path) -> None:
    for name in ("a", "b"):
        write_secret(short_tmp / name, os.urandom(32))
    done = cli("kek-id", "a", "b", "c", cwd=short_tmp)
    ids = [kek_id_of((short_tmp / name).read_bytes()) for name in ("a", "b")]
    assert done.stdout.decode() == f"{ids[0]}  a\n{ids[1]}  b\n" and done.returncode == 1
    assert b"c can't be read: No such file" in done.stderr
    assert json.loads(cli("kek-id", "a", "--json", cwd=short_tmp).stdout) == {"file": "a", "kek_id": ids[0]}


def test_kek_id_goes_on_behind_what_is_no_key(short_tmp: Path) -> None:
    """`kek-id *` in a folder where the key is among other files."""
    write_secret(short_tmp / "b", os.urandom(32))
    write_secret(short_tmp / "a", b"hosts: none\n")
    found = kek_id_of((short_tmp / "b").read_bytes())
    done = cli("kek-id", "a", "b", "c", cwd=short_tmp)
    first, second, last = done.stderr.decode().splitlines()
    assert (done.returncode, done.stdout.decode()) == (1, f"{found}  b\n")
    assert first.startswith("a must be 64 hex digits") and second.startswith("c can't be read: No such file")
    assert last.startswith("progressdb-kms: 2 of 3 hold no key that may be read")
    done = cli("kek-id", "a", "b", "--json", cwd=short_tmp)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert told[0]["error"]["code"] and told[1] == {"file": "b", "kek_id": found} and done.returncode == 1


def line(seq: int, **more: object) -> bytes:
    event = {"chain": "1.0", "seq": seq, "prev": "", "ts": "2026-11-24T02:13:32.123456Z", "op": "encrypt"}
    return (
        json.dumps({"event": {**event, "outcome": "ok", "status": 200, **more}, "sig": "x"}).encode() + b"\n"
    )


class TestTail:
    @pytest.fixture
    def log(self, short_tmp: Path) -> Path:
        path = short_tmp / "kms-audit.log"
        path.write_bytes(b"".join(line(seq) for seq in range(1, 21)))
        return path

    def tail(self, log: Path, *args: str) -> list[str]:
        done = cli("audit", "tail", "--data-dir", str(log.parent), *args, cwd=log.parent)
        assert (done.returncode, done.stderr) == (0, b"")
        return done.stdout.decode().splitlines()

    def test_the_last_ones(self, log: Path) -> None:
        shown = self.tail(log)
        assert len(shown) == 10 and shown[-1] == "2026-11-24T02:13:32.123456Z 1.0:20 encrypt ok 200"
        assert len(self.tail(log, "-n", "3")) == 3 and len(self.tail(log, "-n", "1000")) == 20

    def test_details_follow(self, log: Path) -> None:
        log.write_bytes(line(1, key_id="k_1", peer={"uid": 7, "pid": 9}, code="a\x1bb"))
        assert self.tail(log) == [
            "2026-11-24T02:13:32.123456Z 1.0:1 encrypt ok 200 key_id=k_1 peer.uid=7 peer.pid=9 code=a\\x1bb"
        ]

    def test_lines_as_they_are(self, log: Path) -> None:
        assert self.tail(log, "--json", "-n", "2") == [text.decode()[:-1] for text in (line(19), line(20))]

    def test_what_is_no_record(self, log: Path) -> None:
        log.write_bytes(b'{"event":{"to\n\x1b[2J\n[]\n{"event":7}\n\xff\n')
        assert self.tail(log) == ['{"event":{"to', "\\x1b[2J", "[]", '{"event":7}', "\ufffd"]

    def test_a_line_that_is_being_written_waits(self, log: Path) -> None:
        with open(log, "ab") as file:
            file.write(line(21)[:50])
        assert self.tail(log, "-n", "1") == ["2026-11-24T02:13:32.123456Z 1.0:20 encrypt ok 200"]

    @pytest.mark.parametrize("block", [1, 7, 300])
    def test_any_block_size(self, log: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(auditcmd, "BLOCK", block)
        whole = log.read_bytes().splitlines()
        for count in (1, 2, 19, 20, 21):
            with open(log, "rb") as file:
                assert auditcmd._last(file, count) == whole[-count:]
                assert file.read() == b""

    def test_no_log(self, short_tmp: Path) -> None:
        done = cli("audit", "tail", "--data-dir", str(short_tmp), cwd=short_tmp)
        assert done.returncode == 1 and b"there is no audit log" in done.stderr

    def test_following_over_a_rotation(self, log: Path) -> None:
        with open(log, "ab") as file:
            append(file, line(21)[:30])
        process = spawn(
            "audit", "tail", "-n", "1", "-f", "--data-dir", str(log.parent), stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        try:
            assert b"1.0:20 " in process.stdout.readline()
            with open(log, "ab") as file:
                append(file, line(21)[30:60])
                append(file, line(21)[60:])
            assert b"1.0:21 " in process.stdout.readline()
            with open(log, "ab") as file:
                log.rename(log.with_name("kms-audit.log.1"))
                append(file, line(22))  # the daemon has not been told yet
            assert b"1.0:22 " in process.stdout.readline()
            log.write_bytes(line(23))
            assert b"1.0:23 " in process.stdout.readline()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def append(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.flush()
