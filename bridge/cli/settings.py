"""`settings` and `backend test`: the settings file, and a trial of its CAs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from cryptography import x509

from bridge.ca import conformance, failed, registry
from bridge.cli.declare import Common, argument, command, duration_option, group
from bridge.cli.options import utc_now
from bridge.cli.printing import say, say_sentence
from bridge.contract import Backend, Secret, Selector
from bridge.desk import files as desk_files
from bridge.errors import BackendUnavailableError, BridgeError, Exit, SettingsError, SettingsProblem, WaitingError
from bridge.node.inventory import Node
from bridge.node.reading import read_node
from bridge.node.sample_pki import Cluster, ThrowawayCA, ca_certificate, leaf_certificate
from bridge.pki import csr, verify
from bridge.pki.expiry import duration_text
from bridge.secret import leaves
from bridge.settings import command_words
from bridge.settings.load import DEFAULT_FILE
from bridge.settings.tables import Commands, Components, Settings, for_next, for_rehearsal
from bridge.settings.windows import Windows
from bridge.specs import AUTHORITIES, KUBELET_SERVER, SPECS
from bridge.system.console import doing, log, printable
from bridge.system.files import held_directory, reasons, shipped
from bridge.words import name_found

commands = typer.Typer()
settings_group = group(commands, "settings", "Write, show and check the settings file.")
backend_group = group(commands, "backend", "Try a CA that the settings name.")


@command(settings_group, "init")
def settings_init(
    common: Common,
    kind: Annotated[
        str | None,
        argument(
            "The kind of CA: vault, openssl, cfssl, cmp, est, exec, kubernetes, door, exchange; or desk, on a CA host. "
            "Without it, the file has a commented-out example of each."
        ),
    ] = None,
    file: Annotated[Path | None, argument("[default: --config, or /etc/ca-bridge/config.toml]")] = None,
) -> None:
    """Write a commented settings file; an older one is never overwritten."""
    if kind is not None and file is None and ("/" in kind or "." in kind):
        file, kind = Path(kind), None
    path, text = file or common.config or DEFAULT_FILE, initial(kind)
    if os.path.lexists(path):
        another = f"ca-bridge settings init {kind} FILE" if kind else "ca-bridge settings init FILE"
        raise BridgeError(f"{path}: wanted no file, found one", hint=f"edit it, or write another one: `{another}`")
    write_new(path, text)
    say(f"wrote {path}")


def write_new(path: Path, text: str, mode: int = 0o644, *, hint: str = "") -> None:
    """Write a file, and its directory if that is missing; never over an older file (BridgeError)."""
    with (
        reasons(BridgeError, f"{path}: can't write it", hint=hint),
        held_directory(path.parent) as held,
        (held / path.name).open("x", encoding="utf-8") as opened,
    ):
        os.fchmod(opened.fileno(), mode)  # by descriptor: the directory's owner could replace the name by a link
        opened.write(text)


@command(settings_group, "show")
def settings_show(common: Common) -> None:
    """Show the settings in force, defaults included; a secret's value is never shown."""
    say(in_force(common.settings()))


@command(settings_group, "check")
def settings_check(common: Common) -> None:
    """Check the whole settings file, backends' tables included; asks no CA."""
    settings, problems = common.examined()
    if settings.source.file is None:
        hint = "the defaults are in force; `ca-bridge settings init KIND` writes a commented file"
        raise SettingsError([SettingsProblem("", "a settings file", "none", DEFAULT_FILE)], hint=hint)
    for variant in (settings, for_rehearsal(settings), for_next(settings, settings.authorities)):
        try:
            registry.configured(variant, () if problems else variant.authorities)
        except SettingsError as e:
            problems += [problem for problem in e.problems if problem not in problems]
    if problems:
        raise SettingsError(sorted(problems, key=lambda problem: problem.line or 0))
    if settings.policy.file is not None:
        desk_files.load_policy(settings, settings.policy.file)
    for text in doubts(settings):
        log.warning("%s", text)
    say(f"{settings.source.file}: well-formed; `ca-bridge doctor` tries it")


