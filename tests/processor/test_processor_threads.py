"""One processor in several threads: each call is what it would be alone, whatever the others ask for."""

import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
from rediprune import inputs_tokenizing
from rediprune.inputs_text_tower import load_tokenizer, question_segments
from tiny import random_image, random_video, tiny_processor, write_video


@pytest.fixture(autouse=True)
def threads_change_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def same(first, second):
    if not hasattr(first, "items"):
        return torch.equal(first, second) if torch.is_tensor(first) else first == second
    return list(first) == list(second) and all(same(first[key], second[key]) for key in first)


def in_threads(calls, rounds, alone=None):
    """What went wrong where every call has a thread of its own, against the same calls one after the other."""
    alone, wrong = alone or [call() for call in calls], []
    start = threading.Barrier(len(calls))

    def run(call, expected):
        start.wait()
        for _ in range(rounds):
            try:
                if not same(call(), expected):
                    wrong.append("differs")
            except Exception as error:  # whatever it is, it would not be there in one thread
                wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=pair) for pair in zip(calls, alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


TEXTS = ["where is the star ? " * times for times in (1, 3, 40)]
PADDINGS = [
    {"padding": True},
    {"padding": True, "padding_side": "right"},
    {"padding": "max_length", "max_length": 300},
    {"padding": True, "truncation": True, "max_length": 7},
    {"padding": True, "pad_to_multiple_of": 64},
    {"return_tensors": None},
]


def test_padding_and_truncation_of_others(processor):
    calls = [lambda options=options: processor(text=TEXTS, **options) for options in PADDINGS]
    assert in_threads(calls, rounds=150) == []


def test_media_ratios_and_chats_of_others(processor, tmp_path):
    path = write_video(tmp_path / "clip.mp4", random_video(frames=8))
    chat = [
        {"role": "user", "content": [{"type": "video", "path": str(path)}, {"type": "text", "text": "where <video>"}]}
    ]
    calls = [
        lambda: processor(text="<video> where", videos=path, keep_ratio=0.3),
        lambda: processor(text=["<video> where", "how many"], videos=random_video(1), padding=True, num_frames=2),
        lambda: processor(
            text=["<image> <image>", "<image> where"], images=[random_image(i) for i in range(3)], padding=True
        ),
        lambda: processor(text="<image> where", images=random_image(), do_normalize=False, return_tensors=None)[
            "input_ids"
        ],
        lambda: processor.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_tensors="pt", keep_ratio=0.7
        ),
        lambda: processor.apply_chat_template(chat),
    ]
    assert in_threads(calls, rounds=8) == []


def test_a_call_leaves_no_trace():
    processor = tiny_processor()
    before = {**vars(processor)}
    processor(text=["<video> where", "how"], videos=random_video(), padding=True, keep_ratio=0.5, download_timeout=3)
    assert {key: id(value) for key, value in vars(processor).items()} == {
        key: id(value) for key, value in before.items()
    }
    assert np.array_equal(processor(text="where")["input_ids"], tiny_processor()(text="where")["input_ids"])


@pytest.mark.slow
def test_questions_for_a_text_tower(text_tower):
    processor = tiny_processor(method="cdpruner", text_tower=text_tower)
    calls = [lambda text=text: processor(text=f"<image> {text}", images=random_image()) for text in TEXTS * 2]
    assert in_threads(calls, rounds=3) == []
    calls = [lambda: dict(zip(("ids", "mask"), question_segments(text_tower, TEXTS[2:] * 10)))] * 8
    alone = [calls[0]()] * 8
    for _ in range(20):
        load_tokenizer(text_tower)._tokenizer.no_truncation()  # as it is before the first call
        assert in_threads(calls, 1, alone) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_forked_while_another_thread_tokenizes(processor):
    """As the workers of a data loader are: nobody is left in them to give the lock back."""
    with inputs_tokenizing._LOCK:
        child = os.fork()
        if child == 0:
            processor(text="where is the star ?")
            os._exit(0)
    for _ in range(200):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.05)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child waits for a lock that nobody holds")
    assert status == 0
