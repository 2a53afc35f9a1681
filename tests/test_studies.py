"""The studies' own code: the lab trains what the pipeline trains, and the measures measure what they say."""

import re
from dataclasses import replace
from types import SimpleNamespace

import beyond
import deciding
import factors
import mmeb_hours
import numpy as np
import over_seeds
import probes
import pytest
import report
import results
import torch
from arms_compared import Difference, bootstrap, difference, stacked
from bridge import patched
from lab import Lab, Phase, Start, arguments, every_text
from loops import KINDS, Reconstruction, all_shown
from nats import batch_of, held_out_rows, nats, token_losses, with_other_images
from objectives import FinalState, LateBridge, with_picture, word_by_word
from scipy import stats
from transformers import Qwen2VLModel

from cocoa.backbone import Form, load_backbone
from cocoa.blocks import Block
from cocoa.checkpoint import as_sentence_transformer
from cocoa.corruption import IGNORE_INDEX
from cocoa.evaluation import evaluate
from cocoa.inputs import ImageBudget
from cocoa.pairs import Pair, Side
from cocoa.pipeline import train
from cocoa.recipe import load_recipe
from cocoa.scenes.world import COLOURS, Scene, Thing
from cocoa.scenes.write import write_scenes
from cocoa.stages.reconstruction import Reconstructor

