"""Relevance of visual tokens to the question: one small function for each space in which they are compared.

Shapes: N sets of L tokens; T words of a question, H the width of the language model, h its heads of d features each.
"""

import torch
import torch.nn.functional as F

from .ops_query import cosine_relevance
from .ops_tokens import MIN_NORM, in_double

# "pooled": cosine of the vision features with one vector for the text, which is brought to their width by averaging; the
#     ReDiPrune paper's. Nothing has trained these two spaces to agree.
# "projected": cosine of the projected tokens with that vector, in the space of the language model's input embeddings.
# "attention": `attention_affinity`, in the query-key space of one of the language model's first layers.
# "late_attention": `late_attention` of several of these layers, where the later words count more, and `spread_relevance`.
# "clip": `clip_relevance`, in the joint space of a CLIP checkpoint; CDPruner's and TRIM's.
RELEVANCES = ("pooled", "projected", "attention", "late_attention", "clip")
WORD_TEMPERATURE = 0.02
LATE_LAYERS = 4  # so many layers, from `relevance_layer` on, are looked at
LATENESS = 6  # the last word counts e^6 times as much as the first
LIKENESS = 0.1  # a token whose cosine is so much below 1 counts 1 / e of an equal one

__all__ = [
    "RELEVANCES",
    "attention_by_head",
    "attention_relevance",
    "attention_affinity",
    "clip_relevance",
    "cosine_relevance",
    "late_attention",
    "read_by_layers",
    "read_question",
    "spread_relevance",
    "stack_affinity",
    "word_affinity",
]


@torch.no_grad()
def read_by_layers(language_model, words: torch.Tensor, num_layers: int, num_states: int) -> torch.Tensor:
    """
    The states of a question in several layers, after the first layers of the language model, which read it alone, without the visual tokens. These
    states are contextual (of "red star", "star" has attended to "red"); input embeddings are not.

    Args:
        language_model: a decoder with `layers`, `rotary_emb` and `config`.
        words: (T, H) input embeddings of the question.
        num_layers: how many layers read it before the first of these states; with 0 that is the embeddings.
        num_states: of how many layers in turn the input is asked for; fewer where the model ends before.

    Returns:
        (n, T, H), n = 1 to `num_states`.

    Raises:
        ValueError: the model has no layer left whose attention could be looked at.
    """
    total = len(language_model.layers)
    if num_layers >= total:
        raise ValueError(
            f"relevance_layer={num_layers} must be below {total}, the number of layers that the language model has."
        )
    last = min(num_layers + num_states, total) - 1
    if last == 0 or len(words) == 0:
        return words[None].expand(last - num_layers + 1, -1, -1)
    states, mask = words[None], None
    positions = torch.arange(len(words), device=words.device)[None]
    if "flash" not in (language_model.config._attn_implementation or ""):  # which is causal by itself
        least = torch.finfo(states.dtype).min
        mask = torch.full((len(words), len(words)), least, dtype=states.dtype, device=states.device).triu(1)[None, None]
    config = language_model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # Text has one number in all three rows of multimodal positions.
    places = language_model.rotary_emb(states, positions.expand(3, 1, -1) if "mrope_section" in rope else positions)
    inputs = [states]
    for layer in language_model.layers[:last]:
        states = layer(states, attention_mask=mask, position_ids=positions, position_embeddings=places)
        states = states[0] if isinstance(states, tuple) else states
        inputs.append(states)
    return torch.cat([states.to(words.device) for states in inputs[num_layers:]])


def read_question(language_model, words: torch.Tensor, num_layers: int) -> torch.Tensor:
    """The same of one layer, (T, H): the states after the first `num_layers` layers."""
    return read_by_layers(language_model, words, num_layers, 1)[0]


