"""Imports point downward only: a module may use its own layer and those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.harness import REPO

PACKAGE = REPO / "progressdb_kms"

LAYERS = {  # from the bottom to the top
    "words": "__init__ errors encoding",
    "bytes": "aead envelope framing secretjson",
    "core": "keyring operations policy options",
    "effects": "store memstore lockedmem config audit metrics keysource yamlfile auditverify owner transport"
    " answers auditchain",
    "service": "api service keeper rotation openapi jobs snapshots erasure startup opening maintenance",
    "edge": "httpd",
    "process": "cli __main__ daemon systemd client doctor offline bench hardening commands commandtable"
    " console backup restore imports rotatecmd auditcmd keyfiles",
}
LEVEL = {name: level for level, names in enumerate(LAYERS.values()) for name in names.split()}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def imported(source: str) -> set[str]:
    """The package's own modules that are imported anywhere in it, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "progressdb_kms." * bool(node.level) + (node.module or "")
            names = [base] + [f"{base.rstrip('.')}.{alias.name}" for alias in node.names]
        else:
            continue
        parts = (name.split(".") for name in names)
        found |= {p[1] for p in parts if p[0] == "progressdb_kms" and len(p) > 1}
    return found & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_layer(module: str) -> None:
    assert module in LEVEL


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downward(module: str) -> None:
    names = imported(Path(PACKAGE / f"{module}.py").read_text())
    assert {name for name in names if LEVEL[name] > LEVEL[module]} == set()


def test_all_spellings_of_an_import_are_seen() -> None:
    source = "from . import store\nfrom .aead import x\nimport progressdb_kms.audit\n"
    source += "def f():\n from progressdb_kms import httpd"
    assert imported(source) == {"store", "aead", "audit", "httpd"}
