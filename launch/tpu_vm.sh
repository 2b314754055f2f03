#!/usr/bin/env bash
# One run on all hosts of a Cloud TPU slice: made where it is not there, made again after a
# preemption; resumed by the same command.
#
#   NAME=mine ZONE=us-east5-b TYPE=v6e-16 launch/tpu_vm.sh CONFIG run_dir=gs://bucket/run \
#     [section.key=value ...]                                    [--dry-run first prints]
#
# Needs: gcloud, logged in, with a project and a quota for TYPE in ZONE; `ssh-add
#   ~/.ssh/google_compute_engine` for more than one host; a bucket that the TPU's service account
#   may write, as a preempted host's disk is gone; CONFIG in this tree. A file .env in the tree is
#   copied and read on the hosts (HF_TOKEN=...). One slice, up to v6e: several slices and later
#   TPUs go by xpk.sh or jobset_tpu.yaml.
# Costs: chips of TYPE (v6e-16: 16) times hours times the list price of the zone, from the moment
#   the slice is there until it is deleted, idle or not. See cloud.google.com/tpu/pricing; SPOT=1 is
#   the cheaper price there, and can be preempted.
# Settings: SPOT=1; DELETE=1 deletes the slice after a run that ended well; VLLM=1 installs vLLM
#   (one host); RUNTIME=... for a TYPE whose software version is not known here; POLL=30 (seconds).
# Example, 16 chips that share out every weight:
#   NAME=mine ZONE=us-east5-b TYPE=v6e-16 SPOT=1 DELETE=1 launch/tpu_vm.sh \
#     configs/paper/llama3_8b.yaml run_dir=gs://bucket/llama mesh.fsdp=16
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt 1 ] || [ -z "${NAME:-}" ] || [ -z "${ZONE:-}" ] || [ -z "${TYPE:-}" ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
  exit 2
fi
root="$(cd "$(dirname "$0")/.." && pwd)"
poll="${POLL:-30}"
say() { echo "tpu_vm.sh: $*" >&2; }

if ! printf '%s\n' "$@" | grep -q '^run_dir=gs://' && ! grep -qs '^run_dir: *gs://' "$1"; then
  say "run_dir must be in a bucket (run_dir=gs://...): a preempted host's disk is gone"
  exit 2
fi
case "$TYPE" in
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v[234]-*) runtime=tpu-ubuntu2204-base ;;
  *) runtime="${RUNTIME:?the software version of $TYPE, by cloud.google.com/tpu/docs/runtimes}" ;;
esac
runtime="${RUNTIME:-$runtime}"

run() { # prints a command or runs it
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
tpus() { run gcloud compute tpus "$@" "--zone=$ZONE"; }

# The state of the slice (tpu-vm state) or of the request for it (queued-resources state.state).
state() {
  local said
  if said="$(gcloud compute tpus "$1" describe "$NAME" "--zone=$ZONE" "--format=value($2)" 2>&1)"
  then
    echo "${said##*$'\n'}"
  elif [[ "$said" == *NOT_FOUND* ]]; then
    echo NONE
  else
    say "$said"
    echo UNKNOWN
  fi
}

create() {
  tpus queued-resources create "$NAME" "--node-id=$NAME" "--accelerator-type=$TYPE" \
    "--runtime-version=$runtime" ${SPOT:+--spot}
}

delete() {
  if [ -n "$dry" ] || [ "$(state queued-resources state.state)" != NONE ]; then
    tpus queued-resources delete "$NAME" --force --quiet
  else
    tpus tpu-vm delete "$NAME" --quiet
  fi
}

obtain() { # returns when the slice is there
  local slice request silent=0
  if [ -n "$dry" ]; then
    create
    tpus queued-resources describe "$NAME" "--format=value(state.state)"
    return
  fi
  while [ -z "$stopped" ]; do
    slice="$(state tpu-vm state)"
    request="$(state queued-resources state.state)"
    case "$slice/$request" in
      READY/*) return ;;
      *UNKNOWN*)
        silent=$((silent + 1))
        [ "$silent" -lt 5 ] || { say "gave up: gcloud does not answer"; exit 1; }
        sleep "$poll"
        ;;
      NONE/NONE) create ;;
      */SUSPENDED | PREEMPTED/NONE | PREEMPTED/ACTIVE | TERMINATED/NONE | TERMINATED/ACTIVE)
        delete
        ;;
      STOPPED/* | */FAILED)
        say "the slice is $slice, its request $request: start or delete it yourself"
        exit 1
        ;;
      *)
        say "waiting: the slice is $slice, its request $request"
        sleep "$poll"
        ;;
    esac
  done
}

on_hosts() { # a command on all hosts; in the background, so that this shell hears signals
  local status=0
  tpus tpu-vm ssh "$NAME" --worker=all "--command=$1" &
  local child=$!
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do
    status=0
    wait "$child" || status=$?
  done
  return "$status"
}

worker="montessori_jax/launch/worker.bash"
stop="if [ -f $worker ]; then bash $worker stop; fi"
unpack="mkdir -p montessori_jax && tar -xzf montessori.tgz -C montessori_jax"
prepare="VLLM=${VLLM:-} bash $worker prepare"
printf -v start '%q ' bash "$worker" start "$@"

stopped=""
on_signal() {
  stopped=1
  say "stopping: the run saves first"
  tpus tpu-vm ssh "$NAME" --worker=all "--command=$stop" || true
}

attempt() { # the run's status, or that of the first step that failed; 143 where it was stopped
  [ -z "$stopped" ] || return 143
  tpus tpu-vm scp "$archive" "$NAME:montessori.tgz" --worker=all || return
  [ -z "$stopped" ] || return 143
  on_hosts "$stop && $unpack && $prepare" || return
  [ -z "$stopped" ] || return 143
  on_hosts "$start"
}

archive=montessori.tgz
if [ -z "$dry" ]; then
  archive="$(mktemp)"
  trap 'rm -f "$archive"' EXIT
fi
run tar -czf "$archive" -C "$root" --exclude=./.git --exclude='./.venv*' --exclude=./runs \
  --exclude=./.cache --exclude=./build --exclude=./dist .
trap on_signal INT TERM
short=0
while true; do
  obtain
  status=0
  began=$SECONDS
  attempt || status=$?
  if [ -n "$stopped" ]; then
    say "stopped; the same command goes on. The slice is still there, and is paid for."
    exit "$status"
  fi
  # Hosts that can never be reached are paid for as well.
  if [ $((SECONDS - began)) -gt 600 ]; then short=0; else short=$((short + 1)); fi
  if [ "$status" -ne 0 ] && [ "$short" -ge 10 ]; then
    say "gave up: ten attempts, none of ten minutes, the last with status $status"
    exit "$status"
  fi
  case "$status" in
    0) break ;;
    # The host was told to go, its connection was lost, or trying again may help.
    75 | 143 | 255) again=1 ;;
    *) again="" ;; # an error, or a host that was taken away
  esac
  # The state follows the loss of the hosts, not at once.
  for _ in 1 2 3 4; do
    [ -z "$again" ] || break
    sleep "$poll"
    [ "$(state tpu-vm state)" = READY ] || again=1
  done
  if [ -z "$again" ]; then
    say "the run failed with $status and the slice is there: not a preemption"
    exit "$status"
  fi
  say "the slice was lost, or a host or the storage failed (status $status): again"
  sleep "$poll"
done
if [ -n "${DELETE:-}" ]; then
  delete
elif [ -z "$dry" ]; then
  say "done. The slice is still there, and is paid for until:"
  dry=1 delete >&2
fi
