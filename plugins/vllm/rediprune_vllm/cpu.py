"""What vLLM's runner for the CPU leaves out."""

from vllm.v1.worker.cpu_model_runner import CPUModelRunner


def see_pruned_positions() -> None:
    """
    Lets the CPU runner take positions from embeddings, as the GPU runner does.

    Versions: vLLM 0.32. Reason: the CPU runner has a `load_model` of its own, which does not set the flag that the GPU runner's
    sets. Until: it does.
    """
    load_model = CPUModelRunner.load_model
    if getattr(load_model, "sees_pruned_positions", False):
        return

    def load_and_set_flag(self, *args, **kwargs):
        load_model(self, *args, **kwargs)
        multimodal = self.model_config.multimodal_config
        if multimodal is not None and getattr(self.get_model(), "supports_multimodal_pruning", False):
            self.is_multimodal_pruning_enabled = multimodal.is_multimodal_pruning_enabled()

    load_and_set_flag.sees_pruned_positions = True
    CPUModelRunner.load_model = load_and_set_flag
