"""`settings` and `setup`: the settings file, and what a CA's administrator needs."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cryptography import x509

from bridge.ca import registry
from bridge.cli import jobs
from bridge.cli.printing import say
from bridge.cli.settings_text import lines_of
from bridge.contract import SetsUp, SetupFile, SetupRequest
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.node import inventory
from bridge.node.inventory import Item
from bridge.pki.kubeadm_names import named, parse_nodes, renamed
from bridge.renewal import serving
from bridge.settings.load import DEFAULT_FILE
from bridge.settings.rehearsal import for_rehearsal
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, CA
from bridge.system import jobs as system_jobs
from bridge.system.safe_read import UnreadableError, read
from bridge.system.shipped import shipped
from bridge.words import name_found

log = logging.getLogger("ca-bridge")


def settings_init(file: Path | None) -> None:
    """
    `settings init`: write a commented settings file.

    Raises:
        BridgeError: There is one.
    """
    path = file or DEFAULT_FILE
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        with path.open("x", encoding="utf-8") as opened:
            os.fchmod(opened.fileno(), 0o644)
            opened.write(example().read_text(encoding="utf-8"))
    except FileExistsError:
        raise BridgeError(
            f"{path}: wanted no file, found one", hint="edit it, or write another one: `ca-bridge settings init FILE`"
        ) from None
    say(f"wrote {path}")


def example() -> Path:
    """The commented example that is installed with the program."""
    found = shipped("config.toml")
    if found is not None:
        return found
    raise BridgeError(
        "wanted the example settings that are installed with the program, found none", hint="reinstall it"
    )


def settings_check(settings: Settings) -> None:
    """
    `settings check`: the whole file, backends' tables included; asks no CA.

    Raises:
        SettingsError: Something is wrong with it, or there is none.
    """
    if settings.source.file is None:
        problem = SettingsProblem("", "a settings file", "none: the defaults are in force", DEFAULT_FILE)
        raise SettingsError([problem], hint="`ca-bridge settings init` writes a commented file")
    registry.configured(settings, settings.authorities)
    if any(ours.rehearsal for ours in settings.authorities.values()):
        registry.configured(for_rehearsal(settings), settings.authorities)
    say(f"{settings.source.file}: nothing wrong")


def settings_show(settings: Settings) -> None:
    """`settings show`: print the settings in force."""
    say(in_force(settings))


def in_force(settings: Settings) -> str:
    """The settings in force, as TOML that means the same; a backend's keys are in the tables of its authorities."""
    lines = [f"# from {settings.source.file or 'defaults alone: no settings file'}"]
    named = dataclasses.replace(settings, node=dataclasses.replace(settings.node, name=settings.node.node_name))
    for name in ("node", "renewal", "restart", "cluster", "hooks", "audit", "backups", "gateway"):
        lines += ["", f"[{name}]", *lines_of(getattr(named, name))]
    backends = registry.configured(settings, settings.authorities)
    for name, type_name in {one.name: one.type_name for one in backends.values()}.items():
        lines += ["", f"[backend.{json.dumps(name)}]", f"type = {json.dumps(type_name)}"]
    for authority, configured in backends.items():
        lines += ["", f"[authority.{authority}]", *lines_of(settings.authorities[authority])]
        lines += lines_of(configured.settings)
    for name, certificate in settings.certificates.items():
        lines += ["", f"[certificate.{name}]", *lines_of(certificate)]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class SetupOptions:
    """The options of `setup`."""

    authority: str | None  #: Only this one; None: all that the node has certificates of.
    nodes: Path | None  #: A list of nodes; None: this node's alone.
    directory: Path | None  #: Where the files go; None: to standard output.


def setup(settings: Settings, type_name: str, options: SetupOptions) -> None:
    """
    `setup`: print what the administrator of a CA needs, or write it.

    Raises:
        SettingsError: No such authority, or no such type that could tell.
        BridgeError: The certificates can't be had from such a CA, or a file can't be written.
    """
    files = files_for(settings, type_name, options)
    if options.directory is not None:
        say_written(write_files(files, options.directory))
        return
    if len(files) > 1 and any(file.alone for file in files):
        names = ", ".join(file.name for file in files)
        raise SettingsError(
            [SettingsProblem("--authority", "one of them, since one can't follow another on standard output", names)],
            hint="`-o DIR` writes each into a file of its own",
        )
    say("\n".join(file.text for file in files))


