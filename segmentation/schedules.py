"""Learning-rate schedules: the multiple of the base rate that is in force after some iterations."""


def poly(done: int, iterations: int, power: float = 0.9, every: int = 1) -> float:
    """The polynomial decay of the DeepLab papers (Chen et al., TPAMI 2018, section 4.1).

    DeepLab-v2 (deeplab-pytorch) updates it every 10 iterations. DeepLab-v1 on ResNet-38d (SEAM) never
    reaches 0: it is `poly(done, iterations + 1)`.

    Args:
        done: iterations completed; the factor is that of the next one.
        iterations: after which the factor is 0, if they are a multiple of `every`.
        power: of what is left.
        every: the factor changes only after every so many iterations.

    Returns:
        in [0, 1], 1 at the start.
    """
    updated = min(done, iterations) // every * every
    return (1 - updated / iterations) ** power
