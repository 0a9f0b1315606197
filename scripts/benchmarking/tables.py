"""The numbers of a benchmark in Markdown, and the ratios that are made of them."""

from statistics import median

from writing import table

STAGES = ("vision encoder", "selection", "projector", "prefill", "decode")
COLUMNS = (*STAGES[:-1], "other", "decode", "end to end")
SECOND = "second question"

# The speed-up of the selection that was aimed at, by device and frames x tokens; at all other sizes not to be slower.
GOALS = {"cpu": {(32, 144): 4, (32, 576): 2}, "cuda": {(32, 144): 20}}
GOAL_RATIOS, GOAL_THREADS, GOAL_MILLISECONDS = (0.1, 0.15), 2, 1


def spread(values: list) -> dict:
    return {"median": median(values), "low": min(values), "high": max(values)}


def summarise(report: dict) -> list:
    """
    For each measured row medians and ranges, and its ratios to the unpruned model that ran in turns with it.

    Args:
        report: of `benchmark_model`; in its rows, a group starts with the unpruned one.
    """
    summary, base = [], None
    for row in report["rows"]:
        key = {name: row[name] for name in ("method", "keep_ratio", "frames", "video_pooling", "batch", "error")}
        if row["method"] == "unpruned":
            base = row
        if row["error"] is None:
            key["seconds"] = {stage: spread(values) for stage, values in row["samples"].items()}
            key["answers_per_second"] = row["batch"] / key["seconds"]["end to end"]["median"]
            if base["error"] is None:
                key |= _against(base, row, report)
        summary.append(key)
    return summary


def _against(base: dict, row: dict, report: dict) -> dict:
    """Ratios of one row to the unpruned one; those of times are taken round by round."""
    # Layers of the true language model for each that was measured.
    layer_factor = report["layers"]["language_of"] / report["layers"]["language"]
    same_layers = row.get("inner_tokens") is None or layer_factor == 1  # as many tokens in those that were left out

    def rounds(stage):
        return list(zip(base["samples"][stage], row["samples"][stage]))

    def all_layers(samples):
        """Seconds end to end if every layer that was left out took as long as those that were not."""
        steps = report["new_tokens"] - 1
        language = [prefill + steps * decode for prefill, decode in zip(samples["prefill"], samples["decode"])]
        return [total + (layer_factor - 1) * part for total, part in zip(samples["end to end"], language)]

    speedup = spread([before / after for before, after in rounds("prefill")])
    operations = base["operations"]["prefill"] / row["operations"]["prefill"]
    saved = median(before - after for before, after in rounds("prefill")) * layer_factor
    selection = median(row["samples"]["selection"])
    return {
        "prefill_speedup": speedup,
        "end_to_end_speedup": spread([before / after for before, after in rounds("end to end")]),
        "scaled_end_to_end_speedup": spread(
            [before / after for before, after in zip(all_layers(base["samples"]), all_layers(row["samples"]))]
        )
        if same_layers
        else None,
        "prefill_operations_ratio": operations,
        "formula_ratio": base["paper_prefill_multiply_adds"] / row["paper_prefill_multiply_adds"],
        "share_of_limit": speedup["median"] / operations,
        "selection_share_of_saving": selection / saved if saved > 0 and same_layers and row is not base else None,
    }


def milliseconds(value: dict) -> str:
    middle, low, high = (1000 * value[name] for name in ("median", "low", "high"))
    return f"{short(middle)} ({short(low)} to {short(high)})"


def short(number: float) -> str:
    return f"{number:.0f}" if number >= 1000 else f"{number:.3g}"


def factor(value: dict) -> str:
    return f"{value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f})"


