"""The selection alone at the shapes of the 7B models, beside a plain implementation of the same rule."""

import os

import torch
import torch.nn.functional as F
from encoder_cost import time_in_turns
from repository import code_module, environment
from tqdm import tqdm

WIDTH = 1024  # of CLIP ViT-L
SIZES = ((8, 144), (8, 576), (32, 144), (32, 576))  # frames x tokens, pooled or not
ALPHA = 0.5


def plain_select(features: torch.Tensor, query: torch.Tensor, num_kept: int, alpha: float = ALPHA) -> torch.Tensor:
    """
    The rule written down as the paper has it, frame by frame and step by step: the yardstick.

    Args:
        features: (N, L, C).
        query: (N, C).

    Returns:
        LongTensor (N, k), ascending in each frame.
    """
    tolerance = code_module("selection_rediprune").TIE_TOLERANCE
    all_kept = []
    for tokens, text in zip(features.float(), query.float()):
        tokens, text = F.normalize(tokens, dim=-1), F.normalize(text, dim=-1)
        relevance = tokens @ text
        distance = 1 - tokens @ tokens.T
        scores, kept = relevance, []
        for _ in range(num_kept):
            kept.append((scores >= scores.max() - tolerance).nonzero()[0].item())  # of equals the first
            scores = distance[kept].amin(0) + alpha * relevance
            scores[kept] = -torch.inf
        all_kept.append(sorted(kept))
    return torch.tensor(all_kept, device=features.device)


def random_tokens(frames: int, tokens: int, seed: int, device: str) -> tuple:
    """Features (N, L, C) that have much in common, as those of a video have, and a query for each frame."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(WIDTH, generator=generator) + torch.randn(1, tokens, WIDTH, generator=generator) / 2
    features = common + torch.randn(frames, tokens, WIDTH, generator=generator)
    return features.to(device), torch.randn(1, WIDTH, generator=generator).expand(frames, -1).to(device)


@torch.inference_mode()
def measure_size(frames: int, tokens: int, ratio: float, repeats: int, seed: int, device: str) -> dict:
    selection = code_module("selection_rediprune")
    features, query = random_tokens(frames, tokens, seed, device)
    num_kept = selection.count_kept(tokens, ratio)
    runs = {
        "plain loop": lambda: plain_select(features, query, num_kept),
        "select_rediprune": lambda: selection.select_rediprune(features, query, num_kept, alpha=ALPHA),
    }
    same = torch.equal(*(run() for run in runs.values()))
    return {
        "frames": frames,
        "tokens": tokens,
        "keep_ratio": ratio,
        "kept": num_kept,
        "identical": same,
        "samples": time_in_turns(runs, repeats, device),
    }


def benchmark_selection(args) -> dict:
    load_before = os.getloadavg()[0]
    cases = [(*size, ratio) for size in SIZES for ratio in args.ratios]
    rows = [
        measure_size(*case, args.repeats, args.seed, args.device) for case in tqdm(cases, unit="size", disable=None)
    ]
    machine = {**environment(), "device": args.device, "dtype": "float32"}
    if args.device.startswith("cuda"):
        machine["gpu"] = torch.cuda.get_device_name(args.device)
    return {
        "width": WIDTH,
        "repeats": args.repeats,
        "warmup": 1,
        "seed": args.seed,
        "environment": machine,
        "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        "rows": rows,
    }
