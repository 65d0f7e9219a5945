"""A kubeconfig is read as kubeadm reads it, and an edit changes two values of it and no other byte."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import textwrap
import traceback
from collections.abc import Callable, Iterator
from unittest.mock import patch

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.node import yamltree
from bridge.node.kubeconfig import (
    Kubeconfig,
    KubeconfigError,
    ca_data,
    embedded_users,
    key_data,
    parse,
    with_ca,
    with_credentials,
    with_users,
)
from bridge.pki.budget import MOST_BYTES

LOADERS = [loader for loader in (getattr(yaml, "CSafeLoader", None), yaml.SafeLoader) if loader is not None]

CERTIFICATE = b"-----BEGIN CERTIFICATE-----\nb2xkIGNlcnRpZmljYXRl\n-----END CERTIFICATE-----\n"
KEY = b"-----BEGIN RSA PRIVATE KEY-----\nb2xkIGtleSB0aGF0IGlzIHNlY3JldA==\n-----END RSA PRIVATE KEY-----\n"
NEW_CERTIFICATE = CERTIFICATE.replace(b"b2xk", b"bmV3") * 2
NEW_KEY = b"-----BEGIN EC PRIVATE KEY-----\nbmV3IGtleQ==\n-----END EC PRIVATE KEY-----\n"


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


#: As kubeadm 1.37 writes it.
PLAIN = f"""\
apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: {b64(b"ca")}
    server: https://api.example.com:6443
  name: kubernetes
contexts:
- context:
    cluster: kubernetes
    user: kubernetes-admin
  name: kubernetes-admin@kubernetes
current-context: kubernetes-admin@kubernetes
kind: Config
users:
- name: kubernetes-admin
  user:
    client-certificate-data: {b64(CERTIFICATE)}
    client-key-data: {b64(KEY)}
"""


@pytest.fixture(params=LOADERS, ids=lambda loader: loader.__name__, autouse=True, scope="module")
def _parser(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both parsers of PyYAML: libyaml is not in every build."""
    with patch.object(yamltree, "_LOADER", request.param):
        yield


def edit(text: str) -> str:
    return with_credentials(text.encode(), NEW_CERTIFICATE, NEW_KEY).decode()


def replaced(text: str) -> str:
    return text.replace(b64(CERTIFICATE), b64(NEW_CERTIFICATE)).replace(b64(KEY), b64(NEW_KEY))


def test_reads_what_kubeadm_writes() -> None:
    """All that a renewal and a proof have to know is there, and no key."""
    assert parse(PLAIN.encode()) == Kubeconfig(
        user="kubernetes-admin",
        cluster="kubernetes",
        server="https://api.example.com:6443",
        tls_server_name=None,
        ca_data=b"ca",
        ca_file=None,
        certificate_data=CERTIFICATE,
        certificate_file=None,
        key_present=True,
        key_file=None,
    )
    assert key_data(PLAIN.encode()) == KEY


def test_reads_file_references() -> None:
    """A kubelet's kubeconfig after the first rotation refers to files, relative paths as they stand there."""
    text = PLAIN.replace(f"certificate-authority-data: {b64(b'ca')}", "certificate-authority: pki/ca.crt")
    text = text.replace(f"client-certificate-data: {b64(CERTIFICATE)}", "client-certificate: /var/lib/current.pem")
    text = text.replace(f"client-key-data: {b64(KEY)}", "client-key: /var/lib/current.pem")
    wanted = dataclasses.replace(
        parse(PLAIN.encode()),
        ca_data=None,
        ca_file="pki/ca.crt",
        certificate_data=None,
        certificate_file="/var/lib/current.pem",
        key_present=False,
        key_file="/var/lib/current.pem",
        not_editable="there is no embedded client-certificate-data and client-key-data to replace",
    )
    assert parse(text.encode()) == wanted
    assert key_data(text.encode()) is None


def test_the_current_context_counts() -> None:
    """The user that counts is the one of the current context, wherever it stands."""
    other = PLAIN.replace("current-context: kubernetes-admin@kubernetes", "current-context: second").replace(
        "contexts:\n", "contexts:\n- {name: second, context: {cluster: kubernetes, user: bob}}\n"
    )
    bob = f"- {{name: bob, user: {{client-key-data: {b64(KEY)}, client-certificate-data: {b64(CERTIFICATE)}}}}}\n"
    assert parse((other + bob).encode()).user == "bob"
    assert edit(other + bob) == other + replaced(bob)
    assert edit(PLAIN + bob) == replaced(PLAIN) + bob


