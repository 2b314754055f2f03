#!/usr/bin/env bash
# One run on TPU slices of a GKE cluster, by xpk; resumed by the same command.
#
#   CLUSTER=mine ZONE=us-east5-b TYPE=v6e-16 IMAGE=REGION-docker.pkg.dev/project/repository/image \
#     launch/xpk.sh CONFIG run_dir=gs://bucket/run [section.key=value ...]  [--dry-run first prints]
#
# Needs: xpk (pip install xpk), kubectl and gcloud, logged in; a cluster made by `xpk cluster create`;
#   IMAGE built from launch/Dockerfile (--target tpu) and pushed; a bucket that the cluster's nodes
#   may write.
# Costs: chips of TYPE times SLICES times hours times the list price of the zone, and the cluster;
#   nodes that xpk reserved are paid for without a run too. See cloud.google.com/tpu/pricing.
# Settings: WORKLOAD=montessori; SLICES=1; PROJECT=...; RESTARTS=20, of all hosts, after any of them
#   failed.
# To resume: delete what is left of the last one (xpk workload delete --cluster ... --workload ...)
#   and give the same command. Logs: kubectl logs -l xpk.google.com/workload=montessori
# Example, two slices, each with all weights shared out:
#   CLUSTER=mine ZONE=us-east5-b TYPE=v6e-16 SLICES=2 IMAGE=... launch/xpk.sh \
#     configs/paper/llama3_8b.yaml run_dir=gs://bucket/llama mesh.fsdp=16
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
if [ $# -lt 1 ] || [ -z "${CLUSTER:-}" ] || [ -z "${ZONE:-}" ] || [ -z "${TYPE:-}" ] ||
  [ -z "${IMAGE:-}" ]; then
  sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
  exit 2
fi
# 75 is what a host ends with whose neighbour was taken away; xpk restarts on 127 and above by itself,
# and takes all else for final: a wrong setting ends with 2.
# exec: xpk starts this in a shell, which passes SIGTERM on to its child.
printf -v inside '%q ' exec montessori run "$@"
create=(xpk workload create "--cluster=$CLUSTER" "--zone=$ZONE" "--tpu-type=$TYPE"
  "--num-slices=${SLICES:-1}" "--workload=${WORKLOAD:-montessori}" "--docker-image=$IMAGE"
  "--max-restarts=${RESTARTS:-20}" "--restart-on-exit-codes=75" --termination-grace-period-seconds=300
  --env=MONTESSORI_CLUSTER=auto "--command=${inside% }")
if [ -n "${PROJECT:-}" ]; then create+=("--project=$PROJECT"); fi
if [ -n "$dry" ]; then printf '%q ' "${create[@]}"; echo; exit 0; fi
exec "${create[@]}"