PHASES = [
    Phase("joint_reconstruction", {"max_steps": 2, "learning_rate": 1e-3, "batch_size": 16}),
    Phase("eos_bridge", {"max_steps": 2, "learning_rate": 1e-3, "batch_size": 16, "layout": "strict"}),
    Phase("contrastive", {"max_steps": 2, "learning_rate": 1e-3, "batch_size": 16, "warmup_steps": 0.5}),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    write_scenes(folder / "scenes", 0, 60, 6, splits=("validation",))
    threads = torch.get_num_threads()
    yield Lab(folder, frozen_tower=False)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("mini-qwen2-vl", ImageBudget((1, 16)), attention="bidirectional")


@pytest.fixture(scope="module")
def rows(lab):
    return held_out_rows([each for each in lab.evaluation("validation")[0] if "-" not in each.name])


def weights(backbone):
    return {name: parameter.detach() for name, parameter in backbone.model.named_parameters()}


@pytest.mark.slow
def test_the_lab_trains_what_the_pipeline_trains(lab, tmp_path):
    stages = [{phase.stage: phase.options} for phase in PHASES]
    recipe = {"backbone": "mini-qwen2-vl", "output_dir": str(tmp_path / "run"), "seed": 5, "stages": stages}
    recipe["data"] = {"train": str(lab.folder / "scenes/MMEB-train"), "max_rows_per_subset": 8, "validation_rows": 0}
    recipe["image"] = {"train_tokens": [1, 16], "eval_tokens": [1, 16]}
    (tmp_path / "recipe.yaml").write_text(str(recipe))  # JSON-like, which is YAML
    theirs = weights(load_backbone(train(load_recipe(tmp_path / "recipe.yaml"))))
    start = Start("mini-qwen2-vl", 8, 5)
    ours = weights(lab.train(start, PHASES, keep=1))
    before = weights(load_backbone("mini-qwen2-vl"))
    moved = max((theirs[name] - before[name]).abs().max() for name in theirs)
    apart = max((theirs[name] - ours[name]).abs().max() for name in theirs)
    assert moved > 3e-3
    assert apart < 0.02 * moved  # Adam's first steps turn rounding into this
    again = weights(lab.train(start, PHASES, keep=1))  # goes on from the state that was kept
    assert all(torch.equal(again[name], ours[name]) for name in ours)


@pytest.mark.slow
def test_a_form_outlives_the_phases_that_have_none(lab):
    compression = Phase("compression", {"compression_tokens": 8, "max_steps": 1, "batch_size": 8}, dialogues=True)
    matching = Phase("contrastive", {"max_steps": 1, "batch_size": 8})
    backbone = lab.train(Start("mini-qwen2-vl", 8, 5), [compression, matching])
    assert backbone.form == ("causal", "compression", 8)


@pytest.mark.slow
def test_features_stand_for_pixels(lab, rows, monkeypatch):
    """A frozen tower sees a picture once; embeddings are the same, and so is what is trained, but for the tower."""
    start, phase = (
        Start("mini-qwen2-vl", 8, 5),
        PHASES[1].having(max_steps=1, batch_size=8, warmup_steps=0, max_grad_norm=1e9),
    )
    frozen = Lab(lab.folder, frozen_tower=True)
    sides = [row.side for row in rows[::4]]
    ours = frozen.embed_sides(frozen.load(start), sides, "here")
    theirs = lab.embed_sides(lab.load(start), sides, "there")
    assert torch.allclose(ours, theirs, atol=1e-5)
    kept, seen = (each.encoded["mini-qwen2-vl", name, 0] for each, name in ((frozen, "here"), (lab, "there")))
    assert {value["image_features"].shape[-1] for value in kept.values()} == {128}
    assert {value["pixel_values"].shape[-1] for value in seen.values()} == {588}
    before, ours, theirs = (
        weights(each) for each in (lab.load(start), frozen.train(start, [phase]), lab.train(start, [phase]))
    )
    for name, weight in ours.items():
        if ".visual." in name:
            assert torch.equal(weight, before[name])
        else:
            assert (weight - theirs[name]).abs().mean() < 0.02 * (weight - before[name]).abs().mean()
    monkeypatch.setattr(Qwen2VLModel, "get_image_features", None)
    again = weights(frozen.train(start, [phase]))  # whose tower sees nothing
    assert all(torch.equal(again[name], weight) for name, weight in ours.items())


@pytest.mark.slow
def test_hits_of_two_folders_stand_one_behind_the_other(lab):
    backbone = load_backbone("mini-qwen2-vl", ImageBudget((1, 16)), attention="causal")
    once, twice = (lab.hits(backbone, "validation", folders) for folders in (("scenes",), ("scenes", "scenes")))
    assert all(np.array_equal(twice[name], np.tile(own, 2)) for name, own in once.items())


@pytest.mark.slow
def test_hits_are_those_of_the_evaluator(lab):
    backbone = load_backbone("mini-qwen2-vl", ImageBudget((1, 16)), attention="causal")
    theirs = evaluate("mini-qwen2-vl", lab.folder / "scenes/MMEB-eval", lab.folder / "scores", split="validation")
    ours = lab.hits(backbone, "validation")
    assert {name: 100 * own.mean() for name, own in ours.items()} == pytest.approx(theirs["datasets"])


@pytest.mark.parametrize(
    ("pooling", "attention"), [("lasttoken", "bidirectional"), ("mean", "bidirectional"), ("compression", "causal")]
)
def test_embeddings_are_the_library_s(lab, pooling, attention):
    """In groups of like length, the last layer computed in part."""
    backbone = load_backbone(
        "mini-qwen2-vl", ImageBudget((1, 16)), attention=attention, pooling=pooling, compression_tokens=8
    )
    sides = lab.evaluation("validation")[1].sides[::7]
    theirs = as_sentence_transformer(backbone).encode(
        [backbone.messages(side) for side in sides], convert_to_tensor=True
    )
    assert torch.allclose(lab.embed_sides(backbone, sides, pooling), theirs, atol=1e-5)


def test_two_backbones_have_their_own_features(lab):
    """In one lab, one after the other; both towers make features of one width."""
    sides = [side for side in lab.evaluation("validation")[1].sides if side.image][:5]
    both, alone = Lab(lab.folder), Lab(lab.folder)
    for name in ("mini-qwen2-vl", "mini-qwen2.5-vl"):
        found = both.embed_sides(both.load(Start(name, 8, 5)), sides, "here")
    assert torch.equal(found, alone.embed_sides(alone.load(Start("mini-qwen2.5-vl", 8, 5)), sides, "here"))


@pytest.mark.slow
def test_adapters_start_from_the_seed(lab):
    """Whatever was drawn before; and weights behind a phase with adapters can be kept."""
    phase = replace(PHASES[1].having(max_steps=1, warmup_steps=0), lora=replace(factors.ADAPTERS, dropout=0.0))
    start = Start("mini-qwen2-vl", 8, 5)
    one = weights(lab.train(start, [phase], keep=1))
    torch.rand(3)
    again = weights(lab.train(start, [phase]))
    kept = weights(lab.load(start, [phase]))
    assert all(torch.equal(one[name], again[name]) and torch.equal(one[name], kept[name]) for name in one)


def test_shuffled_rows_change_their_images_every_epoch(lab, backbone, rows):
    frozen = load_backbone("mini-qwen2-vl", ImageBudget((1, 16)), attention="bidirectional")
    args = arguments(Phase("eos_bridge", {"batch_size": 8, "max_steps": 1}), 1)
    shuffled = Reconstruction(frozen, rows, args, "eos_bridge", shuffled=True)
    plain = Reconstruction(frozen, rows, args, "eos_bridge")
    first, second = shuffled.rows_of(0), shuffled.rows_of(1)
    assert list(plain.rows_of(0)) == list(plain.rows_of(1)) == list(rows)
    for own, one, two in zip(rows, first, second, strict=True):
        assert len({own.side.image, one.side.image, two.side.image}) == 3
        assert own.text == one.text == two.text and own.side.text == one.side.text == two.side.text


def test_b_is_from_either_side():
    pair = Pair(Side("Ask.", "what colour?", image="a.png"), Side("Show.", "red", image="b.png"), dataset="d", row=3)
    found = {(row.side.image, row.side.text, row.text) for row in every_text([pair])}
    ask, show = ("a.png", "what colour?"), ("b.png", "red")
    assert found == {("a.png", "", "what colour?"), (*ask, "red"), (*show, "what colour?"), ("b.png", "", "red")}
    words = replace(pair, target=Side(text="red"))
    assert len(every_text([words])) == 2


def test_the_next_token_sees_all_of_b(backbone, rows):
    hidden = batch_of(backbone, rows[:1], "published")
    sample = all_shown({name: value[0] for name, value in hidden.items() if name in ("input_ids", "labels")})
    assert backbone.mask_token_id not in sample["input_ids"]
    told = sample["input_ids"][sample["labels"] != IGNORE_INDEX]
    assert backbone.tokenizer.decode(told) == rows[0].text


def swap_pictures(batch):
    return batch | {"pixel_values": torch.randint_like(batch["pixel_values"], 256)}


@torch.inference_mode()
def losses(model, batch):
    tokens = model.predict(**batch).tokens
    first = torch.isin(tokens.positions, batch["eos_position"] + 1)
    return tokens.losses, first


def test_the_final_state_is_all_that_b_reads(backbone, rows):
    """Without the projection B knows nothing of the picture; with it, it does."""
    batch, model = batch_of(backbone, rows[::5], "published"), FinalState(backbone).eval()
    other = swap_pictures(batch)
    assert not torch.equal(losses(model, batch)[0], losses(model, other)[0])
    torch.nn.init.zeros_(model.projection.weight)
    assert torch.equal(losses(model, batch)[0], losses(model, other)[0])


def test_the_final_state_s_tokens_are_the_bridge_s(backbone, rows):
    batch = batch_of(backbone, rows[::5], "published")
    with torch.inference_mode():
        ours, theirs = FinalState(backbone).eval().predict(**batch), Reconstructor(backbone).eval().predict(**batch)
    assert torch.equal(ours.tokens.rows, theirs.tokens.rows)
    assert torch.equal(ours.tokens.positions, theirs.tokens.positions)


def test_a_late_bridge_is_cut_below(backbone, rows):
    batch = batch_of(backbone, rows[::5], "strict")
    other = swap_pictures(batch)
    layers = len(backbone.model.model.language_model.layers)
    for late, cut in ((0, True), (1, False)):
        model = LateBridge(backbone, late).eval()
        (one, first), (two, _) = losses(model, batch), losses(model, other)
        model.release()
        assert torch.equal(one[~first], two[~first]) == cut
        assert not torch.equal(one[first], two[first])  # EOS itself predicts it
    model = LateBridge(backbone, layers).eval()
    whole = losses(model, batch)[0]
    model.release()
    assert torch.equal(whole, losses(Reconstructor(backbone).eval(), batch)[0])


def test_word_by_word_hides_what_comes_later():
    """A is read whole by EOS and never by B; a word of B sees EOS, and B up to itself."""
    found = word_by_word({"lengths": torch.tensor([5, 3]), "eos_position": torch.tensor([2, 6])})
    first, second = (
        (Block((0, 3), (0, 3)), Block((3, 5), (2, 5), True)),
        (Block((5, 7), (5, 7)), Block((7, 8), (6, 8), True)),
    )
    assert found == [*first, *second]


def test_half_the_rows_have_their_picture_behind_eos_hidden_in_part(backbone, rows):
    row = next(row for row in rows if row.dataset == "Scenes_i2t")
    samples = [with_picture(backbone, row, 4096, 0.7, 0.5, torch.Generator().manual_seed(n)) for n in range(40)]
    texts, shown = ([each for each in samples if (len(each["image_grid_thw"]) == n)] for n in (1, 2))
    assert len(texts) + len(shown) == 40 and min(len(texts), len(shown)) > 10
    for each in texts:
        assert not each["hidden_units"].any() and len(each["target_pixels"]) == 0
        assert (each["labels"] != IGNORE_INDEX).any()
    sample = shown[0]
    is_image = sample["input_ids"] == backbone.model.config.image_token_id
    eos = int(sample["eos_position"])
    assert is_image.sum() == 18 and is_image[eos:].sum() == 9
    assert sample["hidden_units"].sum() == round(0.5 * 9)
    assert (sample["hidden_units"] & ~is_image).sum() == 0 and not sample["hidden_units"][:eos].any()
    clean, corrupted = sample["pixel_values"].chunk(2)
    changed = (clean != corrupted).any(1).reshape(9, 4)
    assert torch.equal(changed.all(1), sample["hidden_units"][is_image][9:])
    assert (sample["labels"] == IGNORE_INDEX).all()


def test_other_images_are_others_and_the_words_stay(rows):
    others = with_other_images(rows)
    for row, other in zip(rows, others, strict=True):
        assert other.side.image != row.side.image
        assert (other.text, other.side.text, other.dataset) == (row.text, row.side.text, row.dataset)


def test_nats_are_the_difference_of_two_losses(backbone, rows):
    found = nats(backbone, rows, "published")
    own = token_losses(backbone, rows, "published").losses
    other = token_losses(backbone, with_other_images(rows), "published").losses
    assert found["token"] == pytest.approx((other.mean() - own.mean()).item(), abs=1e-5)
    assert found["text"] == pytest.approx((other.sum() - own.sum()).item() / len(rows), abs=1e-4)
    assert found["loss"] == pytest.approx(own.mean().item())


def test_patching_every_layer_takes_all_away(backbone, rows):
    captions = [row for row in rows if row.dataset == "Scenes_i2t"]
    shares = {(row["patched"], row["layer"]): float(row["share"]) for row in patched(backbone, captions, "strict")}
    assert shares["from", 0] == 100
    assert shares["alone", 5] == shares["from", 5] != 0
    assert shares["from", 5] != shares["from", 4]
    assert len(shares) == 12


def test_hits_are_packed_and_unpacked():
    hits = np.random.default_rng(0).random(203) < 0.4
    assert np.array_equal(results.unpack(results.pack(hits), 203), hits)


def test_work_that_is_done_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RUNS", tmp_path)
    path, done = tmp_path / "found.csv", []

    def task(name):
        def make():
            done.append(name)
            return [{"value": name.upper()}]

        return {"arm": name, "seed": 1}, make

    for names in (["a", "b"], ["b", "c", "a"]):
        results.work(path, [task(name) for name in names])
    assert done == ["a", "b", "c"]
    assert results.read(path) == [{"arm": name, "seed": "1", "value": name.upper()} for name in done]


def test_an_interval_holds_the_difference_of_two_arms():
    rng = np.random.default_rng(0)
    one = {name: rng.random((8, 200)) < 0.6 for name in ("SceneObjects", "Scenes_i2t")}
    other = {name: rng.random((8, 200)) < 0.5 for name in one}
    found = difference(one, other)
    expected = 100 * np.mean([one[name].mean() - other[name].mean() for name in one])
    assert found.mean == pytest.approx(expected)
    assert found.outer[0] < found.inner[0] < expected < found.inner[1] < found.outer[1]
    assert found.verdict == "better"
    alone = difference(one, other, group="Classification")
    assert alone.mean == pytest.approx(100 * (one["SceneObjects"].mean() - other["SceneObjects"].mean()))


def test_seeds_count_as_much_as_queries():
    """Arms that differ by a seed's luck alone, the same on all queries: the interval is that of a t-test over seeds."""
    luck = np.random.default_rng(3).random((12, 1)).repeat(100, 1) < 0.5
    found = difference({"SceneObjects": luck}, {"SceneObjects": np.zeros_like(luck)})
    expected = stats.ttest_1samp(100.0 * luck[:, 0], 0).confidence_interval(0.95)
    assert found.outer == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="two"):
        difference({"SceneObjects": luck[:1]}, {"SceneObjects": luck[:1]})


