"""The daemon itself: run it, ask how it is."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from typing import TYPE_CHECKING

from ..command import CONFIG, DATA_DIR, JSON, ONLINE, SERVE, SOCKET, Arg, client, command
from ..console import CommandFailed, output, say, show

if TYPE_CHECKING:
    from ...client import Client


@command(
    "serve",
    SERVE,
    "run the daemon in the foreground",
    "Serves until SIGTERM or SIGINT; SIGHUP reopens the audit log. This is also what happens "
    "where no command is given. A flag goes before the config file, that before the environment; "
    "but with --config the keys and the peer rules come from that file alone.",
    (
        SOCKET,
        DATA_DIR,
        CONFIG,
        Arg(("--addr",), "also listen on TCP, on this host alone: 127.0.0.1:6820", "text", "ADDRESS"),
        Arg(
            ("--allow-retired-kek",),
            "take a master key that a rotation had replaced, for this start",
            "flag",
        ),
        Arg(
            ("--accept-older-store",),
            "take a kms.db that is older than the audit log beside it, for this start: what was "
            "shredded or disabled since comes back; on the record",
            "flag",
        ),
    ),
    keys=True,
    examples=(
        "progressdb-kms --socket /run/progressdb-kms/kms.sock --data-dir /var/lib/progressdb-kms "
        "--config /etc/progressdb-kms/progressdb-kms.yaml",
    ),
)
def serve(args: argparse.Namespace) -> int:
    from ...config.load import load
    from ...process import serve

    flags = {
        "socket": args.socket,
        "data_dir": args.data_dir,
        "config": args.config,
        "tcp_address": args.addr,
    }
    with load(flags, os.environ, fleet=True) as loaded:
        forced = {"allow_retired": args.allow_retired_kek, "accept_older": args.accept_older_store}
        return serve.serve(loaded, forced)


@command(
    "status",
    ONLINE,
    "tell how the daemon is",
    "Prints whether it is ready, the KEK and its age, DEKs, deletions that are due, the last backup, a "
    "rotation under way, memory protection, and the use of limits. In colour on a terminal, but not "
    "where NO_COLOR is set. --json gives all of it as GET /status does.",
    (
        SOCKET,
        CONFIG,
        JSON,
        Arg(("--ready",), "fail unless it can do all of its work (a health check)", "flag"),
    ),
    exits=((1, "no answer, or not ready with --ready"),),
    examples=("progressdb-kms status", "progressdb-kms status --ready"),
)
def status(args: argparse.Namespace) -> int:
    with client(args) as kms:
        if args.ready:
            return _check_ready(kms, args.json)
        if args.json:
            show(kms.status(), True)
        else:
            from .. import statuscmd

            statuscmd.run(kms)
    return 0


def _check_ready(kms: Client, as_json: bool) -> int:
    found = kms.ready()
    if as_json:
        show({"ready": found.ready, "reasons": list(found.reasons), "warnings": list(found.warnings)}, True)
    if not found:
        raise CommandFailed("not ready: " + ("; ".join(found.reasons) or "the daemon doesn't say why"))
    if not as_json:
        sys.stdout.write("ready\n")
        for warning in found.warnings:
            say(warning)
    return 0


@command(
    "metrics",
    ONLINE,
    "print the metrics, for Prometheus",
    "Prints what GET /metrics answers. With --textfile it is written whole, for the collector of "
    "node_exporter; where the daemon does not answer, the file says progressdb_kms_up 0.",
    (
        SOCKET,
        CONFIG,
        Arg(("--textfile",), "write to this file, such as kms.prom, mode 0644", "file", "PATH"),
    ),
    examples=("progressdb-kms metrics --textfile /var/lib/prometheus/node-exporter/progressdb-kms.prom",),
)
def metrics(args: argparse.Namespace) -> None:
    from ...client import ClientError
    from ...errors import KMSError

    try:
        with client(args) as kms:
            text = kms.metrics() + UP.format(1)
    except (ClientError, KMSError):  # it may not even be found: at a stop the socket's name goes
        if args.textfile:
            _publish(args.textfile, UP.format(0))
        raise
    if args.textfile:
        _publish(args.textfile, text)
    else:
        sys.stdout.write(text)


UP = (
    "# HELP progressdb_kms_up Whether the daemon answered.\n# TYPE progressdb_kms_up gauge\n"
    "progressdb_kms_up {}\n"
)


def _publish(name: str, text: str) -> None:
    """Whole or not at all, and for the collector's user to read: nothing in it is secret."""
    with output(name) as file:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.fchmod(file.fileno(), 0o644)
        file.write(text.encode("utf-8"))
