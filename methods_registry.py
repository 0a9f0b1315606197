"""The registry of pruning methods: every value of `pruning.method` and of `pruning.inner_method` in config.json."""

from .methods_attention import PruMerge, PruMergePlus, VisionZip
from .methods_baselines import Downsample, NoPruning, Random, Uniform
from .methods_coverage import MMTok, Scope
from .methods_distance import DivPrune, ReDiPrune, ReDiPrunePlus
from .methods_encoder import EvoPrune, EvoPruneReDiPrune
from .methods_inner import DART, VTW, FastV, HoliTomMerging, OnlyInside
from .methods_relevance import CDPruner, Trim
from .methods_still import HoliTom, PruneVid
from .methods_video import FastVID, FlashVID, VidCom2

METHODS = {
    "rediprune": ReDiPrune(),
    "rediprune_plus": ReDiPrunePlus(),
    "divprune": DivPrune(),
    "cdpruner": CDPruner(),
    "scope": Scope(),
    "mmtok": MMTok(),
    "evoprune": EvoPrune(),
    "evoprune_rediprune": EvoPruneReDiPrune(),
    "visionzip": VisionZip(),
    "prumerge": PruMerge(),
    "prumerge_plus": PruMergePlus(),
    "trim": Trim(),
    "vidcom2": VidCom2(),
    "fastvid": FastVID(),
    "flashvid": FlashVID(),
    "holitom": HoliTom(),
    "prunevid": PruneVid(),
    "fastv": OnlyInside("fastv"),
    "vtw": OnlyInside("vtw"),
    "dart": OnlyInside("dart"),
    "random": Random(),
    "uniform": Uniform(),
    "downsample": Downsample(),
    "none": NoPruning(),
}

INNER_METHODS = {"fastv": FastV(), "vtw": VTW(), "dart": DART(), "holitom": HoliTomMerging()}
