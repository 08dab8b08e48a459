"""Learning-rate schedules: the rate of a step as a share of the peak rate, without state."""


def linear(step: int, num_steps: int, warmup_steps: int, final_factor: float) -> float:
    """Return the share of the peak rate: up linearly, then down linearly to the final factor.

    Args:
        step: from 0.
        num_steps: of the run.
        warmup_steps: at the start, in which the rate rises.
        final_factor: share of the peak that is reached at `num_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return 1 + (final_factor - 1) * done
