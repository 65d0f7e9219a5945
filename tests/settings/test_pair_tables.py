"""Tables `[certificate.NAME]` of further pairs: every mistake is named, with its line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bridge.cli.settings import in_force
from bridge.errors import SettingsError, SettingsProblem
from bridge.settings.load import parse
from bridge.settings.pair_tables import collisions
from bridge.specs import SPECS

RIGHT = {
    "certificate_file": '"/etc/registry/tls.crt"',
    "key_file": '"/etc/registry/tls.key"',
    "authority": '"ca"',
    "common_name": '"registry.example.com"',
    "sans": '["registry.example.com"]',
}


def text(name: str = "registry", **changes: str) -> str:
    values = {key: value for key, value in {**RIGHT, **changes}.items() if value}
    return "\n".join([f"[certificate.{name}]", *(f"{key} = {value}" for key, value in values.items())]) + "\n"


def problems(settings: str) -> list[SettingsProblem]:
    with pytest.raises(SettingsError) as e:
        parse(settings, Path("/etc/ca-bridge/config.toml"))
    return e.value.problems


def test_a_pair_is_read() -> None:
    """Its name, files, names and places."""
    copy = '[certificate.registry.copies.other]\ncertificate_file = "/a.pem"\nkey_file = "/a.pem"\n'
    [pair] = parse(text(prove='"[::1]:5000"', key_mode='"0640"') + copy).node.pairs
    assert (pair.name, pair.spec.authority.name, pair.place, pair.shown_name) == (
        "registry", "ca", ("::1", 5000), "registry.example.com"
    )  # fmt: skip
    assert [str(files.certificate_file) for files in pair.places] == ["/etc/registry/tls.crt", "/a.pem"]
    assert parse("").node.pairs == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("certificate_file", '"tls.crt"'),
        ("certificate_file", '"/etc/../tls.crt"'),
        ("key_file", ""),
        ("authority", '"corp"'),
        ("common_name", '""'),
        ("common_name", '"a\\u0007b"'),
        ("organizations", '["system:masters"]'),
        ("sans", "[]"),
        ("sans", '["no name"]'),
        ("sans", '["a.example.com", "a.example.com"]'),
        ("usages", '["email"]'),
        ("usages", "[]"),
        ("key", '"rsa-1024"'),
        ("key_mode", '"0644"'),
        ("key_mode", '"0200"'),
        ("owner", '"a b"'),
        ("reload", '"\'"'),
        ("component", '"kube-proxy"'),
        ("static_pod", '"/etc/kubernetes/manifests/etcd.yaml"'),
        ("prove", '"localhost"'),
        ("prove", '"127.0.0.1:70000"'),
        ("ca_file", '"/etc/registry/tls.key"'),
        ("copies", '"x"'),
        ("restart", '"x"'),
    ],
)
def test_a_mistake_is_named_with_its_key(key: str, value: str) -> None:
    """Each of these alone; without it the table is right."""
    found = problems(text(**{key: value}))
    assert [one.key for one in found] == [f"certificate.registry.{key}"]
    assert all(one.line for one in found)


@pytest.mark.parametrize(
    "name",
    [
        *(name for name in SPECS if name != "kubelet-server" and "." not in name),
        "etcd",
        "ca",
        "all",
        "Registry",
        "a_b",
        "-a",
        "user",
    ],
)
def test_a_name_that_means_something_else_is_refused(name: str) -> None:
    """Names of kubeadm's certificates, components and CAs, and words of the command line, are refused."""
    assert [one.key for one in problems(text(name))] == [f"certificate.{name}"]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/kubernetes/pki/apiserver.crt",
        "/etc/kubernetes/pki/ca.crt",
        "/etc/kubernetes/pki/sa.pub",
        "/etc/kubernetes/admin.conf",
        "/etc/kubernetes/manifests/x.crt",
        "/var/lib/kubelet/pki/x.crt",
        "/var/lib/ca-bridge/x.crt",
    ],
)
def test_files_of_others_are_refused(path: str) -> None:
    """kubeadm's, the kubelet's and ca-bridge's own; a new file beside kubeadm's is none of them."""
    assert [one.key for one in problems(text(certificate_file=f'"{path}"'))] == ["certificate.registry"]
    parse(text(certificate_file='"/etc/kubernetes/pki/registry.crt"'))


def test_two_pairs_with_one_file_are_refused() -> None:
    """A pair and another, a pair and its copy; one file for certificate and key is right."""
    assert [one.key for one in problems(text() + text("other"))] == ["certificate.other"] * 2
    others = {"certificate_file": '"/o.crt"', "key_file": '"/o.key"', "ca_file": '"/ca.crt"'}
    [shared] = problems(text(ca_file='"/ca.crt"') + text("other", **others))
    assert (shared.wanted, shared.found) == (
        "files of its own, since ca-bridge writes them",
        "/ca.crt, which registry names as well",
    )
    again = '[certificate.registry.copies.x]\ncertificate_file = "/etc/registry/tls.crt"\nkey_file = "/b"\n'
    assert [one.key for one in problems(text() + again)] == ["certificate.registry"]
    parse(text(key_file=RIGHT["certificate_file"]))
    both = problems(text(reload='"/bin/true"', component='"etcd"'))
    assert [(one.key, one.found) for one in both] == [("certificate.registry.component", "reload and component")]


def test_files_of_many_pairs_are_compared_once_each() -> None:
    """Pairs are not compared with each file of the node, one by one."""

    class Files(list[Path]):
        looks = 0

        def __iter__(self) -> Iterator[Path]:
            self.looks += 1
            return super().__iter__()

    taken = Files([Path("/etc/kubernetes/admin.conf"), Path("/var/lib/ca-bridge")])
    files = [("/etc/kubernetes/admin.conf", "/a"), ("/b", "/var/lib/ca-bridge/x/y"), ("/c", "/d")]
    [pair] = parse(text()).node.pairs
    pairs = [replace(pair, certificate_file=Path(one), key_file=Path(other)) for one, other in files]
    found = [file for _, _, file in collisions(pairs, taken)]
    assert (found, taken.looks) == (["/etc/kubernetes/admin.conf", "/var/lib/ca-bridge/x/y"], 1)


def test_a_backend_may_have_an_exception_for_a_pair() -> None:
    """The pair's name selects the exception, and is unknown without the pair's table."""
    from bridge.ca import registry

    ca = '[backend.corp]\ntype = "vault"\nurl = "https://ca.example.com"\nauth.method = "token"\nauth.token_file = "/t"\n'
    ca += '[backend.corp.roles]\nregistry = "servers"\n[authority.ca]\nbackend = "corp"\nmount = "pki"\n'
    settings = parse(ca + text())
    assert registry.configured(settings, ["ca"])
    settings = parse(ca)
    with pytest.raises(SettingsError, match="roles"):
        registry.configured(settings, ["ca"])


def test_settings_show_prints_pairs_that_mean_the_same() -> None:
    """The printed pairs, with their copies, mean the same as the file."""
    copy = '[certificate.registry.copies.other]\ncertificate_file = "/a.pem"\nkey_file = "/a.pem"\nkey_mode = "0440"\n'
    settings = parse(text(prove='"127.0.0.1:5000"', key_mode='"0640"', organizations='["a", "b"]', key='"same"') + copy)
    assert parse(in_force(settings)).node.pairs == settings.node.pairs
