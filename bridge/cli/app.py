"""
The command line: parse, call one function of the command's module, exit with what it returns.

Each command loads what it needs, since a cron job waits for it; results go to standard output, everything else to
standard error.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from bridge.cli import bootstrap, gateway
from bridge.cli.changes import AddSanOption, AdoptOption, DropSanOption, KubeadmConfigOption, RekeyOption
from bridge.cli.help import Group
from bridge.cli.options import (
    AnyIdentityOption,
    Common,
    ExpirationOutput,
    Names,
    Output,
    OutputOption,
    WaitOption,
    command,
    duration,
    utc_now,
)
from bridge.cli.printing import say
from bridge.cli.users import kubeconfig_app

# Rich tracebacks can print local variables, and ours hold tokens and keys.
app = typer.Typer(
    name="ca-bridge",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # plain help, the same in a document, a log and a terminal
    help="Renew the certificates of a kubeadm control plane whose CA keys are not on its disks.",
    epilog="`ca-bridge COMMAND -h` shows a command's options and examples. `ca-bridge doctor` says what is missing.",
)


def _group(name: str, sentence: str) -> typer.Typer:
    """Commands that share their first word."""
    group = typer.Typer(cls=Group, no_args_is_help=True, rich_markup_mode=None, help=sentence)
    app.add_typer(group, name=name)
    return group


settings_app = _group("settings", "Write, show and check the settings file.")
audit_app = _group("audit", "Show and verify the audit log.")
pending_app = _group("pending", "Show and cancel requests that a CA has not answered yet.")
backend_app = _group("backend", "Try a CA that the settings name.")
app.add_typer(bootstrap.app, name="bootstrap")
app.add_typer(kubeconfig_app, name="kubeconfig")


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version  # noqa: PLC0415 (18 ms, for this option alone)

        say(f"ca-bridge {version('kubeadm-ca-bridge')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None: ...


@command(app, "check-expiration")
def check_expiration(
    common: Common,
    output: Annotated[ExpirationOutput, typer.Option("--output", "-o", help="Format.")] = ExpirationOutput.TABLE,
    within: Annotated[
        timedelta | None,
        typer.Option(
            parser=duration, metavar="DURATION", help='Exit with 3 if one expires within this time, such as "30d".'
        ),
    ] = None,
    warning: Annotated[
        timedelta | None,
        typer.Option(
            "--warning", "-w", parser=duration, metavar="DURATION", help="For -o nagios. [default: renewal.before]"
        ),
    ] = None,
    critical: Annotated[
        timedelta | None,
        typer.Option(
            "--critical", "-c", parser=duration, metavar="DURATION", help="For -o nagios. [default: a third of it]"
        ),
    ] = None,
) -> None:
    """
    Show when the control plane's certificates expire, as `kubeadm certs check-expiration` does.

    It reads files only: it asks no API server, reads no key and writes nothing.
    """
    from bridge.cli import expiration  # noqa: PLC0415

    if (warning or critical) and output is not ExpirationOutput.NAGIOS:
        raise typer.BadParameter("-w and -c are for -o nagios; for exit code 3 there is --within")
    limit = warning or within
    raise typer.Exit(expiration.check_expiration(common.settings(), utc_now(), output.value, limit, critical))


@command(app, "renew")
def renew(
    common: Common,
    names: Names = None,
    csr_only: Annotated[bool, typer.Option("--csr-only", help="Only write keys and CSRs, to --csr-dir.")] = False,
    csr_dir: Annotated[Path | None, typer.Option(help="Where --csr-only writes NAME.key and NAME.csr.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done; the same as `plan`.")] = False,
    all_or_nothing: Annotated[
        bool, typer.Option("--all-or-nothing", help="Install nothing if one certificate fails.")
    ] = False,
    no_restart: Annotated[
        bool, typer.Option("--no-restart", help="Restart nothing, whatever the settings say; name what to restart.")
    ] = False,
    rehearse: Annotated[
        bool,
        typer.Option("--rehearse", help="Have everything, or the names, signed and proven, and throw it away."),
    ] = False,
    ahead: Annotated[
        timedelta | None,
        typer.Option(
            parser=duration, metavar="DURATION", help='With --rehearse: only what will be due so soon, such as "2d".'
        ),
    ] = None,
    any_identity: AnyIdentityOption = None,
    add_san: AddSanOption = None,
    drop_san: DropSanOption = None,
    adopt_defaults: AdoptOption = False,
    kubeadm_config: KubeadmConfigOption = None,
    rekey: RekeyOption = False,
    wait: WaitOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Renew what is due (the cron job's command), or the named certificates now.

    Each answer of the CA is proven before anything on disk moves; keys and certificates are replaced in one step
    that survives a crash. A named certificate that is missing is made, from kubeadm-config or --kubeadm-config.
    """
    from bridge.cli import changes, renewals  # noqa: PLC0415

    wanted = changes.read(add_san, drop_san, adopt=adopt_defaults, config=kubeadm_config, rekey=rekey)
    names = changes.names_of(names, wanted)
    if csr_only and (wanted.is_any or kubeadm_config):
        raise typer.BadParameter(
            "--csr-only can't be combined with changes and --kubeadm-config: `export` asks for them"
        )

    if (csr_dir is not None) != csr_only:
        given, missing = ("--csr-only", "--csr-dir DIR") if csr_only else ("--csr-dir", "--csr-only")
        raise typer.BadParameter(f"{given} needs {missing} beside it")
    if csr_only and (dry_run or all_or_nothing or no_restart):
        raise typer.BadParameter("--csr-only can't be combined with --dry-run, --all-or-nothing and --no-restart")
    if wait is not None and (csr_only or dry_run):
        raise typer.BadParameter("--wait can't be combined with --csr-only and --dry-run, which take no lock")
    if rehearse and (csr_only or dry_run or all_or_nothing or no_restart):
        raise typer.BadParameter(
            "--rehearse can't be combined with --csr-only, --dry-run, --all-or-nothing and --no-restart"
        )
    if ahead is not None and not rehearse:
        raise typer.BadParameter("--ahead needs --rehearse beside it")
    settings = common.settings()
    if rehearse:
        from bridge.cli import rehearsal  # noqa: PLC0415

        code = rehearsal.rehearse(
            settings,
            names,
            utc_now,
            as_json=output is Output.JSON,
            ahead=ahead,
            wait=wait or timedelta(),
            any_identity=any_identity or [],
            changes=wanted,
        )
    elif csr_dir is not None:
        code = renewals.write_csrs(settings, names, csr_dir.absolute(), utc_now(), any_identity or [])
    elif dry_run:
        code = renewals.plan(
            settings,
            names,
            utc_now(),
            as_json=output is Output.JSON,
            any_identity=any_identity or [],
            changes=wanted,
        )
    else:
        code = renewals.renew(
            settings,
            names,
            utc_now,
            as_json=output is Output.JSON,
            all_or_nothing=all_or_nothing,
            restarts=not no_restart,
            wait=wait or timedelta(),
            any_identity=any_identity or [],
            changes=wanted,
        )
    raise typer.Exit(code)


