"""Results of evaluate.py for several checkpoints side by side: does what holds for one hold for the others?

One table for each kind of media and budget (a keep ratio, or a share of the operations where `evaluate.py --operations` asked for it), a
setting a row and a checkpoint a column, and one of the goals: is the best of ours ahead of every rival outside the intervals, and how
much of the unpruned accuracy is left? A rival is every setting of another method; what one that prunes inside the language model takes
of the unpruned operations stands beside it.

Examples:
    python scripts/evaluate.py --settings methods --ratios 0.25 4/36 --output runs/clip
    python scripts/evaluate.py --settings methods --ratios 0.25 4/36 --output runs/qwen --subfolder checkpoints/qwen2_5_vl
    python scripts/evaluate_across.py CLIP=runs/clip.json Qwen=runs/qwen.json --output runs/across --plots
"""

import argparse
import json
from pathlib import Path

from evaluate_plots import import_matplotlib, read_report
from evaluation.across import draw_across
from evaluation.report import percent, with_interval
from evaluation.settings import UNPRUNED
from repository import fail, parse_setting, recorded_command
from writing import output_prefix, replacing, table, write_results

OURS = "rediprune_plus"


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "reports", nargs="+", metavar="NAME=FILE", help="an OUTPUT.json of evaluate.py and the name of its checkpoint"
    )
    parser.add_argument("--output", required=True, help="where results go: OUTPUT.json, OUTPUT.md")
    parser.add_argument("--plots", action="store_true", help="also draw OUTPUT.png (needs matplotlib)")
    args = parser.parse_args(argv)
    named = [_named(parser, text) for text in args.reports]
    args.reports = dict(named)
    if len(args.reports) < len(named):
        parser.error(f"the names {', '.join(name for name, _ in named)} must differ: a name is a column")
    args.output = output_prefix(args.output)
    args.command = recorded_command(__file__, argv)
    return args


def _named(parser, text: str) -> tuple:
    name, given, path = text.partition("=")
    if not given or not name or not path:
        parser.error(f"{text}: give a name and a file, such as CLIP=runs/clip.json")
    return name, read_report(Path(path))


class Cells:
    """
    The rows of all reports by checkpoint, kind, setting and budget.

    Attributes:
        measure: what budgets are shares of: `"keep ratio"` or `"share of the operations"`.
    """

    def __init__(self, reports: dict):
        self.checkpoints, self.rows = list(reports), {}
        asked = {any("asked_operations" in row for row in report["rows"]) for report in reports.values()}
        if len(asked) > 1:
            fail("some of the reports are by keep ratio and some by operations: give reports of one kind")
        self.measure = "share of the operations" if asked == {True} else "keep ratio"
        for name, report in reports.items():
            for row in report["rows"]:
                self.rows[name, row["kind"], row["setting"], self._budget(row)] = row

    def _budget(self, row) -> float:
        """What was asked for; of a setting that takes no ratio, such as `vtw`, what it comes to."""
        if self.measure == "keep ratio":
            return row["keep_ratio"]
        return row.get("asked_operations", row["share_of_operations"])

    def _column(self, part: int, **fixed) -> list:
        """The values of one part of the keys in order of their first appearance, where other parts are as `fixed`."""
        names = ("checkpoint", "kind", "setting", "budget")
        keys = [key for key in self.rows if all(key[names.index(name)] == value for name, value in fixed.items())]
        return list(dict.fromkeys(key[part] for key in keys))

    @property
    def kinds(self) -> list:
        return self._column(1)

    def settings(self, kind: str, budget: float) -> list:
        return self._column(2, kind=kind, budget=budget)

    def budgets(self, kind: str) -> list:
        return [budget for budget in self._column(3, kind=kind) if budget < 1]

    def row(self, checkpoint: str, kind: str, setting: str, budget: float):
        """`None` where the checkpoint has no such row."""
        return self.rows.get((checkpoint, kind, setting, budget))


