"""Requests that many send ahead, in any order of events: all are answered, in order; nothing stays behind.

A seed makes scripts for some dozen clients at once. A script is what one of them sends, cut anywhere, with
pauses, and how it ends and reads; with it comes the model: which statuses, and which bodies, must come.
Behind each round all that the clients held must be free again.

A failure names its seed: `play(daemon, seed)` plays the same scripts again, if not in the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any, Callable, NamedTuple, Union

import pytest

from progressdb_kms.wire.slab import LAST, SPARES
from tests.conftest import MakeDaemon
from tests.harness import Daemon
from tests.harness.procs import wait_until
from tests.harness.wire import Address, b64, connect, free_port, host_of

PATIENCE = 60.0
"""Seconds in which nothing at all comes, until a client that waits is a failure."""

PIECES = 8
"""Clients that may be at once where one sends keys: each holds at most two pieces of locked memory."""

DONE, GONE = "shuts its side", "is gone"
Step = Union[bytes, float, int, str]
"""Bytes to send; seconds to wait; so many answers to wait for; or an end."""

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Wanted(NamedTuple):
    """An answer. `check` is given its body."""

    status: int
    check: Callable[[bytes], object] = lambda body: True
    is_head: bool = False
    may_continue: bool = False


Made = tuple[bytes, Wanted]


# ---- requests, and what they must get -------------------------------------------------------------------


class Kit:
    """Makes requests for one daemon. What was encrypted is opened at the end of a round."""

    def __init__(self, daemon: Daemon, chance: random.Random, host: str) -> None:
        self.chance = chance
        self.host = host.encode()
        self.daemon = daemon
        self.key = daemon.ok("POST", "/create_dek_for_thread", {"thread_id": "t"})["key_id"]
        self.texts = [chance.getrandbits(8 * size).to_bytes(size, "big") for size in range(1, 40)]
        rows = [{"key_id": self.key, "plaintext": b64(text)} for text in self.texts]
        items = daemon.ok("POST", "/encrypt_batch", {"items": rows})["items"]
        self.sealed = [item["ciphertext"] for item in items]
        self.long = chance.getrandbits(8 * 70_000).to_bytes(70_000, "big")
        self.long_sealed = daemon.request(
            "POST", f"/encrypt?key_id={self.key}", self.long, {"Content-Type": "application/octet-stream"}
        ).body
        self.dek = b64(bytes(range(32)))
        self.wrapped = daemon.ok("POST", "/wrap", {"dek": self.dek})["wrapped"]
        self.made: list[tuple[bytes, str]] = []  # plaintexts, and what came for them
        self.count = 0

    def head(self, method: str, path: str, *lines: str, version: str = "1.1") -> bytes:
        start = f"{method} {path} HTTP/{version}\r\n".encode() + b"Host: " + self.host + b"\r\n"
        return start + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"

    def post(self, path: str, body: Any, *lines: str) -> bytes:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines = ("Content-Type: application/json", *lines)
        return self.head("POST", path, *lines, f"Content-Length: {len(data)}") + data

    # -- what is answered by the waiter

    def health(self) -> Made:
        return self.head("GET", "/healthz"), Wanted(200, lambda body: body == b"ok")

    def old_health(self) -> Made:
        lines = "Connection: keep-alive", f"X: {'x' * self.chance.randrange(300)}"
        return self.head("GET", "/health", *lines, version="1.0"), Wanted(200, lambda body: body == b"ok")

    def only_head(self) -> Made:
        return self.head("HEAD", "/healthz"), Wanted(200, is_head=True)

    def encrypt(self) -> Made:
        text = b"%d of " % self.chance.getrandbits(40) + b"x" * self.chance.choice((0, 9, 3000))
        wanted = Wanted(200, lambda body: self.made.append((text, json.loads(body)["ciphertext"])))
        return self.post("/encrypt", {"key_id": self.key, "plaintext": b64(text)}), wanted

    def expects(self) -> Made:
        text = b"%d" % self.chance.getrandbits(40)
        wanted = Wanted(200, lambda body: self.made.append((text, json.loads(body)["ciphertext"])))
        body = {"key_id": self.key, "plaintext": b64(text)}
        return self.post("/encrypt", body, "Expect: 100-continue"), wanted._replace(may_continue=True)

    def decrypt(self) -> Made:
        number = self.chance.randrange(len(self.texts))
        return (
            self.post("/decrypt", {"key_id": self.key, "ciphertext": self.sealed[number]}),
            Wanted(200, lambda body: json.loads(body)["plaintext"] == b64(self.texts[number])),
        )

    def in_chunks(self) -> Made:
        number = self.chance.randrange(len(self.texts))
        body = json.dumps({"key_id": self.key, "ciphertext": self.sealed[number]}).encode()
        head = self.head(
            "POST", "/decrypt", "Content-Type: application/json", "Transfer-Encoding: chunked", "X: y"
        )
        for piece in cut(body, self.chance.randrange(1, 5), self.chance):
            head += b"%x;a=b\r\n%b\r\n" % (len(piece), piece)
        head += b"0\r\nTrailer: yes\r\n\r\n"
        return head, Wanted(200, lambda body: json.loads(body)["plaintext"] == b64(self.texts[number]))

    def bad(self) -> Made:
        body, code = self.chance.choice(
            [({"key_id": self.key}, "missing_plaintext"), (b"{", "malformed_json"), (b"[]", "malformed_json")]
        )
        return self.post("/encrypt", body), Wanted(400, code_is(code))

    def other_type(self) -> Made:
        data = self.head("POST", "/encrypt", "Content-Type: text/plain", "Content-Length: 2") + b"{}"
        return data, Wanted(415, code_is("unsupported_media_type"))

    def described(self) -> Made:
        wanted = Wanted(200, lambda body: json.loads(body)["key_id"] == self.key)
        return self.head("GET", f"/deks/{self.key}"), wanted

    # -- what is refused by its head

    def missing(self) -> Made:
        return self.head("GET", "/nowhere"), Wanted(404, code_is("not_found"))

    def not_allowed(self) -> Made:
        return self.head("DELETE", "/healthz"), Wanted(405, code_is("method_not_allowed"))

    def coded(self) -> Made:
        data = self.head("POST", "/encrypt", "Content-Encoding: gzip", "Content-Length: 0")
        return data, Wanted(415, code_is("unsupported_media_type"))

    def forbidden(self) -> Made:
        data = self.head("POST", "/clock/accept", "Content-Type: application/json", "Content-Length: 0")
        return data, Wanted(403, code_is("policy_refused"))

    # -- what goes to a thread

    def create(self) -> Made:
        self.count += 1
        key_id = f"f-{os.getpid()}-{time.monotonic_ns()}-{self.count}"
        body = {"key_id": key_id, "thread_id": "f"}
        return self.post("/deks", body), Wanted(201, lambda body: json.loads(body)["key_id"] == key_id)

    def status(self) -> Made:
        return self.head("GET", "/status"), Wanted(200, lambda body: "version" in json.loads(body))

    def batch(self) -> Made:
        return self._batch(self.chance.choice((1, 3, 100)))

    def long_batch(self) -> Made:
        return self._batch(self.chance.choice((129, 300)))

    def _batch(self, count: int) -> Made:
        numbers = [self.chance.randrange(len(self.texts)) for _ in range(count)]
        body = {"items": [{"key_id": self.key, "ciphertext": self.sealed[number]} for number in numbers]}
        items = [{"plaintext": b64(self.texts[number])} for number in numbers]
        return self.post("/decrypt_batch", body), Wanted(200, lambda body: json.loads(body)["items"] == items)

    def large(self) -> Made:
        path = f"/decrypt?key_id={self.key}"
        lines = "Content-Type: application/octet-stream", f"Content-Length: {len(self.long_sealed)}"
        return self.head("POST", path, *lines) + self.long_sealed, Wanted(200, lambda b: b == self.long)

    # -- what holds a key

    def wrap(self) -> Made:
        return self.post("/wrap", {"dek": self.dek}), Wanted(200, lambda body: "wrapped" in json.loads(body))

    def unwrap(self) -> Made:
        wanted = Wanted(200, lambda body: json.loads(body)["dek"] == self.dek)
        return self.post("/unwrap", {"wrapped": self.wrapped}), wanted

    def rewrap(self) -> Made:
        body = {"key_id": self.key, "new_kek_hex": self.daemon.kek.hex()}
        return self.post("/rewrap", body), Wanted(200, lambda body: json.loads(body)["key_id"] == self.key)

    # -- behind which the daemon closes

    def closing(self) -> Made:
        data, wanted = self.chance.choice((self.health, self.decrypt, self.missing, self.create))()
        return data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1), wanted

    def old_closing(self) -> Made:
        return self.head("GET", "/healthz", version="1.0"), Wanted(200)

    def malformed(self) -> Made:
        return b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", Wanted(400, code_is("malformed_request"))

    def too_large(self) -> Made:
        lines = "Content-Type: application/json", f"Content-Length: {1 << 30}"
        data = self.head("POST", "/encrypt", *lines) + b"x" * self.chance.choice((0, 99))
        return data, Wanted(413, code_is("body_too_large"))

    def chunks_to_nowhere(self) -> Made:
        data = self.head("POST", "/nowhere", "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n"
        return data, Wanted(404, code_is("not_found"))

    def opens(self) -> None:
        """What was encrypted in this round."""
        made, self.made = self.made, []
        for at in range(0, len(made), 500):
            rows = [{"key_id": self.key, "ciphertext": sealed} for _, sealed in made[at : at + 500]]
            opened = self.daemon.ok("POST", "/decrypt_batch", {"items": rows})["items"]
            assert [item["plaintext"] for item in opened] == [b64(text) for text, _ in made[at : at + 500]]


def code_is(code: str) -> Callable[[bytes], bool]:
    return lambda body: bool(json.loads(body)["error"]["code"] == code)


def cut(data: bytes, pieces: int, chance: random.Random) -> list[bytes]:
    """Anywhere; none is empty."""
    ends = sorted({chance.randrange(1, len(data)) for _ in range(pieces - 1)} if len(data) > 1 else set())
    return [data[start:end] for start, end in zip([0, *ends], [*ends, len(data)])]


# ---- scripts --------------------------------------------------------------------------------------------

QUICK = [
    "health",
    "old_health",
    "only_head",
    "encrypt",
    "expects",
    "decrypt",
    "in_chunks",
    "bad",
    "other_type",
    "described",
]
REFUSED = ["missing", "not_allowed", "coded", "forbidden"]
THREADS = ["create", "status", "batch", "long_batch", "large"]
SECRET = ["wrap", "unwrap", "rewrap"]
CLOSING = ["closing", "old_closing", "malformed", "too_large", "chunks_to_nowhere"]


class Script(NamedTuple):
    steps: list[Step]
    wanted: list[Wanted] | None  # None: it is gone before it reads them
    closed: bool  # the daemon closes by itself, maybe before all was sent
    reads: tuple[float, int]  # from when on, and how many bytes at a time


def script(kit: Kit, secret: bool) -> Script:
    chance = kit.chance
    made = [getattr(kit, name)() for name in names(chance, secret)]
    end = chance.choice((DONE, DONE, DONE, "waits", "waits", "closes", "closes", "is cut off", GONE))
    if end == "closes":
        made.append(getattr(kit, chance.choice(CLOSING))())
    steps: list[Step] = []
    if chance.random() < 0.4:  # it was answered before: then it comes first in a turn
        first = made.pop(0) if len(made) > 1 else kit.health()
        steps += [*pieces(first[0], chance), 1]
        made.insert(0, (b"", first[1]))
    data = b"".join(data for data, _ in made)
    if end == "closes" and chance.random() < 0.3:
        data += b"GET /healthz HTTP/1.1\r\n" * chance.choice((1, 2000))
    if end == "is cut off":
        data += kit.encrypt()[0][: chance.randrange(1, 60)]
    steps += pieces(data, chance)
    if end == GONE:
        begun = [step for step in steps if not isinstance(step, int)]
        steps = [*begun[: chance.randrange(len(begun) + 1)], chance.choice((0.0, 0.002)), GONE]
    elif end in (DONE, "is cut off") or (end == "closes" and chance.random() < 0.5):
        steps.append(DONE)
    elif end == "waits":
        steps += [len(made), DONE]
    slow = not secret and chance.random() < 0.3
    reads = (chance.choice((0.01, 0.05, 0.2)), chance.choice((3000, 1 << 16))) if slow else (0.0, 1 << 18)
    return Script(steps, None if end == GONE else [one for _, one in made], end == "closes", reads)


def names(chance: random.Random, secret: bool) -> list[str]:
    """Many of one kind, or of many kinds. Few that are much work."""
    kinds = chance.choice(
        (QUICK, QUICK + REFUSED, QUICK + REFUSED + THREADS, [chance.choice(QUICK + REFUSED)])
    )
    count = chance.choice((1, 2, 3, 5, 10, 20, 60))
    if len(kinds) == 1:
        count = chance.choice((3, 20, 150, 400) if kinds[0] not in ("encrypt", "batch") else (3, 20))
    found = [chance.choice(kinds) for _ in range(count)]
    for _ in range(chance.choice((0, 0, 1, 3))):
        found.insert(chance.randrange(len(found) + 1), chance.choice(SECRET if secret else THREADS))
    return found


def pieces(data: bytes, chance: random.Random) -> list[Step]:
    if not data:
        return []
    steps: list[Step] = []
    head = chance.choice((0, 0, 0, 10, 300))  # so much is seen alone
    if head and len(data) > head:
        steps, data = [data[:head], chance.choice((0.001, 0.004))], data[head:]
    for piece in cut(data, chance.choice((1, 1, 1, 2, 3, 6, 40)), chance):
        steps.append(piece)
        if chance.random() < 0.4:
            steps.append(chance.choice((0.0, 0.0003, 0.001, 0.003)))
    return steps[:-1] if isinstance(steps[-1], float) else steps


# ---- clients --------------------------------------------------------------------------------------------

HEAD = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [A-Za-z -]+\r\n(?:[A-Za-z-]+: [^\r\n]*\r\n)*\r\n")
LENGTH = re.compile(rb"\r\nContent-Length: ([0-9]+)\r\n")


class Client:
    def __init__(self, number: int, script: Script, address: Address) -> None:
        self.number = number
        self.script = script
        self.steps = list(reversed(script.steps))
        self.sock = connect(address)
        self.sock.setblocking(False)
        self.answers = 0
        self.here = bytearray()
        self.ended = False
        self.wakes = 0.0
        self.reads_from = time.monotonic() + script.reads[0]
        self.stopped = False  # is the daemon told to end?

    def go_on(self, now: float) -> bool:
        """As far as it comes. Did anything happen?"""
        wrote = now >= self.wakes and bool(self.steps) and self.write(now)
        return (now >= self.reads_from and self.read()) or wrote

    def write(self, now: float) -> bool:
        step = self.steps[-1]
        if isinstance(step, float):
            self.wakes = now + step
        elif isinstance(step, int):
            if self.answers < step:
                return False
        elif isinstance(step, bytes):
            return self.send(step)
        elif step == DONE:
            with contextlib.suppress(OSError):  # it is closed already
                self.sock.shutdown(socket.SHUT_WR)
        else:
            self.ended = True
            self.sock.close()
        self.steps.pop()
        return True

    def send(self, data: bytes) -> bool:
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            return False
        except OSError:  # what it has said is what counts
            self.steps.clear()
            return True
        self.steps.pop()
        if sent < len(data):
            self.steps.append(data[sent:])
        elif self.steps and self.steps[-1] == DONE:  # right behind the last byte
            self.write(0.0)
        return True

    def read(self) -> bool:
        if self.ended:
            return False
        try:
            data = self.sock.recv(self.script.reads[1])
        except BlockingIOError:
            return False
        except ConnectionResetError:
            assert self.script.closed or self.script.wanted is None or self.stopped, self.tells("was reset")
            data = b""
        if data:
            self.here += data
            self.look()
        else:
            self.end()
        return True

    def look(self) -> None:
        while self.here:
            wanted = self.wanted()
            if wanted.may_continue and self.here.startswith(CONTINUE):
                del self.here[: len(CONTINUE)]
            head = HEAD.match(self.here)
            if head is None:
                assert b"\r\n\r\n" not in self.here, self.tells("got no answer")
                return
            length = LENGTH.search(self.here, 0, head.end())
            assert length is not None, self.tells("got an answer without a length")
            end = head.end() + (0 if wanted.is_head else int(length[1]))
            if len(self.here) < end:
                return
            body = bytes(self.here[head.end() : end])
            assert int(head[1]) == wanted.status, self.tells(f"got another answer than {wanted.status}")
            assert wanted.check(body) is not False, self.tells("got what belongs to another")
            self.answers += 1
            del self.here[:end]

    def wanted(self) -> Wanted:
        wanted = self.script.wanted
        if wanted is None:
            self.here.clear()
            return Wanted(0)
        assert self.answers < len(wanted), self.tells("got an answer too many")
        return wanted[self.answers]

    def end(self) -> None:
        self.ended = True
        wanted = self.script.wanted
        if wanted is not None and not self.stopped:
            assert self.answers == len(wanted) and not self.here, self.tells("did not get all of its answers")
        self.sock.close()

    def tells(self, what: str) -> str:
        wanted = self.script.wanted or []
        return (
            f"client {self.number} {what}: answer {self.answers} of {len(wanted)}; here: "
            f"{bytes(self.here[:300])!r}; to send: {len(self.steps)} of {len(self.script.steps)} steps"
        )


def go_on(clients: list[Client], now: float) -> int:
    return sum([client.go_on(now) for client in clients if not client.ended])


def serve(
    clients: list[Client], daemon: Daemon, halts: random.Random | None, stops: float | None = None
) -> None:
    """Until all have ended. `halts`: at times the daemon stands still, and finds all at once what came.
    `stops`: after so many seconds it is told to end."""
    begun = last = time.monotonic()
    waiting = list(clients)
    while waiting:
        now = time.monotonic()
        if stops is not None and now - begun > stops:
            daemon.signal(signal.SIGTERM)
            halts = stops = None
            for client in clients:
                client.stopped = True
        if halts is not None and halts.random() < 0.02:
            with daemon.standing_still():
                for _ in range(halts.choice((1, 20))):
                    go_on(waiting, now)
        came = go_on(waiting, now)
        waiting = [client for client in waiting if not client.ended]
        if came:
            last = now
            continue
        assert now < last + PATIENCE, [client.tells("waits in vain") for client in waiting]
        reads = [client.sock for client in waiting if now >= client.reads_from]
        select.select(reads, [], [], 0.0005)


def play(daemon: Daemon, seed: int, address: Address | None = None, stops: float | None = None) -> None:
    """One round of as many as like to."""
    chance = random.Random(seed)
    where = address or daemon.socket
    kit = Kit(daemon, chance, "unix" if address is None else host_of(address))
    secret = chance.random() < 0.3
    count = chance.randrange(2, PIECES) if secret else chance.randrange(10, 40)
    scripts = [script(kit, secret) for _ in range(count)]
    with contextlib.ExitStack() as opened:
        clients = [Client(number, one, where) for number, one in enumerate(scripts)]
        for client in clients:
            opened.callback(client.sock.close)
        serve(clients, daemon, chance if chance.random() < 0.3 else None, stops)
    if stops is None:
        kit.opens()


# ---- what stays behind ----------------------------------------------------------------------------------


def gauges(daemon: Daemon) -> dict[str, float]:
    text = daemon.request("GET", "/metrics").body.decode()
    found = dict(re.findall(r"^progressdb_kms_(connections|body_bytes) ([0-9.e+]+)$", text, re.MULTILINE))
    assert len(found) == 2
    return {name: float(value) for name, value in found.items()}


def all_is_free(daemon: Daemon, workers: int) -> None:
    """Nobody is connected, no byte of a body is kept; and one UID has what locked memory it may."""
    assert daemon.healthy()
    wait_until(lambda: gauges(daemon) == {"connections": 1.0, "body_bytes": 0.0}, 60, "all to be free again")
    if workers > 1:  # who knows which of them has whom
        return
    body = b'{"dek":"' + b"A" * 60 + b'"}'
    head = b"POST /wrap HTTP/1.1\r\nHost: u\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    with contextlib.ExitStack() as opened:
        held = [opened.enter_context(connect(daemon.socket, 60.0)) for _ in range(SPARES - LAST + 1)]
        for sock in held:
            sock.sendall(head % len(body) + body[:20])
        assert daemon.healthy()  # the one thread has seen them all
        for sock in held:
            sock.sendall(body[20:])
        assert [sock.recv(100).split(b" ")[1] for sock in held] == [b"400"] * len(held)
    assert daemon.stderr.count("locked memory is free") == 0


# ---- the tests ------------------------------------------------------------------------------------------


def refusing() -> dict[str, Any]:
    """All but one operation: it is the one that is refused."""
    operations = ["encrypt", "decrypt", "create_dek", "describe_dek", "wrap", "unwrap", "rewrap"]
    return {"policies": [{"uid": os.geteuid(), "operations": operations}]}


def play_all(daemon: Daemon, seeds: Iterable[int], addresses: list[Address | None]) -> None:
    for seed in seeds:
        try:
            play(daemon, seed, addresses[seed % len(addresses)])
        except BaseException:
            print(f"the seed: {seed}")
            raise


def test_all_are_answered(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(refusing(), workers=1)
    play_all(daemon, range(4), [None])
    all_is_free(daemon, 1)


def drawn(seconds: float) -> Iterator[int]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield int.from_bytes(os.urandom(6), "big")


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_all_are_answered_for_long(make_daemon: MakeDaemon, workers: int) -> None:
    tcp = free_port("127.0.0.1")
    daemon = make_daemon({"tcp_address": host_of(tcp), **refusing()}, workers=workers)
    play_all(daemon, drawn(float(os.environ.get("AHEAD_SECONDS", "60"))), [None, None, tcp])
    all_is_free(daemon, workers)


@pytest.mark.long
def test_what_a_stop_leaves_is_a_beginning_of_the_answers_and_no_connection(make_daemon: MakeDaemon) -> None:
    for seed in drawn(float(os.environ.get("AHEAD_SECONDS", "60"))):
        daemon = make_daemon(refusing(), workers=1 + seed % 2)
        print(f"the seed: {seed}")
        play(daemon, seed, stops=random.Random(seed).random() * 0.3)
        if daemon.alive:
            daemon.signal(signal.SIGTERM)
        daemon.wait()
        assert "were cut" not in daemon.stderr
        daemon.close()
