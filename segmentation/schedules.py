"""Learning-rate schedules: functions of a group's base rate and of the number of completed iterations."""

from collections.abc import Callable

# (base rate of a parameter group, completed iterations) -> learning rate of the next iteration. The base rate
# is an argument because not all schedules scale it: WeakCLIP's cosine anneals all groups to one minimum.
Schedule = Callable[[float, int], float]


def poly(done: int, iterations: int, power: float = 0.9, every: int = 1) -> float:
    """Return the factor of the polynomial decay of the DeepLab papers (Chen et al., TPAMI 2018, section 4.1).

    DeepLab-v2 (deeplab-pytorch) updates it every 10 iterations. DeepLab-v1 on ResNet-38d (SEAM) never
    reaches 0: it is `poly(done, iterations + 1)`.

    Args:
        done: completed iterations; the factor is that of the next one.
        iterations: the factor is 0 from here on, if this is a multiple of `every`.
        power: exponent of the remaining part.
        every: iterations between two updates of the factor.

    Returns:
        A number in [0, 1]; 1 at the start.
    """
    updated = min(done, iterations) // every * every
    return (1 - updated / iterations) ** power
