"""The generated world: what it shows is what it asks for, and nothing can be answered without looking."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import toy_world as world

NUM_SCENES = 300


@pytest.fixture(scope="module")
def videos():
    return [world.sample_video(seed) for seed in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def images():
    return [world.sample_image(seed) for seed in range(NUM_SCENES)]


@pytest.fixture(scope="module", params=["videos", "images"])
def scenes(request):
    return request.getfixturevalue(request.param)


def asked(scenes, type_):
    return [(scene, q) for scene in scenes for q in scene.questions if q.type == type_]


def named(scene, question):
    """The objects that a question calls by colour and shape, in the order of the text."""
    text = question.question
    return sorted((thing for thing in scene.things if thing.name in text), key=lambda thing: text.index(thing.name))


@pytest.mark.parametrize("sample", [world.sample_video, world.sample_image])
def test_a_scene_follows_from_its_seed(sample):
    first, again, other = sample(7), sample(7), sample(8)
    assert np.array_equal(first.frames, again.frames)
    assert first.questions == again.questions
    assert first.questions != other.questions
    # held-out scenes are others than the training scenes of the same offset
    assert sample(world.HELD_OUT_START + 7).questions != first.questions


@pytest.mark.parametrize("sample", [world.sample_video, world.sample_image])
@pytest.mark.parametrize("seed", [-1, 2 * world.HELD_OUT_START])
def test_a_seed_out_of_range_is_named(sample, seed):
    with pytest.raises(ValueError, match=f"seed {seed} is out of range.*held-out"):
        sample(seed)


@pytest.mark.slow
def test_sizes(videos, images):
    assert {scene.frames.shape for scene in videos} == {(8, 96, 96, 3)}
    assert {scene.frames.shape for scene in images} == {(1, *size, 3) for size in world.IMAGE_SIZES}
    assert all(scene.frames.dtype == np.uint8 for scene in videos + images)


def test_objects_are_many_and_distinct(scenes):
    for scene in scenes:
        assert len({thing.name for thing in scene.things}) == len(scene.things)
        for t in range(len(scene.frames)):
            assert 4 <= sum(thing.visible(t) for thing in scene.things) <= 10


def test_a_tenth_of_the_tokens_cannot_hold_the_crowd(videos):
    kept = round(0.1 * (world.FRAME_SIZE // world.SLOT) ** 2)
    crowded = [
        sum(thing.visible(t) for thing in scene.things) > kept for scene in videos for t in range(world.NUM_FRAMES)
    ]
    assert np.mean(crowded) > 0.95


def test_objects_are_seen_in_their_colour(scenes):
    for scene in scenes[:60]:
        for t in range(len(scene.frames)):
            objects = world.object_map(scene, t)
            for i, thing in enumerate(scene.things):
                pixels = scene.frames[t][objects == i + 1]
                assert (len(pixels) > 30) == thing.visible(t)
                if thing.visible(t):
                    distance = np.abs(np.median(pixels, axis=0) - world.COLOURS[thing.colour])
                    assert distance.max() < 35


def test_place_is_clear_of_borders(scenes):
    for scene in scenes:
        size = np.array(scene.frames.shape[1:3])
        for thing in scene.things:
            if not thing.move:
                assert (np.ptp(thing.centres, axis=0) == 0).all()
                distance = np.abs(thing.centres[0] - size[None] * np.array([[1], [2]]) / 3)
                assert distance.min() >= 5


def test_movers_move_far_and_straight(videos):
    movers = [thing for scene in videos for thing in scene.things if thing.move]
    for thing in movers:
        way = thing.centres[-1] - thing.centres[0]
        step = np.array(world.MOVES[thing.move])
        assert (way * step).sum() >= 3 * world.SLOT
        assert (way * (step == 0)).sum() == 0


def test_colour_and_shape_answers(scenes):
    for scene, question in asked(scenes, "colour"):
        (thing,) = [thing for thing in scene.things if thing.shape in question.question]
        assert thing.colour == question.answer
    for scene, question in asked(scenes, "shape"):
        (thing,) = [thing for thing in scene.things if thing.colour in question.question]
        assert thing.shape == question.answer


def test_place_answers(scenes):
    for scene, question in asked(scenes, "place"):
        (thing,) = named(scene, question)
        height, width = scene.frames.shape[1:3]
        row, column = thing.centres[0]
        assert ("top" in question.answer) == (row < height / 3)
        assert ("bottom" in question.answer) == (row > 2 * height / 3)
        assert ("left" in question.answer) == (column < width / 3)
        assert ("right" in question.answer) == (column > 2 * width / 3)


def test_count_answers(scenes):
    for scene, question in asked(scenes, "count"):
        (shape,) = [shape for shape, plural in world.PLURALS.items() if plural in question.question]
        counted = [thing for thing in scene.things if thing.shape == shape]
        assert len(counted) == int(question.answer) <= world.MAX_COUNT
        assert all(not thing.move and all(map(thing.visible, range(len(scene.frames)))) for thing in counted)


def test_presence_answers(scenes):
    for scene, question in asked(scenes, "presence"):
        assert (len(named(scene, question)) == 1) == (question.answer == "yes")
        assert "a orange" not in question.question


def test_motion_and_order_answers(videos):
    for scene, question in asked(videos, "motion"):
        assert named(scene, question)[0].move == question.answer
    for scene, question in asked(videos, "order"):
        a, b = named(scene, question)
        assert abs(a.first - b.first) >= world.ORDER_GAP
        assert question.answer == (a if a.first < b.first else b).name


def test_a_still_has_no_questions_about_time(images):
    assert {q.type for scene in images for q in scene.questions} == set(world.STILL_TYPES)


def test_constant_answers_do_not_score(scenes):
    answers = defaultdict(Counter)
    for scene in scenes:
        for question in scene.questions:
            answers[question.type][question.answer] += 1
    chance = {
        "colour": 1 / 7,
        "shape": 1 / 6,
        "place": 1 / 9,
        "count": 1 / 5,
        "presence": 1 / 2,
        "motion": 1 / 4,
        "order": 1 / 42,
    }
    for type_, counts in answers.items():
        total = sum(counts.values())
        assert total > 0.8 * NUM_SCENES
        assert max(counts.values()) / total < chance[type_] + 0.1, (type_, counts)


def test_the_order_of_mention_does_not_answer(videos):
    first = [named(scene, question)[0].name == question.answer for scene, question in asked(videos, "order")]
    assert 0.4 < np.mean(first) < 0.6


def test_patch_labels_name_the_object_on_the_patch(videos):
    scene = videos[0]
    labels = world.patch_labels(scene.things, world.object_map(scene, 0))
    assert labels.shape == (12, 12, 4)
    assert (labels[3, 5, 2:] == (3, 5)).all()
    for thing in scene.things:
        if thing.visible(0):
            row, column = thing.centres[0] // world.PATCH_SIZE
            around = labels[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2, :2].reshape(-1, 2).tolist()
            assert [1 + world.SHAPES.index(thing.shape), 1 + list(world.COLOURS).index(thing.colour)] in around
    assert ((labels[..., 0] == 0) == (labels[..., 1] == 0)).all()


def test_patch_labels_need_whole_patches():
    with pytest.raises(ValueError, match="90x96 pixels.*multiples of 8"):
        world.patch_labels((), np.zeros((90, 96), np.uint8))


def test_unknown_names_are_named():
    with pytest.raises(ValueError, match="unknown shape 'heart'"):
        world.shape_mask("heart", 7)
    scene = world.sample_image(0)
    with pytest.raises(ValueError, match="unknown question type 'smell'"):
        world.draw_questions(scene.things, scene.counted, (96, 96), ["smell"], np.random.default_rng(0))
