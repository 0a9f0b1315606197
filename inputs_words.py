"""Which words of a question tell what it is about: those that MMTok covers."""

import re

# Words that hold a sentence together and stand for nothing that could be seen.
STOP_WORDS = frozenset(
    word
    for words in (
        "a an the this that these those some any each every all both either neither no",  # determiners
        "such same other another few more most own",
        "i me my mine you your yours he him his she her hers it its we us our ours they them their theirs",  # pronouns
        "myself yourself himself herself itself ourselves themselves someone something anyone anything one ones",
        "who whom whose what which where when why how many much",  # question words
        "am is are was were be been being do does did done doing have has had having",  # auxiliaries
        "can could will would shall should may might must isn aren wasn weren don doesn didn",
        "in on at of to from by with without for about into onto out off up down over under above below through",  # prepositions
        "during before after between against as than",
        "and or but nor so if then because while until whether not only just also too very there here now again once",  # the rest
        "please s t re ve ll d m",
    )
    for word in words.split()
)
WORD = re.compile(r"[^\W_]+")
# A request for a form of answer, as benchmarks put it after the question.
ANSWER_PROMPT = re.compile(
    r"(?:(?:^|(?<=[.?!:\n]))\s*(?:please,?\s+)?(?:answer|reply|respond)\b[^.?!\n]*[.?!:]*)+\s*$", re.IGNORECASE
)


def content_words(question: str) -> list:
    """
    The words of a question without stop words, punctuation, and the sentences at its end that begin with "answer", "reply" or
    "respond". Where nothing would be left, all words of the question.
    """
    words = WORD.findall(ANSWER_PROMPT.sub("", question)) or WORD.findall(question)
    return [word for word in words if word.lower() not in STOP_WORDS] or words
