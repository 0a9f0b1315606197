"""Plots of a report of evaluate.py: accuracy against kept visual tokens, and against measured time with its Pareto front.

Examples:
    python scripts/evaluate_plots.py docs/results/accuracy-video.json
    python scripts/evaluate_plots.py runs/a.json --output docs/results/a
"""

import argparse
import json
from pathlib import Path

from repository import fail

NEEDED = {"kind", "setting", "keep_ratio", "accuracy", "low", "high"}
MARKERS = "os^Dv<>PX*hp"


def import_matplotlib():
    try:
        import matplotlib
    except ImportError:
        fail("plots need matplotlib; install it with `pip install matplotlib`")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def read_report(path: Path) -> dict:
    """A report, or the end of the program with what is wrong with the file."""
    remedy = "give the OUTPUT.json of scripts/evaluate.py; if that run was killed, start it again, its answers are kept"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{path} cannot be read ({error.strerror}); {remedy}")
    except ValueError as error:
        fail(f"{path} is not a whole JSON file ({error}); {remedy}")
    rows = report.get("rows") if isinstance(report, dict) else None
    if not isinstance(rows, list) or not rows:
        fail(f"{path} has no rows; {remedy}")
    for number, row in enumerate(rows):
        missing = NEEDED - row.keys() if isinstance(row, dict) else NEEDED
        if missing:
            fail(f"{path}: row {number} lacks {', '.join(sorted(missing))}; {remedy}")
    return report


def draw_plots(report: dict, output: Path) -> list:
    """Draws what the report has numbers for; returns the files' paths."""
    pyplot, paths = import_matplotlib(), []
    kinds = list(dict.fromkeys(row["kind"] for row in report["rows"]))
    for kind in kinds:
        rows = [row for row in report["rows"] if row["kind"] == kind]
        figures = {"tokens": _against_tokens(pyplot, rows, kind)}
        if all("time" in row for row in rows):
            figures["time"] = _against_time(pyplot, rows, kind)
        for name, figure in figures.items():
            paths.append(output.with_name(f"{output.name}.{kind}-{name}.png"))
            temporary = paths[-1].with_suffix(".part")
            figure.savefig(temporary, dpi=120, bbox_inches="tight", format="png")
            temporary.replace(paths[-1])
            pyplot.close(figure)
            print(f"plot written to {paths[-1]}")
    return paths


def _settings(rows: list) -> list:
    """The rows of each pruned setting."""
    names = dict.fromkeys(row["setting"] for row in rows)
    return [[row for row in rows if row["setting"] == name] for name in names if name != "unpruned"]


def _percents(rows: list) -> tuple:
    """Accuracies, and the lengths of their error bars."""
    values = [100 * row["accuracy"] for row in rows]
    below = [100 * (row["accuracy"] - row["low"]) for row in rows]
    above = [100 * (row["high"] - row["accuracy"]) for row in rows]
    return values, [below, above]


def _axes(pyplot, kind: str, x_label: str):
    figure, axes = pyplot.subplots(figsize=(9, 5))
    axes.set_xlabel(x_label)
    axes.set_ylabel("right answers (%), 95 % interval")
    axes.set_title(f"held-out {kind}s")
    axes.grid(alpha=0.3)
    axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
    return figure, axes


def _against_tokens(pyplot, rows: list, kind: str):
    counted = all("visual_tokens" in row for row in rows)  # reports of earlier versions have the ratio alone
    figure, axes = _axes(pyplot, kind, "visual tokens kept (mean of a question)" if counted else "keep ratio")
    for index, group in enumerate(_settings(rows)):
        group = sorted(group, key=lambda row: row["keep_ratio"])
        values, bars = _percents(group)
        places = [row["visual_tokens" if counted else "keep_ratio"] for row in group]
        axes.errorbar(places, values, bars, marker=MARKERS[index % len(MARKERS)], capsize=2, label=group[0]["setting"])
    for row in rows:
        if row["setting"] == "unpruned":
            axes.axhline(100 * row["accuracy"], color="black", linestyle="--", label="unpruned")
    axes.set_xscale("log")
    ticks = sorted({row["visual_tokens" if counted else "keep_ratio"] for row in rows if row["setting"] != "unpruned"})
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return figure


def _against_time(pyplot, rows: list, kind: str):
    batch = rows[0]["time"]["batch"]
    label = f"ms a question (batches of {batch}; pixels to answer, vision tower included), quartiles"
    figure, axes = _axes(pyplot, kind, label)
    milliseconds = lambda row, key: 1000 * row["time"][key]  # noqa: E731
    groups = [[row for row in rows if row["setting"] == "unpruned"], *_settings(rows)]
    for index, group in enumerate(groups):
        values, bars = _percents(group)
        times = [milliseconds(row, "seconds_per_question") for row in group]
        below = [time - milliseconds(row, "low") for time, row in zip(times, group)]
        above = [milliseconds(row, "high") - time for time, row in zip(times, group)]
        marker, name = MARKERS[index % len(MARKERS)], group[0]["setting"]
        axes.errorbar(times, values, bars, [below, above], marker=marker, linestyle="", capsize=2, label=name)
    front = sorted((row for row in rows if row.get("on_pareto_front")), key=lambda row: row["time"]["seconds_per_question"])
    times = [milliseconds(row, "seconds_per_question") for row in front]
    axes.plot(times, [100 * row["accuracy"] for row in front], color="black", linewidth=1, zorder=0, label="Pareto front")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="OUTPUT.json of evaluate.py")
    parser.add_argument("--output", type=Path, help="beginning of the plots' names (default: that of the report)")
    args = parser.parse_args()
    draw_plots(read_report(args.report), args.output or args.report.with_suffix(""))


if __name__ == "__main__":
    main()