def heading(report: dict, title: str) -> list:
    run, load = report["environment"], report["load_average"]
    device = f"{run['gpu']}, " if "gpu" in run else ""
    return [
        f"# {title}",
        "",
        f"Command: `{report['command']}`  ",
        f"{device}{run['cpu']}, {run['threads']} threads, {run['device']}, {run['dtype']}, torch {run['torch']}, "
        f"transformers {run['transformers']}, Python {run['python']}, {run['date']}, {report['minutes']:g} minutes; load "
        f"average of the machine before {load['before']:.1f}, after {load['after']:.1f}.  ",
        f"{report['repeats']} runs of each after {report['warmup']} to warm up, in turns; medians, in brackets the smallest "
        "and the largest.",
    ]


def setting(row: dict, report: dict) -> list:
    has_ratio = row["method"] != "unpruned" and row.get("inner_tokens") != 0
    name = f"{row['method']} {row['keep_ratio']:g}" if has_ratio else row["method"]
    frames = f"{row['frames']}, {'pooled' if row['video_pooling'] else 'unpooled'}"
    if report.get("medium") == "image":
        frames = "one image"
    return [name, frames, str(row["batch"])]


def markdown(report: dict) -> str:
    lines = selection_tables(report) if report["kind"] == "selection" else model_tables(report)
    return "\n".join(lines) + "\n"


def selection_tables(report: dict) -> list:
    lines = heading(report, f"The selection alone, sets of tokens {report['width']} wide")
    lines[-1] += " The speed-up is that of each turn. Both are to pick the same tokens in every frame."
    rows = []
    for row in report["rows"]:
        plain, ours = row["samples"]["plain loop"], row["samples"]["select_rediprune"]
        ratio = spread([before / after for before, after in zip(plain, ours)])
        cells = [f"{row['frames']} x {row['tokens']}", f"{row['keep_ratio']:g}", str(row["kept"])]
        cells += [milliseconds(spread(plain)), milliseconds(spread(ours)), factor(ratio)]
        rows.append([*cells, _agreement(row), _goal(row, ratio["median"], 1000 * median(ours), report["environment"])])
    header = [
        "frames x tokens",
        "keep ratio",
        "kept",
        "plain loop (ms)",
        "select_rediprune (ms)",
        "speed-up",
        "same tokens",
        "goal",
    ]
    return [
        *lines,
        "",
        *table(header, rows),
        "",
        "Goals are for medians" + _where_goals_are_for(report["environment"]) + ".",
    ]


def _where_goals_are_for(run: dict) -> str:
    return "" if run["device"].startswith("cuda") else f", and for {GOAL_THREADS} CPU threads"


def _goal(row: dict, speedup: float, ours: float, run: dict) -> str:
    """What was aimed at and whether this run reached it; nothing where no goal is set."""
    on_gpu = run["device"].startswith("cuda")
    if not on_gpu and run["threads"] != GOAL_THREADS:
        return "-"
    goals = GOALS["cuda" if on_gpu else "cpu"]
    least = goals.get((row["frames"], row["tokens"]), 1) if row["keep_ratio"] in GOAL_RATIOS else 1
    text, met = f"{least} times" if least > 1 else "not slower", speedup >= least
    if on_gpu and least > 1:
        text, met = f"{text}, under {GOAL_MILLISECONDS} ms", met and ours < GOAL_MILLISECONDS
    return f"{text}: {'met' if met else 'MISSED'}"


def _agreement(row: dict) -> str:
    same, edge = row["identical_frames"], row["frames_at_the_edge_of_a_tie"]
    different = row["frames"] - same - edge
    text = f"{same} of {row['frames']}"
    return text + (f", {edge} at the edge of a tie" if edge else "") + (f", {different} DIFFERENT" if different else "")


