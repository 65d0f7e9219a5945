"""From nothing to a node that `kubeadm init` or `kubeadm join` can run on; a run that waits is run again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta

from bridge.bootstrap import authorities, keys, new_requests, whole
from bridge.bootstrap.authorities import Certificates
from bridge.bootstrap.configuration import assert_usable
from bridge.bootstrap.desired import Bootstrapped, DesiredNode
from bridge.bootstrap.new_requests import Unfinished
from bridge.bootstrap.places import live
from bridge.bootstrap.put_in_place import Composer, keep_what_is_there, put_back, put_in_place
from bridge.bootstrap.whole import look_at
from bridge.errors import BridgeError
from bridge.renewal.readiness import assert_room
from bridge.renewal.verify_and_install import await_validity, remember, verify_all
from bridge.settings.tables import Settings
from bridge.state import audit
from bridge.state.install import Replacement
from bridge.state.session import Run, begun, in_force
from bridge.state.store import Outcome
from bridge.system.console import Progress


def make(
    settings: Settings, desired: DesiredNode, now: Callable[[], datetime], progress: Progress, wait: timedelta
) -> Bootstrapped:
    """
    Make what is missing, ask for it, and put it in place once all is there.

    After any BridgeError nothing was put in place: KubeadmConfigError (the configuration), ClusterExistsError or
    LeftoversError (the node is not new), NotWholeError (the result as a whole), LockedError.
    """
    if desired.role != "worker":
        assert_usable(desired.config, str(settings.node.pki_dir), further=desired.role == "control-plane")
    node = dataclasses.replace(settings.node, name=desired.node)
    with begun(dataclasses.replace(settings, node=node), now, progress, wait) as (run, _):
        keys.clear(run.store.directory)
        return _made(run, desired)


def _made(run: Run, desired: DesiredNode) -> Bootstrapped:
    whole.assert_no_cluster(desired)
    look = look_at(run.settings, desired, live, run.now())
    if not look.missing():
        whole.assert_as_desired(desired, look)
        keep_what_is_there(run, desired)
        new_requests.forget(run)
        return dataclasses.replace(_result(desired, []), is_complete=True)
    whole.assert_no_leftovers(desired, look)
    if (count := put_back(run, desired)) > 0:
        return dataclasses.replace(_result(desired, [], files=count), from_kept=True)
    cas = authorities.gather(run.settings, desired.places, desired.role, desired.ca_dir, desired.carried, run.now())
    run = dataclasses.replace(run, settings=in_force(run.settings, cas))
    whole.assert_brought(look, cas)
    keys.assert_sa_at_hand(desired)
    assert_room(run.settings)  # kubeadm's keys need some, too
    open_requests = new_requests.begin(run, desired)
    prepared = new_requests.prepared(run, desired, open_requests)
    found = new_requests.gather_answers(run, desired, prepared, new_requests.expectations(run, desired, cas))
    composer = _composer(run, desired, open_requests, cas)
    proven, failed = verify_all(run, list(found.answered), list(found.waiting), composer.certificate)
    remember(run, found.answered, proven, by_hand=bool(desired.answers))
    run.record.write()
    if failed:
        return _result(desired, failed, strange=found.strange)
    await_validity([one.verified.leaf for one in proven])
    certificates = [file for one in proven for file in one.files]
    files = [*certificates, *_beside_certificates(desired, composer, open_requests)]
    put_in_place(run, desired, files, composer.kubelet_pem)
    for one in proven:
        run.record.add(audit.INSTALLED, one.name, authority=one.prepared.authority, new=one.verified.leaf)
    run.record.write_or_warn()
    return _result(desired, [one.outcome for one in proven], files=len(files), strange=found.strange)


def _result(
    desired: DesiredNode, outcomes: Sequence[Outcome], *, files: int = 0, strange: Sequence[BridgeError] = ()
) -> Bootstrapped:
    return Bootstrapped(
        role=desired.role,
        node=desired.node,
        outcomes=tuple(outcomes),
        files=files,
        is_complete=files > 0,
        strange=tuple(strange),
    )


def _composer(run: Run, desired: DesiredNode, open_requests: Unfinished, cas: Certificates) -> Composer:
    cluster = desired.config.cluster.get("clusterName")
    return Composer(
        places=desired.places,
        role=desired.role,
        servers=open_requests.servers,
        cluster=cluster if isinstance(cluster, str) and cluster else "kubernetes",
        authorities=cas,
        now=run.now(),
    )


def _beside_certificates(desired: DesiredNode, composer: Composer, open_requests: Unfinished) -> Iterator[Replacement]:
    """CA certificates, the service account key and the configuration: what of them is not in place."""
    yield from composer.ca_files()
    if desired.role != "worker":
        made = open_requests.sa_key.encode(), open_requests.sa_public.encode()
        yield from composer.service_account(*(keys.sa_in_place(desired) or desired.sa or made))
    for path, data in desired.files.items():
        yield from composer.configuration(path, data)
