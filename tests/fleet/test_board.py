"""What the processes of one host know of the fleet, and what a worker forgets."""

from __future__ import annotations

import os
import threading

import pytest

from progressdb_kms.fleet.board import SIZE, SLOTS, Board, Follower
from progressdb_kms.fleet.lease import NONE, Lease
from progressdb_kms.fleet.rows import ALL, KEKS, KEY, ChangeRow, Point


@pytest.fixture
def board() -> Board:
    result = Board(memoryview(bytearray(SIZE)))
    result.flush(Point(1, 10))
    return result


@pytest.fixture
def follower(board: Board) -> Follower[str]:
    result: Follower[str] = Follower(board, 3)
    result.remember("a", "A", Point(1, 10))
    result.remember("b", "B", Point(1, 10))
    return result


def test_a_lease_is_granted_and_ends(board: Board) -> None:
    assert board.lease == NONE
    board.grant(Lease(5, 7))
    assert board.lease == Lease(5, 7)
    board.end()
    assert board.lease == NONE


def test_a_lease_from_before_1970_is_none(board: Board) -> None:
    board.grant(Lease(5, -7))
    assert board.lease.wall == 0


def test_a_change_takes_one_dek(board: Board, follower: Follower[str]) -> None:
    board.tell(ChangeRow(11, KEY, "a"))
    assert follower.follow() == Point(1, 11)
    assert follower.get("a") is None and follower.get("b") == "B"


@pytest.mark.parametrize("kind", [KEKS, ALL])
def test_a_change_of_all_takes_all(board: Board, follower: Follower[str], kind: str) -> None:
    board.tell(ChangeRow(11, kind, ""))
    assert follower.follow() == Point(1, 11)
    assert len(follower) == 0


@pytest.mark.parametrize("name", ["k" * 129, "k" * SIZE, "kä"], ids=["longer", "longest", "another alphabet"])
def test_a_name_that_is_no_key_id_takes_all(board: Board, follower: Follower[str], name: str) -> None:
    """Who writes rows by hand may write one: it must not reach into the next slot."""
    board.tell(ChangeRow(11, KEY, "c"))
    board.tell(ChangeRow(12 + SLOTS - 2, KEY, name))
    assert board.key_id(11) == "c" and board.seen == Point(1, 12 + SLOTS - 2)
    follower.follow()
    assert len(follower) == 0


def test_a_longer_name_after_a_short_one_in_the_same_slot(board: Board) -> None:
    board.tell(ChangeRow(11, KEY, "short"))
    for gen in range(12, 11 + SLOTS):
        board.tell(ChangeRow(gen, KEY, "x"))
    board.tell(ChangeRow(11 + SLOTS, KEY, "y" * 128))
    assert board.key_id(11 + SLOTS) == "y" * 128
    assert board.key_id(11) is None


def test_whoever_is_just_in_time_forgets_one_and_one_more_change_takes_all(
    board: Board, follower: Follower[str]
) -> None:
    late: Follower[str] = Follower(board, 3)
    late.remember("b", "B", Point(1, 10))
    board.tell(ChangeRow(11, KEY, "a"))
    for gen in range(12, 11 + SLOTS):
        board.tell(ChangeRow(gen, KEY, "x"))
    follower.follow()
    assert follower.get("b") == "B" and follower.get("a") is None
    board.tell(ChangeRow(11 + SLOTS, KEY, "x"))
    late.follow()
    assert late.get("b") is None


def test_a_flush_takes_all_though_nothing_was_changed(board: Board, follower: Follower[str]) -> None:
    board.flush(Point(1, 10))
    assert follower.follow() == Point(1, 10)
    assert len(follower) == 0


def test_a_gap_in_the_ring_takes_all(board: Board, follower: Follower[str]) -> None:
    board.words[4] = 12  # seen: as if the slots of 11 and 12 were of another round
    assert follower.follow() == Point(1, 12)
    assert len(follower) == 0


def test_what_was_read_before_it_changed_isnt_remembered(board: Board, follower: Follower[str]) -> None:
    """The read was under way while the change came, and the ring has gone past it."""
    board.tell(ChangeRow(11, KEY, "c"))
    follower.follow()
    follower.remember("c", "old", Point(1, 10))
    assert follower.get("c") is None
    follower.remember("c", "new", Point(1, 11))
    assert follower.get("c") == "new"


def test_what_another_timeline_says_isnt_remembered(board: Board, follower: Follower[str]) -> None:
    follower.remember("c", "C", Point(2, 10))
    assert follower.get("c") is None
    board.flush(Point(2, 9))
    assert follower.follow() == Point(2, 9)
    follower.remember("c", "C", Point(1, 10))
    assert follower.get("c") is None
    follower.remember("c", "C", Point(2, 9))
    assert follower.get("c") == "C"


def test_what_is_used_stays_and_what_isnt_goes(board: Board) -> None:
    follower: Follower[int] = Follower(board, 3)
    for number in range(12):
        follower.remember(f"k{number}", number, Point(1, 10))
        assert follower.get("k0") == 0
        assert len(follower) <= 6
    assert follower.get("k1") is None


def test_old_ones_are_forgotten_too(board: Board) -> None:
    follower: Follower[int] = Follower(board, 1)
    follower.remember("a", 1, Point(1, 10))
    follower.remember("b", 2, Point(1, 10))  # a is among the old now
    board.tell(ChangeRow(11, KEY, "a"))
    follower.follow()
    assert follower.get("a") is None and follower.get("b") == 2


def test_the_board_is_one_for_all_processes() -> None:
    board = Board.new()
    if not (pid := os.fork()):
        board.flush(Point(3, 4))
        board.tell(ChangeRow(5, KEY, "from a child"))
        os._exit(0)
    os.waitpid(pid, 0)
    assert board.seen == Point(3, 5)
    assert board.key_id(5) == "from a child"


def test_nothing_stale_is_found_while_a_writer_runs() -> None:
    """Whoever follows up to n finds nothing of a change up to n: values are the numbers of their changes."""
    board = Board.new()
    board.flush(Point(1, 0))
    follower: Follower[int] = Follower(board, 8)
    stored = {f"k{n}": 0 for n in range(4)}
    told = dict(stored)
    wrong: list[tuple[int, int]] = []
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            for key_id in stored:
                least = told[key_id]
                follower.follow()
                found = follower.get(key_id)
                if found is not None and found < least:
                    wrong.append((found, least))
                point = board.seen  # first: what is read may be newer than its point, and never older
                follower.remember(key_id, stored[key_id], point)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for gen in range(1, 3000):
        key_id = f"k{gen % 4}"
        stored[key_id] = gen
        board.tell(ChangeRow(gen, KEY, key_id))
        told[key_id] = gen
    ended.set()
    for thread in threads:
        thread.join()
    assert wrong == []
