"""Objects of a real API server that hold the CA that goes: found by its bytes, and mended by the commands that are shown."""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509

from bridge.cluster import of_gateway
from bridge.cluster.api import Api
from bridge.node.endpoints import Server
from bridge.pki.certificates import pem
from bridge.rotation import Change, Phase, Standing, trust_copies
from bridge.rotation.objects import AUTHENTICATION
from bridge.rotation.readiness import NotReadyEverywhereError, RotationOptions, assert_followed
from bridge.rotation.trust_copies import Held, holds
from bridge.specs import CA, ETCD_CA
from bridge.system.waiting import wait_until
from tests.kit import kube_api, programs
from tests.kit.issuing import Signer
from tests.kit.kube_api import ApiServer

PATIENCE = timedelta(minutes=3)
CORE, KEY = "/api/v1/namespaces", "a private key that no screen may show"
NEW = Signer.make("kubernetes-2").certificate
OTHER = Signer.make("another").certificate


def b64(value: bytes | str) -> str:
    return base64.b64encode(value if isinstance(value, bytes) else value.encode()).decode()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with kube_api.serving(tmp_path_factory.mktemp("holders")) as server:
        server.admin.create(CORE, {"metadata": {"name": "argocd"}})
        # what the API server writes a moment after it has become ready
        assert wait_until(lambda: server.admin.ask("GET", AUTHENTICATION).ok, bool, PATIENCE, pause_seconds=0.1)
        yield server


@pytest.fixture(scope="module")
def change(server: ApiServer) -> Change:
    return Change(server.cluster.ca.certificate, NEW)


@pytest.fixture
def _cleared(server: ApiServer) -> Iterator[None]:
    """The namespace is empty after the test."""
    yield
    for kind in ("secrets", "configmaps"):
        assert server.admin.ask("DELETE", f"{CORE}/argocd/{kind}").status == 200


def api_of(server: ApiServer, user: str = "admin", *groups: str) -> Api:
    """A client of a node's kind: what it may not do is no answer."""
    found = of_gateway(server.kubeconfig(user, *(groups or ("system:masters",))))
    return Api(found.clients, found.servers)


def seen(server: ApiServer, change: Change, phase: Phase = Phase.TRUSTED) -> list[Held]:
    return trust_copies.look(api_of(server), CA.name, change, phase)


def add(server: ApiServer, name: str, data: Mapping[str, str], kind: str = "secrets", **more: Any) -> None:
    metadata = {"name": name, "namespace": "argocd", **more.pop("metadata", {})}
    server.admin.create(f"{CORE}/argocd/{kind}", {"metadata": metadata, "data": data, **more})


def kubeconfig_of(ca: x509.Certificate) -> str:
    """With a key, and the CA in base64."""
    return f"clusters:\n- cluster:\n    certificate-authority-data: {b64(pem(ca))}\nusers:\n- user: {{token: {KEY}}}\n"


pytestmark = pytest.mark.kube("kube-apiserver", "etcd", "kubectl")


def run(server: ApiServer, command: str) -> None:
    """A command as it is shown, in a shell, with the real kubectl."""
    words = f"{programs.require('kubectl')} --kubeconfig={server.kubeconfig('admin', 'system:masters')}"
    script = f'kubectl() {{ {words} "$@"; }}\nset -o pipefail\n{command}\n'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.usefixtures("_cleared")
@pytest.mark.rotation("others' Secrets and ConfigMaps")
def test_others_secrets_are_listed_with_the_command_that_mends_them(server: ApiServer, change: Change) -> None:
    """Argo CD's JSON, a kubeconfig, plain PEM: with both CAs afterwards, then with the new one alone; keys stay where they are."""
    old = change.old
    argo = json.dumps({"bearerToken": KEY, "tlsClientConfig": {"caData": b64(pem(old))}})
    label = {"labels": {"argocd.argoproj.io/secret-type": "cluster"}}
    add(server, "in-argo", {"config": b64(argo), "server": b64("https://192.0.2.1")}, metadata=label)
    add(server, "flux", {"value.yaml": b64(kubeconfig_of(old))})
    add(server, "plain", {"cacerts": b64(pem(OTHER) + pem(old))})
    add(server, "bundle", {"ca-bundle.pem": pem(old).decode()}, "configmaps")
    add(server, "another", {"ca.crt": b64(pem(OTHER)), "conf": b64(kubeconfig_of(OTHER))})

    found = {one.text.split(":")[0]: one for one in seen(server, change) if "argocd/" in one.text}
    assert set(found) == {
        "Secret argocd/in-argo, Argo CD's",
        "Secret argocd/flux",
        "Secret argocd/plain",
        "ConfigMap argocd/bundle",
    }
    for phase in (Phase.TRUSTED, Phase.NEW):
        for one in seen(server, change, phase):
            assert KEY not in one.text + one.command
            if "argocd/" in one.text:
                run(server, one.command)
        assert [one for one in seen(server, change, phase) if "argocd/" in one.text] == []

    def value(name: str, key: str) -> bytes:
        return base64.b64decode(server.admin.get(f"{CORE}/argocd/secrets/{name}")["data"][key])

    assert json.loads(value("in-argo", "config")) == {
        "bearerToken": KEY,
        "tlsClientConfig": {"caData": b64(pem(NEW))},
    }
    assert value("in-argo", "server") == b"https://192.0.2.1"
    assert value("flux", "value.yaml").decode() == kubeconfig_of(NEW)
    assert sorted(value("plain", "cacerts").decode().split("-----\n")) == sorted(
        (pem(NEW) + pem(OTHER)).decode().split("-----\n")
    )
    assert server.admin.get(f"{CORE}/argocd/configmaps/bundle")["data"] == {"ca-bundle.pem": pem(NEW).decode()}


