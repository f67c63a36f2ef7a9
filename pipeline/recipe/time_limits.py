"""Time limits in the forms that `sbatch --time` takes."""

import re

_FORM = re.compile(r"(?:([0-9]{1,6})-)?([0-9]{1,6})((?::[0-5][0-9]){0,2})")


def time_limit_seconds(text: str) -> int:
    """The seconds of `MM`, `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM` or `D-HH:MM:SS`.

    Raises:
        ValueError: it is none of these, or 0, with which Slurm sets no limit.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} is not a time; write hours:minutes:seconds such as 12:00:00, days-hours:minutes:seconds such as "
            "1-12:00:00, minutes:seconds, or minutes"
        )
    numbers = [int(match[2]), *(int(part) for part in match[3].split(":")[1:])]
    if match[1] is None and len(numbers) < 3:
        numbers = [0, *numbers]
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    total = ((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError(f"{text!r} is no time; leave the time limit out if there is none")
    return total
