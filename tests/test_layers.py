"""The order of the rooms: a folder imports only from those above it, and what serves is small."""

from __future__ import annotations

import ast
import functools
import io
import json
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import REPO

PACKAGE = REPO / "progressdb_kms"

ORDER = (
    "errors encoding disk rules pause journal",
    "crypto",
    "store",
    "audit",
    "config",
    "fleet",
    "service",
    "wire",
    "process",
    "client",
    "tools",
)
"""Each may import from itself and from what stands before it. `__main__` starts either of two: see there."""

LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms.split()}

OWNED = {
    "cryptography": "crypto",
    "yaml": "config",
    "_yaml": "config",
    "sqlitedict": "store",
    "psycopg": "fleet",
    "argparse": "tools",
}
"""Modules of others that one room alone may import."""

NEVER_SERVED = ("client", "tools")

MENDING = ("progressdb_kms.store.mending", "progressdb_kms.fleet.mending")
"""What makes good what isn't genuine, where a person says so: no daemon can."""


def only_in_a_fleet(module: str) -> bool:
    """Loaded where the configuration says `store: postgresql`: whoever has no fleet has none of its lines."""
    return any(part.startswith("fleet") for part in module.split("."))


MAX_SERVED = 9_913
"""Lines of code (no blanks, comments, docstrings) that are loaded to serve."""


def name_of(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: path.read_text() for name, path in SOURCES.items()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@functools.cache
def imports(module: str, source: str) -> tuple[str, ...]:
    """The absolute names of everything imported anywhere in it."""
    return tuple(found_imports(module, ast.parse(source)))


def found_imports(module: str, tree: ast.Module) -> Iterator[str]:
    package = module if SOURCES.get(module, Path("x")).stem == "__init__" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in SOURCES else base


def ours(module: str, source: str) -> set[str]:
    return {name for name in imports(module, source) if name.split(".")[0] == "progressdb_kms"} - {module}


@pytest.mark.parametrize("module", [name for name in MODULES if name.count(".")])
def test_a_module_imports_from_rooms_above_only(module: str) -> None:
    if module == "progressdb_kms.__main__":
        return
    rooms = {room(name) for name in ours(module, MODULES[module]) if room(name)}
    assert {name for name in rooms if LEVEL[name] > LEVEL[room(module)]} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: ours(name, source) for name, source in MODULES.items()}
    left = dict(graph)
    while free := [name for name, needs in left.items() if not needs & set(left)]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("owned", OWNED)
def test_a_module_of_others_has_one_importer(owned: str) -> None:
    users = {
        room(module)
        for module, source in MODULES.items()
        if owned in {name.split(".")[0] for name in imports(module, source)}
    }
    assert users <= {OWNED[owned]}


@pytest.mark.parametrize("module", MENDING)
def test_what_mends_is_for_commands_alone(module: str) -> None:
    users = {name for name, source in MODULES.items() if module in imports(name, source)} - {*MENDING}
    assert {room(name) for name in users} == {"tools"}


SAID_ONCE = {
    '"audit:head:': "store.heads",  # the rows of the heads of audit chains
    "data[os.write(": "disk",  # all of the bytes
    "envelope.own(": "service.ownkeys",  # the audit key and the row key are opened
    "in loaded.keys": "service.plan",  # a configured key gets its name
    " that wraps this DEK is not loaded": "crypto.keyring",  # what a peer hears of a KEK that is not there
    "Option(": "config.options config.values",  # a key of the configuration is a row
}
"""What only these modules may say, so that it is done, and changed, in one place."""


@pytest.mark.parametrize("words", SAID_ONCE)
def test_what_is_said_in_one_place(words: str) -> None:
    places = {f"progressdb_kms.{name}" for name in SAID_ONCE[words].split()}
    assert {name for name, source in MODULES.items() if words in source} == places


