"""Paths of name scopes, as rules have them."""

import re
from collections.abc import Sequence

_CLASS = re.compile(r"[A-Z]\w*?(?<!_\d)(?<!_\d\d)")


def layer_path(scopes: Sequence[str]) -> str:
    """Joins scopes, without the name of the root module's class.

    Args:
      scopes: outermost first, such as `("Decoder", "block_0", "up")`.

    Returns:
      What `PolicyRule(path=...)` matches, such as `"block_0/up"`.
    """
    is_root = bool(scopes) and _CLASS.fullmatch(scopes[0]) is not None
    return "/".join(scopes[1:] if is_root else scopes)
