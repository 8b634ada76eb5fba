"""KEKs that the next start will want, are not there, or were there before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import MakeDaemon
from tests.harness.daemon import Daemon, write_secret
from tests.harness.fakekms import kek_id_of


def ready(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = daemon.request("GET", "/readyz").json()
    return found


def rewrapped(daemon: Daemon, kek: bytes, count: int = 2) -> list[str]:
    """That many DEKs under another KEK, as ProgressDB's own admin call moves them."""
    with daemon.session() as kms:
        keys = [str(kms.create_dek(f"t{number}")["key_id"]) for number in range(count)]
        for key_id in keys:
            answer = kms.ok("POST", "/rewrap", {"key_id": key_id, "new_kek_hex": kek.hex()})
            assert f"the next start needs the KEK {kek_id_of(kek)}" in answer["warning"]
    return keys


class TestRewrapped:
    def test_it_is_told_at_once(self, make_daemon: MakeDaemon) -> None:
        daemon, kek = make_daemon(workers=2), os.urandom(32)
        assert ready(daemon) == {"ready": True, "reasons": [], "warnings": []}
        rewrapped(daemon, kek)
        words = f"the next start needs the KEK {kek_id_of(kek)}: add it to previous_master_keys"
        assert ready(daemon) == {"ready": True, "reasons": [], "warnings": [f"{words} (2 DEKs)"]}
        assert daemon.stderr.count(words) == 1  # once a KEK, not once a DEK
        done = daemon.cli("status", "--ready")
        assert (done.returncode, done.stdout) == (0, b"ready\n") and words.encode() in done.stderr
        done = daemon.cli("doctor", "--config", str(daemon.config_file), "--data-dir", str(daemon.data_dir))
        assert words.encode() in done.stdout

    def test_so_is_a_rotation_that_came_by_the_api(self, make_daemon: MakeDaemon) -> None:
        """Who sends /rotate_kek himself must keep the key himself: until a configured file holds it."""
        daemon, kek = make_daemon(workers=2, source="hexfile"), os.urandom(32)
        rotated = daemon.ok("POST", "/rotate_kek", {"new_kek_hex": kek.hex()})
        words = f"the next start needs the KEK {kek_id_of(kek)}: no configured file holds it"
        assert rotated["warning"].startswith(words)
        assert [warning.startswith(words) for warning in ready(daemon)["warnings"]] == [True]
        assert daemon.stderr.count(words) == 1
        daemon.write_kek(kek)
        assert ready(daemon)["warnings"] == []
        daemon.stop()
        daemon.start()
        assert ready(daemon)["warnings"] == []

    def test_and_not_by_the_command(self, make_daemon: MakeDaemon) -> None:
        daemon = make_daemon(source="hexfile")
        done = daemon.cli("rotate-kek", "--generate", "--config", str(daemon.config_file))
        assert done.returncode == 0, done.stderr
        assert ready(daemon)["warnings"] == [] and "next start" not in daemon.stderr

    def test_nothing_is_told_where_the_key_is_configured(self, make_daemon: MakeDaemon) -> None:
        kek = os.urandom(32)
        daemon = make_daemon({"previous_master_keys": [{"hex": kek.hex()}]})
        with daemon.session() as kms:
            key_id = kms.create_dek("t")["key_id"]
            answer = kms.ok("POST", "/rewrap", {"key_id": key_id, "new_kek_hex": kek.hex()})
            assert "warning" not in answer
        assert ready(daemon)["warnings"] == [] and "next start" not in daemon.stderr

    def test_the_next_start_serves_the_others_where_that_is_allowed(self, make_daemon: MakeDaemon) -> None:
        daemon, kek = make_daemon(workers=2), os.urandom(32)
        with daemon.session() as kms:
            own = str(kms.create_dek("t")["key_id"])
            box = kms.encrypt(own, b"data")
        gone, again = rewrapped(daemon, kek)
        daemon.stop()
        with pytest.raises(AssertionError) as caught:
            daemon.start()
        for word in (kek_id_of(kek), "2 DEKs", "allow_missing_keks", "previous_master_keys"):
            assert word in str(caught.value)

        daemon.write_config({**daemon.config, "allow_missing_keks": True})
        assert b"allow_missing_keks" in daemon.offline("doctor").stdout
        daemon.start()
        assert f"the KEK {kek_id_of(kek)} is not configured (2 DEKs need it" in daemon.stderr
        found = ready(daemon)
        assert found["ready"] and "2 stored DEKs need it" in found["warnings"][0]
        other = os.urandom(32).hex()
        with daemon.session() as kms:
            assert kms.decrypt(own, box) == b"data"
            kms.create_dek("another")
            for path, body in (
                ("/encrypt", {"key_id": gone, "plaintext": ""}),
                ("/rewrap", {"key_id": gone, "new_kek_hex": other}),
                ("/rotate_kek", {"new_kek_hex": other}),
            ):
                reply = kms.request("POST", path, body)
                assert (reply.status, reply.code) == (503, "kek_not_loaded"), (path, reply.body)
            assert kms.ok("GET", f"/deks/{gone}")["state"] == "enabled"
            kms.ok("DELETE", f"/deks/{gone}", {"immediately": True})
        daemon.stop()

        daemon.write_config({"previous_master_keys": [{"hex": kek.hex()}]})
        daemon.start()
        with daemon.session() as kms:
            kms.encrypt(again, b"data")
        assert ready(daemon)["warnings"] == []


