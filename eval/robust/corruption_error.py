"""ImageNet-C's mean corruption error (Hendrycks and Dietterich, 2019, section 4.2).

    CE_c = Σ_s E_{s,c} / Σ_s E^AlexNet_{s,c}        over the five severities s of corruption c
    mCE  = mean of CE_c over the fifteen corruptions

Errors are shares, 0..1; MAE's table 13 gives 33.8 for 0.338.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Final

SEVERITIES: Final = (1, 2, 3, 4, 5)

Errors = Mapping[str, Mapping[int, float]]  # corruption -> severity -> top-1 error


@dataclass(frozen=True)
class CorruptionErrors:
    """What is known of the corruptions that are there."""

    normalised: dict[str, float]  # CE of each that has all severities and a reference
    mean: dict[str, float]  # error of each, averaged over the severities that are there
    missing: tuple[str, ...]  # corruption/severity that the mean over all would need
    mce: float | None  # None where any is missing
    mean_error: float | None  # not normalised, over the same; None where any is missing


def corruption_errors(errors: Errors, reference: Mapping[str, float]) -> CorruptionErrors:
    """All of it from the errors that were measured; corruptions without a reference count in no mean."""
    missing = tuple(
        f"{name}/{severity}" for name in reference for severity in SEVERITIES if severity not in errors.get(name, {})
    )
    mean = {name: fmean(own.values()) for name, own in errors.items()}
    complete = [name for name in reference if set(errors.get(name, {})) >= set(SEVERITIES)]
    normalised = {
        name: sum(errors[name][severity] for severity in SEVERITIES) / (len(SEVERITIES) * reference[name])
        for name in complete
    }
    if missing or not reference:
        return CorruptionErrors(normalised, mean, missing, None, None)
    whole = fmean(fmean(errors[name][severity] for severity in SEVERITIES) for name in reference)
    return CorruptionErrors(normalised, mean, missing, fmean(normalised.values()), whole)