def model_tables(report: dict) -> list:
    layers = report["layers"]
    lines = heading(report, f"Time, memory and operations: {report['model']}")
    lines[-1] += (
        f" Language model {layers['language']} of {layers['language_of']} layers, vision tower {layers['vision']} of "
        f"{layers['vision_of']}; {report['attention']} attention; {report['text_tokens']} text tokens, "
        f"{report['new_tokens']} generated; weights {report['weights_bytes'] / 1e6:.0f} MB."
    )
    measured = [(row, ratios) for row, ratios in zip(report["rows"], report["summary"]) if row["error"] is None]
    names = ["setting", "frames", "batch"]
    lines += ["", "## Where the time goes (ms)", ""]
    again = [SECOND] if all(SECOND in row["samples"] for row, _ in measured) else []  # results of before have none
    columns = [*COLUMNS, *again]
    header = [*names, *(f"{name} a token" if name == "decode" else name for name in columns), "answers a second"]
    lines += table(header, [
        [*setting(row, report), *(milliseconds(ratios["seconds"][name]) for name in columns), f"{ratios['answers_per_second']:.3g}"]
        for row, ratios in measured
    ])  # fmt: skip
    lines += [
        "",
        "`selection` has the query in it, `other` what is between the stages: embeddings, the head, the loop of `generate`."
        + (f" `{SECOND}` is end to end with media that were encoded for an earlier one." if again else ""),
        "",
        "## What is saved",
        "",
    ]
    header = [*names, "visual tokens", "prefill speed-up", "by counted operations", "share of that"]
    header += ["by the paper's formula", "end to end speed-up", "selection / saved prefill"]
    scaled = layers["language"] < layers["language_of"]
    if scaled:
        header.append(f"end to end, scaled to {layers['language_of']} layers")
    lines += table(header, [
        [*setting(row, report), _tokens(row), *_savings(ratios, scaled)] for row, ratios in measured
    ])  # fmt: skip
    lines += [
        "",
        'Speed-ups are those of each turn over the unpruned model of the same turn. "By counted operations" is the one that '
        'the operations of prefill allow, as torch counts them; "share of that" is how much of it was reached. Where tokens leave '
        'inside the language model, "then" is how many go on there, and their choice is part of prefill.'
        + (
            f" Saved prefill is scaled to {layers['language_of']} layers too: computed, not measured." if scaled else ""
        ),
        "",
        "## Operations and memory",
        "",
    ]
    stages = ("vision encoder", "selection", "projector", "prefill", "total")
    header = [*names, *(f"{stage} (GFLOP)" for stage in stages), "paper's formula, prefill (10^9 multiply-adds)"]
    header += ["KV cache (MB)", "peak beyond weights (MB)"]
    lines += table(header, [
        [
            *setting(row, report),
            *(short(row["operations"].get(stage, 0) / 1e9) for stage in stages),
            short(row["paper_prefill_multiply_adds"] / 1e9),
            short(row["kv_cache_bytes"] / 1e6),
            short(row["peak_bytes"] / 1e6),
        ]
        for row, _ in measured
    ])  # fmt: skip
    lines += ["", "Operations up to the first token, two for a multiply-add; the KV cache after it."]
    failed = [row for row in report["rows"] if row["error"] is not None]
    if failed:
        lines += [
            "",
            "## Not measured",
            "",
            *table([*names, "why"], [[*setting(row, report), row["error"]] for row in failed]),
        ]
    return lines


def _tokens(row: dict) -> str:
    inside = row.get("inner_tokens")  # results of before have none
    return str(row["visual_tokens"]) + ("" if inside is None else f", then {inside}")


def _savings(ratios: dict, scaled: bool) -> list:
    if "prefill_speedup" not in ratios:
        return ["unpruned not measured", *["-"] * (6 if scaled else 5)]
    share = ratios["selection_share_of_saving"]
    cells = [
        factor(ratios["prefill_speedup"]),
        f"{ratios['prefill_operations_ratio']:.2f}",
        f"{ratios['share_of_limit']:.0%}",
        f"{ratios['formula_ratio']:.2f}",
        factor(ratios["end_to_end_speedup"]),
        "-" if share is None else f"{share:.2%}",
    ]
    if not scaled:
        return cells
    speedup = ratios["scaled_end_to_end_speedup"]
    return [*cells, "-" if speedup is None else factor(speedup)]
