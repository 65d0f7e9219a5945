"""What the pages of the door show: `ca-bridge serve` with `openssl ca` behind it, a node that asks, and a person who decides."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bridge.door.doors import left_text
from bridge.door.store import UNANSWERED, DoorDatabase, database_file, sqlite_url
from bridge.pki.certificates import pem
from bridge.state import Store, audit
from bridge.system.waiting import wait_until
from tests.kit import est, terminals
from tests.kit.issuing import Signer
from tests.kit.loopback import free_port
from tests.kit.pki import Pki, handmade_pki
from tests.kit.shown import DESK_FILES, ROOT, Machine, Normal, add_cas, typed

DOOR_PAGE, APPROVALS_PAGE = ROOT / "docs/door.md", ROOT / "docs/approvals.md"
_PATIENCE = timedelta(minutes=3)
#: What pages call the two requests that people decide about.
_DIGESTS = ("3f9c2a7be01d4c55", "b71e5d0c94a2f386")

#: At the door's host.
ENROLLED = {
    "enroll": "ca-bridge enroll cp-4",
    "-enroll-alone": "ca-bridge enroll cp-5 --for 8h --certificate kubelet.conf",
    "enrolments": "ca-bridge enrolments list",
    "enrolments-withdraw": "ca-bridge enrolments withdraw 2",
}
#: By the node; of its certificates one is renewed alone, so that it is known which ends first.
FIRST = {"door-doctor": "ca-bridge doctor", "-first": "ca-bridge renew front-proxy-client"}
FLEET = {"fleet": "ca-bridge fleet"}
ASKING = {"door-renew": "ca-bridge renew"}
#: While a request waits for people.
WORKING = {
    "serve-database-status": "ca-bridge serve-database status",
    "serve-database-backup": "ca-bridge serve-database backup /srv/door.db",
}
STOPPED = {"serve-database-restore": "ca-bridge serve-database restore /srv/door.db"}
#: When a door's host is lost, and its CA can't tell what it has signed.
LEFT = {
    "serve-database-left": "ca-bridge serve-database status",
    "serve-database-again": "ca-bridge serve-database again DIGEST",
}
#: By the person, about a request, and about another one.
DECIDED = {
    "approved": {
        "approvals-list": "ca-bridge approvals list",
        "approvals-show": "ca-bridge approvals show DIGEST",
        "approvals-approve": "ca-bridge approvals approve DIGEST",
    },
    "refused": {"approvals-refuse": 'ca-bridge approvals refuse DIGEST --reason "no such change is planned"'},
}


@dataclass(frozen=True, kw_only=True)
class Site:
    """The door's host, the node and the person."""

    door: Machine
    node: Machine
    person: Machine
    normal: Normal

    def typed(self, lines: Mapping[str, str], machine: Machine) -> dict[str, str]:
        """Lines on one machine."""
        return typed(lines, machine, self.normal)

    def set_up_node(self, wait: str) -> None:
        """The page's settings, with how long a run waits for the door's answer."""
        table = _table_of(DOOR_PAGE, "backend").replace("ca_file", f'wait = "{wait}"\nca_file')
        settings = _here(f'[renewal]\nsuper_admin = "by-name"\n{table}', self.normal)
        self.node.write("/etc/ca-bridge/config.toml", settings)

    def asks_people(self, on_page: str) -> str:
        """The digest of a request of the node's that waits for people, which the page calls by another one."""
        self.set_up_node(wait="1s")
        self.node.run("ca-bridge renew super-admin.conf")
        command = self.person.command("ca-bridge approvals list -o json")

        def digests() -> list[str]:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return [str(one["digest"]) for one in json.loads(done.stdout)["requests"]]

        [digest] = wait_until(digests, bool, _PATIENCE, pause_seconds=0.1)
        self.normal.addresses |= {digest: on_page * 4, digest[:16]: on_page}
        return digest[:16]

    def left_to_people(self) -> str:
        """The digest of a request that a door on another host had begun, as a door leaves it that finds it so."""
        store = Store(self.door.root / "var/lib/ca-bridge")
        with contextlib.closing(DoorDatabase(sqlite_url(database_file(store)))) as memory:
            [one] = memory.in_state("undecided")
            text = left_text(replace(one, signer="gone"), {"gone": "ca-door-1"})
            memory.move(one.id, "left", before=UNANSWERED, note=text)
        return one.digest[:16]


