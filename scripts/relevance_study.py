"""How well relevance finds what a question asks about, on the tiny checkpoint and held-out generated videos.

For every question whose object is in the video, the visual tokens that show that object should be ahead of the others: the
share of pairs in which they are (the area under the ROC curve, 0.5 = chance), against all other tokens and, harder, against
those that show another object. Compared are the spaces, the layers whose attention is looked at, how heads and words are
put together, whether tokens compete in a frame or in the whole video, and every head by itself.

Example:
    python scripts/relevance_study.py --output docs/results/relevance
"""

import argparse
import json
from collections import defaultdict

import numpy as np
import torch
from evaluation.questions import Questions, add_scene_arguments, check_scenes
from repository import add_model_arguments, code_module, environment, fail, load, recorded_command
from toy_world import CHOICES_START, object_map, sample_video
from tqdm import tqdm
from writing import output_prefix, table, write_results

SHOWN = 0.3  # a token shows an object from this share of its area on


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="where results go: OUTPUT.json, OUTPUT.md")
    add_scene_arguments(parser, 60, CHOICES_START)
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    check_scenes(parser, args)
    args.output = output_prefix(args.output)
    return args


def asked_about(scene, question) -> list:
    """Numbers of the things in a scene that a question is about."""
    words = question.question.replace("?", "").replace(",", "").split()
    named = {
        "colour": lambda thing: thing.shape in words,
        "shape": lambda thing: thing.colour in words,
        "count": lambda thing: thing.shape == scene.counted,
    }.get(question.type, lambda thing: thing.name in question.question)
    return [number for number, thing in enumerate(scene.things) if named(thing)]


