"""The kubernetes backend against a real API server, with kube-controller-manager's signer, cert-manager's, and none."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509

from backends.kubernetes import KubernetesBackend, KubernetesSettings, _object, parse_kubeconfig
from bridge.ca import registry
from bridge.contract import Issued, Pending, PlannedCertificate, Secret, SetupRequest, SignRequest
from bridge.errors import (
    BackendError,
    BackendRefusedError,
    BackendUnavailableError,
    BridgeError,
    NoVerdictError,
    SettingsError,
)
from bridge.pki.certificates import pem
from bridge.settings.load import parse
from bridge.specs import AUTHORITIES, SPECS, CertificateSpec
from bridge.system.waiting import wait_until
from bridge.testing import BackendConformance, TestCA, sign_request, tampered
from tests.kit import cert_manager, est, kube_api
from tests.kit.api_client import CSRS, ApiClient, Reply
from tests.kit.issuing import Signer
from tests.kit.kube_api import ApiServer
from tests.kit.loopback import LoopbackServer, free_port
from tests.kit.nodes import wait_for

Live = dict[str, x509.Certificate]
Make = Callable[..., KubernetesBackend]

SERVER = ("etcd", "kube-apiserver", "kubectl")
EXAMPLE = Path(__file__).resolve().parents[2] / "config/kubernetes/config.toml"
VALIDITY = timedelta(days=30)
ADMIN, APISERVER, MASTERS = SPECS["admin.conf"], SPECS["apiserver"], SPECS["super-admin.conf"]
CLIENT_SIGNER = "kubernetes.io/kube-apiserver-client"
OWN_SIGNER = "ca-bridge.example.com/{name}"

_CA = TestCA.make("kubernetes", "ecdsa-p256")
_SIGNER = Signer(certificate=_CA.certificate, key=_CA.key)
_LIVE = {spec.name: _CA.leaf(spec) for spec in SPECS.values()}
#: What kube-apiserver-client is for: clients, and never system:masters.
CLIENTS = tuple(spec for spec in SPECS.values() if spec.usage == "client" and "system:masters" not in spec.groups[0])


def request(spec: CertificateSpec = ADMIN, validity: timedelta = VALIDITY) -> SignRequest:
    """To renew the certificate that is named like the spec."""
    return sign_request(_LIVE[spec.name], spec, "ecdsa-p256", validity)


def name_of(one: SignRequest, signer: str = "ca-bridge.example.com/admin.conf") -> str:
    """The name of the object that will be made."""
    return str(_object(one, signer)["metadata"]["name"])


def pending(answer: Issued | Pending) -> Pending:
    """An answer that is none yet."""
    assert isinstance(answer, Pending)
    return answer


def failure(ask: Callable[[], object], kind: type[BackendError] = BackendRefusedError) -> BackendError:
    """The error, which is worded as all of ours are."""
    with pytest.raises(kind) as e:
        ask()
    text = str(e.value)
    assert text.startswith("kubernetes: ")
    assert text.isprintable()
    assert len(text) < 500
    return e.value


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """An API server without a signer."""
    with kube_api.serving(tmp_path_factory.mktemp("api")) as server:
        yield server


@pytest.fixture
def make(api: ApiServer) -> Iterator[Make]:
    """Makes backends of an administrator, whose settings must be without problems, and closes them at the end."""
    kubeconfig = api.kubeconfig("node-1", "system:masters")
    with contextlib.ExitStack() as stack:

        def backend(**keys: Any) -> KubernetesBackend:
            who = {} if {"token", "client_cert"} & set(keys) else {"kubeconfig": kubeconfig}
            given = {"signer": OWN_SIGNER, "wait": timedelta(), "timeout": timedelta(minutes=3), **who, **keys}
            settings = KubernetesSettings(**given)
            assert list(settings.problems()) == []
            return stack.enter_context(contextlib.closing(KubernetesBackend.from_settings(settings)))

        yield backend


# ------------------------------------------------------------------------------------------------------------ conformance


class Conformance(BackendConformance):
    """What both signers have in common; tests are in the classes below."""

    __test__ = False
    unsupported = frozenset({"sign_many", "issuers"})
    patience = timedelta(minutes=3)

    @pytest.fixture(scope="session")
    @classmethod
    def ca(cls) -> TestCA:
        """The CA behind the signer."""
        return _CA

    @pytest.fixture(scope="session")
    @classmethod
    def live(cls) -> Live:
        """The certificates to renew."""
        return _LIVE

    @pytest.fixture
    def dead_backend(self, tmp_path: Path) -> KubernetesBackend:
        """A backend whose server's port is closed."""
        tls = est.make_tls(tmp_path / "tls")
        settings = KubernetesSettings(
            signer=OWN_SIGNER, url=f"https://127.0.0.1:{free_port()}", ca_file=tls.ca, timeout=timedelta(seconds=1),
            client_cert=tls.server_cert, client_key=tls.server_key,
        )  # fmt: skip
        return KubernetesBackend.from_settings(settings)


