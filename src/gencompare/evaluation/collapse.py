"""Are modes of the data missing from samples? The sign of a mode collapse, read off density and coverage."""

from __future__ import annotations

from gencompare.evaluation.neighbours import DENSITY_NEIGHBOURS

EXPECTED_COVERAGE = 1 - 2.0**-DENSITY_NEIGHBOURS
"""Coverage by as many further real images as there are, whatever the data: the k nearest to a real image are each one
or the other with equal chance, and it is covered unless all k are its own kind (Naeem et al. 2020 derive it for finite
sets)."""
MIN_IMAGES = 100
"""Samples and real images from which on density and coverage can show a collapse. With fewer, the ball to the fifth
neighbour spans much of the real images, and what lies off them falls into a few balls. Of noise of four kinds (uniform,
normal, faint, smooth), measured 40 times each against digits, MNIST, Fashion-MNIST and CIFAR-10 (640 sets, compact
networks), 25 % were called a collapse at n = 20, 28 % at 50, 0.8 % at 100, and none at 150 to 400."""
HALF = 0.5
"""How far below what real images reach a figure must be to be called low."""


def missing_modes(density: float, coverage: float, best_coverage: float = 0.0, *, n: int = MIN_IMAGES) -> str | None:
    """A line that says so where samples leave much of the data out, else None.

    It is so if samples lie where real images do (density at least half of the 1 that real images have), and still fewer
    than half as many real images as should have a sample near do: the samples crowd in few places. Bad samples lie
    nowhere near real images and are another matter. It is also so if coverage fell below half of ``best_coverage``,
    that of an earlier look at the same model, once that was as high.

    Args:
        density: as in `neighbours.Neighbourhood`, of as many samples as real images, and so are the others.
        n: how many these are; fewer than `MIN_IMAGES` give no warning.
    """
    if n < MIN_IMAGES:
        return None
    low = HALF * EXPECTED_COVERAGE
    if density >= HALF and coverage < low:
        return (
            f"modes are missing: samples lie among the real images and reach {coverage:.0%} of them, where real ones"
            f" would reach {EXPECTED_COVERAGE:.0%}"
        )
    if best_coverage >= low and coverage < HALF * best_coverage:
        return f"modes were lost: samples reach {coverage:.0%} of the real images, after {best_coverage:.0%} earlier on"
    return None
