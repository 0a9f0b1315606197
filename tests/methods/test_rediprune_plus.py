"""`rediprune_plus` built a second time, from docs/methods.md alone ("Step by step") and in plain loops: the same kept tokens,
embeddings and logits. Of the model the stock parts are used: tower, projector, layers and norms; nothing of this repository."""

import math

import pytest
import torch
from tiny import POOLED, random_image, random_video, tiny_model, tiny_processor

PROMPTS = {
    "video": "USER: what is <video>\nwhich way does the red star move ? ASSISTANT:",
    "image": "USER: what is <image>\nwhere is the star ? ASSISTANT:",
    "no question": "USER: which star ? <video>",
}


# -- what the checkpoint hands to the projector ------------------------------------------------------------------------


def video_sets(model, inputs):
    """One set of x (N, C) with t (N), and the place of each token in the unpruned medium."""
    states = model.model.vision_tower(inputs["pixel_values_videos"][0], output_hidden_states=True).hidden_states[-2]
    frames = [model.model.vision_resampler(frame[None, 1:])[0] for frame in states]
    times = [frame / len(frames) for frame in range(len(frames)) for _ in range(POOLED)]
    return [(torch.cat(frames), times, list(range(len(times))))], len(times)


def image_sets(model, inputs):
    """The base view; then the tiles, two beside each other: 8 x 16 patches, of which an image of 30 x 90 covers 6 x 16."""
    states = model.model.vision_tower(inputs["pixel_values"][0], output_hidden_states=True).hidden_states[-2]
    base, left, right = states[:, 1:]
    rows = torch.cat([left.view(8, 8, -1), right.view(8, 8, -1)], dim=1)[1:7]  # a row of padding above and below
    places = [64 + row * (16 + 1) + column for row in range(6) for column in range(16)]  # a newline after each row
    return [(base, [0.0] * 64, list(range(64))), (rows.flatten(0, 1), [0.0] * 96, places)], 64 + 6 * (16 + 1)


# -- the steps ---------------------------------------------------------------------------------------------------------


def read(model, ids):
    """Steps 1 and 2: the tail through the layers, alone: what enters layers 1 to 4, as far as there are as many."""
    placeholders = {model.config.image_token_id, model.config.video_token_id}
    last = max(place for place, token in enumerate(ids) if token in placeholders)
    tail = torch.tensor(ids[last + 1 :][-128:], dtype=torch.long)
    if not len(tail):
        return []
    inputs, layers = [], model.model.language_model.layers[1:5]
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append((args or (kwargs["hidden_states"],))[0][0]), with_kwargs=True
        )
        for layer in layers
    ]
    model.model.language_model(input_ids=tail[None])
    for hook in hooks:
        hook.remove()
    return list(zip(layers, inputs))


