"""
What holds a CA in the cluster: what follows the files by itself, and what is others', which is listed and never changed.
Others' values are searched for the CA's own bytes, and not parsed: a Secret may hold anything.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from cryptography import x509

from bridge import dataclass
from bridge.cluster import items, kubeadm, mapping
from bridge.cluster.api import Api, NoAnswerError
from bridge.control_plane import READS_AGAIN
from bridge.node import kubeconfig
from bridge.node.kubeconfig import KubeconfigError
from bridge.node.manifests import tag_of
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.rotation import Bundle, Change, Phase
from bridge.rotation.objects import AUTHENTICATION
from bridge.specs import CA, FRONT_PROXY_CA
from bridge.system.console import doing
from bridge.words import one_line, some

_ROOT_CA = "kube-root-ca.crt"
_SERVING = "kubernetes.io/kube-apiserver-serving"
_TOKEN = "kubernetes.io/service-account-token"  # noqa: S105 (a type of Secret)
#: Most are small; an answer that is too long is asked for again, in smaller parts.
_PAGE = 50
_MOST_NODES = 10
_LEADS = "the controller manager that leads has not read ca.crt yet"


_ROOT_CAS = f"/api/v1/configmaps?fieldSelector=metadata.name%3D{_ROOT_CA}"
_CONFIG_MAPS = f"/api/v1/configmaps?fieldSelector=metadata.name%21%3D{_ROOT_CA}"
#: Helm's releases are large, and hold what is in other objects, too.
_SECRETS = "/api/v1/secrets?fieldSelector=type%21%3Dhelm.sh%2Frelease.v1"
#: The newest version that the cluster has, of a kind that is not on everywhere.
_TRUST_BUNDLES = [f"/apis/certificates.k8s.io/{version}/clustertrustbundles" for version in ("v1", "v1beta1")]
#: kubeadm's kube-proxy, and the object from which its pods' CA file is made.
_PROXIES = "/api/v1/namespaces/kube-system/pods?labelSelector=k8s-app%3Dkube-proxy"
_CA_OF_PROXIES = f"/api/v1/namespaces/kube-system/configmaps/{_ROOT_CA}"
_RESTART_PROXIES = "kubectl -n kube-system rollout restart daemonset kube-proxy"
#: Where others keep a CA by which the API server verifies them, in `caBundle`.
_CALLED = {
    "ValidatingWebhookConfiguration": "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
    "MutatingWebhookConfiguration": "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
    "APIService": "/apis/apiregistration.k8s.io/v1/apiservices",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
}
#: ConfigMaps that the verbs of `rotate-ca` change, or the API servers make.
_OURS = {("kube-public", "cluster-info"), ("kube-system", "extension-apiserver-authentication")}
#: Labels and types by which others mark what is theirs.
_OWNERS = {
    "argocd.argoproj.io/secret-type": "Argo CD's",
    "cluster.x-k8s.io/cluster-name": "Cluster API's",
    "kustomize.toolkit.fluxcd.io/name": "Flux's",
    "helm.toolkit.fluxcd.io/name": "Flux's",
    "cattle.io/creator": "Rancher's",
}


@dataclass(frozen=True, slots=True)
class Held:
    """An object that is not as a phase wants it."""

    text: str  #: A sentence.
    #: For its owner, with certificates alone in it; empty: it follows by itself, or there is no such command.
    command: str = ""


def look(api: Api, authority: str, change: Change, phase: Phase) -> list[Held]:
    """The cluster's objects that do not hold the CAs of a phase yet, and other owners' objects that hold the old CA."""
    if authority not in _KEYS:
        return []
    try:
        with doing("looking through the cluster's objects"):
            found = list(_seen("extension-apiserver-authentication", _authentication(api, authority, change, phase)))
            if authority == CA.name:
                found += _looked_through(api, change, phase)
    except NoAnswerError as e:
        return [Held(f"the cluster's objects could not be looked at: {e}")]
    return found


def _looked_through(api: Api, change: Change, phase: Phase) -> Iterator[Held]:
    bundle = change.bundle(phase)
    yield from _seen("cluster-info", _cluster_info(api, bundle))
    maps = api.every(_ROOT_CAS, _PAGE)
    late = (_name(one) for one in maps if set(_certificates(_config_map(one))) != set(bundle))
    yield from _seen(_ROOT_CA, _followers(_ROOT_CA, late))
    yield from _seen("Secrets", _secrets(api, change, phase))
    yield from _seen("ClusterTrustBundles", _trust_bundles(api, change, phase))
    if phase is Phase.TRUSTED:  # `issue` turns the order in their file, and writes it anew
        yield from _seen("kube-proxy", _proxies(api, bundle))
    if phase is not Phase.OLD:
        yield from _seen("ConfigMaps", _config_maps(api, change, phase))
        for kind, path in _CALLED.items():
            yield from _seen(f"{kind}s", _called(api, kind, path, change, phase))


def _seen(what: str, found: Iterable[Held]) -> Iterator[Held]:
    """What a look at one kind finds; one that we may not list is named, and the others are looked at (NoAnswerError)."""
    try:
        yield from found
    except NoAnswerError as e:
        if not e.is_from_server:
            raise
        yield Held(f"{what}: not looked at, or not all of it: {e}")


def behind(api: Api, authority: str, wanted: Bundle) -> list[str]:
    """The cluster's own objects that lack one of these CAs, which pods, joining nodes and API servers read (NoAnswerError)."""
    found, key = [], _KEYS[authority]
    if not set(wanted) <= _in_authentication(api, key):
        found.append(f"{key} of extension-apiserver-authentication")
    if authority == CA.name:
        info = _in_cluster_info(api)
        if info is not None and not set(wanted) <= info:
            found.append(str(kubeadm.CLUSTER_INFO))
        maps = api.every(_ROOT_CAS, _PAGE)
        late = [one for one in maps if not set(wanted) <= set(_certificates(_config_map(one)))]
        found += [f"{_ROOT_CA} of {one_line(str(mapping(one, 'metadata').get('namespace')))}" for one in late]
    return found


