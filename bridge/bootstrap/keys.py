"""Keys and CSRs of a new node, made by `kubeadm certs generate-csr`, or for a worker by us; no key leaves the node."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from bridge.bootstrap import live, servers_of, specs_of
from bridge.bootstrap.desired import DesiredNode
from bridge.bootstrap.orders import NewNode, Order, OrderError
from bridge.errors import BridgeError, Exit, converted
from bridge.node import kubeconfig
from bridge.node.kubeadm_config import KubeadmConfig, KubeadmConfigError
from bridge.node.kubeconfig import KubeconfigError
from bridge.node.pairs import is_sa_pair
from bridge.pki import csr
from bridge.pki.certificates import common_names, spki
from bridge.pki.csr import Naming, general_name, generate_key, subject_of
from bridge.pki.kubeadm_names import NoFactError, naming, sample
from bridge.specs import KEY_ALGORITHMS, KUBELET_CONF, KUBELET_SERVER, SPECS, CertificateSpec, KeyAlgorithm
from bridge.system.files import Attributes, reasons, write_staged
from bridge.system.paths import read_present
from bridge.system.run_command import OutputLines, run_logged

#: Enough for a dozen RSA keys of 4096 bits on a slow machine.
_LIMIT = timedelta(minutes=5)
_SCRATCH = "generate-csr-"
_ERROR = "error: "
#: How kubeadm names the document with the error.
_UNMARSHALING = re.compile(
    r'error unmarshaling configuration schema\.GroupVersionKind\{.*?Kind:"(\w+)"\}: (?:strict decoding error: )?'
)


class KubeadmError(BridgeError):
    """kubeadm could not run, or did not make what we need."""

    hint = "the kubeadm of the version that will run has to be in PATH, or named with --kubeadm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """One key and its CSR."""

    csr_pem: bytes
    key_pem: bytes = field(repr=False)
    server: str = ""  #: The API server of the key's kubeconfig; empty if it has none.


def clear(state_dir: Path) -> None:
    """Remove what an interrupted run of kubeadm has left; no CA has seen its CSRs."""
    for path in state_dir.glob(f"{_SCRATCH}*"):
        shutil.rmtree(path)


def by_kubeadm(
    program: str, version: str, config: bytes, specs: Sequence[CertificateSpec], state_dir: Path
) -> dict[str, Made]:
    """Have kubeadm make a control-plane node's keys and CSRs, and drop those outside `specs`, as an external etcd's."""
    _assert_version(program, version)
    with tempfile.TemporaryDirectory(dir=state_dir, prefix=_SCRATCH) as name:  # 0700
        scratch = Path(name)
        file, pki, kubeconfigs = scratch / "kubeadm.yaml", scratch / "pki", scratch / "kubeconfigs"
        write_staged(file, config, Attributes.private())
        _assert_valid(program, file)
        words = [program, "certs", "generate-csr", "--config", str(file)]
        _run([*words, "--cert-dir", str(pki), "--kubeconfig-dir", str(kubeconfigs)])
        listed = [spec for spec in specs if spec.listed or spec.name == KUBELET_CONF]
        return {spec.name: _read_pair(spec, pki, kubeconfigs) for spec in listed}


def _run(words: Sequence[str]) -> list[str]:
    failure, lines = _output_of(words)
    if failure:
        hint = "" if lines else None  # it ran, and its own message says what is wrong
        raise KubeadmError(f"{' '.join(words[:3])} {failure}; it said: {_error_message(lines)}", hint=hint)
    return lines


def _output_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """Run kubeadm, and return why it failed (empty: it did not), and its output."""
    lines: list[str] = []
    ended = run_logged(words, {}, _LIMIT, OutputLines(lines.append))
    return ended.failure, lines


def _error_message(lines: Sequence[str]) -> str:
    """Return kubeadm's error message, without its remark on stack traces."""
    last = next((line for line in reversed(lines) if line.strip()), "nothing")
    error = next((line for line in lines if line.startswith(_ERROR)), last).removeprefix(_ERROR)
    return _UNMARSHALING.sub(r"\1: ", error)


def _assert_valid(program: str, file: Path) -> None:
    """Validate the configuration, since `generate-csr` only warns of a mistyped key and leaves its names out."""
    failure, lines = _output_of([program, "config", "validate", "--config", str(file)])
    if failure:
        raise KubeadmConfigError(
            f"wanted a configuration that {program} takes, found {_error_message(lines)}",
            hint="correct it and run this again; nothing has been made or asked for",
        )


def _assert_version(program: str, version: str) -> None:
    """Refuse a kubeadm of another version, since it decides the certificates' subjects."""
    lines = _run([program, "version", "-o", "short"])
    found = next((line.strip() for line in lines if re.match(r"v\d", line.strip())), "no version")
    if _minor(found) != _minor(version):
        raise KubeadmError(f"{program}: wanted the kubeadm of kubernetesVersion {version}, found {found}")


def _minor(version: str) -> list[str]:
    return version.removeprefix("v").split(".")[:2]


