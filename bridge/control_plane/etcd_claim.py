"""The turn to restart among etcd hosts, which have no API server: a key that etcd removes when its holder is gone."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from http import HTTPStatus
from typing import Any

from bridge.cluster.access import document, items
from bridge.cluster.api import NoAnswerError
from bridge.control_plane.probes import Etcd
from bridge.node.endpoints import Server
from bridge.system import http

_PREFIX = "/ca-bridge/"  # Kubernetes keeps everything below /registry
_TURNS = 5  # each one that fails means that another host was faster


class EtcdClaim:
    """A claim to one key, as `cluster.lease.Lease` is one to an object of Kubernetes."""

    def __init__(
        self, etcd: Etcd, urls: Sequence[str], name: str, holder: str, *, duration: timedelta, owner: str
    ) -> None:
        """Claim the key `name` for a unique `holder`; `OWNER_…` is an earlier claim of ours, which is not waited for."""
        self.name = name
        self._etcd = etcd
        self._urls = tuple(dict.fromkeys(urls))
        self._key = _text(f"{_PREFIX}{name}")
        self._holder = holder
        self._seconds = math.ceil(duration.total_seconds())
        self._owner = owner
        self._id = ""  # of etcd's lease

    def take(self) -> str:
        """Take it if it is free, or keep it; returns another holder, or an empty text if it is ours now."""
        self._keep_alive()
        for _ in range(_TURNS):
            holder = self._put_if({"target": "CREATE", "createRevision": "0"})
            if holder in {"", self._holder}:
                return ""
            if holder.rpartition("_")[0] != self._owner:
                return holder
            if not self._put_if({"target": "VALUE", "value": _text(holder)}):
                return ""
        raise NoAnswerError(f"wanted the lease {self.name}, found that it changed each time")

    def give_back(self) -> None:
        """Release it at once, if it is ours: the key goes with its lease."""
        if self._id:
            self._call("/v3/lease/revoke", {"ID": self._id})
            self._id = ""

    def _keep_alive(self) -> None:
        """Have a lease that lives: the old one, or a new one where etcd has ended that."""
        if self._id:
            found = self._call("/v3/lease/keepalive", {"ID": self._id}).get("result")
            if not isinstance(found, dict):  # a stream's error comes with status 200; the lease may live
                text = f"wanted to keep the lease {self.name}, found that etcd does not say whether it lives"
                raise NoAnswerError(text)
            if found.get("TTL") not in (None, "0", 0):
                return
        self._id = str(self._call("/v3/lease/grant", {"TTL": self._seconds}).get("ID") or "")
        if not self._id:
            raise NoAnswerError(f"wanted a lease of etcd for {self.name}, found none in its answer")

    def _put_if(self, condition: Mapping[str, str]) -> str:
        """Write it if the condition holds; returns who has it else, and an empty text if it was written."""
        put = {"key": self._key, "value": _text(self._holder), "lease": self._id}
        body = {
            "compare": [{"key": self._key, "result": "EQUAL", **condition}],
            "success": [{"requestPut": put}],
            "failure": [{"requestRange": {"key": self._key}}],
        }
        found = self._call("/v3/kv/txn", body)
        if found.get("succeeded") is True:
            return ""
        for each in items(found, "responses"):
            for one in items(each, "response_range", "kvs"):
                return base64.b64decode(str(one.get("value"))).decode(errors="replace")
        return "a host that has just gone"

    def _call(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of the first member that gives one (NoAnswerError: none did)."""
        troubles = []
        for url in self._urls:
            try:
                answer = self._etcd.ask(Server(url), path, json.dumps(body).encode())
                if answer.status == HTTPStatus.OK:
                    return document(answer.body)
            except http.HttpsError as e:
                troubles.append(f"{url}: {e}")
            else:
                troubles.append(f"{url}: HTTP {answer.status}")
        raise NoAnswerError(f"wanted etcd's word on the lease {self.name}, found {'; '.join(troubles)}")


def _text(value: str) -> str:
    return base64.b64encode(value.encode()).decode()
