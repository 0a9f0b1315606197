"""A page on which visitors ask about a video, and see what pruning keeps of it and saves.

    python demo/app.py [--model FOLDER_OR_HUB_ID] [--port 7860]

On a Hugging Face Space, where nothing can be passed, the variable MODEL_ID names the model.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A Space holds the contents of this folder, with `scripts` and `samples` beside them.
HOME = next((folder for folder in (HERE, HERE.parent) if (folder / "scripts").is_dir()), HERE)
sys.path += [str(HERE), str(HOME / "scripts")]

import gradio as gr  # noqa: E402
from answers import about_video, comparison, earlier, framed, remark  # noqa: E402
from engine import MAX_BYTES, MAX_QUESTION, Engine, Refused, Video  # noqa: E402
from repository import add_model_arguments, load  # noqa: E402

TITLE = "ReDiPrune: what stays of a video"
REMEMBERED = 8  # questions of a visitor
SESSIONS = 64  # visitors whose video is kept
IDLE = 1800  # seconds after which it is not


@dataclass
class Session:
    """What the page remembers of one visitor, and of nobody else: the video of `source` and the last questions about it."""

    source: str
    video: Video
    asked: list = field(default_factory=list)


def sample_questions() -> list:
    """A question about each sample video, of another kind for each, and nothing where there are no samples."""
    listed = HOME / "samples" / "questions.json"
    if not listed.exists():
        return []
    videos = [(name, asked) for name, asked in json.loads(listed.read_text()).items() if name.endswith(".mp4")]
    return [(str(listed.with_name(name)), asked[kind]["question"]) for kind, (name, asked) in enumerate(videos)]


def build(engine: Engine) -> gr.Blocks:
    """The page."""

    def opened(session, source) -> Session:
        if source is None:
            raise Refused("Choose a video first.")
        if session is not None and session.source == source:
            return session
        path = Path(source)
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"This file is too large: at most {MAX_BYTES // 2**20} MB are taken. Cut or compress it.")
        return Session(source, engine.open_video(path.read_bytes()))

    def open_video(session, source):
        """A visitor chose another video: answers about the last one go."""
        if source is None:
            return None, "", "", "", ""
        try:
            session = opened(session, source)
        except Refused as refused:
            return None, remark(str(refused), "alert"), "", "", ""
        return session, about_video(session.video), "", "", ""

    def ask(session, source, question, method, keep_ratio):
        question = question or ""
        try:
            session = opened(session, source)
            pruned = engine.answer(session.video, question, method, keep_ratio)
            full = engine.answer(session.video, question, method, 1.0)
            compared = comparison(question, method, keep_ratio, pruned, full)
            yield session, compared, earlier(session.asked), gr.skip()
            kept = engine.kept_page(session.video, question, method, keep_ratio)
        except Refused as refused:
            yield session, remark(str(refused), "alert"), gr.skip(), gr.skip()
            return
        before, session.asked = (
            session.asked,
            [*session.asked, (question, method, keep_ratio, pruned, full)][-REMEMBERED:],
        )
        yield session, compared, earlier(before), framed(kept)

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(IDLE, IDLE)) as page:
        session = gr.State(None, time_to_live=IDLE)
        gr.HTML(f"<h1>{TITLE}</h1><p>Ask about a video. A vision-language model answers twice: with the few visual tokens that "
                "the question needs, and with all of them.</p>")  # fmt: skip
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                video = gr.Video(label="Video", sources=["upload"], height=300, buttons=[])
                about = gr.HTML(elem_id="about")
                samples = [(gr.Button(f"Sample: {text}", size="md"), path, text) for path, text in sample_questions()]
            with gr.Column(scale=6, min_width=320):
                question = gr.Textbox(
                    label="Question",
                    placeholder="what colour is the square?",
                    max_length=MAX_QUESTION,
                    elem_id="question",
                )
                with gr.Row():
                    method = gr.Dropdown(engine.methods, value=engine.default_method, label="Method", min_width=150)
                    ratio = gr.Slider(
                        0.02, 0.9, engine.default_ratio, step=0.01, label="Share of the tokens that stays", min_width=200,
                        buttons=[],
                    )  # fmt: skip
                button = gr.Button("Ask", variant="primary", elem_id="ask")
        answers = gr.HTML(elem_id="answers")
        kept = gr.HTML(elem_id="kept", js_on_load=FIT_FRAME)
        history = gr.HTML(elem_id="history")

        private = {"api_visibility": "private"}
        for sample, *chosen in samples:
            sample.click(partial(list, chosen), None, [video, question], **private)
        video.change(open_video, [session, video], [session, about, answers, kept, history], **private)
        gr.on(
            [button.click, question.submit],
            ask,
            [session, video, question, method, ratio],
            [session, answers, history, kept],
            trigger_mode="once",
            **private,
        )
    return page


# The page with the kept patches tells its height; a frame of that height needs no scroll bar of its own.
FIT_FRAME = """
addEventListener("message", (event) => {
  const frame = element.querySelector("iframe");
  if (frame && event.source === frame.contentWindow && event.data.height > 0) frame.style.height = `${event.data.height}px`;
});
"""


def launch_options() -> dict:
    """Limits; colours that stand out in light and dark, and fonts of the visitor's own."""
    theme = gr.themes.Default(
        primary_hue="amber",
        neutral_hue="slate",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(
        button_primary_text_color="*neutral_950",
        button_primary_text_color_dark="*neutral_950",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_400",
        body_text_color_subdued="*neutral_600",
    )
    return {
        "max_file_size": MAX_BYTES,
        "state_session_capacity": SESSIONS,
        "footer_links": ["settings"],
        "ssr_mode": False,
        "theme": theme,
        "css_paths": HERE / "style.css",
    }


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.set_defaults(model=os.environ.get("MODEL_ID", str(HOME)))
    parser.add_argument(
        "--host", help="address to listen on (default: this machine alone, or as Gradio's variables say)"
    )
    parser.add_argument("--port", type=int)
    parser.add_argument(
        "--at-once", type=int, default=2, help="visitors who are answered at once (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.model == str(HOME) and not (HOME / "config.json").exists():
        parser.error(
            "there is no checkpoint beside the demo: name one with --model, on a Space with the variable MODEL_ID"
        )
    return args


def main(argv=None):
    args = parse_arguments(argv)
    page = build(Engine(*load(args)))
    page.queue(max_size=32, default_concurrency_limit=args.at_once)
    page.launch(server_name=args.host, server_port=args.port, **launch_options())


if __name__ == "__main__":
    main()
