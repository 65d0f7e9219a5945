"""
Switch `serverTLSBootstrap` on and off in a running cluster, one node at a time; a killed run can simply be repeated.

On: this node's kubelet comes first, because its certificate proves that a signer answers; then kubelet-config, for the
other kubelets; kubeadm-config and the API server only when all kubelets serve valid certificates. Off is the reverse.
https://kubernetes.io/docs/reference/access-authn-authz/kubelet-tls-bootstrapping/
`all_served` checks each kubelet as its clients do, and `authorities` shows which API servers verify kubelets.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

from bridge.cluster import ANONYMOUS, below, items, kubeadm, text_of
from bridge.cluster.api import Api, NoAnswerError
from bridge.control_plane import neighbours, restarts
from bridge.control_plane.restarts import Restarted, Restarts
from bridge.errors import BridgeError, Exit, PostponedError, SettingsError, SettingsProblem, WaitingError
from bridge.node import endpoints, kubelet, manifest_flags, manifests, processes
from bridge.node.endpoints import Address, Flags
from bridge.node.inventory import Node
from bridge.node.kubelet import KubeletFiles
from bridge.node.manifests import flags_of
from bridge.node.processes import Process, file_contents
from bridge.node.reading import read_node
from bridge.node.yamltree import YamlError, split_bom
from bridge.pki.certificates import name_text
from bridge.pki.expiry import duration_text, minute
from bridge.settings.tables import Settings
from bridge.specs import CA, Component
from bridge.state import audit, changed_here, session
from bridge.state.install import STAGED_PREFIX
from bridge.system.console import doing, log
from bridge.system.files import exchange
from bridge.system.paths import UnreadableError
from bridge.system.run_command import Account, Command, passed_on, run
from bridge.system.tls import HttpsError
from bridge.system.waiting import wait_until, workers
from bridge.words import one_line

#: The API server's flag for the CA that verifies kubelets; without it, it verifies none.
AUTHORITY = "--kubelet-certificate-authority"
_NODES = "/api/v1/nodes"
#: A node lists up to 50 images, and an answer has at most 4 MiB.
_PAGE = 50
_AT_ONCE = 8
#: kube-apiserver's default for `--kubelet-preferred-address-types`.
_TYPES = "Hostname,InternalDNS,InternalIP,ExternalDNS,ExternalIP"
_API_SERVERS = "/api/v1/namespaces/kube-system/pods?labelSelector=component%3Dkube-apiserver"
_REQUESTS = (
    "/apis/certificates.k8s.io/v1/certificatesigningrequests?fieldSelector="
    "spec.signerName%3Dkubernetes.io%2Fkubelet-serving"
)

_ARGUMENT = AUTHORITY.removeprefix("--")
#: The flags of kubeadm's API servers, for a worker, which can't see the real ones.
_KUBEADMS: Flags = {"--kubelet-preferred-address-types": "InternalIP,ExternalIP,Hostname"}
_POLL_SECONDS = 0.5

#: Returns why the kubelet refuses a configuration; empty: it accepts it.
Trial = Callable[[bytes], str]


class NotHereError(BridgeError):
    """A node or its kubelet can't be switched."""

    hint = "`ca-bridge help kubelets` says what each node needs"


