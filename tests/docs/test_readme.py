"""README and manual agree with the tables that the program runs on: routes, keys, commands."""

from __future__ import annotations

import re

import pytest

from progressdb_kms.config.options import OPTIONS
from progressdb_kms.config.values import Option
from progressdb_kms.service import usage
from progressdb_kms.store.contract import HEAVY
from progressdb_kms.tools.commands import COMMANDS
from progressdb_kms.tools.manual import TOPICS, default_text
from progressdb_kms.wire.call import Route
from progressdb_kms.wire.routes import ROUTES
from tests.harness.book import ROOT, book

BOOK = book()
README = (ROOT / "README.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading."""
    text = BOOK.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route_stands_in_the_api_table(route: Route) -> None:
    named = {name for row in rows("HTTP API") for name in re.findall(r"`([A-Z]+ /[^`]*)`", row[0])}
    assert f"{route.method} {route.path}" in named


def test_the_api_table_has_no_route_that_is_not_there() -> None:
    known = {f"{route.method} {route.path}" for route in ROUTES}
    named = {name for row in rows("HTTP API") for name in re.findall(r"`([A-Z]+ /[^`]*)`", row[0])}
    assert named == known


def test_every_api_row_has_an_example_of_its_path() -> None:
    for row in rows("HTTP API"):
        path = re.findall(r"`[A-Z]+ /([a-z_]*)", row[0])[0]
        assert re.search(rf"kms ['\"]?/{path}", row[2]), row[0]


def test_the_manual_says_which_calls_are_an_administrator_s() -> None:
    admin = [row for row in rows("HTTP API") if re.search(r"\bAdmin\b", row[1])]
    marked = {row[0].partition("`")[2].partition("`")[0] for row in admin}
    assert marked == {f"{route.method} {route.path}" for route in ROUTES if route.admin}
    meaning = next(row[2] for row in rows("Configuration") if row[0] == "`admin_peer_uids`")
    words = {"/rotate_kek": "rotate", "/clock/accept": "clock accept", "/deks/{key_id}": "delete"}
    for route in (route for route in ROUTES if route.admin):
        assert words.get(route.path, route.path.rpartition("/")[2]) in meaning, route.path


def test_whom_tcp_serves_is_the_same_on_each_page() -> None:
    """Who they are tests/wire/test_tcp.py tries."""
    (row,) = (row for row in rows("Configuration") if row[0] == "`tcp_address`")
    page = " ".join(book().split("\n## ProgressDB\n", 1)[1].split("\n## ", 1)[0].split())
    for text in (row[2], page):
        assert re.search(r"only the daemon's own UID, root and `?admin_peer_uids`? are served", text)


def test_the_numbers_of_usage_are_those_of_the_program() -> None:
    api, runbook = default_book("api"), default_book("runbook")
    for number in (usage.LOST, usage.SOON, usage.MOST, 2 * usage.ROWS, usage.BUSY):
        assert f"{number:,}" in api, number
    assert f"{usage.LOST:,}" in runbook and f"over {2 * usage.ROWS} DEKs a second" in runbook
    assert usage.SPENT == 2**32 and HEAVY == 2**31 and "`key_spent`" in api and "`kek_spent`" in api


def default_book(topic: str) -> str:
    return (ROOT / "progressdb_kms" / "manual" / f"{topic}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_configuration_key_and_its_default_stand_in_the_table(option: Option) -> None:
    table = {row[0].strip("`"): row[1].strip("`") for row in rows("Configuration")}
    default = default_text(option)
    assert table[option.name] == ("" if default == "(none)" else default)


def test_the_configuration_table_has_no_key_that_is_not_there() -> None:
    assert {row[0].strip("`") for row in rows("Configuration")} == {option.name for option in OPTIONS}


def test_every_environment_variable_is_named() -> None:
    for option in OPTIONS:
        if option.env:
            assert option.env in BOOK


def test_the_commands_are_those_of_the_program() -> None:
    named = {name for row in rows("Commands") for name in re.findall(r"`([a-z][a-z -]*)`", row[0])}
    assert named == {command.name for command in COMMANDS}


def test_the_readme_is_for_five_minutes() -> None:
    assert len(README.split()) <= 2200
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_readme_names_each_topic_of_the_manual() -> None:
    named = set(re.findall(r"\(progressdb_kms/manual/([a-z]+)\.md\)", README))
    assert named == set(TOPICS)
