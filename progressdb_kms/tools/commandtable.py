"""Every command as a row of a table: the parser, the man page, the shell completions and the manual's check
are made from it. What a command does stands in `commands`, under the name in `run`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SERVE, ONLINE, OFFLINE = "serve", "online", "offline"

DEFAULT_SOCKET = "/tmp/progressdb-kms.sock"  # noqa: S108
DEFAULT_DATA_DIR = "./kms-data"


class Arg(NamedTuple):
    """One argument. `kind`: flag, text, count (from 1), uid, file, folder, key_id, or a key of CHOICES."""

    names: tuple[str, ...]
    help: str
    kind: str = "text"
    metavar: str = ""
    nargs: str = ""  # as argparse has it: ? * + or a number
    required: bool = False
    default: Any = None

    @property
    def positional(self) -> bool:
        return not self.names[0].startswith("-")


class Command(NamedTuple):
    """One command. `run` is its function in `commands`; `keys`: it handles key bytes, so its process is
    hardened before anything else."""

    name: str  # one or two words
    group: str
    help: str
    about: str
    args: tuple[Arg, ...]
    run: str
    examples: tuple[str, ...] = ()
    keys: bool = False
    exits: tuple[tuple[int, str], ...] = ()


CHOICES: dict[str, tuple[str, ...]] = {
    "bench": ("calls", "many", "progressdb", "store", "rotate", "memory"),
    "outcome": ("ok", "refused", "failed"),
    "state": ("enabled", "disabled", "pending_deletion", "shredded"),
}

EXITS = ((0, "it was done"), (1, "it failed; stderr says why"), (2, "the command line is wrong"))

ENVIRONMENT = (
    ("PROGRESSDB_KMS_SOCKET", "the socket, where neither --socket nor a --config names one"),
    ("PROGRESSDB_KMS_DATA_DIR", "the data-dir, likewise"),
    ("PROGRESSDB_KMS_MASTER_KEY_FILE", "the master key file; not read with --config"),
    ("PROGRESSDB_KMS_MASTER_KEY_HEX", "the master key; not read with --config"),
    ("PROGRESSDB_KMS_ALLOWED_UIDS", "UIDs that are served, with commas between; not read with --config"),
)

SOCKET = Arg(("--socket",), f"the daemon's Unix socket (default {DEFAULT_SOCKET})", "file", "PATH")
SERVER_UID = Arg(
    ("--server-uid",), "the daemon's UID, where others may write to its socket's folder", "uid", "UID"
)
DATA_DIR = Arg(
    ("--data-dir",), f"where the store and the audit log are (default {DEFAULT_DATA_DIR})", "folder", "DIR"
)
CONFIG = Arg(("--config",), "the YAML configuration", "file", "FILE")
JSON = Arg(("--json",), "print JSON, for programs", "flag")
KEY = Arg(("key_id",), "the DEK", "key_id", "KEY_ID")
KEY_OPTION = Arg(("--key-id",), "the DEK to use", "key_id", "ID", required=True)
AAD = Arg(("--aad",), "text that is bound to the data and must be given again to decrypt it", "text", "TEXT")
INPUT = Arg(("input",), "what to read (default and `-`: stdin)", "file", "IN", "?", default="-")
OUTPUT = Arg(("output",), "what to write (default and `-`: stdout)", "file", "OUT", "?", default="-")
NEW_KEY_FILE = Arg(("--new-key-file",), "a key file with the new KEK (see genkey)", "file", "FILE")

_OUT_RULES = (
    "OUT is written whole or not at all, with mode 0600: a command that fails leaves no file, and one"
    " that was there before stays. Binary data is not written to a terminal."
)

COMMANDS: tuple[Command, ...] = (
    Command(
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
        "serve",
        (
            "progressdb-kms --socket /run/progressdb-kms/kms.sock --data-dir /var/lib/progressdb-kms "
            "--config /etc/progressdb-kms/progressdb-kms.yaml",
        ),
        keys=True,
    ),
    # ---- keys and data, through the socket
    Command(
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
        "status",
        ("progressdb-kms status", "progressdb-kms status --ready"),
        exits=((1, "no answer, or not ready with --ready"),),
    ),
    Command(
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
        "metrics",
        ("progressdb-kms metrics --textfile /var/lib/prometheus/node-exporter/progressdb-kms.prom",),
    ),
    Command(
        "create-dek",
        ONLINE,
        "make a DEK for a thread",
        "Prints the key_id of a new DEK. Each call makes another one.",
        (
            SOCKET,
            CONFIG,
            Arg(("--thread-id",), "the chat thread that it is for", "text", "ID", required=True),
            Arg(("--key-id",), "its key_id (default: a generated one)", "key_id", "ID"),
            JSON,
        ),
        "create_dek",
        ("KEY=$(progressdb-kms create-dek --thread-id t1)",),
    ),
    Command(
        "list",
        ONLINE,
        "list the DEKs",
        "Prints a line a DEK, in order of key_id.",
        (
            SOCKET,
            CONFIG,
            Arg(("--thread-id",), "those of this thread only", "text", "ID"),
            Arg(("--state",), "those in this state only", "state", "STATE"),
            Arg(("--prefix",), "those whose key_id begins so", "text", "TEXT"),
            Arg(("--unused-for",), "those older than this and not used since: 90d, 12h", "text", "TIME"),
            Arg(("--limit",), "the first N only", "count", "N"),
            Arg(("--ids",), "print key_ids alone, a line each", "flag"),
            JSON,
        ),
        "list_deks",
        (
            "progressdb-kms list --thread-id t1",
            "progressdb-kms list --ids --prefix k_0190",
            "progressdb-kms list --unused-for 90d",
        ),
    ),
    Command(
        "describe",
        ONLINE,
        "tell about a DEK",
        "Prints state, thread, KEK and times of one DEK, and what was done under it; never its bytes.",
        (SOCKET, CONFIG, KEY, JSON),
        "describe",
    ),
    Command(
        "encrypt",
        ONLINE,
        "encrypt a file or stdin under a DEK",
        "AES-256-GCM inside the daemon; the DEK never leaves it. " + _OUT_RULES,
        (SOCKET, CONFIG, KEY_OPTION, AAD, INPUT, OUTPUT),
        "encrypt",
        (
            "progressdb-kms encrypt --key-id $KEY --aad backup notes.txt notes.enc",
            "… | progressdb-kms encrypt --key-id $KEY > f",
        ),
    ),
    Command(
        "decrypt",
        ONLINE,
        "decrypt a file or stdin",
        "The opposite of encrypt: takes the same key_id and the same AAD. " + _OUT_RULES,
        (SOCKET, CONFIG, KEY_OPTION, AAD, INPUT, OUTPUT),
        "decrypt",
        ("progressdb-kms decrypt --key-id $KEY --aad backup notes.enc notes.txt",),
    ),
    Command(
        "disable",
        ONLINE,
        "take a DEK out of use",
        "What was encrypted under it can't be read until enable.",
        (SOCKET, CONFIG, KEY, JSON),
        "disable",
    ),
    Command(
        "enable",
        ONLINE,
        "take a DEK into use again",
        "Undoes disable, and cancels a scheduled shred.",
        (SOCKET, CONFIG, KEY, JSON),
        "enable",
    ),
    Command(
        "shred",
        ONLINE,
        "schedule the erasure of a DEK, or erase it at once",
        "Once a DEK is shredded nothing can bring back what was encrypted under it: its wrapped bytes"
        " are removed from the store, its log and the snapshots. Backups made before hold it still, "
        "but restore refuses it. Without --now it is due in 7 days, until then `enable` cancels it. On a "
        "terminal it asks before it shreds at once, or more than one DEK; elsewhere that needs --yes.",
        (
            SOCKET,
            CONFIG,
            Arg(("key_id",), "the DEKs", "key_id", "KEY_ID", "*"),
            Arg(("--thread-id",), "all DEKs of this thread", "text", "ID"),
            Arg(("--now",), "at once; it can't be undone", "flag"),
            Arg(("--days",), "when it is due: 1 to 365 days (default 7)", "count", "N"),
            Arg(("--dry-run",), "only list what would be shredded", "flag"),
            Arg(("--yes",), "don't ask", "flag"),
            JSON,
        ),
        "shred",
        ("progressdb-kms shred k_0190… --days 30", "progressdb-kms shred --thread-id room-42 --now"),
    ),
    Command(
        "rewrap",
        ONLINE,
        "move one DEK to another KEK",
        "The other KEK stays in the daemon's memory, and must be in previous_master_keys at its next start.",
        (SOCKET, CONFIG, KEY, NEW_KEY_FILE._replace(required=True), JSON),
        "rewrap",
        keys=True,
    ),
    Command(
        "clock accept",
        ONLINE,
        "say that the wall clock is right, after it moved",
        "A scheduled deletion is due when the wall clock and a trusted one have passed its time. Where the "
        "two contradict each other (the clock went back by more than 5 minutes or ahead by more than a week, "
        "or a reboot took longer), deletions are held. This command goes on by the clock as it stands.",
        (SOCKET, JSON),
        "clock_accept",
    ),
    Command(
        "rotate-kek",
        ONLINE,
        "move all DEKs to a new KEK, while the daemon serves",
        "The new key is in a file and synced before the daemon hears of it: FILE.next beside the "
        "master_key_file FILE, which may be lost as long as the daemon runs. After the rotation it takes "
        "the place of FILE, and the old key stays "
        "as FILE.old-<kek_id>: backups and snapshots made before need it. Whatever is interrupted, "
        "the daemon starts, and --resume finishes. Where the key is not in a master_key_file, the new"
        " key file stays where it is and the lines to change in the configuration are printed.",
        (
            SOCKET,
            CONFIG,
            Arg(("--generate",), "make a new random key", "flag"),
            NEW_KEY_FILE,
            Arg(("--resume",), "finish a rotation that was interrupted", "flag"),
            Arg(("--dry-run",), "open every DEK and change nothing", "flag"),
            Arg(("--forget-old",), "overwrite the old key instead of keeping it", "flag"),
            JSON,
        ),
        "rotate_kek",
        (
            "progressdb-kms rotate-kek --config /etc/progressdb-kms/progressdb-kms.yaml --generate --dry-run",
            "progressdb-kms rotate-kek --config /etc/progressdb-kms/progressdb-kms.yaml --generate",
        ),
        keys=True,
    ),
    # ---- files
    Command(
        "genkey",
        OFFLINE,
        "make a key file",
        "Writes 32 random bytes as hex, mode 0600, synced with the folder; never over a file that "
        "exists. Prints the kek_id, never the key. Keep a copy in a safe place: without it every DEK "
        "is lost.",
        (Arg(("file",), "the key file to make", "file", "FILE"), JSON),
        "genkey",
        ("progressdb-kms genkey /etc/progressdb-kms/kek.key",),
        keys=True,
    ),
    Command(
        "kek-id",
        OFFLINE,
        "tell the kek_id of key files",
        "Prints the fingerprint by which the store names a KEK: finds the file that a message asks for.",
        (Arg(("file",), "a key file", "file", "FILE", "+"), JSON),
        "kek_id",
        ("progressdb-kms kek-id /etc/progressdb-kms/kek.key*",),
        keys=True,
    ),
    Command(
        "audit verify",
        OFFLINE,
        "check the audit log",
        "Checks signatures, chains and heads, and prints the first fault with its file and line. "
        "Without LOG it takes the log of the data-dir.",
        (
            Arg(("log",), "audit logs, the oldest first", "file", "LOG", "*"),
            DATA_DIR,
            CONFIG,
            Arg(
                ("--receipts",),
                "a file of X-KMS-Audit receipts, one a line, to hold against the logs",
                "file",
                "FILE",
            ),
            Arg(("--partial",), "the logs don't reach back to the first record", "flag"),
            JSON,
        ),
        "audit_verify",
        ("progressdb-kms audit verify --config /etc/progressdb-kms/progressdb-kms.yaml",),
        keys=True,
        exits=((1, "a fault was found, or the log can't be read"),),
    ),
    Command(
        "audit search",
        OFFLINE,
        "find audit records",
        "By any number of conditions, over the log of the data-dir or the files that are named, .gz too. "
        "Each record that is shown is checked, and the chains with it: stderr says what was verified. A "
        "damaged line is named and is no end. Times are 2h, 7d, 2026-11-24 or RFC 3339, in UTC.",
        (
            Arg(("log",), "audit logs (default: those of the data-dir)", "file", "LOG", "*"),
            Arg(("--key",), "that name this key_id, in a batch too", "key_id", "ID"),
            Arg(("--thread",), "of this thread", "text", "ID"),
            Arg(("--uid",), "of callers with this UID", "uid", "N"),
            Arg(("--op",), "of this operation, such as decrypt", "text", "OP"),
            Arg(("--outcome",), "ok, refused or failed", "outcome", "WORD"),
            Arg(("--since",), "not before this time", "text", "TIME"),
            Arg(("--until",), "before this time", "text", "TIME"),
            Arg(("--embedded",), "that opened messages of ProgressDB's embedded mode", "flag"),
            Arg(("--csv",), "print CSV, for spreadsheets", "flag"),
            JSON,
            Arg(("--no-verify",), "without the keys: nothing is verified", "flag"),
            DATA_DIR,
            CONFIG,
        ),
        "audit_search",
        (
            "progressdb-kms audit search --outcome refused --since 2h",
            "progressdb-kms audit search --key k_0123 --op decrypt --csv >decrypts.csv",
        ),
        keys=True,
        exits=((1, "a fault was found, or the log can't be read"),),
    ),
    Command(
        "audit report",
        OFFLINE,
        "make one HTML page of the audit log and the store",
        "Calls by hour and operation, refusals and failures by UID, keys used most and never, DEKs by KEK "
        "and state, rotations, deletions that are due, and whether the chains verify. The page needs no "
        "network and no script.",
        (
            Arg(("output",), "the page to write", "file", "FILE"),
            Arg(("log",), "audit logs (default: those of the data-dir)", "file", "LOG", "*"),
            Arg(("--since",), "only records not before this time", "text", "TIME"),
            Arg(("--until",), "only records before this time", "text", "TIME"),
            DATA_DIR,
            CONFIG,
        ),
        "audit_report",
        ("progressdb-kms audit report november.html --since 30d",),
        keys=True,
        exits=((1, "a fault was found (it stands in the page), or the log can't be read"),),
    ),
    Command(
        "audit tail",
        OFFLINE,
        "show the last audit records",
        "Shows records without checking their signatures.",
        (
            DATA_DIR,
            CONFIG,
            Arg(("-n", "--lines"), "how many (default 10)", "count", "N", default=10),
            Arg(("-f", "--follow"), "go on with new ones, also after the log was rotated", "flag"),
            Arg(("--json",), "print the lines as they stand in the log", "flag"),
        ),
        "audit_tail",
        ("progressdb-kms audit tail -f --data-dir /var/lib/progressdb-kms",),
    ),
    Command(
        "verify",
        OFFLINE,
        "open every DEK and check the store",
        "Checks SQLite's integrity and opens each DEK under the KEK it names. May run beside the daemon. "
        "--recount (the daemon is stopped) first counts and adds up the rows anew, each of which must be "
        "genuine, where the store's own figures differ: look why they do before you let them follow.",
        (Arg(("--recount",), "let the counts follow the rows", "flag"), DATA_DIR, CONFIG, JSON),
        "verify",
        keys=True,
    ),
    Command(
        "backup",
        OFFLINE,
        "copy the store to one file",
        "A consistent copy, taken while the daemon may run, with a checksum and the kek_ids that it "
        "needs; never over a file that exists. It holds wrapped DEKs only: keep the key files elsewhere. "
        "--check is a drill for the restore: it opens every DEK of FILE with the configured keys and says "
        "which keys it needs; it needs no store and changes nothing. Where FILE is a folder, the backup gets "
        "a name with the time there. With --keep it is checked at once, and then the oldest of those that "
        "were made there so go; one that fails the check is kept under another name, and none goes.",
        (
            Arg(("file",), "the backup to make, or a folder", "file", "FILE"),
            Arg(("--check",), "make none: open every DEK of FILE", "flag"),
            Arg(("--keep",), "check it, then keep the newest N of the folder", "count", "N"),
            DATA_DIR,
            CONFIG,
            JSON,
        ),
        "backup",
        (
            "progressdb-kms backup /backup/kms-$(date +%FT%T) "
            "--config /etc/progressdb-kms/progressdb-kms.yaml",
            "progressdb-kms backup --check /backup/kms-2026-11-24T02:00:00 "
            "--config /etc/progressdb-kms/progressdb-kms.yaml",
            "progressdb-kms backup /backup --keep 14 --config /etc/progressdb-kms/progressdb-kms.yaml",
        ),
        keys=True,
    ),
    Command(
        "restore",
        OFFLINE,
        "bring back a backup, or DEKs from a snapshot",
        "The daemon must be stopped. The file is checked before anything is changed; what was "
        "shredded since stays shredded. With --snapshot DEKs come from a folder under "
        "kms-deks-backup.",
        (
            Arg(("file",), "a file made by backup", "file", "FILE", "?"),
            DATA_DIR,
            CONFIG,
            Arg(("--snapshot",), "a snapshot folder, instead of FILE", "folder", "PATH"),
            Arg(("--key",), "this DEK only, with --snapshot", "key_id", "ID"),
            Arg(("--force",), "also over what is newer", "flag"),
            JSON,
        ),
        "restore",
        (
            "progressdb-kms restore /backup/kms-2026-11-24 --config /etc/progressdb-kms/progressdb-kms.yaml",
            "progressdb-kms restore --snapshot kms-data/kms-deks-backup/20261124T020000Z-… --key k_0190…",
        ),
        keys=True,
    ),
    Command(
        "export",
        OFFLINE,
        "write all DEKs as JSON lines",
        "A line a DEK, wrapped: it opens under the same KEK only. OUT is written whole or not at all.",
        (OUTPUT, DATA_DIR, CONFIG),
        "export",
        ("progressdb-kms export deks.jsonl --config /etc/progressdb-kms/progressdb-kms.yaml",),
    ),
    Command(
        "import",
        OFFLINE,
        "take DEKs from JSON lines, or from ProgressDB's own stores",
        "Takes what export writes, lines of {key_id, thread_id, wrapped} or {key_id, wrapped_dek} as "
        "ProgressDB had them, its kms-deks and kms-deks-backup folders, and its Pebble folders (with "
        "rocksdict). The daemon must be stopped. Each DEK is opened under the KEK before it is stored.",
        (
            Arg(("input",), "a file, a folder, or `-` for stdin", "file", "IN"),
            DATA_DIR,
            CONFIG,
            Arg(("--skip-bad",), "list bad lines and go on with the others", "flag"),
            JSON,
        ),
        "import_deks",
        ("progressdb-kms import /var/lib/old-kms/kms-deks --config /etc/progressdb-kms/progressdb-kms.yaml",),
        keys=True,
    ),
    Command(
        "backups list",
        OFFLINE,
        "list the snapshots that rotations left",
        "Prints a line a snapshot folder: its time, the KEK it needs, its number of DEKs.",
        (DATA_DIR, CONFIG, JSON),
        "backups_list",
    ),
    Command(
        "backups prune",
        OFFLINE,
        "remove old snapshots",
        "Give --keep, --older-than, or both: then a snapshot goes only where both say so.",
        (
            DATA_DIR,
            CONFIG,
            Arg(("--keep",), "keep the newest N", "count", "N"),
            Arg(("--older-than",), "remove those older than D days", "count", "D"),
            JSON,
        ),
        "backups_prune",
        ("progressdb-kms backups prune --keep 3 --config /etc/progressdb-kms/progressdb-kms.yaml",),
    ),
    Command(
        "doctor",
        OFFLINE,
        "look for what is wrong, and say what to do",
        "Checks limits, memory protection, modes and owners, the store, disk space, the clock, "
        "versions, the daemon, and files that an unfinished rotation left. It changes nothing.",
        (SOCKET, DATA_DIR, CONFIG, JSON),
        "doctor",
        ("progressdb-kms doctor --config /etc/progressdb-kms/progressdb-kms.yaml",),
        keys=True,
        exits=((1, "a check failed"),),
    ),
    Command(
        "policy test",
        OFFLINE,
        "tell whether a call would be allowed, and which rule decides",
        "Asks the rules of the configuration, not the daemon: allowed_peer_uids, admin_peer_uids, then each "
        "entry of policies. Rates are not looked at.",
        (
            Arg(("--uid",), "the caller's UID", "uid", "N", required=True),
            Arg(("--gid",), "the caller's GID (default: none of those that policies name)", "uid", "N"),
            Arg(("--op",), "the operation, as the audit log names it", "text", "OP", required=True),
            Arg(("--key-id",), "the DEK", "key_id", "ID"),
            Arg(("--thread-id",), "its thread", "text", "ID"),
            DATA_DIR,
            CONFIG,
            JSON,
        ),
        "policy_test",
        ("progressdb-kms policy test --uid 998 --op decrypt --key-id k_1 --thread-id room-1",),
        exits=((1, "it would be refused"),),
    ),
    Command(
        "help",
        OFFLINE,
        "show the manual",
        "Without a topic it lists them. On a terminal the text goes through $PAGER.",
        (Arg(("topic",), "what to read about", "text", "TOPIC", "?", default=""),),
        "manual",
        ("progressdb-kms help", "progressdb-kms help secrets"),
    ),
    Command(
        "bench",
        OFFLINE,
        "measure this machine",
        "calls: each call over 1, 16 and 64 connections, beside what HTTP alone and the cipher alone "
        "can do. many: more DEKs than a worker remembers, and pages over many. progressdb: its load, one "
        "message after another, over the socket and TCP. store: durable "
        "creates a second. rotate: rate and memory of a rotation, and p99 beside it. memory: what keeping "
        "keys out of memory costs. It starts a daemon of its own in a temporary folder. --compare holds two "
        "runs against each other, and fails where a figure is worse by a tenth.",
        (
            Arg(
                ("what",),
                "calls (default), many, progressdb, store, rotate or memory",
                "bench",
                "WHAT",
                "?",
                default="calls",
            ),
            Arg(("--seconds",), "how long each figure is measured (default 3)", "count", "N", default=3),
            Arg(
                ("--deks",),
                "DEKs of the largest store: for many (default 40000), for rotate (default 1000000, which "
                "takes minutes and 10 GB)",
                "count",
                "N",
            ),
            Arg(("--compare",), "two files with the output of --json, the older first", "file", "FILE", "2"),
            JSON,
        ),
        "bench",
        (
            "progressdb-kms bench",
            "progressdb-kms bench rotate --deks 100000",
            "progressdb-kms bench --compare before.json after.json",
        ),
        exits=((1, "it failed, or a figure is worse"),),
    ),
)


def _asks_who_listens(command: Command) -> Command:
    """Every command that sends something through the socket takes --server-uid behind --socket."""
    if SOCKET not in command.args or command.group == SERVE:
        return command
    at = command.args.index(SOCKET) + 1
    return command._replace(args=(*command.args[:at], SERVER_UID, *command.args[at:]))


def _takes_a_configuration(command: Command) -> Command:
    """All do, so that a script can give the same words to each; `genkey` and the like have no use for it."""
    return command if CONFIG in command.args else command._replace(args=(*command.args, CONFIG))


COMMANDS = tuple(_takes_a_configuration(_asks_who_listens(command)) for command in COMMANDS)

GROUP_TITLES = {
    SERVE: "the daemon",
    ONLINE: "through the socket",
    OFFLINE: "on files",
}