class TestSwapped:
    def rotated(self, make_daemon: MakeDaemon) -> tuple[Daemon, Path, Path]:
        """A daemon that was rotated by the command and stopped; the new key file and the old one."""
        daemon = make_daemon(workers=1)
        with daemon.session() as kms:
            kms.create_dek("t")
        done = daemon.cli("rotate-kek", "--config", str(daemon.config_file), "--generate")
        assert done.returncode == 0, done.stderr
        daemon.stop()
        (old,) = daemon.home.glob("kek.old-*")
        return daemon, daemon.kek_file, old

    def test_a_kek_that_was_rotated_out_is_refused(self, make_daemon: MakeDaemon) -> None:
        daemon, new, old = self.rotated(make_daemon)
        current, retired = (kek_id_of(bytes.fromhex(path.read_text())) for path in (new, old))
        swapped = {"master_key_file": str(old), "previous_master_keys": [{"file": str(new)}]}
        write_secret(daemon.config_file, repr(swapped).encode())  # a dict of strings is YAML
        with pytest.raises(AssertionError) as caught:
            daemon.start()
        said = str(caught.value)
        assert f"{retired}, which was rotated out on 20" in said and f"active one is {current}" in said
        assert "--allow-retired-kek" in said
        done = daemon.offline("doctor")
        assert done.returncode == 1 and b"rotated out" in done.stdout
        assert daemon.offline("verify").returncode == 0  # it only reads

        daemon.args = ["--allow-retired-kek"]
        daemon.start()
        assert daemon.ok("GET", "/status")["kek_id"] == retired
        daemon.stop()
        daemon.args = []
        daemon.start()  # it is the store's active one by now
        daemon.stop()
        daemon.write_config({"master_key_file": str(new), "previous_master_keys": [{"file": str(old)}]})
        assert "rotated out" in str(pytest.raises(AssertionError, daemon.start).value)  # and so on

    def test_no_rotation_leads_back_to_it(self, make_daemon: MakeDaemon) -> None:
        daemon, _, old = self.rotated(make_daemon)
        daemon.start()
        for extra in ({}, {"dry_run": True}):
            reply = daemon.request("POST", "/rotate_kek", {"new_kek_hex": old.read_text().strip(), **extra})
            assert (reply.status, reply.code) == (409, "kek_in_use"), reply.body
