"""`complete`: completions for the word that is being typed in a shell; it loads nothing heavy and asks no CA."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bridge.cli.app import first_sentence, sections_of
from bridge.cli.printing import say
from bridge.errors import BridgeError
from bridge.settings.load import Overrides
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, SPECS, Component
from bridge.state import Store
from bridge.state.open_requests import OpenRequests
from bridge.system.console import printable

commands = typer.Typer()

#: A word and its meaning, which may be empty.
Offer = tuple[str, str]


@commands.command("complete", hidden=True)
def complete(context: typer.Context, words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Print completions for the last word, each with its meaning after a tab."""
    found = offers(context.find_root().command, words or [""])
    say("\n".join(f"{printable(word)}\t{meaning}" for word, meaning in found))


def offers(program: Any, words: Sequence[str]) -> list[Offer]:
    """Return completions for the last of `words`, which were typed after the program's name."""
    *typed, last = [word for word in words if word != "="] or [""]
    command, rest = _command(program, typed)
    option, is_joined, begun = last.partition("=")
    if is_joined and option.startswith("--"):
        rest, last = [*rest, option], begun
    return [offer for offer in dict.fromkeys(_found(command, rest, last, typed)) if offer[0].startswith(last)]


def _command(program: Any, typed: Sequence[str]) -> tuple[Any, list[str]]:
    """Return the command that the words name, and the words after its name."""
    command, rest = program, list(typed)
    while hasattr(command, "commands") and rest:
        command = command.commands.get(rest.pop(0), command)
    return command, rest


def _found(command: Any, rest: Sequence[str], last: str, typed: Sequence[str]) -> Iterator[Offer]:
    options = {name: param for param in command.params if param.param_type_name == "option" for name in param.opts}
    asked = options.get(rest[-1]) if rest and "--" not in rest else None
    if asked is not None and _takes_value(asked):
        yield from _values(command, asked, typed)
    elif last.startswith("-") and "--" not in rest:
        yield from _options(command, rest)
    elif hasattr(command, "commands"):
        yield from (offer for section in sections_of(command).values() for offer in section.items())
    else:
        yield from _arguments(command, rest, options, typed)


def _takes_value(option: Any) -> bool:
    return not option.is_flag and not option.count


def _options(command: Any, rest: Sequence[str]) -> Iterator[Offer]:
    for param in command.params:
        is_option = param.param_type_name == "option" and not param.hidden
        if is_option and (param.multiple or not set(param.opts) & set(rest)):
            yield max(param.opts, key=len), first_sentence(param.help or "")
    yield "--help", "Show this message and exit."


def _arguments(command: Any, rest: Sequence[str], options: dict[str, Any], typed: Sequence[str]) -> Iterator[Offer]:
    """Yield values of the argument whose turn it is, without those that were typed already."""
    given: list[str] = []
    is_value = False
    for word in rest:
        if not is_value and not (word.startswith("-") and "--" not in rest):
            given.append(word)
        is_value = word in options and _takes_value(options[word])
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    left = len(given)
    for argument in arguments:
        if argument.nargs == -1 or left < argument.nargs:
            yield from (offer for offer in _values(command, argument, typed) if offer[0] not in given)
            return
        left -= argument.nargs


def _values(command: Any, parameter: Any, typed: Sequence[str]) -> Iterator[Offer]:
    for choice in getattr(parameter.type, "choices", None) or ():
        yield str(choice), ""
    find = VALUES.get((command.name, parameter.name)) or VALUES.get(("", parameter.name))
    if find is not None:
        yield from find(lambda: _settings(typed))


def _settings(typed: Sequence[str]) -> Settings:
    """Return the settings that the command would have (BridgeError: they can't be used)."""
    named = dict(itertools.pairwise(typed))
    places = [named.get(option) for option in ("--config", "--pki-dir", "--kubeconfig-dir", "--state-dir")]
    return Overrides(*(Path(place) if place else None for place in places)).settings()


Find = Callable[[Callable[[], Settings]], Iterator[Offer]]


def _certificates(settings: Callable[[], Settings]) -> Iterator[Offer]:
    for name, spec in SPECS.items():
        yield name, f"signed by {spec.authority.name}"
    with contextlib.suppress(BridgeError):
        yield from ((pair.name, f"signed by {pair.authority}") for pair in settings().node.pairs)


def _components(_: object) -> Iterator[Offer]:
    yield "all", "etcd and the three components of the control plane"
    yield from ((component.value, "") for component in Component)


def _subjects(settings: Callable[[], Settings]) -> Iterator[Offer]:
    yield from _certificates(settings)
    yield from ((component.value, "a component") for component in Component)


def _authorities(_: object) -> Iterator[Offer]:
    signs = Counter(spec.authority.name for spec in SPECS.values())
    yield from ((name, f"signs {signs[name]} certificates") for name in AUTHORITIES)


def _kinds(_: object) -> Iterator[Offer]:
    from bridge.ca import registry  # noqa: PLC0415

    yield from ((name, "a backend") for name in sorted(registry.installed()))
    yield "systemd", "a timer for `ca-bridge renew`, or for a CA desk"
    yield "cron", "the same for cron"


def _settings_kinds(_: object) -> Iterator[Offer]:
    from bridge.cli.settings import examples  # noqa: PLC0415

    with contextlib.suppress(BridgeError):
        yield from ((name, "its tables") for name in examples())


def _backups(settings: Callable[[], Settings]) -> Iterator[Offer]:
    with contextlib.suppress(BridgeError, OSError):
        names = (path.name for path in (settings().node.state_dir / "backups").iterdir())
        yield from ((name, "") for name in sorted(names, reverse=True) if not name.startswith("."))


def _pending(settings: Callable[[], Settings]) -> Iterator[Offer]:
    yield "all", "every open request"
    with contextlib.suppress(BridgeError, OSError):
        requests = OpenRequests(Store(settings().node.state_dir))
        yield from ((request.name, "waits for its answer") for request in requests)


#: Sources of values, by command and parameter, or by parameter alone.
VALUES: dict[tuple[str, str], Find] = {
    ("", "names"): lambda settings: itertools.chain([("all", "every certificate")], _certificates(settings)),
    ("", "any_identity"): _certificates,
    ("", "without_proof"): _certificates,
    ("", "authority"): _authorities,
    ("", "components"): _components,
    ("", "backup_id"): _backups,
    ("", "kind"): _kinds,
    ("init", "kind"): _settings_kinds,
    ("show", "name"): _subjects,
    ("cancel", "names"): _pending,
    ("test", "names"): _certificates,
}
