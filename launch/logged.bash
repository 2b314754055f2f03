# shellcheck shell=bash disable=SC2154  # here and exported are set by who sources this
# Sourced by the launchers that keep a run's output in runs/. They set `here` (this folder), `dry`
# (not empty: print, do not run) and `exported` (the variables to show), and then call
#   run_logged CONFIG [section.key=value ...]
run_logged() {
  if [ -n "$dry" ]; then
    local shown="" name
    for name in "${exported[@]}"; do shown+="$name=${!name} "; done
    echo "$shown\\"
    exec "$here/local.sh" --dry-run "$@"
  fi
  mkdir -p "$here/../runs"
  # tee by process substitution, so that this shell is replaced and signals reach Python.
  exec "$here/local.sh" "$@" > >(tee -a "$here/../runs/$(date -u +%Y%m%dT%H%M%SZ).log") 2>&1
}
