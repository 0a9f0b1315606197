"""Plots of a benchmark: speed-up and memory against the keep ratio, and where the time goes."""

import io
from statistics import median

from benchmark_tables import COLUMNS
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
    measured = [(row, short) for row, short in zip(report["rows"], report["summary"]) if row["error"] is None]
    pruned = [(row, short) for row, short in measured if "prefill_speedup" in short and row["keep_ratio"] < 1]
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
    cut = "" if layers["language"] == layers["language_of"] else f", {layers['language']} of {layers['language_of']} layers"
    return f"{report['model']}{cut}\n{run.get('gpu', run['cpu'])}, {run['dtype']}, {run['threads']} threads"


def _curves(pairs: list) -> dict:
    """The rows of one curve by its name, with rising keep ratios."""
    curves = {}
    for row, short in sorted(pairs, key=lambda pair: pair[0]["keep_ratio"]):
        name = f"{row['method']}, {row['frames']} frames, pooling {row['pooling']}, batch {row['batch']}"
        curves.setdefault(name, []).append((row, short))
    return curves


def _speedup(report, pruned):
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, curve in _curves(pruned).items():
        ratios = [row["keep_ratio"] for row, _ in curve]
        for key, label, style in (("prefill_speedup", "prefill", "o-"), ("end_to_end_speedup", "end to end", "s--")):
            values = [short[key] for _, short in curve]
            middle = [value["median"] for value in values]
            errors = [[m - v["low"] for m, v in zip(middle, values)], [v["high"] - m for m, v in zip(middle, values)]]
            axes.errorbar(ratios, middle, yerr=errors, fmt=style, capsize=3, label=f"{label} ({name})")
        limit = [short["prefill_operations_ratio"] for _, short in curve]
        axes.plot(ratios, limit, ":", color="grey", label=f"prefill, by counted operations ({name})")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xlabel="keep ratio", ylabel="speed-up over the unpruned model", title=_title(report))
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return figure


def _memory(report, measured, pruned):
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4))
    bases = {(row["frames"], row["pooling"], row["batch"]): row for row, _ in measured if row["method"] == "unpruned"}
    for axes, key, label in zip(panels, ("kv_cache_bytes", "peak_bytes"), ("KV cache", "peak beyond the weights")):
        for name, curve in _curves(pruned).items():
            rows = [row for row, _ in curve] + [bases[tuple(curve[0][0][part] for part in ("frames", "pooling", "batch"))]]
            axes.plot([row["keep_ratio"] for row in rows], [row[key] / 1e6 for row in rows], "o-", label=name)
        axes.set(xlabel="keep ratio (1 is unpruned)", ylabel=f"{label} (MB)")
        axes.set_ylim(bottom=0)
    panels[0].legend(fontsize=7)
    figure.suptitle(_title(report), fontsize=9)
    return figure


def _stages(report, measured):
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.4 * len(measured)))
    labels = [
        f"{row['method']} {row['keep_ratio']:g}, {row['frames']} frames, {row['pooling']}, batch {row['batch']}"
        for row, _ in measured
    ]
    left = [0.0] * len(measured)
    for stage in COLUMNS[:-1]:
        times = report["new_tokens"] - 1 if stage == "decode" else 1
        widths = [1000 * times * short["seconds"][stage]["median"] for _, short in measured]
        label = f"decode of {times} tokens" if stage == "decode" else stage
        axes.barh(labels, widths, left=left, label=label)
        left = [start + width for start, width in zip(left, widths)]
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds (medians)", title=_title(report))
    axes.legend(fontsize=7)
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
