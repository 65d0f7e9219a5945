"""
Many nodes ask one door at once: how fast it answers, and what is left of it when everything is killed meanwhile.

`python -m tests.measure.door [--nodes 500] [--kills 12] [--docs]`: first the door (`ca-bridge serve`) beside OpenBao
alone, which signs the same CSRs, three times with its storage on disk and three times in memory; then the door, while
door, CA and database are killed at random: `openssl ca` with SQLite and with PostgreSQL, OpenBao with SQLite. Each node has an address
of its own on the loopback network, and asks again as a node does. `History` is what is checked in the end: each node has
exactly what it asked for, and the CA signed nothing that is not recorded, and nothing twice.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import ssl
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPMessage
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from backends.vault import setup as vault_setup
from backends.vault.settings import DEFAULT_ROLE
from bridge.contract import Issued
from bridge.desk.desk import SIGNED
from bridge.door.store import CERTIFICATES
from bridge.pki.bundle_format import loads_answer, loads_request
from bridge.pki.certificates import serial_hex
from tests.kit import est, openbao
from tests.kit.measured import peak_mb
from tests.kit.opensslca import make_ca_directory
from tests.kit.serving import Database, ServeProgram, add_door
from tests.measure import fleet
from tests.measure.__main__ import NUMBERS, machine, write_between

if TYPE_CHECKING:
    from tests.kit.postgresql import PostgreSql

#: What kubeadm renews on a control-plane node: eleven certificates.
NAMES = (*fleet.NAMES, "super-admin.conf")
MARK = "<!-- door: written by `python -m tests.measure.door --docs` -->"
_POLICY = f"""\
[allow]
clusters = ["{fleet.CLUSTER}"]
nodes = ["cp-*"]
masters = ["super-admin.conf"]
"""
#: Nodes that ask at the same moment: each has a thread here.
_AT_ONCE = 500
_PATIENCE_SECONDS = 900.0
_LONGEST_PAUSE_SECONDS = 30.0
#: Between two kills: long enough that some are in the middle of a round, and others at the start of the program.
_BETWEEN_SECONDS = (0.2, 3.0)
_CA_THREADS = 8
#: Of which the one with the median share is shown.
_ROUNDS = 3
#: Of the CA's own rate.
_LEAST_SHARE = 0.5


# --- the nodes --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Node:
    """One node, which asks until it has its answer."""

    number: int
    bundle: bytes
    port: int
    context: ssl.SSLContext
    answer: bytes = b""
    seconds: list[float] = field(default_factory=list)  #: Of each exchange that was answered.
    failures: Counter[str] = field(
        default_factory=Counter
    )  #: Exchanges without an answer, and answers that say: later.
    took: float = 0.0  #: From the first request to the answer.
    _client: http.client.HTTPSConnection | None = None

    def work(self) -> None:
        """Ask; nothing but an answer or the end of patience ends it."""
        begin, place = time.monotonic(), ""
        with contextlib.closing(self):
            while not self.answer and time.monotonic() - begin < _PATIENCE_SECONDS:
                pause = 0.5
                try:
                    status, headers, body = self._ask("GET", place) if place else self._ask("POST", "/v1/requests")
                except (OSError, http.client.HTTPException) as e:
                    self.failures[type(e).__name__] += 1
                    self.close()
                else:
                    pause = min(float(headers.get("Retry-After") or pause), _LONGEST_PAUSE_SECONDS)
                    if status == http.HTTPStatus.OK:
                        self.answer = body
                    elif status == http.HTTPStatus.ACCEPTED:
                        place = headers.get("Location") or place
                    else:
                        self.failures[f"HTTP {status}"] += 1
                if not self.answer:
                    time.sleep(pause)
        self.took = time.monotonic() - begin

    def _ask(self, method: str, path: str) -> tuple[int, HTTPMessage, bytes]:
        if self._client is None:
            address = f"127.0.{1 + self.number // 250}.{1 + self.number % 250}"
            self._client = http.client.HTTPSConnection(
                "127.0.0.1", self.port, context=self.context, timeout=60, source_address=(address, 0)
            )
        begin = time.monotonic()
        body, kind = (self.bundle, {"Content-Type": "application/json"}) if method == "POST" else (None, {})
        self._client.request(method, path, body, kind)
        answer = self._client.getresponse()
        data = answer.read()
        self.seconds.append(time.monotonic() - begin)
        return answer.status, answer.headers, data

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()
        self._client = None


def all_ask(door: ServeProgram, bundles: Sequence[bytes]) -> list[Node]:
    """All at once, to the end."""
    context = door.context()
    nodes = [Node(number=n, bundle=data, port=door.port, context=context) for n, data in enumerate(bundles)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(node.work) for node in nodes]:
            done.result()
    return nodes


# --- the door and what kills it ---------------------------------------------------------------------------------------


_SQLITE = Database(url="")


def openssl_door(directory: Path, made: fleet.Fleet, database: Database = _SQLITE) -> ServeProgram:
    """A door with a directory of `openssl ca` for each CA."""
    tables = ["[node]", f'state_dir = "{directory / "state"}"', "[backend.desk]", 'type = "openssl"']
    for name, ca in made.cas.items():
        folder = make_ca_directory(directory / "ca" / name, ca.certificate_pem, ca.key_pem)
        tables += [f"[authority.{name}]", 'backend = "desk"', f'dir = "{folder}"']
    return _door(directory, tables, database)


def vault_door(directory: Path, made: fleet.Fleet, bao: openbao.OpenBao) -> ServeProgram:
    """A door with OpenBao behind it."""
    token = directory / "token"
    token.touch(mode=0o600)
    token.write_text(bao.root_token)
    tables = ["[node]", f'state_dir = "{directory / "state"}"', "[backend.bao]", 'type = "vault"', f'url = "{bao.url}"']
    tables += [f'auth = {{ method = "token", token_file = "{token}" }}']
    tables += [f'ca_file = "{bao.verify}"'] if isinstance(bao.verify, Path) else []
    for name, ca in made.cas.items():
        bao.add_ca(name, ca.certificate_pem, ca.key_pem)
        bao.add_roles(name, _roles(made))
        tables += [f"[authority.{name}]", 'backend = "bao"', f'mount = "{name}"', 'role = "kubeadm-{name}"']
    return _door(directory, tables, _SQLITE)


def _roles(made: fleet.Fleet) -> dict[str, dict[str, object]]:
    """One role a certificate for all nodes: which names a node gets is for the door's policy to say."""
    found = vault_setup.roles(made.live, fleet.VALIDITY)
    every = {"allow_any_name": True, "allowed_ip_sans_cidr": ["0.0.0.0/0", "::/0"], "enforce_hostnames": False}
    return {name: role | every for name, role in found.items()}


