"""Tokenizers in threads. A tokenizer in Rust keeps padding and truncation as its own state, which every call sets anew:
two calls at once are padded as the other one asked, or fail with "Already borrowed"."""

import os
import threading

_LOCK = threading.Lock()


def _new_lock() -> None:
    """In a process that was forked while another thread held the lock: that thread is not in it, and nobody gives it back."""
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_lock)


class OneAtATime:
    """A tokenizer whose calls wait for one another; in all else the tokenizer itself."""

    def __init__(self, tokenizer):
        self._tokenizer_in_turn = tokenizer

    def __call__(self, *args, **kwargs):
        with _LOCK:
            return self._tokenizer_in_turn(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._tokenizer_in_turn, name)
