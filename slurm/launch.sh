#!/usr/bin/env bash
# Runs `coatnet ARGUMENTS` as every task of this Slurm job, and acts on how it ends. The templates beside it call it.
#
# Settings of the site go into the file that the environment variable COATNET_SITE names, or else into `site.sh` beside
# this file, if it exists. The file is sourced here, before anything runs:
#
#   module load cuda                             # modules
#   export NCCL_SOCKET_IFNAME=ib0                # the network interface between nodes
#   MASTER_ADDR=$(hostname)-ib                   # the first node, where the ranks meet; default: its name in Slurm
#   export TMPDIR=/local/scratch/$SLURM_JOB_ID   # a disk of the node: data.cache.folder defaults to a folder there
#   COATNET=/shared/coatnet/.venv/bin/coatnet    # path of the command, if not in ../.venv/bin or on PATH
#   COATNET_CONTAINER=/shared/coatnet.sqsh       # container image, if the recipe names none
#   COATNET_CONTAINER_RUNTIME=apptainer          # default: pyxis
#   COATNET_CONTAINER_MOUNTS=$'/data\n/scratch:/tmp'   # one per line
#
# COATNET_SITE is for a checkout that several sites share, and for an installed package, where `slurm/` is in
# site-packages: `export COATNET_SITE=/shared/coatnet/site.sh` before `sbatch` or `coatnet submit`. If it names a file
# that cannot be read, the job fails with exit code 78.
#
# Partition, account and the like are options of sbatch, or `resources` in the recipe with `coatnet submit`.
set -uo pipefail

say() { echo "$(date '+%Y-%m-%d %H:%M:%S') job $job: $*"; }

patiently() { # a controller is busy or failing over just when many jobs reach their limit: try for two minutes
    for pause in 1 2 5 10 20 40 40; do
        "$@" && return
        sleep "$pause"
    done
    "$@"
}

whole_number() { # $1 if it is one, else $2: bash would run commands that are hidden in text used as a number
    case $1 in '' | *[!0-9]*) echo "$2" ;; *) echo "$1" ;; esac
}

leave_inherited() { # options of srun that sbatch does not set, or that keep GPUs from tasks, and those of torchrun
    local inherited=("${!SLURM_CPU_BIND@}" "${!SLURM_GPUS_PER_TASK@}" "${!SLURM_GPUS_PER_SOCKET@}" "${!TORCHELASTIC_@}")
    local memory=("${!SLURM_MEM_PER_@}")
    if [ "${#memory[@]}" -gt 1 ]; then inherited+=("${memory[@]}"); fi # srun refuses two; without, a step gets all
    if [ "${#inherited[@]}" -gt 0 ]; then
        say "without effect in the environment: ${inherited[*]}"
        unset "${inherited[@]}"
    fi
    unset SLURM_EXPORT_ENV "${!SQUEUE_@}" # a format or filter of a person would hide this job
}

