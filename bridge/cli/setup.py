"""`setup`: files for a CA's administrator, and jobs for systemd and cron; `gateway` makes the gateway's manifests."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import typer
from cryptography import x509

from bridge.ca import registry
from bridge.cli.declare import Common, argument, command, option
from bridge.cli.gateway import manifests
from bridge.cli.printing import say
from bridge.cli.settings import example, write_new
from bridge.contract import Backend, SetupFile, SetupRequest
from bridge.desk.files import load_policy, policy_path
from bridge.errors import BridgeError, SettingsError, SettingsProblem
from bridge.gateway.nodes import Nodes
from bridge.gateway.rules import patterns
from bridge.node.inventory import Item
from bridge.node.kubelet import KubeletFiles
from bridge.node.reading import read_node
from bridge.pki.kubeadm_names import named, parse_nodes, renamed
from bridge.renewal.changes import decide
from bridge.renewal.prepare import serving_names
from bridge.renewal.selection import RunOptions
from bridge.settings.tables import NodeSettings, Settings, for_next
from bridge.specs import AUTHORITIES, CA, ETCD_CA, PODS, SIGNING_AUTHORITIES
from bridge.system import jobs
from bridge.system.console import log, log_with_hint
from bridge.system.files import DIRECTORY_MODE
from bridge.system.paths import UnreadableError, read_present
from bridge.words import name_found

commands = typer.Typer()
#: Certificates by authority and name.
ByAuthority = Mapping[str, Mapping[str, x509.Certificate]]


@command(commands, "setup")
def setup(
    common: Common,
    kind: Annotated[str, argument("A backend's type (vault, cfssl, openssl …), kubernetes, systemd or cron.", "TYPE")],
    authority: Annotated[
        str | None, option("Only this one of ca, etcd-ca, front-proxy-ca; or pods, by the gateway's policy.")
    ] = None,
    nodes: Annotated[Path | None, option("For all nodes of this list, one per line: `NAME ADDRESS …`.")] = None,
    directory: Annotated[Path | None, option("Write files into this directory.", "-o", "--output")] = None,
    enable: Annotated[bool, option("systemd, cron: write the files where they belong, and start them.")] = False,
    inbox: Annotated[Path | None, option("systemd, cron: for a CA desk that signs what is in here …")] = None,
    outbox: Annotated[Path | None, option("… and puts the answers here.")] = None,
    user: Annotated[str, option("systemd, cron: the desk's user.")] = "ca",
    serving_certs: Annotated[bool, option("Also for the pairs that `serving-certs on` would ask for.")] = False,
    of_next: Annotated[bool, option("For the next CAs, as the tables `next` name them.", "--next")] = False,
) -> None:
    """
    Print what a CA's administrator needs, or a job for cron.

    For a CA it fits exactly this node's certificates. Vault: roles and a policy; cfssl: signing profiles;
    openssl: an openssl.cnf for each CA; cmp, est and exec: what the CA has to give; door: the tables of a door's
    policy. `setup systemd` and `setup cron` make the jobs of this node, or of a CA desk, with this machine's paths.
    `setup kubernetes` makes the gateway's manifests for this cluster; with `--authority`, what a cluster needs that
    signs for this one.
    """
    _assert_options_fit(kind, {"--authority": authority, "--nodes": nodes, "--serving-certs": serving_certs},
                        {"--enable": enable, "--inbox": inbox, "--outbox": outbox})  # fmt: skip
    settings = for_next_cas(common.settings()) if of_next else common.settings()
    if kind in _KINDS:
        desk = _desk_of(settings, inbox, outbox, user)
        job_files = _make_jobs(settings, common.words(), kind, desk, example().parent)
        if enable:
            _assert_runnable(job_files, kind, user if desk else "root")
            prepare(settings, desk)
        _print_or_enable(job_files, kind, directory, enable=enable)
        return
    if kind == "kubernetes" and authority is None:
        files, between = manifests(settings, example().parent), "---\n"
    else:
        files, between = files_for(settings, kind, authority, nodes, servers=serving_certs), "\n"
    print_or_write(files, directory, between)


def _assert_options_fit(kind: str, of_cas: dict[str, object], of_jobs: dict[str, object]) -> None:
    """Refuse options that have no meaning for this TYPE, instead of ignoring them."""
    is_job, is_gateway = kind in _KINDS, kind == "kubernetes" and not of_cas["--authority"]
    unused = {name: "a CA's TYPE, and for kubernetes --authority" for name in of_cas if is_job or is_gateway}
    unused |= {name: "TYPE systemd or cron" for name in of_jobs if not is_job}
    given = of_cas | of_jobs
    wrong = [SettingsProblem(name, wanted, repr(kind)) for name, wanted in unused.items() if given[name]]
    if wrong:
        raise SettingsError(wrong)


def for_next_cas(settings: Settings) -> Settings:
    """Return the settings as they are once the next CAs sign (SettingsError: no authority has a next CA)."""
    names = [name for name, keys in settings.authorities.items() if keys.next]
    if not names:
        problem = settings.source.problem(("authority",), 'a table `next` with `anchor = "FILE"`', "none")
        raise SettingsError([problem], hint="`ca-bridge help replace-the-ca` has an example")
    return for_next(settings, names)


def print_or_write(files: Sequence[SetupFile], directory: Path | None, between: str = "\n") -> None:
    """Write the files into a directory, or print them one after another if they may share standard output."""
    if directory is not None:
        say("\n".join(f"wrote {path}" for path in write_files(files, directory)))
        return
    if len(files) > 1 and any(file.alone for file in files):
        wanted = "one of them, since one can't follow another on standard output"
        problem = SettingsProblem("--authority", wanted, ", ".join(file.name for file in files))
        raise SettingsError([problem], hint="`-o DIR` writes each into a file of its own")
    say(between.join(file.text for file in files))


def write_files(files: Sequence[SetupFile], directory: Path) -> list[Path]:
    """Write each file into a directory, which is made if it is missing; never over an older file."""
    for file in files:
        write_new(directory / file.name, file.text, 0o755 if file.executable else 0o644, hint="name an empty directory")
    return [directory / file.name for file in files]


def files_for(
    settings: Settings, type_name: str, authority: str | None, list_of_nodes: Path | None, *, servers: bool = False
) -> list[SetupFile]:
    """Return the files that a CA's administrator needs for this node's certificates, or for those of several nodes."""
    if authority is not None and authority not in SIGNING_AUTHORITIES:
        known, found = ", ".join(SIGNING_AUTHORITIES), name_found(authority, SIGNING_AUTHORITIES)
        raise SettingsError([SettingsProblem("--authority", f"one of {known}", found)])
    backend_type = registry.that_sets_up(type_name)
    if authority == PODS.name:
        return _for_pods(settings, type_name, backend_type)
    live = _live_certificates(settings, authority)
    if not live:
        raise _nothing_live(settings, authority)
    if servers and authority in (None, CA.name):
        live[CA.name] = {**live.get(CA.name, {}), **_servers(settings)}
    _warn_of_defaults(settings, type_name, live)
    own = settings.node.node_name
    nodes = _nodes(list_of_nodes, own) if list_of_nodes is not None else {own: {}}
    return files_of(settings, type_name, {node: _renamed(live, names) for node, names in nodes.items()})


def _renamed(live: ByAuthority, names: Mapping[str, str]) -> ByAuthority:
    """Return another node's certificates: this node's with the names replaced."""
    if all(here == there for here, there in names.items()):
        return live
    return {ca: {name: renamed(item, names) for name, item in items.items()} for ca, items in live.items()}


def _for_pods(settings: Settings, type_name: str, backend_type: type[Backend]) -> list[SetupFile]:
    if not backend_type.can("names_beside_csr"):
        raise SettingsError([SettingsProblem("TYPE", registry.with_names_beside_csr(), repr(type_name))])
    policy = Nodes(settings.gateway).files()[0]
    if not policy.pod_signers:
        table = 'a table such as [pod_signer."corp.example/spiffe"]'
        raise SettingsError([SettingsProblem("pod_signer", table, "none", settings.gateway.policy)])
    request = SetupRequest(
        authority=PODS,
        certificates={},
        validity=max(rules.max_validity for rules in policy.pod_signers.values()),
        node=settings.node.node_name,
        cluster=settings.node.cluster,
        settings=registry.keys_so_far(settings, PODS.name, type_name),
        patterns=patterns(policy.pod_signers.values()),
    )
    return list(_files_of(backend_type, settings, request))


def files_of(settings: Settings, type_name: str, nodes: Mapping[str, ByAuthority]) -> list[SetupFile]:
    """Return the files for nodes with these certificates; the nodes need not exist yet."""
    backend_type = registry.that_sets_up(type_name)
    by_node: dict[str, list[SetupFile]] = {node: [] for node in nodes}
    for node, found in nodes.items():
        for authority, certificates in found.items():
            request = SetupRequest(
                authority=AUTHORITIES[authority],
                certificates=certificates,
                validity=settings.renewal.validity,
                node=node,
                cluster=settings.node.cluster,
                settings=registry.keys_so_far(settings, authority, type_name),
            )
            by_node[node] += _files_of(backend_type, settings, request)
    return _joined(by_node)


def _warn_of_defaults(settings: Settings, type_name: str, authorities: Iterable[str]) -> None:
    """Warn about authorities without a backend of this type, whose files get the type's own defaults."""
    ours = settings.authorities
    types = {name: settings.backends[ours[name].backend]["type"] for name in authorities if name in ours}
    others = [name for name in authorities if types.get(name) != type_name]
    if others:
        found = ", ".join(dict.fromkeys(types[name] for name in others if name in types)) or "no backend"
        place = settings.source.file or "no settings file"
        text = f"the settings have {found} for it ({place}), so this has the defaults of {type_name}"
        hint = f"`ca-bridge settings init {type_name} FILE` writes such settings; name them by --config FILE"
        log_with_hint(logging.WARNING, f"{', '.join(others)}: {text}", hint)


