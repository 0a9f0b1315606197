"""What the demo writes beside its controls, as HTML: answers with what they cost, remarks, and the frame around the kept patches."""

from html import escape

from ask import STAGES

OF_A_QUESTION = STAGES[2:]  # what comes before, reading and encoding, happens once for all questions


def remark(text: str, kind: str = "status") -> str:
    """A line of plain words; of the `kind` `"alert"`, one about something that went wrong."""
    return f'<p class="remark {kind}" role="{kind}">{escape(text)}</p>'


def about_video(video) -> str:
    return remark(
        f"{len(video.panels)} frames, {video.num_tokens} visual tokens. Read and encoded once, in {milliseconds(video.seconds)}: "
        "ask as many questions as you like."
    )


def comparison(question: str, method: str, keep_ratio: float, pruned: dict, full: dict) -> str:
    """Two answers side by side, and what the pruned one saved."""
    kept, fast, slow = pruned["visual_tokens"] / full["visual_tokens"], to_first_word(pruned), to_first_word(full)
    summary = (
        f"<b>{pruned['visual_tokens']} of {full['visual_tokens']}</b> visual tokens ({kept:.0%}), chosen by "
        f"<b>{escape(method)}</b> at a ratio of <b>{keep_ratio:g}</b>. First word after <b>{milliseconds(fast)}</b> instead of "
        f"{milliseconds(slow)}: {slow / fast:.1f} times as fast, in one run of each."
    )
    return (
        f'<section class="comparison" role="status"><h2>{escape(question)}</h2>'
        f'<div class="pair">{_card("pruned", "With pruning", pruned)}{_card("full", "With all tokens", full)}</div>'
        f"<p>{summary}</p>{_costs(pruned, full)}</section>"
    )


def to_first_word(result: dict) -> float:
    """Seconds of everything before the answer's first word that a question costs."""
    return sum(result["seconds"][stage] for stage in OF_A_QUESTION if stage != "decode")


def milliseconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1000 * seconds:.0f} ms"


def _card(kind: str, title: str, result: dict) -> str:
    answer = escape(result["answer"]) or "(no answer)"
    return f'<article class="{kind}"><h3>{title}</h3><p class="answer">{answer}</p></article>'


def _costs(pruned: dict, full: dict) -> str:
    """A table of tokens and times, folded."""
    counts = [(name, str(pruned[key]), str(full[key])) for name, key in (
        ("visual tokens", "visual_tokens"), ("tokens of the prompt", "prompt_tokens"), ("tokens of the answer", "new_tokens"),
    )]  # fmt: skip
    stages = [
        (stage, *(milliseconds(result["seconds"][stage]) for result in (pruned, full))) for stage in OF_A_QUESTION
    ]
    total = (
        "in all",
        *(milliseconds(sum(result["seconds"][stage] for stage in OF_A_QUESTION)) for result in (pruned, full)),
    )
    rows = "".join(
        f'<tr><th scope="row">{name}</th><td>{a}</td><td>{b}</td></tr>' for name, a, b in (*counts, *stages, total)
    )
    head = '<tr><td></td><th scope="col">with pruning</th><th scope="col">with all</th></tr>'
    return f"<details><summary>Tokens and times</summary><table>{head}{rows}</table></details>"


def earlier(asked: list) -> str:
    """The questions about this video before the last, newest first."""
    if not asked:
        return ""
    rows = "".join(
        f"<tr><td>{escape(question)}</td><td>{escape(pruned['answer'])}</td><td>{escape(full['answer'])}</td>"
        f"<td>{escape(method)}, {keep_ratio:g}</td></tr>"
        for question, method, keep_ratio, pruned, full in reversed(asked)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in ("question", "with pruning", "with all", "method, ratio"))
    return f'<section class="earlier"><h2>Asked before</h2><table><tr>{head}</tr>{rows}</table></section>'


def framed(page: str) -> str:
    """A page inside this one that reaches neither it nor any network."""
    return f'<iframe class="kept" title="Kept patches" sandbox="allow-scripts" srcdoc="{escape(page, quote=True)}"></iframe>'
