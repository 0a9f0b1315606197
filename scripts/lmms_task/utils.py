"""What lmms-eval asks of the task `rediprune_world`. The videos are in the folder of this file."""

import json
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


@cache
def check_videos():
    """Refuses a folder without its videos. Asked with the first question: while it loads a task, lmms-eval hides errors."""
    lines = (FOLDER / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    videos = {json.loads(line)["video"] for line in lines}
    missing = sorted(video for video in videos if not (FOLDER / video).is_file())
    if missing:
        raise FileNotFoundError(
            f"the task folder {FOLDER} lacks {len(missing)} of its {len(videos)} videos (the first: {missing[0]}); write it "
            "again with `python scripts/make_lmms_task.py --output FOLDER`"
        )


def doc_to_visual(doc):
    check_videos()
    return [str(FOLDER / doc["video"])]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def process_results(doc, results):
    right = float(results[0].strip() == doc["answer"])
    return {"accuracy": right, f"accuracy_{doc['type']}": right}
