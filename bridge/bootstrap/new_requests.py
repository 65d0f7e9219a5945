"""A new node's requests: begun once, with keys that are kept, and gone on with by the next run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from bridge.bootstrap import keys, service_account, unfinished
from bridge.bootstrap.keys import Made
from bridge.bootstrap.places import SUPER_ADMIN, Places
from bridge.bootstrap.unfinished import Unfinished
from bridge.bootstrap.wish import NodeWish, OtherWishError
from bridge.contract import SignRequest
from bridge.node.inventory import Item
from bridge.renewal.prepare import Prepared
from bridge.specs import KUBELET_CONF, KUBELET_SERVER, SPECS, CertificateSpec
from bridge.state.requests import OpenRequest
from bridge.state.session import Run, give_up

#: super-admin.conf is needed for seconds; what the settings let be asked for, and a little more.
_SUPER_ADMIN_MORE = timedelta(days=1)


def begin(run: Run, wish: NodeWish) -> Unfinished:
    """
    Go on with what an earlier run has begun, or make keys and CSRs.

    Raises:
        OtherWishError: What waits for an answer is for another node, role or configuration.
        KubeadmError: kubeadm did not make what it should.
    """
    file = unfinished.unfinished_file(run.store)
    found, open_requests = file.read(), run.requests.by_name()
    if found is not None and set(found.names) <= open_requests.keys():
        if found.is_for(wish.role, wish.mark) and not wish.anew:
            return found
        if not wish.anew and any(one.is_waiting for one in run.requests):
            raise OtherWishError(
                "wanted to go on with what waits for an answer, found that another configuration, name or role is asked for now"
            )
    for name in open_requests:
        give_up(run, name, "a new node's keys are made anew")
        run.requests.drop(name)
    file.remove()
    return _begun_anew(run, wish)


def _begun_anew(run: Run, wish: NodeWish) -> Unfinished:
    made = _made(run, wish)
    keys.assert_fits(made, wish.node)
    for name, one in made.items():
        run.requests.put(_open(run, SPECS[name], one))
    run.requests.save()
    sa = ("", "") if wish.role != "init" else service_account.pair_if_new(wish.places, keys.algorithm_of(made))
    fresh = Unfinished(
        role=wish.role,
        config=wish.mark,
        servers={name: one.server for name, one in made.items() if one.server},
        names=tuple(made),
        sa_key=sa[0],
        sa_public=sa[1],
    )
    unfinished.remember(run.store, fresh)
    return fresh


def prepared(run: Run, wish: NodeWish, begun: Unfinished) -> list[Prepared]:
    """The open requests in the form that a renewal has them, but nothing is replaced."""
    made: Mapping[str, OpenRequest] = run.requests.by_name()
    return [
        Prepared(
            item=_item(SPECS[name], wish.places),
            request=made[name].request,
            key_pem=made[name].key_pem,
            was={},
            open=made[name],
        )
        for name in begun.names
    ]


def forget(run: Run) -> None:
    """Drop what was to be remembered until all is in place."""
    for name in run.requests.by_name():
        run.requests.drop(name)
    run.requests.save()
    unfinished.unfinished_file(run.store).remove()


def _made(run: Run, wish: NodeWish) -> dict[str, Made]:
    if wish.role == "worker":
        made = {KUBELET_CONF: keys.kubelet_client(wish.node, wish.server, wish.algorithm)}
    else:
        made = keys.by_kubeadm(wish.kubeadm, wish.config.version, wish.text, wish.role, run.store.directory)
        # the local endpoint, which kubeadm itself writes at the next upgrade
        local = made["controller-manager.conf"].server
        made[KUBELET_CONF] = dataclasses.replace(made[KUBELET_CONF], server=local)
    made[KUBELET_SERVER] = keys.kubelet_serving(wish.node, wish.addresses, keys.algorithm_of(made))
    return made


def _open(run: Run, spec: CertificateSpec, one: Made) -> OpenRequest:
    renewal = run.settings.renewal
    is_short = spec.name == SUPER_ADMIN
    validity = min(renewal.validity, renewal.min_validity + _SUPER_ADMIN_MORE) if is_short else renewal.validity
    request = SignRequest(spec=spec, csr_pem=one.csr_pem, validity=validity)
    return OpenRequest(request=request, key_pem=one.key_pem, created=run.now(), run_id=run.record.run_id)


def _item(spec: CertificateSpec, places: Places) -> Item:
    """A certificate that is not there yet."""
    key: Path | None
    if spec.name == KUBELET_CONF:
        key = certificate = places.kubelet_current
    elif spec.kubeconfig:
        key, certificate = None, places.kubeconfigs / spec.base
    else:
        key, certificate = places.serving if spec.name == KUBELET_SERVER else places.pair(spec)
    return Item(
        spec=spec,
        authority_external=True,
        certificate_path=certificate,
        key_path=key,
        embedded=key is None,
        anchor_path=places.authority(spec.authority),
        certificates=(),
        state="missing",
        trouble=None,
        managed=True,
        listed=spec.listed,
    )
