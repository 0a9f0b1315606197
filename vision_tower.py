"""Models with CLIP vision towers: features and signals of patches, and CLIP's joint space."""

import threading

import torch

from .vision_clip import read_attention, run_tower
from .vision_joint_space import JointSpace

_LOADING = threading.Lock()  # of what is loaded when it is first needed


class ClipTowerMixin:
    """For model classes, before the stock class: one CLIP tower for images and videos, `model.vision_tower`."""

    _joint = None  # a `JointSpace`, once one is needed

    def tower_of(self, kind: str) -> tuple:
        """The vision tower of a kind of media, and whether its CLS stays as a token."""
        return self.model.vision_tower, False

    def patch_features(
        self,
        pixels: torch.Tensor,
        signals=frozenset(),
        kind: str = "image",
        vision_feature_layer=None,
        vision_feature_select_strategy=None,
    ) -> dict:
        """
        Features and signals of the patches of N pictures, before pruning, pooling and the projector.

        Args:
            pixels: (N, 3, height, width).
            signals: which of `read_attention`'s to add; other names are left to the encoder.
            kind: `"image"` or `"video"`, of which media the pictures are.
            vision_feature_layer, vision_feature_select_strategy: instead of the config's.

        Returns:
            `"features"` (N, P, C) of the tapped layer, and the signals, each (N, P, ...). CLS is first where it stays.

        Raises:
            ValueError: the tower gives more or fewer tokens than there are patches.
        """
        config = self.config
        layer = config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or config.vision_feature_select_strategy
        tower, cls_stays = self.tower_of(kind)
        layers = [layer] if isinstance(layer, int) else layer
        states = run_tower(tower, pixels, layers, signals)
        # States are counted from the start, embeddings first.
        number = config.vision_config.num_hidden_layers + 1
        features = torch.cat([states[index % number] for index in layers], dim=-1)
        if not cls_stays and strategy == "default":
            features = features[:, 1:]
        num_patches = self.frame_size.side**2
        if features.shape[1] != num_patches + cls_stays:
            raise ValueError(
                f"the vision tower gives {features.shape[1]} tokens an image, but {num_patches} are patches; pruning needs "
                f"patches alone, and vision_feature_select_strategy={strategy!r} does not leave them."
            )
        is_whole = features.shape[1] == states[layers[-1] % number].shape[1]
        return {"features": features, **read_attention(tower, states, layers[-1], signals, is_whole)}

    def joint_space(self) -> JointSpace:
        """The [`JointSpace`] of the configured text tower, loaded when it is first asked for. None of this model's weights."""
        text_tower = self.config.pruning.text_tower
        with _LOADING:
            joint = self._joint
            if joint is None or joint.text_tower != text_tower:
                joint = self._joint = JointSpace(text_tower, self.config.vision_config.hidden_size)
        return joint
