"""Runs the operator's commands around a renewal; each is on disk before it runs, and later runs repeat failed ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bridge.errors import BridgeError, Exit
from bridge.node.inventory import Item, Node
from bridge.pki.certificates import serial_hex
from bridge.settings.tables import Commands, Settings
from bridge.state import Outcome, Store
from bridge.state.obligations import AFTER_INSTALL, FAILURE, SUCCESS, HooksToRun, hooks_file
from bridge.system.console import log, printable
from bridge.system.run_command import Ended, OutputLines, run_logged
from bridge.system.state_file import StateError

BEFORE = "before"

#: The exit code of a `before` hook that postpones the run (EX_TEMPFAIL of sysexits.h).
NOT_NOW = 75

_MOST_REMEMBERED = 20
_LONGEST_ERRORS = 4000


class HookError(BridgeError):
    """A hook failed; the exit code says what that means for the run."""

    hint = "the next `ca-bridge renew` runs it again, until it succeeds or is no longer in the settings"


class NotNowByHookError(HookError):
    """A `before` hook said "not now"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HookEvent:
    """The facts that a hook gets; none is a secret."""

    names: tuple[str, ...]  #: The run's certificates.
    old_serials: Mapping[str, str] = field(default_factory=dict)  #: In hexadecimal, by name, of renewed certificates.
    new_serials: Mapping[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()  #: Files with new content.
    backup_id: str | None = None
    exit_code: int | None = None  #: None: the run is not over.
    errors: tuple[str, ...] = ()  #: Sentences.

    @classmethod
    def of(
        cls,
        items: Iterable[Item],
        outcomes: Iterable[Outcome] = (),
        *,
        backup_id: str | None = None,
        exit_code: int | None = None,
        errors: Iterable[BridgeError] = (),
    ) -> HookEvent:
        """The event of a run: its items, their outcomes so far, and errors about the run as a whole."""
        outcomes = list(outcomes)
        names = tuple(dict.fromkeys([*(i.spec.name for i in items), *(o.name for o in outcomes)]))
        renewed = {o.name: o.new for o in outcomes if o.new is not None}
        paths = [path for i in items if i.spec.name in renewed for path in (i.certificate_path, i.key_path)]
        return cls(
            names=names,
            old_serials={o.name: serial_hex(o.old) for o in outcomes if o.new is not None and o.old is not None},
            new_serials={name: serial_hex(certificate) for name, certificate in renewed.items()},
            files=tuple(str(path) for path in paths if path is not None),
            backup_id=backup_id,
            exit_code=exit_code,
            errors=(*(f"{o.name}: {o.error.reason}" for o in outcomes if o.error is not None), *map(str, errors)),
        )

    def environment(self) -> dict[str, str]:
        """Return the environment variables; a list has one entry a line, and a fact not known yet is empty."""
        # errors may quote a CA's answer
        errors = "\n".join(printable(line) for error in self.errors for line in error.split("\n"))
        return {
            "CA_BRIDGE_NAMES": "\n".join(self.names),
            "CA_BRIDGE_RENEWED": "\n".join(self.new_serials),
            "CA_BRIDGE_OLD_SERIALS": _pairs(self.old_serials),
            "CA_BRIDGE_NEW_SERIALS": _pairs(self.new_serials),
            "CA_BRIDGE_FILES": "\n".join(self.files),
            "CA_BRIDGE_BACKUP_ID": self.backup_id or "",
            "CA_BRIDGE_EXIT_CODE": "" if self.exit_code is None else str(self.exit_code),
            "CA_BRIDGE_ERRORS": errors[:_LONGEST_ERRORS],
        }


def _pairs(serials: Mapping[str, str]) -> str:
    return "\n".join(f"{name}={serial}" for name, serial in serials.items())


class Hooks:
    """The hooks of one run; the node's lock is held."""

    def __init__(self, settings: Settings, store: Store, run_id: str) -> None:
        self._settings = settings
        self._file = hooks_file(store)
        self._run_id = run_id

    def before(self, occasion: HookEvent) -> None:
        """Run the hooks before a CA is asked (HookError: the renewal must not begin)."""
        environment = self._environment(BEFORE, occasion) | {"CA_BRIDGE_TRY": "1"}
        for words in self._settings.hooks.before.words():
            ended = self._run(BEFORE, words, environment)
            if ended.code == NOT_NOW:
                text = f'hook before: {words[0]} says "not now" (code {NOT_NOW}); no CA was asked'
                raise NotNowByHookError(text, hint="run again later", exit_code=Exit.UNAVAILABLE)
            if ended.failure:
                text = f"hook before: {words[0]} {ended.failure}; no CA was asked"
                raise HookError(text, hint="fix it, or take it out of [hooks]")

    def installing(self, occasion: HookEvent) -> None:
        """Record, before the installation, that the commands of `installed` are to run (HookError: install nothing)."""
        if self._commands(AFTER_INSTALL).texts:
            try:
                self._remember(self._to_run(AFTER_INSTALL, occasion))
            except StateError as e:
                raise HookError(str(e), hint=e.hint) from e

    def installed(self, occasion: HookEvent) -> list[HookError]:
        """Run the hooks after the installation, before any restart."""
        return self._all_of(AFTER_INSTALL, occasion)

    def finished(self, occasion: HookEvent) -> list[HookError]:
        """Run the hooks at the end of a run that had something to do; a run that only waits has no hooks."""
        if occasion.exit_code in (Exit.DONE, Exit.WAITING):
            return self._all_of(SUCCESS, occasion) if occasion.new_serials else []
        return self._all_of(FAILURE, occasion)

    def again(self, node: Node) -> list[HookError]:
        """Run the hooks that earlier runs left; drop a hook if none of its certificates is installed any more."""
        try:
            every = self._file.read() or ()
        except StateError as e:
            return [HookError(str(e), hint=e.hint)]
        errors = []
        for hooks in every:
            why = "its certificates are not in use" if hooks.is_outdated(node) else ""
            if all(text in hooks.done for text in self._commands(hooks.event).texts):
                why = "it is no longer in the settings"
            if why:
                log.info("hook %s of run %s is not run again: %s", hooks.event, hooks.run_id, why)
                self._remember(hooks, is_over=True)
            else:
                errors += self._deliver(hooks, Exit.FAILED if hooks.event == FAILURE else Exit.NOT_LIVE)
        return errors

    def _all_of(self, event: str, occasion: HookEvent) -> list[HookError]:
        if not self._commands(event).texts:
            return []
        failed_anyway = occasion.exit_code if event == FAILURE else None
        return self._deliver(self._to_run(event, occasion), failed_anyway or Exit.NOT_LIVE)

    def _to_run(self, event: str, occasion: HookEvent) -> HooksToRun:
        environment, serials = self._environment(event, occasion), occasion.new_serials if event != FAILURE else {}
        return HooksToRun(event=event, run_id=self._run_id, environment=environment, serials=serials)

    def _deliver(self, hooks: HooksToRun, exit_code: int) -> list[HookError]:
        hooks = dataclasses.replace(hooks, tries=hooks.tries + 1)
        environment = {**hooks.environment, "CA_BRIDGE_TRY": str(hooks.tries)}
        failures, trouble = [], self._kept(hooks)
        commands = self._commands(hooks.event)
        for text, words in zip(commands.texts, commands.words(), strict=True):
            if text in hooks.done:
                continue
            ended = self._run(hooks.event, words, environment)
            if ended.failure:
                failures.append(f"{words[0]} {ended.failure}")
            else:
                hooks = dataclasses.replace(hooks, done=(*hooks.done, text))
                trouble = self._kept(hooks)
        if not failures:
            trouble = self._kept(hooks, is_over=True)
        problems = "; ".join(filter(None, [*failures, trouble]))
        text = f"hook {hooks.event} of run {hooks.run_id}: {problems}"
        return [HookError(text, exit_code=exit_code)] if problems else []

    def _commands(self, event: str) -> Commands:
        commands: Commands = getattr(self._settings.hooks, event)
        return commands

    def _environment(self, event: str, occasion: HookEvent) -> dict[str, str]:
        node = self._settings.node
        return {
            "CA_BRIDGE_EVENT": event,
            "CA_BRIDGE_RUN_ID": self._run_id,
            "CA_BRIDGE_NODE": node.node_name,
            "CA_BRIDGE_CLUSTER": node.cluster,
            "CA_BRIDGE_STATE_DIR": str(node.state_dir),
            "CA_BRIDGE_PKI_DIR": str(node.pki_dir),
            "CA_BRIDGE_KUBECONFIG_DIR": str(node.kubeconfig_dir),
            **occasion.environment(),
        }

    def _run(self, event: str, words: Sequence[str], environment: Mapping[str, str]) -> Ended:
        lines = OutputLines(lambda line: log.info("hook %s: %s", event, line))
        ended = run_logged(words, environment, self._settings.hooks.timeout, lines)
        if lines.left_out:
            log.warning("hook %s: %s: %d more bytes of output are not shown", event, words[0], lines.left_out)
        return ended

    def _kept(self, hooks: HooksToRun, *, is_over: bool = False) -> str:
        """Record that a hook is to run or has run; return a sentence if that failed, which does not stop the hook."""
        try:
            self._remember(hooks, is_over=is_over)
        except StateError as e:
            return f"it may run once more, or be forgotten: {e}"
        return ""

    def _remember(self, hooks: HooksToRun, *, is_over: bool = False) -> None:
        every = self._file.read() or ()
        others = [hook for hook in every if (hook.event, hook.run_id) != (hooks.event, hooks.run_id)]
        if not is_over:
            others = [hook for hook in others if not (hook.event == hooks.event == FAILURE)]  # the newest is enough
            for hook in others[: -(_MOST_REMEMBERED - 1)]:
                log.warning("hook %s of run %s is given up: too many others have failed since", hook.event, hook.run_id)
            others = [*others[-(_MOST_REMEMBERED - 1) :], hooks]
        self._file.put(tuple(others))