def shown(scene, numbers, side: int) -> torch.Tensor:
    """(frames, side^2) bool: the tokens that show one of these things."""
    rows = []
    for time in range(len(scene.frames)):
        hit = np.isin(object_map(scene, time), [number + 1 for number in numbers])
        rows.append(hit.reshape(side, len(hit) // side, side, -1).mean((1, 3)).ravel() > SHOWN)
    return torch.tensor(np.stack(rows))


def share_ahead(scores: torch.Tensor, wanted: torch.Tensor, others: torch.Tensor) -> float:
    """Mean over sets (N, L) of the share of pairs in which a wanted token is ahead of another; ties count half."""
    shares = []
    for score, wanted, others in zip(scores, wanted, others):
        if wanted.any() and others.any():
            margin = score[wanted][:, None] - score[others]
            shares.append(((margin > 0).float() + 0.5 * (margin == 0)).mean().item())
    return float(np.mean(shares)) if shares else float("nan")


class Study:
    """Scores of all candidates for one question after another, and how far ahead they put what it asks about."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.relevance = code_module("ops_relevance")
        self.query = code_module("ops_query")
        self.found = defaultdict(list)

    def words(self, question: str) -> torch.Tensor:
        """(T, H) input embeddings of all after the placeholder."""
        prompt = Questions("video", 0).prompt(self.processor, question)
        ids = self.processor.tokenizer(prompt)["input_ids"]
        ids = ids[ids.index(self.processor.video_token_id) + 1 :]
        return self.model.get_input_embeddings()(torch.tensor(ids, device=self.model.device))

    def candidates(self, features, projected, words):
        """Pairs (name, scores (N, L)) for sets of tokens."""
        query = self.query.build_query(words, "exponential")[None].expand(len(features), -1)
        cosine = self.relevance.cosine_relevance
        yield "pooled", cosine(features, self.query.align_query(query, features.shape[-1]))
        yield "projected", cosine(projected, query)
        yield (
            "projected, closest word",
            torch.stack([cosine(projected, word.expand_as(query)) for word in words]).amax(0),
        )
        language_model = self.model.model.language_model
        for number, layer in enumerate(language_model.layers):
            read = self.relevance.read_question(language_model, words, number)
            heads = self.relevance.attention_by_head(layer, read, projected)  # (N, h, T, L)
            name = f"attention, layer {number}"
            yield f"{name}: largest of heads and words", heads.amax((1, 2))
            yield f"{name}: largest of heads, mean of words", heads.amax(1).mean(1)
            yield f"{name}: mean of heads, largest of words", heads.mean(1).amax(1)
            yield f"{name}: mean of heads and words", heads.mean((1, 2))
            yield f"{name}: largest of heads, last word", heads.amax(1)[:, -1]
            if number:
                unread = self.relevance.attention_by_head(layer, words, projected)
                yield f"{name}, question unread: largest of heads and words", unread.amax((1, 2))
            for head in range(heads.shape[1]):
                yield f"{name}, head {head}: largest of words", heads[:, head].amax(1)

    @torch.inference_mode()
    def add(self, scene) -> None:
        inputs = self.processor(text=["<video>"], videos=[scene.frames], return_tensors="pt", keep_ratio=1.0)
        pixels = inputs["pixel_values_videos"].flatten(0, 1).to(self.model.device, self.model.dtype)
        features = self.model.model.vision_resampler(self.model.patch_features(pixels)["features"])
        projected = self.model.model.multi_modal_projector(features)
        side = int(features.shape[1] ** 0.5)
        any_object = shown(scene, range(len(scene.things)), side)
        for question in scene.questions:
            wanted = shown(scene, asked_about(scene, question), side)
            if not wanted.any():
                continue
            words = self.words(question.question)
            for scope in ("frame", "video"):
                as_sets = (lambda values: values) if scope == "frame" else (lambda values: values.flatten(0, 1)[None])
                sets = [as_sets(values) for values in (wanted, ~wanted, any_object & ~wanted)]
                for name, scores in self.candidates(as_sets(features), as_sets(projected), words):
                    scores = scores.float().cpu()
                    both = [share_ahead(scores, sets[0], others) for others in sets[1:]]
                    self.found[name, scope].append((question.type, *both))

    def rows(self) -> list:
        """For each candidate and scope the mean over question types, against all tokens and against other objects."""
        rows = []
        for (name, scope), results in self.found.items():
            types = sorted({kind for kind, *_ in results})
            by_type = {
                kind: np.nanmean([pair for kind_, *pair in results if kind_ == kind], axis=0).tolist() for kind in types
            }
            against_all, against_objects = np.mean(list(by_type.values()), axis=0)
            rows.append(
                {
                    "relevance": name,
                    "scope": scope,
                    "against_all_tokens": float(against_all),
                    "against_other_objects": float(against_objects),
                    "by_type": by_type,
                    "questions": len(results),
                }
            )
        return rows


def markdown(record: dict) -> str:
    by_scope = {
        scope: {row["relevance"]: row for row in record["rows"] if row["scope"] == scope}
        for scope in ("frame", "video")
    }
    lines = [
        "# How well relevance finds what a question asks about\n",
        f"Command: `{record['command']}`  ",
        ", ".join(f"{key}: {value}" for key, value in record["environment"].items()) + "\n",
        f"{record['questions']} questions about {record['scenes']} held-out videos whose object is in the video. Share of pairs in "
        "which a token that shows it is ahead of one that does not (0.5 = chance), mean over the types of question; and the "
        "same where the other token shows another object. Tokens compete in their frame, or in the whole video.\n",
    ]
    header = ["relevance", "frame: all tokens", "other objects", "video: all tokens", "other objects"]
    rows = []
    for name in by_scope["frame"]:
        cells = [
            by_scope[scope][name][key] for scope in by_scope for key in ("against_all_tokens", "against_other_objects")
        ]
        rows.append([name, *(f"{cell:.3f}" for cell in cells)])
    return "\n".join([*lines, *table(header, rows)]) + "\n"


def main(argv=None):
    args = parse_arguments(argv)
    try:
        study = Study(*load(args))
    except (ValueError, OSError, ImportError) as error:
        fail(str(error))
    for seed in tqdm(range(args.first_scene, args.first_scene + args.scenes), unit="video"):
        study.add(sample_video(seed))
    rows = study.rows()
    record = {
        "command": recorded_command(__file__, argv),
        "environment": environment(study.model),
        "first_scene": args.first_scene,
        "scenes": args.scenes,
        "questions": rows[0]["questions"],
        "rows": rows,
    }
    write_results(args.output, {".json": json.dumps(record, indent=1), ".md": markdown(record)})
    print(markdown(record))


if __name__ == "__main__":
    main()
