"""A study's finished runs, and their means over seeds and differences between arms."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from refalign_ext.evaluation.intervals import mean_and_error, paired_interval
from refalign_ext.sprites.ablations.judging import FLOW_ERROR
from refalign_ext.sprites.ablations.study import Study

VALIDATION = "validation"  # no job: what training itself measured at its end
# Parts of the table: title, and the metrics of a job.
PARTS = (
    ("Identity, one subject", "one", ("colors", "pattern", "shape")),
    ("Identity, two subjects", "two", ("found", "colors", "pattern", "shape", "swapped")),
    ("Following the prompt, one subject", "one", ("motion", "size", "background")),
    ("Following the prompt, two subjects", "two", ("motion", "size", "background")),
    ("Copying from the reference, one subject", "one", ("copied_pose", "copied_scale")),
    ("Copying from the reference, two subjects", "two", ("copied_pose", "copied_scale")),
    ("Control: another clip's reference", "shuffled", ("colors", "pattern")),
    ("Flow-matching error on held-out clips (a loss, not percent)", VALIDATION, ("flow_error",)),
)
CURVES = (
    ("judge_1/colors", "colours, one subject", 100),
    ("judge_2/colors", "colours, two subjects", 100),
    (FLOW_ERROR, "flow-matching error on held-out clips", 1),
)

Values = dict[int, float]  # seed -> share
Results = dict[str, dict[int, dict[str, Any]]]  # letter of an arm -> seed -> result


def collect(study: Study) -> Results:
    """Finished runs of the table.

    Raises:
        ValueError: if one is of another study, or they did not all start from the same model.
    """
    found: Results = {}
    starts: dict[str, Path] = {}
    for arm in study.arms.arms:
        for seed in range(1, study.seeds + 1):
            result = study.result(arm, seed)
            if result is not None:
                found.setdefault(arm.letter, {})[seed] = result
                starts.setdefault(result["start"], study.arm_folder(arm, seed))
    if len(starts) > 1:
        first, second, *_ = starts.values()
        raise ValueError(
            f"{first} and {second} started from different models: delete the older one and run again"
        )
    return found


def _values(results: dict[int, dict[str, Any]], job: str, metric: str) -> Values:
    """A metric by seed, without seeds in which its question never arose."""
    if job == VALIDATION:
        curves = {seed: result["curve"] for seed, result in results.items() if result["curve"]}
        last = {seed: curve[max(curve, key=int)] for seed, curve in curves.items()}
        return {seed: shown[FLOW_ERROR] for seed, shown in last.items() if FLOW_ERROR in shown}
    rows = {seed: result["judged"][job]["table"].get(metric) for seed, result in results.items()}
    return {seed: row["share"] for seed, row in rows.items() if row is not None}


def summarize_study(study: Study, found: Results) -> dict[str, Any]:
    """For every arm, job and metric: values by seed, mean, standard error, and A minus this arm with its interval."""
    first = study.arms.reference
    arms = {}
    for arm in study.arms.arms:
        results = found.get(arm.letter, {})
        figures: dict[str, dict[str, Any]] = defaultdict(dict)
        for _, job, metrics in PARTS:
            is_compared = arm is not first and are_comparable(job, arm.changes, first.changes)
            for metric in metrics:
                values = _values(results, job, metric)
                figure = figures[job][metric] = _figure(values)
                reference = _values(found.get(first.letter, {}), job, metric)
                difference = paired_difference(reference, values) if is_compared else None
                if figure is not None and difference is not None:
                    figure["a_minus_this"] = difference
        arms[arm.letter] = {
            "title": arm.title,
            "changes": arm.changes,
            "seeds": sorted(results),
            "figures": figures,
        }
    return {"table": study.table, "title": study.arms.title, "arms": arms}


def _figure(values: Values) -> dict[str, Any] | None:
    if not values:
        return None
    center, error = mean_and_error(list(values.values()))
    return {"by_seed": values, "mean": center, "standard_error": error}


def are_comparable(job: str, changes: dict[str, Any], others: dict[str, Any]) -> bool:
    """Whether a figure compares between arms of these changes: a flow-matching error needs the same timesteps.

    The gate weighs the alignment loss; timesteps and weights of the flow-matching loss are the same without it.
    """
    first, second = (each.get("timesteps", "").removesuffix("_ungated") for each in (changes, others))
    return job != VALIDATION or first == second


def paired_difference(first: Values, second: Values) -> dict[str, Any] | None:
    """`first` minus `second` in the seeds of both, with its interval; None without such seeds."""
    paired = sorted(first.keys() & second.keys())
    if not paired:
        return None
    difference, low, high = paired_interval([first[s] for s in paired], [second[s] for s in paired])
    return {"mean": difference, "low": low, "high": high, "seeds": paired}


def common_seeds(found: Results) -> list[int]:
    """Seeds that all arms have which have any: what pictures compare while a table is unfinished."""
    return sorted(set.intersection(*(set(by_seed) for by_seed in found.values())))
