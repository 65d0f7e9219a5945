"""One phase of a replacement on this node: a verb does only what its phase lacks, so a repeat goes on after a kill."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from bridge import control_plane
from bridge.ca import CA, registry
from bridge.ca.retry import NoWaitPolicy
from bridge.control_plane import ORDER, Reader, proof
from bridge.control_plane.proof import ProofFinding
from bridge.errors import BridgeError, Exit
from bridge.node.inventory import Node
from bridge.pki.certificates import is_signed_by, load_pem_certificates, name_text, pem, spki
from bridge.pki.expiry import minute
from bridge.renewal import in_use
from bridge.renewal.gate import next_ca_file
from bridge.renewal.renew import renew
from bridge.renewal.selection import RunOptions, Trust, select
from bridge.renewal.transaction import Transaction
from bridge.renewal.verify_and_install import Proven, Result
from bridge.rotation import Bundle, Phase, differences, objects, places, planning, text, texts
from bridge.rotation.places import Replaced, with_ca
from bridge.rotation.planning import NewCaError, NoWayBackError, OrderError, Step, Verb
from bridge.rotation.readiness import RotationOptions
from bridge.settings.tables import Settings, for_next
from bridge.specs import CA as CLUSTER_CA
from bridge.specs import KUBELET_CONF, SPECS, Component
from bridge.state import Outcome, Store, audit, backups, copies
from bridge.state.backups import Backup
from bridge.state.install import Replacement, install
from bridge.state.obligations import NotProven, unproven_file
from bridge.state.session import Now, Run, begun, give_up
from bridge.system.console import Progress
from bridge.system.paths import real_path
from bridge.system.state_file import OnDamage, StateFile, coded


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The result of a verb."""

    steps: Sequence[Step]
    result: Result
    phases: Mapping[str, str]  #: The phase of each CA afterwards, by its files.
    to_restart: Sequence[Component]  #: The components for an operator to restart, with `restart.method = "none"`.

    @property
    def exit_code(self) -> int:
        """The exit code of the worst outcome or error."""
        return self.result.exit_code


def run(
    settings: Settings, verb: Verb, names: Sequence[str], now: Now, progress: Progress, options: RotationOptions
) -> Done:
    """Bring this node's CAs (without names: all with a next CA) to a verb's phase; an error: nothing was replaced."""
    places.assert_has_next(settings)
    # the operator begins each phase, and a repeat after a kill restarts at once: no loop to hold back
    settings = dataclasses.replace(settings, restart=dataclasses.replace(settings.restart, min_interval=timedelta()))
    with begun(settings, now, progress, options.wait) as (ours, as_found):
        transaction = Transaction(ours, RunOptions())
        node = transaction.settle_earlier(as_found)
        cas = places.look(settings, node, names)
        back = _going_back(ours.store).read() or {}
        steps = tuple(
            planning.straight_to_the_new_ca(ca) if options.emergency else planning.planned(verb, ca, back.get(ca.name))
            for ca in cas.values()
        )
        if verb is not Verb.BACK:
            planning.assert_possible(steps, settings, ours.now(), emergency=options.emergency)
            assert_readable(steps, node, options)
            assert_signs_itself(settings, steps, progress)
            assert_keys_can_leave(steps, node, settings, options)
        to_do = [step for step in steps if not step.is_there]
        if transaction.may_go_on and to_do:
            options.assert_open(ours, node, to_do)
        if transaction.may_go_on and verb is not Verb.BACK:
            planning.assert_fits_elsewhere(steps)
        if not transaction.may_go_on or not to_do:
            result = _without_keys(ours, steps, transaction.with_earlier(Result()), options)
            return _done(ours, node, names, steps, result, is_over=transaction.may_go_on)
        if verb is Verb.ISSUE or (options.emergency and any(_leaves_to_issue(step) for step in to_do)):
            result = _issue(ours, transaction, node, to_do, options)
        elif verb is Verb.BACK and any(_leaves_to_issue(step) for step in to_do):
            result = transaction.with_earlier(_go_back(ours, transaction, node, to_do, options))
        else:
            if verb is Verb.BACK:
                _begin_back(ours, to_do)
            trusting = transaction.going_on(ours, RunOptions(trust=Trust(stays=options.emergency)))
            result = transaction.with_earlier(_trust(ours, trusting, node, to_do))
        result = _without_keys(ours, steps, result, options)
        is_over = result.backup_id is not None or verb is not Verb.BACK
        return _done(ours, node, names, steps, result, is_over=is_over)


