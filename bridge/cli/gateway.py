"""`gateway` and `trust`: the service and its check, manifests for `setup kubernetes`, and the roots that pods trust."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge.ca import registry
from bridge.cli.declare import Common, argument, command, group, option
from bridge.cli.options import Output, OutputOption, utc_now
from bridge.cli.printing import say_json, say_sentence, say_sentences
from bridge.cli.settings import lines_of
from bridge.contract import GIVEN, Secret, SetupFile
from bridge.errors import BridgeError, Exit, SettingsError, SettingsProblem
from bridge.gateway import roots
from bridge.gateway.nodes import Nodes
from bridge.gateway.rules import KUBERNETES_SIGNERS, Grant, SignerRules
from bridge.gateway.service import Service
from bridge.settings.tables import GatewaySettings, Settings
from bridge.system.console import log, print_error
from bridge.words import has_controls

commands = typer.Typer()


@command(commands, "gateway")
def gateway(
    common: Common,
    check: Annotated[
        bool, option("Read settings, policy and inventory, ask the API and the CA, sign nothing.")
    ] = False,
) -> int:
    """
    Sign what kubelets and users ask for through the certificates API, as far as the policy allows.

    It runs until SIGTERM; `ca-bridge help gateway` has its settings, policy and metrics.
    """
    service = Service(common.settings(), utc_now)
    if check:
        return _check(service)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: service.stop())
    service.run(lambda port: log.info("gateway %s%s", service.identity, f", status at port {port}" if port else ""))
    return Exit.DONE


def _check(service: Service) -> int:
    problems = list(service.check())
    for text in problems:
        print_error(BridgeError(text, hint="`ca-bridge help gateway` says what the CA has to allow"))
    if problems:
        return Exit.REFUSED
    say_sentences(service.notes(), "")
    signers, nodes = ", ".join(service.signers), len(service.nodes.files()[1].nodes)
    say_sentence(f"ready: {signers}; {nodes} nodes in the inventory; API server {service.api.server}")
    return Exit.DONE


NAMESPACE = "ca-bridge"
#: The pod's directories for files that its settings name, and for trust anchors (each namespace has kubeadm's ca.crt).
FILES, TRUST = Path("/etc/ca-bridge/files"), Path("/etc/ca-bridge/trust")
#: Texts of the shipped manifests that are replaced.
_SHIPPED_SIGNERS = json.dumps(list(KUBERNETES_SIGNERS))
_SHIPPED_POD_SIGNERS, _SHIPPED_BUNDLES = '["corp.example/spiffe"]', '["corp.example:spiffe:ca-bridge"]'
#: Stands in an empty list of names, which RBAC would take for all names.
_NO_SIGNER = "ca-bridge.invalid/none"
_SHIPPED_ITEMS = (
    "items: [{key: role-id, path: files/role-id}, {key: secret-id, path: files/secret-id}, "
    "{key: vault-ca.crt, path: files/vault-ca.crt}]"
)


def manifests(settings: Settings, shipped: Path) -> list[SetupFile]:
    """Return the shipped manifests, filled in for this cluster as far as settings, policy and inventory exist."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in sorted((shipped / "kubernetes").glob("*.yaml"))}
    if not texts:
        raise BridgeError("the program's manifests are not installed", hint="reinstall it")
    if settings.gateway.policy.exists() and settings.gateway.inventory.exists():
        policy = Nodes(settings.gateway).files()[0]
        signers = policy.signers
        texts = {name: _with_signers(text, signers) for name, text in texts.items()}
        if policy.pod_signers:
            pods = (shipped / "kubernetes/pods/50-pods.yaml").read_text(encoding="utf-8")
            pods = _replaced(pods, _SHIPPED_BUNDLES, json.dumps(list(map(roots.name_of, policy.pod_signers))))
            texts["50-pods.yaml"] = _replaced(pods, _SHIPPED_POD_SIGNERS, json.dumps(list(policy.pod_signers)))
        given = {"gateway-policy.toml": settings.gateway.policy, "inventory.toml": settings.gateway.inventory}
        for key, path in given.items():
            texts["30-config.yaml"] = _with_block(texts["30-config.yaml"], key, path.read_text(encoding="utf-8"))
        texts["20-admission.yaml"] += "".join(_askers(signers))
    if settings.authorities:
        config, files = _config(settings)
        ours = [f"{name}.crt" for name in settings.authorities]
        files |= {name: settings.node.pki_dir / _ANCHORS[name] for name in ours if name in _ANCHORS}
        texts["30-config.yaml"] = _with_files(_with_block(texts["30-config.yaml"], "config.toml", config), files)
        places = {name: f"trust/{_ANCHORS[name]}" if name in _ANCHORS else f"files/{name}" for name in files}
        items = ", ".join(f"{{key: {name}, path: {place}}}" for name, place in places.items())
        texts["40-deployment.yaml"] = _replaced(texts["40-deployment.yaml"], _SHIPPED_ITEMS, f"items: [{items}]")
    return [SetupFile(name=name, text=text) for name, text in texts.items()]