def test_edits_what_kubeadm_writes() -> None:
    """The common case: two lines change."""
    assert edit(PLAIN) == replaced(PLAIN)


# What is read, and how it is refused.


def _without(line: str) -> str:
    (found,) = [one for one in PLAIN.splitlines(keepends=True) if line in one]
    return PLAIN.replace(found, "")


UNREADABLE: dict[str, str | bytes] = {
    "empty": "",
    "a comment only": "# nothing\n",
    "a text": "hello",
    "a list": "- 1\n",
    "not UTF-8": PLAIN.encode().replace(b"kind: Config", b"kind: \xff"),
    "UTF-16": PLAIN.encode("utf-16"),
    "a syntax error": PLAIN.replace("kind: Config", "kind: [Config"),
    "a tab for indentation": PLAIN.replace("    client-key-data", "\tclient-key-data"),
    "a control character": PLAIN.replace("kind: Config", "kind: Con\x01fig"),
    "two documents": PLAIN + "---\n" + PLAIN,
    "no current context": _without("current-context:"),
    "a current context that is not there": PLAIN.replace("current-context: k", "current-context: x"),
    "no contexts": PLAIN.replace("contexts:\n", "contexts: []\nother:\n"),
    "a context's cluster that is not there": PLAIN.replace("    cluster: kubernetes", "    cluster: other"),
    "a context's user that is not there": PLAIN.replace("    user: kubernetes-admin", "    user: other"),
    "two users of that name": PLAIN + "- name: kubernetes-admin\n  user: {token: abc}\n",
    "two contexts of that name": PLAIN.replace(
        "contexts:\n", "contexts:\n- {name: kubernetes-admin@kubernetes, context: {cluster: kubernetes, user: a}}\n"
    ),
    "a key twice": PLAIN + f"    client-key-data: {b64(KEY)}\n",
    "users twice": PLAIN + "users: []\n",
    "a merge key": PLAIN.replace("  user:\n    client", "  user:\n    <<: {token: abc}\n    client"),
    "not base64": PLAIN.replace(b64(CERTIFICATE), "LS0t*LS0t"),
    "base64 with spaces": PLAIN.replace(b64(CERTIFICATE), b64(CERTIFICATE).replace("L", "L ", 1)),
    "binary by a tag": PLAIN.replace(b64(CERTIFICATE), f"!!binary {b64(CERTIFICATE)}"),
    "a certificate that is a list": PLAIN.replace(b64(CERTIFICATE), "[a]"),
    "an alias of nothing": PLAIN.replace(b64(CERTIFICATE), "*nothing"),
    "too large": PLAIN + "#" * MOST_BYTES,
    "nested too deeply": PLAIN + "x: " + "[" * 70 + "]" * 70 + "\n",
    "nested without an end": PLAIN + "x: " + "[" * 100_000,
}


@pytest.mark.parametrize("text", UNREADABLE.values(), ids=UNREADABLE.keys())
def test_refuses_to_read(text: str | bytes) -> None:
    """A file that kubeadm could not use, or that we could not read the same way, is refused; the plain file is read."""
    assert parse(PLAIN.encode()).user == "kubernetes-admin"
    with pytest.raises(KubeconfigError):
        parse(text.encode() if isinstance(text, str) else text)


UNEDITABLE = {
    "no certificate data": _without("client-certificate-data"),
    "no key data": _without("client-key-data"),
    "empty certificate data": PLAIN.replace(b64(CERTIFICATE), '""'),
    "null key data": PLAIN.replace(b64(KEY), "~"),
    "an anchor at the key": PLAIN.replace(b64(KEY), f"&key {b64(KEY)}"),
    "an alias for the key": PLAIN.replace(b64(KEY), "*key").replace("kind: Config", f"x: &key {b64(KEY)}"),
    "an anchor at the user": PLAIN.replace("  user:\n    client", "  user: &user\n    client"),
    "an anchor at the entry": PLAIN.replace("- name: kubernetes-admin\n", "- &entry\n  name: kubernetes-admin\n"),
    "an anchor at the list": PLAIN.replace("users:\n", "users: &users\n"),
    "an anchor at all": "&all\n" + PLAIN,
    "an alias for the user": PLAIN.replace(
        f"  user:\n    client-certificate-data: {b64(CERTIFICATE)}\n    client-key-data: {b64(KEY)}\n",
        "  user: *user\n",
    ).replace("kind: Config", f"x: &user {{client-certificate-data: {b64(CERTIFICATE)}, client-key-data: {b64(KEY)}}}"),
    "a tag": PLAIN.replace(b64(KEY), f"!!str {b64(KEY)}"),
}


