#!/usr/bin/env bash
# One run on a host with an NVIDIA GPU, its output kept in a log, resumed by the same command.
#
#   launch/gpu_single_host.sh CONFIG [section.key=value ...]     [--dry-run first prints]
#
# Needs: pip install '.[cuda]' in .venv, and a driver for CUDA 12. Costs: see the config's
#   head for hours; a rented card's price an hour is its provider's list price, check it.
# Example: launch/gpu_single_host.sh configs/gpu_24gb.yaml teacher=hf:org/teacher
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=--dry-run; shift; fi
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
here="$(cd "$(dirname "$0")" && pwd)"
# Take memory as it is needed: stages of different sizes follow each other in one process.
export XLA_PYTHON_CLIENT_PREALLOCATE="${XLA_PYTHON_CLIENT_PREALLOCATE:-false}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda}"
exported=(XLA_PYTHON_CLIENT_PREALLOCATE JAX_PLATFORMS)
source "$here/logged.bash"
run_logged "$@"
