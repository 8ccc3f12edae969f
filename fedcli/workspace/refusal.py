"""Why an update is refused: the codes of the public contract."""

from typing import Literal, get_args

RefusalCode = Literal[
    "symlink",
    "not_regular",
    "owner",
    "size",
    "json",
    "hash",
    "duplicate",
    "header",
    "schema",
    "nonfinite",
    "samples",
    "protocol",
    "workspace",
    "wrong_round",
    "wrong_base",
    "wrong_client",
    "unknown_client",
]
REFUSAL_CODES: tuple[str, ...] = get_args(RefusalCode)


class Refusal(Exception):
    """An update (or a file of it) is not what the protocol asks for; never stops a round."""

    def __init__(self, code: RefusalCode, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code
        self.reason = reason