def _live_certificates(settings: Settings, authority: str | None) -> dict[str, dict[str, x509.Certificate]]:
    live_certificates: dict[str, dict[str, x509.Certificate]] = {}
    for item in read_node(settings.node).items:
        name = item.spec.authority.name
        if item.pair is not None:
            why = "the CA's administrator decides what it needs for a further pair"
            log.warning("%s is left out: %s", item.spec.name, why)
            continue
        is_live = authority in (None, name) and item.managed and item.state == "present"
        if is_live and (certificate := _with_next_names(item, settings)) is not None:
            live_certificates.setdefault(name, {})[item.spec.name] = certificate
    return {name: live_certificates[name] for name in AUTHORITIES if name in live_certificates}


def _nothing_live(settings: Settings, authority: str | None) -> BridgeError:
    hint = "--pki-dir tells where they are"
    node = read_node(settings.node)
    for is_role, role, only in ((node.is_worker, "a worker", CA), (node.is_etcd_host, "an etcd host", ETCD_CA)):
        if is_role and authority not in (None, only.name):
            hint = f"this node is {role}, whose certificates are all of {only.name}"
    of = f" of {authority}" if authority else ""
    return BridgeError(f"there are no live certificates{of} to make it from", hint=hint)


def _servers(settings: Settings) -> dict[str, x509.Certificate]:
    """Return sample certificates with the names of components' serving certificates that do not exist yet."""
    node = read_node(settings.node)
    names = tuple(item.spec.name for item in node.items if item.spec.by_flag and item.state == "missing")
    like, decision = node.live("apiserver"), {}
    for name, one in decide(node, settings, RunOptions(names=names)).items() if names else ():
        if isinstance(one, BridgeError):
            raise one
        if like is not None:
            decision[name] = named(like, one.naming)
    return decision


