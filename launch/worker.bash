#!/usr/bin/env bash
# What tpu_vm.sh does on each host of a slice, in the tree that it has copied there.
#
#   bash launch/worker.bash prepare | start CONFIG [section.key=value ...] | stop
set -euo pipefail
cd "$(dirname "$0")/.."
pid_file="$HOME/.montessori.pid"

# Sets pid; false where no run of this host is left. A number alone may be another process's by now.
running() {
  [ -f "$pid_file" ] && read -r pid <"$pid_file" &&
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q montessori
}

# Until the chips are free: a run that lost its connection may still have them. One that does not
# end in five minutes waits for hosts that are gone.
stop() {
  running || return 0
  kill -TERM "$pid"
  for _ in $(seq 300); do
    running || return 0
    sleep 1
  done
  kill -KILL "$pid"
}

case "${1:-}" in
  stop) stop ;;
  prepare)
    bash launch/install.bash tpu
    if [ -n "${VLLM:-}" ]; then make vllm PYTHON="$PWD/.venv/bin/python" VLLM_FOR=tpu; fi
    ;;
  start)
    shift
    if [ -f .env ]; then
      set -a
      # shellcheck disable=SC1091  # the user's own
      source ./.env
      set +a
    fi
    export MONTESSORI_CLUSTER=auto
    echo $$ >"$pid_file"
    # exec: the number stays, and signals reach Python.
    exec "$PWD/launch/tpu_host.sh" "$@"
    ;;
  *)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
