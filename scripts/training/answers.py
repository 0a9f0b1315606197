"""What an exported folder answers, through stock processor and `generate`."""

from collections import defaultdict
from pathlib import Path

from toy_world import sample_image, sample_video
from tqdm import tqdm
from training.language import summary
from training.recipe import FOLLOWED_SCENES
from training.tokenizing import first_turn
from transformers import AutoProcessor


def evaluate_generation(family, folder: Path, number: int) -> dict[str, dict[str, float]]:
    """Accuracy of the folder on `number` held-out scenes of each kind, all visual tokens seen."""
    model = family.model_class.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    first = FOLLOWED_SCENES.stop
    result = {}
    for kind, sample in (("video", sample_video), ("image", sample_image)):
        hits: defaultdict[str, list[bool]] = defaultdict(list)
        for seed in tqdm(range(first, first + number), f"answers about {kind}s", mininterval=5):
            scene = sample(seed)
            prompts = [f"USER: {family.written(kind)}{first_turn(question)}" for question in scene.questions]
            media = family.media(kind, scene, len(prompts))
            inputs = processor(text=prompts, **media, padding=True, return_tensors="pt")
            generated = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
            answers = processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
            for question, answer in zip(scene.questions, answers, strict=True):
                hits[question.type].append(answer.strip() == question.answer)
        result[kind] = summary(hits)
    return result