def goal(cells: Cells, checkpoint: str, kind: str, budget: float) -> dict | None:
    """How ours stands beside the unpruned model and its best rival; `None` where one of them was not measured."""
    unpruned, ours = cells.row(checkpoint, kind, UNPRUNED, 1.0), cells.row(checkpoint, kind, OURS, budget)
    rivals = [
        row
        for setting in cells.settings(kind, budget)
        if parse_setting(setting)["method"] != OURS and (row := cells.row(checkpoint, kind, setting, budget))
    ]
    if not (unpruned and ours and rivals):
        return None
    rival = max(rivals, key=lambda row: row["accuracy"])
    return {
        "checkpoint": checkpoint,
        "kind": kind,
        "measure": cells.measure,
        "budget": budget,
        "unpruned": unpruned["accuracy"],
        "ours": ours,
        "share_of_unpruned": ours["accuracy"] / unpruned["accuracy"],
        "best_rival": rival["setting"],
        "rival": rival,
        "ahead_outside_intervals": ours["low"] > max(row["high"] for row in rivals),
    }


def goals(cells: Cells) -> list:
    found = [
        goal(cells, checkpoint, kind, budget)
        for kind in cells.kinds
        for budget in cells.budgets(kind)
        for checkpoint in cells.checkpoints
    ]
    return [entry for entry in found if entry]


def markdown(command: str, reports: dict, cells: Cells) -> str:
    lines = ["# The same settings on several checkpoints", "", f"Command: `{command}`  "]
    for name, report in reports.items():
        run = report["environment"]
        lines.append(
            f"{name}: `{report['command']}`; {run.get('gpu', run['cpu'])}, {run['threads']} threads, {run['device']}, "
            f"{run['dtype']}, torch {run['torch']}, transformers {run['transformers']}, {run['date']}; "
            f"{report['scenes']} scenes from number {report['first_scene']} on.  "
        )
    lines += [
        "Right answers in percent with their 95 % interval (bootstrap over scenes). A dash: the model refuses it."
    ]
    lines += ["", f"## {OURS} beside its best rival", ""]
    header = [
        "",
        cells.measure,
        "checkpoint",
        "unpruned",
        OURS,
        "of unpruned",
        "best rival",
        "ahead of all outside intervals",
    ]
    lines += table(header, [_goal_cells(entry) for entry in goals(cells)])
    for kind in cells.kinds:
        unpruned = [cells.row(name, kind, UNPRUNED, 1.0) for name in cells.checkpoints]
        for budget in cells.budgets(kind):
            lines += ["", f"## {kind.capitalize()}s, {cells.measure} {budget:.4g}", ""]
            rows = [["unpruned", *map(_cell, unpruned)]]
            for setting in cells.settings(kind, budget):
                rows.append([setting, *(_cell(cells.row(name, kind, setting, budget)) for name in cells.checkpoints)])
            lines += table(["setting", *cells.checkpoints], rows)
    return "\n".join(lines) + "\n"


def _cell(row) -> str:
    return with_interval(row) if row else "-"


def _goal_cells(entry: dict) -> list:
    rival = f"{entry['best_rival']}: {with_interval(entry['rival'])}"
    if entry["rival"]["inner_tokens"] is not None:
        rival += f" at {percent(entry['rival']['share_of_operations'])} % of the operations"
    return [
        f"{entry['kind']}s",
        f"{entry['budget']:.4g}",
        entry["checkpoint"],
        percent(entry["unpruned"]),
        with_interval(entry["ours"]),
        f"{percent(entry['share_of_unpruned'])} %",
        rival,
        "yes" if entry["ahead_outside_intervals"] else "no",
    ]


def main(argv=None):
    args = parse_arguments(argv)
    scenes = {(report["first_scene"], report["scenes"]) for report in args.reports.values()}
    if len(scenes) > 1:
        fail(
            f"the reports are about different scenes, {sorted(scenes)} (first, number): give reports about the same ones"
        )
    cells = Cells(args.reports)
    text = markdown(args.command, args.reports, cells)
    report = {"command": args.command, "goals": goals(cells)}
    write_results(args.output, {".json": json.dumps(report, indent=1) + "\n", ".md": text})
    print(text)
    if args.plots:
        with replacing(args.output.with_name(args.output.name + ".png")) as temporary:
            draw_across(import_matplotlib(), cells, OURS, temporary)


if __name__ == "__main__":
    main()
