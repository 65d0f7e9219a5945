"""
The objects in the cluster that hold a CA: those that follow the files by themselves, and other owners' objects, which
we list and never change. We search their values for the CA's own bytes, without parsing: a Secret may hold anything.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from cryptography import x509

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
#: Objects in a page; most are small, and we request a page that is too long again in smaller parts.
_PAGE = 50
_MOST_NODES = 10
_LEADS = "the controller manager that leads has not read ca.crt yet"

_ROOT_CAS = f"/api/v1/configmaps?fieldSelector=metadata.name%3D{_ROOT_CA}"
_CONFIG_MAPS = f"/api/v1/configmaps?fieldSelector=metadata.name%21%3D{_ROOT_CA}"
#: Without Helm's releases, which are large and repeat other objects.
_SECRETS = "/api/v1/secrets?fieldSelector=type%21%3Dhelm.sh%2Frelease.v1"
#: Paths of a kind that not every cluster has, the newest version first.
_TRUST_BUNDLES = [f"/apis/certificates.k8s.io/{version}/clustertrustbundles" for version in ("v1", "v1beta1")]
#: kubeadm's kube-proxy, and the object that is its pods' CA file.
_PROXIES = "/api/v1/namespaces/kube-system/pods?labelSelector=k8s-app%3Dkube-proxy"
_CA_OF_PROXIES = f"/api/v1/namespaces/kube-system/configmaps/{_ROOT_CA}"
_RESTART_PROXIES = "kubectl -n kube-system rollout restart daemonset kube-proxy"
#: Kinds with a `caBundle`, by which the API server verifies other servers.
_CALLED = {
    "ValidatingWebhookConfiguration": "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
    "MutatingWebhookConfiguration": "/apis/admissionregistration.k8s.io/v1/mutatingwebhookconfigurations",
    "APIService": "/apis/apiregistration.k8s.io/v1/apiservices",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions",
}
#: ConfigMaps that the verbs of `rotate-ca` change, or that the API servers write.
_OURS = {("kube-public", "cluster-info"), ("kube-system", "extension-apiserver-authentication")}
#: Labels by which other programs mark their objects.
_OWNERS = {
    "argocd.argoproj.io/secret-type": "Argo CD's",
    "cluster.x-k8s.io/cluster-name": "Cluster API's",
    "kustomize.toolkit.fluxcd.io/name": "Flux's",
    "helm.toolkit.fluxcd.io/name": "Flux's",
    "cattle.io/creator": "Rancher's",
}


@dataclass(frozen=True, slots=True)
class Held:
    """An object that differs from a phase."""

    text: str  #: A sentence.
    #: A command for its owner, with only certificates in it; empty: the object follows by itself, or there is none.
    command: str = ""


def look(api: Api, authority: str, change: Change, phase: Phase) -> list[Held]:
    """List the cluster's objects that lack the CAs of a phase, and other owners' objects that hold the old CA."""
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
    late = (_name(each) for each in maps if set(_certificates(_config_map(each))) != set(bundle))
    yield from _seen(_ROOT_CA, _followers(_ROOT_CA, late))
    yield from _seen("Secrets", _secrets(api, change, phase))
    yield from _seen("ClusterTrustBundles", _trust_bundles(api, change, phase))
    if phase is Phase.TRUSTED:  # not later: `issue` swaps the order in their file, and so rewrites it
        yield from _seen("kube-proxy", _proxies(api, bundle))
    if phase is not Phase.OLD:
        yield from _seen("ConfigMaps", _config_maps(api, change, phase))
        for kind, path in _CALLED.items():
            yield from _seen(f"{kind}s", _called(api, kind, path, change, phase))


def _seen(what: str, copies: Iterable[Held]) -> Iterator[Held]:
    """Yield the findings on one kind; report a kind that we may not list, so that the others follow (NoAnswerError)."""
    try:
        yield from copies
    except NoAnswerError as e:
        if not e.is_from_server:
            raise
        yield Held(f"{what}: not looked at, or not all of it: {e}")


def behind(api: Api, authority: str, wanted: Bundle) -> list[str]:
    """List objects read by pods, joining nodes and API servers that lack one of these CAs (NoAnswerError)."""
    found, key = [], _KEYS[authority]
    if not set(wanted) <= _in_authentication(api, key):
        found.append(f"{key} of extension-apiserver-authentication")
    if authority == CA.name:
        info = _in_cluster_info(api)
        if info is not None and not set(wanted) <= info:
            found.append(str(kubeadm.CLUSTER_INFO))
        maps = api.every(_ROOT_CAS, _PAGE)
        late = [each for each in maps if not set(wanted) <= set(_certificates(_config_map(each)))]
        found += [f"{_ROOT_CA} of {one_line(str(mapping(each, 'metadata').get('namespace')))}" for each in late]
    return found


# --- objects that follow by themselves --------------------------------------------------------------------------------


def _cluster_info(api: Api, bundle: Bundle) -> Iterator[Held]:
    held = _in_cluster_info(api)
    if held is not None and held != set(bundle):
        again = "the verb of this phase, run again, writes them"
        yield Held(f"{kubeadm.CLUSTER_INFO}: wanted the CAs of this phase, found others: {again}")


def _in_cluster_info(api: Api) -> set[x509.Certificate] | None:
    """Return the CAs that a joining node trusts; None: there is no cluster-info, and nodes join by files."""
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
    """Check the object to which API servers only add CAs: the old one has to be gone in the last phase alone."""
    held = _in_authentication(api, key := _KEYS[authority])
    if not set(change.bundle(phase)) <= held:
        yield Held(f"extension-apiserver-authentication: wanted the CAs of this phase in {key}, found others")
    elif phase is Phase.NEW and change.old in held and change.old != change.new:
        text = f"extension-apiserver-authentication: wanted {key} without the old CA, found it there"
        yield Held(f"{text}: `rotate-ca drop`, run again, has it recreated")


def _followers(what: str, late: Iterable[str]) -> Iterator[Held]:
    """Report objects that the controller manager writes when it becomes the leader (measured on 1.37)."""
    if names := list(late):
        yield Held(f"{what} of {some(names)}: wanted the CAs of this phase, found others: {_LEADS}")


def _config_map(config_map: Mapping[str, Any]) -> Any:
    return mapping(config_map, "data").get("ca.crt")


def _secrets(api: Api, change: Change, phase: Phase) -> Iterator[Held]:
    """Check service account tokens, which the controller manager keeps, and other owners' Secrets."""
    bundle, late = set(change.bundle(phase)), []
    for secret in api.every(_SECRETS, _PAGE):
        if secret.get("type") == _TOKEN:
            if set(_certificates(_text(_config_map(secret)))) != bundle:
                late.append(_name(secret))
        elif phase is not Phase.OLD:
            yield from _of_data("Secret", secret, change, phase)
    yield from _followers("ca.crt of the service account tokens", late)


