"""Behind a cross certificate of the old CA, new certificates are accepted by what trusts the old CA alone: no `trust` first."""

from __future__ import annotations

import dataclasses
import socket
import ssl
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from bridge import rotation
from bridge.ca.registry import cross_behind
from bridge.cli.options import utc_now
from bridge.errors import SettingsError
from bridge.node import kubeconfig
from bridge.node.reading import read_node
from bridge.pki import expiry
from bridge.pki.certificates import load_pem_certificates, pem
from bridge.pki.csr import key_pem
from bridge.pki.user_rules import User
from bridge.renewal import renew
from bridge.renewal.selection import RunOptions
from bridge.rotation import Change, Phase, places, planning
from bridge.rotation.planning import Verb
from bridge.settings.load import parse
from bridge.settings.tables import Settings
from bridge.specs import AUTHORITIES, CA, EKU, Component
from bridge.state import Store, backups
from bridge.state.obligations import unproven_file
from bridge.users import UserOrder, issue
from tests.kit import next_cas, openbao
from tests.kit.cas import Bridge, add_openssl
from tests.kit.issuing import NOW, Signer, cn, usage
from tests.kit.judge import judge
from tests.kit.openbao import OpenBao
from tests.kit.pairs import assert_pairs
from tests.kit.pki import Pki, kubeadm_pki
from tests.kit.renewing import Quiet
from tests.kit.rotating import contents, phases, run, with_next

pytestmark = pytest.mark.usefixtures("no_process_here")


@pytest.fixture
def settings(pki: Pki, tmp_path: Path) -> Settings:
    return with_next(pki, tmp_path, cross=True)


def change_of(settings: Settings, name: str = "ca") -> Change:
    return places.look(settings, read_node(settings.node), [name])[name].change


@pytest.mark.kube
def test_kubeadm_takes_the_node_in_each_phase_without_the_first(tmp_path: Path) -> None:
    """`trust` has nothing to do, `issue` comes first; the way back has both CAs trusted, as from each other issue."""
    pki = kubeadm_pki(tmp_path / "node", algorithm="ECDSA-P256")
    settings, before = with_next(pki, tmp_path, cross=True), contents(pki)
    spared = run(settings, Verb.TRUST)
    assert (spared.exit_code, [step.is_there for step in spared.steps], contents(pki)) == (0, [True] * 3, before)
    for verb, phase in ((Verb.ISSUE, "issued"), (Verb.BACK, "trusted"), (Verb.BACK, "old"), (Verb.ISSUE, "issued"), (Verb.DROP, "new")):  # fmt: skip
        done = run(settings, verb)
        assert done.exit_code == 0, done.result
        assert phases(settings) == dict.fromkeys(AUTHORITIES, phase)
        assert_pairs(pki)
        pki.run_kubeadm("certs", "check-expiration")
        pki.run_kubeadm("init", "phase", "kubeconfig", "all")
        if phase == "old":
            assert {p: d for p, d in contents(pki).items() if p.suffix != ".conf"} == {
                p: d for p, d in before.items() if p.suffix != ".conf"
            }


def test_without_a_cross_certificate_the_first_phase_is_not_spared(pki: Pki, tmp_path: Path) -> None:
    """The twin: `issue` demands `trust` before it."""
    with pytest.raises(planning.OrderError, match="wanted the phase “trusted” on this node before `issue`"):
        run(with_next(pki, tmp_path), Verb.ISSUE)


def test_each_new_certificate_has_it_also_at_night_and_at_the_end(settings: Settings) -> None:
    """Clients out of reach go on after `drop`, and with the next renewals, until the cross certificate ends."""
    wanted = {name: change_of(settings, name).cross for name in AUTHORITIES}
    for verb in (Verb.ISSUE, Verb.DROP):
        assert run(settings, verb).exit_code == 0
        night = renew.run(settings, RunOptions(names=("apiserver",)), utc_now, Quiet())[0]
        assert night.exit_code == 0, night
        for item in read_node(settings.node).items:
            assert item.certificates[-1] == wanted[item.spec.authority.name], item.spec.name
            assert len(item.certificates) == 2
    assert renew.run(settings, RunOptions(), utc_now, Quiet())[0].renewed == []