def doubts(settings: Settings) -> Iterator[str]:
    """Yield problems of well-formed settings: no CA, names from the examples, missing files and programs."""
    backends = registry.configured(settings, settings.authorities)
    if not backends:
        yield "no CA is named: `ca-bridge settings init KIND FILE` writes tables for one to a new file"
    programs: list[tuple[str, str]] = []
    found: dict[str, None] = {}
    for configured in backends.values():
        examples = ((key, text) for key, text in _texts(configured.settings) if _EXAMPLE_NAME.search(text))
        found |= dict.fromkeys(f"{configured.label}: {key} is still an example's: {text}" for key, text in examples)
        files = [value for _, value in leaves(configured.settings) if isinstance(value, Path)]
        files += _secret_files(configured, settings)
        found |= dict.fromkeys(f"{configured.label}: {path} is not there" for path in files if _is_absent(path))
        programs += ((configured.label, name) for name in configured.settings.programs())
    hooks = ((f"hooks.{key}", value.texts) for key, value in leaves(settings.hooks) if isinstance(value, Commands))
    restarts = ((f"restart.commands.{name}", (text,)) for name, text in settings.restart.commands.items())
    reloads = ((f"certificate.{pair.name}.reload", (pair.reload,)) for pair in settings.node.pairs)
    for key, texts in (*hooks, *restarts, *reloads):
        programs += ((key, word) for text in texts for word in command_words(text)[:1])
    if settings.gateway.inventory_command is not None:
        programs.append(("gateway.inventory_command", str(settings.gateway.inventory_command)))
    lacking = (f"{key}: {name} is no program that can be run here" for key, name in programs if not shutil.which(name))
    yield from dict.fromkeys([*found, *lacking])


#: Names that no site has (RFC 2606), and the account number of AWS's examples.
_EXAMPLE_NAME = re.compile(r"(?<![\w-])example\.(com|net|org)(?![\w.-])|\.example(?![\w.-])|:111122223333:")


def _texts(table: Any) -> Iterator[tuple[str, str]]:
    for key, value in leaves(table):
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", text) for name, text in value.items())
        else:
            items = value if isinstance(value, tuple) else (value,)
            yield from ((key, item) for item in items if isinstance(item, str))


def _secret_files(configured: registry.Configured, settings: Settings) -> Iterator[Path]:
    """Yield the files of an authority's secrets; a pattern in a path is filled in for each certificate of this node."""
    items = read_node(settings.node).items
    ours = [item.spec for item in items if item.spec.authority.name == configured.authority and item.managed]
    for _, value in leaves(configured.settings):
        if isinstance(value, Secret) and value.kind == "file":
            place = Selector(value.where, node=settings.node.node_name)
            yield from (Path(place(spec)) for spec in ours) if "{" in value.where else [Path(value.where)]


def _is_absent(path: Path) -> bool:
    """Whether a file is missing; a file that this user may not see counts as present."""
    with contextlib.suppress(OSError):
        return not path.exists()
    return False


#: The kind for a CA host, whose settings have none of a node's tables.
_DESK = "desk"


def examples() -> dict[str, str]:
    """Return the example settings of each kind of CA, and of a CA host, by kind."""
    found = {path.parent.name: path.read_text(encoding="utf-8") for path in example().parent.glob("*/config.toml")}
    return {name: text for name, text in sorted(found.items()) if "\n[authority.ca]" in text}


def initial(kind: str | None) -> str:
    """Return a settings file to start from: one kind's tables, then the program's own with every default."""
    general, kinds = example().read_text(encoding="utf-8"), examples()
    if kind is None:
        others = {name: re.sub("^(?=[^#\n])", "# ", text, flags=re.MULTILINE) for name, text in kinds.items()}
        headed = [f"# --- {name} ".ljust(120, "-") + f"\n{text}" for name, text in others.items() if name != _DESK]
        return "\n".join([general, *headed])
    if kind not in kinds:
        raise SettingsError([SettingsProblem("KIND", f"one of {', '.join(kinds)}", name_found(kind, kinds))])
    if kind == _DESK:
        return kinds[kind]
    parts = re.split(r"\n(?=\[)", general)
    return "\n".join([kinds[kind], *(part for part in parts if f"\n{part.partition(']')[0]}]" not in kinds[kind])])