def _read_pair(spec: CertificateSpec, pki: Path, kubeconfigs: Path) -> Made:
    if not spec.kubeconfig:
        return Made(csr_pem=_read(pki / f"{spec.base}.csr"), key_pem=_read(pki / f"{spec.base}.key"))
    text = _read(kubeconfigs / spec.base)
    with converted(KubeconfigError, KubeadmError, f"wanted {spec.base} of kubeadm, found: "):
        key, server = kubeconfig.key_data(text), kubeconfig.parse(text).server
    if not key or not server:
        missing = "server" if key else "key"
        raise KubeadmError(f"{spec.base} of kubeadm has no {missing}")
    return Made(csr_pem=_read(kubeconfigs / f"{spec.base}.csr"), key_pem=key, server=server)


def _read(path: Path) -> bytes:
    with reasons(KubeadmError, f"wanted {path.name} of kubeadm, found"):
        return read_present(path)


def made_for(wanted: Naming, algorithm: KeyAlgorithm, server: str = "") -> Made:
    """Make a key and its CSR; `server` is the API server of its kubeconfig."""
    key = generate_key(algorithm)
    return Made(csr_pem=csr.build_for(wanted, key), key_pem=csr.key_pem(key), server=server)


def kubelets(node: str, sans: tuple[x509.GeneralName, ...] = ()) -> Naming:
    """Return a kubelet's subject, as kubeadm and the signer kubernetes.io/kubelet-serving require it, and SANs."""
    return Naming(subject=subject_of(f"system:node:{node}", ("system:nodes",)), sans=sans)


def algorithm_of(made: Mapping[str, Made]) -> KeyAlgorithm:
    """Return the algorithm of kubeadm's keys, for the keys that we make."""
    first = next(iter(made.values()))
    key = x509.load_pem_x509_csr(first.csr_pem).public_key()
    if (algorithm := csr.known_algorithm(key)) is not None:
        return algorithm
    raise KubeadmError(f"wanted keys of {', '.join(KEY_ALGORITHMS)}, found {csr.algorithm_name(key)}")


def assert_fits(made: Mapping[str, Made], node: str) -> None:
    """Refuse a CSR that does not match its key, or lacks the CN of its certificate."""
    for name, pair in made.items():
        request = x509.load_pem_x509_csr(pair.csr_pem)
        key = csr.load_key(pair.key_pem, request.public_key()).public_key()
        if spki(key) != spki(request.public_key()):
            raise KubeadmError(f"{name}: wanted a CSR of its key, found another key's")
        names = common_names(request.subject)
        wanted = [text.replace("{node}", node) for text in SPECS[name].common_names]
        if len(names) != 1 or names[0] not in wanted:
            raise KubeadmError(f"{name}: wanted a CSR for {' or '.join(wanted)}, found one for {', '.join(names)}")


class ForeignSaError(BridgeError):
    """`sa.key` and `sa.pub` are missing, do not match, or are not the cluster's."""

    exit_code = Exit.USAGE
    hint = "copy both from another control-plane node: its tokens are valid only with the same pair"


def sa_public_pem(key: csr.PrivateKey) -> bytes:
    """Return the public key in the form of `sa.pub`."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def sa_in_place(desired: DesiredNode) -> tuple[bytes, bytes] | None:
    """Return the node's service account pair; None: neither file exists."""
    places = desired.places
    key, public = live(places.sa_key), live(places.sa_public)
    if key is None and public is None:
        return None
    if key is None or public is None:
        raise ForeignSaError(f"{places.sa_key}: wanted sa.key and sa.pub, or none of them, found one of the two")
    if not is_sa_pair(key, public):
        raise ForeignSaError(f"{places.sa_public}: wanted the public key of sa.key, found another one")
    if desired.sa is not None and key != desired.sa[0]:
        raise ForeignSaError(f"{places.sa_key}: wanted the other nodes' service account key, found another one")
    return key, public


def assert_sa_at_hand(desired: DesiredNode) -> None:
    """Make sure, before a CA is asked, that a further control-plane node has the cluster's key."""
    if desired.role == "worker" or sa_in_place(desired) is not None:
        return
    if desired.role == "control-plane" and desired.sa is None:
        raise ForeignSaError(
            "the service account key is missing; another control-plane node has it",
            hint="--shared - with what `ca-bridge bootstrap share` prints there, or sa.key and sa.pub copied to "
            f"{desired.places.pki} (mode 0600) over a safe channel",
        )


def expected_certificates(order: Order, now: datetime) -> dict[str, dict[str, x509.Certificate]]:
    """Return samples of a new node's certificates, without a CA's signature, by authority and name."""
    node = order.node
    if node is None:
        raise OrderError("the order names no node")
    certificates: dict[str, dict[str, x509.Certificate]] = {}
    servers = servers_of(order.cluster, Path(order.cluster.certificates_dir or "/etc/kubernetes/pki"))
    for spec in specs_of(node.role, order.cluster.external_etcd, servers):
        try:
            names = _naming(spec, node, order.cluster)
        except (NoFactError, KubeadmConfigError) as e:
            raise OrderError(f"{node.name}: {e}", hint=e.hint) from None
        certificates.setdefault(spec.authority.name, {})[spec.name] = sample(names, now)
    return certificates


def _naming(spec: CertificateSpec, node: NewNode, cluster: KubeadmConfig) -> Naming:
    if spec.name == KUBELET_CONF:
        return kubelets(node.name)
    if spec.name == KUBELET_SERVER:
        return kubelets(node.name, (x509.DNSName(node.name), *map(general_name, node.addresses)))
    return naming(spec, cluster.naming_facts(node.name, node.addresses[0]))
