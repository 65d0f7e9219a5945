"""
What the administrator of the signing cluster needs: an account for the node, a role for approvers, and policies.

With RBAC an account that may create a request may name any signer and subject. So ValidatingAdmissionPolicies reserve
these signer names for this cluster's accounts and limit each account to its node's; the page lists what to approve.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from bridge.contract import Selector, SetupFile, SetupRequest
from bridge.errors import BridgeError
from bridge.pki.certificates import name_text, san_entries
from bridge.pki.kubeadm_names import is_node_name
from bridge.specs import EKU, SPECS
from bridge.words import escaped, one_line

NAMESPACE = "ca-bridge"
_ISSUERS = "issuers.cert-manager.io/"
_PATTERN = "ca-bridge.example.com/{name}"


def files(wanted: SetupRequest) -> Sequence[SetupFile]:
    """Write commented manifests for `kubectl apply` (BridgeError: the settings so far don't give the signer's name)."""
    settings = wanted.settings
    selector = Selector(settings.get("signer") or _PATTERN, settings.get("signers") or {}, wanted.node)
    wrong = list(selector.problems("signer", "signers"))
    if wrong:
        raise BridgeError("; ".join(map(str, wrong)), hint="fix signer in the settings")
    signers = sorted({selector(SPECS[name]) for name in wanted.certificates})
    text = "---\n".join(part for part in (
        "".join(f"# {line}".rstrip() + "\n" for line in _head(wanted, selector)),
        _account(wanted, signers),
        _ITS_OWN,
        _reference(wanted, signers),
        _approver(wanted, signers),
        _admission(wanted, signers),
    ) if part)  # fmt: skip
    return [SetupFile(name=f"kubernetes-{wanted.authority.name}.yaml", text=text, by_node=True)]


def account(node: str) -> str:
    """The node's service account, with the node's whole name, so that no two share one (BridgeError: not a name)."""
    if not is_node_name(node) or node == "gateway":  # which is the name in the account of `ca-bridge gateway`
        wanted = "wanted a node's name (a-z, 0-9, '-' and '.') other than gateway"
        raise BridgeError(f"{wanted}, found {one_line(repr(node))}", hint="it is node.name, or in the list of --nodes")
    return f"ca-bridge-{node}"


def _head(wanted: SetupRequest, selector: Selector) -> Iterator[str]:
    yield f"Requests of node {wanted.node} (cluster {wanted.cluster}) for authority {wanted.authority.name}, signed in THIS cluster."
    yield "Apply it to the cluster that will hold the CertificateSigningRequest objects: kubectl apply -f FILE"
    yield ""
    yield "The requests that will come and may be approved:"
    seconds = int(wanted.validity.total_seconds())
    for name, certificate in wanted.certificates.items():
        usages = ", ".join(eku.label for eku in EKU if eku in SPECS[name].ekus)
        yield f"  {name}: {selector(SPECS[name])}"
        yield f"    subject {one_line(name_text(certificate.subject))}; {usages}; expirationSeconds {seconds}"
        sans = [f"{kind} {one_line(value)}" for kind, value in sorted(san_entries(certificate))]
        yield from (f"    SAN {san}" for san in sans)
    yield ""
    yield "A token for the node (the API server may limit its duration; copy it to the node with mode 0600), and the settings:"
    yield f"  (umask 077; kubectl -n {NAMESPACE} create token {account(wanted.node)} --duration=8760h > token)"
    yield "  [backend.cluster]"
    yield '  type = "kubernetes"'
    yield f"  url = {_quoted(wanted.settings.get('url') or 'https://signing-cluster.example.com:6443')}"
    yield '  ca_file = "/etc/ca-bridge/signing-cluster-ca.crt"'
    yield '  token_file = "/etc/ca-bridge/signing-cluster-token"'
    yield f"  [authority.{wanted.authority.name}]"
    yield '  backend = "cluster"'
    yield f"  signer = {_quoted(selector.pattern)}"
    yield ""
    yield "To approve by hand, read the CSR first:"
    yield "  kubectl get csr ca-bridge-NAME -o jsonpath={.spec.request} | base64 -d | openssl req -noout -text"
    yield "  kubectl certificate approve ca-bridge-NAME"


def _account(wanted: SetupRequest, signers: Sequence[str]) -> str:
    name = account(wanted.node)
    asks = f"{name}:{wanted.authority.name}"  # no node's name has a colon
    return f"""\
