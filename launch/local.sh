#!/usr/bin/env bash
# One run on this machine, resumed by the same command.
#
#   launch/local.sh CONFIG [section.key=value ...]     [--dry-run first prints the command]
#
# Needs: the package installed (make install). Costs: what the config says at its head.
# Example: launch/local.sh configs/quickstart.yaml run_dir=runs/mine
set -euo pipefail
dry=""
if [ "${1:-}" = "--dry-run" ]; then dry=1; shift; fi
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
montessori="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin/montessori"
[ -x "$montessori" ] || montessori="montessori"
if [ -n "$dry" ]; then printf '%q ' "$montessori" run "$@"; echo; exit 0; fi
# exec: signals reach Python, which saves before it stops.
exec "$montessori" run "$@"
