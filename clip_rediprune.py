"""What the pruning methods read in a CLIP vision tower: the attention of its CLS token, and keys."""

import torch


def transformer(tower):
    """The module with `embeddings`, `encoder` and the norms: the tower itself in transformers 5.x, one level below in 4.57."""
    return getattr(tower, "vision_model", tower)


@torch.no_grad()
def read_attention(tower, states, tap: int, needs) -> dict:
    """
    Attention and keys of the patches, from the q and k projections alone: whatever attention the tower runs with.

    Args:
        tower: a CLIP vision tower.
        states: its hidden states, each (N, 1 + P, C), embeddings first.
        tap: index of the tapped one among them.
        needs: which of `"cls_attention"`, `"keys"` (of the layer whose output is tapped, mean over heads),
            `"last_cls_attention"` and `"last_keys"` (of the last layer, with its heads taken as one).

    Returns:
        `dict` with these names: attentions (N, P, 1) fp32, which with CLS itself add up to 1, and keys (N, P, D).
    """
    layers, fields = transformer(tower).encoder.layers, {}
    if needs & {"cls_attention", "keys"}:
        index = max(tap % len(states) - 1, 0)
        fields["cls_attention"], fields["keys"] = _attention_of_cls(layers[index], states[index])
    if needs & {"last_cls_attention", "last_keys"}:
        found = _attention_of_cls(layers[-1], states[len(layers) - 1], heads_as_one=True)
        fields["last_cls_attention"], fields["last_keys"] = found
    return {name: fields[name] for name in fields.keys() & needs}


def _attention_of_cls(layer, states: torch.Tensor, heads_as_one: bool = False) -> tuple:
    """Of CLS to the patches, mean over heads (N, P, 1) fp32, and their keys, mean over heads (N, P, D)."""
    attention = layer.self_attn
    states = layer.layer_norm1(states)
    width = states.shape[-1] if heads_as_one else attention.head_dim
    query = attention.q_proj(states[:, :1]).unflatten(-1, (-1, width)).transpose(1, 2)
    keys = attention.k_proj(states).unflatten(-1, (-1, width)).transpose(1, 2)  # (N, heads, 1 + P, D)
    weights = (query.float() @ keys.float().mT * width**-0.5).softmax(-1)
    return weights.mean(1)[:, 0, 1:, None], keys.mean(1)[:, 1:]
