"""
Clients of three API servers while CAs are replaced, and what each was answered: a refusal of a certificate apart from a
server that is away, and from one that is slow.

OpenSSL is the TLS of all of them but `kubectl`; each request is a new connection, but for the pulse, the watch, and
`kubectl logs -f`.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import json
import os
import signal
import ssl
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from bridge.node import kubeconfig
from bridge.specs import SPECS
from tests.kit.looking import API_PORT, TRAFFIC, Extension, extension
from tests.kit.node import Node
from tests.kit.node import directory as node_directory

_TIMEOUT = 10.0
_ANYTHING = "/apis/looking.example.com/v1/anything"
_CONF = "/etc/kubernetes/admin.conf"


class Answer(Enum):
    """How a request ended."""

    SERVED = "served"
    SLOW = "too late"  #: No answer within 10 s, from a server that took the connection.
    AWAY = "away"  #: No server there, one that closes, or that says so itself (5xx).
    LOADING = "answered 403"  #: A server that has not read its rights yet.
    UNKNOWN = "answered 401"  #: The client's certificate is not known.
    TLS = (
        "refused by TLS"  #: The server's certificate is not trusted, or the server ends the handshake for the client's.
    )


REFUSALS = (Answer.UNKNOWN, Answer.TLS)


def of_status(status: int) -> Answer:
    """What an HTTP status says."""
    if status == http.client.UNAUTHORIZED:
        return Answer.UNKNOWN
    if status == http.client.FORBIDDEN:
        return Answer.LOADING
    return Answer.AWAY if status >= http.client.INTERNAL_SERVER_ERROR else Answer.SERVED


def of_error(error: Exception) -> Answer:
    """What an exception says."""
    if isinstance(error, TimeoutError):
        return Answer.SLOW
    closed = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
    is_refusal = isinstance(error, ssl.SSLError) and not isinstance(error, closed)
    return Answer.TLS if is_refusal else Answer.AWAY


def of_words(text: str) -> Answer:
    """What kubectl says."""
    words = {
        Answer.UNKNOWN: ("Unauthorized", "must be logged in", "the server has asked for the client to provide"),
        Answer.TLS: ("x509:", "tls: "),
        Answer.SLOW: ("timeout", "timed out", "deadline exceeded"),
        Answer.LOADING: ("Forbidden", "forbidden"),
    }
    return next((one for one, parts in words.items() if any(part in text for part in parts)), Answer.AWAY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request."""

    client: str
    server: str  #: The node's name.
    begin: float
    end: float
    answer: Answer
    text: str = ""


@dataclass(kw_only=True)
class Record:
    """The record of all clients, in the order in which requests ended."""

    asked: list[Asked] = field(default_factory=list)

    def add(self, client: str, server: str, begin: float, answer: Answer, text: str = "") -> None:
        """One request that has just ended."""
        one = Asked(client=client, server=server, begin=begin, end=time.monotonic(), answer=answer, text=text[-300:])
        self.asked.append(one)

    def between(self, begin: float, end: float) -> Record:
        """The requests that began in this time."""
        return Record(asked=[one for one in list(self.asked) if begin <= one.begin < end])

    def counts(self, client: str) -> Counter[Answer]:
        """By answer."""
        return Counter(one.answer for one in self.asked if one.client == client)

    def refused(self, *clients: str) -> list[Asked]:
        """Certificates that were not taken, on either side."""
        return [one for one in self.asked if one.client in clients and one.answer in REFUSALS]

    def dark(self, client: str, servers: Sequence[str], *, but: Sequence[Answer] = ()) -> float:
        """
        The longest time, in seconds, without any server for a client that asks all of them all the time: from the first
        request that none of them serves to the first one that one does.

        Args:
            client: Its name.
            servers: All of them.
            but: Answers that do not count as a server that is not there.
        """
        away: list[tuple[float, int]] = []
        for server in servers:
            since: float | None = None
            for one in (each for each in self.asked if each.client == client and each.server == server):
                if one.answer is Answer.SERVED or one.answer in but:
                    if since is not None:
                        away += [(since, 1), (one.begin, -1)]
                    since = None
                elif since is None:
                    since = one.begin
            if since is not None:
                away += [(since, 1), (time.monotonic(), -1)]
        longest, now, begin = 0.0, 0, 0.0
        for moment, step in sorted(away):
            if now == len(servers) and step < 0:
                longest = max(longest, moment - begin)
            now += step
            begin = moment if now == len(servers) and step > 0 else begin
        return longest