def example() -> Path:
    """Return the installed example of the program's own tables; the examples of CAs are in directories beside it."""
    if (file := shipped("config.toml")) is None:
        raise BridgeError("the program's example settings are not installed", hint="reinstall it")
    return file


def in_force(settings: Settings) -> str:
    """Return the settings in force as equivalent TOML; a backend's keys are in the tables of its authorities."""
    lines = [f"# from {settings.source.file or 'defaults alone: no settings file'}"]
    named = dataclasses.replace(settings, node=dataclasses.replace(settings.node, name=settings.node.node_name))
    for name in ("node", "renewal", "policy", "restart", "cluster", "hooks", "audit", "backups", "gateway", "serve"):
        lines += ["", f"[{name}]", *lines_of(getattr(named, name))]
    backends = registry.configured(settings, settings.authorities)
    for name, type_name in {backend.name: backend.type_name for backend in backends.values()}.items():
        lines += ["", f"[backend.{json.dumps(name)}]", f"type = {json.dumps(type_name)}"]
    for authority, configured in backends.items():
        lines += ["", f"[authority.{authority}]", *lines_of(settings.authorities[authority])]
        lines += lines_of(configured.settings)
    if settings.kubelet_server is not None:
        lines += ["", f"[certificate.{KUBELET_SERVER}]", *lines_of(settings.kubelet_server)]
    for pair in settings.node.pairs:
        lines += ["", f"[certificate.{pair.name}]", *lines_of(pair)]
        for number, copy in enumerate(pair.copies, start=1):
            lines += ["", f"[certificate.{pair.name}.copies.{number}]", *lines_of(copy)]
    return "\n".join(lines) + "\n"


def lines_of(table: Any) -> Iterator[str]:
    """Yield a table's keys in force as lines of TOML."""
    for key, value in leaves(table):
        if isinstance(value, Secret):
            yield f"{key}_{value.kind} = {json.dumps(value.where)}"
        elif isinstance(value, Mapping):
            yield from (f"{key}.{json.dumps(name)} = {json.dumps(text)}" for name, text in value.items())
        elif value not in (None, "", timedelta()):  # these mean: not set
            yield f"{key} = {json.dumps(_plain(value))}"


def _plain(value: Any) -> Any:
    """Convert a value to its form in the settings file."""
    match value:
        case bool() | int() | tuple():
            return value
        case timedelta():
            return duration_text(value)
        case Windows():
            return list(map(str, value.windows))
        case Commands():
            return value.texts
        case Components(which="listed"):
            return [component.value for component in value.listed]
        case _:
            return str(value)


# --- a trial of a CA ----------------------------------------------------------------------------------------------------

_SAMPLE_LIFETIME = timedelta(days=1)


