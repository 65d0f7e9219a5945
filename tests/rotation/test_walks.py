"""Nodes of real files walk through the phases and back, killed or not, in any order that their gates allow."""

from __future__ import annotations

import dataclasses
import functools
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Stage
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bridge.errors import Exit
from bridge.node import inventory
from bridge.node.reading import read_node
from bridge.pki.certificates import leads_to, load_pem_certificates
from bridge.rotation import Phase, places
from bridge.rotation.places import Replaced
from bridge.rotation.planning import OrderError, Step, Verb
from bridge.rotation.readiness import NotReadyEverywhereError
from bridge.settings.tables import Settings
from bridge.state.session import Run
from tests.kit.pairs import assert_pairs
from tests.kit.pki import Pki, handmade_pki
from tests.kit.rotating import Open, contents, run, with_next
from tests.kit.static_pod import attempt
from tests.kit.tripwire import kill

#: All walks together, and one of them, take no more steps after that: a busy machine asks a CA slowly.
ALL_SECONDS, ONE_SECONDS = 40.0, 10.0
#: What is left on a node: a server's pair, a client's, and a kubeconfig.
KEPT = ("pki", "admin.conf", "ca.crt", "apiserver.crt", "apiserver.key", "apiserver-kubelet-client.crt",
        "apiserver-kubelet-client.key")  # fmt: skip


def make_node(directory: Path) -> Pki:
    """A node with one CA and three of its certificates."""
    pki = handmade_pki(directory)
    for path in [*pki.kubeconfig_dir.iterdir(), *pki.pki_dir.iterdir()]:
        if path.name not in KEPT:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return pki


@dataclass(frozen=True, kw_only=True)
class Others(Open):
    """A gate that looks at the CA files and certificates of the other nodes, as their servers would."""

    nodes: tuple[Settings, ...] = ()

    def assert_open(self, _run: Run, _node: inventory.Node, steps: Sequence[Step]) -> None:  # type: ignore[override]
        """Each other node has certificates of the CA that is to be the only one here."""
        for step in steps:
            if step.target in (Phase.OLD, Phase.NEW):
                wanted = step.ca.change.signer(step.target)
                if not all(ca == wanted for one in self.nodes for ca in look(one).seen.leaves.values()):
                    raise NotReadyEverywhereError("another node's certificates are of the other CA")

    def assert_accepted(self, _run: Run, _node: inventory.Node, pairs: Mapping[str, tuple[bytes, bytes]]) -> None:  # type: ignore[override]
        """Each other node's CA file leads to them."""
        for one in self.nodes:
            for certificates, _ in pairs.values():
                if not leads_to(load_pem_certificates(certificates), look(one).seen.bundle):
                    raise NotReadyEverywhereError("another node does not trust this CA")