# --- what they show and trust ----------------------------------------------------------------------------------------


def context_of(conf: bytes, trusted: bytes | None = None) -> ssl.SSLContext:
    """A client with a kubeconfig's certificate that trusts its CA data, or these certificates (PEM)."""
    cas = trusted or kubeconfig.ca_data(conf) or b""
    context = ssl.create_default_context(cadata=cas.decode())
    with tempfile.NamedTemporaryFile() as file:
        file.write((kubeconfig.parse(conf).certificate_data or b"") + (kubeconfig.key_data(conf) or b""))
        file.flush()
        context.load_cert_chain(file.name)
    return context


def status_of(context: ssl.SSLContext, address: str, path: str, port: int = API_PORT) -> int:
    """GET on a new connection."""
    with contextlib.closing(http.client.HTTPSConnection(address, port, context=context, timeout=_TIMEOUT)) as opened:
        opened.request("GET", path)
        response = opened.getresponse()
        response.read()
        return response.status


# --- the clients -----------------------------------------------------------------------------------------------------

_Turn = Callable[[Node], tuple[Answer, str]]


@dataclass(kw_only=True)
class Clients:
    """All of them; each has a thread, or one for each server."""

    nodes: Sequence[
        Node
    ]  #: The control planes; the first one's `admin.conf` is the new kubeconfig, as it is at the time.
    extension: Extension
    old_conf: bytes
    both: bytes  #: The old CA's certificate and the new one's.
    record: Record = field(default_factory=Record)
    ended: Counter[str] = field(default_factory=Counter)  #: Streams that ended.
    stop: threading.Event = field(default_factory=threading.Event)

    def threads(self) -> Iterator[Callable[[], None]]:
        """What each does until the end."""
        turns: dict[str, tuple[float, _Turn]] = {
            NEW: (0.4, self._with(lambda: context_of(self._new_conf()))),
            OLD: (0.4, self._with(functools.cache(lambda: context_of(self.old_conf, self.both)))),
            AS_IT_WAS: (1.0, self._with(functools.cache(lambda: context_of(self.old_conf)))),
            AGGREGATED: (1.0, self._with(lambda: context_of(self._new_conf()), _ANYTHING)),
            LOGS: (4.0, lambda node: self._kubectl(node, "logs", "--tail=1", POD)),
            EXEC: (4.0, lambda node: self._kubectl(node, "exec", POD, "--", PYTHON, "-c", "print('here')")),
        }
        for name, (pause, turn) in turns.items():
            yield functools.partial(self._in_turn, name, pause, turn)
        for node in self.nodes:
            yield functools.partial(self._pulse, node)
        yield self._watch
        yield self._follow

    def _new_conf(self) -> bytes:
        return (self.nodes[0].kubeconfig_dir / "admin.conf").read_bytes()

    def _in_turn(self, name: str, pause: float, turn: _Turn) -> None:
        for node in itertools.cycle(self.nodes):
            if self.stop.wait(pause):
                return
            begin = time.monotonic()
            self.record.add(name, node.name, begin, *turn(node))

    def _with(self, context: Callable[[], ssl.SSLContext], path: str = "/api") -> _Turn:
        def turn(node: Node) -> tuple[Answer, str]:
            try:
                status = status_of(context(), node.ip, path)
            except (OSError, http.client.HTTPException) as e:
                return of_error(e), repr(e)
            return of_status(status), str(status)

        return turn

    def _kubectl(self, node: Node, *args: str) -> tuple[Answer, str]:
        server = f"https://{node.ip}:{API_PORT}"
        try:
            run = self.nodes[0].exec(
                "kubectl", "--kubeconfig", _CONF, "--server", server, *args, check=False, timeout_seconds=30
            )
        except subprocess.TimeoutExpired as e:
            return Answer.SLOW, str(e)
        return (Answer.SERVED, "") if run.returncode == 0 else (of_words(run.stderr), run.stderr)

    def _pulse(self, node: Node) -> None:
        """Ask one server ten times a second, on a connection that is kept as long as the kubeconfig stays the same."""
        path = f"/api/v1/namespaces/default/configmaps/{TRAFFIC}"
        opened, used = http.client.HTTPSConnection(node.ip), b""
        while not self.stop.wait(0.1):
            begin = time.monotonic()
            try:
                if used != (conf := self._new_conf()):
                    opened.close()
                    opened = http.client.HTTPSConnection(node.ip, API_PORT, context=context_of(conf), timeout=_TIMEOUT)
                    used = conf
                opened.request("GET", path)
                response = opened.getresponse()
                response.read()
                found, text = of_status(response.status), str(response.status)
            except (OSError, http.client.HTTPException) as e:
                found, text = of_error(e), repr(e)
                opened.close()
            self.record.add(PULSE, node.name, begin, found, text)
        opened.close()

    def _watch(self) -> None:
        """A watch of what is written all the time; a second of it is a turn."""
        path = f"/api/v1/namespaces/default/configmaps?watch=1&fieldSelector=metadata.name={TRAFFIC}"
        for node in itertools.cycle(self.nodes):
            begin = time.monotonic()
            try:
                context = context_of(self._new_conf())
                opened = http.client.HTTPSConnection(node.ip, API_PORT, context=context, timeout=_TIMEOUT)
                with contextlib.closing(opened):
                    opened.request("GET", path)
                    response = opened.getresponse()
                    if response.status != http.client.OK:
                        self.record.add(WATCH, node.name, begin, of_status(response.status), str(response.status))
                        continue
                    while response.readline() and not self.stop.is_set():
                        if time.monotonic() > begin + 1:
                            self.record.add(WATCH, node.name, begin, Answer.SERVED)
                            begin = time.monotonic()
                    self.ended[WATCH] += not self.stop.is_set()
            except TimeoutError as e:  # nothing is written between two commands, or this server's etcd is away
                self.record.add(WATCH, node.name, begin, Answer.SLOW, repr(e))
            except (OSError, http.client.HTTPException, ValueError) as e:
                self.ended[WATCH] += 1
                self.record.add(WATCH, node.name, begin, of_error(e), repr(e))
            if self.stop.wait(0.1):
                return

    def _follow(self) -> None:
        """`kubectl logs -f` of the pod, whose lines are what the pod was answered."""
        for node in itertools.cycle(self.nodes):
            script, log = Path(__file__).parents[1] / "kit/node.sh", node_directory() / self.nodes[0].name / "follow"
            server = ("--kubeconfig", _CONF, "--server", f"https://{node.ip}:{API_PORT}")
            command = [str(script), "exec", self.nodes[0].name, "kubectl", *server, "logs", "-f", "--since=1s", POD]
            begin = time.monotonic()
            with (
                log.open("wb") as errors,
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True) as process,
            ):
                threading.Thread(target=self._end, args=(process,), daemon=True).start()
                for line in process.stdout or ():
                    with contextlib.suppress(ValueError, KeyError):
                        said = json.loads(line)
                        self.record.add(said["client"], said["server"], begin, Answer(said["answer"]), said["text"])
                    begin = time.monotonic()
            if self.stop.wait(1):
                return
            self.ended[FOLLOW] += 1
            words = log.read_text(errors="replace")
            self.record.add(FOLLOW, node.name, begin, of_words(words) if words else Answer.AWAY, words)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """At the end of all, end what was started as a group, unless it has ended before."""
        self.stop.wait()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)