@command(app, "plan")
def plan(
    common: Common,
    names: Names = None,
    any_identity: AnyIdentityOption = None,
    add_san: AddSanOption = None,
    drop_san: DropSanOption = None,
    adopt_defaults: AdoptOption = False,
    kubeadm_config: KubeadmConfigOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Show what `renew` would ask, replace and restart.

    It asks no CA and writes nothing; the cluster's API is asked only about a named certificate that is missing, and for
    --adopt-defaults. Exits with 3 if there is something to do.
    """
    from bridge.cli import changes, renewals  # noqa: PLC0415

    wanted = changes.read(add_san, drop_san, adopt=adopt_defaults, config=kubeadm_config)
    code = renewals.plan(
        common.settings(),
        changes.names_of(names, wanted),
        utc_now(),
        as_json=output is Output.JSON,
        any_identity=any_identity or [],
        changes=wanted,
    )
    raise typer.Exit(code)


@command(app, "recover")
def recover(
    common: Common,
    set_aside: Annotated[
        bool, typer.Option("--set-aside", help="First rename damaged state files, and say what they may leave undone.")
    ] = False,
) -> None:
    """Finish or undo what a crash interrupted; every command that writes does the same first."""
    from bridge.cli import history  # noqa: PLC0415

    raise typer.Exit(history.recover(common.settings(), set_aside=set_aside))


@command(app, "backups")
def list_backups(common: Common, output: OutputOption = Output.TEXT) -> None:
    """List the backups, newest first: when, by whom, which certificates and serial numbers."""
    from bridge.cli import history  # noqa: PLC0415

    raise typer.Exit(history.list_backups(common.settings(), as_json=output is Output.JSON))


@command(app, "rollback")
def rollback(
    common: Common,
    backup_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="As in `backups`. [default: the newest]", show_default=False)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also what would not pass as new; never damage or another CA.")
    ] = False,
    wait: WaitOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Put a backup's files back in one step that survives a crash.

    Refused unless each file is as it was backed up, each key belongs to its certificate, and each certificate would
    pass as a new one: CA, dates, usages, subject, SANs; with --force only the CA counts of these. What is replaced is
    backed up: a second rollback undoes the first.
    """
    from bridge.cli import history  # noqa: PLC0415

    as_json = output is Output.JSON
    settings = common.settings()
    code = history.rollback(settings, backup_id, utc_now, force=force, wait=wait or timedelta(), as_json=as_json)
    raise typer.Exit(code)


@command(app, "restart")
def restart(
    common: Common,
    components: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[COMPONENT…|all]",
            help="etcd, kube-apiserver, kube-controller-manager, kube-scheduler, kubelet; all: the first four. "
            "[default: as restart.components says]",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also while another node is unhealthy, or shortly after another restart.")
    ] = False,
    wait: WaitOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Restart what still runs on old certificates, one component at a time, each only while the other nodes are healthy.

    It does so as restart.method in the settings says; with "none" it prints what to do and exits with 7.
    """
    from bridge.cli import components as module  # noqa: PLC0415

    as_json = output is Output.JSON
    settings = common.settings()
    code = module.restart(settings, components or [], utc_now, force=force, wait=wait or timedelta(), as_json=as_json)
    raise typer.Exit(code)


@command(app, "export")
def export(
    common: Common,
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The file to write.", show_default=False)],
    names: Names = None,
    any_identity: AnyIdentityOption = None,
    add_san: AddSanOption = None,
    drop_san: DropSanOption = None,
    adopt_defaults: AdoptOption = False,
    kubeadm_config: KubeadmConfigOption = None,
    wait: WaitOption = None,
) -> None:
    """
    Write requests for what is due into one file for a CA desk; the new keys stay on this node.

    While a request waits, exporting it again gives the same key and CSR. It also renews expired certificates, and asks
    for a named one that is missing; the desk's policy decides about that, and about changes.
    """
    from bridge.cli import carried, changes  # noqa: PLC0415

    wanted = changes.read(add_san, drop_san, adopt=adopt_defaults, config=kubeadm_config)

    code = carried.export(
        common.settings(),
        path,
        changes.names_of(names, wanted),
        utc_now,
        wait=wait or timedelta(),
        any_identity=any_identity or [],
        changes=wanted,
    )
    raise typer.Exit(code)


@command(app, "inspect")
def inspect_bundle(
    common: Common,
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A request or an answer.", show_default=False)],
) -> None:
    """
    Show a bundle to the operator who approves it: what is asked, what it replaces, and whose proof it has.

    Compare the fingerprint over the phone: both sides see the same one unless the bundle was changed on its way.
    """
    from bridge.cli import carried  # noqa: PLC0415

    raise typer.Exit(carried.inspect(common.settings(), path, utc_now()))


@command(app, "import")
def import_answers(
    common: Common,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE|DIR…",
            help="Answer bundles, or certificates in PEM, DER or PKCS#7, under any file name.",
            show_default=False,
        ),
    ],
    all_or_nothing: Annotated[
        bool, typer.Option("--all-or-nothing", help="Install nothing if one certificate fails.")
    ] = False,
    wait: WaitOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Install a CA desk's answers: match each by its public key, prove it, and install it as `renew` does.

    Exits with 4 while other requests still wait.
    """
    from bridge.cli import carried  # noqa: PLC0415

    code = carried.import_answers(
        common.settings(),
        paths,
        utc_now,
        as_json=output is Output.JSON,
        all_or_nothing=all_or_nothing,
        wait=wait or timedelta(),
    )
    raise typer.Exit(code)


@command(pending_app, "list")
def pending_list(common: Common, output: OutputOption = Output.TEXT) -> None:
    """Show the open requests: their age, the time left, who has them, and their fingerprints."""
    from bridge.cli import carried  # noqa: PLC0415

    carried.pending_list(common.settings(), utc_now(), as_json=output is Output.JSON)


@command(pending_app, "cancel")
def pending_cancel(
    common: Common,
    names: Annotated[list[str], typer.Argument(metavar="NAME…|all", help="kubeadm's names.", show_default=False)],
    wait: WaitOption = None,
) -> None:
    """Forget requests and remove their keys; a later answer to them is refused."""
    from bridge.cli import carried  # noqa: PLC0415

    raise typer.Exit(carried.pending_cancel(common.settings(), names, utc_now, wait=wait or timedelta()))


@command(app, "sign")
def sign(
    common: Common,
    source: Annotated[
        Path,
        typer.Argument(
            metavar="BUNDLE|DIR",
            help="A request bundle, a directory of them, or one of kubeadm's CSRs.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="ANSWER|DIR", help="Where answers go. [default: beside a bundle or the CSRs]"
        ),
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="What may be signed. [default: desk-policy.toml beside the settings]")
    ] = None,
    archive: Annotated[
        Path | None, typer.Option(help="Where answered bundles go. [default: desk.archive, or the state directory]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be signed and refused; sign nothing.")
    ] = False,
    approve: Annotated[
        bool, typer.Option("--approve", help="Show each bundle on the terminal, and ask whether to sign it.")
    ] = False,
    without_proof: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Require no continuity proof for this certificate; may be repeated."),
    ] = None,
    node: Annotated[str, typer.Option(help="The node whose CSRs the directory holds.", show_default=False)] = "",
    cluster: Annotated[str, typer.Option(help="The cluster of that node.", show_default=False)] = "",
    wait: WaitOption = None,
) -> None:
    """
    Sign what the policy allows, at the CA desk: request bundles of nodes, or kubeadm's CSRs.

    With a directory it is the CA host's cron job: it leaves half-copied bundles alone, archives answered ones, and
    does not sign again what an interrupted run had signed. A refusal goes back to its node in the answer.
    """
    from bridge.cli import desk  # noqa: PLC0415
    from bridge.signing.desk_files import Options  # noqa: PLC0415

    options = Options(
        source=source.absolute(),
        out=out.absolute() if out is not None else None,
        policy=policy.absolute() if policy is not None else None,
        archive=archive.absolute() if archive is not None else None,
        without_proof=frozenset(without_proof or ()),
        node=node,
        cluster=cluster,
    )
    code = desk.sign(common.settings(), options, utc_now, dry_run=dry_run, approve=approve, wait=wait or timedelta())
    raise typer.Exit(code)


