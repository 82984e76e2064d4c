"""Names of what one side tells the other."""

from secrets import token_urlsafe


def new_id(kind: str) -> str:
    """Nobody can guess another."""
    return f"{kind}_{token_urlsafe(15)}"