# --- what follows by itself -------------------------------------------------------------------------------------------


def _cluster_info(api: Api, bundle: Bundle) -> Iterator[Held]:
    held = _in_cluster_info(api)
    if held is not None and held != set(bundle):
        again = "the verb of this phase, run again, writes them"
        yield Held(f"{kubeadm.CLUSTER_INFO}: wanted the CAs of this phase, found others: {again}")


def _in_cluster_info(api: Api) -> set[x509.Certificate] | None:
    """The CAs that a joining node trusts; None: there is no such object, and nodes join by files."""
    text = kubeadm.read(api, kubeadm.CLUSTER_INFO).text
    if text is None:
        return None
    with contextlib.suppress(KubeconfigError, ValueError):
        return set(load_pem_certificates(kubeconfig.ca_data(text.encode()) or b""))
    return set()


#: The keys of extension-apiserver-authentication, by authority.
_KEYS = {CA.name: "client-ca-file", FRONT_PROXY_CA.name: "requestheader-client-ca-file"}


def _in_authentication(api: Api, key: str) -> set[x509.Certificate]:
    return set(_certificates(mapping(api.ask("GET", AUTHENTICATION).document, "data").get(key)))


def _authentication(api: Api, authority: str, change: Change, phase: Phase) -> Iterator[Held]:
    """API servers join their CAs to what is there, and take none out: only at the end the old one has to be gone."""
    held = _in_authentication(api, key := _KEYS[authority])
    if not set(change.bundle(phase)) <= held:
        yield Held(f"extension-apiserver-authentication: wanted the CAs of this phase in {key}, found others")
    elif phase is Phase.NEW and change.old in held and change.old != change.new:
        text = f"extension-apiserver-authentication: wanted {key} without the old CA, found it there"
        yield Held(f"{text}: `rotate-ca drop`, run again, has it made anew")


def _followers(what: str, late: Iterable[str]) -> Iterator[Held]:
    """A sentence about objects that the controller manager writes when it becomes the leader (measured on 1.37)."""
    if names := list(late):
        yield Held(f"{what} of {some(names)}: wanted the CAs of this phase, found others: {_LEADS}")


def _config_map(one: Mapping[str, Any]) -> Any:
    return mapping(one, "data").get("ca.crt")