def relevance(model, read_by, projected):
    """Steps 3 and 4."""
    heads, shared = model.config.text_config.num_attention_heads, model.config.text_config.num_key_value_heads
    sums = torch.zeros(len(projected))
    for layer, states in read_by:
        attention, norm = layer.self_attn, layer.input_layernorm
        keys = attention.k_proj(norm(projected)).view(len(projected), shared, -1)
        weights = [math.exp(6 * word / max(1, len(states) - 1)) for word in range(len(states))]
        for weight, state in zip(weights, states):
            queries = attention.q_proj(norm(state)).view(heads, -1)
            for head, query in enumerate(queries):
                logits = keys[:, head // (heads // shared)] @ query / math.sqrt(len(query))
                sums += weight / sum(weights) * logits.softmax(0)
    unit = [row / row.norm() for row in projected]
    spread = []
    for one in unit:
        likeness = [math.exp((float(one @ other) - 1) / 0.1) for other in unit]
        spread.append(sum(weight * float(value) for weight, value in zip(likeness, sums)) / sum(likeness))
    low, high = min(spread), max(spread)
    return [(value - low) / max(high - low, 1e-12) for value in spread]


def first_within_a_tie(scores):
    """Of a dictionary from index to score."""
    return min(index for index, score in scores.items() if score >= max(scores.values()) - 1e-6)


def choose(scores, distance, num_kept):
    """Step 6."""
    kept = [first_within_a_tie(dict(enumerate(scores)))]
    while len(kept) < num_kept:
        left = [index for index in range(len(scores)) if index not in kept]
        kept.append(first_within_a_tie({i: min(distance[u][i] for u in kept) + 0.5 * scores[i] for i in left}))
    return sorted(kept)


def prune(model, features, times, states, keep_ratio):
    """Steps 3 to 8 for one set: the kept indices, what stands in the prompt for each, and the sizes of their groups."""
    projector = model.model.multi_modal_projector
    projected = projector(features)
    unit = [row / row.norm() for row in projected]

    def distances(time_weight):
        return [
            [1 - float(one @ other) + time_weight * abs(now - then) for other, then in zip(unit, times)]
            for one, now in zip(unit, times)
        ]

    kept = choose(relevance(model, states, projected), distances(0.25), max(1, round(keep_ratio * len(features))))
    groups, distance = {token: [token] for token in kept}, distances(1)
    for token in set(range(len(features))) - set(kept):
        groups[first_within_a_tie({u: -distance[u][token] for u in kept})].append(token)
    merged = [features[token] + 0.3 * (features[groups[token]].mean(0) - features[token]) for token in kept]
    return kept, projector(torch.stack(merged)), [len(groups[token]) for token in kept]


def rebuild(model, inputs, kind, keep_ratio):
    """All steps: the kept indices of each set, the embeddings of the prompt, and its logits."""
    ids = inputs["input_ids"][0].tolist()
    sets, length = (image_sets if kind == "image" else video_sets)(model, inputs)
    states = read(model, ids)
    results = [prune(model, features, times, states, keep_ratio) for features, times, _ in sets]
    visual = iter(torch.cat([embeddings for _, embeddings, _ in results]))
    sizes = iter([size for *_, sizes in results for size in sizes])
    places = iter([places[token] for (kept, *_), (*_, places) in zip(results, sets) for token in kept])

    table, token_id = model.get_input_embeddings(), getattr(model.config, f"{kind}_token_id")
    start, after = ids.index(token_id), len(ids) - ids[::-1].index(token_id)
    embeddings, positions, logs = [], [], []
    for column, token in enumerate(ids):
        is_medium = token == token_id
        embeddings.append(next(visual) if is_medium else table(torch.tensor(token)))
        logs.append(math.log(next(sizes)) if is_medium else 0.0)
        if is_medium:  # step 9
            positions.append(start + next(places))
        else:
            positions.append(column if column < start else start + length + column - after)
    least = torch.finfo(torch.float32).min
    mask = torch.full((len(ids), len(ids)), least).triu(1) + torch.tensor(logs)  # step 10
    outputs = model.model.language_model(
        inputs_embeds=torch.stack(embeddings)[None],
        position_ids=torch.tensor([positions]),
        attention_mask=mask.clamp_min(least)[None, None],
    )
    return [kept for kept, *_ in results], torch.stack(embeddings), model.lm_head(outputs.last_hidden_state)


# -- the comparison ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("keep_ratio", [0.05, 0.15, 0.4])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_documentation_says_it_all(prompt, keep_ratio):
    pruning = {"method": "rediprune_plus", "keep_ratio": keep_ratio}
    model, processor = tiny_model(**pruning), tiny_processor(**pruning)
    kind = "image" if prompt == "image" else "video"
    media = {"images": random_image(size=(30, 90))} if kind == "image" else {"videos": random_video(frames=5)}
    inputs = processor(text=PROMPTS[prompt], **media)
    kept, embeddings, logits = rebuild(model, inputs, kind, keep_ratio)

    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    outputs = model(**inputs)
    hook.remove()
    (found,) = outputs.image_kept_indices if kind == "image" else outputs.video_kept_indices
    starts = [0, 64]  # the base view, then the tiles
    assert found.tolist() == [start + index for start, of_set in zip(starts, kept) for index in of_set]
    torch.testing.assert_close(seen[0], embeddings, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.logits, logits, atol=1e-3, rtol=1e-4)
