"""EvoPrune (reconstruction, see `ops_merging.py`): patches are merged step by step inside the vision encoder."""

from .methods_base import Method
from .methods_distance import ReDiPrune
from .methods_settings import share
from .ops_selection import count_kept


class EvoPrune(Method):
    """EvoPrune (reconstruction): the encoder itself leaves as many tokens of each set as stay; its cost falls with them."""

    def count_in_encoder(self, num_patches, num_kept, pruning):
        return num_kept


class EvoPruneReDiPrune(ReDiPrune):
    """
    EvoPrune (reconstruction) down to the share `encoder_keep_ratio` of the patches, then ReDiPrune on what is left.

    Parameters, beside those of `ReDiPrune`:
        encoder_keep_ratio (`float`, defaults to 0.5): share of the patches that the vision encoder leaves, in (0, 1].
    """

    parameters = {**ReDiPrune.parameters, "encoder_keep_ratio": share(0.5)}

    def count_in_encoder(self, num_patches, num_kept, pruning):
        return max(num_kept, count_kept(num_patches, pruning.encoder_keep_ratio))
