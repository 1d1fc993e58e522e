"""Where a server listens, and whether what it needs is installed. Without Keras: the command line asks first."""

import importlib.util
import socket
from collections.abc import Sequence

_PACKAGES = ("starlette", "uvicorn")


def check_installed() -> None:
    """Checks that the packages of the extra `server` are there.

    Raises:
        ImportError: if one is missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"A server needs {' and '.join(missing)}: `pip install 'keras-t5gemma[server]'` installs what it needs."
        )


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket that listens, so that nobody else takes the port while a model is loaded.

    Args:
        host: a name or an address.
        port: a port; 0 for a free one.

    Raises:
        ValueError: if the port is out of range.
        OSError: if the address is unknown or taken. The message names both arguments.
    """
    if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port <= 65535:
        raise ValueError(f"`port` must be an integer from 0, for a free port, to 65535. Received: port={port!r}.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(
            f"Cannot listen on host={host!r}, port={port}: {error.strerror or error}. Choose another port (0 for a "
            f"free one) or an address of this machine."
        ) from error


def url_of(listener: socket.socket) -> str:
    """The URL of a server that listens there."""
    host, port, *_ = listener.getsockname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def checked_keys(keys: str | Sequence[str] | None) -> tuple[str, ...]:
    """The argument `api_key` of `Server` as a tuple, empty for None.

    Raises:
        ValueError: if a key is not a text, is empty, or has white space in it. The message does not hold the key.
    """
    if keys is None:
        return ()
    found = (keys,) if isinstance(keys, str) else tuple(keys)
    if not found or not all(isinstance(key, str) and key and not any(map(str.isspace, key)) for key in found):
        raise ValueError(
            f"`api_key` must be a text without white space, or several of them; None to need no key. Received: "
            f"{len(found)} of them, at least one of which is not (keys are not shown), or none at all."
        )
    return found
