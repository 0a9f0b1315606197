"""From answers to numbers and tables: accuracy with intervals, agreement with the unpruned model, the Pareto front."""

import numpy as np
from writing import table

RESAMPLES = 2000


def interval(right: np.ndarray, scene_of: np.ndarray) -> dict:
    """Share right and its 95 % interval: percentile bootstrap over scenes, whose questions are not independent."""
    scenes, numbers = np.unique(scene_of, return_inverse=True)
    hits = np.bincount(numbers, weights=right, minlength=len(scenes))
    sizes = np.bincount(numbers, minlength=len(scenes))
    draws = np.random.default_rng(0).integers(len(scenes), size=(RESAMPLES, len(scenes)))
    shares = hits[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.percentile(shares, [2.5, 97.5])
    return {"accuracy": float(right.mean()), "low": float(low), "high": float(high)}


def score(expected: list, types: np.ndarray, scene_of: np.ndarray, by_seed: list, unpruned: list) -> dict:
    """
    Accuracy overall and per question type, and agreement with the unpruned model.

    Args:
        expected: the right answer to each question.
        types: the type of each question; scene_of: the scene that it is about.
        by_seed: for each seed the answers; every figure is the mean over them.
        unpruned: the unpruned model's answers.
    """
    given = np.array(by_seed)
    right, same = ((given == np.array(answers)).astype(float) for answers in (expected, unpruned))
    mean = right.mean(0)
    by_type = {}
    for name in sorted(set(types.tolist())):
        of_type = types == name
        by_type[name] = {**interval(mean[of_type], scene_of[of_type]), "questions": int(of_type.sum())}
    row = {
        **interval(mean, scene_of),
        "questions": len(expected),
        "agreement_with_unpruned": float(same.mean()),
        "by_type": by_type,
    }
    if len(by_seed) > 1:
        row["accuracy_by_seed"] = right.mean(1).tolist()
    return row


def pareto_front(costs: list, gains: list) -> list:
    """Which points no other one beats: as cheap and better, or as good and cheaper."""
    points = list(zip(costs, gains))
    better = lambda a, b: a[0] <= b[0] and a[1] >= b[1] and a != b  # noqa: E731
    return [not any(better(other, point) for other in points) for point in points]


def mark_fronts(rows: list) -> None:
    """Says of each row that has a time whether it is on the Pareto front of accuracy and time of its kind."""
    for kind in {row["kind"] for row in rows}:
        timed = [row for row in rows if row["kind"] == kind and "time" in row]
        costs = [row["time"]["seconds_per_question"] for row in timed]
        for row, on_front in zip(timed, pareto_front(costs, [row["accuracy"] for row in timed])):
            row["on_pareto_front"] = on_front


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def with_interval(result: dict) -> str:
    return f"{percent(result['accuracy'])} ({percent(result['low'])} to {percent(result['high'])})"


def _tokens(row: dict) -> str:
    inside = "" if row["inner_tokens"] is None else f", then {row['inner_tokens']:.1f}"
    return f"{row['visual_tokens']:.1f}{inside}"


def _overall(row: dict, timed: bool) -> list:
    seeds = row.get("accuracy_by_seed")
    right = percent(row["accuracy"])
    if seeds:
        right += f", mean of {len(seeds)} seeds ({percent(min(seeds))} to {percent(max(seeds))})"
    cells = [row["setting"], f"{row['keep_ratio']:.4g}", _tokens(row), percent(row["share_of_operations"]), right]
    cells += [f"{percent(row['low'])} to {percent(row['high'])}", percent(row["agreement_with_unpruned"])]
    if timed and "time" in row:
        time = row["time"]
        cells.append(
            f"{1000 * time['seconds_per_question']:.2f} ({1000 * time['low']:.2f} to {1000 * time['high']:.2f})"
        )
        cells.append("yes" if row["on_pareto_front"] else "")
    return cells


def _how_timed(rows: list) -> list:
    times = [row["time"] for row in rows if "time" in row]
    if not times:
        return []
    first = times[0]
    return [
        f"Time: from pixels to the answer, the vision tower included, reading and preprocessing the media not; batches of "
        f"{first['batch']}, all settings in turn on each; median of {first['rounds']} batches and their quartiles.",
    ]


def _scenes(report: dict) -> str:
    return f"about {report['scenes']} scenes from number {report['first_scene']} on"


def markdown(report: dict) -> str:
    """The tables of a report."""
    run = report["environment"]
    lines = [
        "# Accuracy on held-out generated scenes",
        "",
        f"Command: `{report['command']}`  ",
        f"{run.get('gpu', run['cpu'])}, {run['threads']} threads, {run['device']}, {run['dtype']}, torch {run['torch']}, "
        f"transformers {run['transformers']}, Python {run['python']}, {run['date']}; one greedy answer to each question.  ",
        "Share of right answers in percent with its 95 % interval (bootstrap over scenes), and the share of answers equal "
        'to those of the unpruned model. Visual tokens: how many of them a question\'s prompt has, on average; "then" is how many go on '
        "inside the language model, where some leave there. Operations: of the language model's prefill, as torch counts them for the "
        "first question about media of each size, as a share of the unpruned ones.",
        *_how_timed(report["rows"]),
    ]
    for kind in report["kinds"]:
        rows = [row for row in report["rows"] if row["kind"] == kind]
        types, timed = list(rows[0]["by_type"]), "time" in rows[0]
        lines += ["", f"## {kind.capitalize()}s: {rows[0]['questions']} questions {_scenes(report)}", ""]
        header = [
            "setting",
            "keep ratio",
            "visual tokens",
            "operations (%)",
            "right (%)",
            "95 % interval",
            "as unpruned (%)",
        ]
        header += ["ms a question", "on the Pareto front"] if timed else []
        lines += table(header, [_overall(row, timed) for row in rows])
        lines += ["", "Right by type of question, in percent:", ""]
        by_type = [
            [row["setting"], f"{row['keep_ratio']:.4g}", *(with_interval(row["by_type"][name]) for name in types)]
            for row in rows
        ]
        lines += table(["setting", "keep ratio", *types], by_type)
    if report.get("left_out"):
        lines += ["", "## Left out", "", "What this model refuses:", ""]
        lines += [f"- {setting}: {reason}" for setting, reason in report["left_out"].items()]
    return "\n".join(lines) + "\n"