def _secrets(api: Api, change: Change, phase: Phase) -> Iterator[Held]:
    """Tokens of service accounts, which the controller manager keeps, and then those of others."""
    bundle, late = set(change.bundle(phase)), []
    for one in api.every(_SECRETS, _PAGE):
        if one.get("type") == _TOKEN:
            if set(_certificates(_text(_config_map(one)))) != bundle:
                late.append(_name(one))
        elif phase is not Phase.OLD:
            yield from _of_data("Secret", one, change, phase)
    yield from _followers("ca.crt of the service account tokens", late)


def _trust_bundles(api: Api, change: Change, phase: Phase) -> Iterator[Held]:
    for path in _TRUST_BUNDLES:
        if api.ask("GET", f"{path}?limit=1").status == HTTPStatus.NOT_FOUND:
            continue
        serving = []
        for one in api.every(path, _PAGE):
            spec = mapping(one, "spec")
            if spec.get("signerName") == _SERVING:
                serving.append(one)
            elif phase is not Phase.OLD:
                where, data = "/spec/trustBundle", spec.get("trustBundle")
                yield from _foreign("ClusterTrustBundle", one, "trustBundle", data, change, phase, where)
        # its name has a digest of the content: for a moment the old one and the new one are there
        if serving and not any(
            set(_certificates(mapping(one, "spec").get("trustBundle"))) == set(change.bundle(phase)) for one in serving
        ):
            yield from _followers("ClusterTrustBundles", map(_name, serving))
        return


def _proxies(api: Api, bundle: Bundle) -> Iterator[Held]:
    """The pods of kube-proxy that were started before their CA file had these CAs, and do not read it again."""
    written = api.ask("GET", _CA_OF_PROXIES).document
    if set(_certificates(_config_map(written))) != set(bundle):
        return  # another line of the list names it
    times = [_time(one.get("time")) for one in items(mapping(written, "metadata"), "managedFields")]
    since = max((one for one in times if one is not None), default=None)
    late = []
    for pod in api.every(_PROXIES, _PAGE):
        for one in items(mapping(pod, "status"), "containerStatuses"):
            _, version = tag_of(str(one.get("image")))
            is_old = version is None or version < READS_AGAIN
            started = _time(mapping(one, "state", "running").get("startedAt"))
            if is_old and started is not None and since is not None and started < since:
                late.append(one_line(str(mapping(pod, "spec").get("nodeName"))))
    if late:
        names = some(sorted(late), _MOST_NODES)
        text = "wanted it started anew with the CAs of this phase, which it reads at its start alone before 1.36, found older"
        yield Held(f"kube-proxy of {names}: {text}: before `issue`", _RESTART_PROXIES)


def _time(text: Any) -> datetime | None:
    """A time in an object."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC) if isinstance(text, str) else None
    except ValueError:
        return None


# --- what belongs to others -------------------------------------------------------------------------------------------

#: Kinds whose values are texts; those of all others are in base64.
_TEXTS = {"ConfigMap", "ClusterTrustBundle"}


def _config_maps(api: Api, change: Change, phase: Phase) -> Iterator[Held]:
    for one in api.every(_CONFIG_MAPS, _PAGE):
        metadata = mapping(one, "metadata")
        if (metadata.get("namespace"), metadata.get("name")) not in _OURS:
            yield from _of_data("ConfigMap", one, change, phase)


def _of_data(kind: str, one: Mapping[str, Any], change: Change, phase: Phase) -> Iterator[Held]:
    """Each value of a Secret or a ConfigMap that holds the old CA as it should not in this phase."""
    for key, value in mapping(one, "data").items():
        yield from _foreign(kind, one, key, value, change, phase)


def _called(api: Api, kind: str, path: str, change: Change, phase: Phase) -> Iterator[Held]:
    for one in api.every(path, _PAGE):
        for pointer, data in _bundles(one):
            yield from _foreign(kind, one, ".".join(pointer.strip("/").split("/")), data, change, phase, pointer)


def _bundles(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Each `caBundle` of an object, with the JSON pointer to it."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key == "caBundle":
                yield f"{where}/caBundle", one
            elif key != "metadata":
                yield from _bundles(one, f"{where}/{key}")
    elif isinstance(value, list):
        for number, one in enumerate(value):
            yield from _bundles(one, f"{where}/{number}")


def _foreign(
    kind: str, one: Mapping[str, Any], where: str, data: Any, change: Change, phase: Phase, pointer: str = ""
) -> Iterator[Held]:
    """Others' value with the old CA alone, or at the end with it at all; certificates alone have a command, and are printed."""
    value = str(data).encode() if kind in _TEXTS else _decoded(data)
    is_over = phase is Phase.NEW
    is_finished = change.old == change.new  # no backup knows the old one any more
    if is_finished or not holds(value, change.old) or (holds(value, change.new) and not is_over):
        return
    metadata = mapping(one, "metadata")
    labels, name = mapping(one, "metadata", "labels"), f"{kind} {_name(one)}"
    owner = next((f", {owner}" for label, owner in _OWNERS.items() if label in labels), "")
    still = "still has the old CA" if is_over else "has the old CA alone"
    text = f"{name}{owner}: {where} {still}"
    space = f"-n {shlex.quote(str(metadata['namespace']))} " if metadata.get("namespace") else ""
    target = f"{space}{kind.lower()} {shlex.quote(str(metadata.get('name')))}"
    has_key = where == "tls.crt" and "tls.key" in mapping(one, "data")
    command = "" if has_key else _command(kind, target, where, value, change, phase, pointer)
    why = "its owner changes it" if command else "its owner changes it, with whatever goes with it"
    yield Held(f"{text}: {why}", command)