def _done(run: Run, node: Node, names: Sequence[str], steps: Sequence[Step], result: Result, *, is_over: bool) -> Done:
    """End a verb: update the cluster's objects after the files, and read the phases off the files again."""
    result = _with_objects(run, node, steps, result)
    after = places.look(run.settings, run.read_node(), names)
    read = unproven_file(run.store).read() if run.settings.restart.method == "none" else None
    unproven = read or NotProven(certificates=())
    late = {*unproven.to_restart, *(node.spec(name).component for name in unproven.names)}
    if is_over:  # last, so that a repeat after a kill is the same `back`
        _note_going_back(run.store, {step.ca.name: None for step in steps})
    phases = {name: ca.standing.text for name, ca in after.items()}
    to_restart = [component for component in ORDER if component in late]
    return Done(steps=steps, result=result, phases=phases, to_restart=to_restart)


def _going_back(store: Store) -> StateFile[dict[str, Phase]]:
    """The file with the phases to which a `back` is on its way, by authority."""
    what = "the phases to which CAs of this node go back"
    return coded(dict[str, Phase], store.going_back, what, OnDamage.SET_ASIDE, key="phases")


def _note_going_back(store: Store, phases: Mapping[str, Phase | None]) -> None:
    """Record the phases to which these CAs are going back (None: no longer), and keep those of others."""
    file = _going_back(store)
    now = {**(file.read() or {}), **phases}
    file.put({name: phase for name, phase in now.items() if phase is not None})


def _with_objects(run: Run, node: Node, steps: Sequence[Step], result: Result) -> Result:
    """Update the cluster's objects if the node's files changed, and add errors about them to the result."""
    if result.exit_code != Exit.DONE:
        return result
    if late := _not_read(run, steps):
        run.progress.note(
            "not said to other nodes, which wait for it, since components of this one have not read the CAs of this phase: "
            f"{in_use.sentence(late)}; restart them, then the same command again"
        )
    changes = {step.ca.name: (step.ca.change, step.target) for step in steps}
    errors = objects.update(run, node, changes, says=not late)
    for step in steps:
        if step.ca.state.authority == CLUSTER_CA:
            change = step.ca.change
            errors += copies.trust(run.settings, run.record, change.bundles, change.bundle(step.target))
    return dataclasses.replace(result, errors=(*result.errors, *errors))


def _not_read(run: Run, steps: Sequence[Step]) -> list[ProofFinding]:
    """List the components that started before the current CAs, which they read only at their start."""
    cas = [step.ca for step in steps if step.ca.name == CLUSTER_CA.name]
    if not cas:
        return []
    node = run.read_node()
    files = [str(reader.path) for ca in cas for reader in readers(node, ca)]
    ends = (*(f"/{SPECS[name].base}" for name in _KUBECONFIGS), *files)
    findings = proof.by_files(node, run.settings, run.now()).findings
    return [finding for finding in findings if finding.state == "stale" and finding.what.endswith(ends)]


# --- what must be true before a verb begins ---------------------------------------------------------------------------


def assert_readable(steps: Sequence[Step], node: Node, options: RotationOptions) -> None:
    """Refuse an unreadable leaf that may be the old CA's (UnreadableCaError): no phase would replace it."""
    names = {step.ca.name for step in steps if _leaves(step) and not step.is_there and not options.emergency}
    items = (item for item in node.items if item.spec.authority.name in names and not item.pair)
    if lost := [item for item in items if item.state in ("broken", "unreadable")]:
        raise places.UnreadableCaError("; ".join(f"{item.spec.name}: {item.trouble}" for item in lost))