@pytest.mark.parametrize("cross", [True, False])
def test_issue_restarts_what_reads_a_ca_at_its_start_alone(pki: Pki, tmp_path: Path, cross: bool) -> None:
    """An API server reads etcd's CA then, which no phase before has changed; after `trust` it has read it already."""
    settings = with_next(pki, tmp_path, cross=cross)
    by_hand = dataclasses.replace(settings, restart=dataclasses.replace(settings.restart, method="none"))
    path = pki.kubeconfig_dir / "manifests/kube-apiserver.yaml"
    path.parent.mkdir()
    words = f"[kube-apiserver, --etcd-cafile={pki.pki_dir}/etcd/ca.crt]"
    container = f"{{name: kube-apiserver, image: 'registry.k8s.io/kube-apiserver:v1.37.2', command: {words}}}"
    path.write_text(
        f"apiVersion: v1\nkind: Pod\nmetadata: {{name: kube-apiserver}}\nspec: {{containers: [{container}]}}\n"
    )
    unproven = unproven_file(Store(settings.node.state_dir))
    for verb in (Verb.ISSUE,) if cross else (Verb.TRUST, Verb.ISSUE):
        unproven.path.unlink(missing_ok=True)
        run(by_hand, verb, ["etcd-ca"])
    assert phases(settings)["etcd-ca"] == "issued"
    left = unproven.read()
    assert (left is not None and Component.APISERVER in left.to_restart) is cross


@pytest.mark.rotation("kubeconfigs for people")
def test_a_kubeconfig_for_a_person_is_of_the_ca_that_signs(settings: Settings, tmp_path: Path) -> None:
    """The old one before `issue`, and the new one with its cross certificate after it."""
    found = []
    for number in range(2):
        out = tmp_path / f"bob-{number}.conf"
        issue(settings, UserOrder(user=User(name="bob", groups=()), out=out), utc_now, Quiet())
        found.append(load_pem_certificates(kubeconfig.parse(out.read_bytes()).certificate_data or b""))
        assert run(settings, Verb.ISSUE).exit_code == 0
    (old,), (new, above) = found
    assert [one.issuer.rfc4514_string() for one in (old, new, above)] == ["CN=kubernetes", "CN=ca-2", "CN=kubernetes"]


def test_the_plan_says_what_is_spared(pki: Pki, tmp_path: Path) -> None:
    """The first phase, and its restarts; without the cross certificate it says what it writes."""
    bridge = Bridge(pki=pki, directory=tmp_path / "bridge")
    add_openssl(bridge, "etcd-ca")
    made = next_cas.make(tmp_path / "next")["etcd-ca"]
    bridge.add("authority.etcd-ca.next", made.table)
    assert "trust: writes" in bridge.run("rotate-ca", "plan").stdout
    path = next_cas.cross(pki.ca_pem("etcd-ca"), pem(made.signer.certificate), tmp_path / "cross")
    bridge.tables.pop()
    bridge.add("authority.etcd-ca.next", {**made.table, "cross": str(path)})
    planned = bridge.run("rotate-ca", "plan")
    assert (planned.returncode, "trust: writes" in planned.stdout) == (0, False), planned.stderr
    said = " ".join(planned.stdout.split())
    assert "trust: nothing to do: the cross certificate goes behind each new one" in said
    assert "in one step with" in said
    assert said.count("restarts etcd, then the API server of this node") == 2
    done = bridge.run("rotate-ca", "trust")
    assert "next: `ca-bridge rotate-ca issue` on each node" in " ".join(done.stdout.split()), done.stderr


# --- handshakes -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Handshakes:
    """A TLS server with the node's API server pair (OpenSSL), which demands client certificates of the CA that is given."""

    pki_dir: Path
    client: tuple[Path, Path]

    def refused(self, directory: Path, server_trusts: x509.Certificate, client_trusts: x509.Certificate) -> str:
        """Connect once with the kubelet client's pair; the client's, or else the server's complaint."""
        theirs, ours = directory / "server-trusts.crt", directory / "client-trusts.crt"
        theirs.write_bytes(pem(server_trusts))
        ours.write_bytes(pem(client_trusts))
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(self.pki_dir / "apiserver.crt", self.pki_dir / "apiserver.key")
        server.load_verify_locations(theirs)
        server.verify_mode = ssl.CERT_REQUIRED
        client = ssl.create_default_context(cafile=ours)
        client.load_cert_chain(*self.client)
        near, far = socket.socketpair()
        said: list[str] = []

        def serve() -> None:
            try:
                with server.wrap_socket(far, server_side=True) as one:
                    one.sendall(one.recv(1))
            except (OSError, ssl.SSLError) as e:
                said.append(str(e))
            finally:
                far.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with near, client.wrap_socket(near, server_hostname="kubernetes") as one:
                one.sendall(b"x")
                assert one.recv(1) in (b"x", b"")
        except (OSError, ssl.SSLError) as e:
            return str(e)
        finally:
            near.close()
            thread.join(timeout=180)
        return said[0] if said else ""


