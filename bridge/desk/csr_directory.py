"""
Directories of CSRs from `kubeadm certs renew --csr-only` (up to 1.22) and `kubeadm certs generate-csr`, at a CA desk;
such a directory does not name its node, and proves nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from bridge.contract import Issued
from bridge.errors import BridgeError
from bridge.node import kubeconfig
from bridge.node.kubeconfig import FreshKubeconfig, KubeconfigError
from bridge.pki.bundle import BundledRequest, RequestBundle
from bridge.pki.certificates import has_key_of, pem
from bridge.specs import SPECS, CertificateSpec
from bridge.system.files import SECRET_MODE, make_directories, write_atomically
from bridge.system.paths import ForeignLinkError, UnreadableError, opened, read, read_once

_SUFFIX = ".csr"
_CERTIFICATE_MODE = 0o644
_ELSEWHERE = "name a directory in which no other user can put links with -o"
#: Specs by kubeadm's file names, flat and nested.
_BY_FILE = {spec.base: spec for spec in SPECS.values()} | SPECS


class CsrDirectoryError(BridgeError):
    """The directory contains files other than kubeadm's CSRs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CsrDirectory:
    """The CSRs of a directory, as a bundle."""

    directory: Path
    bundle: RequestBundle  #: The same requests in every run, so that an interrupted run can continue.
    files: Mapping[str, Path]  #: The CSRs by certificate name, relative to the directory.


def find(directory: Path, unseen: Callable[[OSError], object] = lambda _: None) -> list[Path]:
    """All CSR files in a directory and below it; `unseen` gets the error of each directory that can't be listed."""
    names = ((place, name) for place, _, names in os.walk(directory, onerror=unseen) for name in names)
    return sorted(Path(place, name) for place, name in names if name.endswith(_SUFFIX) and not name.startswith("."))


def load(directory: Path, *, node: str, cluster: str, validity: timedelta, created: datetime) -> CsrDirectory:
    """Read a directory's CSRs; the error names every file that is not kubeadm's, is repeated, or can't be read."""
    files: dict[str, Path] = {}
    unseen: list[OSError] = []
    paths = find(directory, unseen.append)
    requests, problems = [], [f"{e.filename}: can't look for CSRs: {e.strerror}" for e in unseen]
    for path in paths:
        relative = path.relative_to(directory)
        spec = spec_of(relative)
        if spec is None:
            problems.append(f"{path}: this is none of kubeadm's names, such as apiserver{_SUFFIX}")
        elif spec.name in files:
            problems.append(f"{path}: wanted one CSR for {spec.name}, found {files[spec.name]} too")
        else:
            try:
                requests.append(_request(spec, path, validity))
                files[spec.name] = relative
            except CsrDirectoryError as e:
                problems.append(f"{path}: {e}")
    if problems or not requests:
        raise CsrDirectoryError(
            "\n".join(problems) or f"{directory}: there are no CSRs in it",
            hint="move away what is not to be signed, and make the rest readable for the desk" if problems else "",
        )
    ders = b"".join(sha256(request.csr.public_bytes(Encoding.DER)).digest() for request in requests)
    batch = sha256(ders).hexdigest()[:32]
    bundle = RequestBundle(batch=batch, node=node, cluster=cluster, created=created, requests=tuple(requests))
    return CsrDirectory(directory=directory, bundle=bundle, files=files)


def spec_of(relative: Path, suffix: str = _SUFFIX) -> CertificateSpec | None:
    """The certificate that belongs to a file below kubeadm's directory, by flat or nested name; None: none does."""
    name = relative.as_posix()
    return _BY_FILE.get(name.removesuffix(suffix).removeprefix("pki/")) if name.endswith(suffix) else None


def _request(spec: CertificateSpec, path: Path, validity: timedelta) -> BundledRequest:
    try:
        data = read(path)
        if data is None or data.count(b"-----BEGIN ") != 1:
            raise CsrDirectoryError("wanted one PEM block with a CSR")
        csr = x509.load_pem_x509_csr(data)
    except (UnreadableError, ValueError, x509.InvalidVersion) as e:
        raise CsrDirectoryError(f"wanted one PEM block with a CSR, found: {e}") from e
    return BundledRequest(
        name=spec.name,
        authority=spec.authority.name,
        ekus=spec.ekus,
        validity=validity,
        csr=csr,
        replaces=None,
        proof=None,
    )


def deliver(directory: CsrDirectory, target: Path, answers: Mapping[str, Issued], ca: x509.Certificate | None) -> None:
    """Write `….crt` beside the CSRs and complete kubeconfigs, through directories that are held open."""
    for name, issued in answers.items():
        relative = directory.files[name]
        chain = pem(issued.leaf, *issued.intermediates)
        _write(target, relative.with_suffix(".crt"), chain, _CERTIFICATE_MODE)
        relative = relative.with_suffix("")  # admin.conf.csr belongs to admin.conf
        if SPECS[name].kubeconfig and ca is not None:
            config = _kubeconfig(directory.directory / relative)
            if config is not None:
                data = _completed(directory.directory / relative, config, issued, chain, ca)
                _write(target, relative, data, SECRET_MODE)


def _write(target: Path, relative: Path, data: bytes, mode: int) -> None:
    path = (target / relative).absolute()
    try:
        make_directories(path.parent)
        with opened(path) as place:
            write_atomically(place.path, data, mode)
    except ForeignLinkError as e:
        raise CsrDirectoryError(f"{path}: can't write the answer: {e}", hint=_ELSEWHERE) from None


def _kubeconfig(path: Path) -> bytes | None:
    """The kubeconfig beside a CSR; None: the file does not exist."""
    try:
        with opened(path.absolute()) as place:
            return read_once(place.path)[0]
    except FileNotFoundError:
        return None
    except (ForeignLinkError, UnreadableError) as e:
        raise CsrDirectoryError(f"{path}: wanted the kubeconfig beside {path.name}{_SUFFIX}; {e}") from None


def _completed(path: Path, data: bytes, issued: Issued, chain: bytes, ca: x509.Certificate) -> bytes:
    """The kubeconfig with the client's certificate and the CA's, in kubeadm's layout."""
    try:
        config, key = kubeconfig.parse(data), kubeconfig.key_data(data)
    except KubeconfigError as e:
        raise CsrDirectoryError(f"{path}: {e}") from None
    if config.has_others or key is None:
        wanted = "one cluster, and one user with its key, as `kubeadm certs generate-csr` writes them"
        raise CsrDirectoryError(f"{path}: wanted {wanted}")
    if not has_key_of(key, issued.leaf):
        raise CsrDirectoryError(f"{path}: wanted the key of {path.name}{_SUFFIX} in it, found another one")
    fresh = FreshKubeconfig(server=config.server, cluster=config.cluster, user=config.user, ca_pem=pem(ca))
    return fresh.text(chain, key)
