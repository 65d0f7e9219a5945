"""certmonger's contract with a helper: the environment that it finds, and what it prints (pure: bytes in)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from cryptography import x509

from bridge.pki.budget import of_server
from bridge.pki.certificates import certificates_in
from bridge.specs import CertificateSpec
from bridge.words import one_line

#: What a program finds around it, beside HOME and what the settings name; nothing of our own environment.
ENVIRONMENT: Mapping[str, str] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "SHELL": "/bin/sh",
    "TERM": "dumb",
    "LC_ALL": "C.UTF-8",
}


def ekus_text(spec: CertificateSpec) -> str:
    """RFC 5280's names with commas, as openssl takes them: `serverAuth,clientAuth`."""
    return ",".join(sorted((eku.label for eku in spec.ekus), reverse=True))


_LONGEST_TEXT = 300  # characters; certmonger itself keeps the first line of a refusal
_SECONDS = re.compile(r"[0-9]{1,9}")


def certificates(output: bytes) -> list[x509.Certificate]:
    """All certificates of an answer: PEM, DER, PKCS#7 or certmonger's JSON (its doc/helpers.txt, "SUBMIT"); in its order."""
    if not output.strip():
        raise ValueError("nothing")
    if output.lstrip().startswith(b"{"):
        return [found for text in _texts(output) for found in certificates_in(text.encode())]
    return certificates_in(output)


def _texts(output: bytes) -> list[str]:
    try:
        document = of_server(output)
        texts = list(_members(document))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError('JSON without {"certificate": …, "chain": [{"certificate": …}]}') from None
    if not all(isinstance(text, str) and text.isascii() for text in texts):
        raise ValueError("JSON with a certificate that is no text")
    return texts


def _members(document: Any) -> Iterator[Any]:
    yield document["certificate"]
    for key in ("chain", "roots"):
        yield from (one["certificate"] for one in document.get(key) or ())


def cookie(output: bytes) -> str:
    """The cookie of a request that waits: opaque, one line without its end, or several without the blank ones."""
    try:
        text = output.decode()
    except UnicodeDecodeError:
        raise ValueError("bytes that are no UTF-8") from None
    if "\0" in text:
        raise ValueError("a NUL character")
    return "\n".join(line for line in text.split("\n") if line.strip())


def delayed_cookie(output: bytes) -> tuple[int, str]:
    """Seconds to wait, and the cookie on the lines after them."""
    first, _, rest = output.partition(b"\n")
    seconds = first.decode("ascii", "replace").strip()
    if not _SECONDS.fullmatch(seconds):
        raise ValueError(f'"{text(first)}" in the place of the seconds' if seconds else "no line with the seconds")
    found = cookie(rest)
    if not found:
        raise ValueError("no cookie after the seconds")
    return int(seconds), found


def text(data: bytes, *, keep_end: bool = False) -> str:
    """Text for the operator: on one line, cut, and without what steers a terminal."""
    text = data.decode("utf-8", "replace")
    return one_line(text[::-1], _LONGEST_TEXT)[::-1] if keep_end else one_line(text, _LONGEST_TEXT)


def names(data: bytes) -> list[str]:
    """Names that a helper lists: separated by commas or line ends, blank ones left out."""
    return [name for part in re.split(r"[,\n]", data.decode("utf-8", "replace")) if (name := part.strip())]
