"""The published schema of an audit's ``result.json``.

Written by ``python -m gambeson.auditing.schema > docs/audit.schema.json``.
"""

from __future__ import annotations

import json
import sys

from gambeson.auditing.results import AuditResult


def schema_text() -> str:
    """Return the JSON schema (draft 2020-12) as text, with sorted keys, so that equal schemas are equal bytes."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **AuditResult.model_json_schema()}
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema_text())