NEW, OLD, AS_IT_WAS = (
    "the node's current kubeconfig",
    "an old client certificate, both CAs trusted",
    "an old kubeconfig",
)
AGGREGATED, LOGS, EXEC = "an aggregated API", "`kubectl logs`", "`kubectl exec`"
PULSE, WATCH, FOLLOW = "ten reads a second on one connection", "a watch", "`kubectl logs -f`"
POD_FILE, POD_ONCE = "a pod that reads its CA for each request", "a pod that read its CA once"

#: Their certificates are right, and the CAs that they trust, until the first node begins with `drop`.
VALID_UNTIL_DROP = (NEW, OLD, AGGREGATED, LOGS, EXEC, PULSE, WATCH, POD_FILE, POD_ONCE)
#: … and to the end.
VALID = tuple(name for name in VALID_UNTIL_DROP if name != OLD)

# --- the pod ---------------------------------------------------------------------------------------------------------

POD, PYTHON = "client", "/usr/bin/python3"
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
#: Runs in the pod, by this machine's Python.
_PROGRAM = f"""\
import http.client, itertools, json, ssl, sys, time
once = ssl.create_default_context(cafile="{_ACCOUNT}/ca.crt")
def ask(server, context):
    opened = http.client.HTTPSConnection(server, {API_PORT}, context=context, timeout={_TIMEOUT})
    try:
        token = open("{_ACCOUNT}/token").read()
        opened.request("GET", "/api", headers={{"Authorization": "Bearer " + token}})
        status = opened.getresponse().status
        kinds = {{401: {Answer.UNKNOWN.value!r}, 403: {Answer.LOADING.value!r}}}
        return kinds.get(status, "away" if status >= 500 else "served"), str(status)
    except TimeoutError as e:
        return "too late", repr(e)
    except (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError) as e:
        return "away", repr(e)
    except ssl.SSLError as e:
        return {Answer.TLS.value!r}, repr(e)
    except (OSError, http.client.HTTPException) as e:
        return "away", repr(e)
    finally:
        opened.close()
for name, address in itertools.cycle(zip(sys.argv[1::2], sys.argv[2::2])):
    fresh = ssl.create_default_context(cafile="{_ACCOUNT}/ca.crt")
    for client, context in (({POD_FILE!r}, fresh), ({POD_ONCE!r}, once)):
        answer, text = ask(address, context)
        print(json.dumps({{"client": client, "server": name, "answer": answer, "text": text}}), flush=True)
    time.sleep(0.5)
"""