def _trust_bundles(api: Api, change: Change, phase: Phase) -> Iterator[Held]:
    for path in _TRUST_BUNDLES:
        if api.ask("GET", f"{path}?limit=1").status == HTTPStatus.NOT_FOUND:
            continue
        serving = []
        for bundle in api.every(path, _PAGE):
            spec = mapping(bundle, "spec")
            if spec.get("signerName") == _SERVING:
                serving.append(bundle)
            elif phase is not Phase.OLD:
                where, data = "/spec/trustBundle", spec.get("trustBundle")
                yield from _foreign("ClusterTrustBundle", bundle, "trustBundle", data, change, phase, where)
        # its name has a digest of the content, so that old and new exist together for a moment
        held = [set(_certificates(mapping(bundle, "spec").get("trustBundle"))) for bundle in serving]
        if held and set(change.bundle(phase)) not in held:
            yield from _followers("ClusterTrustBundles", map(_name, serving))
        return


def _proxies(api: Api, bundle: Bundle) -> Iterator[Held]:
    """Report kube-proxy pods that started before their CA file had these CAs, and do not read it again."""
    written = api.ask("GET", _CA_OF_PROXIES).document
    if set(_certificates(_config_map(written))) != set(bundle):
        return  # another finding reports it
    times = [_time(field.get("time")) for field in items(mapping(written, "metadata"), "managedFields")]
    since = max((time for time in times if time is not None), default=None)
    late = []
    for pod in api.every(_PROXIES, _PAGE):
        for container in items(mapping(pod, "status"), "containerStatuses"):
            _, version = tag_of(str(container.get("image")))
            is_old = version is None or version < READS_AGAIN
            started = _time(mapping(container, "state", "running").get("startedAt"))
            if is_old and started is not None and since is not None and started < since:
                late.append(one_line(str(mapping(pod, "spec").get("nodeName"))))
    if late:
        names = some(sorted(late), _MOST_NODES)
        text = "wanted it restarted with this phase's CAs, which it reads only at its start before 1.36, found older"
        yield Held(f"kube-proxy of {names}: {text}: before `issue`", _RESTART_PROXIES)