choose_port() { # sets MASTER_PORT to a random one, so that jobs that share a node hardly ever choose the same
    for _ in 1 2 3 4 5 6 7 8; do
        MASTER_PORT=$((20000 + RANDOM % 12000))
        (exec 3<>"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null || return
    done
}

choose_meeting_place() { # where the ranks meet, see pipeline/ranks/rendezvous.py
    export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
    export MASTER_PORT COATNET_STORE_FOLDER='' COATNET_STORE_SECRET
    if [ "${SLURM_JOB_NUM_NODES:-}" = 1 ]; then
        COATNET_STORE_FOLDER=$(mktemp -d -p /dev/shm coatnet-XXXXXXXXXX 2>/dev/null || mktemp -d)
    fi
    choose_port
    COATNET_STORE_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
}

faulty_nodes() { # those of this job that its ranks name in file $1, separated by commas; empty without any
    local name of_job found=
    [ -r "$1" ] || return
    of_job=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    while read -r name; do
        if [ -n "$name" ] && grep -Fxq -- "$name" <<<"$of_job"; then
            found+=${found:+,}$name
        else
            say "ignored: the faulty node $(printf %q "$name") is none of this job, which runs on $SLURM_JOB_NODELIST" >&2
        fi
    done <"$1"
    echo "$found"
}

exclude() { # nodes $2 from job $1, which is pending, in addition to those that are excluded from it already
    local before
    before=$(squeue --noheader --jobs="$1" --format=%x) || return
    if [ "$before" = '(null)' ]; then before=; fi
    scontrol update JobId="$1" ExcNodeList="${before:+$before,}$2"
}

try_to_exclude() { # for less than the 30 seconds that Slurm leaves this script once its job is requeued
    local pause
    for pause in 1 2 5; do
        exclude "$@" && return
        sleep "$pause"
    done
    exclude "$@"
}

exclude_later() { # nodes $1 from the jobs that wait for this one, or for one that does
    local pending number dependency one found=" ${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID} "
    if ! pending=$(patiently squeue --noheader --me --states=PENDING --sort=i --format='%F %E'); then
        say "jobs that wait for this one may still run on $1: Slurm does not list them"
    fi
    while read -r number dependency; do # a job has a higher number than those that it waits for
        for one in ${dependency//[!0-9]/ }; do
            case $found in *" $one "*) ;; *) continue ;; esac
            found+="$number "
            if try_to_exclude "$number" "$1"; then
                say "job $number, which waits for this one, is without $1, too"
            else
                say "job $number, which waits for this one, may still run on $1"
            fi
            break
        done
    done <<<"$pending"
}

exclude_now() { # nodes $1 from this job: Slurm does that only once it is requeued, and then ends this script soon
    trap '' TERM # which Slurm sends to the commands that this script runs, too: what it ignores, they ignore
    if try_to_exclude "$job" "$1"; then
        say "its next start is without $1"
    else
        # It then ends in the same way; the run's event log counts starts without progress, and the third is the last.
        say "its next start may be on $1 again, which could not be excluded"
    fi
}

