"""The page at /docs: the OpenAPI document as plain HTML.

No script, so that it needs nothing from the network, runs under the policy of the server's own page, and weighs
kilobytes where Swagger UI weighs megabytes. To try the API there is the page at /.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --quiet: light-dark(#5c5c66, #a9abb6); --line: light-dark(#d9d7d0, #393c45);
  --link: light-dark(#1f5fbf, #8ab4ff); --card: light-dark(#fff, #1d1f24); }
body { max-width: 60rem; margin: 0 auto; padding: 1.25rem 1rem 3rem; font: 16px/1.5 system-ui, sans-serif;
  background: light-dark(#f7f6f3, #131417); color: light-dark(#1b1b1f, #f0eff2); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .9rem; padding: .3rem 1rem 1rem;
  margin-top: 1rem; }
h1 { line-height: 1.2; } h2 { overflow-wrap: anywhere; } a { color: var(--link); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; padding: .7rem; border: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; } td { overflow-wrap: anywhere; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
"""
Record = Mapping[str, Any]
_FORM = {"photo": "photo=@cat.jpg", "masks": "masks='[[[1,0,0],[1,1,0]]]'"}


def as_html(openapi: Record) -> str:
    """The page of an OpenAPI document: for each route what it takes, what it answers, and a call to copy."""
    about, schemas = openapi["info"], openapi.get("components", {}).get("schemas", {})
    routes = [
        _route(path, method, route, schemas)
        for path, methods in openapi["paths"].items()
        for method, route in methods.items()
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(about['title'])}: the API</title><style>{STYLE}</style></head><body><main><h1>The API</h1>"
        f'<p>{escape(about["description"])} <a href="/">Try it</a>, or read the machine-readable '
        f'<a href="/openapi.json">OpenAPI document</a> (version {escape(about["version"])}).</p>'
        f"{''.join(routes)}</main></body></html>"
    )


def _route(path: str, method: str, route: Record, schemas: Record) -> str:
    body = route.get("requestBody", {}).get("content", {})
    form = body.get("multipart/form-data", {}).get("schema", {}).get("properties", {})
    call = " ".join(["curl", *(f"-F {_FORM[name]}" for name in form), f"localhost:8000{path}"])
    options = [
        (f"<code>{escape(each['name'])}</code>", _values(each["schema"]), escape(each.get("description", "")))
        for each in route.get("parameters", ())
    ]
    taken = [(escape(kind), _fields(content["schema"], schemas) or "the photo") for kind, content in body.items()]
    answers = [
        (status, escape(answer["description"]), "; or ".join(
            _fields(content.get("schema", {}), schemas) or escape(kind)
            for kind, content in answer.get("content", {}).items()))
        for status, answer in route["responses"].items()
    ]  # fmt: skip
    return (
        f"<section><h2>{method.upper()} <code>{escape(path)}</code></h2><p>{escape(route['description'])}</p>"
        f"<pre>{escape(call)}</pre>{_table(('option, in the address', 'values', 'meaning'), options)}"
        f"{_table(('body', 'fields'), taken)}{_table(('answer', 'meaning', 'fields'), answers)}</section>"
    )


def _values(schema: Record) -> str:
    """The values that an option takes, and its default."""
    kinds = [kind for kind in schema.get("anyOf", [schema]) if kind.get("type") != "null"]
    words = [", ".join(kind.get("enum", [kind.get("type", "any")])) for kind in kinds]
    default = f"; by default {schema['default']}" if schema.get("default") is not None else ""
    return escape(" or ".join(words) + default)


def _fields(schema: Record, schemas: Record) -> str:
    """The names of an object's fields, those of the objects in its lists in brackets."""
    kinds = schema.get("anyOf", [schema])
    named = [schemas.get(kind.get("$ref", "").rpartition("/")[2], kind) for kind in kinds]
    fields = {name: field for kind in named[:1] for name, field in kind.get("properties", {}).items()}
    inner = {name: _fields(field.get("items", {}), schemas) for name, field in fields.items()}
    return ", ".join(f"<code>{escape(name)}</code>" + (f" [{each}]" if each else "") for name, each in inner.items())


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return f"<table><tr>{head}</tr>{lines}</table>" if lines else ""
