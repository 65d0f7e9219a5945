"""What surrounds a renewal: whether it is time, hooks before and after it, and the count of runs that failed."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta

from bridge.errors import BridgeError, Exit, PostponedError, SettingsError, WaitingError
from bridge.node import inventory
from bridge.node.inventory import Node
from bridge.renewal import schedule
from bridge.renewal.attempts import Attempts
from bridge.renewal.hooks import HookError, Hooks, NotNowError, Occasion
from bridge.renewal.selection import Selection, select
from bridge.renewal.verify_and_install import HeldBackError, Result
from bridge.settings.tables import Settings
from bridge.state import audit
from bridge.state.store import Store
from bridge.system.state_file import StateError


def delay(settings: Settings, now: datetime, *, is_terminal: bool) -> timedelta:
    """
    How long a run without names waits before it takes the lock: `renewal.jitter`, where something will be renewed.

    Raises:
        SettingsError: There are windows, and the machine's time zone is none that it knows.
    """
    if is_terminal or not settings.renewal.jitter.most:
        return timedelta()
    node = inventory.read(settings.node.pki_dir, settings.node.kubeconfig_dir)
    due = _held(select(node, settings, (), now), settings, Attempts(Store(settings.node.state_dir)), now)
    share = secrets.SystemRandom().random()
    return schedule.delay(due, settings.renewal, now, is_terminal=is_terminal, share=share)


def _held(selection: Selection, settings: Settings, attempts: Attempts | None, now: datetime) -> Selection:
    selection = schedule.held(selection, settings.renewal, now)
    return selection if attempts is None else attempts.held(selection, now)


class Around:
    """Of one run; the node's lock is held."""

    def __init__(self, settings: Settings, store: Store, record: audit.Record, now: Callable[[], datetime]) -> None:
        self._settings = settings
        self._store = store
        self._attempts = Attempts(store)
        self._record = record
        self._now = now
        #: For the installation: `installing` before it, `installed` after it.
        self.hooks = Hooks(settings, store, record.run_id)

    def again(self, node: Node) -> list[HookError]:
        """First thing in a run, due or not: the hooks that earlier ones owe. Its errors are the run's."""
        return self._told(self.hooks.again(node))

    def held(self, selection: Selection, *, is_terminal: bool) -> Selection:
        """
        For a run without names: without what waits for its window, or for a CA that was asked in vain too often.

        Args:
            selection: What is due.
            is_terminal: Somebody is there, who may ask as often as they like.

        Raises:
            SettingsError: As `delay`.
        """
        return _held(selection, self._settings, None if is_terminal else self._attempts, self._now())

    def before(self, selection: Selection) -> None:
        """
        Before a CA is asked.

        Raises:
            HookError: It must not be asked.
        """
        try:
            self.hooks.before(Occasion.of(selection.items))
        except HookError as e:
            self._record.add(audit.FAILED, error=e)
            raise

    def after(self, selection: Selection, result: Result, errors: Sequence[BridgeError] = ()) -> list[BridgeError]:
        """
        At the end of a run that had something to do, whatever it was: count it, tell who must know, run its hooks.

        Args:
            selection: What was to be renewed; what was held has failed in it.
            result: What became of it.
            errors: About the run as a whole: not installed, not live, rolled back, hooks after the installation.

        Returns:
            What more there is to say; its exit codes are the run's, too.
        """
        if any(isinstance(error, NotNowError) for error in errors):
            return []  # neither success nor failure
        more: list[BridgeError] = list(self._counted(selection, result, errors))
        code = Exit.worst([result.exit_code, *(error.exit_code for error in (*errors, *more))])
        occasion = Occasion.of(
            selection.items, result.outcomes, backup_id=result.backup_id, exit_code=code, errors=(*errors, *more)
        )
        return [*more, *self._told(self.hooks.finished(occasion))]

    def settled(self, about: Mapping[str, Occasion]) -> list[HookError]:
        """
        When it is known what became of an earlier run's installation, or that it still is not: its hooks.

        Args:
            about: By the run that installed.
        """
        every = [Hooks(self._settings, self._store, run_id).finished(one) for run_id, one in about.items()]
        return self._told([error for errors in every for error in errors])

    def _counted(self, selection: Selection, result: Result, errors: Sequence[BridgeError]) -> list[BridgeError]:
        # no CA had a part in those
        of_the_run = [e for e in errors if not isinstance(e, HookError | SettingsError | PostponedError)]
        asked, failed = by_authority(selection, result, of_the_run)
        try:
            people = self._attempts.note(asked, failed, self._now())
        except StateError as e:
            return [e]
        for error in people:
            self._record.add(audit.NEEDS_A_PERSON, authority=error.authority, error=error)
        return [*people]

    def _told(self, errors: list[HookError]) -> list[HookError]:
        for error in errors:
            self._record.add(audit.FAILED, error=error)
        return errors


def by_authority(
    selection: Selection, result: Result, errors: Sequence[BridgeError]
) -> tuple[list[str], dict[str, BridgeError]]:
    """
    Which authorities this run says something about, and the worst error of those that failed (pure).

    One whose answers are only waited for, or were held back because of another's, has neither failed nor succeeded.
    """
    by_name = {outcome.name: outcome for outcome in result.outcomes}
    asked: list[str] = []
    failed: dict[str, BridgeError] = {}
    for item in selection.items:
        outcome, authority = by_name.get(item.spec.name), item.spec.authority.name
        own = outcome.error if outcome is not None else None
        if (outcome is None and not errors) or isinstance(own, WaitingError | HeldBackError):
            continue
        asked.append(authority)
        for error in (own, *errors):
            if error is not None:
                failed[authority] = _worse(failed.get(authority), error)
    return list(dict.fromkeys(asked)), failed


def _worse(one: BridgeError | None, other: BridgeError) -> BridgeError:
    if one is None or Exit.worst([one.exit_code, other.exit_code]) != one.exit_code:
        return other
    return one
