#!/bin/bash
# Stop what start.sh started, jobs first; --wipe removes its folder. Idempotent, and it always ends.
set -u
dir=${SLURM_TEST_DIR:-${TMPDIR:-/tmp}/slurm-test}
export SLURM_CONF=$dir/slurm.conf

alive() {
  local pid
  pid=$(cat "$dir/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] && grep -q . "/proc/$pid/cmdline"
}

wait_for() {
  local end=$((SECONDS + $1))
  shift
  while ((SECONDS < end)); do
    "$@" >/dev/null 2>&1 && return 0
    sleep 0.1
  done
  return 1
}

no_jobs() {
  local jobs
  jobs=$(timeout 5 squeue -h 2>/dev/null) && [ -z "$jobs" ]
}

if alive slurmctld; then
  for signal in TERM KILL; do
    no_jobs && break
    timeout 5 squeue -h -o %A | sort -u | timeout 5 xargs -r scancel --signal=$signal --full 2>/dev/null
    timeout 5 squeue -h -o %A | sort -u | timeout 5 xargs -r scancel 2>/dev/null
    wait_for 6 no_jobs
  done
fi
for program in slurmctld slurmd munged; do
  gone() { ! alive $program; }
  alive $program && kill "$(cat "$dir/$program.pid")"
  wait_for 8 gone || { kill -9 "$(cat "$dir/$program.pid")"; wait_for 2 gone; }
  rm -f "$dir/$program.pid"
done
[ "${1:-}" = --wipe ] && rm -rf "$dir"
exit 0
