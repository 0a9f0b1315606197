"""Which classes of the repository the engine serves, and which not yet."""

SERVED = (
    "ReDiPruneLlavaNextVideoForConditionalGeneration",
    "ReDiPruneLlavaForConditionalGeneration",
    "ReDiPruneLlavaNextForConditionalGeneration",
    "ReDiPruneVideoLlavaForConditionalGeneration",
)
# Named here so that they are refused: vLLM would take them for models of transformers, and prune nothing or fail later.
REFUSED = {
    "ReDiPruneLlavaOnevisionForConditionalGeneration": "how its images are tiled depends on how many are in the prompt",
    "ReDiPruneQwen2_5_VLForConditionalGeneration": "positions of pictures in it have coordinates of their own",
    "ReDiPruneQwen3VLForConditionalGeneration": "positions of pictures in it have coordinates of their own",
}