def write_files(files: Sequence[SetupFile], directory: Path) -> list[Path]:
    """
    Write each into a directory, which is made if it is not there; never over an older file.

    Raises:
        BridgeError: A file is there, or can't be written.
    """
    written = []
    for file in files:
        path = directory / file.name
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with path.open("x", encoding="utf-8") as opened:
                # not by its name, where the directory's owner may have put a link meanwhile
                os.fchmod(opened.fileno(), 0o755 if file.executable else 0o644)
                opened.write(file.text)
        except OSError as e:
            raise BridgeError(f"{path}: wanted to write it, found: {e.strerror}", hint="name an empty directory") from e
        written.append(path)
    return written


def files_for(settings: Settings, type_name: str, options: SetupOptions) -> list[SetupFile]:
    """
    The files that a CA's administrator needs for this node's certificates, or for those of several nodes.

    Raises:
        SettingsError: No such authority, no such type that could tell, or a list of nodes that can't be read.
        BridgeError: The certificates can't be had from such a CA.
    """
    if options.authority is not None and options.authority not in AUTHORITIES:
        problem = SettingsProblem(
            "--authority", f"one of {', '.join(AUTHORITIES)}", name_found(options.authority, AUTHORITIES)
        )
        raise SettingsError([problem])
    backend_type = registry.that_sets_up(type_name)
    live = _live_certificates(settings, options.authority)
    if not live:
        raise _nothing_live(settings, options.authority)
    own = settings.node.node_name
    nodes = _nodes(options.nodes, own) if options.nodes is not None else {own: {}}
    return _joined(
        {
            node: [
                file
                for name, items in live.items()
                for file in _asked(backend_type, settings, _request(settings, type_name, name, node, items, names))
            ]
            for node, names in nodes.items()
        }
    )


def files_of(
    settings: Settings, type_name: str, nodes: Mapping[str, Mapping[str, Mapping[str, x509.Certificate]]]
) -> list[SetupFile]:
    """
    The same for nodes that are yet to be made.

    Args:
        settings: The backends' tables, as far as there are any.
        type_name: The backend's.
        nodes: By node, authority and name: certificates as they will be.

    Raises:
        SettingsError, BridgeError: As `files_for`.
    """
    backend_type = registry.that_sets_up(type_name)
    return _joined(
        {
            node: [
                file
                for name, items in found.items()
                for file in _asked(backend_type, settings, _request(settings, type_name, name, node, items, {}))
            ]
            for node, found in nodes.items()
        }
    )


def _live_certificates(settings: Settings, authority: str | None) -> dict[str, dict[str, x509.Certificate]]:
    """The live certificates by authority and name; no authority without any."""
    items = inventory.of(settings.node).items
    found: dict[str, dict[str, x509.Certificate]] = {}
    for item in items:
        name = item.spec.authority.name
        if authority in (None, name) and item.managed and item.state == "present":
            certificate = _to_be_asked(item, settings)
            if certificate is not None:
                found.setdefault(name, {})[item.spec.name] = certificate
    return {name: found[name] for name in AUTHORITIES if name in found}


def _nothing_live(settings: Settings, authority: str | None) -> BridgeError:
    hint = "--pki-dir tells where they are"
    if authority not in (None, CA.name) and inventory.of(settings.node).is_worker:
        hint = f"this node is a worker, whose certificates are all of {CA.name}"
    of = f" of {authority}" if authority else ""
    return BridgeError(f"wanted live certificates{of} to make it from, found none", hint=hint)


def _to_be_asked(item: Item, settings: Settings) -> x509.Certificate | None:
    """A certificate with the names that the next one gets; None: nobody says which, and it is left out."""
    live = item.certificates[0]
    try:
        asked = serving.asked(item, settings)
    except BridgeError as e:
        log.warning("%s; it is left out: %s", e, e.hint)
        return None
    return live if asked is None else named(live, asked)


