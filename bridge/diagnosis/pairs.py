"""Further pairs: whether each is what the settings say, could be replaced where it is, and would be read again."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator, Sequence
from datetime import datetime

from bridge.diagnosis.findings import Finding, from_error
from bridge.diagnosis.installed import chain, end, key_of
from bridge.node.inventory import AuthorityState, Item, Node
from bridge.node.manifests import pod_name
from bridge.node.pairs import KEY_MASK, account, lost_copy
from bridge.renewal import in_use
from bridge.renewal.pairs import how
from bridge.settings.pairs import PairFiles, PairSettings
from bridge.settings.tables import Settings
from bridge.system.run_command import unsafe_program


def look(node: Node, settings: Settings, now: datetime) -> Iterator[Finding]:
    """Examine all of them."""
    for item in node.items:
        if item.pair is not None:
            yield from _item(item, item.pair, node.authorities, settings, now)
    for one in in_use.late(settings, node, now):
        if one.component is None:
            text = f"its program was not seen to use the installed pair: {one.what}: {one.state}: {one.detail}"
            item = next(item for item in node.items if item.spec.name == one.certificate)
            yield Finding.warning("not-in-use", one.certificate, text, how(item))


def _item(
    item: Item, pair: PairSettings, authorities: Sequence[AuthorityState], settings: Settings, now: datetime
) -> Iterator[Finding]:
    name, text = pair.name, item.trouble or f"wanted a certificate in {item.certificate_path}, found nothing"
    if item.obstacle is not None:
        yield from_error("not-replaceable", name, item.obstacle)
    if item.state == "missing":
        yield Finding.warning(
            "certificate-missing", name, text, f"the next run makes it; so does `ca-bridge renew {name}`"
        )
    elif item.state != "present":
        hint = f"does [certificate.{name}] name the right file? Move it away, and `ca-bridge renew {name}` makes it"
        yield Finding.error(f"certificate-{item.state}", name, text, hint)
    else:
        yield end(item, settings, now)
        if item.unlike is not None:
            yield Finding.warning("pair-differs", name, item.unlike, "the next run asks for what the settings say")
        else:
            yield from chain(item, authorities)
        yield from key_of(item)
        if (lost := lost_copy(item)) is not None:
            yield Finding.warning("pair-differs", name, lost, "the next run makes a new pair for all places")
        for files in pair.places:
            yield from _key_file(name, files)
    yield from _reload(pair)


def _key_file(name: str, files: PairFiles) -> Iterator[Finding]:
    """The key is closed to others, and belongs to the owner that the settings name."""
    try:
        status = files.key_file.stat()
        wanted = account(files.owner) if files.owner else (status.st_uid, status.st_gid)
    except (OSError, LookupError):
        return  # another finding says so
    mode = stat.S_IMODE(status.st_mode)
    if mode & ~KEY_MASK:
        text = f"{files.key_file}: wanted it for its owner, and perhaps a group that reads it, found mode {mode:04o}"
        hint = f"chmod 640 {files.key_file}; renew {name} if another user may have read it"
        yield Finding.error("open-secret", name, text, hint)
    if (status.st_uid, status.st_gid) != wanted:
        text = f"{files.key_file}: wanted owner {files.owner}, found {status.st_uid}:{status.st_gid}"
        yield Finding.warning("pair-owner", name, text, f"chown {files.owner} {files.key_file}; a renewal does it, too")


def _reload(pair: PairSettings) -> Iterator[Finding]:
    """The command could be run, before a certificate is spent on it."""
    words, manifest = pair.reload_words(), pair.static_pod
    if manifest is not None and not pod_name(manifest):
        text = f"wanted the manifest of a static pod in {manifest}, found none"
        yield Finding.error("pair-reload", pair.name, text)
    if not words:
        return
    if (unsafe := unsafe_program(words)) is not None:
        yield Finding.error("pair-reload", pair.name, str(unsafe), unsafe.hint)
    elif shutil.which(words[0]) is None:
        yield Finding.error("pair-reload", pair.name, f"wanted a program {words[0]!r}, found none that can be run")
