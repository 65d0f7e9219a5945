#!/usr/bin/env bash
# Stands in for systemd on a node of the kit, which has none: runs the kubelet like a unit with kubeadm's drop-in, and
# restarts it 2 s after it ends. Its name is `systemctl` in the node's directory, which is first in the node's PATH.
#
#   systemctl start|stop|restart|is-active|is-enabled|status|cat kubelet
#   systemctl keep          runs the service, without end
#
# A kubelet beside this file is started instead of the kit's, so that a node can get a newer one.
# The unit's state is in the node's directory: `kubelet.wanted` while it should run, `kubelet.pid` while it runs.
set -euo pipefail
node=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

running() { [ -e "$node/kubelet.pid" ] && kill -0 "$(cat "$node/kubelet.pid")" 2>/dev/null; }

keep() {
  local args
  while sleep 0.2; do
    if ! [ -e "$node/kubelet.wanted" ] || ! [ -e /var/lib/kubelet/config.yaml ]; then continue; fi
    args=$(sed -n 's/^KUBELET_KUBEADM_ARGS="\(.*\)"/\1/p' /var/lib/kubelet/kubeadm-flags.env 2>/dev/null || true)
    # shellcheck disable=SC2086  # kubeadm's arguments, split into words
    PATH="$node/bin:$PATH" kubelet --bootstrap-kubeconfig=/etc/kubernetes/bootstrap-kubelet.conf --kubeconfig=/etc/kubernetes/kubelet.conf \
      --config=/var/lib/kubelet/config.yaml $args >>"$node/kubelet.log" 2>&1 </dev/null &
    echo $! >"$node/kubelet.pid"
    wait $! || true
    rm -f "$node/kubelet.pid"
    [ ! -e "$node/kubelet.wanted" ] || [ -e "$node/kubelet.now" ] || sleep 2
    rm -f "$node/kubelet.now"
  done
}

start() {
  local tries
  touch "$node/kubelet.wanted"
  for tries in $(seq 1800); do
    ! running && [ -e /var/lib/kubelet/config.yaml ] || return 0
    sleep 0.1
  done
  echo "systemctl: wanted the kubelet to start, found none after $tries checks" >&2
  return 1
}

stop() {
  rm -f "$node/kubelet.wanted"
  while running; do kill "$(cat "$node/kubelet.pid")" 2>/dev/null || true; sleep 0.1; done
}

restart() {
  touch "$node/kubelet.now"
  stop
  start
}

unit=
for word in "${@:2}"; do [[ $word == -* ]] || unit=${word%.service}; done
[ "${1:-}" = keep ] || [ "${1:-}" = daemon-reload ] || [ "$unit" = kubelet ] || {
  echo "systemctl: wanted kubelet, the only unit here, found ${unit:-none}" >&2
  exit 4
}
case ${1:-} in
  keep | start | stop | restart) "$1" ;;
  daemon-reload) ;;
  is-active) if running; then echo active; else echo inactive; exit 3; fi ;;
  is-enabled) echo enabled ;;
  status) echo "Loaded: loaded (kubelet.service; enabled)"; running ;;
  cat) echo "# kubelet.service" ;;
  *) echo "systemctl: wanted start, stop, restart, is-active, is-enabled, status, cat or keep, found ${1:-nothing}" >&2; exit 2 ;;
esac
