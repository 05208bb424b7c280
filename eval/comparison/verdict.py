"""What a comparison can and cannot tell, in words. Nothing is called above another while an interval of the difference
holds 0."""

import math

from eval.comparison.outcome import Metric, Pair, reaches, title
from eval.comparison.plan import Plan
from eval.report_intervals import T95, Z95

MOST_SEEDS = 100  # beyond it no number is named


def verdict(metric: Metric, plan: Plan) -> list[str]:
    """Sentences about the headline score at the full budget."""
    pairs = [pair for pair in metric.pairs if pair.budget == 1.0]
    seeds = len(plan.comparison.seeds)
    repeats = "1 training seed" if seeds == 1 else f"{seeds} training seeds"
    sentences = [f"{metric.name} on {metric.images:,} evaluation images, {repeats} an arm, at equal training FLOPs."]
    sentences.append(_summary(pairs, seeds))
    sentences += [about(pair) for pair in pairs]
    if seeds == 1:
        sentences.append(
            "With one seed nothing is known of how much another training would differ: what is said holds for these "
            "weights, not for the ways of training. Give several --seeds for that."
        )
    sentences += [
        f"Read off its curve, {title(r.arm)} comes to {title(r.other)}'s full score with {100 / r.ratio:.0f} % of its "
        f"FLOPs ({r.ratio:.1f} x less; between two rungs, no interval)."
        for r in reaches(metric, plan.comparison.arms)
        if r.ratio > 1 and any({p.first, p.second} == {r.arm, r.other} and p.conclusion == "apart" for p in pairs)
    ]
    return sentences


def _summary(pairs: list[Pair], seeds: int) -> str:
    apart = [pair for pair in pairs if pair.conclusion == "apart"]
    if not apart:
        why = "one training seed tells nothing of the ways of training" if seeds == 1 else "all arms are within noise"
        return f"No arm can be put above another: {why}."
    found = ", ".join(f"{title(pair.first)} above {title(pair.second)}" for pair in apart)
    rest = len(pairs) - len(apart)
    return f"Clear is {found}" + (f"; {rest} other pair{'s' * (rest > 1)} cannot be told apart." if rest else ".")


def about(pair: Pair) -> str:
    """One sentence on two arms."""
    first, second = title(pair.first), title(pair.second)
    points = 100 * pair.difference
    facts = "; ".join(filter(None, (_interval(pair), _tests(pair))))
    if pair.conclusion == "apart":
        return f"{first} is {points:.1f} points above {second} ({facts}): more than seeds and images explain."
    if pair.conclusion == "apart for these weights":
        start = f"The weights of {first} at hand have {points:.1f} points more right than those of {second} ({facts})"
        unknown = f"; {len(pair.seeds)} seeds do not show it for the way of training{_more(pair)}"
        return f"{start}{unknown if _many(pair) else ''}."
    if pair.images is None and not _many(pair):
        return f"{first} and {second}: {points:+.1f} points, with nothing to judge it by (one seed, no answers kept)."
    return f"{first} and {second} cannot be told apart: {points:+.1f} points is within noise ({facts}){_more(pair)}."


def _many(pair: Pair) -> bool:
    return len(pair.seeds) > 1


def _interval(pair: Pair) -> str:
    found = []
    if pair.low is not None and pair.high is not None:
        over = "seeds and images" if _many(pair) else "images"
        found.append(f"95 % interval over {over} {100 * pair.low:+.1f} to {100 * pair.high:+.1f}")
    if pair.low_seeds is not None and pair.high_seeds is not None:
        found.append(f"over seeds {100 * pair.low_seeds:+.1f} to {100 * pair.high_seeds:+.1f}")
    return ", ".join(found)


def _tests(pair: Pair) -> str:
    if not _many(pair):
        if pair.images is None or pair.images.mcnemar is None:
            return ""
        return (
            f"{pair.images.only_first:,} images only the first has right, {pair.images.only_second:,} only the second; "
            f"{p(pair.holm['images'])} over images, corrected"
        )
    if pair.over_seeds.t is None:
        return "no spread between seeds to test with"
    return f"paired t over {len(pair.seeds)} seeds, corrected: {p(pair.holm['t'])}"


def _more(pair: Pair) -> str:
    needed = seeds_needed(pair)
    return f"; if difference and spread stayed, about {needed} seeds would show it" if needed else ""


def seeds_needed(pair: Pair) -> int | None:
    """Seeds at which a t-interval of this difference and spread would leave 0 out; None where that means nothing."""
    deviation = pair.over_seeds.deviation
    if not deviation or not pair.difference:
        return None
    for seeds in range(len(pair.seeds) + 1, MOST_SEEDS + 1):
        t = T95[seeds - 2] if seeds - 2 < len(T95) else Z95
        if t * deviation / math.sqrt(seeds) < abs(pair.difference):
            return seeds
    return None


def p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"


def caveats(plan: Plan) -> list[str]:
    """What equal FLOPs leave open."""
    asked = plan.comparison
    found = [
        "Equal are the multiply-adds of matrix products in training (3 x forward). Time, memory, pictures seen and "
        "reading of data are not: MAE sees more pictures for the same FLOPs.",
        "Every rung is a training of its own to the end of its own schedule. Learning rates are those of the presets "
        "for every budget and arm; none was tuned for its budget.",
        "Seeds set initial values, order, crops and masks together, and the arms are paired by seed. Intervals over "
        "images know nothing of other data sets; p-values are corrected (Holm) for all pairs of one score and rung, "
        "not across scores and rungs.",
    ]
    if "mae_wsp" in asked.arms:
        share = f"{100 * asked.mae_share:.0f} % of its FLOPs" if asked.mae_share else "as many pictures as WSP"
        found.append(f"MAE→WSP shares its budget between the stages: MAE gets {share}.")
    if "supervised" in asked.arms:
        found.append("The supervised arm learns from labels; its tower is probed like the others.")
    if 1 < len(asked.seeds) < 6:
        found.append(
            f"{len(asked.seeds)} seeds: the exact test by signs cannot go below p = {2 / 2 ** len(asked.seeds):g}; the "
            f"t-test assumes differences that are normal between seeds."
        )
    return found
