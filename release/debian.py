"""The `.deb`, by dpkg-deb."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import subprocess
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

from release import package
from release.package import DESCRIPTION, HOME, OFFLINE_IS_THERE, SUMMARY, Layout
from release.tree import File
from release.wheels import PYTHONS, BuildError

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
MAINTAINER = "The ca-bridge authors <release@ca-bridge.invalid>"

#: Tags of lintian for things that are right here: a program that brings its own modules belongs into /opt or, as here,
#: into its own directory in /usr/lib.
_OVERRIDES = """\
# The wheels' modules, unchanged, as their authors compiled them: their digests are in the lock file.
ca-bridge: unstripped-binary-or-object [usr/lib/ca-bridge/lib/*]
ca-bridge: hardening-no-fortify-functions [usr/lib/ca-bridge/lib/*]
ca-bridge: embedded-library *usr/lib/ca-bridge/lib/*
# Each licence stays beside its package; debian/copyright lists all of them.
ca-bridge: extra-license-file [usr/lib/ca-bridge/lib/*]
ca-bridge: unusual-interpreter *usr/lib/ca-bridge/lib/*
ca-bridge: executable-not-elf-or-script [usr/lib/ca-bridge/lib/*]
# Vault's administrator reads them before running them.
ca-bridge: script-not-executable [usr/lib/ca-bridge/share/kubeadm-ca-bridge/vault/*]
# An absolute path, so that the administrator's environment can't choose a program that root runs.
ca-bridge: command-with-path-in-maintainer-script /usr/bin/ca-bridge *
# Timers stay disabled until an administrator has written the settings and enables them.
ca-bridge: maintainer-script-calls-systemctl *
"""

_PREINST = f"""\
#!/bin/sh
set -e
case $(readlink /usr/bin/ca-bridge || :) in
  /opt/ca-bridge/*) echo "error: {OFFLINE_IS_THERE}" >&2; exit 1 ;;
esac
"""
_POSTINST = f"""\
#!/bin/sh
set -e
if [ "$1" = configure ]; then
  for version in {" ".join(PYTHONS)}; do
    [ -x "/usr/bin/python$version" ] || continue
    # Only this Python's modules: others may have syntax that it does not know.
    "/usr/bin/python$version" -I -S -m compileall -q -x '/pygments/(lexers|styles|formatters)/' \\
      /{HOME}/lib/any "/{HOME}/lib/cp$(echo "$version" | tr -d .)"
    break
  done
  if [ -e /etc/ca-bridge/config.toml ]; then
    ca-bridge settings check >/dev/null || echo "warning: this version does not accept the settings" >&2
  fi
  if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
    [ -z "$2" ] || {package.RESTART_SERVICES}
  fi
fi
"""
_PRERM = f"""\
#!/bin/sh
set -e
{package.ASSERT_AT_REST}if [ "$1" = remove ]; then
  assert_at_rest journal restart staging
{package.STOP_AND_DISABLE}else
  assert_at_rest
fi
find /{HOME} -name __pycache__ -prune -exec rm -rf {{}} +
"""
_POSTRM = """\
#!/bin/sh
set -e
[ ! -d /run/systemd/system ] || systemctl daemon-reload
if [ "$1" = purge ]; then
  for kept in /etc/ca-bridge /var/lib/ca-bridge; do
    [ ! -e "$kept" ] || echo "ca-bridge: $kept is kept: remove settings, audit log and backups with keys yourself" >&2
  done
fi
"""


def build(layout: Layout, platform: str, epoch: int, scratch: Path, output: Path) -> Path:
    """Write the package."""
    if not shutil.which("dpkg-deb"):
        raise BuildError("wanted dpkg-deb (Debian package dpkg), found none")
    version, architecture = layout.release.version, ARCHITECTURES[platform]
    files = {**layout.files, **_documents(layout, epoch)}
    root = scratch / "root"
    _with_control(root, files, layout, architecture, epoch)
    target = output / f"ca-bridge_{version}_{architecture}.deb"
    options = ["--root-owner-group", "-Zxz", "-z3", "--threads-max=1", "--build"]
    done = subprocess.run(
        ["dpkg-deb", *options, str(root), str(target)],
        env={"PATH": "/usr/bin:/bin", "SOURCE_DATE_EPOCH": str(epoch), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BuildError(f"dpkg-deb: {done.stderr.strip()}")
    return target


def _with_control(root: Path, files: dict[str, File], layout: Layout, architecture: str, epoch: int) -> None:
    sums = "".join(f"{hashlib.md5(file.data).hexdigest()}  {path}\n" for path, file in sorted(files.items()))  # noqa: S324
    size = sum(-(-len(file.data) // 1024) for file in files.values()) + len(files)
    control = {
        "control": File(_control(layout.release.version, architecture, size).encode()),
        "md5sums": File(sums.encode()),
        "preinst": File(_PREINST.encode(), executable=True),
        "postinst": File(_POSTINST.encode(), executable=True),
        "prerm": File(_PRERM.encode(), executable=True),
        "postrm": File(_POSTRM.encode(), executable=True),
    }
    everything = {**files, **{f"DEBIAN/{name}": file for name, file in control.items()}}
    package.Layout(files=everything, links=layout.links, release=layout.release).write(root, epoch)


def _control(version: str, architecture: str, size: int) -> str:
    pythons = " | ".join(f"python{python}" for python in reversed(PYTHONS))
    fields = {
        "Package": "ca-bridge",
        "Version": version,
        "Architecture": architecture,
        "Maintainer": MAINTAINER,
        "Installed-Size": str(size),
        "Depends": f"{pythons}, libc6 (>= 2.28)",
        "Recommends": "openssl",
        "Section": "admin",
        "Priority": "optional",
        "Description": SUMMARY,
    }
    return "".join(f"{name}: {value}\n" for name, value in fields.items()) + "".join(
        f" {line}\n" for line in DESCRIPTION
    )


def _documents(layout: Layout, epoch: int) -> dict[str, File]:
    when = format_datetime(datetime.fromtimestamp(epoch, UTC))
    version = layout.release.version
    changes = f"ca-bridge ({version}) stable; urgency=medium\n\n  * See the change log of the project.\n\n -- {MAINTAINER}  {when}\n"
    return {
        "usr/share/doc/ca-bridge/changelog.gz": File(gzip.compress(changes.encode(), 9, mtime=0)),
        "usr/share/doc/ca-bridge/copyright": File(_copyright(layout).encode()),
        "usr/share/lintian/overrides/ca-bridge": File(_OVERRIDES.encode()),
    }


def _copyright(layout: Layout) -> str:
    """The program's copyright, and the places of the licences of the packages in it."""
    licences = sorted(path for path in layout.files if ".dist-info/" in path and "licen" in path.lower())
    return (
        "Upstream-Name: ca-bridge\n\n"
        "Copyright: 2026 the ca-bridge authors\n\n"
        "ca-bridge is licensed under the Apache License, Version 2.0;\n"
        "on Debian systems its text is in /usr/share/common-licenses/Apache-2.0.\n\n"
        f"The Python packages in it, and their licences, are listed in /{HOME}/bom.cdx.json;\n"
        "the licence texts are in\n" + "".join(f"  /{path}\n" for path in licences)
    )