def _replaced(text: str, old: str, new: str) -> str:
    if old not in text:
        raise BridgeError(f"wanted {old!r} in the shipped manifests, found it changed", hint="reinstall the program")
    return text.replace(old, new)


def _with_signers(text: str, signers: Mapping[str, SignerRules]) -> str:
    """Put the policy's signers in; those that people approve are not reserved for the gateway."""
    signers_of_csrs = [name for name, rules in signers.items() if rules.approval != "required"]
    head = f"  - name: approved_here\n    expression: 'object.spec.signerName in {_SHIPPED_SIGNERS}'"
    text = text.replace(head, head.replace(_SHIPPED_SIGNERS, json.dumps(signers_of_csrs)))
    return text.replace(_SHIPPED_SIGNERS, json.dumps(list(signers) or [_NO_SIGNER]))


def _with_block(text: str, key: str, content: str) -> str:
    """Replace the value of a ConfigMap's key; refuse control characters, some of which end a line in YAML only."""
    lines = content.rstrip("\n").replace("\r\n", "\n").split("\n")
    for number, line in enumerate(lines, 1):
        for character in filter(has_controls, line.replace("\t", " ")):
            hint = "take it out of that line; where a text needs it, write it as TOML's \\u and four digits"
            raise BridgeError(f"{key}, line {number}: wanted no control characters, found {character!r}", hint=hint)
    block = "".join(f"    {line}".rstrip() + "\n" for line in lines)
    shipped = rf"^  {re.escape(key)}: \|\n(?:    .*\n|\n)+"
    changed, count = re.subn(shipped, lambda _: f"  {key}: |\n{block}", text, flags=re.MULTILINE)
    if count != 1:
        found = f"wanted {key} once in the shipped manifests, found it {count} times"
        raise BridgeError(found, hint="reinstall the program")
    return changed


def _askers(signers: Mapping[str, SignerRules]) -> Iterator[str]:
    """Yield an admission policy for each signer of the site's own: only granted users may create requests for it."""
    for name, rules in signers.items():
        if name in KUBERNETES_SIGNERS:
            continue
        policy = f"ca-bridge-gateway-{name.replace('/', '.')}"  # domains may have signers of the same name
        who = " || ".join(_condition(grant) for _, grant in rules.grants) or "false"
        yield f"""\
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {{name: {policy}}}
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
    - {{apiGroups: [certificates.k8s.io], apiVersions: [v1], resources: [certificatesigningrequests], operations: [CREATE]}}
  matchConditions:
  - {{name: signer, expression: {json.dumps(f"object.spec.signerName == {json.dumps(name)}")}}}
  validations:
  - expression: {json.dumps(who)}
    message: this signer is not granted to you
    reason: Forbidden
  - expression: '!has(object.metadata.finalizers) && !has(object.metadata.ownerReferences)'
    message: a request must not have finalizers or owners
    reason: Invalid
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {{name: {policy}}}
spec: {{policyName: {policy}, validationActions: [Deny]}}
"""


def _condition(grant: Grant) -> str:
    """Return a grant as a condition in CEL; `{node}` matches anything, and the gateway checks it later."""
    name = "request.userInfo.username"
    parts = [f"request.userInfo.groups.exists(g, g in {json.dumps(grant.groups)})"] if grant.groups else []
    for user in grant.users:
        before, pattern, after = user.partition("{node}")
        between = f"({name}.startsWith({json.dumps(before)}) && {name}.endsWith({json.dumps(after)}))"
        parts.append(between if pattern else f"{name} == {json.dumps(user)}")
    return " || ".join(parts)


def _config(settings: Settings) -> tuple[str, dict[str, Path]]:
    """Return the pod's settings file, and the files that it names, by name."""
    files: dict[str, Path] = {}
    gateway = dataclasses.replace(
        settings.gateway, kubeconfig=None, state_dir=None, lease_namespace=NAMESPACE,
        policy=Path("/etc/ca-bridge/gateway-policy.toml"), inventory=Path("/etc/ca-bridge/inventory.toml"),
    )  # fmt: skip
    usual = set(lines_of(GatewaySettings()))
    lines = ["[node]", 'name = "gateway"', f"cluster = {json.dumps(settings.node.cluster)}",
             f'pki_dir = "{TRUST}"', 'state_dir = "/dev/shm/ca-bridge"', "", "[audit]", 'rotate_at = "8MiB"',
             'keep_total = "40MiB"', "", "[gateway]", *(line for line in lines_of(gateway) if line not in usual)]  # fmt: skip
    backends = registry.configured(settings, settings.authorities)
    for name, type_name in {backend.name: backend.type_name for backend in backends.values()}.items():
        lines += ["", f"[backend.{json.dumps(name)}]", f"type = {json.dumps(type_name)}"]
    for authority, configured in backends.items():
        lines += ["", f"[authority.{authority}]", f"backend = {json.dumps(configured.name)}"]
        lines += lines_of(_moved(configured.settings, files))
    return "\n".join(lines) + "\n", files


