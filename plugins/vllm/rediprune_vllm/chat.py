"""Chats: what somebody types is text, whatever it looks like."""

from vllm.renderers.hf import HfRenderer

from .repository import class_of, part_of


class PlainTextRenderer(HfRenderer):
    """vLLM's renderer of chat templates; typed placeholders stay text, as in the processor of the variant."""

    def _plain(self, messages, params):
        config = self.model_config.hf_config
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        ids = {getattr(config, name, None) for name in names} - {None}
        tokens = tuple(self.get_tokenizer().convert_ids_to_tokens(sorted(ids)))
        chats = part_of(class_of(self.model_config, "AutoProcessor"), "inputs_chat")
        tools = params.chat_template_kwargs.get("tools")
        if tools:
            params.chat_template_kwargs["tools"] = chats.plain_tools(tools, tokens)
        return chats.plain_messages(messages, tokens)

    def render_messages(self, messages, params):
        return super().render_messages(self._plain(messages, params), params)

    async def render_messages_async(self, messages, params):
        return await super().render_messages_async(self._plain(messages, params), params)