@command(app, "install")
def install(
    common: Common,
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Keys, and certificates beside them.", show_default=False)
    ],
    all_or_nothing: Annotated[
        bool, typer.Option("--all-or-nothing", help="Install nothing if one certificate fails.")
    ] = False,
    no_restart: Annotated[
        bool, typer.Option("--no-restart", help="Restart nothing, whatever the settings say; name what to restart.")
    ] = False,
    any_identity: AnyIdentityOption = None,
    wait: WaitOption = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Install keys of `renew --csr-only` or `kubeadm certs generate-csr`, and certificates that were signed by any means.

    Keys have kubeadm's names, flat or nested; certificates are found by public key, in PEM, DER or PKCS#7. Each is
    proven and installed as by `renew`, and must have the identity of the one that it replaces. Exits with 4 while a
    key has no certificate.
    """
    from bridge.cli import renewals  # noqa: PLC0415

    code = renewals.install(
        common.settings(),
        directory.absolute(),
        utc_now,
        as_json=output is Output.JSON,
        all_or_nothing=all_or_nothing,
        restarts=not no_restart,
        wait=wait or timedelta(),
        any_identity=any_identity or [],
    )
    raise typer.Exit(code)


@command(app, "prove")
def prove(
    common: Common,
    wait: Annotated[
        timedelta | None,
        typer.Option(
            parser=duration, metavar="DURATION", help='How long to wait until everything works, such as "60s".'
        ),
    ] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Show what each component really serves and uses, and whether its client certificates are accepted.

    Run it on a control-plane node; it writes and restarts nothing. Exits with 7 if a component runs on an old
    certificate, one is refused, or something does not answer.
    """
    from bridge.cli import components  # noqa: PLC0415

    as_json = output is Output.JSON
    raise typer.Exit(components.prove(common.settings(), utc_now, wait or timedelta(), as_json=as_json))