def start_pod(nodes: Sequence[Node], worker: Node) -> None:
    """A pod on the worker with a service account, in the worker's network, that asks all API servers in turn."""
    [reference] = {one.read_text().strip() for one in node_directory().glob("images-*/pause.reference")}
    places = ("/usr", "/lib", "/lib64")
    volumes = [{"name": f"host{i}", "hostPath": {"path": path}} for i, path in enumerate(places)]
    mounts = [{"name": f"host{i}", "mountPath": path, "readOnly": True} for i, path in enumerate(places)]
    servers = [word for node in nodes for word in (node.name, node.ip)]
    container = {
        "name": "it", "image": reference, "imagePullPolicy": "Never", "volumeMounts": mounts,
        "command": [PYTHON, "-u", "-c", _PROGRAM, *servers],
    }  # fmt: skip
    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": POD},
        "spec": {
            "nodeName": worker.name, "hostNetwork": True, "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}], "volumes": volumes, "containers": [container],
        },
    }  # fmt: skip
    file = node_directory() / nodes[0].name / "pod.json"
    file.write_text(json.dumps(pod))
    nodes[0].kubectl("delete", "pod", "--ignore-not-found", "--wait=true", POD)
    nodes[0].kubectl("apply", "-f", str(file))
    nodes[0].kubectl("wait", "--for=condition=Ready", "--timeout=100s", f"pod/{POD}")


