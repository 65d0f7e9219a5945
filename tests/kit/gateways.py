"""A gateway beside a real API server (`tests.kit.cluster_api`): its settings, rights, CA, and the program itself."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import requests
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bridge.gateway.rules import CLIENT, CLIENT_KUBELET, SERVING
from bridge.specs import AUTHORITIES, SPECS
from tests.kit.api_client import CSRS
from tests.kit.cluster_api import BOOTSTRAP_GROUP, ClusterApi
from tests.kit.loopback import free_port
from tests.kit.measured import peak_mb
from tests.kit.nodes import wait_for
from tests.kit.openbao import OpenBao
from tests.kit.opensslca import make_ca_directory
from tests.kit.pki import ADDRESS, EXTRA_SANS, NODE, PKI_SPECS, Pki

ROOT = Path(__file__).parents[2]
DOMAIN = "ca-bridge.internal"
OWN = tuple(f"{DOMAIN}/{name}" for name in SPECS)
#: Those that docs/kubernetes-backend.md has.
PAGES = tuple(f"ca-bridge.example.com/{name}" for name in SPECS)
USER = "ca-bridge-gateway"
USAGES: Mapping[str, list[str]] = {
    CLIENT_KUBELET: ["digital signature", "client auth"],
    SERVING: ["digital signature", "server auth"],
    CLIENT: ["digital signature", "client auth"],
}

POLICY = f"""\
[allow]
clusters = ["kubernetes"]
nodes = ["*"]
max_validity = "30d"
masters = ["super-admin.conf"]

[signer."{CLIENT_KUBELET}"]
bootstrap_groups = ["{BOOTSTRAP_GROUP}"]
max_validity = "7d"

[signer."{SERVING}"]
max_validity = "7d"

[signer."{CLIENT}"]
max_validity = "24h"
[signer."{CLIENT}".grant.developers]
users = ["alice"]
groups = ["corp:issuers"]
subjects = ["O=developers,CN={{user}}", "O=developers,O=readers,CN={{user}}", "CN=robot"]

[signer."{DOMAIN}/apiserver"]
[signer."{DOMAIN}/apiserver".grant.it]
users = ["system:node:{{node}}", "kubernetes-super-admin"]
[signer."{DOMAIN}/controller-manager.conf"]
[signer."{DOMAIN}/controller-manager.conf".grant.it]
users = ["system:node:{{node}}"]
[signer."{DOMAIN}/super-admin.conf"]
[signer."{DOMAIN}/super-admin.conf".grant.it]
groups = ["system:masters"]
[certificate.apiserver]
sans = ["{{node}}", "kubernetes", "kubernetes.default", "api.example.com", "10.96.0.1"]
"""

INVENTORY = """\
[cluster]
endpoints = ["api.example.com", "203.0.113.5"]
service_networks = ["10.96.0.0/16"]

