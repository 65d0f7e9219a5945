"""
A node's own allow-list: the policy that `[policy] file` names, in the form of a CA desk's.

A renewal takes over the names of the live certificate, so that an attacker who once put a certificate with more names in
its place would have them renewed for ever. With a policy, such a certificate is not renewed, and no CA is asked for it.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from bridge.desk.files import load_policy
from bridge.desk.policy import Planned, Policy, planned_problems
from bridge.errors import BridgeError, Exit
from bridge.node.inventory import Item
from bridge.pki import csr
from bridge.renewal.prepare import next_key, present, replaced_by_next, serving_names
from bridge.renewal.select import Desired
from bridge.settings.tables import Settings


class NotAllowedError(BridgeError):
    """The node's own policy does not allow the next certificate; no CA was asked."""

    exit_code = Exit.REFUSED

    def __init__(self, item: Item, file: Path, problems: tuple[str, ...]) -> None:
        self.problems = problems
        key = f'"{item.spec.name}"' if "." in item.spec.name else item.spec.name
        hint = f"if it is meant, allow it in the policy ([allow] or [certificate.{key}])"
        if item.certificates:
            what = f"find out who put {item.certificate_path} there"
            hint = f"{what}, and put the right one back (an expired one will do); {hint}"
        super().__init__(
            f"this node's policy {file} does not allow the next certificate: {'; '.join(problems)}", hint=hint
        )


class Allowed:
    """The policy, read when the first certificate is judged."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @cached_property
    def policy(self) -> Policy:
        """The policy (SettingsError: the file can't be used)."""
        return load_policy(self._settings, self._settings.policy.file)

    def error(self, item: Item, desired: Desired | None) -> BridgeError | None:
        """The reason why the next certificate of this name must not be asked for; None: the policy allows it."""
        settings, live = self._settings, item.certificates[0] if item.certificates else None
        try:
            naming = desired.naming if desired is not None else serving_names(item, settings)
            planned = Planned(
                node=settings.node.node_name,
                cluster=settings.node.cluster,
                spec=item.spec,
                naming=naming or csr.naming_of(present(item, live)),
                key=next_key(item, live, settings, None, desired),
                validity=settings.renewal.validity,
                replaces=replaced_by_next(item, live),
            )
        except BridgeError as e:  # the renewal would fail for it, too
            return e
        problems = planned_problems(planned, self.policy)
        file = settings.policy.file
        return NotAllowedError(item, file, problems) if problems and file is not None else None
