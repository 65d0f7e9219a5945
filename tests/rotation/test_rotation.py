"""Where a CA's replacement stands is read off the files, and each verb ends where it says, killed or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bridge.rotation import Bundle, Change, Phase, Seen, differences, standing
from tests.kit.issuing import NOW, Signer

CONFS = ("admin.conf", "kubelet.conf")
LEAVES = ("apiserver", "apiserver-kubelet-client")


@cache
def cas() -> tuple[Signer, Signer, Signer]:
    """The old CA, the new one, and another cluster's."""
    return Signer.make("kubernetes"), Signer.make("kubernetes-2"), Signer.make("stranger")


@cache
def change() -> Change:
    """The replacement by another key."""
    old, new, _ = cas()
    return Change(old.certificate, new.certificate)


@cache
def renewed() -> Change:
    """The replacement by a certificate for the same key."""
    old, _, _ = cas()
    return Change(old.certificate, Signer.make("kubernetes", key=old.key, begin=NOW).certificate)


def seen(bundle: Bundle, data: Bundle | None = None, signer: int | None = 0) -> Seen:
    """A node whose kubeconfigs hold the same CA data, and whose leaves lead to one CA."""
    leads_to = None if signer is None else cas()[signer].certificate
    return Seen(
        bundle=bundle,
        kubeconfigs=dict.fromkeys(CONFS, bundle if data is None else data),
        leaves=dict.fromkeys(LEAVES, leads_to),
    )


def at(phase: Phase) -> Seen:
    """A node that is whole in a phase."""
    c = change()
    return seen(c.bundle(phase), signer=0 if c.signer(phase) == c.old else 1)


@pytest.mark.parametrize("phase", Phase)
def test_a_node_is_in_the_phase_of_its_files(phase: Phase) -> None:
    """Each phase has files of its own, with nothing left to change; the others have something left."""
    found = standing(at(phase), change())
    assert (found.phase, found.next, found.differing) == (phase, None, ())
    for other in Phase:
        assert bool(differences(at(phase), change(), other)) == (other is not phase)


def test_the_order_counts_in_the_ca_file_alone() -> None:
    """kubeadm takes a CA file's first certificate for the signer, and looks for any in a kubeconfig."""
    old, new = change().old, change().new
    assert standing(seen((old, new), data=(new, old)), change()).phase is Phase.TRUSTED
    assert standing(seen((new, old), data=(old, new), signer=1), change()).phase is Phase.ISSUED
    mixed = standing(seen((new, old), data=(old, new), signer=0), change())
    assert (mixed.phase, mixed.next) == (Phase.TRUSTED, Phase.ISSUED)


@pytest.mark.parametrize(
    ("mixed", "between"),
    [
        (dataclasses.replace(at(Phase.OLD), bundle=change().bundle(Phase.TRUSTED)), "old → trusted"),
        (
            dataclasses.replace(at(Phase.ISSUED), leaves={LEAVES[0]: change().new, LEAVES[1]: change().old}),
            "trusted → issued",
        ),
        (dataclasses.replace(at(Phase.NEW), kubeconfigs=at(Phase.ISSUED).kubeconfigs), "issued → new"),
    ],
)
def test_a_half_done_phase_counts_as_such(mixed: Seen, between: str) -> None:
    """Each place is in the form of one of two neighbouring phases."""
    assert standing(mixed, change()).text == between


@pytest.mark.parametrize(
    "odd",
    [
        seen((change().new,), signer=0),
        seen((change().old, change().new, cas()[2].certificate)),
        seen((change().old,), signer=2),
        seen((cas()[2].certificate,), signer=2),
        seen((change().old, change().new), signer=None),
        seen((), signer=0),
        dataclasses.replace(at(Phase.NEW), kubeconfigs={CONFS[0]: (change().old,)}),
    ],
)
def test_what_belongs_to_no_phase_is_named(odd: Seen) -> None:
    """A CA file without a leaf's CA, a third CA, a leaf of another CA, a kubeconfig two phases behind."""
    found = standing(odd, change())
    assert (found.phase, found.text) == (None, "unknown")
    assert found.differing
    assert all(one.count("wanted") == 1 for one in found.differing)


