"""Bundles: what is carried says the same on both sides, or is refused by the name of what was changed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
import typing
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from bridge.contract import Issued
from bridge.node import sample_pki
from bridge.pki import bundle as bundles
from bridge.pki import bundle_format, signatures
from bridge.pki.budget import MOST_BYTES
from bridge.pki.bundle import (
    AnswerBundle,
    Bundle,
    BundledRequest,
    BundleError,
    IncompleteBundleError,
    Refusal,
    RequestBundle,
    sign_request,
)
from bridge.pki.bundle_format import (
    describe,
    digest,
    dumps,
    loads,
    loads_answer,
    loads_request,
    short_fingerprint,
)
from bridge.pki.csr import PrivateKey, fingerprint_text, generate_key, key_pem, signature_hash
from bridge.pki.signatures import origin_problem, proof_problem, sign_proof, usages_problem
from bridge.specs import AUTHORITIES, EKU
from tests.kit.bundles import changed, make_bundle, new_csr, old_pairs
from tests.kit.pki import Pki, handmade_pki

NOW = datetime.now(UTC)
NAMES = ("apiserver", "etcd-server", "scheduler.conf")

Pairs = dict[str, tuple[x509.Certificate, PrivateKey]]


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return handmade_pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def pairs(pki: Pki) -> Pairs:
    return old_pairs(pki, NAMES)


@pytest.fixture(scope="module")
def request_bundle(pairs: Pairs) -> RequestBundle:
    return make_bundle(pairs)


@pytest.fixture(scope="module")
def answer_bundle(request_bundle: RequestBundle, pairs: Pairs) -> AnswerBundle:
    """Old certificates in the place of new ones: what they say is not a bundle's business."""
    first, second, third = (pairs[name][0] for name in NAMES)
    return AnswerBundle(
        request_digest=digest(request_bundle),
        batch=request_bundle.batch,
        node=request_bundle.node,
        cluster=request_bundle.cluster,
        signer="desk (openssl)",
        signed=request_bundle.created,
        answers={
            "apiserver": Issued(leaf=first),
            "etcd-server": Refusal(reason="not today"),
            "scheduler.conf": Issued(leaf=third, intermediates=(second,)),
        },
    )


@pytest.fixture(params=["request", "answer"])
def either(request: pytest.FixtureRequest) -> Bundle:
    found: Bundle = request.getfixturevalue(f"{request.param}_bundle")
    return found


def error_of(data: bytes) -> BundleError:
    with pytest.raises(BundleError) as e:
        loads(data)
    return e.value