class PutBackError(BridgeError):
    """The change did not work, and the old configuration is back."""

    exit_code: ClassVar[int] = Exit.ROLLED_BACK


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The result of one run on one node."""

    done: tuple[str, ...]  #: Sentences; empty: there was nothing to do.
    left: tuple[str, ...]  #: Sentences about what other nodes have to do first; empty: this node is done.

    @property
    def exit_code(self) -> int:
        """4 while other nodes come first."""
        return Exit.WAITING if self.left else Exit.DONE


def switch(settings: Settings, *, on: bool, force: bool, wait: timedelta, tell: Callable[[str], None]) -> Report:
    """Switch this node as far as the others allow; `wait` is for the signer, `tell` gets a sentence about each step."""
    if settings.restart.method == "none":
        found = '"none", with which nothing is restarted'
        raise SettingsError([SettingsProblem("restart.method", "a way to restart components", found)])
    with session.alone(settings, timedelta()) as (store, record):
        node = read_node(settings.node)
        if not (node.is_worker or Component.APISERVER in node.manifests):
            raise NotHereError("this is no worker, and no control plane with an API server")
        restarts = Restarts(node=node, settings=settings, store=store, record=record, force=force)
        switching = _Switch(settings=settings, node=node, restarts=restarts, wait=wait, tell=tell)
        (switching.on if on else switching.off)()
        return Report(done=tuple(switching.done), left=tuple(switching.left))


@dataclass(kw_only=True)
class _Switch:
    settings: Settings
    node: Node
    restarts: Restarts
    wait: timedelta
    tell: Callable[[str], None]
    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def on(self) -> None:
        if self.node.is_worker:
            self._assert_map(asks=True)
        self._kubelet(asks=True)
        if self.node.is_worker:
            return
        self._map(asks=True)
        wrong = [kubelet for kubelet in all_served(self.api, self.trust, self.flags) if kubelet.trouble]
        self.left += [f"{kubelet.node}: {kubelet.trouble}" for kubelet in wrong]
        if not wrong:
            self._authority(str(self.ca_file))

    def off(self) -> None:
        if self.node.is_worker:
            self._assert_map(asks=False)
        else:
            self._authority(None)
            found = authorities(self.api, self.name, {})  # this node's flag is gone by now
            verifying = [node for node, authority in found.items() if authority]
            self.left += [f"{name}: its API server still has {AUTHORITY}" for name in verifying]
            if verifying:
                return
            self._map(asks=False)
        self._kubelet(asks=False)

    def _note(self, text: str, name: str = Component.KUBELET.value) -> None:
        self.restarts.record.add(audit.CONFIGURED, name, result=text)
        self.restarts.record.write_late()
        self.done.append(text)
        self.tell(text)  # last, since it may write into a closed pipe

    @cached_property
    def api(self) -> Api:
        if self.node.is_worker:
            return Api.of_node(self.node, self.settings.node.kubeconfig_dir)
        return neighbours.connect(self.node, self.settings)

    @property
    def ca_file(self) -> Path:
        return self.settings.node.pki_dir / CA.certificate_file

    @cached_property
    def trust(self) -> bytes:
        return _contents(self.ca_file)

    @property
    def flags(self) -> Flags:
        return _KUBEADMS if self.node.is_worker else self.node.manifests[Component.APISERVER].flags

    @property
    def name(self) -> str:
        return self.settings.node.node_name

    # --- the cluster's configuration ---------------------------------------------------------------------------------

    def _assert_map(self, *, asks: bool) -> None:
        text = kubeadm.read(self.api, kubeadm.KUBELETS).text
        if text is None or kubelet.asks(text) != asks:
            wanted, found = ("with", "without") if asks else ("without", "with")
            command = "`ca-bridge kubelets on`" if asks else "`ca-bridge kubelets off`"
            hint = f"{command} on a control-plane node comes first"
            raise WaitingError(f"wanted {kubeadm.KUBELETS} {wanted} serverTLSBootstrap, found it {found}", hint=hint)

    def _map(self, *, asks: bool) -> None:
        try:
            changed = kubeadm.change(self.api, kubeadm.KUBELETS, lambda text: kubelet.asking(text, wanted=asks))
        except YamlError as e:
            raise NotHereError(f"{kubeadm.KUBELETS}: {e}") from None
        if changed:
            verb = "has kubelets ask" if asks else "no longer has kubelets ask"
            text = f"{kubeadm.KUBELETS} {verb} for serving certificates, on new nodes and after upgrades"
            self._note(text, kubeadm.KUBELETS.name)

    def _authority(self, value: str | None) -> None:
        """Set or remove the flag by which the API server verifies kubelets, on this node and in kubeadm-config."""
        component = Component.APISERVER
        path = manifests.path_of(component, self.settings.node.kubeconfig_dir)
        self._assert_ours(self.flags.get(AUTHORITY), path.name)
        if value is not None and self.flags.get("--client-ca-file") != value:
            found = f"{self.flags.get('--client-ca-file', 'none')}: does its pod see that file?"
            raise NotHereError(f"wanted --client-ca-file={value} in {path.name}, found {found}")

        def edit(cluster: kubeadm.Cluster) -> kubeadm.Cluster:
            argument = manifest_flags.arguments(cluster, component).get(_ARGUMENT)
            self._assert_ours(argument, str(kubeadm.CLUSTER))
            return (
                cluster if argument == value else manifest_flags.with_arguments(cluster, component, {_ARGUMENT: value})
            )

        if kubeadm.change_cluster(self.api, edit):
            has = "has" if value else "is without"
            self._note(f"{kubeadm.CLUSTER} {has} {AUTHORITY}, for upgrades", kubeadm.CLUSTER.name)
        data = _contents(path)
        try:
            wanted = manifest_flags.edited(data, component, {AUTHORITY: value})
        except YamlError as e:
            raise NotHereError(f"{path}: {e}") from None
        if wanted != data:
            done, back = self.restarts.with_text(component, wanted)
            if (error := _first_error(done)) is not None:
                put_back = PutBackError(f"{error}; {path.name} has its old text again", hint=error.hint)
                raise (_first_error(back) or put_back) if back else error
            verb = "verifies kubelets" if value else "verifies no kubelet"
            self._note(f"the API server of {self.name} {verb}, and is healthy", component.value)

    def _assert_ours(self, value: str | None, place: str) -> None:
        if value not in {None, str(self.ca_file)}:
            text = f"wanted {AUTHORITY}={self.ca_file} or none in {place}, found {value}"
            raise NotHereError(text, hint="ca-bridge did not write it: decide by hand which file it names")

    @property
    def _is_verified(self) -> bool:
        try:
            found = kubeadm.read_cluster(self.api)
        except BridgeError:  # a worker may not read it
            return False
        return _ARGUMENT in manifest_flags.arguments(found, Component.APISERVER)

    # --- this node's kubelet -----------------------------------------------------------------------------------------

    def _kubelet(self, *, asks: bool) -> None:
        """Change the kubelet's configuration, restart it, and wait for its certificate; undo both if that fails."""
        path = self.settings.node.kubelet_dir / "config.yaml"
        data, running = _contents(path), processes.reader_of(Component.KUBELET, path)
        if running is None:
            raise NotHereError(f"no kubelet has {path} among its arguments")
        self._assert_decides(running, path, asks=asks)
        trial = functools.partial(refusal, processes.program_of(running), running.arguments[1:])
        wanted = _edited(path, data, asks=asks)
        error: BridgeError | None = None
        is_changed = wanted != data or running.started <= datetime.fromtimestamp(path.stat().st_ctime, UTC)
        if is_changed:
            if (obstacle := restarts.obstacle(Component.KUBELET, self.node, self.settings)) is not None:
                raise obstacle
            _write(path, trial, wanted)
            error = self._restarted()
        if isinstance(error, PostponedError):  # the kubelet still runs with the old configuration
            _write(path, trial, data)
            raise error
        if not asks:
            if error is not None:
                raise error
            if is_changed:
                self._note(f"the kubelet of {self.name} no longer asks for a serving certificate")
            return
        found = self._await_certificate() if error is None else Served(node=self.name)
        if error is not None or found.trouble:
            raise self._put_back(path, trial, data, error or self._without_certificate(found))
        if is_changed:
            kind = f"a certificate of the cluster's CA, until {minute(found.end) if found.end is not None else ''}"
            self._note(f"the kubelet of {self.name} serves {found.place} with {kind}")

    def _assert_decides(self, running: Process, path: Path, *, asks: bool) -> None:
        """Refuse a kubelet whose flags, or whose own pair of files, take precedence over `serverTLSBootstrap`."""
        if any(word.startswith("--rotate-server-certificates") for word in running.arguments):
            text = "wanted serverTLSBootstrap to be decided by its configuration, found --rotate-server-certificates"
            raise NotHereError(f"kubelet: {text}", hint="take the flag away first: /var/lib/kubelet/kubeadm-flags.env")
        if asks and KubeletFiles.load(path.parent).serving == "named":
            text = f"wanted a kubelet without tlsCertFile and tlsPrivateKeyFile, found them in {path} or its flags"
            hint = "ca-bridge renews that pair; take both keys away to have the kubelet ask itself"
            raise NotHereError(text, hint=hint)

    def _restarted(self, *, back: bool = False) -> BridgeError | None:
        return _first_error(replace(self.restarts, going_back=back).all([Component.KUBELET]))

    def _await_certificate(self) -> Served:
        def look() -> Served:
            try:
                return served(self.api, self.name, self.trust, self.flags)
            except NoAnswerError as e:
                return Served(node=self.name, trouble=str(e))

        with doing("waiting for the kubelet's serving certificate"):
            return wait_until(look, lambda served: not served.trouble, self.wait, pause_seconds=_POLL_SECONDS)

    def _without_certificate(self, served: Served) -> BridgeError:
        within = duration_text(self.wait)
        text = f"kubelet: wanted it to serve a certificate of the cluster's CA within {within}, found: {served.trouble}"
        if request := request_of(self.api, self.name):
            text += f"; {request}"
        return BridgeError(text, hint="a signer of the cluster has to answer: `ca-bridge help gateway`")

    def _put_back(self, path: Path, trial: Trial, data: bytes, error: BridgeError) -> BridgeError:
        """Give the kubelet its old configuration again; return the error to raise."""
        if self._is_verified:  # the API servers would reject a self-signed certificate
            return error
        log.warning("%s", error)
        try:
            _write(path, trial, _edited(path, data, asks=False))
        except BridgeError as e:
            return e
        worse = self._restarted(back=True)
        self._note(f"the kubelet of {self.name} has its old configuration again")
        if worse is not None:
            return worse
        return PutBackError(f"{error}; the kubelet has its old configuration again", hint=error.hint)


