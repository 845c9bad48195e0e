"""Requests at random, by the server's own OpenAPI document: no fault, and no answer that the document does not state.

python -m benchmarks.faults.requests --examples 1000
"""

from __future__ import annotations

import argparse
import time

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.types import ASGIApp

from bla.deploy.engine import open_engine
from bla.deploy.serve import Limits, application

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def sent(app: ASGIApp, examples: int) -> dict[str, int]:
    """How many requests were sent of each operation; raises an error that shows the first wrong answer."""
    found: dict[str, int] = {}
    for operation in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations():
        name = f"{operation.ok().method.upper()} {operation.ok().path}"
        found[name] = 0

        @seed(0)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[*HealthCheck],
        )
        @given(case=operation.ok().as_strategy())
        def send(case: schemathesis.Case) -> None:
            found[name] += 1  # noqa: B023  it is called at once
            case.validate_response(case.call(), checks=CHECKS)

        send()
    return found


def main() -> None:
    """Send requests to a shipped explainer's server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000)
    options = parser.parse_args()
    begun = time.monotonic()
    app = application(open_engine("tf_efficientnet_lite0"), limits=Limits(bytes=400_000, pixels=200_000))
    print(sent(app, options.examples), f"{time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    main()
