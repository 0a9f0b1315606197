"""The pruning block of `config.json`, checked when it is set."""

import difflib
from typing import Optional

from .methods_registry import INNER_METHODS, METHODS
from .methods_settings import collect_settings
from .ops_relevance import LATE_LAYERS
from .ops_selection import count_kept


class PruningConfig:
    """
    The `pruning` block of `config.json`: the only home of the pruning parameters.

    Its keys are `method`, those below, which several methods share, and the parameters of each method, which its class
    declares, checks and documents in `methods_*.py` (docs/methods.md has a table of all).

    Every value is checked when it is set, in the constructor and by attribute. Scalars of numpy and torch are taken as the
    numbers that they hold, and numbers that need not be whole are kept as `float`.

    Args:
        method (`str`, defaults to `"rediprune"`): which tokens stay; a key of `METHODS` in `methods_registry.py`.
        keep_ratio (`float`, defaults to 0.15): share of the visual tokens that stay, in (0, 1]. A set of `n` tokens
            keeps `count_kept(n, keep_ratio)`; 1 is the stock model. `None` where `keep_tokens` is set.
        keep_tokens (`int`, *optional*): instead of a share, how many tokens of each set stay; of a smaller set all of them.
        scope (`str`, *optional*): what shares a budget. `"frame"` = each frame and each image view by itself; `"video"` =
            all frames of a video jointly, image views by themselves; `"item"` = all tokens of a video or an image.
        relevance (`str`, *optional*): the space in which tokens and question are compared, for the methods that look at the
            question. `"pooled"` = the ReDiPrune paper's; `"projected"` = the language model's input embeddings;
            `"attention"` = the query-key space of one of its first layers; `"late_attention"` = of several, where the later words
            count more and like tokens share what they get; `"clip"` = the joint space of `text_tower`.
        relevance_layer (`int`, defaults to 1): the layer of `"attention"`; the question goes through the layers before it. Of
            `"late_attention"` the first of four.
        text_tower (`str`, *optional*): the CLIP checkpoint that the vision tower was made from, a Hub id (`"id@revision"` to
            pin it) or a folder (absolute, or relative to the variant's and beginning with `.`). With it `"cdpruner"` and
            `"trim"` compare as their papers do; its weights are loaded when they are needed and not saved with the model.
        distance (`str`, *optional*): what max-min diversity is measured in, `"features"` of the vision tower or
            `"projected"` tokens. Used by the ReDiPrune methods and `"divprune"`.
        time_weight (`float`, *optional*): what the whole length of a video adds to that distance, in [0, 1e6].
        group_time_weight (`float`, *optional*): the same where it is asked which kept token another one belongs to, for the two
            keys below; `None` of a method = `time_weight`.
        proportional_attention (`bool`, *optional*): a kept token weighs in the language model's attention as much as all
            tokens that it stands for.
        distance_bias (`bool`, defaults to `False`): in the pass of a pruned prompt, attention logits grow with the distance between
            two of its tokens (the distance term of RESTORE, arXiv 2606.01711).
        merge_weight (`float`, *optional*): how far a kept token's features move to the mean of all tokens that it stands for, in
            [0, 1].
        query_weighting (`str`, defaults to `"exponential"`): how text embeddings become one query vector (paper,
            Table 4); `"none"` drops the text, so that diversity alone decides.
        query_max_tokens (`int`, defaults to 128): at most so many tokens of the text after the last placeholder.
        video_pooling (`bool`, defaults to `True`): the tokens of a video are those that the checkpoint's own 2x2 pooling
            leaves; else the unpooled ones of each frame.
        positions (`str`, *optional*): `"compact"` = the pruned prompt is numbered 0..n-1, as in the paper; `"original"` =
            every token keeps the position that it has in the unpruned prompt; `"scaled"` = the same, but
            where that prompt is longer than `max_positions`, the gaps are shrunk until it fits.
        max_positions (`int`, *optional*): for `"scaled"`, the longest prompt that the checkpoint was trained with; `None` = the
            context of the language model, which is the most that is taken.
        inner_method (`str`, *optional*): a second stage, which leaves visual tokens behind inside the language model; a key of
            `INNER_METHODS` in `methods_registry.py`. `None` = none, or what `method` says: `"fastv"`, `"vtw"` and `"dart"` there are
            that stage alone.
        inner_layer (`int`, *optional*): the first layer that they do not reach, counted from 0.
        inner_keep_ratio (`float`, *optional*): share of the visual tokens of the unpruned prompt that goes on there, in (0, 1].
            `"vtw"` has none.

    Of a key that may be `None` (the default of all that are *optional*, but for `keep_tokens`, `text_tower`, `max_positions`,
    `max_candidates`, `inner_method` and `inner_keep_ratio`), `None` is what the paper of the method has; `resolved` looks it up.

    Raises:
        ValueError: unknown key, a value out of range, or both `keep_ratio` and `keep_tokens`; the message names key, value and
            allowed range. Setting one of the two as an attribute takes the place of the other.
    """

    def __init__(self, **values):
        self._check_keys(values)
        vars(self).update(self._checked(values))

    def __setattr__(self, key, value):
        self._check_keys([key])
        vars(self).update(self._checked(self.merged(vars(self), {key: value})))

    @classmethod
    def _checked(cls, values: dict) -> dict:
        """All keys, those that are not among `values` with their defaults."""
        checked, in_tokens = {}, values.get("keep_tokens") is not None
        for key, setting in cls.settings().items():
            if key == "keep_ratio" and in_tokens and values.get(key) is None:
                checked[key] = None
            else:
                checked[key] = setting.checked(key, values.get(key, setting.default))
        cls._check_together(checked)
        return checked

    @staticmethod
    def merged(values: dict, changes: dict) -> dict:
        """`values` with `changes`, in which a budget of one kind takes the place of one of the other kind."""
        for key, other in (("keep_ratio", "keep_tokens"), ("keep_tokens", "keep_ratio")):
            if changes.get(key) is not None and other not in changes:
                changes = {**changes, other: None}
        return {**values, **changes}

    def __eq__(self, other):
        return vars(self) == vars(other) if type(other) is type(self) else NotImplemented

    def __repr__(self):
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"

    @staticmethod
    def settings() -> dict:
        """The [`Setting`] of every key."""
        return collect_settings(METHODS, INNER_METHODS)

    @classmethod
    def _check_keys(cls, keys):
        allowed = cls.settings()
        for key in keys:
            if key not in allowed:
                close = difflib.get_close_matches(str(key), allowed, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"unknown pruning key {key!r}; allowed keys: {', '.join(allowed)}{hint}")

    @staticmethod
    def _check_together(values: dict):
        if values["keep_ratio"] is not None and values["keep_tokens"] is not None:
            raise ValueError(
                f"pruning keys keep_ratio={values['keep_ratio']!r} and keep_tokens={values['keep_tokens']!r} were both given, but a "
                "budget is one of them; leave the other out, or at None"
            )
        for method in METHODS.values():
            method.check(values)
        if values["relevance"] == "clip" and values["text_tower"] is None:
            raise ValueError(
                "pruning key 'relevance' is 'clip', but text_tower is None; set text_tower to a CLIP checkpoint, such as "
                "'openai/clip-vit-large-patch14-336', or choose another relevance"
            )
        _check_inner(values)
        if METHODS[values["method"]].merges_in_encoder:
            for key in ("scope", "proportional_attention", "merge_weight"):
                if values[key] not in (None, "frame", False, 0):
                    raise ValueError(
                        f"pruning key {key} is {values[key]!r}, but method={values['method']!r} merges tokens inside the vision "
                        f"encoder, frame by frame and with sizes of its own; leave {key} at None"
                    )

    @classmethod
    def from_value(cls, value) -> "PruningConfig":
        """A block from `None` (the defaults), a dictionary (merged over the defaults) or another block (copied)."""
        if isinstance(value, PruningConfig):
            return cls(**value.to_dict())
        if value is None:
            return cls()
        if not isinstance(value, dict):
            raise ValueError(
                f"pruning is {value!r}, but must be a dictionary with keys among {', '.join(cls().to_dict())}"
            )
        cls._check_keys(value)
        return cls(**value)

    def with_budget(self, keep_ratio: Optional[float] = None, keep_tokens: Optional[int] = None) -> "PruningConfig":
        """This block with the budget of a call; itself where neither is given, a ValueError where both are."""
        given = {"keep_ratio": keep_ratio, "keep_tokens": keep_tokens}
        given = {key: value for key, value in given.items() if value is not None}
        return self.with_changes(**given) if given else self

    def with_changes(self, **changes) -> "PruningConfig":
        """A block of its own with other values of some keys."""
        return type(self)(**self.merged(vars(self), changes))

    @property
    def prunes(self) -> bool:
        """Whether any token can be dropped before the language model."""
        return self.method != "none" and not self.is_inside and self._drops

    @property
    def drops_tokens(self) -> bool:
        """Whether any token can be dropped, before the language model or inside it."""
        return self.prunes or self.inner is not None

    @property
    def _drops(self) -> bool:
        return self.keep_ratio is None or self.keep_ratio < 1

    @property
    def is_inside(self) -> bool:
        """Whether the method itself is a stage inside the language model, so that its budget is of what goes on there."""
        return METHODS[self.method].inner is not None

    @property
    def inner_name(self) -> Optional[str]:
        """The stage inside the language model, a key of `INNER_METHODS`, whether or not its budget leaves it anything to do."""
        return METHODS[self.method].inner if self.is_inside else self.inner_method

    @property
    def inner(self) -> Optional[str]:
        """The stage inside the language model that drops tokens, a key of `INNER_METHODS`; `None` = nothing is dropped there."""
        keeps_all = not self._drops if self.is_inside else self.inner_keep_ratio == 1
        return None if keeps_all else self.inner_name

    @property
    def takes_ratio(self) -> bool:
        """Whether a budget says how many tokens stay; not where all of them leave inside the language model (`vtw`)."""
        return not self.is_inside or INNER_METHODS[self.inner_name].takes_ratio

    def first_inner_layer(self, num_layers: int) -> int:
        """The first layer, of so many, that the other tokens do not reach."""
        return INNER_METHODS[self.inner_name].first_layer(num_layers) if self.inner_layer is None else self.inner_layer

    def inner_count(self, num_unpruned: int) -> int:
        """How many visual tokens of a prompt, which would have `num_unpruned` without pruning, go on inside the language model."""
        if num_unpruned == 0 or not INNER_METHODS[self.inner_name].takes_ratio:
            return 0
        return self.nominal(num_unpruned) if self.is_inside else count_kept(num_unpruned, self.inner_keep_ratio)

    @property
    def budget(self) -> str:
        """The budget in words, such as `"keep_ratio=0.15"`."""
        return f"keep_ratio={self.keep_ratio:g}" if self.keep_tokens is None else f"keep_tokens={self.keep_tokens}"

    def share(self, num_tokens: int) -> float:
        """The budget of a set of `num_tokens`, as a share of it in (0, 1]."""
        return self.keep_ratio if self.keep_tokens is None else min(1.0, self.keep_tokens / num_tokens)

    def nominal(self, num_tokens: int) -> int:
        """The budget of a set of `num_tokens`, before a method adds to it."""
        return (
            count_kept(num_tokens, self.keep_ratio) if self.keep_tokens is None else min(self.keep_tokens, num_tokens)
        )

    def resolved(self, key: str):
        """The value of a key that may be `None`: then the method's own."""
        value, method = getattr(self, key), METHODS[self.method]
        if value is None and key == "relevance" and self.text_tower is not None:
            value = method.relevance_with_tower
        return getattr(method, key) if value is None else value

    @property
    def compares_in_clip(self) -> bool:
        """Whether tokens and question are compared in CLIP's joint space, where anything is pruned."""
        reads = "relevance" in METHODS[self.method].required_signals and self.query_weighting != "none"
        return reads and self.resolved("relevance") == "clip"

    @property
    def reads_layers(self) -> bool:
        """Whether tokens and question are compared in layers of the language model, where anything is pruned."""
        return self.resolved("relevance") in ("attention", "late_attention")

    @property
    def num_relevance_layers(self) -> int:
        """In how many layers of it at most: `"late_attention"` is a relevance, word by word there is the first of them alone."""
        late = self.resolved("relevance") == "late_attention"
        return LATE_LAYERS if late and "relevance" in METHODS[self.method].required_signals else 1

    @property
    def reads_clip(self) -> bool:
        """Whether the question is read by a CLIP text tower, so that the processor has to give its token ids."""
        return self.prunes and self.compares_in_clip

    @property
    def reads_words(self) -> bool:
        """Whether the question's content words are looked up, so that the processor has to give their token ids."""
        reads = "text_affinity" in METHODS[self.method].required_signals and self.query_weighting != "none"
        return self.prunes and reads and not self.reads_layers and self.resolved("words") == "content"

    @property
    def after_projector(self) -> bool:
        """Whether projected tokens are pruned, so that those that stay need no projector any more."""
        return self.prunes and METHODS[self.method].after_projector

    def count(self, num_tokens: int) -> int:
        """How many of the `num_tokens` tokens of one set (a frame, an image view, or all tokens of an item) stay."""
        return METHODS[self.method].count(num_tokens, self) if self.prunes and num_tokens else num_tokens

    def count_in_grid(self, grid) -> int:
        """The same for the tokens of a set that is a `TokenGrid`."""
        tokens = grid.num_tokens
        return METHODS[self.method].count_in_grid(grid, self) if self.prunes and tokens else tokens

    def to_dict(self) -> dict:
        return dict(vars(self))


def _check_inner(values: dict) -> None:
    """Raises ValueError where the keys of the stage inside the language model exclude one another."""
    method, inner, ratio = (values[key] for key in ("method", "inner_method", "inner_keep_ratio"))
    if METHODS[method].inner is not None:
        given = {key: values[key] for key in ("inner_method", "inner_keep_ratio") if values[key] is not None}
        if given:
            raise ValueError(
                f"method={method!r} is itself a stage inside the language model, with keep_ratio or keep_tokens as its budget, but "
                f"{given} was given beside it; leave these out, or set method to what prunes before the language model ('none')"
            )
    elif inner is None:
        given = {key: values[key] for key in ("inner_layer", "inner_keep_ratio") if values[key] is not None}
        if given:
            raise ValueError(f"pruning keys {given} are of inner_method, which is None; set it, or leave these out")
    elif (ratio is None) == INNER_METHODS[inner].takes_ratio:
        remedy = "set it to a share in (0, 1]" if ratio is None else "leave it out: no visual token goes on there"
        raise ValueError(f"pruning key inner_keep_ratio is {ratio!r} with inner_method={inner!r}; {remedy}")
