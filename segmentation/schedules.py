"""Learning-rate schedules: functions of a group's base rate and the number of completed iterations."""

from collections.abc import Callable

# (base rate of a parameter group, completed iterations) -> learning rate of the next iteration. The base rate
# is an argument because not all schedules are factors of it: WeakCLIP's cosine schedule ends at the same
# minimum for all groups.
Schedule = Callable[[float, int], float]


def poly(done: int, iterations: int, power: float = 0.9, every: int = 1) -> float:
    """Return the factor of the polynomial decay of the DeepLab papers (Chen et al., TPAMI 2018, section 4.1).

    DeepLab-v2 (deeplab-pytorch) updates the factor every 10 iterations. The factor of DeepLab-v1 on
    ResNet-38d (SEAM) is `poly(done, iterations + 1)`, which never reaches 0.

    Args:
        done: completed iterations; the factor is for the next iteration.
        iterations: the factor is 0 from this number on, if it is a multiple of `every`.
        power: exponent of the remaining fraction of iterations.
        every: iterations between two updates of the factor.

    Returns:
        A number in [0, 1]; 1 at the start.
    """
    updated = min(done, iterations) // every * every
    return (1 - updated / iterations) ** power