def _contents(path: Path) -> bytes:
    try:
        return file_contents(path)
    except (UnreadableError, ValueError) as e:
        raise NotHereError(str(e)) from None


def _first_error(done: Sequence[Restarted]) -> BridgeError | None:
    return next((outcome.error for outcome in done if outcome.error is not None), None)


def _write(path: Path, trial: Trial, content: bytes) -> None:
    with doing("asking the kubelet whether it accepts its configuration"):
        refused = trial(content)
    if refused:
        text = f"wanted a configuration that the kubelet accepts, found that it refuses the new content of {path}"
        raise NotHereError(f"{text}: {refused}", hint="nothing was changed, and no kubelet restarted")
    real = path.resolve()
    if real.read_bytes() != content:
        exchange(real, content, real.with_name(f"{STAGED_PREFIX}{real.name}"))
        changed_here.append(path)
        log.info("kubelet: replaced %s", path)


def _edited(path: Path, data: bytes, *, asks: bool) -> bytes:
    try:
        bom, text = split_bom(data)
        return (bom + kubelet.asking(text, wanted=asks)).encode()
    except YamlError as e:
        raise NotHereError(f"{path}: {e}") from None


# --- whether the kubelet would start with a configuration, by its own validation --------------------------------------


#: With `--exit-on-lock-contention` and no lock file a kubelet ends right after it has validated its configuration, before
#: it touches the node (measured on 1.37; `run` in cmd/kubelet/app/server.go).
_ENDS = ("--exit-on-lock-contention", "--lock-file=")
_HAS_ENDED = "no lock file specified"
_LIMIT = timedelta(minutes=2)
_MOST_OUTPUT = 4 << 20
#: The trial runs as `nobody`, so that it can't change the node.
_NOBODY = 65534
_ERROR = re.compile(r'err="((?:[^"\\]|\\.)*)"|^panic: (.*)$', re.MULTILINE)


