#!/usr/bin/env bash
# What systemd does for a kubelet, on a node of the kit, which has none: a unit with kubeadm's drop-in, started when
# asked and again 2 s after each end. It is named `systemctl` in the node's directory, and stands first in its PATH.
#
#   systemctl start|stop|restart|is-active|is-enabled|status|cat kubelet
#   systemctl keep          the service itself, for ever
#
# A kubelet that is beside it is started instead of the kit's: so a node gets a newer one.
# The unit's state is beside it: `kubelet.wanted` while it is to run, `kubelet.pid` while it does.
set -euo pipefail
node=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

running() { [ -e "$node/kubelet.pid" ] && kill -0 "$(cat "$node/kubelet.pid")" 2>/dev/null; }

keep() {
  local args
  while sleep 0.2; do
    if ! [ -e "$node/kubelet.wanted" ] || ! [ -e /var/lib/kubelet/config.yaml ]; then continue; fi
    args=$(sed -n 's/^KUBELET_KUBEADM_ARGS="\(.*\)"/\1/p' /var/lib/kubelet/kubeadm-flags.env 2>/dev/null || true)
    # shellcheck disable=SC2086  # kubeadm's words
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
  echo "systemctl: wanted the kubelet to start, found none after $tries looks" >&2
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
  echo "systemctl: wanted kubelet, the one unit there is here, found ${unit:-none}" >&2
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
