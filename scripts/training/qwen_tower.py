"""The tower of Qwen2.5-VL over many views of one size: the stock weights, all windows of all views at once.

The stock tower goes through windows one by one, which takes several times as long on a CPU.
"""

import torch
from torch.nn import functional as F


def encode_grid(visual, pixels: torch.Tensor) -> torch.Tensor:
    """Patches before the merger, in raster order.

    Args:
        visual: the stock tower, with `temporal_patch_size` 1.
        pixels: (N, 3, H, W); the sides of its grid of patches are multiples of a window's.

    Returns:
        (N, H / patch, W / patch, C)
    """
    config = visual.config
    kernel = visual.patch_embed.proj.weight[:, :, 0]
    states = F.conv2d(pixels, kernel, stride=config.patch_size).permute(0, 2, 3, 1)
    rotation = _rotation(*states.shape[1:3], config.hidden_size // config.num_heads)
    side = config.window_size // config.patch_size
    for number, block in enumerate(visual.blocks):
        window = None if number in config.fullatt_block_indexes else side
        states = states + _attention(block.attn, block.norm1(states), rotation, window, config.num_heads)
        states = states + block.mlp(block.norm2(states))
    return states


def in_merge_order(grid: torch.Tensor, merge_size: int) -> torch.Tensor:
    """(N, H, W, C) -> (N, H W / merge_size², merge_size² C): the patches that become one token, side by side."""
    squares = grid.unflatten(2, (-1, merge_size)).unflatten(1, (-1, merge_size))
    return squares.transpose(2, 3).flatten(3).flatten(1, 2)


def _rotation(height: int, width: int, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of each patch, (H, W, 1, head_size): the first quarter turns with the row, the next with the column."""
    half = head_size // 2
    speeds = 10000.0 ** -(torch.arange(0, half, 2).float() / half)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = torch.cat([rows[..., None] * speeds, columns[..., None] * speeds], -1).repeat(1, 1, 2)[:, :, None]
    return angles.cos(), angles.sin()


def _attention(attention, states, rotation, window: int | None, num_heads: int) -> torch.Tensor:
    """Within windows of `window` x `window` patches, or over the whole view where it is `None`: (N, H, W, C)."""
    grid = states.shape[:3]
    query, key, value = attention.qkv(states).unflatten(-1, (3, num_heads, -1)).unbind(3)
    query, key = (_rotate(part, *rotation).to(value.dtype) for part in (query, key))
    query, key, value = (_in_windows(part, window) for part in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    return attention.proj(_out_of_windows(mixed, grid, window).flatten(3))


def _rotate(states, cosines, sines):
    first, second = states.chunk(2, -1)
    return states * cosines + torch.cat([-second, first], -1) * sines


def _in_windows(states: torch.Tensor, window: int | None) -> torch.Tensor:
    """(N, H, W, heads, D) -> (windows of all views, heads, patches of a window, D)."""
    if window is None:
        return states.flatten(1, 2).transpose(1, 2)
    parts = states.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return parts.transpose(2, 3).flatten(3, 4).flatten(0, 2).transpose(1, 2)


def _out_of_windows(states: torch.Tensor, grid, window: int | None) -> torch.Tensor:
    """(windows, patches, heads, D) -> (N, H, W, heads, D), the way back."""
    number, height, width = grid
    if window is None:
        return states.unflatten(1, (height, width))
    parts = states.unflatten(1, (window, window)).unflatten(0, (number, height // window, width // window))
    return parts.transpose(2, 3).flatten(3, 4).flatten(1, 2)
