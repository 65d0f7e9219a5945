"""Checks of the CAs, as far as a CA can be asked without spending a signature."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from bridge.ca import CA, registry
from bridge.ca.retry import NoWaitPolicy
from bridge.contract import Backend, PlannedCertificate
from bridge.diagnosis import Finding, Level, from_error
from bridge.diagnosis.installed import ca_end, private_file
from bridge.errors import BackendUnavailableError, BridgeError, Exit, SettingsError
from bridge.node.inventory import Item, Node
from bridge.pki import csr, expiry, verify
from bridge.pki.certificates import spki
from bridge.pki.expiry import duration_text, minute
from bridge.pki.kubeadm_names import named
from bridge.renewal import verify_and_install
from bridge.renewal.gate import Attempts
from bridge.rotation import Phase, places, planning, text
from bridge.settings.tables import Settings
from bridge.settings.windows import ever_waits
from bridge.specs import CertificateSpec
from bridge.state import Store, credentials
from bridge.state.credentials import Credential, CredentialEndedError, CredentialFile
from bridge.state.session import not_yet_signing
from bridge.words import one_line

#: From this difference on, certificates of a CA whose clock is ahead are refused (`verify.CLOCK_SKEW`).
_CLOCK_IS_WRONG = timedelta(minutes=5)
_OTHER_MEANS = "a replacement by other means may be under way; `ca-bridge rotate-ca` changes nothing before it is over"


class Question(NamedTuple):
    """The certificates about which one authority's CA is asked."""

    specs: Sequence[CertificateSpec]
    wanted: Sequence[PlannedCertificate]  #: The requests that a renewal would make; empty where they are not known.
    expected: verify.Expectation | None  #: None: no CA file is known here, only what the CA reports.
    is_desks: bool = False  #: A desk asks: the end of the CA's certificate comes from the CA, and not from a file.


