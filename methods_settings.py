"""The kinds of keys in the pruning block, and the keys that several methods share; a method declares its own parameters."""

from dataclasses import dataclass
from typing import Any, Callable, Optional

from .ops_query import QUERY_WEIGHTINGS
from .ops_relevance import RELEVANCES
from .ops_selection import LARGEST_WEIGHT

DEFAULT_METHOD = "rediprune"
SCOPES = ("frame", "video", "item")


@dataclass(frozen=True)
class Setting:
    """
    One key of the pruning block.

    Attributes:
        default: the value where nothing is set. `None` is accepted where it is the default: then the method decides.
        accepts: whether a value is allowed.
        expected: the allowed values, for messages.
        convert: from an allowed value to the one that is kept.
    """

    default: Any
    accepts: Callable[[Any], bool]
    expected: str
    convert: Callable[[Any], Any] = lambda value: value

    def checked(self, key: str, value):
        """
        The value of `key` as it is kept, a scalar of numpy or torch as the number that it holds.

        Raises:
            ValueError: the value is not allowed; the message names key, value and allowed values.
        """
        value = value.item() if getattr(value, "ndim", None) == 0 else value
        if value is None and self.default is None:
            return value
        if not self.accepts(value):
            expected = self.expected + (", or None" if self.default is None else "")
            raise ValueError(f"pruning key {key!r} is {shown(value)}, but must be {expected}")
        return self.convert(value)


def number(default: Optional[float], least: float, most: float, expected: Optional[str] = None) -> Setting:
    """A number in [least, most], kept as a `float`."""
    accepts = lambda value: _is_number(value) and least <= value <= most  # noqa: E731
    return Setting(default, accepts, expected or f"a number in [{least}, {most}]", float)


def share(default: Optional[float]) -> Setting:
    """A number in (0, 1], kept as a `float`."""
    return Setting(default, lambda value: _is_number(value) and 0 < value <= 1, "a number in (0, 1]", float)


def integer(default: Optional[int], least: int) -> Setting:
    """An integer that a tensor can hold."""
    accepts = lambda value: is_whole(value) and least <= value < 2**31  # noqa: E731
    return Setting(default, accepts, f"an integer of at least {least} and below 2**31")


def choice(default: Optional[str], names) -> Setting:
    """One of `names`."""
    accepts = lambda value: isinstance(value, str) and value in names  # noqa: E731
    return Setting(default, accepts, f"one of {', '.join(map(repr, names))}")


def switch(default: Optional[bool]) -> Setting:
    """True or false."""
    return Setting(default, lambda value: isinstance(value, bool), "true or false")


def text(default: Optional[str], expected: str) -> Setting:
    """A string that is not blank."""
    return Setting(default, lambda value: isinstance(value, str) and bool(value.strip()), expected)


def is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def shown(value) -> str:
    """A value for a message, cut where it is long; Python refuses to write out integers of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"an integer of {value.bit_length()} bits"
    written = repr(value)
    return written if len(written) <= 200 else f"{written[:200]}..."


# `PruningConfig` documents them.
SHARED = {
    "keep_ratio": share(0.15),
    "keep_tokens": integer(None, 1),
    "scope": choice(None, SCOPES),
    "relevance": choice(None, RELEVANCES),
    "relevance_layer": integer(1, 0),
    "text_tower": text(None, "the Hub id or folder of a CLIP checkpoint"),
    "distance": choice(None, ("features", "projected")),
    "time_weight": number(None, 0, LARGEST_WEIGHT),
    "group_time_weight": number(None, 0, LARGEST_WEIGHT),
    "proportional_attention": switch(None),
    "distance_bias": switch(False),
    "merge_weight": number(None, 0, 1),
    "query_weighting": choice("exponential", (*QUERY_WEIGHTINGS, "none")),
    "query_max_tokens": integer(128, 1),
    "video_pooling": switch(True),
    "positions": choice(None, ("compact", "original", "scaled")),
    "max_positions": integer(None, 1),
}
# Of the stage inside the language model, beside `inner_method`.
INNER = {"inner_layer": integer(None, 1), "inner_keep_ratio": share(None)}


def collect_settings(methods: dict, inner_methods: dict) -> dict:
    """
    All keys of the pruning block: `method`, `inner_method`, the shared ones, and those that methods declare as their `parameters`.

    Args:
        methods: from name to `Method`.
        inner_methods: from name to `InnerMethod`.

    Returns:
        `dict` of key -> [`Setting`].

    Raises:
        ValueError: two methods declare different settings of one key, or a method one of a shared key.
    """
    settings = {
        "method": choice(DEFAULT_METHOD, methods),
        **SHARED,
        "inner_method": choice(None, inner_methods),
        **INNER,
    }
    for name, method in (*inner_methods.items(), *methods.items()):
        for key, setting in method.parameters.items():
            if settings.setdefault(key, setting) is not setting:
                raise ValueError(
                    f"method {name!r} declares a setting of its own for pruning key {key!r}, which is declared already; take "
                    "that one over, or choose another name"
                )
    return settings
