"""Errors between us and the cluster's API."""

from __future__ import annotations

import ssl
from typing import ClassVar

from bridge.errors import BridgeError, Exit


class NoAnswerError(BridgeError):
    """No API server had an answer that is about the request; the text says why, server by server."""

    exit_code: ClassVar[int] = Exit.UNAVAILABLE
    hint = "is the API server up, and is it the one that the kubeconfig names?"

    def __init__(self, message: str, *, hint: str | None = None, is_unknown: bool = False) -> None:
        self.is_unknown = is_unknown  #: A server does not know who we are (HTTP 401).
        super().__init__(message, hint=hint)


def why(error: Exception) -> str:
    """The operating system's or OpenSSL's reason, in few words."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not trusted: {error.verify_message}"
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return type(error).__name__
