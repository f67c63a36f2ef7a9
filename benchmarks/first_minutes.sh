#!/usr/bin/env bash
# The first ten minutes on a machine with a GPU: does everything run, are the bits equal, how fast is it.
#
#   bash benchmarks/first_minutes.sh [FOLDER]         results go to FOLDER, by default first_minutes
#   bash benchmarks/first_minutes.sh --cpu [FOLDER]   the same with tiny models on CPUs, to try the script out
#
# Each part has a time limit of its own and a log in FOLDER, and one that fails or hangs does not stop the others; the
# most valuable come first. Nothing is downloaded: the images are the demo's. Ends with 1 if a part failed or was left out.
#
# LIMIT=SECONDS   for all parts, by default 600 (with --cpu 1800): those that no time is left for are named
# PYTHON=COMMAND  an interpreter that has what the program needs; by default that of .venv, else python3
# shellcheck disable=SC2329  # functions are called by name, each part in a process of its own
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
  PYTHON=python3
  [ -x "$root/.venv/bin/python" ] && PYTHON=$root/.venv/bin/python
fi
export PYTHON PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

coatnet() {
  "$PYTHON" -P -m jobs "$@"
}

SIZES="pretrain.resolution=64 finetune.resolution=96 evaluate.resolution=96" # multiples of coatnet_0's stride

# The device, and what makes the models tiny on CPUs.
on_device() {
  if [ "$CPU" = 1 ]; then
    echo resources.ranks=1 resources.gpus_per_rank=0 model.name=coatnet_debug precision=fp32
  else
    echo resources.ranks=1 resources.gpus_per_rank=1 model.name=coatnet_0 precision=bf16_autocast
  fi
}

facts() {
  if [ "$CPU" = 0 ]; then
    nvidia-smi || return
    nvidia-smi topo -m
  fi
  coatnet --version && "$PYTHON" - <<'CODE'
import torch

print("torch", torch.__version__, "CUDA", torch.version.cuda, "GPUs", torch.cuda.device_count())
if torch.cuda.is_available():
    print("cuDNN", torch.backends.cudnn.version(), "NCCL", torch.cuda.nccl.version())
    for number in range(torch.cuda.device_count()):
        print(torch.cuda.get_device_properties(number))
CODE
}

# A chain of stages from images to an evaluation: shards, training, checkpoints, a larger image size.
demo() {
  # shellcheck disable=SC2046,SC2086  # several overrides
  coatnet demo "$OUT/demo" $(on_device) $SIZES pretrain.epochs="$EPOCHS" finetune.epochs="$EPOCHS" \
    pretrain.optimizer.warmup_epochs=0 finetune.optimizer.warmup_epochs=0
}

# One run in peace, one killed with SIGKILL after its first checkpoint and continued: are their last checkpoints equal?
resume() {
  local name pid newest tries=0
  # shellcheck disable=SC2046,SC2086
  set -- $(on_device) $SIZES pretrain.epochs="$EPOCHS" pretrain.optimizer.warmup_epochs=0 checkpoint.every_steps=4 \
    checkpoint.keep_last=1000
  coatnet train "$OUT/demo/recipe.yaml" pretrain "$@" name=whole || return
  "$PYTHON" -P -m jobs train "$OUT/demo/recipe.yaml" pretrain "$@" name=killed & # not by the function: a shell of its own
  pid=$!
  until [ -d "$OUT/demo/runs/killed/pretrain/checkpoints/step-00000004" ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 1200 ] || ! kill -0 "$pid" 2>/dev/null; then
      echo "the run that was to be killed has ended, or saved nothing in time"
      kill -9 "$pid" 2>/dev/null
      return 1
    fi
    sleep 0.1
  done
  kill -9 "$pid"
  wait "$pid" 2>/dev/null
  echo "killed; its checkpoints: $(ls "$OUT/demo/runs/killed/pretrain/checkpoints")"
  coatnet train "$OUT/demo/recipe.yaml" pretrain "$@" name=killed || return
  newest=$(basename "$(printf '%s\n' "$OUT"/demo/runs/whole/pretrain/checkpoints/step-* | tail -n 1)")
  for name in whole killed; do
    (cd "$OUT/demo/runs/$name/pretrain/checkpoints/$newest" && sha256sum ./*.safetensors) >"$OUT/$name.sha256" || return
  done
  if diff "$OUT/whole.sha256" "$OUT/killed.sha256"; then
    echo "RESULT: $newest is equal to the bit, undisturbed and killed"
  else
    echo "RESULT: $newest differs between the undisturbed and the killed run"
    return 1
  fi
}

# What one GPU does with the first stage of a recipe that comes with the program.
bench() { # RECIPE CLASSES SECONDS [OPTION]...
  local recipe=$1 classes=$2 seconds=$(($3 * SLOW)) minutes
  [ "$seconds" -gt $((PART_SECONDS - 20)) ] && seconds=$((PART_SECONDS - 20)) # so that it ends by itself, and says what it found
  [ "$seconds" -lt 6 ] && seconds=6
  minutes=$(awk "BEGIN { print $seconds / 60 }")
  shift 3
  [ -e "$OUT/$recipe.yaml" ] || coatnet recipes copy "$recipe" "$OUT/$recipe.yaml" || return
  if [ "$CPU" = 1 ]; then
    # shellcheck disable=SC2046
    set -- $(on_device) resources.nodes=1 resolution=32 batch.global_size=4 batch.micro_size=2 "$@"
  fi
  coatnet bench gpu "$OUT/$recipe.yaml" pretrain "$@" --classes "$classes" --minutes "$minutes" \
    --scratch "$OUT" --out "$OUT/$recipe.json"
}

if [ "${1:-}" = part ]; then # in a process of its own, for its time limit
  shift
  "$@"
  exit
fi

CPU=0
if [ "${1:-}" = --cpu ]; then
  CPU=1
  shift
fi
OUT=${1:-first_minutes}
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || exit
if [ $CPU = 1 ]; then
  EPOCHS=0.15 SLOW=3 limit=${LIMIT:-1800}
else
  EPOCHS=1 SLOW=1 limit=${LIMIT:-600}
fi
export CPU OUT EPOCHS SLOW
failed=0
summary=()

part() { # NAME, SECONDS at most, FUNCTION and its arguments
  local name=$1 most=$(($2 * SLOW)) left=$((limit - SECONDS)) began=$SECONDS code
  shift 2
  if [ $left -lt 10 ]; then
    summary+=("$name: left out, $left s were left") failed=1
    return
  fi
  [ $left -lt "$most" ] && most=$left
  echo "--- $name, at $SECONDS s, at most $most s"
  PART_SECONDS=$most timeout -k 10 "$most" bash "${BASH_SOURCE[0]}" part "$@" >"$OUT/$name.log" 2>&1
  code=$?
  tail -n 60 "$OUT/$name.log"
  case $code in
    0) summary+=("$name: done in $((SECONDS - began)) s") ;;
    124 | 137) summary+=("$name: ended after its $most s") failed=1 ;;
    *) summary+=("$name: FAILED with $code after $((SECONDS - began)) s") failed=1 ;;
  esac
}

part facts 40 facts
part bench-0 190 bench coatnet-0-in1k 1000 150
part demo 90 demo
part resume 120 resume
part bench-3 130 bench coatnet-3-in1k 1000 90 --only parts --only variants
part bench-5 100 bench coatnet-5-in21k 21841 60 --only parts --only micro-batch
part bench-7 100 bench coatnet-7-in21k 21841 60 --only micro-batch
echo
printf '%s\n' "${summary[@]}" "results are in $OUT"
exit $failed