def test_a_renewed_ca_takes_one_step() -> None:
    """With the same key no leaf is issued anew: old and new are the only phases, and leaves do not count."""
    c = renewed()
    assert (c.keeps_key, c.path) == (True, (Phase.OLD, Phase.NEW))
    assert standing(seen((c.old,)), c).phase is Phase.OLD
    assert standing(seen((c.new,)), c).phase is Phase.NEW
    assert standing(seen((c.new,), data=(c.old,)), c).text == "old → new"
    assert (c.before(Phase.OLD), c.before(Phase.NEW)) == (None, Phase.OLD)


@given(st.lists(st.sampled_from([0, 1, 2]), max_size=4), st.sampled_from([0, 1, 2, None]))
def test_any_files_have_a_standing(order: Sequence[int], signer: int | None) -> None:
    """Any CA file has a phase, or a list of differences from the nearest."""
    found = standing(seen(tuple(cas()[n].certificate for n in order), signer=signer), change())
    assert (found.phase is None) == bool(found.differing)


class Cluster(RuleBasedStateMachine):
    """Nodes that pass phases in any order within a phase; a kill leaves a prefix of one node's places replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = [at(Phase.OLD) for _ in range(3)]

    def phases(self) -> set[Phase]:
        """The phases that nodes have reached, those ahead included."""
        found = [standing(node, change()) for node in self.nodes]
        assert all(one.phase is not None for one in found)
        return {phase for one in found for phase in (one.phase, one.next) if phase is not None}

    @rule(number=st.integers(0, 2), is_back=st.booleans(), kill_after=st.none() | st.integers(0, 4))
    def step(self, number: int, is_back: bool, kill_after: int | None) -> None:
        """One verb on one node, whose gate is that no other node is two phases away."""
        node = self.nodes[number]
        now = standing(node, change())
        assert now.phase is not None
        target = change().before(now.phase) if is_back and now.next is None else now.next or following(now.phase)
        if is_back and now.next is not None:
            target = now.phase
        if target is None:
            return
        path = change().path
        others = [standing(one, change()) for n, one in enumerate(self.nodes) if n != number]
        reached = {phase for one in others for phase in (one.phase, one.next) if phase is not None}
        if any(abs(path.index(phase) - path.index(target)) > 1 for phase in reached):
            return
        places = list(differences(node, change(), target))
        self.nodes[number] = replaced(node, target, places if kill_after is None else places[:kill_after])
        if kill_after is None:
            assert standing(self.nodes[number], change()).phase is target

    @invariant()
    def every_leaf_is_trusted_everywhere(self) -> None:
        """Each node's CA file has the CA of each leaf of each node, whichever run was killed."""
        for verifier in self.nodes:
            for node in self.nodes:
                assert set(node.leaves.values()) <= set(verifier.bundle)

    @precondition(lambda self: len(self.phases()) == 1)
    @invariant()
    def a_whole_phase_is_one_of_four(self) -> None:
        """Nodes that are all alike are in a phase in which kubeadm works."""
        assert self.phases() <= set(Phase)


def following(phase: Phase) -> Phase | None:
    """The next phase; None: this is the last."""
    return next((later for later in change().path if change().before(later) is phase), None)


def replaced(node: Seen, phase: Phase, places: Sequence[str]) -> Seen:
    """The node with some of its places as a phase wants them."""
    bundle = change().bundle(phase)
    return Seen(
        bundle=bundle if "CA file" in places else node.bundle,
        kubeconfigs={name: bundle if name in places else data for name, data in node.kubeconfigs.items()},
        leaves={name: change().signer(phase) if name in places else ca for name, ca in node.leaves.items()},
    )


TestCluster = Cluster.TestCase
TestCluster.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