def refusal(program: Path, arguments: Sequence[str], content: bytes) -> str:
    """Run the kubelet's program with the running one's arguments; return why it refuses a configuration, or nothing."""
    with tempfile.TemporaryDirectory(prefix="ca-bridge-kubelet-") as directory:
        file, pki = Path(directory, "config.yaml"), Path(directory, "pki")
        file.write_bytes(content)
        pki.mkdir(mode=0o700)
        is_root = os.geteuid() == 0
        if is_root:
            Path(directory).chmod(0o755)
            file.chmod(0o644)
            os.chown(pki, _NOBODY, _NOBODY)  # the kubelet may make a certificate of its own there
        output, words = bytearray(), [str(program), *_with_config(arguments, str(file)), *_ENDS, f"--cert-dir={pki}"]
        command = Command(words=words, environment=passed_on({}), limit=_LIMIT, most_output=_MOST_OUTPUT)
        if is_root:
            command = replace(command, account=Account(uid=_NOBODY, gid=_NOBODY, groups=(), home="/"))
        ended = run(command, output.extend, output.extend)
    text = output.decode(errors="replace")
    if _HAS_ENDED in text and ended.code:
        return ""
    errors = [error or panic for error, panic in _ERROR.findall(text)]
    last = text.strip().splitlines()[-1:]
    return one_line((errors or last or [f"it {ended.failure or 'ended'}"])[-1])[:1000]