def _time(text: Any) -> datetime | None:
    """Parse a time of an object; None: it has none."""
    with contextlib.suppress(ValueError):
        return datetime.fromisoformat(text).astimezone(UTC) if isinstance(text, str) else None
    return None


# --- other owners' objects --------------------------------------------------------------------------------------------

#: Kinds with plain text values; all others have base64.
_TEXTS = {"ConfigMap", "ClusterTrustBundle"}


def _config_maps(api: Api, change: Change, phase: Phase) -> Iterator[Held]:
    for config_map in api.every(_CONFIG_MAPS, _PAGE):
        metadata = mapping(config_map, "metadata")
        if (metadata.get("namespace"), metadata.get("name")) not in _OURS:
            yield from _of_data("ConfigMap", config_map, change, phase)


def _of_data(kind: str, document: Mapping[str, Any], change: Change, phase: Phase) -> Iterator[Held]:
    """Report each value of a Secret or ConfigMap that should not hold the old CA like this in the phase."""
    for key, value in mapping(document, "data").items():
        yield from _foreign(kind, document, key, value, change, phase)


def _called(api: Api, kind: str, path: str, change: Change, phase: Phase) -> Iterator[Held]:
    for document in api.every(path, _PAGE):
        for pointer, data in _bundles(document):
            yield from _foreign(kind, document, ".".join(pointer.strip("/").split("/")), data, change, phase, pointer)


