#!/bin/bash
# A throw-away Slurm on this machine, for tests and for trying job files: the real slurmctld, slurmd, srun. It has two
# nodes, or as many as LOCAL_SLURM_NODES says.
#
#   tools/local_slurm.sh start DIR      then: source DIR/env.sh; sbatch ...
#   tools/local_slurm.sh status DIR
#   tools/local_slurm.sh stop DIR       ends every process it started, jobs included
#
# Needs Debian's slurmctld, slurmd, slurm-client and munge, which `start` installs when they are missing and it is root.
# Where network namespaces are allowed (root) each node has its own, with a name and an address, so that a job that
# says "localhost" and means its neighbour fails as it would on a cluster. Elsewhere all nodes are 127.0.0.1, which
# hides that mistake, and /etc/hosts names them while they run. CPUs, memory and GPUs of the nodes are claims: enough of
# each for any job file to be accepted.
set -euo pipefail

mapfile -t NODES < <(seq -f node%.0f "${LOCAL_SLURM_NODES:-2}")
CPUS=128 MEMORY_MB=1500000 GPUS=8
READY_SECONDS=30 STOP_SECONDS=15

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# = 2 ] || usage
verb=$1
mkdir -p "$2"
DIR=$(cd "$2" && pwd -P)
ID=$(($(printf %s "$DIR" | cksum | cut -d' ' -f1) % 60000))  # two clusters at once do not meet
BRIDGE=gs$ID
HOSTS_MARK="# local Slurm $ID"
NETWORK=10.$((100 + ID / 250 % 150)).$((ID % 250))
export SLURM_CONF=$DIR/slurm.conf PATH=$PATH:/usr/sbin:/sbin

main() {
  case $verb in
    start) start ;;
    stop) stop ;;
    status) timeout 10 sinfo -N -l && timeout 10 squeue ;;
    *) usage ;;
  esac
}

