"""What is done before, around and after the installation of answers, wherever they came from: `renew` and `import`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from bridge.errors import BridgeError
from bridge.node.inventory import Node
from bridge.renewal.around import Around
from bridge.renewal.hooks import Occasion
from bridge.renewal.selection import Selection
from bridge.renewal.verify_and_install import Result
from bridge.state.outcome import Outcome
from bridge.state.session import Run
from bridge.system.console import print_error


class Walk:
    """Of one run: hooks, restart, proof, the way back, and the count of runs that failed."""

    def __init__(self, run: Run, *, restarts: bool = True) -> None:
        self._run = run
        self._restarts = restarts
        #: False after `earlier`: what earlier runs owe was stopped in the middle, and nothing more is to be installed.
        self.may_go_on = True
        self._errors: list[BridgeError] = []
        self._items: Selection = Selection(items=(), failed=(), skipped=())
        self.around = Around(run.settings, run.store, run.record, run.now)

    def earlier(self, node: Node) -> Node:
        """First in a run: the hooks and the proof that earlier ones owe; the node as it is after that."""
        self._errors += self.around.again(node)
        if not self._is_owed:
            return node
        from bridge.renewal import activation  # noqa: PLC0415 (40 ms; only where components are restarted)

        settled = activation.settle(self._run, node)
        self.may_go_on = settled.may_go_on
        self._errors += [*settled.errors, *self.around.settled(settled.about)]
        return self._run.read_node()

    @property
    def _is_owed(self) -> bool:
        """Whether something is to be restarted and proven, by this run."""
        return self._restarts and self._run.store.unproven.exists()

    def with_earlier(self, result: Result) -> Result:
        """The result with what was wrong with earlier runs."""
        return dataclasses.replace(result, errors=(*self._errors, *result.errors))

    def without_work(self, selection: Selection) -> Result:
        """For a run that can do nothing, or has nothing to do."""
        result = Result(outcomes=selection.failed)
        errors = self.around.after(selection, result) if selection.failed else []
        return self.with_earlier(dataclasses.replace(result, errors=tuple(errors)))

    def whole(self, selection: Selection, work: Callable[[], Result]) -> Result:
        """
        Everything about these certificates.

        Args:
            selection: What they are.
            work: Asks, proves and installs, and calls `before` right before the installation.

        Raises:
            BridgeError: Nothing was replaced.
        """
        self._items = selection
        try:
            self.around.before(selection)
            result = work()
        except BridgeError as e:
            for error in self.around.after(selection, Result(outcomes=selection.failed), [e]):
                print_error(error)
            raise
        if result.backup_id is not None:
            result = self._installed(result)
        more = self.around.after(selection, result, result.errors)
        return self.with_earlier(dataclasses.replace(result, errors=(*result.errors, *more)))

    def before(self, outcomes: Sequence[Outcome]) -> None:
        """
        Right before the installation of these: what is owed after it is on disk.

        Raises:
            BridgeError: It is not; nothing must be installed.
        """
        self.around.hooks.installing(Occasion.of(self._items.items, outcomes))
        if self._restarts and self._run.settings.restart.method != "none":
            from bridge.renewal import activation  # noqa: PLC0415 (see above)

            activation.owe(self._run, outcomes)

    def _installed(self, result: Result) -> Result:
        occasion = Occasion.of(self._items.items, result.outcomes, backup_id=result.backup_id)
        result = dataclasses.replace(result, errors=(*result.errors, *self.around.hooks.installed(occasion)))
        if not self._is_owed:
            return result
        from bridge.renewal import activation  # noqa: PLC0415 (see above)

        settled = activation.settle(self._run, self._run.read_node())
        if not self._is_owed:  # else the hooks of earlier installations were told already
            others = {run_id: one for run_id, one in settled.about.items() if run_id != self._run.record.run_id}
            self._errors += self.around.settled(others)
        outcomes = result.outcomes
        errors = settled.errors
        if settled.rolled_back is not None:
            back = settled.rolled_back
            outcomes = tuple(dataclasses.replace(o, new=None, error=back) if o.new else o for o in outcomes)
            errors = tuple(error for error in errors if error is not back)
        return dataclasses.replace(
            result,
            outcomes=outcomes,
            errors=(*result.errors, *errors),
            restarted=tuple(
                f"{one.component.value} in {one.seconds:.1f} s" for one in settled.restarted if one.seconds
            ),
            proven=settled.proven,
        )
