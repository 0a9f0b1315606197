"""Loading and saving: no weights get lost silently, and linked variants take theirs from where `weights_from` points."""

import contextlib
import os

from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .hub_files import code_in_place
from .hub_linking import checksum_weights, errors_about_base, errors_about_damage, follow_link, same_weights, unlinked

logger = logging.get_logger(__name__)


class LinkedWeightsMixin:
    """For model classes, before the stock class: `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    loading_options = {}  # of `from_pretrained`, where a version of transformers needs them

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path=None, *args, output_loading_info=False, **kwargs):
        """
        As in the stock class, but weights never get lost silently, and those of a linked variant come from where its
        config's `weights_from` points, without anything else that is there.

        Raises:
            OSError: the base of a linked variant cannot be loaded, or a weights file is damaged.
            RuntimeError: tensors have no values, since another thread was loading, too (transformers 4.57).
            ValueError: the checkpoint lacks a tensor of the model, or holds one that the model does not have or has in
                another shape (the message names them), or the base of a linked variant is of another architecture.
        """
        variant = pretrained_model_name_or_path
        source, options = follow_link(cls.config_class, variant, kwargs)
        if source is variant:
            with errors_about_damage(variant):
                return cls._load(variant, *args, output_loading_info=output_loading_info, **options)
        config = options["config"]
        with errors_about_base(config, variant), errors_about_damage(config.weights_from):
            model, info = cls._load(source, *args, output_loading_info=True, **options)
        model.generation_config = options["generation_config"]  # of which 4.57 makes a copy that `generate` fails on
        model.name_or_path = model.config.name_or_path = str(variant)
        model._linked = (config.weights_from, config.weights_revision, checksum_weights(model))
        return (model, info) if output_loading_info else model

    @classmethod
    def _load(cls, *args, output_loading_info, ignore_mismatched_sizes=False, **kwargs):
        # With mismatches ignored they are all reported, by name, in both lines.
        model, info = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **{**cls.loading_options, **kwargs}
        )
        bad = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys")}
        if not ignore_mismatched_sizes:
            # 5.x adds the two shapes to each name.
            bad["mismatched_keys"] = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
        problems = [
            f"{len(names)} {key.replace('_', ' ')} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for key, names in bad.items()
            if names
        ]
        if problems:
            raise ValueError(
                f"the checkpoint does not fit {cls.__name__}: {'; '.join(problems)}. Missing and mismatched tensors would be "
                "random and unexpected ones lost, so nothing was loaded; check that the files belong to this config.json."
            )
        absent = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
        if (
            absent and "device_map" not in kwargs
        ):  # transformers 4.57 builds models with modules patched for the whole process
            raise RuntimeError(
                f"{len(absent)} tensors of the model have no values, such as {absent[0]}: another thread was loading a model at "
                "the same time, which this version of transformers does not allow. Load one after the other, before requests run."
            )
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory,
        is_main_process=True,
        state_dict=None,
        *args,
        materialise=False,
        push_to_hub=False,
        **kwargs,
    ):
        """
        As in the stock class, but a linked variant stays linked: its config names `weights_from`, and no weights are
        written.

        Args:
            materialise (`bool`, defaults to `False`): write the weights of a linked variant, and no link. Happens by
                itself with a `state_dict` of the caller, and, with a warning, when the weights are no longer those of the
                base, as after training.
        """
        adapters_alone = getattr(self, "_hf_peft_config_loaded", False)
        if adapters_alone or state_dict is not None or not self._stays_linked(materialise):
            link = contextlib.nullcontext() if adapters_alone else unlinked(self.config)
            with link, code_in_place(self, save_directory):
                if push_to_hub and not adapters_alone:
                    self.config.check_link_for_others()
                return super().save_pretrained(
                    save_directory, is_main_process, state_dict, *args, push_to_hub=push_to_hub, **kwargs
                )
        if not is_main_process:
            return
        if push_to_hub:
            hub_keys = ("commit_message", "private", "token", "create_pr", "revision")
            hub = {key: kwargs[key] for key in hub_keys if key in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or os.path.basename(os.path.abspath(save_directory)), **hub)
        self.config.save_pretrained(save_directory)
        self.generation_config.save_pretrained(save_directory)
        with code_in_place(self, save_directory):
            if self._auto_class is not None:
                custom_object_save(self, save_directory)

    def push_to_hub(self, repo_id, *args, materialise=False, **kwargs):
        """
        As in the stock class, but a linked variant stays linked, as in `save_pretrained`.

        Raises:
            ValueError: the link names a folder, where nobody else finds the weights, or `text_tower` does.
        """
        with contextlib.nullcontext() if self._stays_linked(materialise) else unlinked(self.config):
            self.config.check_link_for_others()
            return super().push_to_hub(repo_id, *args, **kwargs)

    def _stays_linked(self, materialise: bool) -> bool:
        if self.config.weights_from is None or materialise:
            return False
        if not self._weights_are_linked():
            logger.warning(
                f"The weights are not those of weights_from={self.config.weights_from!r} any more, so they are saved in "
                "full and the link is left out."
            )
            return False
        return True

    def _weights_are_linked(self) -> bool:
        *link, checksums = getattr(self, "_linked", (None, None, None))
        return link == [self.config.weights_from, self.config.weights_revision] and same_weights(self, checksums)
