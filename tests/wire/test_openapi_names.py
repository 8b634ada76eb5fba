"""The description of the API has names that a person would choose, for operations and for models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from progressdb_kms.wire.openapi import document
from progressdb_kms.wire.routes import ROUTES

DOCUMENT = document(ROUTES)
OPERATIONS = [operation for path in DOCUMENT["paths"].values() for operation in path.values()]


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


def test_every_error_is_the_same_model() -> None:
    error = {"$ref": "#/components/schemas/Error"}
    for operation in OPERATIONS:
        for status, answer in operation["responses"].items():
            if status >= "400" and (operation["operationId"], status) != ("readyz", "503"):
                assert answer["content"]["application/json"]["schema"] == error
