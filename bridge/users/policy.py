"""Who may have a certificate, in which groups and for how long, by the settings (pure)."""

from __future__ import annotations

from datetime import timedelta

from bridge.errors import BridgeError, Exit
from bridge.settings.tables import UserSettings
from bridge.users import user_rules
from bridge.users.user_rules import Limits, User


class UserNotAllowedError(BridgeError):
    """The settings do not allow such a user; nobody was asked."""

    exit_code = Exit.REFUSED
    hint = "[users] in the settings says what may be signed"


def assert_allowed(user: User, validity: timedelta, rules: UserSettings) -> None:
    """
    Raises:
        UserNotAllowedError: With all that speaks against it.
    """
    limits = Limits(groups=rules.groups, allow=rules.allow, max_validity=rules.max_validity)
    if found := user_rules.problems(user, validity, limits):
        raise UserNotAllowedError("; ".join(found))