def document(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(dumps(bundle))
    return found


def encoded(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()


def with_new_digest(value: dict[str, Any]) -> bytes:
    """Make a valid digest, as an attacker can who knows the format."""
    return encoded({**value, "digest": bundle_format._digest({k: v for k, v in value.items() if k != "digest"})})


# --- there and back ---------------------------------------------------------------------------------------------------


def test_a_bundle_says_the_same_on_the_other_side(either: Bundle) -> None:
    """Nothing is lost, and the same bundle gives the same bytes."""
    data = dumps(either)

    assert loads(data) == either
    assert dumps(loads(data)) == data


def test_each_kind_is_read_as_itself_only(request_bundle: RequestBundle, answer_bundle: AnswerBundle) -> None:
    """A request that is taken for an answer, or the other way round, is named."""
    assert loads_request(dumps(request_bundle)) == request_bundle
    assert loads_answer(dumps(answer_bundle)) == answer_bundle
    with pytest.raises(BundleError, match="schema") as e:
        loads_request(dumps(answer_bundle))
    assert e.value.hint == "this is the answer, which goes back to the node"
    with pytest.raises(BundleError, match="schema") as e:
        loads_answer(dumps(request_bundle))
    assert e.value.hint == "this is the request, which goes to the CA desk"
    with pytest.raises(
        BundleError, match=r"^schema: wanted ca-bridge/request-bundle, found 'ca-bridge/answer-bundle'$"
    ):
        bundle_format.loads_digested(dumps(answer_bundle))


def test_a_desk_signs_a_text_that_is_nothing_else(answer_bundle: AnswerBundle) -> None:
    """Desks and nodes of different versions agree on it byte by byte."""
    wanted = b"ca-bridge answer bundle 1\n" + digest(answer_bundle).encode()
    assert bundle_format.answer_message(answer_bundle) == wanted


def test_line_breaks_of_another_system_do_no_harm(either: Bundle) -> None:
    """White space between the values may change on the way."""
    assert loads(dumps(either).replace(b"\n", b"\r\n")) == either


def test_a_request_reaches_the_backend_with_our_table(request_bundle: RequestBundle) -> None:
    """EKUs are not the bundle's to choose, and who asks goes with the request."""
    lying = changed(request_bundle, "apiserver", ekus=frozenset(EKU))

    request = sign_request(lying.requests[NAMES.index("apiserver")], lying)

    assert request.spec.ekus == {EKU.SERVER_AUTH}
    assert request.continuity is not None
    assert request.continuity.batch == lying.batch
    assert x509.load_pem_x509_csr(request.csr_pem) == request.csr
    assert request.csr is lying.requests[NAMES.index("apiserver")].csr


def test_sign_requests_make_a_bundle(request_bundle: RequestBundle) -> None:
    """The way from the contract's requests to a bundle and back loses nothing."""
    requests = [sign_request(one, request_bundle) for one in request_bundle.requests]

    assert bundles.bundle_of(requests) == request_bundle


def test_requests_of_two_batches_are_no_bundle(request_bundle: RequestBundle, pairs: Pairs) -> None:
    """One bundle is one batch's."""
    other = make_bundle(pairs)
    requests = [sign_request(one, bundle) for bundle in (request_bundle, other) for one in bundle.requests]

    with pytest.raises(ValueError, match="one batch"):
        bundles.bundle_of(requests)


@pytest.mark.parametrize(
    "values",
    [{"node": "a\nb"}, {"node": "../x"}, {"cluster": "\x1b[2J"}, {"cluster": ""}, {"batch": "12"}, {"requests": ()}],
)
def test_a_request_that_the_desk_would_not_read_is_not_written(
    request_bundle: RequestBundle, values: dict[str, Any]
) -> None:
    """A node with an odd name learns it at home, not at the desk."""
    with pytest.raises(BundleError) as e:
        dumps(replace(request_bundle, **values))
    assert e.value.field == next(iter(values))


@pytest.mark.parametrize(
    "values",
    [{"name": "X"}, {"authority": "x"}, {"ekus": frozenset()}, {"validity": timedelta()}, {"name": "etcd-server"}],
)
def test_the_same_for_each_request(request_bundle: RequestBundle, values: dict[str, Any]) -> None:
    """Unknown names, or one twice, and unknown usages and durations are refused in each request."""
    with pytest.raises(BundleError):
        dumps(changed(request_bundle, "apiserver", **values))


@pytest.mark.parametrize(
    "values",
    [
        {"signer": "a\rb"},
        {"request_digest": "12"},
        {"answers": {}},
        {"answers": {"apiserver": Refusal(reason="a\x07b")}},
        {"answers": {"X": Refusal(reason="a")}},
    ],
)
def test_an_answer_that_the_node_would_not_read_is_not_written(
    answer_bundle: AnswerBundle, values: dict[str, Any]
) -> None:
    """The desk's own texts, too."""
    with pytest.raises(BundleError):
        dumps(replace(answer_bundle, **values))


# --- no key -----------------------------------------------------------------------------------------------------------


def types_within(kind: Any) -> set[Any]:
    """All types that a value of this type is made of."""
    found = {kind}
    if dataclasses.is_dataclass(kind):
        for hint in typing.get_type_hints(kind).values():
            found |= types_within(hint)
    for argument in typing.get_args(kind):
        found |= types_within(argument)
    return found


@pytest.mark.parametrize("kind", [RequestBundle, AnswerBundle])
def test_no_type_of_a_bundle_can_hold_a_key(kind: type) -> None:
    """CSRs and certificates are there as such; the only bytes are a signature's."""
    bytes_fields = {field.name for field in dataclasses.fields(BundledRequest) if "bytes" in str(field.type)}

    leaves = {one for one in types_within(kind) if isinstance(one, type) and not dataclasses.is_dataclass(one)}
    assert leaves <= {
        str, int, bytes, datetime, timedelta, tuple, frozenset, type(None), EKU,
        x509.Certificate, x509.CertificateSigningRequest,
    }  # fmt: skip
    assert bytes_fields == {"proof"}


def test_a_bundle_is_searched_for_keys(request_bundle: RequestBundle, pairs: Pairs, pki: Pki) -> None:
    """No encoding of any private key of the node is in what it sends."""
    data = dumps(request_bundle)

    assert b"PRIVATE KEY" not in data
    for _, key in pairs.values():
        for encoding in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL):
            text = b"".join(key.private_bytes(Encoding.PEM, encoding, NoEncryption()).splitlines()[1:-1])
            assert text[:40] not in data.replace(b"\\n", b"")
    for path in pki.kubeconfig_dir.rglob("*.key"):
        assert path.read_bytes().splitlines()[1] not in data


@pytest.mark.parametrize("place", ["csr", "replaces"])
@pytest.mark.parametrize("before", [True, False])
def test_a_key_beside_the_pem_is_refused(request_bundle: RequestBundle, pairs: Pairs, place: str, before: bool) -> None:
    """A file that `cat` made of certificate and key is refused, digest or not."""
    value = document(request_bundle)
    key = key_pem(pairs["apiserver"][1]).decode()
    one = value["requests"][0]
    one[place] = key + one[place] if before else one[place] + key

    error = error_of(with_new_digest(value))

    assert error.field == f"requests[0].{place}"
    assert key.splitlines()[1] not in str(error)


# --- tampering --------------------------------------------------------------------------------------------------------

#: Another value of the same kind for each field that has one.
OTHER: Mapping[str, Callable[[Any], Any]] = {
    "batch": lambda _: "0" * 32,
    "node": lambda _: "cp-9",
    "cluster": lambda _: "other",
    "created": lambda _: "2020-01-01T00:00:00Z",
    "signed": lambda _: "2020-01-01T00:00:00Z",
    "signer": lambda _: "another desk",
    "requestDigest": lambda _: "0" * 64,
    "digest": lambda _: "0" * 64,
    "name": lambda _: "admin.conf",
    "authority": lambda _: "front-proxy-ca",
    "ekus": lambda found: ["serverAuth"] if found == ["clientAuth"] else ["clientAuth"],
    "validitySeconds": lambda found: found + 1,
    "proof": lambda _: "AAAA",
    "replaces": lambda _: None,
    "refusal": lambda found: f"{found}!",
    "chain": lambda found: [found[0], found[0]],
    "requests": lambda found: found[:-1],
    "answers": lambda found: found[:-1],
}


def paths(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of every field, at any depth."""
    if isinstance(value, dict):
        return [deeper for key, one in value.items() for deeper in [(*path, key), *paths(one, (*path, key))]]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [deeper for number, one in enumerate(value) for deeper in paths(one, (*path, number))]
    return []


def with_value(value: dict[str, Any], path: tuple[str | int, ...], other: Callable[[Any], Any]) -> dict[str, Any]:
    made = deepcopy(value)
    place: Any = made
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = other(place[path[-1]])
    return made


def field_name(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def test_each_field_that_is_changed_is_noticed(either: Bundle) -> None:
    """The digest does not fit any field that was changed to another good value."""
    value = document(either)
    swap_csr = {"csr": lambda _: new_csr(_leaf(either)).public_bytes(Encoding.PEM).decode()}
    tried = set()
    for path in paths(value):
        name = str(path[-1])
        if name in {"schema", "version"}:
            continue
        error = error_of(encoded(with_value(value, path, {**OTHER, **swap_csr}[name])))
        # a name that is there twice is named as that
        assert error.field in {"digest", field_name(path)}, path
        tried.add(name)
    assert tried >= {"batch", "node", "cluster", "digest", "name"}
    assert len(tried) == (13 if isinstance(either, RequestBundle) else 11)


def _leaf(bundle: Bundle) -> x509.Certificate:
    assert isinstance(bundle, RequestBundle)
    leaf = bundle.requests[0].replaces
    assert leaf is not None
    return leaf


_OR_A_PAIR = ", or the name of a node's further pair"


@pytest.mark.parametrize("other", [None, True, 1, 1.5, -1, "", " ", "\x1b[31m", "x\ny", [], {}, [1], "\ud800", 10**30])
def test_each_field_of_another_kind_is_named(either: Bundle, other: Any) -> None:
    """With a digest that fits: wrong types, empty and steering texts are refused by the name of their field."""
    value = document(either)
    for path in paths(value):
        name = str(path[-1])
        if (
            name == "digest"
            or (name in {"proof", "replaces"} and other is None)
            or ((name, other) == ("version", 1) and isinstance(either, AnswerBundle))
        ):
            continue
        if name == "validitySeconds" and other == 1 and type(other) is int:
            continue
        error = error_of(with_new_digest(with_value(value, path, lambda _: other)))

        assert error.field.startswith(field_name(path)), path
        assert str(error).isprintable()


def test_missing_unknown_and_double_keys_are_named(either: Bundle) -> None:
    """Missing, unknown and double keys are named in every object of the bundle."""
    value = document(either)
    for path in paths(value):
        name, data = field_name(path), deepcopy(value)
        place: Any = data
        for part in path[:-1]:
            place = place[part]
        kept = place.pop(path[-1])
        # without its refusal an answer is one that lacks a chain
        missing = name.replace("refusal", "chain")
        assert error_of(encoded(data) if name == "digest" else with_new_digest(data)).field == missing
        place[path[-1]] = kept
        place["extra"] = 1
        assert error_of(with_new_digest(data)).field.endswith("extra")
        del place["extra"]
    twice = dumps(either).replace(b'{\n "schema"', b'{\n "schema": "x",\n "schema"', 1)
    error = error_of(twice)
    assert error.found == "it twice"
    assert "schema" in error.field


WRONG: tuple[tuple[str, str, object, str], ...] = (
    ("request", "version", 3, "version: wanted 2, found 3"),
    ("request", "batch", "12", "batch: wanted 32 hex digits, found '12'"),
    ("request", "node", "a b", "node: wanted a node's name (letters, digits, '.', '_' and '-'), found 'a b'"),
    ("request", "cluster", "x" * 254, "cluster: wanted at most 253 characters, found 254"),
    (
        "request",
        "created",
        "2026-02-31T00:00:00Z",
        "created: wanted a time that there is, found '2026-02-31T00:00:00Z'",
    ),
    ("request", "created", "2026-01-31", "created: wanted a time such as 2026-01-31T12:00:00Z, found '2026-01-31'"),
    (
        "request",
        "created",
        "0999-01-31T00:00:00Z",
        "created: wanted a time after the year 1000, found '0999-01-31T00:00:00Z'",
    ),
    ("request", "requests", [], "requests: wanted a list, not empty, found []"),
    ("request", "digest", "12", "digest: wanted 64 hex digits, found '12'"),
    ("request", "requests.0", 1, "requests[0]: wanted an object, found 1"),
    (
        "request",
        "requests.0.name",
        "X",
        f"requests[0].name: wanted one of {', '.join(bundles.CARRIED)}{_OR_A_PAIR}, found 'X'",
    ),
    (
        "request",
        "requests.0.authority",
        "x",
        "requests[0].authority: wanted one of ca, etcd-ca, front-proxy-ca, found 'x'",
    ),
    ("request", "requests.0.ekus", [], "requests[0].ekus: wanted a list of clientAuth and serverAuth, found []"),
    (
        "request",
        "requests.0.ekus",
        ["serverAuth", "clientAuth"],
        "requests[0].ekus: wanted each once, in alphabetical order, found ['serverAuth', 'clientAuth']",
    ),
    (
        "request",
        "requests.0.validitySeconds",
        0,
        "requests[0].validitySeconds: wanted a whole number of seconds, at most 3153600000, found 0",
    ),
    (
        "request",
        "requests.0.validitySeconds",
        3153600001,
        "requests[0].validitySeconds: wanted a whole number of seconds, at most 3153600000, found 3153600001",
    ),
    (
        "request",
        "requests.0.csr",
        None,
        "requests[0].csr: wanted a CSR as one PEM block, and not a byte more, found something else (no text)",
    ),
    (
        "request",
        "requests.0.replaces",
        "x",
        "requests[0].replaces: wanted a certificate as one PEM block, and not a byte more or null, found something else (Unable to load PEM file",
    ),
    ("request", "requests.0.proof", "x", "requests[0].proof: wanted base64 or null, found 'x'"),
    ("request", "requests.1.name", "apiserver", "requests[1].name: wanted each name once, found apiserver again"),
    ("answer", "version", 2, "version: wanted 1, found 2"),
    ("answer", "requestDigest", "12", "requestDigest: wanted 64 hex digits, found '12'"),
    ("answer", "batch", None, "batch: wanted 32 hex digits, found None"),
    ("answer", "node", "", "node: wanted a node's name (letters, digits, '.', '_' and '-'), found ''"),
    ("answer", "cluster", "a\nb", "cluster: wanted a text without control characters, found 'a\\nb'"),
    ("answer", "signer", " ", "signer: wanted a text, found ' '"),
    ("answer", "signer", "x" * 2001, "signer: wanted at most 2000 characters, found 2001"),
    ("answer", "signed", None, "signed: wanted a time such as 2026-01-31T12:00:00Z, found None"),
    ("answer", "signature", "x", "signature: wanted base64 or null, found 'x'"),
    ("answer", "answers", {}, "answers: wanted a list, not empty, found {}"),
    (
        "answer",
        "answers.0.name",
        "X",
        f"answers[0].name: wanted one of {', '.join(bundles.CARRIED)}{_OR_A_PAIR}, found 'X'",
    ),
    ("answer", "answers.0.chain", [], "answers[0].chain: wanted a list, not empty, found []"),
    (
        "answer",
        "answers.0.chain.0",
        "x",
        "answers[0].chain[0]: wanted a certificate as one PEM block, and not a byte more, found something else (Unable to load PEM file",
    ),
    ("answer", "answers.1.name", "apiserver", "answers[1].name: wanted each name once, found apiserver again"),
    ("answer", "answers.1.refusal", "", "answers[1].refusal: wanted a text, found ''"),
)


@pytest.mark.parametrize(("kind", "path", "value", "sentence"), WRONG)
def test_a_wrong_value_is_reported_with_its_place_and_what_was_wanted(
    request: pytest.FixtureRequest, kind: str, path: str, value: object, sentence: str
) -> None:
    """An operator finds the field by the sentence alone."""
    whole = document(request.getfixturevalue(f"{kind}_bundle"))
    *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
    parent: Any = whole
    for step in steps:
        parent = parent[step]
    parent[last] = value
    assert str(error_of(encoded(whole))).partition(". See ")[0] == sentence  # the rest is the library's


def test_the_longest_values_are_read(request_bundle: RequestBundle, answer_bundle: AnswerBundle) -> None:
    """A name of 253 characters, a hundred years, and a desk's reason of 2,000 characters; the twins are refused above."""
    longest = replace(request_bundle, cluster="x" * 253)
    longest = changed(longest, "apiserver", validity=timedelta(days=36500))
    assert loads(dumps(longest)) == longest
    reported = replace(answer_bundle, cluster="x" * 253, signer="x" * 2000)
    assert loads(dumps(reported)) == reported


def test_the_files_of_an_answer_are_named_after_its_authorities() -> None:
    """One desk of several names those that it has; a desk of all has no need to."""
    assert bundle_format.answer_suffix(list(AUTHORITIES)) == ".answer.json"
    assert bundle_format.answer_suffix(["front-proxy-ca", "ca"]) == ".ca.front-proxy-ca.answer.json"


def test_another_schema_or_version_is_named(either: Bundle) -> None:
    """A bundle of another version is not half understood, neither an older one nor a newer one."""
    assert error_of(with_new_digest({**document(either), "schema": "ca-bridge/other"})).field == "schema"
    assert error_of(with_new_digest({**document(either), "version": 3})).field == "version"
    assert error_of(with_new_digest({**document(either), "version": 0})).field == "version"


@pytest.mark.parametrize("data", [b"", b"{", b"[1", b"\xff\xfe", b"hello", b"\0" * 100])
def test_what_is_no_document_may_be_half_copied(data: bytes) -> None:
    """It gets another error than a bundle that was changed."""
    assert isinstance(error_of(data), IncompleteBundleError)


def test_every_beginning_of_a_bundle_is_half_copied(either: Bundle) -> None:
    """Wherever a copy was cut, it is noticed as that; so is a second document behind the first."""
    data = dumps(either)

    assert all(isinstance(error_of(data[:end]), IncompleteBundleError) for end in range(0, len(data) - 2, 7))
    assert loads(data[:-1]) == either
    assert isinstance(error_of(data + data), IncompleteBundleError)


def test_a_bundle_that_was_cut_off_within_a_csr_is_not_called_a_csr(request_bundle: RequestBundle) -> None:
    """The CSRs in it are no file of a person's: the hint is to copy it again, and the place is named once."""
    data = dumps(request_bundle)
    error = error_of(data[: data.index(b"-----END CERTIFICATE REQUEST-----")])

    assert isinstance(error, IncompleteBundleError)
    assert "copy" in error.hint
    assert "kubeconfig user" not in error.hint
    assert "at at" not in error.found


def test_a_csr_is_no_bundle() -> None:
    """The error names the command that takes it, and does not say to wait for the rest of it."""
    error = error_of(b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n")
    assert isinstance(error, IncompleteBundleError)
    assert "kubeconfig user" in error.hint
    assert "copied" not in error.hint


@pytest.mark.parametrize(
    "data",
    [b"[]", b"1", b"null", b'{"schema": NaN}', b'{"a": ' * 100_000, b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"],
)
def test_what_is_no_bundle_is_refused(data: bytes) -> None:
    """Other JSON, and JSON that was made to break its readers."""
    assert not isinstance(error_of(data), IncompleteBundleError) or data.startswith((b'{"a": {', b"[["))
    assert str(error_of(data)).startswith("bundle: wanted ")


@pytest.mark.parametrize("data", [b"{}", b'{"kind": "Pod"}', b"[]"])
def test_json_of_another_program_is_not_carried_again(data: bytes, either: Bundle) -> None:
    """The hint says that it is no bundle; one that was changed is carried again."""
    assert "another program" in error_of(data).hint
    assert "None" not in str(error_of(data))
    assert "carry it again" in error_of(dumps(either).replace(b"ca-bridge/", b"ca-bridge+", 1)).hint


def test_a_bundle_has_a_size_limit(either: Bundle) -> None:
    """It is known before the first byte is read."""
    assert "at most" in error_of(dumps(either) + b" " * MOST_BYTES).wanted


def test_a_name_asked_for_twice_is_refused(request_bundle: RequestBundle) -> None:
    """Two answers for one certificate would leave it to chance which is installed."""
    double = [*document(request_bundle)["requests"], document(request_bundle)["requests"][0]]

    error = error_of(with_new_digest({**document(request_bundle), "requests": double}))

    assert error.field == "requests[3].name"


# --- hostile input ----------------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=10), children, max_size=4),
    max_leaves=10,
)


@given(st.binary(max_size=200) | json_values.map(lambda value: json.dumps(value).encode()))
def test_whatever_is_read_the_error_is_ours(data: bytes) -> None:
    """No traceback, and nothing in the message that a terminal would obey."""
    try:
        loads(data)
    except BundleError as e:
        assert str(e).isprintable()


@given(data=st.data())
def test_whatever_is_in_a_field_the_error_is_ours(
    request_bundle: RequestBundle, answer_bundle: AnswerBundle, data: st.DataObject
) -> None:
    """The same below the first layer, with a digest that fits."""
    value = document(request_bundle if data.draw(st.booleans()) else answer_bundle)
    path = data.draw(st.sampled_from(paths(value)))
    other = data.draw(json_values)
    try:
        loads(with_new_digest(with_value(value, path, lambda _: other)))
    except BundleError as e:
        assert str(e).isprintable()


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_changes_nothing_or_is_refused(request_bundle: RequestBundle, position: int, byte: int) -> None:
    """Only white space and other spellings of the same value pass."""
    data = bytearray(dumps(request_bundle))
    data[position % len(data)] = byte
    with contextlib.suppress(BundleError):
        assert loads(bytes(data)) == request_bundle


# --- the continuity proof ---------------------------------------------------------------------------------------------

KEYS: dict[str, Callable[[], PrivateKeyTypes]] = {
    "rsa-2048": lambda: generate_key("rsa-2048"),
    "ecdsa-p256": lambda: generate_key("ecdsa-p256"),
    "ecdsa-p384": lambda: generate_key("ecdsa-p384"),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


@pytest.mark.parametrize("kind", KEYS)
def test_the_proof_holds_for_each_type_of_key(pairs: Pairs, kind: str) -> None:
    """The proof works with kubeadm's key types, and with those that other CAs may have been given."""
    key = KEYS[kind]()
    assert isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey)
    old = _self_signed(key)
    bundle = make_bundle({"apiserver": (old, key)})  # type: ignore[dict-item]  # Ed25519, too

    assert proof_problem(bundle.requests[0], bundle) is None
    other = make_bundle(pairs)
    broken = changed(bundle, "apiserver", proof=other.requests[0].proof)
    assert "another signature" in str(proof_problem(broken.requests[0], broken))


def _self_signed(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kube-apiserver")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=1))
    )
    return builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else signature_hash(key))


def test_a_key_of_another_type_proves_nothing(pairs: Pairs) -> None:
    """It is refused on both sides, by name."""
    key = dsa.generate_private_key(2048)
    about: dict[str, Any] = {"validity": timedelta(days=1), "created": NOW}
    with pytest.raises(ValueError, match="DSA"):
        sign_proof(
            key, new_csr(pairs["apiserver"][0]), name="apiserver", batch="0" * 32, node="a", cluster="b", **about
        )


@pytest.mark.parametrize(
    "values",
    [
        {"batch": "0" * 32},
        {"node": "cp-9"},
        {"cluster": "other"},
        {"created": NOW.replace(microsecond=0) + timedelta(days=1)},
    ],
)
def test_a_proof_is_good_for_its_own_bundle_only(request_bundle: RequestBundle, values: dict[str, Any]) -> None:
    """Another batch, node, cluster or time takes another proof."""
    moved = replace(request_bundle, **values)

    assert all(proof_problem(one, request_bundle) is None for one in request_bundle.requests)
    assert all("another signature" in str(proof_problem(one, moved)) for one in moved.requests)


def test_a_proof_is_good_for_its_own_request_only(request_bundle: RequestBundle, pairs: Pairs) -> None:
    """A proof does not fit another CSR, another name, or another replaced certificate."""
    others: list[dict[str, Any]] = [
        {"csr": new_csr(pairs["apiserver"][0])},
        {"name": "admin.conf"},
        {"replaces": pairs["etcd-server"][0]},
        {"validity": timedelta(days=3650)},
    ]
    for values in others:
        broken = changed(request_bundle, "apiserver", **values)
        request = next(one for one in broken.requests if one not in request_bundle.requests)
        assert "another signature" in str(proof_problem(request, broken)), values


@pytest.mark.attack("N5")
@pytest.mark.parametrize("keys", [90_000, 900])
def test_a_key_that_is_there_twice_costs_no_time(keys: int) -> None:
    """One mebibyte of keys would take minutes if each were looked for among all; the second key is found either way."""
    data = ("{" + "".join(f'"{number:06}":0,' for number in range(keys)) + f'"{keys - 1:06}":0}}').encode()
    assert len(data) < MOST_BYTES
    begin = time.process_time()
    with pytest.raises(BundleError, match="at most" if keys > 1000 else "each key once"):
        bundle_format.parse(data)
    assert time.process_time() - begin < 5


def test_a_proof_by_another_holder_is_named(pairs: Pairs) -> None:
    """The signature holds, and a person still sees that its holder is not the new certificate's."""
    other = make_bundle({"scheduler.conf": pairs["apiserver"]}, build=lambda _: new_csr(pairs["scheduler.conf"][0]))
    wrong = "wanted one by the certificate of CN=system:kube-scheduler, found one by that of"

    assert f"{wrong} CN=kube-apiserver" in str(proof_problem(other.requests[0], other))
    assert f"proof       {wrong}" in describe(other, NOW, {})


def test_other_usages_than_the_replaced_certificates_are_named(pairs: Pairs) -> None:
    """A server's certificate does not prove a client; one of both does prove one of them."""
    more = make_bundle({"etcd-server": pairs["apiserver"], "apiserver": pairs["etcd-server"]})

    wrong = "wanted one by a certificate with the same usages, found one without clientAuth"
    assert [usages_problem(one) for one in more.requests] == [wrong, None]
    assert f"proof       {wrong}" in describe(more, NOW, {})


def test_no_proof_and_nothing_to_prove_with_are_named(request_bundle: RequestBundle) -> None:
    """Both are said as they are."""
    without = changed(request_bundle, "apiserver", proof=None)
    alone = changed(request_bundle, "apiserver", replaces=None)

    assert proof_problem(without.requests[0], without) == "there is no continuity proof"
    assert proof_problem(alone.requests[0], alone) == "the certificate that is replaced is missing"


def test_parts_can_not_be_moved_from_one_to_the_next() -> None:
    """Each part is signed with its length: `ab` and `c` are not `a` and `bc`."""
    key = generate_key("ecdsa-p256")
    made = new_csr(_self_signed(key))
    one = signatures._proof_message(made, ("0" * 32, "ab", "c", "x"), timedelta(days=1), NOW)
    other = signatures._proof_message(made, ("0" * 32, "a", "bc", "x"), timedelta(days=1), NOW)

    assert one != other


def test_the_origin_is_known_with_the_ca_certificate_alone(request_bundle: RequestBundle, pki: Pki) -> None:
    """Its own CA's is accepted, expired or not; another CA of the same name is not."""
    cas = {name: x509.load_pem_x509_certificate(pki.ca_pem(name)[0]) for name in AUTHORITIES}
    key = generate_key("ecdsa-p256")
    impostor = sample_pki.ca_certificate("kubernetes", key, NOW, NOW + timedelta(days=1))
    request = next(one for one in request_bundle.requests if one.name == "apiserver")

    assert origin_problem(request, [cas["ca"]]) is None
    assert origin_problem(request, [impostor, cas["ca"]]) is None
    assert "CN=kubernetes" in str(origin_problem(request, [impostor]))
    assert "not signed by it" in str(origin_problem(request, [cas["etcd-ca"]]))
    assert "CA certificate of ca" in str(origin_problem(request, []))


# --- for people -------------------------------------------------------------------------------------------------------


def test_the_short_fingerprint_is_that_of_what_it_holds(either: Bundle) -> None:
    """It can be read out, and another bundle has another."""
    text = short_fingerprint(either)

    assert re.fullmatch(r"([0-9A-HJKMNP-TV-Z]{5}-){3}[0-9A-HJKMNP-TV-Z]{5}", text)
    assert short_fingerprint(loads(dumps(either))) == text
    assert short_fingerprint(replace(either, node="cp-9")) != text


@pytest.mark.parametrize(
    ("digest_hex", "text"),
    [
        ("f" * 64, "ZZZZZ-ZZZZZ-ZZZZZ-ZZZZZ"),
        ("0" * 25 + "f" * 39, "00000-00000-00000-00000"),
        ("00443214c74254b635cf" + "0" * 44, "01234-56789-ABCDE-F0000"),
    ],
)
def test_the_short_fingerprint_is_the_first_hundred_bits(digest_hex: str, text: str) -> None:
    """Each letter of Crockford's alphabet has five bits, in their order."""
    assert fingerprint_text(digest_hex) == text


def test_a_person_sees_what_is_asked_and_what_is_odd(request_bundle: RequestBundle, pki: Pki, pairs: Pairs) -> None:
    """Names, dates, proof, origin and fingerprint; what is more than a renewal stands out."""
    cas = {name: [x509.load_pem_x509_certificate(pki.ca_pem(name)[0])] for name in AUTHORITIES}
    text = describe(request_bundle, NOW, cas)

    for wanted in (*NAMES, "CN=kube-apiserver", "serverAuth", "365d", "DNS:kubernetes", "valid until"):
        assert wanted in text
    assert text.count("holds") == len(NAMES)
    assert text.count("signed by this CA") == len(NAMES)
    assert "CHANGED" not in text
    few = len(NAMES)
    last = text.splitlines()[-1]
    assert last == f"in short     {few} of {few} proofs hold, {few} replaced certificates are of these CAs"
    assert short_fingerprint(request_bundle) in text

    odd = changed(request_bundle, "scheduler.conf", csr=new_csr(pairs["apiserver"][0]))
    seen = describe(odd, NOW + timedelta(days=4000), {})
    assert seen.count("CHANGED") == 3
    assert seen.splitlines()[-1].endswith(f"{few - 1} of {few} proofs hold, no CA is here to compare with, 1 CHANGED")
    assert "another signature" in seen
    assert "expired" in seen


def test_a_person_sees_what_came_back(answer_bundle: AnswerBundle) -> None:
    """A person sees the certificates, the refusals with their reasons, and the signer."""
    text = describe(answer_bundle, NOW, {})

    for wanted in (*NAMES, "not today", "desk (openssl)", "1 intermediate", short_fingerprint(answer_bundle)):
        assert wanted in text
    assert re.fullmatch(r"in short     \d+ certificates?, 1 refused", text.splitlines()[-1])


@pytest.mark.first_use("20")
def test_a_person_sees_who_would_be_held_back_by_no_rule(pki: Pki) -> None:
    """Certificates of system:masters are counted in the last line."""
    asked = make_bundle(old_pairs(pki, ("apiserver", "super-admin.conf")))
    assert describe(asked, NOW, {}).splitlines()[-1].endswith(", 1 in system:masters")


def test_a_refusal_is_one_line_whatever_the_reason() -> None:
    """A CA's words can't steer the node's terminal, nor break the bundle."""
    assert bundles.refusal("a\nb\x1b[31m").reason == "a b [31m"
    assert bundles.refusal("\n").reason == "no reason was given"
    assert len(bundles.refusal("x" * 5000).reason) == bundles.LONGEST_TEXT