def test_an_openssl_client_and_server_accept_it_by_the_old_ca_and_by_the_new_one(
    settings: Settings, pki: Pki, tmp_path: Path
) -> None:
    """Each side with one CA alone, in all four ways; without the cross certificate the old CA refuses."""
    change = change_of(settings)
    assert run(settings, Verb.ISSUE).exit_code == 0
    pair = pki.pki_dir / "apiserver-kubelet-client.crt", pki.pki_dir / "apiserver-kubelet-client.key"
    shakes = Handshakes(pki.pki_dir, pair)
    for theirs in (change.old, change.new):
        for ours in (change.old, change.new):
            assert shakes.refused(tmp_path, theirs, ours) == ""
    whole = pair[0].read_bytes()
    pair[0].write_bytes(pem(load_pem_certificates(whole)[0]))
    assert shakes.refused(tmp_path, change.old, change.new)
    assert shakes.refused(tmp_path, change.new, change.new) == ""
    pair[0].write_bytes(whole)
    serving = pki.pki_dir / "apiserver.crt"
    serving.write_bytes(pem(load_pem_certificates(serving.read_bytes())[0]))
    assert "certificate verify failed" in shakes.refused(tmp_path, change.new, change.old)


@pytest.mark.kube
def test_go_accepts_it_by_the_old_ca_and_by_the_new_one(settings: Settings, pki: Pki) -> None:
    """As Kubernetes verifies clients and servers; without the cross certificate the old CA refuses."""
    change = change_of(settings)
    assert run(settings, Verb.ISSUE).exit_code == 0
    with judge() as go:
        for name, eku, host in (
            ("apiserver", EKU.SERVER_AUTH, "kubernetes"),
            ("apiserver-kubelet-client", EKU.CLIENT_AUTH, ""),
        ):
            chain = [
                one.public_bytes(Encoding.DER)
                for one in load_pem_certificates((pki.pki_dir / f"{name}.crt").read_bytes())
            ]
            key = (pki.pki_dir / f"{name}.key").read_bytes()
            for root in (change.old, change.new):
                roots = [root.public_bytes(Encoding.DER)]
                found = go.ask(chain, roots, at=utc_now(), ekus=frozenset({eku}), key_pem=key, host=host)
                assert found.refused == ""
                alone = go.ask(chain[:1], roots, at=utc_now(), ekus=frozenset({eku}), key_pem=key, host=host)
                assert bool(alone.refused) is (root is change.old)


# --- refusals ---------------------------------------------------------------------------------------------------------

OLD, NEW = (
    Signer.make(name, key_id=True, end=NOW + timedelta(days=days))
    for name, days in (("kubernetes", 900), ("kubernetes-2", 3000))
)
OTHER = Signer.make("other")


