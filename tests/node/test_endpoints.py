"""Where components listen is in their manifests' flags, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from bridge.node import endpoints
from bridge.node.endpoints import Address, Server
from bridge.specs import Component

ALL = "0.0.0.0"  # noqa: S104 (nothing is bound here)


@pytest.mark.parametrize(
    ("flags", "places"),
    [
        ({"--advertise-address": "192.0.2.10"}, [("127.0.0.1", 6443), ("192.0.2.10", 6443)]),
        (
            {"--bind-address": ALL, "--advertise-address": "192.0.2.10", "--secure-port": "7443"},
            [("127.0.0.1", 7443), ("192.0.2.10", 7443)],
        ),
        ({"--bind-address": "192.0.2.11", "--advertise-address": "192.0.2.10"}, [("192.0.2.11", 6443)]),
        ({"--bind-address": "::", "--advertise-address": "2001:db8::1"}, [("::1", 6443), ("2001:db8::1", 6443)]),
        ({"--secure-port": "0"}, []),
    ],
    ids=["default", "all", "one", "ipv6", "none"],
)
def test_an_api_server_listens_where_its_flags_say(flags: dict[str, str], places: list[tuple[str, int]]) -> None:
    """Addresses and port come from its flags, or are the program's default."""
    assert endpoints.bound(Component.APISERVER, flags) == places


def test_a_controller_has_its_own_default_port() -> None:
    """Each program has another one."""
    loopback = {"--bind-address": "127.0.0.1"}
    assert endpoints.bound(Component.CONTROLLER_MANAGER, loopback) == [("127.0.0.1", 10257)]
    assert endpoints.bound(Component.SCHEDULER, loopback) == [("127.0.0.1", 10259)]


def test_a_port_that_is_none_is_an_error() -> None:
    """A flag that the program itself would not take."""
    with pytest.raises(ValueError):
        endpoints.bound(Component.APISERVER, {"--secure-port": "https"})


def test_etcd_listens_at_its_urls() -> None:
    """Those with TLS, each once; for one on all addresses loopback and what is advertised."""
    flags = {
        "--listen-client-urls": "https://127.0.0.1:2379,https://0.0.0.0:2379,http://127.0.0.1:2381",
        "--listen-client-http-urls": "https://[2001:db8::1]:2382",
        "--advertise-client-urls": "https://192.0.2.10:2379",
    }
    found = endpoints.listening(flags, ("--listen-client-urls", "--listen-client-http-urls"), "--advertise-client-urls")
    assert found == [("127.0.0.1", 2379), ("192.0.2.10", 2379), ("2001:db8::1", 2382)]
    assert endpoints.listening({}, ("--listen-client-urls",), "--advertise-client-urls") == []


def test_the_name_of_an_api_server() -> None:
    """The address that it advertises is its name, else the one that it is bound to; "every address" is no name."""
    assert endpoints.name({"--advertise-address": "192.0.2.10", "--bind-address": "192.0.2.11"}) == "192.0.2.10"
    assert endpoints.name({"--bind-address": "192.0.2.11"}) == "192.0.2.11"
    assert endpoints.name({"--bind-address": ALL}) is None
    assert endpoints.name({}) is None


def test_places_and_servers() -> None:
    """IPv6 addresses have brackets in URLs, and none elsewhere."""
    assert str(Address("::1", 2379)) == "[::1]:2379"
    assert str(Address("127.0.0.1", 2379)) == "127.0.0.1:2379"
    assert Server("https://[::1]:2379").place == Address("::1", 2379)
    assert Server("https://etcd.example.com").place == Address("etcd.example.com", 443)


def test_files() -> None:
    """Containers start in /; a flag that has to be there is named when it is not."""
    assert endpoints.file({"--cert-file": "etc/a.crt"}, "--cert-file") == Path("/etc/a.crt")
    assert endpoints.file({"--cert-file": ""}, "--cert-file") is None
    with pytest.raises(ValueError, match="the flag --key-file is missing"):
        endpoints.wanted_file({}, "--key-file")