def _with_next_names(item: Item, settings: Settings) -> x509.Certificate | None:
    """Return a certificate with the names that the next one gets; None: these are unknown, and it is left out."""
    live = item.certificates[0]
    try:
        naming = serving_names(item, settings)
    except BridgeError as e:
        log.warning("%s; it is left out: %s", e, e.hint)
        return None
    return live if naming is None else named(live, naming)


def _nodes(file: Path, own: str) -> dict[str, dict[str, str]]:
    """Read a list of nodes: for each node, its name and addresses by this node's."""
    try:
        listed = {node.name: node.addresses for node in parse_nodes(read_present(file).decode())}
        if len({len(addresses) for addresses in listed.values()}) > 1:
            raise ValueError("wanted as many addresses for each node, found more for some")  # noqa: TRY301
    except UnreadableError as e:
        raise SettingsError([SettingsProblem("--nodes", "a list of nodes", f"{file}: {e}")]) from None
    except ValueError as e:
        wanted = "a line `NAME ADDRESS …` for each node"
        raise SettingsError([SettingsProblem("--nodes", wanted, f"{file}: {e}")]) from None
    if own not in listed:
        wanted = f"this node in it, too ({own}), as the pattern of the others' names"
        hint = "node.name in the settings says what this node is called"
        raise SettingsError([SettingsProblem("--nodes", wanted, ", ".join(listed))], hint=hint)
    ours = [own, *listed[own]]
    return {name: dict(zip(ours, [name, *addresses], strict=True)) for name, addresses in listed.items()}


