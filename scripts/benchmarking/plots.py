"""Plots of a benchmark: speed-up and memory against the keep ratio, and where the time goes."""

import io
import json
from statistics import median

from benchmarking.tables import COLUMNS
from repository import fail

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
except ImportError:
    fail("--plots needs matplotlib; install it (pip install matplotlib), or leave --plots out")


def draw(report: dict) -> dict:
    """PNG files by name."""
    if report["kind"] == "selection":
        return {"speedup": _png(_selection(report))}
    measured = [(row, ratios) for row, ratios in zip(report["rows"], report["summary"]) if row["error"] is None]
    pruned = [(row, ratios) for row, ratios in measured if "prefill_speedup" in ratios and row["keep_ratio"] < 1]
    pictures = {"stages": _png(_stages(report, measured))}
    if pruned:
        pictures |= {"speedup": _png(_speedup(report, pruned)), "memory": _png(_memory(report, measured, pruned))}
    return pictures


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return file.getvalue()


def _title(report: dict) -> str:
    layers, run = report["layers"], report["environment"]
    cut = (
        ""
        if layers["language"] == layers["language_of"]
        else f", {layers['language']} of {layers['language_of']} layers"
    )
    return f"{report['model']}{cut}\n{run.get('gpu', run['cpu'])}, {run['dtype']}, {run['threads']} threads"


GROUP = ("frames", "video_pooling", "batch")


def _names(pairs: list) -> list:
    """A name for every row, of the method and of what else differs between rows."""
    differs = [key for key in GROUP if len({row[key] for row, _ in pairs}) > 1]
    return [", ".join([row["method"], *(f"{key} {json.dumps(row[key])}" for key in differs)]) for row, _ in pairs]


def _curves(pairs: list) -> dict:
    """The rows of one curve by its name, with rising keep ratios."""
    curves = {}
    for name, pair in sorted(zip(_names(pairs), pairs), key=lambda item: item[1][0]["keep_ratio"]):
        curves.setdefault(name, []).append(pair)
    return dict(sorted(curves.items()))


def _speedup(report, pruned):
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.5), sharey=True)
    layers, whole = report["layers"], ("end_to_end_speedup", "end to end")
    if layers["language"] < layers["language_of"]:
        whole = ("scaled_end_to_end_speedup", f"end to end, computed for {layers['language_of']} layers")
    for axes, (key, label) in zip(panels, (("prefill_speedup", "prefill"), whole)):
        for name, curve in _curves(pruned).items():
            keep, values = [row["keep_ratio"] for row, _ in curve], [ratios[key] for _, ratios in curve]
            middle = [value["median"] for value in values]
            errors = [[m - v["low"] for m, v in zip(middle, values)], [v["high"] - m for m, v in zip(middle, values)]]
            lines = axes.errorbar(keep, middle, yerr=errors, fmt="o-", capsize=3, label=name)
            if key == "prefill_speedup":
                limit = [ratios["prefill_operations_ratio"] for _, ratios in curve]
                axes.plot(keep, limit, ":", color=lines[0].get_color())
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xlabel="keep ratio", title=label)
        axes.set_ylim(bottom=0)
    panels[0].set(ylabel="speed-up over the unpruned model", title="prefill (dotted: by counted operations)")
    panels[1].legend(fontsize=7)
    figure.suptitle(_title(report), fontsize=9, y=1.02)
    return figure


def _memory(report, measured, pruned):
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4))
    bases = {tuple(row[key] for key in GROUP): row for row, _ in measured if row["method"] == "unpruned"}
    for axes, key, label in zip(panels, ("kv_cache_bytes", "peak_bytes"), ("KV cache", "peak beyond the weights")):
        for name, curve in _curves(pruned).items():
            rows = [row for row, _ in curve]
            rows.append(bases[tuple(rows[0][part] for part in GROUP)])
            axes.plot([row["keep_ratio"] for row in rows], [row[key] / 1e6 for row in rows], "o-", label=name)
        axes.set(xlabel="keep ratio (1 is unpruned)", ylabel=f"{label} (MB)")
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=7)
    figure.suptitle(_title(report), fontsize=9, y=1.04)
    return figure


def _stages(report, measured):
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.4 * len(measured)))
    labels = [f"{name} (keep {row['keep_ratio']:g})" for name, (row, _) in zip(_names(measured), measured)]
    left = [0.0] * len(measured)
    for stage in COLUMNS[:-1]:
        times = report["new_tokens"] - 1 if stage == "decode" else 1
        widths = [1000 * times * ratios["seconds"][stage]["median"] for _, ratios in measured]
        label = f"decode of {times} tokens" if stage == "decode" else stage
        axes.barh(labels, widths, left=left, label=label)
        left = [start + width for start, width in zip(left, widths)]
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds (medians)", title=_title(report))
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def _selection(report):
    figure, axes = pyplot.subplots(figsize=(7, 4))
    sizes = {}
    for row in report["rows"]:
        pairs = zip(row["samples"]["plain loop"], row["samples"]["select_rediprune"])
        speedup = median(before / after for before, after in pairs)
        sizes.setdefault((row["frames"], row["tokens"]), []).append((row["keep_ratio"], speedup))
    for (frames, tokens), points in sizes.items():
        axes.plot(*zip(*sorted(points)), "o-", label=f"{frames} x {tokens} tokens")
    axes.axhline(1, color="black", linewidth=0.8)
    run = report["environment"]
    title = f"select_rediprune beside a plain loop\n{run.get('gpu', run['cpu'])}, {run['threads']} threads"
    axes.set(xlabel="keep ratio", ylabel="speed-up", title=title)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure
