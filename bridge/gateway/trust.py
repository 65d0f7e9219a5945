"""`trust publish`: the bundles of all signers made equal to `pods.crt` once, by a machine that need not be a gateway."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bridge.cluster.api import Api, NoAnswerError
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.gateway import policy
from bridge.gateway.authorities import read_anchors
from bridge.gateway.pod_rules import PodSignerRules
from bridge.gateway.roots import NotPublishedError, Outcome, Roots, name_of, text_of
from bridge.gateway.rules import is_own_signer
from bridge.node import inventory
from bridge.settings.tables import Settings
from bridge.specs import PODS
from bridge.system.files import how_to_begin
from bridge.system.paths import own_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A signer's bundle after the run."""

    signer: str
    name: str
    outcome: Outcome | None  #: None: there is an error.
    error: BridgeError | None = None


def publish(settings: Settings, signers: Sequence[str], remove: Sequence[str]) -> list[Bundle]:
    """Publish the roots of these signers, or of the policy's, and remove the bundles of others (SettingsError)."""
    wanted = _wanted(settings, signers, remove)
    text = text_of(read_anchors(settings.node.pki_dir / PODS.certificate_file)) if any(wanted.values()) else b""
    api = _api(settings)
    roots, found = Roots(api), []
    for signer, is_published in sorted(wanted.items()):
        outcome, error = None, None
        try:
            outcome = roots.publish(signer, text if is_published else None)
        except (NoAnswerError, NotPublishedError) as e:
            error = e
        found.append(Bundle(signer=signer, name=name_of(signer), outcome=outcome, error=error))
    api.close()
    return found


def _wanted(settings: Settings, signers: Sequence[str], remove: Sequence[str]) -> dict[str, bool]:
    """Each signer, and whether it has a bundle (SettingsError)."""
    path = settings.gateway.policy
    rules: Mapping[str, PodSignerRules] = {}
    if path.exists() or not (signers or remove):
        text = own_text(path, "the policy, or the signers as arguments", how_to_begin("gateway/policy.toml", path))
        rules = policy.parse(text, path).pod_signers
    problems = [
        SettingsProblem(what, "DOMAIN/NAME, of a domain that is not Kubernetes' own", repr(name))
        for what, names in (("SIGNER", signers), ("--remove", remove))
        for name in names
        if not is_own_signer(name)
    ]
    published = set(signers) or {name for name, one in rules.items() if one.publish}
    problems += [
        SettingsProblem("SIGNER", "a signer whose table does not say publish = false", name)
        for name in signers
        if name in rules and not rules[name].publish
    ]
    problems += [
        SettingsProblem("--remove", "a signer whose roots are not to be published", name)
        for name in remove
        if name in published or (name in rules and rules[name].publish)
    ]
    if not problems and not rules and not signers and not remove:
        problems.append(
            SettingsProblem("pod_signer", "a table for a signer, or SIGNER as an argument", "neither", path)
        )
    if problems:
        raise SettingsError(problems)
    unpublished = {*remove, *(() if signers else (name for name, one in rules.items() if not one.publish))}
    return {**dict.fromkeys(published, True), **dict.fromkeys(unpublished, False)}


def _api(settings: Settings) -> Api:
    """With the rights of gateway.kubeconfig, of this pod's service account, or of this node."""
    ours = settings.gateway.kubeconfig
    if ours is not None or "KUBERNETES_SERVICE_HOST" in os.environ:
        return Api.of_gateway(ours)
    return Api.of_node(inventory.of(settings.node), settings.node.kubeconfig_dir)