def _bundles(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the JSON pointer and value of each `caBundle` in an object."""
    if isinstance(value, dict):
        for key, child in value.items():
            if key == "caBundle":
                yield f"{where}/caBundle", child
            elif key != "metadata":
                yield from _bundles(child, f"{where}/{key}")
    elif isinstance(value, list):
        for number, child in enumerate(value):
            yield from _bundles(child, f"{where}/{number}")


def _foreign(
    kind: str, document: Mapping[str, Any], where: str, data: Any, change: Change, phase: Phase, pointer: str = ""
) -> Iterator[Held]:
    """Report a value with the old CA alone, or at all in the last phase; commands print nothing but certificates."""
    value = str(data).encode() if kind in _TEXTS else _decoded(data)
    is_over = phase is Phase.NEW
    is_finished = change.old == change.new  # no backup has the old CA any more
    if is_finished or not holds(value, change.old) or (holds(value, change.new) and not is_over):
        return
    metadata = mapping(document, "metadata")
    labels, name = mapping(document, "metadata", "labels"), f"{kind} {_name(document)}"
    owner = next((f", {owner}" for label, owner in _OWNERS.items() if label in labels), "")
    still = "still has the old CA" if is_over else "has the old CA alone"
    text = f"{name}{owner}: {where} {still}"
    space = f"-n {shlex.quote(str(metadata['namespace']))} " if metadata.get("namespace") else ""
    target = f"{space}{kind.lower()} {shlex.quote(str(metadata.get('name')))}"
    has_key = where == "tls.crt" and "tls.key" in mapping(document, "data")
    command = "" if has_key else _command(kind, target, where, value, change, phase, pointer)
    why = "its owner changes it" if command else "its owner changes it, with whatever goes with it"
    yield Held(f"{text}: {why}", command)


def _command(kind: str, target: str, key: str, value: bytes, change: Change, phase: Phase, pointer: str) -> str:
    """Return the command for the owner to run; empty: the CA is inside other content, and not in base64."""
    text = value.decode("utf-8", errors="replace")
    if _is_certificates(text):
        new = _replaced(text, change, phase)
        new = new if kind in _TEXTS else base64.b64encode(new.encode()).decode()
        patch = [{"op": "replace", "path": pointer, "value": new}] if pointer else {"data": {key: new}}
        return f"kubectl patch {target} --type={'json' if pointer else 'merge'} -p {shlex.quote(json.dumps(patch))}"
    runs = (run for run in _RUN.findall(text) if _is_certificates(_text(run)))
    inner = next((run for run in runs if holds(run.encode(), change.old)), "")
    if not inner or kind != "Secret" or not re.fullmatch(r"[-._A-Za-z0-9]+", key):
        return ""
    new = base64.b64encode(_replaced(_text(inner), change, phase).encode()).decode()
    path = key.replace(".", "\\.")
    read = f"kubectl get {target} -o jsonpath='{{.data.{path}}}' | base64 -d | sed 's|{inner}|{new}|' | base64 -w0"
    return f'kubectl patch {target} --type=merge -p "{{\\"data\\":{{\\"{key}\\":\\"$({read})\\"}}}}"'


def _replaced(text: str, change: Change, phase: Phase) -> str:
    """Return PEM with the new CA behind the old one, or in its place; other certificates stay."""
    others = [ca for ca in _certificates(text) if ca not in (change.old, change.new)]
    cas = [change.new] if phase is Phase.NEW else [change.old, change.new]
    return pem(*cas, *others).decode()


#: Base64 of a text that begins with five hyphens, as PEM does; kubeconfigs and Argo CD's JSON hold CAs like this.
_RUN = re.compile(r"LS0tLS1[A-Za-z0-9+/]+={0,2}")
_BLOCK = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----\s*")


def _is_certificates(text: str) -> bool:
    """Whether a text is nothing but certificates, and so may be printed."""
    return bool(text) and not _BLOCK.sub("", text).strip()


def holds(value: bytes, ca: x509.Certificate) -> bool:
    """Whether a value has a CA, in PEM with any line breaks, or in base64 of PEM."""
    text = value.decode("ascii", errors="replace")
    body = "".join(pem(ca).decode().splitlines()[1:-1])
    return any(body in re.sub(r"\\n|\s", "", each) for each in (text, *map(_text, _RUN.findall(text))))


def _name(document: Mapping[str, Any]) -> str:
    metadata = mapping(document, "metadata")
    return "/".join(str(metadata[key]) for key in ("namespace", "name") if metadata.get(key))


def _decoded(data: Any) -> bytes:
    with contextlib.suppress(ValueError):  # `binascii.Error` is one
        return base64.b64decode(data, validate=True) if isinstance(data, str) else b""
    return b""


def _text(data: Any) -> str:
    return _decoded(data).decode("utf-8", errors="replace")


def _certificates(text: Any) -> tuple[x509.Certificate, ...]:
    with contextlib.suppress(ValueError):
        return tuple(load_pem_certificates(text.encode())) if isinstance(text, str) else ()
    return ()