def certified(
    *,
    by: Signer = OLD,
    of: Signer = NEW,
    subject: x509.Name | None = None,
    ca: bool = True,
    key_usage: x509.KeyUsage | None = None,
    key_id: bytes | None = None,
    authority: Signer = OLD,
    limit: x509.ExtensionType | None = None,
    end: timedelta = timedelta(days=800),
) -> x509.Certificate:
    """A cross certificate in the right form, or with one thing different."""
    own = x509.SubjectKeyIdentifier.from_public_key(NEW.key.public_key())
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject or NEW.certificate.subject)
        .issuer_name(by.certificate.subject)
        .public_key(of.key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - timedelta(days=1))
        .not_valid_after(NOW + end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(key_usage or usage(ca=True), critical=True)
        .add_extension(own if key_id is None else x509.SubjectKeyIdentifier(key_id), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
    )
    if limit is not None:
        builder = builder.add_extension(limit, critical=False)
    return builder.sign(by.key, hashes.SHA256())


def said(cross: x509.Certificate, old: Signer = OLD) -> str:
    change = Change(old.certificate, NEW.certificate, cross)
    return "; ".join(map(str, rotation.new_ca_violations(change, CA, {}, {}, NOW)))


def test_the_right_one_passes() -> None:
    """The new CA's name and key, certified by the old CA."""
    assert said(certified()) == ""


@pytest.mark.parametrize(
    ("wrong", "wanted"),
    [
        (certified(by=OTHER), "cross certificate: wanted a signature of CN=kubernetes ("),
        (certified(of=OTHER), "cross certificate's key: wanted the new CA's"),
        (certified(subject=cn("kubernetes-3")), "cross certificate's subject: wanted the new CA's"),
        (certified(key_id=b"another"), "cross certificate's subjectKeyIdentifier: wanted the new CA's"),
        (certified(authority=OTHER), "cross certificate's authorityKeyIdentifier: wanted the old CA's"),
        (certified(ca=False), "cross certificate's basicConstraints: wanted CA:TRUE"),
        (certified(key_usage=usage(ca=False)), "cross certificate's keyUsage: wanted keyCertSign"),
        (certified(end=timedelta(hours=-1)), "cross certificate's notAfter: wanted later than"),
        (
            certified(limit=x509.ExtendedKeyUsage([x509.ObjectIdentifier(EKU.SERVER_AUTH.value)])),
            "cross certificate's extendedKeyUsage: wanted none",
        ),
    ],
)
def test_one_that_leads_old_clients_nowhere_is_refused(wrong: x509.Certificate, wanted: str) -> None:
    """Another CA's, another key's, another name's, without a CA's rights, ended, or limited."""
    assert wanted in said(wrong)


def test_an_old_ca_that_may_not_certify_another_ca_is_found() -> None:
    """Its path length forbids each cross certificate."""
    narrow = Signer.make("kubernetes", key=OLD.key, path_length=0)
    assert "wanted an old CA that may certify another one" in said(certified(), narrow)


def test_a_new_ca_without_a_key_identifier_is_refused() -> None:
    """`openssl ca` then writes issuer and serial number into certificates, which contradict a cross certificate's."""
    bare, wanted = Signer.make("kubernetes-2", key=NEW.key), "subjectKeyIdentifier: wanted one"
    with_it, without = Change(OLD.certificate, NEW.certificate), Change(OLD.certificate, bare.certificate)
    assert wanted in "; ".join(map(str, rotation.new_ca_violations(without, CA, {}, {}, NOW)))
    assert wanted not in "; ".join(map(str, rotation.new_ca_violations(with_it, CA, {}, {}, NOW)))


def test_one_that_is_about_to_end_is_refused_and_left_out_of_renewals(settings: Settings, pki: Pki) -> None:
    """With such a certificate in the chain, leaves would be due each night."""
    assert run(settings, Verb.ISSUE).exit_code == 0
    change, before = change_of(settings), contents(pki)
    assert change.cross is not None
    soon = (
        change.cross.not_valid_after_utc - settings.renewal.before.of(settings.renewal.validity) + timedelta(minutes=1)
    )
    now_in_force = dataclasses.replace(settings.authorities["ca"], cross=Path(settings.authorities["ca"].next["cross"]))
    ours = dataclasses.replace(settings, authorities={**settings.authorities, "ca": now_in_force})
    assert cross_behind(ours, "ca", change.new, utc_now()) == change.cross
    assert cross_behind(ours, "ca", change.new, soon) is None
    leaf = load_pem_certificates((pki.pki_dir / "apiserver.crt").read_bytes())
    assert expiry.is_due(leaf, settings.renewal.before, settings.renewal.validity, soon)
    found = places.look(settings, read_node(settings.node), ["ca"])
    texts = [str(one) for one in planning.violations(found["ca"], settings, soon)]
    assert any("cross certificate's notAfter: wanted later than renewal.before" in one for one in texts)
    assert not list(planning.violations(found["ca"], settings, utc_now()))
    assert contents(pki) == before


def test_a_file_that_is_no_cross_certificate_stops_everything_before_it_moves(settings: Settings, pki: Pki) -> None:
    """Another CA's, two of them, a file that others can write to, none: each is named, and nothing is asked."""
    before, path = contents(pki), Path(settings.authorities["ca"].next["cross"])
    good = path.read_bytes()
    for bad, wanted in (
        (Path(settings.authorities["etcd-ca"].next["cross"]).read_bytes(), None),
        (good + good, "2 certificates"),
        (b"no certificate", "found"),
    ):
        path.write_bytes(bad)
        with pytest.raises(SettingsError if wanted else planning.NewCaError, match=wanted or "cross certificate's key"):
            run(settings, Verb.ISSUE)
    path.write_bytes(good)
    path.chmod(0o666)
    with pytest.raises(SettingsError, match="a file that only its owner can write to"):
        run(settings, Verb.ISSUE)
    path.unlink()
    with pytest.raises(SettingsError, match="there is no such file"):
        run(settings, Verb.ISSUE)
    assert contents(pki) == before
    next_cas.cross(pki.ca_pem("ca"), pem(change_of(with_next_of(settings)).new), path.parent)
    path.chmod(0o644)
    assert run(settings, Verb.ISSUE).exit_code == 0


def with_next_of(settings: Settings) -> Settings:
    """The settings without the cross certificate, which is away."""
    ours = settings.authorities["ca"]
    table = {key: value for key, value in ours.next.items() if key != "cross"}
    return dataclasses.replace(
        settings, authorities={**settings.authorities, "ca": dataclasses.replace(ours, next=table)}
    )


def test_a_cross_certificate_of_another_ca_fails_the_renewal(settings: Settings, pki: Pki) -> None:
    """`cross` that stayed in [authority.ca] after its CA was replaced once more would go behind certificates in vain."""
    wrong = dataclasses.replace(settings.authorities["ca"], cross=Path(settings.authorities["etcd-ca"].next["cross"]))
    ours = dataclasses.replace(settings, authorities={**settings.authorities, "ca": wrong})
    before = contents(pki)
    failed = renew.run(ours, RunOptions(names=("apiserver",)), utc_now, Quiet())[0]
    assert "wanted a cross certificate for CN=kubernetes and its key" in str(failed.failed[0].error)
    assert contents(pki) == before


def test_the_paths_of_the_settings_are_absolute() -> None:
    """A relative one would depend on where a run starts."""
    for text in ('cross = "x.crt"', '[authority.ca.next]\nanchor = "/x"\ncross = "x.crt"'):
        with pytest.raises(SettingsError, match="wanted an absolute path"):
            parse(f'[backend.desk]\ntype = "openssl"\n[authority.ca]\nbackend = "desk"\ndir = "/ca"\n{text}')


def test_a_back_after_a_trust_all_the_same_finds_its_backup(pki: Pki, tmp_path: Path) -> None:
    """A node that trusted both CAs before the cross certificate came goes back there, and no further."""
    settings = with_next(pki, tmp_path, cross=True)
    assert run(with_next_of(settings), Verb.TRUST, ["ca"]).exit_code == 0
    for verb, phase in ((Verb.ISSUE, "issued"), (Verb.BACK, "trusted"), (Verb.BACK, "old")):
        done = run(settings, verb, ["ca"])
        assert (done.exit_code, phases(settings)["ca"]) == (0, phase), done.result
    assert len(backups.read_all(Store(settings.node.state_dir))[0]) == 4
    assert Phase.TRUSTED is change_of(settings).spares


@pytest.fixture
def bao() -> Iterator[OpenBao]:
    with openbao.dev_server() as server:
        yield server


def test_what_a_vault_mount_makes_is_a_cross_certificate(bao: OpenBao) -> None:
    """The two calls of docs/replace-the-ca.md make one; with another name in the request it is none."""
    old = Signer.make(
        "kubernetes", key_id=True, begin=utc_now() - timedelta(days=1), end=utc_now() + timedelta(days=900)
    )
    bao.add_ca("cross-old", pem(old.certificate), key_pem(old.key))
    bao.write("sys/mounts/cross-new", type="pki", config={"max_lease_ttl": "87600h"})
    made = bao.write("cross-new/root/generate/internal", common_name="kubernetes-2", ttl="40000h")["data"]
    [new] = load_pem_certificates(made["certificate"].encode())

    def found(name: str) -> str:
        asked = {"key_ref": made["key_id"], "common_name": name, "exclude_cn_from_sans": True}
        csr = bao.write("cross-new/intermediate/cross-sign", **asked)["data"]["csr"]
        signed = bao.write("cross-old/root/sign-intermediate", csr=csr, use_csr_values=True, ttl="19000h")["data"]
        [cross] = load_pem_certificates(signed["certificate"].encode())
        change = Change(old.certificate, new, cross)
        return "; ".join(map(str, rotation.new_ca_violations(change, CA, {}, {}, utc_now())))

    assert found("kubernetes-2") == ""
    assert "cross certificate's subject" in found("kubernetes-3")
