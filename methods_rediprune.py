"""The registry of pruning methods: every value of `pruning.method` in config.json."""

from .method_cdpruner_rediprune import CDPruner
from .method_controls_rediprune import NoPruning, Random, Uniform
from .method_coverage_rediprune import MMTok, Scope
from .method_divprune_rediprune import DivPrune
from .method_evoprune_rediprune import EvoPrune, EvoPruneReDiPrune
from .method_prumerge_rediprune import PruMerge, PruMergePlus
from .method_rediprune import ReDiPrune, ReDiPrunePlus
from .method_trim_rediprune import Trim
from .method_visionzip_rediprune import VisionZip

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
    "random": Random(),
    "uniform": Uniform(),
    "none": NoPruning(),
}
