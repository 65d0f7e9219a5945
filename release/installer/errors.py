"""What ends an installation."""

from __future__ import annotations


class InstallError(Exception):
    """Nothing more is done. The text says what was wanted and what was found, the hint what to do next."""

    def __init__(self, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.hint = hint
