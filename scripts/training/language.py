"""The language stage: projector and language model learn to answer, on the cached features of the frozen tower."""

from collections import defaultdict

import numpy as np
import torch
from tokenizers import Tokenizer
from toy_world import VIDEO_TYPES
from training.features import Sample, ScenePool, held_out_scenes, stack
from training.packing import Pack, answer_pack
from training.questions import Questioner
from training.runs import Optimizers, Run, rounded


def train_language(run: Run, family, model, tokenizer: Tokenizer) -> None:
    """Single frames first, then whole videos and images; goes on where `run` stopped."""
    recipe, steps = family.recipe, family.recipe.language_steps
    head = family.position_head(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if not family.in_tower(name)}
    optimizer = Optimizers([*trained.values(), *head.parameters()], recipe.language_peak, family.matrices(trained))
    questioner = Questioner(family, model, tokenizer)
    pools = {"video": ScenePool(family, model, "video", recipe.video_shards, run.work_dir)}
    pools["image"] = ScenePool(family, model, "image", recipe.image_shards, run.work_dir)
    test = None
    recent: defaultdict[str, list[float]] = defaultdict(list)
    parts = {"model": model, "head": head}
    for step, seconds in run.steps("language", steps, recipe.language_peak, parts, optimizer):
        rng = run.rng(3, step)
        warm = step < recipe.frame_steps
        kind = "frames" if warm else rng.choice(["videos", "images", "frames"], p=[0.5, 0.4, 0.1])
        pools["video"].grow(1 + step // recipe.shard_steps)
        if not warm:
            pools["image"].grow(1 + (step - recipe.frame_steps) // recipe.shard_steps)
        samples = pools["image" if kind == "images" else "video"].draw(rng, getattr(recipe, kind))
        features = stack(samples)
        visual, pack = getattr(questioner, kind)(samples, features, rng)
        loss, right, states = answer_pack(model, pack, visual)
        position_loss = family.position_loss(model, head, features, pack, states)
        optimizer.update(loss + recipe.position_weight * position_loss)
        remember(recent, kind, pack, right)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            run.log(
                stage="language",
                step=step + 1,
                seconds=round(seconds),
                loss=round(loss.item(), 4),
                position_loss=round(position_loss.item(), 4),
                scenes={name: len(pool.samples) for name, pool in pools.items()},
                training=averages(recent),
            )
        if (step + 1) % 500 == 0 or step + 1 == steps:
            test = test or held_out_scenes(family, model)
            run.log(stage="language", step=step + 1, seconds=round(seconds), held_out=evaluate(questioner, model, test))


def remember(recent: defaultdict[str, list[float]], kind: str, pack: Pack, right: torch.Tensor) -> None:
    for type_, hit in zip(pack.types, right.tolist(), strict=True):
        recent[f"{kind} {type_}"].append(hit)


def averages(recent: defaultdict[str, list[float]]) -> dict[str, float]:
    """Accuracy on training questions since the last call."""
    result = rounded({name: float(np.mean(hits)) for name, hits in sorted(recent.items())})
    recent.clear()
    return result


@torch.no_grad()
def evaluate(questioner: Questioner, model, samples: dict[str, list[Sample]]) -> dict[str, dict[str, float]]:
    """Share of right answers per kind of scene and question type, on the scenes' own questions, in float32."""
    result = {}
    for kind, scenes in samples.items():
        hits: defaultdict[str, list[bool]] = defaultdict(list)
        groups = defaultdict(list)
        for sample in scenes:
            groups[sample.scene.frames.shape[1:3]].append(sample)
        for size, group in groups.items():
            for start in range(0, len(group), 32):
                part = group[start : start + 32]
                asked = [list(sample.scene.questions) for sample in part]
                visual, pack = questioner(kind, stack(part), asked, size=size if kind == "image" else None)
                _, right, _ = answer_pack(model, pack, visual)
                for type_, hit in zip(pack.types, right.tolist(), strict=True):
                    hits[type_].append(hit)
        result[kind] = summary(hits)
    return result


def summary(hits: dict[str, list[bool]]) -> dict[str, float]:
    """Share of right answers per question type and over all questions, and how many there were."""
    everything = [hit for type_hits in hits.values() for hit in type_hits]
    accuracy = rounded({type_: float(np.mean(hits[type_])) for type_ in VIDEO_TYPES if type_ in hits})
    return accuracy | {"all": round(float(np.mean(everything)), 4), "questions": len(everything)}
