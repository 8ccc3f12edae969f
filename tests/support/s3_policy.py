"""What a bucket's policy lets somebody do, as S3 evaluates it: the documents of docs/stores/ are what is evaluated.

Whoever no statement allows is refused, and a Deny wins. What S3 does beside that stands here, too: of an object that
is not there it says so (404) only to whoever may list the bucket, and to others that access is denied (403).
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from support.fault_proxy import Request

DOCUMENTS = Path(__file__).parents[2] / "docs/stores"
SERVER, PARTY = "AKIASERVER", "AKIAPARTY{}"
"""Access keys; that of no policy is the bucket owner's."""
_ACTIONS = {
    ("GET", "acl"): "s3:GetBucketAcl",
    ("PUT", "acl"): "s3:PutBucketAcl",
    ("GET", "policy"): "s3:GetBucketPolicy",
    ("PUT", "policy"): "s3:PutBucketPolicy",
    ("DELETE", "policy"): "s3:DeleteBucketPolicy",
    ("GET", "versions"): "s3:ListBucketVersions",
    ("PUT", "versioning"): "s3:PutBucketVersioning",
    ("PUT", "lifecycle"): "s3:PutLifecycleConfiguration",
    ("GET", "uploads"): "s3:ListBucketMultipartUploads",
    ("GET", "location"): "s3:GetBucketLocation",
}
"""Of a bucket, by method and subresource."""
_BUCKET = {"GET": "s3:ListBucket", "HEAD": "s3:ListBucket", "PUT": "s3:CreateBucket", "DELETE": "s3:DeleteBucket"}
_CREATES = "s3:ObjectCreationOperation"


@dataclass(frozen=True)
class Act:
    """An action on a resource, with what conditions may ask for."""

    action: str
    bucket: str
    key: str = ""
    context: tuple[tuple[str, str], ...] = ()

    @property
    def resource(self) -> str:
        """The name of the resource."""
        return f"arn:aws:s3:::{self.bucket}" + (f"/{self.key}" if self.key else "")


class Policy:
    """Refuses what a bucket's policy does not let an access key do."""

    def __init__(self, document: Mapping[str, Any], arns: Mapping[str, str], owners: Iterable[str]) -> None:
        assert document["Version"] == "2012-10-17"
        self._statements = document["Statement"]
        self._arns = arns
        self._owners = set(owners)
        identifiers = [statement["Sid"] for statement in self._statements]
        assert len(set(identifiers)) == len(identifiers)
        assert all(re.fullmatch("[A-Za-z0-9]+", identifier) for identifier in identifiers)
        assert len(json.dumps(document, separators=(",", ":"))) <= 20_480, "S3 takes a policy of 20 KB"

    def __call__(self, request: Request, has: Callable[[str, str], bool]) -> str | None:
        """Return why a request is refused; None where it is not."""
        if request.principal in self._owners:
            return None
        for act in acts(request):
            if not self.allows(request.principal, act):
                return (
                    f"User {self._arns.get(request.principal, 'anonymous')} is not authorized to perform {act.action}"
                )
        _, _, path = request.path.partition("/")
        bucket, _, key = path.partition("/")
        is_look = key and request.is_read and "uploadId" not in request.query
        if is_look and not self.allows(request.principal, Act("s3:ListBucket", bucket)) and not has(bucket, key):
            return "Access Denied"
        return None

    def allows(self, principal: str, act: Act) -> bool:
        """Return whether some statement allows an act, and none denies it."""
        arn = self._arns.get(principal, "anonymous")
        effects = {one["Effect"] for one in self._statements if _applies(one, arn, act)}
        return effects == {"Allow"}


def _applies(statement: Mapping[str, Any], arn: str, act: Act) -> bool:
    known = {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}
    assert set(statement) <= known, f"this evaluator knows only {known}"
    who = statement["Principal"]
    is_who = who == "*" or arn in _several(who["AWS"])
    is_action = any(_like(pattern, act.action) for pattern in _several(statement["Action"]))
    is_resource = any(_like(pattern, act.resource) for pattern in _several(statement["Resource"]))
    return is_who and is_action and is_resource and _holds(statement.get("Condition", {}), dict(act.context))


