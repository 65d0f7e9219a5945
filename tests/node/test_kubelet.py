"""Where a kubelet keeps its certificates, as its configuration and its flags say; and what its kubeconfig refers to."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bridge.node import kubeconfig
from bridge.node.kubeconfig import KubeconfigError
from bridge.node.kubelet import KubeletFiles, asking, asks
from bridge.node.yamltree import YamlError


def load(directory: Path, config: str | None = None, flags: str | None = None) -> KubeletFiles:
    """Read a directory with these two files."""
    directory.mkdir(exist_ok=True)
    for name, text in (("config.yaml", config), ("kubeadm-flags.env", flags)):
        (directory / name).unlink(missing_ok=True)
        if text is not None:
            (directory / name).write_text(text)
    return KubeletFiles.load(directory)


def test_without_any_configuration_it_is_the_default(tmp_path: Path) -> None:
    """A pair that the kubelet makes; whether it rotates is unknown."""
    found = load(tmp_path)
    pki = tmp_path / "pki"
    assert (found.serving, found.certificate, found.key) == ("made", pki / "kubelet.crt", pki / "kubelet.key")
    assert (found.client, found.rotates) == (pki / "kubelet-client-current.pem", None)
    assert (found.hostname, found.addresses, found.trouble) == ("", (), None)


@pytest.mark.parametrize(
    ("config", "rotates", "serving", "certificate"),
    [
        ("kind: KubeletConfiguration\n", False, "made", "pki/kubelet.crt"),
        ("rotateCertificates: true\n", True, "made", "pki/kubelet.crt"),
        ("rotateCertificates: false\n", False, "made", "pki/kubelet.crt"),
        ("serverTLSBootstrap: true\n", False, "asked", "pki/kubelet-server-current.pem"),
        ("tlsCertFile: /x/a.crt\ntlsPrivateKeyFile: /x/a.key\n", False, "named", "/x/a.crt"),
        ("tlsCertFile: a.crt\ntlsPrivateKeyFile: a.key\n", False, "named", "a.crt"),
        ("tlsCertFile: /x/a.crt\nserverTLSBootstrap: true\n", False, "asked", "pki/kubelet-server-current.pem"),
    ],
)
def test_what_the_configuration_says(
    tmp_path: Path, config: str, rotates: bool, serving: str, certificate: str
) -> None:
    """Named files go before a signer, and a name alone is none."""
    found = load(tmp_path, config)
    assert (found.rotates, found.serving, found.certificate) == (rotates, serving, tmp_path / certificate)
    assert (found.key == found.certificate) is (serving == "asked")


@pytest.mark.parametrize(
    ("flags", "hostname", "addresses"),
    [
        ('KUBELET_KUBEADM_ARGS="--hostname-override=w1 --node-ip=192.0.2.1"\n', "w1", ("192.0.2.1",)),
        ('KUBELET_KUBEADM_ARGS="--node-ip 192.0.2.1,2001:db8::1"\n', "", ("192.0.2.1", "2001:db8::1")),
        ('KUBELET_KUBEADM_ARGS="--node-ip=0.0.0.0"\n', "", ()),
        ('KUBELET_KUBEADM_ARGS="--node-ip=::,192.0.2.1 --x"\n', "", ("192.0.2.1",)),
        ('# KUBELET_KUBEADM_ARGS="--node-ip=192.0.2.9"\nOTHER="--node-ip=192.0.2.8"\n', "", ()),
        ("KUBELET_KUBEADM_ARGS=\"--node-ip='192.0.2.1\n", "", ()),
    ],
)
def test_what_the_flags_say(tmp_path: Path, flags: str, hostname: str, addresses: tuple[str, ...]) -> None:
    """As kubeadm and operators write them; flags that no kubelet would start with say nothing."""
    found = load(tmp_path, None, flags)
    assert (found.hostname, found.addresses) == (hostname, addresses)


def test_flags_count_more_than_the_configuration(tmp_path: Path) -> None:
    """A kubelet's own rule."""
    flags = "--rotate-certificates=false --cert-dir=/data/pki --tls-cert-file=/f/a.crt --tls-private-key-file=/f/a.key"
    config = "rotateCertificates: true\ntlsCertFile: /x/a.crt\ntlsPrivateKeyFile: /x/a.key\n"
    found = load(tmp_path, config, f'KUBELET_KUBEADM_ARGS="{flags}"\n')
    assert (found.rotates, found.certificate, found.key) == (False, Path("/f/a.crt"), Path("/f/a.key"))
    assert found.client == Path("/data/pki/kubelet-client-current.pem")


@pytest.mark.parametrize("config", ["a: [", "- a\n", "rotateCertificates: [1]\n", "\x00"])
def test_a_broken_configuration_is_reported(tmp_path: Path, config: str) -> None:
    """Whether the kubelet rotates is then unknown, and the report says so."""
    found = load(tmp_path, config)
    assert found.rotates is None
    assert found.trouble is not None
    assert str(tmp_path / "config.yaml") in found.trouble


@given(config=st.text(), flags=st.text())
def test_whatever_is_there_can_be_looked_at(tmp_path_factory: pytest.TempPathFactory, config: str, flags: str) -> None:
    """No file on a node makes the look an error."""
    directory = tmp_path_factory.getbasetemp() / "any"
    found = load(directory, config.replace("\ud800", ""), f"KUBELET_KUBEADM_ARGS={flags}")
    assert found.serving in ("made", "named", "asked")


