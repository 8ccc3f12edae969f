#!/bin/bash
# Start SLURM on this machine alone: no systemd, no cgroups, sockets on 127.0.0.1; prints `export SLURM_CONF=...`.
# Needs slurm-wlm and munge (Debian). Idempotent; exit 0: the node is ready, 2: a program is missing.
# Partition `urgent` preempts the jobs of `main`, which are requeued.
# Environment: SLURM_TEST_DIR (short, and below folders that everybody may search), SLURM_TEST_PORT (the first of two),
# SLURM_TEST_CPUS, SLURM_TEST_MINJOBAGE
set -eu
dir=${SLURM_TEST_DIR:-${TMPDIR:-/tmp}/slurm-test}
port=${SLURM_TEST_PORT:-16817}
user=$(id -un)
host=$(hostname -s)
PATH=$PATH:/usr/sbin:/sbin
export SLURM_CONF=$dir/slurm.conf

alive() {  # not a zombie, and not another program with its old pid
  local pid
  pid=$(cat "$dir/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ] && grep -q . "/proc/$pid/cmdline"
}

until_ok() {
  local seconds=$1 end=$((SECONDS + $1))
  shift
  while ((SECONDS < end)); do
    "$@" >/dev/null 2>&1 && return
    sleep 0.1
  done
  echo "start.sh: no success in $seconds s: $*" >&2
  tail -n 5 "$dir"/*.log >&2
  exit 1
}

is_up() {
  case $(timeout 5 sinfo -h -N -o %T | sort -u) in
    idle | mixed | allocated | completing) return 0 ;;
    down* | drain*) scontrol update nodename="$host" state=resume && sleep 0.5 ;;
  esac
  return 1
}

for program in munged slurmctld slurmd; do
  command -v $program >/dev/null || { echo "start.sh: there is no $program" >&2; exit 2; }
done
umask 022
mkdir -p "$dir"/{state,spool,munge}
chmod 755 "$dir" "$dir"/*/
[ -s "$dir/munge/key" ] || (umask 077; head -c 1024 /dev/urandom >"$dir/munge/key")
alive munged || {
  rm -f "$dir"/munge/sock*
  chmod 711 "$dir/munge"
  munged --key-file="$dir/munge/key" --socket="$dir/munge/sock" --pid-file="$dir/munged.pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
}
until_ok 10 munge -n -S "$dir/munge/sock"
[ -s "$SLURM_CONF" ] || cat >"$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
SlurmctldPort=$port
SlurmdPort=$((port + 1))
AuthType=auth/munge
AuthInfo=socket=$dir/munge/sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
KillWait=5
MinJobAge=${SLURM_TEST_MINJOBAGE:-300}
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$host NodeAddr=127.0.0.1 CPUs=${SLURM_TEST_CPUS:-8} RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE PriorityTier=1 State=UP
PartitionName=urgent Nodes=$host MaxTime=INFINITE PriorityTier=2 State=UP
CONF
alive slurmctld || slurmctld -f "$SLURM_CONF" >&2
until_ok 15 timeout 5 scontrol ping
alive slurmd || slurmd -f "$SLURM_CONF" >&2
until_ok 30 is_up
echo "export SLURM_CONF=$SLURM_CONF"
