"""A small reading of JSON Schema (draft 2020-12): the keywords that the manifest's schema uses, no others.

A keyword that it does not know is an error, wherever it stands: nothing is passed over in silence.
"""
from __future__ import annotations

import re
from typing import Any, Iterator

NOTES = {"$schema", "$comment", "title", "description", "default"}
ONE = {"additionalProperties", "propertyNames", "items", "not", "if", "then"}      # hold a schema
MANY = {"allOf", "anyOf", "oneOf", "prefixItems"}                                  # hold a list of schemas
PLAIN = {"type", "required", "enum", "const", "pattern", "minLength", "minimum", "exclusiveMinimum", "maximum",
         "minItems", "maxItems"}
TYPES = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "null": lambda v: v is None,
    "integer": lambda v: TYPES["number"](v) and v == v // 1,                       # 2.0 is one
}


def schemas_in(schema: Any, path: str = "#") -> Iterator[tuple[str, dict]]:
    """(path, schema) of a schema and all below it.  Raises ValueError for a keyword that is not known."""
    if isinstance(schema, bool):
        return
    yield path, schema
    for word, value in schema.items():
        if word in ONE:
            yield from schemas_in(value, f"{path}/{word}")
        elif word in MANY:
            for n, one in enumerate(value):
                yield from schemas_in(one, f"{path}/{word}/{n}")
        elif word == "properties":
            for name, one in value.items():
                yield from schemas_in(one, f"{path}/properties/{name}")
        elif word not in NOTES | PLAIN:
            raise ValueError(f"{path}: unknown keyword {word}")


def same(a: Any, b: Any) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def ecma(pattern: str) -> str:
    """A pattern of JSON Schema for Python, whose `$` also matches before a last line end."""
    return re.sub(r"(?<!\\)\$", r"\\Z", pattern)


def faults(schema: Any, value: Any, path: str = "") -> list[str]:
    """What `schema` has against `value`; an empty list when it takes it."""
    if isinstance(schema, bool):
        return [] if schema else [f"{path}: nothing may stand here"]
    found = [f"{path}: {words}" for words in own_faults(schema, value)]
    for one in schema.get("allOf", ()):
        found += faults(one, value, path)
    for word, wrong in (("anyOf", lambda n: n == 0), ("oneOf", lambda n: n != 1)):
        if word in schema and wrong(sum(not faults(one, value, path) for one in schema[word])):
            found.append(f"{path}: {word}")
    if "not" in schema and not faults(schema["not"], value, path):
        found.append(f"{path}: not {schema['not']}")
    if "if" in schema and not faults(schema["if"], value, path):
        found += faults(schema.get("then", True), value, path)
    if isinstance(value, dict):
        for name, item in value.items():
            rest = schema.get("additionalProperties", True)
            found += faults(schema.get("properties", {}).get(name, rest), item, f"{path}.{name}")
            found += faults(schema.get("propertyNames", True), name, f"{path}.{name}")
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        for n, item in enumerate(value):
            found += faults(first[n] if n < len(first) else schema.get("items", True), item, f"{path}[{n}]")
    return found


def own_faults(schema: dict, value: Any) -> Iterator[str]:
    """What the keywords without schemas in them have against a value."""
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    if types and not any(TYPES[name](value) for name in types):
        yield f"no {' or '.join(types)}"
    if "enum" in schema and not any(same(value, one) for one in schema["enum"]):
        yield f"none of {schema['enum']}"
    if "const" in schema and not same(value, schema["const"]):
        yield f"not {schema['const']}"
    if isinstance(value, str):
        if len(value) < schema.get("minLength", 0):
            yield "too short"
        if "pattern" in schema and not re.search(ecma(schema["pattern"]), value):
            yield f"does not match {schema['pattern']}"
    if TYPES["number"](value):
        if "minimum" in schema and not value >= schema["minimum"]:
            yield f"below {schema['minimum']}"
        if "exclusiveMinimum" in schema and not value > schema["exclusiveMinimum"]:
            yield f"not above {schema['exclusiveMinimum']}"
        if "maximum" in schema and not value <= schema["maximum"]:
            yield f"above {schema['maximum']}"
    if isinstance(value, list) and len(value) < schema.get("minItems", 0):
        yield "too few"
    if isinstance(value, list) and len(value) > schema.get("maxItems", len(value)):
        yield "too many"
    if isinstance(value, dict):
        yield from (f"without {name}" for name in schema.get("required", ()) if name not in value)
