"""The model: the variant's own code encodes and prunes, vLLM's language model reads what stays."""

import copy
import math

import torch
from torch import nn
from transformers.initialization import no_init_weights
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal
from vllm.model_executor.models.utils import init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from .attention import make_proportional
from .checks import POSITIONS, moves_positions
from .loading import parts_of_checkpoint
from .media_cache import MediaCache
from .processing import DummyInputs, Info, Processor
from .repository import class_of, part_of, plain_config

CACHE_OPTION = "rediprune_media_cache_gib"  # in --additional-config
CACHE_GIB = 1.0


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=DummyInputs)
class PrunedModel(nn.Module, SupportsMultiModal, SupportsMRoPE):
    """
    Any family of the repository.

    Attributes:
        vision: the model of the variant, without its language model but for the layers that read the question.
        language_model: vLLM's.
        media: what the tower gave for the media that were asked about last (`MediaCache`).
    """

    supports_multimodal_pruning = True
    supported_video_pruning_methods = ("evs",)
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        return f"<{modality}>"

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        model_class = class_of(model_config, "AutoModelForImageTextToText")
        self.config = config = plain_config(model_class, model_config.hf_config)
        self.code = {
            name: part_of(model_class, name)
            for name in ("core_items", "core_positions", "core_question", "methods_registry")
        }
        self.moves_positions = moves_positions(config.pruning)
        self.vision = _without_language_model(model_class, config)
        text_config = copy.deepcopy(config.text_config)
        if self.moves_positions:  # tokens stand where they stood in the unpruned prompt
            text_config.max_position_embeddings = POSITIONS + model_config.max_model_len
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config, hf_config=text_config, prefix=maybe_prefix(prefix, "language_model")
            )
        self.weighs = config.pruning.prunes and bool(config.pruning.resolved("proportional_attention"))
        if self.weighs:
            make_proportional(self.language_model, vllm_config)
        ids = (config.image_token_id, getattr(config, "video_token_id", None))
        self.media_tokens = [token_id for token_id in ids if token_id is not None]
        self.configure_mm_token_handling(config.text_config.vocab_size, self.media_tokens)
        gib = (vllm_config.additional_config or {}).get(CACHE_OPTION, CACHE_GIB)
        self.media = MediaCache(int(gib * 2**30))
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    # -- media --------------------------------------------------------------------------------------------------------

    def embed_multimodal(self, **fields) -> list:
        """
        For each medium its kept tokens (k, H); where tokens move in the prompt or have weights, with `marks` behind.

        Args:
            fields: those of `Processor`, by kind and name.
        """
        embeds = []
        for kind in ("image", "video"):
            names = {name.removeprefix(f"{kind}_"): values for name, values in fields.items() if name.startswith(kind)}
            for index in range(len(names.get("pixels", ()))):
                embeds.append(self._embed_item(kind, {name: values[index] for name, values in names.items()}))
        return embeds

    def _embed_item(self, kind: str, fields: dict) -> torch.Tensor:
        vision = self.vision
        ratio, tokens = float(fields["keep_ratio"]), int(fields["keep_tokens"])
        pruning = vision.config.pruning.with_budget(ratio or None, tokens or None)
        pixels = {"image": None, "video": None, kind: fields["pixels"][None]}
        tiled = kind == "image" and vision.frame_size.pinpoints is not None
        sizes = self.code["core_items"].MediaSizes(image_sizes=fields["image_size"][None] if tiled else None)
        (layout,) = vision.layouts_of(pixels, sizes, pruning)
        item = self.code["core_items"].MediaItem(layout, row=0)
        self._encode(item, pixels, pruning, bytes(fields["media_key"].tolist()))
        vision.prune_items([item], pruning, self._question(fields, pruning))
        embeds = vision.project_items([item], pruning)
        if len(embeds) != int(fields["num_tokens"]):  # vLLM would leave out the rest of them
            raise RuntimeError(
                f"{len(embeds)} tokens of a {kind} stay, but its prompt has {int(fields['num_tokens'])} placeholders"
            )
        return torch.cat([embeds, marks(item, embeds)], dim=-1) if self.moves_positions else embeds

    def _encode(self, item, pixels: dict, pruning, media_key: bytes) -> None:
        """Fills in the sets of the item, from the cache where it was asked about before."""
        merges = pruning.prunes and self.code["methods_registry"].METHODS[pruning.method].merges_in_encoder
        key = (item.kind, media_key, pruning.prunes, pruning.budget if merges else None)
        item.sets = self.media.get(key, pixels[item.kind].device)
        if item.sets is None:
            self.vision.encode_items([item], pixels, pruning)
            self.media.put(key, item.sets)

    def _question(self, fields: dict, pruning):
        device = fields["pixels"].device
        embed = lambda ids: self.language_model.embed_input_ids(ids.to(device))  # noqa: E731
        ids = fields["question"]
        question = self.code["core_question"].Question([embed(ids)], [ids])
        if pruning.reads_clip:
            question.clip = self.vision.joint_space().place_questions(
                fields["clip_ids"][None], fields["clip_mask"][None]
            )
        if pruning.reads_words:
            words = fields["words"]
            question.words = [embed(words[words >= 0])]
        return question

    # -- positions ----------------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list, mm_features: list) -> tuple:
        """
        Four rows of positions (4, T) before it is known which tokens stay, and how much later the answer begins.

        The rows are the position; the position + s - 1 of a token that stands for s; how many tokens are left out before the
        medium that a token is of, or before the token itself; and how many are left out in all. What is later than a medium is
        right by then: how many of its tokens are left out is known.
        """
        rows = torch.zeros(4, len(input_tokens), dtype=torch.long)
        if self.config.pruning.resolved("positions") != "compact":
            for feature in mm_features:
                left_out = int(feature.data[f"{feature.modality}_num_unpruned"].data) - feature.mm_position.length
                rows[2, feature.mm_position.offset + feature.mm_position.length :] += left_out
                rows[3] += left_out
        rows[:2], delta = self._positions(rows)
        return rows, delta

    def recompute_mrope_positions(
        self, input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
    ) -> tuple:
        """
        Takes the `marks` off embeddings, and puts them into the positions.

        Args:
            input_ids: (T,) of the prompt.
            multimodal_embeddings: of the media's tokens from `num_computed_tokens` on, in their order, as far as they are there.
            mrope_positions: (4, T).

        Returns:
            the embeddings (k, H), positions (4, T), and how much later the answer begins.
        """
        rows = mrope_positions.clone()
        if not len(multimodal_embeddings):
            return multimodal_embeddings, rows, self._positions(rows)[1]
        width = self.config.text_config.hidden_size
        sizes, shifts = read_marks(torch.cat([embeds[:, width:] for embeds in multimodal_embeddings])).to(rows).T
        ids = torch.as_tensor(input_ids, device=rows.device)[: rows.shape[1]]
        is_medium = torch.isin(ids, torch.tensor(self.media_tokens, device=ids.device))
        is_medium[:num_computed_tokens] = False
        places = is_medium.nonzero()[: len(sizes), 0]
        gaps = rows.clone()
        if self.config.pruning.resolved("positions") != "compact":
            gaps[2, places] += shifts
        positions, delta = self._positions(gaps)
        rows[0, places] = positions[places]
        rows[1, places] = positions[places] + sizes - 1
        return [embeds[:, :width] for embeds in multimodal_embeddings], rows, delta

    def _positions(self, rows: torch.Tensor) -> tuple:
        """Positions (T,) that leave out what the rows (4, T) do, shrunk where they have to be, and how much later the answer is."""
        columns = torch.arange(rows.shape[1], device=rows.device) + rows[2]
        total = rows[3, :1]
        if self.config.pruning.resolved("positions") == "scaled":
            core, skipped = self.code["core_positions"], torch.zeros_like(columns)
            skipped[-1:] = total
            limit = min(core.context_length(self.config.text_config), self.config.pruning.max_positions or math.inf)
            room = core.room_for_gaps(limit, torch.full_like(total, len(columns)), total)
            columns, skipped = (values[0] for values in core.shrunk_columns(columns[None], skipped[None], room))
            total = skipped.sum()
        # Prompts with later positions are refused, but for media that the engine had before.
        return columns.clamp_max(POSITIONS), min(int(total), POSITIONS)

    # -- language -----------------------------------------------------------------------------------------------------

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        if self.moves_positions and not self.weighs:
            positions = positions[0]
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states):
        return self.language_model.compute_logits(hidden_states)

    # -- weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, weights) -> set:
        """
        Returns:
            the names of what was loaded.

        Raises:
            ValueError: the checkpoint lacks a tensor of the vision model, or holds one that the model does not have.
        """
        vision = dict(self.vision.named_parameters())
        loaded, unexpected = set(), []

        def of_language_model():
            for part, name, tensor in parts_of_checkpoint(weights):
                own = name if part == "vision" else f"model.language_{name}"
                if own in vision:
                    with torch.no_grad():
                        vision[own].copy_(tensor)
                    loaded.add(f"vision.{own}")
                elif part == "vision" and not name.endswith(("position_ids", "inv_freq")):
                    unexpected.append(name)
                if part == "language_model":
                    yield name, tensor

        names = self.language_model.load_weights(of_language_model())
        missing = sorted(name for name in vision if f"vision.{name}" not in loaded)
        if missing or unexpected:
            raise ValueError(
                f"the checkpoint does not fit {type(self.vision).__name__}: {len(missing)} missing tensors "
                f"({', '.join(missing[:5])}), {len(unexpected)} unexpected ({', '.join(unexpected[:5])}); check that the files "
                "belong to this config.json."
            )
        return loaded | {f"language_model.{name}" for name in names}


