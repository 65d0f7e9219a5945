"""Names from kubeadm's configuration are those that the real kubeadm asks for; whatever else a file holds is an error."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from bridge.node.kubeadm_config import KubeadmConfigError, parse
from bridge.pki.kubeadm_names import NamingFacts, NoFactError, Release, groups, naming, parse_release
from bridge.specs import SPECS
from tests.kit import programs

_HEAD = """\
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {{advertiseAddress: "{address}"}}
nodeRegistration: {{name: cp-1, criSocket: "unix:///run/none.sock"}}
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v1.37.2
{more}
"""
CASES = {
    "nothing said": ("192.0.2.10", ""),
    "a name with a port": ("192.0.2.10", "controlPlaneEndpoint: api.example.com:8443"),
    "an address": ("192.0.2.10", "controlPlaneEndpoint: 192.0.2.99"),
    "IPv6": (
        "2001:db8::10",
        'controlPlaneEndpoint: "[2001:db8::99]:6443"\nnetworking: {serviceSubnet: "fd00:10::/112"}',
    ),
    "both families": (
        "192.0.2.10",
        'networking: {serviceSubnet: "10.112.0.0/12,fd00:10::/112", dnsDomain: corp.example}',
    ),
    "SANs": (
        "192.0.2.10",
        """apiServer: {certSANs: [zz.example.com, "*.wild.example.com", 203.0.113.7, cp-1, zz.example.com]}
etcd: {local: {serverCertSANs: [etcd.example.com], peerCertSANs: [198.51.100.7]}}""",
    ),
}


@pytest.mark.kube
@pytest.mark.parametrize("case", CASES)
def test_the_names_are_those_of_the_real_kubeadm(case: str, tmp_path: Path) -> None:
    """`kubeadm certs generate-csr` of 1.37, all seven of `pki/`; with another version one of them would differ."""
    address, more = CASES[case]
    file = tmp_path / "kubeadm.yaml"
    file.write_text(_HEAD.format(address=address, more=more))
    command = [str(programs.require("kubeadm")), "certs", "generate-csr", "--config", str(file)]
    places = ["--cert-dir", str(tmp_path / "pki"), "--kubeconfig-dir", str(tmp_path / "conf")]
    subprocess.run([*command, *places], check=True, capture_output=True)
    config = parse(file.read_bytes())
    facts = config.naming_facts(config.name, config.address)
    compared = 0
    for spec in SPECS.values():
        made = tmp_path / "pki" / f"{spec.base}.csr"
        if not spec.kubeconfig and made.exists():
            request = x509.load_pem_x509_csr(made.read_bytes())
            assert naming(spec, facts).is_of(request), (spec.name, naming(spec, facts).text)
            compared += 1
    assert compared == 7
    older = NamingFacts(release=Release(1, 34, 4))
    assert groups(SPECS["apiserver-kubelet-client"], older.release) != groups(
        SPECS["apiserver-kubelet-client"], facts.release
    )


@pytest.mark.parametrize(
    ("version", "wanted"),
    [
        *(("v1.28.15", ("system:masters",)), ("v1.29.0", ("kubeadm:cluster-admins",))),
        *(
            ("v1.33.11", ("kubeadm:cluster-admins",)),
            ("v1.33.12", ()),
            ("v1.34.8", ()),
            ("v1.35.4", ("kubeadm:cluster-admins",)),
        ),
        *(("1.36.0", ("kubeadm:cluster-admins",)), ("v1.36.1-rc.1", ()), ("v1.37", ()), ("v1.40.0", ())),
    ],
)
def test_the_group_of_the_kubelet_client_by_release(version: str, wanted: tuple[str, ...]) -> None:
    """kubernetes/kubernetes#138957 and its cherry-picks; a patch release that is not known is not guessed."""
    assert groups(SPECS["apiserver-kubelet-client"], parse_release(version)) == wanted


@pytest.mark.parametrize("version", ["stable-1", "", "v1.36", "v1.34"])
def test_a_release_that_is_not_known_is_not_guessed(version: str) -> None:
    """An error, and no subject."""
    with pytest.raises(NoFactError):
        groups(SPECS["apiserver-kubelet-client"], parse_release(version))


@given(
    text=st.text()
    | st.sampled_from(["a: &a [*a]", "---\n---\n", "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n"])
)
def test_whatever_stands_there(text: str) -> None:
    """A configuration, or an error of ours."""
    try:
        assert parse(text.encode(errors="surrogatepass")).cluster_name == "kubernetes"
    except KubeadmConfigError as e:
        assert "configuration of kubeadm" in str(e)


@pytest.mark.parametrize(
    "more",
    [
        *("controlPlaneEndpoint: host:port", "networking: {serviceSubnet: x}", "encryptionAlgorithm: ED25519"),
        *("apiServer: {certSANs: x}", "networking: [x]", 'controlPlaneEndpoint: "[::1"'),
    ],
)
def test_values_that_are_none(more: str) -> None:
    """Such a value is named; the same without it is read."""
    head = "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n"
    with pytest.raises(KubeadmConfigError):
        parse(f"{head}{more}\n".encode())
    assert parse(head.encode()).service_address == "10.96.0.1"
