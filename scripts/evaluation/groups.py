"""Settings that belong together under one name, and which of them a model refuses."""

from dataclasses import replace

from evaluation.settings import Setting, as_setting

ORIGINAL = ",positions=original"
WITHOUT_QUESTION = ("query_weighting=none", "query=other")
CONTROLS = ("random", "uniform", "downsample")
# All with a budget that a ratio sets. At original positions, which help nearly every method; the paper's numbering beside them.
METHODS = (
    "rediprune_plus",
    "rediprune" + ORIGINAL,
    "rediprune,positions=compact",
    "divprune" + ORIGINAL,
    "divprune,scope=frame" + ORIGINAL,
    "cdpruner" + ORIGINAL,
    "scope" + ORIGINAL,
    "mmtok" + ORIGINAL,
    "visionzip" + ORIGINAL,
    "prumerge" + ORIGINAL,
    "trim" + ORIGINAL,
    "evoprune" + ORIGINAL,
    "evoprune_rediprune" + ORIGINAL,
    "vidcom2" + ORIGINAL,
    "fastvid" + ORIGINAL,
    "flashvid" + ORIGINAL,
    "holitom" + ORIGINAL,
    "prunevid" + ORIGINAL,
    "fastv",
    "dart",
    *(control + ORIGINAL for control in CONTROLS),
    *(f"rediprune_plus,{control}" for control in WITHOUT_QUESTION),
    *(f"rediprune,{control}{ORIGINAL}" for control in WITHOUT_QUESTION),
)
# What each choice of rediprune_plus is worth: one of them undone, or alone in the paper's method.
ABLATION = (
    "rediprune_plus",
    "rediprune_plus,proportional_attention=false",
    "rediprune_plus,positions=compact",
    "rediprune_plus,scope=frame",
    "rediprune_plus,time_weight=0",
    "rediprune_plus,group_time_weight=0.25",
    "rediprune_plus,distance=features",
    "rediprune_plus,merge_weight=0",
    "rediprune_plus,relevance=attention",
    "rediprune_plus,relevance=pooled",
    "rediprune_plus,relevance=projected",
    "rediprune_plus,query_weighting=none",
    "rediprune" + ORIGINAL,
    "rediprune,proportional_attention=true" + ORIGINAL,
)
# For `--operations`: what prunes before the language model, inside it, and in both places. VTW has no budget that could be set.
STAGES = (
    "rediprune_plus",
    "rediprune" + ORIGINAL,
    "divprune" + ORIGINAL,
    "rediprune_plus,inner_method=fastv,inner_keep_ratio=0.05",
    f"holitom{ORIGINAL},inner_method=holitom,inner_keep_ratio=0.05",
    "fastv",
    "dart",
    "random" + ORIGINAL,
    "uniform" + ORIGINAL,
)
GROUPS = {"methods": METHODS, "ablation": ABLATION, "stages": STAGES}


def as_settings(text: str) -> list[Setting]:
    """A setting, or all of a group: those a model may refuse."""
    if text in GROUPS:
        return [replace(as_setting(member), may_be_refused=True) for member in GROUPS[text]]
    return [as_setting(text)]
