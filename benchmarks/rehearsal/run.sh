#!/bin/bash
# Rehearses a GPU without one. From the project's root:
#
#   bash benchmarks/rehearsal/run.sh step --variant coatnet_5 --micro-batch 64
#   bash benchmarks/rehearsal/run.sh lower --kind mbconv --stochastic-depth
#
# The first use makes a virtual environment in $REHEARSAL (by default ~/.cache/coatnet-rehearsal): 5 GB, ten minutes.
# Needs python3, gcc and g++. README.md says what it shows.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
project=$(cd "$here/../.." && pwd)
place=${REHEARSAL:-$HOME/.cache/coatnet-rehearsal}
python=$place/venv/bin/python

case ${1:-} in
step | lower) ;;
*)
    echo "usage: bash benchmarks/rehearsal/run.sh step|lower [OPTION]...; --help lists the options" >&2
    exit 78
    ;;
esac

if [ ! -e "$place/ready" ]; then
    mkdir -p "$place"
    "${PYTHON:-python3}" -m venv "$place/venv"
    # DeepSpeed is built from its source, and looks for torch while it is. The versions of the rest are the tested ones.
    "$python" -m pip install --quiet --no-compile "torch==2.11.0" setuptools wheel
    grep --extended-regexp --invert-match '^(torch|triton|torchvision|setuptools)==' "$project/constraints.txt" \
        > "$place/constraints.txt"
    "$python" -m pip install --quiet --no-compile --no-build-isolation --constraint "$place/constraints.txt" \
        deepspeed webdataset braceexpand fsspec s3fs pyyaml tensorboard numpy pydantic typer rich psutil safetensors \
        simplejpeg opencv-python-headless pillow filelock
    "$python" -c 'import torch; assert torch.version.cuda, "this build of torch is for CPUs; it must be one for CUDA"'
    touch "$place/ready"
fi

torch=$("$python" -c 'import importlib.util, os; print(os.path.dirname(importlib.util.find_spec("torch").origin))')
# newer SOURCE RESULT: whether the result has to be built.
newer() { [ ! -e "$2" ] || [ "$1" -nt "$2" ]; }
mkdir -p "$place/native"
if newer "$here/native/device_count.c" "$place/native/device_count.so"; then
    gcc -O1 -shared -fPIC "$here/native/device_count.c" -o "$place/native/device_count.so"
fi
if newer "$here/native/device_guard.cpp" "$place/native/device_guard.so"; then
    g++ -O1 -std=c++20 -shared -fPIC "$here/native/device_guard.cpp" -o "$place/native/device_guard.so" \
        -I"$torch/include" -L"$torch/lib" -lc10
fi
if newer "$here/native/driver.c" "$place/native/driver/libcuda.so.1"; then
    mkdir -p "$place/native/driver"
    gcc -O1 -shared -fPIC -Wl,-soname,libcuda.so.1 "$here/native/driver.c" -o "$place/native/driver/libcuda.so.1"
fi

cd "$project"
command=$1
shift
exec env REHEARSAL_NATIVE="$place/native" LD_PRELOAD="$place/native/device_count.so" \
    LD_LIBRARY_PATH="$place/native/driver" PYTHONPATH="$project" OMP_NUM_THREADS=1 \
    "$python" -m "benchmarks.rehearsal.$command" "$@"