def _command(kind: str, target: str, key: str, value: bytes, change: Change, phase: Phase, pointer: str) -> str:
    """The command for the owner to type; empty: the CA is in the middle of something else, and not in base64."""
    text = value.decode("utf-8", errors="replace")
    if _is_certificates(text):
        new = _replaced(text, change, phase)
        new = new if kind in _TEXTS else base64.b64encode(new.encode()).decode()
        patch = [{"op": "replace", "path": pointer, "value": new}] if pointer else {"data": {key: new}}
        return f"kubectl patch {target} --type={'json' if pointer else 'merge'} -p {shlex.quote(json.dumps(patch))}"
    inner = next(
        (run for run in _RUN.findall(text) if _is_certificates(_text(run)) and holds(run.encode(), change.old)), ""
    )
    if not inner or kind != "Secret" or not re.fullmatch(r"[-._A-Za-z0-9]+", key):
        return ""
    new = base64.b64encode(_replaced(_text(inner), change, phase).encode()).decode()
    path = key.replace(".", "\\.")
    read = f"kubectl get {target} -o jsonpath='{{.data.{path}}}' | base64 -d | sed 's|{inner}|{new}|' | base64 -w0"
    return f'kubectl patch {target} --type=merge -p "{{\\"data\\":{{\\"{key}\\":\\"$({read})\\"}}}}"'


def _replaced(text: str, change: Change, phase: Phase) -> str:
    """PEM blocks with the new CA behind the old one, or in its place; what else is there stays."""
    held = [one for one in _certificates(text) if one not in (change.old, change.new)]
    ours = [change.new] if phase is Phase.NEW else [change.old, change.new]
    return pem(*ours, *held).decode()


#: Base64 of what begins with five hyphens, as PEM does; a kubeconfig and Argo CD's JSON hold CAs so.
_RUN = re.compile(r"LS0tLS1[A-Za-z0-9+/]+={0,2}")
_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----\s*")


def _is_certificates(text: str) -> bool:
    """Whether there is nothing but certificates, so that it may be printed."""
    return bool(text) and not _BLOCK.sub("", text).strip()


def holds(value: bytes, ca: x509.Certificate) -> bool:
    """Whether a value has a CA: in PEM, whatever its lines, or in base64 of PEM."""
    text = value.decode("ascii", errors="replace")
    body = "".join(pem(ca).decode().splitlines()[1:-1])
    return any(body in re.sub(r"\\n|\s", "", each) for each in (text, *map(_text, _RUN.findall(text))))


def _name(one: Mapping[str, Any]) -> str:
    metadata = mapping(one, "metadata")
    return "/".join(str(metadata[key]) for key in ("namespace", "name") if metadata.get(key))


def _decoded(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True) if isinstance(data, str) else b""
    except (binascii.Error, ValueError):
        return b""


def _text(data: Any) -> str:
    return _decoded(data).decode("utf-8", errors="replace")


def _certificates(text: Any) -> tuple[x509.Certificate, ...]:
    try:
        return tuple(load_pem_certificates(text.encode())) if isinstance(text, str) else ()
    except ValueError:
        return ()
