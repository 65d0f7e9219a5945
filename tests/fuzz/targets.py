"""
Everything that reads bytes which others wrote, each with good ones to begin with, and what must hold for any bytes.

Two drivers: hypothesis (`test_fuzz.py`, in every run) and atheris (`python -m tests.fuzz`, guided by coverage).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from base64 import b64encode, encodebytes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7

from backends import est as est_answers
from bridge.contract import Continuity, Issued, SignRequest
from bridge.errors import BridgeError, SettingsError, VerificationError
from bridge.node import kubeconfig, manifests
from bridge.node.yamltree import YamlError
from bridge.pki import bundle, bundle_format, csr, verify
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.settings import load
from bridge.specs import SPECS, Component
from bridge.testing import TestCA
from tests.kit.issuing import NOW, Signer

CONFIG = Path(__file__).parents[2] / "config/config.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One reader."""

    seeds: Sequence[bytes]
    holds: Callable[[bytes], None]  #: Raises for bytes that it does not hold for.


@functools.cache
def root() -> Signer:
    """The node's CA."""
    return Signer.make()


@functools.cache
def asked() -> SignRequest:
    """What the CA was asked for."""
    live = TestCA.make(algorithm="ecdsa-p256").leaf(SPECS["apiserver"])
    key = csr.generate_key("ecdsa-p256")
    who = Continuity(batch="0123456789abcdef" * 2, node="cp-1", cluster="c", proof=None, asked=NOW)
    return SignRequest(
        spec=SPECS["apiserver"], csr_pem=csr.build(live, key), validity=timedelta(days=365), continuity=who
    )


@functools.cache
def answer() -> x509.Certificate:
    """A good one."""
    return root().issue(asked()).leaf


# --- what must hold ---------------------------------------------------------------------------------------------------


def settings_or_error(data: bytes) -> None:
    """Settings, or all that is wrong with them."""
    try:
        load.parse(data.decode("utf-8", "replace"))
    except SettingsError as e:
        assert e.problems


def kubeconfig_or_error(data: bytes) -> None:
    """An edited kubeconfig reads as before but for the two values, of which the key is none; or an error of ours."""
    leaf, key = pem(answer()), b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
    try:
        before = kubeconfig.parse(data)
        after = kubeconfig.with_credentials(data, leaf, key)
    except kubeconfig.KubeconfigError:
        return
    assert kubeconfig.parse(after) == dataclasses.replace(before, certificate_data=leaf, key_fits=None)
    assert kubeconfig.key_data(after) == key


def certificates_or_error(data: bytes) -> None:
    """Certificates, whose PEM gives the same ones again; or a ValueError."""
    try:
        found = load_pem_certificates(data)
    except ValueError:
        return
    assert load_pem_certificates(b"".join(map(pem, found))) == found


def answer_or_refused(data: bytes) -> None:
    """No byte of a certificate can be changed without a violation: it is signed."""
    try:
        leaf = x509.load_der_x509_certificate(data)
    except (ValueError, x509.InvalidVersion):
        return  # refused where it is read
    expected = verify.Expectation(
        anchors=(root().certificate,), anchor_name="ca.crt", now=NOW, min_validity=timedelta(days=7)
    )
    try:
        verify.check(Issued(leaf=leaf), asked(), expected)
    except VerificationError as e:
        assert e.violations
    else:
        assert data == answer().public_bytes(Encoding.DER)


def est_answer_or_error(data: bytes) -> None:
    """An EST server's certificates, in which the leaf and the chain can be found; or a ValueError."""
    try:
        found = est_answers.certificates(data)
    except ValueError:
        return
    leaf = est_answers.leaf_of(found, asked().csr)
    assert leaf is None or leaf.public_key() == asked().csr.public_key()
    for one in found:
        assert set(est_answers.intermediates_of(one, found)) <= set(found)
    assert set(est_answers.issuing_first(found)) == set(found)


def manifest_or_error(data: bytes) -> None:
    """A static pod, or an error."""
    with contextlib.suppress(YamlError):
        manifests.parse(Component.APISERVER, data)


def bundle_or_error(data: bytes) -> None:
    """A bundle, which is written as it was read; or an error of ours."""
    try:
        found = bundle_format.loads(data)
    except BridgeError as e:
        assert str(e).isprintable()
    else:
        assert bundle_format.loads(bundle_format.dumps(found)) == found


MANIFEST = json.dumps(
    {
        "kind": "Pod",
        "spec": {
            "containers": [
                {
                    "name": "kube-apiserver",
                    "image": "k8s/kube-apiserver:v1.30.1",
                    "command": ["x", "--secure-port=6443"],
                }
            ]
        },
    }
).encode()


@functools.cache
def targets() -> dict[str, Target]:
    """By name."""
    leaf = pem(answer())
    config = _kubeconfig(leaf)
    bag = pkcs7.serialize_certificates([answer(), root().certificate], Encoding.DER)
    return {
        "settings": Target(seeds=[CONFIG.read_bytes(), _uncommented(CONFIG.read_bytes())], holds=settings_or_error),
        "kubeconfig": Target(seeds=[config, config.replace(b"\n", b"\r\n")], holds=kubeconfig_or_error),
        "certificates": Target(seeds=[leaf, leaf + pem(root().certificate)], holds=certificates_or_error),
        "answer": Target(seeds=[answer().public_bytes(Encoding.DER)], holds=answer_or_refused),
        "est answer": Target(seeds=[bag, encodebytes(bag), b64encode(bag)], holds=est_answer_or_error),
        "manifest": Target(seeds=[MANIFEST], holds=manifest_or_error),
        "bundle": Target(seeds=[bundle_format.dumps(bundle.bundle_of([asked()]))], holds=bundle_or_error),
    }


def _uncommented(data: bytes) -> bytes:
    """The example with what it has in comments switched on."""
    return b"\n".join(line.removeprefix(b"# ") for line in data.splitlines())


def _kubeconfig(leaf: bytes) -> bytes:
    key = b"-----BEGIN PRIVATE KEY-----\nBBBB\n-----END PRIVATE KEY-----\n"
    return f"""\
apiVersion: v1
kind: Config
clusters:
- cluster: {{certificate-authority-data: QQ==, server: "https://192.0.2.1:6443"}}
  name: kubernetes
contexts:
- context:
    cluster: kubernetes
    user: admin
  name: admin@kubernetes
current-context: admin@kubernetes
preferences: {{}}
users:
- name: admin
  user:
    client-certificate-data: {b64encode(leaf).decode()}
    client-key-data: {b64encode(key).decode()}
""".encode()
