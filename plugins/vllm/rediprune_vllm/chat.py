"""Chats become the prompts that the processor of the variant makes of them."""

from vllm.renderers.hf import HfRenderer

from .repository import class_of, part_of


class ChatRenderer(HfRenderer):
    """
    vLLM's renderer of chat templates, and two things of the variant's processor.

    What somebody types is text, whatever it looks like: typed placeholders stay text. And the prompt begins with the token that
    the tokenizer puts first, which vLLM leaves to the template, and templates of the family leave to the tokenizer.
    """

    def render_messages(self, messages, params):
        conversation, prompt = super().render_messages(self._plain(messages, params), params)
        return conversation, self._begun(prompt)

    async def render_messages_async(self, messages, params):
        conversation, prompt = await super().render_messages_async(self._plain(messages, params), params)
        return conversation, self._begun(prompt)

    def _plain(self, messages, params):
        config = self.model_config.hf_config
        names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
        ids = {getattr(config, name, None) for name in names} - {None}
        tokens = tuple(self.get_tokenizer().convert_ids_to_tokens(sorted(ids)))
        chats = part_of(class_of(self.model_config, "AutoProcessor"), "inputs_chat")
        if params.chat_template_kwargs.get("tools"):
            params.chat_template_kwargs["tools"] = chats.plain_tools(params.chat_template_kwargs["tools"], tokens)
        return chats.plain_messages(messages, tokens)

    def _begun(self, prompt):
        tokenizer = self.get_tokenizer()
        first = tokenizer("")["input_ids"][:1]
        if first != [tokenizer.bos_token_id]:
            return prompt
        if "prompt_token_ids" in prompt:
            if prompt["prompt_token_ids"][:1] != first:
                prompt["prompt_token_ids"] = first + list(prompt["prompt_token_ids"])
        elif not prompt["prompt"].startswith(tokenizer.bos_token):
            prompt["prompt"] = tokenizer.bos_token + prompt["prompt"]
        return prompt