@contextlib.contextmanager
def approving(api: ApiServer) -> Iterator[None]:
    """A person who approves every request."""
    end = threading.Event()

    def approve() -> None:
        while not end.wait(0.05):
            for one in api.admin.csrs():
                if not one["status"].get("conditions"):
                    with contextlib.suppress(AssertionError):  # it is gone by now
                        api.admin.decide(one["metadata"]["name"])

    thread = threading.Thread(target=approve)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


@pytest.mark.kube(*SERVER, "cert-manager")
class TestCertManager(Conformance):
    """cert-manager's ClusterIssuer with a CA signs every certificate of a control plane."""

    __test__ = True

    @pytest.fixture(scope="class")
    @classmethod
    def signing(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
        """An API server with cert-manager."""
        with kube_api.serving(tmp_path_factory.mktemp("cert-manager")) as api:
            cert_manager.start(api, "corp", _CA.certificate, _CA.key)
            with approving(api):
                yield api

    @pytest.fixture
    def backend(self, signing: ApiServer) -> Iterator[KubernetesBackend]:
        """As a user with no more rights than `setup` gives."""
        signing.apply(manifests("clusterissuers.cert-manager.io/corp"))
        account = signing.bearer("ca-bridge", "ca-bridge-cp-1")
        wait_for("rights that count", lambda: account.may("create"))
        token = signing.directory / "token"
        token.touch(0o600)
        token.write_text(account.token)
        settings = KubernetesSettings(
            signer="clusterissuers.cert-manager.io/corp", url=signing.url, ca_file=signing.trust,
            token=Secret("file", str(token)), timeout=timedelta(minutes=3),
        )  # fmt: skip
        with contextlib.closing(KubernetesBackend.from_settings(settings)) as backend:
            yield backend


@pytest.mark.kube(*SERVER, "kube-controller-manager")
class TestControllerManager(Conformance):
    """kube-controller-manager's signer for clients of the API server."""

    __test__ = True
    specs = CLIENTS

    @pytest.fixture(scope="class")
    @classmethod
    def signing(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
        """An API server with a controller manager that has the CA's key."""
        with kube_api.serving(tmp_path_factory.mktemp("kcm")) as api:
            api.start_controller_manager(_SIGNER)
            with approving(api):
                yield api

    @pytest.fixture
    def backend(self, signing: ApiServer) -> Iterator[KubernetesBackend]:
        """By kubeconfig."""
        kubeconfig = signing.kubeconfig("node-1", "system:masters")
        settings = KubernetesSettings(signer=CLIENT_SIGNER, kubeconfig=kubeconfig, timeout=timedelta(minutes=3))
        with contextlib.closing(KubernetesBackend.from_settings(settings)) as backend:
            yield backend


# ---------------------------------------------------------------------------------------------------- one request's life


@pytest.mark.kube(*SERVER)
def test_waits_for_approval_and_then_collects(api: ApiServer, make: Make) -> None:
    """Repeated runs make one object; its certificate is collected by a later run, and then the object is removed."""
    asked = request()
    first = pending(make().sign(asked))
    name = first.reference.split(" ")[0]
    assert first.note == f"waits for approval: kubectl certificate approve {name}"
    assert pending(make().sign(asked)).reference == first.reference  # as after a crash
    assert [one["metadata"]["name"] for one in api.admin.csrs()].count(name) == 1

    api.admin.decide(name)
    waiting = pending(make().collect(asked, first.reference))
    assert waiting.note == f"{name} is approved, and waits for the signer of ca-bridge.example.com/admin.conf"
    leaf = _SIGNER.issue(asked, begin=datetime.now(UTC) - timedelta(minutes=5)).leaf
    assert api.admin.issue(name, pem(_CA.certificate) + pem(leaf)).status == 200  # the API takes any order

    later = make()
    answer = later.collect(asked, first.reference)
    assert isinstance(answer, Issued)
    assert (answer.leaf, answer.intermediates) == (leaf, (_CA.certificate,))
    assert api.admin.csr(name)  # until the run ends: a killed one finds it again
    later.close()
    assert api.admin.ask("GET", f"{CSRS}/{name}").status == 404


@pytest.mark.kube(*SERVER)
def test_what_is_asked(api: ApiServer, make: Make) -> None:
    """Usages are the certificate's own, the time is the one that was asked for, and the CSR is one plain block."""
    for spec, usages in (
        (ADMIN, ["digital signature", "client auth"]),
        (APISERVER, ["digital signature", "server auth"]),
        (SPECS["etcd-peer"], ["digital signature", "server auth", "client auth"]),
    ):
        asked = request(spec, timedelta(hours=5))
        odd = SignRequest(spec=spec, csr_pem=b"words\n" + asked.csr_pem + asked.csr_pem, validity=asked.validity)
        name = pending(make().sign(odd)).reference.split(" ")[0]
        found = api.admin.csr(name)["spec"]
        assert found["usages"] == usages
        assert found["expirationSeconds"] == 5 * 3600
        assert found["signerName"] == f"ca-bridge.example.com/{spec.name}"
        assert base64.b64decode(found["request"]) == asked.csr_pem
    rsa = sign_request(_LIVE["admin.conf"], ADMIN, "rsa-2048", VALIDITY)
    assert "key encipherment" in _object(rsa, CLIENT_SIGNER)["spec"]["usages"]


@pytest.mark.kube(*SERVER)
@pytest.mark.parametrize("kind", ["Denied", "Failed"])
def test_a_no_is_reported_with_its_reason(api: ApiServer, make: Make, kind: str) -> None:
    """Denied and Failed end the request, with the reason cleaned; a certificate beside it counts for nothing."""
    asked = request()
    backend = make()
    waiting = pending(backend.sign(asked))
    name = waiting.reference.split(" ")[0]
    api.admin.decide(name, kind, message="no such\x1b[2J node\n" + "x" * 900, reason="Policy")
    issued = api.admin.issue(name, pem(_SIGNER.issue(asked).leaf))
    assert issued.status == 200  # the API server lets both stand together
    error = failure(lambda: backend.collect(asked, waiting.reference))
    assert f"{name}: {kind.lower()}: Policy: no such [2J node xxx" in str(error)
    backend.close()
    assert api.admin.ask("GET", f"{CSRS}/{name}").status == 404


@pytest.mark.kube(*SERVER)
def test_a_foreign_object_of_the_name_is_refused(api: ApiServer, make: Make) -> None:
    """A client that takes our object's name gets nothing from us; the twin with our request is found again."""
    asked, other = request(), request()
    squatted = name_of(asked)
    api.admin.create_csr(other.csr_pem, "ca-bridge.example.com/admin.conf", ["client auth"], name=squatted)
    assert "wanted our own request there, found another" in str(failure(lambda: make().sign(asked)))

    waiting = pending(make().sign(other))
    name = waiting.reference.split(" ")[0]
    assert api.admin.ask("DELETE", f"{CSRS}/{name}").status == 200
    assert "found it removed" in str(failure(lambda: make().collect(other, waiting.reference)))
    again = pending(make().sign(other))
    assert again.reference.split(" ")[0] == name
    assert "found it removed" in str(failure(lambda: make().collect(other, waiting.reference)))
    assert pending(make().collect(other, again.reference))


@pytest.mark.kube(*SERVER)
def test_what_a_signer_should_not_write(api: ApiServer, make: Make) -> None:
    """A certificate for another key, which the API server stores as it comes, is refused."""
    asked = request()
    waiting = pending(make().sign(asked))
    name = waiting.reference.split(" ")[0]
    api.admin.decide(name)
    assert api.admin.issue(name, pem(_LIVE["admin.conf"])).status == 200
    assert "wanted a certificate for the CSR's key" in str(failure(lambda: make().collect(asked, waiting.reference)))


@pytest.mark.kube(*SERVER)
def test_a_run_waits_a_little(api: ApiServer, make: Make) -> None:
    """With `wait` a run gets an answer that comes soon."""
    asked = request()

    def answer() -> None:
        while not any(one["metadata"]["name"] == name_of(asked) for one in api.admin.csrs()):
            time.sleep(0.05)
        api.admin.decide(name_of(asked))
        api.admin.issue(name_of(asked), pem(_SIGNER.issue(asked).leaf))

    thread = threading.Thread(target=answer)
    thread.start()
    assert isinstance(make(wait=timedelta(minutes=5)).sign(asked), Issued)
    thread.join()


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.kube(*SERVER)
def test_the_servers_refusals(api: ApiServer, make: Make) -> None:
    """Each says what is wrong, without the request that the server repeats, and none is made for a time too short."""
    error = failure(lambda: make().sign(tampered(request())))
    assert "spec.request" in str(error)
    assert "LS0t" not in str(error)
    assert "10 minutes or more, found 599 s" in str(
        failure(lambda: make().sign(request(validity=timedelta(seconds=599))))
    )
    assert "system:masters" in str(failure(lambda: make(signer=CLIENT_SIGNER).sign(request(MASTERS))))
    legacy = make(signer="kubernetes.io/legacy-unknown")
    assert "legacy signerName is not allowed" in str(failure(lambda: legacy.sign(request())))
    before = len(api.admin.csrs())
    assert pending(make().sign(request(validity=timedelta(minutes=10))))
    assert len(api.admin.csrs()) == before + 1


@pytest.mark.kube(*SERVER)
def test_credentials_are_read_again(api: ApiServer, make: Make, tmp_path: Path) -> None:
    """A token or a client certificate that was replaced on disk counts from the next request on; a bad one is named."""
    api.apply(manifests("ca-bridge.example.com/{name}"))
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text("nonsense")
    backend = make(url=api.url, ca_file=api.trust, token=Secret("file", str(token)))
    error = failure(lambda: backend.sign(request()))
    assert "HTTP 401" in str(error)
    assert "nonsense" not in str(error) + error.hint
    bearer = api.bearer("ca-bridge", "ca-bridge-cp-1")
    wait_for("rights that count", lambda: bearer.may("create"))
    token.write_text(bearer.token)
    assert pending(backend.sign(request()))
    assert backend.identity() == "system:serviceaccount:ca-bridge:ca-bridge-cp-1"

    pair = {name: tmp_path / name for name in ("client_cert", "client_key")}
    stranger = est.make_tls(tmp_path / "stranger")
    for path, source in zip(pair.values(), (stranger.server_cert, stranger.server_key), strict=True):
        path.write_bytes(source.read_bytes())
    backend = make(url=api.url, ca_file=api.trust, **pair)
    assert "HTTP 401" in str(failure(lambda: backend.sign(request())))
    account = "system:serviceaccount:ca-bridge:ca-bridge-cp-2"  # the admission policy takes a moment, and no other name
    for path, source in zip(pair.values(), api.pair(account, "system:masters"), strict=True):
        path.write_bytes(source.read_bytes())
    assert pending(backend.sign(request()))
    assert backend.identity() == account


@pytest.mark.kube(*SERVER)
def test_the_rights_that_setup_gives_are_the_ones_that_are_needed(api: ApiServer, make: Make, tmp_path: Path) -> None:
    """All works with the rights that `setup` prints; without `create` or `get` it says so; without `delete` the object stays."""
    api.apply(manifests("ca-bridge.example.com/{name}"))
    token = tmp_path / "token"
    token.touch(0o600)
    account = api.bearer("ca-bridge", "ca-bridge-cp-1")
    token.write_text(account.token)

    def with_verbs(*verbs: str) -> KubernetesBackend:
        rules = [{"apiGroups": ["certificates.k8s.io"], "resources": ["certificatesigningrequests"], "verbs": verbs}]
        path = "/apis/rbac.authorization.k8s.io/v1/clusterroles/ca-bridge-requester"
        assert api.admin.patch(path, {"rules": rules}).status == 200
        known = wait_until(
            lambda: {verb for verb in ("create", "get", "delete") if account.may(verb)},
            lambda found: found == set(verbs),
            timedelta(minutes=3),
            pause_seconds=0.05,
        )
        assert known == set(verbs)
        return make(url=api.url, ca_file=api.trust, token=Secret("file", str(token)))

    assert with_verbs("create", "get", "delete").check([ADMIN]) == {}
    backend = with_verbs("create", "get")
    asked = request()
    waiting = pending(backend.sign(asked))
    name = waiting.reference.split(" ")[0]
    api.admin.decide(name)
    api.admin.issue(name, pem(_SIGNER.issue(asked).leaf))
    assert isinstance(backend.collect(asked, waiting.reference), Issued)
    backend.close()
    assert api.admin.csr(name)

    backend = with_verbs("get", "delete")
    assert "HTTP 403" in str(failure(lambda: backend.sign(request())))
    assert [str(one) for one in backend.check([ADMIN])["admin.conf"]] == [
        "rights: wanted create certificatesigningrequests, got no such right of the account"
    ]
    backend = with_verbs("create", "delete")
    assert "HTTP 403" in str(failure(lambda: backend.collect(asked, waiting.reference)))
    assert "get certificatesigningrequests" in str(backend.check([ADMIN])["admin.conf"][0])


@pytest.mark.kube(*SERVER)
def test_others_may_not_ask_the_signers_of_setup(api: ApiServer) -> None:
    """The policy that `setup` prints keeps our signers for the nodes' accounts, and for no longer than agreed."""
    api.apply(manifests("policy.example.com/{name}"))
    node, admin = api.bearer("ca-bridge", "ca-bridge-cp-1"), api.client("boss", "system:masters")
    pem_text, seconds = request().csr_pem, int(VALIDITY.total_seconds())

    def ask(who: ApiClient, signer: str, **more: int) -> tuple[int, str]:
        reply = who.create_csr(pem_text, signer, ["client auth"], **more)
        return reply.status, reply.message

    ours = "policy.example.com/admin.conf"
    deadline = time.monotonic() + 120
    while ask(admin, ours)[0] == 201 and time.monotonic() < deadline:  # a policy takes a moment to count
        time.sleep(0.2)
    status, message = ask(admin, ours, expirationSeconds=seconds)
    assert (status, "only accounts of nodes may ask this signer" in message) == (422, True), message
    assert ask(node, ours, expirationSeconds=seconds)[0] == 201
    status, message = ask(node, ours, expirationSeconds=seconds + 1)
    assert (status, "longer than was agreed" in message) == (422, True), message
    assert ask(admin, "elsewhere.example.com/x")[0] == 201


@pytest.mark.attack("G16")
@pytest.mark.kube(*SERVER)
def test_an_account_deletes_its_own_requests_alone(api: ApiServer) -> None:
    """RBAC lets each of the nodes' accounts delete all; the policy that `setup` prints does not. Others' rights stay."""
    api.apply(manifests("deletes.example.com/{name}"))
    account = api.bearer("ca-bridge", "ca-bridge-cp-1")
    other = api.client("system:serviceaccount:ca-bridge:ca-bridge-cp-2", "system:masters")

    def made(who: ApiClient, signer: str = "elsewhere.example.com/x", **more: int) -> str:
        def reply() -> Reply | None:  # an account's right to ask a signer takes a moment to count
            found = who.create_csr(request().csr_pem, signer, ["client auth"], **more)
            return found if found.ok else None

        return f"{CSRS}/{wait_for('a request', reply).document['metadata']['name']}"

    theirs = [made(api.admin)]

    def refused() -> bool:  # the account's rights and the policy take a moment to count
        reply = account.ask("DELETE", theirs[-1])
        if reply.status == 200:
            theirs.append(made(api.admin))
        return reply.status == 403 and "only its own requests" in reply.message

    wait_for("the policy to count", refused)
    assert account.ask("DELETE", made(other)).status == 403
    ours = made(account, "deletes.example.com/admin.conf", expirationSeconds=int(VALIDITY.total_seconds()))
    assert account.ask("DELETE", ours).status == 200
    assert api.admin.ask("DELETE", theirs[-1]).status == 200


@pytest.mark.kube(*SERVER)
def test_an_account_asks_its_own_nodes_signers_alone(api: ApiServer) -> None:
    """Of two nodes whose names differ by a dot, neither's account may ask the other's signers, nor those of no node."""
    for node in ("cp-1", "cp.1"):
        api.apply(manifests("nodes.example.com/{node}-{usage}", node))
    accounts = {node: api.bearer("ca-bridge", f"ca-bridge-{node}") for node in ("cp-1", "cp.1")}

    def ask(node: str, signer: str) -> tuple[int, str]:
        seconds = int(VALIDITY.total_seconds())
        reply = accounts[node].create_csr(request().csr_pem, signer, ["client auth"], expirationSeconds=seconds)
        return (reply.status, reply.message.rpartition("denied request: ")[2]) if reply.status >= 400 else (201, "")

    refused = (403, "an account of a node asks only its own node's signers")
    asked = {node: f"nodes.example.com/{node}-client" for node in accounts}
    for node, foreign in (("cp-1", asked["cp.1"]), ("cp.1", asked["cp-1"]), ("cp-1", CLIENT_SIGNER)):
        for signer, wanted in ((foreign, refused), (asked[node], (201, ""))):
            found = wait_until(  # a policy and a right take a moment to count
                lambda: ask(node, signer),  # noqa: B023
                lambda one: one == wanted,  # noqa: B023
                timedelta(seconds=120),
                pause_seconds=0.2,
            )
            assert found == wanted


def manifests(signer: str, node: str = "cp-1") -> str:
    """What `ca-bridge setup kubernetes --authority ca` prints for a node."""
    ours = {name: one for name, one in _LIVE.items() if SPECS[name].authority.name == "ca"}
    wanted = SetupRequest(
        authority=AUTHORITIES["ca"], certificates=ours, validity=VALIDITY, node=node, cluster="prod",
        settings={"signer": signer},
    )  # fmt: skip
    [file] = KubernetesBackend.setup(wanted)
    assert file.name == "kubernetes-ca.yaml"
    return file.text


def test_setup_lists_what_may_be_approved() -> None:
    """Each certificate with its signer, subject and usages; objects are those of one account; an Issuer gets its role."""
    text = manifests("issuers.cert-manager.io/pki.{usage}")
    assert "#   admin.conf: issuers.cert-manager.io/pki.client" in text
    assert "#     SAN DNS kubernetes.default.svc" in text
    objects = [one for one in yaml.safe_load_all(text) if one]
    kinds = [one["kind"] for one in objects]
    assert kinds.count("ValidatingAdmissionPolicy") == 2  # one for all accounts, one for these signers
    [role] = [one for one in objects if one["kind"] == "Role"]
    assert role["metadata"] == {"name": "ca-bridge-cp-1-references-ca", "namespace": "pki"}
    assert role["rules"] == [
        {"apiGroups": ["cert-manager.io"], "resources": ["signers"], "verbs": ["reference"], "resourceNames": ["client", "server"]}
    ]  # fmt: skip
    assert "requests-ca" not in manifests(CLIENT_SIGNER)  # others of that cluster use Kubernetes' own signers, too


def test_the_next_nodes_file_leaves_the_first_ones_signers_as_they_were() -> None:
    """Both are applied to one cluster, where an object replaces another one of its name: reserved, with approvers."""
    applied = {}
    for node in ("cp-1", "cp-2"):
        for one in filter(None, yaml.safe_load_all(manifests("ca-bridge.example.com/{node}-{usage}", node))):
            applied[one["kind"], one["metadata"].get("namespace"), one["metadata"]["name"]] = one
    policies = {name for kind, _, name in applied if kind == "ValidatingAdmissionPolicy"}
    assert {
        one["spec"]["policyName"] for (kind, *_), one in applied.items() if kind.endswith("PolicyBinding")
    } == policies
    for node in ("cp-1", "cp-2"):
        conditions = [
            str(applied["ValidatingAdmissionPolicy", None, name]["spec"]["matchConditions"]) for name in policies
        ]
        assert sum(f"ca-bridge.example.com/{node}-client" in text for text in conditions) == 1
        roles = {name for (kind, _, name), one in applied.items()
                 if kind == "ClusterRole" and f"ca-bridge.example.com/{node}-client" in str(one)}  # fmt: skip
        assert roles == {f"ca-bridge-{node}:ca", f"ca-bridge-{node}-approver-ca"}


@pytest.mark.parametrize("node", ["gateway", "CP-1", "cp_1", "cp..1", ""])
def test_a_node_whose_account_would_be_anothers_is_refused(node: str) -> None:
    """The gateway's account stays the gateway's, and no two names become one; a name with a part of it is good."""
    with pytest.raises(BridgeError, match="other than gateway"):
        manifests("ca-bridge.example.com/{name}", node)
    assert "{name: ca-bridge-gateway-1, namespace: ca-bridge}" in manifests("ca-bridge.example.com/{name}", "gateway-1")


# --------------------------------------------------------------------------------------------- answers that are rare


class _Handler(BaseHTTPRequestHandler):
    """Gives the test's answer once it has read a whole request."""

    answers: list[tuple[int, Mapping[str, str], bytes]]

    def do_POST(self) -> None:
        """The next answer."""
        spec = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == CSRS
        assert spec["kind"] == "CertificateSigningRequest"
        self._answer()

    def _answer(self) -> None:
        status, headers, body = self.answers.pop(0)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        """Likewise."""
        self._answer()

    def log_message(self, *args: object) -> None:
        """Nothing."""


def status_of(code: int, message: str) -> bytes:
    """As the API server words it."""
    return json.dumps({"kind": "Status", "status": "Failure", "message": message, "code": code}).encode()


@pytest.mark.parametrize(
    ("status", "headers", "kind", "said"),
    [
        (429, {"Retry-After": "7"}, BackendUnavailableError, "too many"),
        (410, {}, BackendUnavailableError, "gone"),
        (500, {}, BackendUnavailableError, "etcd is away"),
        (500, {}, BackendRefusedError, "etcdserver: request is too large"),
        (503, {}, BackendUnavailableError, "shutting down"),
        (504, {}, BackendUnavailableError, "timeout"),
        (413, {}, BackendRefusedError, "limit is 3145728"),
        (301, {"Location": "https://elsewhere.example.com"}, BackendRefusedError, "moved"),
        (404, {}, BackendRefusedError, "the server could not find the requested resource"),
    ],
)
def test_a_status(tmp_path: Path, status: int, headers: Mapping[str, str], kind: type[BackendError], said: str) -> None:
    """A temporary status is "later", after the server's own delay; any other is a refusal."""
    with answering(tmp_path, [(status, headers, status_of(status, said))]) as backend:
        error = failure(lambda: backend.sign(request()), kind)
    assert f"HTTP {status}: {said}" in str(error)
    if status == 429:
        assert isinstance(error, BackendUnavailableError)
        assert error.retry_after_seconds == 7


@pytest.mark.parametrize("body", [b"<html>Log in</html>", b"[]", b"{" * 9000, b"\xff", b""])
def test_what_is_no_api_server(tmp_path: Path, body: bytes) -> None:
    """A page, or anything else without an object in JSON, is not quoted."""
    with answering(tmp_path, [(403, {}, body)]) as backend:
        assert "HTTP 403: no object in JSON" in str(failure(lambda: backend.sign(request())))


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (401, status_of(401, "Unauthorized")),
        (403, status_of(403, "forbidden")),
        (302, b""),
        (200, b"<html>Log in</html>"),
        (404, b"<html>nothing here</html>"),
    ],
)
def test_what_is_no_verdict_keeps_an_order(tmp_path: Path, status: int, body: bytes) -> None:
    """Lost rights, or a page before the API server, do not say that the object is gone."""
    times = 2 if status == 401 else 1  # with the credentials as they are then
    with answering(tmp_path, [(status, {}, body)] * times) as backend:
        failure(lambda: backend.collect(request(), "ca-bridge-x 17"), NoVerdictError)
    with answering(tmp_path, [(404, {}, status_of(404, "not found"))]) as backend:
        assert not isinstance(failure(lambda: backend.collect(request(), "ca-bridge-x 17")), NoVerdictError)


