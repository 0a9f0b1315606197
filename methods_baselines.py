"""The controls of every comparison: tokens at random, evenly spaced tokens, all tokens."""

from .methods_base import Method
from .methods_settings import Setting, is_whole
from .ops_selection import select_random, select_uniform
from .ops_tokens import check_finite


class Random(Method):
    """
    A uniform draw without replacement, seeded for each set.

    Parameters:
        seed (`int`, defaults to 0): not negative.
    """

    required_signals = frozenset({"seeds"})
    parameters = {"seed": Setting(0, lambda value: is_whole(value) and value >= 0, "a non-negative integer")}

    def select(self, tokens, num_kept, pruning):
        check_finite("features", tokens.features)
        return select_random(tokens.features.shape[1], num_kept, tokens.seeds).to(tokens.features.device)


class Uniform(Method):
    """Evenly spaced tokens in raster order."""

    def select(self, tokens, num_kept, pruning):
        check_finite("features", tokens.features)
        num_sets, num_tokens = tokens.features.shape[:2]
        return select_uniform(num_tokens, num_kept).to(tokens.features.device).expand(num_sets, -1)


class NoPruning(Method):
    """Every token stays: the stock model."""

    def count(self, num_tokens, pruning):
        return num_tokens
