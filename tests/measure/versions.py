"""
What files alone decide, asked of the real kubeadm of four versions: names, and what it says to a set that we have made.

`python -m tests.measure.versions [--docs] [VERSION ...]` runs `certs generate-csr`, `init phase certs`, `init phase
kubeconfig`, `certs check-expiration` and `certs renew` of each kubeadm over directories that take the place of a node's
root; `tests/kit/binaries.sh --older VERSION kubeadm` builds the older ones.
It ends with an error where ca-bridge and a kubeadm do not agree; with `--docs` what was seen goes into docs/evidence/versions.md.
Needs the Python of `.cache/venv-test`, which `scripts/test` made; no root, and no cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from bridge.bootstrap import keys, shared
from bridge.bootstrap.orders import Order, new_node
from bridge.node import kubeconfig
from bridge.node.kubeadm_config import parse_documents as parse
from bridge.pki.certificates import attributes, load_pem_certificates, san_entries
from bridge.specs import AUTHORITIES, SPECS
from tests.kit import programs
from tests.kit.issuing import Signer, signed_again
from tests.kit.new_node import ADDRESS, CONFIG, NAME, NewNode
from tests.measure.__main__ import write_between

DOCUMENT = Path(__file__).parents[2] / "docs/evidence/versions.md"
START = "<!-- numbers: written by `python -m tests.measure.versions --docs` -->"
OLDER, NEWEST = ("1.34", "1.35", "1.36"), "1.37"
#: What kubeadm renews and lists: not the kubelet's.
LISTED = [name for name, spec in SPECS.items() if spec.listed]
KUBELET_CLIENT = "apiserver-kubelet-client"
EXPIRED = "front-proxy-client"
_ORGANIZATION = "2.5.4.10"
#: With all that names are made of.
_CONFIG = f"{CONFIG}networking: {{serviceSubnet: 10.112.0.0/12, dnsDomain: x.example}}\n"

#: Subject and SANs, each in an order of its own.
Names = tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]


@dataclass(kw_only=True)
class Seen:
    """One version's column."""

    kubeadm: str
    cells: dict[str, str] = field(default_factory=dict)

    def add(self, what: str, seen: object) -> None:
        """A cell; and on standard output, so that a walk that ends early has said something."""
        self.cells[what] = str(seen).replace("|", "/")
        print(f"{self.kubeadm}: {what}: {seen}", flush=True)


def directory_of(minor: str, newest: Path) -> Path:
    """Where the kubeadm of a minor release is."""
    return newest if minor == NEWEST else Path(f"{newest}-{minor}")


