"""Whether a node is new: what is there already, and whose it is."""

from __future__ import annotations

from bridge.bootstrap.places import live, some_of, traces_of_cluster
from bridge.bootstrap.whole import NodeLook
from bridge.bootstrap.wish import ClusterExistsError, LeftoversError, NodeWish, NotWholeError, OtherWishError
from bridge.specs import AUTHORITIES

_MADE_FOR_ANOTHER = (
    "what is in place was made for another configuration: run this as before; or have `kubeadm reset` remove it, keys "
    "included, then run this again"
)
_BRING_BACK = "bring back what is missing, or move all of it away and run this again"


def assert_no_cluster(wish: NodeWish) -> None:
    """
    Raises:
        ClusterExistsError: kubeadm or a kubelet has been at work here.
    """
    if traces := list(traces_of_cluster(wish.places)):
        raise ClusterExistsError(f"wanted a node without a cluster, found {some_of(traces)}")


def assert_as_wished(wish: NodeWish, look: NodeLook) -> None:
    """
    Judge a node that has all files.

    Raises:
        OtherWishError: They are there for another configuration.
        NotWholeError: Something is wrong with them.
    """
    for path, wanted in wish.files.items():  # first, since certificates for another one lack its names
        if live(path) != wanted:
            raise OtherWishError(
                f"{path}: wanted the configuration that is asked for now, found another one, or none",
                hint=_MADE_FOR_ANOTHER,
            )
    if problems := look.problems():
        raise NotWholeError(
            "\n".join(problems),
            hint="all files are there, and kubeadm would fail with them: move them away, or mend them",
        )


def assert_no_leftovers(wish: NodeWish, look: NodeLook) -> None:
    """
    Judge a node that lacks files: CA certificates, the service account key and the kubelet's own pair may be there.

    Raises:
        LeftoversError: Others are there, too, or another configuration.
        NotWholeError: Most of a whole set is there.
    """
    places = wish.places
    allowed = {places.sa_key, places.sa_public, *places.serving}
    allowed |= {places.authority(one) for one in AUTHORITIES.values()}
    there = [path for path in look.files() if path not in allowed and look.read(path) is not None]
    missing = look.missing()
    if there and len(missing) < len(there):
        raise NotWholeError("\n".join(look.problems()), hint=_BRING_BACK)
    if there:
        raise LeftoversError(f"wanted a node without certificates, or with all of them, found {some_of(there)}")
    for path, data in wish.files.items():
        if live(path) not in (None, data):
            raise LeftoversError(
                f"{path}: wanted no file, found another configuration",
                hint="move it away, or give it as --kubeadm-config",
            )