@pytest.mark.parametrize("text", UNEDITABLE.values(), ids=UNEDITABLE.keys())
def test_refuses_to_edit(text: str) -> None:
    """A file that can be read but not edited in one place alone is refused; the plain file is edited."""
    assert parse(text.encode()).user == "kubernetes-admin"
    assert parse(text.encode()).not_editable is not None
    assert parse(PLAIN.encode()).not_editable is None
    assert edit(PLAIN) == replaced(PLAIN)
    with pytest.raises(KubeconfigError):
        edit(text)


def test_anchors_elsewhere_are_no_hindrance() -> None:
    """An anchor and its aliases beside the path to the two values stay what they are."""
    text = PLAIN.replace("server: https", "server: &server https") + "x: [*server, &a {b: c}, *a]\n"
    assert edit(text) == replaced(text)


@pytest.mark.parametrize("reference", ["[{0}]", "{{<<: [{0}]}}"], ids=["aliases", "merge keys"])
def test_nothing_expands(reference: str) -> None:
    """A document whose aliases stand for 10^12 values is read and edited as quickly as any other."""
    levels = ["x0: &x0 {a: b}"]
    levels += [f"x{n}: &x{n} " + reference.format(", ".join([f"*x{n - 1}"] * 10)) for n in range(1, 13)]
    text = "\n".join(levels) + "\n" + PLAIN
    assert edit(text) == replaced(text)


def test_no_error_shows_the_key() -> None:
    """Neither an error's text nor the errors that led to it quote the file."""
    texts = [*UNREADABLE.values(), *UNEDITABLE.values(), PLAIN.replace(b64(KEY), f'"{b64(KEY)}')]
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        with pytest.raises(KubeconfigError) as e:
            with_credentials(data, NEW_CERTIFICATE, NEW_KEY)
        shown = "".join(traceback.format_exception(e.value)) + repr(e.value.__context__) + repr(e.value.__cause__)
        assert not [part for part in textwrap.wrap(b64(KEY), 12) if part in shown]


# Any shape that is accepted: the edit is compared byte by byte with what it has to be.

Wrap = Callable[[str], str]
Style = tuple[str, Wrap, str]  # before the value, how its old content is laid out, after it


def _lines(width: int, join: str) -> Wrap:
    return lambda text: join.join(textwrap.wrap(text, width))


def _same(text: str) -> str:
    return text


COMMENTS = st.sampled_from(["", " # ü comment", "  #client-key-data: abc"])
WIDTHS = st.integers(20, 90)


@st.composite
def block_styles(draw: st.DrawFn) -> Style:
    """A value in block context, in a mapping that is indented by four spaces; it ends with its line."""
    comment = draw(COMMENTS)
    indent = "\n" + " " * draw(st.integers(5, 8))
    blanks = "\n" * draw(st.integers(0, 2))
    chomping = draw(st.sampled_from(["", "-", "+"]))
    styles: list[Style] = [
        ("", _same, comment + "\n"),
        (indent, _same, comment + "\n"),
        (indent, _lines(draw(WIDTHS), "\n" + indent), comment + "\n"),
        ("'", _same, "'" + comment + "\n"),
        ('"', _same, '"' + comment + "\n"),
        ('"', _lines(draw(WIDTHS), "\\" + indent), '"' + comment + "\n"),
        ("|" + chomping + comment + blanks + indent, _lines(draw(WIDTHS), indent), "\n" + blanks),
        (">" + chomping + comment + blanks + indent, _same, "\n" + blanks),
        (">" + chomping + comment + indent, _lines(draw(WIDTHS), "\n" + indent), "\n" + blanks),
    ]
    return draw(st.sampled_from(styles))


NAMES = st.sampled_from(["admin", "ädmin@kubernetes", '"quoted: #name"', "'it''s'", "system:node:cp-1", "\U0001f511"])