def test_the_token_is_never_repeated(tmp_path: Path) -> None:
    """A server that quotes what we sent is not quoted."""
    with answering(tmp_path, [(403, {}, status_of(403, "who is secret-token?"))]) as backend:
        error = failure(lambda: backend.sign(request()))
    assert "who is …?" in str(error)


@contextlib.contextmanager
def answering(directory: Path, answers: list[tuple[int, Mapping[str, str], bytes]]) -> Iterator[KubernetesBackend]:
    """A backend and a double, which has to be asked for all of these answers."""
    tls = est.make_tls(directory / "tls")
    left = list(answers)
    handler = type("Handler", (_Handler,), {"answers": left})
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.server_cert, tls.server_key)
    token = directory / "token"
    token.touch(0o600)
    token.write_text("secret-token\n")
    with LoopbackServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        settings = KubernetesSettings(
            signer=OWN_SIGNER, url=f"https://127.0.0.1:{server.server_port}", ca_file=tls.ca,
            token=Secret("file", str(token)), timeout=timedelta(minutes=3),
        )  # fmt: skip
        try:
            with contextlib.closing(KubernetesBackend.from_settings(settings)) as backend:
                yield backend
        finally:
            server.shutdown()
            thread.join()
    assert left == []


# ----------------------------------------------------------------------------------------------------------- settings