@pytest.mark.usefixtures("_cleared")
@pytest.mark.rotation("the leader moves to an old node")
def test_a_namespace_that_is_behind_is_named_before_issue(server: ApiServer, change: Change) -> None:
    """A namespace, or an object that aggregated API servers read, without both CAs holds the phase up and is named."""
    both, api = pem(change.old, change.new).decode(), api_of(server)
    own = server.admin.get(AUTHENTICATION)["data"]["client-ca-file"]
    add(server, "kube-root-ca.crt", {"ca.crt": pem(change.old).decode()}, "configmaps")
    with pytest.raises(NotReadyEverywhereError) as refused:
        assert_followed(api, CA.name, change, Phase.ISSUED, timedelta())
    assert "client-ca-file of extension-apiserver-authentication" in str(refused.value)
    assert "kube-root-ca.crt of argocd" in str(refused.value)
    try:
        for path, key in ((AUTHENTICATION, "client-ca-file"), (f"{CORE}/argocd/configmaps/kube-root-ca.crt", "ca.crt")):
            assert server.admin.patch(path, {"data": {key: both}}).ok
        assert_followed(api, CA.name, change, Phase.ISSUED, timedelta())
        assert_followed(api, CA.name, change, Phase.TRUSTED, timedelta())
        assert trust_copies.behind(api, CA.name, (change.new, OTHER)) == [
            "client-ca-file of extension-apiserver-authentication",
            "kube-root-ca.crt of argocd",
        ]
    finally:  # the server is the other tests', too
        assert server.admin.patch(AUTHENTICATION, {"data": {"client-ca-file": own}}).ok