def assert_signs_itself(settings: Settings, steps: Sequence[Step], progress: Progress) -> None:
    """Refuse a CA above the issuer that its backend names (NewCaError): we would trust all that it signs for others."""
    for one, backend in _to_be_asked(settings, [step.ca for step in steps if not step.is_there]):
        try:
            with contextlib.closing(CA.of(backend, NoWaitPolicy())) as ca:
                issuers = () if ca.opened().spends() else ca.issuers()
        except BridgeError as e:
            progress.note(f"{one.name}: not seen whether {text(one.change.new)} itself signs: {e}")
            continue
        if not issuers:
            progress.note(not_asked(one, backend.label))
        if issuers and spki(issuers[0].public_key()) != spki(one.change.new.public_key()):
            raise NewCaError(
                f"{one.name}: wanted the certificate of the CA that signs ({text(issuers[0])}) as next.anchor, found "
                f"{text(one.change.new)}: what that one signs for others would be trusted, too",
                hint='next.anchor = "FILE" with the first one; next.above = "allowed" accepts a CA above it that signs for '
                "this cluster alone; nothing was replaced",
            )


def not_asked(ca: Replaced, backend: str) -> str:
    """Return a sentence about a CA that does not name the certificate that signs."""
    return (
        f"{ca.name}: {backend} does not say which certificate signs: if it is one below {text(ca.change.new)}, what that "
        "one signs for others is trusted from `trust` on, and `issue` refuses the answers; compare the issuer of a "
        "certificate that it has signed"
    )


def silent_backends(settings: Settings, cas: Iterable[Replaced]) -> Iterator[str]:
    """Yield sentences about CAs whose backend can't name the certificate that signs, so that `trust` can't check it."""
    for ca, backend in _to_be_asked(settings, cas):
        if not backend.backend_type.can("issuers", "issuers_of"):
            yield not_asked(ca, backend.label)


def _to_be_asked(settings: Settings, cas: Iterable[Replaced]) -> list[tuple[Replaced, registry.Configured]]:
    """List the new CAs that must sign themselves and are not trusted yet, with their backends."""
    new = {ca.name: ca for ca in cas if ca.standing.phase is Phase.OLD and _must_sign_itself(settings, ca.name)}
    backends = registry.configured(for_next(settings, new), new) if new else {}
    return [(ca, backends[name]) for name, ca in new.items()]


def _must_sign_itself(settings: Settings, name: str) -> bool:
    return settings.authorities[name].next.get("above") != "allowed"


def assert_signed_by_it(settings: Settings, steps: Mapping[str, Step], proven: Sequence[Proven]) -> None:
    """Refuse answers from a CA below the new one (NewCaError), where the backend could not name it before."""
    for item in proven:
        name = item.prepared.item.spec.authority.name
        new = steps[name].ca.change.new
        if _must_sign_itself(settings, name) and not is_signed_by(item.verified.leaf, new):
            raise NewCaError(
                f"{item.name}: wanted a signature of {text(new)} itself, found one of {name_text(item.verified.leaf.issuer)} below "
                "it: what the first one signs for others is trusted, too",
                hint="`ca-bridge rotate-ca back`, then next.anchor with the certificate that signs; a CA above it that signs "
                'for this cluster alone is taken with next.above = "allowed"; nothing was replaced',
            )


def assert_keys_can_leave(steps: Sequence[Step], node: Node, settings: Settings, options: RotationOptions) -> None:
    """Refuse a step that a CA key left by kubeadm on this node makes impossible (OrderError, SettingsError)."""
    if options.keys_to is not None:
        places.assert_takes_keys(options.keys_to, settings.node)
    for step in steps:
        ca = step.ca
        if step.target is Phase.OLD or ca.change.keeps_key:
            continue
        if flags := places.signing_flags(node, ca):
            raise OrderError(
                f"{ca.name}: wanted a controller manager that does not sign with {ca.state.path}, found "
                f"{', '.join(flags)}: it ends at a file with two CAs, or with another key's",
                hint="`ca-bridge help gateway` says how the flags are emptied, and what signs instead; nothing was replaced",
            )
        if ca.state.key == "local" and options.keys_to is None and _leaves(step):
            raise OrderError(
                f"{ca.name}: wanted its key away from this node, or --keys-to, found {places.key_place(settings.node, ca)}",
                hint="--keys-to DIRECTORY moves it there, with the new certificates in use: a disk that leaves the node; "
                "nothing was replaced",
            )


def _leaves(step: Step) -> bool:
    """Whether the old CA stops signing with this step, so that its key must not stay beside the new certificate."""
    return step.target in (Phase.ISSUED, Phase.NEW) and not step.ca.change.keeps_key