def _door(directory: Path, tables: Sequence[str], database: Database) -> ServeProgram:
    config = directory / "config.toml"
    config.write_text("\n".join([*tables, ""]))
    (directory / "desk-policy.toml").write_text(_POLICY)
    return add_door(config, directory, database.settings)


@dataclass(kw_only=True)
class Killer:
    """Kills the door, the CA (the `openssl` that it runs, or OpenBao), or PostgreSQL, at random, and starts them again."""

    door: ServeProgram
    kills: int
    dice: random.Random
    server: PostgreSql | None = None  #: None: the database is a file, which dies with the door.
    bao: openbao.OpenBao | None = None  #: None: the CA is `openssl ca`.
    done: Counter[str] = field(default_factory=Counter)
    ended: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        """Until so many were killed, or there is nothing to do any more."""
        for number in range(self.kills):
            if self.ended.wait(self.dice.uniform(*_BETWEEN_SECONDS)):
                return
            if self.server is not None and number % 3 == 1:
                self.server.stop(signal.SIGQUIT)  # at once, as in a crash; SIGKILL would leave its other processes
                self.done["database"] += 1
                self.server.start()
            elif number % 2 or not self._kill_ca():
                self.door.stop(signal.SIGKILL)
                self.done["door"] += 1
                self.door.start()

    def _kill_ca(self) -> bool:
        """Whether a CA ran, and was killed."""
        assert self.door.process is not None
        if self.bao is not None:
            self.bao.stop()
            self.done["CA"] += 1
            self.bao.start_again()
            return True
        deadline = time.monotonic() + _BETWEEN_SECONDS[1]
        while time.monotonic() < deadline and not self.ended.is_set():
            for pid in fleet.family(self.door.process.pid)[1:]:
                with contextlib.suppress(OSError):
                    if Path(f"/proc/{pid}/comm").read_text() == "openssl\n":
                        os.kill(pid, signal.SIGKILL)
                        self.done["CA"] += 1
                        return True
            time.sleep(0.002)
        return False


