#!/usr/bin/env bash
# One run on one TPU host, whose chips training and vLLM use by turns; resumed by the same command.
#
#   launch/tpu_host.sh CONFIG [section.key=value ...]     [--dry-run first prints]
#
# Needs: pip install '.[tpu]' in .venv; for vLLM also make vllm. Costs: see the
#   config's head for hours; chips times the list price at cloud.google.com/tpu/pricing, check it.
# Example: launch/tpu_host.sh configs/quickstart.yaml
#
# A chip belongs to one process. So with vLLM (generator=vllm, added here where .venv-vllm is there)
# the process that leads the run stays on the CPU, every stage that trains has a process of its own,
# and the one vLLM of this host is ended before such a stage starts.
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=--dry-run; shift; fi
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
here="$(cd "$(dirname "$0")" && pwd)"
export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"
if [ -x "$here/../.venv-vllm/bin/python" ]; then
  set -- "$1" generator=vllm "${@:2}"
fi
exported=(JAX_PLATFORMS)
source "$here/logged.bash"
run_logged "$@"
