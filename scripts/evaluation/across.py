"""The picture of several checkpoints: a panel for each kind of media and checkpoint, ours beside its best rivals and chance."""

from evaluation.settings import UNPRUNED

COLOURS = ("C0", "C1", "C2", "C4")  # of so many rivals: more lines could not be told apart
CONTROL = "random,positions=original"


def draw_across(pyplot, cells, ours: str, path) -> None:
    """
    Args:
        pyplot: matplotlib's.
        cells: `evaluate_across.Cells`.
        ours: the setting that is drawn in front of the others.
        path: of the picture.
    """
    kinds, checkpoints = cells.kinds, cells.checkpoints
    size = (3.4 * len(checkpoints) + 1.5, 3 * len(kinds) + 0.5)
    figure, axes = pyplot.subplots(
        len(kinds), len(checkpoints), figsize=size, sharex=True, sharey=True, squeeze=False, layout="tight"
    )
    for row, kind in zip(axes, kinds, strict=True):
        lines = {ours: {"color": "C3", "linewidth": 2.5, "zorder": 3}}
        rivals = zip(_best_rivals(cells, kind, ours), COLOURS, strict=False)
        lines |= {setting: {"color": colour, "linewidth": 1.2} for setting, colour in rivals}
        lines[CONTROL] = {"color": "grey", "linestyle": ":"}
        for place, name in zip(row, checkpoints, strict=True):
            _draw_panel(place, cells, name, kind, lines)
        row[0].set_ylabel(f"{kind}s: right answers (%)")
        row[-1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    for place, name in zip(axes[0], checkpoints, strict=True):
        place.set_title(name)
    for place in axes[-1]:
        place.set_xlabel(cells.measure)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _best_rivals(cells, kind: str, ours: str) -> list:
    """The settings of other methods with the highest mean, of those checkpoints and budgets that have them."""
    means = {}
    budgets = cells.budgets(kind)
    for setting in dict.fromkeys(setting for budget in budgets for setting in cells.settings(kind, budget)):
        if setting == CONTROL or setting.startswith(ours):
            continue
        rows = [cells.row(name, kind, setting, budget) for name in cells.checkpoints for budget in budgets]
        accuracies = [row["accuracy"] for row in rows if row]
        means[setting] = sum(accuracies) / len(accuracies)
    return sorted(means, key=means.get, reverse=True)


def _draw_panel(axes, cells, checkpoint: str, kind: str, lines: dict) -> None:
    unpruned = cells.row(checkpoint, kind, UNPRUNED, 1.0)
    if unpruned:
        axes.axhline(100 * unpruned["accuracy"], color="black", linestyle="--", linewidth=1, label=UNPRUNED)
    for setting, style in lines.items():
        rows = {budget: cells.row(checkpoint, kind, setting, budget) for budget in sorted(cells.budgets(kind))}
        rows = {budget: row for budget, row in rows.items() if row}
        axes.plot(
            list(rows),
            [100 * row["accuracy"] for row in rows.values()],
            marker=".",
            label=setting,
            **style,
        )
    ticks = sorted(cells.budgets(kind))
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:.2f}" for tick in ticks], fontsize=7)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