def _files_of(backend_type: type[Backend], settings: Settings, request: SetupRequest) -> Sequence[SetupFile]:
    try:
        return backend_type.setup(request)
    except SettingsError as e:
        raise registry.located(e, settings, request.authority.name) from None


def _joined(by_node: Mapping[str, Sequence[SetupFile]]) -> list[SetupFile]:
    """Return all nodes' files, prefixed by node; files that are the same for all nodes only once."""
    (first, *others) = by_node.values()
    if not others or all(list(files) == list(first) for files in others):
        return list(first)
    if not all(file.by_node for files in by_node.values() for file in files):
        text = "wanted files for several nodes, found a CA whose set-up is one for all nodes"
        raise BridgeError(text, hint="leave --nodes out, and widen in the result what names one node")
    return [replace(file, name=f"{node}-{file.name}") for node, files in by_node.items() for file in files]


# --- jobs for systemd and cron ---------------------------------------------------------------------------------------


def _assert_runnable(job_files: Sequence[jobs.Job], kind: _Kind, user: str) -> None:
    """Check that this machine would run the job, and warn about another job that does the same."""
    (jobs.assert_cron_takes if kind == "cron" else jobs.assert_systemd_takes)(user)
    for other in jobs.others(job_files):
        undo = f"rm {other}" if kind == "systemd" else f"systemctl disable --now {other.name}"
        log_with_hint(logging.WARNING, f"{other} does the same, so that both would run", undo)


def _print_or_enable(job_files: Sequence[jobs.Job], kind: _Kind, directory: Path | None, *, enable: bool) -> None:
    if not enable and directory is None:
        say("\n".join(f"# {job.path}\n{job.text}" for job in job_files))
        return
    say("\n".join(f"wrote {path}" for path in jobs.write(job_files, directory)))
    if enable and kind == "systemd":
        units = [job.path.name for job in job_files if re.search(r"^WantedBy=", job.text, re.MULTILINE)]
        jobs.enable(units)
        say(f"enabled {', '.join(units)}")


_Kind = Literal["systemd", "cron"]
_KINDS: tuple[_Kind, ...] = get_args(_Kind)

#: The shipped files of a node's job.
_NODE = {
    "systemd": ("systemd/ca-bridge.service", "systemd/ca-bridge.timer", "systemd/ca-bridge-recover.service"),
    "cron": ("cron/ca-bridge",),
}
#: Those of a node whose CA answers later: within the hour, requests go out, and answers are installed.
_CARRIED = {
    "systemd": ("systemd/ca-bridge.service", "exchange/ca-bridge.timer", "systemd/ca-bridge-recover.service"),
    "cron": ("exchange/crontab",),
}
_DESK = {"systemd": ("desk/ca-bridge-desk.service", "desk/ca-bridge-desk.timer"), "cron": ("desk/crontab",)}
_DESK_INBOX, _DESK_OUTBOX = "/srv/desk/inbox", "/srv/desk/outbox"
#: A file in /etc/cron.d is read only if it has no dot in its name (cron(8)).
_CRONTABS = {"desk/crontab": "ca-bridge-desk", "exchange/crontab": "ca-bridge"}
#: All user names that systemd takes (systemd.exec(5), User=; https://systemd.io/USER_NAMES); blanks and line ends would
#: add words and lines to a unit or crontab.
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*\$?")


@dataclass(frozen=True, kw_only=True)
class DeskJob:
    """A CA desk's job."""

    inbox: Path
    outbox: Path
    user: str  #: The user who owns the CA.
    archive: Path | None = None  #: The archive that the policy names; None: it is in the state directory.