[node.cp1]
control_plane = true
addresses = ["203.0.113.11"]
[node.cp2]
control_plane = true
addresses = ["203.0.113.12", "2001:db8::12"]
names = ["cp2.example.com"]
"""


def workers(*names: str, more: str = "") -> str:
    """Entries of the inventory; the address of `wN` ends with N."""
    return "".join(
        f'[node.{name}]\naddresses = ["{address_of(name)}"]\nnames = ["{name}.example.com"]\n{more}' for name in names
    )


def address_of(worker: str) -> str:
    """The address of the node `wN`."""
    number = int(worker[1:])
    return f"198.51.{number // 256}.{number % 256}"


@dataclass(kw_only=True)
class Place:
    """What a gateway works with."""

    cluster: ClusterApi
    directory: Path
    user: str = USER
    policy: str = POLICY
    inventory: str = INVENTORY
    tables: list[str] = field(default_factory=list)  #: Of the CA.
    gateway: dict[str, Any] = field(default_factory=dict)  #: More keys of the table.
    trust: Path | None = None  #: Where the CAs' certificates are; None: they are the cluster's own.
    program: Sequence[str] = (str(Path(sys.executable).with_name("ca-bridge")),)

    def write(self) -> Path:
        """The settings file; policy and inventory beside it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.write_policy(self.policy)
        self.write_inventory(self.inventory)
        keys = {
            "policy": str(self.directory / "policy.toml"),
            "inventory": str(self.directory / "inventory.toml"),
            "kubeconfig": str(self.cluster.kubeconfig(self.user)),
            "state_dir": str(self.directory / "state"),
            "lease_duration": "1m",  # a stalled machine does not lose it
            **self.gateway,
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        text = "\n".join(
            [f'[node]\npki_dir = "{self.trust or self.cluster.pki_dir}"', "[gateway]", *lines, *self.tables, ""]
        )
        return written(self.directory / "config.toml", text)

    def write_policy(self, text: str) -> None:
        """Another one."""
        written(self.directory / "policy.toml", text)

    def write_inventory(self, text: str) -> None:
        """Another one."""
        written(self.directory / "inventory.toml", text)

    def with_openssl(self) -> Place:
        """A directory of `openssl ca`."""
        ca = self.directory / "ca"
        make_ca_directory(ca, self.cluster.ca.certificate_pem, self.cluster.ca.key_pem)
        self.tables.append(f'[backend.ca]\ntype = "openssl"\ndir = "{ca}"\n[authority.ca]\nbackend = "ca"\n')
        return self

    def with_vault(self, bao: OpenBao, mount: str = "pki") -> Place:
        """A PKI engine of OpenBao; one role for each kind of certificate."""
        bao.add_ca(mount, self.cluster.ca.certificate_pem, self.cluster.ca.key_pem)
        bao.add_roles(mount, ROLES)
        token = written(self.directory / f"{mount}.token", bao.root_token, 0o600)
        self.tables.append(
            f'[backend.ca]\ntype = "vault"\nurl = "{bao.url}"\ntimeout = "1m"\n'
            f'[backend.ca.auth]\ntoken_file = "{token}"\n[authority.ca]\nbackend = "ca"\nmount = "{mount}"\nrole = "kubeadm-{{name}}"\n'
        )
        return self

    def start(self, name: str = "one", **environment: str) -> Gateway:
        """The program, in a state directory of its own."""
        config = self.directory / f"config-{name}.toml"
        port = free_port()
        state = self.directory / f"state-{name}"
        text = self.write().read_text().replace(f'"{self.directory / "state"}"', f'"{state}"')
        text = text.replace("[gateway]\n", f'[gateway]\nlisten = "127.0.0.1:{port}"\n')
        written(config, text)
        command = [*self.program, "gateway", "--config", str(config)]
        log = self.directory / f"{name}.log"
        with log.open("ab") as file:
            process = subprocess.Popen(
                [*command, "--log-format", "json"], stdout=file, stderr=file, env={**os.environ, **environment}
            )
        return Gateway(process=process, port=port, log=log, state_dir=state, config=config)


def written(path: Path, text: str, mode: int = 0o644) -> Path:
    """A file, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    beside.write_text(text)
    beside.chmod(mode)
    beside.rename(path)
    return path


_ROLE = {
    "key_type": "any", "key_usage": ["DigitalSignature", "KeyEncipherment"], "ext_key_usage": [],
    "basic_constraints_valid_for_non_ca": True, "allow_any_name": False, "allow_bare_domains": True,
    "allow_glob_domains": True, "allow_localhost": False, "cn_validations": ["hostname"], "enforce_hostnames": False,
    "use_csr_common_name": True, "use_csr_sans": True, "require_cn": True, "max_ttl": "720h", "no_store": True,
    "server_flag": False, "client_flag": False, "not_before_duration": "30s",
}  # fmt: skip
#: As docs/gateway.md has them.
ROLES: Mapping[str, Mapping[str, object]] = {
    "kubeadm-kubelet-client": {
        **_ROLE, "allowed_domains": ["system:node:*"], "organization": ["system:nodes"], "client_flag": True,
        "allow_ip_sans": False,
    },
    "kubeadm-kubelet-serving": {
        **_ROLE, "allowed_domains": ["system:node:*", "*"], "organization": ["system:nodes"], "server_flag": True,
    },
    "kubeadm-user": {**_ROLE, "allowed_domains": ["*"], "organization": ["developers"], "client_flag": True},
    "kubeadm-apiserver": {**_ROLE, "allowed_domains": ["*"], "server_flag": True},
}  # fmt: skip


@dataclass(kw_only=True)
class Gateway:
    """A running one."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    state_dir: Path
    config: Path

    def page(self, name: str) -> tuple[int, str]:
        """Status and text of a status page; 0 while no process listens."""
        try:
            answer = requests.get(f"http://127.0.0.1:{self.port}/{name}", timeout=180)
        except requests.exceptions.ConnectionError:
            return 0, ""
        return answer.status_code, answer.text

    def is_working(self) -> bool:
        """It has the lease, and a watch."""
        status, text = self.page("readyz")
        return status == 200 and "this replica works" in text

    def until(self, done: Callable[[], object], seconds: float = 180, what: str = "") -> None:
        """Wait, with its log where it takes too long."""
        deadline = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None, self.text()[-3000:]
            assert time.monotonic() < deadline, f"{what}\n{self.text()[-4000:]}"
            time.sleep(0.03)

    def until_working(self) -> Gateway:
        """Ready."""
        self.until(self.is_working, what="wanted a gateway that works")
        return self

    def text(self) -> str:
        """Its log."""
        return self.log.read_text()

    def lines(self) -> list[dict[str, Any]]:
        """Its log's lines, each of which is JSON."""
        return _whole_lines(self.log)

    def audit(self) -> list[dict[str, Any]]:
        """The record, as far as it has begun."""
        file = self.state_dir / "audit.jsonl"
        return _whole_lines(file) if file.exists() else []

    def metric(self, name: str, /, **labels: str) -> float:
        """One number."""
        _, text = self.page("metrics")
        for line in text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.startswith(f"ca_bridge_gateway_{name}") and all(f'{k}="{v}"' in head for k, v in labels.items()):
                return float(value)
        return 0.0

    def peak_mb(self) -> float:
        """The most memory that it had."""
        return peak_mb(self.process.pid)

    def kill(self) -> None:
        """As a power cut would."""
        self.process.kill()
        self.process.wait()

    def end(self, seconds: float = 180) -> int:
        """As systemd would; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """Lines of JSON; a last one without its end is being written."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


@contextlib.contextmanager
def running(place: Place, name: str = "one", **environment: str) -> Iterator[Gateway]:
    """A gateway that works, and gives its lease back at the end, since the next one would wait for it."""
    with begun(place, name, **environment) as gateway:
        yield gateway.until_working()
        if gateway.process.poll() is None:
            gateway.end()


@contextlib.contextmanager
def begun(place: Place, name: str, **environment: str) -> Iterator[Gateway]:
    """A gateway that may have to stand by, and is killed at the end."""
    gateway = place.start(name, **environment)
    try:
        yield gateway
    finally:
        if gateway.process.poll() is None:
            gateway.kill()


def for_control_planes(cluster: ClusterApi, pki: Pki, directory: Path, policy: str) -> Place:
    """Settings of a gateway that signs by `openssl ca` with a cluster's three CAs, and proves answers by their certificates."""
    tables = []
    for name in AUTHORITIES:
        ca = make_ca_directory(directory / "cas" / name, *pki.ca_pem(name))
        tables.append(f'[backend.{name}]\ntype = "openssl"\ndir = "{ca}"\n[authority.{name}]\nbackend = "{name}"\n')
    inventory = f"""\
[cluster]
endpoints = ["api.example.com"]
service_networks = ["10.96.0.0/12"]
[node.{NODE}]
control_plane = true
addresses = ["{ADDRESS}"]
"""
    return Place(
        cluster=cluster, directory=directory, policy=policy, inventory=inventory, tables=tables, trust=pki.ca_dir
    )


def page_policy(approval: str = "gateway") -> str:
    """The policy of docs/kubernetes-backend.md, with its last two tables for each certificate, and kubeadm's extra SANs."""
    text = (ROOT / "docs/kubernetes-backend.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"```toml\n(# the gateway's policy.*?)```", text, re.DOTALL)
    begin, mark, table = (
        str(found).replace('"10.96.0.1"]', f'"10.96.0.1", {json.dumps(EXTRA_SANS)[1:]}').partition("[signer.")
    )
    tables = (f"{mark}{table}".replace("example.com/apiserver", f"example.com/{name}") for name in PKI_SPECS)
    return begin + "".join(one.replace('"]\n', f'"]\napproval = "{approval}"\n', 1) for one in tables)


def grant_rights(cluster: ClusterApi) -> None:
    """What docs/gateway.md says that the gateway needs, and no more; and for requesters what kubeadm gives them."""
    admin = cluster.client()
    csrs = "certificates.k8s.io"
    rules = [
        {"apiGroups": [csrs], "resources": ["certificatesigningrequests"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [csrs], "resources": ["certificatesigningrequests/status"], "verbs": ["patch"]},
        {"apiGroups": [csrs], "resources": ["certificatesigningrequests/approval"], "verbs": ["patch"]},
        {"apiGroups": [csrs], "resources": ["signers"], "verbs": ["approve", "sign"],
         "resourceNames": [CLIENT_KUBELET, SERVING, CLIENT, *OWN, *PAGES]},
        {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list"]},
    ]  # fmt: skip
    add_role(admin, USER, rules, {"kind": "User", "name": USER})
    lease = [{"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["get", "update", "create"]}]
    add_role(admin, f"{USER}-lease", lease, {"kind": "User", "name": USER}, namespace="kube-system")
    create = [{"apiGroups": [csrs], "resources": ["certificatesigningrequests"], "verbs": ["create", "get", "list"]}]
    all_users = {"kind": "Group", "name": "system:authenticated"}
    add_role(admin, "all-users-ask", create, all_users)
    wait_for("rights that count", lambda: cluster.client("somebody").may("create"))


def add_role(admin: Any, name: str, rules: list[Any], subject: dict[str, str], namespace: str = "") -> None:
    """A role that a subject has; in one namespace, or in the whole cluster."""
    kind = "Role" if namespace else "ClusterRole"
    base = "/apis/rbac.authorization.k8s.io/v1" + (f"/namespaces/{namespace}" if namespace else "")
    admin.create(f"{base}/{kind.lower()}s", {"metadata": {"name": name}, "rules": rules})
    body = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", **subject}],
    }
    admin.create(f"{base}/{kind.lower()}bindings", body)


# --- requests ---------------------------------------------------------------------------------------------------------


def new_key() -> ec.EllipticCurvePrivateKey:
    """As a kubelet makes one."""
    return ec.generate_private_key(ec.SECP256R1())


def csr_pem(
    subject: Sequence[tuple[x509.ObjectIdentifier, str]] | x509.Name,
    sans: Sequence[x509.GeneralName] = (),
    key: Any = None,
) -> bytes:
    """A CSR."""
    name = subject if isinstance(subject, x509.Name) else x509.Name([x509.NameAttribute(*one) for one in subject])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    if sans:
        builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=False)
    key = key or new_key()
    algorithm = hashes.SHA256() if hasattr(key, "curve") or hasattr(key, "key_size") else None
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.PEM)


def node_subject(node: str) -> list[tuple[x509.ObjectIdentifier, str]]:
    """As a kubelet has it."""
    return [(NameOID.ORGANIZATION_NAME, "system:nodes"), (NameOID.COMMON_NAME, f"system:node:{node}")]


def body(
    pem: bytes, signer: str, *, usages: Sequence[str] | None = None, seconds: int | None = None, name: str = ""
) -> dict[str, Any]:
    """An object to create."""
    spec: dict[str, Any] = {
        "request": base64.b64encode(pem).decode(),
        "signerName": signer,
        "usages": list(usages if usages is not None else USAGES.get(signer, ["digital signature", "server auth"])),
    }
    if seconds is not None:
        spec["expirationSeconds"] = seconds
    metadata = {"name": name} if name else {"generateName": "csr-"}
    return {
        "apiVersion": "certificates.k8s.io/v1",
        "kind": "CertificateSigningRequest",
        "metadata": metadata,
        "spec": spec,
    }


def read(cluster: ClusterApi, name: str) -> dict[str, Any]:
    """An object as it is."""
    found: dict[str, Any] = cluster.client().get(f"{CSRS}/{name}")
    return found


def conditions(document: Mapping[str, Any]) -> set[str]:
    """Types of those that are true."""
    return {one["type"] for one in document["status"].get("conditions", []) if one["status"] == "True"}


def chain(document: Mapping[str, Any]) -> list[x509.Certificate]:
    """The chain of `status.certificate`; none without one."""
    data = document["status"].get("certificate")
    return x509.load_pem_x509_certificates(base64.b64decode(data)) if data else []


State = Literal["signed", "denied", "failed", "open"]


def state_of(document: Mapping[str, Any]) -> State:
    """What has become of an object."""
    found = conditions(document)
    if document["status"].get("certificate"):
        return "signed"
    return "denied" if "Denied" in found else "failed" if "Failed" in found else "open"
