"""
ClusterTrustBundles: the roots that pods trust, kept equal to those in `pods.crt`, with one object for each signer; we
never remove an object with another name or without our label.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, ClassVar, Literal
from urllib.parse import quote

from cryptography import x509

from bridge.cluster import below, mapping
from bridge.cluster.api import JSON, MERGE_PATCH, Api, NoAnswerError, Reply
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem
from bridge.gateway import policy
from bridge.gateway.authorities import read_anchors
from bridge.gateway.rules import PodSignerRules, is_own_signer
from bridge.gateway.watch import GROUP, served
from bridge.node.reading import read_node
from bridge.pki.certificates import pem
from bridge.settings.tables import Settings
from bridge.specs import PODS
from bridge.system.files import how_to_begin
from bridge.system.paths import own_text
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

BUNDLES = "clustertrustbundles"
_SUFFIX = "ca-bridge"
_TRIES = 5
#: The label of objects that we may remove.
_LABEL = {"app.kubernetes.io/managed-by": "ca-bridge"}


def name_of(signer: str) -> str:
    """Return the bundle's name; the API server requires that it begins with the signer's name."""
    return f"{signer.replace('/', ':')}:{_SUFFIX}"


#: The outcome for a signer's bundle; `foreign`: it belongs to another client, and we may not remove it.
Outcome = Literal["published", "replaced", "unchanged", "removed", "absent", "foreign"]


class NotPublishedError(BridgeError):
    """The API server rejects the roots."""

    exit_code: ClassVar[int] = Exit.REFUSED
    hint = "docs/pod-certificates.md names the rights on clustertrustbundles and signers that it needs"


class Roots:
    """The roots that pods trust, kept published; used by one thread."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._group = ""  #: The API group and version in which the API server has bundles; empty: not known.
        self._said: dict[str, str] = {}
        self.good: dict[str, bool] = {}  #: By signer: whether the bundle is as it should be.

    def keep(self, signer: str, roots: str | None) -> None:
        """Publish these certificates (PEM) in the signer's bundle, or remove ours if None; log the result."""
        trouble, name = "", name_of(signer)
        try:
            outcome = self.publish(signer, roots)
        except (NoAnswerError, NotPublishedError) as e:
            trouble = str(e)
        else:
            if outcome == "published":
                log.info("published the roots of %s as %s", signer, name)
            elif outcome == "replaced":
                log.warning("published the roots of %s again: %s had others", signer, name)
            elif outcome == "removed":
                log.warning("removed %s: the policy no longer publishes these roots", name)
        self.good[signer] = not trouble
        if trouble and self._said.get(signer) != trouble:
            log.error("the roots of %s are not published: %s", signer, trouble)
        self._said[signer] = trouble

    def publish(self, signer: str, roots: str | None) -> Outcome:
        """Publish these certificates in the bundle, or remove ours if None (NoAnswerError, NotPublishedError)."""
        for _ in range(_TRIES):
            outcome = self._once(signer, roots)
            if outcome is not None:
                return outcome
        raise NotPublishedError(f"another client changes {name_of(signer)} all the time")

    def _once(self, signer: str, roots: str | None) -> Outcome | None:
        """Try to publish once; None: another client changed the bundle meanwhile."""
        self._group = self._group or served(self._api, BUNDLES)
        collection = f"{self._group}/{BUNDLES}"
        path = f"{collection}/{quote(name_of(signer), safe=':')}"
        reply = self._api.ask("GET", path)
        if reply.status == HTTPStatus.NOT_FOUND:
            if self._group != GROUP:  # an upgrade may have removed this version
                self._group = ""
            if roots is None:
                return "absent"
            spec = {"signerName": signer, "trustBundle": roots}
            body = {"metadata": {"name": name_of(signer), "labels": _LABEL}, "spec": spec}
            return self._wrote("published", "POST", collection, body)
        if reply.status != HTTPStatus.OK:
            raise _refusal("GET", reply)
        document = reply.document
        if not below(document, "metadata", "resourceVersion"):
            raise NoAnswerError(f"{self._api.server}: wanted {name_of(signer)}, found something else")
        if roots is None:
            conditions = {key: below(document, "metadata", key) for key in ("uid", "resourceVersion")}
            body = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": conditions}
            return self._wrote("removed", "DELETE", path, body) if _is_ours(document) else "foreign"
        if below(document, "spec", "trustBundle") == roots and _is_ours(document):
            return "unchanged"
        metadata = {"resourceVersion": document["metadata"]["resourceVersion"], "labels": _LABEL}
        body = {"metadata": metadata, "spec": {"trustBundle": roots}}
        return self._wrote("replaced", "PATCH", path, body, MERGE_PATCH)

    def _wrote(
        self, outcome: Outcome, method: str, path: str, body: Mapping[str, Any], content_type: str = JSON
    ) -> Outcome | None:
        reply = self._api.ask(method, path, body, content_type)
        if reply.status in {HTTPStatus.OK, HTTPStatus.CREATED}:
            return outcome
        if reply.status in {HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND}:
            return None
        raise _refusal(method, reply)


