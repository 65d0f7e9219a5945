"""The command line of what looks and changes nothing."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

import typer

from bridge.cli.options import (
    Common,
    ExpirationOutput,
    Output,
    OutputOption,
    command,
    duration,
    utc_now,
)
from bridge.cli.program import app, audit_app, backend_app


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
    if warning is not None and critical is not None and critical > warning:
        raise typer.BadParameter("-c has to be shorter than -w: nobody would be warned before it is critical")
    if output is ExpirationOutput.NAGIOS:
        limit = within if warning is None else warning
        raise typer.Exit(expiration.check_for_nagios(common.settings, utc_now(), limit, critical))
    raise typer.Exit(expiration.check_expiration(common.settings(), utc_now(), output.value, within))


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
    history.audit_show(common.settings_with_record(), begin, name, as_json=output is Output.JSON)


@command(audit_app, "verify")
def audit_verify(common: Common) -> None:
    """
    Find changed, missing, inserted, moved and cut lines of the audit log.

    Exits with 1 if there are any. A log that was written anew as a whole can only be found by a copy elsewhere.
    """
    from bridge.cli import history  # noqa: PLC0415

    raise typer.Exit(history.audit_verify(common.settings_with_record()))


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