def _nodes(file: Path, own: str) -> dict[str, dict[str, str]]:
    """A list of nodes: for each, its name and addresses by this node's."""
    try:
        data = read(file)
        if data is None:
            raise UnreadableError("no file")  # noqa: TRY301
        listed = {node.name: node.addresses for node in parse_nodes(data.decode())}
        if len({len(addresses) for addresses in listed.values()}) > 1:
            raise ValueError("wanted as many addresses for each node, found more for some")  # noqa: TRY301
    except UnreadableError as e:
        raise SettingsError([SettingsProblem("--nodes", "a list of nodes", f"{file}: {e}")]) from None
    except ValueError as e:
        raise SettingsError(
            [SettingsProblem("--nodes", "a line `NAME ADDRESS …` for each node", f"{file}: {e}")]
        ) from None
    if own not in listed:
        raise SettingsError(
            [
                SettingsProblem(
                    "--nodes", f"this node in it, too ({own}), by which the others' names are told", ", ".join(listed)
                )
            ],
            hint="node.name in the settings says what this node is called",
        )
    ours = [own, *listed[own]]
    return {name: dict(zip(ours, [name, *addresses], strict=True)) for name, addresses in listed.items()}


def _asked(backend_type: SetsUp, settings: Settings, request: SetupRequest) -> Sequence[SetupFile]:
    try:
        return backend_type.setup(request)
    except SettingsError as e:
        raise registry.located(e, settings, request.authority.name) from None


def _joined(by_node: Mapping[str, Sequence[SetupFile]]) -> list[SetupFile]:
    """One node's files as they are; of several nodes each one's, but only once what is the same for all."""
    (first, *others) = by_node.values()
    if not others or all(list(files) == list(first) for files in others):
        return list(first)
    if not all(file.by_node for files in by_node.values() for file in files):
        raise BridgeError(
            "wanted files for several nodes, found a CA whose set-up is one for all nodes",
            hint="leave --nodes out, and widen in the result what names one node",
        )
    return [replace(file, name=f"{node}-{file.name}") for node, files in by_node.items() for file in files]


def _request(
    settings: Settings,
    type_name: str,
    authority: str,
    node: str,
    items: Mapping[str, x509.Certificate],
    names: Mapping[str, str],
) -> SetupRequest:
    is_other = any(here != there for here, there in names.items())
    return SetupRequest(
        authority=AUTHORITIES[authority],
        certificates={name: renamed(one, names) for name, one in items.items()} if is_other else items,
        validity=settings.renewal.validity,
        node=node,
        cluster=settings.node.cluster,
        settings=registry.keys_so_far(settings, authority, type_name),
    )


# --- jobs for systemd and cron ---------------------------------------------------------------------------------------


def setup_gateway(settings: Settings, directory: Path | None) -> None:
    """
    `setup kubernetes` without an authority: print the gateway's manifests, or write them.

    Raises:
        SettingsError: Settings, policy or inventory can't be used.
        BridgeError: The shipped files are not there, or a file can't be written.
    """
    from bridge.cli import manifests  # noqa: PLC0415 (the gateway's policy, which nothing else here needs)

    files = manifests.make(settings, example().parent)
    if directory is not None:
        say_written(write_files(files, directory))
        return
    say(manifests.text_of(files))


def setup_jobs(
    settings: Settings, kind: jobs.Kind, desk: jobs.DeskJob | None, directory: Path | None, *, enable: bool
) -> None:
    """
    `setup systemd` and `setup cron`: print the files, or write and enable them.

    Raises:
        BridgeError: A file can't be made or written, or systemd says no.
    """
    made = jobs.make(settings, kind, desk, example().parent)
    if not enable and directory is None:
        say("\n".join(f"# {job.path}\n{job.text}" for job in made))
        return
    say_written(system_jobs.write(made, directory))
    if enable and kind == "systemd":
        units = jobs.to_enable(made)
        system_jobs.enable(units)
        say(f"enabled {', '.join(units)}")


def say_written(paths: Sequence[Path]) -> None:
    """Print the files that were written, one a line."""
    say("\n".join(f"wrote {path}" for path in paths))
