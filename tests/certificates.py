"""Certificates for clusters of tests."""

import datetime
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ray_dnn.network import TlsFiles

HOST = "127.0.0.1"
_DAY = datetime.timedelta(days=1)


class Authority:
    """Signs certificates. Its files lie in a folder of its own."""

    def __init__(self, folder: Path):
        self._folder = folder
        folder.mkdir()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"authority {folder.name}")])
        certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = str(folder / "authority.pem")
        Path(self.file).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _builder(self, name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
        )

    def sign(self, addresses: Sequence[str]) -> TlsFiles:
        """A certificate for a node with these addresses, and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
        certificate = (
            self._builder(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "node")]), key)
            .add_extension(x509.SubjectAlternativeName([*names, x509.DNSName("localhost")]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        certificate_file, key_file = (self._folder / f"{addresses[0]}.{end}.pem" for end in ("certificate", "key"))
        certificate_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return TlsFiles(str(certificate_file), str(key_file), self.file)


class Pki(NamedTuple):
    """Files of nodes: this host in our cluster, another node of it, and this host in another cluster."""

    ours: TlsFiles
    elsewhere: TlsFiles
    foreign: TlsFiles


def make_pki(folder: Path) -> Pki:
    ours, foreign = Authority(folder / "ours"), Authority(folder / "foreign")
    return Pki(ours.sign([HOST]), ours.sign(["192.0.2.1"]), foreign.sign([HOST]))