def test_the_example_is_whole(tmp_path: Path) -> None:
    """`config/kubernetes/config.toml` is read as it is, and names every key."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for key in ("url", "ca_file", "client_cert", "client_key", "kubeconfig", "wait", "delete", "timeout", "retry_for"):
        assert f"{key} = " in text
    settings = parse(text, tmp_path / "config.toml")
    found = registry.configured(settings, settings.authorities)
    assert {one.type_name for one in found.values()} == {"kubernetes"}


@pytest.mark.parametrize(
    ("keys", "wrong"),
    [
        ({}, "url"),
        ({"url": "http://x", "token": Secret("file", "/t")}, "url"),
        ({"url": "https://u:p@x", "token": Secret("file", "/t")}, "url"),
        ({"url": "https://x"}, "token_file"),
        ({"url": "https://x", "token": Secret("file", "/t"), "client_cert": Path("/c"), "client_key": Path("/k")}, "token_file"),
        ({"url": "https://x", "client_cert": Path("/c")}, "client_key"),
        ({"kubeconfig": Path("/k"), "url": "https://x"}, "kubeconfig"),
        ({"kubeconfig": Path("/k"), "signer": "no-slash"}, "signer"),
        ({"kubeconfig": Path("/k"), "signer": "Example.com/x"}, "signer"),
        ({"kubeconfig": Path("/k"), "signer": "example/x"}, "signer"),
        ({"kubeconfig": Path("/k"), "signer": "example.com/a/b"}, "signer"),
        ({"kubeconfig": Path("/k"), "signer": "example.com/{what}"}, "signer"),
    ],
)  # fmt: skip
def test_settings_that_contradict_themselves(keys: dict[str, Any], wrong: str) -> None:
    """Each is named by its key; the twins without the mistake are in the tests above."""
    assert wrong in {one.key for one in KubernetesSettings(**{"signer": OWN_SIGNER, **keys}).problems()}


@pytest.mark.kube(*SERVER)
def test_a_kubeconfigs_forms(api: ApiServer, tmp_path: Path) -> None:
    """Embedded data or files beside it; a plug-in, a proxy, no CA, half a pair, or no verification are said to be wrong."""
    good = json.loads(api.kubeconfig("x").read_text())
    access = parse_kubeconfig(json.dumps(good).encode(), tmp_path)
    assert access.url == api.url
    (tmp_path / "ca.crt").write_bytes(access.trust)
    (tmp_path / "t").write_text("abc")
    by_file = json.loads(json.dumps(good))
    by_file["clusters"][0]["cluster"] = {"server": api.url, "certificate-authority": "ca.crt"}
    by_file["users"][0]["user"] = {"tokenFile": "t"}
    found = parse_kubeconfig(json.dumps(by_file).encode(), tmp_path)
    assert found.trust == access.trust
    assert isinstance(found.token, Secret)
    assert found.token.read() == "abc"

    def broken(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> str:
        copy = json.loads(json.dumps(good))
        change(copy["clusters"][0]["cluster"], copy["users"][0]["user"])
        with pytest.raises(ValueError) as e:
            parse_kubeconfig(json.dumps(copy).encode(), tmp_path)
        return str(e.value)

    assert "exec" in broken(lambda _, user: user.update(exec={"command": "x"}))
    assert "insecure-skip" in broken(lambda cluster, _: cluster.update({"insecure-skip-tls-verify": True}))
    assert "proxy-url" in broken(lambda cluster, _: cluster.update({"proxy-url": "http://x"}))
    assert "no certificate-authority" in broken(lambda cluster, _: cluster.pop("certificate-authority-data"))
    assert "not both" in broken(lambda _, user: user.pop("client-key-data"))
    assert "neither" in broken(lambda _, user: user.clear())
    assert "base64" in broken(lambda _, user: user.update({"client-key-data": "!"}))
    assert "https" in broken(lambda cluster, _: cluster.update(server="http://x"))
    for data in (b"", b"- a", b"\x00", b"a: [", b"current-context: x"):
        with pytest.raises(ValueError):
            parse_kubeconfig(data, tmp_path)
    path = tmp_path / "bad.conf"
    path.write_text("users: secret-in-a-file [")
    with pytest.raises(SettingsError) as e:
        KubernetesBackend.from_settings(KubernetesSettings(signer=OWN_SIGNER, kubeconfig=path))
    assert "secret" not in str(e.value)


@pytest.mark.kube(*SERVER)
def test_what_doctor_finds(make: Make) -> None:
    """A signer of Kubernetes' own that gives other usages, system:masters, and a time that is too short."""
    backend = make(signer=CLIENT_SIGNER)
    assert set(backend.check([ADMIN, APISERVER])) == {"apiserver"}

    def wanted(spec: CertificateSpec, validity: timedelta) -> PlannedCertificate:
        live = _LIVE[spec.name]
        return PlannedCertificate(
            spec=spec, certificate=live, key="ecdsa-p256", validity=validity, at_least=timedelta(minutes=1)
        )

    assert backend.check_whole([wanted(ADMIN, VALIDITY)]) == {}
    assert set(backend.check_whole([wanted(MASTERS, VALIDITY)])) == {"super-admin.conf"}
    assert set(backend.check_whole([wanted(ADMIN, timedelta(minutes=9))])) == {"admin.conf"}
    assert "kube-apiserver-client" in backend.advice(ADMIN)
