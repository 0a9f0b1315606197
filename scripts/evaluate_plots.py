"""Plots of a report of evaluate.py: accuracy against kept visual tokens, and against measured time with its Pareto front.

Examples:
    python scripts/evaluate_plots.py docs/results/accuracy-video.json
    python scripts/evaluate_plots.py runs/a.json --output docs/results/a
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from repository import code_module, fail, parse_setting
from writing import output_prefix, replacing

NEEDED = {"kind", "setting", "keep_ratio", "accuracy", "low", "high"}
MARKERS = "os^Dv<>PX*hp"
MANY = 12  # settings in one panel


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
            with replacing(paths[-1]) as temporary:
                figure.savefig(temporary, dpi=120, bbox_inches="tight")
            pyplot.close(figure)
            print(f"plot written to {paths[-1]}")
    return paths


def _panels(rows: list) -> dict:
    """
    The rows of every pruned setting by its label, best first, for each panel by its title: one for all settings, or, where they
    are too many to tell apart, one for each way to number the tokens.
    """
    names = [name for name in dict.fromkeys(row["setting"] for row in rows) if name != "unpruned"]
    groups = {name: sorted((row for row in rows if row["setting"] == name), key=_keep_ratio) for name in names}
    names.sort(key=lambda name: -sum(row["accuracy"] for row in groups[name]) / len(groups[name]))
    panels = {}
    for name in names:
        title, label = "", name
        if len(names) > MANY:
            title = f"{_positions(name)} positions"
            label = ",".join(part for part in name.split(",") if not part.startswith("positions="))
        panels.setdefault(title, {})[label] = groups[name]
    return panels


def _positions(setting: str) -> str:
    """How a setting numbers its tokens, by itself or as its method has it."""
    changes = parse_setting(setting)
    method = code_module("methods_registry").METHODS[changes["method"]]
    return changes.get("positions") or method.positions


def _keep_ratio(row: dict) -> float:
    return row["keep_ratio"]


def _percents(rows: list) -> tuple:
    """Accuracies, and the lengths of their error bars."""
    values = [100 * row["accuracy"] for row in rows]
    below = [100 * (row["accuracy"] - row["low"]) for row in rows]
    above = [100 * (row["high"] - row["accuracy"]) for row in rows]
    return values, [below, above]


def _figure(pyplot, kind: str, x_label: str, panels: dict):
    """A figure with axes for each panel, and for each label the colour and marker that it has in all of them."""
    size = (9, 5 * len(panels))
    figure, axes = pyplot.subplots(len(panels), figsize=size, sharex=True, sharey=True, squeeze=False, layout="tight")
    for each, title in zip(axes[:, 0], panels):
        each.set_ylabel("right answers (%), 95 % interval")
        each.set_title(f"held-out {kind}s" + (f": {title}" if title else ""))
        each.grid(alpha=0.3)
    axes[-1, 0].set_xlabel(x_label)
    colours = pyplot.get_cmap("tab20").colors
    # Pairs of the map's colours are shades of one: all dark ones first.
    colours = (*colours[::2], *colours[1::2])
    labels = dict.fromkeys(label for groups in panels.values() for label in groups)
    styles = {
        label: {
            "color": colours[index % len(colours)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 5,
            "capsize": 2,
            "elinewidth": 0.8,
        }
        for index, label in enumerate(labels)
    }
    return figure, axes[:, 0], styles


def _legend(axes) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")


def _against_tokens(pyplot, rows: list, kind: str):
    counted = all("visual_tokens" in row for row in rows)  # reports of earlier versions have the ratio alone
    measure = "visual_tokens" if counted else "keep_ratio"
    panels = _panels(rows)
    x_label = "visual tokens kept (mean of a question)" if counted else "keep ratio"
    figure, all_axes, styles = _figure(pyplot, kind, x_label, panels)
    ticks = _labelled([row[measure] for row in rows if row["setting"] != "unpruned"])
    for axes, groups in zip(all_axes, panels.values()):
        for row in rows:
            if row["setting"] == "unpruned":
                axes.axhline(100 * row["accuracy"], color="black", linestyle="--", label="unpruned")
        for label, group in groups.items():
            axes.errorbar([row[measure] for row in group], *_percents(group), label=label, **styles[label])
        axes.set_xscale("log")
        axes.set_xticks(*ticks)
        axes.minorticks_off()
        _legend(axes)
    return figure


def _labelled(places: list) -> tuple:
    """
    Ticks at all places, and their texts: methods round their counts differently, and of ticks whose texts would run into one
    another the most frequent has one.
    """
    numbers, labelled = Counter(places), []
    for tick, _ in numbers.most_common():
        if all(max(tick, other) > 1.12 * min(tick, other) for other in labelled):
            labelled.append(tick)
    return sorted(numbers), [f"{tick:.3g}" if tick in labelled else "" for tick in sorted(numbers)]


def _against_time(pyplot, rows: list, kind: str):
    batch = rows[0]["time"]["batch"]
    panels = _panels(rows)
    x_label = f"ms a question (batches of {batch}; pixels to answer, vision tower included), quartiles"
    figure, all_axes, styles = _figure(pyplot, kind, x_label, panels)
    milliseconds = lambda row, key: 1000 * row["time"][key]  # noqa: E731
    unpruned = [row for row in rows if row["setting"] == "unpruned"]
    front = sorted(
        (row for row in rows if row.get("on_pareto_front")), key=lambda row: row["time"]["seconds_per_question"]
    )
    for axes, groups in zip(all_axes, panels.values()):
        axes.plot(
            [milliseconds(row, "seconds_per_question") for row in front],
            [100 * row["accuracy"] for row in front],
            color="black", linewidth=1, zorder=0, label="Pareto front" if len(panels) == 1 else "Pareto front of all",
        )  # fmt: skip
        for label, group in {"unpruned": unpruned, **groups}.items():
            times = [milliseconds(row, "seconds_per_question") for row in group]
            below = [time - milliseconds(row, "low") for time, row in zip(times, group)]
            above = [milliseconds(row, "high") - time for time, row in zip(times, group)]
            style = styles.get(label, {"color": "black", "marker": "x"})
            # The thin line goes from one keep ratio of a setting to the next.
            axes.errorbar(times, *_percents(group), [below, above], linewidth=0.4, label=label, **style)
        _legend(axes)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="OUTPUT.json of evaluate.py")
    parser.add_argument("--output", help="beginning of the plots' names (default: that of the report)")
    args = parser.parse_args(argv)
    report = read_report(args.report)
    try:
        draw_plots(report, output_prefix(args.output or str(args.report)))
    except OSError as error:
        fail(f"a plot cannot be written: {error}")


if __name__ == "__main__":
    main()
