"""The process of one measurement: `python -m pipeline.gpu_benchmark.worker REQUEST RESULT`, two JSON files.

It ends with 0 and a result, or prints as its last line why there is none.
"""

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from data.errors import EXIT_FAILED, CoatnetError
from data.files.atomic_file import write_atomically
from data.files.child_process import end_with_parent
from data.files.json_records import parse_json, to_json
from pipeline.gpu_benchmark.burning_in import measure_burn_in
from pipeline.gpu_benchmark.copies import measure_copies
from pipeline.gpu_benchmark.machine import is_memory_full, present_device
from pipeline.gpu_benchmark.micro_batches import try_micro_batch
from pipeline.gpu_benchmark.operations import measure_operations
from pipeline.gpu_benchmark.parts import measure_parts
from pipeline.gpu_benchmark.processes import FAILED, WorkerRequest
from pipeline.gpu_benchmark.record import OUT_OF_MEMORY
from pipeline.gpu_benchmark.saving import measure_saves
from pipeline.gpu_benchmark.training_steps import measure_steps

MEASUREMENTS: Mapping[str, Callable[[WorkerRequest], Any]] = {
    "device": lambda request: present_device(request.subject.uses_gpus),
    "steps": lambda request: measure_steps(request.subject),
    "burn-in": lambda request: measure_burn_in(request.subject),
    "parts": lambda request: measure_parts(request.subject),
    "operations": lambda request: measure_operations(request.subject),
    "copies": lambda request: measure_copies(request.subject),
    "saves": lambda request: measure_saves(request.subject, Path(request.folder)),
    "micro-batch": lambda request: try_micro_batch(request.subject),
}


def main() -> NoReturn:
    """Measure what the request says, and end without the finalizers of libraries, which may hang."""
    _, request_file, result_file = sys.argv
    request = parse_json(WorkerRequest, Path(request_file).read_bytes())
    end_with_parent(request.parent, EXIT_FAILED)
    faulthandler.enable()
    try:
        result = MEASUREMENTS[request.measurement](request)
        write_atomically(Path(result_file), json.dumps(to_json(result)))
        code = 0
    except BaseException as error:
        code, reason = EXIT_FAILED, str(error).strip().partition("\n")[0]
        if is_memory_full(error):
            print(f"{FAILED}{OUT_OF_MEMORY} ({reason})", file=sys.stderr)
        elif isinstance(error, CoatnetError):
            print(f"{FAILED}{reason}", file=sys.stderr)
        else:
            traceback.print_exc()
            print(f"{FAILED}{type(error).__name__}: {reason}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
