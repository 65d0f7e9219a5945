"""
From nothing to a node that `kubeadm init` or `kubeadm join` can be run on.

Nothing is put in place before all of it is there and judged as a whole; then all of it is, in one step that the next
run finishes or undoes after a crash. A run that was cut off, or waits for a desk, is gone on with by running it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta

from bridge.bootstrap import answers, authorities, keys, leftovers, new_requests, service_account
from bridge.bootstrap.authorities import Certificates
from bridge.bootstrap.configuration import assert_usable
from bridge.bootstrap.files import Composer
from bridge.bootstrap.places import live
from bridge.bootstrap.put_in_place import keep_what_is_there, put_back, put_in_place
from bridge.bootstrap.unfinished import Unfinished
from bridge.bootstrap.whole import look_at
from bridge.bootstrap.wish import Bootstrapped, NodeWish
from bridge.errors import BridgeError
from bridge.renewal.readiness import assert_room
from bridge.renewal.verify_and_install import await_validity, remember, verify_all
from bridge.settings.tables import Settings
from bridge.state import audit
from bridge.state.install import Replacement
from bridge.state.outcome import Outcome
from bridge.state.session import Run, begun
from bridge.system.console import Progress


def make(
    settings: Settings, wish: NodeWish, now: Callable[[], datetime], progress: Progress, wait: timedelta
) -> Bootstrapped:
    """
    Make what is missing, ask for it, and put it in place once all is there.

    Args:
        settings: CAs, directories, how long.
        wish: What for.
        now: The clock.
        progress: Is told.
        wait: For another run to end.

    Raises:
        KubeadmConfigError: The configuration can't be used.
        ClusterExistsError, LeftoversError: The node is not new.
        NotWholeError: Something is wrong with the whole.
        LockedError: Another run works on this node.
        BridgeError: Whatever else; nothing was put in place.
    """
    if wish.role != "worker":
        assert_usable(wish.config, str(settings.node.pki_dir), further=wish.role == "control-plane")
    node = dataclasses.replace(settings.node, name=wish.node)
    with begun(dataclasses.replace(settings, node=node), now, progress, wait) as (run, _):
        keys.clear(run.store.directory)
        return _made(run, wish)


def _made(run: Run, wish: NodeWish) -> Bootstrapped:
    leftovers.assert_no_cluster(wish)
    look = look_at(run.settings, wish, live, run.now())
    if not look.missing():
        leftovers.assert_as_wished(wish, look)
        keep_what_is_there(run, wish)
        new_requests.forget(run)
        return dataclasses.replace(_result(wish, []), is_complete=True)
    leftovers.assert_no_leftovers(wish, look)
    if (count := put_back(run, wish)) > 0:
        return dataclasses.replace(_result(wish, [], files=count), from_kept=True)
    cas = authorities.gather(run.settings, wish.places, wish.role, wish.ca_dir, wish.carried, run.now())
    service_account.assert_at_hand(wish)
    assert_room(run.settings)  # kubeadm's keys need some, too
    open_requests = new_requests.begin(run, wish)
    prepared = new_requests.prepared(run, wish, open_requests)
    found = answers.gather(run, wish, prepared, answers.expected(run, wish, cas))
    composer = _composer(run, wish, open_requests, cas)
    proven, failed = verify_all(run, list(found.answered), list(found.waiting), composer.certificate)
    remember(run, found.answered, proven, by_hand=bool(wish.answers))
    run.record.write()
    if failed:
        return _result(wish, failed, strange=found.strange)
    await_validity([one.verified.leaf for one in proven])
    certificates = [file for one in proven for file in one.files]
    files = [*certificates, *_beside_certificates(wish, composer, open_requests)]
    put_in_place(run, wish, files, composer.kubelet_pem)
    for one in proven:
        run.record.add(audit.INSTALLED, one.name, authority=one.prepared.authority, new=one.verified.leaf)
    run.record.write_or_warn()
    return _result(wish, [one.outcome for one in proven], files=len(files), strange=found.strange)


def _result(
    wish: NodeWish, outcomes: Sequence[Outcome], *, files: int = 0, strange: Sequence[BridgeError] = ()
) -> Bootstrapped:
    return Bootstrapped(
        role=wish.role,
        node=wish.node,
        outcomes=tuple(outcomes),
        files=files,
        is_complete=files > 0,
        strange=tuple(strange),
    )


def _composer(run: Run, wish: NodeWish, open_requests: Unfinished, cas: Certificates) -> Composer:
    cluster = wish.config.cluster.get("clusterName")
    return Composer(
        places=wish.places,
        role=wish.role,
        servers=open_requests.servers,
        cluster=cluster if isinstance(cluster, str) and cluster else "kubernetes",
        authorities=cas,
        read=live,
        now=run.now(),
    )


def _beside_certificates(wish: NodeWish, composer: Composer, open_requests: Unfinished) -> Iterator[Replacement]:
    """CA certificates, the service account key and the configuration: what of them is not in place."""
    yield from composer.ca_files()
    if wish.role != "worker":
        made = open_requests.sa_key.encode(), open_requests.sa_public.encode()
        yield from composer.service_account(*(service_account.in_place(wish) or wish.sa or made))
    for path, data in wish.files.items():
        yield from composer.configuration(path, data)
