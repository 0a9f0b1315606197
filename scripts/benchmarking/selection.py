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


def plain_select(features: torch.Tensor, query: torch.Tensor, num_kept: int, tolerance: float = None) -> torch.Tensor:
    """
    The rule written down as the paper has it, frame by frame and step by step: the yardstick.

    Args:
        features: (N, L, C).
        query: (N, C).
        tolerance: scores so close are a tie, which the first wins; as in the tested rule if None.

    Returns:
        LongTensor (N, k), ascending in each frame.
    """
    tolerance = code_module("ops_tokens").TIE_TOLERANCE if tolerance is None else tolerance
    all_kept = []
    for tokens, text in zip(features, query):
        tokens, text = F.normalize(tokens, dim=-1), F.normalize(text, dim=-1)
        relevance = tokens @ text
        distance = 1 - tokens @ tokens.T
        scores, kept = relevance, []
        for _ in range(num_kept):
            kept.append((scores >= scores.max() - tolerance).nonzero()[0].item())
            scores = distance[kept].amin(0) + ALPHA * relevance
            scores[kept] = -torch.inf
        all_kept.append(sorted(kept))
    return torch.tensor(all_kept, device=features.device)


def random_tokens(frames: int, tokens: int, seed: int, device: str) -> tuple:
    """Features (N, L, C) that have much in common, as those of a video have, and a query for each frame."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(WIDTH, generator=generator) + torch.randn(1, tokens, WIDTH, generator=generator) / 2
    features = common + torch.randn(frames, tokens, WIDTH, generator=generator)
    return features.to(device), torch.randn(1, WIDTH, generator=generator).expand(frames, -1).to(device)


def compare(features: torch.Tensor, query: torch.Tensor, plain: torch.Tensor, ours: torch.Tensor) -> dict:
    """
    In how many frames both pick the same tokens.

    Two implementations round differently, by some 1e-7, and two scores that differ by just the tolerance of a tie are
    then a tie for one of them alone. A frame that differs is at such an edge if the rule in double precision picks our
    tokens with a tolerance a little smaller or larger.
    """
    tolerance = code_module("ops_tokens").TIE_TOLERANCE
    differing = (plain != ours).any(1).nonzero()[:, 0]
    features, query, ours = features[differing].double(), query[differing].double(), ours[differing]
    at_edge = torch.zeros(len(differing), dtype=torch.bool, device=ours.device)
    for change in (0.5, 0.8, 1.2, 1.5) if len(differing) else ():
        at_edge |= (plain_select(features, query, ours.shape[1], change * tolerance) == ours).all(1)
    return {"identical_frames": len(plain) - len(differing), "frames_at_the_edge_of_a_tie": int(at_edge.sum())}


@torch.inference_mode()
def measure_size(frames: int, tokens: int, ratio: float, repeats: int, seed: int, device: str) -> dict:
    selection = code_module("ops_selection")
    features, query = random_tokens(frames, tokens, seed, device)
    num_kept = selection.count_kept(tokens, ratio)
    runs = {
        "plain loop": lambda: plain_select(features, query, num_kept),
        "select_rediprune": lambda: selection.select_rediprune(features, query, num_kept, alpha=ALPHA),
    }
    agreement = compare(features, query, *(run() for run in runs.values()))
    return {
        "frames": frames,
        "tokens": tokens,
        "keep_ratio": ratio,
        "kept": num_kept,
        **agreement,
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
