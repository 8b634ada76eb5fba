"""Every error says whose fault it is, has a code of its own, and can be sent between processes."""

from __future__ import annotations

import inspect
import re
import socket

import pytest

from progressdb_kms import errors
from progressdb_kms.errors import KMSError
from progressdb_kms.service import channel

ALL = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, KMSError)]
GROUPS = [cls for cls in ALL if not cls.status]
LEAVES = [cls for cls in ALL if cls.status]


@pytest.mark.parametrize("cls", GROUPS)
def test_a_group_cant_be_raised(cls: type[KMSError]) -> None:
    with pytest.raises(TypeError, match="group"):
        cls("x")


@pytest.mark.parametrize("cls", LEAVES)
def test_a_leaf_has_a_status_and_a_code(cls: type[KMSError]) -> None:
    assert 400 <= cls.status <= 599 and inspect.getdoc(cls)
    assert not cls.default_code or re.fullmatch("[a-z_]+", cls.default_code)


OF_THE_EDGE = ("allow", "entry")
"""What an error tells that only the edge raises: it never comes from the keeper."""


@pytest.mark.parametrize(
    "cls", [cls for cls in LEAVES if not {*OF_THE_EDGE} & {*inspect.signature(cls).parameters}]
)
def test_an_error_of_the_keeper_is_the_same_for_the_worker(cls: type[KMSError]) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        channel.answer(
            channel.Job("x", {}, None, theirs), cls("what happened", code="own_code", hint="what to do")
        )
        with pytest.raises(cls) as caught:
            channel._unpack(channel._read(ours))
    assert type(caught.value) is cls
    assert (caught.value.message, caught.value.code, caught.value.hint) == (
        "what happened", "own_code", "what to do"
    )  # fmt: skip


def test_a_keeper_that_ended_before_it_answered() -> None:
    with pytest.raises(errors.StoreUnavailable, match="may or may not"):
        channel._unpack(b"")


def test_a_keeper_that_is_gone() -> None:
    inbox, outbox = channel.channel()
    inbox.close()
    with outbox, pytest.raises(errors.StoreUnavailable, match="can't be reached"):
        channel.KeeperClient(outbox).call("x", {})


def test_a_keeper_that_is_silent() -> None:
    inbox, outbox = channel.channel()
    with inbox, outbox:
        with pytest.raises(errors.StoreUnavailable, match="does not answer: a change may or") as change:
            channel.KeeperClient(outbox).call("x", {}, ("1.1", 7, "sig"), timeout=0.05)
        with pytest.raises(errors.StoreUnavailable, match="does not answer$") as question:
            channel.KeeperClient(outbox).call("status", {}, timeout=0.05)
    assert "may be repeated" in change.value.hint and "help troubleshooting" in question.value.hint


def test_a_job_comes_over_whole() -> None:
    inbox, outbox = channel.channel()
    with inbox, outbox:
        assert channel.receive(inbox) is None
        with pytest.raises(errors.StoreUnavailable):
            channel.KeeperClient(outbox).call("create", {"thread_id": "ü"}, ("1.1", 7, "sig"), timeout=0.01)
        job = channel.receive(inbox)
        assert job is not None and job[:3] == ("create", {"thread_id": "ü"}, ["1.1", 7, "sig"])
        channel.answer(job, {})  # the caller is gone: no error