def blocks(directory: Path) -> dict[str, str]:
    """By name: what each block shows."""
    site = make_site(directory)
    with serving(site) as said:
        found = {"serve": said}
        for lines, machine in ((ENROLLED, site.door), (FIRST, site.node), (FLEET, site.door), (ASKING, site.node)):
            found |= site.typed(lines, machine)
        for (verdict, lines), on_page in zip(DECIDED.items(), _DIGESTS, strict=True):
            digest = site.asks_people(on_page)
            site.normal.addresses["the request is answered"] = f"the request is {verdict}"  # the CA may be that fast
            if verdict == "approved":
                found |= site.typed(WORKING, site.door)
            found |= site.typed({name: line.replace("DIGEST", digest) for name, line in lines.items()}, site.person)
            site.set_up_node(wait="2m")
            site.node.run("ca-bridge renew super-admin.conf")  # which takes the answer
    found |= site.typed(STOPPED, site.door)
    digest = site.left_to_people()
    return found | site.typed({name: line.replace("DIGEST", digest) for name, line in LEFT.items()}, site.door)


@contextlib.contextmanager
def serving(site: Site) -> Iterator[str]:
    """The door at work, and what it says until then."""
    line = "ca-bridge serve"
    with terminals.working(site.door.command(line, is_server=True), "serving at port") as said:
        yield f"$ {line}\n{site.normal.of(said)}"


def make_site(directory: Path) -> Site:
    """With the settings and the policy of the pages, but for the port and the person's directory."""
    normal, port, now = Normal(), free_port(), datetime.now(UTC)
    normal.addresses |= {
        f"https://127.0.0.1:{port}": "https://ca-door.corp.example:9443",
        f"127.0.0.1:{port}": "0.0.0.0:9443",
        f"at port {port}": "at port 9443",
        "/etc/ca-bridge/alice": "/home/alice/alice",
        f"by {audit.person()}": "by root",
    }
    tls = est.make_tls(directory / "tls", left=timedelta(days=365))
    begin, end = now - timedelta(days=345), now + timedelta(days=20)
    pki = handmade_pki(directory / "cp-1", now=begin, not_after=end, extra_sans=())
    node = Machine(directory / "cp-1", "cp-1", is_alone=False)
    people = Signer.make("security-team", begin=now - timedelta(days=1), end=now + timedelta(days=3))
    person = Machine(directory / "office", "office", is_alone=False)
    person.write("/etc/ca-bridge/config.toml", _here(_table_of(APPROVALS_PAGE, "approver"), normal))
    alice = tls.agent("alice", signer=people)
    for path, file in ((node, tls.ca), (person, tls.ca)):
        path.write("/etc/ca-bridge/door-ca.crt", file.read_text(encoding="utf-8"), 0o644)
    person.write("/etc/ca-bridge/alice.crt", alice["client_cert"].read_text(encoding="utf-8"), 0o644)
    person.write("/etc/ca-bridge/alice.key", alice["client_key"].read_text(encoding="utf-8"))
    door = _door(directory / "ca-door", pki, tls, normal)
    door.write("/etc/ca-bridge/people.crt", pem(people.certificate).decode(), 0o644)
    site = Site(door=door, node=node, person=person, normal=normal)
    site.set_up_node(wait="2m")
    return site


def _door(root: Path, pki: Pki, tls: est.Tls, normal: Normal) -> Machine:
    machine = Machine(root, "ca-door", is_alone=False)
    settings = (DESK_FILES / "config.toml").read_text(encoding="utf-8")
    table = _table_of(DOOR_PAGE, "serve") + 'approvers_ca = "/etc/ca-bridge/people.crt"\n'
    policy = (DESK_FILES / "desk-policy.toml").read_text(encoding="utf-8")
    machine.write("/etc/ca-bridge/config.toml", _here(f"{settings}\n{table}", normal))
    machine.write("/etc/ca-bridge/desk-policy.toml", f"{policy}\n{_table_of(APPROVALS_PAGE, 'approvals')}")
    machine.write("/etc/ca-bridge/serve.crt", tls.server_cert.read_text(encoding="utf-8"), 0o644)
    machine.write("/etc/ca-bridge/serve.key", tls.server_key.read_text(encoding="utf-8"))
    add_cas(machine, pki, settings)
    return machine


def _here(settings: str, normal: Normal) -> str:
    for ours, on_page in normal.addresses.items():
        settings = settings.replace(on_page, ours)
    return settings


def _table_of(page: Path, table: str) -> str:
    """The page's first block of settings that begins with a table of this name."""
    found = re.findall(rf"```toml\n( *\[{table}[\].].*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return "\n".join(line.strip() for line in str(found[0]).splitlines()) + "\n"