def _without_keys(run: Run, steps: Sequence[Step], result: Result, options: RotationOptions) -> Result:
    """Move the former CAs' keys away, and return the result with errors; keys stay if anything failed or waits."""
    if options.keys_to is None or result.exit_code != Exit.DONE:
        return result
    cas = [step.ca for step in steps if _leaves(step)]
    errors: list[BridgeError] = []
    for note in places.take_keys_away(cas, run.settings.node, options.keys_to):
        if isinstance(note, str):
            run.record.add(audit.TRUSTED, result=note)
            run.progress.note(note)
        else:
            errors.append(note)
    return dataclasses.replace(result, errors=(*result.errors, *errors))


# --- trust ------------------------------------------------------------------------------------------------------------

#: Kubeconfigs from which components read the cluster's CA at their start.
_KUBECONFIGS = ("controller-manager.conf", "scheduler.conf", KUBELET_CONF)


def readers(node: Node, ca: Replaced) -> list[Reader]:
    """List this node's components that read this CA's file only at their start."""
    real = real_path(ca.state.path)
    return [reader for reader in control_plane.readers(node) if real_path(reader.path) == real]


def _trust(run: Run, transaction: Transaction, node: Node, steps: Sequence[Step]) -> Result:
    """Replace the CA file and the kubeconfigs' CA data; restart and check the components that read them once."""
    files = [file for step in steps for file in step.ca.trust_files(step.target)]
    _record(run, steps)
    about = audit.about(phases={step.ca.name: step.target.value for step in steps})
    try:
        with transaction.owing():
            _owe_reading(run, transaction, node, steps, {file.certificate for file in files})
            backup_id = install(run.store, files, run.record.run_id, about)
    except BridgeError as e:
        for step in steps:
            run.record.add(audit.FAILED, step.ca.name, authority=step.ca.name, error=e)
        raise
    run.record.write_late()
    return transaction.activated(Result(outcomes=(), backup_id=backup_id))


def _owe_reading(run: Run, transaction: Transaction, node: Node, steps: Sequence[Step], names: Collection[str]) -> None:
    """Record, before the installation, the components to restart for these CAs and to prove on them."""
    seen_by = {reader.certificate for step in steps for reader in readers(node, step.ca)}
    seen_by |= {name for step in steps if step.ca.name == CLUSTER_CA.name for name in _KUBECONFIGS}
    at_once = {item.spec.name for step in steps if step.ca.change.keeps_key for item in step.ca.items}
    to_prove = {*names, *seen_by, *at_once}  # a certificate for the same key is the CA of all leaves from now on
    used = [(i.spec, i.certificates[0]) for i in node.items if i.spec.name in to_prove and i.certificates]
    as_if_new = [Outcome(name=s.name, authority=s.authority.name, old=leaf, new=leaf) for s, leaf in used]
    transaction.owe_use(as_if_new)
    file = unproven_file(run.store)
    unproven = file.read() or NotProven(certificates=())
    users = {node.spec(name).component for name in seen_by} & in_use.running(node)
    wanted = [component for component in Component if component in users]
    in_use.keep(file, dataclasses.replace(unproven, to_restart=tuple(dict.fromkeys([*unproven.to_restart, *wanted]))))


def _record(run: Run, steps: Sequence[Step]) -> None:
    for step in steps:
        name, bundle = step.ca.name, step.ca.change.bundle(step.target)
        run.record.add(audit.TRUSTED, name, authority=name, result=f"{step.target.value}: {texts(bundle)}")
    run.record.write()  # the audit log comes before the installation


# --- issue ------------------------------------------------------------------------------------------------------------


