"""JSON from strangers: no duplicate keys, no NaN, no crash on depth or length."""

import json
from typing import Any, NoReturn

from fedcli.workspace.refusal import Refusal


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Parse a UTF-8 JSON object; raise Refusal(json) or Refusal(duplicate)."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            raise Refusal("duplicate", f"{what} has a key twice in one object")
        return mapping

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Refusal("json", f"{what} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise Refusal("json", f"{what} is not a JSON object")
    return document
