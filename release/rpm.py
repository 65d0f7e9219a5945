"""The `.rpm`, by rpmbuild."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from release.package import (
    ASSERT_AT_REST,
    DESCRIPTION,
    HOME,
    OFFLINE_IS_THERE,
    RESTART_SERVICES,
    STOP_AND_DISABLE,
    SUMMARY,
    Layout,
)
from release.wheels import PYTHONS, BuildError

_SPEC = """\
Name: ca-bridge
Version: {version}
Release: 1
Summary: {summary}
License: Apache-2.0
URL: https://ca-bridge.invalid/
AutoReqProv: no
Requires: ({pythons})
Requires: libc.so.6(GLIBC_2.28)(64bit)
Recommends: openssl
# The wheels stay unchanged: no stripping, no bytecode, no changed first lines.
%global __os_install_post %{{nil}}
%global debug_package %{{nil}}
%global _build_id_links none

%description
{description}

%install
cp -a {root}/. %{{buildroot}}/

%files
{files}

%pre
case $(readlink /usr/bin/ca-bridge || :) in
  /opt/ca-bridge/*) echo "error: {offline}" >&2; exit 1 ;;
esac
{at_rest}[ "$1" -lt 2 ] || assert_at_rest

%post
for version in {versions}; do
  [ -x "/usr/bin/python$version" ] || continue
  "/usr/bin/python$version" -I -S -m compileall -q -x '/pygments/(lexers|styles|formatters)/' \\
    /{home}/lib/any "/{home}/lib/cp$(echo "$version" | tr -d .)"
  break
done
if [ -e /etc/ca-bridge/config.toml ]; then
  /usr/bin/ca-bridge settings check >/dev/null || echo "warning: this version does not accept the settings" >&2
fi
if [ -d /run/systemd/system ]; then
  systemctl daemon-reload
  [ "$1" -lt 2 ] || {restart}
fi

%preun
{at_rest}if [ "$1" = 0 ]; then
  assert_at_rest journal restart staging
{stop}  find /{home} -name __pycache__ -prune -exec rm -rf {{}} +
fi

%postun
[ ! -d /run/systemd/system ] || systemctl daemon-reload
"""


def build(layout: Layout, platform: str, epoch: int, scratch: Path, output: Path) -> Path:
    """Write the package; as `debian.build`."""
    if not shutil.which("rpmbuild"):
        raise BuildError("wanted rpmbuild (Debian package rpm), found none")
    root, top = scratch / "root", scratch / "rpm"
    layout.write(root, epoch)
    spec = scratch / "ca-bridge.spec"
    spec.write_text(_spec(layout, root), encoding="utf-8")
    defined = {
        "_topdir": str(top),
        "_rpmdir": str(top),
        "_rpmfilename": "%{NAME}.rpm",
        "_buildhost": "ca-bridge",
        "_binary_payload": "w3.xzdio",
        "use_source_date_epoch_as_buildtime": "1",
        "clamp_mtime_to_source_date_epoch": "1",
    }
    options = [word for name, value in defined.items() for word in ("--define", f"{name} {value}")]
    done = subprocess.run(
        ["rpmbuild", "-bb", "--target", f"{platform}-linux", *options, str(spec)],
        env={"PATH": "/usr/bin:/bin", "HOME": str(scratch), "SOURCE_DATE_EPOCH": str(epoch), "LC_ALL": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BuildError(f"rpmbuild: {done.stderr.strip()[-2000:]}")
    target = output / f"ca-bridge-{layout.release.version}-1.{platform}.rpm"
    shutil.move(top / "ca-bridge.rpm", target)
    return target


def _spec(layout: Layout, root: Path) -> str:
    ours = [f"%dir /{HOME}", f"/{HOME}/*"]
    others = sorted(f"/{path}" for path in (*layout.files, *layout.links) if not path.startswith(f"{HOME}/"))
    return _SPEC.format(
        at_rest=ASSERT_AT_REST,
        stop=STOP_AND_DISABLE,
        restart=RESTART_SERVICES,
        version=layout.release.version,
        summary=SUMMARY,
        pythons=" or ".join(f"/usr/bin/python{python}" for python in PYTHONS),
        versions=" ".join(PYTHONS),
        description="\n".join(DESCRIPTION),
        root=root,
        files="\n".join(["%defattr(-,root,root,-)", *ours, *others]),
        offline=OFFLINE_IS_THERE,
        home=HOME,
    )
