"""What cross-checks cost, and how many were passed, in words and as points of curves."""

from pipeline.cross_check.cross_check import CrossChecks


def points(checks: CrossChecks, seconds: float, step_seconds: float) -> dict[str, float]:
    """TensorBoard tags and values of a check of `seconds` in a step that took `step_seconds` with it."""
    return {
        "verify/seconds": seconds,
        "verify/share_of_step": _share(seconds, step_seconds),
        "verify/passed": float(checks.passed),
    }


def announcement(checks: CrossChecks, seconds: float, step_seconds: float) -> str | None:
    """A line about the first two checks of a start; None about later ones.

    The first one is in the first step, which also compiles and warms up; so the second one says what they cost.
    """
    steps = checks.every_steps or 1
    every = "every step" if steps == 1 else f"every {steps:,} steps"
    if checks.passed == 1:
        return (
            f"cross-check: passed in step {checks.last_passed:,}, {_how(checks)}, in {seconds:.3g} s with the warm-up; "
            f"another one follows {every}"
        )
    if checks.passed > 2:
        return None
    share = _share(seconds, step_seconds)
    return f"cross-check: takes {seconds:.3g} s, {share:.0%} of a step; {every} that is {share / steps:.2%} of the run"


def summary(checks: CrossChecks) -> str:
    """How many checks of this start were passed, for its end."""
    if checks.last_passed is None:
        return "cross-checks: none was passed in this start"
    return f"cross-checks: {checks.passed:,} passed in this start, the last one in step {checks.last_passed:,}"


def _how(checks: CrossChecks) -> str:
    ranks = len(checks.devices)
    return (
        "which one rank computed twice" if ranks == 1 else f"by {ranks:,} ranks, each of which computed its neighbour's"
    )


def _share(seconds: float, step_seconds: float) -> float:
    """Of the step without the check."""
    return seconds / max(1e-9, step_seconds - seconds)
