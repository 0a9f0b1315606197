"""Operations of a prefill: as torch counts them, and by the formula of the ReDiPrune paper, tokens that leave inside included."""

from typing import Optional

from repository import StageTimer, flop_counter
from tflops import prefill


def count_operations(model, inputs: dict) -> tuple:
    """
    Floating-point operations of each stage up to the first token, as torch counts them, and the cache.

    Args:
        inputs: what `generate` takes, on the model's device.

    Returns:
        a dictionary from stage, and `"total"`, to operations, two of which are one multiply-add; the cache after the prefill.
    """
    options = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    with flop_counter() as counter, StageTimer(model, counter.get_total_flops) as stages:
        output = model.generate(**inputs, **options)
    counted = {name: int(value) for name, value in stages.seconds.items()}
    return {**counted, "total": counter.get_total_flops()}, output.past_key_values


def formula(config, pruning, entering: float, unpruned: float, text: float) -> float:
    """
    The paper's multiply-adds of a prefill of one prompt.

    Args:
        config: of the whole model.
        pruning: the `PruningConfig` of the call.
        entering: visual tokens that enter the language model.
        unpruned: those that would without pruning.
        text: the other tokens of the prompt.
    """
    language = config.text_config
    layers, sizes = language.num_hidden_layers, (language.hidden_size, language.intermediate_size)
    first = layers if pruning.inner is None else pruning.first_inner_layer(layers)
    staying = entering if pruning.inner is None else min(entering, pruning.inner_count(round(unpruned)))
    return 1e12 * (prefill(entering, text, first, *sizes) + prefill(staying, text, layers - first, *sizes))


def ratio_of_operations(goal: float, operations_at) -> Optional[float]:
    """
    The largest keep ratio, of four digits, at which a prefill takes at most `goal` operations; `None` where none is as cheap.

    Args:
        goal: operations.
        operations_at: from a keep ratio to operations, the more the larger the ratio is.
    """
    low, high = 0, 10_000
    if operations_at(1.0) <= goal:
        return 1.0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if operations_at(middle / 10_000) <= goal else (low, middle)
    return low / 10_000 or None
