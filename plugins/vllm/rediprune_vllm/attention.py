"""Proportional attention with any kernel: log s of a token that stands for s others is in spare channels of its key."""

import torch
import torch.nn.functional as F
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.llama import LlamaAttention

SPARE = 2  # log s, and what half precision cut off it
MULTIPLE = 32  # of the head sizes that vLLM's kernels have


def wide_head(size: int) -> int:
    """The size of a head of `size` channels with the spare ones."""
    return -(-(size + SPARE) // MULTIPLE) * MULTIPLE


class ProportionalAttention(LlamaAttention):
    """
    Attention of a Llama whose positions are rows: the position, the position + s - 1, and others that are not read.

    A query has 1 / scaling in the spare channels, so that the logit of a key gets log s; what is in the key stays in the cache.
    """

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`positions` (4, T), `hidden_states` (T, H); returns (T, H)."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        q, k = self.rotary_emb(positions[0], q, k)
        size, wide = self.head_dim, self.attn.head_size
        q, k, v = (F.pad(states.unflatten(-1, (-1, size)), (0, wide - size)) for states in (q, k, v))
        bias = (positions[1] - positions[0] + 1).clamp_min(1).float().log()[:, None]
        high = bias.to(k.dtype)
        q[..., size : size + SPARE] = 1 / self.scaling
        k[..., size] = high
        k[..., size + 1] = (bias - high.float()).to(k.dtype)
        states = self.attn(q.flatten(1), k.flatten(1), v.flatten(1))
        states = states.unflatten(-1, (-1, wide))[..., :size].flatten(1)
        return self.o_proj(states)[0]


def make_proportional(language_model, vllm_config) -> None:
    """
    Gives the attention layers of a language model that vLLM has built spare channels.

    Raises:
        ValueError: its attention is not Llama's.
    """
    layers = vllm_config.compilation_config.static_forward_context
    for name, module in language_model.named_modules():
        if not name.endswith(".self_attn"):
            continue
        if type(module) is not LlamaAttention:
            raise ValueError(
                f"proportional_attention is served for language models of the Llama architecture, but this one has "
                f"{type(module).__name__}; set pruning.proportional_attention to false in config.json."
            )
        plain = module.attn
        del layers[plain.layer_name]
        module.attn = Attention(
            module.num_heads,
            wide_head(module.head_dim),
            module.scaling,
            num_kv_heads=module.num_kv_heads,
            cache_config=vllm_config.cache_config,
            prefix=plain.layer_name,
        )
        module.__class__ = ProportionalAttention
