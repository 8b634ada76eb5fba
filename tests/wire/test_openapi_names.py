"""The description of the API has names that a person would choose, for operations and for models."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from progressdb_kms.tools.openapi import FILE, document, text
from progressdb_kms.wire.routes import ROUTES
from tests.conftest import MakeDaemon

DOCUMENT = document()
OPERATIONS = [operation for path in DOCUMENT["paths"].values() for operation in path.values()]


def test_what_is_served_is_what_the_table_of_routes_says() -> None:
    """If this fails: `python -m progressdb_kms.tools.openapi`, and look at the diff."""
    assert FILE.read_text("ascii") == text() and json.loads(text()) == DOCUMENT


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from nodes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from nodes(inner)


def test_operations_have_short_names_of_their_own() -> None:
    names = [operation["operationId"] for operation in OPERATIONS]
    assert len(set(names)) == len(names) == len(ROUTES)
    assert all(re.fullmatch("[a-z]+(_[a-z]+)*", name) and len(name) <= 21 for name in names)
    assert {"encrypt", "decrypt", "create_dek", "list_deks", "describe_dek", "delete_dek", "readyz"} <= set(
        names
    )


def test_every_reference_leads_somewhere_and_every_model_is_used() -> None:
    models = DOCUMENT["components"]["schemas"]
    used = {node["$ref"] for node in nodes(DOCUMENT) if "$ref" in node}
    assert used == {f"#/components/schemas/{name}" for name in models}
    assert all(
        re.fullmatch("([A-Z][a-z]+)+", name) and model["title"] == name for name, model in models.items()
    )


def test_no_choice_stands_twice() -> None:
    for node in nodes(DOCUMENT):
        choices = [json.dumps(choice, sort_keys=True) for choice in node.get("anyOf", node.get("oneOf", ()))]
        assert len(choices) == len(set(choices)) != 1, node


def test_every_error_is_the_same_model() -> None:
    error = {"$ref": "#/components/schemas/Error"}
    for operation in OPERATIONS:
        for status, answer in operation["responses"].items():
            if status >= "400" and (operation["operationId"], status) != ("readyz", "503"):
                assert answer["content"]["application/json"]["schema"] == error


def test_only_what_a_caller_chose_is_an_object_of_any_kind() -> None:
    """Status, rewrap and rotate answers have models of their own, too."""
    answers = {
        operation["operationId"]: answer["content"].get("application/json", {}).get("schema")
        for operation in OPERATIONS
        for status, answer in operation["responses"].items()
        if status < "300"
    }
    assert [name for name, schema in answers.items() if schema == {"type": "object"}] == ["openapi"]
    assert answers["status"] == {"$ref": "#/components/schemas/Status"}
    assert answers["rewrap"] == {"$ref": "#/components/schemas/Rewrapped"}


def fits(value: Any, schema: Any) -> bool:
    """Enough of JSON Schema for what answers are described with here."""
    if "$ref" in schema:
        return fits(value, DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    for word, count in (("anyOf", any), ("oneOf", lambda found: sum(found) == 1)):
        if word in schema:
            return bool(count([fits(value, choice) for choice in schema[word]]))
    kinds = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    if not any(KINDS[kind](value) for kind in kinds):
        return False
    if isinstance(value, list):
        return all(fits(item, schema["items"]) for item in value)
    if isinstance(value, dict):
        more, known = schema.get("additionalProperties"), schema.get("properties", {})
        return set(schema.get("required", ())) <= set(value) and all(
            fits(inner, known.get(name, more)) if known.get(name, more) else False
            for name, inner in value.items()
        )
    return True


KINDS = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "null": lambda value: value is None,
}


def test_what_is_answered_is_as_described(make_daemon: MakeDaemon) -> None:
    """The answers that schemathesis can't have: of a rotation, of a rewrap, of a status with all in it."""
    daemon = make_daemon({"kek_max_age_days": 9}, workers=1)
    key = daemon.ok("POST", "/deks", {"thread_id": "t"}, 201)["key_id"]
    with tempfile.TemporaryDirectory() as folder:
        assert daemon.offline("backup", f"{folder}/b").returncode == 0
    calls = [
        ("POST", "/rewrap", {"key_id": key, "new_kek_hex": os.urandom(32).hex()}),
        ("POST", "/rotate_kek", {"new_kek_hex": (new := os.urandom(32).hex()), "dry_run": True}),
        ("POST", "/rotate_kek", {"new_kek_hex": new}),
        ("GET", "/status", None),
    ]
    for method, path, body in calls:
        answer = daemon.ok(method, path, body)
        schema = DOCUMENT["paths"][path][method.lower()]["responses"]["200"]["content"]["application/json"]
        assert fits(answer, schema["schema"]), (path, answer)
        assert not fits({**answer, "more": 1}, schema["schema"]) and not fits({}, schema["schema"])
    assert answer["backup"] and answer["kek_max_age_days"] == 9