def _refusal(method: str, reply: Reply) -> NotPublishedError:
    return NotPublishedError(one_line(f"{method}: HTTP {reply.status} {reply.message}"))


def text_of(roots: Sequence[x509.Certificate]) -> str:
    """Return the certificates in PEM, each once, as the API server requires."""
    return pem(*dict.fromkeys(roots)).decode("ascii")


def _is_ours(document: Mapping[str, Any]) -> bool:
    labels = mapping(document, "metadata", "labels")
    return all(labels.get(key) == value for key, value in _LABEL.items())


def publish(settings: Settings, signers: Sequence[str], remove: Sequence[str]) -> dict[str, Outcome | BridgeError]:
    """Publish the roots of `signers`, or of the policy's, and remove others' bundles; by signer (SettingsError)."""
    wanted_bundles = _wanted_bundles(settings, signers, remove)
    text = text_of(read_anchors(settings.node, PODS)) if any(wanted_bundles.values()) else ""
    found: dict[str, Outcome | BridgeError] = {}
    with contextlib.closing(_api(settings)) as api:
        roots = Roots(api)
        for signer, is_published in sorted(wanted_bundles.items()):
            try:
                found[signer] = roots.publish(signer, text if is_published else None)
            except (NoAnswerError, NotPublishedError) as e:
                found[signer] = e
    return found


def _wanted_bundles(settings: Settings, signers: Sequence[str], remove: Sequence[str]) -> dict[str, bool]:
    """Return for each signer whether it should have a bundle (SettingsError)."""
    path = settings.gateway.policy
    rules: Mapping[str, PodSignerRules] = {}
    if path.exists() or not (signers or remove):
        text = own_text(path, "the policy, or the signers as arguments", how_to_begin("gateway/policy.toml", path))
        rules = policy.parse(text, path).pod_signers
    if not (rules or signers or remove):
        wanted = "a table for a signer, or SIGNER as an argument"
        raise SettingsError([SettingsProblem("pod_signer", wanted, "neither", path)])
    by_policy = {name: table.publish for name, table in rules.items()}
    published = set(signers) or {name for name, publish in by_policy.items() if publish}
    if problems := [*_problems(signers, remove, by_policy, published)]:
        raise SettingsError(problems)
    unpublished = [name for name, publish in by_policy.items() if not publish and not signers]
    return {**dict.fromkeys(published, True), **dict.fromkeys([*remove, *unpublished], False)}


def _problems(
    signers: Sequence[str], remove: Sequence[str], by_policy: Mapping[str, bool], published: Collection[str]
) -> Iterator[SettingsProblem]:
    """Yield what is wrong with the arguments: names of others, and contradictions to the policy or to each other."""
    for what, names in (("SIGNER", signers), ("--remove", remove)):
        for name in names:
            if not is_own_signer(name):
                yield SettingsProblem(what, "DOMAIN/NAME, of a domain that is not Kubernetes' own", repr(name))
    for name in signers:
        if not by_policy.get(name, True):
            yield SettingsProblem("SIGNER", "a signer whose table does not say publish = false", name)
    for name in remove:
        if name in published or by_policy.get(name, False):
            yield SettingsProblem("--remove", "a signer whose roots are not to be published", name)


def _api(settings: Settings) -> Api:
    """Open the API with the credentials of gateway.kubeconfig, of this pod's service account, or of this node."""
    ours = settings.gateway.kubeconfig
    if ours is not None or "KUBERNETES_SERVICE_HOST" in os.environ:
        return Api.of_gateway(ours)
    return Api.of_node(read_node(settings.node), settings.node.kubeconfig_dir)