def version_of(directory: Path) -> str:
    """What the kubeadm in there says that it is; `none`: there is none."""
    program = directory / "kubeadm"
    if not program.exists():
        return "none"
    command = [str(program), "version", "-o", "short"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def names_of(one: x509.Certificate | x509.CertificateSigningRequest) -> Names:
    """The names of a certificate or a CSR."""
    return tuple(sorted(attributes(one.subject))), tuple(sorted(san_entries(one)))


def groups_of(one: x509.Certificate | x509.CertificateSigningRequest) -> str:
    """The O values, for people."""
    return ", ".join(value for oid, value in attributes(one.subject) if oid == _ORGANIZATION) or "none"


@dataclass(kw_only=True)
class Walk:
    """One version's kubeadm, and a node of its own."""

    version: str
    directory: Path
    seen: Seen
    asked: dict[str, Names] = field(default_factory=dict)  #: What this kubeadm asks for, by certificate.

    def run(self) -> None:
        """
        All of it.

        Raises:
            AssertionError: ca-bridge and this kubeadm do not agree.
        """
        self._generated()
        node = NewNode.make(self.directory / "node")
        run = node.init(config=self._config())
        assert run.returncode == 0, run.stderr
        self._accepted(node, "`bootstrap init`, then `init phase certs all` and `kubeconfig all`")
        self._listed(node)
        self._not_renewed(node)
        self._made_anew(node)
        self._missed(node)
        self._expired(node)

    def _config(self) -> str:
        return _CONFIG.replace("v1.37.2", self.version)

    def _generated(self) -> None:
        """`certs generate-csr` beside the names that we tell a CA's administrator before any key exists."""
        place = self.directory / "generated"
        place.mkdir(parents=True)
        (place / "kubeadm.yaml").write_text(self._config())
        command = [str(programs.require("kubeadm")), "certs", "generate-csr", "--config", str(place / "kubeadm.yaml")]
        subprocess.run(
            [*command, "--cert-dir", str(place / "pki"), "--kubeconfig-dir", str(place)],
            check=True,
            capture_output=True,
        )
        order = Order(
            cluster=shared(parse(self._config().encode())), authorities={}, node=new_node("init", NAME, [ADDRESS])
        )
        ours = {
            name: one
            for ones in keys.expected_certificates(order, datetime.now(UTC)).values()
            for name, one in ones.items()
        }
        requests: dict[str, x509.CertificateSigningRequest] = {}
        for name in (*LISTED, "kubelet.conf"):
            path = place / (f"{name}.csr" if SPECS[name].kubeconfig else f"pki/{SPECS[name].base}.csr")
            requests[name] = x509.load_pem_x509_csr(path.read_bytes())
        self.asked = {name: names_of(one) for name, one in requests.items()}
        differing = [name for name in self.asked if self.asked[name] != names_of(ours[name])]
        self.seen.add("CSRs of `certs generate-csr`", len(list(place.rglob("*.csr"))))
        self.seen.add("… whose subject or SANs differ from those that `bootstrap setup` prints", len(differing))
        self.seen.add(f"… groups (O) of {KUBELET_CLIENT}", groups_of(requests[KUBELET_CLIENT]))
        assert not differing, differing

    def _accepted(self, node: NewNode, what: str) -> None:
        """kubeadm's phases find everything, and write nothing."""
        before = node.files()
        phases = [node.phase("certs", "all"), node.phase("kubeconfig", "all")]
        said = "".join(run.stdout for run in phases)
        changed = [path for path, data in node.files().items() if before.get(path) != data]
        self.seen.add(what, f"exit {phases[0].returncode} and {phases[1].returncode}, {len(changed)} files written")
        assert [run.returncode for run in phases] == [0, 0], phases
        assert (changed, "Generating" in said) == ([], False), (changed, said)
        assert said.count("Using existing") == len(AUTHORITIES) + 7 + 1, said  # and the service account key
        assert said.count("Using user provided") == 5, said

    def _listed(self, node: NewNode) -> None:
        """`certs check-expiration` beside what the files say."""
        run = self._certs(node, "check-expiration", "-o", "json")
        assert run.returncode == 0, run.stderr
        reported = json.loads(run.stdout[run.stdout.index("{") :])
        theirs = {one["name"]: one["expirationDate"] for one in reported["certificates"] if not one.get("missing")}
        ours = {name: f"{_live(node, name).not_valid_after_utc:%Y-%m-%dT%H:%M:%SZ}" for name in LISTED}
        external = sum(one["externallyManaged"] for one in reported["certificates"])
        text = f"exit 0, {len(theirs)} certificates, {external} of an external CA"
        self.seen.add("`certs check-expiration`", text)
        assert theirs == ours, (theirs, ours)
        assert external == len(LISTED), reported

    def _not_renewed(self, node: NewNode) -> None:
        """`certs renew all` has no CA key, says so of each, and leaves everything as it is."""
        before = node.files()
        run = self._certs(node, "renew", "all")
        refused = run.stdout.count("can't be renewed")
        changed = [path for path, data in node.files().items() if before.get(path) != data]
        self.seen.add(
            "`certs renew all`",
            f"exit {run.returncode}, `… can't be renewed` {refused} times, {len(changed)} files changed",
        )
        self.seen.add("… and its last message", f"`{run.stdout.strip().splitlines()[-1].partition('.')[0]}`")
        assert (refused, changed) == (len(LISTED), []), run.stdout

    def _made_anew(self, node: NewNode) -> None:
        """Each certificate that kubeadm lists, missing: `renew NAME` makes it with the names of this kubeadm."""
        for phase in (("control-plane", "all"), ("etcd", "local")):
            assert node.phase(*phase).returncode == 0
        for path in node.places.kubeconfigs.glob("manifests/*.yaml"):
            path.write_text(path.read_text().replace("/etc/kubernetes", str(node.places.kubeconfigs)))
        texts = {name: _without_data(node, name) for name in LISTED if SPECS[name].kubeconfig}
        for name in LISTED:
            _file(node, name).unlink()
            _file(node, name).with_suffix(".key").unlink(missing_ok=True)
        run = node.bridge.run("renew", *LISTED, "--kubeadm-config", str(node.places.kubeadm_config))
        assert run.returncode == 0, run.stderr
        differing = [name for name in LISTED if names_of(_live(node, name)) != self.asked[name]]
        self.seen.add("missing certificates that `renew NAME` made", len(LISTED))
        self.seen.add("… whose names differ from this kubeadm's", len(differing))
        assert not differing, differing
        assert texts == {name: _without_data(node, name) for name in texts}
        shutil.rmtree(node.places.kubeconfigs / "manifests")
        self._accepted(node, "… then `init phase certs all` and `kubeconfig all`")

    def _missed(self, node: NewNode) -> None:
        """What kubeadm does not look at, and `bootstrap check` does."""
        for name in ("sa.key", "etcd/server.key"):
            path = node.places.pki / name
            data = path.read_bytes()
            path.unlink()
            theirs, ours = node.phase("certs", "all"), node.run("check")
            path.write_bytes(data)
            path.chmod(0o600)
            self.seen.add(
                f"{name} missing", f"kubeadm: exit {theirs.returncode}; `bootstrap check`: exit {ours.returncode}"
            )
            assert (ours.returncode, f"{name}: wanted" in ours.stderr) == (5, True), ours.stderr
        path = node.places.pki / "ca.crt"
        data = path.read_bytes()
        path.unlink()
        ours, theirs = node.run("check"), node.phase("certs", "all")
        own = node.places.pki / "ca.key"
        self.seen.add(
            "ca.crt missing", "kubeadm makes a CA of its own" if own.exists() else f"exit {theirs.returncode}"
        )
        assert (ours.returncode, "kubeadm would make a CA of its own" in ours.stderr) == (5, True), ours.stderr
        assert own.exists(), "the warning of `bootstrap check` is wrong for this kubeadm"
        own.unlink()
        path.write_bytes(data)

    def _expired(self, node: NewNode) -> None:
        """One certificate that has ended, and what `certs check-expiration` then says of all."""
        path = _file(node, EXPIRED)
        signer = Signer.load(*node.cas.ca_pem(SPECS[EXPIRED].authority.name))
        path.write_bytes(signed_again(_live(node, EXPIRED), signer, end=datetime.now(UTC) - timedelta(minutes=5)))
        theirs = self._certs(node, "check-expiration")
        ours = node.bridge.run("check-expiration")
        self.seen.add(
            f"{EXPIRED} expired: `certs check-expiration`, `ca-bridge check-expiration`",
            f"exit {theirs.returncode}, {_rows(theirs.stdout)} of {len(LISTED)} listed; "
            f"exit {ours.returncode}, {_rows(ours.stdout)} of {len(LISTED)}",
        )
        assert _rows(ours.stdout) == len(LISTED), ours.stdout
        renewed = node.bridge.run("renew", EXPIRED)
        assert renewed.returncode == 0, renewed.stderr
        assert self._certs(node, "check-expiration").returncode == 0

    def _certs(self, node: NewNode, *args: str) -> subprocess.CompletedProcess[str]:
        return node.kubeadm("certs", *args, "--config", "/etc/kubernetes/kubeadm.yaml")


def _file(node: NewNode, name: str) -> Path:
    spec = SPECS[name]
    return node.places.kubeconfigs / spec.base if spec.kubeconfig else node.places.pki / f"{spec.base}.crt"


def _live(node: NewNode, name: str) -> x509.Certificate:
    data = _file(node, name).read_bytes()
    return load_pem_certificates((kubeconfig.parse(data).certificate_data or b"") if SPECS[name].kubeconfig else data)[
        0
    ]


def _without_data(node: NewNode, name: str) -> list[str]:
    return sorted(line.strip(" -") for line in _file(node, name).read_text().splitlines() if "client-" not in line)


def _rows(text: str) -> int:
    """How many certificates a table lists."""
    first = [line.split()[0] for line in text.splitlines() if line.strip()]
    return len(set(LISTED) & set(first))


def table(columns: Sequence[Seen]) -> str:
    """For the document: a column a version."""
    what = list(dict.fromkeys(key for one in columns for key in one.cells))
    return "".join(
        [
            f"| checked | {' | '.join(one.kubeadm for one in columns)} |\n",
            f"| --- |{' --- |' * len(columns)}\n",
            *(f"| {row} | {' | '.join(one.cells.get(row, '-') for one in columns)} |\n" for row in what),
        ]
    )


def walk(directory: Path, minors: Iterable[str], newest: Path) -> list[Seen]:
    """
    One column a version.

    Raises:
        AssertionError: As for `Walk.run`.
    """
    columns = []
    for minor in minors:
        os.environ["KUBE_BIN_DIR"] = str(directory_of(minor, newest))
        version = version_of(programs.directory())
        columns.append(Seen(kubeadm=version.removeprefix("v")))
        Walk(version=version, directory=directory / minor, seen=columns[-1]).run()
    return columns


def main(arguments: Sequence[str] | None = None) -> None:
    """Walk, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.measure.versions")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"such as {NEWEST}; without one all")
    options = parser.parse_args(arguments)
    minors = options.versions or [*OLDER, NEWEST]
    newest = programs.directory()
    for minor in minors:
        if not version_of(directory_of(minor, newest)).startswith(f"v{minor}."):
            option = "" if minor == NEWEST else f" --older {minor}"
            parser.error(f"wanted kubeadm {minor}: run {programs.COMMAND}{option} kubeadm")
    with tempfile.TemporaryDirectory() as directory:
        text = table(walk(Path(directory), minors, newest))
    print(text)
    if options.docs:
        write_between(DOCUMENT, START, text)


if __name__ == "__main__":
    main()
