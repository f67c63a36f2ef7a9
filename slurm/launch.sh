#!/usr/bin/env bash
# Runs `coatnet ARGUMENTS` as every task of this Slurm job, and acts on how it ends. The templates beside it call it.
#
# What a site must adapt goes into a file `site.sh` beside this one, which is read here if it is there:
#
#   module load cuda                             # modules
#   export NCCL_SOCKET_IFNAME=ib0                # the network of the nodes
#   export TMPDIR=/local/scratch/$SLURM_JOB_ID   # a disk of the node: data.cache.folder lies there unless a recipe says
#   COATNET=/shared/coatnet/.venv/bin/coatnet    # where the command is, if not in ../.venv/bin or on PATH
#   COATNET_CONTAINER=/shared/coatnet.sqsh       # an image to run in, where the recipe names none
#   COATNET_CONTAINER_RUNTIME=apptainer          # pyxis unless given
#   COATNET_CONTAINER_MOUNTS=$'/data\n/scratch:/tmp'   # one on a line
#
# Partition, account and the like are options of sbatch, or in the recipe's `resources` if `coatnet submit` is used.
set -uo pipefail

say() { echo "$(date '+%Y-%m-%d %H:%M:%S') job $job: $*"; }

main() { # as a whole in memory: bash would go on in the middle of a file that changes under a long srun
    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    # shellcheck source=/dev/null
    if [ -r "$here/site.sh" ]; then . "$here/site.sh"; fi
    program=${COATNET:-}
    if [ -z "$program" ]; then
        program=$here/../.venv/bin/coatnet
        if [ -n "${COATNET_CONTAINER:-}" ] || [ ! -x "$program" ]; then program=coatnet; fi
    fi
    if [ "$1" = tensorboard ]; then
        program=${program%coatnet}tensorboard
        shift
    fi

    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    notes=$PWD/.coatnet-job-$job # on a file system that all nodes share, as logs are

    # Ranks of one process group; see `join_ranks`. One port for a job: several may share a node.
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MASTER_ADDR
    export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # srun does not take it from sbatch by itself.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export COATNET_CAUSE_FILE=$notes.cause COATNET_BEGUN_FILE=$notes.begun
    rm -f "$COATNET_CAUSE_FILE" "$COATNET_BEGUN_FILE"

    # All tasks see all GPUs of their node, without which NCCL cannot use the links between them.
    srun=(srun --kill-on-bad-exit=1 --gpu-bind=none)
    inside=()
    if [ -n "${COATNET_CONTAINER:-}" ]; then
        mapfile -t mounts <<<"${COATNET_CONTAINER_MOUNTS:-}"
        mounts+=("$PWD" "$here")
        case ${COATNET_CONTAINER_RUNTIME:-pyxis} in
        pyxis)
            joined=
            for mount in "${mounts[@]}"; do
                [ -n "$mount" ] || continue
                case $mount in *:*) ;; *) mount=$mount:$mount ;; esac
                joined+=${joined:+,}$mount
            done
            srun+=("--container-image=$COATNET_CONTAINER" "--container-mounts=$joined" "--container-workdir=$PWD")
            ;;
        apptainer)
            inside=(apptainer exec --nv --pwd "$PWD")
            for mount in "${mounts[@]}"; do [ -z "$mount" ] || inside+=(--bind "$mount"); done
            inside+=("$COATNET_CONTAINER")
            ;;
        *)
            say "COATNET_CONTAINER_RUNTIME is $COATNET_CONTAINER_RUNTIME; it must be pyxis or apptainer" >&2
            exit 78
            ;;
        esac
    fi

    # A task learns who it is from Slurm. With exec, signals reach Python.
    # shellcheck disable=SC2016
    rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) && export LOCAL_WORLD_SIZE && exec "$@"'

    say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, ${SLURM_NTASKS:-1} tasks"
    trap : TERM USR1 USR2 # the tasks act on them; this shell lives on to act on what comes of it
    "${srun[@]}" "${inside[@]}" bash -c "$rank" rank "$program" "$@"
    code=$?

    # srun reports the greatest code of all tasks, of which most only lost the one that failed. The first cause counts.
    why="srun ended with $code"
    if [ -s "$COATNET_CAUSE_FILE" ]; then
        { read -r code && why=$(cat); } <"$COATNET_CAUSE_FILE"
    elif [ "$code" = 1 ] || [ "$code" -gt 128 ]; then
        code=75 # a rank was killed, or a node is gone
    fi
    begun=
    if [ -e "$COATNET_BEGUN_FILE" ] || [ "$1" != train ]; then begun=yes; fi
    rm -f "$COATNET_BEGUN_FILE" "$COATNET_CAUSE_FILE"
    starts=0
    if [ -r "$notes.starts" ]; then read -r starts <"$notes.starts"; fi
    rm -f "$notes.starts"
    case $code in
    0)
        say "done"
        ;;
    75)
        # A job that was cancelled must not come back, and one that is preempted comes back by itself.
        state=$(squeue --noheader --jobs="$job" --format='%T %r')
        case $state in
        RUNNING* | *TimeLimit*)
            # What begins and gets nowhere is counted in the run's event log. What does not even begin is counted here.
            if [ -z "$begun" ] && [ "$((starts += 1))" -ge 3 ]; then
                say "failed: $starts starts in a row ended before the run began ($why)"
                exit 70
            fi
            [ -n "$begun" ] || echo "$starts" >"$notes.starts"
            say "requeued: $why" # said first, since Slurm ends this script soon
            scontrol requeue "$job" || say "could not be requeued; submit it again, and it continues"
            ;;
        *)
            say "ended as ${state:-nobody knows what}: $why"
            ;;
        esac
        ;;
    *)
        say "failed with exit code $code, not requeued: $why"
        ;;
    esac
    exit "$code"
}

main "$@"