@st.composite
def block_kubeconfigs(draw: st.DrawFn) -> tuple[str, str]:
    """A kubeconfig in block style, and what it has to be after the edit."""
    name = draw(NAMES)
    entries = [
        ("client-certificate-data", CERTIFICATE, NEW_CERTIFICATE),
        ("client-key-data", KEY, NEW_KEY),
    ]
    before = after = ""
    for key, old, new in draw(st.permutations(entries)):
        start, wrap, end = draw(block_styles())
        extra = draw(st.sampled_from(["", "    # between\n", "    token: abc\n"])) if not before else ""
        before += f"    {key}: {start}{wrap(b64(old))}{end}{extra}"
        after += f"    {key}: {start}{b64(new)}{end}{extra}"
    bystander = f"- {{name: other, user: {{client-key-data: {b64(KEY)}, x: &x [1]}}}}\n"
    around = draw(st.sampled_from([("", ""), (bystander, ""), ("", bystander), ("# c\n", "- name: 1\n  user: {}\n")]))
    sections = draw(
        st.permutations(
            [
                "apiVersion: v1\nkind: Config\npreferences: {}\n",
                f"clusters:\n  - name: k\n    cluster: {{server: 'https://x', certificate-authority-data: {b64(b'ca')}}}\n",
                f"contexts:\n- name: c # ü\n  context: {{user: {name}, cluster: k}}\n",
                "current-context: c\n",
                "users:\n" + around[0] + f"- name: {name}\n  user:\n\0" + around[1],
            ]
        )
    )
    text = draw(st.sampled_from(["", "---\n", "# first\n---\n"])) + "".join(sections)
    text += draw(st.sampled_from(["", "...\n", "# last", "\n\n"]))
    return _dressed(draw, text.replace("\0", before), text.replace("\0", after))


def _dressed(draw: st.DrawFn, *texts: str) -> tuple[str, str]:
    """The same line breaks, byte order mark and end for both."""
    crlf, bom = draw(st.booleans()), draw(st.booleans())
    stripped = draw(st.booleans())
    before, after = (
        ("\ufeff" if bom else "")
        + (text.removesuffix("\n") if stripped else text).replace("\n", "\r\n" if crlf else "\n")
        for text in texts
    )
    return before, after


@st.composite
def flow_kubeconfigs(draw: st.DrawFn) -> tuple[str, str]:
    """A kubeconfig in JSON, with any spacing, and what it has to be after the edit."""
    user = {"client-certificate-data": "@certificate@", "client-key-data": "@key@", "ü": draw(st.text(max_size=5))}
    value = {
        "users": [
            {"name": "a", "user": {"client-key-data": b64(KEY)}},
            {"user": dict(draw(st.permutations(list(user.items())))), "name": "u"},
        ],
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
        "clusters": [{"name": "k", "cluster": {"server": "https://x"}}],
        "current-context": "c",
    }
    value = dict(draw(st.permutations(list(value.items()))))
    text = json.dumps(value, indent=draw(st.sampled_from([None, 0, 1, 4])), ensure_ascii=draw(st.booleans()))
    if draw(st.booleans()):
        text = text.replace('"@certificate@"', "@certificate@").replace('"@key@"', "'@key@'")
    return _dressed(
        draw,
        text.replace("@certificate@", b64(CERTIFICATE)).replace("@key@", b64(KEY)),
        text.replace("@certificate@", b64(NEW_CERTIFICATE)).replace("@key@", b64(NEW_KEY)),
    )


@settings(deadline=None)
@given(st.one_of(block_kubeconfigs(), flow_kubeconfigs()))
def test_only_the_two_values_change(case: tuple[str, str]) -> None:
    """In a kubeconfig of any style all bytes but those of the two values stay."""
    before, after = case
    try:
        parsed = parse(before.encode())
    except KubeconfigError:
        # A plain or folded value over several lines has spaces in it, which Go's base64 refuses as well; and JSON can
        # escape characters that YAML has no place for.
        return
    assert parsed.certificate_data == CERTIFICATE
    assert edit(before) == after
    assert parse(after.encode()) == dataclasses.replace(parsed, certificate_data=NEW_CERTIFICATE)
    assert key_data(after.encode()) == NEW_KEY


YAML_PIECES = st.sampled_from(
    [
        *"\n -?:,[]{}#&*!|>'\"%@~<\t\\\r",
        "  ",
        "\r\n",
        "<<: ",
        "- ",
        "&a ",
        "*a",
        "!!str ",
        "---\n",
        "...\n",
        "ü",
        "\x85",
    ]
)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(PLAIN)), st.integers(0, 3), YAML_PIECES), max_size=4))
def test_a_damaged_kubeconfig_is_edited_rightly_or_refused(damages: list[tuple[int, int, str]]) -> None:
    """In any damaged kubeconfig two values change and the rest says the same, or it is refused."""
    text = PLAIN
    for place, length, piece in damages:
        text = text[:place] + piece + text[place + length :]
    try:
        edited = edit(text)
    except KubeconfigError:
        return
    parsed = parse(text.encode())
    assert parse(edited.encode()) == dataclasses.replace(parsed, certificate_data=NEW_CERTIFICATE)
    assert _others(edited) == _others(text)