# --- the history ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class History:
    """What each side knows in the end, by the certificates' serial numbers."""

    asked: int  #: Certificates that all nodes asked for together.
    wrong: list[str]  #: Answers that do not match their requests exactly.
    delivered: list[str]  #: As the nodes have them.
    signed: list[str]  #: As the CA has them.
    recorded: list[str]  #: In the audit log, of this or an earlier run of the door.
    remembered: list[str]  #: In the database.

    def troubles(self) -> Iterator[str]:
        """What must not be."""
        yield from self.wrong
        if len(self.delivered) != self.asked:
            yield f"wanted {self.asked} certificates at the nodes, found {len(self.delivered)}"
        for name in ("delivered", "signed", "remembered"):
            twice = [serial for serial, count in Counter(getattr(self, name)).items() if count > 1]
            if twice:
                yield f"{name} more than once: {', '.join(twice[:5])} ({len(twice)} in all)"
        for one, other in (("signed", "recorded"), ("signed", "delivered"), ("delivered", "remembered")):
            only = set(getattr(self, one)) - set(getattr(self, other))
            if only:
                yield f"{one}, and not {other}: {', '.join(sorted(only)[:5])} ({len(only)} in all)"


def history(directory: Path, nodes: Sequence[Node], signed: Sequence[str], database: Database = _SQLITE) -> History:
    """Read from the answers, from the audit log and from the database; the CA's `signed` serial numbers are given."""
    found = [pair for node in nodes for pair in _delivered(node)]
    log = [json.loads(line) for file in directory.glob("state/audit*.jsonl") for line in file.read_text().splitlines()]
    with (
        contextlib.closing(database.memory(directory / "state")) as memory,
        contextlib.closing(memory.engine.connect()) as connection,
    ):
        remembered = list(connection.execute(sa.select(CERTIFICATES.c.serial)).scalars())
    return History(
        asked=sum(len(loads_request(node.bundle).requests) for node in nodes),
        wrong=[text for text, _ in found if text],
        delivered=[serial for text, serial in found if not text],
        signed=[_short(one) for one in signed],
        recorded=[_short(one["serialNumber"]) for one in log if one["event"] == SIGNED],
        remembered=[_short(one) for one in remembered],
    )


def _signed_by_openssl(directory: Path) -> list[str]:
    rows = [row.split("\t") for file in directory.glob("ca/*/index.txt") for row in file.read_text().splitlines()]
    return [row[3] for row in rows]


def _signed_by(bao: openbao.OpenBao, mounts: Iterable[str]) -> list[str]:
    return [number for mount in mounts for number in bao.request("LIST", f"{mount}/certs").json()["data"]["keys"]]


def _delivered(node: Node) -> Iterator[tuple[str, str]]:
    """For each request what is wrong with its answer, and the serial number of its certificate."""
    asked = loads_request(node.bundle)
    if not node.answer:
        yield f"node {node.number}: no answer after {node.took:.0f} s ({dict(node.failures)})", ""
        return
    answers = loads_answer(node.answer).answers
    for request in asked.requests:
        one = answers.get(request.name)
        if not isinstance(one, Issued):
            yield f"node {node.number}: {request.name}: {one}", ""
        elif _key(one.leaf) != _key(request.csr):
            yield f"node {node.number}: {request.name}: another key", ""
        else:
            yield "", _short(serial_hex(one.leaf))


def _key(one: x509.Certificate | x509.CertificateSigningRequest) -> bytes:
    return one.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _short(serial: str) -> str:
    return serial.replace(":", "").upper().lstrip("0")


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The door, and the CA alone."""

    nodes: int
    certificates: int
    seconds: float
    alone: float  #: The CA alone for as many certificates.
    exchanges: int
    p50: float
    p99: float  #: Of all exchanges, while all ask at once; in seconds.
    megabytes: float

    @property
    def share(self) -> float:
        """Of the CA's own rate."""
        return self.alone / self.seconds

    def column(self) -> tuple[str, ...]:
        """One for each of `ROWS`."""
        rate, bare, share = self.certificates / self.seconds, self.certificates / self.alone, self.share
        return (
            f"{self.seconds:.1f} s",
            f"{rate:.0f}",
            f"{bare:.0f}",
            f"{share:.2f}{'' if share >= _LEAST_SHARE else ', **missed**'}",
            f"{self.exchanges / self.seconds:.0f}",
            f"{1000 * self.p50:.0f} and {1000 * self.p99:.0f} ms",
            f"{self.megabytes:.0f} MB",
        )


