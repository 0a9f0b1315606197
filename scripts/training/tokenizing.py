"""The text around a question, and the tokenizer, in which every word of the questions is one token."""

from repository import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from toy_world import Question, sample_image, sample_video

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def first_turn(question: Question) -> str:
    """The rest of the first turn, after the placeholders."""
    return f"\n{question.question} ASSISTANT:"


def later_turn(question: Question) -> str:
    """A turn that follows an answer and its end token."""
    return f"USER: {question.question} ASSISTANT:"


def build_tokenizer(special_tokens: tuple[str, ...]) -> Tokenizer:
    """A byte-level BPE in which every word of the questions is one token, and which can still spell anything else."""
    corpus = []
    for seed in range(3000):
        for question in sample_video(seed).questions if seed % 2 else sample_image(seed).questions:
            corpus += [first_turn(question), later_turn(question), f" {question.answer}"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """Rows of the embedding table: the tokens, and some more up to a multiple of 8."""
    return -(-tokenizer.get_vocab_size() // 8) * 8


def chat_template(image: str, video: str) -> str:
    """The repository's chat template with other texts for an image and a video."""
    text = (ROOT / "chat_template.jinja").read_text()
    own = "'<' + part['type'] + '>\\n'"
    if own not in text:
        raise ValueError(f"chat_template.jinja has no {own}: the text of a medium, which is replaced here")
    return text.replace(own, f"{{'image': '{image}', 'video': '{video}'}}[part['type']] + '\\n'")
