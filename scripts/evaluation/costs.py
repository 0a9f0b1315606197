"""What a setting costs: visual tokens, and operations of the prefill, counted for a row or given as its budget."""

from benchmarking.operations import count_operations, formula, ratio_of_operations


class Costs:
    """
    Costs of settings on the questions of one kind.

    Args:
        run: the `Evaluation`; a setting has to be in force (`run.use`) whenever its costs are asked for.
        questions: the `Questions`.
    """

    def __init__(self, run, questions):
        self.run, self.questions = run, questions
        self.unpruned = self.visual_tokens(1.0)
        lengths = questions.mean_over_media(lambda index: self._prompt(index)["input_ids"].shape[1])
        self.text_tokens = lengths - self.unpruned

    def _prompt(self, index: int) -> dict:
        return self.questions.inputs(self.run.processor, index, 1, 1.0)

    @property
    def _pruning(self):
        return self.run.model.config.pruning

    def visual_tokens(self, ratio) -> float:
        """Visual tokens that enter the language model, on average; `ratio` as the processor is called with it."""
        processor = self.run.processor
        return self.questions.mean_over_media(lambda index: self.questions.visual_tokens(processor, ratio, index))

    def inner_tokens(self, ratio):
        """Those that go on inside the language model, on average; `None` where none leave there."""
        pruning, processor = self._pruning.with_budget(ratio), self.run.processor
        if pruning.inner is None:
            return None
        count = lambda index: pruning.inner_count(self.questions.visual_tokens(processor, 1.0, index))  # noqa: E731
        return min(self.questions.mean_over_media(count), self.visual_tokens(ratio))

    def of_row(self, setting, ratio: float) -> dict:
        """What the row of a setting says of its costs; operations are those of the first question about each shape of media."""

        def operations(index):
            return count_operations(self.run.model, self.run.inputs(self.questions, setting, (index, 1), ratio))[0][
                "prefill"
            ]

        call = setting.ratio_of_call(ratio)
        return {
            "visual_tokens": self.visual_tokens(call),
            "inner_tokens": self.inner_tokens(call),
            "prefill_operations": self.questions.mean_over_media(operations),
        }

    def share_of_budget(self) -> float:
        """The keep ratio that a budget in tokens comes to."""
        inside = self.inner_tokens(None) if self._pruning.is_inside else None
        return (self.visual_tokens(None) if inside is None else inside) / self.unpruned

    def ratio_at(self, share: float):
        """The keep ratio at which the prefill takes a share of the operations of the unpruned one, by the formula; `None` = at none."""
        config = self.run.model.config

        def operations(ratio):
            return formula(
                config, self._pruning.with_budget(ratio), self.visual_tokens(ratio), self.unpruned, self.text_tokens
            )

        whole = formula(config, type(self._pruning)(method="none"), self.unpruned, self.unpruned, self.text_tokens)
        return ratio_of_operations(share * whole, operations)