def cas_in_pod(node: Node, worker: Node) -> int:
    """How many CAs the pod's own file has at this moment."""
    uid = node.kubectl("get", "pod", POD, "-o", "jsonpath={.metadata.uid}").stdout
    volumes = worker.root / "var/lib/kubelet/pods" / uid / "volumes/kubernetes.io~projected"
    # The kubelet's mount is on the node alone.
    found = worker.exec("sh", "-c", f"cat {Path('/') / volumes.relative_to(worker.root)}/*/ca.crt", check=False)
    return found.stdout.count("BEGIN CERTIFICATE")


@contextlib.contextmanager
def aggregated(nodes: Sequence[Node], directory: Path) -> Iterator[Extension]:
    """An aggregated API that reads the CA of the API servers' client certificate as its library does: from the ConfigMap."""
    latest, stop = _request_header_ca(nodes[0]), threading.Event()

    def follow() -> None:
        nonlocal latest
        for node in itertools.cycle(nodes):
            if stop.wait(0.5):
                return
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                latest = _request_header_ca(node)

    thread = threading.Thread(target=follow)
    thread.start()
    directory.mkdir(parents=True)
    try:
        with extension(nodes[0], directory, lambda: latest) as found:
            yield found
    finally:
        stop.set()
        thread.join()


def _request_header_ca(node: Node) -> str:
    context = context_of((node.kubeconfig_dir / "admin.conf").read_bytes())
    opened = http.client.HTTPSConnection(node.ip, API_PORT, context=context, timeout=_TIMEOUT)
    with contextlib.closing(opened):
        opened.request("GET", "/api/v1/namespaces/kube-system/configmaps/extension-apiserver-authentication")
        return str(json.loads(opened.getresponse().read())["data"]["requestheader-client-ca-file"])


# --- when the old CA is forgotten ------------------------------------------------------------------------------------


def strangers(node: Node, old: Path, trusted: bytes) -> Iterator[tuple[str, str]]:
    """
    What each client certificate of before is answered on a node, by name.

    Args:
        node: The node.
        old: A copy of its `/etc/kubernetes` from before.
        trusted: The new CAs (PEM), of which the servers' certificates are.
    """
    confs = ("admin.conf", "super-admin.conf", "controller-manager.conf", "scheduler.conf", "kubelet.conf")
    places = {**dict.fromkeys(confs, ("api",)),
              "apiserver-kubelet-client": ("api", "kubelet"), "front-proxy-client": ("api",),
              "apiserver-etcd-client": ("etcd",), "etcd-healthcheck-client": ("etcd",)}  # fmt: skip
    for name, kinds in places.items():
        if pair := _pair(old, name):  # a kubelet's may be in another file
            for kind in kinds:
                yield f"{name} at {kind}", _answer_to(node, trusted, pair, kind, is_proxy=name.startswith("front"))


def _pair(old: Path, name: str) -> bytes:
    spec = SPECS[name]
    if spec.kubeconfig:
        data = (old / spec.base).read_bytes()
        return (kubeconfig.parse(data).certificate_data or b"") + (kubeconfig.key_data(data) or b"")
    return b"".join((old / "pki" / f"{spec.base}{suffix}").read_bytes() for suffix in (".crt", ".key"))


def _answer_to(node: Node, trusted: bytes, pair: bytes, kind: str, *, is_proxy: bool) -> str:
    port, path = {"api": (API_PORT, "/api"), "kubelet": (10250, "/healthz"), "etcd": (2379, "/health")}[kind]
    context = ssl.create_default_context(cadata=trusted.decode())
    with tempfile.NamedTemporaryFile() as file:
        file.write(pair)
        file.flush()
        context.load_cert_chain(file.name)
    if kind == "kubelet":  # its certificate may be its own
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    headers = {"X-Remote-User": "kubernetes-admin", "X-Remote-Group": "system:masters"} if is_proxy else {}
    opened = http.client.HTTPSConnection(node.ip, port, context=context, timeout=_TIMEOUT)
    with contextlib.closing(opened):
        try:
            opened.request("GET", path, headers=headers)
            return str(opened.getresponse().status)
        except ssl.SSLError as e:
            return "TLS alert" if of_error(e) is Answer.TLS else repr(e)
        except OSError as e:
            return repr(e)
