"""One paragraph of conclusion out of an ablation's numbers.

It claims a difference only where the 95 % interval over the seeds leaves 0 out.
"""

from __future__ import annotations

from moefy.studies.ablations import Ablation
from moefy.studies.outcome import ArmOutcome, difference

_GROUPS = (
    "lower",
    "higher",
    "no difference beyond the spread",
    "no spread known",
    "no seed in common",
)
_NUMBERS = ("no", "One", "Two", "Three", "Four", "Five")


def conclusion(ablation: Ablation, arms: dict[str, ArmOutcome]) -> str:
    """Say what the numbers show, what they do not, and how that stands to the paper.

    Args:
        ablation: the question.
        arms: by name; see `outcome.read_outcome`.
    """
    differences = "" if _seed_counts(arms) == [1] else _differences(arms)
    parts = _budget(arms), _lowest(arms), differences, _paper(ablation, arms)
    return " ".join(part for part in parts if part)


def _seed_counts(arms: dict[str, ArmOutcome]) -> list[int]:
    return sorted({len(arm.after) for arm in arms.values() if arm.against})


def _budget(arms: dict[str, ArmOutcome]) -> str:
    counts = _seed_counts(arms)
    if len(counts) == 1:
        seeds = _NUMBERS[counts[0]] if counts[0] < len(_NUMBERS) else str(counts[0])
        seeds += " seed" if counts[0] == 1 else " seeds"
    else:
        seeds = f"{counts[0]} to {counts[-1]} seeds" if counts else "No arm beside a baseline"
    tokens = sorted({arm.trained for arm in arms.values() if arm.trained})
    talks = sorted({arm.conversations for arm in arms.values() if arm.conversations})
    budget = [f"{' or '.join(f'{n:,}' for n in tokens)} training tokens"] if tokens else []
    budget += [f"{' or '.join(f'{n:,}' for n in talks)} conversations"] if talks else []
    text = f"{seeds}, {' and '.join(budget) or 'no training'}."
    if counts and counts[0] == 1:
        text += " One seed has no spread, so no difference of it can be called more than chance."
    return text


def _lowest(arms: dict[str, ArmOutcome]) -> str:
    """Name the lowest loss, and those that cannot be told from it."""
    made = [arm for arm in arms.values() if arm.learned or not _is_reference(arm, arms)]
    if len(made) < 2:
        return ""
    best = min(made, key=_mean)
    equal = []
    for arm in made:
        found = difference(arm.after, best.after)
        if arm is not best and (found is None or not found.sign):
            equal.append(arm.name)
    text = f"The lowest loss is that of **{best.name}** ({_mean(best):.3f})"
    if len(best.after) == 1:
        return f"{text}."
    if equal:
        return f"{text}; not told apart from it: {', '.join(equal)}."
    return f"{text}, below every other by more than the spread."


def _is_reference(arm: ArmOutcome, arms: dict[str, ArmOutcome]) -> bool:
    """Whether it is an untouched model that others are only shown beside."""
    compared = {other.against for other in arms.values()}
    return not arm.learned and arm.against is None and arm.name not in compared


def _mean(arm: ArmOutcome) -> float:
    return sum(arm.after.values()) / len(arm.after)


def _differences(arms: dict[str, ArmOutcome]) -> str:
    """Say which arms differ from what they are compared with, at the start and in the end."""
    after = _grouped(arms, before=False)
    if not any(arm.learned and arm.against for arm in arms.values()):
        return f"{after[:1].upper()}{after[1:]}." if after else ""
    said = {"At the start": _grouped(arms, before=True), "In the end": after}
    return " ".join(f"{when}, {text}." for when, text in said.items() if text)


def _grouped(arms: dict[str, ArmOutcome], *, before: bool) -> str:
    """List the pairs by what can be said of them; pairs that begin as one model are left out."""
    groups: dict[str, list[str]] = {name: [] for name in _GROUPS}
    for arm in arms.values():
        other = arms.get(arm.against or "")
        if other is None:
            continue
        ours, theirs = (each.before if before else each.after for each in (arm, other))
        found = difference(ours, theirs)
        pair = f"{arm.name} against {other.name}"
        if found is None:
            groups["no seed in common"].append(pair)
        elif found.sign:
            groups["higher" if found.sign > 0 else "lower"].append(f"{pair} ({found.text('+')})")
        elif found.half_width is not None:
            groups["no difference beyond the spread"].append(f"{pair} ({found.text('+')})")
        elif found.mean or not before:
            groups["no spread known"].append(f"{pair} ({found.text('+')})")
    return "; ".join(f"{name}: {', '.join(pairs)}" for name, pairs in groups.items() if pairs)


def _agreement(expected: str, sign: int) -> int:
    """Return 1 where a difference is the expected one, -1 where it is another, 0 where it is none.

    That two arms are the same cannot be shown by a spread, only that they are not.
    """
    if expected == "same":
        return -abs(sign)
    return sign if expected == "higher" else -sign


def _paper(ablation: Ablation, arms: dict[str, ArmOutcome]) -> str:
    if not ablation.paper:
        return ""
    text = f"The paper: {ablation.paper}."
    signs = [
        0 if found is None else _agreement(arm.expected, found.sign)
        for arm in arms.values()
        if arm.expected and arm.against in arms
        for found in [difference(arm.after, arms[arm.against].after)]
    ]
    if not signs:
        return text
    agreeing, opposed = signs.count(1), signs.count(-1)
    if agreeing == len(signs):
        verdict = "agree with that"
    elif opposed == len(signs):
        verdict = "contradict that"
    elif _seed_counts(arms) == [1]:
        verdict = "do not decide that: they are of one seed"
    elif not agreeing and not opposed:
        verdict = "do not decide that: no difference is beyond the spread"
    else:
        verdict = (
            f"agree in {agreeing}, contradict in {opposed} and do not decide "
            f"{signs.count(0)} of {len(signs)} comparisons"
        )
    text += f" The losses here {verdict}."
    return f"{text} {ablation.why}" if opposed and ablation.why else text
