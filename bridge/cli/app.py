"""
The program `ca-bridge`: each command is in a file of its own, which is loaded when the command is used; it parses its
options, calls a room, prints the result, and returns the exit code.

This file lists all commands by task, options that exclude or need each other, and examples. The help is plain text in
whole sentences; `docs/commands.md` and the manual pages are made from it.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from bridge.cli.printing import say, say_usage, wrapped

#: The contents of `ca-bridge --help`: headings in the order of an operator's day; below each its commands with files.
TASKS: dict[str, dict[str, tuple[str, str]]] = {
    "Look, and change nothing": {
        "check-expiration": ("expiration", "Show when certificates expire, as kubeadm does."),
        "plan": ("renew", "Show what the next `ca-bridge renew` would do."),
        "prove": ("components", "Show what each component really serves and uses."),
        "doctor": ("doctor", "Check that the next renewal will succeed."),
    },
    "Renew": {
        "renew": ("renew", "Renew what is due, or the named certificates."),
        "restart": ("components", "Restart components that run on old certificates."),
        "serving-certs": ("components", "Give controller manager and scheduler serving certificates."),
        "install": ("renew", "Install keys and certificates from a directory."),
    },
    "Replace a CA": {"rotate-ca": ("rotate_ca", "Put another CA in the place of this one, while the cluster runs.")},
    "Carry requests to a CA, and its answers back": {
        "export": ("carried", "Write requests for a CA desk into a file."),
        "inspect": ("carried", "Show what a request or an answer holds."),
        "sign": ("desk", "Sign requests at a CA desk, by its policy."),
        "serve": ("serve", "Sign what nodes ask for over HTTPS, by the desk's policy."),
        "fleet": ("serve", "Show all nodes of the door: what ends next, what failed."),
        "enroll": ("serve", "Make a new node's one-time secret for the door."),
        "enrolments": ("serve", "Show and withdraw these secrets."),
        "serve-database": ("serve", "Back up and restore the door's database."),
        "approvals": ("serve", "Decide about requests that wait for people."),
        "import": ("carried", "Install the answers of a CA desk."),
        "pending": ("carried", "Show and cancel requests that wait for an answer."),
    },
    "Sign for the cluster": {
        "gateway": ("gateway", "Sign for kubelets and users, by the certificates API."),
        "kubelets": ("components", "Have kubelets ask for serving certificates, or not."),
        "trust": ("gateway", "Publish the roots that pods trust."),
    },
    "Go back, and clean up after a crash": {
        "backups": ("history", "List the backups of replaced files."),
        "rollback": ("history", "Put the files of a backup back."),
        "recover": ("history", "Finish or undo an interrupted installation."),
    },
    "Make a new node": {"bootstrap": ("bootstrap", "Make what `kubeadm init` or `kubeadm join` needs.")},
    "Let people and machines in": {"kubeconfig": ("users", "Make kubeconfigs with short-lived certificates.")},
    "Set up": {
        "settings": ("settings", "Write, show and check the settings file."),
        "setup": ("setup", "Print what a CA, systemd, cron or Kubernetes needs."),
        "backend": ("settings", "Try a CA that the settings name."),
        "demo": ("demo", "Show the main job on a throwaway PKI."),
        "help": ("pages", "Show a page of the documents."),
    },
    "Keep the record": {"audit": ("history", "Show and verify the audit log.")},
}
#: The file of each command.
FILES = {command: file for task in TASKS.values() for command, (file, _) in task.items()} | {"complete": "completion"}

#: By command: an option, and the options that can't be combined with it.
EXCLUDES: dict[str, dict[str, tuple[str, ...]]] = {
    "renew": {
        "--csr-only": (
            *("--dry-run", "--rehearse", "--all-or-nothing", "--no-restart", "--wait"),
            *("--add-san", "--drop-san", "--adopt-defaults", "--kubeadm-config"),
        ),
        "--rehearse": ("--dry-run", "--all-or-nothing", "--no-restart"),
        "--dry-run": ("--wait",),
    },
    "doctor": {"--kubelets": ("--before-upgrade",), "--ca-keys": ("--before-upgrade", "--kubelets")},
    "rotate-ca drop": {"--emergency": ("--without",)},
    "bootstrap join": {"--control-plane": ("--worker",)},
    "bootstrap check": {"--control-plane": ("--worker",)},
}

#: By command: an option, and the option that it needs.
NEEDS: dict[str, dict[str, str]] = {
    "renew": {"--csr-only": "--csr-dir", "--csr-dir": "--csr-only", "--ahead": "--rehearse"},
    "kubeconfig user": {"--key-file": "--csr"},
    "rotate-ca drop": {"--accept-outage": "--emergency"},
}

#: Command lines without the program's name, each with its effect.
EXAMPLES = (
    ("help", "List the pages."),
    ("help emergency", "Everything has expired, or keys have leaked: what to do."),
    ("kubeconfig request bob --group dev --group ops", "Make bob.key and bob.csr, on bob's machine."),
    ("kubeconfig user bob --group dev --group ops --csr bob.csr", "Make bob.conf from bob's request."),
    ("kubeconfig user backup --validity 1h -o /etc/backup/kubeconfig", "Make one for a machine, with its key."),
    ("check-expiration", "Show the two tables that kubeadm shows."),
    ("check-expiration --within 14d", "Exit with 3 if something expires within two weeks."),
    ("check-expiration -o nagios -w 30d -c 7d", "One line for Nagios or Icinga."),
    ("renew", "Renew what is due: the command for cron."),
    ("renew apiserver etcd-server", "Renew these two now, due or not."),
    ("renew all --no-restart", "Renew everything, and restart nothing."),
    ("renew --rehearse --ahead 2d", "Rehearse what is due tomorrow: sign, prove, throw away."),
    ("renew all --csr-only --csr-dir /root/csrs", "Only write keys and CSRs."),
    ("renew apiserver --kubeadm-config kubeadm.yaml", "Make a missing one from kubeadm's file."),
    ("renew --add-san apiserver=api2.example.com", "Give the API server one more name."),
    ("serving-certs on", "Make, restart and prove; the last node writes kubeadm-config."),
    ("serving-certs off", "Go back to certificates that they make themselves."),
    ("plan", "Show what the next `ca-bridge renew` would do."),
    ("plan all -o json", "Show what `ca-bridge renew all` would do, for a program."),
    ("rotate-ca status", "Show where the replacement stands on this node."),
    ("rotate-ca plan", "Show what each phase would do, and whether the new CAs can work."),
    ("rotate-ca trust", "The first phase, on each node."),
    ("rotate-ca issue", "The second phase, on each node, when all trust the new CAs."),
    ("rotate-ca issue --without worker-9", "Without a node that is gone for good."),
    ("rotate-ca issue --keys-to /mnt/disk", "With kubeadm's own CA keys moved away from this node."),
    ("rotate-ca drop", "The last phase, on each node, when nothing uses the old CAs."),
    ("rotate-ca drop --emergency", "The old CA's key has leaked: what it costs to be rid of it now."),
    ("rotate-ca back --ca etcd-ca", "Back by one phase, for one of the CAs."),
    ("recover", "Finish or undo an interrupted installation."),
    ("recover --set-aside", "Put damaged state files aside first."),
    ("backups", "Show what a rollback could put back."),
    ("rollback", "Put the newest backup back."),
    ("rollback 20261201T030911Z-f66c4ae7", "Put this one back; `ca-bridge backups` lists them."),
    ("restart", "Restart what still runs on an old certificate."),
    ("restart kube-scheduler", "Restart this component."),
    ("export /media/stick/cp-1.request.json", "Write requests for what is due."),
    ("export /media/stick/cp-1.request.json all", "Write requests for everything."),
    ("inspect cp-1.request.json", "Show what is asked, and its fingerprint."),
    ("import /media/stick/cp-1.answer.json", "Install the answers of a CA desk."),
    ("import /media/stick/certificates", "Install certificates that came as files."),
    ("pending list", "Show what waits, and for how long."),
    ("pending cancel apiserver", "Forget this request; the next run makes a new one."),
    ("pending cancel all", "Forget every open request."),
    ("sign cp-1.request.json -o cp-1.answer.json --approve", "Sign one bundle, and ask first."),
    ("sign /srv/desk/inbox -o /srv/desk/outbox", "Answer an inbox: the CA host's job for cron."),
    ("sign /srv/desk/inbox -o /srv/desk/outbox --dry-run", "Say what would be signed or refused."),
    ("install /root/csrs", "Install keys and the certificates beside them."),
    ("prove", "Show what each component serves and uses."),
    ("prove --wait 2m", "Wait up to two minutes until everything works."),
    ("doctor", "Find what would make the next renewal fail."),
    ("doctor -o json", "The same for a program."),
    ("doctor --before-upgrade", "Say what `kubeadm upgrade` would do to certificates here."),
    ("doctor --kubelets", "Show every kubelet's serving certificate."),
    ("doctor --ca-keys /", "Find out whether a CA's key is anywhere on this node."),
    ("gateway --check", "Find out whether it could work; nothing is signed."),
    ("gateway --log-format json", "Run until SIGTERM: the command of a unit or a pod."),
    ("serve --log-format json", "Run until SIGTERM: the command of a unit."),
    ("fleet", "Show the nodes, the worst first; exit 3 if one needs a person."),
    ("fleet -o prometheus", "The same as metrics."),
    ("enroll cp-4", "Print the secret of cp-4, good for one hour and one request."),
    ("enroll worker-7 --certificate kubelet.conf --for 10m", "One for a worker's kubelet alone."),
    ("approvals list", "Show what waits for people, and what it means."),
    ("approvals show 3f9c2a7be01d4c55", "Show this request whole, before you decide."),
    ("approvals approve 3f9c2a7be01d4c55", "Sign its digest with your key: yes."),
    ('approvals refuse 3f9c2a7be01d4c55 --reason "no such change"', "The node gets this reason."),
    ("enrolments list", "Show who may ask for first certificates, and who has."),
    ("enrolments withdraw 3", "End number 3 now; its unsigned request is refused."),
    ("serve-database status", "Count requests, and list those left to people."),
    ("serve-database backup /backup/door.db", "Copy SQLite's file while the door runs."),
    ("serve-database restore /backup/door.db", "Put the copy in its place, while no door runs."),
    ("serve-database restored", "After pg_restore: have CAs asked what they have signed since."),
    ("serve-database again 3f1c0a9b7e5d2468", "Have a request signed that was left to people."),
    ("kubelets on", "Take this node as far as the others allow; run it on each node, then again."),
    ("kubelets off", "The same backwards, the control-plane nodes first."),
    ("trust publish", "Make the bundles of the policy's signers equal to pods.crt: for a timer."),
    ("trust publish corp.example/spiffe", "Only this signer's, without a policy."),
    ("trust publish --remove corp.example/old", "Also remove the bundle of a former signer."),
    ("setup vault", "Print roles and a policy for this node's certificates."),
    ("setup openssl -o /root/for-the-ca", "Write an openssl.cnf for each CA into a directory."),
    ("setup systemd --enable", "Install and start a timer for `ca-bridge renew`."),
    ("setup cron --enable", "Write a file for /etc/cron.d instead."),
    ("demo", "Show the main job in a temporary directory."),
    ("demo --directory /tmp/ca-bridge-demo", "Keep the directory, to go on with it."),
    ("bootstrap init --kubeadm-config cluster.yaml", "Get a machine ready for `kubeadm init`."),
    (
        "bootstrap init --kubeadm-config cluster.yaml --request cp-1.request.json",
        "Write requests for a CA desk instead of asking a CA.",
    ),
    (
        "bootstrap join --control-plane --shared - --name cp-2 --advertise-address 192.0.2.11",
        "Get a machine ready for `kubeadm join`; what another node shares comes through a pipe.",
    ),
    ("bootstrap join --order w-1.order.json", "The same from an administrator's order."),
    ("bootstrap share --worker", "Print what a worker needs; no secret is in it."),
    ("bootstrap orders --nodes nodes.txt --kubeadm-config cluster.yaml -o orders", "Prepare all nodes of a list."),
    (
        "bootstrap setup vault --order orders/cp-1.order.json -o roles",
        "Write roles and policies for a node that does not exist yet.",
    ),
    ("bootstrap check", "Look at all that `kubeadm init` needs."),
    ("settings init vault", "Write /etc/ca-bridge/config.toml for Vault or OpenBao."),
    ("settings init cfssl /tmp/config.toml", "Write it elsewhere, to read it first."),
    ("settings show", "Show every key, with its value."),
    ("settings check", "Find every error in the file."),
    ("audit show --since 30d", "Show the last month."),
    ("audit show --name apiserver -o json", "Show what concerns one certificate."),
    ("audit verify", "Exit with 1 if a line was changed, removed or inserted."),
    ("backend test ca", "Have real certificates signed by this authority's CA."),
)


#: Names of the parameters that `options.command` gives to every command, and click's own.
COMMON = frozenset(("config", "pki_dir", "kubeconfig_dir", "state_dir", "verbose", "log_format", "help"))

#: The program's name.
PROGRAM = "ca-bridge"

#: How wide the left column may get before its text goes on the next line.
_WIDEST = 28


def first_sentence(text: str) -> str:
    """Return the first sentence of a help text, on one line."""
    paragraph = " ".join(inspect.cleandoc(text).split("\n\n")[0].split())
    return re.split(r"(?<=[.]) (?=[A-Z])", paragraph)[0]


def examples_of(command: str) -> list[tuple[str, str]]:
    """Return the example lines of a command such as `audit show`, each with its effect."""
    return [(f"{PROGRAM} {line}", text) for line, text in EXAMPLES if f"{line} ".startswith(f"{command} ")]


def name_of(context: typer.Context) -> str:
    """Return a command's name without the program's, such as `audit show`."""
    return context.command_path.partition(" ")[2]


#: Stands for a hyphen while the help is wrapped, so that no line breaks at it.
_HARD = "\N{NON-BREAKING HYPHEN}"


def _hard(text: str) -> str:
    """Keep words with hyphens whole: they are names of commands, files and options."""
    return re.sub(r"(?<=\w)-(?=\w)", _HARD, text)


class Command(TyperCommand):
    """A command whose help ends with examples, and whose options are checked against each other."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty paths, which would mean the working directory, and options that exclude or lack each other."""
        rest: list[str] = super().parse_args(ctx, args)
        for param in self.params:
            value = ctx.params.get(param.name)
            if param.type.name == "path" and "" in (value if isinstance(value, list | tuple) else [value]):
                raise typer.BadParameter("wanted a path, found an empty text: a variable that is not set?", ctx, param)
        given: set[str] = set()
        for param in self.params:
            if getattr(ctx.get_parameter_source(param.name), "name", "") == "COMMANDLINE":
                given.update(param.opts, param.secondary_opts)
        for option, others in EXCLUDES.get(name_of(ctx), {}).items():
            clash = [other for other in others if other in given]
            if option in given and clash:
                raise typer.BadParameter(f"{option} can't be combined with {', '.join(clash)}", ctx)
        for option, other in NEEDS.get(name_of(ctx), {}).items():
            if option in given and other not in given:
                raise typer.BadParameter(f"{option} needs {other}", ctx)
        return rest

    def get_help(self, ctx: Any) -> str:
        """Return the whole help text."""
        return super().get_help(ctx).replace(_HARD, "-")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 (typer calls it)
        """Write the command's description."""
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(_hard(inspect.cleandoc(self.help or "")))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, the command's own options, those of every command, and which go together."""
        parts: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": [], "Options of every command": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                own = "Arguments" if parameter.param_type_name == "argument" else "Options"
                heading = "Options of every command" if parameter.name in COMMON else own
                parts[heading].append((record[0], _hard(record[1])))
        parts["Options together"] = list(_together(name_of(ctx)))
        for heading, records in parts.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records, col_max=_WIDEST)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write each example on a line that can be copied, with its effect below it."""
        if examples := examples_of(name_of(ctx)):
            with formatter.section("Examples"):
                for line, sentence in examples:
                    # a wide example is broken with backslashes, so that a shell takes it as it is shown
                    typed = " \\\n".join(wrapped(f"  {line}", formatter.width - len(" \\"), 4))
                    meaning = "\n".join(wrapped(f"{' ' * 6}{sentence}", formatter.width, 6))
                    formatter.write(f"{typed}\n{meaning}\n")


def _together(command: str) -> Iterator[tuple[str, str]]:
    needs, excludes = NEEDS.get(command, {}), EXCLUDES.get(command, {})
    for option in dict.fromkeys([*needs, *excludes]):
        parts = [f"needs {needs[option]}"] if option in needs else []
        parts += [f"not with {', '.join(excludes[option])}"] if option in excludes else []
        yield option, _hard("; ".join(parts))


class Group(TyperGroup):
    """A group of commands, each with a sentence; the program's own commands are listed by task."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words before the command; an option of every command belongs behind it."""
        try:
            return super().parse_args(ctx, args)
        except typer.TyperException as error:
            e: Any = error  # the classes of usage errors are not exported
            option = getattr(e, "option_name", "")
            if option.lstrip("-").replace("-", "_") in {*COMMON, "v"}:
                e.message += f"; write it behind the command: {ctx.command_path} COMMAND {option}"
            raise

    def get_help(self, ctx: Any) -> str:
        """Return the whole help text."""
        return super().get_help(ctx).replace(_HARD, "-")

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 (typer calls it)
        """Return the commands' names in the order of the help."""
        return [name for section in sections_of(self).values() for name in section]

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Write a section for each task of the program, or one section for a group."""
        sections = sections_of(self)
        width = max(len(name) for section in sections.values() for name in section)
        for heading, commands in sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), _hard(sentence)) for name, sentence in commands.items()])


def sections_of(group: Any) -> dict[str, dict[str, str]]:
    """Return by heading the first sentence of each command; the program's come from `TASKS`, and load no file."""
    if group.name == PROGRAM:
        return {heading: {name: sentence for name, (_, sentence) in tasks.items()} for heading, tasks in TASKS.items()}
    return {"Commands": {name: first_sentence(command.help or "") for name, command in group.commands.items()}}


# --- the program ------------------------------------------------------------------------------------------------------


class _Commands(Mapping[str, Any]):
    """The commands by name; looking one up loads its file."""

    def __getitem__(self, name: str) -> Any:
        file = import_module(f"{__package__}.{FILES[name]}")
        file.commands.rich_markup_mode = None  # as the program's
        return typer.main.get_group(file.commands).commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(FILES)

    def __len__(self) -> int:
        return len(FILES)


class _Program(Group):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _Commands()  # type: ignore[assignment]  # no command is added later

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Parse the words before the command."""
        with _usage():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Parse and run the command."""
        with _usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """Print a usage error, and end with its exit code."""
    try:
        yield
    except typer.TyperException as error:
        e: Any = error  # the classes of usage errors are not exported
        say_usage(e)
        raise typer.Exit(e.exit_code) from None


# rich's tracebacks can print local variables, and ours hold tokens and keys
app = typer.Typer(
    name="ca-bridge",
    cls=_Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # plain help, the same in a document, a log and a terminal
    help="Renew the certificates of a kubeadm control plane whose CA keys are not on its disks.",
    epilog="`ca-bridge COMMAND -h` shows a command's options and examples. `ca-bridge doctor` says what is missing.",
)


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
