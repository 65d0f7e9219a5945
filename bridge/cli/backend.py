"""`backend test`: the suite that every backend passes, run against a backend as it is configured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated

import typer
from cryptography import x509

from bridge.ca import registry
from bridge.ca.conformance import ABILITIES, CHECKS, FURTHER_ABILITIES, Check, NotSupportedError, Trial, abilities
from bridge.cli.options import ZERO, Common, command, duration_option, group, utc_now
from bridge.cli.printing import say, say_sentence
from bridge.contract import Backend, ListsIssuers, Spends
from bridge.errors import BackendUnavailableError, BridgeError, Exit, SettingsError, SettingsProblem, WaitingError
from bridge.node import inventory
from bridge.node.inventory import Node
from bridge.node.sample_pki import Cluster, ThrowawayCA, ca_certificate, leaf_certificate
from bridge.pki import csr, verify
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, SPECS
from bridge.system.console import doing, printable

_SAMPLE_LIFETIME = timedelta(days=1)

commands = typer.Typer()
backend = group(commands, "backend", "Try a CA that the settings name.")


@command(backend, "test")
def run_suite(
    common: Common,
    authority: Annotated[str, typer.Argument(help="ca, etcd-ca or front-proxy-ca.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME…]", help="Only these. [default: all of the authority]")
    ] = None,
    wait: Annotated[timedelta, duration_option('For a CA that answers later, such as "10m".')] = ZERO,
) -> int:
    """
    Run the suite that every backend passes against an authority's backend; the node stays as it is.

    It asks for real certificates with the node's names, a dozen or more per name, for keys that it throws away.
    """
    settings, now = common.settings(), utc_now()
    names = names or []
    _assert_known(authority, names)
    configured = registry.configured(settings, [authority])[authority]
    node = inventory.of(settings.node)
    opened = configured.open()
    try:
        _assert_nothing_is_spent(opened, configured.label)
        live, sample = _certificates(node, authority, names, now)
        trial = Trial(
            backend=opened,
            live=live,
            expected=_expectation(node, settings, authority, opened, now),
            validity=settings.renewal.validity,
            patience=wait,
            node=settings.node.node_name,
            cluster=settings.node.cluster,
        )
        say_sentence(_heading(configured.label, authority, trial, sample=sample))
        codes = []
        for line, code in _results(trial):
            say_sentence(printable(line), hanging=11)
            codes.append(code)
        say(f"{len(trial.issued)} certificates were signed, for keys that are nowhere any more")
    finally:
        registry.close(opened)
    return Exit.worst(codes)


def _assert_nothing_is_spent(backend: Backend, label: str) -> None:
    if isinstance(backend, Spends) and (credential := backend.spends()):
        raise BridgeError(
            f"{label}: wanted credentials that can be used again, found {credential}",
            hint="the next renewal needs it; put another one there for the test",
        )


def _assert_known(authority: str, names: Sequence[str]) -> None:
    if authority not in AUTHORITIES:
        raise SettingsError([SettingsProblem("AUTHORITY", f"one of {', '.join(AUTHORITIES)}", repr(authority))])
    ours = [name for name, spec in SPECS.items() if spec.authority.name == authority]
    wrong = [SettingsProblem("NAME", f"one of {', '.join(ours)}", repr(name)) for name in names if name not in ours]
    if wrong:
        raise SettingsError(wrong)


def _certificates(
    node: Node, authority: str, names: Sequence[str], now: datetime
) -> tuple[Mapping[str, x509.Certificate], bool]:
    """Certificates to ask for the like of, by name, and whether they are made up: the node has none, or not those named."""
    live = {item.spec.name: item.certificates[0] for item in node.items
            if item.spec.authority.name == authority and item.managed and item.state == "present"
            and not item.foreign and item.pair is None}  # fmt: skip
    if live and set(names) <= live.keys():
        return {name: live[name] for name in live if not names or name in names}, False
    key = csr.generate_key("ecdsa-p256")
    begin, end = now - _SAMPLE_LIFETIME, now + _SAMPLE_LIFETIME
    ca = ThrowawayCA(certificate=ca_certificate("sample", key, begin, end), key=key)
    wanted = [SPECS[name] for name in names] or [
        spec for spec in SPECS.values() if spec.authority.name == authority and spec.of_kubeadm
    ]
    return {
        spec.name: leaf_certificate(spec, key, ca, Cluster(), not_before=begin, not_after=end) for spec in wanted
    }, True


def _expectation(node: Node, settings: Settings, authority: str, backend: Backend, now: datetime) -> verify.Expectation:
    """The node's own CA certificate is the anchor; where there is none, what the backend says is the CA's."""
    files = {one.authority.name: str(one.path) for one in node.authorities}
    anchors, name = node.bundles.get(authority, ()), files.get(authority, "")
    if not anchors and isinstance(backend, ListsIssuers):
        anchors, name = tuple(backend.issuers()[-1:]), "the CA's own word"
    if not anchors:
        raise BridgeError(
            f"wanted the certificate of {authority} to compare with, found none on this node, and the backend tells none",
            hint="--pki-dir tells where ca.crt, etcd/ca.crt and front-proxy-ca.crt are",
        )
    return verify.Expectation(
        anchors=anchors,
        anchor_name=name,
        now=now,
        min_validity=settings.renewal.min_validity,
        extra_subject=settings.extra_subject(authority),
    )


def _heading(label: str, authority: str, trial: Trial, *, sample: bool) -> str:
    able = ", ".join(abilities(trial.backend, ABILITIES | FURTHER_ABILITIES)) or "nothing"
    whose = "names that are made up" if sample else "this node's names"
    return printable(
        f"{label} for {authority}, compared with {trial.expected.anchor_name}; "
        f"{whose}: {', '.join(trial.live)}; beside signing it has: {able}"
    )


def _results(trial: Trial) -> Iterator[tuple[str, int]]:
    """A line and an exit code for each check; after an answer that does not come nothing more is asked for."""
    over = ""
    for check in CHECKS:
        if over and check is not CHECKS[-1]:
            yield _line("not tried", check, over), Exit.DONE
            continue
        with doing(check.name, is_plain=False):
            line, code = _result(check, trial)
        if code in {Exit.WAITING, Exit.UNAVAILABLE}:
            over = "the CA has not answered" if code == Exit.WAITING else "the CA is not available"
        yield line, code


def _result(check: Check, trial: Trial) -> tuple[str, int]:
    try:
        check.run(trial)
    except NotSupportedError as e:
        return _line("can't", check, str(e)), Exit.DONE
    except (WaitingError, BackendUnavailableError) as e:
        return _line("no answer", check, _with_hint(e)), e.exit_code
    except BridgeError as e:
        if not check.must:
            return _line("differs", check, f"{e}; a CA may do so"), Exit.DONE
        return _line("FAILED", check, _with_hint(e)), e.exit_code
    return _line("ok", check), Exit.DONE


def _with_hint(error: BridgeError) -> str:
    return f"{error}{f' ({error.hint})' if error.hint else ''}"


def _line(word: str, check: Check, text: str = "") -> str:
    return f"{word:<10} {check.name}{f': {text}' if text else ''}"