@pytest.mark.parametrize("seeds", [4, 16])
def test_intervals_hold_what_is_true_as_often_as_they_say(seeds):
    """Seeds, queries and what they do together all vary."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(300):
        parts = {"SceneObjects": (3, 20), "Scenes_i2t": (1, 40)}  # standard deviations of seeds and queries
        change = {
            name: (rng.normal(0, a, (seeds, 1)) + rng.normal(0, b, (1, 60)) + rng.normal(0, 60, (seeds, 60))) / 100
            for name, (a, b) in parts.items()
        }
        nothing = {name: np.zeros_like(own) for name, own in change.items()}
        low, high = difference(change, nothing).outer
        held += low < 0 < high
    assert 0.93 < held / 300 <= 0.99


def test_the_bootstrap_counts_the_residual_three_times():
    noise = np.random.default_rng(0).normal(0, 0.6, (100, 400))
    one, nothing = {"SceneObjects": noise}, {"SceneObjects": np.zeros_like(noise)}
    (low, high), (lowest, highest) = difference(one, nothing).outer, bootstrap(one, nothing)
    assert (highest - lowest) / (high - low) == pytest.approx(3**0.5, rel=0.1)


@pytest.mark.parametrize(
    ("inner", "outer", "verdict"),
    [
        ((0.4, 3), (0.1, 3.3), "better"),
        ((-3, -0.4), (-3.3, -0.1), "worse"),
        ((0.2, 0.9), (0.1, 1.1), "better, by less than a point"),
        ((-0.7, 0.9), (-0.9, 1.1), "equal"),
        ((-0.7, 1.2), (-0.9, 1.4), "not resolved"),
    ],
)
def test_verdicts(inner, outer, verdict):
    assert Difference(sum(inner) / 2, inner, outer, 16).verdict == verdict


def test_an_arm_is_stacked_by_seed():
    hits = {1: np.array([True, False]), 2: np.array([True, True])}
    rows = [{"arm": "x", "seed": str(seed)} | results.hit_rows({"SceneObjects": own})[0] for seed, own in hits.items()]
    assert np.array_equal(stacked(rows, "x", [2, 1])["SceneObjects"], np.stack([hits[2], hits[1]]))
    with pytest.raises(KeyError):
        stacked(rows, "x", [3])


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    scores = torch.tensor([[0.1, 1.0], [0.4, 1.0], [0.3, 2.0], [0.8, 3.0]])
    truth = torch.tensor([[False, True], [True, True], [False, True], [True, True]])
    assert probes.auc(scores, truth) == 1.0  # the second column does not vary
    truth[3, 0] = False
    assert probes.auc(scores, truth) == pytest.approx(2 / 3)  # above two of three


def test_a_probe_finds_what_is_linear():
    rng = torch.Generator().manual_seed(0)
    vectors = torch.randn(400, 8, generator=rng)
    truth = torch.stack([vectors[:, 0] + 0.3 > 0, torch.rand(400, generator=rng) > 0.5], dim=1)
    weights = probes.ridge(vectors[:300], truth[:300], 1.0)
    scores = torch.cat([vectors[300:].double(), torch.ones(100, 1).double()], 1) @ weights
    assert probes.auc(scores[:, :1], truth[300:, :1]) > 0.98
    assert 0.3 < probes.auc(scores[:, 1:], truth[300:, 1:]) < 0.7


def test_attributes_are_those_of_the_things():
    scene = Scene((Thing("star", "red", "solid", "large", 0), Thing("ring", "blue", "dotted", "small", 4)))
    found = probes.attributes([scene])
    assert found["colour"][0].tolist() == [colour in ("red", "blue") for colour in COLOURS]
    assert found["cell"][0].tolist() == [cell in (0, 4) for cell in range(9)]
    assert found["bound"].sum() == 2 and found["count"].tolist() == [[False]]


def test_decoding_goes_word_by_word(backbone, rows):
    """The first word is the likeliest with all hidden, the second one the likeliest behind the first."""
    captions = [row for row in rows if row.dataset == "Scenes_i2t"][:2]
    (ids, truth), _ = probes.decode(backbone, captions, "strict")
    assert backbone.tokenizer.decode(truth) == captions[0].text
    batch, model = batch_of(backbone, captions, "strict"), Reconstructor(backbone).eval()
    for place in range(2):
        with torch.inference_mode():
            tokens = model.predict(**batch).tokens
        now = [(tokens.positions == eos + 1 + place).nonzero().item() for eos in batch["eos_position"].tolist()]
        assert ids[place] == tokens.likeliest[now[0]]
        batch["input_ids"][0, batch["eos_position"] + 1 + place] = tokens.likeliest[now]


def test_every_study_s_phases_are_arguments(monkeypatch):
    """What is not run yet would at least be built: every option is one of the stage's."""
    monkeypatch.setattr(deciding, "best_rate", lambda *arms: 1e-3)
    arms = [deciding.phases_after(arm) for arm in deciding.ARMS]
    arms += [*factors.variants().values(), *beyond.arms(800).values()]
    for phases in arms:
        for phase in phases:
            arguments(phase, 1)
            if phase.beside:
                arguments(phase.beside, 1)
        assert phases[-1].stage == "contrastive" and phases[-1].options["max_steps"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_bridge_of_our_own_takes_a_step(lab, kind):
    frozen, start = Lab(lab.folder), Start("mini-qwen2-vl", 8, 5)
    phase = Phase(kind, {"max_steps": 1, "batch_size": 16, "warmup_steps": 0}, either_side=True)
    before, after = weights(frozen.load(start, form=Form())), weights(frozen.train(start, [phase]))
    assert sum(not torch.equal(after[name], weight) for name, weight in before.items()) > 50


def test_a_loss_beside_the_contrastive_one_has_gradients(lab):
    beside = Phase("final", {"batch_size": 8, "max_steps": 1})
    phase = Phase("contrastive", {"max_steps": 1, "batch_size": 8, "warmup_steps": 0}, beside=beside, beside_weight=0.5)
    start = Start("mini-qwen2-vl", 8, 5)
    one, other = (weights(lab.train(start, [each])) for each in (phase, replace(phase, beside=None)))
    changed = [name for name in one if not torch.equal(one[name], other[name])]
    assert len(changed) > 50


def test_layouts_share_the_rate_that_is_best_in_their_mean(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "RUNS", tmp_path)
    monkeypatch.setattr(deciding, "TUNING", tmp_path / "tuning.csv")
    scores = {"contrastive": (50, 60, 40), "published": (60, 66, 62, 1), "full": (61, 50, 62, 1), "ntp": (0, 1, 2)}
    rows = [
        {"pairs": deciding.PAIRS, "seed": deciding.TUNING_SEED, "arm": arm, "rate": rate, "All": value}
        for arm, values in scores.items()
        for rate, value in zip(deciding.rates_of(arm), values, strict=True)
    ]
    results.append(deciding.TUNING, [*rows, rows[0] | {"pairs": 1, "All": 99}, rows[2] | {"seed": 1, "All": 99}])
    _, second, third = deciding.RATES
    rates = {arm: deciding.phases_after(arm)[-2].options["learning_rate"] for arm in deciding.LAYOUTS}
    assert rates == dict.fromkeys(deciding.LAYOUTS, third)
    assert deciding.best_rate("published") == second and deciding.best_rate("ntp") == third
    assert {deciding.phases_after(arm)[-1].options["learning_rate"] for arm in ("full", "ntp", "contrastive")} == {5e-4}
    with pytest.raises(SystemExit, match="moca lacks rate"):
        deciding.best_rate("moca")


def test_the_best_bridge_is_confirmed_if_it_is_two_points_better(tmp_path, monkeypatch):
    monkeypatch.setattr(deciding, "best_rate", lambda *arms: 1e-3)
    monkeypatch.setattr(results, "RUNS", tmp_path)
    monkeypatch.setattr(factors, "RESULTS", tmp_path / "factors.csv")
    monkeypatch.setattr(beyond, "EXPLORED", tmp_path / "beyond.csv")
    same = {"backbone": beyond.BACKBONE, "pairs": beyond.PAIRS}
    published = [same | {"arm": arm, "seed": n, "All": 60.0} for arm in beyond.BASELINES for n in beyond.SEEDS]
    results.append(factors.RESULTS, [*published, published[0] | {"pairs": 4000, "All": 90.0}])
    with pytest.raises(SystemExit, match="has not been run on all seeds"):
        beyond.chosen()
    for best, chosen in ((61.9, []), (62.0, ["late bridge"])):
        beyond.EXPLORED.unlink(missing_ok=True)
        rows = [
            {"arm": arm, "seed": seed, "All": best if arm == "late bridge" else 60.5}
            for arm in beyond.arms(8)
            for seed in beyond.SEEDS
        ]
        results.append(beyond.EXPLORED, rows)
        assert beyond.chosen() == chosen
    rows = [same | {"arm": "strict", "seed": seed, "All": 63.0} for seed in beyond.SEEDS]
    factors.RESULTS.unlink()
    results.append(factors.RESULTS, [*(row for row in published if row["arm"] != "strict"), *rows])
    assert beyond.chosen() == ["strict"]


@pytest.mark.slow
def test_the_page_has_the_tables_of_the_files():
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.written(page) == page
    assert sorted(set(re.findall(r"<!-- (.*?) -->", page)) - {"end"}) == sorted(report.TABLES)


def test_all_but_the_first_run_share_stage_1():
    stages = mmeb_hours.stage_hours()
    alone = mmeb_hours.run_hours(stages)
    assert alone["published"] == alone["full"] == alone["strict"]
    assert alone["published"] + stages["1 joint reconstruction"] == pytest.approx(sum(stages.values()))
    assert mmeb_hours.stage_hours(tflops=800)["2 EOS-bridge"] == pytest.approx(stages["2 EOS-bridge"] / 2)


def rows_of(arm, seeds, hits):
    """Of a results file: every seed has the same hits by data set."""
    return [
        {"arm": arm, "seed": str(seed), "backbone": "mini-qwen2-vl", "seconds": "1"} | row
        for seed in seeds
        for row in results.hit_rows(hits)
    ]


def told_by(monkeypatch, make, deciding_rows, fresh_rows=()):
    files = {over_seeds.RESULTS: deciding_rows, beyond.CONFIRMED: list(fresh_rows)}
    monkeypatch.setattr(over_seeds, "read", files.__getitem__)
    return make()


def test_runs_that_hardly_learn_to_ground_are_counted(monkeypatch):
    hits = {share: {"SceneGrounding": np.arange(100) < share} for share in (84, 85, 95)}
    rows = [
        row for arm in over_seeds.ARMS for seed, own in enumerate(hits.values()) for row in rows_of(arm, [seed], own)
    ]
    told = told_by(monkeypatch, over_seeds.grounding_lost, rows, rows_of("strict", [301], hits[84]))
    assert "| published | 3 | 1 | 84.0 | 85.0 |" in told
    assert "| strict | 4 | 2 | 84.0 | 84.5 |" in told


def test_a_seed_alone_is_judged_by_its_queries(monkeypatch):
    more, less = {"SceneObjects": np.ones(200, bool)}, {"SceneObjects": np.arange(200) < 100}
    rows = [*rows_of("published", [1, 2, 3], more), *rows_of("full", [1, 2], less), *rows_of("full", [3], more)]
    fresh = [*rows_of("published", [301], less), *rows_of("full", [301], more)]
    told = told_by(monkeypatch, over_seeds.single_seeds, rows, fresh)
    assert "4 seeds" in told and "better in 2 and worse in 1" in told


def test_leads_are_told_of_old_seeds_new_ones_and_both(monkeypatch):
    more = {name: np.ones(50, bool) for name in ("SceneGrounding", "Scenes_t2i", "Scenes_i2t")}
    less = more | {"Scenes_t2i": np.zeros(50, bool)}
    rows = [
        row
        for one, other in (over_seeds.COMPARED, over_seeds.HIGH)
        for row in rows_of(one, [1, 2], more) + rows_of(other, [1, 2], less)
    ]
    fresh = rows_of("published", [301, 302], less) + rows_of("full", [301, 302], less)
    told = told_by(monkeypatch, over_seeds.leads, rows, fresh)
    assert "| 1 to 16 | +0.0 [+0.0, +0.0] | +100.0 [+100.0, +100.0] |" in told
    assert "| 301 to 308 | +0.0 [+0.0, +0.0] | +0.0 [+0.0, +0.0] |" in told
    assert "| all of them | +0.0 [+0.0, +0.0] | +50.0" in told


def test_only_what_was_confirmed_is_judged_on_fresh_seeds(monkeypatch):
    seeds, hits = beyond.FRESH, {"Scenes_i2t": np.arange(50) < 30}
    rows = [row for arm in ("full", "published", "final state") for row in rows_of(arm, seeds, hits)]
    told = told_by(monkeypatch, over_seeds.confirmed, [], rows)
    assert told.count("equal") == 2
    assert all("equal" in line for line in told.splitlines() if line.startswith("| final state"))


def test_embeddings_straight_after_a_bridge_have_seen_no_contrastive_step(monkeypatch):
    monkeypatch.setattr(deciding, "best_rate", lambda *arms: 1e-3)
    monkeypatch.setattr(beyond, "validated", lambda lab, phases: {"stages": [phase.stage for phase in phases]})
    done: dict[str, list[str]] = {}

    def work(path, tasks):
        for key, make in tasks:
            done[key["arm"]] = make()[0]["stages"]

    monkeypatch.setattr(beyond, "work", work)
    beyond.straight(SimpleNamespace(train=lambda start, phases, keep: phases))
    assert {"published", "full", "strict", "final state", "late bridge"} < set(done)
    assert all(len(stages) == 2 and "contrastive" not in stages for stages in done.values())