def look(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Check all CAs of this node's certificates."""
    yield from _windows(settings, now)
    yield from failures(settings)
    yield from replacements(node, settings, now)
    yield from _shared_keys(node)
    items = [item for item in node.items if item.managed and item.state == "present" and not item.foreign]
    names = dict.fromkeys(item.spec.authority.name for item in items)
    if not settings.authorities:
        yield from _credentials(settings, credentials.own_places(settings), now)
        words = f"by hand: no [authority.NAME] ({settings.source.file or 'no settings file'}), so that no CA was asked"
        carried = "`ca-bridge export` writes requests for a CA desk, `ca-bridge import` takes its answers"
        yield Finding.note("by-hand", "CAs", f"{words}; {carried}")
        return
    later = not_yet_signing(settings, node.bundles)
    demands, _ = verify_and_install.expectations(node, settings, items, now, later)
    for name in later.keys() & demands.keys():
        demands[name] = dataclasses.replace(demands[name], anchor_name=settings.authorities[name].next["anchor"])
    questions = {name: _question([i for i in items if i.spec.authority.name == name], demands[name], settings)
                 for name in names if name in demands}  # fmt: skip
    yield from ask_all(settings, names, questions, now)


def replacements(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Yield a finding about each CA that is being replaced: its phase, and since when."""
    try:
        replaced = places.look(settings, node, ())
    except BridgeError as e:
        yield from_error("ca-replacement", "CAs", e)
        return
    for one in replaced.values():
        about, standing = f"CA {one.name}", one.standing
        since = f"since {minute(one.since)} ({duration_text(timedelta(days=max((now - one.since).days, 0)))})"
        old, new = text(one.change.old), text(one.change.new)
        for problem in planning.unfit_elsewhere(one, standing.phase) if standing.phase is not None else ():
            hint = "change the file by hand, and restart the component that reads it"
            yield Finding.error("ca-replacement", about, problem.removeprefix(f"{one.name}: "), hint)
        if standing.phase is None:
            words = f"the files are of no phase: {'; '.join(standing.differing)}"
            yield Finding.error("ca-replacement", about, words, _OTHER_MEANS)
        elif standing.next is not None:
            hint = "the same `ca-bridge rotate-ca` command again finishes it; kubeadm may refuse this node until then"
            yield Finding.warning("ca-replacement", about, f"half way, “{standing.text}”, {since}", hint)
        elif standing.phase in (Phase.TRUSTED, Phase.ISSUED):
            words = f"{old} and {new} are trusted, phase “{standing.text}”, {since}"
            make = Finding.warning if one.is_late(now) else Finding.note
            yield make("ca-replacement", about, words, "`ca-bridge rotate-ca plan` shows what comes next")
        elif standing.phase is Phase.NEW:
            hint = f"move the keys of [authority.{one.name}.next] into [authority.{one.name}]"
            yield Finding.note("ca-replacement", about, f"{new} has taken its place, {since}", hint)
        else:
            yield Finding.note("ca-replacement", about, f"{new} is to take its place; no phase has begun")


def _shared_keys(node: Node) -> Iterator[Finding]:
    """Yield an error about each pair of this node's CAs with one key: one opens all that the other one guards."""
    keys = {s.authority.name: {spki(ca.public_key()) for ca in s.certificates} for s in node.authorities}
    for first, second in itertools.combinations(keys, 2):
        if keys[first] & keys[second]:
            words = f"wanted a key of its own for {first} and for {second}, found one key in the files of both"
            hint = f"have another CA made for {second}; `ca-bridge help replace-the-ca` says how it comes into use"
            yield Finding.error("ca-shared-key", f"CA {second}", words, hint)


def _question(items: Sequence[Item], expected: verify.Expectation, settings: Settings) -> Question:
    wanted = []
    for item in items:
        with contextlib.suppress(csr.CannotCarryError):  # a renewal reports it
            wanted.append(_wanted(item, expected, settings))
    return Question(specs=[item.spec for item in items], wanted=wanted, expected=expected)


def _wanted(item: Item, expected: verify.Expectation, settings: Settings) -> PlannedCertificate:
    live, renewal = item.certificates[0], settings.renewal
    key, as_named = renewal.key, live
    if item.pair is not None:
        key, as_named = item.pair.key or renewal.key, named(live, item.pair.naming)
    left = live.not_valid_after_utc - verify.BACKDATING - expected.now
    return PlannedCertificate(
        spec=item.spec,
        certificate=as_named,
        key=csr.key_algorithm(live, key),
        validity=renewal.validity,
        at_least=min(max(renewal.min_validity, left), renewal.validity),
        extra_subject=expected.extra_subject,
    )


# --- asking ----------------------------------------------------------------------------------------------------------


def ask_all(
    settings: Settings, names: Mapping[str, None], questions: Mapping[str, Question], now: datetime
) -> Iterator[Finding]:
    """Ask each authority's CA; a backend that does not answer is not asked again for its other authorities."""
    try:
        backends = registry.configured(settings, names)
    except SettingsError as e:
        for problem in e.problems:
            yield Finding.error("settings", "settings", str(problem), e.hint)
        return
    yield from _credentials(settings, registry.credentials(settings, backends), now)
    silent: dict[str, BackendUnavailableError] = {}
    with contextlib.ExitStack() as opened:  # backends stay open until all were asked, since they may share a login
        for name, configured in backends.items():
            for path in configured.settings.private_files():
                yield from private_file(path, str(path))
            if configured.name in silent:
                yield _refused(configured, silent[configured.name])
            elif name in questions:
                try:
                    yield from _ask(configured, questions[name], opened, settings, now)
                except BackendUnavailableError as e:
                    silent[configured.name] = e
                    yield _refused(configured, e)
                except BridgeError as e:
                    yield _refused(configured, e)


def _about(configured: registry.Configured) -> str:
    return f"backend of {configured.authority}"


def _refused(configured: registry.Configured, error: BridgeError) -> Finding:
    """Return a finding for the error; it is about the clock if a TLS certificate is not valid *yet*."""
    return from_error("clock" if "not yet valid" in error.reason else "backend", _about(configured), error)


def _ask(
    configured: registry.Configured,
    question: Question,
    opened: contextlib.ExitStack,
    settings: Settings,
    now: datetime,
) -> Iterator[Finding]:
    reached = CA.of(configured, NoWaitPolicy())
    opened.callback(reached.close)
    backend = reached.opened()
    spends = backend.spends()
    try:
        wrong = reached.preflight(*((), ()) if spends else (question.specs, question.wanted), question.expected)
        for name, error in wrong.items():
            yield from_error("what-the-ca-would-sign", name, error)
        yield from _clock(backend, configured)
        for key, end in reached.ask_ends(f"backend.{configured.name}").items():
            path = "" if end.file is None else str(end.file)
            yield _end(Credential(name=key, path=path, ends=end.ends, begins=end.begins, reported=now), settings, now)
        if not wrong:
            yield Finding.ok("backend", _about(configured), _answers(reached, spends))
    finally:
        for certificate in reached.certificates[:1] if question.is_desks else ():
            yield ca_end(certificate, f"CA {configured.authority}", now)


def _answers(reached: CA, spends: str) -> str:
    rest = f"; the login and its rights were not checked, because that would use up {spends}" if spends else ""
    if not reached.certificates:
        unknown = "no CA was asked, so which CA signs, and what, is unknown until it answers"
        return f"{reached.label} can be used; {unknown}{rest}"
    return f"{reached.label} answers, and is the right CA{rest}"


def _clock(backend: Backend, configured: registry.Configured) -> Iterator[Finding]:
    """Compare clocks: if the CA's is ahead, its certificates are refused as not yet valid; if behind, they end early."""
    ahead = backend.clock_ahead()
    if ahead is None or abs(ahead) <= verify.CLOCK_SKEW:
        return
    word = "ahead of" if ahead > timedelta() else "behind"
    amount = duration_text(timedelta(minutes=round(abs(ahead) / timedelta(minutes=1))))
    text = f"wanted the CA's clock and this node's to agree, found the CA's {amount} {word} this node's"
    level: Level = "error" if abs(ahead) > _CLOCK_IS_WRONG else "warning"
    hint = "put right whichever is wrong (`timedatectl`, `chronyc tracking`)"
    yield Finding(level, "clock", _about(configured), text, hint)


# --- our own credentials -----------------------------------------------------------------------------------------------


def _credentials(settings: Settings, places: Iterable[CredentialFile], now: datetime) -> Iterator[Finding]:
    """Return findings about credential files alone; `_ask` reports what a CA says about a token."""
    return (_end(credential, settings, now) for credential in credentials.look(settings, places, None))


def _end(credential: Credential, settings: Settings, now: datetime) -> Finding:
    if credential.ends is not None and not credential.is_near(settings.renewal.before, now):
        return Finding.ok("credential", credential.name, expiry.left_text(credential.ends, now))
    is_bad = credential.ends is None or credential.has_ended(now)
    level: Level = "error" if is_bad and not credential.is_key_alone else "warning"
    return Finding(level, "credential", credential.name, credential.text(now), CredentialEndedError.hint)


# --- what earlier runs found, and when the next may act ----------------------------------------------------------------


def failures(settings: Settings) -> Iterator[Finding]:
    """Yield a warning for each CA whose last renewals failed."""
    for name, found in Attempts(Store(settings.node.state_dir)).authorities.items():
        is_local = found.exit_code == Exit.FAILED  # errors of a CA have other exit codes
        cause = ", and not by a CA's fault" if is_local else ""
        text = f"{found}{cause}; the last failure: {found.reason}"
        about = "this node" if is_local else f"backend of {name}"
        yield Finding.warning("failed-runs", about, one_line(text))


def _windows(settings: Settings, now: datetime) -> Iterator[Finding]:
    renewal, about = settings.renewal, "renewal.window"
    if not renewal.window:
        return
    try:
        zone = renewal.window_zone.resolve()
    except SettingsError as e:
        yield from_error("window", about, e)
        return
    text = f"{renewal.window} ({zone})"
    if ever_waits(now, renewal.window, zone, renewal.before.of(renewal.validity)):
        yield Finding.ok("window", about, f"{text}; the timer must fire within it")
    else:
        text = f"wanted renewal.before longer than two windows take, found {renewal.before}: nothing waits for {text}"
        yield Finding.warning("window", about, text)
