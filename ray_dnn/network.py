"""What an agent's environment says about its connections: on which ports it listens, and whether they use TLS.

TLS is that of Ray: where Ray's own connections use it, those between agents do, with the same files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ray_dnn.errors import ConfigError

PORTS = "RAY_DNN_PORTS"
USE_TLS = "RAY_USE_TLS"  # this and the three below are Ray's
CERTIFICATE = "RAY_TLS_SERVER_CERT"
KEY = "RAY_TLS_SERVER_KEY"
AUTHORITY = "RAY_TLS_CA_CERT"

_LOWEST, _HIGHEST = 1024, 65535


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files.

    Attributes:
        certificate: of this node, with those between it and the authority; shown to whoever connects, and to whom this
            node connects.
        key: of the certificate.
        authority: the certificates that all others must be signed by.
    """

    certificate: str
    key: str
    authority: str


@dataclass(frozen=True)
class Network:
    """How an agent listens and connects.

    Attributes:
        ports: that it may listen on; None: on any that the system gives.
        tls: None: connections are plain.
    """

    ports: range | None = None
    tls: TlsFiles | None = None

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Network:
        """Read it from environment variables.

        Raises:
            ConfigError: a variable has no meaning, or one is missing.
        """
        return cls(_ports(environment.get(PORTS, "")), _tls(environment))


def _ports(given: str) -> range | None:
    if not given.strip():
        return None
    match = re.fullmatch(r"\s*([0-9]{1,5})\s*(?:-\s*([0-9]{1,5})\s*)?", given)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not _LOWEST <= first <= last <= _HIGHEST:
        raise ConfigError(
            f"{PORTS}={given!r}: must be a range of ports from {_LOWEST} to {_HIGHEST}, such as 20000-20100, with one "
            "for each agent on a node. Without it the system chooses."
        )
    return range(first, last + 1)


def _tls(environment: Mapping[str, str]) -> TlsFiles | None:
    if environment.get(USE_TLS, "0").lower() not in ("1", "true"):  # as Ray reads it
        return None
    if missing := [name for name in (CERTIFICATE, KEY, AUTHORITY) if not environment.get(name)]:
        raise ConfigError(f"{USE_TLS}={environment[USE_TLS]} needs {' and '.join(missing)}: paths of PEM files.")
    return TlsFiles(environment[CERTIFICATE], environment[KEY], environment[AUTHORITY])