@command(backend_group, "test")
def run_suite(
    common: Common,
    authority: Annotated[str, argument("ca, etcd-ca or front-proxy-ca.")],
    names: Annotated[list[str] | None, argument("Only these. [default: all of the authority]", "[NAME…]")] = None,
    wait: Annotated[timedelta, duration_option('For a CA that answers later, such as "10m".')] = timedelta(),
) -> int:
    """
    Test an authority's backend with the suite that every backend passes; the node stays as it is.

    It asks for real certificates with the node's names, a dozen or more per name, for keys that it throws away.
    """
    settings, now = common.settings(), utc_now()
    names = names or []
    _assert_known(authority, names)
    configured = registry.configured(settings, [authority])[authority]
    node = read_node(settings.node)
    opened = configured.open()
    try:
        if credential := opened.spends():
            text = f"{configured.label}: wanted credentials that can be used again, found {credential}"
            raise BridgeError(text, hint="the next renewal needs it; put another one there for the test")
        live, sample = _certificates(node, authority, names, now)
        trial = conformance.Trial(
            backend=opened,
            live=live,
            expected=_expectation(node, settings, authority, opened, now),
            validity=settings.renewal.validity,
            patience=wait,
            node=settings.node.node_name,
            cluster=settings.node.cluster,
        )
        known = (*conformance.ABILITIES, *conformance.FURTHER_ABILITIES)
        able = ", ".join(conformance.abilities(opened, known)) or "nothing"
        whose = "names that are made up" if sample else "this node's names"
        about = f"{configured.label} for {authority}, compared with {trial.expected.anchor_name}; {whose}"
        say_sentence(printable(f"{about}: {', '.join(live)}; beside signing it has: {able}"))
        codes = []
        for line, code in _results(trial):
            say_sentence(printable(line), hanging=11)
            codes.append(code)
        say(f"{len(trial.issued)} certificates were signed, for keys that are nowhere any more")
        if opened.can("candidates") and (trial.issued or Exit.WAITING in codes):
            say_sentence("the requests of this test stay in the outbox: remove them, or a desk signs them for nothing")
    finally:
        opened.close()
    return Exit.worst(codes)


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
    """Return the certificates to test with, by name, and whether they are samples because the node lacks some."""
    live = {item.spec.name: item.certificates[0] for item in node.items
            if item.spec.authority.name == authority and item.managed and item.state == "present"
            and not item.foreign and item.pair is None}  # fmt: skip
    if live and set(names) <= live.keys():
        return {name: live[name] for name in live if not names or name in names}, False
    key = csr.generate_key("ecdsa-p256")
    begin, end = now - _SAMPLE_LIFETIME, now + _SAMPLE_LIFETIME
    ca = ThrowawayCA(certificate=ca_certificate("sample", key, begin, end), key=key)
    of_kubeadm = [name for name, spec in SPECS.items() if spec.authority.name == authority and spec.of_kubeadm]
    return {name: leaf_certificate(SPECS[name], key, ca, Cluster(), not_before=begin, not_after=end)
            for name in names or of_kubeadm}, True  # fmt: skip


def _expectation(node: Node, settings: Settings, authority: str, backend: Backend, now: datetime) -> verify.Expectation:
    """Return the expectation for the test, with the node's own CA certificate as anchor, or else the backend's."""
    files = {state.authority.name: str(state.path) for state in node.authorities}
    anchors, name = node.bundles.get(authority, ()), files.get(authority, "")
    if not anchors:
        anchors, name = tuple(backend.issuers()[-1:]), "the CA's own word"
    if not anchors:
        text = f"there is no certificate of {authority} to compare with, on this node or from the backend"
        raise BridgeError(text, hint="--pki-dir tells where ca.crt, etcd/ca.crt and front-proxy-ca.crt are")
    return settings.expectation(authority, anchors, name, now)


def _results(trial: conformance.Trial) -> Iterator[tuple[str, int]]:
    """Yield a line and an exit code for each check; after a missing answer the CA is asked for nothing more."""
    over = ""
    for check in conformance.CHECKS:
        if over and check is not conformance.CHECKS[-1]:
            word, text, code = "not tried", over, Exit.DONE
        else:
            with doing(check.name, is_plain=False):
                word, text, code = _result(check, trial)
        if code in {Exit.WAITING, Exit.UNAVAILABLE}:
            over = "the CA has not answered" if code == Exit.WAITING else "the CA is not available"
        yield f"{word:<10} {check.name}{f': {text}' if text else ''}", code


def _result(check: conformance.ConformanceCheck, trial: conformance.Trial) -> tuple[str, str, int]:
    """Return a word, what is to be said about it, and the exit code."""
    try:
        check.run(trial)
    except conformance.NotSupportedError as e:
        return "can't", str(e), Exit.DONE
    except (WaitingError, BackendUnavailableError) as e:
        return "no answer", _with_hint(e), e.exit_code
    except BridgeError as e:
        return ("FAILED", _with_hint(e), e.exit_code) if check.must else ("differs", f"{e}; a CA may do so", Exit.DONE)
    except Exception as e:  # noqa: BLE001 (the test must report a plug-in's bug)
        bug = failed(type(trial.backend).__name__, e)
        return "FAILED", _with_hint(bug), bug.exit_code
    return "ok", "", Exit.DONE


def _with_hint(error: BridgeError) -> str:
    return f"{error}{f' ({error.hint})' if error.hint else ''}"
