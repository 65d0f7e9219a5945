"""
Control-plane PKIs to renew: made by the real kubeadm, or by hand in its shape.

Both are laid out below a directory as if that were a node's root: `etc/kubernetes` with `pki/` and the kubeconfigs,
and beside `etc` a directory `ca-keys` with what an external CA would hold.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from bridge.node import kubeconfig, sample_pki
from bridge.specs import AUTHORITIES, SPECS, KeyAlgorithm
from tests.kit import programs

KubeadmVersion = Literal["1.37", "1.20"]
KubeadmAlgorithm = Literal["RSA-2048", "RSA-3072", "RSA-4096", "ECDSA-P256", "ECDSA-P384"]

#: What kubeadm makes on a control plane: all but what a kubelet serves with.
PKI_SPECS = {name: spec for name, spec in SPECS.items() if spec.of_kubeadm}

#: Every kind of SAN that kubeadm takes, on top of its own.
EXTRA_SANS = ("zz.example.com", "*.wild.example.com", "api2.example.com", "203.0.113.7", "2001:db8::7")
NODE = "cp-1"
ADDRESS = "192.0.2.10"
ENDPOINT = "api.example.com:6443"

_PROGRAMS: dict[KubeadmVersion, str] = {"1.37": "kubeadm", "1.20": "kubeadm-1.20"}
_CONFIG_INSIDE = "/kubeadm.yaml"
# kubernetesVersion keeps kubeadm from asking the internet for it, criSocket from looking for a container runtime.
_CONFIG = """\
apiVersion: kubeadm.k8s.io/{api}
kind: InitConfiguration
localAPIEndpoint: {{advertiseAddress: {address}}}
nodeRegistration: {{name: {node}, criSocket: {socket}}}
---
apiVersion: kubeadm.k8s.io/{api}
kind: ClusterConfiguration
kubernetesVersion: {version}
controlPlaneEndpoint: {endpoint}
apiServer: {{certSANs: [{sans}]}}
{more}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pki:
    """A control plane's PKI."""

    root: Path  #: Takes the place of the node's `/`.
    external: bool  #: The CA keys are in `root/ca-keys`, with copies of the CA certificates, and not below `pki_dir`.

    @property
    def kubeconfig_dir(self) -> Path:
        """Takes the place of `/etc/kubernetes`."""
        return self.root / "etc/kubernetes"

    @property
    def pki_dir(self) -> Path:
        """Takes the place of `/etc/kubernetes/pki`."""
        return self.kubeconfig_dir / "pki"

    @property
    def ca_dir(self) -> Path:
        """Where the CAs' certificates and keys are, laid out as below `pki_dir`."""
        return self.root / "ca-keys" if self.external else self.pki_dir

    def ca_files(self, authority: str) -> tuple[Path, Path]:
        """Certificate and key of `ca`, `etcd-ca` or `front-proxy-ca`."""
        files = AUTHORITIES[authority]
        return self.ca_dir / files.certificate_file, self.ca_dir / files.key_file

    def ca_pem(self, authority: str) -> tuple[bytes, bytes]:
        """Certificate and key of `ca`, `etcd-ca` or `front-proxy-ca`."""
        certificate, key = self.ca_files(authority)
        return certificate.read_bytes(), key.read_bytes()

    def trust(self, authority: str, certificate_pem: bytes) -> None:
        """
        Have another CA, or some, first in the authority's file, and in every kubeconfig if it is theirs.

        Behind it in the file stays the old one, to which the live certificates lead.
        """
        path = self.pki_dir / AUTHORITIES[authority].certificate_file
        path.write_bytes(certificate_pem + path.read_bytes())
        if authority == "ca":
            self.trust_in_kubeconfigs(certificate_pem)

    def trust_in_kubeconfigs(self, certificate_pem: bytes) -> None:
        """Their `certificate-authority-data`."""
        data = base64.b64encode(certificate_pem).decode()
        for config in self.kubeconfig_dir.glob("*.conf"):
            config.write_text(re.sub(r"(certificate-authority-data: ).*", rf"\g<1>{data}", config.read_text()))


@dataclass(frozen=True, slots=True, kw_only=True)
class KubeadmPki(Pki):
    """A PKI that the real kubeadm made, and may look at again."""

    version: KubeadmVersion

    @property
    def config_file(self) -> Path:
        """Its configuration; the paths in it, and the default ones, are seen from `root`, so use `run_kubeadm`."""
        return Path(f"{self.root}{_CONFIG_INSIDE}")

    def run_kubeadm(self, *args: str, config: bool = True, check: bool = True) -> subprocess.CompletedProcess[str]:
        """
        Run the kubeadm that made this PKI, with `root` as its root directory.

        `certs renew` and `certs check-expiration` find kubeconfigs nowhere but in `/etc/kubernetes`; kubeadm's own
        `--rootfs` (a chroot) is what brings that to another place.

        Args:
            args: Such as `"certs", "check-expiration"`.
            config: Add `--config`; some subcommands do not know it.
            check: Let a failure be an error, with kubeadm's own words.
        """
        command = [str(programs.require(_PROGRAMS[self.version])), *args, "--rootfs", str(self.root)]
        if config:
            command += ["--config", _CONFIG_INSIDE]
        if os.geteuid() != 0:
            command = ["unshare", "--map-root-user", *command]  # chroot(2) needs a root of some kind
        run = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
        if check and run.returncode:
            raise AssertionError(f"{' '.join(command)}: exit {run.returncode}\n{run.stdout}{run.stderr}")
        return run