@torch.no_grad()
def attention_by_head(layer, words: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Attention of each word of a question to the tokens of a set, in a decoder layer, without rotary positions: for each
    head the softmax over the tokens of (W_q n(e_t)) . (W_k n(z_i)) / sqrt(d).

    Args:
        layer: a decoder layer with `input_layernorm` and `self_attn` (`q_proj`, `k_proj`, `head_dim`, `scaling`, and `q_norm`
            and `k_norm` where the model has them); its heads may share keys.
        words: (T, H) the question, as the layer before gives it (`read_question`).
        tokens: (N, L, H) projected visual tokens.

    Returns:
        (N, h, T, L) fp32; each row adds up to 1.
    """
    attention = layer.self_attn
    weight = attention.q_proj.weight
    dtype = weight.dtype if weight.is_floating_point() else words.dtype  # quantized weights take what they are given

    def heads(states, kind):
        states = getattr(attention, f"{kind}_proj")(states).unflatten(-1, (-1, attention.head_dim))
        norm = getattr(attention, f"{kind}_norm", None)
        return (states if norm is None else norm(states)).float()

    queries = heads(layer.input_layernorm(words.to(dtype)), "q")  # (T, h, d)
    tokens = layer.input_layernorm(tokens.to(dtype))
    folded = _folded_keys(attention, queries)
    if folded is None:
        keys = heads(tokens, "k").permute(0, 2, 3, 1)  # (N, groups, d, L)
        queries = _by_group(queries, keys.shape[1])
    else:
        queries, keys = folded, tokens.float().mT[:, None]  # (1, h T, H) and (N, 1, H, L)
    with torch.autocast(words.device.type, enabled=False):
        logits = queries @ keys * attention.scaling  # (N, groups, h / groups T, L)
        return logits.flatten(1, 2).softmax(-1).unflatten(1, (-1, len(words)))


def _by_group(queries: torch.Tensor, groups: int) -> torch.Tensor:
    """(T, h, d) -> (groups, h / groups T, d): together what reads the same keys."""
    return queries.unflatten(1, (groups, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _folded_keys(attention, queries: torch.Tensor):
    """
    W_k^T q for every head and word, (1, h T, H) fp32, since (W_k x) . q = x . (W_k^T q): cheaper than the keys of all tokens where
    the words of all heads are fewer than the features of a key. A bias would add the same to every token, which softmax forgets.

    `None` where they are not fewer, or the keys are more than a matrix times the tokens: normalized, quantized, adapted, elsewhere.
    """
    projection = attention.k_proj
    if type(projection) is not torch.nn.Linear or getattr(attention, "k_norm", None) is not None:
        return None
    weight = projection.weight
    if type(weight.data) is not torch.Tensor or not weight.is_floating_point() or weight.device != queries.device:
        return None
    if len(queries) * queries.shape[1] >= len(weight):
        return None
    with torch.autocast(queries.device.type, enabled=False):
        weight = weight.float().unflatten(0, (-1, attention.head_dim))  # (groups, d, H)
        return (_by_group(queries, len(weight)) @ weight).flatten(0, 1)[None]


def attention_affinity(layer, words: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(N, T, L) fp32, in [0, 1]: of `attention_by_head` the largest of all heads."""
    return attention_by_head(layer, words, tokens).amax(1)


def attention_relevance(rows: torch.Tensor) -> torch.Tensor:
    """Relevance (N, L) from `attention_affinity` (N, T, L): the largest of all words, scaled to [0, 1] in each set."""
    largest = rows.amax(1)
    low, high = largest.aminmax(dim=1, keepdim=True)
    return (largest - low) / (high - low).clamp_min(MIN_NORM)


def late_attention(layer, words: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    (N, L) fp32: the sum over heads of `attention_by_head`, where the words are weighted by exp(6 j / (T - 1)), j from 0.

    A word has read those before it, and the last ones, which ask for the answer, all of the question.
    """
    places = torch.arange(len(words), dtype=torch.float32, device=words.device)
    weights = (LATENESS * places / max(1, len(words) - 1)).softmax(0)
    return attention_by_head(layer, words, tokens).sum(1).mul(weights[:, None]).sum(1)


@torch.no_grad()
def spread_relevance(relevance: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    What shows the same is as relevant: of each token the mean relevance of all tokens of its set, weighted by their likeness to it,
    exp((cosine - 1) / 0.1), and scaled to [0, 1] in each set.

    Args:
        relevance: (N, L) fp32, at least 0.
        tokens: (N, L, H) projected visual tokens.

    Returns:
        (N, L) fp32.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.float(), dim=-1, eps=MIN_NORM)
        spread = (((unit @ unit.mT - 1) / LIKENESS).softmax(-1) @ relevance[..., None])[..., 0]
    low, high = spread.aminmax(dim=1, keepdim=True)
    return (spread - low) / (high - low).clamp_min(MIN_NORM)


@torch.no_grad()
def clip_relevance(tokens: torch.Tensor, questions: torch.Tensor) -> torch.Tensor:
    """
    Minus the cosine of tokens and question in CLIP's joint space, as in CDPruner and TRIM.

    CLIP trains the vector of CLS towards the text, not those of patches, and the patches that show what the text names are
    the less similar ones: hence the sign.

    Args:
        tokens: (N, L, D), not normalized.
        questions: (N, D), for each set the mean of the unit vectors of its question's segments.

    Returns:
        (N, L) fp32 in [-1, 1].
    """
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(tokens.float(), dim=-1, eps=MIN_NORM)
        return -(unit @ questions.float()[..., None]).squeeze(-1)


@torch.no_grad()
def word_affinity(words: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """
    Closeness of each word to the tokens: softmax over the tokens of their cosine / 0.02 (MMTok, arXiv 2508.18264).

    Args:
        words: (T, H) input embeddings of the question.
        tokens: (N, L, H) projected visual tokens.

    Returns:
        (N, T, L) fp64, in which cosines that are so much enlarged do not depend on the order of summation; each row adds up
        to 1.
    """
    words, tokens = (F.normalize(in_double(states), dim=-1, eps=MIN_NORM) for states in (words, tokens))
    return (words @ tokens.mT / WORD_TEMPERATURE).softmax(-1)


def stack_affinity(rows: list) -> torch.Tensor:
    """Rows (n, T, L) of several questions as one (N, T', L), with zeros for the words that the shorter ones lack."""
    longest = max(1, max(part.shape[1] for part in rows))
    return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in rows])
