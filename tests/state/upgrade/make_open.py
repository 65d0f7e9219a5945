"""
Make `open.tar.gz`: a state directory as version 5154d35 of this repository left it, with all that was open or owed.

Requests of a node, for users, of the gateway and the desk, in each state that they can be in; a new node's beginning;
certificates not proven, hooks, revocations and copies that were owed; what failed and when. Made once, by that
version's own code, outside of a run of it:

    git archive 5154d35 | tar -x -C OLD
    cd OLD && python REPOSITORY/tests/state/upgrade/make_open.py
"""

# mypy: ignore-errors
# (its names are those of that version)

from __future__ import annotations

import io
import sys
import tarfile
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path.cwd()))

from bridge.kubernetes.tickets import Ticket, Tickets
from bridge.node.fresh_kubeconfig import FreshKubeconfig
from bridge.signing.desk_journal import Asked, Journal

from bridge.bootstrap import unfinished
from bridge.contract import Continuity, Issued, Pending, SignRequest
from bridge.control_plane.restarts import times_file
from bridge.monitoring import history
from bridge.pki import csr
from bridge.renewal import gate, hooks, owed, revocation
from bridge.specs import SPECS, Component
from bridge.state import Store, copies, requests, users
from tests.kit.issuing import Signer

NOW = datetime.now(UTC)
HERE = Path(__file__).parent
WHO = Continuity(batch="0" * 32, node="cp-1", cluster="kubernetes", proof=b"\1\2", asked=NOW.replace(microsecond=0))


def request(name: str, signer: Signer, continuity: Continuity | None = None) -> tuple[SignRequest, bytes]:
    """A request to renew a certificate, and its key."""
    key = csr.generate_key("ecdsa-p256")
    old = signer.issue(SignRequest(spec=SPECS[name], csr_pem=_csr(name, key), validity=timedelta(days=1))).leaf
    made = SignRequest(
        spec=SPECS[name], csr_pem=_csr(name, key), validity=timedelta(days=90), replaces=old, continuity=continuity
    )
    return made, csr.key_pem(key)


def _csr(name: str, key: csr.PrivateKey) -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    subject = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, name)])
    return (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .sign(key, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )


def node(store: Store, signer: Signer) -> None:
    """The node's requests, and what it owes."""
    opened = requests.OpenRequests(store)
    made, key = request("apiserver", signer)
    opened.put(
        requests.OpenRequest(
            request=made,
            key_pem=key,
            created=NOW,
            run_id="11111111",
            backend="people",
            reference="R-1",
            note="is asked",
        )
    )
    made, key = request("scheduler.conf", signer, WHO)
    answer = signer.issue(made)
    opened.put(
        requests.OpenRequest(
            request=made,
            key_pem=key,
            created=NOW,
            run_id="22222222",
            backend="desk",
            answer=Issued(leaf=answer.leaf, intermediates=(signer.certificate,)),
            bundles=("ab" * 32,),
            kubeconfig=FreshKubeconfig(server="https://a:6443", cluster="kubernetes", user="u", ca_pem=b"-----BEGIN\n"),
        )
    )
    made, key = request("admin.conf", signer)
    opened.put(requests.OpenRequest(request=made, key_pem=key, created=NOW, run_id="33333333"))
    opened.save()
    certificate = made.replaces
    assert certificate is not None
    owed.write(
        store,
        owed.Owed(
            certificates=(
                owed.Unproven(
                    name="apiserver", runs={"0a": "44444444"}, backup_of="44444444", before=frozenset({"b", "a"})
                ),
            ),
            going_back="it does not work",
            to_restart=(Component.APISERVER,),
        ),
    )
    hooks.hooks_file(store).replace(
        {
            "version": 1,
            "owed": [
                {
                    "event": "success",
                    "run_id": "55555555",
                    "environment": {"CA_BRIDGE_EVENT": "success"},
                    "serials": {"apiserver": "0a"},
                    "done": ["true"],
                    "tries": 2,
                }
            ],
        }
    )
    revocation._save(store, [revocation.Superseded(name="admin.conf", certificate=certificate, due=NOW)])
    copies.owed_file(store).replace({"version": 1, "certificates": {"admin.conf": ["00", "01"]}})


def others(store: Store, signer: Signer) -> None:
    """What is open of users, the gateway, the desk and a new node, and what is remembered of runs."""
    made, key = request("admin.conf", signer)
    who = Continuity(batch="1" * 32, node="cp-1", cluster="kubernetes", proof=None, asked=WHO.asked)
    common = {
        "groups": ("dev",),
        "csr_pem": made.csr_pem,
        "validity": timedelta(hours=8),
        "created": NOW,
        "backend": "people",
    }
    users.save(
        store,
        {
            "jane": users.OpenUser(name="jane", key_pem=key, reference="R-2", **common),
            "john": users.OpenUser(name="john", key_pem=None, carried=who, **common),
        },
    )
    tickets = Tickets(store)
    for uid in ("u-1", "u-2"):
        tickets.put(
            Ticket(
                uid=uid,
                object_name=f"csr-{uid}",
                signer="kubernetes.io/kubelet-serving",
                csr_sha256="0" * 64,
                reference=f"R-{uid}",
                validity_seconds=600,
                asked=NOW.isoformat(),
            )
        )
    journal = Journal(store.directory / "desk-answers.jsonl", NOW)
    for name, answer in (
        ("apiserver", Asked(since=NOW)),
        ("etcd-server", Pending(reference="R-3", note="at the CA")),
        ("admin.conf", None),
    ):
        made, _ = request(name, signer)
        journal.add([(made, answer or signer.issue(made))])
    unfinished.remember(
        store,
        unfinished.Unfinished(
            role="init",
            config="a: 1\n",
            servers={"admin.conf": "https://a:6443"},
            names=("admin.conf",),
            sa_key="k",
            sa_public="p",
        ),
    )
    failures = gate.Failures(count=3, since=NOW, last=NOW, exit_code=6, reason="not there")
    gate.attempts_file(store).replace({"version": 1, "authorities": {"ca": gate._to_json(failures)}})
    history.history_file(store).replace(
        history.to_json(history.History(ended=NOW, exit_code=6, seconds=1.5, failures=3))
    )
    times_file(store).replace({"etcd": NOW.isoformat()})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        store = Store(Path(directory))
        store.prepare()
        signer = Signer.make()
        node(store, signer)
        others(store, signer)
        with tarfile.open(HERE / "open.tar.gz", "w:gz") as tar:
            for path in sorted(path for path in Path(directory).iterdir() if path.is_file()):
                entry = tarfile.TarInfo(path.name)
                entry.size, entry.mode = len(path.read_bytes()), 0o600
                tar.addfile(entry, io.BytesIO(path.read_bytes()))
