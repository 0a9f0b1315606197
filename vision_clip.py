"""A CLIP vision tower for pruning: hidden states, attention of its CLS token, keys, and merging of patches on their way."""

import torch
import torch.nn.functional as F

from .hub_versions import clip_transformer, layer_states, no_masks
from .methods_base import TOWER_SIGNALS
from .ops_merging import merge_tokens, merging_schedule
from .ops_tokens import gather_tokens


def run_tower(tower, pixels: torch.Tensor, taps, required_signals=frozenset()) -> dict:
    """
    Runs the tower as far as the hidden states that are asked for, and keeps these: without gradients, all of them would be
    most of the memory that the tower takes, and the layers after the last one would run for nothing.

    The layers are called one by one, since hooks on a module would see what other threads send through it.

    Args:
        tower: a CLIP vision tower.
        pixels: (N, 3, height, width).
        taps: indices of hidden states, embeddings first; from the end if negative.
        required_signals: as in `read_attention`, with the last of `taps`.

    Returns:
        `dict` from index (counted from the start) to hidden state (N, 1 + P, C).

    Raises:
        ValueError: the tower has no such hidden state.
    """
    layers = clip_transformer(tower).encoder.layers
    wanted = {_from_start(tap, layers) for tap in taps} | _states_read(taps[-1], layers, required_signals)
    states = embed_patches(tower, pixels)
    kept = {0: states} if 0 in wanted else {}
    for index, layer in enumerate(layers[: max(wanted)], 1):
        states = layer_states(layer(states, *no_masks(layer)))
        if index in wanted:
            kept[index] = states
    return kept


def embed_patches(tower, pixels: torch.Tensor) -> torch.Tensor:
    """The input (N, 1 + P, C) of the first layer, CLS first; (N, P, C) in a SigLIP, which has neither CLS nor this norm."""
    vision = clip_transformer(tower)
    states = vision.embeddings(pixels)
    return vision.pre_layrnorm(states) if hasattr(vision, "pre_layrnorm") else states


def _from_start(tap: int, layers) -> int:
    if not -len(layers) - 1 <= tap <= len(layers):
        raise ValueError(f"vision_feature_layer {tap} does not exist in a vision tower of {len(layers)} layers")
    return tap % (len(layers) + 1)


def _states_read(tap: int, layers, required_signals) -> set:
    """Indices of the hidden states from which `read_attention` computes the required signals: the inputs of their layers."""
    states = {"tap": max(_from_start(tap, layers) - 1, 0), "last": len(layers) - 1}
    read = required_signals & TOWER_SIGNALS - {"cls_features"}  # which is of the tapped state itself
    return {states["last" if name.startswith("last_") else "tap"] for name in read}


@torch.no_grad()
def read_attention(tower, states, tap: int, required_signals, with_cls: bool = False) -> dict:
    """
    Attention and keys of the patches, from the q and k projections alone: whatever attention the tower runs with.

    Args:
        tower: a CLIP vision tower.
        states: its hidden states by index, each (N, 1 + P, C), embeddings first: those of `run_tower`.
        tap: index of the tapped one among them.
        required_signals: which of `"cls_attention"`, `"keys"` (of the layer whose output is tapped, mean over heads),
            `"cls_features"` (CLS in that output), `"last_cls_attention"`, `"last_keys"` (of the last layer, with its heads taken
            as one) and `"last_attention"` (what each receives there from all, CLS too, mean over heads).
        with_cls: whether all tokens count: CLS is one like the patches, and the first of them, or there is none.

    Returns:
        `dict` with these names: attentions (N, P, 1) fp32, which with that of CLS itself add up to 1, keys (N, P, D), and CLS
        (N, P, C), the same for all patches of a picture.
    """
    layers, fields = clip_transformer(tower).encoder.layers, {}
    if required_signals & {"cls_attention", "keys"}:
        index = max(_from_start(tap, layers) - 1, 0)
        fields["cls_attention"], fields["keys"] = _attention_of_cls(layers[index], states[index], with_cls)
    if required_signals & {"last_cls_attention", "last_keys"}:
        found = _attention_of_cls(layers[-1], states[len(layers) - 1], with_cls, heads_as_one=True)
        fields["last_cls_attention"], fields["last_keys"] = found
    first = 0 if with_cls else 1
    if "cls_features" in required_signals:
        state = states[_from_start(tap, layers)]
        fields["cls_features"] = state[:, :1].expand(-1, state.shape[1] - first, -1)
    if "last_attention" in required_signals:
        fields["last_attention"] = _attention_received(layers[-1], states[len(layers) - 1])[:, first:, None]
    return {name: fields[name] for name in fields.keys() & required_signals}