def _issue(run: Run, earlier: Transaction, node: Node, steps: Sequence[Step], options: RotationOptions) -> Result:
    """
    Install all leaves by the new CA, and the CAs' new order, in one step, or nothing (an error: nothing was replaced).

    The order: no request waits at the old CA; the audit log, then the list of next CAs, are on disk; the new CA is asked;
    its answers are checked, then tried on all servers (`accept`); only then anything is installed.
    """
    by_name = {step.ca.name: step for step in steps}
    run = dataclasses.replace(run, settings=for_next(run.settings, by_name))
    names = [name for step in steps for name in _leaves_to_issue(step)]

    def accept(proven: Sequence[Proven]) -> None:
        """Refuse answers that the new CA itself did not sign, or that a server rejects; called before the installation."""
        # no earlier phase restarted the components that read a CA only at their start
        if first := [step for step in steps if options.emergency or step.ca.standing.phase is Phase.OLD]:
            _owe_reading(run, transaction, node, first, ())
        assert_signed_by_it(run.settings, by_name, proven)
        pairs = {item.name: (pem(*item.verified.chain), item.prepared.key_pem) for item in proven}
        options.assert_accepted(run, node, pairs)

    bundles = {name: step.ca.change.bundle(step.target) for name, step in by_name.items()}
    files, edit = tuple(_beside_leaves(steps, names)), functools.partial(_with_cas, steps=steps)
    trust = Trust(bundles=bundles, files=files, edit=edit, gate=accept, stays=options.emergency)
    renewal = RunOptions(names=tuple(names), all_or_nothing=True, trust=trust)
    transaction = earlier.going_on(run, renewal)
    _assert_none_waits(run, by_name, names)
    selection = select(node, run.settings, renewal, run.now(), requests=run.requests)
    if selection.failed:
        return transaction.with_earlier(Result(outcomes=selection.failed))
    if left := sorted(set(names) - {item.spec.name for item in selection.items}):
        raise OrderError(f"can't issue all certificates, since these stay: {', '.join(left)}; no CA was asked")
    _record(run, steps)
    next_cas = next_ca_file(run.store)
    next_cas.put(tuple(dict.fromkeys([*(next_cas.read() or ()), *by_name])))
    result = renew(run, transaction, selection, node, renewal)
    if result.backup_id is not None:
        _forget_asked(run, by_name)
    return result


def _beside_leaves(steps: Sequence[Step], names: Collection[str]) -> Iterator[Replacement]:
    """Yield the files that get the CAs of the phase, without kubeconfigs whose leaf is renewed: these get both at once."""
    items = [(step, item) for step in steps for item in step.ca.items if item.spec.name in names and item.embedded]
    both = {item.certificate_path for step, item in items if str(item.certificate_path) in step.ca.confs}
    for step in steps:
        yield from (file for file in step.ca.trust_files(step.target) if file.path not in both)


def _with_cas(file: Replacement, steps: Sequence[Step]) -> Replacement:
    """Give a new kubeconfig, or the CA file of a further pair, the CAs of the phase."""
    if file.data is None:
        return file
    for step in steps:
        change, bundle = step.ca.change, step.ca.change.bundle(step.target)
        if str(file.path) in step.ca.confs:
            return dataclasses.replace(file, data=with_ca(file.path, file.data, change, bundle))
        places_of_pairs = (place for item in step.ca.items if item.pair is not None for place in item.pair.places)
        if file.path in [place.ca_file for place in places_of_pairs]:
            above = [ca for ca in load_pem_certificates(file.data) if ca not in step.ca.seen.bundle]
            return dataclasses.replace(file, data=pem(*above, *bundle))
    return file


def _assert_none_waits(run: Run, authorities: Collection[str], names: Collection[str]) -> None:
    """Refuse open requests at the CA that signs now (OrderError): its answer would be the wrong certificate."""
    next_cas = next_ca_file(run.store).read() or ()
    for request in run.requests:
        authority = request.request.spec.authority.name
        if request.is_waiting and request.name in names and authority in authorities and authority not in next_cas:
            raise OrderError(
                f"{request.name}: wanted no open request at the CA that is replaced, found one of {minute(request.created)}",
                hint=f"wait for its answer, or `ca-bridge pending cancel {request.name}`; no CA was asked",
            )


def _forget_asked(run: Run, names: Collection[str]) -> None:
    """Forget that the next CAs were asked: their answers are installed or given up."""
    file = next_ca_file(run.store)
    file.put(tuple(name for name in file.read() or () if name not in names))


def _begin_back(run: Run, steps: Sequence[Step]) -> None:
    """Record the target phases, and give up requests at a next CA that no longer signs: no renewal may wait for it."""
    _note_going_back(run.store, {step.ca.name: step.target for step in steps})
    next_cas, signing = next_ca_file(run.store).read() or (), (Phase.TRUSTED, Phase.OLD)
    back = [step.ca for step in steps if step.target in signing]
    names = {ca.name for ca in back if ca.standing.phase is Phase.ISSUED or ca.name in next_cas}
    for name in [opened.name for opened in run.requests if opened.request.spec.authority.name in names]:
        give_up(run, name, "the CA goes back")
    run.requests.save()
    _forget_asked(run, names)


