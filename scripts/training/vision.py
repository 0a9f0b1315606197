"""The vision stage: the tower learns what covers each patch, and its class token, where it has one, which objects are there."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from toy_world import COLOURS, NUM_FRAMES, PAIRS, SHAPES, object_map, patch_labels, sample_image, sample_video
from training.pixels import GRID, frames_to_pixels
from training.recipe import FOLLOWED_SCENES, TRAINING_SCENES
from training.runs import Optimizers, Run, rounded


class VisionHeads(nn.Module):
    """What the vision tower is asked in its own stage; not part of the checkpoint.

    Per patch: shape and colour, and with `positions` row and column. With `class_token`, of it, at the tapped layer and at the
    end: which (shape, colour) pairs are in view, so that its attention goes to the objects.
    """

    def __init__(self, width: int, positions: bool = True, class_token: bool = True):
        super().__init__()
        self.sizes = (len(SHAPES) + 1, len(COLOURS) + 1, *((GRID, GRID) if positions else ()))
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, sum(self.sizes))
        if class_token:
            self.tap_pairs = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(PAIRS)))
            self.final_pairs = nn.Linear(width, len(PAIRS))

    def forward(self, patches: torch.Tensor, classes: tuple[torch.Tensor, ...] = ()) -> tuple[tuple, tuple]:
        """
        Args:
            patches: (N, L, C), of the tapped layer.
            classes: the class token there and at the end, each (N, C); empty without one.

        Returns:
            Logits of each patch, each (N, L, classes), and of each class token (N, 42).
        """
        dense = self.dense(self.norm(patches)).split(self.sizes, -1)
        heads = (self.tap_pairs, self.final_pairs) if classes else ()
        return dense, tuple(head(state) for head, state in zip(heads, classes, strict=True))


def vision_batch(family, rng: np.random.Generator, num_videos: int, num_images: int, seeds: range) -> list[tuple]:
    """Four frames of each video and all views of each image, of scenes drawn from `seeds`.

    Returns for each size of views pixels float32 (N, 3, H, W), patch labels int64 (N, L, 4) and the pairs in view float32 (N, 42).
    """
    views: defaultdict[tuple, list] = defaultdict(list)
    for _ in range(num_videos):
        scene = sample_video(seeds[rng.integers(len(seeds))])
        times = rng.choice(NUM_FRAMES, 4, replace=False)
        pixels = frames_to_pixels(scene.frames[times])
        views[pixels.shape[1:]].append((pixels, [patch_labels(scene.things, object_map(scene, t)) for t in times]))
    for _ in range(num_images):
        scene = sample_image(seeds[rng.integers(len(seeds))])
        pixels, maps = family.image_views(scene)
        views[pixels.shape[1:]].append((pixels, [patch_labels(scene.things, view) for view in maps]))
    batches = []
    for of_size in views.values():
        pixels, labels = zip(*of_size, strict=True)
        batches.append((torch.cat(pixels), *dense_targets([label for part in labels for label in part])))
    return batches


def dense_targets(labels: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Patch labels of N views, each int64 (H / 8, W / 8, 4), as int64 (N, L, 4), and the pairs in view, float32 (N, 42)."""
    stacked = torch.from_numpy(np.stack(labels)).flatten(1, 2)
    shape, colour = stacked[..., 0], stacked[..., 1]
    pair = ((shape - 1) * len(COLOURS) + colour - 1).where(shape > 0, len(PAIRS))
    return stacked, F.one_hot(pair, len(PAIRS) + 1).amax(1)[:, :-1].float()


def vision_loss(dense, classes, labels, pairs) -> torch.Tensor:
    """Shape and colour count most: position is easy, and most patches are background."""
    losses = [F.cross_entropy(logits.flatten(0, 1), labels[..., i].flatten()) for i, logits in enumerate(dense)]
    loss = 3 * (losses[0] + losses[1])
    if len(losses) > 2:
        loss = loss + 0.3 * (losses[2] + losses[3])
    if classes:
        tap, final = (F.binary_cross_entropy_with_logits(logits, pairs) for logits in classes)
        loss = loss + 2 * tap + final
    return loss


def vision_accuracy(predictions: list[tuple], batches: list[tuple]) -> dict[str, float]:
    """Right answers per object patch, background patches taken for background, and the pairs that the class token names."""
    covered = torch.cat([labels[..., 0].flatten() > 0 for _, labels, _ in batches])
    right = [
        torch.cat(
            [
                (dense[i].argmax(-1) == labels[..., i]).flatten()
                for (dense, _), (_, labels, _) in zip(predictions, batches, strict=True)
            ]
        )
        for i in range(len(predictions[0][0]))
    ]
    accuracy = {name: hit[covered].float().mean().item() for name, hit in zip(("shape", "colour"), right, strict=False)}
    accuracy |= {name: hit.float().mean().item() for name, hit in zip(("row", "column"), right[2:], strict=False)}
    accuracy["background"] = (labels_of(predictions) == 0)[~covered].float().mean().item()
    if predictions[0][1]:
        named = torch.cat([classes[0] for _, classes in predictions]) > 0
        pairs = torch.cat([pairs for _, _, pairs in batches])
        both = (named & (pairs > 0)).sum().item()
        accuracy |= {"class precision": both / max(1, named.sum().item()), "class recall": both / pairs.sum().item()}
    return accuracy


def labels_of(predictions: list[tuple]) -> torch.Tensor:
    """The shape that each patch is taken for, int64 (all patches,)."""
    return torch.cat([dense[0].argmax(-1).flatten() for dense, _ in predictions])


def look(family, model, heads: VisionHeads, batches: list[tuple]) -> Iterator[tuple]:
    for pixels, _, _ in batches:
        yield heads(*family.look(model, pixels))


def train_vision(run: Run, family, model) -> None:
    """Trains the tower alone; goes on where `run` stopped."""
    recipe = family.recipe
    heads = family.vision_heads(model.config)
    trained = {name: parameter for name, parameter in model.named_parameters() if family.in_tower(name)}
    optimizer = Optimizers([*trained.values(), *heads.parameters()], recipe.vision_peak, family.matrices(trained))
    steps, parts = recipe.vision_steps, {"model": model, "heads": heads}
    for step, seconds in run.steps("vision", steps, recipe.vision_peak, parts, optimizer):
        rng = run.rng(1, step)
        batches = vision_batch(family, rng, recipe.vision_videos, recipe.vision_images, TRAINING_SCENES)
        predictions = list(look(family, model, heads, batches))
        patches = [labels[..., 0].numel() for _, labels, _ in batches]
        loss = sum(
            vision_loss(*predicted, *batch[1:]) * (number / sum(patches))
            for predicted, batch, number in zip(predictions, batches, patches, strict=True)
        )
        optimizer.update(loss)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            batches = vision_batch(family, run.rng(2), 24, 12, FOLLOWED_SCENES)
            with torch.no_grad():
                accuracy = vision_accuracy(list(look(family, model, heads, batches)), batches)
            run.log(stage="vision", step=step + 1, seconds=round(seconds), loss=loss.item(), held_out=rounded(accuracy))