def _attention_of_cls(layer, states: torch.Tensor, with_cls: bool, heads_as_one: bool = False) -> tuple:
    """Attention of CLS to the patches, mean over heads (N, P, 1) fp32, and their keys, mean over heads (N, P, D)."""
    attention = layer.self_attn
    states = layer.layer_norm1(states)
    width = states.shape[-1] if heads_as_one else attention.head_dim
    query = attention.q_proj(states[:, :1]).unflatten(-1, (-1, width)).transpose(1, 2)
    keys = attention.k_proj(states).unflatten(-1, (-1, width)).transpose(1, 2)  # (N, heads, 1 + P, D)
    weights = (query.float() @ keys.float().mT * width**-0.5).softmax(-1)
    first = 0 if with_cls else 1
    return weights.mean(1)[:, 0, first:, None], keys.mean(1)[:, first:]


def _attention_received(layer, states: torch.Tensor) -> torch.Tensor:
    """What each token receives from all tokens of its picture, CLS first, mean over these and the heads: (N, 1 + P) fp32."""
    attention, states = layer.self_attn, layer.layer_norm1(states)
    heads = lambda values: values.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2).float()  # noqa: E731
    queries, keys = heads(attention.q_proj(states)) * attention.head_dim**-0.5, heads(attention.k_proj(states))
    # Picture by picture: the weights of all of them at once would take more memory than the tower.
    return torch.stack([(query @ key.mT).softmax(-1).mean((0, 1)) for query, key in zip(queries, keys)])


def encode_and_merge(tower, pixels, num_layers: int, num_kept: int, inside=None) -> tuple:
    """
    Runs the first layers of the tower and merges patches on the way (EvoPrune, reconstruction): between the attention and the
    MLP of the layers in `merging_schedule`. From then on a token of s patches is attended to as s tokens would be: log s is
    added to its logits. CLS is never merged.

    Attention is computed here from the projections, whatever attention the tower was loaded with.

    Args:
        tower: a CLIP vision tower.
        pixels: (N, 3, height, width).
        num_layers: layers that run, at least 1.
        num_kept: k, patches that are left of each image.
        inside: (N, n) ascending indices of the patches that show the image, where some are padding: those are seen by
            the first layers and then dropped.

    Returns:
        features (N, k, C) without CLS, and LongTensor (N, k), for each the first patch that is merged in it, ascending.
    """
    states = embed_patches(tower, pixels)
    source_indices = inside
    if source_indices is None:
        source_indices = torch.arange(states.shape[1] - 1, device=states.device).expand(len(states), -1)
    schedule = merging_schedule(source_indices.shape[1], num_kept, num_layers)
    sizes = None
    for index, layer in enumerate(clip_transformer(tower).encoder.layers[:num_layers]):
        attended, keys, attention = _attend(layer.self_attn, layer.layer_norm1(states), sizes)
        states = states + attended
        if index in schedule:
            patches = states[:, 1:]
            if sizes is None:
                sizes = torch.ones(source_indices.shape, dtype=torch.float32, device=states.device)
                patches, keys = gather_tokens(patches, source_indices), gather_tokens(keys, source_indices)
                attention = attention.gather(1, source_indices)
            patches, sizes, source_indices = merge_tokens(
                patches, keys, attention, sizes, source_indices, schedule[index]
            )
            states = torch.cat([states[:, :1], patches], dim=1)
        states = states + layer.mlp(layer.layer_norm2(states))
    return states[:, 1:], source_indices


def _attend(attention, states, sizes) -> tuple:
    """A layer's attention output (N, 1 + n, C), and of its patches the keys (N, n, D) and the attention of CLS (N, n)."""
    heads = lambda values: values.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # noqa: E731
    queries, keys, values = (heads(getattr(attention, f"{name}_proj")(states)) for name in "qkv")
    bias = None if sizes is None else F.pad(sizes.log(), (1, 0))[:, None, None].to(queries.dtype)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=attention.scale)
    logits = queries[:, :, :1].detach().float() @ keys.detach().float().mT * attention.scale
    weights = (logits if bias is None else logits + bias.float()).softmax(-1)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2)), keys.mean(1)[:, 1:], weights.mean(1)[:, 0, 1:]