ROWS = (
    "time until the last node had its answer",
    "certificates per second through the door",
    f"OpenBao alone, the same CSRs over {_CA_THREADS} connections",
    "the door's rate, divided by OpenBao's",
    "HTTPS exchanges per second",
    "time of an exchange, median and 99th percentile",
    "peak memory of the door",
)


@contextlib.contextmanager
def production(directory: Path) -> Iterator[openbao.OpenBao]:
    """OpenBao as a company runs it: TLS, and each certificate is on disk before it is given out."""
    tls = est.make_tls(directory / "openbao")
    with openbao.tls_server(tls.server_cert, tls.server_key, tls.ca) as bao:
        yield bao


#: OpenBao's ways to run, by the table's words.
SERVERS: Mapping[str, Callable[[Path], contextlib.AbstractContextManager[openbao.OpenBao]]] = {
    "storage on disk (raft), HTTPS": production,
    "in memory, HTTP": lambda _: openbao.dev_server(),
}


def speed_table(speeds: Mapping[str, Speed]) -> str:
    """Markdown; a column for each of `SERVERS`."""
    [first, *_] = speeds.values()
    head = (f"{first.nodes:,} nodes ask at once, {first.certificates:,} certificates; {machine()}", *speeds)
    return _table(head, list(zip(ROWS, *(one.column() for one in speeds.values()), strict=True)))


def measure_speed(directory: Path, nodes: int, serve: contextlib.AbstractContextManager[openbao.OpenBao]) -> Speed:
    """The door and OpenBao alone with the same CSRs, in one run on one machine."""
    made = fleet.make_fleet(nodes, NAMES)
    with serve as bao:
        door = vault_door(directory, made, bao)
        door.start()
        try:
            assert door.process is not None
            begin = time.monotonic()
            asked = all_ask(door, made.bundles)
            seconds = time.monotonic() - begin
            megabytes = sum(map(peak_mb, fleet.family(door.process.pid)))
        finally:
            door.stop()
        wrong = [text for node in asked for text, _ in _delivered(node) if text]
        if wrong:
            raise SystemExit("\n".join(wrong[:10]))
        alone = fleet.seconds(lambda: _bare(bao, made))
    times = sorted(one for node in asked for one in node.seconds)
    return Speed(
        nodes=nodes,
        certificates=len(made.csrs),
        seconds=seconds,
        alone=alone,
        exchanges=len(times),
        p50=statistics.median(times),
        p99=times[int(len(times) * 0.99)],
        megabytes=megabytes,
    )


def _bare(bao: openbao.OpenBao, made: fleet.Fleet) -> None:
    """The same CSRs by requests to the same roles, as a script sends them: no policy, proof, record or check."""
    wanted = [
        (request.authority, request.name, request.csr)
        for data in made.bundles
        for request in loads_request(data).requests
    ]
    parts = [wanted[number::_CA_THREADS] for number in range(_CA_THREADS)]
    port = int(bao.url.rpartition(":")[2])
    context = ssl.create_default_context(cafile=bao.verify) if isinstance(bao.verify, Path) else None

    def connection() -> http.client.HTTPConnection:
        if context is None:
            return http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        return http.client.HTTPSConnection("127.0.0.1", port, timeout=60, context=context)

    def sign(part: Sequence[tuple[str, str, x509.CertificateSigningRequest]]) -> None:
        with contextlib.closing(connection()) as client:
            for authority, name, csr in part:
                body = {"csr": csr.public_bytes(Encoding.PEM).decode(), "ttl": f"{fleet.VALIDITY.total_seconds():.0f}s"}
                path = f"/v1/{authority}/sign/{DEFAULT_ROLE.format(name=name)}"
                client.request("POST", path, json.dumps(body), {"X-Vault-Token": bao.root_token})
                answer = client.getresponse()
                said = answer.read()
                if answer.status != http.HTTPStatus.OK:
                    raise SystemExit(f"OpenBao: HTTP {answer.status} {said[:500]!r}")

    with ThreadPoolExecutor(_CA_THREADS) as pool:
        for done in [pool.submit(sign, part) for part in parts]:
            done.result()