# --- the kubeconfig --------------------------------------------------------------------------------------------------

DATA = {
    "client-certificate-data": base64.b64encode(b"C" * 60).decode(),
    "client-key-data": base64.b64encode(b"K").decode(),
}
PLACE = "/var/lib/kubelet/pki/kubelet-client-current.pem"
HEAD = """\
# kept
apiVersion: v1
clusters:
- {name: c, cluster: {server: "https://192.0.2.1:6443", certificate-authority-data: Q0E=}}
contexts:
- {name: x, context: {cluster: c, user: n}}  # and this
current-context: x
users:
- name: other
  user: {client-certificate-data: b3RoZXI=, client-key-data: b3RoZXI=}
"""
FORMS = {
    "block": "- name: n\n  user:\n    client-certificate-data: {c}\n    client-key-data: {k}\n",
    "flow": "- name: n\n  user: {{client-certificate-data: {c}, client-key-data: {k}}}\n",
    "quoted": "- name: n\n  user:\n    \"client-key-data\": \"{k}\"\n    'client-certificate-data': '{c}'  # mine\n",
    "lines": "- name: n\n  user:\n    client-certificate-data: |\n      {c}\n    client-key-data: {k}\nkind: Config\n",
}


def text_of(form: str) -> bytes:
    return (HEAD + FORMS[form].format(c=DATA["client-certificate-data"], k=DATA["client-key-data"])).encode()


@pytest.mark.parametrize("form", FORMS)
def test_data_become_a_reference_and_nothing_else_changes(form: str) -> None:
    """Certificate and key of the current context's user, in whatever form; other users and comments stay."""
    before = text_of(form)
    after = kubeconfig.with_references(before, PLACE)
    found, old = kubeconfig.parse(after), kubeconfig.parse(before)
    assert (found.certificate_file, found.key_file) == (PLACE, PLACE)
    assert (found.certificate_data, found.key_present, found.server) == (None, False, old.server)
    assert kubeconfig.key_data(after) is None
    assert after.startswith(HEAD.encode())
    assert (b"# mine" in after) is (b"# mine" in before)
    assert (b"kind: Config" in after) is (b"kind: Config" in before)
    with pytest.raises(KubeconfigError):
        kubeconfig.with_references(after, PLACE)


def test_what_names_files_already_is_left_alone() -> None:
    """Two entries of one name would be no YAML."""
    text = text_of("block").decode() + "    client-certificate: /x\n"
    with pytest.raises(KubeconfigError, match="found files beside them"):
        kubeconfig.with_references(text.encode(), PLACE)


# --- asking for a serving certificate ---------------------------------------------------------------------------------

KUBEADMS = "apiVersion: kubelet.config.k8s.io/v1beta1\n# kept\nkind: KubeletConfiguration\nrotateCertificates: true\n"


@pytest.mark.parametrize(
    "text", [KUBEADMS, f"{KUBEADMS}evictionHard: {{memory.available: 50Mi}}\n", f"---\n{KUBEADMS}"]
)
def test_a_key_comes_and_goes_and_all_else_stays(text: str) -> None:
    """On and off again is the very text; what is so already is not touched."""
    on = asking(text, wanted=True)
    assert on == f"{text}serverTLSBootstrap: true\n"
    assert asks(on)
    assert not asks(text)
    assert asking(on, wanted=True) == on
    assert asking(text, wanted=False) == asking(on, wanted=False) == text


@pytest.mark.parametrize("value", ["false", "False # why", '"false"', ""])
def test_a_key_that_says_no_says_yes(value: str) -> None:
    """The value changes in its place, and is removed on the way back, which is the kubelet's default."""
    text = f"kind: KubeletConfiguration\nserverTLSBootstrap: {value}\nzone: x\n"
    on = asking(text, wanted=True)
    assert asks(on)
    assert on.splitlines()[0::2] == ["kind: KubeletConfiguration", "zone: x"]
    assert asking(on, wanted=False) == "kind: KubeletConfiguration\nzone: x\n"


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(
    "text",
    [
        "{kind: x}\n",
        "{kind: x, serverTLSBootstrap: %s}\n",
        "- a\n",
        "a: &x b\nc: *x\n",
        "kind: x\n...\n",
        "kind: x\nserverTLSBootstrap:\n  %s\nlast: y\n",
        "kind: x\nserverTLSBootstrap: %s\nserverTLSBootstrap: %s\n",
    ],
)
def test_a_form_that_is_not_kubeadms_is_left_alone(text: str, wanted: bool) -> None:
    """A file in another form stays, because a change might give it another meaning."""
    text = text.replace("%s", str(not wanted).lower())
    if not wanted and "serverTLS" not in text and not text.startswith("- "):
        assert asking(text, wanted=wanted) == text
        return
    with pytest.raises(YamlError):
        asking(text, wanted=wanted)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.booleans() | st.lists(st.integers())))
def test_no_other_value_ever_changes(values: dict[str, object]) -> None:
    """For any kubelet configuration, on and off again means the same."""
    text = yaml.safe_dump({"kind": "x", **{key: one for key, one in values.items() if key != "serverTLSBootstrap"}})
    try:
        on = asking(text, wanted=True)
    except YamlError:
        return
    assert yaml.safe_load(on) == {**yaml.safe_load(text), "serverTLSBootstrap": True}
    assert yaml.safe_load(asking(on, wanted=False)) == yaml.safe_load(text)