def look(one: Settings) -> Replaced:
    """The CA of a node, by its files."""
    return places.look(one, read_node(one.node), ["ca"])["ca"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """Three nodes of one cluster, as they are before everything; `live` is made anew from `template` for each walk."""

    live: Path
    template: Path
    nodes: tuple[Settings, ...]

    @classmethod
    @functools.cache
    def make(cls) -> Site:
        """Once a process: keys and CAs are the same for each walk."""
        base = Path(tempfile.mkdtemp(prefix="walks-"))
        live = base / "live"
        pki = make_node(live / "0")
        first = with_next(pki, live / "cas", cross=True)
        for number in ("1", "2"):
            shutil.copytree(pki.root, live / number)
        nodes = tuple(
            dataclasses.replace(first, node=dataclasses.replace(
                first.node,
                pki_dir=live / str(number) / pki.pki_dir.relative_to(pki.root),
                kubeconfig_dir=live / str(number) / pki.kubeconfig_dir.relative_to(pki.root),
                state_dir=live / str(number) / "state",
            ))
            for number in range(3)
        )  # fmt: skip
        shutil.copytree(live, base / "template")
        return cls(live=live, template=base / "template", nodes=nodes)

    def begin(self, *, cross: bool) -> list[Settings]:
        """All nodes with the old CA, with or without its cross certificate for the next one."""
        shutil.rmtree(self.live)
        shutil.copytree(self.template, self.live)
        ours = self.nodes[0].authorities["ca"]
        table = {key: value for key, value in ours.next.items() if cross or key != "cross"}
        authorities = {**self.nodes[0].authorities, "ca": dataclasses.replace(ours, next=table)}
        return [dataclasses.replace(one, authorities=authorities) for one in self.nodes]


class Walk(RuleBasedStateMachine):
    """Any verb on any node, killed at any system call; a gate or the order of phases may refuse it."""

    ends: ClassVar[float | None] = None

    def __init__(self) -> None:
        super().__init__()
        now = time.monotonic()
        type(self).ends = self.ends or now + ALL_SECONDS
        self.end = min(now + ONE_SECONDS, self.ends or now)
        self.cut_off: dict[int, Verb] = {}
        self.nodes: list[Settings] = []

    @property
    def is_over(self) -> bool:
        """Whether nothing is to be done or looked at any more."""
        return not self.nodes or time.monotonic() > self.end

    @initialize(cross=st.booleans())
    def begin(self, cross: bool) -> None:
        """All nodes have the old CA alone, and a person has a certificate of it."""
        if time.monotonic() > self.end:
            return
        self.nodes = Site.make().begin(cross=cross)
        self.change = look(self.nodes[0]).change
        self.persons = [
            load_pem_certificates((self.nodes[0].node.pki_dir / "apiserver-kubelet-client.crt").read_bytes())
        ]
        self.dropped = False

    @rule(number=st.integers(0, 2), verb=st.sampled_from(Verb), kill_at=st.none() | st.integers(1, 400))
    def step(self, number: int, verb: Verb, kill_at: int | None) -> None:
        """A verb that is refused changes nothing; one that ends has reached its phase; one that is killed is completed."""
        if self.is_over:
            return
        verb = self.cut_off.get(number, verb)
        node, others = self.nodes[number], tuple(one for n, one in enumerate(self.nodes) if n != number)
        work = functools.partial(run, node, verb, ["ca"], Others(nodes=others))
        before = contents(pki_of(node))
        if kill_at is not None and attempt(work, kill_at, kill)[0] == -signal.SIGKILL:
            self.cut_off[number] = verb
        else:
            self._whole(number, work, before)
        self.dropped |= any(look(one).seen.bundle == (self.change.new,) for one in self.nodes)
        self._keep_client(node)

    def _whole(self, number: int, work: functools.partial[Any], before: Mapping[Path, bytes]) -> None:
        was_cut_off = self.cut_off.pop(number, None)
        try:
            done = work()
        except (OrderError, NotReadyEverywhereError):
            assert was_cut_off is not None or contents(pki_of(self.nodes[number])) == before
            return
        assert done.exit_code == Exit.DONE, done.result
        [step] = done.steps
        here = look(self.nodes[number]).standing
        assert (here.phase, here.next) == (step.target, None)
        assert_pairs(pki_of(self.nodes[number]), count=3)

    def _keep_client(self, node: Settings) -> None:
        """Keep the node's certificate, since the holder of an old one is a client, too."""
        path = node.node.pki_dir / "apiserver-kubelet-client.crt"
        chain = load_pem_certificates(path.read_bytes())
        if chain not in self.persons:
            self.persons.append(chain)

    def phases(self) -> set[Phase | None]:
        """The phases of all nodes."""
        return {phase for one in self.nodes for phase in (look(one).standing.phase, look(one).standing.next)}

    @invariant()
    def each_file_is_of_one_phase(self) -> None:
        """Killed or not: CA file, kubeconfigs and certificates are of one phase, or of two neighbours."""
        for one in () if self.is_over else self.nodes:
            assert look(one).standing.phase is not None, look(one).standing.differing

    @invariant()
    def every_certificate_of_a_node_is_trusted_on_every_node(self) -> None:
        """The present CA files trust every node's certificate, whichever run was killed."""
        if self.is_over:
            return
        bundles = [look(one).seen.bundle for one in self.nodes]
        for one in self.nodes:
            for item in read_node(one.node).items:
                assert not item.certificates or all(leads_to(item.certificates, each) for each in bundles)

    @invariant()
    def no_client_is_refused_before_the_end(self) -> None:
        """Each certificate that was ever in use is known everywhere, until a node trusts one CA alone again."""
        if self.is_over or self.dropped:
            return
        for bundle in (look(one).seen.bundle for one in self.nodes):
            for chain in self.persons:
                assert leads_to(chain, bundle) or bundle == (self.change.old,)


def pki_of(node: Settings) -> Pki:
    return Pki(root=node.node.kubeconfig_dir.parents[1], external=True)


@pytest.fixture(autouse=True, scope="module")
def _no_process_here() -> Any:
    """A kubelet of another test's node is not this node's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bridge.node.processes.running", lambda *_: [])
        yield
    shutil.rmtree(Site.make().live.parent)


TestWalk = Walk.TestCase
TestWalk.settings = settings(
    max_examples=5,
    stateful_step_count=14,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Stage.generate,),  # a walk that fails is printed as it is: to shorten it takes minutes
)
