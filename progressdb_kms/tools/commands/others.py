"""The host, the rules, the manual, the speed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..command import CONFIG, DATA_DIR, JSON, OFFLINE, SOCKET, Arg, command, load

if TYPE_CHECKING:
    pass


@command(
    "doctor",
    OFFLINE,
    "look for what is wrong, and say what to do",
    "Checks limits, memory protection, modes and owners, the store, disk space, the clock, "
    "versions, the daemon, and files that an unfinished rotation left. It changes nothing.",
    (SOCKET, DATA_DIR, CONFIG, JSON),
    keys=True,
    exits=((1, "a check failed"),),
    examples=("progressdb-kms doctor --config /etc/progressdb-kms/progressdb-kms.yaml",),
)
def doctor(args: argparse.Namespace) -> int:
    from .. import doctor as clinic

    return clinic.run(args)


@command(
    "policy test",
    OFFLINE,
    "tell whether a call would be allowed, and which rule decides",
    "Asks the rules of the configuration, not the daemon: allowed_peer_uids, admin_peer_uids, then each "
    "entry of policies. Rates are not looked at.",
    (
        Arg(("--uid",), "the caller's UID", "uid", "N", required=True),
        Arg(("--gid",), "a group of the caller (default: none of those that policies name)", "uid", "N"),
        Arg(("--op",), "the operation: a command, or as the audit log names it", "op", "OP", required=True),
        Arg(("--key-id",), "the DEK", "key_id", "ID"),
        Arg(("--thread-id",), "its thread", "text", "ID"),
        DATA_DIR,
        CONFIG,
        JSON,
    ),
    exits=((1, "it would be refused"),),
    examples=("progressdb-kms policy test --uid 998 --op decrypt --key-id k_1 --thread-id room-1",),
)
def policy_test(args: argparse.Namespace) -> int:
    from .. import policycmd

    with load(args, need_key=False, fleet=True) as loaded:
        return policycmd.test(args, loaded.settings)


@command(
    "help",
    OFFLINE,
    "show the manual",
    "Without a topic it lists them. On a terminal the text goes through $PAGER.",
    (Arg(("topic",), "what to read about", "topic", "TOPIC", "?", default="", empty=True),),
    examples=("progressdb-kms help", "progressdb-kms help secrets"),
)
def manual(args: argparse.Namespace) -> None:
    from .. import manual as book

    book.show(book.text_of(args.topic) if args.topic else book.overview())


@command(
    "bench",
    OFFLINE,
    "measure this machine",
    "calls: each call over 1, 16 and 64 connections, beside what a socket, HTTP and the cipher alone "
    "can do. many: more DEKs than a worker remembers, and pages over many. usage: what it costs to count "
    "what is done under each DEK. progressdb: its load, one message after another, over the socket and "
    "TCP. store: durable "
    "creates a second. rotate: rate and memory of a rotation, and p99 beside it. audit: how quickly a log "
    "is verified, searched and reported on. memory: what keeping "
    "keys out of memory costs. fleet: a host of a fleet beside one with a store of its own, how long a "
    "change takes until it holds on all of 3 and of 100 hosts, and how long a rotation locks the rows; it "
    "starts a PostgreSQL of its own for that. "
    "It starts a daemon of its own in a temporary folder. --compare holds two "
    "runs against each other, and fails where a figure is worse by a tenth.",
    (
        Arg(
            ("what",),
            "calls (default), many, usage, progressdb, store, rotate, audit, memory or fleet",
            "bench",
            "WHAT",
            "?",
            default="calls",
        ),
        Arg(("--seconds",), "how long each figure is measured (default 3)", "count", "N", default=3),
        Arg(
            ("--deks",),
            "DEKs of the largest store: for many, usage and audit (default 40000), for rotate (default "
            "1000000, which takes minutes and 10 GB), for the rotation of fleet (default 20000)",
            "count",
            "N",
        ),
        Arg(("--compare",), "two files with the output of --json, the older first", "file", "FILE", "2"),
        JSON,
    ),
    exits=((1, "it failed, or a figure is worse"),),
    examples=(
        "progressdb-kms bench",
        "progressdb-kms bench rotate --deks 100000",
        "progressdb-kms bench --compare before.json after.json",
    ),
)
def bench(args: argparse.Namespace) -> int:
    from .. import bench as measure
    from .. import benchcompare

    if args.compare:
        return benchcompare.show(*args.compare, as_json=args.json)
    if args.what == "fleet":
        from ..fleetbench import fleet

        return measure.show(fleet(float(args.seconds), args.deks), args.json)
    return measure.run(args.what, seconds=args.seconds, deks=args.deks, as_json=args.json)