def _with_config(arguments: Sequence[str], path: str) -> Iterator[str]:
    follows = False
    for word in arguments:
        yield path if follows else f"--config={path}" if word.startswith("--config=") else word
        follows = word == "--config"


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The certificate that the clients of one kubelet see."""

    node: str
    place: Address | None = None  #: The address by which the API server reaches it; None: its Node object has none.
    trouble: str = ""  #: Why a client that trusts only the cluster's CA would reject it; empty: it would not.
    end: datetime | None = None  #: The end of its certificate, if that is right.


def all_served(api: Api, trust_pem: bytes, flags: Flags) -> list[Served]:
    """Check the kubelet of each Node object, as an API server with these flags does (NoAnswerError: none answers)."""
    every = list(nodes(api))
    with workers(_AT_ONCE) as pool:
        return list(pool.map(lambda kubelet: _look(kubelet, trust_pem, flags), every))


def served(api: Api, name: str, trust_pem: bytes, flags: Flags) -> Served:
    """Check the kubelet of one node in the same way."""
    return _look(api.get(f"{_NODES}/{quote(name, safe='')}"), trust_pem, flags)


def nodes(api: Api) -> Iterator[Mapping[str, Any]]:
    """Yield all Node objects, page by page (NoAnswerError)."""
    return api.every(_NODES, _PAGE)


def _look(node: Mapping[str, Any], trust_pem: bytes, flags: Flags) -> Served:
    name, place = name_of(node), place_of(node, flags)
    if place is None:
        return Served(node=name, trouble="its Node object has no address")
    try:
        leaf = replace(ANONYMOUS, trust_pem=trust_pem).served(place)
    except HttpsError as e:
        return Served(node=name, place=place, trouble=f"{e}{_issuer(place)}")
    return Served(node=name, place=place, end=leaf.not_valid_after_utc)


def _issuer(place: Address) -> str:
    """Name the issuer of the certificate that a kubelet shows; empty: it shows none."""
    try:
        return f"; it shows a certificate from {one_line(name_text(ANONYMOUS.served(place).issuer))}"
    except (HttpsError, ValueError):
        return ""


def place_of(node: Mapping[str, Any], flags: Flags) -> Address | None:
    """Return the address that an API server uses: the first of the first type that the node has."""
    by_type: dict[str, str] = {}
    for item in items(node, "status", "addresses"):
        by_type.setdefault(str(item.get("type")), str(item.get("address") or ""))
    wanted = flags.get("--kubelet-preferred-address-types", _TYPES).split(",")
    host = next((found for kind in wanted if (found := by_type.get(kind.strip()))), "")
    port = below(node, "status", "daemonEndpoints", "kubeletEndpoint", "Port")
    usual = endpoints.PORTS[Component.KUBELET]
    return Address(host, port if isinstance(port, int) and 0 < port < 1 << 16 else usual) if host else None


def authorities(api: Api, own: str, own_flags: Flags) -> dict[str, str]:
    """Return, by node, the CA file by which its API server verifies kubelets; empty: none (NoAnswerError)."""
    # this node's flags come from the caller, since a mirror pod follows some seconds after a restart
    found: dict[str, Flags] = {own: own_flags}
    for pod in items(api.get(_API_SERVERS), "items"):
        lists = [item.get(key) for item in items(pod, "spec", "containers") for key in ("command", "args")]
        words = [str(word) for listed in lists if isinstance(listed, list) for word in listed]
        found.setdefault(one_line(text_of(pod, "spec", "nodeName")), flags_of(words))
    return {node: flags.get(AUTHORITY, "") for node, flags in sorted(found.items())}


def request_of(api: Api, node: str) -> str:
    """Describe a node's newest request for a serving certificate; empty: it can't be seen."""
    try:
        found = items(api.get(_REQUESTS), "items")
    except NoAnswerError:
        return ""
    ours = [request for request in found if text_of(request, "spec", "username") == f"system:node:{node}"]
    if not ours:
        return "it has not asked for one"
    newest = max(ours, key=lambda request: text_of(request, "metadata", "creationTimestamp"))
    types = [text_of(item, "type") for item in items(newest, "status", "conditions")]
    messages = [text_of(item, "message") for item in items(newest, "status", "conditions")]
    is_signed = bool(text_of(newest, "status", "certificate"))
    state = "signed" if is_signed else " and ".join(types).lower() or "open: no answer yet"
    reason = f" ({one_line(messages[-1])[:300]})" if messages and messages[-1] and not is_signed else ""
    return f"its request {name_of(newest)} is {state}{reason}"


def name_of(of: Mapping[str, Any]) -> str:
    """Return an object's name."""
    return one_line(text_of(of, "metadata", "name"))