def marks(item, embeds: torch.Tensor) -> torch.Tensor:
    """
    How many tokens each kept token (k, H) stands for, and by how many the tokens left out before it would move it.

    Returns:
        the bits of two int32, as numbers in the dtype of the embeddings (k, channels).
    """
    kept = item.kept.to(embeds.device)
    # Where nothing is pruned, newlines are among the tokens.
    columns = item.layout.columns(kept) if len(kept) == len(embeds) else torch.arange(len(embeds))
    places = torch.arange(len(embeds), device=embeds.device)
    sizes = torch.ones_like(places) if item.token_sizes is None else item.token_sizes.to(places)
    return torch.stack([sizes, columns.to(places) - places], dim=1).int().view(embeds.dtype)


def read_marks(values: torch.Tensor) -> torch.Tensor:
    """(k, 2) int32 from `marks`."""
    return values.contiguous().view(torch.int32)


def _without_language_model(model_class, config):
    """
    The model of the variant as it encodes, prunes and projects.

    Of its language model there are the first layers where the question is read by them (`pruning.reads_layers`): what they
    do has to be what transformers does, and vLLM's cannot be run without its cache.
    """
    config = copy.deepcopy(config)
    text_config, pruning = config.text_config, config.pruning
    reads = pruning.prunes and {"relevance", "text_affinity"} & _required(model_class, pruning)
    reads = reads and pruning.query_weighting != "none" and pruning.reads_layers
    layers = text_config.num_hidden_layers
    if reads and pruning.relevance_layer >= layers:
        raise ValueError(
            f"relevance_layer={pruning.relevance_layer} must be below {layers}, the number of layers that the language model has."
        )
    last = min(layers, pruning.relevance_layer + pruning.num_relevance_layers)
    text_config.num_hidden_layers = last if reads else 0
    text_config.vocab_size, text_config.pad_token_id = 1, None
    with no_init_weights():
        model = model_class(config)
    model.lm_head = model.model.language_model.embed_tokens = model.model.language_model.norm = None
    return model.eval().requires_grad_(False)


def _required(model_class, pruning) -> frozenset:
    return part_of(model_class, "methods_registry").METHODS[pruning.method].required_signals