@command(app, "doctor")
def doctor(
    common: Common,
    before_upgrade: Annotated[
        bool,
        typer.Option(
            "--before-upgrade",
            help="Say instead what `kubeadm upgrade` will do to certificates here, and where it would abort.",
        ),
    ] = False,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Check that everything is ready for the next renewal.

    It checks files, keys, owners, manifests, clock, room and secrets, whether what is installed would survive a
    restart, and for each authority whether its backend answers, is the right CA, and would sign exactly this. At a CA
    desk it checks policy, CAs and keys. It asks the CAs, has nothing signed and writes nothing. Exits with 1 for an
    error, with 3 for a warning.
    """
    from bridge.cli import doctor as doctor_module  # noqa: PLC0415

    as_json = output is Output.JSON
    raise typer.Exit(doctor_module.run(common.settings(), utc_now(), as_json=as_json, upgrade=before_upgrade))


@command(app, "setup")
def setup(
    common: Common,
    kind: Annotated[
        str,
        typer.Argument(
            metavar="TYPE",
            help="A backend's type (vault, cfssl, openssl …), kubernetes, systemd or cron.",
            show_default=False,
        ),
    ],
    authority: Annotated[
        str | None, typer.Option(help="Only this one of ca, etcd-ca, front-proxy-ca.", show_default=False)
    ] = None,
    nodes: Annotated[
        Path | None,
        typer.Option(help="For all nodes of this list, one per line: `NAME ADDRESS …`.", show_default=False),
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write files into this directory.", show_default=False)
    ] = None,
    enable: Annotated[
        bool, typer.Option("--enable", help="systemd, cron: write the files where they belong, and start them.")
    ] = False,
    inbox: Annotated[
        Path | None, typer.Option(help="systemd, cron: for a CA desk that signs what is in here …", show_default=False)
    ] = None,
    outbox: Annotated[Path | None, typer.Option(help="… and puts the answers here.", show_default=False)] = None,
    user: Annotated[str, typer.Option(help="systemd, cron: the desk's user.")] = "ca",
) -> None:
    """
    Print what a CA's administrator needs, or a job for cron.

    For a CA it is made for exactly this node's certificates. Vault: roles and a policy; cfssl: signing profiles;
    openssl: an openssl.cnf for each CA; cmp, est and exec: what the CA has to give. `setup systemd` and
    `setup cron` make the jobs of this node, or of a CA desk, with this machine's paths. `setup kubernetes` makes the
    gateway's manifests for this cluster; with `--authority`, what a cluster needs that signs for this one.
    """
    from bridge.cli import jobs  # noqa: PLC0415
    from bridge.cli import setup as module  # noqa: PLC0415

    if kind == "kubernetes" and authority is None:
        module.setup_gateway(common.settings(), directory)
        return
    if kind in jobs.KINDS:
        module.setup_jobs(common.settings(), kind, jobs.desk_of(inbox, outbox, user), directory, enable=enable)
        return
    options = module.SetupOptions(authority=authority, nodes=nodes, directory=directory)
    module.setup(common.settings(), kind, options)


@command(app, "demo")
def demo(
    _: Common,
    directory: Annotated[
        Path | None, typer.Option(help="Keep everything in this directory. [default: a temporary one]")
    ] = None,
) -> None:
    """
    Show the main job on a throwaway PKI: no root, no cluster, no network.

    A plan, a renewal, a bad certificate that is refused, a run that is killed and the next one that ends what it
    began, a rollback, and the record of all of it, with an `openssl ca` directory as the company's CA.
    """
    from bridge.cli import demo as demo_module  # noqa: PLC0415

    raise typer.Exit(demo_module.run(directory, utc_now()))


@app.command("complete", hidden=True)
def complete(words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Say what a shell may offer for the last word, each with its meaning after a tab."""
    from bridge.cli import completion  # noqa: PLC0415
    from bridge.system.console import printable  # noqa: PLC0415

    program = typer.main.get_command(app)
    offers = completion.offers(program, words or [""])
    say("\n".join(f"{printable(word)}\t{meaning}" for word, meaning in offers))


@command(settings_app, "init")
def settings_init(
    common: Common,
    file: Annotated[Path | None, typer.Argument(help="[default: --config, or /etc/ca-bridge/config.toml]")] = None,
) -> None:
    """Write a commented settings file; an older one is never overwritten."""
    from bridge.cli import setup as module  # noqa: PLC0415

    module.settings_init(file or common.config)


@command(settings_app, "show")
def settings_show(common: Common) -> None:
    """Show the settings in force, defaults included; a secret's value is never shown."""
    from bridge.cli import setup as module  # noqa: PLC0415

    module.settings_show(common.settings())


@command(settings_app, "check")
def settings_check(common: Common) -> None:
    """Check the whole settings file, backends' tables included; asks no CA."""
    from bridge.cli import setup as module  # noqa: PLC0415

    module.settings_check(common.settings())


@command(audit_app, "show")
def audit_show(
    common: Common,
    since: Annotated[
        timedelta | None,
        typer.Option(parser=duration, metavar="DURATION", help='Only events younger than this, such as "7d".'),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Only events of this certificate.", show_default=False)] = None,
    output: OutputOption = Output.TEXT,
) -> None:
    """
    Show what was asked, issued, refused and installed, when and by whom.

    It prints the audit log in the state directory, oldest event first; `audit verify` checks it.
    """
    from bridge.cli import history  # noqa: PLC0415

    begin = utc_now() - since if since is not None else None
    history.audit_show(common.settings(), begin, name, as_json=output is Output.JSON)


@command(audit_app, "verify")
def audit_verify(common: Common) -> None:
    """
    Find changed, missing, inserted, moved and cut lines of the audit log.

    Exits with 1 if there are any. A log that was written anew as a whole can only be found by a copy elsewhere.
    """
    from bridge.cli import history  # noqa: PLC0415

    raise typer.Exit(history.audit_verify(common.settings()))


@command(backend_app, "test")
def backend_test(
    common: Common,
    authority: Annotated[str, typer.Argument(help="ca, etcd-ca or front-proxy-ca.", show_default=False)],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME…]", help="Only these. [default: all of the authority]", show_default=False),
    ] = None,
    wait: Annotated[
        timedelta | None,
        typer.Option(parser=duration, metavar="DURATION", help='For a CA that answers later, such as "10m".'),
    ] = None,
) -> None:
    """
    Run the suite that every backend passes against an authority's backend; the node stays as it is.

    It asks for real certificates with the node's names, a dozen or more per name, for keys that it throws away.
    """
    from bridge.cli import trial  # noqa: PLC0415

    raise typer.Exit(trial.run(common.settings(), authority, names or [], wait or timedelta(), utc_now()))


gateway.register(app)