@pytest.mark.usefixtures("_cleared")
def test_a_namespace_without_the_old_ca_is_named_before_its_certificates_come_back(
    server: ApiServer, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `back` from “new” pods of it still trust the new CA alone; from “trusted” nothing is asked of it."""
    both, asked = pem(change.old, change.new).decode(), list[Any]()

    def look_once(look: Callable[[], Any], *_: object, **__: object) -> Any:
        asked.append(look())
        return asked[-1]

    def goes_back(here: Phase) -> None:
        ca = SimpleNamespace(name=CA.name, change=change, standing=Standing(phase=here))
        run: Any = None
        node: Any = SimpleNamespace(is_worker=False, is_etcd_host=False)
        step: Any = SimpleNamespace(ca=ca, target=Phase.TRUSTED)
        RotationOptions().assert_open(run, node, [step])

    monkeypatch.setattr("bridge.rotation.readiness._cluster", lambda *_: contextlib.nullcontext(api_of(server)))
    monkeypatch.setattr("bridge.rotation.readiness.wait_until", look_once)
    add(server, "kube-root-ca.crt", {"ca.crt": pem(change.new).decode()}, "configmaps")
    with pytest.raises(NotReadyEverywhereError) as refused:
        goes_back(Phase.ISSUED)
    assert "kube-root-ca.crt of argocd" in str(refused.value)
    assert "`ca-bridge rotate-ca issue`, run again, writes cluster-info" in refused.value.hint
    goes_back(Phase.TRUSTED)
    assert len(asked) == 1
    assert server.admin.patch(f"{CORE}/argocd/configmaps/kube-root-ca.crt", {"data": {"ca.crt": both}}).ok
    goes_back(Phase.ISSUED)
    assert (len(asked), asked[-1]) == (2, [])


@pytest.mark.usefixtures("_cleared")
def test_a_ca_with_its_key_is_its_owners_alone(server: ApiServer, change: Change) -> None:
    """A certificate without the key that goes with it would be worth nothing: there is no command."""
    add(server, "c1-ca", {"tls.crt": b64(pem(change.old)), "tls.key": b64(KEY)}, type="kubernetes.io/tls")
    [one] = [one for one in seen(server, change) if "argocd/" in one.text]
    assert one.command == ""
    assert "its owner changes it, with whatever goes with it" in one.text


@pytest.mark.rotation("caBundle of webhooks, APIServices and conversions")
def test_webhooks_are_listed_with_their_patch(server: ApiServer, change: Change) -> None:
    """The second of two webhooks, and no other field."""
    hooks = [
        {
            "name": f"{name}.example.com",
            "clientConfig": {"url": "https://192.0.2.2", "caBundle": b64(pem(ca))},
            "sideEffects": "None",
            "admissionReviewVersions": ["v1"],
        }
        for name, ca in (("a", OTHER), ("b", change.old))
    ]
    path = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    server.admin.create(path, {"metadata": {"name": "hooks"}, "webhooks": hooks})
    [one] = [one for one in seen(server, change) if "hooks" in one.text]
    assert "ValidatingWebhookConfiguration hooks: webhooks.1.clientConfig.caBundle has the old CA alone" in one.text
    run(server, one.command)
    held = [hook["clientConfig"]["caBundle"] for hook in server.admin.get(f"{path}/hooks")["webhooks"]]
    assert held == [b64(pem(OTHER)), b64(pem(change.old, NEW))]
    assert [one for one in seen(server, change) if "hooks" in one.text] == []
    assert server.admin.ask("DELETE", f"{path}/hooks").status == 200


@pytest.mark.usefixtures("_cleared")
@pytest.mark.rotation(
    "a backup of etcd restored",
    "the leader moves to an old node",
    "kube-root-ca.crt",
    "service account tokens",
    "ClusterTrustBundle",
)
def test_what_the_controller_manager_keeps_is_behind_until_it_leads(server: ApiServer, change: Change) -> None:
    """Tokens of service accounts, kube-root-ca.crt and the API server's trust bundle; no command is for these."""
    both, old = pem(change.old, NEW), pem(change.old)
    account = {"annotations": {"kubernetes.io/service-account.name": "default"}}
    server.admin.ask("POST", f"{CORE}/argocd/serviceaccounts", {"metadata": {"name": "default"}})
    add(server, "t1", {"ca.crt": b64(old)}, type="kubernetes.io/service-account-token", metadata=account)
    add(server, "kube-root-ca.crt", {"ca.crt": old.decode()}, "configmaps")
    bundles = "/apis/certificates.k8s.io/v1/clustertrustbundles"
    signer, serving = "kubernetes.io/kube-apiserver-serving", "kubernetes.io:kube-apiserver-serving"

    def publish(name: str, text: bytes) -> None:
        spec = {"signerName": signer, "trustBundle": text.decode()}
        server.admin.create(bundles, {"metadata": {"name": f"{serving}:{name}"}, "spec": spec})

    publish("one", old)
    said = [one.text for one in seen(server, change)]
    for what in ("ca.crt of the service account tokens of argocd/t1", "kube-root-ca.crt of argocd/kube-root-ca.crt"):
        assert [text for text in said if text.startswith(what)] != [], said
    assert [text for text in said if text.startswith(f"ClusterTrustBundles of {serving}:one")] != []
    assert all(not one.command for one in seen(server, change))

    server.admin.patch(f"{CORE}/argocd/secrets/t1", {"data": {"ca.crt": b64(both)}})
    server.admin.patch(f"{CORE}/argocd/configmaps/kube-root-ca.crt", {"data": {"ca.crt": both.decode()}})
    publish("two", both)  # the old one is there for a moment
    said = [one.text for one in seen(server, change)]
    assert [text for text in said if "controller manager" in text] == []
    for name in ("one", "two"):
        assert server.admin.ask("DELETE", f"{bundles}/{serving}:{name}").status == 200


@pytest.mark.parametrize(
    ("version", "seconds", "is_late"),
    [
        ("v1.34.4", -60, True),
        ("v1.34.4", 60, False),
        ("v1.36.0", -60, False),
        ("of-our-own", -60, True),
        (f"v1.35.9@sha256:{64 * '0'}", -60, True),
        (f"v1.37.2@sha256:{64 * '0'}", -60, False),
    ],
)
def test_a_kube_proxy_that_has_read_its_ca_before_is_named_with_the_command(
    server: ApiServer, change: Change, version: str, seconds: int, is_late: bool
) -> None:
    """Before 1.36 it reads that file at its start alone; one that was started afterwards has both CAs."""
    pods, maps = f"{CORE}/kube-system/pods", f"{CORE}/kube-system/configmaps"
    both = {"metadata": {"name": "kube-root-ca.crt"}, "data": {"ca.crt": pem(change.old, NEW).decode()}}
    written = server.admin.create(maps, both)["metadata"]["creationTimestamp"]
    started = (datetime.fromisoformat(written) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
    image = f"registry.k8s.io/kube-proxy:{version}"
    container = {"name": "kube-proxy", "image": image}
    spec = {"nodeName": "cp-1", "containers": [container], "automountServiceAccountToken": False}
    server.admin.ask("POST", f"{CORE}/kube-system/serviceaccounts", {"metadata": {"name": "default"}})
    server.admin.create(pods, {"metadata": {"name": "kube-proxy-a", "labels": {"k8s-app": "kube-proxy"}}, "spec": spec})
    state = {"running": {"startedAt": started}}
    status = {**container, "imageID": "", "ready": True, "restartCount": 0, "state": state}
    assert server.admin.patch(f"{pods}/kube-proxy-a/status", {"status": {"containerStatuses": [status]}}).ok
    try:
        found = [one for one in seen(server, change) if one.text.startswith("kube-proxy")]
        command = "kubectl -n kube-system rollout restart daemonset kube-proxy"
        assert [one.command for one in found] == ([command] if is_late else [])
        assert all("kube-proxy of cp-1" in one.text for one in found)
        assert [one for one in seen(server, change, Phase.NEW) if one.text.startswith("kube-proxy")] == []
    finally:
        assert server.admin.ask("DELETE", f"{pods}/kube-proxy-a", {"gracePeriodSeconds": 0}).status == 200
        assert server.admin.ask("DELETE", f"{maps}/kube-root-ca.crt").status == 200


@pytest.mark.rotation("cluster-info", "extension-apiserver-authentication")
def test_what_the_api_servers_hold_is_looked_at(server: ApiServer, change: Change) -> None:
    """API servers may hold both CAs, and only at the end the old one has to be gone."""

    def said(phase: Phase) -> list[str]:
        return [one.text for one in seen(server, change, phase) if one.text.startswith("extension-")]

    assert "wanted the CAs of this phase in client-ca-file" in said(Phase.TRUSTED)[0]
    assert said(Phase.OLD) == []
    assert trust_copies.look(api_of(server), ETCD_CA.name, change, Phase.NEW) == []
    own = server.admin.get(f"{CORE}/kube-system/configmaps/extension-apiserver-authentication")["data"][
        "client-ca-file"
    ]
    assert pem(change.old).decode() in own


def test_what_may_not_be_listed_is_named(server: ApiServer, change: Change) -> None:
    """Each kind by itself: the others are looked at all the same."""
    said = [one.text for one in trust_copies.look(api_of(server, "nobody", "none"), CA.name, change, Phase.TRUSTED)]
    for what in ("Secrets", "ConfigMaps", "kube-root-ca.crt", "APIServices", "ValidatingWebhookConfigurations"):
        assert [text for text in said if text.startswith(f"{what}: not looked at")] != [], said


def test_a_server_that_is_away_is_asked_once(server: ApiServer, change: Change) -> None:
    """One sentence instead of one a kind."""
    found = of_gateway(server.kubeconfig("admin", "system:masters"))
    away = Api(found.clients, [Server("https://127.0.0.1:1")])
    [one] = trust_copies.look(away, CA.name, change, Phase.TRUSTED)
    assert "the cluster's objects could not be looked at" in one.text


@pytest.mark.parametrize(
    "value",
    [
        pem(NEW),
        pem(OTHER) + pem(NEW),
        json.dumps({"ca": pem(NEW).decode()}).encode(),
        kubeconfig_of(NEW).encode(),
        pem(NEW).replace(b"\n", b"\r\n"),
        b"x: |\n" + b"\n".join(b"    " + line for line in pem(NEW).splitlines()),
    ],
)
def test_a_ca_is_found_whatever_is_around_it(value: bytes) -> None:
    """PEM, JSON, base64 of PEM, other line ends, indented; another CA in its place is not it."""
    assert holds(value, NEW)
    assert not holds(value, Signer.make("third").certificate)


@pytest.mark.parametrize("value", [b"", b"\xff" * 99, b"LS0tLS1" * 1000, b"LS0tLS1=", b"-----BEGIN CERTIFICATE-----"])
def test_what_is_no_certificate_holds_none(value: bytes) -> None:
    """A Secret may hold anything."""
    assert not holds(value, NEW)
