#!/bin/bash
# What the job files here share:  launch.sh train RECIPE [KEY=VALUE ...]   or   launch.sh eval RUN [KEY=VALUE ...]
#
# One rank for each Slurm task. A job that has to leave early saves, ends with 85, is requeued and goes on. The second
# component of a heterogeneous job holds the servers that sample. Read from the environment:
#   OVERRIDES     more KEY=VALUE, quoted as in a shell: OVERRIDES="train.steps=3 parallel.dp=2"
#   OPTIONS       options of grpo-mega: OPTIONS=--resume
#   PYTHON        the interpreter of the environment (python: whatever was active when the job was submitted)
#   MAX_RESTARTS  how often a job may come back (20)
set -uo pipefail

REQUEUE=85  # what a rank ends with that has saved on request, or that hung
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
step="" servers="" signals=0 resume="" urls=""
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}  # the bare number of one task of an array may mean the whole array

# Slurm asks this script (--signal=B:USR1@180). The ranks hear it as USR1: on TERM srun would kill them unsaved.
# shellcheck disable=SC2329  # the trap calls it
pass_on() {
  signals=$((signals + 1))
  # A second request would end ranks that are saving.
  if [ "$signals" = 1 ] && [ -n "$step" ]; then kill -USR1 "$step"; fi
}

wait_for_step() {  # a signal cuts `wait` short, so it is repeated until the ranks are gone
  local last
  while kill -0 "$step" 2> /dev/null; do
    wait ${servers:+-n} "$step" ${servers:+"$servers"}
    code=$?
    if [ -n "$servers" ] && ! kill -0 "$servers" 2> /dev/null; then
      if kill -TERM "$step" 2> /dev/null; then servers_code=$code; fi
      servers=""
    fi
  done
  wait "$step"
  last=$?
  [ "$last" = 127 ] || code=$last  # some shells forget what they have told once
  [ -z "$servers" ] || kill -TERM "$servers"
}

serve() {  # on the node of the second component, at that node's own name
  # shellcheck disable=SC2016  # that node's shell reads it
  SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK_HET_GROUP_1:-1} srun --het-group=1 --kill-on-bad-exit=1 --input=none \
    --output="$logs/serve.txt" --open-mode=append bash -c 'exec "$@" --host "$SLURMD_NODENAME"' serve \
    "$python" -m grpo_mega serve "$@" --urls "$urls" 2> "$logs/srun_serve.txt" &
  servers=$!
}

come_back() {
  local restarts=${SLURM_RESTART_COUNT:-0} most=${MAX_RESTARTS:-20}
  if [ "$restarts" -ge "$most" ]; then
    echo "error: this job has come back $restarts times, and MAX_RESTARTS is $most" >&2
    echo "  remedy: look into the logs; then submit it again with OPTIONS=--resume" >&2
  elif timeout 60 scontrol --oneliner show job "$job" | grep -q "JobState=RUNNING"; then
    echo "requeued after $restarts restarts"
    timeout 60 scontrol requeue "$job" || echo "  remedy: submit it again with OPTIONS=--resume" >&2
  fi  # otherwise Slurm is ending the job itself: one that was cancelled stays cancelled
  exit $REQUEUE
}

main() {  # read whole before it runs: the file may change while the job does
  trap pass_on USR1 TERM
  mapfile -t overrides < <(xargs -r printf '%s\n' <<< "${OVERRIDES:-}")
  read -ra options <<< "${OPTIONS:-}"
  arguments=("$@" "${overrides[@]}" "${options[@]}")

  # Once, before any rank: the recipe's laws, the lock on the run's directory, a free port, whether to resume.
  prepared=$("$python" -m grpo_mega.slurm_job begin "${arguments[@]}") || exit $?
  { read -r run_dir && read -r logs && read -r MASTER_PORT && read -r resume && read -r urls; } <<< "$prepared"
  trap '"$python" -m grpo_mega.slurm_job release "$run_dir"' EXIT
  [ -z "$urls" ] || overrides+=(rollout.engine=sglang rollout.sglang.mode=external "rollout.sglang.urls_file=$urls")
  arguments=("$@" "${overrides[@]}" "${options[@]}")
  [ -z "$resume" ] || arguments+=("$resume")
  MASTER_ADDR=$(timeout 60 scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR MASTER_PORT
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR} PYTHONUNBUFFERED=1
  # Since Slurm 22.05 srun does not take it from the job.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK_HET_GROUP_0:-1}}
  [ "$signals" = 0 ] || come_back

  echo "job $job on $SLURM_JOB_NODELIST: $SLURM_NTASKS ranks meet at $MASTER_ADDR:$MASTER_PORT; logs: $logs"
  [ -z "$urls" ] || echo "servers on $SLURM_JOB_NODELIST_HET_GROUP_1 write their addresses to $urls"
  output=()
  [ "$1" != train ] || output=(--output="$logs/rank_%t.txt" --open-mode=append)
  srun --kill-on-bad-exit=1 --distribution=block --input=none "${output[@]}" \
    "$here/rank.sh" "$python" -m grpo_mega "${arguments[@]}" 2> "$logs/srun.txt" &
  step=$!
  [ -z "$urls" ] || serve "${@:2}" "${overrides[@]}"
  [ "$signals" = 0 ] || kill -USR1 "$step"
  wait_for_step
  if [ -n "${servers_code:-}" ]; then
    echo "error: the servers ended, with exit code $servers_code, before the ranks did" >&2
    tail -n 15 "$logs/serve.txt" >&2
    exit "$((servers_code > 0 ? servers_code : 1))"
  fi
  "$python" -m grpo_mega.slurm_job explain "$logs" "$code"
  code=$?
  [ "$code" != $REQUEUE ] || come_back
  exit "$code"
}

main "$@"