apiVersion: v1
kind: Namespace
metadata: {{name: {NAMESPACE}}}
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: {name}, namespace: {NAMESPACE}}}
automountServiceAccountToken: false
---
# delete: answered requests are removed; without it kube-controller-manager does so an hour later (set delete = false).
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: ca-bridge-requester}}
rules:
- {{apiGroups: [certificates.k8s.io], resources: [certificatesigningrequests], verbs: [create, get, delete]}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: {name}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: ca-bridge-requester}}
subjects: [{{kind: ServiceAccount, name: {name}, namespace: {NAMESPACE}}}]
---
# Which signers this node's account may ask, for the policy ca-bridge-requester.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: "{asks}"}}
rules:
- {{apiGroups: [certificates.k8s.io], resources: [signers], verbs: [request], resourceNames: {json.dumps(signers)}}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {{name: "{asks}"}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: "{asks}"}}
subjects: [{{kind: ServiceAccount, name: {name}, namespace: {NAMESPACE}}}]
"""


_ACCOUNTS = f"system:serviceaccount:{NAMESPACE}:ca-bridge-"
_ITS_OWN = f"""\
# An account asks its own node's signers, and deletes its own requests; in these two, RBAC alone can't tell nodes apart.
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {{name: ca-bridge-requester}}
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
    - {{apiGroups: [certificates.k8s.io], apiVersions: [v1], resources: [certificatesigningrequests], operations: [CREATE, DELETE]}}
  matchConditions:
  - {{name: account, expression: "request.userInfo.username.startsWith('{_ACCOUNTS}')"}}
  validations:
  - expression: >-
      request.operation != 'CREATE' || authorizer.group('certificates.k8s.io').resource('signers')
      .name(object.spec.signerName).check('request').allowed()
    message: an account of a node asks only its own node's signers
    reason: Forbidden
  - expression: request.operation != 'DELETE' || oldObject.spec.username == request.userInfo.username
    message: an account of a node deletes only its own requests
    reason: Forbidden
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {{name: ca-bridge-requester}}
spec: {{policyName: ca-bridge-requester, validationActions: [Deny]}}
"""


def _reference(wanted: SetupRequest, signers: Sequence[str]) -> str:
    """cert-manager signs with an Issuer of a namespace only for accounts that may `reference` it."""
    issuers = [signer.removeprefix(_ISSUERS).partition(".") for signer in signers if signer.startswith(_ISSUERS)]
    by_namespace: dict[str, list[str]] = {}
    for namespace, _, issuer in issuers:
        by_namespace.setdefault(namespace, []).append(issuer)
    node = account(wanted.node)
    name = f"{node}-references-{wanted.authority.name}"
    return "---\n".join(
        f"""\
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {{name: {name}, namespace: {namespace}}}
rules:
- {{apiGroups: [cert-manager.io], resources: [signers], verbs: [reference], resourceNames: {json.dumps(names)}}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {{name: {name}, namespace: {namespace}}}
roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: {name}}}
subjects: [{{kind: ServiceAccount, name: {node}, namespace: {NAMESPACE}}}]
"""
        for namespace, names in by_namespace.items()
    )


def _approver(wanted: SetupRequest, signers: Sequence[str]) -> str:
    return f"""\
# For the approver of this node's requests: bind it to a person or a program, never to the account above.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {{name: {account(wanted.node)}-approver-{wanted.authority.name}}}
rules:
- {{apiGroups: [certificates.k8s.io], resources: [certificatesigningrequests], verbs: [get, list, watch]}}
- {{apiGroups: [certificates.k8s.io], resources: [certificatesigningrequests/approval], verbs: [update, patch]}}
- apiGroups: [certificates.k8s.io]
  resources: [signers]
  verbs: [approve]
  resourceNames: {json.dumps(signers)}
"""


def _admission(wanted: SetupRequest, signers: Sequence[str]) -> str:
    """The admission policy; none for Kubernetes' own signers, which others in that cluster also use."""
    own_signers = [signer for signer in signers if not signer.partition("/")[0].endswith("kubernetes.io")]
    if not own_signers:
        return ""
    # named after the node: else the next node's file, which may have other signers, would leave these open
    name = f"{account(wanted.node)}-requests-{wanted.authority.name}"
    return f"""\
# Only the accounts of nodes may ask these signers; and for no longer than was agreed.
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {{name: {name}}}
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules:
    - {{apiGroups: [certificates.k8s.io], apiVersions: [v1], resources: [certificatesigningrequests], operations: [CREATE]}}
  matchConditions:
  - {{name: signer, expression: {_quoted(f"object.spec.signerName in {json.dumps(own_signers)}")}}}
  validations:
  - expression: {_quoted(f"request.userInfo.username.startsWith('{_ACCOUNTS}')")}
    message: only accounts of nodes may ask this signer
  - expression: {_quoted(f"has(object.spec.expirationSeconds) && object.spec.expirationSeconds <= {int(wanted.validity.total_seconds())}")}
    message: the request is for longer than was agreed
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {{name: {name}}}
spec: {{policyName: {name}, validationActions: [Deny]}}
"""


def _quoted(text: Any) -> str:
    return escaped(json.dumps(str(text), ensure_ascii=False))
