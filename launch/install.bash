#!/usr/bin/env bash
# Installs this clone into its .venv on a host whose own Python is too old; again is quick.
#
#   bash launch/install.bash tpu|cuda
#
# Needs: pip for the host's Python 3, and a network; uv brings Python 3.12.
set -euo pipefail
[ $# -eq 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
cd "$(dirname "$0")/.."
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --quiet --user uv
[ -x .venv/bin/python ] || uv venv --quiet --python 3.12 --seed .venv
uv pip install --quiet --python .venv/bin/python -e ".[$1,gcs]"
