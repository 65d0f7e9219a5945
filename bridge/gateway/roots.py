"""
ClusterTrustBundles: the roots that pods trust, kept equal to those in `pods.crt`, one object a signer.

What another client changes or deletes is put back; nothing but the gateway's own objects is ever touched.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

from bridge.cluster.api import MERGE_PATCH, Api, NoAnswerError, Reply
from bridge.gateway.watch import GROUP
from bridge.pki.certificates import pem
from bridge.words import one_line

log = logging.getLogger("ca-bridge")

COLLECTION = f"{GROUP}/clustertrustbundles"
_SUFFIX = "ca-bridge"
#: What says that an object is ours to remove.
_LABEL = {"app.kubernetes.io/managed-by": "ca-bridge"}


def name_of(signer: str) -> str:
    """The object's name, which the API server wants to begin with the signer's."""
    return f"{signer.replace('/', ':')}:{_SUFFIX}"


class Roots:
    """For one thread."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._said: dict[str, str] = {}
        self.good: dict[str, bool] = {}  #: By signer: the object is as it should be.

    def keep(self, signer: str, roots: bytes | None) -> None:
        """Have the object with these certificates in PEM, or with None no object of ours."""
        try:
            trouble = self._kept(signer, roots)
        except NoAnswerError as e:
            trouble = str(e)
        self.good[signer] = not trouble
        if trouble and self._said.get(signer) != trouble:
            log.error("the roots of %s are not published: %s", signer, trouble)
        self._said[signer] = trouble

    def _kept(self, signer: str, roots: bytes | None) -> str:
        """Why it is not so; empty: it is."""
        path = f"{COLLECTION}/{quote(name_of(signer), safe=':')}"
        reply = self._api.ask("GET", path)
        if reply.status == HTTPStatus.NOT_FOUND:
            return self._made(signer, roots) if roots is not None else ""
        if reply.status != HTTPStatus.OK:
            return _trouble(reply)
        if roots is None:
            return self._removed(path, reply.document)
        return self._changed(path, signer, roots, reply.document)

    def _made(self, signer: str, roots: bytes) -> str:
        body = {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "ClusterTrustBundle",
            "metadata": {"name": name_of(signer), "labels": _LABEL},
            "spec": {"signerName": signer, "trustBundle": roots.decode("ascii")},
        }
        reply = self._api.ask("POST", COLLECTION, body)
        if reply.status == HTTPStatus.CREATED:
            log.info("published the roots of %s as %s", signer, name_of(signer))
        return "" if reply.status == HTTPStatus.CREATED else _trouble(reply)

    def _changed(self, path: str, signer: str, roots: bytes, document: Mapping[str, Any]) -> str:
        if document["spec"].get("trustBundle") == roots.decode("ascii") and _is_ours(document):
            return ""
        metadata = {"resourceVersion": document["metadata"]["resourceVersion"], "labels": _LABEL}
        body = {"metadata": metadata, "spec": {"trustBundle": roots.decode("ascii")}}
        reply = self._api.ask("PATCH", path, body, MERGE_PATCH)
        if reply.status == HTTPStatus.OK:
            log.warning("published the roots of %s anew: %s had others", signer, name_of(signer))
        return "" if reply.status == HTTPStatus.OK else _trouble(reply)

    def _removed(self, path: str, document: Mapping[str, Any]) -> str:
        if not _is_ours(document):
            return ""
        metadata = document["metadata"]
        conditions = {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        body = {"kind": "DeleteOptions", "apiVersion": "v1", "preconditions": conditions}
        reply = self._api.ask("DELETE", path, body)
        if reply.status == HTTPStatus.OK:
            log.warning("removed %s: the policy publishes these roots no more", metadata["name"])
        return "" if reply.status in {HTTPStatus.OK, HTTPStatus.NOT_FOUND} else _trouble(reply)


def text_of(roots: tuple[Any, ...]) -> bytes:
    """Certificates in PEM, each once, as the API server wants them."""
    return pem(*dict.fromkeys(roots))


def _is_ours(document: Mapping[str, Any]) -> bool:
    labels = document["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in _LABEL.items())


def _trouble(reply: Reply) -> str:
    return one_line(f"HTTP {reply.status} {reply.message}")