def kubeadm_pki(
    directory: Path,
    *,
    version: KubeadmVersion = "1.37",
    algorithm: KubeadmAlgorithm = "RSA-2048",
    extra_sans: tuple[str, ...] = EXTRA_SANS,
    validity: timedelta | None = None,
    external: bool = True,
) -> KubeadmPki:
    """
    Have the real kubeadm make a control plane's certificates and kubeconfigs.

    Args:
        directory: Empty or absent.
        version: Which kubeadm.
        algorithm: Of all keys; 1.20 knows RSA-2048 and ECDSA-P256 (not for kubeconfigs).
        extra_sans: Of the API server.
        validity: Of all but the CAs, a year unless given; 1.20 knows nothing else.
        external: Move the CA keys out of its sight afterwards.
    """
    pki = KubeadmPki(root=directory, external=external, version=version)
    directory.mkdir(parents=True, exist_ok=True)
    pki.config_file.write_text(_config(version, algorithm, extra_sans, validity))
    pki.run_kubeadm("init", "phase", "certs", "all")
    pki.run_kubeadm("init", "phase", "kubeconfig", "all")
    if external:
        _move_ca_keys(pki)
    return pki


def handmade_pki(
    directory: Path,
    *,
    now: datetime | None = None,
    not_after: datetime | None = None,
    ca_not_after: datetime | None = None,
    key: KeyAlgorithm = "ecdsa-p256",
    extra_sans: tuple[str, ...] = EXTRA_SANS,
    node: str = NODE,
    external: bool = True,
) -> Pki:
    """
    Make a PKI in the shape of kubeadm 1.37, without kubeadm and with any dates.

    Args:
        directory: Empty or absent.
        now: When kubeadm would have run (aware); the current time unless given.
        not_after: Of all but the CAs; a year after `now` unless given.
        ca_not_after: Ten years after `now` unless given.
        key: Of all keys; RSA takes a second or two.
        extra_sans: Of the API server.
        node: The node's name.
        external: The CA keys are outside `pki_dir`.
    """
    now = now or datetime.now(UTC)
    pki = Pki(root=directory, external=external)
    cluster = sample_pki.Cluster(node=node, address=ADDRESS, endpoint=ENDPOINT, extra_sans=extra_sans)
    cas = sample_pki.make(
        pki.kubeconfig_dir,
        now=now,
        not_after=not_after or now + timedelta(days=365),
        ca_not_after=ca_not_after,
        key=key,
        cluster=cluster,
    )
    for name, ca in cas.items():
        if external:  # else it is there, and the key alone is missing
            _write(pki.ca_dir / AUTHORITIES[name].certificate_file, ca.certificate_pem, 0o644)
        _write(pki.ca_dir / AUTHORITIES[name].key_file, ca.key_pem, 0o600)
    return pki


def _write(path: Path, data: bytes, mode: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=mode)
    path.write_bytes(data)


def _config(
    version: KubeadmVersion, algorithm: KubeadmAlgorithm, extra_sans: tuple[str, ...], validity: timedelta | None
) -> str:
    more = []
    if version == "1.37":
        more.append(f"encryptionAlgorithm: {algorithm}")
        if validity is not None:
            more.append(f"certificateValidityPeriod: {int(validity.total_seconds())}s")
    elif algorithm not in {"RSA-2048", "ECDSA-P256"} or validity is not None:
        raise ValueError(f"kubeadm {version} can't make {algorithm} with a validity of {validity}")
    elif algorithm == "ECDSA-P256":
        more.append("featureGates: {PublicKeysECDSA: true}")
    return _CONFIG.format(
        api="v1beta4" if version == "1.37" else "v1beta2",
        version="v1.37.2" if version == "1.37" else "v1.20.2",
        socket="unix:///run/none.sock" if version == "1.37" else "/run/none.sock",
        address=ADDRESS,
        node=NODE,
        endpoint=ENDPOINT,
        sans=", ".join(f'"{san}"' for san in extra_sans),
        more="\n".join(more),
    )


def _move_ca_keys(pki: Pki) -> None:
    for name, files in AUTHORITIES.items():
        certificate, key = pki.ca_files(name)
        certificate.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(pki.pki_dir / files.certificate_file, certificate)
        shutil.move(pki.pki_dir / files.key_file, key)


def finalize(pki: Pki, certificate: bytes | None = None) -> Path:
    """
    Do what kubeadm's kubelet-finalize leaves: a dated file with the pair, a symlink to it, and a kubelet.conf with its name.

    Args:
        pki: Its kubelet.conf holds certificate and key.
        certificate: PEM, for the same key, instead of the one in kubelet.conf.

    Returns:
        The symlink, seen from here.
    """
    path = pki.kubeconfig_dir / "kubelet.conf"
    data = path.read_bytes()
    pair = certificate or kubeconfig.parse(data).certificate_data, kubeconfig.key_data(data)
    directory = pki.root / "var/lib/kubelet/pki"
    directory.mkdir(parents=True, exist_ok=True)
    dated, current = directory / "kubelet-client-2026-01-02-03-04-05.pem", directory / "kubelet-client-current.pem"
    dated.touch(mode=0o600)
    dated.write_bytes(b"".join(part or b"" for part in pair))
    current.unlink(missing_ok=True)
    current.symlink_to(dated.name)
    place = os.path.relpath(current, pki.kubeconfig_dir)  # the same on the node, whatever its root is from here
    lines = [line for line in data.decode().splitlines() if "client-" not in line]
    path.write_text("\n".join([*lines, f"    client-certificate: {place}", f"    client-key: {place}", ""]))
    return current