def _moved(table: Any, files: dict[str, Path]) -> Any:
    """Replace the paths of files by their paths in the pod, and collect the files."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(table):
        value = getattr(table, field.name)
        if GIVEN in field.metadata:
            continue
        if isinstance(value, Secret) and value.kind != "file":
            wanted = "a secret in a file, which can go into the pod's Secret"
            raise SettingsError([SettingsProblem(field.name, wanted, f"one in {value}")])
        if isinstance(value, Secret):
            changes[field.name] = Secret("file", str(_added(Path(value.where), files)))
        elif isinstance(value, Path):
            changes[field.name] = _added(value, files)
        elif dataclasses.is_dataclass(value) and not hasattr(value, "from_setting"):
            changes[field.name] = _moved(value, files)
    return dataclasses.replace(table, **changes) if changes else table


def _added(path: Path, files: dict[str, Path]) -> Path:
    name = re.sub(r"[^-._a-zA-Z0-9]", "-", path.name)
    if files.setdefault(name, path) != path:
        found = f"{files[name]} and {path}"
        raise SettingsError([SettingsProblem("", "files with different names, for one directory of the pod", found)])
    return FILES / name


#: CA files to mount, by name in the volume, except the cluster CA's, which every namespace has.
_ANCHORS = {"etcd-ca.crt": "etcd/ca.crt", "front-proxy-ca.crt": "front-proxy-ca.crt", "pods.crt": "pods.crt"}


def _with_files(text: str, files: Mapping[str, Path]) -> str:
    """Replace the example of a Secret by the command that makes it, so that no secret is printed."""
    head, mark, _ = text.partition("---\n# What must stay secret")
    if not mark:
        raise BridgeError("the shipped manifests have no example of a Secret", hint="reinstall the program")
    for path in filter(Path.is_dir, files.values()):
        log.warning("%s is a directory, which no Secret can hold: run the gateway as a systemd unit for this CA", path)
    given = " ".join(shlex.quote(f"--from-file={name}={path}") for name, path in files.items() if not path.is_dir())
    return f"{head}# The files that config.toml names; made once, and again when one of them changes:\n#   kubectl -n {NAMESPACE} create secret generic ca-bridge-gateway {given}\n"


_trust = group(commands, "trust", "Publish the roots that pods trust.")

#: Outcomes of publishing, for people; `{name}` is the ClusterTrustBundle's.
_WORDS = {
    "published": "published as {name}",
    "replaced": "published anew: {name} had others",
    "unchanged": "{name} has them already",
    "removed": "removed {name}",
    "absent": "nothing to remove",
    "foreign": "left {name} alone: another client has made it",
}


@command(_trust, "publish")
def publish(
    common: Common,
    signers: Annotated[
        list[str] | None, argument("DOMAIN/NAME. [default: those of the gateway's policy]", "[SIGNER…]")
    ] = None,
    remove: Annotated[
        list[str] | None, option("Remove the bundle of a signer that the policy does not have.", "SIGNER")
    ] = None,
    output: OutputOption = Output.TEXT,
) -> int:
    """
    Make the ClusterTrustBundle of each signer equal to pods.crt, for a cluster without the gateway.

    It needs no CA and no policy if the signers are named. It removes the bundle of a signer whose table says `publish =
    false`. Run it from a timer: it undoes other clients' changes. Exits with 5 if the API server refuses, and with 6 if it
    does not answer.
    """
    found = roots.publish(common.settings(), signers or (), remove or ())
    entries = []
    for signer, outcome in found.items():
        entry = {"signer": signer, "name": roots.name_of(signer), "outcome": "failed", "error": ""}
        if isinstance(outcome, BridgeError):
            print_error(BridgeError(f"{signer}: {outcome}", hint=outcome.hint))
            entry["error"] = str(outcome)
        else:
            entry["outcome"] = outcome
            if output is Output.TEXT:
                say_sentence(f"{signer}: {_WORDS[outcome].format(name=entry['name'])}")
        entries.append(entry)
    code = Exit.worst([outcome.exit_code for outcome in found.values() if isinstance(outcome, BridgeError)])
    if output is Output.JSON:
        say_json(exitCode=code, bundles=entries)
    return code