def _holds(condition: Mapping[str, Mapping[str, Any]], context: Mapping[str, str]) -> bool:
    operators: dict[str, Callable[[str | None, str], bool]] = {
        "Null": lambda found, wanted: (found is None) == (wanted == "true"),
        "Bool": lambda found, wanted: found == wanted,
        "StringEquals": lambda found, wanted: found == wanted,
        "StringLike": lambda found, wanted: found is not None and _like(wanted, found),
    }
    return all(
        any(operators[operator](context.get(key), value) for value in _several(values))
        for operator, wanted in condition.items()
        for key, values in wanted.items()
    )


def _several(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _like(pattern: str, text: str) -> bool:
    """Return whether a text fits a pattern; a star stands for slashes, too."""
    parts = (".*" if part == "*" else "." if part == "?" else re.escape(part) for part in re.split(r"([*?])", pattern))
    return re.fullmatch("".join(parts), text, re.DOTALL) is not None


def acts(request: Request) -> list[Act]:
    """Return all that a request does."""
    bucket, _, key = request.path.removeprefix("/").partition("/")
    query, headers = request.query, request.headers
    if not key:
        if request.method == "POST" and "delete" in query:
            keys = re.findall(r"<Key>(.*?)</Key>", request.body.decode())
            return [Act("s3:DeleteObject", bucket, unquote(name)) for name in keys]
        named = next((_ACTIONS[request.method, name] for name in query if (request.method, name) in _ACTIONS), None)
        context = (("s3:prefix", query.get("prefix", "")),) if request.method == "GET" else ()
        return [Act(named or _BUCKET[request.method], bucket, context=context)]
    if "acl" in query:
        return [Act(f"s3:{'Get' if request.is_read else 'Put'}ObjectAcl", bucket, key)]
    if "tagging" in query:
        return [Act(f"s3:{request.method.title()}ObjectTagging", bucket, key)]
    if request.is_read:
        return [Act("s3:ListMultipartUploadParts" if "uploadId" in query else "s3:GetObject", bucket, key)]
    if request.method == "DELETE":
        return [Act("s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject", bucket, key)]
    is_part = "partNumber" in query or "uploads" in query
    context = [(_CREATES, "false" if is_part else "true")]
    for header in ("if-none-match", "if-match"):
        context += [(f"s3:{header}", headers[header])] if header in headers else []
    found = [Act("s3:PutObject", bucket, key, tuple(context))]
    if source := headers.get("x-amz-copy-source"):
        from_bucket, _, from_key = unquote(source).removeprefix("/").partition("/")
        found.append(Act("s3:GetObject", from_bucket, from_key))
    return found


def federation_policy(bucket: str, prefix: str, clients: Iterable[int], owner: str) -> Policy:
    """Return the policy that docs/stores/ gives to a federation in a bucket."""
    arns = {SERVER: "arn:aws:iam::111122223333:user/server"}
    documents = [filled("s3-bucket.json", BUCKET=bucket, PREFIX=prefix, SERVER_ARN=arns[SERVER])]
    for client in clients:
        arns[PARTY.format(client)] = arn = f"arn:aws:iam::{client + 444400000000}:user/party-{client}"
        documents.append(filled("s3-party.json", BUCKET=bucket, PREFIX=prefix, PARTY_ARN=arn, ID=str(client)))
    statements = [statement for document in documents for statement in document["Statement"]]
    return Policy(documents[0] | {"Statement": statements}, arns, [owner])


def filled(name: str, **places: str) -> dict[str, Any]:
    """Return a document with what stands for its names, longest names first, as the recipe's sed does."""
    text = (DOCUMENTS / name).read_text()
    for place in sorted(places, key=len, reverse=True):
        text = text.replace(place, places[place])
    return json.loads(text)