start() {
  install_slurm
  [ ! -e "$DIR/pids" ] || { echo "error: a cluster of $DIR is there already; stop it first" >&2; exit 1; }
  mkdir -p "$DIR"/{munge,state,log,spool,gpu}
  chmod 755 "$DIR" "$DIR"/*
  : > "$DIR/pids"
  make_network
  write_configuration
  trap 'stop; exit 1' ERR
  start_munge
  launch slurmctld slurmctld -D
  for node in "${NODES[@]}"; do start_node "$node"; done
  trap - ERR
  wait_until_idle
}

install_slurm() {
  local missing=""
  for command in slurmctld slurmd sbatch munged ip; do
    command -v "$command" > /dev/null || missing=$command
  done
  [ -n "$missing" ] || return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "error: $missing is missing; as root: apt-get install slurmctld slurmd slurm-client munge iproute2" >&2
    exit 1
  fi
  (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    slurmctld slurmd slurm-client munge iproute2) > "$DIR/apt.log" 2>&1 || { tail "$DIR/apt.log" >&2; exit 1; }
}

make_network() {
  if ! (ip link add "$BRIDGE" type bridge && ip addr add "$NETWORK.1/24" dev "$BRIDGE" &&
    ip link set "$BRIDGE" up && ip netns add "$BRIDGE-probe" && ip netns del "$BRIDGE-probe") 2> /dev/null; then
    ip link del "$BRIDGE" 2> /dev/null || true
    echo "no network namespaces here: all nodes are 127.0.0.1" >&2
    name_nodes
    return
  fi
  touch "$DIR/namespaces"
  local number=0
  for node in "${NODES[@]}"; do
    number=$((number + 1))
    ip netns add "$BRIDGE-$node"
    ip link add "$BRIDGE.$number" type veth peer name eth0 netns "$BRIDGE-$node"
    ip link set "$BRIDGE.$number" master "$BRIDGE" up
    ip -n "$BRIDGE-$node" addr add "$(address "$number")/24" dev eth0
    ip -n "$BRIDGE-$node" link set eth0 up
    ip -n "$BRIDGE-$node" link set lo up
  done
}

name_nodes() {  # where the ranks look names up
  local line="127.0.0.1 ${NODES[*]}"
  ! getent hosts "${NODES[@]}" > /dev/null || return 0
  [ -w /etc/hosts ] || { echo "error: /etc/hosts needs this line: $line" >&2; exit 1; }
  echo "$line  $HOSTS_MARK" >> /etc/hosts
}

forget_names() {  # written in place: a container's is a mount
  local kept
  grep -qF "$HOSTS_MARK" /etc/hosts || return 0
  kept=$(grep -vF "$HOSTS_MARK" /etc/hosts)
  echo "$kept" > /etc/hosts
}

address() {  # of a node by its number, from 1; 0 is the controller
  if [ -e "$DIR/namespaces" ]; then echo "$NETWORK.$((1 + $1))"; else echo 127.0.0.1; fi
}

write_configuration() {
  local base=$((20000 + ID % 10000)) controller number=0
  controller=$(hostname -s)
  {
    cat << CONF
ClusterName=local
SlurmctldHost=$controller($(address 0))
SlurmctldPort=$base
AuthType=auth/munge
# An expired credential is what a requeued job waits for: 5 s in place of 120.
AuthInfo=socket=$DIR/munge/munge.sock,cred_expire=5
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
CommunicationParameters=NoInAddrAny
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,bf_continue
MpiDefault=none
MailProg=/bin/true
ReturnToService=1
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=10
MinJobAge=3600
AccountingStorageType=accounting_storage/none
GresTypes=gpu
CONF
    for node in "${NODES[@]}"; do
      number=$((number + 1))
      echo "NodeName=$node NodeHostname=$node NodeAddr=$(address "$number") Port=$((base + number))" \
        "CPUs=$CPUS Sockets=1 CoresPerSocket=$CPUS ThreadsPerCore=1 RealMemory=$MEMORY_MB Gres=gpu:$GPUS"
    done
    # Jobs of `urgent` push those of `debug` out, which then have 60 s to leave.
    echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60"
    echo "PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF"
  } > "$SLURM_CONF"
  # A count without device files makes a node invalid. These are /dev/null by another name: no CUDA, no harm.
  for ((gpu = 0; gpu < GPUS; gpu++)); do
    [ -e "$DIR/gpu/nvidia$gpu" ] || mknod "$DIR/gpu/nvidia$gpu" c 1 3 2> /dev/null || touch "$DIR/gpu/nvidia$gpu"
  done
  printf 'AutoDetect=off\nName=gpu File=%s\n' "$DIR/gpu/nvidia[0-$((GPUS - 1))]" > "$DIR/gres.conf"
  echo CgroupAutomount=no > "$DIR/cgroup.conf"
  printf 'export SLURM_CONF=%q\n' "$SLURM_CONF" > "$DIR/env.sh"
  {
    echo "127.0.0.1 localhost"
    echo "$(address 0) $controller"
    number=0
    for node in "${NODES[@]}"; do number=$((number + 1)); echo "$(address "$number") $node"; done
  } > "$DIR/hosts"
}

start_munge() {
  if [ ! -f "$DIR/munge/munge.key" ]; then
    (umask 077 && dd if=/dev/urandom of="$DIR/munge/munge.key" bs=128 count=1 status=none)
  fi
  rm -f "$DIR"/munge/munge.sock*
  launch munged munged --foreground --force --key-file="$DIR/munge/munge.key" --num-threads=2 \
    --socket="$DIR/munge/munge.sock" --pid-file="$DIR/munge/munged.pid" --log-file="$DIR/munge/munged.log" \
    --seed-file="$DIR/munge/munged.seed"
  for _ in $(seq 100); do
    [ ! -S "$DIR/munge/munge.sock" ] || return 0
    sleep 0.05
  done
  echo "error: munged did not start; see $DIR/log/munged.out" >&2
  return 1
}

start_node() {
  mkdir -p "$DIR/spool/$1"
  if [ -e "$DIR/namespaces" ]; then
    # Its own name and its own idea of /etc/hosts; the machine's are left alone.
    # shellcheck disable=SC2016
    launch "slurmd-$1" nsenter --net="/run/netns/$BRIDGE-$1" unshare --uts --mount bash -c \
      'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"' "$1" "$DIR/hosts" slurmd -D -N "$1"
  else
    launch "slurmd-$1" slurmd -D -N "$1"
  fi
}

launch() {  # NAME COMMAND...: a daemon of its own session, whose pid is kept
  local name=$1
  shift
  setsid "$@" < /dev/null > "$DIR/log/$name.out" 2>&1 &
  echo $! >> "$DIR/pids"
}

wait_until_idle() {
  local idle=0
  local deadline=$((SECONDS + READY_SECONDS))
  while [ "$SECONDS" -lt "$deadline" ]; do
    idle=$(timeout 10 sinfo -h -N -p debug -t idle -o %N 2> /dev/null | wc -l) || idle=0
    if [ "$idle" -ge ${#NODES[@]} ]; then
      echo "ready: source $DIR/env.sh"
      return
    fi
    sleep 0.2
  done
  echo "error: the nodes did not come up" >&2
  tail -n 5 "$DIR"/log/* >&2 || true
  stop
  exit 1
}

stop() {
  local deadline=$((SECONDS + STOP_SECONDS))
  if [ -e "$DIR/pids" ]; then
    timeout 10 scancel --state=PENDING,RUNNING,SUSPENDED -u "$(id -un)" 2> /dev/null || true
    while [ "$SECONDS" -lt "$deadline" ] && [ -n "$(timeout 5 squeue -h 2> /dev/null)" ]; do sleep 0.2; done
    signal_all TERM
    for _ in $(seq 50); do
      [ -n "$(survivors)" ] || break
      sleep 0.1
    done
    signal_all KILL
    rm -f "$DIR/pids"
  fi
  forget_names
  [ -e "$DIR/namespaces" ] || return 0
  for node in "${NODES[@]}"; do ip netns del "$BRIDGE-$node" 2> /dev/null || true; done
  ip link del "$BRIDGE" 2> /dev/null || true
  rm -f "$DIR/namespaces"
}

survivors() {  # the daemons, and whatever lives on the nodes: job steps outlast their slurmd by design
  local pid
  while read -r pid; do
    ! tr '\0' '\n' 2> /dev/null < "/proc/$pid/environ" | grep -qxF "SLURM_CONF=$SLURM_CONF" || echo "$pid"
  done < "$DIR/pids"
  if [ -e "$DIR/namespaces" ]; then
    for node in "${NODES[@]}"; do ip netns pids "$BRIDGE-$node" 2> /dev/null || true; done
  else
    grep -lzxF "SLURM_CONF=$SLURM_CONF" /proc/[0-9]*/environ 2> /dev/null | cut -d/ -f3 |
      grep -vx -e $$ -e "$BASHPID" -e "$PPID" || true
  fi
}

signal_all() {
  local pid
  for pid in $(survivors); do kill "-$1" "$pid" 2> /dev/null || true; done
}

main