def _desk_of(settings: Settings, inbox: Path | None, outbox: Path | None, user: str) -> DeskJob | None:
    """Return the desk's job if its directories are named; the desk's policy need not exist yet."""
    if inbox is None and outbox is None:
        return None
    if inbox is None or outbox is None:
        missing, given = ("--inbox", "--outbox") if inbox is None else ("--outbox", "--inbox")
        raise SettingsError([SettingsProblem(missing, f"a directory, since {given} is given", "nothing")])
    if not _USER.fullmatch(user):
        raise SettingsError([SettingsProblem("--user", "a user's name", repr(user))])
    archive = load_policy(settings, None).desk.archive if policy_path(settings).exists() else None
    return DeskJob(inbox=inbox, outbox=outbox, user=user, archive=archive)


def _make_jobs(
    settings: Settings, options: Sequence[str], kind: _Kind, desk: DeskJob | None, shipped: Path
) -> list[jobs.Job]:
    """Return the files of a node's or a desk's job; its command gets the same `options` for the settings."""
    places = _places(settings, options, desk)
    make_one = jobs.unit if kind == "systemd" else jobs.crontab
    backends = registry.configured(settings, settings.authorities)
    is_carried = any(configured.backend_type.carries for configured in backends.values())  # the CA answers later
    names = (_DESK if desk else _CARRIED if is_carried else _NODE)[kind]
    texts = {name: (shipped / name).read_text(encoding="utf-8") for name in names}
    return [make_one(_CRONTABS.get(name, Path(name).name), text, places) for name, text in texts.items()]


def prepare(settings: Settings, desk: DeskJob | None) -> None:
    """Make directories that the job's user owns: for state, the desk, and the backends' secrets (JobError)."""
    user = desk.user if desk else "root"
    if desk is not None:
        for path in (desk.inbox, desk.outbox):
            jobs.make_directory(path, user, _CARRIERS_MODE)
        if desk.archive is not None:
            jobs.make_directory(desk.archive, user, DIRECTORY_MODE)
    for configured in registry.configured(settings, settings.authorities).values():
        for path in configured.settings.writes():
            jobs.assert_may_write(path, user, f"that {configured.label} writes to")
        for secret in configured.settings.private_files():
            if not secret.parent.exists():
                jobs.make_directory(secret.parent, user, DIRECTORY_MODE)
    jobs.make_directory(settings.node.state_dir, user, DIRECTORY_MODE)  # a unit with a missing directory does not start


#: Other users may read these directories: bundles hold nothing secret, and another user carries them.
_CARRIERS_MODE = 0o755


def _places(settings: Settings, options: Sequence[str], desk: DeskJob | None) -> jobs.Places:
    node, usual = settings.node, NodeSettings()
    paths = {str(usual.kubeconfig_dir): str(node.kubeconfig_dir), str(usual.state_dir): str(node.state_dir)}
    kubelet = KubeletFiles.load(node.kubelet_dir)
    writable = [node.kubeconfig_dir, node.pki_dir]
    maybe = _outermost([kubelet.directory, kubelet.certificate.parent, kubelet.key.parent])
    if desk is not None:
        relative = [SettingsProblem(name, "an absolute path", repr(str(path)))
                    for name, path in (("--inbox", desk.inbox), ("--outbox", desk.outbox)) if not path.is_absolute()]  # fmt: skip
        if relative:
            raise SettingsError(relative)
        paths |= {_DESK_INBOX: str(desk.inbox), _DESK_OUTBOX: str(desk.outbox)}
        writable, maybe = [desk.inbox, desk.outbox], [desk.archive] if desk.archive is not None else []
    writable.append(node.state_dir)
    maybe += [path.parent for path in settings.copies.files.paths]
    maybe += [path.parent for pair in settings.node.pairs for files in pair.places for _, path in files.paths()]
    maybe += [settings.metrics.file.parent] if settings.metrics.file is not None else []
    for configured in registry.configured(settings, settings.authorities).values():
        writable += configured.settings.writes()
    return jobs.Places(
        program=jobs.this_program(desk.user if desk else "root"),
        options=options,
        paths=paths,
        user=desk.user if desk else "root",
        writable=_outermost(writable),
        maybe_writable=maybe,
    )


def _outermost(paths: Sequence[Path]) -> list[Path]:
    """Return the paths that are not inside another one of them."""
    inner = [path for path in paths if any(path != other and path.is_relative_to(other) for other in paths)]
    return [path for path in dict.fromkeys(paths) if path not in inner]