main() { # a function, so that bash has read all of it: the file may change during a long srun
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}

    here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
    unset MASTER_ADDR # of the shell that submitted this job
    site=${COATNET_SITE:-$here/site.sh}
    case $site in /*) ;; *) site=$PWD/$site ;; esac # else bash would search PATH for it
    if [ -f "$site" ] && [ -r "$site" ]; then
        # shellcheck source=/dev/null
        . "$site"
    elif [ -n "${COATNET_SITE:-}" ]; then
        say "failed with exit code 78, not requeued: COATNET_SITE is $site, which is not a readable file on $(hostname);" \
            "correct or unset it"
        exit 78
    fi
    program=${COATNET:-}
    if [ -z "$program" ]; then
        program=$here/../.venv/bin/coatnet
        if [ -n "${COATNET_CONTAINER:-}" ] || [ ! -x "$program" ]; then program=coatnet; fi
    fi
    if [ "$1" = tensorboard ]; then
        program=${program%coatnet}tensorboard
        shift
    elif [ -z "${COATNET_CONTAINER:-}" ] && [ -e "$here/../jobs/__main__.py" ]; then
        # Tasks run the code that this file belongs to, which submitted them: not that of the working directory, which a
        # relative path in PYTHONPATH means, or of the environment in which the command is installed.
        PYTHONPATH=$(dirname "$here")${PYTHONPATH:+:$PYTHONPATH}
        export PYTHONPATH
    fi

    notes=$PWD/.coatnet-job-$job # on a file system that all nodes share, like the logs

    choose_meeting_place
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # srun does not inherit --cpus-per-task from sbatch.
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
    export COATNET_CAUSE_FILE=$notes.cause COATNET_BEGUN_FILE=$notes.begun COATNET_FAULTY_NODES_FILE=$notes.faulty
    rm -f "$COATNET_CAUSE_FILE" "$COATNET_BEGUN_FILE" "$COATNET_FAULTY_NODES_FILE"

    # Every task sees all GPUs of its node; otherwise NCCL cannot use the links between them.
    srun=(srun --kill-on-bad-exit=1 --gpu-bind=none)
    inside=()
    if [ -n "${COATNET_CONTAINER:-}" ]; then
        mapfile -t mounts <<<"${COATNET_CONTAINER_MOUNTS:-}"
        mounts+=("$PWD" "$here")
        if [ -n "$COATNET_STORE_FOLDER" ]; then mounts+=("$COATNET_STORE_FOLDER"); fi
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

    # A shell in another job, or one that outlived its job, passes its variables on to this one, and srun obeys them.
    leave_inherited

    # Slurm's variables give a task its rank; SLURM_GTIDS lists the tasks of its node. With exec, signals reach Python.
    # shellcheck disable=SC2016
    rank='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    tasks=${SLURM_GTIDS//[^,]/} && LOCAL_WORLD_SIZE=$((${#tasks} + 1)) && export LOCAL_WORLD_SIZE && exec "$@"'

    say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, ${SLURM_NTASKS:-1} tasks"
    trap : TERM USR1 USR2 # the tasks handle these; this shell must survive them to handle the exit code
    "${srun[@]}" "${inside[@]}" bash -c "$rank" rank "$program" "$@"
    code=$?
    if [ -n "$COATNET_STORE_FOLDER" ]; then rm -rf "$COATNET_STORE_FOLDER"; fi

    # srun reports the highest code of all tasks, but most tasks fail only because another one did. The file has the cause.
    why="srun ended with $code"
    if [ -s "$COATNET_CAUSE_FILE" ]; then
        { # by bash alone: at a time limit, Slurm's TERM ends the commands that it runs
            read -r cause
            IFS= read -r -d '' why
        } <"$COATNET_CAUSE_FILE"
        why=${why%$'\n'}
        code=$(whole_number "$cause" 1)
    elif [ "$code" = 1 ] || [ "$code" -gt 128 ]; then
        code=75 # a rank was killed, or a node failed
    fi
    begun= # whether this start came as far as to be counted elsewhere, or left something for the next
    if [ -e "$COATNET_BEGUN_FILE" ]; then begun=yes; fi
    case $1 in
    train) in_vain="the run began" ;;
    shards) in_vain="anything new was written" ;;
    *) begun=yes ;;
    esac
    without= # nodes that compute wrong values
    if [ "$code" = 71 ]; then without=$(faulty_nodes "$COATNET_FAULTY_NODES_FILE"); fi
    rm -f "$COATNET_BEGUN_FILE" "$COATNET_CAUSE_FILE" "$COATNET_FAULTY_NODES_FILE"
    starts=
    if [ -r "$notes.starts" ]; then read -r starts <"$notes.starts"; fi
    starts=$(whole_number "$starts" 0)
    rm -f "$notes.starts"
    case $code:$without in
    0:*)
        say "done"
        ;;
    75:* | 71:?*)
        # A cancelled job must not be requeued, and Slurm requeues a preempted one itself. A job is SIGNALING until all
        # nodes have confirmed the warning of --signal, by when quick ranks have saved and ended.
        state=$(patiently squeue --noheader --jobs="$job" --format='%T %r')
        case $state in
        RUNNING* | SIGNALING* | *TimeLimit*)
            # Starts without progress are counted in the run's event log; what comes before it or has none, here.
            if [ -z "$begun" ] && [ "$((starts += 1))" -ge 3 ]; then
                say "failed: $starts starts in a row ended before $in_vain ($why)"
                exit 70
            fi
            [ -n "$begun" ] || echo "$starts" >"$notes.starts"
            if [ -n "$without" ]; then exclude_later "$without"; fi
            say "requeued: $why" # first, since Slurm ends this script soon after
            if ! patiently scontrol requeue "$job"; then
                say "could not be requeued; submit it again to continue"
            elif [ -n "$without" ]; then
                exclude_now "$without"
            fi
            ;;
        *)
            say "ended as ${state:-UNKNOWN}: $why"
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
