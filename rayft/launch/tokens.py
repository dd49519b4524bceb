"""Ray's token: what of it the environment gives, and what mends it where a cluster wants one, or another.

RAY_AUTH_TOKEN holds it, or the file that RAY_AUTH_TOKEN_PATH names, or Ray's own file. Ray itself looks at none of them
without RAY_AUTH_MODE=token. A token is sent, and never shown or stored.
"""

from __future__ import annotations

import os
import re

from rayft.errors import ClusterError

_TOKEN, _PATH, _FILE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"


def headers() -> dict[str, str]:
    """The token of the two variables, where Ray's client would not send it by itself.

    ClusterError where there is no such file, or what is given can't be a token.
    """
    token = (os.environ.get(_TOKEN) or (_content() if os.environ.get(_PATH) else "")).strip()
    if not re.fullmatch(r"[!-~]*", token):  # what a header of HTTP can carry
        source = _TOKEN if os.environ.get(_TOKEN) else f"{_PATH}={os.environ[_PATH]}"
        raise ClusterError(f"{source}: not a token; it is one line of plain ASCII letters, digits and signs")
    return {"Authorization": f"Bearer {token}"} if token and not _in_mode() else {}


def refused(address: str, joining: bool = False) -> str:
    """What to tell where `address` wants a token. Who joins a cluster of Ray's sends none without the mode."""
    variable = next((name for name in (_TOKEN, _PATH) if os.environ.get(name)), None)
    if variable == _PATH:
        _content()
    given = variable or (_FILE if os.path.exists(os.path.expanduser(_FILE)) else None)
    if given and (_in_mode() or (variable and not joining)):
        return f"{address} refuses the token that {given} gives; it has to be the one that the cluster was started with"
    if given:
        return f"{address} asks for a token; with RAY_AUTH_MODE=token in the environment that of {given} is sent"
    mode = "RAY_AUTH_MODE=token, and " if joining and not _in_mode() else ""
    return f"{address} asks for a token; set {mode}{_TOKEN}, or {_PATH} to the file that holds it"


def _in_mode() -> bool:
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def _content() -> str:
    path = os.environ[_PATH]
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise ClusterError(f"{_PATH}={path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ClusterError(f"{_PATH}={path}: not a token but a file of bytes, which no header can carry") from None