@dataclass(frozen=True, kw_only=True)
class Chaos:
    """A run in which everything was killed."""

    label: str
    seconds: float
    killed: Mapping[str, int]
    failures: Mapping[str, int]
    history: History

    def row(self) -> tuple[str, ...]:
        """For the table."""
        done = ", ".join(f"{what} {count} times" for what, count in sorted(self.killed.items())) or "nothing"
        ours = self.history
        return (
            self.label,
            done,
            f"{self.seconds:.0f} s",
            f"{len(ours.delivered):,} of {ours.asked:,}",
            f"{len(ours.signed):,}",
        )


def measure_chaos(
    directory: Path,
    made: fleet.Fleet,
    kills: int,
    seed: int,
    server: PostgreSql | None = None,
    bao: openbao.OpenBao | None = None,
) -> Chaos:
    """Everything is killed while all nodes ask; SystemExit: the history is not as it has to be."""
    database = _SQLITE if server is None else _database(directory, server)
    door = openssl_door(directory, made, database) if bao is None else vault_door(directory, made, bao)
    door.start()
    dice = random.Random(seed)  # noqa: S311 (a seed repeats a run)
    killer = Killer(door=door, kills=kills, dice=dice, server=server, bao=bao)
    thread, begin = threading.Thread(target=killer.work), time.monotonic()
    thread.start()
    try:
        nodes = all_ask(door, made.bundles)
    finally:
        killer.ended.set()
        thread.join()
        door.stop()
    seconds = time.monotonic() - begin
    signed = _signed_by_openssl(directory) if bao is None else _signed_by(bao, made.cas)
    found = history(directory, nodes, signed, database)
    if troubles := list(found.troubles()):
        raise SystemExit("\n".join(troubles[:20]))
    failures = sum((node.failures for node in nodes), Counter[str]())
    label = f"{'SQLite' if server is None else 'PostgreSQL'}, {'`openssl ca`' if bao is None else 'OpenBao (raft)'}"
    return Chaos(label=label, seconds=seconds, killed=killer.done, failures=failures, history=found)


def _database(directory: Path, server: PostgreSql) -> Database:
    """A new one at the server."""
    from tests.kit.postgresql import PASSWORD  # (the driver is not everywhere)

    password = directory / "database-password"
    password.touch(mode=0o600)
    password.write_text(PASSWORD)
    return Database(url=server.database(), password_file=password)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    from tests.kit import postgresql  # (the driver is not everywhere)

    parser = argparse.ArgumentParser(prog="python -m tests.measure.door")
    parser.add_argument("--nodes", type=int, default=500, help="that ask at once, eleven certificates each")
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--docs", action="store_true")
    options = parser.parse_args(arguments)
    print(f"--seed {options.seed}")
    with tempfile.TemporaryDirectory() as directory:
        speeds = dict[str, Speed]()
        for number, (label, serve) in enumerate(SERVERS.items()):
            rounds = list[Speed]()
            for turn in range(_ROUNDS):
                (speed_in := Path(directory, f"speed-{number}-{turn}")).mkdir()
                rounds.append(measure_speed(speed_in, options.nodes, serve(speed_in)))
            speeds[label] = sorted(rounds, key=lambda one: one.share)[_ROUNDS // 2]
            print(label, *(f"{one.share:.2f}" for one in rounds))
        print(speed_table(speeds))
        runs = list[Chaos]()
        with postgresql.running() as postgres, production(Path(directory, "ca")) as bao:
            for server, ca in ((None, None), (postgres, None), (None, bao)):
                (chaos_in := Path(directory, f"chaos-{len(runs)}")).mkdir()
                made = fleet.make_fleet(options.nodes, NAMES)
                runs.append(measure_chaos(chaos_in, made, options.kills, options.seed, server, ca))
    head = (
        "database and CA",
        "killed by SIGKILL meanwhile",
        "time until the last node had its answer",
        "certificates",
        "signed by the CA",
    )
    text = f"{speed_table(speeds)}\n\n{_table(head, [one.row() for one in runs])}\n"
    print(text, *(dict(one.failures) for one in runs))
    if options.docs:
        write_between(NUMBERS, MARK, text)


if __name__ == "__main__":
    main()
