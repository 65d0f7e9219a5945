"""A new node's requests and keys, and their answers: of an earlier run, from carried files, or from the CAs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from cryptography import x509

from bridge.bootstrap import keys
from bridge.bootstrap.desired import DesiredNode, NoSignerError, OtherNodeDesiredError
from bridge.bootstrap.keys import Made
from bridge.bootstrap.places import SUPER_ADMIN, Certificates, Places, Role
from bridge.contract import SignRequest
from bridge.errors import BridgeError, WaitingError
from bridge.node import cross
from bridge.node.inventory import Item
from bridge.pki import verify
from bridge.pki.bundle_format import short_fingerprint
from bridge.pki.csr import general_name
from bridge.pki.kubeadm_names import NamingFacts, naming
from bridge.renewal import airgap
from bridge.renewal.issuance import Answered, issue, reaching
from bridge.renewal.prepare import Prepared
from bridge.renewal.select import outcome_of
from bridge.specs import AUTHORITIES, KUBELET_CONF, KUBELET_SERVER, SPECS, CertificateSpec
from bridge.state.open_requests import OpenRequest
from bridge.state.session import Run, give_up
from bridge.state.store import Outcome, Store
from bridge.system.state_file import OnDamage, StateFile, coded

#: super-admin.conf is needed for seconds, so it gets little more than the settings' minimum.
_SUPER_ADMIN_MORE = timedelta(days=1)


def begin(run: Run, desired: DesiredNode) -> Unfinished:
    """Go on with what an earlier run has begun, or make keys and CSRs."""
    file = unfinished_file(run.store)
    found, open_requests = file.read(), run.requests.by_name()
    if found is not None and set(found.names) <= open_requests.keys():
        if (found.role, found.config) == (desired.role, desired.mark) and not desired.inputs.anew:
            return found
        if not desired.inputs.anew and any(one.is_waiting for one in run.requests):
            raise OtherNodeDesiredError(
                "wanted to continue with the requests that wait, found another configuration, name or role"
            )
    for name in open_requests:
        give_up(run, name, "a new node's keys are made anew")
        run.requests.drop(name)
    file.remove()
    return _begun_anew(run, desired)


def _begun_anew(run: Run, desired: DesiredNode) -> Unfinished:
    made = _made(run, desired)
    keys.assert_fits(made, desired.node)
    for name, one in made.items():
        run.requests.put(_open(run, SPECS[name], one))
    run.requests.save()
    sa = ("", "") if desired.role != "init" else keys.sa_pair_if_new(desired.places, keys.algorithm_of(made))
    fresh = Unfinished(
        role=desired.role,
        config=desired.mark,
        servers={name: one.server for name, one in made.items() if one.server},
        names=tuple(made),
        sa_key=sa[0],
        sa_public=sa[1],
    )
    unfinished_file(run.store).put(fresh)
    return fresh


def prepared(run: Run, desired: DesiredNode, begun: Unfinished) -> list[Prepared]:
    """The open requests in the form that a renewal has them, but nothing is replaced."""
    made: Mapping[str, OpenRequest] = run.requests.by_name()
    return [
        Prepared(
            item=_item(SPECS[name], desired.places),
            request=made[name].request,
            key_pem=made[name].key_pem,
            was={},
            open=made[name],
        )
        for name in begun.names
    ]


def forget(run: Run) -> None:
    """Drop the open requests and the mark of this bootstrap."""
    for name in run.requests.by_name():
        run.requests.drop(name)
    run.requests.save()
    unfinished_file(run.store).remove()


def _made(run: Run, desired: DesiredNode) -> dict[str, Made]:
    if desired.role == "worker":
        made = {KUBELET_CONF: keys.made_for(keys.kubelets(desired.node), desired.config.key, desired.server)}
    else:
        brought = desired.places.brought
        specs = [one for one in desired.places.specs(desired.role) if one not in brought and not one.by_flag]
        made = keys.by_kubeadm(desired.inputs.kubeadm, desired.config.version, desired.text, specs, run.store.directory)
        # the local endpoint, as kubeadm itself writes it at the next upgrade
        local = made["controller-manager.conf"].server
        made[KUBELET_CONF] = dataclasses.replace(made[KUBELET_CONF], server=local)
        for spec in desired.places.servers:
            wanted = naming(spec, NamingFacts(node=desired.node, address=desired.config.address))
            made[spec.name] = keys.made_for(wanted, keys.algorithm_of(made))
    sans = x509.DNSName(desired.node), *map(general_name, desired.addresses)
    made[KUBELET_SERVER] = keys.made_for(keys.kubelets(desired.node, sans), keys.algorithm_of(made))
    return made


def _open(run: Run, spec: CertificateSpec, one: Made) -> OpenRequest:
    renewal = run.settings.renewal
    is_short = spec.name == SUPER_ADMIN
    validity = min(renewal.validity, renewal.min_validity + _SUPER_ADMIN_MORE) if is_short else renewal.validity
    request = SignRequest(spec=spec, csr_pem=one.csr_pem, validity=validity)
    return OpenRequest(request=request, key_pem=one.key_pem, created=run.now(), run_id=run.record.run_id)


def _item(spec: CertificateSpec, places: Places) -> Item:
    """A certificate that is not there yet."""
    key: Path | None
    if spec.name == KUBELET_CONF:
        key = certificate = places.kubelet_current
    elif spec.kubeconfig:
        key, certificate = None, places.kubeconfigs / spec.base
    else:
        key, certificate = places.serving if spec.name == KUBELET_SERVER else places.pair(spec)
    return Item(
        spec=spec,
        authority_external=True,
        certificate_path=certificate,
        key_path=key,
        embedded=key is None,
        anchor_path=places.authority(spec.authority),
        certificates=(),
        state="missing",
        trouble=None,
        managed=True,
        listed=spec.listed,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Unfinished:
    """One node's bootstrap that has begun; its keys are among the open requests."""

    role: Role
    config: str  #: kubeadm's, from which the CSRs were made.
    servers: Mapping[str, str]  #: By kubeconfig.
    names: tuple[str, ...]  #: Of the certificates.
    sa_key: str = field(default="", repr=False)  #: PEM; empty where it comes from elsewhere.
    sa_public: str = ""


