"""Normalised hosts and origins, so that they can be compared."""

import ipaddress
import re
from urllib.parse import urlsplit

DEFAULT_PORTS = {"http": 80, "https": 443}
NAME = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_.])?")


def normal_host(host: str) -> str:
    """Return a host without its port: a name in lower-case ASCII, as browsers send it, or an address in its shortest form.

    `LOCALHOST:8000` becomes `localhost`, `[0:0::1]:80` and `0:0::1` become `::1`.

    Raises:
        ValueError: it is neither a name nor an address.
    """
    bare = re.sub(r":[0-9]*$", "", host) if host.startswith("[") or host.count(":") == 1 else host
    if bare.startswith("[") and bare.endswith("]"):
        return str(ipaddress.IPv6Address(bare[1:-1]))
    try:
        return str(ipaddress.ip_address(bare))
    except ValueError:
        name = bare.encode("idna").decode("ascii").lower()
    if not NAME.fullmatch(name):
        raise ValueError(f"{host!r} is neither a name nor an address")
    return name


def is_loopback(host: str) -> bool:
    """Return whether a host, normalised by `normal_host`, is a loopback address or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def normal_origin(origin: str) -> str:
    """Return an origin as browsers send it: `HTTPS://Studio.Example:443` becomes `https://studio.example`.

    Raises:
        ValueError: it is not the origin of a web page: a scheme, a host and an optional port.
    """
    parts = urlsplit(origin)
    scheme, _, rest = origin.partition("://")
    if scheme.lower() not in DEFAULT_PORTS or rest != parts.netloc or parts.username is not None or not parts.hostname:
        raise ValueError(f"{origin!r} is not a scheme and a host")
    host = normal_host(f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname)
    shown = f"[{host}]" if ":" in host else host
    port = parts.port or DEFAULT_PORTS[parts.scheme]
    return f"{parts.scheme}://{shown}" + ("" if port == DEFAULT_PORTS[parts.scheme] else f":{port}")