def _others(text: str) -> list[str]:
    """The scalars of a document without those that follow the two keys."""
    scalars = [
        event.value for event in yaml.parse(text, Loader=yamltree._LOADER) if isinstance(event, yaml.ScalarEvent)
    ]
    keys = ("client-certificate-data", "client-key-data")
    return [scalar for before, scalar in itertools.pairwise(["", *scalars]) if before not in keys]


TWO_USERS = PLAIN + PLAIN.partition("users:\n")[2].replace("name: ", "name: second-", 1)


@given(st.lists(st.tuples(st.integers(0, len(TWO_USERS)), st.integers(0, 3), YAML_PIECES), max_size=4))
def test_users_of_a_damaged_kubeconfig_are_edited_rightly_or_refused(damages: list[tuple[int, int, str]]) -> None:
    """In a damaged file with several users the named ones change and the others stay, or it is refused."""
    text = TWO_USERS
    for place, length, piece in damages:
        text = text[:place] + piece + text[place + length :]
    try:
        users = embedded_users(text.encode())
        last = users[-1:]
        edited = with_users(text.encode(), {one.number: (NEW_CERTIFICATE, NEW_KEY) for one in last})
    except KubeconfigError:
        return
    changed = [dataclasses.replace(one, certificate_pem=NEW_CERTIFICATE, key_pem=NEW_KEY) for one in last]
    assert embedded_users(edited) == [*users[:-1], *changed]
    assert _others(edited.decode()) == _others(text)
    assert with_users(text.encode(), {}) == text.encode()


def test_both_users_are_found() -> None:
    """Both users are found, whichever the current context names."""
    assert [one.name for one in embedded_users(TWO_USERS.encode())] == ["kubernetes-admin", "second-kubernetes-admin"]


# --- CA data ---------------------------------------------------------------------------------------------------------

#: As kubeadm writes cluster-info.
CLUSTER_INFO = f"""\
apiVersion: v1
clusters:
- cluster:
    certificate-authority-data: {b64(b"ca")}
    server: https://api.example.com:6443
  name: ""
contexts: null
current-context: ""
kind: Config
users: null
"""


@pytest.mark.parametrize("text", [PLAIN, CLUSTER_INFO, PLAIN.replace("\n", "\r\n"), "\ufeff" + PLAIN])
def test_the_ca_data_alone_is_another_one(text: str) -> None:
    """Only the CA data of the current context's cluster changes, or of the only one in kubeadm's cluster-info."""
    edited = with_ca(text.encode(), NEW_CERTIFICATE).decode()
    assert edited == text.replace(b64(b"ca"), b64(NEW_CERTIFICATE))
    assert ca_data(edited.encode()) == NEW_CERTIFICATE
    assert ca_data(text.encode()) == b"ca"


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("certificate-authority-data: ", "certificate-authority-data: &a ", "a value of its own"),
        (f"certificate-authority-data: {b64(b'ca')}", "certificate-authority: /etc/kubernetes/pki/ca.crt", "embedded"),
        ("current-context: kubernetes-admin@kubernetes", "current-context: another", "one entry named 'another'"),
    ],
)
def test_ca_data_that_can_not_be_edited_is_left(old: str, new: str, wanted: str) -> None:
    """A value that others share, a file, a context that is not there."""
    assert old in PLAIN
    with pytest.raises(KubeconfigError, match=wanted):
        with_ca(PLAIN.replace(old, new).encode(), NEW_CERTIFICATE)


def test_two_clusters_without_a_context_are_not_guessed_at() -> None:
    """A kubeconfig with two clusters and no current context is refused."""
    entry = CLUSTER_INFO[CLUSTER_INFO.index("- cluster") : CLUSTER_INFO.index("contexts")]
    with pytest.raises(KubeconfigError, match="one entry in clusters, found 2 entries"):
        with_ca(CLUSTER_INFO.replace(entry, entry * 2).encode(), NEW_CERTIFICATE)