def unfinished_file(store: Store) -> StateFile[Unfinished]:
    """The file in the state directory; a damaged one costs new keys and requests, and nothing else."""
    what = "what the requests of a new node are for"
    return coded(Unfinished, store.bootstrap, what, OnDamage.START_OVER, key="bootstrapV1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """The answers that were found to a new node's requests."""

    answered: Sequence[Answered]
    waiting: Sequence[Outcome] = ()  #: A CA or an operator has the request.
    strange: Sequence[BridgeError] = ()  #: Answers to something else.


def expectations(run: Run, desired: DesiredNode, cas: Certificates) -> dict[str, verify.Expectation]:
    """The expectations that answers are checked against, by authority."""
    settings = run.settings
    return {
        name: verify.Expectation(
            anchors=certificates,
            anchor_name=str(desired.places.authority(AUTHORITIES[name])),
            now=run.now(),
            min_validity=settings.renewal.min_validity,
            extra_subject=settings.extra_subject(name),
            cross=cross.behind(settings, name, certificates[0], run.now()),
        )
        for name, certificates in cas.items()
    }


def gather_answers(
    run: Run, desired: DesiredNode, prepared: Sequence[Prepared], expected: Mapping[str, verify.Expectation]
) -> Answers:
    """Take proven and carried answers; ask the CAs for the rest, or write a request bundle for a desk."""
    answered = [one for each in prepared if (one := _proven_before(each, expected)) is not None]
    carried, strange = _carried(run, desired, _rest(prepared, answered), expected)
    answered += carried
    rest = _rest(prepared, answered)
    if desired.inputs.request is not None and rest:
        requests, _ = airgap.carry(run, rest, desired.inputs.request)
        why = f"{desired.inputs.request} is to be carried to the desk, fingerprint {short_fingerprint(requests)}"
        return Answers(answered=answered, waiting=[_waits(one, why) for one in rest], strange=strange)
    at_desks = [one for one in rest if one.open and one.open.bundles]
    away = [one for one in at_desks if one.authority not in run.settings.authorities]
    answered += _asked(run, [one for one in rest if one not in away], expected)
    waiting = [_waits(one, "an operator has the request") for one in away]
    return Answers(answered=answered, waiting=waiting, strange=strange)


def _rest(prepared: Sequence[Prepared], answered: Sequence[Answered]) -> list[Prepared]:
    had = {one.prepared.name for one in answered}
    return [one for one in prepared if one.name not in had]


def _carried(
    run: Run, desired: DesiredNode, prepared: Sequence[Prepared], expected: Mapping[str, verify.Expectation]
) -> tuple[list[Answered], Sequence[BridgeError]]:
    if not desired.inputs.answers:
        return [], ()
    found = airgap.answers_in(run, desired.inputs.answers)
    answered = [
        airgap.answered_by(run, one, found, expected[one.authority]) for one in prepared if one.name in found.candidates
    ]
    return answered, tuple(found.strange)


def _asked(run: Run, prepared: Sequence[Prepared], expected: Mapping[str, verify.Expectation]) -> list[Answered]:
    if not prepared:
        return []
    lacking = {one.authority for one in prepared} - run.settings.authorities.keys()
    if lacking:
        raise NoSignerError(
            f"wanted a CA or a desk for {', '.join(name for name in AUTHORITIES if name in lacking)}, found none"
        )
    items = [one.item for one in prepared]
    with reaching(run.settings, items, expected, run.progress) as reached:
        return issue(run, prepared, reached(), expected)


def _proven_before(one: Prepared, expected: Mapping[str, verify.Expectation]) -> Answered | None:
    """An answer that an earlier run has checked and kept, if it still holds."""
    made, wanted = one.open, expected[one.authority]
    if made is None or made.answer is None or verify.error_of(made.answer, one.request, wanted) is not None:
        return None
    return Answered(prepared=one, expected=wanted, label=made.backend, answer=made.answer)


def _waits(one: Prepared, why: str) -> Outcome:
    return outcome_of(one.item, WaitingError(why, hint="run the same command again, with --answer FILE"))
