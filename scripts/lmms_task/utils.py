"""What lmms-eval asks of a task of generated scenes. The videos or images are in the folder of this file."""

import json
from functools import cache
from pathlib import Path

from PIL import Image

FOLDER = Path(__file__).resolve().parent


@cache
def check_media():
    """Refuses a folder without its media. Asked with the first question: while it loads a task, lmms-eval hides errors."""
    lines = (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    media = {json.loads(line)["file"] for line in lines}
    missing = sorted(file for file in media if not (FOLDER / file).is_file())
    if missing:
        raise FileNotFoundError(
            f"the task folder {FOLDER} lacks {len(missing)} of its {len(media)} {Path(missing[0]).parent} (the first: "
            f"{missing[0]}); write it again with `python scripts/make_lmms_task.py --output FOLDER`"
        )


def doc_to_visual(doc):
    check_media()
    path = FOLDER / doc["file"]
    return [Image.open(path).convert("RGB") if path.suffix == ".png" else str(path)]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    right = float(results[0].strip() == doc["answer"])
    return {"accuracy": right, f"accuracy_{doc['type']}": right}
