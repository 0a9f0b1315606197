"""Fine-tunes a variant with LoRA while its visual tokens are pruned, so that the language model learns to answer from what stays.

Without --data the questions are those of the generated world, about scenes that nothing is measured on. --data names a file with
a JSON object in each line, whose media are paths (from the file's folder), URLs or data URLs:

    {"video": "clip.mp4", "question": "what happens?", "answer": "a dog jumps"}
    {"image": "photo.png", "question": "what colour is the car?", "answer": "red"}

OUTPUT gets the adapter, which `peft.PeftModel.from_pretrained(model, OUTPUT)` puts on the variant, and `state.pt`, from which a
killed run goes on when it is started again with the same arguments. Needs `pip install peft`.

Examples:
    python scripts/finetune.py --output runs/adapter --keep-ratio 0.1
    python scripts/finetune.py --model my-variant --data train.jsonl --output runs/mine --dtype bfloat16 --steps 1000
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from repository import add_model_arguments, at_least_one, fail, keep_ratio, load
from toy_world import HELD_OUT_START, sample_image, sample_video
from tqdm import tqdm
from writing import output_folder, replacing

KINDS = ("image", "video")
IGNORED = -100  # the label of a token whose prediction does not count
STATE = "state.pt"
HELD_OUT_SCENES = 16
TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj)"


class Collator:
    """
    Makes a batch of samples: the prompts padded on the left, and behind each its answer and the end token, padded on the right.

    The processor reads the prompt alone, so that what stays depends on the question and never on the answer.

    Args:
        processor: that of the variant, which writes as many placeholders as tokens stay.
        keep_ratio: instead of the one of its config.
    """

    def __init__(self, processor, keep_ratio: float = None):
        self.processor, self.keep_ratio = processor, keep_ratio

    def __call__(self, samples: list) -> dict:
        """
        Args:
            samples: dictionaries with a `question`, an `answer` and a medium under `video` or `image`.

        Returns:
            the model's inputs, and `labels` (B, T), int64: the ids of answer and end token, `IGNORED` everywhere else.
        """
        media = {f"{kind}s": [sample[kind] for sample in samples if kind in sample] for kind in KINDS}
        media = {name: items for name, items in media.items() if items}
        prompts = [self.prompt(sample) for sample in samples]
        inputs = self.processor(
            text=prompts, **media, keep_ratio=self.keep_ratio, padding=True, padding_side="left", return_tensors="pt"
        )
        answers = [self.answer(sample) for sample in samples]
        ends = torch.full((len(answers), max(map(len, answers))), IGNORED)
        for row, answer in zip(ends, answers):
            row[: len(answer)] = torch.tensor(answer)
        is_answer, prompt_ids = ends != IGNORED, inputs["input_ids"]
        padded = ends.masked_fill(~is_answer, self.processor.tokenizer.pad_token_id)
        joined = {
            "input_ids": torch.cat([prompt_ids, padded], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], is_answer.to(inputs["attention_mask"])], 1),
            "labels": torch.cat([torch.full_like(prompt_ids, IGNORED), ends], 1),
        }
        return {**inputs, **joined}

    def prompt(self, sample: dict) -> str:
        return self.processor.apply_chat_template(self._question(sample), add_generation_prompt=True)

    def answer(self, sample: dict) -> list:
        """
        The ids that the model has to write after the prompt, as the chat template spaces them.

        Raises:
            ValueError: the template has no place for an answer, or the prompt's last token would change with it.
        """
        tokenizer, prompt = self.processor.tokenizer, self.prompt(sample)
        said = {"role": "assistant", "content": [{"type": "text", "text": sample["answer"]}]}
        whole = self.processor.apply_chat_template([*self._question(sample), said])
        if not whole.startswith(prompt):
            raise ValueError(f"the chat template writes an answer as {whole!r}, which does not go on from {prompt!r}")
        text = whole.rstrip().removesuffix(tokenizer.eos_token).rstrip()
        # From the last placeholder on: its tokens are no text, and tokenizers treat the first word of a text otherwise.
        start = max(
            prompt.rfind(token) + len(token) for token in self.processor.placeholders.values() if token in prompt
        )
        before, ids = (tokenizer(part[start:], add_special_tokens=False)["input_ids"] for part in (prompt, text))
        if ids[: len(before)] != before:
            raise ValueError(f"the tokenizer merges the end of the prompt {prompt[-20:]!r} with {sample['answer']!r}")
        return [*ids[len(before) :], tokenizer.eos_token_id]

    def _question(self, sample: dict) -> list:
        kind = next(kind for kind in KINDS if kind in sample)
        return [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": sample["question"]}]}]


# -- samples -----------------------------------------------------------------------------------------------------------


class World:
    """Questions of the generated world: a scene of its own for each, below those that are held out."""

    def __init__(self, kind: str, seed: int):
        self.kind, self.seed = kind, seed

    def batch(self, step: int, size: int) -> list:
        rng = np.random.default_rng((self.seed, step))
        return [self._sample(int(scene), rng) for scene in rng.integers(0, HELD_OUT_START, size)]

    def held_out(self) -> list:
        rng = np.random.default_rng(0)
        return [self._sample(HELD_OUT_START + number, rng) for number in range(HELD_OUT_SCENES)]

    def _sample(self, seed: int, rng) -> dict:
        scene = sample_video(seed) if self.kind == "video" else sample_image(seed)
        question = scene.questions[rng.integers(len(scene.questions))]
        frames = scene.frames if self.kind == "video" else scene.frames[0]
        return {self.kind: frames, "question": question.question, "answer": question.answer}


class Lines:
    """The samples of a file, in another order in each epoch; the last ones of the file are held out."""

    def __init__(self, path: Path, seed: int):
        samples = read_samples(path)
        number = min(HELD_OUT_SCENES, len(samples) // 5)
        self.samples, self.last, self.seed = samples[: len(samples) - number], samples[len(samples) - number :], seed

    def batch(self, step: int, size: int) -> list:
        return [self._sample(number) for number in range(step * size, (step + 1) * size)]

    def held_out(self) -> list:
        return self.last

    def _sample(self, number: int) -> dict:
        epoch, place = divmod(number, len(self.samples))
        return self.samples[np.random.default_rng((self.seed, epoch)).permutation(len(self.samples))[place]]


def read_samples(path: Path) -> list:
    """
    Raises:
        ValueError: a line is no sample, or there is none; the message names it.
        OSError: the file cannot be read.
    """
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
            texts = [sample["question"], sample["answer"], *(sample[kind] for kind in KINDS if kind in sample)]
            good = len(texts) == 3 and all(isinstance(text, str) for text in texts)
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            raise ValueError(
                f'{path}, line {number}: must be {{"video": "clip.mp4", "question": "...", "answer": "..."}}, or "image" '
                "instead of video"
            )
        for kind in set(KINDS) & set(sample):
            local = path.parent / sample[kind]
            sample[kind] = sample[kind] if sample[kind].startswith(("http:", "https:", "data:")) else str(local)
        samples.append(sample)
    if not samples:
        raise ValueError(f"{path} has no lines")
    return samples


# -- training ----------------------------------------------------------------------------------------------------------


class Run:
    """
    One training run: the adapter, its optimizer and how many steps were done.

    Args:
        model: the variant; its own weights stay as they are.
        settings: what a run that goes on must have in common with the one that it continues.
        folder: where adapter and state are written.
    """

    def __init__(self, model, settings: dict, folder: Path):
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(settings["seed"])
        config = LoraConfig(r=settings["rank"], lora_alpha=2 * settings["rank"], target_modules=TARGETS)
        self.model, self.settings, self.folder = get_peft_model(model, config), settings, folder
        self.weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=settings["learning_rate"])
        self.step = 0
        if (folder / STATE).exists():
            self._go_on()

    def _go_on(self) -> None:
        state = torch.load(self.folder / STATE, weights_only=True)
        different = [key for key, value in self.settings.items() if state["settings"].get(key) != value]
        if different:
            values = ", ".join(f"{key} was {state['settings'].get(key)!r}" for key in different)
            raise ValueError(
                f"--output {self.folder} holds a run with other arguments ({values}); repeat them, or choose another --output"
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def save(self) -> None:
        """The adapter as PEFT loads it, and then the state, which replaces the old one at once."""
        self.model.save_pretrained(self.folder)
        state = {"settings": self.settings, "step": self.step, "optimizer": self.optimizer.state_dict()}
        state["weights"] = {name: weight.detach().cpu() for name, weight in self.weights.items()}
        with replacing(self.folder / STATE) as temporary:
            torch.save(state, temporary)

    def loss(self, batch: dict):
        device, dtype = self.model.device, self.model.dtype
        tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None) for name, value in tensors.items()
        }
        return self.model(**{**batch, **moved}).loss

    def train(self, samples, collator: Collator, steps: int, batch_size: int, save_every: int) -> None:
        # Not in train mode: what a pruned prompt holds must not depend on dropout, and LoRA has none here.
        with tqdm(total=steps, initial=self.step, desc="fine-tuning") as bar:
            while self.step < steps:
                loss = self.loss(collator(samples.batch(self.step, batch_size)))
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.step += 1
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
                if self.step % save_every == 0 or self.step == steps:
                    self.save()

    @torch.no_grad()
    def held_out_loss(self, samples: list, collator: Collator, batch_size: int) -> float:
        """The mean loss of the batches of held-out samples; NaN where there are none."""
        parts = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        return float(np.mean([self.loss(collator(part)).item() for part in parts])) if parts else float("nan")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--data", type=Path, help="JSON lines (default: the generated world)")
    parser.add_argument("--keep-ratio", type=keep_ratio, help="while it learns (default: as config.json says)")
    parser.add_argument("--steps", type=at_least_one, default=300, help="default: %(default)s")
    parser.add_argument("--batch-size", type=at_least_one, default=8, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="default: %(default)s")
    parser.add_argument("--rank", type=at_least_one, default=8, help="of the adapter (default: %(default)s)")
    parser.add_argument("--save-every", type=at_least_one, default=50, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    add_model_arguments(parser)
    return parser.parse_args(argv)


def settings_of(args) -> dict:
    """What two parts of one run must have in common: all but how long it is and how often it is saved."""
    keys = ("model", "revision", "dtype", "keep_ratio", "batch_size", "learning_rate", "rank", "seed")
    data = None if args.data is None else str(args.data)
    return {**{key: getattr(args, key) for key in keys}, "data": data, "pruning": dict(args.pruning)}


def main(argv=None):
    args = parse_arguments(argv)
    output_folder(args.output)
    try:
        import peft  # noqa: F401
    except ImportError:
        fail("fine-tuning needs PEFT: pip install peft")
    try:
        model, processor = load(args)
        kind = "video" if "video" in processor.placeholders else "image"
        samples = World(kind, args.seed) if args.data is None else Lines(args.data, args.seed)
        run, collator = Run(model, settings_of(args), args.output), Collator(processor, args.keep_ratio)
        before = run.held_out_loss(samples.held_out(), collator, args.batch_size)
        run.train(samples, collator, args.steps, args.batch_size, args.save_every)
        after = run.held_out_loss(samples.held_out(), collator, args.batch_size)
    except (OSError, ValueError) as error:
        fail(str(error))
    print(
        f"loss on held-out questions: {before:.4f} before, {after:.4f} after step {run.step}; adapter in {args.output}"
    )


if __name__ == "__main__":
    main()