def _leaves_to_issue(step: Step) -> list[str]:
    differing = differences(step.ca.seen, step.ca.change, step.target)
    return [name for name in (item.spec.name for item in step.ca.items) if name in differing]


def _go_back(run: Run, transaction: Transaction, node: Node, steps: Sequence[Step], options: RotationOptions) -> Result:
    """Put back the files that the new CA's certificates replaced, with the CA files, from the backup of `issue`."""
    wanted = {step.ca.name for step in steps}
    backup = _backup_of(run, steps)
    names = {*wanted, *(item.spec.name for item in node.items if item.spec.authority.name in wanted)}
    backup = dataclasses.replace(backup, files=tuple(f for f in backup.files if f.certificate in names))
    options.assert_accepted(run, node, dict(_pairs(backup, node)))
    _begin_back(run, steps)
    _record(run, steps)
    transaction.owe_use(backups.outcomes_of(backup, node))
    edit = functools.partial(_as_target, steps=steps)
    done = backups.put_back(run, backup, node, lambda problem: problem.subject == backups.PHASE, edit)
    errors = [*done.late]
    if left := sorted({name for step in steps for name in _leaves_to_issue(step)} - {*backup.names}):
        text = f"{', '.join(left)}: wanted certificates of the CA before, found that they were made after `issue`"
        hint = (
            f"they work, since both CAs are trusted: `ca-bridge renew {' '.join(left)}` replaces them now; then "
            "`ca-bridge rotate-ca trust`, which says to other nodes that this one is back"
        )
        errors.append(NoWayBackError(text, hint=hint))
    result = Result(outcomes=done.outcomes, backup_id=done.replaced_backup_id, errors=tuple(errors))
    return transaction.activated(result)


def _as_target(file: Replacement, steps: Sequence[Step]) -> Replacement:
    """Give a backup's file the CAs of the phase: if `trust` was skipped, the backup of `issue` has the old CA alone."""
    for step in steps:
        bundle = step.ca.change.bundle(step.target)
        if file.data is not None and file.certificate == step.ca.name:
            is_same = set(step.ca.seen.bundle) == set(bundle)
            return dataclasses.replace(file, data=pem(*bundle), says_the_same=is_same)
        if file.data is not None and str(file.path) in step.ca.confs:
            return dataclasses.replace(file, data=with_ca(file.path, file.data, step.ca.change, bundle))
    return file


def _pairs(backup: Backup, node: Node) -> Iterator[tuple[str, tuple[bytes, bytes]]]:
    """Yield the certificates and keys in a backup, by name; damaged pairs are refused later, with the reason."""
    for item in node.items:
        files = backups.files_of(backup, item.spec.name)
        with contextlib.suppress(BridgeError, OSError, ValueError):
            if files:
                certificates, key = backups.pair_of(files, item)
                yield item.spec.name, (pem(*certificates), key)


def _has_leaves(backup: Backup, steps: Sequence[Step]) -> bool:
    """Whether a backup has leaves; kubeconfigs, also in backups of CA data, count only if no leaf has its own file."""
    items = {item.spec.name: item for step in steps for item in step.ca.items}
    has_pairs = any(not item.embedded for item in items.values())
    return any(f.certificate in items and not (has_pairs and f.path.suffix == ".conf") for f in backup.files)


def _backup_of(run: Run, steps: Sequence[Step]) -> Backup:
    """Find the newest backup that has the CA files of the previous phase together with their leaves."""
    wanted: dict[str, list[Bundle]] = {}
    for step in steps:
        spared = [Phase.OLD] if step.target is step.ca.change.spares else []
        wanted[step.ca.name] = [step.ca.change.bundle(phase) for phase in (step.target, *spared)]
    for backup in backups.read_all(run.store)[0]:
        has_cas = all(backups.cas_of(backup, name) in bundles for name, bundles in wanted.items())
        if has_cas and _has_leaves(backup, steps):
            return backup
    raise NoWayBackError(
        f"{', '.join(wanted)}: there is no backup of the phase “{steps[0].target.value}” with the old CA's certificates; "
        "`drop --emergency` from the phase “old” makes none, and old ones are deleted once the table `next` is gone",
        hint=f"{NoWayBackError.hint}; CAs that were issued one by one go back so: --ca {next(iter(wanted))}",
    )