LOADED = """
import json, sys
from progressdb_kms.__main__ import main
from progressdb_kms.process import hardening, serve
hardening.prepare = lambda *args: None
serve.serve = lambda loaded: print(json.dumps(sorted(sys.modules))) or 0
sys.exit(main(json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The modules that the daemon holds once it is about to serve, with what its routes load later."""
    folder = tmp_path_factory.mktemp("serve")
    key = folder / "kek"
    key.touch(0o600)
    key.write_bytes(bytes(range(100, 132)))
    config = folder / "kms.yaml"
    config.touch(0o600)
    config.write_text(f"master_key_file: {key}\ndata_dir: {folder}/data\n")
    words = json.dumps(["--config", str(config)])
    done = subprocess.run(
        [sys.executable, "-c", LOADED, words], cwd=REPO, capture_output=True, text=True, check=True
    )
    found = {name for name in json.loads(done.stdout) if name.split(".")[0] == "progressdb_kms"}
    while (
        later := {name for module in found for name in ours(module, MODULES[module])}
        - found
        - {name for name in SOURCES if room(name) in NEVER_SERVED or only_in_a_fleet(name)}
    ):
        found |= later
    return sorted(found)


def test_what_serves_loads_no_command_and_no_client(served: list[str]) -> None:
    assert [name for name in served if room(name) in NEVER_SERVED or only_in_a_fleet(name)] == []
    for module in served:
        if module != "progressdb_kms.__main__":
            assert {room(name) for name in ours(module, MODULES[module])}.isdisjoint(NEVER_SERVED)


def code_lines(source: str) -> int:
    """Lines that hold code: no blanks, no comments, no docstrings."""
    lines: set[int] = set()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*skipped, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


COUNTED = '''"""Doc
string."""

# comment
x = (1,
     2)

def f():
    "doc"
    return """a
b"""
'''


def test_lines_are_counted_without_what_is_not_code() -> None:
    assert code_lines(COUNTED) == 5


def test_what_serves_is_as_small_as_told(served: list[str], record_property: pytest.RecordProperty) -> None:
    sizes = {module: code_lines(MODULES[module]) for module in served}
    total = sum(sizes.values())
    record_property("lines of code loaded to serve", total)
    print(f"\n{total} lines of code are loaded to serve, in {len(sizes)} modules")
    for name in dict.fromkeys(room(module) for module in sizes):
        print(f"{sum(n for module, n in sizes.items() if room(module) == name):6} {name or '(top)'}")
    assert total <= MAX_SERVED


def test_all_spellings_of_an_import_are_seen() -> None:
    source = "from . import log\nfrom ..crypto.aead import x\nimport progressdb_kms.store\n"
    source += "def f():\n from progressdb_kms.wire import server"
    expected = "audit.log crypto.aead store wire.server"
    assert ours("progressdb_kms.audit.chain", source) == {
        f"progressdb_kms.{name}" for name in expected.split()
    }


def test_the_manual_names_all_that_serves_once(served: list[str]) -> None:
    """For whoever reads all of it."""
    page = (PACKAGE / "manual" / "structure.md").read_text()
    named = [f"progressdb_kms.{name}" for name in re.findall(r"^- `([a-z0-9_.]+)`:", page, re.M)]
    packages = {name.rpartition(".")[0] for name in served}
    assert sorted(named) == sorted(set(served) - packages)


def test_the_manual_tells_how_long_that_is(served: list[str]) -> None:
    """All of it, and the way of a key: within five lines of a hundred."""
    page = (PACKAGE / "manual" / "structure.md").read_text()
    beginning = page[page.index("## To read all of it") : page.index("**Words and bytes**")]
    way = re.findall(r"`((?:config|crypto|process|service|wire)\.[a-z0-9]+)`", beginning)
    told = [int(number.replace(",", "")) for number in re.findall(r"some ([0-9,]+) lines", beginning)]
    lines = [sum(code_lines(MODULES[f"progressdb_kms.{name}"]) for name in way)]
    lines.insert(0, sum(code_lines(MODULES[name]) for name in served))
    assert len(way) > 10 and len(told) == 2, (way, told)
    assert all(abs(said - real) <= 0.05 * real for said, real in zip(told, lines)), (told, lines)
